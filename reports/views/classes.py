"""Classes, and what attacks turn them into."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from robustann.results import MATRIX_LIMIT, AuditResult, ClassScores


@dataclass(frozen=True)
class ClassRow:
    """A class, clean and in the worst case.

    >>> dark = classes(result)[0]
    >>> dark.clean.recall, dark.worst.recall
    (1.0, 0.5)
    """

    clean: ClassScores
    worst: ClassScores


def classes(result: AuditResult) -> list[ClassRow]:
    """Classes with their scores clean and in the worst case.

    In order; but the weakest first where they are too many to read them all.

    >>> [row.clean.name for row in classes(result)]
    ['dark', 'bright']
    """
    pairs = zip(result.clean.classes, result.worst_case.scores.classes, strict=True)
    found = [ClassRow(clean, worst) for clean, worst in pairs]
    if len(found) > MATRIX_LIMIT:
        found.sort(key=lambda row: (row.worst.support == 0, row.worst.recall))
    return found


def weakest(result: AuditResult) -> list[ClassRow]:
    """The classes of the lowest worst-case recall, among those that have samples.

    >>> [row.worst.name for row in weakest(result)]  # as weak as each other
    ['dark', 'bright']
    """
    present = [row for row in classes(result) if row.worst.support]
    lowest = min((row.worst.recall for row in present), default=0.0)
    return [row for row in present if row.worst.recall == lowest]


@dataclass(frozen=True)
class Flip:
    """How many samples of one class an attack turned into another.

    >>> Flip("dark", "bright", samples=1, share=1.0) in flips(result)
    True
    """

    source: str
    target: str
    samples: int
    share: float


def flips(result: AuditResult, limit: int = 10) -> list[Flip]:
    """The most frequent changes among broken samples, with their share of the class's broken.

    >>> [(flip.source, flip.target, flip.samples) for flip in flips(result)]
    [('dark', 'bright', 1), ('bright', 'dark', 1)]
    """
    worst, labels = result.worst_case, result.clean_samples.label
    changes = Counter(
        (label, prediction)
        for label, prediction, by in zip(labels, worst.prediction, worst.broken_by, strict=True)
        if by is not None
    )
    fallen: Counter[int] = Counter()
    for (label, _), samples in changes.items():
        fallen[label] += samples
    ordered = sorted(changes.items(), key=lambda item: (-item[1], item[0]))[:limit]
    names = result.class_names
    return [
        Flip(names[label], names[prediction], samples, samples / fallen[label])
        for (label, prediction), samples in ordered
    ]


def turned(result: AuditResult) -> list[list[int]]:
    """Clean prediction (rows) against worst-case prediction, of the samples correct unattacked.

    >>> turned(result)
    [[1, 1], [1, 1]]
    """
    size = len(result.class_names)
    counts = [[0] * size for _ in range(size)]
    clean = result.clean_samples
    for label, before, after in zip(
        clean.label, clean.prediction, result.worst_case.prediction, strict=True
    ):
        if label == before:
            counts[before][after] += 1
    return counts


# From which share of its row a cell takes which shade, darkest first.
SHADES = ((0.7, 6), (0.4, 5), (0.2, 4), (0.1, 3), (0.05, 2), (0.0, 1))


def shade(samples: int, total: int) -> int:
    """The shade of a confusion cell, 0 (no sample) to 6.

    >>> shade(0, 10), shade(1, 10), shade(10, 10)
    (0, 3, 6)
    """
    if not samples:
        return 0
    return next(level for share, level in SHADES if samples / total >= share)
