"""What the training steps that craft adversarial images have in common, and what wraps them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustann.attacks.base import Attack
from robustann.attacks.engine import craft
from robustann.attacks.pgd import PGD
from robustann.errors import UsageError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel

_VALIDATION_STEPS = 10
_SAFER_STEPS = 4


class AdversarialStep(ABC):
    """A step for :func:`robustann.training.train` that crafts images and then takes their loss.

    The two halves are apart, so that a wrapper such as
    :class:`~robustann.defenses.AdversarialWeightPerturbation` can do something in between.
    Validation, hence the choice of the epoch, is by an attack of at least ten steps at the full
    radius: by clean accuracy an early, unprotected epoch would win, and by the attack of a
    single-step training one that masks its gradient.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = "objective"
    paper: ClassVar[str]
    helps: ClassVar[tuple[str, ...]] = (
        "white-box and black-box attacks in the norm trained with, up to the radius trained with",
    )
    limits: ClassVar[tuple[str, ...]] = (
        "attacks in other norms",
        "radii larger than the one trained with",
        "faults in the weights",
    )
    # At the 0.1 of plain training, MNIST at linf 0.3 fell back to chance level.
    default_lr: ClassVar[float] = 0.05

    def __init__(
        self,
        threat: ThreatModel,
        *,
        eps_warmup_epochs: int | None = None,
        validation_attack: Attack | None = None,
    ) -> None:
        if threat.targeted:
            raise UsageError(
                "expected an untargeted threat model for adversarial training, got a targeted one; "
                "leave targeted=False"
            )
        if eps_warmup_epochs is not None and eps_warmup_epochs < 0:
            raise UsageError(
                f"eps_warmup_epochs: expected at least 0 or None, got {eps_warmup_epochs!r}"
            )
        self.threat = threat
        self.eps_warmup_epochs = eps_warmup_epochs
        self.validation_attack = validation_attack or PGD(steps=_VALIDATION_STEPS)
        self.validation_attack.check(threat)
        self._current = threat

    def parameters(self) -> dict[str, Any]:
        """The threat model and the settings, as JSON values."""
        return {
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "bounds": list(self.threat.bounds),
            "eps_warmup_epochs": self.eps_warmup_epochs,
            "validation_attack": self.validation_attack.label,
        }

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the radius for this epoch, the first being 1.

        >>> from robustann.defenses import AdversarialTraining
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
        """Return the loss and the logits (N, K) on what was crafted.

        Args:
            model: in training mode; maps images in [0, 1] to logits.
            images: float (N, C, H, W) in [0, 1].
            labels: int64 (N,).
            random: one stream a sample.
        """
        crafted = self.crafted(model, images, labels, random=random)
        return self.loss(model, images, crafted, labels)

    @abstractmethod
    def crafted(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> Tensor:
        """The images to train on, like ``images``; arguments as above."""

    @abstractmethod
    def loss(
        self, model: nn.Module, images: Tensor, crafted: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The scalar loss, and the logits (N, K) of ``crafted``."""

    def validation_logits(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> Tensor:
        """The logits (N, K) on images crafted at the full radius by the validation attack."""
        crafted = craft(self.validation_attack, model, images, labels, self.threat, random=random)
        with torch.no_grad():
            logits: Tensor = model(crafted)
        return logits


class AttackStep(AdversarialStep):
    """An adversarial step whose images come from an attack in eval mode with frozen parameters.

    If the attack takes a single gradient step, training is watched (see
    :class:`~robustann.training.TrainingStep`): after a collapse it goes on with PGD.
    """

    def __init__(
        self,
        attack: Attack,
        threat: ThreatModel,
        *,
        eps_warmup_epochs: int | None = None,
        validation_attack: Attack | None = None,
        watch: bool = True,
    ) -> None:
        attack.check(threat)
        if validation_attack is None and (
            attack.iterations >= _VALIDATION_STEPS or threat.norm not in PGD.norms
        ):
            validation_attack = attack
        super().__init__(
            threat, eps_warmup_epochs=eps_warmup_epochs, validation_attack=validation_attack
        )
        self.attack = attack
        single = attack.iterations == 1 and attack.cost[1] > 0
        self.watched = watch and single and threat.norm in PGD.norms
        self._inner = attack

    def parameters(self) -> dict[str, Any]:
        """The attack, the threat model and the settings, as JSON values."""
        return {
            "attack": self.attack.name,
            **{f"attack.{name}": value for name, value in self.attack.parameters.items()},
            **super().parameters(),
            "watched": self.watched,
        }

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the radius for this epoch, the first being 1, which begins with the given attack."""
        super().begin_epoch(epoch, epochs)
        if epoch == 1:
            self._inner = self.attack

    def crafted(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> Tensor:
        """The last proposals of the attack at the present radius."""
        return craft(self._inner, model, images, labels, self._current, random=random)

    def safer(self) -> str:
        """Go on with an attack of four steps, or of twice as many as now; say so.

        >>> from robustann.defenses import AdversarialTraining
        >>> step = AdversarialTraining(PGD(steps=1), ThreatModel("linf", 0.3))
        >>> step.safer(), step.safer()
        ('from now on with pgd:steps=4', 'from now on with pgd:steps=8')
        """
        self._inner = self._with_steps(max(_SAFER_STEPS, 2 * self._inner.iterations))
        return f"from now on with {self._inner.label}"

    def _with_steps(self, steps: int) -> Attack:
        return PGD(steps=steps)

    def state(self) -> dict[str, Any]:
        """How many steps the attack takes now, 0 for the given one's."""
        return {"steps": 0 if self._inner is self.attack else self._inner.iterations}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` returned."""
        self._inner = self._with_steps(state["steps"]) if state["steps"] else self.attack


class StepWrapper:
    """A training step around another one: what it does not define itself is the inner step's.

    Hooks are found by name, so a wrapper has exactly those that the inner step has, and its own.
    One that defines a hook calls the inner one's with :meth:`_inner_hook`.

    >>> from robustann.defenses import AdversarialTraining
    >>> inner = AdversarialTraining(PGD(steps=1), ThreatModel("linf", 0.3))
    >>> StepWrapper(inner).watched, hasattr(StepWrapper(inner), "after_update")
    (True, False)
    """

    name: str = "wrapper"
    kind: str = "wrapper"

    def __init__(self, step: Any) -> None:
        self.step = step

    def __getattr__(self, name: str) -> Any:
        # Copying asks for names before there is a step.
        if name == "step" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.step, name)

    def _inner_hook(self, name: str, *facts: Any) -> None:
        call = getattr(self.step, name, None)
        if call is not None:
            call(*facts)

    def parameters(self) -> dict[str, Any]:
        """The inner step's name and parameters."""
        return {"step": {"name": self.step.name, **self.step.parameters()}}

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        """The inner step's loss and logits."""
        answer: tuple[Tensor, Tensor] = self.step(model, images, labels, random=random)
        return answer
