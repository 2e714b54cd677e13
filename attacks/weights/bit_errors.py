"""Random bit errors in stored weights.

Each bit of each weight is inverted with the same probability, independently: the model of errors
in low-voltage memory in Stutz et al. (MLSys 2021, https://arxiv.org/abs/2006.13977). Each bit has
a fixed number u drawn uniformly from [0, 1), and is inverted at rate p where u < p, so what is
wrong at one rate is wrong at every higher one too, as it is on one chip while its voltage falls.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustann.attacks.engine import frozen, model_device
from robustann.attacks.weights.evaluation import Samples, accuracy_with, check_batch_size
from robustann.attacks.weights.quantization import (
    QuantizedTensor,
    check_bits,
    quantized_parameters,
    stored_parameters,
)
from robustann.data import Split
from robustann.errors import ModelError, UsageError
from robustann.rng import SampleRandom

FLOAT_BITS = 32
# The uniform numbers are multiples of 2 ** -24: finer rates would be rounded by more than 6 %.
LEAST_RATE = 1e-6

Repair = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class BitErrorPoint:
    """The error of a model at one bit error rate.

    Attributes:
        rate: probability with which each bit is inverted.
        errors: share of images classified wrongly, one value a seed.

    >>> point = BitErrorPoint(0.01, (0.1, 0.3))
    >>> round(point.mean, 3), round(point.std, 3), point.worst
    (0.2, 0.141, 0.3)
    """

    rate: float
    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.errors)

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds; 0 for one seed."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else 0.0

    @property
    def worst(self) -> float:
        """The largest over the seeds."""
        return max(self.errors)


@dataclass(frozen=True)
class BitErrorCurve:
    """Error over bit error rate.

    Attributes:
        bits: of each stored weight: 2 to 8 in fixed point, or 32 for float32.
        clean_error: of the model with its own weights.
        stored_error: of the weights as stored, without any bit error.
        points: one a rate, in the order given.
        seeds: the patterns of errors measured at each rate.
        samples: how many images were classified.

    >>> curve = BitErrorCurve(8, 0.02, 0.02, (BitErrorPoint(0.01, (0.1, 0.3)),), (0, 1), 100)
    >>> curve.points[0].worst
    0.3
    """

    bits: int
    clean_error: float
    stored_error: float
    points: tuple[BitErrorPoint, ...]
    seeds: tuple[int, ...]
    samples: int


def error_masks(
    name: str,
    shape: torch.Size | tuple[int, ...],
    *,
    rates: Sequence[float],
    seed: int,
    bits: int,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Which bits of a tensor of this name are inverted, one mask a rate.

    Depends on seed, name, and each element's position alone.

    Args:
        name: of the tensor in its model.
        shape: of the tensor.
        rates: probabilities, 0 or from 1e-6 to 1.
        seed: of the pattern.
        bits: of each element: up to 8 gives uint8 masks, 32 int32 ones.
        device: where to draw.

    >>> one, two = error_masks("w", (1000,), rates=(0.01, 0.1), seed=0, bits=8)
    >>> bool((one & ~two == 0).all()), one.dtype
    (True, torch.uint8)
    """
    _check_rates(rates)
    positions = torch.arange(torch.Size(shape).numel(), device=device)
    streams = SampleRandom.create(seed, positions).fork("bit-errors", name)
    kind = torch.int32 if bits == FLOAT_BITS else torch.uint8
    masks = [torch.zeros(len(positions), dtype=kind, device=device) for _ in rates]
    for bit in range(bits):
        drawn = streams.uniform()
        for mask, rate in zip(masks, rates, strict=True):
            mask |= (drawn < rate).to(kind) << bit
    return [mask.view(shape) for mask in masks]


def flipped(values: Tensor, mask: Tensor) -> Tensor:
    """float32 values with the bits of an int32 mask inverted; bit 31 is the sign.

    >>> flipped(torch.tensor([1.5]), torch.tensor([-(2**31)], dtype=torch.int32)).item()
    -1.5
    """
    return (values.contiguous().view(torch.int32) ^ mask).view(torch.float32)


