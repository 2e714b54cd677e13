"""The momentum iterative fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from robustann.attacks.base import Access, Attack, State, at_least
from robustann.attacks.losses import get_loss

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle


@dataclass(frozen=True, kw_only=True)
class MIFGSM(Attack):
    """Steps along an accumulated gradient (Dong et al., CVPR 2018).

    Each gradient is divided by the sum of its absolute entries before it is added to ``decay``
    times what has been gathered; a step has length ``eps / steps``. Weaker than PGD on the model
    itself; made for images that also fool other models.

    Args:
        steps: gradient steps, from the original.
        decay: share of the gathered gradient that stays; 0 is the iterative FGSM.
        loss: ``ce``, ``margin`` or ``dlr``.

    >>> MIFGSM(steps=5, decay=0.9).label
    'mifgsm:steps=5,decay=0.9'
    """

    name: ClassVar[str] = "mifgsm"
    paper: ClassVar[str] = "https://arxiv.org/abs/1710.06081"
    access: ClassVar[Access] = "white-box"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})

    steps: int = 10
    decay: float = 1.0
    loss: str = "ce"

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("decay", self.decay, 0)
        get_loss(self.loss)

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def cost(self) -> tuple[int, int]:
        return self.steps + 1, self.steps

    def init(self, oracle: Oracle) -> State:
        return {"x": oracle.x, "gathered": torch.zeros_like(oracle.x)}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        gradient = oracle.gradient(state["x"], get_loss(self.loss))
        length = gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
        unit = gradient / length.clamp(min=torch.finfo(length.dtype).tiny)
        gathered = self.decay * state["gathered"] + unit
        x = oracle.region.step(state["x"], gathered, oracle.threat.eps / self.steps)
        return {"x": x, "gathered": gathered}
