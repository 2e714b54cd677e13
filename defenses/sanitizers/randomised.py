"""Sanitizers that draw: random resizing and padding, Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustann.defenses.sanitizers.base import Sanitizer, in_range

_EOT = (
    "attackers who average gradients over many draws (EOT: Athalye et al., ICML 2018); judged on "
    "the average, little of the randomness is left"
)


@dataclass(kw_only=True, eq=False, repr=False)
class ResizePad(Sanitizer):
    """Shrinks each image to a random size and puts it at a random place on black (Xie et al.,
    ICLR 2018).

    The paper enlarges into a wider frame; here the frame keeps the size of the image, so that
    any model can follow. Sizes and places are drawn for each image alone, evenly among whole
    pixels; interpolation is bilinear.

    Args:
        scale: the smallest size as a share of the image's, above 0 and at most 1.

    >>> ResizePad(scale=0.5)(torch.rand(2, 3, 8, 6)).shape
    torch.Size([2, 3, 8, 6])
    """

    name: ClassVar[str] = "resize-pad"
    paper: ClassVar[str] = "https://arxiv.org/abs/1711.01991"
    helps: ClassVar[tuple[str, ...]] = (
        "attackers who do not know of it, or who attack one draw only",
    )
    limits: ClassVar[tuple[str, ...]] = (_EOT,)
    differentiable: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False

    scale: float = 0.85

    def check(self) -> None:
        in_range("scale", self.scale, 0.01, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        shrink = torch.rand(len(x), device=x.device)
        rows, columns = (
            _placement(size, self.scale, shrink, torch.rand(len(x), device=x.device)).to(x.dtype)
            for size in x.shape[2:]
        )
        placed = rows[:, None] @ x @ columns[:, None].mT
        return placed.clamp(0.0, 1.0)


def _placement(size: int, scale: float, shrink: Tensor, place: Tensor) -> Tensor:
    """Bilinear resizing to a new size and a shift, of each of N lines, as matrices (N, size,
    size) to apply to the line; ``shrink`` and ``place`` in [0, 1) choose both."""
    least = max(1, round(scale * size))
    new = (least + (shrink * (size + 1 - least)).floor()).clamp(max=size)[:, None]
    start = (place[:, None] * (size - new + 1)).floor()
    inside = torch.arange(size, device=shrink.device) - start
    source = ((inside + 0.5) * size / new - 0.5).clamp(0, size - 1)
    low = source.floor()
    weight = source - low
    high = (low + 1).clamp(max=size - 1)
    matrix = torch.zeros(len(shrink), size, size, device=shrink.device)
    matrix.scatter_add_(2, low.long()[..., None], (1 - weight)[..., None])
    matrix.scatter_add_(2, high.long()[..., None], weight[..., None])
    return matrix * ((inside >= 0) & (inside < new))[..., None]


@dataclass(kw_only=True, eq=False, repr=False)
class GaussianNoise(Sanitizer):
    """Adds normal noise, as randomised smoothing does (Cohen et al., ICML 2019), then clips.

    Alone it certifies nothing: for that many draws must vote, and the noise stay unclipped.

    Args:
        sigma: standard deviation of the noise, above 0 and at most 10.

    >>> bool(GaussianNoise()(torch.rand(1, 1, 8, 8)).min() >= 0)
    True
    """

    name: ClassVar[str] = "noise"
    paper: ClassVar[str] = "https://arxiv.org/abs/1902.02918"
    helps: ClassVar[tuple[str, ...]] = (
        "l2 attackers, a little, where the model was trained with this noise",
    )
    limits: ClassVar[tuple[str, ...]] = (
        _EOT,
        "models that were trained without noise, which lose clean accuracy",
    )
    differentiable: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False

    sigma: float = 0.25

    def check(self) -> None:
        in_range("sigma", self.sigma, 1e-4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.sigma * torch.randn_like(x)).clamp(0.0, 1.0)
