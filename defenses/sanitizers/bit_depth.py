"""Bit-depth reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustann.defenses.sanitizers.base import Sanitizer, in_range, smooth_round


@dataclass(kw_only=True, eq=False, repr=False)
class BitDepth(Sanitizer):
    """Rounds every value to one of ``2 ** bits`` levels (Xu et al., NDSS 2018).

    Args:
        bits: 1 to 8; 1 is black and white.

    >>> import torch
    >>> BitDepth(bits=1)(torch.tensor([[[[0.2, 0.7]]]]))
    tensor([[[[0., 1.]]]])
    """

    name: ClassVar[str] = "bit-depth"
    paper: ClassVar[str] = "https://arxiv.org/abs/1704.01155"
    helps: ClassVar[tuple[str, ...]] = (
        "attackers who do not know of it, with changes below half a level",
        "any attacker, on images nearly black and white, while the radius is below the distance "
        "of their values to the next rounding step",
    )
    limits: ClassVar[tuple[str, ...]] = (
        "attackers who pass gradients through the rounding (Athalye et al., ICML 2018)",
        "radii of half a level or more",
    )
    differentiable: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True

    bits: int = 4

    def check(self) -> None:
        in_range("bits", self.bits, 1, 8)

    def forward(self, x: Tensor) -> Tensor:
        top = (1 << self.bits) - 1
        # A remainder of zero slope would pass for a gradient.
        return (x.detach() * top).round_().div_(top)

    def surrogate(self, x: Tensor) -> Tensor:
        """The staircase with its steps smoothed."""
        top = (1 << self.bits) - 1
        return smooth_round(x * top) / top
