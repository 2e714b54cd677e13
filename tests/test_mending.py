"""Remedies for attacks that were found wanting: on all that stands, counted, told, and the same
whoever stops, cuts or shares the audit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from zoo import InOnePiece, Wrapped

import robustann as ra
from robustann.attacks import MM
from robustann.auditing import Audit, AuditConfig, presets, runner
from robustann.auditing.mending import labelled_mends, mends
from robustann.auditing.passes import Passes
from robustann.auditing.presets import get_preset, labelled
from robustann.auditing.remedies import Plan
from robustann.findings import Finding, unresolved
from robustann.trust import Probed
from robustann.trust.checks import CHECKS, conclude

THREAT = ra.ThreatModel("linf", eps=0.1)
ASKED = {"preset": "quick", "max_samples": 48, "batch_size": 16}
BRIEF = {**ASKED, "explain": False, "curve": False}
WITH_CURVE = {**ASKED, "explain": False, "max_samples": 24, "batch_size": 8}
OF_SUCCESS = ("randomised", "batch-dependent", "training-mode", "certificate-crossed")
MENDED = ("single-step-wins", "noise-wins", "rising-curve", "loss-choice", "restarts-help",
          "steps-help", "incomplete-optimisation", "black-box-wins")  # fmt: skip


def finding(result: ra.AuditResult, check: str) -> Finding:
    return next(one for one in result.findings if one.check == check)


def lasting(result: ra.AuditResult) -> dict:
    values = json.loads(result.to_json())
    del values["execution"]
    return values


def remedies(result: ra.AuditResult) -> list:
    return [one for one in result.attacks if "(remedy" in one.label]


def doubting(monkeypatch, *checks: str) -> None:
    """Let the experiments fail these checks, whatever they see."""

    def probe(*args, **kwargs) -> Probed:
        return Probed(tuple(conclude(check, True, "Made up.") for check in checks), 7)

    monkeypatch.setattr(runner, "probe", probe)


def weaken(monkeypatch) -> None:
    """Let nothing break before the remedies."""
    stages = (runner.Stage(MM(steps=1, step_scale=1e-6)),)
    monkeypatch.setattr(AuditConfig, "stages", property(lambda self: stages))
    monkeypatch.setattr(AuditConfig, "check", property(lambda self: ()))


@pytest.fixture(scope="module")
def plain(model_file, digits) -> ra.AuditResult:
    return ra.audit(ra.load_model(model_file), digits, THREAT, **BRIEF)


def test_nobody_pays_where_nothing_is_wrong(plain):
    assert remedies(plain) == []
    assert plain.believable


@pytest.mark.parametrize("check", MENDED)
def test_each_failed_check_is_answered_on_all_that_stands(check, model, digits, plain, monkeypatch):
    doubting(monkeypatch, check)
    result = ra.audit(model, digits, THREAT, **BRIEF)
    found = finding(result, check)
    assert found.verdict == "fail"
    standing = sum(one is None for one in plain.worst_case.broken_by)
    wrong = sum(
        a != b for a, b in zip(plain.clean_samples.prediction, plain.clean_samples.label,
                               strict=True)
    )  # fmt: skip
    ran = remedies(result)
    assert ran[0].attempted == standing - wrong
    assert all(one.label in (found.remedy or "") for one in ran if one.name != "square")
    assert result.believable
    # Of the same attacks the figures are the same, and what was added is counted.
    assert result.attacks[: -len(ran)] == plain.attacks
    spent = sum(one.forwards + one.backwards for one in ran)
    assert spent > 0
    assert sum(result.worst_case.propagations) == sum(plain.worst_case.propagations) + spent
    assert result.robust_accuracy <= plain.robust_accuracy


class Parity(nn.Module):
    """Two classes: whether a digit is even or odd."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        logits = self.inner(x)
        return torch.stack([logits[:, 0::2].amax(1), logits[:, 1::2].amax(1)], 1)


