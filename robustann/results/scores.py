"""How predictions compare with labels."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationInfo, field_validator

from robustann.results.value import Value
from robustann.rounding import Number

# Up to so many classes a confusion matrix is written whole; people read it up to there too.
MATRIX_LIMIT = 20


class Interval(Value):
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


class ClassScores(Value):
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


class Scores(Value):
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
