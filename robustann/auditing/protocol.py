"""A published protocol within an audit: what it found by itself, and whether it is still itself."""

from __future__ import annotations

from robustann.attacks import APGD
from robustann.auditing.presets import AuditConfig, get_preset
from robustann.auditing.remedies import LogProbabilities, Plan
from robustann.results import AuditResult, Interval, Protocol

# As published; what the presets run in other norms is another protocol.
_NORMS = ("linf", "l2")


def protocol_alone(
    result: AuditResult, config: AuditConfig, made: Plan, budget: int | None
) -> Protocol | None:
    """What the preset's protocol came to without whatever the audit added; None where the preset
    follows none.

    ``result`` holds the outcomes of ``made``, whose first stages are the protocol's; ``budget``
    is what an image could cost.
    """
    preset = get_preset(config.preset)
    if config.attacks is not None or preset.protocol is None:
        return None
    own = result.attacks[: made.own]
    clean = result.clean_samples
    left = [
        row
        for row, (guess, label) in enumerate(zip(clean.prediction, clean.label, strict=True))
        if guess == label and not any(one.samples.success[row] for one in own)
    ]
    spent = [
        sum(one.samples.forwards[row] + one.samples.backwards[row] for one in own) for row in left
    ]
    departures = []
    if config.threat.norm not in _NORMS:
        departures.append(f"it was published for {' and '.join(_NORMS)}")
    if made.own < len(config.stages):
        departures.append("without its attacks by gradients, for the model has none")
    if any(stage.through for stage in made.stages[: made.own]):
        departures.append("with gradients through a part of the model")
    if made.draws != preset.draws:
        departures.append(f"averaged over {made.draws} draws")
    # With fewer classes it is no more than a sign (see losses.py).
    takes = [
        5 if stage.attack.targets else 4
        for stage in made.stages[: made.own]
        if isinstance(stage.attack, APGD) and stage.attack.loss == "dlr"
    ]
    if len(result.class_names) < max(takes, default=0):
        departures.append(f"with margins in place of DLR, which takes {max(takes)} classes")
    if isinstance(made.model, LogProbabilities):
        departures.append("on the logarithm of the output, which is a softmax")
    if config.precision != "float32":
        departures.append(f"searching in {config.precision}")
    if budget is not None and max(spent, default=0) >= budget:
        departures.append(f"ended by a budget of {budget} propagations an image")
    return Protocol(
        name=preset.protocol,
        attacks=tuple(one.label for one in own),
        accuracy=len(left) / result.n,
        interval=Interval.of_rate(len(left), result.n),
        departures=tuple(departures),
    )
