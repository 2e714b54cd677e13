"""HopSkipJump: walks along the boundary, and needs the predicted class alone."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from robustann.attacks.base import Access, QueryAttack, State, at_least

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle

# Images that are tried for one that is adversarial; steps along a normal, each half as long as the
# one before; and halvings of the way back from there.
_STARTS, _JUMPS, _HALVINGS = 60, 3, 4
# What an image from anywhere, and a step, must come nearer by to be worth a query; and the least
# distance, as a share, that the way back is searched down to.
_NEARER_START, _NEARER, _LEAST = 0.9, 0.995, 0.7


class _Query(NamedTuple):
    """What a query is for: the ``number``-th of its kind in a round, from 0."""

    kind: Literal["start", "bisect", "probe", "jump"]
    round: int
    number: int


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(QueryAttack):
    """Estimates the boundary's normal from decisions, steps along it, and bisects back to the
    boundary (Chen, Jordan and Wainwright, S&P 2020).

    A point on the boundary is probed in random directions; which of them are adversarial tells the
    normal. From a step along it the way back to the boundary ends nearer to the original. The
    probes grow with the square root of the round. It asks for predictions only, so neither masked
    gradients nor scores without slope stop it.

    Beyond the paper: the way back is the projection onto ever smaller balls around the original,
    box included, which makes l1 one of its norms; steps follow the normal in linf too, not its
    signs; a step is asked for from the start at a smaller distance than the best; and it begins
    with the nearest of several images from anywhere.

    Args:
        queries: forwards a sample.
        probes: directions of the first round.

    >>> HopSkipJump(queries=500).label
    'hopskipjump:queries=500'
    """

    name: ClassVar[str] = "hopskipjump"
    paper: ClassVar[str] = "https://arxiv.org/abs/1904.02144"
    access: ClassVar[Access] = "decision"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})
    minimum_norm: ClassVar[bool] = True

    probes: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("probes", self.probes, 1)

    def init(self, oracle: Oracle) -> State:
        x = oracle.x
        zero = torch.zeros_like(x[:, 0, 0, 0])
        state = {
            # The nearest adversarial image so far, how far it is, and where the way back from it
            # has met the other side.
            "point": x,
            "far": zero + torch.inf,
            "near": zero,
            # Probes of a round: their sum, that of the adversarial ones, and how many those are.
            "all": torch.zeros_like(x),
            "hits": torch.zeros_like(x),
            "count": zero,
        }
        return self._propose(oracle, state, self._plan(oracle)[0])

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        oracle.forward(state["x"])
        query, following = self._plan(oracle)[iteration : iteration + 2]
        fallen, x = oracle.fallen, state["x"]
        taken = fallen
        if query.kind == "bisect":
            middle = (state["near"] + state["far"]) / 2
            state = {**state, "near": torch.where(fallen, state["near"], middle)}
        elif query.kind == "probe":
            # The box may have cut it short.
            way = x - state["point"]
            state = {
                **state,
                "all": state["all"] + way,
                "hits": state["hits"] + way * fallen.view(-1, 1, 1, 1),
                "count": state["count"] + fallen,
            }
            # Where there was nothing to probe yet, it was one more image from anywhere.
            taken = fallen & state["far"].isinf()
        distance = oracle.threat.distance(x, oracle.x).to(x.dtype)
        taken = taken & (distance < state["far"])
        state = {
            **state,
            "point": torch.where(taken.view(-1, 1, 1, 1), x, state["point"]),
            "far": torch.where(taken, distance, state["far"]),
        }
        return self._propose(oracle, state, following)

    def _plan(self, oracle: Oracle) -> tuple[_Query, ...]:
        return _plan(self.queries, self.probes, oracle.x[0].numel())

    def _propose(self, oracle: Oracle, state: State, query: _Query) -> State:
        point, far, region = state["point"], state["far"], oracle.region
        lost = far.isinf()
        if query.kind == "bisect":
            if query.number == 0:
                least = _LEAST if query.round else 0.0
                near = torch.where(lost, torch.zeros_like(far), least * far)
                state = {**state, "near": near}
            return {**state, "x": region.project(point, (state["near"] + far) / 2)}
        noise = oracle.random.normal(*point.shape[1:])
        anywhere = region.project(_anywhere(oracle, noise, query.number), _NEARER_START * far)
        if query.kind == "start":
            return {**state, "x": anywhere}
        length = _length(point - oracle.x)
        if query.kind == "probe":
            if query.number == 0:
                zero = torch.zeros_like(noise)
                state = {**state, "all": zero, "hits": zero, "count": zero[:, 0, 0, 0]}
            # As far as a normal is of use where the boundary is as curved as a ball around x.
            way = noise / _length(noise) * length / math.sqrt(point[0].numel())
            asked = region.project(point + way)
        else:
            # In l1 a step is cut down to the few entries that the ball leaves room for: no less far
            # in later rounds.
            slower = 1.0 if oracle.threat.norm == "l1" else math.sqrt(query.round)
            size = 0.5**query.number / slower
            way = self._normal(oracle, state, query) * length * size
            asked = region.project(region.project(point + way), _NEARER * far)
        return {**state, "x": torch.where(lost.view(-1, 1, 1, 1), anywhere, asked)}

    def _normal(self, oracle: Oracle, state: State, query: _Query) -> Tensor:
        """Where the adversarial side lies, of Euclidean length one."""
        probes = _probes(self.probes, query.round)
        count = state["count"].view(-1, 1, 1, 1)
        # The mean over the adversarial ones, against that over all; where all are alike, that.
        normal = state["hits"] - count / probes * state["all"]
        normal = torch.where(count == probes, state["all"], normal)
        normal = torch.where(count == 0, -state["all"], normal)
        return normal / _length(normal)


def _probes(first: int, number: int) -> int:
    return round(first * math.sqrt(number))


@functools.lru_cache(maxsize=16)
def _plan(queries: int, probes: int, entries: int) -> tuple[_Query, ...]:
    """What each of the queries is for, for images of so many entries."""
    plan: list[_Query] = []

    def add(kind: Literal["start", "bisect", "probe", "jump"], number: int, of: int) -> None:
        plan.extend(_Query(kind, number, place) for place in range(of))

    add("start", 0, _STARTS)
    # From an image from anywhere it may be a long way.
    add("bisect", 0, math.ceil(math.log2(entries)) + _HALVINGS)
    number = 0
    while len(plan) < queries:
        number += 1
        add("probe", number, _probes(probes, number))
        add("jump", number, _JUMPS)
        add("bisect", number, _HALVINGS)
    return tuple(plan[:queries])


def _anywhere(oracle: Oracle, noise: Tensor, number: int) -> Tensor:
    """An image that has nothing to do with the original: noise, of finer and coarser grain by
    turns, every other one black and white."""
    low, high = oracle.threat.bounds
    height, width = noise.shape[2:]
    grain = 2 ** (number // 2 % 4)
    rows = torch.arange(height, device=noise.device) // grain * grain
    columns = torch.arange(width, device=noise.device) // grain * grain
    coarse = noise[:, :, rows][:, :, :, columns]
    share = (coarse > 0).to(noise.dtype) if number % 2 else torch.sigmoid(1.7 * coarse)
    return oracle.region.project(low + (high - low) * share)


def _length(delta: Tensor) -> Tensor:
    length: Tensor = delta.flatten(1).norm(dim=1).clamp(min=torch.finfo(delta.dtype).tiny)
    return length[:, None, None, None]
