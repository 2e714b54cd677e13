"""Every number in the page is found again in results.json, or follows from it by plain counting.

The counting here is independent of the code that makes the page.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from made_up import VARIANTS, make_result
from pages import Page
from scipy.stats import binomtest

from robustann.explained import explained
from robustann.reports import render, render_comparison
from robustann.results import AuditResult

NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?")
# What words say: confidence levels, the top 5 %, steps of a rule, ranges of a scale.
WORDS = {"95", "5", "0", "50", "100", "1", "2", "255", "300", "60"}


def shown(html: str) -> str:
    """The page's text and what its charts say, without definitions and axes."""
    for part in (
        r"<div popover.*?</div>",
        r'<section id="(?:definitions|limits)".*?</section>',
        r'<text class="tick[^>]*>.*?</text>',
        r"<h2.*?</h2>",
        # The rule of colours and the scale of shades are words.
        r'<ul class="(?:rules|legend)".*?</ul>',
    ):
        html = re.sub(part, "", html, flags=re.DOTALL)
    page = Page(html)
    # A space between elements: two numbers side by side are two.
    return " ".join(text for path, text in page.texts if not {"style", "script"} & {*path})


def values(content: Any) -> Iterator[int | float]:
    if isinstance(content, dict):
        for one in content.values():
            yield from values(one)
    elif isinstance(content, list):
        for one in content:
            yield from values(one)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield content


def summed_up(result: AuditResult) -> dict[str, Any]:
    """What results.json says but for single samples: the page shows none of them outside of the
    gallery, and among thousands of numbers almost any would be found."""
    content: dict[str, Any] = json.loads(result.to_json())
    content.pop("clean_samples")
    for attack in content["attacks"]:
        attack.pop("samples")
    for name in ("prediction", "distance", "propagations", "confidence", "margin"):
        content["worst_case"].pop(name)
    if content["certificate"]:
        content["certificate"].pop("certified")
    return content


def written(value: float) -> set[str]:
    """All ways in which the page writes a number, without its sign and unit."""
    value = abs(value)
    found = {f"{value}", f"{value:,}", f"{100 * value:.1f}", f"{100 * value:.0f}"}
    for one in (value, 255 * value, 100 * value):
        for digits in (2, 3, 4, 6):
            large = one >= 10 ** (digits - 1)
            found.add(f"{one:,.0f}" if large else f"{one:.{digits}g}")
    if value >= 1:
        minutes, seconds = divmod(round(value), 60)
        hours, rest = divmod(minutes, 60)
        found |= {f"{minutes}", f"{seconds:02d}", f"{hours}", f"{rest:02d}"}
    found |= {f"{value:.2f}", f"{value:.0f}", f"{value:.10f}".rstrip("0").rstrip(".")}
    found.add(f"{100 * value:.10f}".rstrip("0").rstrip("."))
    return found


