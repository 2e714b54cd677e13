"""Hardening in one call: each defense alone and all together, measured before and after."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binom
from torch import nn

import robustann as ra
from robustann.defenses import TRADES, WeightClipping
from robustann.defenses.registry import check_together, defense_names, parse_defense
from robustann.defenses.sanitizers import BitDepth, Sanitized
from robustann.hardening import paired
from robustann.reports import render
from robustann.training import StandardStep

THREAT = ra.ThreatModel("linf", eps=0.1)
QUICK = {"preset": "quick", "max_samples": 60, "explain": False, "curve": False, "trust": False}
OPTIONS = {"noise-training": "noise-training:sigma=0.2"}


def hardened(model, digits, *defenses, **settings) -> ra.HardenResult:
    return ra.harden(model, digits, THREAT, defenses, **{**QUICK, "epochs": 2, **settings})


@pytest.mark.parametrize("name", [n for n, kind in defense_names().items() if kind == "objective"])
def test_each_objective_trains_on_from_a_model_and_leaves_it_alone(name, model, digits):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = hardened(model, digits, OPTIONS.get(name, name), epochs=1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert result.model is not model
    changed = result.model.state_dict()
    assert any(not torch.equal(before[key], changed[key]) for key in before)
    assert [stage.name for stage in result.comparison.stages] == ["before", "after"]
    assert result.training.epochs_run == 1
    assert result.comparison.defenses[0].name == name
    assert result.comparison.defenses[0].helps


@pytest.mark.parametrize("name", [n for n, kind in defense_names().items() if kind == "sanitizer"])
def test_each_sanitizer_stands_in_front_and_trains_nothing(name, model, digits):
    result = hardened(model, digits, name, max_samples=8)
    assert isinstance(result.model, Sanitized)
    assert result.training is None
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            model.state_dict().values(), result.network.state_dict().values(), strict=True
        )
    )
    assert [way.name for way in result.comparison.ways] == [
        "transfer", "identity", "gradient", "eot", "score",
    ]  # fmt: skip
    assert result.comparison.robust_accuracy <= result.after.robust_accuracy
    assert result.comparison.robust_accuracy <= min(
        way.robust_accuracy for way in result.comparison.ways
    )


def test_adversarial_training_helps_and_the_comparison_says_so(model, digits):
    result = ra.harden(
        model, digits, THREAT, "adversarial-training:steps=5", "quick", epochs=6, explain=False
    )
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
    result = ra.harden(model, digits, THREAT, "jpeg:quality=50", **{**QUICK, "max_samples": 48})
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
        **QUICK,
    )
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


def test_same_seed_same_hardening(model, digits):
    first, second = (
        hardened(
            copy.deepcopy(model),
            digits,
            "fast-adversarial-training",
            "noise",
            epochs=1,
            max_samples=8,
        )
        for _ in range(2)
    )
    assert first.comparison.robust == second.comparison.robust
    assert first.after.worst_case == second.after.worst_case


def test_steps_and_sanitizers_can_be_objects(model, digits):
    result = hardened(model, digits, TRADES(THREAT, beta=3.0), BitDepth(bits=5), epochs=1)
    assert [one.name for one in result.comparison.defenses] == ["trades", "bit-depth"]
    wrapped = hardened(model, digits, WeightClipping(StandardStep(), w_max=0.2), epochs=1)
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
    assert not (folder / "training.pt").exists()
    assert ra.load_model(folder / "model.safetensors") is not None
