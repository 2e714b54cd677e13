"""Counts what passes through a model, whoever attacks it."""

from __future__ import annotations

from torch import Tensor, nn


class Counting(nn.Module):
    """Counts the images that pass through a model, forwards and backwards."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.propagations = 0

    def forward(self, x: Tensor) -> Tensor:
        self.propagations += len(x)
        logits: Tensor = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.propagations += len(gradient)
