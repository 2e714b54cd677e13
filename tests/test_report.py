"""The report is tested as what it is: a page that people believe, and an attack surface."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import itertools
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from robustann.errors import DataError
from robustann.findings import Finding
from robustann.reports import charts, render, views
from robustann.reports.filters import count, interval, percent
from robustann.results import (
    AttackOutcome,
    AttackSamples,
    Attribution,
    AuditResult,
    BitErrorLevel,
    BitErrors,
    BitFlip,
    BitSearch,
    Certificate,
    CertifiedPoint,
    ClassScores,
    CleanSamples,
    CurvePoint,
    Drift,
    DriftStatistics,
    Execution,
    Explanation,
    GallerySample,
    Gate,
    Interval,
    Provenance,
    Scores,
    Threat,
    Weights,
    WorstCase,
)

ANIMALS = ("bird", "cat", "deer", "dog", "frog")
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>",
    "\u202eesrever\u202c\u200f",
    "x" * 10_000,
    "{{ 7 * 7 }}{% raw %}&amp;",
)

FINDINGS = (
    Finding(
        check="gradient-missing",
        verdict="fail",
        value=0.75,
        threshold=0.05,
        explanation="The gradient is zero for 24 of 32 images. Remove what rounds.",
    ),
    Finding(
        check="randomised",
        verdict="fail",
        value=0.318,
        threshold=0.0001,
        explanation="Repeated forwards differ.",
        remedy="Gradients were averaged over 20 draws.",
    ),
    Finding(check="softmax-output", verdict="pass", explanation="The model returns logits."),
    Finding(check="rising-curve", verdict="not run", explanation="One eps only."),
)


def wilson(successes: int, n: int) -> Interval:
    z, p = 1.96, successes / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(low=(middle - half) / (1 + z * z / n), high=(middle + half) / (1 + z * z / n))


def scores(labels: Sequence[int], predictions: Sequence[int], names: Sequence[str]) -> Scores:
    size = len(names)
    confusion = [[0] * size for _ in range(size)]
    for label, prediction in zip(labels, predictions, strict=True):
        confusion[label][prediction] += 1
    classes = []
    for i, name in enumerate(names):
        hit, support = confusion[i][i], sum(confusion[i])
        called = sum(row[i] for row in confusion)
        precision, recall = hit / called if called else 0, hit / support if support else 0
        f1 = 2 * precision * recall / (precision + recall) if hit else 0
        classes.append(
            ClassScores(name=name, precision=precision, recall=recall, f1=f1, support=support)
        )
    right = sum(confusion[i][i] for i in range(size))
    return Scores(
        accuracy=right / len(labels),
        interval=wilson(right, len(labels)),
        precision=sum(c.precision for c in classes) / size,
        recall=sum(c.recall for c in classes) / size,
        f1=sum(c.f1 for c in classes) / size,
        classes=tuple(classes),
        confusion=tuple(tuple(row) for row in confusion),
    )


def png(size: int = 8, mode: str = "RGB") -> str:
    buffer = io.BytesIO()
    Image.new(mode, (size, size)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def explanation(size: int) -> Explanation:
    def attribution(method: str, spearman: float | None) -> Attribution:
        return Attribution(
            method=method,
            target=0,
            clean_png=png(),
            attacked_png=png(),
            spearman=spearman,
            top5=None if spearman is None else 0.25,
        )

    sample = GallerySample(
        index=7,
        label=0,
        why="smallest distance",
        attack="pgd:steps=20",
        clean_prediction=0,
        clean_confidence=0.91,
        attacked_prediction=size - 1,
        attacked_confidence=0.77,
        distance=0.0123,
        amplification=16.0,
        clean_png=png(),
        attacked_png=png(),
        difference_png=png(),
        attributions=(attribution("Saliency", 0.412), attribution("Integrated gradients", None)),
    )
    drift = Drift(
        method="Saliency",
        attacked=DriftStatistics(n=31, spearman=0.412, top5=0.222),
        noise=DriftStatistics(n=31, spearman=0.687, top5=0.444),
    )
    return Explanation(rule="The rule of the gallery.", gallery=(sample,), drift=(drift,))


def weights(name: str = "net.0.weight") -> Weights:
    def errors(bits: int, *means: float) -> BitErrors:
        levels = zip((1e-5, 1e-3, 0.01, 0.1), means, strict=True)
        return BitErrors(
            bits=bits,
            stored_error=0.1,
            levels=tuple(
                BitErrorLevel(rate=rate, mean=mean, std=0.0123, worst=min(1.0, mean + 0.05))
                for rate, mean in levels
            ),
        )

    def flip(place: int, accuracy: float) -> BitFlip:
        return BitFlip(
            tensor=name, index=(place, 0, 1), bit=7, before=143, after=15, accuracy=accuracy
        )

    return Weights(
        samples=200,
        clean_error=0.1,
        seeds=(0, 1, 2),
        fixed=errors(8, 0.1, 0.11, 0.153, 0.6),
        float32=errors(32, 0.12, 0.7, 0.9, 0.95),
        guarded=errors(32, 0.1, 0.1, 0.12, 0.65),
        search=BitSearch(
            bits=8,
            total_bits=1_234_568,
            searches=2,
            samples=100,
            attack_samples=100,
            stored_accuracy=0.9,
            target=0.22,
            reached=True,
            flips=(flip(3, 0.6), flip(7, 0.21)),
            control=(0.9, 0.893, 0.9),
        ),
        not_measured=(name,),
    )


def certificate(right: Sequence[bool], hardness: Sequence[float]) -> Certificate:
    """Proven at the audited eps for what would take an attack of a strength above 0.8."""
    n = len(right)
    held = tuple(ok and hard > 0.8 for ok, hard in zip(right, hardness, strict=True))
    share = sum(held) / n
    return Certificate(
        method="crown",
        words="Bounds were carried through every layer.",
        eps=8 / 255,
        certified_accuracy=share,
        interval=wilson(sum(held), n),
        certified=held,
        settings={"sigma": 0.25, "n": 1000},
        curve=tuple(
            CertifiedPoint(eps=e / 255, certified_accuracy=s, interval=wilson(round(s * n), n))
            for e, s in ((0, 0.9), (4, 0.4), (8, share), (16, 0.0))
        ),
        crossed=(),
    )


def make_result(
    names: Sequence[str] = ANIMALS,
    n: int = 200,
    *,
    strengths: Sequence[float] = (0.02, 0.3, 0.55),
    seed: int = 0,
    **changes: Any,
) -> AuditResult:
    """A plausible result: the first attack is a control; attack k breaks about strengths[k]."""
    rng = random.Random(seed)
    size = len(names)
    labels = [i % size for i in range(n)]
    clean = [y if rng.random() < 0.9 else (y + 1) % size for y in labels]
    hardness = [rng.random() for _ in labels]
    fallen_by: list[str | None] = [None] * n
    worst = list(clean)
    attacks = []
    for k, strength in enumerate(strengths):
        label = ("noise:draws=5", "fgsm", "pgd:steps=20", "pgd:steps=20,loss=margin")[k]
        right = [p == y for p, y in zip(clean, labels, strict=True)]
        success = [ok and h < strength for ok, h in zip(right, hardness, strict=True)]
        prediction = [
            (y + 1 + i % max(1, min(3, size - 1))) % size if s else p
            for i, (s, y, p) in enumerate(zip(success, labels, clean, strict=True))
        ]
        added = 0
        for i, s in enumerate(success):
            if s and fallen_by[i] is None:
                fallen_by[i], worst[i], added = label, prediction[i], added + 1
        attempted, succeeded = sum(right), sum(success)
        attacks.append(
            AttackOutcome(
                name=label.partition(":")[0],
                label=label,
                access="none" if k == 0 else "white-box",
                paper="Madry et al. 2018, arXiv:1706.06083" if k else "",
                control=k == 0,
                parameters={"steps": 10 * k, "loss": "cross-entropy"},
                scores=scores(labels, prediction, names),
                attempted=attempted,
                succeeded=succeeded,
                added=added,
                success_rate=succeeded / attempted,
                success_interval=wilson(succeeded, attempted),
                median_distance=0.0271 + k / 1000 if succeeded else None,
                forwards=1234 * (k + 1),
                backwards=1111 * k,
                samples=AttackSamples(
                    prediction=tuple(prediction),
                    success=tuple(success),
                    distance=tuple(0.03 if s else None for s in success),
                    margin=tuple(-1.0 if s else 1.0 for s in success),
                    forwards=(10,) * n,
                    backwards=(9,) * n,
                    first_success=tuple(3 if s else None for s in success),
                ),
            )
        )
    final = scores(labels, worst, names)
    eps = 8 / 255
    values: dict[str, Any] = {
        "threat": Threat(
            norm="linf",
            eps=eps,
            eps_text="8/255",
            bounds=(0.0, 1.0),
            targeted=False,
            words="An attacker who may change every pixel by at most 8/255.",
        ),
        "class_names": tuple(names),
        "n": n,
        "chance": 1 / size,
        "clean": scores(labels, clean, names),
        "clean_samples": CleanSamples(
            index=tuple(range(n)),
            label=tuple(labels),
            prediction=tuple(clean),
            confidence=tuple(round(rng.random(), 3) for _ in labels),
            margin=tuple(1.0 if p == y else -1.0 for p, y in zip(clean, labels, strict=True)),
        ),
        "attacks": tuple(attacks),
        "cascade": False,
        "worst_case": WorstCase(
            scores=final,
            prediction=tuple(worst),
            broken_by=tuple(fallen_by),
            distance=tuple(0.0293 if by else None for by in fallen_by),
            propagations=(57,) * n,
        ),
        "curve": tuple(
            CurvePoint(eps=e / 255, robust_accuracy=r, interval=wilson(round(r * n), n))
            for e, r in ((0, 0.9), (1, 0.84), (2, 0.71), (4, 0.6), (8, final.accuracy), (16, 0.1))
        ),
        "curve_propagations": 4321,
        "explanation": explanation(size),
        "weights": weights(),
        "certificate": certificate(
            [by is None and p == y for by, p, y in zip(fallen_by, clean, labels, strict=True)],
            hardness,
        ),
        "findings": FINDINGS,
        "gates": (
            Gate(metric="robust_accuracy", on="lower", threshold=0.3, value=0.3123, passed=True),
            Gate(metric="clean_accuracy", on="point", threshold=0.95, value=0.9012, passed=False),
        ),
        "provenance": Provenance(
            versions={"robustann": "0.1.0", "torch": "2.15.0"},
            seed=17,
            model="resnet18",
            model_sha256="ab" * 32,
            parameters=11_173_962,
            data="cifar10",
            data_sha256="cd" * 32,
            preset="standard",
            config={"attacks": ["fgsm", "pgd"], "eps": "8/255", "device": None},
        ),
        "execution": Execution(
            command="robustann audit model.safetensors --data cifar10",
            started="2025-01-02T03:04:05Z",
            seconds=83.4,
            attack_seconds={"fgsm": 1.25, "pgd:steps=20": 61.0},
            batch_size=256,
            device="cpu",
            threads=2,
        ),
    }
    return AuditResult(**{**values, **changes})


class Page(HTMLParser):
    """Reads a page as a browser would, strictly: every element is closed, in order."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))
        if ("td" in self.open or "th" in self.open) and "svg" not in self.open:
            self.tables[-1][-1][-1] += data

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def text(self) -> str:
        joined = "".join(text for path, text in self.texts if "style" not in path)
        return re.sub(r"[ \n]+", " ", joined)


