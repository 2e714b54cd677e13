"""What happens to a model if bits of its stored weights are wrong, by accident or by choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from robustann.attacks.engine import model_device, predict_logits
from robustann.attacks.weights import (
    BitErrorCurve,
    BitSearchResult,
    progressive_bit_search,
    random_bit_errors,
    random_flips,
)
from robustann.attacks.weights.bit_errors import FLOAT_BITS, Repair
from robustann.attacks.weights.evaluation import Samples
from robustann.attacks.weights.quantization import stored_parameters
from robustann.auditing.batching import is_out_of_memory
from robustann.data import Split
from robustann.defenses import WeightGuard
from robustann.errors import ModelError
from robustann.progress import progress_bar
from robustann.results import BitErrorLevel, BitErrors, BitFlip, BitSearch, Weights

T = TypeVar("T")

_FIXED_BITS = 8
_SELECTION_SEED = 20_240_301


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured: bit error rates and patterns of bit errors, images, and, for the
    search, flips at most, images of the attacker, and how often it begins with others of these."""

    rates: tuple[float, ...]
    patterns: int
    samples: int
    flips: int
    searches: int
    attackers: int = 128


_COARSE = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_FINE = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

# 50 patterns as in Stutz et al. (MLSys 2021); how many flips a search needs hangs so much on the
# attacker's images (43 to 73 on the digits) that more than one is worth its time.
EFFORTS: Mapping[str, Effort] = {
    "quick": Effort(rates=_COARSE, patterns=3, samples=500, flips=50, attackers=64, searches=1),
    "standard": Effort(rates=_FINE, patterns=10, samples=1000, flips=100, searches=2),
    "thorough": Effort(rates=_FINE, patterns=50, samples=5000, flips=300, searches=4),
}


def effort_of(preset: str) -> Effort:
    """The effort that goes with a preset; that of ``standard`` for those without one of their own.

    >>> effort_of("quick").patterns, effort_of("autoattack") == effort_of("standard")
    (3, True)
    """
    return EFFORTS.get(preset, EFFORTS["standard"])


def weight_propagations(model: nn.Module, count: int, effort: Effort) -> int:
    """Forwards of single images, at most, for ``count`` images to choose from.

    >>> effort = Effort(rates=(0.01,), patterns=1, samples=9, flips=1, attackers=2, searches=1)
    >>> weight_propagations(nn.Linear(2, 2), 4, effort)
    48
    """
    samples = min(count, effort.samples)
    curves = 3 * (2 + effort.patterns * len(effort.rates)) * samples
    flip = _flip_cost(model, samples, effort)
    return curves + effort.searches * effort.flips * flip + effort.patterns * samples