def derived(result: AuditResult) -> Iterator[float]:
    """What the page counts from the samples."""
    n, clean, worst = result.n, result.clean_samples, result.worst_case
    yield 1 - result.chance  # the error of guessing
    right = [p == y for p, y in zip(clean.prediction, clean.label, strict=True)]
    fell = [by is not None for by in worst.broken_by]
    correct, broken = sum(right), sum(fell)
    yield from (correct, broken, correct - broken, broken / max(correct, 1))
    yield result.propagations
    controls = sum(attack.control for attack in result.attacks)
    yield from (controls, len(result.attacks) - controls)
    verdicts = Counter(one.verdict for one in result.findings)
    yield from (*verdicts.values(), len(result.findings), verdicts["pass"] + verdicts["not run"])
    passed = sum(gate.passed for gate in result.gates)
    yield from (passed, len(result.gates) - passed, len(result.gates))
    # The attacks' table: passes an image, and the sums in its last row.
    spent = [(one.forwards, one.backwards, one.attempted) for one in result.attacks]
    for forwards, backwards, attempted in spent:
        yield (forwards + backwards) / max(attempted, 1)
    yield from (sum(one[0] for one in spent), sum(one[1] for one in spent))
    yield sum(one[0] + one[1] for one in spent) / max(correct, 1)
    distances = [one for one in worst.distance if one is not None]
    if distances:
        yield statistics.median(distances)
    # How many stood after each fall, and what was spent until then.
    costs = []
    labels = [one.label for one in result.attacks]
    for row, by in enumerate(worst.broken_by):
        if by is not None:
            samples = [one.samples for one in result.attacks[: labels.index(by) + 1]]
            costs.append(sum(one.forwards[row] + one.backwards[row] for one in samples))
    yield from costs
    yield from ((correct - k) / n for k in range(broken + 1))
    # Flips, of all broken and of those of a class, and what correct predictions turned into.
    flips = Counter(
        (y, p) for y, p, b in zip(clean.label, worst.prediction, fell, strict=True) if b
    )
    of_class = Counter(y for y, b in zip(clean.label, fell, strict=True) if b)
    for (label, _), count in flips.items():
        yield from (count, count / of_class[label])
    yield from Counter(
        (p, w) for p, w, ok in zip(clean.prediction, worst.prediction, right, strict=True) if ok
    ).values()
    if result.certificate is not None:
        held = result.certificate.certified
        yield sum(held)
        rows = zip(right, fell, held, strict=True)
        yield sum(ok and not down and not proof for ok, down, proof in rows)
        gap = correct - broken - sum(held)
        yield from (gap / n, gap)
    yield from _sure(result, right)
    yield from _weights(result)
    for one in result.corruptions.kinds if result.corruptions else ():
        yield statistics.mean(level.accuracy for level in one.levels)
    if result.explanation is not None:
        yield 0.02  # the tolerance of completeness
        yield 0.5  # from which on a map counts as alike
        yield 64  # pixels, above which a picture is made smaller


def _sure(result: AuditResult, right: list[bool]) -> Iterator[float]:
    """Means, calibration and histograms."""
    worst, clean = result.worst_case, result.clean_samples
    if not worst.confidence:
        return
    stood = [p == y for p, y in zip(worst.prediction, clean.label, strict=True)]
    for confidence, hit in ((clean.confidence, right), (worst.confidence, stood)):
        pairs = [(c or 0.0, h) for c, h in zip(confidence, hit, strict=True)]
        yield sum(c for c, _ in pairs) / len(pairs)
        gap = 0.0
        for k in range(15):
            some = [(c, h) for c, h in pairs if k / 15 < c <= (k + 1) / 15]
            if k == 0:
                some += [(c, h) for c, h in pairs if c == 0]
            if some:
                mean, share = (sum(one[i] for one in some) / len(some) for i in (0, 1))
                gap += len(some) * abs(mean - share)
                yield from (mean, share, len(some))
        yield gap / len(pairs)
        yield from Counter(min(int(c * 20 + 1e-9), 19) for c, _ in pairs).values()
    yield from (k / 20 for k in range(21))
    margins = [m or 0.0 for m in (*clean.margin, *worst.margin)]
    ordered = sorted(margins)
    cut = len(ordered) // 100
    low, high = min(ordered[cut], 0.0), max(ordered[-1 - cut], 0.0)
    width = (high - low) / 19 or 1.0
    first = -math.ceil(-low / width)
    edges = [(first + k) * width for k in range(21)]
    yield from edges
    for some in (clean.margin, worst.margin):
        places = [math.floor(((m or 0.0) - edges[0]) / width + 1e-9) for m in some]
        yield from Counter(min(max(place, 0), 19) for place in places).values()


def _weights(result: AuditResult) -> Iterator[float]:
    """Costs against what is stored, and how rare a wrong bit is."""
    found = result.weights
    if found is None:
        return
    yield len(found.seeds)
    for errors in (found.fixed, found.float32, found.guarded):
        for level in errors.levels if errors else ():
            yield from (level.mean - errors.stored_error, level.worst - errors.stored_error)
            yield 1 / level.rate
    if found.search is not None:
        yield len(found.search.flips)
        yield from Counter(flip.tensor for flip in found.search.flips).values()


@pytest.mark.parametrize(
    "variant",
    ["usual", "two classes", "twenty classes", "hundred classes", "nothing fell", "no attacks"],
)
def test_every_number_of_the_page_is_found_in_the_results(variant: str) -> None:
    result = VARIANTS[variant]()
    content = summed_up(result)
    known = {*WORDS, *NUMBER.findall(json.dumps(content))}
    for value in (*values(content), *derived(result)):
        known |= written(value)
    # Times are written out.
    known |= {"2", "2025", "03", "04"}
    # What is said of every check, whatever was found.
    for finding in result.findings:
        known |= set(NUMBER.findall(explained()[finding.check].text))
    unknown = [found for found in NUMBER.findall(shown(render(result))) if found not in known]
    assert unknown == []