def with_changes(result: AuditResult, part: str, **changes: Any) -> AuditResult:
    return result.model_copy(update={part: getattr(result, part).model_copy(update=changes)})


def no_attack_fell() -> AuditResult:
    return make_result(
        strengths=(0.0, 0.0),
        explanation=None,
        curve=(),
        gates=(),
        curve_propagations=0,
        weights=None,
        certificate=None,
    )


VARIANTS: dict[str, Callable[[], AuditResult]] = {
    "no findings": lambda: make_result(findings=()),
    "remedied": lambda: make_result(findings=FINDINGS[1:3]),
    "nothing failed": lambda: make_result(findings=FINDINGS[2:3]),
    "nothing checked": lambda: make_result(findings=FINDINGS[3:]),
    "usual": make_result,
    "two classes": lambda: make_result(("no", "yes")),
    "twenty classes": lambda: make_result([f"class {i}" for i in range(20)]),
    "no weights": lambda: make_result(
        weights=Weights(
            samples=9,
            clean_error=0.1,
            seeds=(0,),
            fixed=None,
            float32=None,
            guarded=None,
            search=None,
            not_measured=("got none",),
        )
    ),
    "hundred classes": lambda: make_result([f"class {i}" for i in range(100)], n=1000),
    "hostile names": lambda: make_result(HOSTILE),
    "nothing fell": no_attack_fell,
    "no attacks": lambda: make_result(strengths=()),
    "everything fell": lambda: make_result(strengths=(0.1, 1.1)),
    "empty explanation": lambda: make_result(
        explanation=Explanation(rule="None.", gallery=(), drift=())
    ),
    "empty drift": lambda: make_result(
        explanation=Explanation(
            rule="None.",
            gallery=(),
            drift=(
                Drift(
                    method="Saliency",
                    attacked=DriftStatistics(n=0, spearman=None, top5=None),
                    noise=DriftStatistics(n=0, spearman=None, top5=None),
                ),
            ),
        )
    ),
}


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
    assert all(th.get("scope") in ("row", "col", "colgroup") for th in page.all("th"))
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
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    style = "".join(text for path, text in page.texts if path[-1:] == ("style",))
    assert "url(" not in style
    assert "@import" not in style


