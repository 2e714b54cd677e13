"""How sure the model is, clean and attacked: histograms, and whether its confidence is earned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from robustann.results import AuditResult

# Bins of equal width of a reliability diagram: the usual number.
BINS = 15
_HISTOGRAM = 20


# Edges of the histogram of confidences.
CONFIDENCES = tuple(k / _HISTOGRAM for k in range(_HISTOGRAM + 1))


@dataclass(frozen=True)
class Bin:
    """Samples whose confidence lies in (low, high]: their mean confidence and their accuracy."""

    low: float
    high: float
    samples: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Reliability of a list of confidences; ``error`` is the expected calibration error: the gap
    between confidence and accuracy, averaged over samples (Guo et al. 2017).

    >>> found = calibration([0.95, 0.95, 0.65], [True, False, True])
    >>> found.samples, [(one.samples, one.accuracy) for one in found.bins]
    (3, [(1, 1.0), (2, 0.5)])
    """

    bins: tuple[Bin, ...]
    samples: int
    confidence: float
    accuracy: float
    error: float


def calibration(
    confidence: Sequence[float], right: Sequence[bool], bins: int = BINS
) -> Calibration:
    """Confidence against accuracy in bins of equal width; empty bins are left out.

    >>> calibration([0.95, 0.85], [True, False]).error
    0.45
    """
    held: list[list[int]] = [[] for _ in range(bins)]
    for row, sure in enumerate(confidence):
        held[min(max(math.ceil(sure * bins) - 1, 0), bins - 1)].append(row)
    found = []
    for place, rows in enumerate(held):
        if rows:
            mean = sum(confidence[row] for row in rows) / len(rows)
            hit = sum(right[row] for row in rows) / len(rows)
            found.append(Bin(place / bins, (place + 1) / bins, len(rows), mean, hit))
    n = len(confidence)
    gap = sum(one.samples * abs(one.confidence - one.accuracy) for one in found) / n
    return Calibration(tuple(found), n, sum(confidence) / n, sum(right) / n, float(f"{gap:.6g}"))


@dataclass(frozen=True)
class Sure:
    """The same samples, clean and in the worst case.

    >>> found = sure(result)
    >>> found.worst.samples, found.worst.accuracy, sum(found.worst_margin)
    (4, 0.5, 4)
    """

    clean: Calibration
    worst: Calibration
    clean_confidence: tuple[int, ...]
    worst_confidence: tuple[int, ...]
    margins: tuple[float, ...]
    clean_margin: tuple[int, ...]
    worst_margin: tuple[int, ...]
    left_out: int


def sure(result: AuditResult) -> Sure | None:
    """Confidences and margins, clean and in the worst case; None for a result of an older version,
    which does not hold them, or where nothing was attacked.

    >>> sure(result).clean.error  # always right, at a confidence of 63 %
    0.3687
    """
    worst, samples = result.worst_case, result.clean_samples
    if not worst.confidence or not result.attacks:
        return None
    rows = [
        row
        for row, (one, other) in enumerate(zip(worst.confidence, worst.margin, strict=True))
        if one is not None and other is not None
    ]
    if not rows:
        return None
    confidence = [samples.confidence[row] for row in rows]
    attacked = [worst.confidence[row] or 0.0 for row in rows]
    margin = [samples.margin[row] for row in rows]
    attacked_margin = [worst.margin[row] or 0.0 for row in rows]
    right = [samples.prediction[row] == samples.label[row] for row in rows]
    stood = [worst.prediction[row] == samples.label[row] for row in rows]
    edges = _edges(margin + attacked_margin)
    return Sure(
        clean=calibration(confidence, right),
        worst=calibration(attacked, stood),
        clean_confidence=counts(confidence, CONFIDENCES),
        worst_confidence=counts(attacked, CONFIDENCES),
        margins=edges,
        clean_margin=counts(margin, edges),
        worst_margin=counts(attacked_margin, edges),
        left_out=result.n - len(rows),
    )


def _edges(values: Sequence[float]) -> tuple[float, ...]:
    """Even bins of which one edge is 0, where right turns to wrong; what is far out, beyond 1 % at
    either end, falls into the last bin."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    low, high = min(ordered[cut], 0.0), max(ordered[-1 - cut], 0.0)
    width = (high - low) / (_HISTOGRAM - 1) or 1.0
    first = -math.ceil(-low / width)
    return tuple((first + k) * width for k in range(_HISTOGRAM + 1))


def counts(values: Sequence[float], edges: Sequence[float]) -> tuple[int, ...]:
    """How many values lie in each bin; those beyond an end in the last one there.

    >>> counts([0.1, 0.6, 7.0], [0.0, 0.5, 1.0])
    (1, 2)
    """
    found = [0] * (len(edges) - 1)
    width = edges[1] - edges[0]
    for value in values:
        place = math.floor((value - edges[0]) / width + 1e-9)
        found[min(max(place, 0), len(found) - 1)] += 1
    return tuple(found)
