"""Weights that withstand bit errors: clipped in training, and trained on random bit errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from robustann.attacks.weights.bit_errors import LEAST_RATE, error_masks
from robustann.attacks.weights.quantization import check_bits, quantized_parameters
from robustann.defenses.steps import StepWrapper
from robustann.errors import UsageError
from robustann.rng import SampleRandom

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

_PAPER = "https://arxiv.org/abs/2006.13977"
_HELPS = (
    "random bit errors in fixed-point quantised weights, such as those of low-voltage memory",
)
_LIMITS = (
    "adversarial inputs",
    "bit errors in float32 weights, whose exponent bits make any weight huge",
    "an attacker who chooses the bits, or who alters the weight file",
)


class WeightClipping(StepWrapper):
    """Training with every parameter kept within [-w_max, w_max] (Stutz et al., MLSys 2021).

    A bit error moves a fixed-point weight by a share of the range of its tensor. Clipping alone
    shrinks range and weights alike, which would change nothing; but a network that must reach
    large logits with small weights makes use of more of them, and then no single one matters as
    much. Wraps another step of :func:`robustann.training.train` and projects the weights after
    each update.

    The scales of normalisation layers are kept within [1 - w_max, 1 + w_max] instead, or w_max
    would throttle the signal in each of them. The paper stores the scale as its difference from 1
    and clips that: the same set of weights, and, as the range of a tensor is asymmetric, the same
    steps between them.

    Helps against random bit errors in quantised weights. Known not to help against adversarial
    inputs, bit errors in float32 weights (see :class:`robustann.defenses.WeightGuard`), or
    tampering (see :mod:`robustann.defenses.seal`). Measured on MNIST (small-cnn, 5 epochs, clean
    error 1 % either way): at 10 % bit errors in 8-bit weights 75 % error with plain training, 4 %
    with w_max = 0.1. The smaller w_max, the more robust, and at some
    point the less accurate; label smoothing works against it, for it rewards small logits.

    Args:
        step: what to train with, for example ``StandardStep()``.
        w_max: largest magnitude of a parameter, above 0 and up to 1.

    Raises:
        UsageError: ``w_max`` is out of range.

    >>> from robustann.training import StandardStep
    >>> step = WeightClipping(StandardStep(), w_max=0.25)
    >>> layer = nn.Linear(1, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[-3.0], [0.125]]))
    >>> step.after_update(layer)
    >>> layer.weight.flatten().tolist()
    [-0.25, 0.125]
    """

    name: str = "weight-clipping"
    against: str = "bit errors"
    paper: str = _PAPER
    helps: tuple[str, ...] = _HELPS
    limits: tuple[str, ...] = _LIMITS

    def __init__(self, step: Any, *, w_max: float = 0.1) -> None:
        if not 0 < w_max <= 1:
            raise UsageError(f"w_max: expected a number above 0 and up to 1, got {w_max!r}")
        super().__init__(step)
        self.w_max = w_max

    def parameters(self) -> dict[str, Any]:
        """The bound, and the step inside, as JSON values."""
        return {"w_max": self.w_max, **super().parameters()}

    def after_update(self, model: nn.Module) -> None:
        """Project the model's parameters, after what the step inside does with them."""
        self._inner_hook("after_update", model)
        clip_weights(model, self.w_max)


