"""Audits through a surrogate: what fools another model is tried on the audited one."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn
from zoo import Closed

import robustann as ra
from robustann.cli import main
from robustann.errors import ModelError

THREAT = ra.ThreatModel("linf", eps=0.1)


def audited(model, digits, **options) -> ra.AuditResult:
    """Noise and the surrogate alone: what else there is would find the same."""
    settings = {"attacks": ["noise:draws=1", "fgsm"], "trust": False, "max_samples": 40}
    return ra.audit(model, digits, THREAT, curve=False, explain=False, **{**settings, **options})


def transfer_of(result: ra.AuditResult):
    return next(one for one in result.attacks if one.label == "transfer")


def test_a_closed_model_falls_to_its_copy(model, digits):
    flags = [module.training for module in model.modules()]
    options = {"max_samples": 40, "curve": False, "explain": False}
    alone = ra.audit(Closed(model), digits, THREAT, "quick", budget=60, **options)
    result = ra.audit(Closed(model), digits, THREAT, "quick", budget=60, surrogate=model, **options)
    assert transfer_of(result).access == "decision"
    assert result.robust_accuracy < alone.robust_accuracy - 0.1
    found = {one.check: one for one in result.findings}
    assert found["surrogate-disagrees"].verdict == "pass"
    assert found["surrogate-disagrees"].value == 0
    assert [module.training for module in model.modules()] == flags


def test_what_crafting_costs_is_counted_and_hangs_on_no_batch(model, digits):
    first = audited(model, digits, surrogate=model, batch_size=7)
    second = audited(model, digits, surrogate=model, batch_size=32)
    assert transfer_of(first).samples == transfer_of(second).samples
    one = transfer_of(first)
    stands = [
        row
        for row, (cost, fell) in enumerate(
            zip(one.samples.forwards, one.samples.success, strict=True)
        )
        if cost and not fell
    ]
    assert stands
    # 25, 20 and 50 steps, and a look at each end.
    assert {one.samples.backwards[row] for row in stands} == {95}
    assert {one.samples.forwards[row] for row in stands} == {98}


def test_a_stranger_is_told_and_takes_no_trust_from_the_rest(model, digits):
    torch.manual_seed(0)
    stranger = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    result = audited(model, digits, surrogate=stranger, trust=True)
    found = {one.check: one for one in result.findings}
    assert found["surrogate-disagrees"].verdict == "fail"
    assert found["surrogate-disagrees"].remedy is not None


def test_a_surrogate_answers_for_the_same_classes(model, digits):
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ModelError, match="got one with 3 logits"):
        audited(model, digits, surrogate=other)


def test_on_the_command_line(model_file, tmp_path, monkeypatch):
    arguments = ["audit", "--model", str(model_file), "--surrogate", str(model_file), "--data",
                 "digits", "--eps", "0.1", "--preset", "quick", "--max-samples", "20",
                 "--no-explain", "--no-curve", "--no-trust", "--quiet",
                 "--output-dir", str(tmp_path)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["robustann", *arguments])
    assert main._run() == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert "transfer" in [one["label"] for one in results["attacks"]]
