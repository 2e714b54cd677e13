"""Confidence, margins and calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from robustann.reports.charts.elements import (
    LEFT,
    RIGHT,
    WIDTH,
    across,
    chart,
    height_of,
    path_of,
    square_frame,
    svg,
    tag,
)
from robustann.reports.filters import percent, significant
from robustann.reports.views import (
    Calibration,
)


def histograms(
    title: str,
    axis: str,
    edges: Sequence[float],
    clean: Sequence[int],
    worst: Sequence[int],
    mark: float | None = None,
) -> Markup:
    """Two histograms over the same bins, mirrored: clean above the line, the worst case below it.

    >>> "<title>Confidence</title>" in histograms("Confidence", "", [0, 0.5, 1], [1, 2], [3, 0])
    True
    """
    most = max(*clean, *worst, 1)
    middle, room = 150.0, 118.0
    left, right = LEFT, WIDTH - RIGHT
    wide = (right - left) / len(clean)
    shapes = []
    for place, (above, below) in enumerate(zip(clean, worst, strict=True)):
        x = round(left + place * wide, 2)
        span = f"{significant(edges[place])} to {significant(edges[place + 1])}"
        for kind, samples, word in (("clean", above, "clean"), ("worst", below, "worst case")):
            tall = round(room * samples / most, 2)
            shapes.append(
                tag(
                    "rect",
                    tag("title", f"{span}: {samples} samples, {word}"),
                    class_=f"column {kind}",
                    x=x + 1,
                    y=middle - tall if kind == "clean" else middle,
                    width=round(wide - 2, 2),
                    height=tall,
                )
            )
    shapes.append(tag("line", class_="base", x1=left, x2=right, y1=middle, y2=middle))
    for y, tall in ((middle - room, -1), (middle + room, 1)):
        shapes.append(tag("text", str(most), class_="tick end", x=left - 8, y=y + 5))
        shapes.append(tag("line", class_="grid", x1=left, x2=right, y1=y, y2=y))
        word = "clean" if tall < 0 else "worst case"
        shapes.append(
            tag("text", word, class_="note start", x=left + 6, y=y + (-8 if tall < 0 else 20))
        )
    last = edges[-1] - edges[0]
    ticks = [edges[0], *((edges[0] + last / 2,) if mark is None else (mark,)), edges[-1]]
    for tick in ticks:
        x = round(left + (right - left) * (tick - edges[0]) / last, 2)
        text = significant(tick)
        shapes.append(tag("text", text, class_="tick middle", x=x, y=middle + room + 44))
    if mark is not None:
        x = round(left + (right - left) * (mark - edges[0]) / last, 2)
        shapes.append(tag("line", class_="audited", x1=x, x2=x, y1=10.0, y2=middle + room + 24))
    shapes.append(
        tag("text", axis, class_="axis middle", x=(left + right) / 2, y=middle + room + 70)
    )
    told = [
        f"{significant(edges[k])} to {significant(edges[k + 1])}: {clean[k]} clean, "
        f"{worst[k]} attacked"
        for k in range(len(clean))
    ]
    return svg(title, "; ".join(told), *shapes, class_="curve", viewBox="0 0 640 346")


def reliability(clean: Calibration, worst: Calibration) -> Markup:
    """Accuracy over confidence, clean and in the worst case, beside the diagonal of a model that is
    right as often as it says.

    >>> reliability.__name__
    'reliability'
    """

    x, y = across, height_of
    shapes = square_frame("confidence")
    says = []
    for kind, found, word in (("clean", clean, "clean"), ("worst", worst, "worst case")):
        places = [(x(one.confidence), y(one.accuracy)) for one in found.bins]
        shapes.append(tag("polyline", class_=f"line {kind}", points=path_of(places)))
        most = max(one.samples for one in found.bins)
        for one, (px, py) in zip(found.bins, places, strict=True):
            told = (
                f"confidence {percent(one.confidence)}, accuracy {percent(one.accuracy)}, "
                f"{one.samples} samples, {word}"
            )
            size = round(3 + 5 * math.sqrt(one.samples / most), 2)
            classes = "ring clean" if kind == "clean" else "point"
            shapes.append(tag("circle", tag("title", told), class_=classes, cx=px, cy=py, r=size))
            says.append(told)
    return chart(
        "Accuracy over confidence",
        "; ".join(says),
        *shapes,
    )
