"""TRADES and MART: adversarial training that weighs clean against adversarial images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from robustann.attacks.base import Access, Attack, State, at_least
from robustann.attacks.engine import Oracle
from robustann.attacks.pgd import PGD
from robustann.defenses.adversarial import check_share
from robustann.defenses.steps import AttackStep
from robustann.errors import UsageError
from robustann.threat import ThreatModel

# Standard deviation of the start: at the image itself the divergence has no gradient.
_START = 1e-3


@dataclass(frozen=True, kw_only=True)
class DivergenceAscent(Attack):
    """Projected ascent of the divergence of the prediction from the one on the original.

    Args:
        steps: gradient steps.
        step_size: length of a step in the norm of the threat model; None means
            ``2.5 * eps / steps``.

    >>> DivergenceAscent(steps=4).cost
    (6, 4)
    """

    name: ClassVar[str] = "divergence-ascent"
    paper: ClassVar[str] = "https://arxiv.org/abs/1901.08573"
    access: ClassVar[Access] = "white-box"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2", "l1"})

    steps: int = 10
    step_size: float | None = None

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def cost(self) -> tuple[int, int]:
        return self.steps + 2, self.steps

    def init(self, oracle: Oracle) -> State:
        noise = oracle.random.normal(*oracle.x.shape[1:]).mul_(_START)
        clean = oracle.forward(oracle.x).log_softmax(1)
        return {"x": oracle.region.project(oracle.x + noise), "clean": clean}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        def loss(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
            return divergences(state["clean"], logits.log_softmax(1))

        size = 2.5 * oracle.threat.eps / self.steps if self.step_size is None else self.step_size
        gradient = oracle.gradient(state["x"], loss)
        return {**state, "x": oracle.region.step(state["x"], gradient, size)}


def divergences(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence of q from p, (N,), from log-probabilities (N, K).

    >>> import torch
    >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> round(float(divergences(p, q)), 4)
    0.1438
    """
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


