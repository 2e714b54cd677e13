"""The same samples before and after: what changed, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from robustann.defenses.detection import Detection, DetectionResult
from robustann.defenses.registry import Defense
from robustann.defenses.sanitizers import Sanitizer
from robustann.errors import DataError
from robustann.hardening.sanitized import SanitizedResult, Way, in_words, judged
from robustann.results import (
    AttackerWay,
    AuditResult,
    DefenseUsed,
    DetectorFound,
    DetectorRates,
    Hardening,
    HardeningStage,
    Interval,
    Paired,
    StoredError,
)

# Shares of wrong bits that are compared.
_RATES = (0.01, 0.1)

# The 97.5 % quantile of the normal distribution.
_Z = 1.959963984540054


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare two lists of outcomes on the same samples, in the same order.

    McNemar's exact test (McNemar, 1947) on the samples that changed sides; the interval of the
    difference is Agresti and Min's (Statistics in Medicine, 2005): Wald's, with half a sample added
    to each of the four cells.

    Raises:
        DataError: the lists differ in length, or are empty.

    >>> found = paired([True, True, False, False], [True, True, True, False])
    >>> found.gained, found.lost, found.difference, found.p
    (1, 0, 0.25, 1.0)
    """
    if len(before) != len(after) or not before:
        raise DataError(
            f"expected as many outcomes before as after, at least one, got {len(before)} and "
            f"{len(after)}; compare audits of the same samples"
        )
    pairs = list(zip(before, after, strict=True))
    lost = sum(was and not now for was, now in pairs)
    gained = sum(now and not was for was, now in pairs)
    both = sum(was and now for was, now in pairs)
    low, high = _interval(lost, gained, len(pairs))
    return Paired(
        both=both,
        lost=lost,
        gained=gained,
        neither=len(pairs) - both - lost - gained,
        difference=(gained - lost) / len(pairs),
        interval=Interval(low=low, high=high),
        p=_mcnemar(lost, gained),
    )


def _mcnemar(lost: int, gained: int) -> float:
    if lost + gained == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue)


def _interval(lost: int, gained: int, n: int) -> tuple[float, float]:
    down, up, total = lost + 0.5, gained + 0.5, n + 2
    centre = (up - down) / total
    half = _Z * math.sqrt(max(down + up - (up - down) ** 2 / total, 0.0)) / total
    return max(centre - half, -1.0), min(centre + half, 1.0)


def staged(name: str, result: AuditResult) -> HardeningStage:
    """A model at one point of its hardening, by its audit."""
    proven = result.certificate
    errors: tuple[StoredError, ...] = ()
    if result.weights is not None and result.weights.fixed is not None:
        fixed = result.weights.fixed
        stored = StoredError(rate=0.0, mean=fixed.stored_error, worst=fixed.stored_error)
        wrong = tuple(
            StoredError(rate=level.rate, mean=level.mean, worst=level.worst)
            for level in fixed.levels
            if any(math.isclose(level.rate, rate) for rate in _RATES)
        )
        errors = (stored, *wrong)
    return HardeningStage(
        name=name,
        clean_accuracy=result.clean_accuracy,
        clean_interval=result.clean.interval,
        robust_accuracy=result.robust_accuracy,
        robust_interval=result.worst_case.scores.interval,
        believable=result.believable,
        certified_accuracy=None if proven is None else proven.certified_accuracy,
        certified_interval=None if proven is None else proven.interval,
        bit_errors=errors,
    )


