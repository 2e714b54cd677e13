"""What an audit does to a batch, in two passes, or three.

The first runs the cascade, and on a share of the samples a check by search. Whether that check
found anything is known once all batches are through; the second pass then goes on, or not, with
more, measures distances for the curve, and keeps what is to be explained. Should the trust checks
then find the attacks wanting, a third pass brings the remedies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustann.attacks import Attack
from robustann.attacks.engine import AttackResult, predict_logits, run
from robustann.attacks.losses import margin
from robustann.auditing.batching import in_halves
from robustann.auditing.curve import DistanceStage
from robustann.auditing.inner import SeenThrough
from robustann.auditing.mending import Within
from robustann.auditing.presets import AuditConfig, Stage
from robustann.auditing.remedies import Plan
from robustann.auditing.rows import Batch, Worst, empty_columns
from robustann.auditing.shown import Shown
from robustann.data import Split
from robustann.progress import Advance
from robustann.results import Tuned
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel

Labelled = Sequence[tuple[str, Stage]]


def _as_it_is(model: nn.Module) -> nn.Module:
    """The model where nothing is switched on."""
    return model


@dataclass(frozen=True, kw_only=True)
class Passes:
    """The work on the batches of one audit.

    Attributes:
        plan: the model as it is attacked, and how.
        stages: the cascade, with the labels of its attacks.
        check: what the share is checked with.
        shown: what attackers outside the audit found, put before the model.
        escalation: what follows for all that stands, should the check break anything.
        distances: measures the distance of each sample, for the curve; None does not.
        budget: propagations that an image may cost in all attacks together.
        quick: a model as attacks run it, by the switches for speed.
        tuned: how a timed batch chose them; None where nobody asked.
        candidates: positions of the samples that may be explained.
    """

    plan: Plan
    config: AuditConfig
    split: Split
    stages: Labelled
    check: Labelled
    shown: Sequence[Shown]
    escalation: Labelled
    distances: DistanceStage | None
    budget: int | None
    candidates: frozenset[int]
    quick: Callable[[nn.Module], nn.Module] = _as_it_is
    tuned: Tuned | None = None

    def first(self, start: int, positions: Tensor, advance: Advance) -> Batch:
        """The clean pass, the cascade, and the check."""
        x, labels = self.split.images(positions).cpu(), self.split.labels[positions]
        logits = predict_logits(
            self.plan.model, x, batch_size=len(x), seed=self.config.seed, draws=self.plan.draws
        )
        advance(len(x), "clean")
        gap = -margin(logits, labels)
        if self.plan.only_seen:
            # As the attacks see it; the prediction is the same.
            seen = predict_logits(self.plan.attacked, x, batch_size=len(x), seed=self.config.seed)
            gap = -margin(seen, labels)
        batch = Batch(
            start=start,
            index=positions,
            labels=labels,
            logits=logits,
            gap=gap,
            worst=Worst.unattacked(x, logits.argmax(1), gap),
            propagations=torch.zeros_like(labels),
            distance=torch.where(logits.argmax(1) == labels, torch.inf, 0.0).double(),
            confidence=logits.softmax(1).amax(1),
            label_margin=-margin(logits, labels),
        )
        for label, stage in (*self.stages, *self.check):
            self._attack(batch, x, label, stage)
            advance(len(x), label)
        for shown in self.shown:
            self._show(batch, x, shown)
            advance(len(x), shown.label)
        self._answers(batch, torch.tensor([name != "none" for name in batch.worst.attack]))
        wanted = ~batch.worst.success & batch.correct if self.escalation else batch.labels < 0
        wanted = wanted | torch.tensor([int(one) in self.candidates for one in positions])
        wanted = wanted | (batch.worst.success & self._voted)
        batch.park(wanted.nonzero().squeeze(1))
        return batch

    def second(self, batch: Batch, escalate: bool, advance: Advance) -> Batch:
        """More attacks where the check says so, the distances, and what is to be explained."""
        x = self.split.images(batch.index).cpu()
        batch.unpark(x)
        before = batch.worst.margin.clone(), batch.worst.success.clone()
        nearest: dict[int, Tensor] = {}
        for label, stage in self.escalation if escalate else ():
            self._attack(batch, x, label, stage)
            advance(len(x), label)
        if self.distances is not None:
            nearest = self._distances(batch, x, self.distances)
            advance(len(x), "curve")
        worst = batch.worst
        self._answers(batch, (worst.margin != before[0]) | (worst.success != before[1]))
        if self.config.explain:
            self._keep(batch, x, nearest)
        # Remedies may go on from where the others ended.
        standing = batch.correct & ~batch.worst.success & self._doubts
        batch.park((standing | (batch.worst.success & self._voted)).nonzero().squeeze(1))
        return batch

    def third(self, batch: Batch, remedies: Labelled, advance: Advance) -> Batch:
        """Remedies for attacks that were found wanting, on what still stands."""
        x = self.split.images(batch.index).cpu()
        batch.unpark(x)
        before = batch.worst.margin.clone(), batch.worst.success.clone()
        for label, stage in remedies:
            self._attack(batch, x, label, stage)
            advance(len(x), label)
        worst = batch.worst
        changed = (worst.margin != before[0]) | (worst.success != before[1])
        self._answers(batch, changed)
        self._renew(batch, changed)
        batch.park((worst.success & self._voted).nonzero().squeeze(1))
        return batch

    @property
    def _doubts(self) -> bool:
        """Whether a third pass may follow."""
        return self.config.trust and self.config.attacks is None

    @property
    def _voted(self) -> bool:
        """Whether what broke a sample has yet to be voted on, by a smoothed classifier."""
        return self.config.certify and self.config.threat.norm == "l2"

    def _attack(self, batch: Batch, x: Tensor, label: str, stage: Stage) -> None:
        """One attack, on those samples of the batch that it goes to."""
        begin = time.perf_counter()
        worst, cascade, gap = batch.worst, self.config.cascade, batch.gap
        # What is not attacked keeps its prediction: the clean one, in a cascade the worst.
        columns = empty_columns(
            worst.prediction if cascade else batch.logits.argmax(1),
            worst.margin if cascade else gap,
        )
        pending = batch.correct & ~worst.success if cascade else batch.correct
        if stage.near is not None:
            pending = pending & (worst.margin <= stage.near * gap)
        if cascade and not stage.aims(batch.logits.shape[1]):
            # There is no such runner-up; the last one has had its turn.
            pending = torch.zeros_like(pending)
        if stage.share < 1:
            # By sample, so that neither batch nor order decides who is drawn.
            drawn = self._random(batch).fork("share", label).uniform(1).squeeze(1)
            pending = pending & (drawn < stage.share)
        left = None
        if self.budget is not None:
            left = self.budget - self._spent(batch)
            pending = pending & (left > 0)
        rows = pending.nonzero().squeeze(1)
        columns["attempted"][rows] = True
        if len(rows):
            # Margins are compared with those of the same view alone.
            native = stage.through == self.plan.only_seen
            result = self._run(
                stage.attack,
                x,
                batch,
                rows,
                label,
                model=self.plan.seen_by(stage),
                threat=stage.allowed(self.config.threat) if isinstance(stage, Within) else None,
                best=(worst.x[rows], worst.margin[rows]) if cascade and native else None,
                limit=None if left is None else left[rows],
            )
            self._record(batch, label, rows, columns, result, native=native)
        batch.attacks[label] = columns
        batch.seconds[label] = time.perf_counter() - begin

    def _spent(self, batch: Batch) -> Tensor:
        """What counts against the budget: the curve comes on top."""
        curve = None if self.distances is None else batch.attacks.get(self.distances.label)
        if curve is None:
            return batch.propagations
        return batch.propagations - curve["forwards"] - curve["backwards"]

    def _show(self, batch: Batch, x: Tensor, shown: Shown) -> None:
        """Judge what was found elsewhere, on the samples that still stand.

        What finding it cost is counted with it; no budget holds back what is known already.
        """
        begin = time.perf_counter()
        columns = empty_columns(batch.worst.prediction, batch.worst.margin)
        attempted, found = shown.places(batch.index)
        pending = batch.correct & ~batch.worst.success & (attempted >= 0)
        columns["attempted"] |= pending
        rows = (pending & (found >= 0)).nonzero().squeeze(1)
        if len(rows):
            result = run(
                shown.only(found[rows]),
                self.plan.model,
                x[rows],
                batch.labels[rows],
                self.config.threat,
                random=self._random(batch).select(rows).fork(shown.label),
                known_correct=True,
                draws=self.plan.draws,
            )
            native = not self.plan.only_seen
            self._record(batch, shown.label, rows, columns, result, native=native)
        spent = pending.nonzero().squeeze(1)
        for name in ("forwards", "backwards"):
            cost = getattr(shown, name)[attempted[spent]]
            columns[name][spent] += cost
            batch.propagations[spent] += cost
        batch.attacks[shown.label] = columns
        batch.seconds[shown.label] = time.perf_counter() - begin

    def _answers(self, batch: Batch, changed: Tensor) -> None:
        """What the model says of the worst images that are new, in confidence and margin."""
        rows = changed.nonzero().squeeze(1)
        if not len(rows):
            return
        images, labels = batch.worst.x[rows], batch.labels[rows]
        logits = predict_logits(
            self.plan.model,
            images,
            batch_size=len(images),
            seed=self.config.seed,
            draws=self.plan.draws,
            finite=False,
        )
        # An attack may have driven the model to an answer that is no number.
        lost = ~logits.isfinite().all(1)
        said = batch.worst.prediction[rows, None]
        confidence = logits.softmax(1).gather(1, said).squeeze(1)
        batch.confidence[rows] = confidence.masked_fill(lost, torch.nan)
        batch.label_margin[rows] = (-margin(logits, labels)).masked_fill(lost, torch.nan)

    def _distances(self, batch: Batch, x: Tensor, stage: DistanceStage) -> dict[int, Tensor]:
        """The nearest adversarial image of each sample, found or bettered.

        What falls within the audited eps only now counts as broken by this attack. Returns the
        nearest images of the samples that may be explained, by their row.
        """
        nearest: dict[int, Tensor] = {}
        begin = time.perf_counter()
        worst, label = batch.worst, stage.label
        cascade = self.config.cascade
        columns = empty_columns(
            worst.prediction if cascade else batch.logits.argmax(1),
            worst.margin if cascade else batch.gap,
        )
        rows = batch.correct.nonzero().squeeze(1)
        # In a cascade what fell already is measured, but was no longer attacked.
        counted = ~worst.success[rows] if cascade else torch.ones_like(rows, dtype=torch.bool)
        if stage.attack is not None and len(rows):
            result = self._run(stage.attack, x, batch, rows, label, model=self.plan.attacked)
            broken = result.prediction != batch.labels[rows]
            found = torch.where(broken, result.distance, torch.inf)
            batch.distance[rows] = torch.minimum(batch.distance[rows], found)
            for place in broken.nonzero().squeeze(1).tolist():
                row = int(rows[place])
                if int(batch.index[row]) in self.candidates:
                    nearest[row] = result.adversarial[place].cpu()
            spent = result.forwards + result.backwards
            batch.curve_propagations += int(spent[~counted].sum())
            columns["attempted"][rows[counted]] = True
            self._record(batch, label, rows[counted], columns, result.select(counted))
        self._levels(batch, x, stage, columns)
        batch.attacks[label] = columns
        batch.seconds[label] = time.perf_counter() - begin
        return nearest

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
            result = self._run(
                searching,
                x,
                batch,
                rows,
                "curve",
                f"{level:.6g}",
                model=self.plan.attacked,
                threat=self.config.threat.with_eps(level),
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

    def _run(
        self,
        attack: Attack,
        x: Tensor,
        batch: Batch,
        rows: Tensor,
        *streams: str,
        model: nn.Module,
        threat: ThreatModel | None = None,
        best: tuple[Tensor, Tensor] | None = None,
        limit: Tensor | None = None,
    ) -> AttackResult:
        """Attack some rows of a batch; where memory runs out, half of them at a time."""
        random = self._random(batch)
        # Seen through a part, every look at the model is two forwards, of each draw: the model's
        # and the part's.
        seen = model if isinstance(model, SeenThrough) else None
        called = self.quick(model)
        if limit is not None and seen is not None:
            # Three for a step of a forward and a backward, two for a forward alone.
            limit = (limit + 1) // 2 if attack.cost[1] == 0 else (2 * limit + 2) // 3
            limit = -(-limit // seen.draws)

        def attacked(places: Tensor) -> list[AttackResult]:
            some = rows[places]
            return [
                run(
                    attack,
                    called,
                    x[some],
                    batch.labels[some],
                    threat or self.config.threat,
                    random=random.select(some).fork(*streams),
                    known_correct=True,
                    best=None if best is None else (best[0][places], best[1][places]),
                    limit=None if limit is None else limit[places],
                    draws=self.plan.draws_of(model),
                    precision=self.config.precision,
                    judge=None if called is model else model,
                )
            ]

        result = AttackResult.concatenate(in_halves(attacked, torch.arange(len(rows))))
        if seen is not None:
            found = result.first_success
            result = replace(
                result,
                forwards=seen.price * result.forwards,
                backwards=seen.draws * result.backwards,
                first_success=torch.where(found < 0, found, seen.price * found),
            )
        return result

    def _record(
        self,
        batch: Batch,
        label: str,
        rows: Tensor,
        columns: dict[str, Tensor],
        result: AttackResult,
        *,
        native: bool = True,
    ) -> None:
        """Take down what an attack did to these rows; ``native`` says that its margins can be
        compared with the others'."""
        # A minimum-norm attack's nearest image may lie beyond eps: it is none that counts.
        counts = result.success | (native and not result.attack.minimum_norm)
        for name in columns.keys() - {"attempted"}:
            values = getattr(result, name).to(columns[name].dtype)
            if name in ("forwards", "backwards"):
                # The curve may come back to a row that it has measured before.
                columns[name][rows] += values
            else:
                columns[name][rows[counts]] = values[counts]
        batch.propagations[rows] += result.forwards + result.backwards
        fell = torch.where(result.success, result.distance, torch.inf)
        batch.distance[rows] = torch.minimum(batch.distance[rows], fell)
        batch.worst.update(rows[counts], label, result.adversarial[counts], columns)

    def _keep(self, batch: Batch, x: Tensor, nearest: dict[int, Tensor]) -> None:
        """Keep the samples that are to be explained."""
        prediction = batch.logits.argmax(1)
        for row in range(len(x)):
            if int(batch.index[row]) not in self.candidates:
                continue
            batch.explained.append(
                {
                    "index": batch.index[row],
                    "label": batch.labels[row],
                    "clean": x[row],
                    "nearest": nearest.get(row, batch.worst.x[row]),
                    "clean_prediction": prediction[row],
                    "clean_confidence": batch.logits[row].softmax(0)[prediction[row]],
                    **self._attacked(batch, row),
                }
            )

    def _renew(self, batch: Batch, changed: Tensor) -> None:
        """Put what was found since into the samples that are to be explained."""
        places = {int(index): row for row, index in enumerate(batch.index)}
        for kept in batch.explained:
            row = places[int(kept["index"])]
            if not changed[row]:
                continue
            if torch.equal(torch.as_tensor(kept["nearest"]), torch.as_tensor(kept["attacked"])):
                kept["nearest"] = batch.worst.x[row]
            kept.update(self._attacked(batch, row))

    @staticmethod
    def _attacked(batch: Batch, row: int) -> dict[str, Tensor | str]:
        worst = batch.worst
        return {
            "attacked": worst.x[row],
            "attacked_prediction": worst.prediction[row],
            "attacked_confidence": batch.confidence[row].nan_to_num(0.0),
            "success": worst.success[row],
            "distance": worst.distance[row],
            "attack": worst.attack[row],
        }

    def _random(self, batch: Batch) -> SampleRandom:
        return SampleRandom.create(self.config.seed, batch.index)
