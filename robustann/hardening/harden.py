"""Hardening in one call, with audits before and after that go through the defense."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustann import files
from robustann.auditing import Audit, AuditConfig
from robustann.auditing.runner import Explainer
from robustann.data import ImageData
from robustann.defenses.registry import Defense, as_defense, check_together
from robustann.defenses.sanitizers import Sanitized, Sanitizer
from robustann.errors import UsageError
from robustann.hardening.comparing import paired
from robustann.hardening.sanitized import SanitizedResult, measure_sanitizer
from robustann.metrics import wilson_interval
from robustann.models import ImageClassifier, save_model
from robustann.results import (
    AttackerWay,
    AuditResult,
    DefenseUsed,
    Hardening,
    HardeningStage,
    Interval,
)
from robustann.training import StandardStep, TrainConfig, TrainResult, train

_SANITIZERS_KNOW = ("linf", "l2")


@dataclass(frozen=True, kw_only=True)
class HardenResult:
    """A hardened model, and what hardening did.

    Attributes:
        model: hardened, in eval mode: the trained network, with the sanitizers in front of it.
        network: the trained network alone; the same object where there are no sanitizers.
        before: the audit of the model as it came (or, of an architecture, trained plainly).
        after: the audit of ``model``, of the same samples with the same seed; its report holds the
            comparison.
        comparison: clean and robust outcomes of both, sample by sample.
        training: what training said, None where no defense trains.
        baseline: the plainly trained model, where the call named an architecture.
        sanitized: sanitizers against five kinds of attackers, None where there are none.
    """

    model: nn.Module
    network: nn.Module
    before: AuditResult
    after: AuditResult
    comparison: Hardening
    training: TrainResult[Any] | None
    baseline: nn.Module | None
    sanitized: SanitizedResult | None

    def save(self, folder: str | Path) -> None:
        """Write the network, and both audits with their reports, into ``folder``.

        ``model.safetensors`` holds the network without sanitizers, with its sidecar where robustann
        knows its architecture; ``before`` and ``after`` hold ``results.json``, ``samples.csv`` and
        ``report.html``.
        """
        root = Path(folder)
        self.before.save(root / "before")
        self.after.save(root / "after")
        path = root / "model.safetensors"
        if isinstance(self.network, ImageClassifier):
            facts = self.training.training if self.training else None
            metrics = self.training.metrics if self.training else None
            save_model(self.network, path, training=facts, metrics=metrics)
            return
        from safetensors.torch import save

        state = {name: one.detach().cpu() for name, one in self.network.state_dict().items()}
        files.write_bytes(path, save({name: one.contiguous() for name, one in state.items()}))


def harden(
    model: nn.Module | str,
    data: ImageData,
    config: AuditConfig,
    defenses: Sequence[Defense | Sanitizer | str | Any],
    *,
    training: TrainConfig | None = None,
    device: str | torch.device | None = None,
    explainer: Explainer | None = None,
    model_name: str | None = None,
    progress: bool = False,
    command: str = "robustann.harden(...)",
    notify: Callable[[str], None] = lambda message: None,
    checkpoint: Path | None = None,
) -> HardenResult:
    """Harden a model and measure what that did; :func:`robustann.harden` tells the arguments."""
    chosen = [as_defense(one) for one in defenses]
    check_together(chosen)
    threat = config.threat
    sanitizers = [one.made() for one in chosen if one.kind == "sanitizer"]
    if sanitizers and threat.norm not in _SANITIZERS_KNOW:
        raise UsageError(
            "expected the norm linf or l2, in which sanitizers can be measured, got "
            f"{threat.norm}; choose one of these, or leave the sanitizers out"
        )
    step = _step(chosen, config)
    settings = training or TrainConfig()
    baseline: nn.Module | None = None
    name = model_name or (model if isinstance(model, str) else type(model).__name__)
    if isinstance(model, str):
        notify(f"training {model} plainly, to compare with")
        baseline = train(
            model, data, config=replace(settings, lr=None), device=device, progress=progress
        ).model
        original: nn.Module = baseline
        subject: nn.Module | str = model
    else:
        original = model
        # The caller's model stays as it is.
        subject = copy.deepcopy(model)

    def audited(what: nn.Module, called: str, *, explain: bool = True) -> AuditResult:
        notify(f"auditing {called}")
        asked = config if explain else replace(config, explain=False, curve=False)
        return Audit(asked).run(
            what,
            data.test,
            class_names=data.class_names,
            model_name=called,
            data_name=data.name,
            explainer=explainer if explain else None,
            progress=progress,
            command=command,
        )

    before = audited(original, f"{name} before hardening")
    trained: TrainResult[Any] | None = None
    if step is not None:
        notify(f"training with {step.name}")
        trained = train(
            subject,
            data,
            config=settings,
            step=step,
            device=device,
            checkpoint=checkpoint,
            resume=checkpoint is not None,
            progress=progress,
        )
        network: nn.Module = trained.model
    elif isinstance(subject, str):
        # Nothing trains: the sanitizers stand in front of the plain model.
        network = copy.deepcopy(original)
    else:
        network = subject
    network.eval()
    stages = [_stage("before", before)]
    if not sanitizers:
        after = audited(network, f"{name} hardened")
        stages.append(_stage("after", after))
        comparison = _comparison(chosen, stages, before, after, None, trained)
        after = after.model_copy(update={"hardening": comparison})
        return _result(network, network, before, after, trained, baseline, None)
    if trained is not None:
        between = audited(network, f"{name} trained, without sanitizers", explain=False)
        stages.append(_stage("after training, without sanitizers", between))
    defended = Sanitized(network, *sanitizers).eval()
    notify("measuring the sanitizers against five kinds of attackers")
    measured = measure_sanitizer(
        network,
        sanitizers,
        data,
        threat,
        seed=config.seed,
        max_samples=config.max_samples,
        progress=progress,
    )
    # The attacker knows the defense: gradients through it, or through stand-ins for it.
    after = audited(defended.seen_through("surrogate").eval(), f"{name} hardened")
    stages.append(_stage("after", after))
    comparison = _comparison(chosen, stages, before, after, measured, trained)
    after = after.model_copy(update={"hardening": comparison})
    return _result(defended, network, before, after, trained, baseline, measured)


def _result(
    model: nn.Module,
    network: nn.Module,
    before: AuditResult,
    after: AuditResult,
    trained: TrainResult[Any] | None,
    baseline: nn.Module | None,
    sanitized: SanitizedResult | None,
) -> HardenResult:
    if after.hardening is None:
        raise ValueError("a hardened model's audit holds its comparison")
    return HardenResult(
        model=model,
        network=network,
        before=before,
        after=after,
        comparison=after.hardening,
        training=trained,
        baseline=baseline,
        sanitized=sanitized,
    )


def _step(defenses: Sequence[Defense], config: AuditConfig) -> Any | None:
    """The training step that objective and wrappers make; None where nothing trains."""
    objectives = [one for one in defenses if one.kind == "objective"]
    wrappers = [one for one in defenses if one.kind == "wrapper"]
    if not objectives and not wrappers:
        return None
    step: Any = objectives[0].made(config.threat) if objectives else StandardStep()
    # Clipping is outermost, whatever the order: it has the last word on the weights.
    for wrapper in sorted(wrappers, key=lambda one: one.name == "weight-clipping"):
        step = wrapper.made(step)
    return step


def _stage(name: str, result: AuditResult) -> HardeningStage:
    return HardeningStage(
        name=name,
        clean_accuracy=result.clean_accuracy,
        clean_interval=result.clean.interval,
        robust_accuracy=result.robust_accuracy,
        robust_interval=result.worst_case.scores.interval,
        believable=result.believable,
    )


def _comparison(
    defenses: Sequence[Defense],
    stages: Sequence[HardeningStage],
    before: AuditResult,
    after: AuditResult,
    measured: SanitizedResult | None,
    trained: TrainResult[Any] | None,
) -> Hardening:
    standing = robust_outcomes(after)
    if measured is not None:
        if measured.index != after.clean_samples.index:
            raise ValueError("expected both measurements on the same samples")
        # The minimum over everything that was tried counts.
        right = zip(measured.clean_correct, measured.broken_by, strict=True)
        withstood = [correct and by is None for correct, by in right]
        standing = [one and other for one, other in zip(standing, withstood, strict=True)]
    robust = sum(standing)
    low, high = wilson_interval(robust, len(standing))
    return Hardening(
        defenses=tuple(
            DefenseUsed(
                name=one.name,
                label=one.label,
                kind=one.kind,
                paper=one.paper,
                helps=one.helps,
                limits=one.limits,
            )
            for one in defenses
        ),
        stages=tuple(stages),
        clean=paired(clean_outcomes(before), clean_outcomes(after)),
        robust=paired(robust_outcomes(before), standing),
        robust_accuracy=robust / len(standing),
        robust_interval=Interval(low=low, high=high),
        ways=()
        if measured is None
        else tuple(
            AttackerWay(
                name=way.name,
                words=way.words,
                robust_accuracy=way.robust_accuracy,
                interval=way.interval,
            )
            for way in measured.ways
        ),
        sanitizer_verdict=None if measured is None else measured.words,
        training={}
        if trained is None
        else {
            "epochs": trained.epochs_run,
            "best epoch": trained.best_epoch,
            "seconds": round(trained.seconds, 1),
            **_scores(trained),
        },
    )


def _scores(trained: TrainResult[Any]) -> dict[str, float]:
    """What validation said of the best epoch and of the last."""
    names = ("validation_accuracy", "validation_robust_accuracy")
    rows = {"best": trained.history[trained.best_epoch - 1], "last": trained.history[-1]}
    return {
        f"{which} epoch, {name.replace('_', ' ')}": round(float(row[name]), 6)
        for which, row in rows.items()
        for name in names
        if name in row
    }


def clean_outcomes(result: AuditResult) -> list[bool]:
    """Which samples were classified correctly, unattacked."""
    samples = result.clean_samples
    return [guess == label for guess, label in zip(samples.prediction, samples.label, strict=True)]


def robust_outcomes(result: AuditResult) -> list[bool]:
    """Which samples were classified correctly and broken by no attack."""
    broken = result.worst_case.broken_by
    return [right and by is None for right, by in zip(clean_outcomes(result), broken, strict=True)]