def measure_weights(
    model: nn.Module,
    split: Split,
    *,
    effort: Effort = EFFORTS["standard"],
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> Weights:
    """Measure what wrong bits in the weights do, at random and chosen; the model stays as it was.

    Random bit errors in 8-bit fixed point, in float32, and in float32 behind a
    :class:`~robustann.defenses.WeightGuard` recorded from the model as it is; then the progressive
    bit search in 8-bit fixed point, beside as many random flips.

    Args:
        model: maps images in [0, 1] to logits.
        split: images and labels, of which as many as the effort says are drawn at random, the same
            for every seed.
        effort: how much to measure.
        seed: of the patterns of bit errors and of the attacker's images.
        batch_size: images at a time.
        progress: show a bar on stderr if that is a terminal.

    Raises:
        DataError: images or labels are unfit for this model.

    >>> from robustann.data import TensorSplit
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> split = TensorSplit(torch.rand(9, 1, 2, 2), torch.arange(9) % 3)
    >>> found = measure_weights(model, split, effort=effort_of("quick"))
    >>> found.samples, len(found.fixed.levels), found.search.attack_samples
    (9, 5, 4)
    """
    count = min(len(split), effort.samples)
    # At random, for data may be sorted by class; the same for every seed, to compare audits.
    drawn = torch.Generator().manual_seed(_SELECTION_SEED)
    part = split.subset(torch.randperm(len(split), generator=drawn)[:count].sort().values)
    # Apart for each audit's seed, and small enough to be typed in again.
    seeds = tuple((1000 * seed + pattern) % 2**63 for pattern in range(effort.patterns))
    reasons: list[str] = []
    refused = _refusal(model)
    if refused is not None:
        return Weights(
            samples=count,
            clean_error=_clean_error(model, part, batch_size),
            seeds=seeds,
            fixed=None,
            float32=None,
            guarded=None,
            search=None,
            not_measured=(refused,),
        )
    total = weight_propagations(model, count, effort)
    with progress_bar(total, wanted=progress, unit="images") as advance:

        def curve(what: str, bits: int, repair: Callable[[], Repair | None]) -> BitErrors | None:
            return _measured(
                what,
                reasons,
                lambda: _curve(
                    random_bit_errors(
                        model,
                        part,
                        rates=effort.rates,
                        seeds=seeds,
                        bits=bits,
                        batch_size=batch_size,
                        repair=repair(),
                        advance=lambda images: advance(images, what),
                    )
                ),
            )

        fixed = curve("bit errors in fixed point", _FIXED_BITS, lambda: None)
        float32 = curve("bit errors in float32", FLOAT_BITS, lambda: None)
        guarded = curve(
            "bit errors behind a guard", FLOAT_BITS, lambda: WeightGuard.record(model).repaired
        )
        search = None
        if count == 1:
            reasons.append("bit search: it needs an image for the attacker and another to evaluate")
        else:
            search = _measured(
                "bit search",
                reasons,
                lambda: _search(
                    model, part, effort, seeds, batch_size, lambda n: advance(n, "bit search")
                ),
            )
        return Weights(
            samples=count,
            clean_error=_clean_error(model, part, batch_size),
            seeds=seeds,
            fixed=fixed,
            float32=float32,
            guarded=guarded,
            search=search,
            not_measured=tuple(reasons),
        )


def _refusal(model: nn.Module) -> str | None:
    """Why there is nothing to measure; None if there is."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return (
            "the model is compiled by TorchScript, so that its weights cannot be exchanged; audit "
            "the module that it was made from"
        )
    try:
        stored_parameters(model)
    except ModelError as error:
        return str(error)
    return None


def _measured(what: str, reasons: list[str], measure: Callable[[], T]) -> T | None:
    """What ``measure`` returns; None, with a reason, where it cannot be had.

    It comes after the attacks, whose outcome must not be lost with it.
    """
    try:
        return measure()
    except ModelError as error:
        reasons.append(f"{what}: {error}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reasons.append(f"{what}: memory ran out; free some, or take a smaller batch size")
    # Outside the except block: the error's traceback holds the tensors that filled the memory.
    torch.cuda.empty_cache()
    return None


def _curve(found: BitErrorCurve) -> BitErrors:
    return BitErrors(
        bits=found.bits,
        stored_error=found.stored_error,
        levels=tuple(
            BitErrorLevel(rate=point.rate, mean=point.mean, std=point.std, worst=point.worst)
            for point in found.points
        ),
    )


def _search(
    model: nn.Module,
    part: Split,
    effort: Effort,
    seeds: Sequence[int],
    batch_size: int,
    advance: Callable[[int], None],
) -> BitSearch:
    each = _flip_cost(model, len(part), effort)
    found: list[BitSearchResult] = []
    for search in range(effort.searches):
        result = progressive_bit_search(
            model,
            part,
            attack_size=_attackers(len(part), effort),
            # More flips than the best so far would not be kept.
            max_flips=min([effort.flips, *(len(one.flips) for one in found if one.reached)]) or 1,
            bits=_FIXED_BITS,
            batch_size=batch_size,
            seed=seeds[0] + search,
            advance=lambda flips: advance(flips * each),
        )
        advance((effort.flips - len(result.flips)) * each)
        found.append(result)
    best = min(found, key=lambda one: (not one.reached, len(one.flips), one.accuracy))
    control: tuple[float, ...] = ()
    if best.flips:
        control = random_flips(
            model,
            part,
            count=len(best.flips),
            seeds=seeds,
            bits=_FIXED_BITS,
            batch_size=batch_size,
        )
        advance(len(seeds) * len(part))
    return BitSearch(
        bits=best.bits,
        total_bits=best.total_bits,
        searches=len(found),
        samples=best.samples,
        attack_samples=best.attack_samples,
        stored_accuracy=best.stored_accuracy,
        target=best.target,
        reached=best.reached,
        flips=tuple(
            BitFlip(
                tensor=flip.tensor,
                index=flip.index,
                bit=flip.bit,
                before=flip.before,
                after=flip.after,
                accuracy=flip.accuracy,
            )
            for flip in best.flips
        ),
        control=control,
    )


def _attackers(count: int, effort: Effort) -> int:
    return min(effort.attackers, count // 2)


def _flip_cost(model: nn.Module, samples: int, effort: Effort) -> int:
    tensors = sum(parameter.is_floating_point() for parameter in model.parameters())
    return tensors * _attackers(samples, effort) + samples


def _clean_error(model: nn.Module, part: Split, batch_size: int) -> float:
    right = 0
    for images, labels in Samples(part).batches(batch_size, model_device(model)):
        right += int((predict_logits(model, images).argmax(1) == labels.cpu()).sum())
    return 1 - right / len(part)
