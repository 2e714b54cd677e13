"""Decoupled direction and norm: the gradient turns the change, the judgement sets its length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from robustann.attacks.base import Access, Attack, State, at_least
from robustann.attacks.losses import cross_entropy
from robustann.errors import UsageError

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle


@dataclass(frozen=True, kw_only=True)
class DDN(Attack):
    """Decoupled direction and norm attack (Rony et al., CVPR 2019), for the nearest image in l2.

    The change of an image is turned by a normalised gradient step on cross-entropy, and its
    length is then set: shorter by the factor 1 - gamma than before where the image was
    adversarial, longer by 1 + gamma where it was not. The paper's rounding to 256 grey levels is
    left out. A leak through closed ReLUs is added (see
    :func:`~robustann.attacks.relaxed.leaky_backward`).

    Args:
        steps: gradient steps, one forward and one backward each. Their size falls from 1 to 0.01
            along a cosine.
        gamma: share by which the length changes in a step.
        init_norm: the first length.
        leak: share of the gradient that passes closed ReLUs.

    >>> DDN(steps=300).label
    'ddn:steps=300'
    """

    name: ClassVar[str] = "ddn"
    paper: ClassVar[str] = "https://arxiv.org/abs/1811.09600"
    access: ClassVar[Access] = "white-box"
    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimum_norm: ClassVar[bool] = True

    steps: int = 100
    gamma: float = 0.05
    init_norm: float = 1.0
    leak: float = 0.02

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("leak", self.leak, 0)
        if not 0 < self.gamma < 1:
            raise UsageError(f"expected gamma above 0 and below 1, got {self.gamma}")
        if not self.init_norm > 0:
            raise UsageError(f"expected init_norm > 0, got {self.init_norm}; it is a length")

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def cost(self) -> tuple[int, int]:
        return self.steps + 1, self.steps

    def init(self, oracle: Oracle) -> State:
        # The original is not adversarial: its judgement lengthens this to init_norm.
        radius = torch.full((len(oracle),), self.init_norm / (1 + self.gamma))
        return {"x": oracle.x, "radius": radius.to(oracle.x.device)}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        x, threat = state["x"], oracle.threat
        gradient = oracle.gradient(x, cross_entropy, leak=self.leak)
        radius = state["radius"] * torch.where(oracle.fallen, 1 - self.gamma, 1 + self.gamma)
        radius = radius.clamp(max=threat.widest(x[0].numel()))
        size = 0.01 + 0.99 * (1 + math.cos(math.pi * iteration / self.steps)) / 2
        # A step of length "radius" along the change, from the original: its length set anew.
        turned = x + threat.steepest_step(gradient, size) - oracle.x
        change = threat.steepest_step(turned, 1.0) * radius.view(-1, 1, 1, 1)
        return {"x": oracle.region.project(oracle.x + change), "radius": radius}
