"""Demands on the figures of an audit, for use in CI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from robustann.errors import UsageError, unknown_name
from robustann.results import AuditResult, Gate
from robustann.threat import parse_number

METRICS = ("clean_accuracy", "robust_accuracy")


def parse_gate(text: str) -> tuple[str, float]:
    """A demand such as ``robust_accuracy=0.40`` as (metric, threshold).

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
    if metric not in METRICS:
        raise unknown_name("gate metric", metric, METRICS)
    threshold = parse_number(value, f"the threshold of {metric}")
    if not 0 <= threshold <= 1:
        raise UsageError(f"expected the threshold of {metric} from 0 to 1, got {value}; "
                         "write 40 % as 0.40")  # fmt: skip
    return metric, threshold


def with_gates(
    result: AuditResult, demands: Mapping[str, float], on: Literal["lower", "point"] = "lower"
) -> AuditResult:
    """The result with its gates decided: does each metric reach its threshold?

    ``on`` says what is compared: the lower end of the 95 % interval, which asks for evidence, or
    the point estimate.
    """
    scores = {"clean_accuracy": result.clean, "robust_accuracy": result.worst_case.scores}
    gates = []
    for metric, threshold in demands.items():
        score = scores[metric]
        value = score.interval.low if on == "lower" else score.accuracy
        gates.append(
            Gate(metric=metric, on=on, threshold=threshold, value=value, passed=value >= threshold)
        )
    return result.model_copy(update={"gates": tuple(gates)})
