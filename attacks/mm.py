"""Minimum-margin ascent: the workhorse of the cascade."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from robustann.attacks.base import Access, Attack, State, at_least
from robustann.attacks.losses import margin
from robustann.errors import UsageError

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle


@dataclass(frozen=True, kw_only=True)
class MM(Attack):
    """Steepest ascent on the margin with a step that decays to nothing, from several sides.

    Margin losses do not saturate, and going for the runner-up classes one by one finds what the
    nearest one hides (MM: Gao et al., ICML 2022). A large first step crosses the ball, the last
    ones settle (A3: Liu et al., CVPR 2022). A leak through closed ReLUs in the backward pass finds
    its way where adversarial training has masked the gradient (see
    :func:`~robustann.attacks.relaxed.leaky_backward`).

    Args:
        steps: gradient steps of one start.
        restarts: starts, each with a fresh random point; from the best image one is enough.
        rank: 0 to make any other class overtake; k to go for the k-th runner-up of the best image
            so far. A model with fewer classes takes its last one.
        start: ``random``, a point of the ball; ``best``, where earlier attacks ended.
        step_scale: the first step, as a multiple of eps; the others decay linearly.
        leak: share of the gradient that passes closed ReLUs.

    >>> MM(steps=20, rank=2).label
    'mm:steps=20,rank=2'
    """

    name: ClassVar[str] = "mm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2206.07314"
    access: ClassVar[Access] = "white-box"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})

    steps: int = 25
    restarts: int = 1
    rank: int = 0
    start: str = "random"
    step_scale: float = 1.0
    leak: float = 0.02

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("restarts", self.restarts, 1)
        at_least("rank", self.rank, 0)
        if not 0 <= self.leak <= 1:
            raise UsageError(f"expected leak from 0 to 1, got {self.leak}; it is a share")
        if not 0 < self.step_scale < math.inf:
            raise UsageError(
                f"expected a finite step_scale > 0, got {self.step_scale}; it is a multiple of eps"
            )
        if self.start not in ("random", "best"):
            raise UsageError(f"expected start as random or best, got '{self.start}'")

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def starts(self) -> int:
        return self.restarts

    @property
    def cost(self) -> tuple[int, int]:
        look = 1 if self.rank else 0
        return self.starts * (self.steps + 1 + look), self.starts * self.steps

    def init(self, oracle: Oracle) -> State:
        state: State = {}
        if self.rank:
            logits = oracle.forward(oracle.best)
            others = logits.scatter(1, oracle.labels[:, None], -torch.inf)
            rank = min(self.rank, logits.shape[1] - 1)
            state["wanted"] = others.topk(rank, dim=1).indices[:, -1]
        state["x"] = (
            oracle.best if self.start == "best" else oracle.region.random_start(oracle.random)
        )
        return state

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        loss = margin
        if self.rank and not oracle.threat.targeted:
            wanted = state["wanted"]

            def loss(logits: Tensor, labels: Tensor, targeted: bool = False) -> Tensor:
                pair = torch.stack([wanted, labels], dim=1)
                chosen = logits.gather(1, pair)
                return chosen[:, 0] - chosen[:, 1]

        gradient = oracle.gradient(state["x"], loss, leak=self.leak)
        size = self.step_scale * oracle.threat.eps * (1 - iteration / self.steps)
        return {**state, "x": oracle.region.step(state["x"], gradient, size)}