class BitErrorTraining(StepWrapper):
    """Training on clean weights and on quantised ones with random bit errors (Stutz et al.).

    The paper's RandBET. Each batch is passed twice: through the weights as they are, and through
    the quantised ones with fresh bit errors; the loss is the mean of both. (The paper takes their
    sum; the mean leaves the learning rate its meaning.) The gradient passes straight through
    quantisation and errors, as if they were not there. The errors begin where the clean loss of
    the batch is below ``start_below``: from the first batch on, training may never get going.

    Wraps another step of :func:`robustann.training.train`. Best inside
    :class:`WeightClipping`: ``WeightClipping(BitErrorTraining(StandardStep()))``. Helps beyond
    clipping at rates about the one trained with; the limits are the same. It costs two passes and
    the drawing of the errors. The statistics of batch normalisation see the clean pass alone.

    Args:
        step: what to train with, for example ``StandardStep()``.
        rate: probability with which each bit is inverted, from 1e-6 to 0.5.
        bits: of each quantised weight, from 2 to 8.
        start_below: clean loss under which the errors begin.

    Raises:
        UsageError: a setting out of range; or a step that moves the weights until its backward pass
            (:class:`~robustann.defenses.AdversarialWeightPerturbation`): it cannot be taken twice.

    >>> from robustann.training import StandardStep
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> images, labels = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 2])
    >>> step = BitErrorTraining(StandardStep(), rate=0.2)
    >>> loss, _ = step(model, images, labels, random=SampleRandom.create(0, torch.arange(2)))
    >>> bool(loss == nn.functional.cross_entropy(model(images), labels))
    False
    """

    name: str = "bit-error-training"
    against: str = "bit errors"
    paper: str = _PAPER
    helps: tuple[str, ...] = _HELPS
    limits: tuple[str, ...] = _LIMITS

    def __init__(
        self, step: Any, *, rate: float = 0.05, bits: int = 8, start_below: float = 1.75
    ) -> None:
        if not LEAST_RATE <= rate <= 0.5:
            raise UsageError(f"rate: expected a number from {LEAST_RATE:g} to 0.5, got {rate!r}")
        check_bits(bits)
        if not start_below > 0:
            raise UsageError(f"start_below: expected a positive number, got {start_below!r}")
        if hasattr(step, "abandon"):
            moving = step
            while isinstance(moving, StepWrapper) and not hasattr(type(moving), "abandon"):
                moving = moving.step
            raise UsageError(
                "step: expected a step that leaves the weights where they are, for it is taken "
                f"twice, got {moving.name}, which moves them until the backward pass; use "
                f"{self.name} or {moving.name}, not both"
            )
        super().__init__(step)
        self.rate, self.bits, self.start_below = rate, bits, start_below

    def parameters(self) -> dict[str, Any]:
        """The settings, and the step inside, as JSON values."""
        own = {"rate": self.rate, "bits": self.bits, "start_below": self.start_below}
        return {**own, **super().parameters()}

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        """The mean of both losses, and the logits of the clean weights."""
        loss, logits = super().__call__(model, images, labels, random=random)
        if not bool(loss.detach() < self.start_below):
            return loss, logits
        # One pattern a batch, which depends on the seed, the epoch and the batch alone.
        drawn = random.fork("bit-errors").uniform()
        # What is compiled is compiled for the weights that it has.
        model = getattr(model, "_orig_mod", model)
        faulty = _Faulty(model, self._weights(model, seed=int(drawn[0] * 2**24)))
        other, _ = self.step(faulty, images, labels, random=random.fork("faulty"))
        return (loss + other) / 2, logits

    def _weights(self, model: nn.Module, seed: int) -> dict[str, Tensor]:
        parameters = dict(model.named_parameters())
        weights = {}
        for name, stored in quantized_parameters(model, self.bits).items():
            own = parameters[name]
            (mask,) = error_masks(
                name, own.shape, rates=(self.rate,), seed=seed, bits=self.bits, device=own.device
            )
            # The value of the one, the gradient of the other.
            weights[name] = own + (stored.dequantize(mask) - own).detach()
        return weights


class _Faulty(nn.Module):
    """A model with other weights, and buffers of its own to write to."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._values = {**weights, **buffers}

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.model, self._values, (images,))
        return logits


@torch.no_grad()
def clip_weights(model: nn.Module, w_max: float) -> None:
    """Clip the parameters in place: scales of normalisation layers about 1, all others about 0.

    >>> norm = nn.BatchNorm2d(1)
    >>> _ = norm.weight.data.fill_(3.0), norm.bias.data.fill_(-3.0)
    >>> clip_weights(norm, 0.5)
    >>> norm.weight.item(), norm.bias.item()
    (1.5, -0.5)
    """
    scales = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, _NORMS) and module.weight is not None
    }
    for parameter in model.parameters():
        if parameter.is_floating_point():
            centre = 1.0 if id(parameter) in scales else 0.0
            parameter.clamp_(centre - w_max, centre + w_max)
