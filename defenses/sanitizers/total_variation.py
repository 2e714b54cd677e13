"""Total-variation minimisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustann.attacks.base import at_least
from robustann.defenses.sanitizers.base import Sanitizer, in_range


@dataclass(kw_only=True, eq=False, repr=False)
class TotalVariation(Sanitizer):
    """The image of least total variation near the given one (Guo et al., ICLR 2018).

    Minimises ``0.5 ||u - x||^2 + weight * TV(u)`` (Rudin, Osher and Fatemi, 1992), each channel by
    itself, with isotropic TV, by a fixed number of accelerated steps on the dual problem (Beck
    and Teboulle, 2009), all differentiable. Unlike in the paper no pixels are dropped at random,
    so it is deterministic.

    Args:
        weight: how much smoothing, above 0.
        steps: of the solver.

    >>> TotalVariation()(torch.full((1, 1, 4, 4), 0.25)).unique()
    tensor([0.2500])
    """

    name: ClassVar[str] = "tv"
    paper: ClassVar[str] = "https://arxiv.org/abs/1711.00117"
    helps: ClassVar[tuple[str, ...]] = ("attackers who do not know of it, with noise-like changes",)
    limits: ClassVar[tuple[str, ...]] = (
        "attackers who differentiate through the solver or pass it over (Athalye et al., ICML "
        "2018)",
        "images that live by texture, which it takes away",
    )
    differentiable: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    weight: float = 0.1
    steps: int = 40

    def check(self) -> None:
        in_range("weight", self.weight, 1e-6, 1e3)
        at_least("steps", self.steps, 1)

    def forward(self, x: Tensor) -> Tensor:
        down = right = fast_down = fast_right = torch.zeros_like(x)
        pace = 1.0
        for _ in range(self.steps):
            slope_down, slope_right = _differences(
                x - self.weight * _adjoint(fast_down, fast_right)
            )
            # 8 bounds the squared norm of the differences in two dimensions.
            new_down = fast_down + slope_down / (8 * self.weight)
            new_right = fast_right + slope_right / (8 * self.weight)
            # The root of what is at least 1: it has a derivative where both are zero.
            length = (new_down.square() + new_right.square()).clamp(min=1.0).sqrt()
            new_down, new_right = new_down / length, new_right / length
            new_pace = (1 + math.sqrt(1 + 4 * pace**2)) / 2
            ahead = (pace - 1) / new_pace
            fast_down = new_down + ahead * (new_down - down)
            fast_right = new_right + ahead * (new_right - right)
            down, right, pace = new_down, new_right, new_pace
        return (x - self.weight * _adjoint(down, right)).clamp(0.0, 1.0)


def objective(u: Tensor, x: Tensor, weight: float) -> Tensor:
    """``0.5 ||u - x||^2 + weight * TV(u)`` of each image, (N,).

    >>> x = torch.tensor([[[[0.0, 1.0]]]])
    >>> objective(x, x, 0.1)
    tensor([0.1000])
    """
    down, right = _differences(u)
    variation = (down.square() + right.square()).sqrt().flatten(1).sum(1)
    return 0.5 * (u - x).square().flatten(1).sum(1) + weight * variation


def _differences(u: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences down and to the right, zero at the last row and column."""
    return (
        torch.cat([u[..., 1:, :], u[..., -1:, :]], dim=2) - u,
        torch.cat([u[..., :, 1:], u[..., :, -1:]], dim=3) - u,
    )


def _adjoint(down: Tensor, right: Tensor) -> Tensor:
    """The adjoint of :func:`_differences`."""
    down, right = down[..., :-1, :], right[..., :, :-1]
    return (
        F.pad(down, (0, 0, 1, 0))
        - F.pad(down, (0, 0, 0, 1))
        + F.pad(right, (1, 0, 0, 0))
        - F.pad(right, (0, 1, 0, 0))
    )
