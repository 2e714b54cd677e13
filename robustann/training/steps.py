"""What one batch contributes to training: the part that a defense replaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from robustann.rng import SampleRandom


class TrainingStep(Protocol):
    """What one batch contributes; any object of this form will do.

    A step may also have these, found by name:

    - ``default_lr``, the peak learning rate where the settings name none.
    - ``begin_epoch(epoch, epochs)``, called before each epoch (the first is 1), a resumed one too.
    - ``begin_update(done)``, called before each update with the epochs done by then: halfway
      through the third 2.5.
    - ``after_backward(model)``, called when the gradients of the loss lie in the parameters, and
      before they are clipped or used: to take back what the step did to the weights, or to read
      the gradient of something else that the loss depends on.
    - ``abandon(model)``, called instead where the step, its backward pass or ``after_backward``
      raised anything, an interrupt too: to take back what it did to the weights. A step that has it
      is taken to move them.
    - ``after_update(model)``, called after each update of the weights and before their moving
      average sees them: to project them.
    - ``replays``, how many updates in a row each batch is used for; 1 without it. The epochs stay
      passes over the data, so each then holds that many times the updates.
    - ``validation_logits(model, images, labels, *, random)``, the logits that a step wants to be
      judged by, such as those on crafted images. The best epoch is then the one with the highest
      accuracy of these, logged as ``validation_robust_accuracy`` beside the plain one. They are
      asked for on at most 2000 validation images, spread evenly.
    - ``watched`` (with ``validation_logits`` and ``safer``), whether the step can fall into
      catastrophic overfitting. If it is true, one training image in 20, at most 256, is set aside
      and judged after each epoch (``watch_accuracy``). Where that accuracy falls 20 points below
      the best so far, the epoch is undone, weights, average, momentum and the step's state, and
      ``safer()`` makes the step harder to overfit to and returns, for the log, what it changed.
    - ``state()`` and ``restore(state)``, what the step carries from one update to another beside
      its parameters, as tensors and plain values in dicts and lists. It goes into the checkpoint;
      a resumed run ends like one that was not stopped only if nothing is missing. Tensors may
      come back on another device.

    ``model`` is the bare module, whatever compiles or averages it.

    >>> from robustann.training import StandardStep
    >>> step: TrainingStep = StandardStep()
    >>> step.name
    'standard'
    """

    @property
    def name(self) -> str:
        """Name of the step, for the log and the file beside a saved model."""

    def parameters(self) -> Mapping[str, Any]:
        """Everything that the step's result depends on, as JSON values."""

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        """Return the scalar loss and the logits (N, K) of what was trained on, in order.

        ``images`` (N, C, H, W) are in [0, 1]; ``random`` yields numbers that depend on the seed,
        the epoch and each sample alone. The model is in training mode and must be left so.
        """


@dataclass(frozen=True, kw_only=True)
class StandardStep:
    """Cross-entropy on the images as they are.

    >>> import torch
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 2])
    >>> random = SampleRandom.create(0, torch.arange(2))
    >>> loss, logits = StandardStep()(model, images, labels, random=random)
    >>> loss.ndim, tuple(logits.shape)
    (0, (2, 3))
    """

    name: ClassVar[str] = "standard"

    label_smoothing: float = 0.0

    def parameters(self) -> dict[str, Any]:
        """The label smoothing."""
        return {"label_smoothing": self.label_smoothing}

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the logits; see :class:`TrainingStep`."""
        logits = model(images)
        # Under bf16 autocast the logits are too coarse for a logarithm.
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return loss, logits
