"""How far attribution maps move: similarity of two maps, and medians with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from robustann.results import Drift, DriftStatistics, Interval

TOP_SHARE = 0.05
_WINDOW = 7
_RESAMPLES = 2000

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Likeness:
    """How alike two maps are: Spearman, the shared part of the largest 5 %, and SSIM (NaN for
    images under three pixels)."""

    spearman: float
    top5: float
    ssim: float


def compare(before: Tensor, after: Tensor) -> Likeness | None:
    """Likeness of two (H, W) maps of |attribution|; None if one is constant or not finite.

    >>> import torch
    >>> compare(torch.eye(8), torch.eye(8)).top5
    1.0
    """
    from scipy.stats import spearmanr

    if any(not bool(x.isfinite().all()) or x.min() == x.max() for x in (before, after)):
        return None
    first, second = before.flatten().double(), after.flatten().double()
    top_first, top_second = _top(first), _top(second)
    shared = len(top_first & top_second) / max(len(top_first), len(top_second))
    correlation = float(spearmanr(first.numpy(), second.numpy()).statistic)
    return Likeness(correlation, shared, ssim(_scaled(before), _scaled(after)))


def _scaled(values: Tensor) -> Values:
    """From 0 to 1: each map in its own scale, as it is shown."""
    scaled: Values = (values.double() / values.max().double().clamp_min(1e-300)).numpy()
    return scaled


def ssim(first: Values, second: Values) -> float:
    """Structural similarity of two (H, W) images in [0, 1] (Wang et al. 2004): the mean over
    windows of 7 x 7 pixels, or the largest odd size that fits; NaN if that is under 3.

    >>> ssim(np.eye(8), np.eye(8))
    1.0
    """
    from scipy.ndimage import uniform_filter

    side = min(_WINDOW, *first.shape)
    side -= 1 - side % 2
    if side < 3:
        return math.nan
    count = side**2
    mean_1, mean_2 = uniform_filter(first, side), uniform_filter(second, side)
    # Sample covariances, not those of the whole window.
    unbiased = count / (count - 1)
    var_1 = unbiased * (uniform_filter(first * first, side) - mean_1 * mean_1)
    var_2 = unbiased * (uniform_filter(second * second, side) - mean_2 * mean_2)
    both = unbiased * (uniform_filter(first * second, side) - mean_1 * mean_2)
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_1 * mean_2 + c1) * (2 * both + c2)
    found = top / ((mean_1**2 + mean_2**2 + c1) * (var_1 + var_2 + c2))
    edge = (side - 1) // 2
    return float(found[edge : found.shape[0] - edge, edge : found.shape[1] - edge].mean())


def _top(values: Tensor) -> set[int]:
    """Where the largest 5 % lie; zeros never count, or sparse maps would agree on nothing."""
    count = max(1, math.ceil(TOP_SHARE * len(values)))
    order = values.argsort(descending=True, stable=True)[:count]
    return set(order[values[order] > 0].tolist())


def drift(
    method: str,
    target: str,
    group: str,
    attacked: Sequence[Likeness | None],
    noise: Sequence[Likeness | None],
    other: Sequence[Likeness | None],
    seed: int,
) -> Drift:
    """Medians over samples, one entry a sample; those where the attacked or the noisy map cannot be
    compared are left out of both. ``other`` stands for itself: not every sample has another.

    >>> drift("Saliency", "true class", "flipped", [None], [None], [None], 0).attacked.n
    0
    """
    pairs = [
        (attack, control)
        for attack, control in zip(attacked, noise, strict=True)
        # The two medians are over the same samples, or their difference would say nothing.
        if attack is not None and control is not None
    ]
    gaps = np.array([control.spearman - attack.spearman for attack, control in pairs])
    return Drift.model_validate(
        {
            "method": method,
            "target": target,
            "group": group,
            "attacked": _medians([attack for attack, _ in pairs], seed),
            "noise": _medians([control for _, control in pairs], seed),
            "other": _medians([one for one in other if one is not None], seed),
            "difference": float(np.median(gaps)) if len(gaps) else None,
            "difference_interval": bootstrap(gaps, seed),
        }
    )


def _medians(found: Sequence[Likeness], seed: int) -> DriftStatistics:
    columns = {
        name: np.array([getattr(one, name) for one in found])
        for name in ("spearman", "top5", "ssim")
    }
    medians = {
        name: float(np.median(values)) if len(values) else None for name, values in columns.items()
    }
    spans = {f"{name}_interval": bootstrap(values, seed) for name, values in columns.items()}
    return DriftStatistics.model_validate({"n": len(found), **medians, **spans})


def bootstrap(values: Values, seed: int) -> Interval | None:
    """Percentile bootstrap of the median (Efron and Tibshirani 1993), 95 %; None for fewer than
    five values, or where one is no number.

    >>> bootstrap(np.ones(20), 0)
    Interval(low=1.0, high=1.0)
    """
    if len(values) < 5 or not np.isfinite(values).all():
        return None
    drawn = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[drawn], axis=1), [2.5, 97.5])
    return Interval(low=float(low), high=float(high))


def flat(maps: Tensor) -> Tensor:
    """|attribution| summed over channels, (n, H, W).

    >>> import torch
    >>> flat(torch.ones(1, 3, 2, 2)).shape
    torch.Size([1, 2, 2])
    """
    return maps.detach().abs().sum(1)
