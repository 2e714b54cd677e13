"""Single-step adversarial training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from robustann.attacks.base import Access, Attack, State
from robustann.attacks.engine import Oracle
from robustann.attacks.losses import cross_entropy
from robustann.defenses.adversarial import AdversarialTraining
from robustann.errors import UsageError
from robustann.threat import ThreatModel

# An image range that no start leaves, so that it is not clipped.
_UNBOUNDED = (-1e4, 1e4)


@dataclass(frozen=True, kw_only=True)
class NoisyStep(Attack):
    """One steepest step from a random start that may lie outside the image range.

    Where most pixels are 0, as on MNIST, a start clipped to the image range keeps half of them at
    0: the noise loses its variety, and the network learns to tell it. Only the result is an image.

    Args:
        noise: radius of the random start, in multiples of eps.
        step_size: length of the step, in multiples of eps.
        clip: whether the result is projected to the ball, or to the image range alone.

    >>> NoisyStep(noise=2.0, step_size=1.0, clip=False).cost
    (2, 1)
    """

    name: ClassVar[str] = "noisy-step"
    paper: ClassVar[str] = "https://arxiv.org/abs/2202.01181"
    access: ClassVar[Access] = "white-box"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})

    noise: float
    step_size: float
    clip: bool

    @property
    def iterations(self) -> int:
        return 1

    @property
    def cost(self) -> tuple[int, int]:
        return 2, 1

    def init(self, oracle: Oracle) -> State:
        radius = self.noise * oracle.threat.eps
        around = replace(oracle.threat, eps=radius, eps_text="", bounds=_UNBOUNDED)
        return {"x": around.random_start(oracle.x, oracle.random)}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        gradient = oracle.gradient(state["x"], cross_entropy)
        size = self.step_size * oracle.threat.eps
        if self.clip:
            return {"x": oracle.region.step(state["x"], gradient, size)}
        moved = state["x"] + oracle.threat.steepest_step(gradient, size)
        return {"x": moved.clamp(*oracle.threat.bounds)}


class FastAdversarialTraining(AdversarialTraining):
    """Adversarial training with one step from a random start, FGSM-RS (Wong et al., ICLR 2020).

    For twice the price of plain training it reaches much of what PGD reaches, at small radii.
    At larger ones it may collapse within one epoch, from robust to not at all; training is
    watched, and goes on with PGD from the epoch before.

    Args:
        threat: untargeted, linf or l2; the radius to train for.
        step_size: in multiples of eps.
        label_smoothing, eps_warmup_epochs, validation_attack, watch: see
            :class:`~robustann.defenses.AdversarialTraining`.

    >>> step = FastAdversarialTraining(ThreatModel("linf", 0.1))
    >>> step.attack
    NoisyStep(noise=1.0, step_size=1.25, clip=True)
    """

    name: ClassVar[str] = "fast-adversarial-training"
    paper: ClassVar[str] = "https://arxiv.org/abs/2001.03994"
    limits: ClassVar[tuple[str, ...]] = (
        *AdversarialTraining.limits,
        "large radii, where single-step training may collapse (catastrophic overfitting)",
    )

    def __init__(self, threat: ThreatModel, *, step_size: float = 1.25, **settings: Any) -> None:
        super().__init__(_noisy(1.0, step_size, clip=True), threat, **settings)


class NoisyFastAdversarialTraining(AdversarialTraining):
    """Single-step training with more noise and no projection, N-FGSM (de Jorge et al., 2022).

    The noise reaches ``noise * eps``, and image plus noise plus step is cut to the image range
    alone, so what is trained on may lie up to ``noise + step_size`` radii away. It costs what
    FGSM-RS costs and does without its collapse up to larger radii.

    Args:
        threat: untargeted, linf or l2; the radius to train for.
        noise: radius of the noise, in multiples of eps.
        step_size: in multiples of eps.
        label_smoothing, eps_warmup_epochs, validation_attack, watch: see
            :class:`~robustann.defenses.AdversarialTraining`.

    >>> step = NoisyFastAdversarialTraining(ThreatModel("linf", 0.1))
    >>> step.attack
    NoisyStep(noise=2.0, step_size=1.0, clip=False)
    """

    name: ClassVar[str] = "n-fgsm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2202.01181"
    limits: ClassVar[tuple[str, ...]] = (
        *AdversarialTraining.limits,
        "very large radii, where single-step training may still collapse",
    )

    def __init__(
        self,
        threat: ThreatModel,
        *,
        noise: float = 2.0,
        step_size: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(_noisy(noise, step_size, clip=False), threat, **settings)


def _noisy(noise: float, step_size: float, *, clip: bool) -> NoisyStep:
    for what, value in (("noise", noise), ("step_size", step_size)):
        if not 0 < value < 100:
            raise UsageError(
                f"{what}: expected a number above 0 and below 100, in multiples of eps, "
                f"got {value!r}"
            )
    return NoisyStep(noise=noise, step_size=step_size, clip=clip)