def test_content_security_policy_allows_the_style_alone() -> None:
    html = render(make_result())
    policy = next(
        meta["content"]
        for meta in Page(html).all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    style = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    assert len(style) == 1
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_sections_stand_in_the_order_of_their_files() -> None:
    folder = Path(charts.__file__).parent / "templates" / "sections"
    names = sorted(path.name for path in folder.iterdir())
    sections = Page(render(make_result())).all("section")
    # Without before and after there is nothing to say of hardening.
    names.remove("74-hardening.html.j2")
    assert [section["id"] for section in sections] == [
        re.sub(r"^\d+-|\.html\.j2$", "", name) for name in names
    ]
    assert [section["id"] for section in sections] == [
        "verdict",
        "trust",
        "attacks",
        "curve",
        "certificate",
        "effort",
        "classes",
        "confusion",
        "gallery",
        "explanations",
        "weights",
        "limits",
        "definitions",
        "provenance",
    ]


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
    for variant, words in (
        ("remedied", "To be believed, after remedies"),
        ("nothing failed", "No sign that the evaluation misleads"),
        ("nothing checked", "Not checked"),
    ):
        assert words in Page(render(VARIANTS[variant]())).text
    assert '<section id="trust"' not in render(VARIANTS["no findings"]())


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
        f"Propagations{count(result.propagations)}",
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
    result = make_result([str(i) for i in range(10)])
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


def test_a_few_samples_of_two_classes_are_too_few_to_tell() -> None:
    result = make_result(("no", "yes"), n=8, strengths=(0.0, 0.0))
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
                            "clean_png": bad,
                            "attributions": tuple(
                                a.model_copy(update={"method": bad, "clean_png": bad})
                                for a in sample.attributions
                            ),
                        }
                    ),
                ),
                drift=plain.explanation.drift if plain.explanation else (),
            ),
            "findings": tuple(
                f.model_copy(update={"check": bad, "explanation": bad, "remedy": f.remedy and bad})
                for f in plain.findings
            ),
            "weights": weights(bad),
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
    assert len(html) < 200_000


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
    assert 'class="matrix"' not in html
    assert "Most frequent flips" in html
    assert 'class="matrix"' in render(VARIANTS["twenty classes"]())


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
    assert start < page.text.index("worst-case robust accuracy")
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


