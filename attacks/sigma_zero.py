"""Sigma-zero: few changed entries, by gradient descent on a smooth count of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from robustann.attacks.base import Access, Attack, State, at_least
from robustann.attacks.losses import margin
from robustann.errors import UsageError

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle

# Adam's (Kingma and Ba, ICLR 2015).
_DECAY, _DECAY_SQUARE, _TINY = 0.9, 0.999, 1e-8


@dataclass(frozen=True, kw_only=True)
class SigmaZero(Attack):
    """Sigma-zero (Cinà et al., ICLR 2025), for the fewest changed entries.

    Adam descends on the margin, while it is not yet wrong, plus the mean over all entries of
    d^2 / (d^2 + sigma), a smooth count of the changes d. The gradient is divided by its largest
    entry. After each step, changes below a threshold are undone; the threshold rises while the
    image is adversarial and falls while it is not. A leak through closed ReLUs is added (see
    :func:`~robustann.attacks.relaxed.leaky_backward`).

    Args:
        steps: gradient steps, one forward and one backward each (the paper takes 1000).
        lr: the first learning rate; it falls to 0 along a cosine.
        sigma: how sharply the smooth count tells changed from unchanged.
        threshold: changes below it are undone at first, as a share of the width of the box.
        threshold_step: what the threshold moves by in a step, times the learning rate.
        leak: share of the gradient that passes closed ReLUs.

    >>> SigmaZero(steps=1000).label
    'sigma-zero:steps=1000'
    """

    name: ClassVar[str] = "sigma-zero"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.01879"
    access: ClassVar[Access] = "white-box"
    norms: ClassVar[frozenset[str]] = frozenset({"l0"})
    minimum_norm: ClassVar[bool] = True

    steps: int = 100
    lr: float = 1.0
    sigma: float = 1e-3
    threshold: float = 0.3
    threshold_step: float = 0.01
    leak: float = 0.02

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("threshold_step", self.threshold_step, 0)
        at_least("leak", self.leak, 0)
        for what, value in (("lr", self.lr), ("sigma", self.sigma)):
            if not value > 0:
                raise UsageError(f"expected {what} > 0, got {value}; choose a larger one")
        if not 0 <= self.threshold <= 1:
            raise UsageError(
                f"expected threshold from 0 to 1, got {self.threshold}; it is a share of the "
                "width of the box"
            )

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def cost(self) -> tuple[int, int]:
        return self.steps + 1, self.steps

    def init(self, oracle: Oracle) -> State:
        flat = oracle.x.flatten(1)
        return {
            "x": oracle.x,
            "threshold": torch.full_like(flat[:, :1], self.threshold),
            "mean": torch.zeros_like(flat),
            "square": torch.zeros_like(flat),
        }

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        threat, region = oracle.threat, oracle.region
        low, high = threat.bounds
        width = high - low
        x = state["x"]
        gradient = oracle.gradient(x, margin, leak=self.leak).flatten(1)
        fallen = oracle.fallen[:, None]

        # In units of the box, as the paper's images are.
        change = (x - oracle.x).flatten(1) / width
        slope = 2 * self.sigma * change / (change.square() + self.sigma).square()
        down = slope / change.shape[1] - gradient.masked_fill(fallen, 0.0) * width
        down = down / down.abs().amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        mean = _DECAY * state["mean"] + (1 - _DECAY) * down
        square = _DECAY_SQUARE * state["square"] + (1 - _DECAY_SQUARE) * down.square()
        steady = (square / (1 - _DECAY_SQUARE ** (iteration + 1))).sqrt() + _TINY
        rate = self.lr * (1 + math.cos(math.pi * iteration / self.steps)) / 2
        moved = change - rate * (mean / (1 - _DECAY ** (iteration + 1))) / steady

        drift = rate * self.threshold_step
        threshold = (state["threshold"] + torch.where(fallen, drift, -drift)).clamp(0.0, 1.0)
        proposal = torch.clamp(oracle.x + moved.view_as(x) * width, low, high)
        small = (proposal - oracle.x).flatten(1).abs() < threshold * width
        proposal = torch.where(small.view_as(x), oracle.x, proposal)
        return {
            "x": region.project(proposal),
            "threshold": threshold,
            "mean": mean,
            "square": square,
        }
