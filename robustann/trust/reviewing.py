"""After the attacks: do their outcomes fit together? Plain data in, findings out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from robustann.findings import Finding
from robustann.results import AttackOutcome, CurvePoint
from robustann.trust.checks import CHECKS, conclude, not_run

# How unlikely a difference must be by chance to count: several checks ask on every audit.
_CHANCE = 0.01
# Gradient steps under which a sample that stands has not been attacked in earnest: about three
# starts, or three classes, of a short attack.
_CLIMB = 40
# Of all attacked samples, what a search from a gradient attack's images may add: it is part white
# box, and on robust models adds a few points as a matter of course.
_HYBRID = 0.1
_LOSS_WORDS = {"ce": "cross-entropy", "margin": "the margin loss"}


@dataclass(frozen=True)
class Paired:
    """Two attacks on the same samples.

    Attributes:
        n: how many samples.
        first: success rate of the first; ``second``: of the second.
        p: how likely so large an excess of the first is if neither is better (one-sided sign
            test on the samples that only one of them broke).

    >>> compare([True] * 8, [False] * 8)
    Paired(n=8, first=1.0, second=0.0, p=0.00390625)
    """

    n: int
    first: float
    second: float
    p: float

    def beats(self, points: float) -> bool:
        """Whether the first does better by more than so much, and not by chance."""
        return self.first - self.second > points and self.p < _CHANCE


def compare(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare two lists of successes on the same samples; see :class:`Paired`."""
    pairs = list(zip(first, second, strict=True))
    ahead = sum(one and not other for one, other in pairs)
    behind = sum(other and not one for one, other in pairs)
    differing = ahead + behind
    tail = sum(math.comb(differing, k) for k in range(ahead, differing + 1))
    n = max(len(pairs), 1)
    return Paired(len(pairs), sum(first) / n, sum(second) / n, tail / 2**differing)


def review(
    outcomes: Sequence[AttackOutcome], curve: Sequence[CurvePoint] = (), *, chance: float,
    widest: float
) -> tuple[Finding, ...]:  # fmt: skip
    """Check that the outcomes of an audit's attacks do not contradict each other.

    Args:
        outcomes: in the order in which the attacks ran.
        curve: robust accuracy over eps.
        chance: the accuracy of guessing.
        widest: the eps from which on everything is allowed
            (:meth:`robustann.threat.ThreatModel.widest`).

    Returns:
        One finding a check; ``not run`` where the audit did not run what it takes.
        :func:`robustann.trust.probe` makes up for these on a few images.

    >>> [one.verdict for one in review((), chance=0.1, widest=1.0)]
    ['not run', 'not run', 'not run', 'not run', 'not run', 'not run', 'not run']
    """
    return (
        _single_step(outcomes),
        _black_box(outcomes),
        _noise(outcomes),
        _rising(curve),
        _unbounded(curve, chance, widest, len(outcomes[0].samples.success) if outcomes else 0),
        _loss_choice(outcomes),
        _restarts(outcomes),
    )


def surrogate_agrees(agreement: float, n: int) -> Finding:
    """Whether a surrogate model predicts what its target predicts.

    ``agreement`` is the share of ``n`` clean images that both put in the same class
    (:class:`robustann.attacks.transfer.TransferResult` has it).

    >>> surrogate_agrees(0.99, 100).verdict
    'pass'
    """
    name = "surrogate-disagrees"
    if not n:
        return not_run(name, "There are no predictions to compare.")
    differ = 1 - agreement
    seen = f"Surrogate and target disagree on {differ:.1%} of {n} clean images."
    return conclude(name, differ > (CHECKS[name].threshold or 0.0), seen, value=differ)


def budget_cut(
    broken_after: Sequence[int | None], spent: Sequence[int], climbed: Sequence[int], budget: int
) -> Finding:
    """Whether a budget ended the attacks while they still found something.

    Args:
        broken_after: propagations after which each attacked sample fell, None where it stands.
        spent: propagations that each attacked sample cost.
        climbed: the gradients among them.
        budget: what each could cost.

    >>> budget_cut([3, 5, None, None], [3, 5, 10, 10], [1, 2, 5, 5], 10).verdict
    'fail'
    >>> budget_cut([3, None], [3, 90], [1, 45], 100).verdict
    'pass'
    """
    name = "budget-cut"
    standing = [i for i, fell in enumerate(broken_after) if fell is None]
    cut = [i for i in standing if spent[i] >= budget]
    if not cut:
        return conclude(name, False, f"No sample's budget of {budget} was spent.", value=0.0)
    short = sum(climbed[i] < _CLIMB for i in cut)
    late = sum(fell is not None and fell > 0.8 * budget for fell in broken_after)
    n = len(broken_after)
    if short:
        seen = (
            f"{short} of {n} samples stand after fewer than {_CLIMB} gradient steps, for the "
            f"budget of {budget} was spent."
        )
        return conclude(name, short / n > (CHECKS[name].threshold or 0.0), seen, value=short / n)
    seen = (
        f"The last fifth of the budget of {budget} broke {late} of {n} samples, and {len(cut)} "
        "stand whose budget is spent."
    )
    failed = late > 1 and late / n > (CHECKS[name].threshold or 0.0)
    return conclude(name, failed, seen, value=late / n)


