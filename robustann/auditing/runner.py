"""The audit: clean pass, attacks, curve and explanations, batch by batch, into one result."""

from __future__ import annotations

import datetime
import itertools
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor, nn

from robustann.attacks import PGD, Attack, Square
from robustann.attacks.engine import check_classes, model_device, predict_logits, run
from robustann.attacks.losses import margin
from robustann.auditing.batching import find_batch_size, in_halves, is_out_of_memory, measure
from robustann.auditing.presets import AuditConfig, get_preset, labelled
from robustann.auditing.remedies import Plan, plan, searched
from robustann.auditing.rows import Batch, Cases, Worst, empty_columns
from robustann.auditing.summary import summarize
from robustann.data import Split
from robustann.errors import DataError, ModelError
from robustann.findings import Finding
from robustann.models import tensor_digest
from robustann.progress import Advance, progress_bar
from robustann.results import AuditResult, Execution, Explanation, Provenance
from robustann.rng import SampleRandom
from robustann.trust import combine, diagnose, probe, review

# Which samples are audited and explained must not hang on the seed of the attacks.
_SELECTION_SEED = 20_240_229
# Images that the trust checks look at.
_TRUST_IMAGES = 64


Explainer = Callable[[nn.Module, Cases, Sequence[str], int], Explanation]


@dataclass(frozen=True)
class Estimate:
    """What an audit will cost at most: every sample correct, and none falling."""

    samples: int
    propagations: int
    seconds: float
    batch_size: int
    device: str


