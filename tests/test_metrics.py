"""Scores of predictions, against values worked out by hand and published ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

from robustann.errors import DataError, UsageError
from robustann.metrics import classification_report, wilson_interval


def _reference_wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson (1927), written out."""
    z, p = 1.959963984540054, successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return centre - half, centre + half


@pytest.mark.parametrize(("successes", "n"), [(1, 1), (3, 10), (81, 263), (9999, 10000)])
def test_wilson_interval_is_the_formula(successes: int, n: int) -> None:
    assert wilson_interval(successes, n) == pytest.approx(_reference_wilson(successes, n))


def test_wilson_interval_at_its_ends() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(0, 20)
    assert low == pytest.approx(0, abs=1e-12)
    # Newcombe (1998), table I: 0/20 gives an upper limit of 0.1611.
    assert high == pytest.approx(0.1611, abs=5e-5)
    assert wilson_interval(20, 20) == pytest.approx((1 - high, 1.0))


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (1, 0), (0, -1)])
def test_wilson_interval_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(UsageError, match="successes <= n"):
        wilson_interval(successes, n)


def test_report_is_what_hand_counting_gives() -> None:
    #        confusion: cat 3 right, 1 as dog; dog 2 right, 2 as cat; owl never occurs.
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    predictions = np.array([0, 0, 0, 1, 1, 1, 0, 0])
    report = classification_report(labels, predictions, ["cat", "dog", "owl"])
    assert report.confusion == ((0, 0, 3), (0, 1, 1), (1, 0, 2), (1, 1, 2))
    assert report.accuracy == 5 / 8
    assert report.interval == wilson_interval(5, 8)
    cat, dog, owl = report.per_class
    assert cat == pytest.approx((3 / 5, 3 / 4, 2 / 3, 4))
    assert dog == pytest.approx((2 / 3, 2 / 4, 4 / 7, 4))
    assert owl == (0, 0, 0, 0)
    # The macro averages leave the owl out, as scikit-learn's do by default.
    assert report.precision == pytest.approx((3 / 5 + 2 / 3) / 2)
    assert report.recall == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert report.f1 == pytest.approx((2 / 3 + 4 / 7) / 2)
    averages = precision_recall_fscore_support(labels, predictions, average="macro")
    assert (report.precision, report.recall, report.f1) == pytest.approx(averages[:3])


def test_report_holds_plain_numbers() -> None:
    report = dataclasses.asdict(classification_report([0, 1], [1, 1], ["a", "b"]))
    flat = [report["accuracy"], *report["interval"], report["precision"], report["f1"]]
    assert all(type(value) is float for value in flat)
    assert all(type(count) is int for row in report["confusion"] for count in row)
    assert [type(value) for value in report["per_class"][0]] == [float, float, float, int]


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 1], [0], "2 labels and 1 predictions"),
        ([], [], "at least one integer"),
        ([0, 2], [0, 1], "labels from 0 to 1 for 2 classes, got 0 to 2"),
        ([0, 1], [0, -1], "predictions from 0 to 1 for 2 classes, got -1 to 0"),
        ([0, 1], [0.0, 1.0], "predictions as a flat list of at least one integer, got float64"),
        ([[0], [1]], [0, 1], r"of shape \(2, 1\)"),
    ],
)
def test_report_refuses(labels: object, predictions: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        classification_report(labels, predictions, ["a", "b"])  # type: ignore[arg-type]
