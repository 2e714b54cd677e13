"""Hardening in one call: each defense alone and all together, measured before and after."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binom
from torch import nn

import robustann as ra
from robustann.certificates import Smoothed
from robustann.defenses import TRADES, WeightClipping
from robustann.defenses.registry import (
    OBJECTIVES,
    as_defense,
    check_together,
    defense_names,
    defense_options,
    parse_defense,
)
from robustann.defenses.sanitizers import BitDepth, InputCheck, Jpeg, Sanitized, Sanitizer
from robustann.hardening import harden as hardening
from robustann.hardening import paired
from robustann.reports import render, views
from robustann.reports.filters import percent
from robustann.training import StandardStep, TrainConfig
from robustann.training import run as one_run

THREAT = ra.ThreatModel("linf", eps=0.1)
QUICK = {"preset": "quick", "max_samples": 40, "explain": False, "curve": False, "trust": False}
OPTIONS = {"noise-training": "noise-training:sigma=0.2"}


@pytest.fixture(scope="module")
def trained_small(digits):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return ra.train(plain, digits, epochs=12, device="cpu").model


@pytest.fixture
def small(trained_small):
    """A network of which a forward costs next to nothing: averages over draws take many."""
    return copy.deepcopy(trained_small)


def hardened(model, digits, *defenses, **settings) -> ra.HardenResult:
    trains = any(not isinstance(one, (str, Sanitizer)) or trained(one) for one in defenses)
    usual = {**QUICK, "epochs": 1} if trains else QUICK
    return ra.harden(model, digits, THREAT, defenses, **{**usual, **settings})


def trained(defense) -> bool:
    return isinstance(defense, str) and parse_defense(defense).kind in ("objective", "wrapper")


def assert_one_minimum(result: ra.HardenResult) -> None:
    """What every place says of the hardened model is one number, and nothing is below it."""
    after, compared = result.after, result.comparison
    correct = zip(after.clean_samples.prediction, after.clean_samples.label, strict=True)
    right = [guess == label for guess, label in correct]
    standing = [
        one and by is None for one, by in zip(right, after.worst_case.broken_by, strict=True)
    ]
    headline = sum(standing) / after.n
    assert compared.robust_accuracy == after.robust_accuracy == pytest.approx(headline, abs=1e-5)
    assert compared.stages[-1].robust_accuracy == after.robust_accuracy
    assert compared.robust.both + compared.robust.gained == sum(standing)
    for way in compared.ways:
        assert way.robust_accuracy >= after.robust_accuracy
    page = render(after)
    assert page.count(f"{percent(after.robust_accuracy)}") >= 2
    # What the five found is attacks like others: every figure follows from the samples.
    fallen: list[str | None] = [None] * after.n
    for attack in after.attacks:
        assert attack.forwards == sum(attack.samples.forwards)
        for row, fell in enumerate(attack.samples.success):
            assert not (fell and fallen[row])
            fallen[row] = attack.label if fell else fallen[row]
    assert list(after.worst_case.broken_by) == fallen
    assert list(after.worst_case.propagations) == [
        sum(one.samples.forwards[row] + one.samples.backwards[row] for one in after.attacks)
        for row in range(after.n)
    ]


@pytest.mark.parametrize("name", [n for n, kind in defense_names().items() if kind == "objective"])
def test_each_objective_trains_on_from_a_model_and_leaves_it_alone(name, model, digits):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = hardened(model, digits, OPTIONS.get(name, name), max_samples=8)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert result.model is not model
    changed = result.model.state_dict()
    assert any(not torch.equal(before[key], changed[key]) for key in before)
    assert [stage.name for stage in result.comparison.stages] == ["before", "after"]
    assert result.training.epochs_run == 1
    assert result.comparison.defenses[0].name == name
    assert result.comparison.defenses[0].helps


def test_a_collapse_in_training_is_told(small, digits, monkeypatch):
    monkeypatch.setattr(one_run, "collapsed", lambda seen, rows: len(rows) == 1)
    result = hardened(small, digits, "n-fgsm", epochs=2)
    (note,) = result.comparison.notes
    assert note.startswith("In epoch 1 of training, catastrophic overfitting")
    assert note.endswith("from now on with pgd:steps=4.")
    assert note in render(result.after)


@pytest.mark.parametrize("name", [n for n, kind in defense_names().items() if kind == "wrapper"])
def test_each_wrapper_alone_trains_on(name, small, digits):
    result = hardened(small, digits, name, max_samples=8, weights=True)
    before, after = small.state_dict(), result.network.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    told = [one.name for one in result.comparison.defenses]
    # Weights are perturbed for the sake of crafted images.
    assert told == (["adversarial-training", "awp"] if name == "awp" else [name])
    assert [stage.name for stage in result.comparison.stages] == ["before", "after"]
    assert all(len(stage.bit_errors) == 3 for stage in result.comparison.stages)
    assert name in render(result.after)


def test_noise_training_is_measured_by_the_vote_under_its_noise(small, digits, tmp_path):
    asked = {"max_samples": 20, "epochs": 4, "lr": 0.2}
    l2 = ra.ThreatModel("l2", 0.3)
    result = ra.harden(small, digits, l2, "noise-training:sigma=0.3", certify=True,
                       **{**QUICK, **asked})  # fmt: skip
    assert not result.comparison.notes
    before, after = result.comparison.stages
    assert 0 < before.certified_accuracy < after.certified_accuracy
    assert after.certified_accuracy <= after.robust_accuracy
    assert result.after.certificate.method == "smoothing"
    assert result.after.certificate.settings["sigma"] == 0.3
    assert "Certified accuracy" in render(result.after)
    assert isinstance(result.model, Smoothed)
    assert result.model.model is result.network
    assert not result.model.training
    result.save(tmp_path)
    assert json.loads((tmp_path / "hardened.json").read_text())["smoothing"] == 0.3
    assert load_file(tmp_path / "model.safetensors").keys() == small.state_dict().keys()
    # The same audit of what was saved says the same.
    again = ra.audit(result.model, digits, l2, certify=True, **QUICK | {"max_samples": 20})
    assert again.certificate.certified == result.after.certificate.certified
    silent = hardened(small, digits, "noise-training:sigma=0.3", max_samples=2)
    assert "vote under noise, which these audits did not look at" in render(silent.after)
    assert silent.model is silent.network


@pytest.mark.parametrize("name", [n for n, kind in defense_names().items() if kind == "sanitizer"])
def test_each_sanitizer_stands_in_front_and_trains_nothing(name, small, digits):
    result = hardened(small, digits, name, max_samples=3)
    assert isinstance(result.model, Sanitized)
    assert result.training is None
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            small.state_dict().values(), result.network.state_dict().values(), strict=True
        )
    )
    assert [way.name for way in result.comparison.ways] == [
        "transfer", "identity", "gradient", "eot", "score",
    ]  # fmt: skip
    assert_one_minimum(result)


def test_adversarial_training_helps_and_the_comparison_says_so(model, digits):
    result = ra.harden(
        model, digits, THREAT, "adversarial-training:steps=5", "quick", epochs=6, explain=False,
        max_samples=200, curve=False, trust=False,
    )  # fmt: skip
    assert result.after.robust_accuracy > result.before.robust_accuracy + 0.1
    compared = result.comparison
    assert compared.robust.interval.low > 0
    assert compared.robust.p < 1e-3
    # Both audits saw the same samples with the same seeds.
    assert result.before.clean_samples.index == result.after.clean_samples.index
    assert result.before.provenance.data_sha256 == result.after.provenance.data_sha256
    assert compared.robust.difference == pytest.approx(
        result.after.robust_accuracy - result.before.robust_accuracy, abs=1e-5
    )
    assert compared.clean.gained - compared.clean.lost == round(
        (result.after.clean_accuracy - result.before.clean_accuracy) * result.after.n
    )
    page = render(result.after)
    assert 'id="hardening"' in page
    assert "Hardening raised robust accuracy by" in page
    assert 'id="hardening"' not in render(result.before)


def test_a_sanitizer_that_only_masks_gradients_is_shown_as_useless(model, digits):
    result = hardened(model, digits, "jpeg:quality=50", curve=True)
    assert_one_minimum(result)
    at = {point.eps: point.robust_accuracy for point in result.after.curve}
    assert at[THREAT.eps] == result.after.robust_accuracy
    ways = {way.name: way.robust_accuracy for way in result.comparison.ways}
    assert ways["transfer"] > ways["gradient"] + 0.05
    assert result.comparison.robust_accuracy <= result.before.robust_accuracy + 0.02
    assert "Useless against an adaptive attacker" in result.comparison.sanitizer_verdict
    assert "Useless against an adaptive attacker" in render(result.after)


def test_everything_together_on_a_fresh_architecture(digits, tmp_path):
    result = ra.harden(
        "small-cnn",
        digits,
        THREAT,
        ["adversarial-training:steps=3", "awp", "weight-clipping:w_max=0.3", "bit-depth", "check"],
        epochs=3,
        **{**QUICK, "max_samples": 20},
    )
    assert_one_minimum(result)
    assert [stage.name for stage in result.comparison.stages] == [
        "before", "after training, without sanitizers", "after",
    ]  # fmt: skip
    assert result.baseline is not None
    for parameter in result.network.parameters():
        assert float(parameter.detach().abs().max()) <= 0.3 + 1e-6
    result.save(tmp_path)
    loaded = ra.load_model(tmp_path / "model.safetensors")
    images = digits.test.images(slice(0, 8))
    assert torch.equal(loaded(images), result.network.cpu()(images))
    for part in ("before", "after"):
        kept = ra.AuditResult.load(tmp_path / part / "results.json")
        assert (kept.hardening is None) == (part == "before")
        assert (tmp_path / part / "report.html").exists()


def test_a_detector_is_attacked_by_those_who_know_of_it(small, digits, tmp_path, monkeypatch):
    before = {key: value.clone() for key, value in small.state_dict().items()}
    asked = {"max_samples": 60, "state": tmp_path / "kept"}
    # What save removes is kept for the second run.
    monkeypatch.setattr(hardening, "forget", lambda folder: None)
    result = hardened(small, digits, "feature-squeezing:bits=2,fpr=0.1", **asked)
    found = result.comparison.detector
    knows_not, knows = found.ways
    assert found.squeezers == ("bit-depth:bits=2", "median:size=2")
    assert 0 < knows_not.fooled <= knows.fooled <= knows.attacked == knows_not.attacked
    # It catches some of those who do not know of it, and hardly anybody who does.
    assert knows_not.evaded < knows.evaded <= knows.fooled
    assert knows.auc < knows_not.auc
    assert found.robust_accuracy <= (found.n - knows.evaded) / found.n
    assert found.fpr <= 0.25
    # Nothing trains, and the audits do not see it.
    assert result.training is None
    assert result.comparison.robust.lost == result.comparison.robust.gained == 0
    assert all(torch.equal(before[key], one) for key, one in result.network.state_dict().items())
    detector = result.detector
    assert detector.model is result.network
    clean = digits.validation.images(slice(0, len(digits.validation)))
    assert 0 < float(detector.detects(clean).double().mean()) <= 0.1
    page = render(result.after)
    assert "Adversarial images refused over clean images refused" in page
    assert "against an attacker who evades it too" in page
    result.save(tmp_path / "first")
    assert render(ra.AuditResult.load(tmp_path / "first" / "after" / "results.json")) == page
    # Taken up after a stop, it is not attacked again.
    said: list[str] = []
    again = hardened(small, digits, "feature-squeezing:bits=2,fpr=0.1", notify=said.append, **asked)
    assert again.comparison.detector == found
    assert not any("attacking the detector" in one for one in said)
    again.save(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "hardened.json").read_text())
    assert told["detector"]["squeezers"] == ["bit-depth:bits=2", "median:size=2"]
    assert told["detector"]["threshold"] == pytest.approx(detector.threshold, rel=1e-5)


MILD = [
    "check", "bit-depth:bits=6", "gaussian:sigma=0.2", "jpeg:quality=95", "median:size=2",
    "tv:weight=0.01,steps=3", "resize-pad:scale=0.95", "noise:sigma=0.02",
]  # fmt: skip


@pytest.mark.parametrize("weights", [("awp",), ("bit-error-training:rate=0.01",)])
def test_all_defenses_together(weights, small, digits, monkeypatch):
    import robustann.auditing.presets as presets

    # Each answer is a mean of 20 draws through eight sanitizers: few questions will do here.
    attack = ra.PGD(steps=3, loss="margin")
    monkeypatch.setitem(hardening._EFFORT, "quick", {"queries": 5, "attacks": (attack,)})
    short = dataclasses.replace(
        presets.PRESETS["quick"], stages=(presets.Stage(attack),), check=(), escalation=()
    )
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "quick": short})
    wrappers = (*weights, "weight-clipping:w_max=0.5")
    sanitizers = {name for name, kind in defense_names().items() if kind == "sanitizer"}
    others = sorted(sanitizers - {parse_defense(one).name for one in MILD})
    defenses = ["trades:steps=3", *wrappers, *MILD, *others]
    result = ra.harden(
        small, digits, THREAT, defenses, epochs=2, weights=True, **{**QUICK, "max_samples": 3}
    )
    assert_one_minimum(result)
    used = {one.name for one in result.comparison.defenses}
    assert used == {parse_defense(one).name for one in defenses} >= sanitizers
    between, after = result.comparison.stages[1:]
    assert between.clean_accuracy >= after.clean_accuracy > 0.4
    assert max(float(p.detach().abs().max()) for p in result.network.parameters()) <= 0.5 + 1e-6
    page = render(result.after)
    for one in result.comparison.defenses:
        assert one.limits[0][:40] in page.replace("&#39;", "'")


def test_a_users_own_module_and_arrays(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(300, 1, 6, 6)
    labels = (images[:, 0, :3].mean((1, 2)) > images[:, 0, 3:].mean((1, 2))).long()
    mine = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 2)).train()
    mine[1].weight.requires_grad_(True)
    state = torch.get_rng_state()
    data = ra.from_arrays(images, labels, class_names=["up", "down"])
    assert len(data.train) + len(data.validation) + len(data.test) == 300
    result = ra.harden(mine, data, THREAT, ["trades"], epochs=2, **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in mine.modules())
    assert all(p.requires_grad and p.grad is None for p in mine.parameters())
    assert not result.model.training
    result.save(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == mine.state_dict().keys()


def test_same_seed_same_hardening(small, digits):
    first, second = (
        hardened(
            copy.deepcopy(small),
            digits,
            "fast-adversarial-training",
            "noise",
            max_samples=4,
        )
        for _ in range(2)
    )
    assert first.comparison.robust == second.comparison.robust
    assert first.after.worst_case == second.after.worst_case


def test_steps_and_sanitizers_can_be_objects(small, digits):
    result = hardened(small, digits, TRADES(THREAT, beta=3.0), BitDepth(bits=5), max_samples=8)
    assert [one.name for one in result.comparison.defenses] == ["trades", "bit-depth"]
    wrapped = hardened(small, digits, WeightClipping(StandardStep(), w_max=0.2))
    assert max(float(p.detach().abs().max()) for p in wrapped.model.parameters()) <= 0.2 + 1e-6


def test_wrong_use_says_what_to_do(model, digits):
    cases = {
        "did you mean 'trades'": ["trade"],
        "at least one defense": [],
        "one training objective": ["trades", "mart"],
        "'jpeg' twice": ["jpeg", "jpeg:quality=20"],
        "as text, a sanitizer or a training step": [3],
        "did you mean 'beta'": ["trades:betta=1"],
        "with sigma": ["noise-training"],
    }
    for match, defenses in cases.items():
        with pytest.raises(ra.UsageError, match=match):
            ra.harden(model, digits, THREAT, defenses)
    with pytest.raises(ra.UsageError, match="linf or l2, in which sanitizers"):
        ra.harden(model, digits, ra.ThreatModel("l1", 3.0), ["jpeg"])
    with pytest.raises(ra.UsageError, match="did you mean 'epochs'"):
        ra.harden(model, digits, THREAT, epoch=3)


def test_every_defense_says_where_it_helps_and_where_not():
    for name in defense_names():
        defense = parse_defense(OPTIONS.get(name, name))
        assert defense.helps
        assert defense.limits
        assert all(isinstance(one, str) and one for one in (*defense.helps, *defense.limits))
    check_together([parse_defense("trades"), parse_defense("jpeg")])


def test_options_that_are_listed_are_taken():
    for name, (_, _, options) in defense_options().items():
        given = {
            option: {"NUMBER": 0.5, None: 1}.get(default, default)
            for option, default in options.items()
        }
        text = ",".join(f"{option}={value}" for option, value in given.items())
        made = parse_defense(f"{name}:{text}" if text else name).made
        if name in OBJECTIVES:
            made = made(THREAT)
            known = made.parameters()
            assert {key: known[key] for key in given if key in known and key != "attack"} == {
                key: value for key, value in given.items() if key in known and key != "attack"
            }
    step = parse_defense("n-fgsm:mix=0.25,eps_warmup_epochs=2,watch=no").made(THREAT)
    assert (step.mix, step.eps_warmup_epochs, step.watched) == (0.25, 2, False)


@pytest.mark.parametrize("trust", [True, False])
def test_a_randomised_sanitizer_has_one_minimum_judged_on_averages(small, digits, trust):
    result = hardened(small, digits, "noise:sigma=0.15", trust=trust, max_samples=12)
    assert_one_minimum(result)
    # Every answer is a mean of 20 draws, whether trust checks looked or not.
    assert all(count % 20 == 0 for a in result.after.attacks for count in a.samples.forwards)
    assert "mean of 20 draws" in result.comparison.sanitizer_verdict


def test_what_only_one_of_the_five_breaks_counts_everywhere(small, digits, monkeypatch):
    """An audit that attacks with nothing but noise: all that falls, falls to the five."""
    import robustann.auditing.presets as presets

    weak = dataclasses.replace(
        presets.PRESETS["quick"],
        stages=(presets.Stage(ra.PGD(steps=1, step_size=1e-6)),),
        check=(), escalation=(),
    )  # fmt: skip
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "quick": weak})
    result = hardened(small, digits, "bit-depth:bits=5")
    assert_one_minimum(result)
    by = {name for name in result.after.worst_case.broken_by if name}
    assert any(name.startswith("sanitizer: ") for name in by)
    assert result.after.robust_accuracy < result.before.robust_accuracy - 0.2


PHASES = ["baseline", "before", "hardened", "between", "measured", "after"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_loses_nothing_that_was_done(phase, digits, tmp_path, monkeypatch, whole):
    asked = dict(STOPPED)
    genuine = {name: getattr(hardening._Work, name) for name in ("trained", "audited", "measured")}
    begun: list[str] = []

    class StopError(Exception):
        pass

    def watched(name, place):
        def call(self, *args, **kwargs):
            what = "measured" if name == "measured" else args[place]
            if what == phase and "--" not in begun:
                raise StopError
            return genuine[name](self, *args, **kwargs)

        return call

    for name, place in (("trained", 1), ("audited", 1), ("measured", 0)):
        monkeypatch.setattr(hardening._Work, name, watched(name, place))
    epoch, run, five = one_run.Run.epoch, hardening.Audit.run, hardening.attack_sanitizer
    monkeypatch.setattr(one_run.Run, "epoch", lambda *a: begun.append("epoch") or epoch(*a))
    monkeypatch.setattr(
        hardening.Audit, "run", lambda *a, **k: begun.append("audit") or run(*a, **k)
    )
    monkeypatch.setattr(
        hardening, "attack_sanitizer", lambda *a, **k: begun.append("five") or five(*a, **k)
    )
    with pytest.raises(StopError):
        ra.harden("small-cnn", digits, THREAT, state=tmp_path / "kept", **asked)
    first = list(begun)
    begun.append("--")
    result = ra.harden("small-cnn", digits, THREAT, state=tmp_path / "kept", **asked)
    # Both runs together did what one does.
    assert sorted([*first, *begun[len(first) + 1 :]]) == sorted(
        ["epoch"] * 2 + ["audit"] * 3 + ["five"]
    )
    assert result.comparison == whole.comparison or differing(result, whole) == {"training"}
    assert result.after.worst_case == whole.after.worst_case
    result.save(tmp_path / "out")
    assert not (tmp_path / "kept").exists()


STOPPED = {
    **QUICK,
    "max_samples": 8,
    "epochs": 1,
    "defenses": ["fast-adversarial-training", "bit-depth:bits=4"],
}


@pytest.fixture(scope="module")
def whole(digits):
    """A hardening that was not stopped."""
    return ra.harden("small-cnn", digits, THREAT, **STOPPED)


def differing(one: ra.HardenResult, other: ra.HardenResult) -> set[str]:
    pairs = zip(one.comparison, other.comparison, strict=True)
    return {name for (name, first), (_, second) in pairs if first != second}


def test_what_another_hardening_left_is_not_taken_up(small, digits, tmp_path):
    asked = {"state": tmp_path, "max_samples": 3}
    said: list[str] = []
    first = hardened(small, digits, "bit-depth:bits=3", **asked)
    second = hardened(small, digits, "bit-depth:bits=1", notify=said.append, **asked)
    assert not any("before the stop" in one for one in said)
    assert second.sanitized.sanitizers[0].label == "bit-depth:bits=1"
    other = copy.deepcopy(small)
    with torch.no_grad():
        next(other.parameters()).add_(0.01)
    hardened(other, digits, "bit-depth:bits=3", notify=said.append, **asked)
    assert not any("before the stop" in one for one in said)
    again = hardened(small, digits, "bit-depth:bits=3", notify=said.append, **asked)
    assert sum("before the stop" in one for one in said) == 2
    assert again.comparison == first.comparison
    again.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ['{"netw', "[]", "\udcff"])
def test_what_is_damaged_is_done_again(damage, small, digits, tmp_path):
    asked = {"max_samples": 8, "state": tmp_path}
    first = hardened(small, digits, "feature-squeezing", **asked)
    for name in ("before", "detector"):
        (path,) = tmp_path.rglob(f"{name}.json")
        path.write_bytes(damage.encode(errors="surrogateescape"))
    said: list[str] = []
    second = hardened(small, digits, "feature-squeezing", notify=said.append, **asked)
    assert second.comparison == first.comparison
    assert "attacking the detector, knowing of it and not" in said
    assert sum("audited before the stop" in one for one in said) == 1


def test_before_and_after_are_trained_alike(digits):
    asked = {**QUICK, "max_samples": 4, "epochs": 1, "lr": 0.02, "label_smoothing": 0.0}
    result = ra.harden("small-cnn", digits, THREAT, "weight-clipping:w_max=1", **asked)
    # Nothing reaches 1: clipping changes nothing, and so nothing else may.
    plain, hard = result.baseline.state_dict(), result.network.state_dict()
    assert all(torch.equal(plain[name], hard[name]) for name in plain)
    assert result.training.training["step"]["step"]["label_smoothing"] == 0.0
    # What an adversarial step needs is none for plain training.
    assert result.training.training["config"]["lr"] == 0.02
    smooth = ra.harden(
        "small-cnn", digits, THREAT, "fast-adversarial-training",
        **{**asked, "label_smoothing": 0.1},
    )  # fmt: skip
    assert smooth.training.training["step"]["label_smoothing"] == 0.1
    for taken in ("mart", TRADES(THREAT)):
        with pytest.raises(ra.UsageError, match="label_smoothing: expected none"):
            ra.harden("small-cnn", digits, THREAT, taken, **asked)


def test_a_model_that_only_guesses_is_compared_with_plain_training(digits):
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    result = hardened(mine, digits, "weight-clipping:w_max=1", epochs=3)
    assert result.before.clean_accuracy > 0.6
    assert result.comparison.clean.difference == 0
    assert any("came untrained" in note for note in result.comparison.notes)
    assert "came untrained" in render(result.after)


def test_one_seed_decides_everything(small, digits):
    result = hardened(
        small, digits, "fast-adversarial-training", training=TrainConfig(batch_size=64), seed=7,
        max_samples=4,
    )  # fmt: skip
    assert result.training.training["config"]["seed"] == 7
    assert result.training.training["config"]["batch_size"] == 64
    assert result.after.provenance.seed == 7
    other = hardened(
        small, digits, "fast-adversarial-training", training=TrainConfig(seed=3), max_samples=4
    )
    assert other.after.provenance.seed == 3
    with pytest.raises(ra.UsageError, match="one seed"):
        hardened(small, digits, "trades", training=TrainConfig(seed=3), seed=4)


def test_a_step_made_by_the_caller_is_named_in_full(small, digits):
    wide = TRADES(ra.ThreatModel("linf", 0.15), beta=3.0)
    result = hardened(small, digits, wide, max_samples=4)
    label = result.comparison.defenses[0].label
    assert label.startswith("trades:")
    assert "beta=3.0" in label
    assert "eps=0.15" in label
    assert any("Trained for eps 0.15" in note for note in result.comparison.notes)
    clipped = as_defense(WeightClipping(StandardStep(label_smoothing=0.1), w_max=0.2))
    assert clipped.label == "weight-clipping:w_max=0.2 around standard:label_smoothing=0.1"
    with pytest.raises(ra.UsageError, match=r"a step for linf .* got trades.* for l2"):
        hardened(small, digits, TRADES(ra.ThreatModel("l2", 1.0)))


class Never(nn.Module):
    """Fails the test that runs it: everything below is refused before any work."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        pytest.fail("work was done")


