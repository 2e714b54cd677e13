"""Audits of broken defenses: flagged for what they are, and brought down to what they hide."""

from __future__ import annotations

import pytest
from zoo import ZOO

import robustann as ra

THREAT = ra.ThreatModel("linf", eps=0.1)


def audited(model, digits: ra.ImageData) -> ra.AuditResult:
    return ra.audit(model, digits, THREAT, "quick", max_samples=100, explain=False, curve=False)


@pytest.fixture(scope="module")
def undefended(model_file, digits) -> ra.AuditResult:
    return audited(ra.load_model(model_file), digits)


def test_an_undefended_model_is_believed(undefended):
    assert undefended.believable
    assert undefended.robust_accuracy < undefended.clean_accuracy - 0.2


# No gradient, and next to no score to search by: told not to be believed, but not broken.
STANDING = ("thermometer", "argmax head")


@pytest.mark.parametrize("name", ZOO)
def test_a_broken_defense_is_flagged_and_broken(name, model, digits, undefended):
    result = audited(ZOO[name].make(model), digits)
    failed = {finding.check for finding in result.findings if finding.verdict == "fail"}
    assert ZOO[name].check in failed
    assert result.clean_accuracy > 0.5
    if name in STANDING:
        assert not result.believable
    else:
        assert result.robust_accuracy <= undefended.robust_accuracy + 0.02
