"""The benchmarks that a page names run, and train what the page says."""

from __future__ import annotations

import dataclasses
import re
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


@pytest.mark.parametrize("page", ["docs/published.md", "benchmarks/README.md"])
def test_every_row_beside_autoattack_has_its_setting(page: str, verdict: ModuleType) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    part = text.split("The verdict beside AutoAttack")[1].split("\n## ")[0]
    table = [line for line in part.splitlines() if line.startswith("| ")]
    named = part.split("`--setting` ")[1].split(".")[0]
    assert re.split(r",\s+|\s+and\s+", named) == list(verdict.SETTINGS)
    # Its head and the line under it are no rows.
    assert len(table) - 2 == len(verdict.SETTINGS)


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
