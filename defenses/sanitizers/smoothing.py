"""Median and Gaussian smoothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustann.defenses.sanitizers.base import Sanitizer, in_range


@dataclass(kw_only=True, eq=False, repr=False)
class Median(Sanitizer):
    """Each value becomes the median of a window around it (Xu et al., NDSS 2018).

    Edges are repeated. As ``scipy.ndimage.median_filter(mode="nearest")``, channel by channel: a
    window of even size reaches one further up and left, and takes the upper of the two middles.

    Args:
        size: side of the window in pixels, 2 to 11.

    >>> x = torch.zeros(1, 1, 3, 3)
    >>> x[0, 0, 1, 1] = 1.0
    >>> Median(size=3)(x).max()
    tensor(0.)
    """

    name: ClassVar[str] = "median"
    paper: ClassVar[str] = "https://arxiv.org/abs/1704.01155"
    helps: ClassVar[tuple[str, ...]] = (
        "attackers who do not know of it, above all with few changed pixels (l0)",
    )
    limits: ClassVar[tuple[str, ...]] = (
        "attackers who differentiate through the median (He et al., WOOT 2017)",
        "small images, whose details it takes away",
    )
    differentiable: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    size: int = 3

    def check(self) -> None:
        in_range("size", self.size, 2, 11)

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.size // 2, self.size - 1 - self.size // 2
        height, width = x.shape[2:]
        padded = F.pad(x, (before, after, before, after), mode="replicate")
        window = torch.stack(
            [
                padded[..., down : down + height, right : right + width]
                for down in range(self.size)
                for right in range(self.size)
            ]
        )
        # Stable, so that among equal values the derivative goes to the same one on every device.
        return window.sort(dim=0, stable=True).values[self.size**2 // 2]


@dataclass(kw_only=True, eq=False, repr=False)
class GaussianBlur(Sanitizer):
    """Convolution with a Gaussian, cut off at four standard deviations; edges are repeated.

    As ``scipy.ndimage.gaussian_filter(mode="nearest")``, channel by channel.

    Args:
        sigma: standard deviation in pixels, above 0 and at most 20.

    >>> GaussianBlur(sigma=0.5)(torch.full((1, 1, 4, 4), 0.25)).max()
    tensor(0.2500)
    """

    name: ClassVar[str] = "gaussian"
    paper: ClassVar[str] = "https://arxiv.org/abs/1612.07767"
    helps: ClassVar[tuple[str, ...]] = ("attackers who do not know of it, with fine-grained noise",)
    limits: ClassVar[tuple[str, ...]] = (
        "attackers who differentiate through it: it is one more linear layer (Carlini and Wagner, "
        "AISec 2017)",
        "small images, whose details it takes away",
    )
    differentiable: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    sigma: float = 1.0

    def check(self) -> None:
        in_range("sigma", self.sigma, 1e-3, 20)

    def forward(self, x: Tensor) -> Tensor:
        reach = int(4 * self.sigma + 0.5)
        bell = [math.exp(-0.5 * (step / self.sigma) ** 2) for step in range(-reach, reach + 1)]
        # Sums of shifted images, not a convolution: no image's last bits hang on its batch.
        for pad, axis in (((reach, reach, 0, 0), 3), ((0, 0, reach, reach), 2)):
            size = x.shape[axis]
            padded = F.pad(x, pad, mode="replicate")
            x = torch.zeros_like(x)
            for step, weight in enumerate(bell):
                x = x + padded.narrow(axis, step, size) * (weight / sum(bell))
        # The rounded weights may sum to a little over 1.
        return x.clamp(0.0, 1.0)
