"""Auto-PGD: projected gradient ascent that sets its own step size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from robustann.attacks.base import Access, Attack, State, at_least
from robustann.attacks.losses import Loss, get_loss
from robustann.attacks.ranking import check_targets, lead, runner_up
from robustann.errors import UsageError
from robustann.threat import ThreatModel

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle

# How much of the proposed move is made; the rest repeats the last one.
_MOMENTUM = 0.75
# l1 (Croce and Hein, ICML 2021): share of the entries in the first step, share of the steps
# between two checkpoints, how much sparser a step is than the best change, when a change counts
# as having become sparser, by how much a step shrinks, and down to which share of eps.
_L1_ENTRIES, _L1_PERIOD, _L1_SPARSER = 0.2, 0.04, 1.5
_L1_SAME, _L1_SHRINK, _L1_LEAST = 0.95, 1.5, 0.1


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Projected gradient ascent with momentum that halves its step where it stops paying (Croce
    and Hein, ICML 2020).

    linf and l2: the first step is 2 * eps long. At checkpoints that follow each other ever faster
    the step of a sample is halved, and the sample sent back to its best point, if its loss rose
    in less than ``rho`` of the steps since the last one, or if neither step nor best loss have
    changed since. l1 (Croce and Hein, "Mind the box", ICML 2021): steps move only the entries of
    largest gradient, fewer of them the sparser the best change is; the step shrinks while that
    sparsity stays, and is eps again, from the best point, when it falls. Two things are ours, and
    take it to the optimum of linear models: entries at the end of their range leave their share of
    the step to others, and where a period brought no gain the current sparsity counts too.

    Args:
        steps: gradient steps of one start.
        restarts: random starts, each with all its steps.
        loss: ``ce``, ``margin`` or ``dlr``.
        targets: 0 to make any other class overtake; k to go for the k-th runner-up of the clean
            image (APGD-T is one run for each of k = 1 to 9 with ``loss="dlr"``). A model with
            fewer classes takes its last one.
        rho: share of the steps in which the loss must rise to keep the step size (linf, l2).

    >>> APGD(loss="dlr", targets=3).label
    'apgd:loss=dlr,targets=3'
    """

    name: ClassVar[str] = "apgd"
    paper: ClassVar[str] = "https://arxiv.org/abs/2003.01690"
    access: ClassVar[Access] = "white-box"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})

    steps: int = 100
    restarts: int = 1
    loss: str = "ce"
    targets: int = 0
    rho: float = 0.75

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("restarts", self.restarts, 1)
        at_least("targets", self.targets, 0)
        if not 0 <= self.rho <= 1:
            raise UsageError(f"expected rho from 0 to 1, got {self.rho}; it is a share of steps")
        get_loss(self.loss)

    def check(self, threat: ThreatModel) -> None:
        super().check(threat)
        check_targets(self.targets, threat)

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def starts(self) -> int:
        return self.restarts

    @property
    def cost(self) -> tuple[int, int]:
        look = 1 if self.targets else 0
        return self.starts * (self.steps + 1 + look), self.starts * self.steps

    def init(self, oracle: Oracle) -> State:
        x, norm, eps = _start(oracle), oracle.threat.norm, oracle.threat.eps
        lowest = torch.full((len(oracle),), -torch.inf, device=x.device)
        state = {
            "x": x,
            "best": x,
            "best_gradient": torch.zeros_like(x),
            "best_value": lowest,
            "size": torch.full_like(lowest, eps if norm == "l1" else 2 * eps),
        }
        if norm == "l1":
            state |= {
                "entries": torch.full_like(lowest, _L1_ENTRIES * x[0].numel()),
                "mark": lowest,
            }
        else:
            state |= {
                "previous": x,
                "value": lowest,
                "rises": torch.zeros_like(lowest),
                "mark": lowest,
                "halved": torch.zeros_like(lowest, dtype=torch.bool),
            }
        if self.targets:
            state["wanted"] = runner_up(oracle.forward(oracle.x), oracle.labels, self.targets)
        return state

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        loss = self._loss(state)
        x, gradient = state["x"], oracle.gradient(state["x"], loss)
        value = loss(oracle.logits, oracle.labels, oracle.threat.targeted)
        value = value.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        better = value > state["best_value"]
        state = {
            **state,
            "best": _where(better, x, state["best"]),
            "best_gradient": _where(better, gradient, state["best_gradient"]),
            "best_value": torch.where(better, value, state["best_value"]),
        }
        if oracle.threat.norm == "l1":
            return self._sparse_step(oracle, state, gradient, iteration)
        return self._momentum_step(oracle, state, gradient, value, iteration)

    def _loss(self, state: State) -> Loss:
        """What is maximised: towards the wanted class where there is one."""
        if not self.targets:
            return get_loss(self.loss)
        wanted = state["wanted"]

        def towards(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
            if self.loss == "ce":
                return get_loss("ce")(logits, wanted, True)
            gap = lead(logits, labels, wanted)
            if self.loss == "margin" or logits.shape[1] < 5:
                return gap
            top = logits.topk(4, dim=1).values
            return gap / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2).clamp(min=1e-12)

        return towards

    def _momentum_step(
        self, oracle: Oracle, state: State, gradient: Tensor, value: Tensor, iteration: int
    ) -> State:
        x, previous, size = state["x"], state["previous"], state["size"]
        rises, mark, halved = state["rises"], state["mark"], state["halved"]
        if iteration == 0:
            mark = value
        else:
            rises = rises + (value > state["value"])
        marks = checkpoints(self.steps)
        if iteration in marks:
            window = iteration - max((at for at in marks if at < iteration), default=0)
            stuck = ~halved & (state["best_value"] == mark)
            halved = (rises < self.rho * window) | stuck
            size = torch.where(halved, size / 2, size)
            x = _where(halved, state["best"], x)
            gradient = _where(halved, state["best_gradient"], gradient)
            value = torch.where(halved, state["best_value"], value)
            rises, mark = torch.zeros_like(rises), state["best_value"]
        move = oracle.threat.steepest_step(gradient, 1.0) * size.view(-1, 1, 1, 1)
        target = oracle.region.project(x + move)
        if iteration:
            mixed = x + _MOMENTUM * (target - x) + (1 - _MOMENTUM) * (x - previous)
            target = oracle.region.project(mixed)
        return {
            **state,
            "x": target,
            "previous": x,
            "value": value,
            "size": size,
            "rises": rises,
            "mark": mark,
            "halved": halved,
        }

    def _sparse_step(self, oracle: Oracle, state: State, gradient: Tensor, iteration: int) -> State:
        x, size, entries, mark = state["x"], state["size"], state["entries"], state["mark"]
        if iteration and iteration % _l1_period(self.steps) == 0:
            eps = oracle.threat.eps
            # Steps that move the very entries which the projection then shortens lead nowhere:
            # where nothing has improved, the sparser of best and current change counts.
            here, best = ((image != oracle.x).flatten(1).sum(1) for image in (x, state["best"]))
            stale = state["best_value"] == mark
            changed = torch.where(stale, torch.minimum(here, best), best) / _L1_SPARSER
            mark = state["best_value"]
            sparser = changed < _L1_SAME * entries
            shrunk = (size / _L1_SHRINK).clamp(min=_L1_LEAST * eps)
            size, entries = torch.where(sparser, torch.full_like(size, eps), shrunk), changed
            x = _where(sparser, state["best"], x)
            gradient = _where(sparser, state["best_gradient"], gradient)
        # What has arrived at the end of its range cannot use its share of the step.
        low, high = oracle.threat.bounds
        arrived = torch.where(gradient > 0, x >= high, x <= low)
        move = _sparse(gradient.masked_fill(arrived, 0.0), entries) * size.view(-1, 1, 1, 1)
        x = oracle.region.project(x + move)
        return {**state, "x": x, "size": size, "entries": entries, "mark": mark}


