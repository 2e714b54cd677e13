"""The audit: clean pass, attacks, curve and explanations, batch by batch, into one result."""

from __future__ import annotations

import contextlib
import datetime
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustann.attacks.engine import ALIGNMENT, check_classes, model_device, predict_logits
from robustann.auditing.batching import find_batch_size, is_out_of_memory, measure
from robustann.auditing.certifying import Proof, check_provable, prove, with_proof
from robustann.auditing.corruptions import measure_corruptions
from robustann.auditing.costs import Estimate, affordable, estimated
from robustann.auditing.curve import DistanceStage, distance_stage
from robustann.auditing.inner import differentiable_part
from robustann.auditing.mending import Doubts, Mend, labelled_mends, mended, mends
from robustann.auditing.partial import InMemory, Kept, Partial
from robustann.auditing.passes import Passes
from robustann.auditing.presets import AuditConfig, Stage, get_preset, labelled
from robustann.auditing.protocol import protocol_alone
from robustann.auditing.provenance import device_name, identity, provenance_of
from robustann.auditing.remedies import DRAWS, Plan, answered, plan, withdrawn
from robustann.auditing.rows import Batch, Cases
from robustann.auditing.sanity import advise
from robustann.auditing.selection import TRUST_IMAGES, chosen_samples, shuffled
from robustann.auditing.shards import LARGEST_SHARD, Shards, own_shard, shard_size
from robustann.auditing.shown import Shown
from robustann.auditing.speed import Precision, Quick, Timer, low_precisions, tune
from robustann.auditing.summary import summarize
from robustann.auditing.surrogate import agreement, from_surrogate
from robustann.auditing.weights import effort_of, measure_weights
from robustann.data import Split
from robustann.errors import DataError, ModelError, RobustannError, UsageError
from robustann.findings import Finding, unresolved
from robustann.results import AuditResult, Execution, Explanation, Provenance, Tuned
from robustann.rng import SampleRandom
from robustann.trust import budget_cut, combine, diagnose, losses_used, probe, review

# Images a batch of a randomised model, where nobody chose.
_RANDOMISED_BATCH = 64
# Bytes of images that may lie in memory between the passes.
_LARGEST_IN_MEMORY = 2**29
# Samples that the check by search goes to at the least, where there are so many.
_LEAST_CHECKED = 32


def _silent(message: str) -> None:
    """Who tells nobody."""


def _as_it_is(result: AuditResult) -> AuditResult:
    """What is saved where nobody saves."""
    return result


