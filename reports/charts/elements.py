"""What charts are drawn with: elements, frames, marks. Text and numbers pass through markupsafe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

from robustann.reports.filters import percent
from robustann.results import AuditResult


def tag(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """An element: children and attribute values are escaped unless they are Markup already.

    A trailing underscore of an attribute's name is dropped, others become hyphens.
    """
    parts = [Markup("<"), Markup(name)]
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.6g}" if isinstance(value, float) else value
            parts.append(Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), text))
    parts.append(Markup(">"))
    parts.extend(escape(child) for child in children)
    parts.append(Markup("</{}>").format(Markup(name)))
    return Markup("").join(parts)


def svg(title: str, description: str, *children: str, **attributes: str | float | None) -> Markup:
    """A picture that says what it shows."""
    return tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        *children,
        role="img",
        **attributes,
    )


def at(share: float) -> str:
    """A share of the width."""
    return f"{100 * min(max(share, 0.0), 1.0):.4g}%"


# Of a chart, and the margins around its frame.
WIDTH, HEIGHT = 640.0, 360.0
LEFT, RIGHT, TOP, BOTTOM = 78.0, 38.0, 32.0, 66.0


def height_of(share: float) -> float:
    """Where a share lies in the frame."""
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 2)


def across(share: float) -> float:
    """Where a share of the frame's width lies."""
    return round(LEFT + (WIDTH - LEFT - RIGHT) * share, 2)


def chart(title: str, description: str, *children: str) -> Markup:
    """A picture of the size of a frame."""
    viewbox = f"0 0 {WIDTH:.0f} {HEIGHT:.0f}"
    return svg(title, description, *children, class_="curve", viewBox=viewbox)


def square_frame(axis: str) -> list[Markup]:
    """A frame for one share over another, with the diagonal where both are alike."""
    x, y = across, height_of
    diagonal = tag("line", class_="chance", x1=x(0), x2=x(1), y1=y(0), y2=y(1))
    return [*frame(y, {x(k / 4): f"{25 * k} %" for k in range(5)}, axis), diagonal]


def frame(y: Callable[[float], float], ticks: Mapping[float, str], axis: str) -> list[Markup]:
    """Levels of accuracy, ticks below them, and what the ticks mean."""
    left, right, bottom = LEFT, WIDTH - RIGHT, y(0)
    shapes = []
    for level in range(0, 101, 25):
        height = y(level / 100)
        shapes += [
            tag("line", class_="grid", x1=left, x2=right, y1=height, y2=height),
            tag("text", f"{level} %", class_="tick end", x=left - 8, y=height + 5),
        ]
    for place, label in ticks.items():
        shapes += [
            tag("line", class_="grid", x1=place, x2=place, y1=bottom, y2=bottom + 5),
            tag("text", label, class_="tick middle", x=place, y=bottom + 22),
        ]
    middle = (left + right) / 2
    shapes.append(tag("text", axis, class_="axis middle", x=middle, y=HEIGHT - 8))
    return shapes


def chance_line(result: AuditResult, y: Callable[[float], float]) -> list[Markup]:
    return level_line(result.chance, f"chance {percent(result.chance)}", y)


def level_line(share: float, says: str, y: Callable[[float], float]) -> list[Markup]:
    left, height = LEFT, y(share)
    return [
        tag("line", class_="chance", x1=left, x2=WIDTH - RIGHT, y1=height, y2=height),
        tag("text", says, class_="note start", x=left + 6, y=height - 6),
    ]


def path_of(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def ticks_of(last: float, power: float, *, doubling: bool) -> list[float]:
    """Round values from 0 to ``last``: even steps, or, on a square-root scale, growing ones."""
    if power < 1:
        # Quarters of the root's range are sixteenths, quarters and nine sixteenths of the value.
        return [0.0, *(float(f"{last * share:.2g}") for share in (1 / 16, 1 / 4, 9 / 16, 1))]
    rough = last / 5
    if doubling:
        step = 2.0 ** math.ceil(math.log2(rough * 0.999))
    else:
        decade = 10.0 ** math.floor(math.log10(rough))
        step = next(decade * nice for nice in (1, 2, 5, 10) if decade * nice >= rough * 0.999)
    return [step * i for i in range(math.floor(last / step + 1e-6) + 1)]


def shape_of(mark: str, classes: str, x: float, y: float, says: str) -> Markup:
    """A mark of its own shape, so that lines do not differ in colour alone."""
    title = tag("title", says)
    corners = {
        "square": [(x - 4, y - 4), (x + 4, y - 4), (x + 4, y + 4), (x - 4, y + 4)],
        "triangle": [(x, y - 5), (x + 5, y + 4), (x - 5, y + 4)],
        "diamond": [(x, y - 6), (x + 5, y), (x, y + 6), (x - 5, y)],
        "bar": [(x - 6, y - 2), (x + 6, y - 2), (x + 6, y + 2), (x - 6, y + 2)],
    }.get(mark)
    if corners is None:
        return tag("circle", title, class_=classes, cx=x, cy=y, r="4")
    return tag("polygon", title, class_=classes, points=path_of(corners))
