"""How many images a batch: found by trying, halved when memory runs out, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from robustann.attacks.engine import ALIGNMENT, Oracle, frozen, model_device
from robustann.attacks.losses import cross_entropy
from robustann.data import Split
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel

T = TypeVar("T")
LARGEST = 1024
# A larger batch must be this much faster a sample to be worth its memory.
_GAIN = 0.95
# One call longer than this would make progress and ctrl-C sluggish.
_LONGEST_CALL = 2.0


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on an accelerator or on the CPU.

    >>> is_out_of_memory(torch.OutOfMemoryError()), is_out_of_memory(ValueError("x"))
    (True, False)
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def in_halves(work: Callable[[Tensor], list[T]], positions: Tensor) -> list[T]:
    """``work(positions)``; where memory runs out, each half of them in turn.

    >>> in_halves(lambda part: [len(part)], torch.arange(3))
    [3]
    """
    try:
        return work(positions)
    except (RuntimeError, MemoryError) as error:
        if len(positions) == 1 or not is_out_of_memory(error):
            raise
    # Outside the except block: the error's traceback holds the tensors that filled the memory.
    torch.cuda.empty_cache()
    middle = len(positions) // 2
    return in_halves(work, positions[:middle]) + in_halves(work, positions[middle:])


@dataclass(frozen=True)
class Rate:
    """Seconds that a forward and a backward take for one sample in a batch of ``batch_size``."""

    batch_size: int
    forward: float
    backward: float


def measure(
    model: nn.Module,
    split: Split,
    positions: Tensor,
    threat: ThreatModel,
    gradients: bool = True,
    precision: str = "float32",
) -> Rate:
    """Time one forward and, unless the model has none, one gradient on the images there."""
    device = model_device(model)
    x = split.images(positions).to(device)
    labels = split.labels[positions].to(device)
    with frozen(model, 0):
        random = SampleRandom.create(0, labels)
        oracle = Oracle(model, x, labels, threat, random, judging=False, precision=precision)

        def seconds(call: Callable[[], object]) -> float:
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - begin

        forward = seconds(lambda: oracle.forward(oracle.x))
        both = forward
        if gradients:
            both = seconds(lambda: oracle.gradient(oracle.x, cross_entropy))
    return Rate(len(x), forward / len(x), max(both - forward, 0.0) / len(x))


def find_batch_size(
    model: nn.Module,
    split: Split,
    positions: Tensor,
    threat: ThreatModel,
    gradients: bool = True,
) -> int:
    """The smallest batch that is about as fast a sample as any larger one, within memory."""
    best = size = ALIGNMENT
    fastest = float("inf")
    # The first call pays for set-up: it warms up and is not counted.
    warm = False
    while size <= min(LARGEST, max(ALIGNMENT, len(positions))):
        try:
            if not warm:
                measure(model, split, positions[:size], threat, gradients)
                warm = True
            rate = measure(model, split, positions[:size], threat, gradients)
        except (RuntimeError, MemoryError) as error:
            if size == ALIGNMENT or not is_out_of_memory(error):
                raise
            break
        cost = rate.forward + rate.backward
        if cost < fastest * _GAIN:
            best, fastest = size, cost
        elif size > 2 * best:
            break
        if cost * size > _LONGEST_CALL:
            break
        size *= 2
    return best
