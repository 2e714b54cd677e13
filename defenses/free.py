"""Adversarial training that gets its images for free."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.attacks.base import Attack, at_least
from robustann.defenses.adversarial import check_share
from robustann.defenses.steps import AdversarialStep
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel

# An image range that no perturbation leaves.
_UNBOUNDED = (-1e4, 1e4)


class FreeAdversarialTraining(AdversarialStep):
    """Each batch replayed, one backward pass for both weights and images (Shafahi et al., 2019).

    The perturbation takes a steepest step of a whole radius after each update, by the gradient
    that the update had computed anyway, and is carried over to the next batch. An update costs what
    it costs in plain training; an epoch holds ``replays`` times as many, so divide the epochs by
    it. The images are those of the training mode, not of the eval mode (they share its backward
    pass). Training is watched for catastrophic overfitting; after a collapse the step is halved.

    Args:
        threat: untargeted; the radius to train for.
        replays: updates in a row from one batch; the paper takes 8 for CIFAR-10, 4 for ImageNet.
        label_smoothing: share of the target spread over all classes.
        eps_warmup_epochs, validation_attack, watch: see
            :class:`~robustann.defenses.AdversarialTraining`.

    >>> step = FreeAdversarialTraining(ThreatModel("linf", 0.1), replays=4)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> images, labels = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 2])
    >>> random = SampleRandom.create(0, torch.arange(2))
    >>> first, _ = step(model, images, labels, random=random)
    >>> first.backward()
    >>> step.after_backward(model)
    >>> bool(step(model, images, labels, random=random)[0] > first)
    True
    """

    name: ClassVar[str] = "free-adversarial-training"
    paper: ClassVar[str] = "https://arxiv.org/abs/1904.12843"
    limits: ClassVar[tuple[str, ...]] = (
        *AdversarialStep.limits,
        "many replays: the weights forget other batches meanwhile",
    )

    def __init__(
        self,
        threat: ThreatModel,
        *,
        replays: int = 8,
        label_smoothing: float = 0.0,
        eps_warmup_epochs: int | None = None,
        validation_attack: Attack | None = None,
        watch: bool = True,
    ) -> None:
        super().__init__(
            threat, eps_warmup_epochs=eps_warmup_epochs, validation_attack=validation_attack
        )
        at_least("replays", replays, 1)
        check_share("label_smoothing", label_smoothing)
        self.replays = replays
        self.label_smoothing = label_smoothing
        self.watched = watch
        self._share = 1.0
        self._shift: Tensor | None = None
        self._shown: Tensor | None = None

    def parameters(self) -> dict[str, Any]:
        """The threat model and the settings, as JSON values."""
        return {
            **super().parameters(),
            "replays": self.replays,
            "label_smoothing": self.label_smoothing,
            "watched": self.watched,
        }

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the radius for this epoch, the first being 1, which begins without perturbation."""
        super().begin_epoch(epoch, epochs)
        if epoch == 1:
            self._shift, self._share = None, 1.0

    def crafted(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> Tensor:
        """The images under the perturbation so far, requiring the gradient that moves it on."""
        if self._shift is None or self._shift.shape != images.shape:
            self._shift = torch.zeros_like(images)
        self._shift = self._shift.to(images.device)
        # The gradient is that of the image cut to its range, not of the cut: on pixels that the
        # cut holds at 0 the perturbation would never come back.
        shown = self._current.project(images + self._shift, images).detach().requires_grad_()
        self._shown = shown
        return shown

    def loss(
        self, model: nn.Module, images: Tensor, crafted: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The cross-entropy on the perturbed images, and their logits (N, K)."""
        logits = model(crafted)
        # Under bf16 autocast the logits are too coarse for a logarithm.
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return loss, logits

    def after_backward(self, model: nn.Module) -> None:
        """Move the perturbation on, by the gradient of the images."""
        shown, shift = self._shown, self._shift
        if shown is None or shift is None or shown.grad is None:
            return
        size = self._share * self._current.eps
        moved = shift + self._current.steepest_step(shown.grad, size)
        threat = self._current
        ball = ThreatModel(threat.norm, threat.eps, bounds=_UNBOUNDED)
        self._shift = ball.project(moved, torch.zeros_like(moved))
        self._shown = None

    def safer(self) -> str:
        """Go on with steps of half the length; say so."""
        self._share /= 2
        return f"from now on with steps of {self._share:g} eps"

    def state(self) -> dict[str, Any]:
        """The perturbation, and the length of its steps in multiples of eps."""
        return {"shift": self._shift, "share": self._share}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` returned."""
        self._shift, self._share = state["shift"], state["share"]
