"""Many audits at once, and how they change over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from robustann.reports.views.verdict import Glance, Verdict, glance, verdict
from robustann.results import AuditResult


@dataclass(frozen=True)
class Found:
    """A results.json that was found: where, the report beside it as a relative address if there is
    one, and the audit, or why it could not be read."""

    path: str
    report: str | None
    result: AuditResult | None
    reason: str = ""


@dataclass(frozen=True)
class Listed:
    """An audit of the overview, with when it was started, if that can be told."""

    path: str
    report: str | None
    result: AuditResult
    when: datetime | None

    @property
    def verdict(self) -> Verdict:
        """Its verdict."""
        return verdict(self.result)

    @property
    def glance(self) -> list[Glance]:
        """Whether to believe it, and its gates."""
        return glance(self.result)


@dataclass(frozen=True)
class Trend:
    """Audits of the same data in the same threat model, in the order of time.

    >>> two = [Found(path, None, result) for path in ("a/results.json", "b/results.json")]
    >>> (trend,) = overview("runs", two).trends
    >>> trend.norm, trend.eps, len(trend.audits)
    ('linf', '0.2', 2)
    """

    data: str
    norm: str
    eps: str
    audits: tuple[tuple[datetime, Listed], ...]


@dataclass(frozen=True)
class Overview:
    """All that was found in a folder: newest first, trends, and what could not be read."""

    folder: str
    audits: tuple[Listed, ...]
    trends: tuple[Trend, ...]
    skipped: tuple[Found, ...]


def overview(folder: str, found: Sequence[Found]) -> Overview:
    """Sort what was found.

    >>> overview("runs", []).audits
    ()
    """
    listed = [
        Listed(one.path, one.report, one.result, moment_of(one.result.execution.started))
        for one in found
        if one.result is not None
    ]
    earliest = datetime.min.replace(tzinfo=UTC)
    listed.sort(key=lambda one: one.path)
    listed.sort(key=lambda one: one.when or earliest, reverse=True)
    groups: dict[tuple[str, str, str], list[tuple[datetime, Listed]]] = {}
    for one in reversed(listed):
        if one.when is not None:
            threat = one.result.threat
            key = (one.result.provenance.data, threat.norm, threat.eps_text)
            groups.setdefault(key, []).append((one.when, one))
    trends = tuple(Trend(*key, tuple(audits)) for key, audits in groups.items() if len(audits) > 1)
    skipped = tuple(one for one in found if one.result is None)
    return Overview(folder, tuple(listed), trends, skipped)


def moment_of(text: str) -> datetime | None:
    """An ISO 8601 time with its zone; None for other text.

    >>> moment_of("2025-01-02T03:04:05+00:00").year, moment_of("yesterday")
    (2025, None)
    """
    try:
        when = datetime.fromisoformat(text)
        return None if when.utcoffset() is None else when.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
