"""Whether a model jumps: what no gradient tells of, however right it is where it is taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustann.threat import ThreatModel

# Each way is cut into so many parts, and the part of the largest change halved so many times.
_PARTS, _HALVINGS = 8, 10


def ways(x: Tensor, labels: Tensor, slope: Tensor, threat: ThreatModel) -> dict[str, Tensor]:
    """Where jumps are looked for: ends of ways from each image (N, C, H, W), by their names.

    Up the ``slope`` of the loss (in l0 there is none), and towards the nearest of the other images
    that has another label (where there are several), as far as the threat model allows.
    """
    region, ends = threat.region(x), {}
    if threat.norm != "l0":
        ends["up the gradient"] = region.project(x + threat.steepest_step(slope, threat.eps))
    other = labels[:, None] != labels
    if bool(other.any()):
        apart = torch.cdist(x.flatten(1), x.flatten(1))
        nearest = apart.masked_fill(~other, torch.inf).argmin(1)
        ends["to an image of another class"] = region.project(x[nearest])
    return ends


def jumps(answer: Callable[[Tensor], Tensor], x: Tensor, ends: Sequence[Tensor]) -> Tensor:
    """The largest jump of a logit on the way to one of the ends that is found for each image (N,),
    as a share of the spread of the logits; 19 forwards an image and way.

    A way is cut into parts; where the logits change most is cut in half again and again. A change
    of a continuous function shrinks with the part, a jump stays.
    """
    return torch.stack([_largest(answer, x, end) for end in ends]).amax(0)


def _largest(answer: Callable[[Tensor], Tensor], x: Tensor, end: Tensor) -> Tensor:
    def at(share: Tensor) -> Tensor:
        weights = share.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        return answer(x + weights * (end - x)).double()

    def change(first: Tensor, second: Tensor) -> Tensor:
        return (first - second).abs().amax(1)

    count = len(x)
    places = torch.linspace(0, 1, _PARTS + 1, dtype=torch.float64, device=x.device)
    along = torch.stack([at(place.expand(count)) for place in places])
    spread = (along[0].amax(1) - along[0].amin(1)).median()
    widest = torch.stack([change(a, b) for a, b in itertools.pairwise(along)]).argmax(0)
    rows = torch.arange(count, device=x.device)
    low, high = places[widest], places[widest + 1]
    before, after = along[widest, rows], along[widest + 1, rows]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        between = at(middle)
        first = change(before, between) >= change(between, after)
        low, high = torch.where(first, low, middle), torch.where(first, middle, high)
        before = torch.where(first[:, None], before, between)
        after = torch.where(first[:, None], between, after)
    return change(before, after) / spread.clamp(min=torch.finfo(spread.dtype).tiny)
