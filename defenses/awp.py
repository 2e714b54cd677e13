"""Adversarial weight perturbation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustann.defenses.steps import AdversarialStep, StepWrapper
from robustann.errors import UsageError
from robustann.parallel import averaged
from robustann.rng import SampleRandom


class AdversarialWeightPerturbation(StepWrapper):
    """Training for weights around which the adversarial loss is flat (Wu et al., NeurIPS 2020).

    Around any step that crafts: the weights first move, layer by layer, by ``gamma`` times their
    norm along the gradient of the loss on the crafted images; the gradient at that point updates
    the original ones. It narrows the gap between robust accuracy on training and on test images
    (robust overfitting), for one more forward and backward pass a batch.

    Args:
        step: an adversarial step, such as :class:`~robustann.defenses.AdversarialTraining` or
            :class:`~robustann.defenses.TRADES`, or a wrapper of one that leaves the loss to it.
        gamma: how far each layer's weights move, relative to their norm. Biases and the parameters
            of normalisation layers stay.

    Raises:
        UsageError: a step that crafts nothing, or that has more to it than crafting and the loss of
            what was crafted (:class:`~robustann.defenses.BitErrorTraining`); a gamma out of range.

    >>> from robustann.attacks import PGD
    >>> from robustann.defenses import AdversarialTraining
    >>> from robustann.threat import ThreatModel
    >>> inner = AdversarialTraining(PGD(steps=2), ThreatModel("linf", 0.1))
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> images, labels = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 2])
    >>> random = SampleRandom.create(0, torch.arange(2))
    >>> step = AdversarialWeightPerturbation(inner)
    >>> loss, _ = step(model, images, labels, random=random)
    >>> loss.backward()
    >>> step.after_backward(model)
    >>> bool(loss > inner(model, images, labels, random=random)[0])
    True
    """

    name = "awp"
    paper: ClassVar[str] = "https://arxiv.org/abs/2004.05884"

    def __init__(self, step: Any, *, gamma: float = 5e-3) -> None:
        super().__init__(step)
        _check_call(step)
        if not (hasattr(step, "crafted") and hasattr(step, "loss")):
            raise UsageError(
                "step: expected an adversarial step, such as AdversarialTraining or TRADES, got "
                f"{type(step).__name__}, which crafts no images"
            )
        if not 0 < gamma < 1:
            raise UsageError(f"gamma: expected a number above 0 and below 1, got {gamma!r}")
        self.gamma = gamma
        self._originals: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def helps(self) -> tuple[str, ...]:
        """What the inner step helps against, and robust overfitting."""
        return (*self.step.helps, "robust overfitting: it narrows the gap of training to test")

    @property
    def limits(self) -> tuple[str, ...]:
        """What the inner step does not help against."""
        return tuple(self.step.limits)

    def parameters(self) -> dict[str, Any]:
        """Gamma, and the inner step's name and parameters."""
        return {"gamma": self.gamma, **super().parameters()}

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        """The loss at the perturbed weights, in which the model stays until after the backward
        pass, and the logits (N, K)."""
        crafted = self.step.crafted(model, images, labels, random=random)
        weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        with _buffers_kept(model):
            loss, _ = self.step.loss(model, images, crafted, labels)
            # Of the whole batch, however many processes share it.
            gradients = averaged(torch.autograd.grad(loss, weights, allow_unused=True))
        self._originals = [(weight, weight.detach().clone()) for weight in weights]
        try:
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None:
                        # A zero gradient moves nothing.
                        length = gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)
                        weight.add_(gradient * (self.gamma * weight.norm() / length))
            # Autocast would go on with the copies in low precision that it made of the weights
            # before they moved.
            torch.clear_autocast_cache()
            answer: tuple[Tensor, Tensor] = self.step.loss(model, images, crafted, labels)
        except BaseException:
            self._take_back()
            raise
        return answer

    def after_backward(self, model: nn.Module) -> None:
        """Put the weights back, to the last bit."""
        self._take_back()
        self._inner_hook("after_backward", model)

    def abandon(self, model: nn.Module) -> None:
        """Put the weights back where the backward pass failed."""
        self._take_back()
        self._inner_hook("abandon", model)

    @torch.no_grad()
    def _take_back(self) -> None:
        for weight, original in self._originals:
            weight.copy_(original)
        self._originals = []


def _check_call(step: Any) -> None:
    """Refuse a step whose own ``__call__`` would be passed by.

    Raises:
        UsageError: names it.
    """
    inner = step
    while isinstance(inner, StepWrapper | AdversarialStep):
        kind = StepWrapper if isinstance(inner, StepWrapper) else AdversarialStep
        if type(inner).__call__ is not kind.__call__:
            raise UsageError(
                "step: expected an adversarial step that is nothing but its crafting and the loss "
                f"of what was crafted, got {inner.name}, which computes a loss of its own; "
                f"use awp or {inner.name}, not both"
            )
        inner = getattr(inner, "step", None)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """The statistics of normalisation layers see each batch once, in the pass that counts."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, content in kept:
            buffer.copy_(content)
