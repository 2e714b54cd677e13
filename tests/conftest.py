"""What several test files start from: a trained model, the command line, an empty folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import robustann as ra
from robustann.cli import main

# Needs atheris, which the test extra does not bring.
collect_ignore = ["fuzz.py"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums have one order, and workers of pytest-xdist do not get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits() -> ra.ImageData:
    return ra.load_data("digits")


@pytest.fixture(scope="session")
def model_file(digits: ra.ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CNN trained on the digits, saved."""
    trained = ra.train("small-cnn", digits, epochs=10)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    ra.save_model(trained.model, path, training=trained.training, metrics=trained.metrics)
    return path


@pytest.fixture
def model(model_file: Path):
    return ra.load_model(model_file)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["robustann", *map(str, arguments)])
        code = main._run()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; ``sys.path`` and imported modules are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path
