"""Robust accuracy over eps: how the distance of every sample is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustann.attacks import MM, Attack, Square
from robustann.attacks.fmn import FMN
from robustann.attacks.sigma_zero import SigmaZero
from robustann.threat import ThreatModel

# Levels of a curve that follow from the distances, beside 0 and the audited eps.
_POINTS = 30


@dataclass(frozen=True)
class DistanceStage:
    """How the distance of the nearest adversarial image is measured.

    Attributes:
        label: what the measuring attack is called in the result.
        attack: a minimum-norm attack; None where there is none without gradients.
        searching: goes to what ``attack`` left unbroken, with each of ``levels`` as its eps.
        levels: first those under the audited eps, falling, then those over it, rising.
    """

    label: str
    attack: Attack | None
    searching: Attack | None
    levels: tuple[float, ...]

    @property
    def named(self) -> Attack:
        """The attack that the result names."""
        return self.attack or self.searching  # type: ignore[return-value]

    @property
    def cost(self) -> tuple[int, int]:
        """Forwards and backwards of a sample, at most."""
        forwards, backwards = 0, 0
        if self.attack is not None:
            forwards, backwards = self.attack.cost[0] + 1, self.attack.cost[1]
        if self.searching is not None:
            forwards += len(self.levels) * (self.searching.cost[0] + 1)
            backwards += len(self.levels) * self.searching.cost[1]
        return forwards, backwards


def distance_stage(
    threat: ThreatModel, entries: int, *, steps: int, gradients: bool
) -> DistanceStage | None:
    """What measures distances in this norm, in so many steps; None where nothing can.

    With gradients one run of a minimum-norm attack gives the distance of every sample, and what it
    does not break is tried once more where everything is allowed. Without, a random search is made
    at several eps.

    >>> distance_stage(ThreatModel("linf", 0.1), 64, steps=20, gradients=True).label
    'fmn:steps=20 (curve)'
    """
    if threat.eps == 0:
        return None
    widest = threat.widest(entries)
    if gradients:
        attack: Attack = SigmaZero(steps=steps) if threat.norm == "l0" else FMN(steps=steps)
        last = MM(leak=0.0)
        unbounded = threat.norm in last.norms
        return DistanceStage(
            f"{attack.label} (curve)",
            attack,
            last if unbounded else None,
            (widest,) if unbounded else (),
        )
    search = Square(queries=20 * steps)
    if threat.norm not in search.norms:
        return None
    return DistanceStage(f"{search.label} (curve)", None, search, search_levels(threat, widest))


def search_levels(threat: ThreatModel, widest: float) -> tuple[float, ...]:
    """Several eps under the audited one, falling, and over it, rising to the widest that still
    allows something more.

    >>> search_levels(ThreatModel("linf", 0.4), 1.0)
    (0.3, 0.2, 0.1, 0.05, 0.5, 0.6, 0.8, 1.0)
    """
    below = [_rounded(threat.eps * factor) for factor in (0.75, 0.5, 0.25, 0.125)]
    above, factor = [_rounded(threat.eps * 1.25)], 1.5
    while above[-1] < widest:
        above += [_rounded(threat.eps * factor), _rounded(threat.eps * factor * 4 / 3)]
        factor *= 2
    return (*below, *(level for level in above if level < widest), widest)


def curve_levels(
    distance: Tensor, audited: float, levels: Sequence[float] = ()
) -> tuple[float, ...]:
    """The eps at which a curve is drawn, rising: 0, the audited one, and where samples fall.

    Args:
        distance: of the nearest adversarial image of each sample (N,), infinity where none is
            known; 0 where the original itself is classified wrongly.
        audited: the audited eps.
        levels: where everything was attacked anyway.

    >>> curve_levels(torch.tensor([0.0, 0.25, 0.5, torch.inf]), 0.3)
    (0.0, 0.25, 0.3, 0.5)
    """
    found = distance[distance.isfinite() & (distance > 0)].double()
    drawn: list[float] = []
    if len(found):
        shares = torch.linspace(0, 1, min(_POINTS, len(found)), dtype=torch.float64)
        # Rounded up, so that the samples that fall there are among the fallen.
        places = torch.quantile(found, shares, interpolation="higher").tolist()
        drawn = [_rounded_up(value) for value in places]
    return tuple(sorted({0.0, audited, *levels, *drawn}))


def _rounded(eps: float) -> float:
    """To six digits, as results are written: a level means the same after a round trip."""
    return float(f"{eps:.6g}")


def _rounded_up(eps: float) -> float:
    rounded = _rounded(eps)
    if rounded >= eps:
        return rounded
    return _rounded(eps + 10.0 ** (math.floor(math.log10(eps)) - 5))
