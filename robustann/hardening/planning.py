"""What a hardening will do, with all that can be refused refused before any of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from robustann.attacks.engine import predict_logits
from robustann.auditing import AuditConfig
from robustann.auditing.certifying import check_provable
from robustann.certificates import Smoothed
from robustann.data import ImageData, Split
from robustann.defenses import AdversarialTraining, AdversarialWeightPerturbation, NoiseTraining
from robustann.defenses.detection import Detector, check_detection
from robustann.defenses.registry import Defense, as_defense, check_together, parse_defense
from robustann.defenses.sanitizers import Sanitized, Sanitizer
from robustann.defenses.steps import StepWrapper
from robustann.errors import DataError, ModelError, UsageError
from robustann.hardening.sanitized import MEASURED_NORMS
from robustann.metrics import wilson_interval
from robustann.models import create_model, resolve_device, tensor_digest
from robustann.threat import ThreatModel
from robustann.training import StandardStep, TrainConfig

# Of the way from guessing to no error, what a network that was never trained may have by luck.
_LUCK = 0.1
_LOOKED_AT = 2000
_USUAL = TrainConfig()


@dataclass(frozen=True, eq=False)
class Planned:
    """What is to be done.

    Attributes:
        defenses: as they were asked for, with what they need besides.
        step: what trains with them; None where nothing does.
        sanitizers: to stand in front of the network, in order; the caller's own stay his.
        detector: to refuse images beside the network; None where there is none.
        smoothing: standard deviation of the noise under which all audits vote; None where they are
            of the network itself.
        plain: how to train without defenses, to compare with.
        hard: how to train with them.
        device: where everything runs.
        notes: what the comparison has to say besides.
    """

    defenses: tuple[Defense, ...]
    step: Any | None
    sanitizers: tuple[Sanitizer, ...]
    detector: Detector | None
    smoothing: float | None
    plain: TrainConfig
    hard: TrainConfig
    device: torch.device
    notes: tuple[str, ...]

    def identity(
        self, model: nn.Module | str, data: ImageData, config: AuditConfig
    ) -> dict[str, Any]:
        """Everything that the result depends on, as JSON values."""
        parts = {"train": data.train, "validation": data.validation, "test": data.test}
        return {
            "model": model if isinstance(model, str) else [repr(model), tensor_digest(model)],
            "trained": None
            if isinstance(model, str)
            else [name for name, one in model.named_parameters() if one.requires_grad],
            "data": {name: part.digest() for name, part in parts.items()},
            "audit": repr(config),
            "defenses": [one.label for one in self.defenses],
            "step": None if self.step is None else [self.step.name, self.step.parameters()],
            "plain": asdict(self.plain),
            "hard": asdict(self.hard),
            "smoothing": self.smoothing,
            "device": self.device.type,
            "torch": torch.__version__,
        }

    def voting(self, network: nn.Module) -> nn.Module:
        """The network, or its vote under noise, in eval mode, which is what gets audited."""
        return network if self.smoothing is None else Smoothed(network, self.smoothing).eval()


def planned(
    model: nn.Module | str,
    data: ImageData,
    config: AuditConfig,
    defenses: Sequence[Defense | Sanitizer | str | Any],
    training: TrainConfig | None,
    device: str | torch.device | None,
) -> Planned:
    """Check everything that was asked for, and say what to do.

    Raises:
        UsageError: a wrong name, option or combination.
        DataError: a sanitizer refuses the images, or there are test images alone to train on.
        ModelError: there is nothing to train.
    """
    check_kinds(model, data, training)
    place = resolve_device(None if device is None else str(device))
    chosen = _completed(tuple(as_defense(one) for one in defenses))
    check_together(chosen)
    threat = config.threat
    sanitizers = tuple(one.made() for one in chosen if one.kind == "sanitizer")
    if sanitizers and threat.norm not in MEASURED_NORMS:
        raise UsageError(
            "expected the norm linf or l2, in which sanitizers can be measured, got "
            f"{threat.norm}; choose one of these, or leave the sanitizers out"
        )
    detector = next((one.made() for one in chosen if one.kind == "detector"), None)
    if detector is not None:
        check_detection(threat)
        data.check_trainable()  # its threshold is set on validation images
        _check_calibration(detector, data)
    # One seed decides everything.
    settings = replace(training or _USUAL, seed=config.seed)
    step = _step(chosen, threat, settings)
    if step is not None or isinstance(model, str):
        data.check_trainable()
    if step is None and training is not None and not isinstance(model, str):
        raise UsageError(
            f"expected no training settings, as {' and '.join(one.label for one in chosen)} "
            "train nothing, got some; leave them out, or add a defense that trains"
        )
    thawed = isinstance(model, str) or any(one.requires_grad for one in model.parameters())
    if step is not None and not thawed:
        raise ModelError(
            "expected a model with something to train, got one without a parameter that "
            "requires a gradient; thaw what shall be trained (requires_grad_(True))"
        )
    _check_images(sanitizers, data)
    smoothing = _smoothing(chosen, step, sanitizers, config)
    if config.certify:
        _check_provable(model, sanitizers, smoothing, data, config)
    standard = step is None or isinstance(_innermost(step), StandardStep)
    return Planned(
        defenses=chosen,
        step=step,
        sanitizers=sanitizers,
        detector=detector,
        smoothing=smoothing,
        # The learning rate of an adversarial step is none for plain training.
        plain=settings if standard else replace(settings, lr=None),
        hard=replace(settings, label_smoothing=_USUAL.label_smoothing),
        device=place,
        notes=tuple(_notes(chosen, step, config)),
    )


def check_kinds(model: object, data: object, training: object) -> None:
    """Refuse what is not of the kind that was asked for.

    Raises:
        UsageError: with what was expected, what came, and what to do.
    """
    if not isinstance(model, (str, nn.Module)):
        raise UsageError(
            "expected a module that returns logits, or the name of an architecture, got "
            f"{_kind(model)}; see 'robustann list models' for the names"
        )
    if not isinstance(data, ImageData):
        why = "a dataset that can be split into three"
        if isinstance(data, Split):
            why = "one part of a dataset, but training, choosing and auditing need one each"
        elif isinstance(data, str):
            why = f"text; load_data('{data}') returns a dataset"
        raise UsageError(
            "expected data as the result of load_data or from_arrays, or a pair (images, labels), "
            f"got {_kind(data) if why.startswith('a dataset') else why}; give one of these"
        )
    if training is not None and not isinstance(training, TrainConfig):
        raise UsageError(
            f"expected training as a TrainConfig, got {_kind(training)}; write "
            "TrainConfig(epochs=5), or epochs=5 by itself"
        )


def untrained(model: nn.Module, data: ImageData) -> bool:
    """Whether a model guesses: its accuracy on validation images is about that of chance.

    >>> from robustann.data import load_data
    >>> untrained(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), load_data("digits"))
    True
    """
    split = data.validation
    count = min(len(split), _LOOKED_AT)
    chosen, right = torch.arange(count) * len(split) // count, 0
    for part in chosen.split(256):  # type: ignore[no-untyped-call]
        try:
            logits = predict_logits(model, split.images(part).cpu())
        except RuntimeError:
            # It does not fit the images; the audit says so, and what to do.
            return False
        right += int((logits.argmax(1) == split.labels[part]).sum())
    chance = 1 / data.num_classes
    return wilson_interval(right, count)[0] <= chance + _LUCK * (1 - chance)


def _completed(defenses: tuple[Defense, ...]) -> tuple[Defense, ...]:
    """With adversarial training where weights shall be perturbed and nothing says for what."""
    objectives = [one for one in defenses if one.kind == "objective"]
    if objectives or AdversarialWeightPerturbation.name not in [one.name for one in defenses]:
        return defenses
    return (parse_defense(AdversarialTraining.name), *defenses)


def _smoothing(
    defenses: Sequence[Defense],
    step: Any | None,
    sanitizers: Sequence[Sanitizer],
    config: AuditConfig,
) -> float | None:
    """The noise to vote under, where that is what shall be certified."""
    if not config.certify or config.threat.norm != "l2":
        return None
    inner = _innermost(step)
    if not isinstance(inner, NoiseTraining) or sanitizers:
        named = ", ".join(one.label for one in defenses)
        raise UsageError(
            "expected noise-training and no sanitizers to certify in l2, where the certificate is "
            f"of a vote under the noise trained with, got {named}; harden with "
            "'noise-training:sigma=0.25', or leave out certify"
        )
    return inner.sigma


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _step(defenses: Sequence[Defense], threat: ThreatModel, settings: TrainConfig) -> Any | None:
    """The training step that objective and wrappers make; None where nothing trains."""
    objectives = [one for one in defenses if one.kind == "objective"]
    wrappers = [one for one in defenses if one.kind == "wrapper"]
    if not objectives and not wrappers:
        return None
    smoothing = settings.label_smoothing
    step: Any = StandardStep(label_smoothing=smoothing)
    for one in objectives:
        if smoothing == _USUAL.label_smoothing:
            step = one.made(threat)
        elif "label_smoothing" in one.takes:
            step = one.made(threat, label_smoothing=smoothing)
        else:
            raise UsageError(
                f"label_smoothing: expected none among the training settings, as {one.label} takes "
                f"none there, got {smoothing}; leave it out, or give it where the step is made"
            )
        _check_threat(one.label, step, threat)
    # Clipping is outermost, whatever the order: it has the last word on the weights.
    for wrapper in sorted(wrappers, key=lambda one: one.name == "weight-clipping"):
        step = wrapper.made(step)
    return step


def _innermost(step: Any) -> Any:
    while isinstance(step, StepWrapper):
        step = step.step
    return step


def _check_threat(label: str, step: Any, threat: ThreatModel) -> None:
    own = getattr(_innermost(step), "threat", None)
    if isinstance(own, ThreatModel) and (own.norm, own.bounds) != (threat.norm, threat.bounds):
        raise UsageError(
            f"expected a step for {threat.norm} and bounds {threat.bounds}, in which the audits "
            f"are, got {label} for {own.norm} and bounds {own.bounds}; make it for the same, or "
            "audit in its own threat model"
        )


def _notes(defenses: Sequence[Defense], step: Any | None, config: AuditConfig) -> list[str]:
    """What the comparison cannot show, or shows under a condition."""
    said = []
    own = getattr(_innermost(step), "threat", None)
    if isinstance(own, ThreatModel) and own.eps != config.threat.eps:
        said.append(
            f"Trained for eps {own.eps_text}, audited at {config.threat.eps_text} "
            f"({config.threat.norm})."
        )
    against = {one.against: one.name for one in reversed(defenses)}
    if "bit errors" in against and not config.weights:
        said.append(
            f"{against['bit errors']} is for wrong bits in the weights, which these audits did not "
            "ask for: this comparison says nothing of what it is for (weights=True, --weights)."
        )
    noisy = isinstance(_innermost(step), NoiseTraining)
    if noisy and not (config.certify and config.threat.norm == "l2"):
        said.append(
            f"{NoiseTraining.name} is for a vote under noise, which these audits did not look at, "
            "but at the network without noise: this comparison says little of what it is for "
            "(certify=True, --certify, in l2)."
        )
    if "proofs" in against and not config.certify:
        said.append(
            f"{against['proofs']} is for robustness that can be proven, which these audits did not "
            "try: this comparison says little of what it is for (certify=True, --certify)."
        )
    return said


def _check_calibration(detector: Detector, data: ImageData) -> None:
    """A threshold takes clean images enough, and ones that the squeezers take."""
    least = math.ceil(1 / detector.fpr)
    if len(data.validation) < least:
        raise DataError(
            f"expected at least {least} validation images to set the threshold of "
            f"{detector.label}, got {len(data.validation)}; give more data, or a larger fpr"
        )
    _check_images(detector.squeezers, data)


def _check_images(sanitizers: Sequence[Sanitizer], data: ImageData) -> None:
    """Pass one image through the sanitizers: what they refuse, they refuse now."""
    image = data.test.images([0]).cpu()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for part in sanitizers:
            image = part(image)


def _check_provable(
    model: nn.Module | str,
    sanitizers: Sequence[Sanitizer],
    smoothing: float | None,
    data: ImageData,
    config: AuditConfig,
) -> None:
    if isinstance(model, str):
        model = create_model(model, class_names=data.class_names, shape=data.shape, seed=0)
    if sanitizers:
        model = Sanitized(model, *sanitizers).seen_through("surrogate")
    if smoothing is not None:
        model = Smoothed(model, smoothing)
    check_provable(model, data.test, config)
