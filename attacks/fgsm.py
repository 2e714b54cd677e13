"""The fast gradient sign method, and its steepest-descent form for other norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from robustann.attacks.base import Access, Attack, State
from robustann.attacks.losses import get_loss

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One steepest step of length eps from the original (Goodfellow et al., ICLR 2015).

    Weak by design: where it does better than PGD, gradients are masked.

    Args:
        loss: ``ce``, ``margin`` or ``dlr``.

    >>> FGSM().cost
    (2, 1)
    """

    name: ClassVar[str] = "fgsm"
    paper: ClassVar[str] = "https://arxiv.org/abs/1412.6572"
    access: ClassVar[Access] = "white-box"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})

    loss: str = "ce"

    def __post_init__(self) -> None:
        get_loss(self.loss)

    @property
    def iterations(self) -> int:
        return 1

    @property
    def cost(self) -> tuple[int, int]:
        return 2, 1

    def init(self, oracle: Oracle) -> State:
        return {"x": oracle.x}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        gradient = oracle.gradient(state["x"], get_loss(self.loss))
        return {"x": oracle.region.step(state["x"], gradient, oracle.threat.eps)}
