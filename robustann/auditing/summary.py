"""From the rows of all batches to the values of a result."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from robustann.attacks import Attack
from robustann.attacks.losses import margin
from robustann.auditing.curve import curve_levels
from robustann.auditing.presets import AuditConfig
from robustann.auditing.rows import Batch
from robustann.metrics import classification_report
from robustann.results import (
    AttackOutcome,
    AttackSamples,
    AuditResult,
    ClassScores,
    CleanSamples,
    CurvePoint,
    Execution,
    Interval,
    Provenance,
    Scores,
    Threat,
    WorstCase,
)


def summarize(
    batches: Sequence[Batch],
    config: AuditConfig,
    *,
    attacks: Sequence[tuple[str, Attack]],
    class_names: Sequence[str],
    levels: Sequence[float],
    provenance: Provenance,
    execution: Execution,
) -> AuditResult:
    """Join the batches, in order, and compute every figure of the result from their rows.

    ``attacks`` come with their labels, in the order in which they ran; ``levels`` are the eps of
    the curve that were attacked as such.
    """
    labels = torch.cat([batch.labels for batch in batches])
    logits = torch.cat([batch.logits for batch in batches])
    distance = torch.cat([batch.distance for batch in batches])
    prediction = logits.argmax(1)
    correct = prediction == labels

    standing = correct.clone()
    outcomes = []
    for label, attack in attacks:
        columns = {
            name: torch.cat([batch.attacks[label][name] for batch in batches])
            for name in batches[0].attacks[label]
        }
        added = int((columns["success"] & standing).sum())
        standing &= ~columns["success"]
        outcomes.append(_outcome(attack, label, columns, labels, added, class_names))

    worst = torch.cat([batch.worst.prediction for batch in batches])
    broken = torch.cat([batch.worst.success for batch in batches])
    broken_by = itertools.chain(*(batch.worst.attack for batch in batches))
    threat = config.threat
    return AuditResult(
        threat=Threat(
            norm=threat.norm,
            eps=threat.eps,
            eps_text=threat.eps_text,
            bounds=threat.bounds,
            targeted=threat.targeted,
            words=threat.words(),
        ),
        class_names=tuple(class_names),
        n=len(labels),
        chance=1 / len(class_names),
        clean=_scores(labels, prediction, class_names),
        clean_samples=CleanSamples(
            index=_ints(torch.cat([batch.index for batch in batches])),
            label=_ints(labels),
            prediction=_ints(prediction),
            confidence=_floats(logits.softmax(1).amax(1)),
            margin=_floats(-margin(logits, labels)),
        ),
        attacks=tuple(outcomes),
        worst_case=WorstCase(
            scores=_scores(labels, worst, class_names),
            prediction=_ints(worst),
            broken_by=tuple(
                label if fell else None
                for label, fell in zip(broken_by, broken.tolist(), strict=True)
            ),
            distance=_floats(torch.where(broken, distance, torch.nan)),
            propagations=_ints(torch.cat([batch.propagations for batch in batches])),
            confidence=_floats(torch.cat([batch.confidence for batch in batches])),
            margin=_floats(torch.cat([batch.label_margin for batch in batches])),
        ),
        cascade=config.cascade,
        curve=_curve(
            correct, distance, threat.eps, levels if config.curve else None, 1 / len(class_names)
        ),
        curve_propagations=sum(batch.curve_propagations for batch in batches),
        # Attributions take a model.
        explanation=None,
        provenance=provenance,
        execution=execution,
    )


def _outcome(
    attack: Attack,
    label: str,
    columns: dict[str, Tensor],
    labels: Tensor,
    added: int,
    class_names: Sequence[str],
) -> AttackOutcome:
    success = columns["success"]
    attempted = int(columns["attempted"].sum())
    succeeded = int(success.sum())
    distances = columns["distance"][success].numpy()
    return AttackOutcome(
        name=attack.name,
        label=label,
        access=attack.access,
        paper=attack.paper,
        control=attack.control,
        parameters=attack.parameters,
        scores=_scores(labels, columns["prediction"], class_names),
        attempted=attempted,
        succeeded=succeeded,
        added=added,
        success_rate=succeeded / attempted if attempted else None,
        success_interval=Interval.of_rate(succeeded, attempted) if attempted else None,
        median_distance=float(np.median(distances)) if succeeded else None,
        forwards=int(columns["forwards"].sum()),
        backwards=int(columns["backwards"].sum()),
        samples=AttackSamples(
            prediction=_ints(columns["prediction"]),
            success=tuple(success.tolist()),
            distance=_floats(torch.where(success, columns["distance"], torch.nan)),
            margin=_floats(columns["margin"]),
            forwards=_ints(columns["forwards"]),
            backwards=_ints(columns["backwards"]),
            first_success=tuple(
                None if count < 0 else count for count in columns["first_success"].tolist()
            ),
        ),
    )


def _curve(
    correct: Tensor, distance: Tensor, audited: float, levels: Sequence[float] | None, chance: float
) -> tuple[CurvePoint, ...]:
    """Robust accuracy at each eps, up to the first beyond the audited one at or under chance."""
    points = []
    drawn = {0.0, audited} if levels is None else curve_levels(distance, audited, levels)
    for eps in sorted(drawn):
        standing = int((correct & (distance > eps)).sum())
        share = standing / len(correct)
        points.append(
            CurvePoint(
                eps=eps, robust_accuracy=share, interval=Interval.of_rate(standing, len(correct))
            )
        )
        if eps >= audited and share <= chance:
            break
    return tuple(points)


def _scores(labels: Tensor, prediction: Tensor, class_names: Sequence[str]) -> Scores:
    report = classification_report(labels, prediction, class_names)
    low, high = report.interval
    return Scores(
        accuracy=report.accuracy,
        interval=Interval(low=low, high=high),
        precision=report.precision,
        recall=report.recall,
        f1=report.f1,
        classes=tuple(
            ClassScores(name=name, precision=one[0], recall=one[1], f1=one[2], support=one[3])
            for name, one in zip(class_names, report.per_class, strict=True)
        ),
        confusion=Scores.confusion_of(report.confusion, len(class_names)),
    )


def _ints(values: Tensor) -> tuple[int, ...]:
    return tuple(values.tolist())


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
