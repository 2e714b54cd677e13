"""Switches that change how fast attacks run, and next to nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustann.attacks.engine import model_device
from robustann.attacks.relaxed import leaking
from robustann.errors import RobustannError
from robustann.results import Tuned

# Rows of a captured graph cannot vary: batches are filled up to one of few sizes.
_SMALLEST = 8
# A switch must save this share of the time to be worth a result that hangs on the machine.
_GAIN = 0.95
_ROUNDS = 5

Precision = Literal["float32", "bf16", "fp16"]
# Seconds of a batch in this precision, channels last or not.
Timer = Callable[[Precision, bool], float]


class Quick(nn.Module):
    """A model as attacks call it: the same weights in another memory format, or compiled.

    Compiled on a GPU, calls without gradients run as CUDA graphs, which saves the launching of
    kernels; batches are then filled up to powers of two, so that few graphs are captured. A leaky
    backward pass goes through the model as it is: compiled code would not see it.

    Other kernels round otherwise, so it only searches: the model itself judges (``judge`` of the
    engine's ``run``).

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    >>> x = torch.rand(2, 3, 4, 4)
    >>> torch.allclose(Quick(model, channels_last=True)(x), model(x), atol=1e-6)
    True
    """

    def __init__(
        self, model: nn.Module, *, channels_last: bool = False, compiled: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self._channels_last = channels_last
        # Fallen samples leave the batch: one program for all sizes.
        self._compiled = _compiled(model, dynamic=True) if compiled else None
        # By size and precision. One that answers for all of them would be compiled anew for each,
        # and after eight times no more.
        self._graphs: dict[tuple[int, torch.dtype | None], Callable[[Tensor], Any]] | None = (
            {} if compiled and _captures(model) else None
        )

    def forward(self, x: Tensor) -> Any:
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self._compiled is None or leaking():
            return self.model(x)
        if self._graphs is None or torch.is_grad_enabled():
            return self._compiled(x)
        rows = filled_rows(len(x))
        filled = torch.cat([x, x[:1].expand(rows - len(x), *x.shape[1:])]) if rows > len(x) else x
        kind = x.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if (rows, low) not in self._graphs:
            self._graphs[rows, low] = _compiled(self.model, dynamic=False, mode="reduce-overhead")
        # Whatever else is compiled and waits for its backward pass: this is a pass of its own.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # The next replay overwrites what this one returns.
        return self._graphs[rows, low](filled)[: len(x)].clone()


def filled_rows(count: int) -> int:
    """The rows of the captured graph that a batch of so many images runs through: a power of two.

    >>> filled_rows(3), filled_rows(8), filled_rows(136)
    (8, 8, 256)
    """
    return max(_SMALLEST, 1 << (count - 1).bit_length())


def _captures(model: nn.Module) -> bool:
    """Whether calls of this model can be captured as graphs."""
    return any(tensor.is_cuda for tensor in model.parameters())


def _compiled(model: nn.Module, **options: Any) -> Callable[[Tensor], Any]:
    def call(x: Tensor) -> Any:
        return model(x)

    # Programs are kept with a function's code, eight at most, and all functions made here would
    # share it: each gets a copy to itself.
    own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    return torch.compile(own, **options)


def tune(
    *timers: Timer,
    precision: Precision = "float32",
    channels_last: bool = False,
    low: tuple[Precision, ...],
) -> Tuned:
    """Time each switch alone, and keep those that save more than 5 %.

    Each is timed in the same rounds as a batch without any, after one that warms up; its ratio is
    the median over rounds, and the worst over batches: fallen samples leave, and what speeds up a
    full batch may slow down a small one. Where two are kept, they stay together only if that is
    faster than the faster one alone. A switch that fails on this model is off, and its ratio None.

    Args:
        timers: one a batch, called with a precision and whether channels are last: its seconds.
        precision: what was asked for: where it is not ``float32`` it stays, as ``channels_last``
            does where that was asked for.
        low: precisions to try.

    >>> seconds = {("float32", False): 1.0, ("bf16", False): 0.6, ("float32", True): 0.98}
    >>> tune(lambda *switches: seconds[switches], low=("bf16",))
    Tuned(precision='bf16', channels_last=False, ratios={'bf16': 0.6, 'channels_last': 0.98})
    """
    plain = precision, channels_last
    tried: dict[str, tuple[Precision, bool]] = {}
    if precision == "float32":
        tried |= {name: (name, channels_last) for name in low}
    if not channels_last:
        tried["channels_last"] = precision, True
    ratios = _worst(timers, plain, tried)
    kept = {name: ratio for name, ratio in ratios.items() if ratio is not None and ratio < _GAIN}
    last = kept.pop("channels_last", None)
    fastest = min((name for name in low if name in kept), key=kept.__getitem__, default=None)
    if last is not None and fastest is not None:
        together = f"{fastest}+channels_last"
        ratios |= _worst(timers, plain, {together: (fastest, True)})
        both = ratios[together]
        if both is None or both >= min(last, kept[fastest]):
            last, fastest = (last, None) if last < kept[fastest] else (None, fastest)
    return Tuned(
        precision=fastest or precision,
        channels_last=channels_last or last is not None,
        ratios=ratios,
    )


def low_precisions(model: nn.Module) -> tuple[Precision, ...]:
    """What is worth a trial: no processor searches faster in fp16 than in bf16.

    >>> low_precisions(nn.Linear(2, 2))
    ('bf16',)
    """
    return ("bf16",) if model_device(model).type == "cpu" else ("bf16", "fp16")


def _ratios(
    timer: Timer, plain: tuple[Precision, bool], tried: Mapping[str, tuple[Precision, bool]]
) -> dict[str, float | None]:
    found: dict[str, list[float]] = {name: [] for name in tried}
    failed: set[str] = set()
    for number in range(_ROUNDS + 1 if tried else 0):
        without = timer(*plain)
        for name, switches in tried.items():
            if name in failed:
                continue
            try:
                seconds = timer(*switches)
            except (RuntimeError, RobustannError):
                failed.add(name)
                continue
            # The first round warms up.
            if number:
                found[name].append(seconds / max(without, 1e-12))
    return {
        name: None if name in failed else statistics.median(ratios)
        for name, ratios in found.items()
    }


def _worst(
    timers: Sequence[Timer],
    plain: tuple[Precision, bool],
    tried: Mapping[str, tuple[Precision, bool]],
) -> dict[str, float | None]:
    found = [_ratios(timer, plain, tried) for timer in timers]
    worst: dict[str, float | None] = {}
    for name in tried:
        ratios = [one[name] for one in found]
        known = [ratio for ratio in ratios if ratio is not None]
        worst[name] = max(known) if len(known) == len(ratios) else None
    return worst
