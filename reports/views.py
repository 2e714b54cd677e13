"""What the sections show, worked out of a result; no HTML here."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from robustann.reports.filters import THIN, percent, points, significant
from robustann.results import (
    AuditResult,
    BitErrorLevel,
    BitErrors,
    BitSearch,
    CertifiedPoint,
    ClassScores,
    Drift,
    Hardening,
    Scores,
    StoredError,
    Weights,
)

# Up to so many classes a confusion matrix, or a list of all classes, can be read.
MATRIX_LIMIT = 20

DEFINITIONS: dict[str, str] = {
    "accuracy": "Share of the audited samples that the model classifies correctly.",
    "robust accuracy": (
        "Share of the samples that stay correctly classified under every attack of the audit: "
        "for each sample, its worst outcome counts. Samples that the model gets wrong unattacked "
        "count as wrong."
    ),
    "certified accuracy": (
        "Share of the samples that are proven to be classified correctly whatever the threat model "
        "allows. It bounds the robust accuracy from below, as attacks bound it from above."
    ),
    "interval": (
        "Wilson's 95 % confidence interval. It covers the chance in which test samples were "
        "drawn, not the strength of the attacks nor another training run."
    ),
    "chance": "The accuracy of guessing.",
    "precision": (
        "Of the samples predicted as a class, the share that belongs to it; averaged over "
        "the classes that occur, each with the same weight (macro)."
    ),
    "recall": (
        "Of the samples of a class, the share predicted as it; averaged over the classes that "
        "occur, each with the same weight (macro)."
    ),
    "F1": "The harmonic mean of precision and recall; averaged over the classes that occur.",
    "success rate": (
        "Samples that the attack broke, divided by the samples it attacked: those that the model "
        "classifies correctly unattacked; in a cascade only of those that still stood after the "
        "attacks before, so that the rates of two attacks do not compare. 0 % means it broke "
        "none, not that none can be broken."
    ),
    "median distance": (
        "Median, over the samples that the attack broke, of the distance between the clean and "
        "the attacked image, in the norm of the threat model."
    ),
    "propagations": (
        "Forward plus backward passes of single images: what an attack costs, whatever the "
        "machine. Per image: divided by the samples attacked."
    ),
    "added": "Samples that this attack broke and no earlier one in the table did.",
    "control": (
        "Not an attack but a yardstick: random noise in the same threat model. An attack that "
        "does not beat it has found nothing."
    ),
    "Spearman": (
        "Rank correlation between two attribution maps: 1 is the same order of pixels, 0 is no "
        "relation."
    ),
    "bit error rate": (
        "Share of the bits of the stored weights that are inverted, each with this probability, "
        "wherever it lies."
    ),
    "top 5 %": "Of the 5 % most important pixels of one map, the share that the other map has too.",
}


@dataclass(frozen=True)
class Verdict:
    """The state of the headline, by :data:`VERDICT_RULE`: a colour class, a symbol and words."""

    state: Literal["unknown", "broken", "unsure", "most", "part", "held"]
    symbol: str
    words: str


VERDICTS = (
    Verdict("broken", "×", "No better than guessing"),  # noqa: RUF001
    Verdict("unsure", "?", "Too few samples to tell it from guessing"),
    Verdict("most", "▼", "Most of the accuracy is lost"),
    Verdict("part", "▽", "Part of the accuracy is lost"),
    Verdict("held", "●", "No clear loss found"),
    Verdict("unknown", "?", "Not measured"),
)
VERDICT_RULES = {
    "broken": "the robust accuracy is not above chance",
    "unsure": "it is above chance, but its interval reaches down to it: take more samples",
    "most": "the robust accuracy is less than half of the clean accuracy",
    "part": "at least half is left, but the interval lies under the clean accuracy",
    "held": "the interval reaches the clean accuracy, as it also does when attacks are too weak",
    "unknown": "no attack ran",
}


def verdict(result: AuditResult) -> Verdict:
    """The verdict on a result, by the rule that the report states."""
    worst = result.worst_case.scores
    state = "held"
    if all(attack.control for attack in result.attacks):
        state = "unknown"
    elif worst.accuracy <= result.chance or worst.interval.high <= result.chance:
        state = "broken"
    elif worst.interval.low <= result.chance:
        state = "unsure"
    elif worst.accuracy < result.clean.accuracy / 2:
        state = "most"
    elif worst.interval.high < result.clean.accuracy:
        state = "part"
    return next(known for known in VERDICTS if known.state == state)


def distance(result: AuditResult, value: float | None) -> str:
    """A distance, in 255ths where eps was given so."""
    if value and in_255ths(result):
        return f"{significant(255 * value)}/255"
    return significant(value)


def in_255ths(result: AuditResult) -> bool:
    """Whether eps was given as a number of grey levels, such as ``8/255``."""
    return result.threat.eps_text.replace(" ", "").endswith("/255")


def correct(scores: Scores) -> int:
    """How many samples were classified correctly."""
    return sum(row[i] for i, row in enumerate(scores.confusion))


def broken(result: AuditResult) -> int:
    """How many correctly classified samples some attack broke."""
    return sum(name is not None for name in result.worst_case.broken_by)


@dataclass(frozen=True)
class Row:
    """A row of the attacks table; what does not apply is None."""

    kind: Literal["clean", "control", "attack", "worst"]
    label: str
    scores: Scores
    succeeded: int | None = None
    attempted: int | None = None
    success_rate: float | None = None
    median_distance: float | None = None
    per_image: float | None = None
    forwards: int | None = None
    backwards: int | None = None
    seconds: float | None = None
    added: int | None = None


def rows(result: AuditResult) -> list[Row]:
    """The clean samples, each attack in order, and the worst case over all of them."""
    found = [Row("clean", "Clean", result.clean, per_image=1, forwards=result.n, backwards=0)]
    times: list[float | None] = []
    for attack in result.attacks:
        times.append(result.execution.attack_seconds.get(attack.label))
        spent = attack.forwards + attack.backwards
        found.append(
            Row(
                kind="control" if attack.control else "attack",
                label=attack.label,
                scores=attack.scores,
                succeeded=attack.succeeded,
                attempted=attack.attempted,
                success_rate=attack.success_rate,
                median_distance=attack.median_distance,
                per_image=spent / attack.attempted if attack.attempted else None,
                forwards=attack.forwards,
                backwards=attack.backwards,
                seconds=times[-1],
                added=attack.added,
            )
        )
    attempted, fell = correct(result.clean), broken(result)
    distances = [d for d in result.worst_case.distance if d is not None]
    forwards = sum(attack.forwards for attack in result.attacks)
    backwards = sum(attack.backwards for attack in result.attacks)
    known = [time for time in times if time is not None]
    found.append(
        Row(
            kind="worst",
            label="Worst case",
            scores=result.worst_case.scores,
            succeeded=fell,
            attempted=attempted,
            success_rate=fell / attempted if attempted else None,
            median_distance=statistics.median(distances) if distances else None,
            per_image=(forwards + backwards) / attempted if attempted else None,
            forwards=forwards,
            backwards=backwards,
            seconds=sum(known) if known and len(known) == len(times) else None,
        )
    )
    return found


@dataclass(frozen=True)
class ClassRow:
    """A class, clean and in the worst case."""

    clean: ClassScores
    worst: ClassScores


def classes(result: AuditResult) -> list[ClassRow]:
    """Classes with their scores clean and in the worst case.

    In order; but the weakest first where they are too many to read them all.
    """
    pairs = zip(result.clean.classes, result.worst_case.scores.classes, strict=True)
    found = [ClassRow(clean, worst) for clean, worst in pairs]
    if len(found) > MATRIX_LIMIT:
        found.sort(key=lambda row: (row.worst.support == 0, row.worst.recall))
    return found


def weakest(result: AuditResult) -> list[ClassRow]:
    """The classes of the lowest worst-case recall, among those that have samples."""
    present = [row for row in classes(result) if row.worst.support]
    lowest = min((row.worst.recall for row in present), default=0.0)
    return [row for row in present if row.worst.recall == lowest]


@dataclass(frozen=True)
class Flip:
    """How many samples of one class an attack turned into another."""

    source: str
    target: str
    samples: int
    share: float


def flips(result: AuditResult, limit: int = 10) -> list[Flip]:
    """The most frequent changes among broken samples, with their share of the class's broken."""
    worst, labels = result.worst_case, result.clean_samples.label
    changes = Counter(
        (label, prediction)
        for label, prediction, by in zip(labels, worst.prediction, worst.broken_by, strict=True)
        if by is not None
    )
    fallen: Counter[int] = Counter()
    for (label, _), samples in changes.items():
        fallen[label] += samples
    ordered = sorted(changes.items(), key=lambda item: (-item[1], item[0]))[:limit]
    names = result.class_names
    return [
        Flip(names[label], names[prediction], samples, samples / fallen[label])
        for (label, prediction), samples in ordered
    ]


