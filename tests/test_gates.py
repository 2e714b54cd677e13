"""Gates: what they compare, against what they compare it, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import robustann as ra
from robustann.auditing import parse_gate, with_gates
from robustann.auditing.gates import METRICS, outcomes, parse_drop
from robustann.config import drops
from robustann.config.drops import check_same_data, matching, read_baselines, with_drops
from robustann.findings import Finding
from robustann.hardening.comparing import paired
from robustann.metrics import wilson_interval
from robustann.results import AuditResult, Certificate, Interval
from robustann.threat import ThreatModel

LINF = ThreatModel("linf", 0.1)
CHEAP = {"attacks": ["fgsm"], "trust": False, "curve": False, "explain": False}


@pytest.fixture(scope="module")
def result(digits, model_file) -> AuditResult:
    return ra.audit(ra.load_model(model_file), digits, LINF, max_samples=80, **CHEAP)


@pytest.fixture(scope="module")
def other(digits, model_file) -> AuditResult:
    """The same model on the same samples under a weaker attack."""
    asked = {**CHEAP, "attacks": ["pgd:steps=1,step_size=0.04,restarts=1"]}
    return ra.audit(ra.load_model(model_file), digits, LINF, max_samples=80, **asked)


def certified(result: AuditResult, held: list[bool]) -> AuditResult:
    low, high = wilson_interval(sum(held), len(held))
    found = Certificate(
        method="ibp", words="proven", eps=0.1, certified_accuracy=sum(held) / len(held),
        interval=Interval(low=low, high=high), certified=tuple(held), settings={}, curve=(),
        crossed=(),
    )  # fmt: skip
    return result.model_copy(update={"certificate": found})


# What a gate asks.


def test_a_demand_may_name_its_threat_model():
    assert parse_gate("robust_accuracy@l2 = 30/100") == ("robust_accuracy@l2", 0.3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("robust_accuracy", "metric=points"),
        ("robust=2", "did you mean 'robust_accuracy'"),
        ("robust_accuracy=-1", "from 0 to 100 percentage points"),
        ("robust_accuracy=101", "from 0 to 100 percentage points"),
        ("robust_accuracy=much", "finite number"),
        ("believable=1", "unknown gate metric 'believable'"),
    ],
)
def test_malformed_drops(text, says):
    with pytest.raises(ra.UsageError, match=says):
        parse_drop(text)


def test_outcomes_add_up_to_the_figures(result):
    (clean,) = outcomes(result, "clean_accuracy").values()
    (robust,) = outcomes(result, "robust_accuracy").values()
    assert sum(clean) / len(clean) == pytest.approx(result.clean_accuracy, abs=1e-6)
    assert sum(robust) / len(robust) == pytest.approx(result.robust_accuracy, abs=1e-6)
    assert 0 < sum(robust) < sum(clean)
    recalls = {c.name: (c.recall, c.support) for c in result.worst_case.scores.classes}
    for name, rows in outcomes(result, "worst_class_robust_recall").items():
        assert len(rows) == recalls[name][1]
        assert sum(rows) / len(rows) == pytest.approx(recalls[name][0], abs=1e-6)


def test_the_worst_class_is_asked_with_its_own_interval(result):
    groups = outcomes(result, "worst_class_robust_recall")
    least = min(sum(rows) / len(rows) for rows in groups.values())
    (gate,) = with_gates(result, {"worst_class_robust_recall": least}, "point").gates
    assert gate.passed
    assert gate.value == pytest.approx(least, abs=1e-6)
    assert least < result.robust_accuracy
    lowest = min(wilson_interval(sum(rows), len(rows))[0] for rows in groups.values())
    (gate,) = with_gates(result, {"worst_class_robust_recall": least}, "lower").gates
    assert not gate.passed
    assert gate.value == pytest.approx(lowest, abs=1e-6)
    assert gate.detail is not None
    assert gate.detail.startswith("class '")


def test_certified_accuracy_is_asked_where_there_is_a_certificate(result):
    held = [row % 4 == 0 for row in range(result.n)]
    proven = certified(result, held)
    (gate,) = with_gates(proven, {"certified_accuracy": 0.25}, "point").gates
    assert (gate.passed, gate.value) == (True, 0.25)
    (gate,) = with_gates(proven, {"certified_accuracy": 0.25}, "lower").gates
    assert gate.value == pytest.approx(wilson_interval(20, 80)[0], abs=1e-6)
    assert not gate.passed
    with pytest.raises(ra.UsageError, match="add --certify"):
        with_gates(result, {"certified_accuracy": 0.25})


@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_believable_is_one_or_nothing(result, verdict):
    finding = Finding(check="randomised", verdict=verdict, explanation="Seen.")
    checked = result.model_copy(update={"findings": (finding,)})
    (gate,) = with_gates(checked, {"believable": 1.0}).gates
    assert gate.passed == (verdict == "pass") == bool(gate.value)


# Against an earlier audit.


def baseline(result: AuditResult) -> drops.Baseline:
    return drops.Baseline(Path("before.json"), result)


def test_the_same_samples_are_compared_pair_by_pair(result, other):
    before, after = (
        outcomes(one, "robust_accuracy")[""] for one in (other, result)
    )  # fmt: skip
    wanted = paired(before, after)
    assert wanted.lost > 0
    point = with_drops(result, baseline(other), {"robust_accuracy": 100}, "point").gates[0]
    lower = with_drops(result, baseline(other), {"robust_accuracy": 100}, "lower").gates[0]
    assert point.value == pytest.approx(wanted.difference, abs=1e-6)
    assert lower.value == pytest.approx(wanted.interval.low, abs=1e-6)
    assert point.detail == "against 'before.json', paired on 80 samples"
    assert point.metric == "change_of_robust_accuracy"
    # One point less than it fell is too little, a hair more is enough.
    fell = -100 * wanted.difference
    for allowed, passed in ((fell - 0.1, False), (fell + 0.1, True), (fell, True)):
        asked = with_drops(result, baseline(other), {"robust_accuracy": allowed}, "point")
        assert asked.gates[0].passed is passed
    # What has risen has not fallen.
    assert with_drops(other, baseline(result), {"robust_accuracy": 0}, "point").gates[0].passed


def test_nothing_changed_is_a_fall_of_nothing(result):
    same = with_drops(result, baseline(result), {"clean_accuracy": 0}, "point").gates[0]
    assert (same.value, same.passed) == (0, True)
    # Evidence for less than a point takes more than 80 samples.
    assert not with_drops(result, baseline(result), {"clean_accuracy": 0.5}).gates[0].passed


def test_other_samples_are_compared_as_independent():
    # Newcombe (Statistics in Medicine 1998), table II, example (a): 56/70 against 48/80, method 10.
    first, second = [True] * 56 + [False] * 14, [True] * 48 + [False] * 32
    low = drops._change(second, first, same=False, on="lower")
    assert low == pytest.approx(0.0524, abs=5e-5)
    assert -drops._change(first, second, same=False, on="lower") == pytest.approx(0.3339, abs=5e-5)
    assert drops._change(second, first, same=False, on="point") == pytest.approx(0.2)


def test_a_smaller_audit_of_the_same_data_is_a_baseline_too(result, digits, model):
    few = ra.audit(model, digits, LINF, max_samples=50, **CHEAP)
    check_same_data(baseline(few), digits.test, digits.class_names)
    gate = with_drops(result, baseline(few), {"robust_accuracy": 50}, "point").gates[0]
    assert gate.value == pytest.approx(result.robust_accuracy - few.robust_accuracy, abs=1e-5)
    assert "80 samples against 50, not the same ones" in gate.detail


def test_the_class_that_fell_most_counts(result, other):
    before = outcomes(other, "worst_class_robust_recall")
    after = outcomes(result, "worst_class_robust_recall")
    falls = [sum(after[c]) / len(after[c]) - sum(before[c]) / len(before[c]) for c in after]
    asked = {"worst_class_robust_recall": 0}
    gate = with_drops(result, baseline(other), asked, "point").gates[0]
    assert gate.value == pytest.approx(min(falls), abs=1e-6)
    assert gate.value < 0
    assert not gate.passed


def test_a_baseline_without_certificate(result):
    proven = certified(result, [True] * result.n)
    with pytest.raises(ra.UsageError, match=r"'before.json' does not fit: .*certif"):
        with_drops(proven, baseline(result), {"certified_accuracy": 1})


def test_a_baseline_in_another_threat_model(result):
    assert matching([baseline(result)], LINF).result is result
    for threat in (ThreatModel("l2", 0.1), ThreatModel("linf", "8/255")):
        with pytest.raises(ra.UsageError, match=r"got linf 0\.1 in 'before\.json'"):
            matching([baseline(result)], threat)


def test_a_baseline_of_other_data(result, digits):
    found = baseline(result)
    check_same_data(found, digits.test, digits.class_names)
    for split, names in [
        (digits.train, digits.class_names),
        (digits.test.subset(range(40)), digits.class_names),
        (digits.test, [*digits.class_names[:-1], "other"]),
    ]:
        with pytest.raises(ra.UsageError, match=r"on the same data, got 'before\.json'"):
            check_same_data(found, split, names)


def test_baselines_of_a_folder(result, tmp_path):
    with pytest.raises(ra.UsageError, match=r"no results\.json"):
        read_baselines(tmp_path)
    for name in ("linf-0.1", "l2-0.5"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.json").write_text(result.to_json())
    (tmp_path / "summary.json").write_text("{}")
    assert len(read_baselines(tmp_path)) == len(read_baselines(tmp_path / "summary.json")) == 2
    (tmp_path / "results.json").write_text(result.to_json())
    assert len(read_baselines(tmp_path)) == 3
    assert [one.path for one in read_baselines(tmp_path / "results.json")] == [
        tmp_path / "results.json"
    ]


def test_every_metric_can_be_demanded(result):
    finding = Finding(check="randomised", verdict="pass", explanation="Fine.")
    whole = certified(result, [True] * result.n).model_copy(update={"findings": (finding,)})
    gates = with_gates(whole, dict.fromkeys(METRICS, 0.01)).gates
    assert [gate.metric for gate in gates] == list(METRICS)
    again = AuditResult.model_validate_json(json.dumps({
        **json.loads(result.to_json()), "gates": [g.model_dump(mode="json") for g in gates],
    }))  # fmt: skip
    assert again.gates == gates