def part_of(html: str, section: str) -> Page:
    begin = html.index(f'<section id="{section}"')
    return Page(html[begin : html.index("</section>", begin)] + "</section>")


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


def test_a_saved_result_gives_the_same_page(tmp_path: Path) -> None:
    result = make_result()
    result.save(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page == render(result) == render(AuditResult.load(tmp_path / "results.json"))


TAMPERINGS: dict[str, tuple[str, object]] = {
    "no samples": ("n", 0),
    "too few samples": ("n", 199),
    "negative eps": ("threat.eps", -0.1),
    "negative eps of the curve": ("curve.1.eps", -0.1),
    "no class names": ("class_names", []),
    "a class name too many": ("class_names", [*ANIMALS, "emu"]),
    "label out of range": ("clean_samples.label.3", 5),
    "negative prediction": ("clean_samples.prediction.3", -1),
    "attack's prediction out of range": ("attacks.1.samples.prediction.0", 5),
    "worst prediction out of range": ("worst_case.prediction.0", 5),
    "clean samples of another length": ("clean_samples.margin", [1.0]),
    "attack's samples of another length": ("attacks.1.samples.first_success", []),
    "worst case of another length": ("worst_case.broken_by", [None]),
    "scores of too few classes": ("clean.classes", []),
    "confusion with too few rows": ("worst_case.scores.confusion", [[1, 2, 3, 4, 5]]),
    "confusion with a short row": ("attacks.0.scores.confusion.2", [1]),
    "negative count": ("clean.confusion.0.0", -1),
    "clean accuracy above 1": ("clean.accuracy", 1.1),
    "negative robust accuracy": ("worst_case.scores.accuracy", -0.1),
    "attack's accuracy above 1": ("attacks.2.scores.accuracy", 2),
    "curve above 1": ("curve.0.robust_accuracy", 1.5),
    "chance above 1": ("chance", 2.0),
    "gallery label out of range": ("explanation.gallery.0.label", 5),
    "gallery prediction out of range": ("explanation.gallery.0.attacked_prediction", -1),
    "gallery target out of range": ("explanation.gallery.0.attributions.0.target", 99),
    "weights' error above 1": ("weights.fixed.levels.0.worst", 1.01),
    "weights' accuracy below 0": ("weights.search.flips.0.accuracy", -0.01),
    "bit error rate of 0": ("weights.float32.levels.0.rate", 0.0),
    "bit error rates that fall": ("weights.guarded.levels.1.rate", 1e-6),
    "no bit error rates": ("weights.fixed.levels", []),
    "negative index of a weight": ("weights.search.flips.1.index", [-1]),
    "certificate of another length": ("certificate.certified", [True]),
    "certified accuracy of other samples": ("certificate.certified_accuracy", 1.0),
    "crossed out of range": ("certificate.crossed", [200]),
    "endless run": ("execution.seconds", math.inf),
    "other schema version": ("schema_version", 2),
}


def tampered(place: str, value: object) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(make_result().to_json())
    *path, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
    at: Any = content
    for part in path:
        at = at[part]
    at[last] = value
    return content


@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_tampered_result_is_refused_with_a_reason(what: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(tampered(*TAMPERINGS[what])), encoding="utf-8")
    with pytest.raises(DataError, match="run the audit again"):
        AuditResult.load(path)


def test_a_result_without_schema_version_is_refused(tmp_path: Path) -> None:
    content = json.loads(make_result().to_json())
    del content["schema_version"]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="no schema_version"):
        AuditResult.load(path)