def turned(result: AuditResult) -> list[list[int]]:
    """Clean prediction (rows) against worst-case prediction, of the samples correct unattacked."""
    size = len(result.class_names)
    counts = [[0] * size for _ in range(size)]
    clean = result.clean_samples
    for label, before, after in zip(
        clean.label, clean.prediction, result.worst_case.prediction, strict=True
    ):
        if label == before:
            counts[before][after] += 1
    return counts


# From which share of its row a cell takes which shade, darkest first.
SHADES = ((0.7, 6), (0.4, 5), (0.2, 4), (0.1, 3), (0.05, 2), (0.0, 1))


def shade(samples: int, total: int) -> int:
    """The shade of a confusion cell, 0 (no sample) to 6.

    >>> shade(0, 10), shade(1, 10), shade(10, 10)
    (0, 3, 6)
    """
    if not samples:
        return 0
    return next(level for share, level in SHADES if samples / total >= share)


def reading(drift: Drift) -> str:
    """What a row of the drift table says, and what it does not."""
    attacked, noise = drift.attacked, drift.noise
    if not attacked.n or attacked.spearman is None or noise.spearman is None:
        return (
            "No broken sample had maps to compare: either nothing broke, or the maps are constant "
            "because the model has no gradient there."
        )
    gap = noise.spearman - attacked.spearman
    if gap >= 0.05:
        text = "The attack moves this map further than random noise of the same size does."
    elif gap <= -0.05:
        text = "The attack moves this map less than random noise of the same size does."
    else:
        text = (
            "The attack moves this map about as far as random noise of the same size does: the "
            "drift shows how restless the map is, not what the attack did."
        )
    if noise.spearman < 0.5:
        text += " Noise alone already reorders it, so a single map says little."
    if attacked.n < 20:
        text += f" With {attacked.n} samples this is no more than a hint."
    return text


