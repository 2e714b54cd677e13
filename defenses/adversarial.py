"""Adversarial training."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.attacks.base import Attack
from robustann.defenses.steps import AttackStep
from robustann.errors import UsageError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel


class AdversarialTraining(AttackStep):
    """Training on images that an attack has just crafted (Madry et al., ICLR 2018).

    Minimises the cross-entropy of the worst image that ``attack`` finds within ``threat``, as a
    step for :func:`robustann.training.train`. The attack works against the model in eval mode with
    frozen parameters; its last proposal counts, whether it fools the model or not. Validation,
    hence the choice of the epoch, is at the full radius.

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
        validation_attack: what validation uses; None takes ``attack`` if it has ten steps or more,
            else ten steps of PGD.
        watch: look out for catastrophic overfitting if ``attack`` takes a single gradient step.

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
    paper: ClassVar[str] = "https://arxiv.org/abs/1706.06083"

    def __init__(
        self,
        attack: Attack,
        threat: ThreatModel,
        *,
        label_smoothing: float = 0.0,
        mix: float = 0.0,
        eps_warmup_epochs: int | None = None,
        validation_attack: Attack | None = None,
        watch: bool = True,
    ) -> None:
        super().__init__(
            attack,
            threat,
            eps_warmup_epochs=eps_warmup_epochs,
            validation_attack=validation_attack,
            watch=watch,
        )
        for what, value in (("label_smoothing", label_smoothing), ("mix", mix)):
            check_share(what, value)
        self.label_smoothing = label_smoothing
        self.mix = mix

    def parameters(self) -> dict[str, Any]:
        """The attack, the threat model and the settings, as JSON values."""
        return {
            **super().parameters(),
            "label_smoothing": self.label_smoothing,
            "mix": self.mix,
        }

    def crafted(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> Tensor:
        """The last proposals of the attack, behind the share that stays clean."""
        clean = round(self.mix * len(images))
        rows = torch.arange(clean, len(images), device=images.device)
        crafted = super().crafted(model, images[clean:], labels[clean:], random=random.select(rows))
        return torch.cat([images[:clean], crafted])

    def loss(
        self, model: nn.Module, images: Tensor, crafted: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The cross-entropy on the crafted images, and their logits (N, K)."""
        logits = model(crafted)
        # Under bf16 autocast the logits are too coarse for a logarithm.
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return loss, logits


def check_share(what: str, value: float) -> None:
    """Refuse a number outside [0, 1).

    Raises:
        UsageError: with what was expected and what came.
    """
    if not 0 <= value < 1:
        raise UsageError(f"{what}: expected a number from 0 to below 1, got {value!r}")
