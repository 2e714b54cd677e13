"""Training for interval bounds."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.certificates import margin_bounds
from robustann.errors import UsageError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel


class IBPTraining:
    """Training on the worst logits that interval bounds allow (Gowal et al. 2018).

    Minimises ``kappa * CE(clean) + (1 - kappa) * CE(worst)``, as a step for
    :func:`robustann.training.train`. The worst logits come from
    :func:`robustann.certificates.margin_bounds` and hold for every image within ``threat``, so what
    gets small is a bound, which :func:`robustann.certificates.certify_linf` then proves. Over the
    ramp, the radius grows from 0 and ``kappa`` falls from 1, a little with each update, for from
    the full radius the bounds of a fresh network are too wide to learn from. Bounds see batch
    normalisation with its running statistics and no dropout. Validation, hence the choice of the
    epoch, is by certified accuracy at the full radius (by intervals, without allowance for
    rounding).

    Helps, provably, in linf up to the radius certified. Known to cost much clean accuracy, more
    than adversarial training, and to suit small networks only; a radius somewhat larger than the
    one to certify often certifies more.

    Args:
        threat: untargeted linf; the radius to train for.
        kappa: weight of the clean loss at the end, in [0, 1].
        warmup_epochs: epochs on clean images first; None takes a sixth of all. Without any,
            training may never leave chance level.
        ramp_epochs: epochs over which radius and kappa then reach their final values. None takes
            half of all.

    Raises:
        UsageError: another norm, a targeted threat, or a value out of range.

    >>> step = IBPTraining(ThreatModel("linf", 0.1), ramp_epochs=0)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> images, labels = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 2])
    >>> loss, logits = step(model, images, labels, random=SampleRandom.create(0, torch.arange(2)))
    >>> bool(loss > F.cross_entropy(model(images), labels))
    True
    """

    name: ClassVar[str] = "ibp-training"
    kind: ClassVar[str] = "objective"
    against: ClassVar[str] = "proofs"
    paper: ClassVar[str] = "https://arxiv.org/abs/1810.12715"
    # On the digits, at lower ones the ramp outran the training: down to chance without a warm-up,
    # fewer images certified with it.
    default_lr: ClassVar[float] = 0.2
    helps: ClassVar[tuple[str, ...]] = (
        "every attack in linf up to the radius trained with, on images that get certified",
    )
    limits: ClassVar[tuple[str, ...]] = (
        "attacks in other norms",
        "radii larger than the one trained with",
        "large networks, whose bounds grow with depth and width",
        "faults in the weights",
    )

    def __init__(
        self,
        threat: ThreatModel,
        *,
        kappa: float = 0.5,
        warmup_epochs: int | None = None,
        ramp_epochs: int | None = None,
    ) -> None:
        if threat.norm != "linf" or threat.targeted:
            raise UsageError(
                "expected an untargeted linf threat model for interval bounds, got "
                f"{'a targeted' if threat.targeted else 'an'} {threat.norm} one; name a linf radius"
            )
        if not 0 <= kappa <= 1:
            raise UsageError(f"kappa: expected a number from 0 to 1, got {kappa!r}")
        for what, value in (("warmup_epochs", warmup_epochs), ("ramp_epochs", ramp_epochs)):
            if value is not None and value < 0:
                raise UsageError(f"{what}: expected at least 0, got {value!r}")
        self.threat = threat
        self.kappa = kappa
        self.warmup_epochs = warmup_epochs
        self.ramp_epochs = ramp_epochs
        self._epochs = 0
        self._share = 1.0

    def parameters(self) -> dict[str, Any]:
        """The threat model and the settings, as JSON values."""
        return {
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "bounds": list(self.threat.bounds),
            "kappa": self.kappa,
            "warmup_epochs": self.warmup_epochs,
            "ramp_epochs": self.ramp_epochs,
        }

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set radius and kappa for the start of this epoch, the first being 1."""
        self._epochs = epochs
        self.begin_update(epoch - 1)

    def begin_update(self, done: float) -> None:
        """Set radius and kappa for an update, ``done`` epochs into the training.

        >>> step = IBPTraining(ThreatModel("linf", 0.3), warmup_epochs=1, ramp_epochs=2)
        >>> for done in (0.5, 1.0, 2.0, 2.5, 3.0):
        ...     step.begin_update(done)
        ...     print(round(step.eps, 3), round(step.current_kappa, 3))
        0.0 1.0
        0.0 1.0
        0.15 0.75
        0.225 0.625
        0.3 0.5
        """
        ramp = self._epochs / 2 if self.ramp_epochs is None else self.ramp_epochs
        warmup = self._epochs / 6 if self.warmup_epochs is None else self.warmup_epochs
        ramped = (done - warmup) / ramp if ramp else float(done >= warmup)
        self._share = min(1.0, max(0.0, ramped))

    @property
    def eps(self) -> float:
        """The present radius."""
        return self.threat.eps * self._share

    @property
    def current_kappa(self) -> float:
        """The present weight of the clean loss."""
        return 1 - (1 - self.kappa) * self._share

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the logits (N, K) of the clean images.

        Args:
            model: in training mode; maps images in [0, 1] to logits.
            images: float (N, C, H, W) in [0, 1].
            labels: int64 (N,).
            random: not used; there is nothing random about bounds.
        """
        logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        if self._share > 0:
            # In bfloat16 the bounds would round to nothing of use.
            with torch.autocast(images.device.type, enabled=False):
                worst = self._worst(model, images, labels, self.eps)
            worst_loss = F.cross_entropy(worst, labels)
            loss = self.current_kappa * loss + (1 - self.current_kappa) * worst_loss
        return loss, logits

    def validation_logits(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> Tensor:
        """The worst logits (N, K) at the full radius, less the label's, which is 0."""
        with torch.no_grad():
            return self._worst(model, images, labels, self.threat.eps)

    def _worst(self, model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        low, high = self.threat.bounds
        lower, upper = (images - eps).clamp(min=low), (images + eps).clamp(max=high)
        return -margin_bounds(model, lower, upper, labels, rounding=False)