class TRADES(AttackStep):
    """Cross-entropy on clean images plus beta times how far predictions move (Zhang et al., 2019).

    The second term is the divergence KL(p(clean) || p(adversarial)); the images are crafted, in
    eval mode, to maximise it. A larger ``beta`` buys robustness with clean accuracy.

    Args:
        threat: untargeted; the radius to train for.
        beta: weight of the divergence.
        steps: gradient steps of the crafting.
        step_size: of one of them; None takes ``2.5 * eps / steps``.
        label_smoothing: share of the clean images' target spread over all classes.
        eps_warmup_epochs, validation_attack, watch: see
            :class:`~robustann.defenses.AdversarialTraining`.

    >>> import torch
    >>> from robustann.rng import SampleRandom
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> images, labels = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 2])
    >>> step = TRADES(ThreatModel("linf", 0.1), steps=2)
    >>> loss, logits = step(model, images, labels, random=SampleRandom.create(0, torch.arange(2)))
    >>> bool(loss > F.cross_entropy(model(images), labels))
    True
    """

    name: ClassVar[str] = "trades"
    paper: ClassVar[str] = "https://arxiv.org/abs/1901.08573"

    def __init__(
        self,
        threat: ThreatModel,
        *,
        beta: float = 6.0,
        steps: int = 10,
        step_size: float | None = None,
        label_smoothing: float = 0.0,
        eps_warmup_epochs: int | None = None,
        validation_attack: Attack | None = None,
        watch: bool = True,
    ) -> None:
        at_least("steps", steps, 1)
        if step_size is not None and not 0 < step_size < float("inf"):
            raise UsageError(f"step_size: expected a number above 0 or None, got {step_size!r}")
        check_weight("beta", beta)
        check_share("label_smoothing", label_smoothing)
        super().__init__(
            DivergenceAscent(steps=steps, step_size=step_size),
            threat,
            eps_warmup_epochs=eps_warmup_epochs,
            # Moving the prediction far is not yet an error: judged by cross-entropy.
            validation_attack=validation_attack or PGD(steps=10),
            watch=watch,
        )
        self.beta = beta
        self.label_smoothing = label_smoothing

    def parameters(self) -> dict[str, Any]:
        """The attack, the threat model and the settings, as JSON values."""
        settings = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        return {**super().parameters(), **settings}

    def _with_steps(self, steps: int) -> Attack:
        return DivergenceAscent(steps=steps)

    def loss(
        self, model: nn.Module, images: Tensor, crafted: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighed loss, and the logits (N, K) of the crafted images."""
        clean, logits = model(images).float(), model(crafted)
        natural = F.cross_entropy(clean, labels, label_smoothing=self.label_smoothing)
        moved = divergences(clean.log_softmax(1), logits.float().log_softmax(1)).mean()
        return natural + self.beta * moved, logits


class MART(AttackStep):
    """Adversarial training that cares for misclassified images apart (Wang et al., ICLR 2020).

    On the crafted images it minimises the cross-entropy plus ``-log(1 - p)`` of the likeliest
    wrong class, and beta times KL(p(clean) || p(adversarial)), weighed by how unsure the
    prediction on the clean image is of the label.

    Args:
        attack: what crafts, by its own loss.
        threat: untargeted; the radius to train for.
        beta: weight of the divergence (the paper's lambda).
        eps_warmup_epochs, validation_attack, watch: see
            :class:`~robustann.defenses.AdversarialTraining`.

    >>> import torch
    >>> from robustann.attacks import PGD
    >>> from robustann.rng import SampleRandom
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> images, labels = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 2])
    >>> step = MART(PGD(steps=2), ThreatModel("linf", 0.1))
    >>> loss, logits = step(model, images, labels, random=SampleRandom.create(0, torch.arange(2)))
    >>> bool(loss > F.cross_entropy(logits, labels))
    True
    """

    name: ClassVar[str] = "mart"
    paper: ClassVar[str] = "https://openreview.net/forum?id=rklOg6EFwS"

    def __init__(
        self,
        attack: Attack,
        threat: ThreatModel,
        *,
        beta: float = 5.0,
        eps_warmup_epochs: int | None = None,
        validation_attack: Attack | None = None,
        watch: bool = True,
    ) -> None:
        check_weight("beta", beta)
        super().__init__(
            attack,
            threat,
            eps_warmup_epochs=eps_warmup_epochs,
            validation_attack=validation_attack,
            watch=watch,
        )
        self.beta = beta

    def parameters(self) -> dict[str, Any]:
        """The attack, the threat model and the settings, as JSON values."""
        return {**super().parameters(), "beta": self.beta}

    def loss(
        self, model: nn.Module, images: Tensor, crafted: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighed loss, and the logits (N, K) of the crafted images."""
        # In this order, as the authors have it: the crafted images weigh most in the statistics of
        # batch normalisation, by which the model is judged.
        clean = model(images).float().log_softmax(1)
        answer = model(crafted)
        logits = answer.float()
        # 1 - p of the likeliest wrong class, as the sum of the others: nothing cancels.
        wrong = logits.scatter(1, labels[:, None], float("-inf")).argmax(1, keepdim=True)
        others = logits.scatter(1, wrong, float("-inf")).logsumexp(1)
        boosted = F.cross_entropy(logits, labels) + (logits.logsumexp(1) - others).mean()
        unsure = 1 - clean.gather(1, labels[:, None]).squeeze(1).exp()
        moved = divergences(clean, logits.log_softmax(1)) * unsure
        return boosted + self.beta * moved.mean(), answer


def check_weight(what: str, value: float) -> None:
    """Refuse a weight that is no finite number of at least 0.

    Raises:
        UsageError: with what was expected and what came.
    """
    if not 0 <= value < float("inf"):
        raise UsageError(f"{what}: expected a finite number of at least 0, got {value!r}")
