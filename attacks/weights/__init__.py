"""Faults in the weights: what memory or a tampered file does to a model, not what an image does.

Low-voltage memory, storage rot and Rowhammer flip bits of stored weights; an attacker may choose
which. None of this is an :class:`~robustann.attacks.base.Attack` on images: no threat model of a
norm applies, and the images stay as they are.
"""

from __future__ import annotations

from robustann.attacks.weights.bit_errors import BitErrorCurve, BitErrorPoint, random_bit_errors
from robustann.attacks.weights.bit_search import (
    BitSearchResult,
    Flip,
    progressive_bit_search,
    random_flips,
)
from robustann.attacks.weights.quantization import QuantizedTensor, quantize, quantized_model

__all__ = [
    "BitErrorCurve",
    "BitErrorPoint",
    "BitSearchResult",
    "Flip",
    "QuantizedTensor",
    "progressive_bit_search",
    "quantize",
    "quantized_model",
    "random_bit_errors",
    "random_flips",
]