Explainer = Callable[[nn.Module, Cases, Sequence[str], int], Explanation]


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

    def estimate(
        self,
        model: nn.Module,
        split: Split,
        *,
        class_names: Sequence[str],
        surrogate: nn.Module | None = None,
    ) -> Estimate:
        """Time one batch and say what :meth:`run` would cost at most."""
        _check_fit(model, split, class_names)
        if self.config.certify:
            check_provable(model, split, self.config)
        positions = self._positions(split)
        sample = positions[shuffled(len(positions))[:TRUST_IMAGES]]
        made = self._plan(model, split, sample, surrogate=surrogate)
        size = self._batch_size(made.attacked, split, positions, made.gradients)
        further = (*self._checks(len(positions)), *self.config.escalation)
        return estimated(
            self.config,
            made,
            measure(made.attacked, split, positions[:size], self.config.threat, made.gradients),
            stages=(*made.stages, *made.fitting(further)),
            distances=self._distance_stage(split, made.gradients),
            shape=split.shape,
            count=len(positions),
            batch_size=size,
            device=str(model_device(model)),
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
        state: Path | None = None,
        notify: Callable[[str], None] = _silent,
        draws: int = 1,
        shown: Sequence[Shown] = (),
        surrogate: nn.Module | None = None,
        shared: bool = False,
        save: Callable[[AuditResult], AuditResult] = _as_it_is,
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
            state: folder for the batches that are done. What the same audit left there when it was
                stopped is taken up; what another audit left is left alone. It stays at the end, for
                callers who save the result first: see :func:`robustann.auditing.forget`.
            notify: told in words when a stopped audit is taken up, and when the model looks as if
                images reached it in another form than in training.
            draws: forwards averaged for each answer at the least; for a model that is known to be
                randomised, as without trust checks nobody looks.
            shown: what attackers outside the audit found. It is judged as everything else is, and
                counts in the worst case; only in a cascade.
            surrogate: another model for the same classes: gradient attacks on it are tried on
                ``model`` too. Left as it was.
            shared: whether other processes that run the same audit with the same ``state`` take
                part. Each returns the same result. It stays in ``state``, for those that come
                later.
            save: called with the result before it is returned, by one process of several alone;
                what it returns is the result.

        Raises:
            DataError: images or labels are unfit for this model.
            ModelError: the model's output is unfit.
            UsageError: ``state`` cannot be written, or nothing can be certified; or ``shared``
                without ``state``.
            RobustannError: what is in ``state`` is damaged.
        """
        begin = time.perf_counter()
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if shared and state is None:
            raise UsageError(
                "expected a folder that the workers of a shared audit see, got none; give state"
            )
        _check_fit(model, split, class_names)
        positions = self._positions(split)
        if notify is not _silent:
            for advice in advise(model, split, positions, seed=self.config.seed):
                notify(advice)
        if self.config.certify:
            check_provable(model, split, self.config)
        proof = None
        if self.config.certify and not shared:
            # At once, for what cannot be proven is refused; of several workers one does it later.
            proof = prove(model, split, positions, self.config, progress=progress)
        provenance = provenance_of(
            self.config, model, split, positions, model_name=model_name, data_name=data_name
        )
        order = shuffled(len(positions))
        sample = positions[order[:TRUST_IMAGES]]
        made = self._plan(model, split, sample, draws, surrogate)
        with contextlib.ExitStack() as held:
            kept: Kept = InMemory()
            entries = len(positions) * math.prod(split.shape)
            if state is None and 4 * entries > _LARGEST_IN_MEMORY:
                # Between the passes images of most samples are kept.
                state = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="robustann-")))
            if state is not None:
                facts = identity(self.config, model, split, sample, made, provenance, shown)
                partial = Partial(state, facts, shared)
                kept = held.enter_context(partial.held())
                if (over := partial.result()) is not None:
                    notify("this shared audit has finished already: nothing is left to do")
                    return over
                if partial.others():
                    notify(
                        f"'{partial.root}' also holds the state of another, unfinished audit; it "
                        "is removed when this one has finished"
                    )

            shards, passes = self._divided(
                model, split, positions, order, made, kept, begin=begin, notify=notify, shown=shown
            )
            if isinstance(kept, Partial) and not shared:
                kept.check(shards.starts)

            @cache
            def ran(remedies: tuple[Mend, ...]) -> AuditResult:
                """What the attacks come to: so far, or with the remedies for what was doubted."""
                return self._summed(
                    class_names, provenance, shards, passes, remedies,
                    begin=begin, started=started, command=command, device=model_device(model),
                )  # fmt: skip

            def doubt() -> Doubts:
                doubts = self._doubted(made, split, sample, shards, lambda: ran(()))
                if doubts.mends:
                    failed = ", ".join(mend.check for mend in doubts.mends)
                    notify(f"the attacks were found wanting ({failed}): remedies follow")
                return doubts

            def finish(doubts: Doubts) -> AuditResult:
                result = self._joined(
                    model, split, class_names, made, proof, shards, passes, doubts,
                    ran(doubts.mends),
                    explainer=explainer, progress=progress,
                )  # fmt: skip
                spent = round(time.perf_counter() - begin, 3)
                execution = result.execution.model_copy(update={"seconds": spent})
                return save(result.model_copy(update={"execution": execution}))

            return self._through(shards, passes, doubt, finish, progress)

    def _through(
        self,
        shards: Shards,
        passes: Passes,
        doubt: Callable[[], Doubts],
        finish: Callable[[Doubts], AuditResult],
        progress: bool,
    ) -> AuditResult:
        """All passes, then what comes of them: once, whoever of several workers does it."""
        kept = shards.kept

        def through() -> Doubts:
            shards.first(passes, progress)
            shards.second(passes, shards.misled, progress)
            doubts = doubt()
            if doubts.mends:
                shards.third(passes, labelled_mends(doubts.mends), progress)
            return doubts

        if not isinstance(kept, Partial) or not kept.shared:
            return finish(through())
        try:
            doubts = through()
            kept.once("result", kept.result_path, lambda: kept.keep_result(finish(doubts)))
        except RobustannError:
            # Taken for dead, and overtaken: the shards are gone where the result is there.
            if not kept.result_path.exists():
                raise
        result = kept.result()
        if result is None:
            raise RobustannError(
                f"expected the result of the shared audit in '{kept.result_path}', got nothing: "
                "was the folder removed? Run the audit again"
            )
        return result

    def _divided(
        self,
        model: nn.Module,
        split: Split,
        positions: Tensor,
        order: Tensor,
        made: Plan,
        kept: Kept,
        *,
        begin: float,
        notify: Callable[[str], None],
        shown: Sequence[Shown],
    ) -> tuple[Shards, Passes]:
        """The shards, and what is to be done with each."""
        size = self._batch_size(made.attacked, split, positions, made.gradients)
        if self.config.batch_size == "auto":
            if made.draws > 1:
                # What a randomised model answers hangs on the batch: not on how fast it was today.
                size = _RANDOMISED_BATCH
            elif isinstance(kept, Partial):
                # A stop loses a batch.
                size = min(size, LARGEST_SHARD)
        distances = self._distance_stage(split, made.gradients)

        def decide() -> dict[str, Any]:
            # With the rest, for results hang on it: a stop or another worker must not change it.
            tuned = self._tuned(made, split, positions[:size]) if self.config.tune else None
            budget = self.config.budget
            if self.config.minutes is not None:
                spent = time.perf_counter() - begin
                rate = measure(
                    made.attacked, split, positions[:size], self.config.threat, made.gradients
                )
                budget = affordable(
                    self.config, made, rate, distances=distances, shape=split.shape,
                    count=len(positions), spent=spent,
                )  # fmt: skip
            fixed = self.config.batch_size != "auto" or made.draws > 1
            shard = size
            if kept.shared:
                shard = shard_size(len(positions), size, keeps_batches=fixed)
            elif isinstance(kept, Partial):
                shard = own_shard(len(positions), size)
            return {
                "shard": shard,
                "budget": budget,
                "tuned": None if tuned is None else tuned.model_dump(),
            }

        decided = kept.decided("plan", decide)
        shards = Shards(kept, positions, decided["shard"], size)
        tuned, config = None, self.config
        if config.tune:
            tuned = Tuned.model_validate(decided["tuned"])
            config = replace(config, precision=tuned.precision, channels_last=tuned.channels_last)
            notify(tuned.words)
        if done := shards.done(1):
            verb = "joining an" if kept.shared else "going on with a stopped"
            notify(f"{verb} audit: {done:,} of {len(positions):,} images are done")
        check = made.fitting(self._checks(len(positions)))
        escalation = made.fitting(self.config.escalation)
        stages = labelled((*made.stages, *check, *escalation))
        main, checks = len(made.stages), len(check)
        passes = Passes(
            plan=made,
            config=config,
            split=split,
            stages=stages[:main],
            check=stages[main : main + checks],
            shown=shown,
            escalation=stages[main + checks :],
            distances=distances,
            budget=decided["budget"],
            candidates=frozenset(positions[order[: self.preset.explained]].tolist()),
            quick=_quick(made, config),
            tuned=tuned,
        )
        return shards, passes

    def _summed(
        self,
        class_names: Sequence[str],
        provenance: Provenance,
        shards: Shards,
        passes: Passes,
        remedies: tuple[Mend, ...],
        *,
        begin: float,
        started: str,
        command: str,
        device: torch.device,
    ) -> AuditResult:
        """What the attacks come to, when all shards are through two passes, or three: with the
        remedies for what was doubted."""
        batches = shards.all(3 if remedies else 2)
        ran = [*passes.stages, *passes.check, *(passes.escalation if shards.misled else ())]
        attacks = [(label, stage.attack) for label, stage in ran]
        # In the order in which they ran.
        place = len(passes.stages) + len(passes.check)
        attacks[place:place] = [(one.label, one) for one in passes.shown]
        distances = passes.distances
        if distances is not None:
            attacks.append((distances.label, distances.named))
        attacks += [(label, stage.attack) for label, stage in labelled_mends(remedies)]
        if self.config.minutes is not None:
            told = {**provenance.config, "budget": passes.budget}
            provenance = provenance.model_copy(update={"config": told})
        seconds: Counter[str] = Counter()
        for batch in batches:
            seconds.update(batch.seconds)
        result = summarize(
            batches,
            self.config,
            attacks=attacks,
            class_names=class_names,
            levels=() if distances is None else distances.levels,
            provenance=provenance,
            execution=Execution(
                command=command,
                started=started,
                seconds=round(time.perf_counter() - begin, 3),
                attack_seconds={label: round(spent, 3) for label, spent in seconds.items()},
                batch_size=shards.batch,
                device=device_name(device),
                threads=torch.get_num_threads(),
                tuned=passes.tuned,
            ),
        )
        alone = protocol_alone(result, passes.config, passes.plan, passes.budget)
        return result.model_copy(update={"protocol": alone})

    def _joined(
        self,
        model: nn.Module,
        split: Split,
        class_names: Sequence[str],
        made: Plan,
        proof: Proof | None,
        shards: Shards,
        passes: Passes,
        doubts: Doubts,
        result: AuditResult,
        *,
        explainer: Explainer | None,
        progress: bool,
    ) -> AuditResult:
        """The result of the attacks, with everything else that was asked for."""
        positions, batches = shards.positions, shards.all(3 if doubts.mends else 2)
        explanation = None
        if explainer is not None and self.config.explain:
            cases = self._cases(batches)
            explanation = explainer(model, cases, class_names, self.config.seed)
        weights = None
        if self.config.weights:
            weights = measure_weights(
                model,
                split.subset(positions),
                effort=effort_of(self.config.preset),
                seed=self.config.seed,
                batch_size=shards.batch,
                progress=progress,
            )
        corruptions = None
        if self.config.corruptions:
            corruptions = measure_corruptions(
                made.model,
                split,
                positions,
                seed=self.config.seed,
                draws=made.draws,
                batch_size=shards.batch,
                progress=progress,
            )
        result = result.model_copy(
            update={"explanation": explanation, "weights": weights, "corruptions": corruptions}
        )
        if self.config.trust:
            result = self._believed(made, split, doubts, result)
        if self.config.certify:
            proof = proof or prove(model, split, positions, self.config, progress=progress)
            result = with_proof(result, proof, batches, self.config, made.draws)
        return result

    def _tuned(self, made: Plan, split: Split, batch: Tensor) -> Tuned:
        """The switches that pay on this machine, by timing this batch and a part of it."""
        threat, model = self.config.threat, made.attacked
        quick = {last: Quick(model, channels_last=last) for last in (False, True)}

        def timer(some: Tensor) -> Timer:
            def seconds(precision: Precision, last: bool) -> float:
                rate = measure(quick[last], split, some, threat, made.gradients, precision)
                return rate.forward + rate.backward

            return seconds

        return tune(
            # What still stands may be few.
            *(timer(batch[: max(ALIGNMENT, len(batch) // part)]) for part in (1, 8)),
            precision=self.config.precision,
            channels_last=self.config.channels_last,
            low=low_precisions(model),
        )

    def _share(self, count: int) -> float:
        """The share that is checked: as configured, and more of few samples."""
        configured = max((stage.share for stage in self.config.check), default=0.0)
        return min(1.0, max(configured, _LEAST_CHECKED / count)) if configured else 0.0

    def _checks(self, count: int) -> tuple[Stage, ...]:
        share = self._share(count)
        return tuple(replace(stage, share=share) for stage in self.config.check)

    def _distance_stage(self, split: Split, gradients: bool) -> DistanceStage | None:
        if not self.config.curve:
            return None
        entries = math.prod(split.shape)
        steps = self.preset.curve_steps
        return distance_stage(self.config.threat, entries, steps=steps, gradients=gradients)

    def _plan(
        self,
        model: nn.Module,
        split: Split,
        sample: Tensor,
        draws: int = 1,
        surrogate: nn.Module | None = None,
    ) -> Plan:
        """The attacks as configured, or as a first look at the model says; and through a surrogate
        where there is one."""
        made = self._adapted(model, split, sample, draws)
        if surrogate is None:
            return made
        # Also where nobody asks: it must answer for the same classes.
        found = agreement(surrogate, made.model, split.images(sample).cpu(), seed=self.config.seed)
        attack = from_surrogate(surrogate, self.config.threat)
        if attack is None:
            return made
        place = len(made.stages) - len(made.searches)
        stages = (*made.stages[:place], Stage(attack), *made.stages[place:])
        return replace(made, stages=stages, findings=(*made.findings, found))

    def _adapted(self, model: nn.Module, split: Split, sample: Tensor, draws: int) -> Plan:
        """The attacks as configured, or as a first look at the model says."""
        config = self.config
        draws = max(draws, 1 if config.attacks is not None else self.preset.draws)
        if not config.trust:
            followed = any(stage.attack.access == "white-box" for stage in config.stages)
            return Plan(model, config.stages, draws, followed, (), own=len(config.stages))
        x, labels = split.images(sample).cpu(), split.labels[sample]
        found = diagnose(model, x, labels, config.threat, seed=config.seed)
        part, looked = None, 0
        if found.gradient_partly_missing or found.gradient_unreliable or found.dynamic:
            device = model_device(model)
            part, looked = differentiable_part(
                model,
                x.to(device),
                labels.to(device),
                config.threat,
                config.seed,
                draws=max(draws, DRAWS) if found.randomised else draws,
            )
        made = plan(
            model,
            config.stages,
            found,
            config.threat,
            queries=self.preset.queries,
            draws=draws,
            fixed=config.attacks is not None,
            part=part,
        )
        return replace(made, propagations=made.propagations + looked)

    def _doubted(
        self,
        made: Plan,
        split: Split,
        sample: Tensor,
        shards: Shards,
        ran: Callable[[], AuditResult],
    ) -> Doubts:
        """What small experiments and the outcomes of two passes say, and what is to be done."""
        if not self.config.trust:
            return Doubts()

        def make() -> dict[str, Any]:
            result = ran()
            probed = probe(
                made.leading,
                split.images(sample).cpu(),
                split.labels[sample],
                self.config.threat,
                random=SampleRandom.create(self.config.seed, sample).fork("probe"),
                draws=made.draws_of(made.leading),
                gradients=made.gradients,
                losses=losses_used(result.attacks),
            )
            seen = combine(probed, self._reviewed(split, result))
            findings = withdrawn(made, combine(made.findings, seen), result.attacks)
            findings = self._answered(made, findings, result)
            return {
                "seen": [one.model_dump(mode="json") for one in seen],
                "propagations": made.price_of(
                    made.leading, probed.propagations - probed.backwards, probed.backwards
                ),
                "open": [one.check for one in unresolved(findings)],
            }

        # With the rest: others must not see otherwise, nor who goes on after a stop in the midst
        # of the remedies.
        decided = shards.kept.decided("findings", make)
        remedies: tuple[Mend, ...] = ()
        if self.config.attacks is None:
            remedies = mends(
                decided["open"], made, self.config.threat, self.preset, escalated=shards.misled
            )
        return Doubts(
            tuple(Finding.model_validate(one) for one in decided["seen"]),
            decided["propagations"],
            remedies,
        )

    def _reviewed(self, split: Split, result: AuditResult) -> tuple[Finding, ...]:
        """What the outcomes say."""
        budget = result.provenance.config.get("budget")
        limited = isinstance(budget, int)
        # A budget ends the attacks, and does not end the curve's: no round of theirs.
        # Nor is one that was to go to a runner-up that there is not.
        classes = len(result.class_names)
        rounds = [
            one
            for one in result.attacks
            if not (limited and one.label.endswith("(curve)"))
            and (one.attempted or int(str(one.parameters.get("rank", 0))) < classes)
        ]
        widest = self.config.threat.widest(math.prod(split.shape))
        reviewed = review(rounds, result.curve, chance=result.chance, widest=widest)
        cut = (_budget_cut(result, budget),) if isinstance(budget, int) else ()
        return combine(reviewed, cut)

    def _answered(
        self, made: Plan, findings: tuple[Finding, ...], result: AuditResult
    ) -> tuple[Finding, ...]:
        return answered(
            made,
            findings,
            result.attacks,
            robust_accuracy=result.robust_accuracy,
            chance=result.chance,
        )

    def _believed(
        self, made: Plan, split: Split, doubts: Doubts, result: AuditResult
    ) -> AuditResult:
        """The result with the findings of all checks, and what was done about them."""
        again: tuple[Finding, ...] = ()
        if doubts.mends:
            # Whether rounds still help is for the remedies to say: they are of several kinds.
            again = tuple(
                one for one in self._reviewed(split, result) if one.check != "restarts-help"
            )
        findings = withdrawn(made, combine(made.findings, doubts.seen, again), result.attacks)
        findings = self._answered(made, mended(findings, doubts.mends, result), result)
        spent = made.propagations + doubts.propagations
        return result.model_copy(update={"findings": findings, "trust_propagations": spent})

    def _positions(self, split: Split) -> Tensor:
        return chosen_samples(len(split), self.config.max_samples)

    def _batch_size(
        self, model: nn.Module, split: Split, positions: Tensor, gradients: bool
    ) -> int:
        if self.config.batch_size == "auto":
            return find_batch_size(model, split, positions, self.config.threat, gradients)
        return self.config.batch_size

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
            norm=self.config.threat.norm,
        )


def _quick(made: Plan, config: AuditConfig) -> Callable[[nn.Module], nn.Module]:
    """The models as attacks shall run them."""
    if not (config.channels_last or config.compile):
        return lambda model: model
    known = {
        id(model): Quick(
            model,
            channels_last=config.channels_last,
            # Seen through a part, a model is two: each call would be compiled anew.
            compiled=config.compile and model is not made.seen,
        )
        for model in (made.model, made.seen)
        if model is not None
    }
    return lambda model: known[id(model)]


def _budget_cut(result: AuditResult, budget: int) -> Finding:
    """Whether the budget ended the attacks too early."""
    worst, samples = result.worst_case, result.clean_samples
    rows = [
        row
        for row, (guess, label) in enumerate(zip(samples.prediction, samples.label, strict=True))
        if guess == label
    ]
    counted = [one for one in result.attacks if not one.label.endswith("(curve)")]
    spent = [
        sum(one.samples.forwards[row] + one.samples.backwards[row] for one in counted)
        for row in rows
    ]
    climbed = [sum(one.samples.backwards[row] for one in counted) for row in rows]
    fell = [
        None if worst.broken_by[row] is None else price
        for row, price in zip(rows, spent, strict=True)
    ]
    return budget_cut(fell, spent, climbed, budget)


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
