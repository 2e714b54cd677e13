"""Accuracy over what was spent, and over time."""

from __future__ import annotations

import math
from datetime import datetime

from markupsafe import Markup

from robustann.reports.charts.elements import (
    LEFT,
    RIGHT,
    WIDTH,
    across,
    chance_line,
    chart,
    frame,
    height_of,
    path_of,
    shape_of,
    tag,
)
from robustann.reports.filters import interval, percent, plain, significant
from robustann.reports.views import (
    Trend,
    spent,
)
from robustann.results import (
    AuditResult,
)


def effort(result: AuditResult) -> Markup:
    """Robust accuracy over the propagations that the attacks had spent on an image, on a
    logarithmic scale.

    >>> effort.__name__
    'effort'
    """
    points = spent(result)
    last = max(points[-1][0], 2)

    def x(propagations: float) -> float:
        share = math.log(max(propagations, 1.0)) / math.log(last)
        return across(share)

    y = height_of
    decades = range(math.floor(math.log10(last)) + 1)
    ticks = {x(10.0**decade): significant(10.0**decade) for decade in decades}
    corners: list[tuple[float, float]] = []
    for propagations, share in points:
        # It stays as it was until the next image falls.
        corners += [(x(propagations), corners[-1][1])] if corners else []
        corners.append((x(propagations), y(share)))
    return chart(
        "Robust accuracy over propagations spent",
        "; ".join(f"{propagations}: {percent(share)}" for propagations, share in points),
        *frame(y, ticks, "propagations an image, logarithmic scale"),
        *chance_line(result, y),
        tag("polyline", class_="line", points=path_of(corners)),
    )


def trend(found: Trend) -> Markup:
    """Clean and robust accuracy of audits over the time at which they were started.

    >>> trend.__name__
    'trend'
    """
    begin, end = found.audits[0][0], found.audits[-1][0]
    whole = (end - begin).total_seconds()

    def x(when: datetime, place: int) -> float:
        # Audits at one moment stand in their order.
        share = (when - begin).total_seconds() / whole if whole else place / (len(found.audits) - 1)
        return round(LEFT + 10 + (WIDTH - LEFT - RIGHT - 20) * share, 2)

    y = height_of
    same_day = begin.date() == end.date()
    words = [f"{one:%H:%M}" if same_day else f"{one.day} {one:%b %Y}" for one in (begin, end)]
    ticks = {x(begin, 0): words[0], x(end, len(found.audits) - 1): words[1]}
    axis = f"started ({begin.day} {begin:%B %Y}, UTC)" if same_day else "started (UTC)"
    shapes = frame(y, ticks, axis) + chance_line(found.audits[0][1].result, y)
    says = []
    for kind, word in (("clean", "clean"), ("worst", "robust")):
        line = []
        marks = []
        for place, (when, one) in enumerate(found.audits):
            scores = one.result.clean if kind == "clean" else one.result.worst_case.scores
            px, py = x(when, place), y(scores.accuracy)
            line.append((px, py))
            told = (
                f"{when.day} {when:%B %Y, %H:%M}, {plain(one.result.provenance.model, 60)}: {word} "
                f"{percent(scores.accuracy)}, interval {interval(scores.interval)}"
            )
            says.append(told)
            low, high = y(scores.interval.low), y(scores.interval.high)
            marks.append(tag("line", class_=f"span {kind}", x1=px, x2=px, y1=low, y2=high))
            shape, classes = ("ring", "ring clean") if kind == "clean" else ("disc", "point")
            marks.append(shape_of(shape, classes, px, py, told))
        shapes += [tag("polyline", class_=f"line {kind}", points=path_of(line)), *marks]
    return chart(
        "Accuracy over time",
        "; ".join(says),
        *shapes,
    )