def checkpoints(steps: int) -> list[int]:
    """The steps at which APGD considers to halve: ceil(p * steps) for p = 0.22, 0.41, 0.57, ...

    p grows by 0.22, and by 0.03 less each time, but by 0.06 at least.

    >>> checkpoints(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    # In hundredths: sums of 0.03 and 0.06 in binary floats end beside the whole number.
    found, share, gap = [], 22, 22
    while share <= 100:
        found.append(-(-share * steps // 100))
        gap = max(gap - 3, 6)
        share += gap
    return sorted(set(found))


def _l1_period(steps: int) -> int:
    return max(1, -(-round(100 * _L1_PERIOD) * steps // 100))


def _start(oracle: Oracle) -> Tensor:
    """A random image whose change, before the box cuts it, has length eps."""
    shape, region, eps = oracle.x.shape[1:], oracle.region, oracle.threat.eps
    if oracle.threat.norm == "linf":
        ray = oracle.random.uniform(*shape).mul_(2).sub_(1)
        longest = ray.abs().amax(dim=(1, 2, 3), keepdim=True)
    else:
        ray = oracle.random.normal(*shape)
        if oracle.threat.norm == "l1":
            return region.project(oracle.x + ray)
        longest = ray.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return region.project(oracle.x + ray * (eps / longest.clamp(min=1e-12)))


def _sparse(gradient: Tensor, entries: Tensor) -> Tensor:
    """The signs of so many largest entries of each gradient, divided by their number."""
    size = gradient.flatten(1).abs()
    rank = entries.long().clamp(1, size.shape[1])[:, None] - 1
    least = size.sort(dim=1, descending=True).values.gather(1, rank)
    signs = torch.where(size >= least, gradient.flatten(1).sign(), 0.0)
    count = signs.abs().sum(1, keepdim=True).clamp(min=1)
    return (signs / count).view_as(gradient)


def _where(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(rows.view(-1, 1, 1, 1), first, second)
