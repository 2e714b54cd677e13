"""Accuracy over eps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from robustann.reports.charts.elements import (
    across,
    chance_line,
    chart,
    frame,
    height_of,
    path_of,
    shape_of,
    tag,
    ticks_of,
)
from robustann.reports.filters import interval, percent, plain, significant
from robustann.reports.views import (
    MARKS,
    Entry,
    in_255ths,
    proven,
)
from robustann.results import (
    AuditResult,
    CertifiedPoint,
    CurvePoint,
)


def curve(result: AuditResult) -> Markup:
    """Robust accuracy over eps with its confidence band, chance, and the audited eps; below it,
    dashed and with squares, what is certified, if anything is.

    >>> curve.__name__
    'curve'
    """
    threat = result.threat
    points = sorted(result.curve, key=lambda point: point.eps)
    certified = proven(result)
    last = max(threat.eps, points[-1].eps, *(point.eps for point in certified)) or 1.0
    x, shapes = _framed(result, threat.eps, last)
    y = height_of
    left, right, top = x(0), x(last), y(1)
    band = [(x(p.eps), y(p.interval.high)) for p in points]
    band += [(x(p.eps), y(p.interval.low)) for p in reversed(points)]
    line = [(x(p.eps), y(p.robust_accuracy)) for p in points]
    audited = x(threat.eps)
    # The label turns to the side that has room.
    side = "end" if audited > (left + right) / 2 else "start"
    shapes += [
        tag("polygon", class_="band", points=path_of(band)),
        *chance_line(result, y),
        tag("line", class_="audited", x1=audited, x2=audited, y1=top - 8, y2=y(0)),
        tag(
            "text",
            f"audited eps {plain(threat.eps_text, 20)}",
            class_=f"note {side}",
            x=audited + (-6 if side == "end" else 6),
            y=top - 12,
        ),
        tag("polyline", class_="line", points=path_of(line)),
    ]
    shapes += [_point(p, px, py) for p, (px, py) in zip(points, line, strict=True)]
    says = "; ".join(
        f"eps {significant(p.eps)}: {percent(p.robust_accuracy)} ({interval(p.interval)})"
        for p in points
    )
    if certified:
        below = [(x(p.eps), y(p.certified_accuracy)) for p in certified]
        shapes.append(tag("polyline", class_="line certified", points=path_of(below)))
        shapes += [_square(p, px, py) for p, (px, py) in zip(certified, below, strict=True)]
        # Under the line where it is half way down; above its end, if there is no room.
        at, height = min(below, key=lambda place: abs(place[1] - (below[0][1] + y(0)) / 2))
        if at - left > 90:
            aside, under = at - 12, height + 5
        else:
            aside, under = below[-1][0], below[-1][1] - 9
        shapes.append(tag("text", "certified", class_="note end", x=aside, y=under))
        says += ". Certified: " + "; ".join(
            f"eps {significant(p.eps)}: {percent(p.certified_accuracy)}" for p in certified
        )
    return chart(
        "Robust and certified accuracy over eps" if certified else "Robust accuracy over eps",
        says,
        *shapes,
    )


def curves(entries: Sequence[Entry]) -> Markup:
    """Robust accuracy over eps of several audits in one norm, each line with its own mark.

    >>> curves.__name__
    'curves'
    """
    drawn = [(one, sorted(one.result.curve, key=lambda point: point.eps)) for one in entries]
    first = entries[0].result
    audited = max(one.result.threat.eps for one, _ in drawn)
    last = max(audited, *(points[-1].eps for _, points in drawn)) or 1.0
    x, shapes = _framed(first, audited, last)
    y = height_of
    shapes += chance_line(first, y)
    says = []
    for one, points in drawn:
        band = [(x(p.eps), y(p.interval.high)) for p in points]
        band += [(x(p.eps), y(p.interval.low)) for p in reversed(points)]
        shapes.append(tag("polygon", class_=f"band series{one.place}", points=path_of(band)))
    for one, points in drawn:
        line = [(x(p.eps), y(p.robust_accuracy)) for p in points]
        shapes.append(tag("polyline", class_=f"line series{one.place}", points=path_of(line)))
        told = [f"eps {significant(p.eps)}: {percent(p.robust_accuracy)}" for p in points]
        shapes += [
            shape_of(MARKS[one.place], f"point series{one.place}", px, py, f"{one.letter}, {text}")
            for (px, py), text in zip(line, told, strict=True)
        ]
        says.append(f"{one.letter}: {'; '.join(told)}.")
    return chart(
        "Robust accuracy over eps, side by side",
        " ".join(says),
        *shapes,
    )


def _framed(
    result: AuditResult, audited: float, last: float
) -> tuple[Callable[[float], float], list[Markup]]:
    """Where an eps lies, and the frame with its ticks up to ``last``, in the result's unit."""
    unit, per_unit = ("/255", 255.0) if in_255ths(result) else ("", 1.0)
    # A curve may go on to where every image is lost, far beyond the eps that was asked about.
    power = 0.5 if last > 8 * audited else 1.0

    def x(eps: float) -> float:
        return across(math.pow(eps / last, power))

    ticks = {
        x(tick / per_unit): f"{significant(tick)}{unit if tick else ''}"
        for tick in ticks_of(last * per_unit, power, doubling=unit != "")
    }
    scale = ", square-root scale" if power < 1 else ""
    return x, frame(height_of, ticks, f"eps ({plain(result.threat.norm, 20)}{scale})")


def _point(point: CurvePoint, x: float, y: float) -> Markup:
    says = (
        f"eps {significant(point.eps)}: {percent(point.robust_accuracy)}, "
        f"interval {interval(point.interval)}"
    )
    return shape_of("disc", "point", x, y, says)


def _square(point: CertifiedPoint, x: float, y: float) -> Markup:
    says = (
        f"eps {significant(point.eps)}: {percent(point.certified_accuracy)} certified, "
        f"interval {interval(point.interval)}"
    )
    return shape_of("square", "point certified", x, y, says)