def compared(
    defenses: Sequence[Defense],
    stages: Sequence[HardeningStage],
    before: AuditResult,
    after: AuditResult,
    *,
    sanitizers: Sequence[Sanitizer] = (),
    measured: SanitizedResult | None = None,
    detected: DetectionResult | None = None,
    notes: Sequence[str] = (),
    training: dict[str, str | int | float | bool | None] | None = None,
) -> Hardening:
    """What defenses did, from audits of the same samples.

    ``measured`` are the kinds of attackers whose images ``after`` has judged; ``stages`` ends with
    ``after``, behind the ``sanitizers``, preceded by the network without them.
    """
    verdict = None
    if measured is not None:
        verdict = _verdict(sanitizers, stages[-2], stages[-1], measured)
    return Hardening(
        defenses=tuple(
            DefenseUsed(
                name=one.name,
                label=one.label,
                kind=one.kind,
                paper=one.paper,
                helps=one.helps,
                limits=one.limits,
            )
            for one in defenses
        ),
        stages=tuple(stages),
        clean=paired(clean_outcomes(before), clean_outcomes(after)),
        robust=paired(robust_outcomes(before), robust_outcomes(after)),
        robust_accuracy=after.robust_accuracy,
        robust_interval=after.worst_case.scores.interval,
        ways=() if measured is None else tuple(_way(way, after) for way in measured.ways),
        sanitizer_verdict=verdict,
        detector=None if detected is None else _found(detected),
        notes=tuple(notes),
        training=training or {},
    )


def _verdict(
    sanitizers: Sequence[Sanitizer],
    bare: HardeningStage,
    behind: HardeningStage,
    measured: SanitizedResult,
) -> str:
    found = judged(
        sanitizers,
        robust=behind.robust_accuracy,
        bare=bare.robust_accuracy,
        bare_high=bare.robust_interval.high,
        bare_clean=bare.clean_accuracy,
    )
    names = ", ".join(part.label for part in sanitizers)
    rule = f" Judged on the mean of {measured.draws} draws." if measured.draws > 1 else ""
    return (
        f"{in_words(found, bare.robust_accuracy)} Robust accuracy "
        f"{100 * behind.robust_accuracy:.1f} % behind {names}: for each of {measured.n} samples "
        "the minimum over the attacks of the audit and five attackers, who differ in what they "
        f"know of the sanitizers.{rule}"
    )


def _way(way: Way, after: AuditResult) -> AttackerWay:
    # What the audit does not confirm, on fresh draws, was luck.
    broken = zip(way.success, after.worst_case.broken_by, strict=True)
    fell = [success and by is not None for success, by in broken]
    left = sum(right and not down for right, down in zip(clean_outcomes(after), fell, strict=True))
    return AttackerWay(
        name=way.name,
        words=way.words,
        robust_accuracy=left / after.n,
        interval=Interval.of_rate(left, after.n),
    )


def _found(detected: DetectionResult) -> DetectorFound:
    low, high = detected.interval
    return DetectorFound(
        squeezers=detected.squeezers,
        n=detected.n,
        threshold=detected.threshold,
        asked_fpr=detected.fpr,
        fpr=detected.test_fpr,
        robust_accuracy=detected.robust_accuracy,
        interval=Interval(low=low, high=high),
        bare_robust_accuracy=detected.bare_robust_accuracy,
        ways=(
            _rates("does not know of it", detected.ordinary),
            _rates("evades it too", detected.adaptive),
        ),
    )


def _rates(words: str, found: Detection) -> DetectorRates:
    return DetectorRates(
        words=words,
        attacks=found.attacks,
        attacked=found.attacked,
        fooled=found.fooled,
        evaded=found.evaded,
        auc=found.auc,
        false_positive_rates=found.false_positive_rates,
        true_positive_rates=found.true_positive_rates,
    )


def clean_outcomes(result: AuditResult) -> list[bool]:
    """Which samples were classified correctly, unattacked."""
    samples = result.clean_samples
    return [guess == label for guess, label in zip(samples.prediction, samples.label, strict=True)]


def robust_outcomes(result: AuditResult) -> list[bool]:
    """Which samples were classified correctly and broken by no attack."""
    broken = result.worst_case.broken_by
    return [right and by is None for right, by in zip(clean_outcomes(result), broken, strict=True)]