def test_of_two_classes_no_round_goes_to_a_second_runner_up(model, digits, monkeypatch):
    """That nobody is left for it is no lack of budget, nor does it tell that rounds add nothing."""
    parts = {
        name: getattr(digits, name).relabelled(getattr(digits, name).labels % 2)
        for name in ("train", "validation", "test")
    }
    two = replace(digits, **parts, class_names=("even", "odd"))
    result = ra.audit(Parity(model), two, THREAT, **BRIEF)
    assert finding(result, "restarts-help").verdict == "not run"
    assert result.believable
    doubting(monkeypatch, "restarts-help")
    result = ra.audit(Parity(model), two, THREAT, **BRIEF)
    found = finding(result, "restarts-help")
    assert found.remedy is not None
    assert "budget" not in found.remedy
    assert "rank" not in found.remedy
    assert result.believable


def test_an_attack_that_never_ends_is_answered_by_nothing_but_its_success(
    model, digits, monkeypatch
):
    doubting(monkeypatch, "unbounded-attack")
    result = ra.audit(model, digits, THREAT, **BRIEF)
    found = finding(result, "unbounded-attack")
    assert [one.name for one in remedies(result)] == ["square", "rays"]
    assert found.remedy is None
    assert "proves little" in found.explanation
    assert not result.believable


@pytest.mark.parametrize("eps", [0.5, 1e-4])
def test_where_nothing_stands_only_doubts_of_success_count(eps, model, digits, monkeypatch):
    doubting(monkeypatch, *CHECKS)
    threat, asked = ra.ThreatModel("linf", eps=eps), {**BRIEF, "max_samples": 16}
    # The caller named the attacks: no remedy follows.
    result = ra.audit(model, digits, threat, **asked, attacks=("pgd",))
    assert (result.robust_accuracy == 0) == (eps == 0.5)
    assert [one.check for one in result.findings if one.verdict == "fail"] == [*CHECKS]
    doubtful = [*CHECKS] if eps < 0.5 else [*OF_SUCCESS]
    assert [one.check for one in unresolved(result.findings)] == doubtful
    assert not result.believable
    doubting(monkeypatch, *set(CHECKS) - set(OF_SUCCESS))
    result = ra.audit(model, digits, threat, **asked, attacks=("pgd",))
    assert result.believable == (eps == 0.5)


def test_images_of_smaller_eps_count(model, digits, monkeypatch):
    doubting(monkeypatch, "rising-curve")
    result = ra.audit(model, digits, THREAT, attacks=("fgsm",), max_samples=48)
    # The caller named the attacks: nothing is added, and the doubt stays.
    assert remedies(result) == []
    assert not result.believable
    (mend,) = mends(
        ["rising-curve"], Plan(model, (), 1, True, ()), THREAT, get_preset("quick"), escalated=False
    )
    assert [getattr(stage, "reach", 1) for stage in mend.stages] == [0.75, 0.5, 0.25]


def test_attacks_within_smaller_eps_stay_there(model, digits, monkeypatch):
    doubting(monkeypatch, "rising-curve")
    weaken(monkeypatch)
    result = ra.audit(model, digits, THREAT, **BRIEF)
    for one, reach in zip(remedies(result), (0.75, 0.5, 0.25), strict=True):
        distances = [d for d, hit in zip(one.samples.distance, one.samples.success, strict=True)
                     if hit]  # fmt: skip
        assert all(d <= reach * THREAT.eps + 1e-6 for d in distances if d is not None)
    assert sum(one.added for one in remedies(result)) > 0


def test_a_budget_that_is_spent_leaves_the_doubt(model, digits, monkeypatch):
    doubting(monkeypatch, "steps-help")
    result = ra.audit(model, digits, THREAT, **BRIEF, budget=20)
    found = finding(result, "steps-help")
    assert found.remedy is None
    assert "There was no budget for attacks of two and four times the steps" in found.explanation


