"""What wrong bits in the weights do."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from robustann.reports.filters import THIN, percent, points
from robustann.results import BitErrorLevel, BitErrors, BitSearch, Weights


@dataclass(frozen=True)
class Storage:
    """A way in which weights are stored, and how it is drawn: a CSS class, and a mark with the
    symbol that stands for it in a text.

    >>> [(storage.kind, storage.mark) for storage in storages(result.weights)]
    [('fixed', 'disc'), ('float', 'square'), ('guarded', 'triangle')]
    """

    kind: Literal["fixed", "float", "guarded"]
    words: str
    mark: Literal["disc", "square", "triangle"]
    symbol: str
    errors: BitErrors


def storages(weights: Weights) -> list[Storage]:
    """The ways of storing weights in which bit errors were measured.

    >>> [storage.words for storage in storages(result.weights)]
    ['8-bit fixed point', 'float32', 'float32 with a guard']
    """
    found = []
    if weights.fixed is not None:
        words = f"{weights.fixed.bits}-bit fixed point"
        found.append(Storage("fixed", words, "disc", "\N{BLACK CIRCLE}", weights.fixed))
    if weights.float32 is not None:
        found.append(Storage("float", "float32", "square", "\N{BLACK SQUARE}", weights.float32))
    if weights.guarded is not None:
        symbol = "\N{BLACK UP-POINTING TRIANGLE}"
        guarded = weights.guarded
        found.append(Storage("guarded", "float32 with a guard", "triangle", symbol, guarded))
    return found


def bit_error_rate(rate: float) -> str:
    """A bit error rate as percent, without needless zeros.

    >>> bit_error_rate(1e-6), bit_error_rate(0.03)
    ('0.0001\\u202f%', '3\\u202f%')
    """
    return f"{float(f'{100 * rate:.3g}'):.10f}".rstrip("0").rstrip(".") + f"{THIN}%"


def bit_error_rows(weights: Weights) -> list[tuple[float, list[BitErrorLevel | None]]]:
    """Each bit error rate with its level in each of :func:`storages`; None where it has none.

    >>> rate, levels = bit_error_rows(result.weights)[0]
    >>> rate, [level.mean for level in levels]
    (1e-06, [0.0, 0.0, 0.0])
    """
    columns = [
        {level.rate: level for level in storage.errors.levels} for storage in storages(weights)
    ]
    rates = sorted({rate for column in columns for rate in column})
    return [(rate, [column.get(rate) for column in columns]) for rate in rates]


def faults(weights: Weights) -> list[str]:
    """What wrong bits in the weights mean, a sentence each, in plain words.

    >>> faults(result.weights)[0].partition(":")[0], len(faults(result.weights))
    ('By accident', 3)
    """
    said = []
    if weights.fixed is not None:
        stored = weights.fixed.stored_error
        level = min(weights.fixed.levels, key=lambda level: abs(math.log(level.rate / 0.01)))
        said.append(
            f"By accident: one wrong bit in {1 / level.rate:,.0f}, in weights of "
            f"{weights.fixed.bits} bits, costs {_cost(level.mean - stored)} of accuracy in the "
            f"mean and {_cost(level.worst - stored)} in the worst of {len(weights.seeds)} patterns."
        )
    if weights.float32 is not None and weights.guarded is not None:
        behind = {level.rate: level for level in weights.guarded.levels}
        pairs = [(level, behind.get(level.rate)) for level in weights.float32.levels]
        helped = [(bare, kept) for bare, kept in pairs if kept and bare.mean - kept.mean >= 0.01]
        if helped:
            bare, kept = max(helped, key=lambda pair: pair[0].mean - pair[1].mean)
            said.append(
                f"In float32 one wrong bit in {1 / bare.rate:,.0f} is enough for an error of "
                f"{percent(bare.mean)}; a guard that looks at the weights when they are loaded "
                f"leaves {percent(kept.mean)}."
            )
        else:
            said.append("A guard at loading makes no clear difference at these rates.")
    if weights.search is not None:
        said.append(_chosen(weights.search))
    return said


def _cost(change: float) -> str:
    text = points(max(change, 0.0)).lstrip("+")
    return "nothing" if text == points(0.0) else text


def _chosen(search: BitSearch) -> str:
    """What an attacker who chooses the bits needs."""
    start, left = percent(search.stored_accuracy), percent(search.accuracy)
    flips, bits = len(search.flips), f"{search.total_bits:,}"
    if not flips:
        return "On purpose: the model is at the level of guessing without a single flip."
    word, bring = ("flip", "brings") if flips == 1 else ("flips", "bring")
    if search.reached:
        said = (
            f"On purpose: {flips} {word} of chosen bits, of {bits}, {bring} accuracy from {start} "
            f"down to {left}, about that of guessing"
        )
    else:
        said = (
            f"On purpose: {flips} {word} of chosen bits, of {bits}, {bring} accuracy from {start} "
            f"to {left}; the search ended there, short of guessing"
        )
    if search.control:
        said += f"; as many random ones leave {percent(min(search.control))} or more"
    return f"{said}."


def hit(search: BitSearch, limit: int = 5) -> list[tuple[str, int]]:
    """The tensors that most flips hit, with how many.

    >>> hit(result.weights.search)
    [('1.weight', 1)]
    """
    return Counter(flip.tensor for flip in search.flips).most_common(limit)
