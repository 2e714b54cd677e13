"""The benchmarks that a page names run, and train what the page says."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

import robustann as ra

ROOT = Path(__file__).parent.parent


@pytest.fixture
def verdict(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for name in ("verdict", "counting"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import verdict  # type: ignore[import-not-found]

    return verdict


def test_every_setting_has_its_row_beside_autoattack(verdict: ModuleType) -> None:
    """The tables that a command repeats name their rows as the command does."""
    text = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    # MNIST's table is of models made elsewhere.
    for suite in verdict.SUITES.keys() - {"mnist"}:
        table = text.split(f"| `--suite {suite}` |")[1].split("\n\n")[0]
        rows = [line.split()[1] for line in table.splitlines()[2:]]
        assert rows == list(verdict.SUITES[suite].settings), suite


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar10-l2", "mnist-l2"])
def test_a_setting_trains_its_kind_of_model(
    verdict: ModuleType, digits: ra.ImageData, name: str
) -> None:
    suite = verdict.SUITES[name]
    few = verdict.fewer(digits, 64)
    assert (len(few.train), len(few.validation)) == (64, 6)
    threat = ra.ThreatModel(suite.norm, 0.1)
    x = digits.test.images(range(4))
    for setting, one in suite.settings.items():
        brief = dataclasses.replace(one, epochs=1)
        model = verdict.trained(brief, few, threat)
        assert model(x).shape == (4, 10), setting
        pools = any(isinstance(one, torch.nn.MaxPool2d) for one in model.modules())
        assert pools == setting.startswith("pooling"), setting
        norms = any(isinstance(one, torch.nn.BatchNorm2d) for one in model.modules())
        assert norms == setting.startswith("residual"), setting
    assert torch.equal(verdict.trained(brief, few, threat)(x), model(x))


@pytest.mark.parametrize(
    ("suite", "setting", "eps"),
    [("digits", "strided-fgsm", "0.1"), ("mnist-l2", "strided-pgd", "0.5")],
)
def test_both_verdicts_are_on_the_same_images(
    verdict: ModuleType, tmp_path: Path, suite: str, setting: str, eps: str
) -> None:
    rows = tmp_path / "rows.json"
    asked = ["--suite", suite, "--setting", setting, "--data", "digits", "--eps", eps]
    asked += ["--samples", "8", "--epochs", "1", "--seeds", "2", "--steps", "10"]
    asked += ["--output", str(rows)]
    done = CliRunner().invoke(verdict.main, asked)
    assert done.exit_code == 0, done.output
    line = done.output.splitlines()[-1].split()
    assert line[0] == setting
    clean, theirs = (float(cell.rstrip("%")) for cell in line[1:3])
    (row,) = json.loads(rows.read_text(encoding="utf-8")).values()
    assert [len(row[key]) for key in ("robust_seeds", "only_here", "only_autoattack")] == [2, 2, 2]
    for seed, robust in enumerate(row["robust_seeds"]):
        assert 100 * max(robust, theirs / 100) <= clean
        # What one broke and the other did not is the whole difference.
        apart = len(row["only_here"][seed]) - len(row["only_autoattack"][seed])
        assert round(8 * (row["robust_autoattack"] - robust)) == apart


def test_what_is_not_there_is_refused(verdict: ModuleType) -> None:
    assert CliRunner().invoke(verdict.main, ["--setting", "no-such"]).exit_code == 2
    listed = CliRunner().invoke(verdict.main, ["--list"])
    assert listed.exit_code == 0
    assert all(f"{name}: " in listed.output for name in verdict.SUITES)


def test_what_is_to_be_run_on_an_accelerator_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for name in ("accelerator", "bench", "pgd", "verdict", "counting"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import accelerator  # type: ignore[import-not-found]

    asked = ["--small", "--device", "cpu", "--output-dir", str(tmp_path)]
    done = CliRunner().invoke(accelerator.main, asked, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "accelerator.json").read_text(encoding="utf-8"))["results"]
    assert list(found) == ["standard", "fast", "audit", "share", "switches"]
    assert found["standard"]["test_accuracy"] > 0.3
    assert found["audit"]["robust_accuracy"] <= found["audit"]["clean_accuracy"]
    assert {len(rows) for rows in found["share"]["loops"].values()} == {2}
    (switched,) = found["switches"]["models"].values()
    rows = [row for one in switched.values() for row in one.values()]
    assert len(rows) >= 10
    assert all(row["rate"] > 0 and abs(row["points"]) <= 20 for row in rows)
    # Nothing is begun once the time is over.
    late = CliRunner().invoke(accelerator.main, [*asked, "--minutes", "0"])
    assert late.exit_code == 0, late.output
    found = json.loads((tmp_path / "accelerator.json").read_text(encoding="utf-8"))["results"]
    assert {str(row) for row in found.values()} == {"{'left out': 'no time was left'}"}
