"""What common corruptions do, where nobody attacks."""

from __future__ import annotations

from dataclasses import dataclass

from robustann.reports.filters import percent
from robustann.reports.views.classes import SHADES
from robustann.results import AuditResult, CorruptionLevel

# All that can be measured.
SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class CorruptionCell:
    """Accuracy at one severity; ``shade`` rises from 0 to 6 with the share of the clean accuracy
    that is lost.

    >>> [cell.shade for cell in corruption_rows(result)[2].cells]
    [0, 0, 0, 4, 4]
    """

    level: CorruptionLevel
    shade: int


@dataclass(frozen=True)
class CorruptionRow:
    """One corruption over :data:`SEVERITIES`; None where it was not measured.

    >>> row = corruption_rows(result)[2]
    >>> row.words, row.mean
    ('brightness', 0.9)
    """

    words: str
    cells: tuple[CorruptionCell | None, ...]
    mean: float


def corruption_rows(result: AuditResult) -> list[CorruptionRow]:
    """The corruptions that were measured, in their order.

    >>> [row.words for row in corruption_rows(result)]
    ['gaussian noise', 'gaussian blur', 'brightness', 'contrast', 'jpeg']
    """
    if result.corruptions is None:
        return []
    rows = []
    for one in result.corruptions.kinds:
        levels = {level.severity: level for level in one.levels}
        cells = tuple(
            CorruptionCell(level, _shade(level.accuracy, result.clean_accuracy)) if level else None
            for level in map(levels.get, SEVERITIES)
        )
        rows.append(CorruptionRow(one.kind.replace("_", " "), cells, one.mean_accuracy))
    return rows


def _shade(accuracy: float, clean: float) -> int:
    lost = clean - accuracy
    if lost <= 0:
        return 0
    return next(level for share, level in SHADES if lost / clean >= share)


def corrupted(result: AuditResult) -> str:
    """The mean and the worst, in a sentence; empty where nothing was measured.

    >>> corrupted(result).partition(";")[2]
    ' clean it is 100.0\u202f%.'
    """
    found = result.corruptions
    if found is None or found.mean_accuracy is None or found.worst is None:
        return ""
    kind, level = found.worst
    return (
        f"Accuracy is {percent(found.mean_accuracy)} in the mean over all kinds and severities, "
        f"and {percent(level.accuracy)} under the worst of them, {kind.replace('_', ' ')} at "
        f"severity {level.severity}; clean it is {percent(result.clean_accuracy)}."
    )
