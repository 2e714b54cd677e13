"""A trained model that several test files attack, audit and explain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import robustann as ra

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
