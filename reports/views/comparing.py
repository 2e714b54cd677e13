"""Audits side by side: what differs on the same samples, and whether they may be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from robustann.errors import DataError, UsageError
from robustann.reports.filters import points
from robustann.reports.views.verdict import Verdict, verdict
from robustann.results import AttackOutcome, AuditResult, Paired

# As many lines as marks and colours can be told apart.
MOST = 6
MARKS = ("disc", "square", "triangle", "diamond", "bar", "ring")
SYMBOLS = ("●", "■", "▲", "◆", "▬", "○")


@dataclass(frozen=True)
class Entry:
    """One of the audits: a letter that stands for it, and the name that it came by.

    >>> entry = compare([("a/results.json", result), ("b/results.json", result)]).entries[1]
    >>> entry.letter, entry.symbol, entry.verdict.words
    ('B', '■', 'No better than guessing')
    """

    place: int
    letter: str
    name: str
    result: AuditResult
    symbol: str

    @property
    def verdict(self) -> Verdict:
        """Its own verdict."""
        return verdict(self.result)


@dataclass(frozen=True)
class Change:
    """A sample that changed sides: its position in the test part, and its class."""

    index: int
    label: str
    how: Literal["lost", "gained"]
    by: str


@dataclass(frozen=True)
class Pair:
    """The first audit and another one on the samples that both audited."""

    entry: Entry
    samples: int
    clean: Paired
    robust: Paired
    changes: tuple[Change, ...]

    @property
    def words(self) -> str:
        """What changed under attack, without claiming more than the samples show."""
        found, change = self.robust, points(self.robust.difference)
        if found.interval.low > 0:
            return f"is more robust than A by {change.lstrip('+')}"
        if found.interval.high < 0:
            return f"is less robust than A by {change[1:]}"
        return f"is not shown to differ from A in robustness ({change})"


@dataclass(frozen=True)
class Comparison:
    """Several audits; ``notes`` say what else differs between them."""

    entries: tuple[Entry, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    @property
    def first(self) -> Entry:
        """What the others are compared with."""
        return self.entries[0]


def compare(results: Sequence[tuple[str, AuditResult]]) -> Comparison:
    """Pair each audit with the first, on the samples that both audited.

    Raises:
        UsageError: fewer than two audits, or more than :data:`MOST`.
        DataError: their classes or labels differ, or two have no sample in common.

    >>> both = compare([("a/results.json", result), ("b/results.json", result)])
    >>> both.pairs[0].words, both.notes
    ('is not shown to differ from A in robustness (0.0 points)',
     ('A and B are of a model with the same weights.',))
    """
    if not 2 <= len(results) <= MOST:
        raise UsageError(
            f"expected two to {MOST} audits to compare, got {len(results)}; 'robustann index' "
            "shows many at once"
        )
    entries = tuple(
        Entry(place, "ABCDEF"[place], name, result, SYMBOLS[place])
        for place, (name, result) in enumerate(results)
    )
    first = entries[0]
    return Comparison(
        entries,
        tuple(_pair(first, other) for other in entries[1:]),
        tuple(note for other in entries[1:] for note in _notes(first, other)),
    )


def _pair(first: Entry, other: Entry) -> Pair:
    # It needs torch, which rendering one audit does not.
    from robustann.hardening.comparing import clean_outcomes, paired, robust_outcomes

    one, two = first.result, other.result
    if one.class_names != two.class_names:
        raise DataError(
            f"expected audits of the same classes, but '{first.name}' and '{other.name}' name "
            "different ones; compare audits of the same data"
        )
    places = {index: row for row, index in enumerate(two.clean_samples.index)}
    rows = [
        (row, places[index]) for row, index in enumerate(one.clean_samples.index) if index in places
    ]
    if not rows:
        raise DataError(
            f"expected samples that both '{first.name}' and '{other.name}' audited, found none; "
            "audit both with the same --max-samples"
        )
    labels, others = one.clean_samples.label, two.clean_samples.label
    wrong = sum(labels[row] != others[same] for row, same in rows)
    if wrong:
        raise DataError(
            f"expected the same labels in '{first.name}' and '{other.name}', but {wrong} of "
            f"{len(rows)} samples at the same positions differ; compare audits of the same data"
        )
    clean, clean_other = clean_outcomes(one), clean_outcomes(two)
    robust, robust_other = robust_outcomes(one), robust_outcomes(two)
    changes = [
        Change(
            one.clean_samples.index[row],
            one.class_names[labels[row]],
            "lost" if robust[row] else "gained",
            _breaker(two, same) if robust[row] else _breaker(one, row),
        )
        for row, same in rows
        if robust[row] != robust_other[same]
    ]
    return Pair(
        other,
        len(rows),
        paired([clean[row] for row, _ in rows], [clean_other[same] for _, same in rows]),
        paired([robust[row] for row, _ in rows], [robust_other[same] for _, same in rows]),
        tuple(changes),
    )


def side_by_side(comparison: Comparison) -> list[tuple[str, list[AttackOutcome | None]]]:
    """Each attack, in the order of its first appearance, with what it did in every audit.

    >>> both = compare([("a/results.json", result), ("b/results.json", result)])
    >>> [(label, [one.succeeded for one in row]) for label, row in side_by_side(both)][:1]
    [('fgsm', [2, 2])]
    """
    columns = [{one.label: one for one in entry.result.attacks} for entry in comparison.entries]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    return [(label, [column.get(label) for column in columns]) for label in labels]


def _breaker(result: AuditResult, row: int) -> str:
    """What made a sample wrong there."""
    return result.worst_case.broken_by[row] or "wrong before any attack"


def _notes(first: Entry, other: Entry) -> list[str]:
    one, two, said = first.result, other.result, []
    pair = f"A and {other.letter}"
    if (one.threat.norm, one.threat.eps) != (two.threat.norm, two.threat.eps):
        said.append(
            f"{pair} were audited in different threat models: their robust accuracies answer "
            "different questions."
        )
    if one.provenance.data_sha256 != two.provenance.data_sha256:
        if one.clean_samples.index == two.clean_samples.index:
            said.append(
                f"{pair} took samples at the same positions whose images are not the same, by "
                "their hash: of other data, or prepared in another way."
            )
        else:
            said.append(
                f"{pair} did not take all the same samples; only those that both took are paired."
            )
    if one.provenance.preset != two.provenance.preset or [a.label for a in one.attacks] != [
        a.label for a in two.attacks
    ]:
        said.append(
            f"{pair} were not attacked in the same way: a difference may come of the attacks."
        )
    if one.provenance.seed != two.provenance.seed:
        said.append(f"{pair} were audited with different seeds.")
    if one.provenance.model_sha256 == two.provenance.model_sha256:
        said.append(f"{pair} are of a model with the same weights.")
    for entry in (first, other):
        if entry.result.findings and not entry.result.believable:
            said.append(f"{entry.letter} is not to be believed yet: see its own report.")
    return said
