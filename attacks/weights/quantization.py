"""Weights as fixed-point numbers of few bits.

Stutz, Chandramoorthy, Hein and Schiele, "Bit Error Robustness for Energy-Efficient DNN
Accelerators", MLSys 2021, https://arxiv.org/abs/2006.13977: of the schemes compared there, the
one whose weights withstand bit errors best. A range for each tensor instead of one for all;
asymmetric, from the smallest to the largest value; rounded to the nearest level, not truncated;
stored as unsigned integers, so that no single bit carries a sign.

The codes are offset binary. Two's complement over the same levels differs from it only in the top
bit, which is inverted, so each flip of a bit has the same effect in both.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from robustann.errors import ModelError, UsageError

M = TypeVar("M", bound=nn.Module)

LEAST_BITS, MOST_BITS = 2, 8


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in fixed point: value = low + code * step.

    Attributes:
        codes: uint8, of the tensor's shape, from 0 to 2 ** bits - 1.
        low: the value of code 0.
        high: the value of the largest code.
        bits: how many of each byte are used, from 2 to 8; the upper ones stay 0.
        dtype: floating-point type that the values came in and return to.

    >>> stored = quantize(torch.tensor([-1.0, 0.1, 2.0]), bits=2)
    >>> stored.codes.tolist(), stored.step, stored.dequantize().tolist()
    ([0, 1, 3], 1.0, [-1.0, 0.0, 2.0])
    """

    codes: Tensor
    low: float
    high: float
    bits: int
    dtype: torch.dtype

    @property
    def step(self) -> float:
        """Distance of two neighbouring values; 0 where all values are zero."""
        return (self.high - self.low) / ((1 << self.bits) - 1)

    def dequantize(self, flips: Tensor | None = None) -> Tensor:
        """The values that the codes stand for; ``flips``, if given, are bits to invert first.

        Args:
            flips: uint8 of the codes' shape; what is set in it is inverted.
        """
        codes = self.codes if flips is None else self.codes ^ flips
        # Read from a table: the same values on every device, and both ends exact.
        levels = torch.linspace(self.low, self.high, 2**self.bits, dtype=torch.float64)
        return levels.to(self.dtype).to(codes.device)[codes.int()]


def quantize(values: Tensor, bits: int = 8) -> QuantizedTensor:
    """The values as codes of ``bits`` bits, each at most half a step away.

    The smallest and the largest value are represented exactly. A constant tensor, which has no
    range, is stored as the end of a range that begins at zero.

    Args:
        values: floating point, any shape, finite.
        bits: from 2 to 8.

    Raises:
        UsageError: ``bits`` is out of range.
        ModelError: the values are no finite floating-point numbers, or there are none.

    >>> quantize(torch.tensor([0.0, 0.4, 1.0])).codes.tolist()
    [0, 102, 255]
    """
    check_bits(bits)
    values = values.detach()
    if not values.is_floating_point() or not values.numel():
        raise ModelError(
            f"expected floating-point weights to quantise, got {values.numel()} values of type "
            f"{values.dtype}; leave them out"
        )
    low, high = (float(value) for value in torch.aminmax(values))
    if not (abs(low) < torch.inf and abs(high) < torch.inf):
        raise ModelError(
            f"expected finite weights to quantise, got values from {low} to {high}; "
            "train the model again with a lower learning rate"
        )
    if low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        codes = torch.zeros_like(values, dtype=torch.uint8)
        return QuantizedTensor(codes, low, high, bits, values.dtype)
    # Apple's accelerator has no float64; there a value on the border of two levels may round
    # either way.
    exact = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    largest = 2**bits - 1
    codes = ((exact - low) * (largest / (high - low))).round_().clamp_(0, largest)
    return QuantizedTensor(codes.to(torch.uint8), low, high, bits, values.dtype)


def quantized_parameters(model: nn.Module, bits: int = 8) -> dict[str, QuantizedTensor]:
    """All floating-point parameters of the model in fixed point, by name; tied ones once.

    Buffers, such as the statistics of batch normalisation, are none of them.

    Raises:
        UsageError: ``bits`` is out of range.
        ModelError: a parameter is not finite, or there is none.

    >>> sorted(quantized_parameters(nn.Linear(2, 1)))
    ['bias', 'weight']
    """
    check_bits(bits)
    found = {}
    for name, parameter in stored_parameters(model).items():
        try:
            found[name] = quantize(parameter, bits)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from error
    return found


def quantized_model(model: M, bits: int = 8, *, in_place: bool = False) -> M:
    """The model with its parameters rounded to ``bits`` bits, as floating-point values again.

    Args:
        model: stays as it was unless ``in_place``.
        bits: from 2 to 8.
        in_place: change ``model`` itself instead of a copy.

    Raises:
        UsageError: ``bits`` is out of range.
        ModelError: a parameter is not finite, or there is none.

    >>> layer = nn.Linear(8, 4)
    >>> quantized_model(layer, 4).weight.unique().numel() <= 2**4
    True
    """
    stored = quantized_parameters(model, bits)
    target = model if in_place else copy.deepcopy(model)
    parameters = dict(target.named_parameters())
    with torch.no_grad():
        for name, tensor in stored.items():
            parameters[name].copy_(tensor.dequantize())
    return target


def stored_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters, detached, by name; tied ones once.

    Raises:
        ModelError: there is none.

    >>> list(stored_parameters(nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    found = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.numel()
    }
    if not found:
        raise ModelError(
            "expected a model with floating-point parameters, got none; "
            "there is nothing in it that a bit error could hit"
        )
    return found


def check_bits(bits: int) -> None:
    """Refuse widths that are not from 2 to 8.

    Raises:
        UsageError: with what came.

    >>> check_bits(8)
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not LEAST_BITS <= bits <= MOST_BITS:
        raise UsageError(
            f"bits: expected an integer from {LEAST_BITS} to {MOST_BITS}, got {bits!r}"
        )