@pytest.mark.parametrize(
    "started", ["", "yesterday", "2025-13-45", "0001-01-01T00:00:00+14:00", "2025-01-01"]
)
def test_a_start_that_is_no_moment_is_shown_as_it_is(started: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(tampered("execution.started", started)), encoding="utf-8")
    assert started in Page(render(AuditResult.load(path))).text


def as_cascade(result: AuditResult) -> AuditResult:
    """The same result, as if each attack had gone only to what was correct until then."""
    standing = [
        p == y
        for p, y in zip(result.clean_samples.prediction, result.clean_samples.label, strict=True)
    ]
    attacks = []
    for attack in result.attacks:
        forwards = tuple(10 if here else 0 for here in standing)
        success = tuple(s and h for s, h in zip(attack.samples.success, standing, strict=True))
        samples = attack.samples.model_copy(update={"forwards": forwards, "success": success})
        attacks.append(attack.model_copy(update={"samples": samples}))
        standing = [h and not s for h, s in zip(standing, success, strict=True)]
    return result.model_copy(update={"attacks": tuple(attacks), "cascade": True})


def test_samples_csv_leaves_empty_what_an_attack_of_a_cascade_did_not_touch() -> None:
    alone = make_result()
    for result in (alone, as_cascade(alone)):
        lines = list(csv.DictReader(io.StringIO(result.samples_csv())))
        assert len(lines) == result.n
        empty = 0
        for attack in result.attacks:
            for i, line in enumerate(lines):
                cells = (line[f"{attack.label} prediction"], line[f"{attack.label} success"])
                if result.cascade and not attack.samples.forwards[i]:
                    assert cells == ("", "")
                    empty += 1
                else:
                    taken = attack.samples.prediction[i], int(attack.samples.success[i])
                    assert cells == tuple(map(str, taken))
        assert (empty > 0) == result.cascade


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


