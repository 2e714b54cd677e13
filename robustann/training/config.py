"""The settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from robustann.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; the defaults suit digits, MNIST and CIFAR-10.

    Attributes:
        epochs: passes over the training part; None chooses by the data (MNIST 3, else 30).
        batch_size: images a step; an incomplete last batch is left out of that epoch.
        lr: peak of the one-cycle learning rate; None takes the step's, else 0.1.
        momentum: Nesterov momentum of SGD.
        weight_decay: L2 penalty, on neither biases nor the parameters of normalisation layers.
        label_smoothing: share of the target spread over all classes, for the standard step; another
            step carries its own.
        ema: decay a step of the weights' moving average, which is then what gets validated and
            returned; 0 turns it off.
        patience: stop after this many epochs without a better validation accuracy; None never does.
        precision: ``float32``, or ``bf16`` for autocast in training (evaluation stays float32).
        channels_last: memory format in which convolutions run.
        compile: run the training steps through ``torch.compile``.
        seed: of the initial weights, the order, the augmentation and dropout.
        clip: largest norm of the gradient; None leaves it alone.
        fsdp: spread the parameters over the processes that ``torchrun`` launched, for models that
            do not fit on one device; without ``ema`` and ``compile``.

    Raises:
        UsageError: a value out of its range.

    >>> TrainConfig(epochs=3).batch_size
    128
    >>> TrainConfig(lr=-1)
    Traceback (most recent call last):
    ...
    robustann.errors.UsageError: lr: expected a positive number or None, got -1
    """

    epochs: int | None = None
    batch_size: int = 128
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    ema: float = 0.99
    patience: int | None = None
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    clip: float | None = None
    fsdp: bool = False

    def __post_init__(self) -> None:
        for name, (holds, expected) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise UsageError(f"{name}: expected {expected}, got {value!r}")
        if self.fsdp and (self.ema or self.compile):
            raise UsageError(
                "fsdp: expected neither a moving average of the weights nor compile, got "
                f"ema={self.ema} and compile={self.compile}; add ema=0 (--ema 0), leave out compile"
            )


def _number(value: object, least: float, below: float = math.inf) -> bool:
    # NaN fails the comparison; True is an int to Python but no number to a caller.
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < below


def _positive(value: object) -> bool:
    return _number(value, 0.0) and value != 0


def _integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_SHARE = (lambda v: _number(v, 0, 1), "a number from 0 to below 1")
_SWITCH = (lambda v: isinstance(v, bool), "True or False")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda v: v is None or _integer(v, 1), "a positive integer or None"),
    "batch_size": (lambda v: _integer(v, 1), "a positive integer"),
    "lr": (lambda v: v is None or _positive(v), "a positive number or None"),
    "momentum": (lambda v: _positive(v) and v < 1, "a number above 0 and below 1"),
    "weight_decay": (lambda v: _number(v, 0), "a number of at least 0"),
    "label_smoothing": _SHARE,
    "ema": _SHARE,
    "patience": (lambda v: v is None or _integer(v, 1), "a positive integer or None"),
    "precision": (lambda v: v in ("float32", "bf16"), "'float32' or 'bf16'"),
    "channels_last": _SWITCH,
    "compile": _SWITCH,
    "seed": (lambda v: _integer(v, 0), "an integer of at least 0"),
    "clip": (lambda v: v is None or _positive(v), "a positive number or None"),
    "fsdp": _SWITCH,
}
