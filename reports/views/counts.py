"""Counts and distances that several sections show."""

from __future__ import annotations

from robustann.reports.filters import significant
from robustann.results import AuditResult, Scores


def distance(result: AuditResult, value: float | None) -> str:
    """A distance, in 255ths where eps was given so.

    >>> distance(result, 0.1)
    '0.1'
    """
    if value and in_255ths(result):
        return f"{significant(255 * value)}/255"
    return significant(value)


def in_255ths(result: AuditResult) -> bool:
    """Whether eps was given as a number of grey levels, such as ``8/255``.

    >>> in_255ths(result)  # eps was given as 0.2
    False
    """
    return result.threat.eps_text.replace(" ", "").endswith("/255")


def correct(scores: Scores) -> int:
    """How many samples were classified correctly.

    >>> correct(result.clean), correct(result.worst_case.scores)
    (4, 2)
    """
    return sum(n for (label, found), n in scores.counts().items() if label == found)


def broken(result: AuditResult) -> int:
    """How many correctly classified samples some attack broke.

    >>> broken(result)
    2
    """
    return sum(name is not None for name in result.worst_case.broken_by)
