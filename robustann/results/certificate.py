"""What is proven."""

from __future__ import annotations

from typing import Literal

from robustann.results.scores import Interval
from robustann.results.value import Value
from robustann.rounding import Number


class CertifiedPoint(Value):
    """Certified accuracy at one eps: so many samples are proven to withstand everything in it.

    >>> [(one.eps, one.certified_accuracy) for one in result.certificate.curve if one.eps <= 0.1]
    [(0.0, 1.0), (0.05, 1.0), (0.1, 0.75)]
    """

    eps: Number
    certified_accuracy: Number
    interval: Interval


class Certificate(Value):
    """What is proven about the audited samples: robust accuracy bounded from below.

    ``crown`` and ``ibp`` are proofs for linf, by linear bounds and by intervals alone.
    ``smoothing`` is one for l2 about the smoothed classifier, each sample's with the probability
    that ``settings`` name; ``words`` say which classifier and what was attacked.

    ``certified`` has one entry a sample, in the order of
    :class:`~robustann.results.CleanSamples`: proven to be classified correctly whatever the threat
    model allows. ``crossed`` holds the places of samples that are certified and were broken all
    the same, within the audited eps or another one that was certified: there are none, unless the
    certificate or the judgement of an attack is wrong.

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
