"""What an audit costs: beforehand and at most, and what a limit in time leaves for its attacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from robustann.auditing.batching import Rate
from robustann.auditing.corruptions import corruption_propagations
from robustann.auditing.curve import DistanceStage
from robustann.auditing.presets import AuditConfig, Stage
from robustann.auditing.remedies import Plan
from robustann.auditing.selection import TRUST_IMAGES
from robustann.auditing.weights import effort_of, weight_propagations

# What the experiments of the trust checks cost on each image at most, about.
_TRUST_PROPAGATIONS = 800


@dataclass(frozen=True)
class Estimate:
    """What an audit will cost at most: every sample correct, and none falling.

    Remedies for attacks that the trust checks then find wanting come on top.

    >>> from torch import nn
    >>> from robustann.auditing import Audit
    >>> from robustann.data import load_data
    >>> from robustann.threat import ThreatModel
    >>> model, data = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), load_data("digits")
    >>> config = AuditConfig(threat=ThreatModel("linf", 0.1), preset="quick", max_samples=20)
    >>> found = Audit(config).estimate(model, data.test, class_names=data.class_names)
    >>> found.samples, found.propagations > 20 * 100, found.device
    (20, True, 'cpu')
    """

    samples: int
    propagations: int
    seconds: float
    batch_size: int
    device: str


def estimated(
    config: AuditConfig,
    made: Plan,
    rate: Rate,
    *,
    stages: Sequence[Stage],
    distances: DistanceStage | None,
    shape: Sequence[int],
    count: int,
    batch_size: int,
    device: str,
) -> Estimate:
    """The most that an audit of ``count`` images of this ``shape`` costs."""
    forwards, backwards = 1.0, 0.0
    for stage in stages:
        goes_to = stage.share * made.draws
        # A success is confirmed by a forward of its own.
        forwards += goes_to * (stage.attack.cost[0] + 1)
        backwards += goes_to * stage.attack.cost[1]
    if made.seen is not None:
        # Each look at the model is one at the part too.
        forwards *= 2
    if "randomised" in {one.check for one in made.findings if one.verdict == "fail"}:
        # What looks like a success and is none costs a forward more.
        forwards *= 2
    allowed = math.inf if config.budget is None else config.budget + 3 * made.draws
    if config.minutes is not None:
        mean = (rate.forward + rate.backward) / 2
        allowed = 60 * config.minutes / (count * max(mean, 1e-12))
    if forwards + backwards > allowed:
        scale = allowed / (forwards + backwards)
        forwards, backwards = forwards * scale, backwards * scale
    if distances is not None:
        forwards += made.draws * distances.cost[0] * (2 if made.only_seen else 1)
        backwards += made.draws * distances.cost[1]
    checked = min(TRUST_IMAGES, count) / count if config.trust else 0.0
    looks, slopes = _experiments(made)
    forwards += looks * checked
    backwards += slopes * checked
    seconds = count * (forwards * rate.forward + backwards * rate.backward)
    if made.seen is not None and made.only_seen:
        # What was timed were all draws.
        seconds /= made.seen.draws
    controls = _further_forwards(config, made, shape, count)
    return Estimate(
        count,
        math.ceil(count * (forwards + backwards)) + controls,
        seconds + controls * rate.forward,
        batch_size,
        device,
    )


def affordable(
    config: AuditConfig,
    made: Plan,
    rate: Rate,
    *,
    distances: DistanceStage | None,
    shape: Sequence[int],
    count: int,
    spent: float,
) -> int:
    """The propagations an image that the configured minutes allow, of which ``spent`` seconds are
    gone."""
    # Of one propagation, and of one answer: all its draws.
    mean = (rate.forward + rate.backward) / (2 if made.gradients else 1)
    if made.seen is not None and made.only_seen:
        mean /= made.seen.draws
    answer = mean * made.draws
    left = 60 * (config.minutes or 0.0) - spent
    if config.trust:
        left -= sum(_experiments(made)) * min(TRUST_IMAGES, count) * mean
    if distances is not None:
        left -= sum(distances.cost) * count * answer
    left -= _further_forwards(config, made, shape, count) * rate.forward
    return max(1, int(left / (count * max(mean, 1e-12))))


def _experiments(made: Plan) -> tuple[float, float]:
    """Forwards and backwards of the trust checks' experiments on each image."""
    half = made.draws * _TRUST_PROPAGATIONS / 2
    # Each look at the model is one at the part too.
    return (2 * half if made.leading is made.seen else half), half


def _further_forwards(config: AuditConfig, made: Plan, shape: Sequence[int], count: int) -> int:
    """What faults in the weights and corruptions cost."""
    total = 0
    if config.weights:
        total += weight_propagations(made.model, count, effort_of(config.preset))
    if config.corruptions:
        total += corruption_propagations(shape, count, made.draws)
    return total