def _attempted(outcome: AttackOutcome) -> tuple[bool, ...]:
    return tuple(count > 0 for count in outcome.samples.forwards)


def _white_box(outcomes: Sequence[AttackOutcome]) -> list[AttackOutcome]:
    return [one for one in outcomes if one.access == "white-box" and not one.control]


def _iterative(outcomes: Sequence[AttackOutcome]) -> list[AttackOutcome]:
    return [one for one in _white_box(outcomes) if not _one_step(one)]


def _one_step(outcome: AttackOutcome) -> bool:
    return outcome.name == "fgsm" or outcome.parameters.get("steps") == 1


def _broken(outcomes: Sequence[AttackOutcome], n: int) -> list[bool]:
    return [any(one.samples.success[i] for one in outcomes) for i in range(n)]


def _on_common(first: AttackOutcome, second: AttackOutcome) -> Paired | None:
    """Both on the samples that both attacked; None unless these are nearly all of each.

    In a cascade the second sees only what the first left: no fair comparison.
    """
    tried, also = _attempted(first), _attempted(second)
    common = [i for i, (one, other) in enumerate(zip(tried, also, strict=True)) if one and other]
    if not common or len(common) < 0.95 * max(sum(tried), sum(also)):
        return None
    return compare(
        [first.samples.success[i] for i in common], [second.samples.success[i] for i in common]
    )


def single_step(pair: Paired) -> Finding:
    """The finding from one step (first) against many (second)."""
    name = "single-step-wins"
    failed = pair.beats(CHECKS[name].threshold or 0.0)
    seen = (
        f"One step breaks {pair.first:.1%}, many steps break {pair.second:.1%} of the same "
        f"{pair.n} images."
    )
    return conclude(name, failed, seen, value=pair.first - pair.second)


def _single_step(outcomes: Sequence[AttackOutcome]) -> Finding:
    singles = [one for one in _white_box(outcomes) if _one_step(one)]
    pairs = [
        pair
        for single in singles
        for other in _iterative(outcomes)
        if (pair := _on_common(single, other))
    ]
    if not pairs:
        return not_run(
            "single-step-wins",
            "No single-step and iterative gradient attack ran on the same samples.",
        )
    # The best iterative attack is the one to beat.
    return single_step(max(pairs, key=lambda pair: pair.second - pair.first))


def black_box(broken: int, n: int, hybrid: int = 0) -> Finding:
    """The finding from how many of ``n`` attacked samples fell only to attacks without gradients.

    ``broken`` counts those from scratch; ``hybrid`` those that went on from a gradient attack's
    best image. One sample alone is chance, whatever its share.
    """
    name = "black-box-wins"
    limit = CHECKS[name].threshold or 0.0
    alone, helped = broken / n, hybrid / n
    scratch = broken > 1 and alone > limit
    failed = scratch or helped > _HYBRID
    seen = f"Attacks without gradients alone broke {alone:.1%} of {n} samples"
    if hybrid:
        seen += f", and {helped:.1%} more from where gradient attacks ended"
    return conclude(
        name,
        failed,
        seen + ".",
        value=alone if scratch or not failed else helped,
        threshold=limit if scratch or not failed else _HYBRID,
    )


def _black_box(outcomes: Sequence[AttackOutcome]) -> Finding:
    name = "black-box-wins"
    white = _white_box(outcomes)
    others = [one for one in outcomes if one.access != "white-box" and not one.control]
    if not white or not others:
        return not_run(name, "The audit did not run both gradient attacks and others.")
    n = len(white[0].samples.success)
    tried = [any(_attempted(one)[i] for one in white) for i in range(n)]
    left = [was and not fell for was, fell in zip(tried, _broken(white, n), strict=True)]
    scratch = [one for one in others if one.parameters.get("start") != "best"]
    alone = [fell and was for fell, was in zip(_broken(scratch, n), left, strict=True)]
    either = [fell and was for fell, was in zip(_broken(others, n), left, strict=True)]
    return black_box(sum(alone), max(sum(tried), 1), sum(either) - sum(alone))


