"""What clumsy, tired or hurried users do to the command line, and what must not be lost by it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import robustann as ra
from robustann.cli import main


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["robustann", *map(str, arguments)])
        code = main._run()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def audit_arguments(model_file: Path, *more: str) -> list[str]:
    return [
        *("audit", "--model", str(model_file), "--data", "digits", "--eps", "0.1"),
        *("--attack", "fgsm", "--max-samples", "16", "--no-trust", "--no-curve", "--no-explain"),
        *("--output-dir", "out", *more),
    ]


@pytest.mark.parametrize("shares", [("0.99", "0.01"), ("0.01", "0.99")])
def test_the_largest_threshold_of_a_metric_counts(run, model_file, shares):
    gates = [f"--fail-under=robust_accuracy={share}" for share in shares]
    code, _, err = run(*audit_arguments(model_file, *gates))
    assert code == 1
    assert "under 99.0 %" in err


def test_help_says_what_a_gate_compares(run):
    code, out, _ = run("audit", "--help")
    words = " ".join(out.split())
    assert code == 0
    assert "lower end of the 95 % interval is compared, which never reaches 1.0" in words
