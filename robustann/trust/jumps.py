"""Whether a model jumps: what no gradient tells of, however right it is where it is taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from robustann.threat import ThreatModel

# Each way is cut into so many parts, and the part of the largest change halved so many times.
_PARTS, _HALVINGS = 8, 10


def jumps(
    answer: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    slope: Tensor,
    threat: ThreatModel,
) -> Tensor:
    """The largest jump of a logit within the threat model that is found for each image (N,), as a
    share of the spread of the logits; some 36 forwards an image.

    Looked for on two ways from each image: up the ``slope`` of the loss (in l0 there is none), and
    towards the nearest of the other images that has another label, as far as the threat model
    allows. A way is cut into
    parts; where the logits change most is cut in half again and again. A change of a continuous
    function shrinks with the part, a jump stays.
    """
    region = threat.region(x)
    ends = []
    if threat.norm != "l0":
        ends.append(region.project(x + threat.steepest_step(slope, threat.eps)))
    apart = torch.cdist(x.flatten(1), x.flatten(1))
    other = labels[:, None] != labels
    if bool(other.any(1).all()):
        nearest = apart.masked_fill(~other, torch.inf).argmin(1)
        ends.append(region.project(x[nearest]))
    found = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for end in ends:
        found = torch.maximum(found, _largest(answer, x, end))
    return found


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
