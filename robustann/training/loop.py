"""Training, from what was asked for to the saved result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn

from robustann import parallel
from robustann.data import ImageData
from robustann.errors import UsageError, unknown_name
from robustann.files import check_writable_folder, write_text
from robustann.memory import keep_freed
from robustann.models import ImageClassifier, create_model, resolve_device
from robustann.progress import progress_bar
from robustann.training.batches import channel_statistics
from robustann.training.checkpoint import load_checkpoint, save_checkpoint
from robustann.training.config import TrainConfig
from robustann.training.randomness import global_state_kept
from robustann.training.result import TrainResult
from robustann.training.run import Run
from robustann.training.sharding import spread
from robustann.training.steps import StandardStep, TrainingStep

M = TypeVar("M", bound=nn.Module)


@overload
def train(
    model: str,
    data: ImageData,
    *,
    config: TrainConfig | None = ...,
    step: TrainingStep | None = ...,
    device: str | torch.device | None = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    keep_checkpoint: bool = ...,
    log: str | os.PathLike[str] | None = ...,
    resume: bool = ...,
    progress: bool = ...,
    **overrides: Any,
) -> TrainResult[ImageClassifier]: ...


@overload
def train(
    model: M,
    data: ImageData,
    *,
    config: TrainConfig | None = ...,
    step: TrainingStep | None = ...,
    device: str | torch.device | None = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    keep_checkpoint: bool = ...,
    log: str | os.PathLike[str] | None = ...,
    resume: bool = ...,
    progress: bool = ...,
    **overrides: Any,
) -> TrainResult[M]: ...


def train(
    model: str | nn.Module,
    data: ImageData,
    *,
    config: TrainConfig | None = None,
    step: TrainingStep | None = None,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    keep_checkpoint: bool = False,
    log: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    **overrides: Any,
) -> TrainResult[Any]:
    """Train on ``data.train``, choose the epoch on ``data.validation``, score on ``data.test``.

    Args:
        model: an architecture's name, built with the data's classes and the training images' mean
            and standard deviation; or a module that takes images in [0, 1] and returns logits,
            which is trained in place and stays on ``device``. Parts of it that come in eval mode
            and all of whose parameters are frozen (``requires_grad`` is False), such as batch
            normalisation whose statistics are to stay, remain in eval mode; so does what has no
            parameters (dropout) if it, or what it is part of, was put there on purpose.
        data: see :func:`robustann.data.load_data`. The test part is read once, at the end.
        config: settings; ``overrides`` replace single ones (``epochs=3, seed=1``).
        step: what a batch contributes; the default is cross-entropy on clean images.
        device: where to train; None takes the fastest there is.
        checkpoint: file to write after each epoch; removed once training has finished.
        keep_checkpoint: do not remove it; for callers who remove it after saving the model.
        log: file with one JSON object an epoch.
        resume: go on from ``checkpoint`` if it is there, else start afresh. A module must come with
            the weights that it had at the first start: load it, or seed what makes it.
        progress: show a bar on stderr, if that is a terminal.

    Launched by ``torchrun``, all processes call this alike and train one model: each takes its
    share of every batch (``batch_size`` stays the images of all together), gradients are averaged,
    and the first one writes checkpoint and log, which all of them must see. Each returns the same.
    Started again (``--max-restarts``), they go on from the checkpoint.

    The caller's random state is the same afterwards as before.

    Raises:
        UsageError: a wrong setting; or a checkpoint of other settings, data or model.
        DataError: there are test images alone.
        ModelError: the model does not fit the data, or has nothing to train.
        RobustannError: a damaged checkpoint; a loss that is not finite.

    >>> from robustann.data import load_data
    >>> result = train("small-cnn", load_data("digits"), epochs=1)
    >>> result.epochs_run, result.metrics["accuracy"] > 0.2, result.model.training
    (1, True, False)
    """
    keep_freed()
    config = _configured(config, overrides, data, step)
    data.check_trainable()
    if resume and checkpoint is None:
        raise UsageError("resume: expected a checkpoint file too, got none; give checkpoint=PATH")
    for path in (checkpoint, log):
        if path is not None:
            check_writable_folder(Path(path).parent)
    place = resolve_device(None if device is None else str(device))
    launched = parallel.join(place)
    # Of several processes one writes.
    writes = launched.rank == 0
    resume = resume or (launched.restarts > 0 and checkpoint is not None)
    data = data.to(place)
    with global_state_kept(place):
        module = _built(model, data, config) if isinstance(model, str) else model
        step = step or StandardStep(label_smoothing=config.label_smoothing)
        architecture = model if isinstance(model, str) else type(model).__qualname__
        original = module
        if config.fsdp:
            _check_spread(step)
            # The whole stays on the CPU, and gets what was learned.
            module = spread(module.cpu())
        run = Run(module, architecture, data, config, step, place, original)
        identity = run.identity() if checkpoint is not None else {}
        found = resume and checkpoint is not None and Path(checkpoint).exists()
        if parallel.agreed(found) and checkpoint is not None:
            run.history = load_checkpoint(Path(checkpoint), identity, run.restore)
        if log is not None and writes:
            # Written anew from the history: lines of epochs that the checkpoint lacks drop out.
            write_text(log, "".join(json.dumps(row) + "\n" for row in run.history))
        total = (run.epochs - len(run.history)) * run.steps
        with progress_bar(total, wanted=progress and writes, unit="steps") as advance:
            while not run.finished:
                run.epoch(advance)
                # All of them: each knows a part of it.
                state = run.state() if checkpoint is not None else {}
                if checkpoint is not None and writes:
                    save_checkpoint(Path(checkpoint), state, identity, run.history)
                if log is not None and writes:
                    with Path(log).open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(run.history[-1]) + "\n")
        result = run.result()
    if checkpoint is not None and not keep_checkpoint and writes:
        Path(checkpoint).unlink(missing_ok=True)
    return result


def _configured(
    config: TrainConfig | None,
    overrides: Mapping[str, Any],
    data: ImageData,
    step: TrainingStep | None,
) -> TrainConfig:
    if not isinstance(data, ImageData):
        raise UsageError(
            f"data: expected an ImageData, got {type(data).__name__}; load_data(NAME) returns one"
        )
    known = [field.name for field in fields(TrainConfig)]
    for name in overrides:
        if name not in known:
            raise unknown_name("training setting", name, known)
    config = replace(config or TrainConfig(), **overrides)
    if step is not None and config.label_smoothing != TrainConfig.label_smoothing:
        raise UsageError(
            f"label_smoothing: expected it to be set on the given step '{step.name}', "
            f"got {config.label_smoothing} among the settings; give it where the step is made"
        )
    return config


def _check_spread(step: TrainingStep) -> None:
    """Refuse what a spread model cannot bear."""
    if not parallel.together():
        raise UsageError(
            "fsdp: expected several processes, got one; launch with torchrun --nproc-per-node"
        )
    for hook in ("abandon", "after_update"):
        if hasattr(step, hook):
            raise UsageError(
                f"fsdp: expected a step that leaves the weights to the optimizer, got "
                f"'{step.name}', which changes them itself; train without fsdp"
            )


def _built(architecture: str, data: ImageData, config: TrainConfig) -> ImageClassifier:
    mean, std = channel_statistics(data.train, config.batch_size)
    return create_model(
        architecture,
        class_names=data.class_names,
        shape=data.shape,
        mean=mean,
        std=std,
        seed=config.seed,
    )
