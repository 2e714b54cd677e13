"""What each attack did, and what it took."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

from robustann.reports.views.counts import broken, correct
from robustann.results import AuditResult, Scores


@dataclass(frozen=True)
class Row:
    """A row of the attacks table; what does not apply is None.

    >>> worst = rows(result)[-1]
    >>> worst.kind, worst.succeeded, worst.attempted, worst.success_rate
    ('worst', 2, 4, 0.5)
    """

    kind: Literal["clean", "control", "attack", "worst"]
    label: str
    scores: Scores
    succeeded: int | None = None
    attempted: int | None = None
    success_rate: float | None = None
    median_distance: float | None = None
    per_image: float | None = None
    forwards: int | None = None
    backwards: int | None = None
    seconds: float | None = None
    added: int | None = None


def rows(result: AuditResult) -> list[Row]:
    """The clean samples, each attack in order, and the worst case over all of them.

    >>> [row.label for row in rows(result)]
    ['Clean', 'fgsm', 'pgd:steps=10', 'fmn:steps=50 (curve)', 'Worst case']
    """
    found = [Row("clean", "Clean", result.clean, per_image=1, forwards=result.n, backwards=0)]
    times: list[float | None] = []
    for attack in result.attacks:
        times.append(result.execution.attack_seconds.get(attack.label))
        spent = attack.forwards + attack.backwards
        found.append(
            Row(
                kind="control" if attack.control else "attack",
                label=attack.label,
                scores=attack.scores,
                succeeded=attack.succeeded,
                attempted=attack.attempted,
                success_rate=attack.success_rate,
                median_distance=attack.median_distance,
                per_image=spent / attack.attempted if attack.attempted else None,
                forwards=attack.forwards,
                backwards=attack.backwards,
                seconds=times[-1],
                added=attack.added,
            )
        )
    attempted, fell = correct(result.clean), broken(result)
    distances = [d for d in result.worst_case.distance if d is not None]
    forwards = sum(attack.forwards for attack in result.attacks)
    backwards = sum(attack.backwards for attack in result.attacks)
    known = [time for time in times if time is not None]
    found.append(
        Row(
            kind="worst",
            label="Worst case",
            scores=result.worst_case.scores,
            succeeded=fell,
            attempted=attempted,
            success_rate=fell / attempted if attempted else None,
            median_distance=statistics.median(distances) if distances else None,
            per_image=(forwards + backwards) / attempted if attempted else None,
            forwards=forwards,
            backwards=backwards,
            seconds=sum(known) if known and len(known) == len(times) else None,
        )
    )
    return found


def telling(found: list[Row], limit: int = 8) -> list[Row]:
    """The rows that a chart needs: all if they are few, else those that broke something more,
    beside controls, clean and the worst case; of these the ones that broke most.

    >>> telling([])
    []
    """
    if len(found) <= limit:
        return found
    adding = sorted(row.added or 0 for row in found if row.kind == "attack")
    least = max(1, adding[-limit] if len(adding) >= limit else 1)
    return [row for row in found if row.kind != "attack" or (row.added or 0) >= least]


def spent(result: AuditResult, limit: int = 60) -> list[tuple[int, float]]:
    """Propagations that the attacks had spent on an image, and the share that then still stood.

    Starts with the clean accuracy at the first propagation; at most ``limit`` steps.

    >>> steps = spent(result)
    >>> steps[0], [share for _, share in steps]
    ((1, 1.0), [1.0, 0.5, 0.5])
    """
    price = {attack.label: attack.samples for attack in result.attacks}
    order = list(price)
    fell = []
    for row, label in enumerate(result.worst_case.broken_by):
        if label in price:
            before = order[: order.index(label) + 1]
            fell.append(sum(price[one].forwards[row] + price[one].backwards[row] for one in before))
    fell.sort()
    standing = correct(result.clean)
    steps = [(1, standing / result.n)]
    for place, propagations in enumerate(fell):
        left = (standing - place - 1) / result.n
        if propagations == steps[-1][0]:
            steps[-1] = (propagations, left)
        else:
            steps.append((propagations, left))
    end = max((*result.worst_case.propagations, steps[-1][0]))
    if len(steps) > limit:
        # The first and the last are always among them.
        kept = {round(i * (len(steps) - 1) / (limit - 1)) for i in range(limit)}
        steps = [steps[place] for place in sorted(kept)]
    return [*steps, (end, steps[-1][1])] if end > steps[-1][0] else steps
