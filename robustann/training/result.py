"""What training returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class TrainResult(Generic[M]):
    """A trained model and what is known about it.

    Attributes:
        model: with the best epoch's weights, in eval mode.
        metrics: on the test part ``accuracy``, ``accuracy_interval`` (95 %), macro ``precision``,
            ``recall``, ``f1`` and ``test_size``; ``validation_accuracy`` of the best epoch.
        history: one row an epoch, as in the log.
        best_epoch: the epoch with the highest validation accuracy, the later one of equals; the
            first is 1.
        epochs_run: epochs trained, those before a resume included.
        seconds: time spent in them.
        training: settings and facts as JSON values, for the file beside a saved model; among them
            ``last``, what validation said of the last epoch, and ``events``, what the watch for
            catastrophic overfitting did.
        last_weights: state dict of the last epoch, by which robust overfitting shows (Rice et al.,
            ICML 2020): the best epoch's robust accuracy is often above the last one's.

    >>> TrainResult(model=nn.Identity(), metrics={"accuracy": 0.99}, history=[], best_epoch=3,
    ...             epochs_run=5, seconds=2.5, training={}).metrics["accuracy"]
    0.99
    """

    model: M
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    best_epoch: int
    epochs_run: int
    seconds: float
    training: dict[str, Any]
    last_weights: dict[str, Tensor] = field(default_factory=dict, repr=False)