def proven(result: AuditResult) -> list[CertifiedPoint]:
    """Certified accuracy over rising eps; empty where the audit has no certificate."""
    found = result.certificate
    return sorted(found.curve, key=lambda point: point.eps) if found else []


# How a certificate was made.
METHODS = {
    "crown": "linear bounds through every layer (CROWN)",
    "ibp": "intervals through every layer (IBP)",
    "smoothing": "randomised smoothing",
}


def undecided(result: AuditResult) -> int:
    """How many samples the model gets right that were neither certified nor broken."""
    held = result.certificate.certified if result.certificate else (False,) * result.n
    clean, broken_by = result.clean_samples, result.worst_case.broken_by
    rows = zip(clean.label, clean.prediction, broken_by, held, strict=True)
    return sum(y == seen and by is None and not proof for y, seen, by, proof in rows)


def crossed(result: AuditResult, limit: int = 20) -> str:
    """Positions in the test part of samples that are certified and broken."""
    if result.certificate is None:
        return ""
    rows = result.certificate.crossed
    more = ", ..." if len(rows) > limit else ""
    return ", ".join(str(result.clean_samples.index[row]) for row in rows[:limit]) + more


def spent(result: AuditResult, limit: int = 60) -> list[tuple[int, float]]:
    """Propagations that the attacks had spent on an image, and the share that then still stood.

    Starts with the clean accuracy at the first propagation; at most ``limit`` steps.
    """
    price = {attack.label: attack.samples for attack in result.attacks}
    order = list(price)
    fell = []
    for row, label in enumerate(result.worst_case.broken_by):
        if label in price:
            before = order[: order.index(label) + 1]
            fell.append(sum(price[one].forwards[row] + price[one].backwards[row] for one in before))
    fell.sort()
    standing = correct(result.clean)
    steps = [(1, standing / result.n)]
    for place, propagations in enumerate(fell):
        left = (standing - place - 1) / result.n
        if propagations == steps[-1][0]:
            steps[-1] = (propagations, left)
        else:
            steps.append((propagations, left))
    end = max((*result.worst_case.propagations, steps[-1][0]))
    if len(steps) > limit:
        # The first and the last are always among them.
        kept = {round(i * (len(steps) - 1) / (limit - 1)) for i in range(limit)}
        steps = [steps[place] for place in sorted(kept)]
    return [*steps, (end, steps[-1][1])] if end > steps[-1][0] else steps


def hardened(hardening: Hardening) -> str:
    """What hardening did, in a sentence that does not claim more than the samples show."""
    pair = hardening.robust
    change = points(pair.difference)
    if pair.interval.low > 0:
        said = f"Hardening raised robust accuracy by {change.lstrip('+')}"
    elif pair.interval.high < 0:
        said = f"Hardening lowered robust accuracy by {change[1:]}"
    else:
        said = f"These samples do not show that hardening changed robust accuracy ({change})"
    span = f"95 % interval {points(pair.interval.low)} to {points(pair.interval.high)}"
    clean = hardening.clean
    if clean.interval.high < 0:
        price = f"It cost {points(clean.difference)[1:]} of clean accuracy"
    elif clean.interval.low > 0:
        price = f"Clean accuracy rose by {points(clean.difference)[1:]} too"
    elif not clean.lost + clean.gained:
        price = "No sample changed sides unattacked"
    else:
        price = (
            f"These samples do not show that clean accuracy changed ({points(clean.difference)})"
        )
    return f"{said}; {span}. {price}."


