"""Projected gradient descent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from robustann.attacks.base import Access, Attack, State, at_least
from robustann.attacks.losses import get_loss
from robustann.errors import UsageError

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected steepest ascent from random starts (Madry et al., ICLR 2018).

    Args:
        steps: gradient steps of one start.
        step_size: length of a step in the norm of the threat model; None means
            ``2.5 * eps / steps``, which reaches the far side of the ball and back.
        restarts: fresh random starts; each goes only to samples that still stand.
        loss: ``ce``, ``margin`` or ``dlr``.
        random_start: begin at a random point of the ball; otherwise at the original.

    >>> PGD(steps=40, step_size=0.01).label
    'pgd:step_size=0.01'
    """

    name: ClassVar[str] = "pgd"
    paper: ClassVar[str] = "https://arxiv.org/abs/1706.06083"
    access: ClassVar[Access] = "white-box"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})

    steps: int = 40
    step_size: float | None = None
    restarts: int = 1
    loss: str = "ce"
    random_start: bool = True

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("restarts", self.restarts, 1)
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise UsageError(
                f"expected a finite step_size > 0, got {self.step_size}; leave it out for "
                "2.5 * eps / steps"
            )
        get_loss(self.loss)

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def starts(self) -> int:
        # Without a random start, a second one would repeat the first.
        return self.restarts if self.random_start else 1

    @property
    def cost(self) -> tuple[int, int]:
        return self.starts * (self.steps + 1), self.starts * self.steps

    def init(self, oracle: Oracle) -> State:
        if self.random_start:
            return {"x": oracle.region.random_start(oracle.random)}
        return {"x": oracle.x}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        size = self.step_size
        if size is None:
            size = 2.5 * oracle.threat.eps / self.steps
        gradient = oracle.gradient(state["x"], get_loss(self.loss))
        return {"x": oracle.region.step(state["x"], gradient, size)}
