"""Switches that change how fast attacks run, and next to nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robustann.attacks.relaxed import leaking

# Rows of a captured graph cannot vary: batches are filled up to one of few sizes.
_SMALLEST = 8


class Quick(nn.Module):
    """A model as attacks call it: the same weights in another memory format, or compiled.

    Compiled on a GPU, calls without gradients run as CUDA graphs, which saves the launching of
    kernels; batches are then filled up to powers of two, so that few graphs are captured. A leaky
    backward pass goes through the model as it is: compiled code would not see it.

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
        self._compiled: Callable[[Tensor], Any] | None = None
        self._graphs: Callable[[Tensor], Any] | None = None
        if compiled:
            # Fallen samples leave the batch: one program for all sizes.
            self._compiled = _compiled(model, dynamic=True)
            if any(tensor.is_cuda for tensor in model.parameters()):
                self._graphs = _compiled(model, dynamic=False, mode="reduce-overhead")

    def forward(self, x: Tensor) -> Any:
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self._compiled is None or leaking():
            return self.model(x)
        if self._graphs is None or torch.is_grad_enabled():
            return self._compiled(x)
        rows = max(_SMALLEST, 1 << (len(x) - 1).bit_length())
        filled = torch.cat([x, x[:1].expand(rows - len(x), *x.shape[1:])]) if rows > len(x) else x
        # The next replay overwrites what this one returns.
        return self._graphs(filled)[: len(x)].clone()


def _compiled(model: nn.Module, **options: Any) -> Callable[[Tensor], Any]:
    def call(x: Tensor) -> Any:
        return model(x)

    return torch.compile(call, **options)
