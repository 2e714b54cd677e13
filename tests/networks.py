"""Small networks on scikit-learn's digits, which several test files attack, each trained once."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images (N, 1, 8, 8) in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    return torch.from_numpy(data / 16).float().view(-1, 1, 8, 8), torch.from_numpy(labels).long()


def convolutional() -> nn.Module:
    """Without any defense, trained for a second on all but the last 360 digits; a copy."""
    return copy.deepcopy(_convolutional())


def perceptron() -> nn.Module:
    """A hidden layer of 48, trained on the first 1,400 digits; a copy."""
    return copy.deepcopy(_perceptron())


@functools.cache
def _convolutional() -> nn.Module:
    x, labels = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(200):
            batch = torch.randint(len(x) - 360, (128,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@functools.cache
def _perceptron() -> nn.Module:
    x, labels = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(model(x[:1400]), labels[:1400]).backward()
            optimizer.step()
    return model.eval()