REFUSED = {
    "one part of a dataset": lambda d: {"data": d.test},
    r"load_data\('digits'\) returns": lambda d: {"data": "digits"},
    "threat as a ThreatModel, got list": lambda d: {"threat": ["trades"]},
    "threat as a ThreatModel, got float": lambda d: {"threat": 0.1},
    "the class TRADES itself": lambda d: {"defenses": [TRADES]},
    "the class Jpeg itself": lambda d: {"defenses": [Jpeg]},
    "training as a TrainConfig, got dict": lambda d: {"training": {"epochs": 1}},
    "a device|no cuda|cuda": lambda d: {"device": "cuda:77"},
    r"shape \(N, 3": lambda d: {"defenses": ["trades", "check:channels=3"]},
    "a module that returns logits": lambda d: {"model": 3},
    "no training settings": lambda d: {"defenses": ["check"], "training": TrainConfig()},
    "untargeted": lambda d: {"threat": ra.ThreatModel("linf", 0.1, targeted=True)},
    "an adversarial step": lambda d: {"defenses": ["awp", "ibp-training"]},
    "noise-training and no sanitizers": lambda d: {
        "threat": ra.ThreatModel("l2", 0.3), "certify": True,
    },
    "between 0 and 1, got 2": lambda d: {"defenses": ["feature-squeezing:fpr=2"]},
    "bits from 1 to 8": lambda d: {"defenses": ["feature-squeezing:bits=0"]},
    "option of defense feature-squeezing": lambda d: {"defenses": ["feature-squeezing:bit=3"]},
    "at least 1000 validation images": lambda d: {"defenses": ["feature-squeezing:fpr=0.001"]},
    "got noise-training:sigma=0.2, median": lambda d: {
        "threat": ra.ThreatModel("l2", 0.3), "certify": True,
        "defenses": ["noise-training:sigma=0.2", "median"],
    },
}  # fmt: skip


