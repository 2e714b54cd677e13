"""What attacks did, sample by sample."""

from __future__ import annotations

from robustann.results.scores import Interval, Scores
from robustann.results.value import Value
from robustann.rounding import MaybeNumber, Number


class CleanSamples(Value):
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


class AttackSamples(Value):
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


class AttackOutcome(Value):
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


class WorstCase(Value):
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


class CurvePoint(Value):
    """Robust accuracy at one eps: no attack of the audit broke these samples within it.

    >>> [(round(point.eps, 3), point.robust_accuracy) for point in result.curve]
    [(0.0, 1.0), (0.1, 0.75), (0.15, 0.5), (0.2, 0.5)]
    """

    eps: Number
    robust_accuracy: Number
    interval: Interval
