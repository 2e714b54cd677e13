"""Demands on the figures of an audit, for use in CI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from robustann.errors import UsageError, unknown_name
from robustann.metrics import wilson_interval
from robustann.results import AuditResult, Gate, Scores
from robustann.threat import parse_number

METRICS = (
    "clean_accuracy",
    "robust_accuracy",
    "certified_accuracy",
    "worst_class_recall",
    "worst_class_robust_recall",
    "believable",
)


def parse_gate(text: str) -> tuple[str, float]:
    """A demand such as ``robust_accuracy=0.40`` as (metric, threshold).

    A metric may be followed by the threat model that is meant: ``robust_accuracy@l2=0.30``.

    Raises:
        UsageError: the text is not of that form, the metric unknown, or the threshold not a
            share from 0 to 1.

    >>> parse_gate("robust_accuracy=0.40")
    ('robust_accuracy', 0.4)
    """
    metric, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise UsageError(f"expected a gate as metric=threshold, got '{text}'; for example "
                         "robust_accuracy=0.40")  # fmt: skip
    return check_metric(metric), check_share(metric, value)


def parse_drop(text: str) -> tuple[str, float]:
    """A demand such as ``robust_accuracy=2`` as (metric, points): how far it may fall.

    Raises:
        UsageError: the text is not of that form, the metric unknown, or the points not from 0 to
            100.

    >>> parse_drop("robust_accuracy@l2=1.5")
    ('robust_accuracy@l2', 1.5)
    """
    metric, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise UsageError(f"expected a drop as metric=points, got '{text}'; for example "
                         "robust_accuracy=2")  # fmt: skip
    return check_metric(metric, drop=True), check_points(metric, value)


def check_metric(metric: str, *, drop: bool = False) -> str:
    """The metric as it is, if a gate can ask it; what follows ``@`` is looked at later.

    Raises:
        UsageError: there is no such metric, or it cannot fall.

    >>> check_metric("clean_accuracy")
    'clean_accuracy'
    """
    known = [name for name in METRICS if not drop or name != "believable"]
    if metric.partition("@")[0] not in known:
        raise unknown_name("gate metric", metric, known)
    return metric


def check_share(metric: str, value: float | str) -> float:
    """A threshold as a share from 0 to 1.

    Raises:
        UsageError: it is no such number.

    >>> check_share("clean_accuracy", "0.9")
    0.9
    """
    threshold = parse_number(value, f"the threshold of {metric}")
    if not 0 <= threshold <= 1:
        raise UsageError(f"expected the threshold of {metric} from 0 to 1, got {value}; "
                         "write 40 % as 0.40")  # fmt: skip
    return threshold


def check_points(metric: str, value: float | str) -> float:
    """How far a metric may fall, in percentage points from 0 to 100.

    Raises:
        UsageError: it is no such number.

    >>> check_points("clean_accuracy", 2)
    2.0
    """
    points = parse_number(value, f"the drop of {metric}")
    if not 0 <= points <= 100:
        raise UsageError(f"expected the drop of {metric} from 0 to 100 percentage points, got "
                         f"{value}; write a fall from 40 % to 38 % as 2")  # fmt: skip
    return points


def outcomes(result: AuditResult, metric: str) -> dict[str, list[bool]]:
    """Which samples count as right for a metric: all of them under one name, or class by class.

    The worst class is asked class by class; a class without samples is left out.

    Raises:
        UsageError: nothing was certified, or the metric counts no samples.
    """
    labels = result.clean_samples.label
    clean = [
        guess == label for guess, label in zip(result.clean_samples.prediction, labels, strict=True)
    ]
    robust = [
        right and by is None for right, by in zip(clean, result.worst_case.broken_by, strict=True)
    ]
    if metric == "clean_accuracy":
        return {"": clean}
    if metric == "robust_accuracy":
        return {"": robust}
    if metric == "certified_accuracy":
        if result.certificate is None:
            raise UsageError(
                "expected an audit that certifies for certified_accuracy, got one without a "
                "certificate; add --certify"
            )
        return {"": list(result.certificate.certified)}
    if metric in ("worst_class_recall", "worst_class_robust_recall"):
        right = clean if metric == "worst_class_recall" else robust
        return {
            name: [held for held, label in zip(right, labels, strict=True) if label == number]
            for number, name in enumerate(result.class_names)
            if number in labels
        }
    raise unknown_name("gate metric", metric, METRICS[:-1])


def with_gates(
    result: AuditResult, demands: Mapping[str, float], on: Literal["lower", "point"] = "lower"
) -> AuditResult:
    """The result with its gates decided: does each metric reach its threshold?

    ``on`` says what is compared: the lower end of the 95 % interval, which asks for evidence, or
    the point estimate. The worst class is the one where that is least. ``believable`` is 1 or 0.

    Raises:
        UsageError: a metric is unknown, or nothing was certified.

    >>> decided = with_gates(result, {"robust_accuracy": 0.4}, on="point")
    >>> decided.gates[0].value, decided.gates[0].passed
    (0.5, True)
    >>> with_gates(result, {"robust_accuracy": 0.4}).gates[0].value  # the interval's end
    0.150039
    """
    gates = []
    for metric, threshold in demands.items():
        value, asked, detail = _figure(result, metric, on)
        gates.append(
            Gate(
                metric=metric,
                on=asked,
                threshold=threshold,
                value=value,
                passed=value >= threshold,
                detail=detail,
            )
        )
    return result.model_copy(update={"gates": tuple(gates)})


def _figure(
    result: AuditResult, metric: str, on: Literal["lower", "point"]
) -> tuple[float, Literal["lower", "point"], str | None]:
    scores: dict[str, Scores] = {
        "clean_accuracy": result.clean,
        "robust_accuracy": result.worst_case.scores,
    }
    if metric in scores:
        score = scores[metric]
        return (score.interval.low if on == "lower" else score.accuracy), on, None
    if metric == "believable":
        return float(result.believable), "point", None
    groups = outcomes(result, metric)
    if metric == "certified_accuracy" and result.certificate is not None:
        found = result.certificate
        return (found.interval.low if on == "lower" else found.certified_accuracy), on, None
    figures = {
        name: wilson_interval(sum(rows), len(rows))[0] if on == "lower" else sum(rows) / len(rows)
        for name, rows in groups.items()
    }
    worst = min(figures, key=lambda name: figures[name])
    return figures[worst], on, f"class '{worst}', {counted(len(groups[worst]))}"


def counted(samples: int) -> str:
    """So many samples, in words.

    >>> counted(1), counted(2)
    ('1 sample', '2 samples')
    """
    return f"{samples} sample{'s' * (samples != 1)}"
