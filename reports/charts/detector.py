"""How well a detector tells attacked images from clean ones."""

from __future__ import annotations

from markupsafe import Markup

from robustann.reports.charts.elements import (
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    frame,
    height_of,
    path_of,
    svg,
    tag,
)
from robustann.reports.filters import significant
from robustann.results import (
    DetectorFound,
)


def roc(found: DetectorFound) -> Markup:
    """True positives over false positives of a detector, against each kind of attacker, beside the
    diagonal of one that guesses; a mark at the share of clean images that it refuses.

    >>> roc.__name__
    'roc'
    """

    def x(share: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * share, 2)

    y = height_of
    ticks = {x(k / 4): f"{25 * k} %" for k in range(5)}
    shapes = frame(y, ticks, "clean images refused")
    shapes.append(tag("line", class_="chance", x1=x(0), x2=x(1), y1=y(0), y2=y(1)))
    shapes.append(tag("line", class_="audited", x1=x(found.fpr), x2=x(found.fpr), y1=y(1), y2=y(0)))
    says = []
    for way, kind in zip(found.ways, ("clean dashed", "worst"), strict=True):
        rates = zip(way.false_positive_rates, way.true_positive_rates, strict=True)
        places = [(x(false), y(true)) for false, true in rates]
        if places:
            shapes.append(tag("polyline", class_=f"line {kind}", points=path_of(places)))
        auc = "none fooled" if way.auc is None else f"area {significant(way.auc)}"
        says.append(f"an attacker who {way.words}: {auc}")
    return svg(
        "Adversarial images refused over clean images refused",
        "; ".join(says),
        *shapes,
        class_="curve",
        viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}",
    )