def noise(fooled: int, survivors: int) -> Finding:
    """The finding from how many survivors of gradient attacks fall to random noise."""
    seen = (
        f"Random noise within the threat model fools {fooled} of {survivors} samples that "
        "gradient attacks left standing."
    )
    return conclude("noise-wins", fooled > 0, seen, value=fooled / max(survivors, 1))


def _noise(outcomes: Sequence[AttackOutcome]) -> Finding:
    white = _white_box(outcomes)
    noises = [one for one in outcomes if one.control and one.name == "noise"]
    if not white or not noises:
        return not_run("noise-wins", "The audit did not run both noise and gradient attacks.")
    n = len(white[0].samples.success)
    broken = _broken(white, n)
    both = [
        i
        for i in range(n)
        if not broken[i]
        and any(_attempted(one)[i] for one in white)
        and any(_attempted(one)[i] for one in noises)
    ]
    fell = _broken(noises, n)
    return noise(sum(fell[i] for i in both), len(both))


def _rising(curve: Sequence[CurvePoint]) -> Finding:
    name = "rising-curve"
    points = sorted(curve, key=lambda point: point.eps)
    if len(points) < 2:
        return not_run(name, "The audit measured one eps only.")
    rises = [
        (after.robust_accuracy - before.robust_accuracy, after.eps)
        for before, after in itertools.pairwise(points)
    ]
    rise, eps = max(rises)
    seen = "Robust accuracy never rises with eps."
    if rise > 0:
        seen = f"Robust accuracy rises by {rise:.1%} up to eps {eps:.3g}."
    return conclude(name, rise > 0, seen, value=max(rise, 0.0))


def unbounded(standing: float, n: int, chance: float) -> Finding:
    """The finding from the share of ``n`` samples that stands where everything is allowed."""
    name = "unbounded-attack"
    limit = min(chance, CHECKS[name].threshold or 0.0)
    failed = standing > limit and standing * n > 1.5
    seen = f"Where any change is allowed, {standing:.1%} of {n} samples stand."
    return conclude(name, failed, seen, value=standing, threshold=limit)


def _unbounded(curve: Sequence[CurvePoint], chance: float, widest: float, n: int) -> Finding:
    name = "unbounded-attack"
    if not curve:
        return not_run(name, "The audit measured no curve.")
    last = max(curve, key=lambda point: point.eps)
    if last.eps >= widest * (1 - 1e-5):
        return unbounded(last.robust_accuracy, n, chance)
    if last.robust_accuracy <= chance:
        seen = f"Chance level is reached at eps {last.eps:.3g} already."
        return conclude(name, False, seen, value=last.robust_accuracy)
    return not_run(name, "The curve ends before everything is allowed.")


def loss_choice(ce: float, other: float, pair: Paired, used: Collection[str] = ()) -> Finding:
    """The finding from the success of cross-entropy and margin; ``pair`` has the better first.

    ``used`` names the losses (``ce``, ``margin``) that the audit's own attacks climb.
    """
    name = "loss-choice"
    better = "ce" if ce > other else "margin"
    seen = (
        f"On the same {pair.n} images, cross-entropy breaks {ce:.1%} and the margin loss "
        f"{other:.1%}."
    )
    return conclude(
        name,
        pair.beats(CHECKS[name].threshold or 0.0),
        seen,
        value=pair.first - pair.second,
        remedy=f"Attacks of the audit climb the better of the two, {_LOSS_WORDS[better]}."
        if better in used
        else None,
    )


def compare_losses(
    ce: Sequence[bool], margin: Sequence[bool], used: Collection[str] = ()
) -> Finding:
    """Cross-entropy against margin on the same samples; ``used`` are the losses that the audit's
    own attacks climb (:func:`losses_used`).

    >>> found = compare_losses([False] * 20, [True] * 20)
    >>> found.verdict, found.remedy is None
    ('fail', True)
    >>> compare_losses([False] * 20, [True] * 20, {"margin"}).remedy
    'Attacks of the audit climb the better of the two, the margin loss.'
    """
    forth, back = compare(ce, margin), compare(margin, ce)
    return loss_choice(forth.first, forth.second, max(forth, back, key=lambda p: p.first), used)


def losses_used(outcomes: Sequence[AttackOutcome]) -> frozenset[str]:
    """Which of ``ce`` and ``margin`` the iterative gradient attacks of an audit climbed, on
    samples that its other gradient attacks had not broken. DLR is a margin, free of scale.

    >>> losses_used(())
    frozenset()
    """
    ran = [one for one in _iterative(outcomes) if one.attempted]
    named = {one.parameters.get("loss", "margin" if one.name == "mm" else None) for one in ran}
    return frozenset(
        {"margin" if name == "dlr" else str(name) for name in named} & {"ce", "margin"}
    )


