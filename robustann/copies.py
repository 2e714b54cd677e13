"""Copies from the processor's memory to an accelerator's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def pins(tensor: Tensor, device: torch.device) -> bool:
    """Whether a copy of ``tensor`` to ``device`` should go through page-locked memory.

    >>> pins(torch.zeros(2), torch.device("cpu"))
    False
    """
    return device.type == "cuda" and tensor.device.type == "cpu"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the processor does not wait for what is computed there.

    A copy to a GPU from ordinary memory waits until all is done that was asked for before. From
    page-locked memory it takes its turn, and PyTorch keeps that memory until then.

    >>> sent(torch.ones(2), torch.device("cpu")).tolist()
    [1.0, 1.0]
    """
    if pins(tensor, device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def ahead(
    work: Callable[[T], Tensor], items: Sequence[T], device: torch.device
) -> Iterator[Tensor]:
    """``work`` of each item, in their order; the next is made while the caller has the last.

    It runs in a thread of its own and, on a GPU, in a stream of its own: copies of the next batch
    overlap with what is computed on this one.

    >>> [int(one) for one in ahead(torch.tensor, [3, 1, 2], torch.device("cpu"))]
    [3, 1, 2]
    """
    side = _Side(device) if device.type == "cuda" else None
    do = work if side is None else side.doing(work)
    with ThreadPoolExecutor(1, thread_name_prefix="robustann-ahead") as maker:
        coming = [maker.submit(do, item) for item in items[:1]]
        for following in [*items[1:], None]:
            if not coming:
                return
            made = coming.pop().result()
            if following is not None:
                coming.append(maker.submit(do, following))
            yield made if side is None else side.taken(made)


class _Side:
    """A stream of its own on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._events: list[torch.cuda.Event] = []

    def doing(self, work: Callable[[T], Tensor]) -> Callable[[T], Tensor]:
        """``work`` in this stream."""

        def do(item: T) -> Tensor:
            with torch.cuda.stream(self._stream):
                made = work(item)
                self._events.append(self._stream.record_event())
            return made

        return do

    def taken(self, made: Tensor) -> Tensor:
        """What was made first of what is there, for the stream that the caller computes in."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._events.pop(0))
        # Its memory is free for others only when that stream, too, is through with it.
        made.record_stream(stream)
        return made