@pytest.mark.parametrize("match", REFUSED)
def test_what_cannot_be_is_refused_before_any_work(match, digits):
    asked = {"model": Never(), "data": digits, "threat": THREAT, "defenses": ["trades"]}
    with pytest.raises((ra.UsageError, ra.DataError), match=match):
        ra.harden(**{**asked, **REFUSED[match](digits)})


def test_what_cannot_be_certified_is_refused_before_any_work(small, digits):
    said: list[str] = []
    for asked in (["bit-depth"], ["ibp-training", "noise"]):
        with pytest.raises(ra.UsageError, match="certify"):
            hardened(small, digits, *asked, certify=True, notify=said.append)
    assert not said


def test_a_model_for_other_images_is_named_as_that(digits):
    with pytest.raises(ra.ModelError, match="belongs to the data"):
        hardened(nn.Sequential(nn.Flatten(), nn.Linear(63, 10)), digits, "trades")


def test_a_model_with_nothing_to_train_is_refused(digits):
    with pytest.raises(ra.ModelError, match="something to train"):
        ra.harden(Never().requires_grad_(False), digits, THREAT, ["trades"])


def test_a_pair_is_data_and_tied_weights_are_saved(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(36, 36), nn.Linear(36, 36), nn.Linear(36, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x.flatten(1)).relu()).relu())

    torch.manual_seed(0)
    x = torch.rand(200, 1, 6, 6)
    y = (x[:, 0, :3].mean((1, 2)) > x[:, 0, 3:].mean((1, 2))).long()
    result = ra.harden(Tied(), (x, y), THREAT, "fast-adversarial-training", epochs=1,
                       **{**QUICK, "max_samples": 4})  # fmt: skip
    result.save(tmp_path)
    again = Tied()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(x), result.network.cpu()(x))
    told = json.loads((tmp_path / "hardened.json").read_text())
    assert told["sanitizers"] == []
    assert told["defenses"] == ["fast-adversarial-training"]


