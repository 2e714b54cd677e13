"""What defenses did."""

from __future__ import annotations

from robustann.reports.filters import points
from robustann.results import Hardening, StoredError


def hardened(hardening: Hardening) -> str:
    """What hardening did, in a sentence that does not claim more than the samples show.

    >>> from robustann.hardening import paired
    >>> raised = paired([True] * 40 + [False] * 60, [True] * 80 + [False] * 20)
    >>> found = defended.comparison.model_copy(update={"robust": raised})
    >>> print(hardened(found))
    Hardening raised robust accuracy by 40.0 points; 95 % interval +29.5 points to +48.9 points. No
    sample changed sides unattacked.
    """
    pair = hardening.robust
    change = points(pair.difference)
    if pair.interval.low > 0:
        said = f"Hardening raised robust accuracy by {change.lstrip('+')}"
    elif pair.interval.high < 0:
        said = f"Hardening lowered robust accuracy by {change[1:]}"
    else:
        said = f"These samples do not show that hardening changed robust accuracy ({change})"
    span = f"95 % interval {points(pair.interval.low)} to {points(pair.interval.high)}"
    clean = hardening.clean
    if clean.interval.high < 0:
        price = f"It cost {points(clean.difference)[1:]} of clean accuracy"
    elif clean.interval.low > 0:
        price = f"Clean accuracy rose by {points(clean.difference)[1:]} too"
    elif not clean.lost + clean.gained:
        price = "No sample changed sides unattacked"
    else:
        price = (
            f"These samples do not show that clean accuracy changed ({points(clean.difference)})"
        )
    return f"{said}; {span}. {price}."


def bit_errors(hardening: Hardening) -> list[tuple[float, list[StoredError | None]]]:
    """Each share of wrong bits with what every stage makes of it, None where it was not asked;
    nothing where no stage was.

    >>> before, after = defended.comparison.stages
    >>> asked = after.model_copy(
    ...     update={"bit_errors": (StoredError(rate=0.01, mean=0.032, worst=0.053),)}
    ... )
    >>> found = defended.comparison.model_copy(update={"stages": (before, asked)})
    >>> [(rate, [one and one.worst for one in row]) for rate, row in bit_errors(found)]
    [(0.01, [None, 0.053])]
    """
    columns = [{one.rate: one for one in stage.bit_errors} for stage in hardening.stages]
    rates = sorted({rate for column in columns for rate in column})
    return [(rate, [column.get(rate) for column in columns]) for rate in rates]
