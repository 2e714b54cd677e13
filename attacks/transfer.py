"""Transfer: images crafted on a model that the attacker has, judged on one that he has not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustann.attacks import engine
from robustann.attacks.art_adapter import ArtAttack
from robustann.attacks.base import Access, Attack, State
from robustann.attacks.engine import AttackResult, Oracle
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel


@dataclass(frozen=True)
class TransferResult:
    """What an attack on a surrogate does to the target.

    Attributes:
        target: the images judged on the target. Its counts are the target's alone; it never gives
            a gradient.
        surrogate: what the same attack did to the surrogate, with the surrogate's counts.
        full_forwards: images of each sample that the surrogate was shown besides, int64 (N,), in
            the attack that does not stop at its first success; ``full_backwards`` likewise.
        full_backwards: see there.
        agreement: share of the N originals that both models put in the same class. Where it is
            low, the surrogate is a poor stand-in, and failing to transfer says little.

    >>> from robustann.attacks import FGSM
    >>> def linear(*weight):
    ...     model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    ...     model[1].weight.data.copy_(torch.tensor([[1.0, 0.0], weight]))
    ...     return model
    >>> x, labels = torch.tensor([[[[0.625, 0.5]]]]), torch.tensor([0])
    >>> threat, random = ThreatModel("linf", 0.125), SampleRandom.create(0, torch.arange(1))
    >>> found = transfer(
    ...     FGSM(), linear(0.0, 1.0), linear(0.5, 0.5), x, labels, threat, random=random
    ... )
    >>> found.surrogate.success.item(), found.target.success.item(), found.agreement
    (True, True, 1.0)
    """

    target: AttackResult
    surrogate: AttackResult
    full_forwards: Tensor
    full_backwards: Tensor
    agreement: float


def transfer(
    attack: Attack,
    surrogate: nn.Module,
    target: nn.Module,
    x: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    random: SampleRandom,
) -> TransferResult:
    """Attack ``surrogate`` and judge the images on ``target`` (Papernot et al., 2016).

    The target is shown two images a sample. First the last iterate of a full first start, which
    does not stop where the surrogate falls: an image that has only just crossed the surrogate's
    boundary seldom crosses another model's. Then the one that :func:`~robustann.attacks.engine.run`
    returns. Attacks of ART run to their end anyway, and attacks that look for the nearest
    adversarial image have no such last iterate (they transfer badly by their nature): of both
    only the second is shown.

    Args:
        attack: what to run on the surrogate.
        surrogate: maps images in [0, 1] to logits; both models are left as they were.
        target: judges; with as many classes.
        x: float images (N, C, H, W) within the bounds of ``threat``.
        labels: int64 (N,): the true classes, or the wanted ones of a targeted threat.
        threat: what the attacker may do.
        random: one stream a sample.

    Raises:
        UsageError: the attack does not support the norm.
        DataError: images or labels are unfit.
        ModelError: a model's output is unfit, or the surrogate carries no gradient.

    >>> from robustann.attacks import PGD
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64)
    >>> random = SampleRandom.create(0, torch.arange(6))
    >>> transfer(PGD(), model, model, x, y, ThreatModel("linf", 0.1), random=random).agreement
    1.0
    """
    on_surrogate = engine.run(attack, surrogate, x, labels, threat, random=random)
    shown = [on_surrogate.adversarial]
    counter = _Counter(surrogate)
    if not (attack.minimum_norm or isinstance(attack, ArtAttack)):
        # The streams of the first start above: on an equal model nothing else is found.
        streams = random.fork(attack.label).fork("start", 0)
        device = engine.model_device(surrogate)
        full = engine.craft(
            attack,
            counter,
            x.detach().to(device, torch.float32),
            labels.to(device),
            threat,
            random=streams.to(device),
        )
        shown.insert(0, full.cpu())
    judged = engine.run(
        _Shown(attack=attack, images=tuple(shown)), target, x, labels, threat, random=random
    )
    same = engine.predict_logits(surrogate, x).argmax(1) == engine.predict_logits(target, x).argmax(
        1
    )
    rows = len(x) + -len(x) % engine.ALIGNMENT
    return TransferResult(
        target=dataclasses.replace(judged, attack=attack),
        surrogate=on_surrogate,
        full_forwards=torch.full((len(x),), counter.forwards // rows),
        full_backwards=torch.full((len(x),), counter.backwards // rows),
        agreement=float(same.double().mean()),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Shown(Attack):
    """Given images, one after the other, as if ``attack`` had proposed them."""

    attack: Attack
    images: tuple[Tensor, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.attack.name

    @property
    def paper(self) -> str:  # type: ignore[override]
        return self.attack.paper

    @property
    def access(self) -> Access:  # type: ignore[override]
        return "none"

    @property
    def norms(self) -> frozenset[str]:  # type: ignore[override]
        return self.attack.norms

    @property
    def minimum_norm(self) -> bool:  # type: ignore[override]
        return self.attack.minimum_norm

    @property
    def label(self) -> str:
        return self.attack.label

    @property
    def iterations(self) -> int:
        # The engine looks at the last image itself.
        return len(self.images) - 1

    @property
    def cost(self) -> tuple[int, int]:
        return len(self.images), 0

    def init(self, oracle: Oracle) -> State:
        given = {
            f"image{place}": image.to(oracle.x)[oracle.rows]
            for place, image in enumerate(self.images)
        }
        return {**given, "x": given["image0"]}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        oracle.forward(state["x"])
        return {**state, "x": state[f"image{iteration + 1}"]}


class _Counter(nn.Module):
    """A model that counts the images it is shown and the gradients it gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = 0
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        self.forwards += len(x)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return logits

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)