def random_bit_errors(
    model: nn.Module,
    images: Tensor | Split,
    labels: Tensor | None = None,
    *,
    rates: Sequence[float] = (0.001, 0.01, 0.05, 0.1),
    seeds: int | Sequence[int] = 10,
    bits: int = 8,
    batch_size: int = 256,
    repair: Repair | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> BitErrorCurve:
    """The error of a model whose stored weights suffer random bit errors.

    All floating-point parameters are hit, buffers are not. The model stays as it was.

    Args:
        model: maps images in [0, 1] to logits.
        images: float (N, C, H, W) in [0, 1], or a part of a dataset.
        labels: int64 (N,); None takes those of the part.
        rates: probability with which each bit is inverted, each 0 or from 1e-6 to 1.
        seeds: patterns of errors, or how many of them.
        bits: of a weight: 2 to 8 for fixed point (see
            :mod:`robustann.attacks.weights.quantization`), 32 for float32 as it is.
        batch_size: images at a time.
        repair: what is done to the weights after the errors, before they are used, such as
            :meth:`robustann.defenses.WeightGuard.repaired`.
        advance: told how many images were classified, each time that all of them were.

    Raises:
        UsageError: a rate, seed, batch size or number of bits out of range.
        DataError: unfit images or labels.
        ModelError: unfit weights or output.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> images, labels = torch.rand(6, 1, 2, 2), torch.arange(6) % 3
    >>> curve = random_bit_errors(model, images, labels, rates=(0.0, 0.1), seeds=2)
    >>> [point.mean == curve.stored_error for point in curve.points][0]
    True
    """
    _check_rates(rates)
    chosen = _seeds(seeds)
    check_batch_size(batch_size)
    if bits != FLOAT_BITS:
        check_bits(bits)
    samples = Samples(images, labels)
    device = model_device(model)
    own = stored_parameters(model)
    stored = quantized_parameters(model, bits) if bits != FLOAT_BITS else _float32(own)

    def error(weights: Mapping[str, Tensor]) -> float:
        wrong = 1 - accuracy_with(model, weights, samples, batch_size)
        advance(len(samples))
        return wrong

    errors: list[list[float]] = [[] for _ in rates]
    with frozen(model, 0):
        clean = error(own)
        kept = {name: _read(tensor, None) for name, tensor in stored.items()}
        without = error(repair(kept) if repair else kept)
        for seed in chosen:
            masks = {
                name: error_masks(
                    name, own[name].shape, rates=rates, seed=seed, bits=bits, device=device
                )
                for name in stored
            }
            for place, found in enumerate(errors):
                weights: Mapping[str, Tensor] = {
                    name: _read(tensor, masks[name][place]) for name, tensor in stored.items()
                }
                found.append(error(repair(weights) if repair else weights))
    points = tuple(
        BitErrorPoint(float(rate), tuple(found)) for rate, found in zip(rates, errors, strict=True)
    )
    return BitErrorCurve(bits, clean, without, points, chosen, len(samples))


def _read(stored: QuantizedTensor | Tensor, mask: Tensor | None) -> Tensor:
    if isinstance(stored, QuantizedTensor):
        return stored.dequantize(mask)
    return stored if mask is None else flipped(stored, mask)


def _float32(parameters: Mapping[str, Tensor]) -> dict[str, QuantizedTensor | Tensor]:
    for name, values in parameters.items():
        if values.dtype != torch.float32:
            raise ModelError(
                f"expected float32 parameters for bits={FLOAT_BITS}, got {values.dtype} in {name}; "
                "call model.float()"
            )
    return dict(parameters)


def _check_rates(rates: Sequence[float]) -> None:
    for rate in rates:
        if rate != 0 and not LEAST_RATE <= rate <= 1:
            raise UsageError(
                f"rates: expected probabilities, each 0 or from {LEAST_RATE:g} to 1, got {rate!r}"
            )
    if not len(rates):
        raise UsageError("rates: expected at least one bit error rate, got none")


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(seeds, int):
        seeds = range(seeds)
    if not len(seeds):
        raise UsageError("seeds: expected at least one, got none; give a number above 0")
    return tuple(int(seed) for seed in seeds)