class Audit:
    """Runs what an :class:`AuditConfig` says.

    >>> from robustann.data import load_data
    >>> from robustann.threat import ThreatModel
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> config = AuditConfig(threat=ThreatModel("linf", 0.1), preset="quick", max_samples=20)
    >>> data = load_data("digits")
    >>> Audit(config).run(model, data.test, class_names=data.class_names).n
    20
    """

    def __init__(self, config: AuditConfig) -> None:
        self.config = config
        self.preset = get_preset(config.preset)

    def estimate(self, model: nn.Module, split: Split, *, class_names: Sequence[str]) -> Estimate:
        """Time one batch and say what :meth:`run` would cost at most."""
        _check_fit(model, split, class_names)
        positions = self._positions(split)
        size = self._batch_size(model, split, positions, gradients=True)
        rate = measure(model, split, positions[:size], self.config.threat)
        forwards, backwards = 1, 0
        for attack in self.config.chosen:
            forwards, backwards = forwards + attack.cost[0], backwards + attack.cost[1]
        levels = sum(map(len, self._levels(split, gradients=True)))
        forwards += levels * (self.preset.curve_steps + 2)
        backwards += levels * self.preset.curve_steps
        seconds = len(positions) * (forwards * rate.forward + backwards * rate.backward)
        return Estimate(
            len(positions),
            len(positions) * (forwards + backwards),
            seconds,
            size,
            str(model_device(model)),
        )

    def run(
        self,
        model: nn.Module,
        split: Split,
        *,
        class_names: Sequence[str],
        model_name: str = "a torch module",
        data_name: str = "images",
        explainer: Explainer | None = None,
        progress: bool = False,
        command: str = "",
    ) -> AuditResult:
        """Audit a model on one part of a dataset.

        Args:
            model: maps images in [0, 1] to logits; left as it was.
            split: the images and labels.
            class_names: one a class; as many as the model has logits.
            model_name: shown in the report, as is ``data_name``.
            explainer: computes attributions; None leaves them out.
            progress: show a bar on stderr if that is a terminal.
            command: how the audit was asked for, kept in the result.

        Raises:
            DataError: images or labels are unfit for this model.
            ModelError: the model's output is unfit.
        """
        begin = time.perf_counter()
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        _check_fit(model, split, class_names)
        positions = self._positions(split)
        # A fixed random subset can be explained, so that memory does not grow with the data.
        order = torch.randperm(len(positions), generator=_generator(1))
        candidates = set(positions[order[: self.preset.explained]].tolist())
        seconds: dict[str, float] = {}
        sample = positions[order[:_TRUST_IMAGES]]
        made = self._plan(model, split, sample)
        size = self._batch_size(made.model, split, positions, made.gradients)
        work = len(positions) * (1 + len(made.stages))
        batches: list[Batch] = []
        with progress_bar(work, wanted=progress, unit="images") as advance:
            for start in range(0, len(positions), size):
                batches += in_halves(
                    lambda part: [self._batch(made, split, part, candidates, seconds, advance)],
                    positions[start : start + size],
                )
        explanation = None
        if explainer is not None and self.config.explain:
            cases = self._cases(batches)
            explanation = explainer(model, cases, class_names, self.config.seed)
        result = summarize(
            batches,
            self.config,
            stages=labelled(made.stages),
            class_names=class_names,
            levels=list(itertools.chain(*self._levels(split, made.gradients))),
            explanation=explanation,
            provenance=self._provenance(model, split, positions, model_name, data_name),
            execution=Execution(
                command=command,
                started=started,
                seconds=round(time.perf_counter() - begin, 3),
                attack_seconds={label: round(spent, 3) for label, spent in seconds.items()},
                batch_size=size,
                device=_device_name(model_device(model)),
                threads=torch.get_num_threads(),
            ),
        )
        if not self.config.trust:
            return result
        return result.model_copy(update={"findings": self._findings(made, split, sample, result)})

    def _plan(self, model: nn.Module, split: Split, sample: Tensor) -> Plan:
        """The attacks as configured, or as a first look at the model says."""
        config = self.config
        draws = 1 if config.attacks is not None else self.preset.draws
        if not config.trust:
            return Plan(model, config.stages, draws, True, ())
        found = diagnose(
            model, split.images(sample).cpu(), split.labels[sample], config.threat,
            seed=config.seed,
        )  # fmt: skip
        return plan(
            model,
            config.stages,
            found,
            config.threat,
            queries=self.preset.queries,
            draws=draws,
            fixed=config.attacks is not None,
        )

    def _findings(
        self, made: Plan, split: Split, sample: Tensor, result: AuditResult
    ) -> tuple[Finding, ...]:
        """What the diagnosis, small experiments and the outcomes themselves say."""
        threat = self.config.threat
        probed = probe(
            made.model,
            split.images(sample).cpu(),
            split.labels[sample],
            threat,
            random=SampleRandom.create(self.config.seed, sample).fork("probe"),
            draws=made.draws,
            gradients=made.gradients,
        )
        reviewed = review(
            result.attacks,
            result.curve,
            chance=result.chance,
            widest=threat.widest(math.prod(split.shape)),
        )
        return searched(made.stages, combine(made.findings, probed, reviewed))

    def _positions(self, split: Split) -> Tensor:
        return chosen_samples(len(split), self.config.max_samples)

    def _batch_size(
        self, model: nn.Module, split: Split, positions: Tensor, gradients: bool
    ) -> int:
        if self.config.batch_size == "auto":
            return find_batch_size(model, split, positions, self.config.threat, gradients)
        return self.config.batch_size

    def _curve_attack(self, gradients: bool) -> Attack | None:
        attack: Attack = PGD(steps=self.preset.curve_steps, loss="margin")
        if not gradients:
            attack = Square(queries=20 * self.preset.curve_steps)
        return attack if self.config.curve and self.config.threat.norm in attack.norms else None

    def _levels(self, split: Split, gradients: bool) -> tuple[list[float], list[float]]:
        """The curve's eps under the audited one, falling, and over it, rising to the widest that
        still allows something more."""
        threat = self.config.threat
        channels, height, width = split.shape
        widest = threat.widest(channels * height * width)
        if self._curve_attack(gradients) is None or threat.eps == 0:
            return [], []
        below = [_rounded(threat.eps * factor) for factor in (0.75, 0.5, 0.25, 0.125)]
        above, factor = [_rounded(threat.eps * 1.25)], 1.5
        while above[-1] < widest:
            above += [_rounded(threat.eps * factor), _rounded(threat.eps * factor * 4 / 3)]
            factor *= 2
        return below, [*(level for level in above if level < widest), widest]

    def _batch(
        self,
        plan: Plan,
        split: Split,
        positions: Tensor,
        candidates: set[int],
        seconds: dict[str, float],
        advance: Advance,
    ) -> Batch:
        model = plan.model
        x, labels = split.images(positions).cpu(), split.labels[positions]
        logits = predict_logits(model, x, batch_size=len(x), seed=self.config.seed)
        advance(len(x), "clean")
        batch = Batch(positions, labels, logits)
        prediction = logits.argmax(1)
        correct = prediction == labels
        gap = -margin(logits, labels)
        random = SampleRandom.create(self.config.seed, positions)
        batch.distance = torch.where(correct, torch.inf, 0.0).double()
        worst = Worst(x, prediction, gap)
        spent = torch.zeros_like(labels)
        for label, stage in labelled(plan.stages):
            begin = time.perf_counter()
            # What is not attacked keeps its prediction: the clean one, in a cascade the worst.
            columns = empty_columns(
                worst.prediction if self.config.cascade else prediction,
                worst.margin if self.config.cascade else gap,
            )
            pending = correct & ~worst.success if self.config.cascade else correct
            if stage.near is not None:
                pending = pending & (worst.margin <= stage.near * gap)
            if self.config.budget is not None:
                pending = pending & (spent < self.config.budget)
            rows = pending.nonzero().squeeze(1)
            columns["attempted"][rows] = True
            if len(rows):
                result = run(
                    stage.attack,
                    model,
                    x[rows],
                    labels[rows],
                    self.config.threat,
                    random=random.select(rows).fork(label),
                    known_correct=True,
                    best=(worst.x[rows], worst.margin[rows]) if self.config.cascade else None,
                    limit=None if self.config.budget is None else self.config.budget - spent[rows],
                )
                for name in columns.keys() - {"attempted"}:
                    columns[name][rows] = getattr(result, name).to(columns[name].dtype)
                spent[rows] += result.forwards + result.backwards
                fell = torch.where(result.success, result.distance, torch.inf)
                batch.distance[rows] = torch.minimum(batch.distance[rows], fell)
                worst.update(rows, label, result.adversarial, columns)
            batch.attacks[label] = columns
            seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - begin
            advance(len(x), label)
        batch.propagations = spent
        self._curve(plan, x, labels, split, random, batch, worst)
        batch.worst_prediction = worst.prediction
        batch.broken_by = [
            label if success else None
            for label, success in zip(worst.attack, worst.success.tolist(), strict=True)
        ]
        batch.broken_at = torch.where(worst.success, worst.distance, torch.nan)
        kept = [row for row in range(len(x)) if int(positions[row]) in candidates]
        if kept and self.config.explain:
            confidence = predict_logits(model, worst.x[kept], seed=self.config.seed).softmax(1)
            for place, row in enumerate(kept):
                found = worst.prediction[row]
                batch.explained.append(
                    {
                        "index": positions[row],
                        "label": labels[row],
                        "clean": x[row],
                        "attacked": worst.x[row],
                        "clean_prediction": prediction[row],
                        "attacked_prediction": found,
                        "clean_confidence": logits[row].softmax(0)[prediction[row]],
                        "attacked_confidence": confidence[place, found],
                        "success": worst.success[row],
                        "distance": worst.distance[row],
                        "attack": worst.attack[row],
                    }
                )
        return batch

    def _curve(
        self,
        plan: Plan,
        x: Tensor,
        labels: Tensor,
        split: Split,
        random: SampleRandom,
        batch: Batch,
        worst: Worst,
    ) -> None:
        """Find smaller distances for what fell, and the distance at which the rest falls.

        A sample that stands at some eps stands at every smaller one (a smaller ball lies in the
        larger), so each level goes only to the samples that it can still tell apart.
        """
        attack = self._curve_attack(plan.gradients)
        if attack is None:
            return
        audited = self.config.threat.eps
        broken = (batch.distance > 0) & (batch.distance <= audited)
        standing = batch.distance > audited
        below_levels, above_levels = self._levels(split, plan.gradients)
        for levels, pending in ((below_levels, broken), (above_levels, standing)):
            for level in levels:
                below = level < audited
                rows = (pending & (batch.distance > level)).nonzero().squeeze(1)
                if not len(rows):
                    if below:
                        continue
                    break
                result = run(
                    attack,
                    plan.model,
                    x[rows],
                    labels[rows],
                    self.config.threat.with_eps(level),
                    random=random.select(rows).fork("curve", f"{level:.6g}"),
                    known_correct=True,
                    draws=plan.draws,
                )
                spent = result.forwards.sum() + result.backwards.sum()
                batch.curve_propagations += int(spent)
                found = torch.where(result.success, result.distance, torch.inf)
                batch.distance[rows] = torch.minimum(batch.distance[rows], found)
                if below:
                    pending[rows] = result.success
                    continue
                # Broken within the audited eps after all: that counts.
                columns = empty_columns(worst.prediction, worst.margin)
                for name in ("prediction", "margin", "distance"):
                    columns[name][rows] = getattr(result, name).to(columns[name].dtype)
                columns["success"][rows] = result.success & (result.distance <= audited)
                inside = rows[columns["success"][rows]]
                worst.update(inside, "curve", result.adversarial[columns["success"][rows]], columns)

    def _cases(self, batches: list[Batch]) -> Cases:
        rows = [row for batch in batches for row in batch.explained]
        stacked = {
            name: torch.stack([torch.as_tensor(row[name]) for row in rows])
            for name in rows[0]
            if name != "attack"
        }
        return Cases(
            **stacked,
            attack=[str(row["attack"]) for row in rows],
            eps=self.config.threat.eps,
            bounds=self.config.threat.bounds,
        )

    def _provenance(
        self, model: nn.Module, split: Split, positions: Tensor, model_name: str, data_name: str
    ) -> Provenance:
        config = self.config
        return Provenance(
            versions={
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("robustann", "torch", "captum")},
            },
            seed=config.seed,
            model=model_name,
            model_sha256=tensor_digest(model),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            data=data_name,
            data_sha256=split.digest(positions),
            preset=None if config.attacks is not None else config.preset,
            config={
                "norm": config.threat.norm,
                "eps": config.threat.eps,
                "attacks": [attack.label for attack in config.chosen],
                "cascade": config.cascade,
                "budget": config.budget,
                "max_samples": config.max_samples,
                "trust": config.trust,
                "curve": config.curve,
                "explain": config.explain,
            },
        )


def _check_fit(model: nn.Module, split: Split, class_names: Sequence[str]) -> None:
    """Refuse a model that does not belong to the data, before any long work."""
    image = split.images([0]).cpu()
    try:
        classes = predict_logits(model, image).shape[1]
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"expected a model for images of shape {tuple(image.shape[1:])}, but it failed on one: "
            f"{error}; check that the model belongs to the data"
        ) from error
    if classes != len(class_names):
        raise DataError(
            f"expected a model with one logit for each of the {len(class_names)} classes of "
            f"the data, got {classes} logits; check that the model belongs to the data"
        )
    check_classes(split.labels, classes)


def chosen_samples(count: int, wanted: int | None) -> Tensor:
    """Positions of ``wanted`` of ``count`` samples, in order: drawn at random, always the same.

    >>> len(chosen_samples(10, 4)), chosen_samples(3, None).tolist()
    (4, [0, 1, 2])
    """
    if wanted is None or wanted >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=_generator(0))[:wanted].sort().values


def _generator(purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed(_SELECTION_SEED + purpose)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _rounded(eps: float) -> float:
    """To six digits, as results are written: a level means the same after a round trip."""
    return float(f"{eps:.6g}")