def test_the_callers_own_sanitizer_stays_as_it_is(small, digits):
    mine = BitDepth(bits=4)
    assert mine.training
    hardened(small, digits, mine, max_samples=4)
    assert mine.training


def test_words_claim_no_more_than_the_samples_show(small, digits):
    result = hardened(small, digits, InputCheck(), max_samples=12)
    compared = result.comparison
    assert compared.sanitizer_verdict.startswith("Claims nothing against adversarial images")
    assert compared.clean.lost == compared.clean.gained == 0
    page = render(result.after)
    assert "Useless" not in page
    assert "no sample changed" in page
    assert "went through the defense" not in page
    assert "did not change for certain" not in page
    assert "No sample changed sides unattacked" in views.hardened(compared)
    few = paired([True] * 20, [True] * 19 + [False])
    said = views.hardened(compared.model_copy(update={"clean": few}))
    assert "do not show that clean accuracy changed" in said


def test_clipping_is_measured_by_bit_errors_and_ibp_by_proofs(small, digits):
    plain = {"max_samples": 40, "epochs": 2}
    silent = hardened(small, digits, "weight-clipping:w_max=0.1", **plain)
    assert "did not ask for" in render(silent.after)
    assert not silent.comparison.stages[0].bit_errors
    clipped = hardened(small, digits, "weight-clipping:w_max=0.1", weights=True, **plain)
    assert not clipped.comparison.notes
    rates = [[one.rate for one in stage.bit_errors] for stage in clipped.comparison.stages]
    assert rates == [[0, 0.01, 0.1]] * 2
    before, after = (stage.bit_errors[2].mean for stage in clipped.comparison.stages)
    assert after < before
    level = clipped.after.weights.fixed.levels[-1]
    assert (level.rate, level.mean) == (0.1, after)
    assert percent(after) in render(clipped.after)
    assert "Share of wrong bits" in render(clipped.after)
    proven = hardened(small, digits, "ibp-training", certify=True, epochs=15)
    before, after = (stage.certified_accuracy for stage in proven.comparison.stages)
    assert after > before
    assert after == proven.after.certificate.certified_accuracy
    assert "Certified accuracy" in render(proven.after)


