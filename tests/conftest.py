"""A trained model that several test files attack, audit and explain."""

from __future__ import annotations

from pathlib import Path

import pytest

import robustann as ra


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
