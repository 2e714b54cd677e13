"""What an audit does to a batch, in two passes.

The first runs the cascade, and on a share of the samples a check by search. Whether that check
found anything is known once all batches are through; the second pass then goes on, or not, with
more, measures distances for the curve, and keeps what is to be explained.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustann.attacks.engine import AttackResult, predict_logits, run
from robustann.attacks.losses import margin
from robustann.auditing.curve import DistanceStage
from robustann.auditing.presets import AuditConfig, Stage
from robustann.auditing.remedies import Plan
from robustann.auditing.rows import Batch, Worst, empty_columns
from robustann.data import Split
from robustann.progress import Advance
from robustann.rng import SampleRandom

Labelled = Sequence[tuple[str, Stage]]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """The work on the batches of one audit.

    Attributes:
        plan: the model as it is attacked, and how.
        stages: the cascade, with the labels of its attacks.
        check: what the share is checked with.
        escalation: what follows for all that stands, should the check break anything.
        distances: measures the distance of each sample, for the curve; None does not.
        budget: propagations that an image may cost in all attacks together.
        candidates: positions of the samples that may be explained.
    """

    plan: Plan
    config: AuditConfig
    split: Split
    stages: Labelled
    check: Labelled
    escalation: Labelled
    distances: DistanceStage | None
    budget: int | None
    candidates: frozenset[int]

    def first(self, start: int, positions: Tensor, advance: Advance) -> Batch:
        """The clean pass, the cascade, and the check."""
        x, labels = self.split.images(positions).cpu(), self.split.labels[positions]
        logits = predict_logits(
            self.plan.model, x, batch_size=len(x), seed=self.config.seed, draws=self.plan.draws
        )
        advance(len(x), "clean")
        gap = -margin(logits, labels)
        batch = Batch(
            start=start,
            index=positions,
            labels=labels,
            logits=logits,
            worst=Worst.unattacked(x, logits.argmax(1), gap),
            propagations=torch.zeros_like(labels),
            distance=torch.where(logits.argmax(1) == labels, torch.inf, 0.0).double(),
        )
        for label, stage in (*self.stages, *self.check):
            self._attack(batch, x, label, stage)
            advance(len(x), label)
        wanted = ~batch.worst.success & batch.correct if self.escalation else batch.labels < 0
        wanted = wanted | torch.tensor([int(one) in self.candidates for one in positions])
        batch.park(wanted.nonzero().squeeze(1))
        return batch

    def second(self, batch: Batch, escalate: bool, advance: Advance) -> Batch:
        """More attacks where the check says so, the distances, and what is to be explained."""
        x = self.split.images(batch.index).cpu()
        batch.unpark(x)
        for label, stage in self.escalation if escalate else ():
            self._attack(batch, x, label, stage)
            advance(len(x), label)
        if self.distances is not None:
            self._distances(batch, x, self.distances)
            advance(len(x), "curve")
        if self.config.explain:
            self._keep(batch, x)
        # What broke a smoothed classifier has yet to be voted on.
        voted = self.config.certify and self.config.threat.norm == "l2"
        batch.park((batch.worst.success & voted).nonzero().squeeze(1))
        batch.finished = True
        return batch

    def _attack(self, batch: Batch, x: Tensor, label: str, stage: Stage) -> None:
        """One attack, on those samples of the batch that it goes to."""
        begin = time.perf_counter()
        worst, cascade = batch.worst, self.config.cascade
        gap = -margin(batch.logits, batch.labels)
        # What is not attacked keeps its prediction: the clean one, in a cascade the worst.
        columns = empty_columns(
            worst.prediction if cascade else batch.logits.argmax(1),
            worst.margin if cascade else gap,
        )
        pending = batch.correct & ~worst.success if cascade else batch.correct
        if stage.near is not None:
            pending = pending & (worst.margin <= stage.near * gap)
        if stage.share < 1:
            # By sample, so that neither batch nor order decides who is drawn.
            drawn = self._random(batch).fork("share", label).uniform(1).squeeze(1)
            pending = pending & (drawn < stage.share)
        if self.budget is not None:
            pending = pending & (batch.propagations < self.budget)
        rows = pending.nonzero().squeeze(1)
        columns["attempted"][rows] = True
        if len(rows):
            result = run(
                stage.attack,
                self.plan.model,
                x[rows],
                batch.labels[rows],
                self.config.threat,
                random=self._random(batch).select(rows).fork(label),
                known_correct=True,
                best=(worst.x[rows], worst.margin[rows]) if cascade else None,
                limit=None if self.budget is None else self.budget - batch.propagations[rows],
                draws=self.plan.draws,
            )
            self._record(batch, label, rows, columns, result)
        batch.attacks[label] = columns
        batch.seconds[label] = time.perf_counter() - begin

    def _distances(self, batch: Batch, x: Tensor, stage: DistanceStage) -> None:
        """The nearest adversarial image of each sample, found or bettered.

        What falls within the audited eps only now counts as broken by this attack.
        """
        begin = time.perf_counter()
        worst, threat, label = batch.worst, self.config.threat, stage.label
        cascade = self.config.cascade
        columns = empty_columns(
            worst.prediction if cascade else batch.logits.argmax(1),
            worst.margin if cascade else -margin(batch.logits, batch.labels),
        )
        rows = batch.correct.nonzero().squeeze(1)
        # In a cascade what fell already is measured, but was no longer attacked.
        counted = ~worst.success[rows] if cascade else torch.ones_like(rows, dtype=torch.bool)
        if stage.attack is not None and len(rows):
            result = run(
                stage.attack,
                self.plan.model,
                x[rows],
                batch.labels[rows],
                threat,
                random=self._random(batch).select(rows).fork(label),
                known_correct=True,
                draws=self.plan.draws,
            )
            broken = result.prediction != batch.labels[rows]
            found = torch.where(broken, result.distance, torch.inf)
            batch.distance[rows] = torch.minimum(batch.distance[rows], found)
            spent = result.forwards + result.backwards
            batch.curve_propagations += int(spent[~counted].sum())
            columns["attempted"][rows[counted]] = True
            self._record(batch, label, rows[counted], columns, result.select(counted))
        self._levels(batch, x, stage, columns)
        batch.attacks[label] = columns
        batch.seconds[label] = time.perf_counter() - begin

    def _levels(
        self, batch: Batch, x: Tensor, stage: DistanceStage, columns: dict[str, Tensor]
    ) -> None:
        """Find smaller distances for what fell, and the distance at which the rest falls.

        A sample that stands at some eps stands at every smaller one (a smaller ball lies in the
        larger), so each level goes only to the samples that it can still tell apart.
        """
        audited = self.config.threat.eps
        broken = (batch.distance > 0) & (batch.distance <= audited)
        standing = batch.distance > audited
        searching = stage.searching
        if searching is None:
            return
        for level in stage.levels:
            below = level < audited
            pending = broken if below else standing
            rows = (pending & (batch.distance > level)).nonzero().squeeze(1)
            if below and not len(rows):
                continue
            if not below:
                # One that is broken nowhere yet is attacked at each level; others need none.
                rows = rows[batch.distance[rows].isinf()]
            if not len(rows):
                continue
            result = run(
                searching,
                self.plan.model,
                x[rows],
                batch.labels[rows],
                self.config.threat.with_eps(level),
                random=self._random(batch).select(rows).fork("curve", f"{level:.6g}"),
                known_correct=True,
                draws=self.plan.draws,
            )
            found = torch.where(result.success, result.distance, torch.inf)
            batch.distance[rows] = torch.minimum(batch.distance[rows], found)
            # Broken within the audited eps after all: that counts.
            inside = (found <= audited) & ~batch.worst.success[rows]
            spent = result.forwards + result.backwards
            batch.curve_propagations += int(spent[~inside].sum())
            columns["attempted"][rows[inside]] = True
            self._record(batch, stage.label, rows[inside], columns, result.select(inside))
            if below:
                broken[rows] = result.success

    def _record(
        self,
        batch: Batch,
        label: str,
        rows: Tensor,
        columns: dict[str, Tensor],
        result: AttackResult,
    ) -> None:
        # A minimum-norm attack's nearest image may lie beyond eps: it is none that counts.
        counts = result.success | (not result.attack.minimum_norm)
        for name in columns.keys() - {"attempted"}:
            values = getattr(result, name).to(columns[name].dtype)
            kept = counts | (name in ("forwards", "backwards"))
            columns[name][rows[kept]] = values[kept]
        batch.propagations[rows] += result.forwards + result.backwards
        fell = torch.where(result.success, result.distance, torch.inf)
        batch.distance[rows] = torch.minimum(batch.distance[rows], fell)
        batch.worst.update(rows[counts], label, result.adversarial[counts], columns)

    def _keep(self, batch: Batch, x: Tensor) -> None:
        """Keep the samples that are to be explained."""
        kept = [row for row in range(len(x)) if int(batch.index[row]) in self.candidates]
        if not kept:
            return
        worst, prediction = batch.worst, batch.logits.argmax(1)
        confidence = predict_logits(
            self.plan.model, worst.x[kept], seed=self.config.seed, draws=self.plan.draws
        ).softmax(1)
        for place, row in enumerate(kept):
            found = worst.prediction[row]
            batch.explained.append(
                {
                    "index": batch.index[row],
                    "label": batch.labels[row],
                    "clean": x[row],
                    "attacked": worst.x[row],
                    "clean_prediction": prediction[row],
                    "attacked_prediction": found,
                    "clean_confidence": batch.logits[row].softmax(0)[prediction[row]],
                    "attacked_confidence": confidence[place, found],
                    "success": worst.success[row],
                    "distance": worst.distance[row],
                    "attack": worst.attack[row],
                }
            )

    def _random(self, batch: Batch) -> SampleRandom:
        return SampleRandom.create(self.config.seed, batch.index)