BROWSER = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: the page is not looked at"
    )
    if BROWSER is None:
        pytest.skip("no chromium on the path: the page is not looked at")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module", params=["usual", "hostile names", "hundred classes"])
def page_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(VARIANTS[request.param]()), encoding="utf-8")
    return path


def test_browser_loads_the_page_alone_and_complains_of_nothing(
    browser: Any, page_file: Path
) -> None:
    page = browser.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_load_state("networkidle")
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:image/png")] == [page_file.as_uri()]


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_browser_never_scrolls_the_page_sideways(browser: Any, page_file: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    page.close()
    assert widths[0] <= widths[1]


def test_browser_prints_the_usual_page_within_the_paper(browser: Any) -> None:
    # A4 with margins of 15 mm, at 96 dots an inch.
    page = browser.new_page(viewport={"width": 680, "height": 1000}, color_scheme="dark")
    page.set_content(render(make_result(n=1000)))
    page.emulate_media(media="print")
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()
    assert widths[0] <= widths[1]
    assert paper == "rgb(255, 255, 255)"


# For every piece of shown text: its contrast to the nearest opaque background.
CONTRASTS = """() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => {
    const [r, g, b] = channels(colour).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor, alpha = channels(colour)[3];
      if (alpha === undefined || alpha === 1) return colour;
    }
  };
  document.querySelectorAll('details').forEach(part => part.open = true);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || !element.getClientRects().length || element.closest('title, desc')) continue;
    const style = getComputedStyle(element);
    const ink = luminance(element.closest('svg') ? style.fill : style.color);
    const paper = luminance(behind(element));
    found.push([text.slice(0, 30), (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_shows_all_text_with_enough_contrast(browser: Any, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.set_content(render(make_result()))
    contrasts = page.evaluate(CONTRASTS)
    page.close()
    assert len(contrasts) > 200
    assert [entry for entry in contrasts if entry[1] < 4.5] == []


def test_browser_follows_the_dark_mode(browser: Any, page_file: Path) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(page_file.as_uri())
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert colours == {"rgb(250, 249, 246)", "rgb(20, 23, 26)"}
