"""What wrong bits in the weights do."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from robustann.results.value import Count, Share, Value
from robustann.rounding import Number


class BitErrorLevel(Value):
    """Error at one bit error rate, over the patterns of bit errors that were tried.

    >>> level = result.weights.float32.levels[0]
    >>> level.rate, level.mean, level.worst
    (1e-06, 0.0, 0.0)
    """

    rate: Annotated[Number, Field(ge=1e-6, le=1)]
    mean: Share
    std: Share
    worst: Share


class BitErrors(Value):
    """Error over bit error rate, rising, for weights stored in one way.

    ``stored_error`` is that of the weights as stored, without any bit error: after quantisation,
    or, for a guard, after it looked at whole weights.

    >>> result.weights.fixed.bits, result.weights.fixed.stored_error
    (8, 0.0)
    """

    bits: Annotated[int, Field(ge=1, le=64)]
    stored_error: Share
    levels: Annotated[tuple[BitErrorLevel, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _rising(self) -> BitErrors:
        rates = [level.rate for level in self.levels]
        if rates != sorted(set(rates)):
            raise ValueError("expected bit error rates that rise")
        return self


class BitFlip(Value):
    """One flipped bit: of which weight, its stored code before and after, and the accuracy after
    this flip and all before it. Bit 0 is the lowest.

    >>> flip = result.weights.search.flips[0]
    >>> flip.tensor, flip.bit, flip.before, flip.after, flip.accuracy
    ('1.weight', 7, 0, 128, 0.5)
    """

    tensor: str
    index: tuple[Count, ...]
    bit: Annotated[int, Field(ge=0, lt=64)]
    before: Count
    after: Count
    accuracy: Share


class BitSearch(Value):
    """The fewest flips found that bring the accuracy to ``target``, or how far they got.

    A greedy search over the ``total_bits`` of weights stored in ``bits`` bits; the fewest of
    ``searches``. The attacker saw ``attack_samples`` images; ``samples`` others were evaluated, in
    ``stored_accuracy`` before any flip. ``control`` holds the accuracy, over all of them, after as
    many random flips, one entry a try.

    >>> search = result.weights.search
    >>> search.reached, len(search.flips), search.total_bits, search.accuracy
    (True, 1, 32, 0.5)
    """

    bits: Annotated[int, Field(ge=1, le=64)]
    total_bits: Annotated[int, Field(ge=1)]
    searches: Annotated[int, Field(ge=1)]
    samples: Annotated[int, Field(ge=1)]
    attack_samples: Annotated[int, Field(ge=1)]
    stored_accuracy: Share
    target: Share
    reached: bool
    flips: tuple[BitFlip, ...]
    control: tuple[Share, ...]

    @property
    def accuracy(self) -> float:
        """After all flips."""
        return self.flips[-1].accuracy if self.flips else self.stored_accuracy


class Weights(Value):
    """What happens if bits of the stored weights are wrong, by accident or by choice.

    The same ``samples`` images throughout, and the same patterns of bit errors, one a seed, in all
    curves: ``fixed`` for weights in 8-bit fixed point, ``float32`` for weights as they are,
    ``guarded`` for these with :class:`robustann.defenses.WeightGuard`. What could not be measured
    is None, and ``not_measured`` says why.

    >>> result.weights.samples, result.weights.clean_error, result.weights.not_measured
    (4, 0.0, ())
    """

    samples: Annotated[int, Field(ge=1)]
    clean_error: Share
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    fixed: BitErrors | None
    float32: BitErrors | None
    guarded: BitErrors | None
    search: BitSearch | None
    not_measured: tuple[str, ...] = ()
