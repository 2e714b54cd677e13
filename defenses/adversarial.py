"""Adversarial training."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.attacks.base import Attack
from robustann.attacks.engine import craft
from robustann.errors import UsageError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel


class AdversarialTraining:
    """Training on images that an attack has just crafted (Madry et al., ICLR 2018).

    Minimises the cross-entropy of the worst image that ``attack`` finds within ``threat``, as a
    step for :func:`robustann.training.train`. The attack works against the model in eval mode with
    frozen parameters; its last proposal counts, whether it fools the model or not. Validation,
    hence the choice of the epoch, uses the same attack at the full radius: by clean accuracy an
    early, unprotected epoch would win.

    Helps in the norm and up to the radius that it trains with. Known not to help in other norms
    (Tramer and Boneh, NeurIPS 2019: a model robust in one norm falls in another), beyond the
    radius, nor against faults in the weights. It costs clean accuracy, and with a weak attack the
    robustness may be apparent only (Wong et al., ICLR 2020: catastrophic overfitting with FGSM), so
    evaluate with a stronger attack than the one used here.

    Args:
        attack: what crafts; its hyper-parameters set the price, (steps + 1) times plain training.
        threat: untargeted; the radius to train for.
        label_smoothing: share of the target spread over all classes.
        mix: share of each batch that stays clean.
        eps_warmup_epochs: epochs over which the radius grows to the full one. From a large radius
            (MNIST, linf 0.3) training may never leave chance level. None takes a third of the
            epochs.

    Raises:
        UsageError: the attack does not know the norm, a targeted threat, or a value out of range.

    >>> from robustann.attacks import PGD
    >>> step = AdversarialTraining(PGD(steps=2), ThreatModel("linf", 0.1))
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> images, labels = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 2])
    >>> loss, logits = step(model, images, labels, random=SampleRandom.create(0, torch.arange(2)))
    >>> bool(loss > F.cross_entropy(model(images), labels))
    True
    """

    name: ClassVar[str] = "adversarial-training"
    # At the 0.1 of plain training, MNIST at linf 0.3 fell back to chance level.
    default_lr: ClassVar[float] = 0.05
    paper: ClassVar[str] = "https://arxiv.org/abs/1706.06083"
    helps: ClassVar[tuple[str, ...]] = (
        "white-box and black-box attacks in the norm trained with, up to the radius trained with",
    )
    limits: ClassVar[tuple[str, ...]] = (
        "attacks in other norms",
        "radii larger than the one trained with",
        "faults in the weights",
    )

    def __init__(
        self,
        attack: Attack,
        threat: ThreatModel,
        *,
        label_smoothing: float = 0.0,
        mix: float = 0.0,
        eps_warmup_epochs: int | None = None,
    ) -> None:
        attack.check(threat)
        if threat.targeted:
            raise UsageError(
                "expected an untargeted threat model for adversarial training, got a targeted one; "
                "leave targeted=False"
            )
        for what, value in (("label_smoothing", label_smoothing), ("mix", mix)):
            if not 0 <= value < 1:
                raise UsageError(f"{what}: expected a number from 0 to below 1, got {value!r}")
        if eps_warmup_epochs is not None and eps_warmup_epochs < 0:
            raise UsageError(
                f"eps_warmup_epochs: expected at least 0 or None, got {eps_warmup_epochs!r}"
            )
        self.attack = attack
        self.threat = threat
        self.label_smoothing = label_smoothing
        self.mix = mix
        self.eps_warmup_epochs = eps_warmup_epochs
        self._current = threat

    def parameters(self) -> dict[str, Any]:
        """The attack, the threat model and the settings, as JSON values."""
        return {
            "attack": self.attack.name,
            **{f"attack.{name}": value for name, value in self.attack.parameters.items()},
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "bounds": list(self.threat.bounds),
            "label_smoothing": self.label_smoothing,
            "mix": self.mix,
            "eps_warmup_epochs": self.eps_warmup_epochs,
        }

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the radius for this epoch, the first being 1.

        >>> from robustann.attacks import PGD
        >>> step = AdversarialTraining(PGD(), ThreatModel("linf", 0.3), eps_warmup_epochs=2)
        >>> step.begin_epoch(1, 10)
        >>> round(step.eps, 3)
        0.1
        """
        warmup = self.eps_warmup_epochs
        if warmup is None:
            warmup = epochs // 3
        share = min(1.0, epoch / (warmup + 1))
        self._current = self.threat.with_eps(self.threat.eps * share)

    @property
    def eps(self) -> float:
        """The radius of the present epoch."""
        return self._current.eps

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        """Return the loss on the crafted images and their logits (N, K).

        Args:
            model: in training mode; maps images in [0, 1] to logits.
            images: float (N, C, H, W) in [0, 1].
            labels: int64 (N,).
            random: one stream a sample.
        """
        clean = round(self.mix * len(images))
        rows = torch.arange(clean, len(images), device=images.device)
        crafted = craft(
            self.attack,
            model,
            images[clean:],
            labels[clean:],
            self._current,
            random=random.select(rows),
        )
        logits = model(torch.cat([images[:clean], crafted]))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return loss, logits

    def validation_logits(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> Tensor:
        """The logits (N, K) on images crafted at the full radius; arguments as above."""
        crafted = craft(self.attack, model, images, labels, self.threat, random=random)
        with torch.no_grad():
            logits: Tensor = model(crafted)
        return logits
