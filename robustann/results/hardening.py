"""What defenses did to a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from robustann.results.scores import Interval
from robustann.results.value import Share, Value
from robustann.rounding import MaybeNumber, Number


class DefenseUsed(Value):
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


class StoredError(Value):
    """Error with the weights in 8 bits, of which a share ``rate`` is wrong: the mean over patterns
    of bit errors, and the worst of them. At a rate of 0 nothing is wrong but the rounding.

    >>> StoredError(rate=0.01, mean=0.032, worst=0.053).worst
    0.053
    """

    rate: Share
    mean: Share
    worst: Share


class HardeningStage(Value):
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


class Paired(Value):
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


class AttackerWay(Value):
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


class DetectorRates(Value):
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


class DetectorFound(Value):
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


class Hardening(Value):
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
    training: dict[str, str | int | float | bool | None] = Field(default={})
