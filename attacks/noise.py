"""Random noise: the control that tells what an attack adds to mere disturbance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from robustann.attacks.base import Access, Attack, State, at_least

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle


@dataclass(frozen=True, kw_only=True)
class UniformNoise(Attack):
    """Random points of the allowed region, uniform in the ball: no attack, but its control.

    Args:
        draws: points tried for each sample.

    >>> UniformNoise(draws=3).cost
    (3, 0)
    """

    name: ClassVar[str] = "noise"
    paper: ClassVar[str] = ""
    access: ClassVar[Access] = "none"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1", "l0"})
    control: ClassVar[bool] = True

    draws: int = 10

    def __post_init__(self) -> None:
        at_least("draws", self.draws, 1)

    @property
    def iterations(self) -> int:
        # The engine looks at the last proposal itself.
        return self.draws - 1

    @property
    def cost(self) -> tuple[int, int]:
        return self.draws, 0

    def init(self, oracle: Oracle) -> State:
        return {"x": oracle.region.random_start(oracle.random)}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        oracle.forward(state["x"])
        return {"x": oracle.region.random_start(oracle.random)}
