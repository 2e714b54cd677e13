"""How predictions compare with labels, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from robustann.errors import DataError, UsageError


@dataclass(frozen=True)
class Report:
    """Scores of a list of predictions.

    Attributes:
        accuracy: share of predictions that equal the label, in [0, 1].
        interval: 95 % Wilson interval of the accuracy.
        precision: unweighted mean over the classes that occur in labels or predictions
            (scikit-learn's macro average); likewise ``recall`` and ``f1``.
        per_class: (precision, recall, f1, support) of each class; support counts its samples.
        confusion: (label, prediction, samples) of each pair that occurs, in order. A matrix of
            many classes is nearly empty.

    A ratio with nothing in its denominator counts as 0.

    >>> classification_report([0, 1], [0, 1], ["a", "b"]).accuracy
    1.0
    """

    accuracy: float
    interval: tuple[float, float]
    precision: float
    recall: float
    f1: float
    per_class: tuple[tuple[float, float, float, int], ...]
    confusion: tuple[tuple[int, int, int], ...]


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % confidence interval of a rate, by Wilson's score (Wilson 1927).

    Args:
        successes: how often it happened, 0..n.
        n: how often it was tried; for 0 nothing is known and the interval is (0, 1).

    Raises:
        UsageError: not 0 <= successes <= n.

    >>> low, high = wilson_interval(50, 100)
    >>> round(low, 3), round(high, 3)
    (0.404, 0.596)
    """
    if not 0 <= successes <= n:
        raise UsageError(f"expected 0 <= successes <= n, got {successes} of {n}; check the counts")
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(int(successes), int(n)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def classification_report(
    labels: Tensor | Sequence[int] | npt.NDArray[Any],
    predictions: Tensor | Sequence[int] | npt.NDArray[Any],
    class_names: Sequence[str],
) -> Report:
    """Accuracy, precision, recall, F1 by scikit-learn, and confusions.

    Args:
        labels: N integers in 0..C-1.
        predictions: N integers in 0..C-1.
        class_names: the C classes.

    Raises:
        DataError: different lengths, none at all, no integers, or a value outside 0..C-1.

    >>> report = classification_report([0, 0, 1], [0, 1, 1], ["cat", "dog"])
    >>> report.confusion, report.per_class[1]
    (((0, 0, 1), (0, 1, 1), (1, 1, 1)), (0.5, 1.0, 0.666..., 1))
    """
    from sklearn.metrics import precision_recall_fscore_support

    classes = range(len(class_names))
    truth = _integers(labels, "labels", len(classes))
    guess = _integers(predictions, "predictions", len(classes))
    if len(truth) != len(guess):
        raise DataError(
            f"expected one prediction a label, got {len(truth)} labels and "
            f"{len(guess)} predictions; give both for the same samples"
        )
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, guess, labels=classes, zero_division=0
    )
    # A class that neither occurs nor is predicted says nothing: small samples of many classes
    # would drown in zeros.
    seen = np.union1d(truth, guess)
    hits = int((truth == guess).sum())
    pairs, samples = np.unique(np.stack((truth, guess), axis=1), axis=0, return_counts=True)
    return Report(
        accuracy=hits / len(truth),
        interval=wilson_interval(hits, len(truth)),
        precision=float(precision[seen].mean()),
        recall=float(recall[seen].mean()),
        f1=float(f1[seen].mean()),
        per_class=tuple(
            (float(p), float(r), float(f), int(s))
            for p, r, f, s in zip(precision, recall, f1, support, strict=True)
        ),
        confusion=tuple(
            (label, prediction, count)
            for (label, prediction), count in zip(pairs.tolist(), samples.tolist(), strict=True)
        ),
    )


def _integers(
    values: Tensor | Sequence[int] | npt.NDArray[Any], what: str, num_classes: int
) -> npt.NDArray[np.int64]:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise DataError(
            f"expected {what} as a flat list of at least one integer, "
            f"got {array.dtype} of shape {array.shape}"
        )
    if array.min() < 0 or array.max() >= num_classes:
        raise DataError(
            f"expected {what} from 0 to {num_classes - 1} for {num_classes} classes, "
            f"got {array.min()} to {array.max()}; name every class"
        )
    return array.astype(np.int64)