@pytest.mark.parametrize(("budget", "answered"), [(300, False), (2000, True)])
def test_a_remedy_that_a_budget_cuts_short_is_none(budget, answered, model, digits, monkeypatch):
    doubting(monkeypatch, "steps-help")
    monkeypatch.setattr(AuditConfig, "check", property(lambda self: ()))
    result = ra.audit(model, digits, THREAT, **BRIEF, budget=budget)
    found = finding(result, "steps-help")
    standing = sum(one.attempted for one in remedies(result)[-1:])
    # It did begin on all of them.
    assert standing == remedies(result)[0].attempted - remedies(result)[0].added > 0
    assert (found.remedy is not None) == answered
    assert ("cut that short" in found.explanation) != answered


def test_a_curve_takes_nothing_from_the_budget_of_remedies(model, digits, monkeypatch):
    doubting(monkeypatch, "steps-help")
    found = [
        ra.audit(model, digits, THREAT, **WITH_CURVE | {"curve": curve}, budget=450)
        for curve in (True, False)
    ]
    spent = [[(one.label, one.forwards, one.backwards) for one in remedies(result)]
             for result in found]  # fmt: skip
    assert spent[0] == spent[1]
    assert sum(forwards for _, forwards, _ in spent[0]) > 0


def test_a_remedy_for_what_is_near_to_falling_leaves_the_others_out(model, digits, monkeypatch):
    doubting(monkeypatch, "black-box-wins")
    near = (runner.Stage(MM(steps=2), near=1e-6),)
    quick = replace(get_preset("quick"), escalation=near, queries=50)
    monkeypatch.setitem(presets.PRESETS, "quick", quick)
    monkeypatch.setattr(AuditConfig, "check", property(lambda self: ()))
    found = finding(ra.audit(model, digits, THREAT, **BRIEF), "black-box-wins")
    assert "no budget" not in found.explanation
    assert "All that stood" in (found.remedy or "")


def test_what_still_adds_is_no_answer(model, digits, monkeypatch):
    doubting(monkeypatch, "steps-help")
    monkeypatch.setattr("robustann.auditing.mending._SETTLED", -1.0)
    genuine = Passes.third

    def lucky(self, batch, stages, advance):
        batch = genuine(self, batch, stages, advance)
        (last,) = [label for label, _ in stages][-1:]
        rows = (~batch.worst.success & batch.correct).nonzero().squeeze(1)[:2]
        batch.attacks[last]["success"][rows] = True
        return batch

    monkeypatch.setattr(Passes, "third", lucky)
    result = ra.audit(model, digits, THREAT, **BRIEF)
    found = finding(result, "steps-help")
    assert found.remedy is None
    assert "more would break more" in found.explanation


DOUBTS = ("noise-wins", "steps-help", "black-box-wins")


@pytest.fixture(scope="module")
def doubted(model_file, digits) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        doubting(patch, *DOUBTS)
        return lasting(ra.audit(ra.load_model(model_file), digits, THREAT, **WITH_CURVE))


class StoppedError(Exception):
    pass


def test_stopped_in_the_midst_of_remedies_it_goes_on_and_ends_the_same(
    model, digits, tmp_path, monkeypatch, doubted
):
    genuine, begun = Passes.third, []

    def stopping(self, *args):
        begun.append(1)
        if len(begun) == 2:
            raise StoppedError
        return genuine(self, *args)

    state = tmp_path / "state"
    doubting(monkeypatch, *DOUBTS)
    with monkeypatch.context() as patch:
        patch.setattr(Passes, "third", stopping)
        with pytest.raises(StoppedError):
            ra.audit(model, digits, THREAT, **WITH_CURVE, state=state)
    assert len(list(state.glob("audit-*/batch-*.3.pt"))) == 1
    # What was seen is not looked at again: a second look need not see the same.
    doubting(monkeypatch, "loss-choice")
    again = ra.audit(model, digits, THREAT, **{**WITH_CURVE, "batch_size": 7}, state=state)
    assert lasting(again) == doubted
    assert not state.exists()


def test_batches_and_shared_work_change_nothing(model, digits, tmp_path, monkeypatch, doubted):
    doubting(monkeypatch, *DOUBTS)
    other = ra.audit(model, digits, THREAT, **{**WITH_CURVE, "batch_size": 7})
    assert lasting(other) == doubted
    shared = ra.audit(model, digits, THREAT, **WITH_CURVE, state=tmp_path / "state", shared=True)
    assert lasting(shared) == doubted


