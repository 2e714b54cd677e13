"""Charts as inline SVG. All text and numbers pass through markupsafe; colours are CSS classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from markupsafe import Markup, escape

from robustann.reports.filters import interval, percent, plain, significant
from robustann.reports.views import (
    MARKS,
    Calibration,
    Entry,
    Storage,
    Trend,
    bit_error_rate,
    in_255ths,
    proven,
    spent,
    storages,
)
from robustann.results import (
    AuditResult,
    CertifiedPoint,
    CurvePoint,
    DetectorFound,
    Interval,
    Weights,
)


def _tag(name: str, *children: str, **attributes: str | float | None) -> Markup:
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


def _svg(title: str, description: str, *children: str, **attributes: str | float | None) -> Markup:
    return _tag(
        "svg",
        _tag("title", title),
        _tag("desc", description),
        *children,
        role="img",
        **attributes,
    )


def _at(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.4g}%"


def meter(title: str, value: float, span: Interval, chance: float, kind: str) -> Markup:
    """A bar from 0 to 100 % with its confidence interval and a mark at chance.

    ``kind`` is a CSS class (clean, attack, control, worst). It stretches with its column.

    >>> "<title>PGD</title>" in meter("PGD", 0.5, Interval(low=0.4, high=0.6), 0.1, "attack")
    True
    """
    says = f"{percent(value)}, 95 % interval {interval(span)}; chance {percent(chance)}"
    return _svg(
        plain(title),
        says,
        _tag("rect", class_="track", x="0", y="4", width="100%", height="12", rx="2"),
        _tag("rect", class_="bar", x="0", y="4", width=_at(value), height="12", rx="2"),
        _tag("line", class_="chance", x1=_at(chance), x2=_at(chance), y1="0", y2="20"),
        _tag("line", class_="whisker", x1=_at(span.low), x2=_at(span.high), y1="10", y2="10"),
        _tag("line", class_="whisker", x1=_at(span.low), x2=_at(span.low), y1="6", y2="14"),
        _tag("line", class_="whisker", x1=_at(span.high), x2=_at(span.high), y1="6", y2="14"),
        class_=f"meter {kind}",
        height="20",
    )


def dumbbell(title: str, clean: float, worst: float) -> Markup:
    """Two marks on a line from 0 to 100 %: a ring for clean, a disc for the worst case.

    >>> "recall 90.0" in dumbbell("cat", 0.9, 0.2)
    True
    """
    return _svg(
        plain(title),
        f"clean recall {percent(clean)}, worst case {percent(worst)}",
        _tag("line", class_="track", x1="0", x2="100%", y1="8", y2="8"),
        _tag("line", class_="drop", x1=_at(worst), x2=_at(clean), y1="8", y2="8"),
        _tag("circle", class_="clean", cx=_at(clean), cy="8", r="4"),
        _tag("circle", class_="worst", cx=_at(worst), cy="8", r="4"),
        class_="dumbbell",
        height="16",
    )


_WIDTH, _HEIGHT = 640.0, 360.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 78.0, 38.0, 32.0, 66.0


def curve(result: AuditResult) -> Markup:
    """Robust accuracy over eps with its confidence band, chance, and the audited eps; below it,
    dashed and with squares, what is certified, if anything is.

    >>> curve.__name__
    'curve'
    """
    threat = result.threat
    points = sorted(result.curve, key=lambda point: point.eps)
    certified = proven(result)
    unit, per_unit = ("/255", 255.0) if in_255ths(result) else ("", 1.0)
    last = max(threat.eps, points[-1].eps, *(point.eps for point in certified)) or 1.0
    # A curve may go on to where every image is lost, far beyond the eps that was asked about.
    power = 0.5 if last > 8 * threat.eps else 1.0

    def x(eps: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * math.pow(eps / last, power), 2)

    y = _height
    ticks = {
        x(tick / per_unit): f"{significant(tick)}{unit if tick else ''}"
        for tick in _ticks(last * per_unit, power, doubling=unit != "")
    }
    scale = ", square-root scale" if power < 1 else ""
    left, right, top = x(0), x(last), y(1)
    shapes = _frame(y, ticks, f"eps ({plain(threat.norm, 20)}{scale})")
    band = [(x(p.eps), y(p.interval.high)) for p in points]
    band += [(x(p.eps), y(p.interval.low)) for p in reversed(points)]
    line = [(x(p.eps), y(p.robust_accuracy)) for p in points]
    audited = x(threat.eps)
    # The label turns to the side that has room.
    side = "end" if audited > (left + right) / 2 else "start"
    shapes += [
        _tag("polygon", class_="band", points=_path(band)),
        *_chance(result, y),
        _tag("line", class_="audited", x1=audited, x2=audited, y1=top - 8, y2=y(0)),
        _tag(
            "text",
            f"audited eps {plain(threat.eps_text, 20)}",
            class_=f"note {side}",
            x=audited + (-6 if side == "end" else 6),
            y=top - 12,
        ),
        _tag("polyline", class_="line", points=_path(line)),
    ]
    shapes += [_point(p, px, py) for p, (px, py) in zip(points, line, strict=True)]
    says = "; ".join(
        f"eps {significant(p.eps)}: {percent(p.robust_accuracy)} ({interval(p.interval)})"
        for p in points
    )
    if certified:
        below = [(x(p.eps), y(p.certified_accuracy)) for p in certified]
        shapes.append(_tag("polyline", class_="line certified", points=_path(below)))
        shapes += [_square(p, px, py) for p, (px, py) in zip(certified, below, strict=True)]
        # Under the line where it is half way down; above its end, if there is no room.
        at, height = min(below, key=lambda place: abs(place[1] - (below[0][1] + y(0)) / 2))
        if at - left > 90:
            aside, under = at - 12, height + 5
        else:
            aside, under = below[-1][0], below[-1][1] - 9
        shapes.append(_tag("text", "certified", class_="note end", x=aside, y=under))
        says += ". Certified: " + "; ".join(
            f"eps {significant(p.eps)}: {percent(p.certified_accuracy)}" for p in certified
        )
    return _svg(
        "Robust and certified accuracy over eps" if certified else "Robust accuracy over eps",
        says,
        *shapes,
        class_="curve",
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
    )


def curves(entries: Sequence[Entry]) -> Markup:
    """Robust accuracy over eps of several audits in one norm, each line with its own mark.

    >>> curves.__name__
    'curves'
    """
    drawn = [(one, sorted(one.result.curve, key=lambda point: point.eps)) for one in entries]
    first = entries[0].result
    unit, per_unit = ("/255", 255.0) if in_255ths(first) else ("", 1.0)
    audited = max(one.result.threat.eps for one, _ in drawn)
    last = max(audited, *(points[-1].eps for _, points in drawn)) or 1.0
    power = 0.5 if last > 8 * audited else 1.0

    def x(eps: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * math.pow(eps / last, power), 2)

    y = _height
    ticks = {
        x(tick / per_unit): f"{significant(tick)}{unit if tick else ''}"
        for tick in _ticks(last * per_unit, power, doubling=unit != "")
    }
    scale = ", square-root scale" if power < 1 else ""
    shapes = _frame(y, ticks, f"eps ({plain(first.threat.norm, 20)}{scale})") + _chance(first, y)
    says = []
    for one, points in drawn:
        band = [(x(p.eps), y(p.interval.high)) for p in points]
        band += [(x(p.eps), y(p.interval.low)) for p in reversed(points)]
        shapes.append(_tag("polygon", class_=f"band series{one.place}", points=_path(band)))
    for one, points in drawn:
        line = [(x(p.eps), y(p.robust_accuracy)) for p in points]
        shapes.append(_tag("polyline", class_=f"line series{one.place}", points=_path(line)))
        told = [f"eps {significant(p.eps)}: {percent(p.robust_accuracy)}" for p in points]
        shapes += [
            _shape(MARKS[one.place], f"point series{one.place}", px, py, f"{one.letter}, {text}")
            for (px, py), text in zip(line, told, strict=True)
        ]
        says.append(f"{one.letter}: {'; '.join(told)}.")
    return _svg(
        "Robust accuracy over eps, side by side",
        " ".join(says),
        *shapes,
        class_="curve",
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
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
        return round(_LEFT + 10 + (_WIDTH - _LEFT - _RIGHT - 20) * share, 2)

    y = _height
    same_day = begin.date() == end.date()
    words = [f"{one:%H:%M}" if same_day else f"{one.day} {one:%b %Y}" for one in (begin, end)]
    ticks = {x(begin, 0): words[0], x(end, len(found.audits) - 1): words[1]}
    axis = f"started ({begin.day} {begin:%B %Y}, UTC)" if same_day else "started (UTC)"
    shapes = _frame(y, ticks, axis) + _chance(found.audits[0][1].result, y)
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
            marks.append(_tag("line", class_=f"span {kind}", x1=px, x2=px, y1=low, y2=high))
            shape = "ring" if kind == "clean" else "disc"
            marks.append(_shape(shape, "ring clean" if kind == "clean" else "point", px, py, told))
        shapes += [_tag("polyline", class_=f"line {kind}", points=_path(line)), *marks]
    return _svg(
        "Accuracy over time",
        "; ".join(says),
        *shapes,
        class_="curve",
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
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
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * share, 2)

    y = _height
    decades = range(math.floor(math.log10(last)) + 1)
    ticks = {x(10.0**decade): significant(10.0**decade) for decade in decades}
    corners: list[tuple[float, float]] = []
    for propagations, share in points:
        # It stays as it was until the next image falls.
        corners += [(x(propagations), corners[-1][1])] if corners else []
        corners.append((x(propagations), y(share)))
    return _svg(
        "Robust accuracy over propagations spent",
        "; ".join(f"{propagations}: {percent(share)}" for propagations, share in points),
        *_frame(y, ticks, "propagations an image, logarithmic scale"),
        *_chance(result, y),
        _tag("polyline", class_="line", points=_path(corners)),
        class_="curve",
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
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
    left, right = _LEFT, _WIDTH - _RIGHT
    wide = (right - left) / len(clean)
    shapes = []
    for place, (above, below) in enumerate(zip(clean, worst, strict=True)):
        x = round(left + place * wide, 2)
        span = f"{significant(edges[place])} to {significant(edges[place + 1])}"
        for kind, samples, word in (("clean", above, "clean"), ("worst", below, "worst case")):
            tall = round(room * samples / most, 2)
            shapes.append(
                _tag(
                    "rect",
                    _tag("title", f"{span}: {samples} samples, {word}"),
                    class_=f"column {kind}",
                    x=x + 1,
                    y=middle - tall if kind == "clean" else middle,
                    width=round(wide - 2, 2),
                    height=tall,
                )
            )
    shapes.append(_tag("line", class_="base", x1=left, x2=right, y1=middle, y2=middle))
    for y, tall in ((middle - room, -1), (middle + room, 1)):
        shapes.append(_tag("text", str(most), class_="tick end", x=left - 8, y=y + 5))
        shapes.append(_tag("line", class_="grid", x1=left, x2=right, y1=y, y2=y))
        word = "clean" if tall < 0 else "worst case"
        shapes.append(
            _tag("text", word, class_="note start", x=left + 6, y=y + (-8 if tall < 0 else 20))
        )
    last = edges[-1] - edges[0]
    ticks = [edges[0], *((edges[0] + last / 2,) if mark is None else (mark,)), edges[-1]]
    for tick in ticks:
        x = round(left + (right - left) * (tick - edges[0]) / last, 2)
        text = significant(tick)
        shapes.append(_tag("text", text, class_="tick middle", x=x, y=middle + room + 44))
    if mark is not None:
        x = round(left + (right - left) * (mark - edges[0]) / last, 2)
        shapes.append(_tag("line", class_="audited", x1=x, x2=x, y1=10.0, y2=middle + room + 24))
    shapes.append(
        _tag("text", axis, class_="axis middle", x=(left + right) / 2, y=middle + room + 70)
    )
    told = [
        f"{significant(edges[k])} to {significant(edges[k + 1])}: {clean[k]} clean, "
        f"{worst[k]} attacked"
        for k in range(len(clean))
    ]
    return _svg(title, "; ".join(told), *shapes, class_="curve", viewBox="0 0 640 346")


def reliability(clean: Calibration, worst: Calibration) -> Markup:
    """Accuracy over confidence, clean and in the worst case, beside the diagonal of a model that is
    right as often as it says.

    >>> reliability.__name__
    'reliability'
    """

    def x(share: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * share, 2)

    y = _height
    ticks = {x(k / 4): f"{25 * k} %" for k in range(5)}
    shapes = _frame(y, ticks, "confidence")
    shapes.append(_tag("line", class_="chance", x1=x(0), x2=x(1), y1=y(0), y2=y(1)))
    says = []
    for kind, found, word in (("clean", clean, "clean"), ("worst", worst, "worst case")):
        places = [(x(one.confidence), y(one.accuracy)) for one in found.bins]
        shapes.append(_tag("polyline", class_=f"line {kind}", points=_path(places)))
        most = max(one.samples for one in found.bins)
        for one, (px, py) in zip(found.bins, places, strict=True):
            told = (
                f"confidence {percent(one.confidence)}, accuracy {percent(one.accuracy)}, "
                f"{one.samples} samples, {word}"
            )
            size = round(3 + 5 * math.sqrt(one.samples / most), 2)
            if kind == "clean":
                shapes.append(
                    _tag("circle", _tag("title", told), class_=f"ring {kind}", cx=px, cy=py, r=size)
                )
            else:
                shapes.append(
                    _tag("circle", _tag("title", told), class_="point", cx=px, cy=py, r=size)
                )
            says.append(told)
    return _svg(
        "Accuracy over confidence",
        "; ".join(says),
        *shapes,
        class_="curve",
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
    )


def roc(found: DetectorFound) -> Markup:
    """True positives over false positives of a detector, against each kind of attacker, beside the
    diagonal of one that guesses; a mark at the share of clean images that it refuses.

    >>> roc.__name__
    'roc'
    """

    def x(share: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * share, 2)

    y = _height
    ticks = {x(k / 4): f"{25 * k} %" for k in range(5)}
    shapes = _frame(y, ticks, "clean images refused")
    shapes.append(_tag("line", class_="chance", x1=x(0), x2=x(1), y1=y(0), y2=y(1)))
    shapes.append(
        _tag("line", class_="audited", x1=x(found.fpr), x2=x(found.fpr), y1=y(1), y2=y(0))
    )
    says = []
    for way, kind in zip(found.ways, ("clean dashed", "worst"), strict=True):
        rates = zip(way.false_positive_rates, way.true_positive_rates, strict=True)
        places = [(x(false), y(true)) for false, true in rates]
        if places:
            shapes.append(_tag("polyline", class_=f"line {kind}", points=_path(places)))
        auc = "none fooled" if way.auc is None else f"area {significant(way.auc)}"
        says.append(f"an attacker who {way.words}: {auc}")
    return _svg(
        "Adversarial images refused over clean images refused",
        "; ".join(says),
        *shapes,
        class_="curve",
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
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
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * share, 2)

    y = _height
    decades = [10.0**k for k in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)]
    ticks = {x(rate): bit_error_rate(rate) for rate in decades or rates}
    shapes = _frame(y, ticks, "wrong bits, logarithmic scale")
    shapes += _level(1 - chance, f"guessing {percent(1 - chance)}", y)
    says = []
    for storage in shown:
        levels = storage.errors.levels
        worst = _path([(x(level.rate), y(level.worst)) for level in levels])
        mean = _path([(x(level.rate), y(level.mean)) for level in levels])
        shapes.append(_tag("polyline", class_=f"line extreme {storage.kind}", points=worst))
        shapes.append(_tag("polyline", class_=f"line {storage.kind}", points=mean))
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
    return _svg(
        "Error over the share of wrong bits in the weights",
        " ".join(says),
        *shapes,
        class_="curve",
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
    )


def _mark(storage: Storage, x: float, y: float, says: str) -> Markup:
    return _shape(storage.mark, f"point {storage.kind}", x, y, says)


def _shape(mark: str, classes: str, x: float, y: float, says: str) -> Markup:
    """A mark of its own shape, so that lines do not differ in colour alone."""
    title = _tag("title", says)
    corners = {
        "square": [(x - 4, y - 4), (x + 4, y - 4), (x + 4, y + 4), (x - 4, y + 4)],
        "triangle": [(x, y - 5), (x + 5, y + 4), (x - 5, y + 4)],
        "diamond": [(x, y - 6), (x + 5, y), (x, y + 6), (x - 5, y)],
        "bar": [(x - 6, y - 2), (x + 6, y - 2), (x + 6, y + 2), (x - 6, y + 2)],
    }.get(mark)
    if corners is None:
        return _tag("circle", title, class_=classes, cx=x, cy=y, r="4")
    return _tag("polygon", title, class_=classes, points=_path(corners))


def _height(share: float) -> float:
    return round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share, 2)


def _frame(y: Callable[[float], float], ticks: Mapping[float, str], axis: str) -> list[Markup]:
    """Levels of accuracy, ticks below them, and what the ticks mean."""
    left, right, bottom = _LEFT, _WIDTH - _RIGHT, y(0)
    shapes = []
    for level in range(0, 101, 25):
        height = y(level / 100)
        shapes += [
            _tag("line", class_="grid", x1=left, x2=right, y1=height, y2=height),
            _tag("text", f"{level} %", class_="tick end", x=left - 8, y=height + 5),
        ]
    for place, label in ticks.items():
        shapes += [
            _tag("line", class_="grid", x1=place, x2=place, y1=bottom, y2=bottom + 5),
            _tag("text", label, class_="tick middle", x=place, y=bottom + 22),
        ]
    middle = (left + right) / 2
    shapes.append(_tag("text", axis, class_="axis middle", x=middle, y=_HEIGHT - 8))
    return shapes


def _chance(result: AuditResult, y: Callable[[float], float]) -> list[Markup]:
    return _level(result.chance, f"chance {percent(result.chance)}", y)


def _level(share: float, says: str, y: Callable[[float], float]) -> list[Markup]:
    left, height = _LEFT, y(share)
    return [
        _tag("line", class_="chance", x1=left, x2=_WIDTH - _RIGHT, y1=height, y2=height),
        _tag("text", says, class_="note start", x=left + 6, y=height - 6),
    ]


def _point(point: CurvePoint, x: float, y: float) -> Markup:
    says = (
        f"eps {significant(point.eps)}: {percent(point.robust_accuracy)}, "
        f"interval {interval(point.interval)}"
    )
    return _tag("circle", _tag("title", says), class_="point", cx=x, cy=y, r="4")


def _square(point: CertifiedPoint, x: float, y: float) -> Markup:
    says = (
        f"eps {significant(point.eps)}: {percent(point.certified_accuracy)} certified, "
        f"interval {interval(point.interval)}"
    )
    corners = [(x - 4, y - 4), (x + 4, y - 4), (x + 4, y + 4), (x - 4, y + 4)]
    return _tag("polygon", _tag("title", says), class_="point certified", points=_path(corners))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def _ticks(last: float, power: float, *, doubling: bool) -> list[float]:
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
