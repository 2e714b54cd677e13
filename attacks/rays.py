"""RayS: a search along sign directions that needs the predicted class alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from robustann.attacks.base import Access, QueryAttack, State
from robustann.errors import UsageError

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle


@dataclass(frozen=True, kw_only=True)
class RayS(QueryAttack):
    """Flips blocks of a sign vector, and keeps what is adversarial nearer by (Chen and Gu, KDD
    2020).

    For linf the nearest adversarial image lies, or nearly so, in a direction whose entries are all
    +1 or -1, so the search needs no gradient estimate: it flips a block of the best direction, asks
    once whether the image at the best radius stays adversarial, and only then bisects for the new
    radius. The blocks halve from the whole image down to single entries. It asks for predictions
    only, so neither masked gradients nor scores without slope stop it.

    Beyond the paper: after a sweep down to single entries it sweeps again, and once a sweep gains
    nothing it begins anew with random vertical stripes; the engine keeps the nearest of all.

    Args:
        queries: forwards a sample.
        tolerance: where bisection ends, as a share of the range of images.
        start: ``ones``, the paper's first direction; ``best``, that of the image where earlier
            attacks ended.

    >>> RayS(queries=500).label
    'rays:queries=500'
    """

    name: ClassVar[str] = "rays"
    paper: ClassVar[str] = "https://arxiv.org/abs/2006.12792"
    access: ClassVar[Access] = "decision"
    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimum_norm: ClassVar[bool] = True

    tolerance: float = 0.001
    start: str = "ones"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tolerance < 1:
            raise UsageError(f"expected tolerance above 0 and under 1, got {self.tolerance}")
        if self.start not in ("ones", "best"):
            raise UsageError(f"expected start as ones or best, got '{self.start}'")

    def init(self, oracle: Oracle) -> State:
        flat = oracle.x.flatten(1)
        low, high = oracle.threat.bounds
        sign = torch.ones_like(flat)
        if self.start == "best":
            sign[oracle.best.flatten(1) < flat] = -1.0
        span = torch.full_like(flat[:, 0], high - low)
        ones = torch.ones_like(oracle.labels)
        state = {
            "sign": sign,
            "trial": sign,
            "radius": span,
            # Between these a bisection looks for the boundary along the trial.
            "near": torch.zeros_like(span),
            "far": span,
            "bisecting": ones < 0,
            # How many blocks there are, and which one the trial has flipped: none at first.
            "blocks": ones,
            "block": -ones,
            "gained": ones < 0,
        }
        return self._propose(oracle, state)

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        oracle.forward(state["x"])
        low, high = oracle.threat.bounds
        fallen, bisecting, asked = oracle.fallen, state["bisecting"], state["asked"]
        near = torch.where(bisecting & ~fallen, asked, state["near"])
        far = torch.where(bisecting & fallen, asked, state["far"])
        # What is adversarial at the best radius of all is worth a bisection.
        going = bisecting | fallen
        better = going & (far - near <= self.tolerance * (high - low))
        gain = state["radius"] - far > self.tolerance * (high - low)
        state = {
            **state,
            "sign": torch.where(better[:, None], state["trial"], state["sign"]),
            "radius": torch.where(better, far, state["radius"]),
            "gained": state["gained"] | (better & gain),
        }
        over = better | ~going
        following = self._following(oracle, state)
        state = {
            name: torch.where(over[:, None] if value.dim() == 2 else over, following[name], value)
            for name, value in state.items()
            if name in following
        }
        return self._propose(
            oracle,
            {
                **state,
                "near": torch.where(over, torch.zeros_like(near), near),
                "far": torch.where(over, state["radius"], far),
                "bisecting": going & ~over,
            },
        )

    @staticmethod
    def _following(oracle: Oracle, state: State) -> State:
        """The state with the next block flipped; where a whole sweep has gained nothing, with a
        fresh direction."""
        channels, _, width = oracle.x.shape[1:]
        low, high = oracle.threat.bounds
        sign, size = state["sign"], state["sign"].shape[1]
        block = state["block"] + 1
        finer = block == state["blocks"]
        ended = finer & (state["blocks"] == size)
        blocks = torch.where(finer, (2 * state["blocks"]).clamp(max=size), state["blocks"])
        blocks = torch.where(ended, torch.ones_like(blocks), blocks)
        block = torch.where(finer, torch.zeros_like(block), block)
        stuck = ended & ~state["gained"]
        stripes = oracle.random.sign(channels, 1, width).expand_as(oracle.x).flatten(1)
        sign = torch.where(stuck[:, None], stripes, sign)
        place = torch.arange(size, device=sign.device)
        flipped = (place * blocks[:, None] // size == block[:, None]) & ~stuck[:, None]
        return {
            "sign": sign,
            "trial": torch.where(flipped, -sign, sign),
            "radius": torch.where(stuck, high - low, state["radius"]),
            "blocks": blocks,
            "block": torch.where(stuck, -torch.ones_like(block), block),
            "gained": state["gained"] & ~ended,
        }

    @staticmethod
    def _propose(oracle: Oracle, state: State) -> State:
        near, far = state["near"], state["far"]
        # Most gains are small: plain halving would take as many queries for each as for the first.
        within = torch.maximum((near + far) / 2, 0.9 * far)
        asked = torch.where(state["bisecting"], within, state["radius"])
        x = oracle.x + state["trial"].view_as(oracle.x) * asked.view(-1, 1, 1, 1)
        return {**state, "asked": asked, "x": oracle.region.project(x)}
