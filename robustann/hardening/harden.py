"""Hardening in one call, with audits before and after that go through the defense."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustann import files, parallel
from robustann.attacks import MM, PGD
from robustann.auditing import Audit, AuditConfig, chosen_samples
from robustann.auditing.runner import Explainer
from robustann.auditing.shown import Shown
from robustann.certificates import Smoothed
from robustann.data import ImageData
from robustann.defenses.detection import (
    DetectionResult,
    Detector,
    FeatureSqueezing,
    evaluate_detector,
)
from robustann.defenses.registry import Defense
from robustann.defenses.sanitizers import Sanitized, Sanitizer
from robustann.hardening.comparing import compared, staged
from robustann.hardening.kept import Kept, forget
from robustann.hardening.planning import Planned, planned, untrained
from robustann.hardening.sanitized import LEAST_DRAWS, SanitizedResult, attack_sanitizer
from robustann.models import ImageClassifier, save_model
from robustann.results import AuditResult, Hardening
from robustann.training import TrainConfig, TrainResult, train

# What the five attackers of sanitizers do, by preset; for others what is usual.
_EFFORT: Mapping[str, dict[str, Any]] = {
    "quick": {
        "queries": 200,
        "attacks": (MM(steps=15), MM(steps=15, rank=2), PGD(steps=20, loss="margin")),
    },
    "thorough": {"queries": 5000},
}
# Likewise what the attackers of a detector do.
_EVASION: Mapping[str, dict[str, Any]] = {
    "quick": {"adaptive": (MM(steps=15), PGD(steps=30, loss="margin")), "targets": 2},
}
# Clean images that set its threshold, at most.
_CALIBRATED = 2000


@dataclass(frozen=True, kw_only=True)
class HardenResult:
    """A hardened model, and what hardening did.

    Attributes:
        model: hardened, in eval mode: the trained network, with the sanitizers in front of it, or
            as a vote under noise (:class:`robustann.certificates.Smoothed`).
        network: the trained network alone; the same object where there is nothing around it.
        before: the audit of the model as it came (or, of an architecture or a model that was never
            trained, trained plainly).
        after: the audit of ``model``, of the same samples with the same seed; its report holds the
            comparison.
        comparison: clean and robust outcomes of both, sample by sample.
        training: what training said, None where no defense trains.
        baseline: the plainly trained model, where there is one.
        sanitized: sanitizers against five kinds of attackers alone, None where there are none; what
            these found counts in ``after``, whose robust accuracy is the minimum over everything.
        detected: the detector against attackers who know of it and who do not, None where there is
            none; the audits do not see it.
        detector: it, around ``network``, with its threshold set on validation images.
        state: the folder that was given for what is kept on the way.

    >>> defended.before.robust_accuracy, defended.after.robust_accuracy, defended.sanitizers
    (0.5, 0.5, ('bit-depth:bits=1',))
    """

    model: nn.Module
    network: nn.Module
    before: AuditResult
    after: AuditResult
    comparison: Hardening
    training: TrainResult[Any] | None
    baseline: nn.Module | None
    sanitized: SanitizedResult | None
    detected: DetectionResult | None = None
    detector: FeatureSqueezing | None = None
    state: Path | None = None

    def save(self, folder: str | Path) -> None:
        """Write the network, and both audits with their reports, into ``folder``.

        ``model.safetensors`` holds the network without sanitizers, with its sidecar where robustann
        knows its architecture; ``hardened.json`` names the defenses, and the sanitizers and the
        noise that belong in front of it; ``before`` and ``after`` hold ``results.json``,
        ``samples.csv`` and ``report.html``. Then what was kept on the way is removed.
        """
        root = Path(folder)
        # What took longest comes first.
        self._save_network(root / "model.safetensors")
        told = {
            "model": "model.safetensors",
            "defenses": [one.label for one in self.comparison.defenses],
            "sanitizers": list(self.sanitizers),
            "smoothing": self.smoothing,
            "detector": self.detected
            and {"squeezers": self.detected.squeezers, "threshold": self.detected.threshold},
        }
        files.write_text(root / "hardened.json", json.dumps(told, indent=1) + "\n")
        self.before.save(root / "before")
        self.after.save(root / "after")
        if self.state is not None:
            forget(self.state)

    @property
    def sanitizers(self) -> tuple[str, ...]:
        """The sanitizers in front of the network as text, in order."""
        parts = self.model.parts if isinstance(self.model, Sanitized) else ()
        return tuple(part.label for part in parts)

    @property
    def smoothing(self) -> float | None:
        """Standard deviation of the noise under which the model votes; None where it does not."""
        return self.model.sigma if isinstance(self.model, Smoothed) else None

    def _save_network(self, path: Path) -> None:
        if isinstance(self.network, ImageClassifier):
            facts = self.training.training if self.training else None
            metrics = self.training.metrics if self.training else None
            save_model(self.network, path, training=facts, metrics=metrics)
            return
        from safetensors.torch import save

        state = self.network.state_dict()
        # Clones: tensors that share their memory, such as tied weights, cannot be stored.
        apart = {name: _apart(one) for name, one in state.items() if isinstance(one, Tensor)}
        files.write_bytes(path, save(apart))


def _apart(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


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
    state: Path | None = None,
) -> HardenResult:
    """Harden a model and measure what that did; :func:`robustann.harden` tells the arguments."""
    plan = planned(model, data, config, defenses, training, device)
    # Where several processes were launched, all take part in training and audits.
    parallel.join(plan.device)
    kept = Kept(state, {} if state is None else plan.identity(model, data, config))
    work = _Work(plan, data, config, kept, explainer, progress, command, notify)
    name = model_name or (model if isinstance(model, str) else type(model).__name__)
    notes = list(plan.notes)
    baseline: nn.Module | None = None
    subject: nn.Module | str = model
    if isinstance(model, str):
        notify(f"training {model} plainly, to compare with")
        original = baseline = work.trained(model, "baseline", plan.plain).model
    else:
        # The caller's model stays as it is, and where it is.
        original = copy.deepcopy(model).to(plan.device)
        subject = copy.deepcopy(original)
        if plan.step is not None and untrained(original, data):
            notify(f"{name} only guesses: training it plainly too, to compare with")
            notes.append(
                "The model came untrained: before hardening means trained plainly, from the same "
                "weights with the same settings."
            )
            original = baseline = work.trained(original, "baseline", plan.plain).model
    before = work.audited(plan.voting(original), "before", f"{name} before hardening")
    trained: TrainResult[Any] | None = None
    if plan.step is not None:
        notify(f"training with {plan.step.name}")
        trained = work.trained(subject, "hardened", plan.hard, plan.step)
        network: nn.Module = trained.model
        notes += [
            f"In epoch {one['epoch']} of training, {one['event']}."
            for one in trained.training["events"]
        ]
    elif isinstance(subject, str):
        # Nothing trains: the sanitizers stand in front of the plain model.
        network = copy.deepcopy(original)
    else:
        network = subject
    network.eval()
    stages = [staged("before", before)]
    measured: SanitizedResult | None = None
    hardened: nn.Module
    if not plan.sanitizers:
        hardened = plan.voting(network)
        after = work.audited(hardened, "after", f"{name} hardened")
    else:
        if trained is not None:
            called = f"{name} trained, without sanitizers"
            between = work.audited(network, "between", called, whole=False)
            stages.append(staged("after training, without sanitizers", between))
        # Copies: the caller's own stay in the mode that they are in.
        hardened = Sanitized(network, *map(copy.deepcopy, plan.sanitizers)).eval()
        measured, shown = work.measured(network, hardened.parts)
        # The attacker knows the defense: gradients through it, or through stand-ins for it.
        seen = hardened.seen_through("surrogate").eval()
        draws = 1 if hardened.deterministic else LEAST_DRAWS
        after = work.audited(seen, "after", f"{name} hardened", draws=draws, shown=shown)
    stages.append(staged("after", after))
    detected: DetectionResult | None = None
    detector: FeatureSqueezing | None = None
    if plan.detector is not None:
        detected = work.detected(network, plan.detector)
        # Set anew: the threshold in a result is rounded.
        detector = FeatureSqueezing.fit(
            network, plan.detector.squeezers, work.calibration(), fpr=plan.detector.fpr
        ).eval()
    comparison = compared(
        plan.defenses,
        stages,
        before,
        after,
        sanitizers=plan.sanitizers,
        measured=measured,
        detected=detected,
        notes=notes,
        training=None if trained is None else _told(trained),
    )
    # Who saves removes what was kept on the way: not before all have it.
    parallel.gathered(None)
    return HardenResult(
        model=hardened,
        network=network,
        before=before,
        after=after.model_copy(update={"hardening": comparison}),
        comparison=comparison,
        training=trained,
        baseline=baseline,
        sanitized=measured,
        detected=detected,
        detector=detector,
        state=state,
    )


@dataclass(frozen=True)
class _Work:
    """The parts of a hardening, each taken up where it was stopped."""

    plan: Planned
    data: ImageData
    config: AuditConfig
    kept: Kept
    explainer: Explainer | None
    progress: bool
    command: str
    notify: Callable[[str], None]

    def trained(
        self, model: nn.Module | str, name: str, config: TrainConfig, step: Any = None
    ) -> TrainResult[Any]:
        checkpoint = self.kept.path(f"{name}.pt")
        return train(
            model,
            self.data,
            config=config,
            step=step,
            device=self.plan.device,
            checkpoint=checkpoint,
            # It stays until everything is saved.
            keep_checkpoint=True,
            resume=checkpoint is not None,
            progress=self.progress,
        )

    def audited(
        self,
        model: nn.Module,
        stage: str,
        called: str,
        *,
        whole: bool = True,
        draws: int = 1,
        shown: Sequence[Shown] = (),
    ) -> AuditResult:
        done = self.kept.audit(stage, model)
        if done is not None:
            self.notify(f"{called}: audited before the stop")
            return done
        self.notify(f"auditing {called}")
        config, state = self.config, self.kept.path(stage)
        shared = state is not None and parallel.together()
        if not whole:
            config = replace(config, explain=False, curve=False, weights=False, certify=False)
        result = Audit(config).run(
            model,
            self.data.test,
            class_names=self.data.class_names,
            model_name=called,
            data_name=self.data.name,
            explainer=self.explainer if whole else None,
            progress=self.progress,
            command=self.command,
            state=state,
            notify=self.notify,
            draws=draws,
            shown=shown,
            shared=shared,
        )
        # Others may still be reading what they share.
        parallel.gathered(None)
        self.kept.keep_audit(stage, result)
        return result

    def measured(
        self, network: nn.Module, sanitizers: Sequence[Sanitizer]
    ) -> tuple[SanitizedResult, tuple[Shown, ...]]:
        done = self.kept.measured(network)
        if done is not None:
            return done
        self.notify("measuring the sanitizers against five kinds of attackers")
        measured, shown = attack_sanitizer(
            network,
            sanitizers,
            self.data,
            self.config.threat,
            seed=self.config.seed,
            max_samples=self.config.max_samples,
            progress=self.progress,
            **_EFFORT.get(self.config.preset, {}),
        )
        self.kept.keep_measured(network, measured, shown)
        return measured, shown

    def calibration(self) -> Tensor:
        """Clean images that a detector's threshold is set on."""
        split = self.data.validation
        count = min(len(split), _CALIBRATED)
        return split.images(torch.arange(count) * len(split) // count).cpu()

    def detected(self, network: nn.Module, detector: Detector) -> DetectionResult:
        done = self.kept.detected(network)
        if done is not None:
            return done
        self.notify("attacking the detector, knowing of it and not")
        config, test = self.config, self.data.test
        positions = chosen_samples(len(test), config.max_samples)
        found = evaluate_detector(
            network,
            detector.squeezers,
            self.calibration(),
            test.images(positions).cpu(),
            test.labels[positions],
            config.threat,
            fpr=detector.fpr,
            seed=config.seed,
            **_EVASION.get(config.preset, {}),
        )
        self.kept.keep_detected(network, found)
        return found


def _told(trained: TrainResult[Any]) -> dict[str, str | int | float | bool | None]:
    """What training said, for the report."""
    return {
        "epochs": trained.epochs_run,
        "best epoch": trained.best_epoch,
        "seconds": round(trained.seconds, 1),
        **_scores(trained),
    }


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
