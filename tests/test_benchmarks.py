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
    """The table that a command repeats names its rows as the command does."""
    text = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    table = text.split("| `--setting` |")[1].split("\n\n")[0]
    rows = [line.split()[1] for line in table.splitlines()[2:]]
    assert rows == list(verdict.SETTINGS)


def test_a_setting_trains_its_kind_of_model(verdict: ModuleType, digits: ra.ImageData) -> None:
    few = dataclasses.replace(digits, train=digits.train.subset(range(64)))
    threat = ra.ThreatModel("linf", 0.1)
    x = digits.test.images(range(4))
    models = {
        name: verdict.trained(dataclasses.replace(one, epochs=1), few, threat)
        for name, one in verdict.SETTINGS.items()
    }
    for name, model in models.items():
        assert model(x).shape == (4, 10), name
        pools = any(isinstance(one, torch.nn.MaxPool2d) for one in model.modules())
        assert pools == name.startswith("pooling"), name
    again = verdict.trained(dataclasses.replace(verdict.SETTINGS[name], epochs=1), few, threat)
    assert torch.equal(again(x), model(x))


def test_both_verdicts_are_on_the_same_images(verdict: ModuleType) -> None:
    asked = [
        "--setting",
        "strided-fgsm",
        "--data",
        "digits",
        "--eps",
        "0.1",
        "--samples",
        "8",
        "--epochs",
        "1",
    ]
    done = CliRunner().invoke(verdict.main, asked)
    assert done.exit_code == 0, done.output
    line = done.output.splitlines()[-1].split()
    assert line[0] == "strided-fgsm"
    clean, ours, theirs = (float(cell.rstrip("%")) for cell in line[1:4])
    assert max(ours, theirs) <= clean
    assert CliRunner().invoke(verdict.main, ["--setting", "no-such"]).exit_code == 2


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