def bit_errors(hardening: Hardening) -> list[tuple[float, list[StoredError | None]]]:
    """Each share of wrong bits with what every stage makes of it, None where it was not asked;
    nothing where no stage was."""
    columns = [{one.rate: one for one in stage.bit_errors} for stage in hardening.stages]
    rates = sorted({rate for column in columns for rate in column})
    return [(rate, [column.get(rate) for column in columns]) for rate in rates]


@dataclass(frozen=True)
class Storage:
    """A way in which weights are stored, and how it is drawn: a CSS class, and a mark with the
    symbol that stands for it in a text."""

    kind: Literal["fixed", "float", "guarded"]
    words: str
    mark: Literal["disc", "square", "triangle"]
    symbol: str
    errors: BitErrors


def storages(weights: Weights) -> list[Storage]:
    """The ways of storing weights in which bit errors were measured."""
    found = []
    if weights.fixed is not None:
        words = f"{weights.fixed.bits}-bit fixed point"
        found.append(Storage("fixed", words, "disc", "\N{BLACK CIRCLE}", weights.fixed))
    if weights.float32 is not None:
        found.append(Storage("float", "float32", "square", "\N{BLACK SQUARE}", weights.float32))
    if weights.guarded is not None:
        symbol = "\N{BLACK UP-POINTING TRIANGLE}"
        guarded = weights.guarded
        found.append(Storage("guarded", "float32 with a guard", "triangle", symbol, guarded))
    return found


def bit_error_rate(rate: float) -> str:
    """A bit error rate as percent, without needless zeros.

    >>> bit_error_rate(1e-6), bit_error_rate(0.03)
    ('0.0001\\u202f%', '3\\u202f%')
    """
    return f"{float(f'{100 * rate:.3g}'):.10f}".rstrip("0").rstrip(".") + f"{THIN}%"


def bit_error_rows(weights: Weights) -> list[tuple[float, list[BitErrorLevel | None]]]:
    """Each bit error rate with its level in each of :func:`storages`; None where it has none."""
    columns = [
        {level.rate: level for level in storage.errors.levels} for storage in storages(weights)
    ]
    rates = sorted({rate for column in columns for rate in column})
    return [(rate, [column.get(rate) for column in columns]) for rate in rates]


def faults(weights: Weights) -> list[str]:
    """What wrong bits in the weights mean, a sentence each, in plain words."""
    said = []
    if weights.fixed is not None:
        stored = weights.fixed.stored_error
        level = min(weights.fixed.levels, key=lambda level: abs(math.log(level.rate / 0.01)))
        said.append(
            f"By accident: one wrong bit in {1 / level.rate:,.0f}, in weights of "
            f"{weights.fixed.bits} bits, costs {_cost(level.mean - stored)} of accuracy in the "
            f"mean and {_cost(level.worst - stored)} in the worst of {len(weights.seeds)} patterns."
        )
    if weights.float32 is not None and weights.guarded is not None:
        behind = {level.rate: level for level in weights.guarded.levels}
        pairs = [(level, behind.get(level.rate)) for level in weights.float32.levels]
        helped = [(bare, kept) for bare, kept in pairs if kept and bare.mean - kept.mean >= 0.01]
        if helped:
            bare, kept = max(helped, key=lambda pair: pair[0].mean - pair[1].mean)
            said.append(
                f"In float32 one wrong bit in {1 / bare.rate:,.0f} is enough for an error of "
                f"{percent(bare.mean)}; a guard that looks at the weights when they are loaded "
                f"leaves {percent(kept.mean)}."
            )
        else:
            said.append("A guard at loading makes no clear difference at these rates.")
    if weights.search is not None:
        said.append(_chosen(weights.search))
    return said


def _cost(change: float) -> str:
    text = points(max(change, 0.0)).lstrip("+")
    return "nothing" if text == points(0.0) else text


def _chosen(search: BitSearch) -> str:
    """What an attacker who chooses the bits needs."""
    start, left = percent(search.stored_accuracy), percent(search.accuracy)
    flips, bits = len(search.flips), f"{search.total_bits:,}"
    if not flips:
        return "On purpose: the model is at the level of guessing without a single flip."
    word = "flip" if flips == 1 else "flips"
    if search.reached:
        said = (
            f"On purpose: {flips} {word} of chosen bits, of {bits}, bring accuracy from {start} "
            f"down to {left}, about that of guessing"
        )
    else:
        said = (
            f"On purpose: {flips} {word} of chosen bits, of {bits}, bring accuracy from {start} to "
            f"{left}; the search ended there, short of guessing"
        )
    if search.control:
        said += f"; as many random ones leave {percent(min(search.control))} or more"
    return f"{said}."


def hit(search: BitSearch, limit: int = 5) -> list[tuple[str, int]]:
    """The tensors that most flips hit, with how many."""
    return Counter(flip.tensor for flip in search.flips).most_common(limit)
