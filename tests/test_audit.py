"""Audits: every figure is recomputed from the samples, and none hangs on the batch size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attacking import lasting
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import nn
from zoo import Quantised

import robustann as ra
from robustann.attacks import PGD, engine
from robustann.attacks.engine import predict_logits
from robustann.auditing import AuditConfig, parse_gate, passes, runner, with_gates
from robustann.auditing.batching import find_batch_size

THREAT = ra.ThreatModel("linf", eps=0.1)


# The search that a share of the samples goes through at the end of the preset "quick".
CHECK = "square:queries=200"
NAMED = ["noise", "fgsm", "pgd:steps=20", "pgd:steps=20,loss=margin"]


@pytest.fixture(scope="module", params=["cascade", "named"])
def result(request, model_file, digits):
    """A preset, whose attacks follow each other, and attacks named one by one."""
    attacks = NAMED if request.param == "named" else None
    return ra.audit(ra.load_model(model_file), digits, THREAT, preset="quick", attacks=attacks)


def assert_scores(scores, labels, predictions):
    labels, predictions = np.array(labels), np.array(predictions)
    n, p = len(labels), float((labels == predictions).mean())
    assert scores.accuracy == pytest.approx(p, rel=1e-5)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predictions, labels=range(10), zero_division=0
    )
    assert scores.precision == pytest.approx(precision.mean(), rel=1e-5)
    assert scores.recall == pytest.approx(recall.mean(), rel=1e-5)
    assert scores.f1 == pytest.approx(f1.mean(), rel=1e-5)
    assert [c.support for c in scores.classes] == support.tolist()
    assert [c.precision for c in scores.classes] == pytest.approx(precision.tolist(), rel=1e-5)
    assert np.array_equal(scores.confusion, confusion_matrix(labels, predictions, labels=range(10)))
    # Wilson's interval, from its formula.
    z = 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert scores.interval.low == pytest.approx(centre - half, rel=1e-4, abs=1e-6)
    assert scores.interval.high == pytest.approx(centre + half, rel=1e-4)


def test_figures_follow_from_the_samples(result, digits):
    labels = digits.test.labels.tolist()
    assert list(result.clean_samples.label) == labels
    assert list(result.clean_samples.index) == list(range(360))
    assert result.clean_accuracy > 0.95
    assert_scores(result.clean, labels, result.clean_samples.prediction)
    correct = [p == y for p, y in zip(result.clean_samples.prediction, labels, strict=True)]
    standing = list(correct)
    broken_by = [None] * len(labels)
    assert result.cascade == (result.attacks[1].name == "mm")
    for attack in result.attacks:
        samples = attack.samples
        assert_scores(attack.scores, labels, samples.prediction)
        attempted = list(standing) if result.cascade else correct
        if attack.label == CHECK:
            drawn = [count > 0 for count in samples.forwards]
            assert 0 < sum(drawn) < sum(attempted)
            assert all(was for was, went in zip(attempted, drawn, strict=True) if went)
            attempted = drawn
        assert attack.attempted == sum(attempted)
        assert [count > 0 for count in samples.forwards] == attempted
        assert attack.succeeded == sum(samples.success)
        assert attack.success_rate == pytest.approx(attack.succeeded / attack.attempted, rel=1e-5)
        assert attack.forwards == sum(samples.forwards)
        assert attack.backwards == sum(samples.backwards)
        added = 0
        for row, fell in enumerate(samples.success):
            assert fell == (attempted[row] and samples.prediction[row] != labels[row])
            assert (samples.distance[row] is not None) == fell
            if fell:
                assert samples.distance[row] <= THREAT.eps
                assert correct[row]
                added += standing[row]
                standing[row] = False
                broken_by[row] = broken_by[row] or attack.label
        assert attack.added == added
    assert result.robust_accuracy == pytest.approx(sum(standing) / len(labels), rel=1e-5)
    assert list(result.worst_case.broken_by) == broken_by
    assert_scores(result.worst_case.scores, labels, result.worst_case.prediction)
    spent = [attack.samples for attack in result.attacks]
    assert list(result.worst_case.propagations) == [
        sum(samples.forwards[row] + samples.backwards[row] for samples in spent)
        for row in range(len(labels))
    ]
    if result.cascade:
        assert result.attacks[-1].scores == result.worst_case.scores
    assert result.trust_propagations > 0
    assert result.propagations == 360 + result.curve_propagations + result.trust_propagations + sum(
        attack.forwards + attack.backwards for attack in result.attacks
    )


def test_attacks_are_ordered_as_theory_says(model, digits):
    named = ra.audit(model, digits, THREAT, attacks=NAMED, curve=False, explain=False)
    noise, fgsm, _, margin = (attack.success_rate for attack in named.attacks)
    assert noise < fgsm < margin
    cascade = ra.audit(model, digits, THREAT, preset="quick", curve=False, explain=False)
    assert cascade.robust_accuracy <= named.robust_accuracy < named.clean_accuracy - 0.2


def test_budget_caps_what_an_image_costs(model, digits):
    asked = {"curve": False, "explain": False, "max_samples": 100}
    free = ra.audit(model, digits, THREAT, **asked)
    capped = ra.audit(model, digits, THREAT, budget=60, **asked)
    # A step of one forward and one backward may cross the line, and a success is confirmed.
    assert max(capped.worst_case.propagations) <= 60 + 2
    assert max(free.worst_case.propagations) > 300
    assert free.robust_accuracy <= capped.robust_accuracy < capped.clean_accuracy


def test_curve_falls_from_clean_through_the_audit_to_chance(result):
    eps = [point.eps for point in result.curve]
    robust = [point.robust_accuracy for point in result.curve]
    assert eps == sorted(set(eps))
    assert eps[0] == 0
    assert robust[0] == result.clean_accuracy
    assert robust == sorted(robust, reverse=True)
    assert robust[eps.index(THREAT.eps)] == result.robust_accuracy
    assert robust[-1] <= result.chance < robust[-2]


def test_same_seed_same_result_for_every_batch_size(model, digits):
    results = [
        lasting(
            ra.audit(model, digits, THREAT, preset="quick", max_samples=45, batch_size=size, seed=3)
        )
        for size in (1, 64, 1000)
    ]
    assert results[0] == results[1] == results[2]


def test_out_of_memory_halves_the_batch_and_changes_nothing(model, digits, monkeypatch):
    asked = {"preset": "quick", "max_samples": 40, "batch_size": 40, "explain": False}
    expected = lasting(ra.audit(model, digits, THREAT, **asked))
    genuine = engine.run

    def small_memory(attack, model, x, *args, **kwargs):
        if len(x) > 12:
            raise torch.OutOfMemoryError("too much")
        return genuine(attack, model, x, *args, **kwargs)

    monkeypatch.setattr(passes, "run", small_memory)
    assert lasting(ra.audit(model, digits, THREAT, **asked)) == expected


def test_audited_samples_do_not_hang_on_the_seed(model, digits):
    asked = {"preset": "quick", "max_samples": 20, "explain": False, "curve": False}
    first = ra.audit(model, digits, THREAT, seed=0, **asked)
    second = ra.audit(model, digits, THREAT, seed=1, **asked)
    assert first.clean_samples == second.clean_samples
    assert first.attacks != second.attacks
    # Drawn at random, not the first twenty.
    assert list(first.clean_samples.index) != list(range(20))


def test_result_survives_its_json(result, tmp_path):
    result.save(tmp_path)
    assert ra.AuditResult.load(tmp_path / "results.json") == result
    assert {path.name for path in tmp_path.iterdir()} == {
        "gallery.npz",
        "results.json",
        "samples.csv",
        "report.html",
    }
    header, *rows = (tmp_path / "samples.csv").read_text().splitlines()
    assert header.startswith("index,label,clean_prediction,")
    assert len(rows) == 360
    assert "NaN" not in (tmp_path / "results.json").read_text()


def test_samples_csv_quotes_labels_with_commas(result, tmp_path):
    result.save(tmp_path)
    import csv

    with (tmp_path / "samples.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    last = result.attacks[-1]
    ran = [count > 0 or not result.cascade for count in last.samples.forwards]
    for what in ("success", "prediction"):
        expected = [
            str(int(value)) if there else ""
            for value, there in zip(getattr(last.samples, what), ran, strict=True)
        ]
        assert [row[f"{last.label} {what}"] for row in rows] == expected


def test_model_is_left_as_it_was(model, digits):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    ra.audit(model, digits, THREAT, preset="quick", max_samples=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Constant(nn.Module):
    """Always the same class, whatever the image."""

    def __init__(self, classes: int = 10, always: int = 0) -> None:
        super().__init__()
        self.register_buffer("logits", torch.eye(classes)[always])

    def forward(self, x):
        return self.logits.expand(len(x), -1) + 0 * x.flatten(1).sum(1, keepdim=True)


def test_a_model_that_is_always_wrong_has_nothing_to_attack():
    x, y = torch.rand(10, 1, 6, 6), torch.ones(10, dtype=torch.int64)
    result = ra.audit(Constant(), (x, y), THREAT, preset="quick")
    assert result.clean_accuracy == result.robust_accuracy == 0
    assert all(attack.attempted == 0 for attack in result.attacks)
    assert all(attack.success_rate is None for attack in result.attacks)
    assert result.propagations == 10 + result.trust_propagations


def test_a_model_that_ignores_its_input_stays_correct_and_curve_ends_at_the_widest_eps():
    x, y = torch.rand(10, 1, 6, 6), torch.zeros(10, dtype=torch.int64)
    result = ra.audit(Constant(), (x, y), THREAT, preset="quick")
    assert result.robust_accuracy == 1
    assert result.curve[-1].eps == 1.0
    assert "robust" in result.to_json()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_class_counts_and_norms(norm, classes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 5 * 7, classes))
    x = torch.rand(9, 3, 5, 7)
    y = model(x).argmax(1)
    result = ra.audit(model, (x, y), ra.ThreatModel(norm, 0.5), preset="quick")
    assert result.clean_accuracy == 1
    assert result.robust_accuracy < 1
    assert len(result.class_names) == classes
    # To a runner-up that there is not, nothing goes.
    ranks = [(one.parameters["rank"], one.attempted) for one in result.attacks if one.name == "mm"]
    assert any(tried for _, tried in ranks)
    assert all(rank < classes or not tried for rank, tried in ranks)


def test_what_hardly_any_check_looked_at_is_not_believed(result):
    findings = result.findings
    assert findings
    unknown = [one.model_copy(update={"verdict": "not run", "value": None}) for one in findings]
    few = result.model_copy(update={"findings": (*findings[:2], *unknown[2:])})
    assert result.believable
    assert not few.believable


def test_wrong_use_says_what_to_do(model, digits):
    pair = digits.test.images([0, 1]), digits.test.labels[:2]
    with pytest.raises(ra.UsageError, match="did you mean 'quick'"):
        ra.audit(model, digits, THREAT, preset="quik")
    with pytest.raises(ra.UsageError, match="untargeted"):
        ra.audit(model, digits, ra.ThreatModel("linf", 0.1, targeted=True))
    with pytest.raises(ra.UsageError, match="at least one attack for the norm linf"):
        ra.audit(model, digits, THREAT, attacks=["noise"])
    with pytest.raises(ra.UsageError, match="twice"):
        ra.audit(model, digits, THREAT, attacks=["fgsm", "fgsm"])
    with pytest.raises(ra.UsageError, match="norms of pgd"):
        ra.audit(model, digits, ra.ThreatModel("l0", 3), attacks=["pgd"])
    with pytest.raises(ra.UsageError, match="pair"):
        ra.audit(model, "digits", THREAT)
    with pytest.raises(ra.DataError, match="one logit for each of the 3 classes"):
        ra.audit(model, pair, THREAT, class_names=["a", "b", "c"])
    with pytest.raises(ra.DataError, match="labels"):
        ra.audit(model, (pair[0], torch.tensor([3, 10])), THREAT)
    with pytest.raises(ra.DataError, match="NaN"):
        ra.audit(model, (pair[0] * math.nan, pair[1]), THREAT)


def test_model_with_infinite_logits_is_refused():
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] / 0.0

    with pytest.raises(ra.ModelError, match="finite logits"):
        ra.audit(Broken(), (torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)), THREAT)


def test_estimate_bounds_what_the_audit_spends(model, digits):
    config = AuditConfig(threat=THREAT, preset="quick", max_samples=30, explain=False)
    audit = runner.Audit(config)
    estimate = audit.estimate(model, digits.test, class_names=digits.class_names)
    spent = audit.run(model, digits.test, class_names=digits.class_names).propagations
    assert estimate.samples == 30
    assert spent <= estimate.propagations
    assert estimate.seconds > 0


def test_estimate_knows_that_experiments_through_a_part_cost_more(model, digits):
    quantised, asked = Quantised(model), {"class_names": digits.class_names}
    right = predict_logits(quantised, digits.test.images(slice(0, 40))).argmax(1)
    rows = (right == digits.test.labels[:40]).nonzero().squeeze(1)[:16]
    threat, attacks = ra.ThreatModel("linf", 1e-4), (PGD(steps=1),)
    audit = runner.Audit(AuditConfig(threat=threat, attacks=attacks, explain=False, curve=False))
    estimate = audit.estimate(quantised, digits.test.subset(rows), **asked)
    found = audit.run(quantised, digits.test.subset(rows), **asked)
    assert found.trust_propagations > 800 * len(rows)
    assert found.propagations <= estimate.propagations


def test_batch_size_is_found_within_memory(model, digits, monkeypatch):
    genuine = engine.Oracle.gradient

    def small_memory(self, x, loss):
        if len(x) > 40:
            raise torch.OutOfMemoryError("too much")
        return genuine(self, x, loss)

    monkeypatch.setattr(engine.Oracle, "gradient", small_memory)
    size = find_batch_size(model, digits.test, torch.arange(360), THREAT)
    assert 8 <= size <= 40


def test_gates_ask_the_lower_bound_or_the_point(result):
    point = result.robust_accuracy
    assert with_gates(result, {"robust_accuracy": point}, on="point").gates[0].passed
    assert not with_gates(result, {"robust_accuracy": point}, on="lower").gates[0].passed
    low = result.worst_case.scores.interval.low
    assert with_gates(result, {"robust_accuracy": low}, on="lower").gates[0].passed


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("robust_accuracy", "metric=threshold"),
        ("robust_acuracy=0.4", "did you mean 'robust_accuracy'"),
        ("robust_accuracy=40", "from 0 to 1"),
        ("robust_accuracy=x", "finite number"),
    ],
)
def test_malformed_gates(text, match):
    with pytest.raises(ra.UsageError, match=match):
        parse_gate(text)