def test_a_number_that_is_not_in_the_results_would_be_seen() -> None:
    result = make_result()
    html = render(result)
    assert "<td>1,234</td>" in html
    content = summed_up(result)
    known = set().union(*map(written, (*values(content), *derived(result))))
    changed = shown(html.replace("<td>1,234</td>", "<td>1,298</td>"))
    assert "1,298" not in known
    assert "1,298" in NUMBER.findall(changed)
    # Most numbers that could be written are not among the known ones.
    assert sum(f"{k / 10:.1f}" in known for k in range(1001)) < 350


def table(result: AuditResult, head: str, names: int = 1) -> list[list[str]]:
    """The body of the one table that begins so."""
    found = [
        rows[names:]
        for rows in Page(render(result)).tables
        if " ".join("|".join(rows[0]).split()).startswith(head)
    ]
    assert len(found) == 1, head
    return [[" ".join(cell.split()) for cell in row] for row in found[0]]


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def test_numbers_of_classes_curve_and_confusion_stand_where_they_belong() -> None:
    result = make_result(n=317)
    worst = result.worst_case.scores
    wanted = [
        [one.name, str(one.support), "", *map(share, (one.precision, one.recall, one.f1,
                                                      two.precision, two.recall, two.f1))]
        for one, two in zip(result.clean.classes, worst.classes, strict=True)
    ]  # fmt: skip
    assert table(result, "Class|Samples", 2) == wanted
    assert table(result, "eps|Robust accuracy") == [
        [
            f"{255 * one.eps:.3g}/255" if one.eps else "0",
            share(one.robust_accuracy),
            f"{100 * one.interval.low:.1f} to {100 * one.interval.high:.1f} %",
        ]
        for one in result.curve
    ]
    # Three matrices: clean, worst case, and from the one to the other.
    matrices = [rows for rows in Page(render(result)).tables if rows[0][0] == "true class"]
    turned = [rows for rows in Page(render(result)).tables if rows[0][0] == "clean prediction"]
    both = zip(result.clean_samples.prediction, result.worst_case.prediction,
               result.clean_samples.label, strict=True)  # fmt: skip
    pairs = Counter((before, after) for before, after, label in both if before == label)
    size = range(len(result.class_names))
    for rows, cells in (
        (matrices[0], result.clean.confusion),
        (matrices[1], worst.confusion),
        (turned[0], [[pairs[a, b] for b in size] for a in size]),
    ):
        assert rows[0][1:] == list(result.class_names)
        assert [[0 if cell == "·" else int(cell) for cell in row[1:]] for row in rows[1:]] == [
            list(row) for row in cells
        ]


def test_every_number_of_a_comparison_is_found_in_the_results() -> None:
    results = [make_result(), make_result(strengths=(0.0, 0.1, 0.2))]
    known = {*WORDS, "2", "2025", "03", "04"}
    outcomes = []
    for result in results:
        known |= {*NUMBER.findall(result.to_json())}
        samples = zip(
            result.clean_samples.prediction,
            result.clean_samples.label,
            result.worst_case.broken_by,
            strict=True,
        )
        outcomes.append([(p == y, p == y and by is None) for p, y, by in samples])
        for value in (*values(json.loads(result.to_json())), len(results)):
            known |= written(value)
    for kind in (0, 1):
        pairs = Counter((a[kind], b[kind]) for a, b in zip(*outcomes, strict=True))
        lost, gained, n = pairs[True, False], pairs[False, True], results[0].n
        for count in (*pairs.values(), 0, lost, gained):
            known |= written(count)
        # Agresti and Min: half a sample more in each cell.
        down, up, total = lost + 0.5, gained + 0.5, n + 2
        centre = (up - down) / total
        half = 1.959964 * math.sqrt(down + up - (up - down) ** 2 / total) / total
        for value in ((gained - lost) / n, centre - half, centre + half):
            known |= written(value)
        if lost + gained:
            known |= written(binomtest(lost, lost + gained).pvalue)
    html = render_comparison([("a.json", results[0]), ("b.json", results[1])])
    assert [found for found in NUMBER.findall(shown(html)) if found not in known] == []