def test_paired_statistics():
    before = [True] * 50 + [False] * 50
    after = [True] * 45 + [False] * 5 + [True] * 20 + [False] * 30
    found = paired(before, after)
    assert (found.both, found.lost, found.gained, found.neither) == (45, 5, 20, 30)
    assert found.difference == pytest.approx(0.15)
    # Twice the tail of the binomial distribution.
    assert found.p == pytest.approx(2 * binom.cdf(5, 25, 0.5), rel=1e-4)
    # Agresti and Min, by hand: cells 5.5 and 20.5 of 102.
    half = 1.959964 * math.sqrt(26 - 15**2 / 102) / 102
    assert found.interval.low == pytest.approx(15 / 102 - half, abs=1e-5)
    assert found.interval.high == pytest.approx(15 / 102 + half, abs=1e-5)
    assert paired([True], [True]).p == 1
    with pytest.raises(ra.DataError, match="as many outcomes"):
        paired([True], [True, False])


def test_on_the_command_line(model_file, tmp_path, capsys):
    from click.testing import CliRunner

    from robustann.cli.main import cli

    folder = tmp_path / "hard"
    asked = [
        "harden", "--model", str(model_file), "--eps", "0.1", "--defense",
        "adversarial-training:steps=2", "--preset", "quick", "--epochs", "1", "--max-samples", "20",
        "--no-explain", "--output-dir", str(folder),
    ]  # fmt: skip
    done = CliRunner().invoke(cli, asked, standalone_mode=False)
    assert done.exit_code == 0, done.output
    assert "McNemar" in done.output
    assert json.loads((folder / "after" / "results.json").read_text())["hardening"] is not None
    assert not (folder / "unfinished").exists()
    assert "audit it again: robustann audit --model" in done.output
    assert ra.load_model(folder / "model.safetensors") is not None


