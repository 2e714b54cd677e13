"""The report is tested as what it is: a page that people believe, and an attack surface."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from made_up import (
    FINDINGS,
    HOSTILE,
    VARIANTS,
    as_cascade,
    corruptions,
    make_result,
    no_attack_fell,
    scores,
    tampered,
    weights,
    wilson,
    with_changes,
)
from pages import Page, part_of

from robustann.explained import explained
from robustann.reports import charts, render, views
from robustann.reports.filters import count, interval, percent
from robustann.results import (
    AuditResult,
    CertifiedPoint,
    CurvePoint,
    Drift,
    DriftStatistics,
    Explanation,
    Interval,
    Scores,
    Seal,
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_page_is_well_formed_and_accessible(variant: str) -> None:
    html = render(VARIANTS[variant]())
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert page.all("html") == [{"lang": "en"}]
    assert page.tags.count("h1") == 1
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert (link["href"] or "").removeprefix("#") in ids
    assert page.tags.count("table") == page.tags.count("caption")
    assert all(th.get("scope") in ("row", "col", "colgroup", "rowgroup") for th in page.all("th"))
    assert all(img.get("alt") for img in page.all("img"))
    assert all(svg.get("role") == "img" for svg in page.all("svg"))
    assert page.tags.count("desc") == page.tags.count("svg")
    for wrong in ("None", "nan", "inf ", "Undefined", "-0.0"):
        assert not re.search(rf"(?<![a-zA-Z]){wrong}(?![a-z.])", page.text.replace("None.", ""))


@pytest.mark.parametrize("variant", VARIANTS)
def test_page_asks_nothing_of_any_host(variant: str) -> None:
    html = render(VARIANTS[variant]())
    page = Page(html)
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name != "style"
            if name in ("src", "href", "action", "srcset", "data", "poster"):
                assert (value or "").startswith(("#", "data:"))
    assert not {"iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert page.all("script") == [{}]
    style = "".join(text for path, text in page.texts if path[-1:] == ("style",))
    assert "url(" not in style
    assert "@import" not in style


def test_content_security_policy_allows_one_style_and_one_script() -> None:
    html = render(make_result())
    policy = next(
        meta["content"]
        for meta in Page(html).all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    hashes = {}
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[tag] = f"'sha256-{digest}'"
    assert policy == (
        f"default-src 'none'; img-src data:; style-src {hashes['style']}; "
        f"script-src {hashes['script']}; base-uri 'none'; form-action 'none'"
    )


def test_the_script_is_the_same_for_every_result_and_makes_no_html() -> None:
    found = {
        re.findall("<script>(.*?)</script>", render(make()), re.DOTALL)[0]
        for make in (make_result, VARIANTS["hostile names"], no_attack_fell)
    }
    assert len(found) == 1
    (text,) = found
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "eval(", "document.write", "fetch("):
        assert word not in text


def test_sections_stand_in_the_order_of_their_files() -> None:
    folder = Path(views.__file__).parent.parent / "templates" / "sections"
    names = sorted(path.name for path in folder.iterdir())
    sections = Page(render(make_result())).all("section")
    shown = [section["id"] for section in sections]
    # A section that has nothing to say of a result is left out, as hardening is here.
    named = [re.sub(r"^\d+-|\.html\.j2$", "", name) for name in names]
    assert shown == [name for name in named if name in shown]
    assert "hardening" not in shown
    assert {"verdict", "trust", "attacks", "classes", "gallery", "limits", "provenance"} <= {*shown}


def test_effort_falls_from_clean_to_the_worst_case_at_the_cost_of_each_fall() -> None:
    result = make_result()
    steps = views.spent(result)
    assert steps[0] == (1, pytest.approx(result.clean_accuracy))
    assert steps[-1] == (
        max(result.worst_case.propagations),
        pytest.approx(result.robust_accuracy),
    )
    assert [share for _, share in steps] == sorted((share for _, share in steps), reverse=True)
    costs = [
        sum(a.samples.forwards[row] + a.samples.backwards[row]
            for a in result.attacks[: [b.label for b in result.attacks].index(label) + 1])
        for row, label in enumerate(result.worst_case.broken_by) if label is not None
    ]  # fmt: skip
    for propagations, share in steps:
        fallen = sum(cost <= propagations for cost in costs)
        assert share == pytest.approx(result.clean_accuracy - fallen / result.n, abs=1e-6)
    assert len(views.spent(result, limit=3)) <= 4


def test_findings_stand_above_the_results_and_say_what_to_do() -> None:
    html = render(make_result())
    start, end = html.index('<section id="trust"'), html.index('<section id="attacks"')
    text = Page(html[start:end]).text
    for expected in (
        "Do not believe these figures yet",
        "Of 4 checks 1 passed, 2 failed and 1 did not run",
        "gradient missing (value 0.75, threshold 0.05) The gradient is zero for 24 of 32 images.",
        "failed, remedied randomised",
        "What the audit did: Gradients were averaged over 20 draws.",
        "passed softmax output The model returns logits.",
        "not run rising curve One eps only.",
    ):
        assert expected in text
    # What a check is about stands at it, and needs no other page.
    assert 'id="check-gradient-missing"' in html[start:end]
    assert text.count("About this check") == 4
    told = explained()["gradient-missing"]
    assert told.means in text
    assert told.measures in text
    for variant, words in (
        ("remedied", "To be believed, after remedies"),
        ("nothing failed", "No sign that the evaluation misleads"),
        ("nothing checked", "Not checked"),
    ):
        assert words in Page(render(VARIANTS[variant]())).text
    assert "This audit did not look at itself" in Page(render(VARIANTS["no findings"]())).text


def test_verdict_shows_the_figures_of_the_result() -> None:
    result = make_result()
    html = render(result)
    text = Page(html[: html.index('<section id="attacks"')] + "</main></div></body></html>").text
    clean, worst = result.clean, result.worst_case.scores
    right, stood = views.correct(clean), views.correct(worst)
    assert right == round(clean.accuracy * result.n)
    assert stood == right - sum(a.added for a in result.attacks)
    for figure in (
        f"{percent(worst.accuracy)} worst-case robust accuracy "
        f"95 % interval {interval(worst.interval)}",
        f"{percent(clean.accuracy)} clean accuracy 95 % interval {interval(clean.interval)}",
        f"Of {result.n} samples the model classifies {right} correctly.",
        f"2 attacks and 1 control found a misclassified image within the threat model for "
        f"{right - stood} of these; {stood} stayed correct throughout.",
        f"It took {count(result.propagations)} propagations.",
        "The attacker knows the weights",
        result.threat.words,
        "passed robust accuracy (lower end of its 95 % interval) is 31.2\u202f%, at least "
        "30.0\u202f% is demanded",
        "failed clean accuracy is 90.1\u202f%, at least 95.0\u202f% is demanded",
    ):
        assert figure in text


def test_attacks_table_shows_the_figures_of_the_result() -> None:
    result = make_result(n=1000)
    table = Page(render(result)).tables[0]
    head, clean, *attacks, worst = ([cell.strip() for cell in row] for row in table)
    assert head == [
        *("Attack", "Accuracy", "Precision", "Recall", "F1", "Success rate", "Added"),
        *("Median distance", "Passes per image", "Forwards", "Backwards", "Time"),
    ]

    def scored(scores: Scores) -> list[str]:
        return [
            f"{percent(scores.accuracy)} {interval(scores.interval)}",
            percent(scores.precision),
            percent(scores.recall),
            percent(scores.f1),
        ]

    dash = "\u2013"
    rest = [dash, dash, dash, "1", "1,000", "0", dash]
    assert clean == ["Clean", *scored(result.clean), *rest]
    times = [dash, "1.25\u202fs", "1\u202fmin 01\u202fs"]
    labels = ["noise control draws=5", "fgsm", "pgd steps=20"]
    for row, attack, label, spent in zip(attacks, result.attacks, labels, times, strict=True):
        assert row == [
            label,
            *scored(attack.scores),
            f"{percent(attack.success_rate)} {attack.succeeded} of {attack.attempted}",
            f"{attack.added}",
            f"{255 * (attack.median_distance or 0):.3g}/255",
            f"{(attack.forwards + attack.backwards) / attack.attempted:.3g}",
            count(attack.forwards),
            count(attack.backwards),
            spent,
        ]
    fell = sum(attack.added for attack in result.attacks)
    right = views.correct(result.clean)
    assert worst[:6] == [
        "Worst case",
        *scored(result.worst_case.scores),
        f"{percent(fell / right)} {fell} of {right}",
    ]
    assert worst[6:] == [dash, "7.47/255", f"{10737 / right:.3g}", "7,404", "3,333", dash]


@pytest.mark.parametrize(
    ("clean", "low", "accuracy", "high", "state"),
    [
        (0.9, 0.02, 0.1, 0.2, "broken"),
        (0.9, 0.01, 0.05, 0.09, "broken"),
        (0.9, 0.05, 0.12, 0.2, "unsure"),
        (0.9, 0.1, 0.6, 0.9, "unsure"),
        (0.9, 0.3, 0.4, 0.5, "most"),
        (0.9, 0.5, 0.6, 0.7, "part"),
        (0.9, 0.8, 0.88, 0.93, "held"),
    ],
)
def test_verdict_follows_its_stated_rule(
    clean: float, low: float, accuracy: float, high: float, state: str
) -> None:
    result = make_result([str(i) for i in range(10)], findings=FINDINGS[1:3])
    worst = result.worst_case.scores.model_copy(
        update={"accuracy": accuracy, "interval": Interval(low=low, high=high)}
    )
    result = with_changes(result, "worst_case", scores=worst)
    result = with_changes(result, "clean", accuracy=clean)
    assert views.verdict(result).state == state
    controls = tuple(a.model_copy(update={"control": True}) for a in result.attacks)
    only_controls = result.model_copy(update={"attacks": controls})
    assert views.verdict(only_controls).state == "unknown"
    html = render(result)
    assert f'<p class="verdict {state}">' in html
    # Never by colour alone: a symbol and words stand beside it.
    assert views.verdict(result).words in Page(html).text


def test_a_failed_check_changes_the_verdict_and_its_colour() -> None:
    believed = make_result(findings=FINDINGS[1:3])
    doubted = make_result(findings=FINDINGS)
    unchecked = make_result(findings=())
    assert views.verdict(believed).state == views.verdict(unchecked).state == "most"
    assert views.verdict(doubted).state == "doubted"
    assert views.measured(doubted).state == "most"
    html = render(doubted)
    assert '<div class="hero doubted">' in html
    assert '<div class="figure main doubted">' in html
    text = Page(html).text
    assert "Not to be believed yet" in text
    assert "What was measured so far reads: most of the accuracy is lost" in text
    assert "doubted" not in re.findall('<div class="hero (\\w+)">', render(believed))
    # Where most checks could not be made, nothing is known either.
    assert views.verdict(make_result(findings=(FINDINGS[2], *FINDINGS[3:] * 3))).state == "doubted"


def test_a_glance_tells_trust_and_gates() -> None:
    def told(**changes: Any) -> list[tuple[str, str, str]]:
        return [(one.state, one.words, one.more) for one in views.glance(make_result(**changes))]

    gates = make_result().gates
    assert told() == [
        ("fail", "1 check failed", "1 of 4 checks passed"),
        ("fail", "1 failed", "1 of 2 passed"),
    ]
    assert told(findings=FINDINGS[1:3], gates=gates[:1]) == [
        ("warn", "1 failed, remedied", "1 of 2 checks passed"),
        ("pass", "All passed", "1 of 1 passed"),
    ]
    assert [one[0] for one in told(findings=FINDINGS[2:3], gates=())] == ["pass", "none"]
    assert told(findings=())[0][:2] == ("none", "Not checked")


def test_a_broken_seal_is_told_with_what_differs() -> None:
    broken = Seal(intact=False, changes=("tensor <w>: other values",))
    result = make_result(seal=broken)
    text = part_of(render(result), "weights").text
    assert "broken The audited file is not what was sealed. tensor <w>: other values" in text
    assert views.advice(result)[0].what == "Do not use this model file"
    text = part_of(render(make_result(seal=Seal(intact=True), weights=None)), "weights").text
    assert "intact The audited file is what was sealed" in text
    assert "The manifest is not signed" in text
    assert "Seal" not in part_of(render(make_result()), "weights").text


def test_advice_follows_from_what_was_found() -> None:
    def told(result: AuditResult) -> list[str]:
        # Made-up attacks spend the same on each sample, so that all fall at the end.
        longer = "Attack for longer"
        return [one.what for one in views.advice(result) if one.what != longer]

    always = "Ask about other attackers"
    assert told(make_result(n=1000))[0] == "Mend the evaluation before anything else"
    good = {"findings": FINDINGS[2:3]}
    assert told(make_result(n=1000, **good)) == ["Harden the model", always]
    assert told(make_result(n=40, **good))[0] == "Take more samples"
    assert "Let the audit check itself" in told(make_result(findings=()))
    held = make_result(n=1000, strengths=(0.0, 0.0), **good)
    assert told(held) == [always]
    bare = make_result(n=1000, weights=None, certificate=None, gates=(), **good)
    assert told(bare)[-3:] == [
        "Bound it from below too",
        "Ask what wrong bits in the weights do",
        "Keep what was reached",
    ]
    # One class falls wholly: it is named, as text.
    names = ("<b>", "cat", "deer", "dog", "frog")
    result = make_result(names, n=1000, **good)
    worst = result.worst_case.scores
    classes = tuple(
        one.model_copy(update={"recall": 0.01 if k == 0 else 0.5})
        for k, one in enumerate(worst.classes)
    )
    result = with_changes(
        result, "worst_case", scores=worst.model_copy(update={"classes": classes})
    )
    assert "Look at the weakest class" in told(result)
    text = part_of(render(result), "advice").text
    assert "Look at the weakest class: <b> Its worst-case recall is 1.0" in text
    # Wrong and sure of it.
    n = result.n
    loud = with_changes(make_result(n=1000, **good), "worst_case", confidence=(0.95,) * n)
    assert "Do not rely on confidence to notice attacks" in told(loud)


def test_a_few_samples_of_two_classes_are_too_few_to_tell() -> None:
    result = make_result(("no", "yes"), n=8, strengths=(0.0, 0.0), findings=())
    assert result.robust_accuracy > 0.5
    for right, state in ((6, "unsure"), (5, "unsure"), (4, "broken"), (0, "broken")):
        few = {"accuracy": right / 8, "interval": wilson(right, 8)}
        worst = result.worst_case.scores.model_copy(update=few)
        found = views.verdict(with_changes(result, "worst_case", scores=worst))
        assert found.state == state
    assert "Too few samples" in next(v.words for v in views.VERDICTS if v.state == "unsure")


def test_success_rate_of_a_cascade_is_of_what_still_stood() -> None:
    def says(result: AuditResult) -> bool:
        html = render(result)
        start, end = html.index('<section id="attacks"'), html.index('<section id="curve"')
        return "of those that still stood" in Page(html[start:end]).text

    assert says(as_cascade(make_result()))
    assert not says(make_result())


def test_hostile_strings_change_nothing() -> None:
    """The same result with every string replaced has the same elements and attributes."""
    plain = make_result()
    bad = HOSTILE[0] + HOSTILE[1] + HOSTILE[2] + HOSTILE[4]
    sample = plain.explanation.gallery[0] if plain.explanation else None
    assert sample is not None
    evil = plain.model_copy(
        update={
            "class_names": HOSTILE,
            "clean": scores(plain.clean_samples.label, plain.clean_samples.prediction, HOSTILE),
            "attacks": tuple(
                a.model_copy(
                    update={
                        "label": a.label + bad,
                        "name": bad,
                        "access": bad,
                        "paper": a.paper and bad,
                        "parameters": {bad: bad, "steps": 1},
                    }
                )
                for a in plain.attacks
            ),
            "worst_case": plain.worst_case.model_copy(
                update={"broken_by": tuple(by and by + bad for by in plain.worst_case.broken_by)}
            ),
            "explanation": Explanation(
                rule=bad,
                gallery=(
                    sample.model_copy(
                        update={
                            "why": bad,
                            "attack": bad,
                            "clean": bad,
                            "attributions": tuple(
                                a.model_copy(update={"method": bad, "clean": bad})
                                for a in sample.attributions
                            ),
                        }
                    ),
                ),
                drift=plain.explanation.drift if plain.explanation else (),
                quality=tuple(
                    one.model_copy(update={"method": bad}) for one in plain.explanation.quality
                ),
                left_out=(bad,),
            ),
            "findings": tuple(
                f.model_copy(update={"check": bad, "explanation": bad, "remedy": f.remedy and bad})
                for f in plain.findings
            ),
            "weights": weights(bad),
            "corruptions": corruptions(plain.n, *(k + bad for k in "ab"), missing=bad),
            "certificate": plain.certificate
            and plain.certificate.model_copy(update={"words": bad, "settings": {bad: bad, "n": 1}}),
            "gates": tuple(g.model_copy(update={"metric": bad}) for g in plain.gates),
        }
    )
    evil = with_changes(evil, "threat", norm=bad, eps_text=bad + "/255", words=bad)
    evil = with_changes(
        evil,
        "provenance",
        versions={bad: bad, "torch": bad},
        model=bad,
        model_sha256=bad,
        data=bad,
        data_sha256=bad,
        preset=bad,
        config={bad: [bad, bad], "eps": bad, "device": None},
    )
    evil = with_changes(
        evil, "execution", command=bad * 100, started=bad, device=bad, attack_seconds={bad: 1.0}
    )
    html = render(evil)
    # A check that nobody knows has no section either.
    unknown = tuple(one.model_copy(update={"check": "unknown"}) for one in plain.findings)
    plain = plain.model_copy(update={"findings": unknown})
    page, expected = Page(html), Page(render(plain))
    assert [tag for tag in page.tags if tag not in ("span", "bdi")] == [
        tag for tag in expected.tags if tag not in ("span", "bdi")
    ]
    known = {name for _, attributes in expected.elements for name in attributes}
    assert {name for _, attributes in page.elements for name in attributes} <= known
    assert "<img src=x" not in html
    assert "<svg onload" not in html
    assert "{{ 7 * 7 }}" in html
    assert not re.search("[\u200e\u200f\u202a-\u202e\u2066-\u2069\x00]", html)
    # A name of 10,000 characters is clipped, not carried along at every mention.
    assert len(html) < 300_000


def test_every_name_from_outside_is_isolated() -> None:
    page = Page(render(make_result(("\u05d0\u05d1", "cat", "deer"))))
    for path, text in page.texts:
        if "\u05d0\u05d1" in text and "svg" not in path:
            assert "bdi" in path


def test_empty_parts_are_said_to_be_empty() -> None:
    text = Page(render(no_attack_fell())).text
    for words in (
        "has no curve",
        "kept no images",
        "computed no explanations",
        "did not ask what wrong bits in the weights do",
        "This audit proved nothing",
        "An upper bound found by attacks, not a certificate.",
        "No attack broke a sample",
        "No clear loss found",
    ):
        assert words in text


def test_many_classes_have_flips_but_no_matrix() -> None:
    html = render(VARIANTS["hundred classes"]())
    assert part_of(html, "confusion").tags.count("table") == 1
    assert "Most frequent flips" in html
    assert part_of(render(VARIANTS["twenty classes"]()), "confusion").tags.count("table") == 4


def test_flips_and_weakest_class_are_counted_from_the_samples() -> None:
    result = make_result()
    flips = views.flips(result, limit=1000)
    assert sum(flip.samples for flip in flips) == views.broken(result)
    assert [flip.samples for flip in flips] == sorted((f.samples for f in flips), reverse=True)
    lowest = min(c.recall for c in result.worst_case.scores.classes)
    weakest = views.weakest(result)
    assert {row.worst.recall for row in weakest} == {lowest}
    assert f"Weakest class: {weakest[0].worst.name}. " in Page(render(result)).text


def test_matrix_of_turned_predictions_counts_the_correct_samples() -> None:
    result = make_result()
    counts = views.turned(result)
    stayed = sum(row[i] for i, row in enumerate(counts))
    assert sum(map(sum, counts)) == views.correct(result.clean)
    assert stayed == views.correct(result.worst_case.scores)
    assert sum(map(sum, counts)) - stayed == views.broken(result)
    html = render(result)
    begin = html.index('<section id="confusion"')
    end = html.index("</section>", begin)
    matrices = Page(html[begin:end] + "</section>").tables[:3]
    shown = [[int(cell.replace("\u00b7", "0")) for cell in row[1:]] for row in matrices[2][1:]]
    assert shown == counts


def test_drift_is_read_beside_its_control() -> None:
    def words(attacked: float, noise: float, n: int = 50) -> str:
        return views.reading(
            Drift(
                method="Saliency",
                attacked=DriftStatistics(n=n, spearman=attacked, top5=0.5),
                noise=DriftStatistics(n=n, spearman=noise, top5=0.5),
            )
        )

    assert "further than random noise" in words(0.4, 0.8)
    assert "about as far as random noise" in words(0.79, 0.8)
    assert "less than random noise" in words(0.9, 0.8)
    assert "Noise alone already reorders it" in words(0.1, 0.3)
    assert "no more than a hint" in words(0.4, 0.8, n=3)
    assert "hint" not in words(0.4, 0.8)


@pytest.mark.parametrize("eps_text", ["8/255", "0.0313725"])
def test_curve_puts_every_point_where_it_belongs(eps_text: str) -> None:
    result = with_changes(make_result(), "threat", eps_text=eps_text)
    svg = str(charts.curve(result))
    line = re.findall(r'<polyline class="line" points="([^"]+)"', svg)[0]
    places = [tuple(map(float, pair.split(","))) for pair in line.split()]
    left, right, bottom, top = places[0][0], places[-1][0], 294.0, 32.0
    for (x, y), point in zip(places, result.curve, strict=True):
        assert x == pytest.approx(left + (right - left) * point.eps / result.curve[-1].eps, abs=0.1)
        assert y == pytest.approx(bottom + (top - bottom) * point.robust_accuracy, abs=0.1)
    audited = re.findall(r'<line class="audited" x1="([\d.]+)"', svg)[0]
    assert float(audited) == pytest.approx((left + right) / 2, abs=0.1)
    assert (">8/255<" in svg) == (eps_text == "8/255")
    assert svg.count('class="point"') == len(result.curve)


def test_both_sides_are_shown_and_told_apart_without_colour() -> None:
    result = make_result()
    found = result.certificate
    assert found is not None
    html = render(result)
    text = Page(html).text
    for words in (
        f"{percent(found.certified_accuracy)} certified accuracy 95 % interval "
        f"{interval(found.interval)}",
        found.words,
        "Bounded from both sides",
        "certified: dashed line, squares",
        "not broken: solid line, discs",
    ):
        assert words in text
    assert "not a certificate" not in text
    assert "contradict" not in text
    undecided = views.correct(result.worst_case.scores) - sum(found.certified)
    assert f"Neither proven nor broken{undecided} samples" in text
    svg = str(charts.curve(result))
    line = re.findall(r'<polyline class="line certified" points="([^"]+)"', svg)[0]
    places = [tuple(map(float, pair.split(","))) for pair in line.split()]
    assert svg.count('class="point certified"') == len(places) == len(found.curve)
    assert ">certified</text>" in svg
    for (x, y), point in zip(places, found.curve, strict=True):
        assert x == pytest.approx(78 + 524 * point.eps * 255 / 16, abs=0.1)
        assert y == pytest.approx(294 - 262 * point.certified_accuracy, abs=0.1)
    alone = str(charts.curve(result.model_copy(update={"certificate": None})))
    assert "certified" not in alone


def test_a_certificate_beyond_the_attacks_widens_the_chart() -> None:
    result = make_result()
    assert result.certificate is not None
    far = CertifiedPoint(eps=32 / 255, certified_accuracy=0.0, interval=wilson(0, 200))
    svg = str(charts.curve(with_changes(result, "certificate", curve=(far,))))
    line = re.findall(r'<polyline class="line" points="([^"]+)"', svg)[0].split()
    assert float(line[-1].split(",")[0]) == pytest.approx(78 + 524 / 2, abs=0.1)


def test_a_contradiction_is_the_first_thing_said() -> None:
    result = with_changes(make_result(), "certificate", crossed=(3, 7))
    page = Page(render(result))
    start = page.text.index("A proof and an attack contradict each other: see the certificate")
    assert page.text.index("Not to be believed yet") < page.text.index("worst-case robust accuracy")
    assert start < page.text.index("An attacker who may change")
    assert "2 of 200 samples are certified and were broken" in page.text
    assert "at the positions 3, 7 of the test part" in page.text
    assert "Certificate and attacks contradict each other." in page.text
    assert "Bounded from both sides" not in page.text


def test_a_curve_far_beyond_the_audited_eps_says_that_its_scale_changes() -> None:
    result = make_result()
    far = CurvePoint(eps=1.0, robust_accuracy=0.2, interval=Interval(low=0.1, high=0.3))
    svg = str(charts.curve(result.model_copy(update={"curve": (*result.curve, far)})))
    assert "square-root scale" in svg
    line = re.findall(r'<polyline class="line" points="([^"]+)"', svg)[0].split()
    first, sixteenth, last = (float(line[i].split(",")[0]) for i in (0, -2, -1))
    assert (sixteenth - first) / (last - first) == pytest.approx(math.sqrt(16 / 255), abs=0.001)


def test_weights_are_shown_with_every_figure_and_read_in_plain_words() -> None:
    result = make_result()
    assert result.weights is not None
    page = part_of(render(result), "weights")
    for words in (
        "one wrong bit in 100, in weights of 8 bits, costs 5.3 points of accuracy in the mean and "
        "10.3 points in the worst of 3 patterns",
        "In float32 one wrong bit in 100 is enough for an error of 90.0\u202f%; a guard that looks "
        "at the weights when they are loaded leaves 12.0\u202f%",
        "2 flips of chosen bits, of 1,234,568, bring accuracy from 90.0\u202f% down to "
        "21.0\u202f%, about that of guessing; as many random ones leave 89.3\u202f% or more",
        "Hit most: net.0.weight (2)",
        "Not measured: net.0.weight",
    ):
        assert words in page.text
    curves, flips = page.tables
    assert curves[2:][0] == ["none", *("10.0\u202f%", "", "") * 3]
    levels = zip(
        *(
            e.levels
            for e in (result.weights.fixed, result.weights.float32, result.weights.guarded)
            if e
        ),
        strict=True,
    )
    for row, columns in zip(curves[3:], levels, strict=True):
        assert row[0] == f"{100 * columns[0].rate:g}\u202f%"
        assert row[1:] == [
            percent(value) for one in columns for value in (one.mean, one.std, one.worst)
        ]
    assert flips[2] == ["2", "net.0.weight", "7, 0, 1", "7", "143", "15", "21.0\u202f%"]


def test_bit_errors_are_drawn_where_they_belong_and_not_told_by_colour_alone() -> None:
    found = weights()
    svg = str(charts.bit_errors(found, 0.2))
    left, right, bottom, top = 78.0, 602.0, 294.0, 32.0
    for kind, errors in (
        ("fixed", found.fixed),
        ("float", found.float32),
        ("guarded", found.guarded),
    ):
        assert errors is not None
        for classes, name in ((f"line {kind}", "mean"), (f"line extreme {kind}", "worst")):
            (line,) = re.findall(f'<polyline class="{classes}" points="([^"]+)"', svg)
            for pair, level in zip(line.split(), errors.levels, strict=True):
                x, y = map(float, pair.split(","))
                share = (math.log10(level.rate) + 5) / 4
                assert x == pytest.approx(left + (right - left) * share, abs=0.1)
                assert y == pytest.approx(bottom + (top - bottom) * getattr(level, name), abs=0.1)
    assert svg.count('<circle class="point fixed"') == 4
    assert svg.count('<polygon class="point float"') == 4
    shapes = re.findall(r'<polygon class="point (\w+)" points="([^"]+)"', svg)
    assert {(kind, len(points.split())) for kind, points in shapes} == {
        ("float", 4),
        ("guarded", 3),
    }
    for tick in ("0.001", "0.01", "0.1", "1", "10"):
        assert f">{tick}\u202f%<" in svg
    assert "guessing 80.0\u202f%" in svg
    only = found.model_copy(
        update={
            "fixed": found.fixed
            and found.fixed.model_copy(update={"levels": found.fixed.levels[:1]}),
            "float32": None,
            "guarded": None,
        }
    )
    assert ">0.001\u202f%<" in str(charts.bit_errors(only, 0.2))


@pytest.mark.parametrize(
    "started", ["", "yesterday", "2025-13-45", "0001-01-01T00:00:00+14:00", "2025-01-01"]
)
def test_a_start_that_is_no_moment_is_shown_as_it_is(started: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(tampered("execution.started", started)), encoding="utf-8")
    assert started in Page(render(AuditResult.load(path))).text


def test_a_thousand_samples_render_in_well_under_a_second() -> None:
    result = make_result([f"class {i}" for i in range(100)], n=1000)
    render(result)
    begin = time.perf_counter()
    render(result)
    assert time.perf_counter() - begin < 1


def test_classes_without_samples_are_said_to_have_none() -> None:
    names = [f"class {i}" for i in range(30)]
    result = make_result(names, n=20)
    rows = views.classes(result)
    recalls = [row.worst.recall for row in rows if row.worst.support]
    assert len(recalls) == 20
    assert recalls == sorted(recalls)
    assert all(row.worst.support == 0 for row in rows[20:])
    assert all(row.worst.support for row in views.weakest(result))
    assert Page(render(result)).text.count("not among the audited samples") == 10
