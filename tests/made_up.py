"""Made-up results, for the tests of reports."""

from __future__ import annotations

import base64
import io
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from robustann.findings import Finding
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
    CorruptionLevel,
    Corruptions,
    CorruptionScores,
    CurvePoint,
    Drift,
    DriftStatistics,
    Execution,
    Explanation,
    GallerySample,
    Gate,
    Interval,
    MapQuality,
    PathPoint,
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
        confusion=Scores.confusion_of(
            [
                (i, j, samples)
                for i, row in enumerate(confusion)
                for j, samples in enumerate(row)
                if samples
            ],
            size,
        ),
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
            clean=png(),
            attacked=png(),
            spearman=spearman,
            top5=None if spearman is None else 0.25,
        )

    sample = GallerySample(
        index=7,
        label=0,
        why="easiest to break",
        attack="pgd:steps=20",
        clean_prediction=0,
        clean_confidence=0.91,
        attacked_prediction=size - 1,
        attacked_confidence=0.77,
        distance=0.0123,
        nearest=0.0119,
        amplification=16.0,
        clean=png(),
        attacked=png(),
        difference=png(),
        attributions=(attribution("Saliency", 0.412), attribution("Integrated gradients", None)),
        path=tuple(
            PathPoint(
                distance=share * 0.0123,
                image=png(),
                prediction=size - 1 if share >= 1 else 0,
                confidence=0.9 - 0.3 * share,
            )
            for share in (0.0, 0.5, 1.0, 2.0)
        ),
    )

    def alike(spearman: float, top5: float) -> DriftStatistics:
        spans = {
            f"{name}_interval": Interval(low=value - 0.05, high=value + 0.06)
            for name, value in (("spearman", spearman), ("top5", top5), ("ssim", 0.513))
        }
        return DriftStatistics(n=31, spearman=spearman, top5=top5, ssim=0.513, **spans)

    groups = (
        ("true class", "flipped"),
        ("own prediction", "flipped"),
        ("true class", "not flipped"),
    )
    drift = tuple(
        Drift.model_validate(
            {
                "method": "Saliency",
                "target": target,
                "group": group,
                "attacked": alike(0.412, 0.222),
                "noise": alike(0.687, 0.444),
                "other": alike(0.123, 0.111),
                "difference": 0.275,
                "difference_interval": Interval(low=0.2, high=0.3),
            }
        )
        for target, group in groups
    )
    quality = (
        MapQuality(
            method="Saliency", n=16, reinitialised=0.213, infidelity=0.0031, max_sensitivity=0.42
        ),
        MapQuality(
            method="Integrated gradients",
            n=16,
            reinitialised=0.613,
            infidelity=0.0123,
            max_sensitivity=0.37,
            completeness_error=0.0174,
            steps=64,
            incomplete=2,
        ),
    )
    return Explanation(
        rule="The rule of the gallery.",
        gallery=(sample,),
        drift=drift,
        quality=quality,
        left_out=("LayerGradCam: no spatial layer",),
    )


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


def corruptions(n: int, *kinds: str, missing: str = "jpeg") -> Corruptions:
    """Corruption k costs about 3 (k + 1) points a severity, of 90."""
    right = [
        [round((0.9 - 0.03 * (place + 1) * severity) * n) for severity in range(1, 6)]
        for place in range(len(kinds))
    ]
    every = [count for counts in right for count in counts]
    return Corruptions(
        kinds=tuple(
            CorruptionScores(
                kind=kind,
                levels=tuple(
                    CorruptionLevel(severity=k, accuracy=count / n, interval=wilson(count, n))
                    for k, count in enumerate(counts, 1)
                ),
            )
            for kind, counts in zip(kinds, right, strict=True)
        ),
        mean_accuracy=sum(every) / (n * len(every)) if every else None,
        forwards=n * len(every),
        not_measured=(f"{missing}: images of 4 channels do not allow it",),
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
            confidence=tuple(round(rng.uniform(0.3, 1), 3) for _ in labels),
            margin=tuple(
                round(rng.uniform(-4, 0) if by else rng.uniform(0, 5), 3) for by in fallen_by
            ),
        ),
        "curve": tuple(
            CurvePoint(eps=e / 255, robust_accuracy=r, interval=wilson(round(r * n), n))
            for e, r in ((0, 0.9), (1, 0.84), (2, 0.71), (4, 0.6), (8, final.accuracy), (16, 0.1))
        ),
        "curve_propagations": 4321,
        "explanation": explanation(size),
        "weights": weights(),
        "corruptions": corruptions(n, "gaussian_noise", "contrast"),
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
        corruptions=None,
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
    "no corruption": lambda: make_result(corruptions=corruptions(200)),
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


def tampered(place: str, value: object) -> dict[str, Any]:
    """The JSON of a result with one value replaced."""
    content: dict[str, Any] = json.loads(make_result().to_json())
    *path, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
    at: Any = content
    for part in path:
        at = at[part]
    at[last] = value
    return content
