"""Error over the share of wrong bits."""

from __future__ import annotations

import math

from markupsafe import Markup

from robustann.reports.charts.elements import (
    across,
    chart,
    frame,
    height_of,
    level_line,
    path_of,
    shape_of,
    tag,
)
from robustann.reports.filters import percent
from robustann.reports.views import (
    Storage,
    bit_error_rate,
    storages,
)
from robustann.results import (
    Weights,
)


def bit_errors(weights: Weights, chance: float) -> Markup:
    """Error over bit error rate on a logarithmic scale: a line for the mean with its own marks, and
    a dashed one for the worst pattern, for each way in which the weights are stored.

    >>> bit_errors.__name__
    'bit_errors'
    """
    shown = storages(weights)
    rates = sorted({level.rate for storage in shown for level in storage.errors.levels})
    first, last = math.log10(rates[0]), math.log10(rates[-1])

    def x(rate: float) -> float:
        share = (math.log10(rate) - first) / ((last - first) or 1.0)
        return across(share)

    y = height_of
    decades = [10.0**k for k in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)]
    ticks = {x(rate): bit_error_rate(rate) for rate in decades or rates}
    shapes = frame(y, ticks, "wrong bits, logarithmic scale")
    shapes += level_line(1 - chance, f"guessing {percent(1 - chance)}", y)
    says = []
    for storage in shown:
        levels = storage.errors.levels
        worst = path_of([(x(level.rate), y(level.worst)) for level in levels])
        mean = path_of([(x(level.rate), y(level.mean)) for level in levels])
        shapes.append(tag("polyline", class_=f"line extreme {storage.kind}", points=worst))
        shapes.append(tag("polyline", class_=f"line {storage.kind}", points=mean))
        told = [
            f"{bit_error_rate(level.rate)} of the bits wrong: error {percent(level.mean)} in the "
            f"mean, {percent(level.worst)} at worst"
            for level in levels
        ]
        shapes += [
            _mark(storage, x(level.rate), y(level.mean), f"{storage.words}, {one}")
            for level, one in zip(levels, told, strict=True)
        ]
        says.append(f"{storage.words}: {'; '.join(told)}.")
    return chart(
        "Error over the share of wrong bits in the weights",
        " ".join(says),
        *shapes,
    )


def _mark(storage: Storage, x: float, y: float, says: str) -> Markup:
    return shape_of(storage.mark, f"point {storage.kind}", x, y, says)
