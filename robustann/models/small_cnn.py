"""A small network for digits and MNIST, quick on a CPU."""

from __future__ import annotations

from torch import nn

from robustann.errors import UsageError

_SMALLEST = 4  # two convolutions of stride 2 leave one pixel of it


def small_cnn(num_classes: int, shape: tuple[int, int, int]) -> nn.Sequential:
    """Two strided convolutions and two linear layers.

    The convolutions are those that Wong & Kolter (2018, arXiv:1711.00851) train on MNIST, with
    32 and 64 filters. No batch norm: a sample's logits never depend on its batch. Every ReLU is
    a module of its own, because attribution methods hook modules.

    Args:
        num_classes: length of the logits.
        shape: (C, H, W) of the images; H and W at least 4.

    Raises:
        UsageError: the images are smaller.

    >>> sum(p.numel() for p in small_cnn(10, (1, 8, 8)).parameters())
    67562
    """
    channels, height, width = shape
    if min(height, width) < _SMALLEST:
        raise UsageError(
            f"expected images of at least {_SMALLEST}x{_SMALLEST} pixels for small-cnn, "
            f"got {height}x{width}; use larger images"
        )
    return nn.Sequential(
        nn.Conv2d(channels, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )
