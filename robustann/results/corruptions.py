"""What common corruptions do."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from robustann.results.scores import Interval
from robustann.results.value import Count, Share, Value


class CorruptionLevel(Value):
    """Accuracy on all audited samples, corrupted at this severity: 1 to 5, the worst.

    >>> kind, level = result.corruptions.worst
    >>> level.severity, level.accuracy
    (4, 0.75)
    """

    severity: Annotated[int, Field(ge=1, le=5)]
    accuracy: Share
    interval: Interval


class CorruptionScores(Value):
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


class Corruptions(Value):
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
    mean_accuracy: Share | None
    forwards: Count
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