def test_explanations_show_what_remedies_found(model, digits, monkeypatch):
    doubting(monkeypatch, "noise-wins", "steps-help")
    weaken(monkeypatch)
    kept = []

    def explainer(model, cases, class_names, seed):
        kept.append(cases)

    told = []
    config = AuditConfig(threat=THREAT, **ASKED, curve=False)
    result = Audit(config).run(
        model,
        digits.test,
        class_names=digits.class_names,
        explainer=explainer,
        notify=told.append,
    )
    assert told[-1] == ("the attacks were found wanting (noise-wins, steps-help): remedies follow")
    assert result.robust_accuracy < result.clean_accuracy
    (cases,) = kept
    assert int(cases.success.sum()) > 0
    for row in cases.success.nonzero().squeeze(1).tolist():
        assert "(remedy" in cases.attack[row]
        said = model(cases.attacked[row][None]).argmax(1)
        assert said == cases.attacked_prediction[row] != cases.label[row]
        assert torch.equal(cases.nearest[row], cases.attacked[row])


def test_labels_tell_remedies_apart(model):
    plan = Plan(model, (), 1, True, ())
    found = mends(MENDED, plan, THREAT, get_preset("standard"), escalated=False)
    labels = [label for label, _ in labelled_mends(found)]
    assert len(set(labels)) == len(labels)
    assert labels.count("square (remedy)") == 1


@pytest.mark.parametrize("preset", ["quick", "standard", "thorough"])
def test_a_number_never_stands_without_the_ones_before_it(preset, model):
    config = AuditConfig(threat=THREAT, preset=preset)
    always = (*config.stages, *config.check)
    plan = Plan(model, (), 1, True, ())
    found = mends(MENDED, plan, THREAT, get_preset(preset), escalated=False)
    for stages in (labelled(always), labelled((*always, *config.escalation)),
                   labelled_mends(found)):  # fmt: skip
        labels = [label for label, _ in stages]
        assert len(set(labels)) == len(labels)
        for label in labels:
            name, _, number = label.partition("#")
            assert {name, *(f"{name}#{k}" for k in range(2, int(number or 1)))} <= {*labels}
            assert number != "1"


def test_in_l0_there_is_no_search(model):
    plan, threat = Plan(model, (), 1, True, ()), ra.ThreatModel("l0", eps=2)
    (mend,) = mends(["noise-wins"], plan, threat, get_preset("quick"), escalated=False)
    assert [stage.attack.name for stage in mend.stages] == ["noise"]
    assert not mend.enough
    assert mends(["black-box-wins"], plan, threat, get_preset("quick"), escalated=True) == ()


# ------------------------------------------------------------------ defenses that call for them


class Staircase(InOnePiece):
    """A staircase that is smooth: its slope is nearly zero almost everywhere, but not zero."""

    def forward(self, x):
        level = 16 * x
        floor = level.floor()
        return self.inner((floor + torch.sigmoid(40 * (level - floor - 0.5))) / 16)


class Unlike(Wrapped):
    """Answers more surely where somebody wants a gradient."""

    def forward(self, x):
        logits = self.inner(x)
        sure = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1])
        return logits + 30 * sure if x.requires_grad else logits


@pytest.mark.parametrize(
    ("make", "checks"),
    [(Staircase, {"single-step-wins"}), (Unlike, {"incomplete-optimisation", "steps-help"})],
)
def test_a_defense_found_out_by_experiments_is_answered(make, checks, model, digits):
    asked = {"max_samples": 100, "explain": False, "curve": False}
    reference = ra.audit(model, digits, THREAT, "quick", **asked)
    result = ra.audit(make(model), digits, THREAT, "quick", **asked)
    failed = {one.check for one in result.findings if one.verdict == "fail"}
    assert failed & checks
    assert unresolved(result.findings) == ()
    assert remedies(result)
    assert result.robust_accuracy <= reference.robust_accuracy + 0.02
