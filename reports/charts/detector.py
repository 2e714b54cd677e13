"""How well a detector tells attacked images from clean ones."""

from __future__ import annotations

from markupsafe import Markup

from robustann.reports.charts.elements import (
    across,
    chart,
    height_of,
    path_of,
    square_frame,
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

    x, y = across, height_of
    shapes = square_frame("clean images refused")
    shapes.append(tag("line", class_="audited", x1=x(found.fpr), x2=x(found.fpr), y1=y(1), y2=y(0)))
    says = []
    for way, kind in zip(found.ways, ("clean dashed", "worst"), strict=True):
        rates = zip(way.false_positive_rates, way.true_positive_rates, strict=True)
        places = [(x(false), y(true)) for false, true in rates]
        if places:
            shapes.append(tag("polyline", class_=f"line {kind}", points=path_of(places)))
        auc = "none fooled" if way.auc is None else f"area {significant(way.auc)}"
        says.append(f"an attacker who {way.words}: {auc}")
    return chart(
        "Adversarial images refused over clean images refused",
        "; ".join(says),
        *shapes,
    )
