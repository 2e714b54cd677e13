"""The Square attack: random search over square patches, no gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from robustann.attacks.base import Access, QueryAttack, State
from robustann.errors import UsageError

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle

# Share of pixels in a square, halved when this many of 10,000 queries are done (the paper's).
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True, kw_only=True)
class Square(QueryAttack):
    """Random squares at the edge of the ball; what lowers the margin stays (Andriushchenko et al.,
    ECCV 2020).

    It asks for logits only, so masked gradients do not stop it. From the best image of a gradient
    attack it needs far fewer queries than from scratch.

    linf: a square of side sqrt(p * H * W) is set to +-eps, one sign a channel; from scratch the
    search begins with vertical stripes. l2: the change within a random window is taken away, and
    what the ball then allows is spent in another window, in a centred bump of random sign. l1: the
    same, with lengths and windows as fit that norm (for which Croce and Hein, ICML 2021, adapt it
    too): down to one pixel of one channel, and taken away where there is a change.

    Args:
        queries: forwards a sample.
        p: share of the pixels in the first squares; it falls in nine halvings.
        start: ``stripes``, from scratch; ``best``, where earlier attacks ended.

    >>> Square(queries=100, start="best").label
    'square:queries=100,start=best'
    """

    name: ClassVar[str] = "square"
    paper: ClassVar[str] = "https://arxiv.org/abs/1912.00049"
    access: ClassVar[Access] = "score"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})

    p: float = 0.8
    start: str = "stripes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise UsageError(f"expected p above 0 and at most 1, got {self.p}")
        if self.start not in ("stripes", "best"):
            raise UsageError(f"expected start as stripes or best, got '{self.start}'")

    def init(self, oracle: Oracle) -> State:
        if self.start == "best":
            known = {"best": oracle.best, "value": oracle.best_margin}
            return {**known, "x": self._propose(oracle, oracle.best, 0)}
        # What other attacks found does not count: the first image is the best one.
        known = {"best": oracle.x, "value": torch.full_like(oracle.best_margin, torch.inf)}
        if oracle.threat.norm == "linf":
            channels, _, width = oracle.x.shape[1:]
            signs = oracle.random.sign(channels, 1, width)
            return {**known, "x": oracle.region.project(oracle.x + signs * oracle.threat.eps)}
        if oracle.threat.norm == "l1":
            # A random point of that ball hardly differs from the original.
            return {**known, "x": self._propose(oracle, oracle.x, 0)}
        return {**known, "x": oracle.region.random_start(oracle.random)}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        oracle.forward(state["x"])
        # Not the engine's best image, for that is known only once it has judged.
        gap = oracle.gap
        better = gap < state["value"]
        best = torch.where(better.view(-1, 1, 1, 1), state["x"], state["best"])
        value = torch.where(better, gap, state["value"])
        return {"x": self._propose(oracle, best, iteration + 1), "best": best, "value": value}

    def _propose(self, oracle: Oracle, x: Tensor, query: int) -> Tensor:
        channels, height, width = x.shape[1:]
        done = 10_000 * query / self.queries
        share = self.p / 2 ** sum(done > mark for mark in _HALVINGS)
        side = max(1, min(round(math.sqrt(share * height * width)), height, width))
        if oracle.threat.norm == "linf":
            window = _window(oracle, side, height, width)
            edge = oracle.x + oracle.random.sign(channels, 1, 1) * oracle.threat.eps
            return oracle.region.project(torch.where(window, edge, x))
        least = 1 if oracle.threat.norm == "l1" else min(3, height, width)
        return self._move_energy(oracle, x, max(side, least))

    def _move_energy(self, oracle: Oracle, x: Tensor, side: int) -> Tensor:
        """l2, l1: empty one window, fill another up to the sphere."""
        power = 1 if oracle.threat.norm == "l1" else 2

        def length(part: Tensor) -> Tensor:
            long: Tensor = torch.linalg.vector_norm(part.flatten(1), power, dim=1)
            return long.view(-1, 1, 1, 1)

        channels, height, width = x.shape[1:]
        delta = x - oracle.x
        source, target = (_window(oracle, side, height, width) for _ in range(2))
        sign = oracle.random.sign(channels, 1, 1)
        if power == 1:
            # Changes are sparse there: most windows have none to give, and who spreads them over
            # the channels wastes them.
            source = _around_change(oracle, delta, side)
            chosen = (oracle.random.uniform(1) * channels).long().view(-1, 1, 1, 1)
            order = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
            target = target & (order == chosen)
        delta = torch.where(source & ~target, torch.zeros_like(delta), delta)
        rows = torch.arange(height, device=x.device).view(1, 1, height, 1)
        columns = torch.arange(width, device=x.device).view(1, 1, 1, width)
        anywhere = target.any(1, keepdim=True)
        top = anywhere.any(3, keepdim=True).float().argmax(2, keepdim=True)
        left = anywhere.any(2, keepdim=True).float().argmax(3, keepdim=True)
        middle = (side - 1) / 2
        away = (rows - top - middle).abs() + (columns - left - middle).abs()
        bump = torch.where(target, 1 / (1 + away), torch.zeros_like(delta))
        inside = torch.where(target, delta, torch.zeros_like(delta))
        # Old change and new bump share the window, as in the paper.
        mixed = bump / length(bump) * sign + inside / length(inside).clamp(min=1e-12)
        mixed = mixed / length(mixed).clamp(min=1e-12)
        rest = length(torch.where(target, torch.zeros_like(delta), delta))
        left_over = (oracle.threat.eps**power - rest**power).clamp(min=0) ** (1 / power)
        return oracle.region.project(oracle.x + torch.where(target, mixed * left_over, delta))


def _window(oracle: Oracle, side: int, height: int, width: int) -> Tensor:
    """A random square for each sample, as a mask (M, 1, H, W)."""
    place = oracle.random.uniform(2)
    top = (place[:, 0] * (height - side + 1)).long().view(-1, 1, 1, 1)
    left = (place[:, 1] * (width - side + 1)).long().view(-1, 1, 1, 1)
    rows = torch.arange(height, device=place.device).view(1, 1, height, 1)
    columns = torch.arange(width, device=place.device).view(1, 1, 1, width)
    return (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)


def _around_change(oracle: Oracle, delta: Tensor, side: int) -> Tensor:
    """A square around a changed pixel of each sample, drawn by how much it is changed, as a mask
    (M, 1, H, W)."""
    height, width = delta.shape[2:]
    passed = delta.abs().sum(1).flatten(1).cumsum(1)
    drawn = (
        (oracle.random.uniform(1) * passed[:, -1:] >= passed).sum(1).clamp(max=height * width - 1)
    )
    top, left = drawn // width - side // 2, drawn % width - side // 2
    rows = torch.arange(height, device=delta.device).view(1, 1, height, 1) - top.view(-1, 1, 1, 1)
    columns = torch.arange(width, device=delta.device).view(1, 1, 1, width) - left.view(-1, 1, 1, 1)
    return (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
