"""What is done about gradients that mislead: in every norm, and no more believed than found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn
from zoo import ZOO

import robustann as ra
from robustann.attacks import APGD, MM, RayS, Square
from robustann.auditing import AuditConfig
from robustann.auditing.inner import Part
from robustann.auditing.mending import mends
from robustann.auditing.presets import get_preset
from robustann.auditing.remedies import plan, withdrawn
from robustann.findings import Finding
from robustann.trust import Diagnosis
from robustann.trust.checks import conclude

EPS = {"linf": 0.1, "l2": 0.5, "l1": 1.4}
PART = Part("inner", nn.Identity(), 1.0)


def shattered(value: float = 2.0) -> Diagnosis:
    found = conclude("gradient-shattered", True, "Made up.", value=value)
    return Diagnosis((found,), gradient_unreliable=True)


def planned(norm: str, part: Part | None, found: Diagnosis, preset: str = "quick"):
    threat = ra.ThreatModel(norm, EPS[norm])
    stages = AuditConfig(threat=threat, preset=preset).stages
    return plan(nn.Identity(), stages, found, threat, queries=100, part=part)


@pytest.mark.parametrize("preset", ["quick", "standard"])
@pytest.mark.parametrize("norm", EPS)
def test_where_gradients_mislead_the_cascade_follows_through_the_part(norm, preset):
    """All that owes to gradients and starts afresh, whatever the norm adds to the cascade."""
    made = planned(norm, PART, shattered(), preset)
    stages = AuditConfig(threat=ra.ThreatModel(norm, EPS[norm]), preset=preset).stages
    afresh = {
        stage.attack
        for stage in stages
        if stage.attack.access == "white-box" and "start=best" not in stage.attack.label
    }
    through = [stage for stage in made.stages if stage.through]
    assert afresh <= {stage.attack for stage in through}
    assert all(stage.near is None and stage.share == 1 for stage in through)
    assert any(isinstance(stage.attack, APGD) for stage in through) == (
        norm == "l1" or preset == "standard"
    )
    # The part may be as rough as the whole.
    assert made.findings[0].remedy is None
    threat = ra.ThreatModel(norm, EPS[norm])
    (mend,) = mends(["gradient-shattered"], made, threat, get_preset(preset), escalated=False)
    assert mend.until_settled


@pytest.mark.parametrize("norm", EPS)
def test_where_gradients_are_missing_a_short_cascade_has_more_rounds(norm):
    found = conclude("gradient-missing", True, "Made up.", value=1.0)
    missing = Diagnosis((found,), gradient_missing=True, gradient_partly_missing=True)
    made = planned(norm, PART, missing)
    through = [stage.attack for stage in made.stages if stage.through]
    assert {MM(steps=15), MM(), MM(rank=2), MM(leak=0.0)} <= set(through)
    assert len(set(through)) == len(through)
    assert made.only_seen


def test_where_gradients_mislead_and_there_is_no_part_rounds_have_to_settle():
    """One search from scratch, which may find nothing, is no answer."""
    made = planned("l2", None, shattered())
    assert [one.label for one in made.searches] == ["square:queries=100"]
    (found,) = made.findings
    assert found.remedy is None
    assert "square:queries=100" in found.explanation
    threat = ra.ThreatModel("l2", 0.5)
    (mend,) = mends(["gradient-shattered"], made, threat, get_preset("quick"), escalated=False)
    assert mend.until_settled
    assert mend.stages[-1].attack == MM(restarts=4)
    # More of what leads nowhere is no remedy.
    wrong = conclude("gradient-mismatch", True, "Made up.", value=1.0)
    lost = replace(made, findings=(found, wrong))
    assert not mends(["gradient-shattered"], lost, threat, get_preset("quick"), escalated=False)


def test_a_part_that_a_search_beats_is_no_answer():
    wrong = conclude("gradient-mismatch", True, "Made up.", value=0.5)
    made = planned("l2", PART, Diagnosis((wrong,), gradient_unreliable=True))
    assert made.findings[0].remedy is not None
    (found,) = withdrawn(replace(made, searches=()), made.findings, ())
    assert found.remedy == made.findings[0].remedy
    beaten = conclude("black-box-wins", True, "Made up.", value=0.1)
    found, _ = withdrawn(replace(made, searches=()), (*made.findings, beaten), ())
    assert found.remedy is None
    assert "break more than attacks through its part" in found.explanation


def test_a_part_of_a_model_whose_gradient_is_useless_answers_that_it_is_rough():
    """It is not the part's gradient that was looked at."""
    rough, wrong = (
        conclude(check, True, "Made up.", value=value)
        for check, value in (("gradient-shattered", 2.0), ("gradient-mismatch", 1.0))
    )
    made = planned("l2", PART, Diagnosis((rough, wrong), gradient_unreliable=True))
    assert all(one.remedy is not None for one in made.findings)
    # A search that the budget left out takes that back, whatever it was for.
    assert made.searches
    assert all(one.remedy is None for one in withdrawn(made, made.findings, ()))


def test_a_search_that_ran_already_is_not_bought_again():
    """A model that optimises while it predicts, and jumps too."""
    threat = ra.ThreatModel("linf", 0.1)
    preset = get_preset("quick")
    found = conclude("dynamic-defense", True, "Made up.")
    made = planned("linf", None, Diagnosis((found,), dynamic=True))
    made = replace(made, searches=(Square(queries=1000), RayS(queries=1000)))
    for check in ("discontinuous", "unbounded-attack"):
        (mend,) = mends([check], made, threat, preset, escalated=False)
        # The last of them tells whether more would break more.
        assert [stage.label for stage in mend.stages] == ["rays:queries=1000"]
        fresh = replace(made, searches=())
        (mend,) = mends([check], fresh, threat, preset, escalated=False)
        assert len(mend.stages) == 2


def test_winners_that_take_all_get_more_rounds_and_are_not_believed(model, digits):
    threat, asked = ra.ThreatModel("l2", 0.5), {"explain": False, "curve": False}
    result = ra.audit(
        ZOO["k winners take all"].make(model), digits, threat, "quick", max_samples=24, **asked
    )
    found: Finding = next(one for one in result.findings if one.check == "gradient-shattered")
    assert found.verdict == "fail"
    rounds = [one for one in result.attacks if "(remedy)" in one.label]
    assert rounds[0].label in f"{found.remedy} {found.explanation}"
    # Rounds that settle there may have settled too early.
    assert found.remedy is None
    assert not result.believable


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_levels_before_the_network_are_climbed_as_they_are(norm, model, digits):
    """Through the network alone, whose gradient is that of another image, more would stand."""
    threat = ra.ThreatModel(norm, EPS[norm])
    exhibit = ZOO["thermometer"]
    assert exhibit.known is not None
    asked = {"max_samples": 40, "explain": False, "curve": False}
    result = ra.audit(exhibit.make(model), digits, threat, "quick", **asked)
    found = next(one for one in result.findings if one.check == "gradient-missing")
    assert "through the model as if" in f"{found.remedy} {found.explanation}"
    known = ra.audit(exhibit.known(model), digits, threat, "quick", **asked)
    assert result.robust_accuracy <= known.robust_accuracy
