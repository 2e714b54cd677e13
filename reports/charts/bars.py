"""Bars and marks on a line from 0 to 100 %."""

from __future__ import annotations

from markupsafe import Markup

from robustann.reports.charts.elements import (
    at,
    svg,
    tag,
)
from robustann.reports.filters import interval, percent, plain
from robustann.results import (
    Interval,
)


def meter(title: str, value: float, span: Interval, chance: float, kind: str) -> Markup:
    """A bar from 0 to 100 % with its confidence interval and a mark at chance.

    ``kind`` is a CSS class (clean, attack, control, worst). It stretches with its column.

    >>> "<title>PGD</title>" in meter("PGD", 0.5, Interval(low=0.4, high=0.6), 0.1, "attack")
    True
    """
    says = f"{percent(value)}, 95 % interval {interval(span)}; chance {percent(chance)}"
    return svg(
        plain(title),
        says,
        tag("rect", class_="track", x="0", y="4", width="100%", height="12", rx="2"),
        tag("rect", class_="bar", x="0", y="4", width=at(value), height="12", rx="2"),
        tag("line", class_="chance", x1=at(chance), x2=at(chance), y1="0", y2="20"),
        tag("line", class_="whisker", x1=at(span.low), x2=at(span.high), y1="10", y2="10"),
        tag("line", class_="whisker", x1=at(span.low), x2=at(span.low), y1="6", y2="14"),
        tag("line", class_="whisker", x1=at(span.high), x2=at(span.high), y1="6", y2="14"),
        class_=f"meter {kind}",
        height="20",
    )


def dumbbell(title: str, clean: float, worst: float) -> Markup:
    """Two marks on a line from 0 to 100 %: a ring for clean, a disc for the worst case.

    >>> "recall 90.0" in dumbbell("cat", 0.9, 0.2)
    True
    """
    return svg(
        plain(title),
        f"clean recall {percent(clean)}, worst case {percent(worst)}",
        tag("line", class_="track", x1="0", x2="100%", y1="8", y2="8"),
        tag("line", class_="drop", x1=at(worst), x2=at(clean), y1="8", y2="8"),
        tag("circle", class_="clean", cx=at(clean), cy="8", r="4"),
        tag("circle", class_="worst", cx=at(worst), cy="8", r="4"),
        class_="dumbbell",
        height="16",
    )