def _loss_choice(outcomes: Sequence[AttackOutcome]) -> Finding:
    for ce in _iterative(outcomes):
        for other in _iterative(outcomes):
            alike = {**ce.parameters, "loss": "margin"} == other.parameters
            if ce.name != other.name or ce.parameters.get("loss") != "ce" or not alike:
                continue
            if _on_common(ce, other):
                tried = _attempted(ce)
                return compare_losses(
                    [hit for hit, was in zip(ce.samples.success, tried, strict=True) if was],
                    [hit for hit, was in zip(other.samples.success, tried, strict=True) if was],
                    losses_used((ce, other)),
                )
    return not_run(
        "loss-choice", "No attack ran with cross-entropy and with margin on the same samples."
    )


def _restarts(outcomes: Sequence[AttackOutcome]) -> Finding:
    name = "restarts-help"
    stages = _iterative(outcomes)
    if len(stages) < 3:
        return not_run(name, "Fewer than three rounds of gradient attacks ran.")
    n = max(one.attempted for one in stages)
    if not n:
        return not_run(name, "No sample was attacked.")
    last = stages[-1]
    share = last.added / n
    seen = f"The last of {len(stages)} rounds, {last.label}, added {share:.1%} of {n} samples."
    # One sample is chance, whatever its share.
    failed = last.added > 1 and share > (CHECKS[name].threshold or 0.0)
    return conclude(name, failed, seen, value=share)


def twice_the_steps(long: Sequence[bool], short: Sequence[bool], steps: int) -> Finding:
    """An attack of ``steps`` steps (``short``) against one of twice as many.

    >>> twice_the_steps([True] * 20, [True] * 10 + [False] * 10, 25).verdict
    'fail'
    """
    name = "steps-help"
    pair = compare(long, short)
    seen = (
        f"In {steps} steps {pair.second:.1%} of {pair.n} images fall, in {2 * steps} steps "
        f"{pair.first:.1%}."
    )
    failed = pair.beats(CHECKS[name].threshold or 0.0)
    return conclude(name, failed, seen, value=pair.first - pair.second)


def last_tenth(
    clean: Sequence[float], early: Sequence[float], full: Sequence[float], steps: int
) -> Finding:
    """Margins of images that stand: before the attack, after nine tenths of it, at its end.

    >>> last_tenth([4.0], [2.0], [1.0], 20).value
    0.333333
    """
    name = "incomplete-optimisation"
    # Infinite where the model gave no number: nothing was gained that could be told.
    known = [
        margins
        for margins in zip(clean, early, full, strict=True)
        if all(math.isfinite(one) for one in margins)
    ]
    if full and not known:
        return not_run(name, "The model gave no finite answers.")
    late = sum(max(before - end, 0.0) for _, before, end in known)
    gain = sum(max(start - end, 0.0) for start, _, end in known)
    share = late / gain if gain > 0 else 0.0
    seen = (
        f"Of what {steps} steps gain, the last tenth gains {share:.1%} (over {len(known)} images "
        "that stand)."
    )
    # One image alone is chance.
    failed = len(known) > 1 and share > (CHECKS[name].threshold or 0.0)
    return conclude(name, failed, seen, value=share)


def no_answer(finite: Sequence[bool]) -> Finding:
    """Whether images at the end of an attack are answered in finite logits.

    >>> no_answer([True, False]).value
    0.5
    """
    name = "answer-missing"
    lost = len(finite) - sum(finite)
    return conclude(
        name,
        lost > 0,
        f"{lost} of {len(finite)} images at the end of PGD get logits that are not finite.",
        value=lost / max(len(finite), 1),
    )


def lost_on_the_way(best: Sequence[bool], last: Sequence[bool]) -> Finding:
    """Whether images that were adversarial on the way (``best``) are so no longer (``last``).

    >>> lost_on_the_way([True] * 10, [True] * 5 + [False] * 5).value
    0.5
    """
    name = "silent-success"
    lost = sum(was and not still for was, still in zip(best, last, strict=True))
    share = lost / max(len(best), 1)
    return conclude(
        name,
        # One sample is chance, whatever its share.
        lost > 1 and share > (CHECKS[name].threshold or 0.0),
        f"{lost} of {len(best)} images are adversarial on the way of PGD and not at its end.",
        value=share,
        remedy="The audit judges every image on the way and keeps the best.",
    )
