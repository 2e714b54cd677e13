"""The values that an audit yields, and their JSON form.

Everything a report, a gate or another program may ask of an audit is here. ``execution`` holds
whatever differs between two runs of the same audit (times, batch size, device, command line);
all other fields are the same for the same seed, model and data, whatever the batch size.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from robustann import files
from robustann.errors import DataError, UsageError
from robustann.findings import Finding, unresolved
from robustann.rounding import MaybeNumber, Number

SCHEMA_VERSION = 1
# Some kilobytes a sample, at most.
_LARGEST = 2**30
# Up to so many classes a confusion matrix is written whole; people read it up to there too.
MATRIX_LIMIT = 20

_Share = Annotated[Number, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=0)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Interval(_Value):
    """A 95 % confidence interval."""

    low: Number
    high: Number

    @classmethod
    def of_rate(cls, successes: int, n: int) -> Interval:
        """Wilson's interval of a rate.

        >>> Interval.of_rate(50, 100)
        Interval(low=0.403832, high=0.596168)
        """
        # Reading a result must not import torch, which the metrics do.
        from robustann.metrics import wilson_interval

        low, high = wilson_interval(successes, n)
        return cls(low=low, high=high)


class ClassScores(_Value):
    """Precision, recall and F1 of one class; ``support`` counts its samples.

    >>> dark = result.clean.classes[0]
    >>> dark.name, dark.recall, dark.support
    ('dark', 1.0, 2)
    """

    name: str
    precision: Number
    recall: Number
    f1: Number
    support: int


class Scores(_Value):
    """How a list of predictions compares with the labels.

    ``interval`` is Wilson's for the accuracy; ``precision``, ``recall`` and ``f1`` are macro
    averages.

    Up to 20 classes ``confusion[i][j]`` counts samples of class i predicted as j. With more it
    lists (class, prediction, samples) of what occurs, in order, since a matrix would be nearly
    empty and take megabytes; :meth:`counts` reads both.
    """

    accuracy: Number
    interval: Interval
    precision: Number
    recall: Number
    f1: Number
    classes: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]

    @field_validator("confusion")
    @classmethod
    def _listed(
        cls, found: tuple[tuple[int, ...], ...], info: ValidationInfo
    ) -> tuple[tuple[int, ...], ...]:
        """Older results hold a matrix however many classes there are."""
        size = len(info.data.get("classes", ()))
        if size > MATRIX_LIMIT and [len(row) for row in found] == [size] * size:
            return tuple(
                (label, prediction, samples)
                for label, row in enumerate(found)
                for prediction, samples in enumerate(row)
                if samples
            )
        return found

    @staticmethod
    def confusion_of(
        counts: Sequence[tuple[int, int, int]], size: int
    ) -> tuple[tuple[int, ...], ...]:
        """(class, prediction, samples) of ``size`` classes, as ``confusion`` holds them.

        >>> Scores.confusion_of([(0, 0, 3), (1, 0, 2)], 2)
        ((3, 0), (2, 0))
        """
        if size > MATRIX_LIMIT:
            return tuple(counts)
        rows = [[0] * size for _ in range(size)]
        for label, prediction, samples in counts:
            rows[label][prediction] = samples
        return tuple(map(tuple, rows))

    def counts(self) -> dict[tuple[int, int], int]:
        """How many samples of a class came out as which, where any did: {(class, prediction): n}.

        >>> Scores(
        ...     accuracy=0.6, interval=Interval(low=0.2, high=0.9), precision=0.6, recall=0.5,
        ...     f1=0.5, classes=(), confusion=((3, 0), (2, 0)),
        ... ).counts()
        {(0, 0): 3, (1, 0): 2}
        """
        if len(self.classes) > MATRIX_LIMIT:
            return {(label, prediction): n for label, prediction, n in self.confusion}
        return {
            (label, prediction): n
            for label, row in enumerate(self.confusion)
            for prediction, n in enumerate(row)
            if n
        }


class CleanSamples(_Value):
    """One entry a sample: its position in the test part, label, and the clean prediction.

    ``confidence`` is the softmax probability of the prediction, ``margin`` the logit of the
    label minus the largest other logit (negative where the prediction is wrong).

    >>> result.clean_samples.margin
    (0.8, 0.3, 0.2, 0.9)
    """

    index: tuple[int, ...]
    label: tuple[int, ...]
    prediction: tuple[int, ...]
    confidence: tuple[Number, ...]
    margin: tuple[Number, ...]


class AttackSamples(_Value):
    """One entry a sample, in the order of :class:`CleanSamples`.

    A sample whose clean prediction is wrong is not attacked: its ``prediction`` is the clean
    one, ``success`` false, ``distance`` None and its counts 0. Likewise, in a cascade, one that
    an earlier attack broke; its ``prediction`` is then that for the worst image so far.
    ``distance`` is that of the adversarial image where ``success`` holds, else None. ``margin`` is
    that of the image kept (the adversarial one, or the best found). ``first_success`` counts the
    forwards up to the first adversarial iterate.

    >>> result.attacks[0].samples.success
    (False, True, True, False)
    """

    prediction: tuple[int, ...]
    success: tuple[bool, ...]
    distance: tuple[MaybeNumber, ...]
    margin: tuple[MaybeNumber, ...]
    forwards: tuple[int, ...]
    backwards: tuple[int, ...]
    first_success: tuple[int | None, ...]


class AttackOutcome(_Value):
    """What one attack did. ``success_rate`` is ``succeeded / attempted``, over the samples
    that were classified correctly before (in a cascade: that still were); ``added`` counts
    samples that no earlier attack broke.

    ``control`` marks what is no attack but a yardstick (random noise).

    >>> fgsm = result.attacks[0]
    >>> fgsm.label, fgsm.succeeded, fgsm.attempted, fgsm.success_rate
    ('fgsm', 2, 4, 0.5)
    """

    name: str
    label: str
    access: str
    paper: str
    control: bool
    parameters: dict[str, str | int | float | bool | None]
    scores: Scores
    attempted: int
    succeeded: int
    added: int
    success_rate: MaybeNumber
    success_interval: Interval | None
    median_distance: MaybeNumber
    forwards: int
    backwards: int
    samples: AttackSamples


class WorstCase(_Value):
    """The minimum over all attacks for each sample: the headline.

    ``broken_by`` names the attack that broke a sample (the first in order), None where none
    did or where the clean prediction was wrong already; ``distance`` is the smallest at which an
    attack broke it, ``propagations`` what all attacks together spent on it. ``confidence`` and
    ``margin`` are as in :class:`CleanSamples`, for the worst image that was kept (the original,
    where no attack came nearer to an error); None where the model gave no finite answer, and both
    empty in results of older versions.

    >>> result.worst_case.broken_by
    (None, 'fgsm', 'fgsm', None)
    >>> [distance and round(distance, 3) for distance in result.worst_case.distance]
    [None, 0.15, 0.1, None]
    """

    scores: Scores
    prediction: tuple[int, ...]
    broken_by: tuple[str | None, ...]
    distance: tuple[MaybeNumber, ...]
    propagations: tuple[int, ...]
    confidence: tuple[MaybeNumber, ...] = ()
    margin: tuple[MaybeNumber, ...] = ()


class CurvePoint(_Value):
    """Robust accuracy at one eps: no attack of the audit broke these samples within it.

    >>> [(round(point.eps, 3), point.robust_accuracy) for point in result.curve]
    [(0.0, 1.0), (0.1, 0.75), (0.15, 0.5), (0.2, 0.5)]
    """

    eps: Number
    robust_accuracy: Number
    interval: Interval


class Attribution(_Value):
    """One method's attribution maps of a gallery sample, as pictures in base64.

    ``target`` is the class that both maps explain.

    >>> result.explanation.gallery[0].attributions[0].method
    'Saliency'
    """

    method: str
    target: int
    clean: str = Field(validation_alias=AliasChoices("clean", "clean_png"))
    attacked: str = Field(validation_alias=AliasChoices("attacked", "attacked_png"))
    spearman: MaybeNumber
    top5: MaybeNumber
    ssim: MaybeNumber = None


class PathPoint(_Value):
    """An image on the line from a sample to its nearest adversarial image and beyond it, at this
    ``distance`` in the audited norm, and what the model says of it.

    >>> path = result.explanation.gallery[0].path
    >>> [(point.distance, point.prediction) for point in (path[0], path[-1])]
    [(0.0, 1), (0.2, 0)]
    """

    distance: Number
    image: str
    prediction: int
    confidence: Number


class GallerySample(_Value):
    """One sample shown in the report: pictures are PNG, or WebP where they are larger than 64
    pixels and made smaller, in base64.

    ``why`` says by which rule it was chosen; ``difference`` shows the difference multiplied
    by ``amplification`` around mid-grey; ``path`` leads through the nearest adversarial image that
    a minimum-norm attack found. ``distance`` is that of the attacked image, ``nearest`` that of the
    nearest adversarial one, None where none is known within the threat model.

    >>> shown = result.explanation.gallery[0]
    >>> shown.why, shown.label, shown.attacked_prediction, shown.nearest
    ('easiest to break', 1, 0, 0.1)
    """

    index: int
    label: int
    why: str
    attack: str
    clean_prediction: int
    clean_confidence: Number
    attacked_prediction: int
    attacked_confidence: Number
    distance: Number
    nearest: Number | None = None
    amplification: Number
    clean: str = Field(validation_alias=AliasChoices("clean", "clean_png"))
    attacked: str = Field(validation_alias=AliasChoices("attacked", "attacked_png"))
    difference: str = Field(validation_alias=AliasChoices("difference", "difference_png"))
    attributions: tuple[Attribution, ...]
    path: tuple[PathPoint, ...] = ()


class DriftStatistics(_Value):
    """Medians over ``n`` samples of how alike two maps are (1 = same explanation): Spearman's rank
    correlation of |attribution|, the share of the 5 % largest pixels in common, and SSIM. Intervals
    are percentile bootstraps of the median.

    >>> drift = result.explanation.drift[0].attacked
    >>> drift.n, drift.spearman  # maps of a single pixel have no order
    (0, None)
    """

    n: int
    spearman: MaybeNumber
    top5: MaybeNumber
    ssim: MaybeNumber = None
    spearman_interval: Interval | None = None
    top5_interval: Interval | None = None
    ssim_interval: Interval | None = None


class Drift(_Value):
    """How far explanations move under attack, beside two controls: random-sign ``noise`` of the
    same size, and an ``other`` image of the same class.

    ``target`` is the class that is explained: the true one, or what the model says of each image.
    ``group`` are samples that the attack flipped, or those that it did not. ``difference`` is the
    median, over samples, of Spearman for noise minus Spearman for the attack.

    >>> drift = result.explanation.drift[0]
    >>> drift.method, drift.target, drift.group
    ('Saliency', 'true class', 'flipped')
    """

    method: str
    attacked: DriftStatistics
    noise: DriftStatistics
    other: DriftStatistics | None = None
    target: Literal["true class", "own prediction"] = "true class"
    group: Literal["flipped", "not flipped"] = "flipped"
    difference: MaybeNumber = None
    difference_interval: Interval | None = None


class MapQuality(_Value):
    """Whether the maps of a method are to be read at all, as medians over ``n`` clean images.

    ``reinitialised`` is Spearman between the map and that of the same network with re-initialised
    weights (Adebayo et al. 2018): near 1, the map does not show what was learned. ``infidelity``
    and ``max_sensitivity`` (Yeh et al. 2019) are lower for better maps; infidelity is not defined
    for maps of a layer. For integrated gradients ``completeness_error`` is the largest gap to the
    difference of the logits, relative to the sum of |attribution|, after up to ``steps`` steps;
    ``incomplete`` maps stayed above the tolerance, or are empty where the logits differ. What only
    empty maps would tell (no gradient) is None.

    >>> quality = {one.method: one for one in result.explanation.quality}
    >>> quality["Integrated gradients"].completeness_error < 0.01
    True
    """

    method: str
    n: int
    reinitialised: MaybeNumber = None
    infidelity: MaybeNumber = None
    max_sensitivity: MaybeNumber = None
    completeness_error: MaybeNumber = None
    steps: int | None = None
    incomplete: int | None = None


class Explanation(_Value):
    """What the attributions say; ``rule`` tells how the gallery was chosen, ``left_out`` which
    methods this model does not allow. ``tensors`` are the gallery's exact images, as an ``.npz``
    file's bytes; they are written beside the results, not into them.

    >>> [shown.index for shown in result.explanation.gallery]
    [2, 1]
    """

    rule: str
    gallery: tuple[GallerySample, ...]
    drift: tuple[Drift, ...]
    quality: tuple[MapQuality, ...] = ()
    left_out: tuple[str, ...] = ()
    tensors: bytes = Field(default=b"", exclude=True, repr=False)

    def __eq__(self, other: object) -> bool:
        """Equal if all is that is written into results."""
        if not isinstance(other, Explanation):
            return NotImplemented
        return self.model_dump() == other.model_dump()


class DefenseUsed(_Value):
    """A defense, and what it says of itself: where it helps, and where it is known not to.

    >>> [(one.label, one.kind) for one in defended.comparison.defenses]
    [('bit-depth:bits=1', 'sanitizer'), ('feature-squeezing', 'detector')]
    """

    name: str
    label: str
    kind: Literal["objective", "wrapper", "sanitizer", "detector"]
    paper: str
    helps: tuple[str, ...]
    limits: tuple[str, ...]


class StoredError(_Value):
    """Error with the weights in 8 bits, of which a share ``rate`` is wrong: the mean over patterns
    of bit errors, and the worst of them. At a rate of 0 nothing is wrong but the rounding.

    >>> StoredError(rate=0.01, mean=0.032, worst=0.053).worst
    0.053
    """

    rate: _Share
    mean: _Share
    worst: _Share


class HardeningStage(_Value):
    """The model at one point of its hardening; ``believable`` is the audit's own verdict.

    ``certified_accuracy`` is None where the audit did not certify; ``bit_errors`` is empty where it
    did not ask for faults in the weights.

    >>> [(stage.name, stage.robust_accuracy) for stage in defended.comparison.stages]
    [('before', 0.5), ('after', 0.5)]
    """

    name: str
    clean_accuracy: Number
    clean_interval: Interval
    robust_accuracy: Number
    robust_interval: Interval
    believable: bool
    certified_accuracy: MaybeNumber = None
    certified_interval: Interval | None = None
    bit_errors: tuple[StoredError, ...] = ()


class Paired(_Value):
    """The same samples before and after: how many were right both times, only before (``lost``),
    only after (``gained``), or never.

    ``p`` is McNemar's exact one, two-sided: how likely so uneven a split of lost and gained is if
    nothing changed. ``difference`` is after minus before, with its 95 % interval (Agresti and Min,
    2005).

    >>> change = defended.comparison.robust
    >>> change.both, change.lost, change.gained, change.neither, change.p
    (10, 0, 0, 10, 1.0)
    """

    both: int
    lost: int
    gained: int
    neither: int
    difference: Number
    interval: Interval
    p: Number


class AttackerWay(_Value):
    """Robust accuracy behind sanitizers against one kind of attacker.

    A sample counts as broken by this attacker only if the audit confirms it, so that none is below
    the audit's own robust accuracy, the minimum over everything that was tried.

    >>> [way.name for way in defended.comparison.ways]
    ['transfer', 'identity', 'gradient', 'eot', 'score']
    """

    name: str
    words: str
    robust_accuracy: Number
    interval: Interval


class DetectorRates(_Value):
    """A detector against one kind of attacker: of ``attacked`` samples, which the network
    classifies correctly, ``fooled`` came to be classified wrongly, and ``evaded`` wrongly and not
    refused.

    The ROC curve is that of the fooled images against the clean ones; no points and no ``auc``
    where none was fooled.

    >>> [(way.words, way.fooled, way.evaded) for way in defended.comparison.detector.ways]
    [('does not know of it', 10, 6), ('evades it too', 10, 10)]
    """

    words: str
    attacks: tuple[str, ...]
    attacked: int
    fooled: int
    evaded: int
    auc: MaybeNumber
    false_positive_rates: tuple[Number, ...]
    true_positive_rates: tuple[Number, ...]


class DetectorFound(_Value):
    """What a detector beside the network is worth; ``robust_accuracy`` counts a sample where the
    network is right, the clean image is not refused, and no attacker found a wrong one that passes.
    ``bare_robust_accuracy`` is that of the network alone under the attacker who does not know.

    >>> found = defended.comparison.detector
    >>> found.robust_accuracy, found.bare_robust_accuracy
    (0.5, 0.5)
    """

    squeezers: tuple[str, ...]
    n: int
    threshold: Number
    asked_fpr: Number
    fpr: Number
    robust_accuracy: Number
    interval: Interval
    bare_robust_accuracy: Number
    ways: tuple[DetectorRates, ...]


class Hardening(_Value):
    """What defenses did to a model: audits of the same samples with the same seeds, before,
    between and after, each through the defenses that stand by then.

    ``ways`` are the five kinds of attackers that sanitizers were measured against;
    ``sanitizer_verdict`` sums them up. What they broke counts in the audit that holds this, whose
    robust accuracy ``robust_accuracy`` repeats. ``detector`` stands apart, as the audits do not
    see it. ``notes`` say what the comparison leaves open.

    >>> defended.comparison.sanitizer_verdict.partition(":")[0]
    'Useless against an adaptive attacker'
    """

    defenses: tuple[DefenseUsed, ...]
    stages: tuple[HardeningStage, ...]
    clean: Paired
    robust: Paired
    robust_accuracy: Number
    robust_interval: Interval
    ways: tuple[AttackerWay, ...] = ()
    sanitizer_verdict: str | None = None
    detector: DetectorFound | None = None
    notes: tuple[str, ...] = ()
    training: dict[str, str | int | float | bool | None] = {}


class BitErrorLevel(_Value):
    """Error at one bit error rate, over the patterns of bit errors that were tried.

    >>> level = result.weights.float32.levels[0]
    >>> level.rate, level.mean, level.worst
    (1e-06, 0.0, 0.0)
    """

    rate: Annotated[Number, Field(ge=1e-6, le=1)]
    mean: _Share
    std: _Share
    worst: _Share


class BitErrors(_Value):
    """Error over bit error rate, rising, for weights stored in one way.

    ``stored_error`` is that of the weights as stored, without any bit error: after quantisation,
    or, for a guard, after it looked at whole weights.

    >>> result.weights.fixed.bits, result.weights.fixed.stored_error
    (8, 0.0)
    """

    bits: Annotated[int, Field(ge=1, le=64)]
    stored_error: _Share
    levels: Annotated[tuple[BitErrorLevel, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _rising(self) -> BitErrors:
        rates = [level.rate for level in self.levels]
        if rates != sorted(set(rates)):
            raise ValueError("expected bit error rates that rise")
        return self


class BitFlip(_Value):
    """One flipped bit: of which weight, its stored code before and after, and the accuracy after
    this flip and all before it. Bit 0 is the lowest.

    >>> flip = result.weights.search.flips[0]
    >>> flip.tensor, flip.bit, flip.before, flip.after, flip.accuracy
    ('1.weight', 7, 0, 128, 0.5)
    """

    tensor: str
    index: tuple[_Count, ...]
    bit: Annotated[int, Field(ge=0, lt=64)]
    before: _Count
    after: _Count
    accuracy: _Share


class BitSearch(_Value):
    """The fewest flips found that bring the accuracy to ``target``, or how far they got.

    A greedy search over the ``total_bits`` of weights stored in ``bits`` bits; the fewest of
    ``searches``. The attacker saw ``attack_samples`` images; ``samples`` others were evaluated, in
    ``stored_accuracy`` before any flip. ``control`` holds the accuracy, over all of them, after as
    many random flips, one entry a try.

    >>> search = result.weights.search
    >>> search.reached, len(search.flips), search.total_bits, search.accuracy
    (True, 1, 32, 0.5)
    """

    bits: Annotated[int, Field(ge=1, le=64)]
    total_bits: Annotated[int, Field(ge=1)]
    searches: Annotated[int, Field(ge=1)]
    samples: Annotated[int, Field(ge=1)]
    attack_samples: Annotated[int, Field(ge=1)]
    stored_accuracy: _Share
    target: _Share
    reached: bool
    flips: tuple[BitFlip, ...]
    control: tuple[_Share, ...]

    @property
    def accuracy(self) -> float:
        """After all flips."""
        return self.flips[-1].accuracy if self.flips else self.stored_accuracy


class Weights(_Value):
    """What happens if bits of the stored weights are wrong, by accident or by choice.

    The same ``samples`` images throughout, and the same patterns of bit errors, one a seed, in all
    curves: ``fixed`` for weights in 8-bit fixed point, ``float32`` for weights as they are,
    ``guarded`` for these with :class:`robustann.defenses.WeightGuard`. What could not be measured
    is None, and ``not_measured`` says why.

    >>> result.weights.samples, result.weights.clean_error, result.weights.not_measured
    (4, 0.0, ())
    """

    samples: Annotated[int, Field(ge=1)]
    clean_error: _Share
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    fixed: BitErrors | None
    float32: BitErrors | None
    guarded: BitErrors | None
    search: BitSearch | None
    not_measured: tuple[str, ...] = ()


class CorruptionLevel(_Value):
    """Accuracy on all audited samples, corrupted at this severity: 1 to 5, the worst.

    >>> kind, level = result.corruptions.worst
    >>> level.severity, level.accuracy
    (4, 0.75)
    """

    severity: Annotated[int, Field(ge=1, le=5)]
    accuracy: _Share
    interval: Interval


class CorruptionScores(_Value):
    """Accuracy under one common corruption over its severities, rising.

    >>> {one.kind: one.mean_accuracy for one in result.corruptions.kinds}["brightness"]
    0.9
    """

    kind: str
    levels: Annotated[tuple[CorruptionLevel, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _rising(self) -> CorruptionScores:
        severities = [level.severity for level in self.levels]
        if severities != sorted(set(severities)):
            raise ValueError("expected severities that rise")
        return self

    @property
    def mean_accuracy(self) -> float:
        """Over the severities, each with the same weight."""
        return sum(level.accuracy for level in self.levels) / len(self.levels)


class Corruptions(_Value):
    """Accuracy where nobody attacks and images only get worse (Hendrycks and Dietterich, ICLR
    2019): a control beside the attacks, of the same samples through the same model.

    Corruptions are bound by no eps and nobody looks for the worst: no outcome of theirs counts in
    the worst case. ``mean_accuracy`` is that over all kinds and severities, each with the same
    weight; None where nothing could be measured, and ``not_measured`` says what and why.
    ``forwards`` counts those of single images.

    >>> result.corruptions.mean_accuracy, result.corruptions.worst[0]
    (0.98, 'brightness')
    """

    kinds: tuple[CorruptionScores, ...]
    mean_accuracy: _Share | None
    forwards: _Count
    not_measured: tuple[str, ...] = ()

    @property
    def worst(self) -> tuple[str, CorruptionLevel] | None:
        """The kind and severity of the lowest accuracy; None where nothing was measured."""
        every = [(one.kind, level) for one in self.kinds for level in one.levels]
        return min(every, key=lambda pair: pair[1].accuracy, default=None)

    @model_validator(mode="after")
    def _fits_together(self) -> Corruptions:
        names = [one.kind for one in self.kinds]
        if len(names) != len(set(names)):
            raise ValueError("expected each corruption once")
        found = [level.accuracy for one in self.kinds for level in one.levels]
        mean = sum(found) / len(found) if found else None
        if (mean is None) != (self.mean_accuracy is None):
            raise ValueError("expected a mean accuracy where, and only where, one was measured")
        if mean is not None and abs(mean - (self.mean_accuracy or 0.0)) > 1e-5:
            raise ValueError(
                f"expected a mean accuracy of {mean:.6g}, that of all kinds and severities, got "
                f"{self.mean_accuracy}"
            )
        return self


class Seal(_Value):
    """Whether the audited file is what was sealed (``robustann seal``), by the manifest beside it.

    ``changes`` say what differs, a sentence each. The signature is not checked in an audit, which
    is given no key: only accidents are ruled out, and ``signed`` says that a check would tell more.

    >>> Seal(intact=False, changes=("1.bias has other values",)).signed
    False
    """

    intact: bool
    changes: tuple[str, ...] = ()
    signed: bool = False


class CertifiedPoint(_Value):
    """Certified accuracy at one eps: so many samples are proven to withstand everything in it.

    >>> [(one.eps, one.certified_accuracy) for one in result.certificate.curve if one.eps <= 0.1]
    [(0.0, 1.0), (0.05, 1.0), (0.1, 0.75)]
    """

    eps: Number
    certified_accuracy: Number
    interval: Interval


class Certificate(_Value):
    """What is proven about the audited samples: robust accuracy bounded from below.

    ``crown`` and ``ibp`` are proofs for linf, by linear bounds and by intervals alone.
    ``smoothing`` is one for l2 about the smoothed classifier, each sample's with the probability
    that ``settings`` name; ``words`` say which classifier and what was attacked.

    ``certified`` has one entry a sample, in the order of :class:`CleanSamples`: proven to be
    classified correctly whatever the threat model allows. ``crossed`` holds the places of samples
    that are certified and were broken all the same, within the audited eps or another one that
    was certified: there are none, unless the certificate or the judgement of an attack is wrong.

    >>> result.certificate.method, result.certificate.certified, result.certificate.crossed
    ('crown', (True, False, False, True), ())
    """

    method: Literal["crown", "ibp", "smoothing"]
    words: str
    eps: Number
    certified_accuracy: Number
    interval: Interval
    certified: tuple[bool, ...]
    settings: dict[str, str | int | float | bool | None]
    curve: tuple[CertifiedPoint, ...]
    crossed: tuple[int, ...]


class Gate(_Value):
    """A demand on a figure: ``value`` (the interval's lower bound or the point) >= threshold.

    Where the figure is a change against an earlier audit, ``metric`` is named so
    (``change_of_robust_accuracy``) and a fall is negative. ``detail`` says what was compared.

    >>> from robustann.auditing import with_gates
    >>> gate = with_gates(result, {"robust_accuracy": 0.4}).gates[0]
    >>> gate.on, gate.threshold, gate.value, gate.passed
    ('lower', 0.4, 0.150039, False)
    """

    metric: str
    on: Literal["lower", "point"]
    threshold: Number
    value: Number
    passed: bool
    detail: str | None = None


class Threat(_Value):
    """The threat model of the audit; ``words`` says it in a sentence.

    >>> print(result.threat.words)
    An attacker who may change every pixel by at most 0.2 and wants any wrong class.
    """

    norm: str
    eps: Number
    eps_text: str
    bounds: tuple[float, float]
    targeted: bool
    words: str


class Provenance(_Value):
    """What makes the audit repeatable: versions, seed, hashes, and the resolved configuration.

    ``model_sha256`` covers names, shapes and bytes of all parameters and buffers;
    ``data_sha256`` the audited images and labels.

    >>> result.provenance.seed, result.provenance.parameters
    (0, 4)
    """

    versions: dict[str, str]
    seed: int
    model: str
    model_sha256: str
    parameters: int
    data: str
    data_sha256: str
    preset: str | None
    config: dict[str, str | int | float | bool | list[str] | None]


class Tuned(_Value):
    """The switches that a timed batch chose for the search, and its ``ratios``: the time of a batch
    with a switch over that without, the worse of a full batch and an eighth of it; None where the
    model failed with it.
    """

    precision: Literal["float32", "bf16", "fp16"]
    channels_last: bool
    ratios: dict[str, MaybeNumber]

    @property
    def words(self) -> str:
        """In a sentence.

        >>> Tuned(precision="bf16", channels_last=False, ratios={"bf16": 0.6}).words
        'searching in bf16; time of a batch with bf16 0.60 of that without'
        """
        chosen = self.precision + (", channels last" if self.channels_last else "")
        told = ", ".join(
            f"{name.replace('_', ' ').replace('+', ' and ')} "
            + ("failed" if ratio is None else f"{ratio:.2f}")
            for name, ratio in self.ratios.items()
        )
        return f"searching in {chosen}" + (
            f"; time of a batch with {told} of that without" if told else ""
        )


class Execution(_Value):
    """What differs between two runs of the same audit.

    >>> result.execution.device
    'cpu'
    """

    command: str
    started: str
    seconds: FiniteFloat
    attack_seconds: dict[str, FiniteFloat]
    batch_size: int
    device: str
    threads: int
    tuned: Tuned | None = None


class AuditResult(_Value):
    """What an audit found. Read from and written to ``results.json``.

    In a ``cascade`` each attack went only to the samples that the ones before had not broken, and
    the scores listed with it are those after it and all before it.

    The three figures most asked for are properties: :attr:`clean_accuracy`,
    :attr:`robust_accuracy` (per-sample worst case over all attacks) and :attr:`propagations`.

    >>> result.clean_accuracy, result.robust_accuracy, result.certificate.certified_accuracy
    (1.0, 0.5, 0.5)
    >>> result.believable, [one.check for one in result.findings if one.verdict == "fail"]
    (True, [])
    >>> AuditResult.model_validate_json(result.to_json()) == result
    True
    """

    schema_version: Literal[1] = 1
    threat: Threat
    class_names: tuple[str, ...]
    n: int
    chance: Number
    clean: Scores
    clean_samples: CleanSamples
    attacks: tuple[AttackOutcome, ...]
    cascade: bool
    worst_case: WorstCase
    curve: tuple[CurvePoint, ...]
    curve_propagations: int
    trust_propagations: int = 0
    explanation: Explanation | None
    hardening: Hardening | None = None
    certificate: Certificate | None = None
    weights: Weights | None = None
    corruptions: Corruptions | None = None
    seal: Seal | None = None
    findings: tuple[Finding, ...] = ()
    gates: tuple[Gate, ...] = ()
    provenance: Provenance
    execution: Execution

    @model_validator(mode="after")
    def _fits_together(self) -> AuditResult:
        """Refuse what no audit yields: a report of it would fail, or mislead."""
        if self.n < 1:
            raise ValueError(f"expected n to be at least 1, got {self.n}")
        if not self.class_names:
            raise ValueError("expected at least one class name, got none")
        for place, eps in [
            ("threat", self.threat.eps),
            *(("curve", point.eps) for point in self.curve),
        ]:
            if eps < 0:
                raise ValueError(f"expected eps of {place} to be at least 0, got {eps}")
        for attack in self.attacks:
            self._check_scores(f"attack {attack.label!r:.60}", attack.scores)
            self._check_lengths(f"attack {attack.label!r:.60}", attack.samples)
            self._check_classes(f"attack {attack.label!r:.60}", attack.samples.prediction)
        self._check_scores("clean", self.clean)
        self._check_scores("worst_case", self.worst_case.scores)
        self._check_lengths("clean_samples", self.clean_samples)
        if self.worst_case.confidence or self.worst_case.margin:
            self._check_lengths("worst_case", self.worst_case)
        else:
            # An older result has neither.
            told = self.worst_case.model_copy(update={"confidence": None, "margin": None})
            self._check_lengths("worst_case", told)
        self._check_classes("clean_samples", self.clean_samples.label)
        self._check_classes("clean_samples", self.clean_samples.prediction)
        self._check_classes("worst_case", self.worst_case.prediction)
        self._check_shares("curve", [point.robust_accuracy for point in self.curve])
        self._check_shares("chance", [self.chance])
        if self.explanation is not None:
            for shown in self.explanation.gallery:
                classes = [shown.label, shown.clean_prediction, shown.attacked_prediction]
                classes += [attribution.target for attribution in shown.attributions]
                classes += [point.prediction for point in shown.path]
                self._check_classes("the gallery", classes)
        if self.certificate is not None:
            self._check_certificate(self.certificate)
        return self

    def _check_certificate(self, found: Certificate) -> None:
        if len(found.certified) != self.n:
            raise ValueError(
                f"expected {self.n} entries in certified of the certificate, "
                f"got {len(found.certified)}"
            )
        shares = [found.certified_accuracy, *(point.certified_accuracy for point in found.curve)]
        self._check_shares("the certificate", shares)
        if min([found.eps, *(point.eps for point in found.curve)]) < 0:
            raise ValueError("expected eps of the certificate to be at least 0")
        share = sum(found.certified) / self.n
        if abs(found.certified_accuracy - share) > 1e-5:
            raise ValueError(
                f"expected a certified accuracy of {share:.6g}, the share of the certified "
                f"samples, got {found.certified_accuracy}"
            )
        if list(found.crossed) != sorted({*found.crossed} & {*range(self.n)}):
            raise ValueError(f"expected crossed as rising places from 0 to {self.n - 1}")
        broken = zip(found.certified, self.worst_case.broken_by, strict=True)
        both = {row for row, (held, by) in enumerate(broken) if held and by is not None}
        # A vote decides whether the smoothed classifier was broken.
        if found.method != "smoothing" and not both <= {*found.crossed}:
            raise ValueError("expected every sample that is certified and broken among crossed")

    def _check_scores(self, place: str, scores: Scores) -> None:
        size = len(self.class_names)
        if len(scores.classes) != size:
            raise ValueError(
                f"expected scores of {size} classes for {place}, got {len(scores.classes)}"
            )
        widths = [len(row) for row in scores.confusion]
        if size > MATRIX_LIMIT:
            if set(widths) - {3}:
                raise ValueError(
                    f"expected (class, prediction, samples) in the confusion of {place}"
                )
            cells = [(label, prediction) for label, prediction, _ in scores.confusion]
            if cells != sorted({*cells}):
                raise ValueError(f"expected each pair once, in order, in the confusion of {place}")
            self._check_classes(
                f"the confusion of {place}", [one for cell in cells for one in cell]
            )
        elif widths != [size] * size:
            raise ValueError(f"expected a confusion of {size} x {size} for {place}")
        if min(scores.counts().values(), default=0) < 0:
            raise ValueError(f"expected no negative count in the confusion of {place}")
        self._check_shares(place, [scores.accuracy])

    def _check_lengths(self, place: str, samples: BaseModel) -> None:
        for name, column in samples:
            if isinstance(column, tuple) and len(column) != self.n:
                raise ValueError(
                    f"expected {self.n} entries in {name} of {place}, got {len(column)}"
                )

    def _check_classes(self, place: str, classes: Sequence[int]) -> None:
        last = len(self.class_names) - 1
        for wrong in classes:
            if not 0 <= wrong <= last:
                raise ValueError(f"expected classes 0 to {last} in {place}, got {wrong}")

    @staticmethod
    def _check_shares(place: str, shares: Sequence[float]) -> None:
        for wrong in shares:
            if not 0 <= wrong <= 1:
                raise ValueError(f"expected shares from 0 to 1 in {place}, got {wrong}")

    @property
    def clean_accuracy(self) -> float:
        """Share of the samples classified correctly, unattacked."""
        return self.clean.accuracy

    @property
    def robust_accuracy(self) -> float:
        """Share of the samples that are classified correctly under every attack."""
        return self.worst_case.scores.accuracy

    @property
    def believable(self) -> bool:
        """Whether no trust check failed without a remedy.

        False also where none was made, or fewer than half could be: what nobody looked at is not
        known. A robust accuracy of 0 needs fewer, for nothing can be lower.
        """
        made = sum(one.verdict != "not run" for one in self.findings)
        enough = 2 * made >= len(self.findings) or self.robust_accuracy == 0
        return made > 0 and enough and not unresolved(self.findings)

    @property
    def propagations(self) -> int:
        """Forwards plus backwards, summed over samples: clean pass, attacks, curve, trust checks
        and corruptions."""
        return (
            self.n
            + sum(attack.forwards + attack.backwards for attack in self.attacks)
            + self.curve_propagations
            + self.trust_propagations
            + (0 if self.corruptions is None else self.corruptions.forwards)
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``results.json``, ``samples.csv`` and ``report.html`` into ``folder``, and
        ``gallery.npz`` with the exact images of the gallery, where they are at hand: ``index``,
        ``label``, ``clean``, ``attacked`` and ``nearest``, float32 of shape (n, C, H, W)."""
        root = Path(folder)
        files.write_text(root / "results.json", self.to_json())
        files.write_text(root / "samples.csv", self.samples_csv())
        if self.explanation is not None and self.explanation.tensors:
            files.write_bytes(root / "gallery.npz", self.explanation.tensors)
        self.save_report(root / "report.html")

    def save_report(self, path: str | os.PathLike[str]) -> None:
        """Write the report, one self-contained HTML file, to ``path``."""
        from robustann.reports import render

        files.write_text(path, render(self))

    def to_json(self) -> str:
        """The result as JSON text; :meth:`load` reads it again."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AuditResult:
        """Read a ``results.json``.

        Raises:
            UsageError: the file is missing, cannot be read, or is no regular one.
            DataError: it is not a result of this schema version, or its parts do not fit together.
        """
        try:
            with files.open_regular(path) as stream:
                text = stream.read(_LARGEST + 1)
        except OSError as error:
            raise UsageError(
                f"expected a results.json, could not read '{path}' ({error.strerror or error}); "
                "name the file that 'robustann audit' wrote"
            ) from error
        if len(text) > _LARGEST:
            raise DataError(
                f"expected a results.json of at most {_LARGEST} bytes, got more in '{path}'; name "
                "the file that 'robustann audit' wrote"
            )
        try:
            result = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the top level"
            raise DataError(
                f"expected a results.json of schema version {SCHEMA_VERSION}, but in '{path}' "
                f"at {place}: {first['msg']}; run the audit again to make a new one"
            ) from error
        if "schema_version" not in result.model_fields_set:
            raise DataError(
                f"expected a results.json of schema version {SCHEMA_VERSION}, but '{path}' has no "
                "schema_version; run the audit again to make a new one"
            )
        return result

    def samples_csv(self) -> str:
        """Outcomes as CSV: index, label, clean prediction, per attack prediction and success,
        and whether the sample is certified, if there is a certificate.

        In a cascade an attack goes to some samples only: both its cells are empty for a sample
        on which it made no forward. Without a cascade every cell is filled; a sample whose clean
        prediction is wrong keeps that prediction, with success 0.
        """
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        header = ["index", "label", "clean_prediction"]
        columns: list[Sequence[int | None]] = [
            self.clean_samples.index,
            self.clean_samples.label,
            self.clean_samples.prediction,
        ]
        for attack in self.attacks:
            header += [f"{attack.label} prediction", f"{attack.label} success"]
            ran = [bool(forwards) or not self.cascade for forwards in attack.samples.forwards]
            for column in (attack.samples.prediction, attack.samples.success):
                cells = zip(column, ran, strict=True)
                columns.append([int(value) if went else None for value, went in cells])
        if self.certificate is not None:
            header.append("certified")
            columns.append([int(held) for held in self.certificate.certified])
        writer.writerow(header)
        writer.writerows(zip(*columns, strict=True))
        return buffer.getvalue()