def test_a_saved_model_is_audited_behind_its_sanitizers(model_file, tmp_path):
    from click.testing import CliRunner

    from robustann.cli.main import cli

    asked = ["--model", str(model_file), "--eps", "0.1", "--preset", "quick", "--max-samples", "6",
             "--no-explain", "--no-curve", "--no-trust"]  # fmt: skip
    folder = tmp_path / "hard"
    done = CliRunner().invoke(
        cli,
        ["harden", *asked[:-2], "--no-trust", "--defense", "bit-depth:bits=2",
         "--defense", "median", "--output-dir", str(folder), "--device", "cpu"],
        standalone_mode=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads((folder / "hardened.json").read_text())["sanitizers"]
    assert told == ["bit-depth:bits=2", "median"]
    after = ra.AuditResult.load(folder / "after" / "results.json")
    command = next(line for line in done.output.splitlines() if "audit it again" in line)
    assert command.endswith("--eps 0.1 --sanitize bit-depth:bits=2 --sanitize median")
    again = CliRunner().invoke(
        cli,
        ["audit", *asked, "--sanitize", told[0], "--sanitize", told[1], "--device", "cpu",
         "--output-dir", str(tmp_path / "again")],
        standalone_mode=False,
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    found = ra.AuditResult.load(tmp_path / "again" / "results.json")
    assert found.clean_samples == after.clean_samples
    own = [one.label for one in after.attacks if "sanitizer" not in one.label]
    assert [one.label for one in found.attacks] == [one for one in own if "curve" not in one]
    assert found.attacks[0] == after.attacks[0]
    assert found.robust_accuracy >= after.robust_accuracy
