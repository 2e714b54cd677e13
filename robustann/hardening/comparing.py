"""The same samples before and after: paired statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from robustann.errors import DataError
from robustann.results import Interval, Paired

# The 97.5 % quantile of the normal distribution.
_Z = 1.959963984540054


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare two lists of outcomes on the same samples, in the same order.

    McNemar's exact test (McNemar, 1947) on the samples that changed sides; the interval of the
    difference is Agresti and Min's (Statistics in Medicine, 2005): Wald's, with half a sample added
    to each of the four cells.

    Raises:
        DataError: the lists differ in length, or are empty.

    >>> found = paired([True, True, False, False], [True, True, True, False])
    >>> found.gained, found.lost, found.difference, found.p
    (1, 0, 0.25, 1.0)
    """
    if len(before) != len(after) or not before:
        raise DataError(
            f"expected as many outcomes before as after, at least one, got {len(before)} and "
            f"{len(after)}; compare audits of the same samples"
        )
    pairs = list(zip(before, after, strict=True))
    lost = sum(was and not now for was, now in pairs)
    gained = sum(now and not was for was, now in pairs)
    both = sum(was and now for was, now in pairs)
    low, high = _interval(lost, gained, len(pairs))
    return Paired(
        both=both,
        lost=lost,
        gained=gained,
        neither=len(pairs) - both - lost - gained,
        difference=(gained - lost) / len(pairs),
        interval=Interval(low=low, high=high),
        p=_mcnemar(lost, gained),
    )


def _mcnemar(lost: int, gained: int) -> float:
    if lost + gained == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue)


def _interval(lost: int, gained: int, n: int) -> tuple[float, float]:
    down, up, total = lost + 0.5, gained + 0.5, n + 2
    centre = (up - down) / total
    half = _Z * math.sqrt(max(down + up - (up - down) ** 2 / total, 0.0)) / total
    return max(centre - half, -1.0), min(centre + half, 1.0)
