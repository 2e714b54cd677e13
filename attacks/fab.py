"""The fast adaptive boundary attack: the nearest adversarial image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from robustann.attacks.base import Access, Attack, State, at_least
from robustann.attacks.losses import Loss, margin
from robustann.attacks.ranking import check_targets, lead, runner_up
from robustann.errors import UsageError
from robustann.threat import ThreatModel, wide

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle

# Points tried at the end between the original and the nearest adversarial image.
_SEARCH = 3


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """Looks for the nearest adversarial image along linearised class boundaries (Croce and Hein,
    ICML 2020).

    Each step takes the boundary's tangent plane at the current image, projects onto it within the
    box both the current image and the original, and goes to a mean of the two, a little beyond.
    An adversarial image is pulled back towards the original, and the search goes on from there.

    Args:
        steps: steps of one start.
        restarts: starts: the first from the original, the others from a random image half as far
            away as the nearest adversarial one found (at most half of eps).
        targets: 0 to weigh the boundaries to all other classes, which costs a backward each; k
            for that to the k-th runner-up of the clean image alone (FAB-T). A model with fewer
            classes takes its last one.
        classes: how many other classes are weighed where ``targets`` is 0, the strongest ones.
        alpha_max: largest share of the original's projection in the mean.
        eta: how far to go along the projection; 1 ends on the plane.
        beta: what is left of the change after the pull towards the original.

    >>> FAB(targets=2).label
    'fab:targets=2'
    """

    name: ClassVar[str] = "fab"
    paper: ClassVar[str] = "https://arxiv.org/abs/1907.02044"
    access: ClassVar[Access] = "white-box"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})
    minimum_norm: ClassVar[bool] = True

    steps: int = 100
    restarts: int = 1
    targets: int = 0
    classes: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("restarts", self.restarts, 1)
        at_least("targets", self.targets, 0)
        at_least("classes", self.classes, 1)
        at_least("eta", self.eta, 0)
        for what, value in (("alpha_max", self.alpha_max), ("beta", self.beta)):
            if not 0 <= value <= 1:
                raise UsageError(f"expected {what} from 0 to 1, got {value}; it is a share")

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
        gradients = self.steps * (1 if self.targets else self.classes)
        return self.starts * (1 + 2 * self.steps + _SEARCH), self.starts * gradients

    def init(self, oracle: Oracle) -> State:
        logits = oracle.forward(oracle.x)
        state = {
            "x": oracle.x if self.restarts == 1 else _start(oracle),
            "clean": -margin(logits, oracle.labels, oracle.threat.targeted),
        }
        if self.targets:
            state["wanted"] = runner_up(logits, oracle.labels, self.targets)
        return state

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        x, origin, threat = state["x"], oracle.x, oracle.threat
        gap, normal = self._boundary(oracle, state)
        near = nearest_on_plane(x, normal, gap, threat)
        offset = (wide(normal) * (wide(origin) - wide(x))).flatten(1).sum(1)
        home = nearest_on_plane(origin, normal, gap + offset, threat)
        way, way_home = threat.distance(near, x), threat.distance(home, origin)
        alpha = (way / (way + way_home).clamp(min=1e-30)).clamp(max=self.alpha_max)
        share = alpha.to(x.dtype).view(-1, 1, 1, 1)
        moved = (1 - share) * (x + self.eta * (near - x))
        moved = (moved + share * (origin + self.eta * (home - origin))).clamp(*threat.bounds)
        logits = oracle.forward(moved)
        if iteration == self.steps - 1:
            return {**state, "x": oracle.region.project(_search(oracle, state["clean"], moved))}
        hit = logits.argmax(1) == oracle.labels
        fallen = (hit if threat.targeted else ~hit).view(-1, 1, 1, 1)
        pulled = (1 - self.beta) * origin + self.beta * moved
        return {**state, "x": torch.where(fallen, pulled, moved)}

    def _boundary(self, oracle: Oracle, state: State) -> tuple[Tensor, Tensor]:
        """The boundary to go for at ``x``: the difference of logits that vanishes on it (M,),
        negative while the sample stands, and its gradient (M, C, H, W)."""
        if oracle.threat.targeted:
            return _tangent(oracle, state["x"], lambda z, y, _: margin(z, y, True))
        if self.targets:
            wanted = state["wanted"]
            return _tangent(oracle, state["x"], lambda z, y, _: lead(z, y, wanted))
        x, threat = state["x"], oracle.threat
        ranks = range(1, min(self.classes, oracle.logits.shape[1] - 1) + 1)
        (gap, normal), *others = _tangents(oracle, x, [_behind(rank) for rank in ranks])
        away = _plane_distance(x, normal, gap, threat)
        for other_gap, other_normal in others:
            other_away = _plane_distance(x, other_normal, other_gap, threat)
            nearer = other_away < away
            gap, away = torch.where(nearer, other_gap, gap), torch.where(nearer, other_away, away)
            normal = torch.where(nearer.view(-1, 1, 1, 1), other_normal, normal)
        return gap, normal


def _behind(rank: int) -> Loss:
    """The logit of the strongest other class of this rank minus the label's."""

    def loss(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
        return lead(logits, labels, runner_up(logits, labels, rank))

    return loss


def _tangent(oracle: Oracle, x: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    return _tangents(oracle, x, [loss])[0]


def _tangents(oracle: Oracle, x: Tensor, losses: Sequence[Loss]) -> list[tuple[Tensor, Tensor]]:
    normals = oracle.gradients(x, losses)
    gaps = [loss(oracle.logits, oracle.labels, oracle.threat.targeted) for loss in losses]
    return [
        (wide(gap).nan_to_num(nan=0.0), normal) for gap, normal in zip(gaps, normals, strict=True)
    ]


def _plane_distance(x: Tensor, normal: Tensor, gap: Tensor, threat: ThreatModel) -> Tensor:
    """Distance to where a plane meets the box (N,), infinite where it misses it.

    The paper divides by the dual norm of the gradient, which leaves the box out: on images with
    many black and white pixels that often names a boundary which is not the nearest.
    """
    _, slope, room = _rooms(x, normal, gap, threat)
    away = threat.distance(nearest_on_plane(x, normal, gap, threat), x)
    return away.masked_fill((slope * room).sum(1) < gap.abs(), torch.inf)


def _rooms(
    x: Tensor, normal: Tensor, gap: Tensor, threat: ThreatModel
) -> tuple[Tensor, Tensor, Tensor]:
    """For each entry the sign of the change that brings ``gap`` to zero, what a unit of change
    brings, and how far the box lets it go; all (N, entries)."""
    low, high = threat.bounds
    begin, weight = wide(x).flatten(1), wide(normal).flatten(1)
    way = -wide(gap).sign()[:, None] * weight.sign()
    return way, weight.abs(), torch.where(way > 0, high - begin, begin - low).clamp(min=0.0)


def nearest_on_plane(x: Tensor, normal: Tensor, gap: Tensor, threat: ThreatModel) -> Tensor:
    """The image of the box nearest to ``x`` at which a linear function vanishes: exact.

    The function has the value ``gap`` (N,) at ``x`` (N, C, H, W) and the gradient ``normal``.
    Where it vanishes nowhere in the box, the corner where it comes nearest to zero. Along the
    path of smallest change every entry moves until it meets the box: in linf all at one speed, in
    l2 at a speed of its slope, in l1 one after another, the steepest first. The function then
    falls piecewise linearly, and sorting the bends finds the piece where it ends.

    >>> x, normal = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[4.0, 1.0]]]])
    >>> nearest_on_plane(x, normal, torch.tensor([-2.2]), ThreatModel("linf", 1.0)).flatten()
    tensor([0.9400, 0.9400])
    >>> nearest_on_plane(x, normal, torch.tensor([-2.2]), ThreatModel("l1", 1.0)).flatten()
    tensor([1.0000, 0.7000])
    """
    way, slope, room = _rooms(x, normal, gap, threat)
    need = wide(gap).abs()[:, None]
    fall = slope * room
    tiny = torch.finfo(fall.dtype).tiny
    if threat.norm == "l1":
        order = slope.sort(dim=1, descending=True, stable=True).indices
        paid = fall.gather(1, order)
        share = ((need - (paid.cumsum(1) - paid)) / paid.clamp(min=tiny)).clamp(0.0, 1.0)
        move = torch.zeros_like(room).scatter(1, order, share) * room
    else:
        speed = torch.ones_like(slope) if threat.norm == "linf" else slope
        # An entry without slope does not move, wherever its bend is put.
        bends, order = torch.where(slope > 0, room / speed.clamp(min=tiny), 0.0).sort(
            dim=1, stable=True
        )
        arrived = fall.gather(1, order)
        arrived = arrived.cumsum(1) - arrived
        moving = (slope * speed).gather(1, order).flip(1).cumsum(1).flip(1)
        piece = (arrived + bends * moving < need).sum(1, keepdim=True)
        piece = piece.clamp(max=bends.shape[1] - 1)
        end = bends.gather(1, piece)
        time = (need - arrived.gather(1, piece)) / moving.gather(1, piece).clamp(min=tiny)
        move = torch.minimum(torch.minimum(time, end).clamp(min=0.0) * speed, room)
    return (wide(x) + (way * move).view_as(x)).to(x.dtype).clamp(*threat.bounds)


def _start(oracle: Oracle) -> Tensor:
    """The original where nothing else has been seen of a sample; else a random image."""
    x, threat = oracle.x, oracle.threat
    away = threat.distance(oracle.best, x)
    found = oracle.best_margin <= 0
    radius = torch.where(found, away.clamp(max=threat.eps), threat.eps) / 2
    ray = (
        oracle.random.uniform(*x.shape[1:]).mul_(2).sub_(1)
        if threat.norm == "linf"
        else oracle.random.normal(*x.shape[1:])
    )
    length = threat.distance(ray, torch.zeros_like(ray)).clamp(min=1e-30)
    scale = torch.where(away > 0, radius / length, 0.0)
    return (x + ray * scale.to(x.dtype).view(-1, 1, 1, 1)).clamp(*threat.bounds)


def _search(oracle: Oracle, clean: Tensor, otherwise: Tensor) -> Tensor:
    """Towards the boundary on the line from the original to the nearest adversarial image.

    Each point is where a straight margin would vanish, and a tenth of the way back, so that both
    ends of the interval close in. The last point is returned for the engine to judge; where
    nothing adversarial is known, ``otherwise``.
    """
    edge, found = oracle.best, (oracle.best_margin <= 0).view(-1, 1, 1, 1)
    inner, outer = torch.zeros_like(clean), torch.ones_like(clean)
    stands, falls = clean, oracle.best_margin
    for point in range(_SEARCH):
        share = (stands / (stands - falls)).nan_to_num(nan=0.5).clamp(0.0, 1.0)
        middle = inner + (outer - inner) * (share + 0.1 * (1 - share))
        tried = oracle.x + (edge - oracle.x) * middle.view(-1, 1, 1, 1)
        tried = torch.where(found, tried, otherwise)
        if point == _SEARCH - 1:
            break
        gap = -margin(oracle.forward(tried), oracle.labels, oracle.threat.targeted)
        fallen = gap < 0
        inner, stands = torch.where(fallen, inner, middle), torch.where(fallen, stands, gap)
        outer, falls = torch.where(fallen, middle, outer), torch.where(fallen, gap, falls)
    return tried
