"""The verbs of the package, put together from the floors below: attack, audit and harden.

(``load_data``, ``load_model`` and ``train`` need nothing put together; they come straight from
their floors.)
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from robustann.attacks import Attack, AttackResult, parse_attack
from robustann.attacks import engine as _engine
from robustann.auditing import Audit, AuditConfig
from robustann.auditing import forget as _forget
from robustann.data import (
    ImageData,
    Split,
    from_arrays,
    from_dataset,
    renumbering,
    tensor_split,
)
from robustann.errors import UsageError, unknown_name
from robustann.hardening import HardenResult
from robustann.hardening.harden import harden as _harden
from robustann.hardening.planning import check_kinds
from robustann.launch import world
from robustann.reports.explain import explain as _explain
from robustann.reports.explain.methods import check_methods
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel
from robustann.training import TrainConfig

if TYPE_CHECKING:
    from robustann.results import AuditResult


def attack(
    attack: Attack | str,
    model: nn.Module,
    x: Any,
    y: Any,
    threat: ThreatModel,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> AttackResult:
    """Attack images and judge the outcome.

    Args:
        attack: an attack such as ``PGD(steps=40)``, or its text form ``"pgd:steps=40"``.
        model: maps images in [0, 1] to logits. It is left exactly as it was.
        x: images (N, C, H, W) in [0, 1], tensor or array.
        y: N integer labels: the true classes, or the wanted ones of a targeted threat model.
        threat: what the attacker may do.
        seed: of everything random; the same seed gives the same result on the CPU, whatever the
            batch size.
        batch_size: images a batch.

    Returns:
        One row a sample, in the order of ``x``.

    Raises:
        UsageError: an unknown attack, or one that does not support the norm.
        DataError: images or labels are unfit.
        ModelError: the model's output is unfit or carries no gradient.

    >>> from robustann.attacks import PGD
    >>> from robustann.threat import ThreatModel
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> attack(PGD(steps=5), model, x, y, ThreatModel("linf", 0.1)).adversarial.shape
    torch.Size([6, 1, 2, 2])
    """
    chosen = parse_attack(attack) if isinstance(attack, str) else attack
    split = tensor_split(x, y)
    parts = []
    for positions in torch.split(torch.arange(len(split)), batch_size):
        parts.append(
            _engine.run(
                chosen,
                model,
                split.images(positions),
                split.labels[positions],
                threat,
                random=SampleRandom.create(seed, positions),
            )
        )
    return AttackResult.concatenate(parts)


def audit(
    model: nn.Module,
    data: Any,
    threat: ThreatModel,
    preset: str = "standard",
    *,
    attacks: Sequence[Attack | str] | None = None,
    seed: int = 0,
    max_samples: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    budget: int | None = None,
    minutes: float | None = None,
    trust: bool = True,
    curve: bool = True,
    explain: bool = True,
    attributions: Sequence[str] = (),
    weights: bool = False,
    corruptions: bool = False,
    certify: bool = False,
    precision: Literal["float32", "bf16", "fp16"] = "float32",
    channels_last: bool = False,
    compile: bool = False,  # noqa: A002
    tune: bool = False,
    surrogate: nn.Module | None = None,
    class_names: Sequence[str] | None = None,
    state: str | os.PathLike[str] | None = None,
    shared: bool | None = None,
    progress: bool = False,
    model_name: str | None = None,
    data_name: str | None = None,
    command: str = "robustann.audit(...)",
) -> AuditResult:
    """Attack a model in every way of a preset and report what it withstands.

    Args:
        model: maps images in [0, 1] to logits. It is left exactly as it was.
        data: a dataset of :func:`robustann.load_data` (its test part is used), one part of it, a
            PyTorch Dataset of (image, label), or a pair of images (N, C, H, W) in [0, 1] and N
            integer labels. Classes are matched by name where model and data both have names.
        threat: what the attacker may do; untargeted.
        preset: ``quick``, ``standard``, ``thorough`` or ``autoattack``: which attacks, how much
            effort.
        attacks: run these instead of the preset's, given as objects or as text.
        seed: of everything random.
        max_samples: audit so many samples, drawn at random, the same for every seed.
        batch_size: images a batch; ``auto`` tries. Not the result, only time and memory, hang on
            it.
        budget: propagations that an image may cost in all attacks together; None means as many as
            the preset takes.
        minutes: how long the audit may take, as an estimate from one timed batch; attributions come
            on top.
        trust: whether to check that the evaluation can be believed (``result.findings``,
            ``result.believable``), and to adapt the attacks to a model that would mislead them.
        curve: whether to measure robust accuracy at other eps too.
        explain: whether to compute attributions.
        attributions: further methods: ``input-x-gradient``, ``smoothgrad``, ``gradient-shap``,
            ``occlusion``.
        weights: whether to ask too what happens if bits of the stored weights are wrong
            (``result.weights``).
        corruptions: whether to measure accuracy under common corruptions too, five kinds at five
            severities (``result.corruptions``): a control, never part of robust accuracy.
        certify: whether to prove too what no attack can break (``result.certificate``): in linf by
            bounds through the layers; in l2 by smoothing, of a model wrapped as
            ``robustann.certificates.Smoothed(model, sigma)``. Refused at once where nothing can be
            proven.
        precision: ``bf16`` or ``fp16`` lets attacks search under autocast; what they find is judged
            in float32.
        channels_last: run attacks in this memory format.
        compile: run attacks through ``torch.compile``.
        tune: time a batch with bf16, with fp16 on an accelerator, and channels last first, and use
            what is more than 5 % faster; ``result.execution.tuned`` tells. Results then hang on the
            machine. It never compiles.
        surrogate: another model for the same classes, as an attacker may have who does not have
            this one: what gradient attacks find on it is tried on ``model`` too.
        class_names: of the model's outputs, in their order, where it does not say.
        state: folder for the batches that are done. Stopped, even killed, the audit goes on from
            there when it is called again with the same arguments; the folder is removed at the
            end.
        shared: whether other processes that make the same call with the same ``state`` take part,
            on one machine or several that see the folder. Each gets the same result, which stays
            in the folder. None means: where ``torchrun`` launched several, and there is ``state``.
        progress: show a bar on stderr if that is a terminal.
        model_name: shown in the report, as are ``data_name`` and ``command``.

    Raises:
        UsageError: an option is unfit.
        DataError: the data is unfit for this model.
        ModelError: the model's output is unfit or carries no gradient.

    >>> from robustann.threat import ThreatModel
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> pair = torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64)
    >>> audit(model, pair, ThreatModel("linf", 0.1), preset="quick").n
    6
    """
    config = AuditConfig(
        threat=threat,
        preset=preset,
        attacks=None
        if attacks is None
        else tuple(parse_attack(one) if isinstance(one, str) else one for one in attacks),
        seed=seed,
        max_samples=max_samples,
        batch_size=batch_size,
        budget=budget,
        minutes=minutes,
        trust=trust,
        curve=curve,
        explain=explain,
        attributions=check_methods(attributions),
        weights=weights,
        corruptions=corruptions,
        certify=certify,
        precision=precision,
        channels_last=channels_last,
        compile=compile,
        tune=tune,
    )
    split, names, found_name = _resolve(model, data, class_names)
    folder = None if state is None else Path(state)
    if shared is None:
        shared = folder is not None and world().size > 1
    result = Audit(config).run(
        model,
        split,
        class_names=names,
        model_name=model_name or _name(model),
        data_name=data_name or found_name,
        explainer=partial(_explain, more=config.attributions),
        surrogate=surrogate,
        progress=progress,
        command=command,
        state=folder,
        shared=shared,
    )
    if folder is not None and not shared:
        _forget(folder)
    return result


def harden(
    model: nn.Module | str,
    data: ImageData | tuple[Any, Any],
    threat: ThreatModel | None = None,
    defenses: Any = ("adversarial-training",),
    preset: str = "standard",
    *,
    training: TrainConfig | None = None,
    seed: int | None = None,
    max_samples: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    budget: int | None = None,
    trust: bool = True,
    curve: bool = True,
    explain: bool = True,
    weights: bool = False,
    certify: bool = False,
    device: str | torch.device | None = None,
    progress: bool = False,
    model_name: str | None = None,
    state: str | os.PathLike[str] | None = None,
    command: str = "robustann.harden(...)",
    notify: Callable[[str], None] = lambda message: None,
    **settings: Any,
) -> HardenResult:
    """Harden a model, and audit it before and after: same samples, same seeds, through the defense.

    Args:
        model: a module that maps images in [0, 1] to logits, whose copy is trained on from where it
            stands; or the name of an architecture, which is trained from scratch, once plainly to
            compare with and once with the defenses. A module that only guesses is trained twice
            too.
        data: its training part trains, its validation part chooses, its test part is audited; see
            :func:`robustann.load_data` and :func:`robustann.from_arrays`, which a pair (images,
            labels) goes through.
        threat: what the attacker may do, in training and in the audits; None takes linf 8/255.
        defenses: names with options such as ``"trades:beta=6"``, ``"weight-clipping:w_max=0.1"`` or
            ``"jpeg:quality=75"`` (``robustann list defenses`` has them), training steps, or
            sanitizers, one or a list: at most one training objective, any wrappers, any sanitizers
            in order, a detector (``"feature-squeezing"``).
        preset: of the audits.
        training: how to train; ``settings`` replace single ones (``epochs=5, lr=0.01``).
        seed: of everything random; None takes that of ``training``, else 0.
        max_samples: audit so many samples of the test part.
        batch_size: images a batch of the audits.
        budget: propagations that an image may cost in the attacks of the audits.
        trust: whether the audits check that they can be believed.
        curve: whether to measure robust accuracy at other eps too.
        explain: whether to compute attributions.
        weights: whether both audits ask too what happens if bits of the stored weights are wrong:
            what ``weight-clipping`` and ``bit-error-training`` are for.
        certify: whether both audits prove too what no attack can break: what ``ibp-training`` is
            for in linf, and in l2 ``noise-training``, whose network then votes under its noise.
        device: where everything runs.
        progress: show bars on stderr if that is a terminal.
        model_name: shown in the reports, as is ``command``.
        state: folder for what is done. Stopped, even killed, hardening goes on from there when it
            is called again with the same arguments; ``result.save`` empties it.
        notify: told in words what begins.

    Returns:
        The model, both audits, and what changed; ``result.save(folder)`` writes them. The report
        of ``result.after`` holds the comparison.

    Raises:
        UsageError: a wrong name or option, or defenses that do not go together.
        DataError: the data is unfit for this model.
        ModelError: the model does not fit the data, or has nothing to train.

    >>> from robustann.data import load_data
    >>> result = harden(
    ...     "small-cnn", load_data("digits"), defenses=["bit-depth:bits=3"], preset="quick",
    ...     epochs=1, max_samples=20, explain=False, curve=False
    ... )
    >>> [stage.name for stage in result.comparison.stages]
    ['before', 'after']
    """
    if threat is not None and not isinstance(threat, ThreatModel):
        raise UsageError(
            f"expected threat as a ThreatModel, got {type(threat).__name__}; write "
            'harden(model, data, ThreatModel("linf", 0.1), defenses)'
        )
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in settings:
        if name not in known:
            raise unknown_name("training setting", name, known)
    whole = from_arrays(*data) if isinstance(data, (tuple, list)) and len(data) == 2 else data
    check_kinds(model, whole, training)
    seed = _one_seed(seed, training)
    config = AuditConfig(
        threat=threat or ThreatModel("linf", 8 / 255),
        preset=preset,
        seed=seed,
        max_samples=max_samples,
        batch_size=batch_size,
        budget=budget,
        trust=trust,
        curve=curve,
        explain=explain,
        weights=weights,
        certify=certify,
    )
    if settings:
        training = dataclasses.replace(training or TrainConfig(), **settings)
    return _harden(
        model,
        whole,
        config,
        defenses if isinstance(defenses, (tuple, list)) else (defenses,),
        training=training,
        device=device,
        explainer=_explain,
        model_name=model_name,
        progress=progress,
        command=command,
        notify=notify,
        state=None if state is None else Path(state),
    )


def _one_seed(seed: int | None, training: TrainConfig | None) -> int:
    """The seed of everything, from the argument and the training settings."""
    own = TrainConfig.seed if training is None else training.seed
    if seed is None:
        return own
    if own not in (TrainConfig.seed, seed):
        raise UsageError(
            f"expected one seed, got seed={seed} and training with seed={own}; give it once"
        )
    return seed


def _resolve(
    model: nn.Module, data: Any, names: Sequence[str] | None
) -> tuple[Split, Sequence[str], str]:
    """The part to audit, the class names, and what to call the data."""
    own: Sequence[str] | None = getattr(getattr(model, "spec", None), "class_names", None)
    if isinstance(data, ImageData):
        return _in_order(data.test, data.class_names, names or own, data.name)
    if isinstance(data, Split):
        split = data
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        split = tensor_split(*data)
    elif isinstance(data, torch.utils.data.Dataset):
        split = from_dataset(data)
        classes = getattr(data, "classes", None)
        if classes and all(isinstance(name, str) for name in classes):
            return _in_order(split, classes, names or own, type(data).__name__)
    else:
        raise UsageError(
            "expected data as the result of load_data, one part of it, a PyTorch Dataset, or a "
            f"pair (images, labels), got {type(data).__name__}; build a pair of tensors"
        )
    names = names or own
    if names is None:
        logits: Tensor = _engine.predict_logits(model, split.images([0]))
        names = [str(number) for number in range(logits.shape[1])]
    return split, names, "images"


def _in_order(
    split: Split, theirs: Sequence[str], names: Sequence[str] | None, called: str
) -> tuple[Split, Sequence[str], str]:
    """The part with its classes numbered as the model's are."""
    if names is None:
        return split, theirs, called
    numbers, chosen, told = renumbering(theirs, names)
    if numbers is None:
        return split, chosen, called
    warnings.warn(told, stacklevel=4)
    return split.relabelled(numbers[split.labels]), chosen, called


def _name(model: nn.Module) -> str:
    arch = getattr(getattr(model, "spec", None), "arch", None)
    return type(model).__name__ if arch is None else str(arch)
