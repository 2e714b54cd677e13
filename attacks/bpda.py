"""Backward pass differentiable approximation: gradients through what has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustann.errors import ModelError


def bpda(module: nn.Module, surrogate: nn.Module | None = None) -> nn.Module:
    """``module`` forward, the derivative of ``surrogate`` backward (BPDA: Athalye et al., ICML
    2018).

    A part that rounds, encodes or draws gives no useful gradient, and a gradient attack fails on
    the model around it without the model being robust. Replaced by ``bpda(part)``, the model
    computes and is judged as before, bit for bit, while attacks see through it. The part may be
    anything that maps tensors to tensors; it runs without gradients, and its parameters and
    those of the surrogate get none: this is for attacking, not for training.

    Args:
        module: the part as it is.
        surrogate: a differentiable stand-in of the same output shape, taken at the same input;
            None means the identity, which suits parts that give back about what they are given
            (quantisers, JPEG, denoisers).

    Raises:
        ModelError: in use, where the output has not the shape of the surrogate's output, or the
            surrogate's carries no gradient.

    >>> class Round(nn.Module):
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return x.round()
    >>> x = torch.tensor([0.2, 0.9], requires_grad=True)
    >>> y = bpda(Round())(x)
    >>> y.tolist(), torch.autograd.grad((3 * y).sum(), x)[0].tolist()
    ([0.0, 1.0], [3.0, 3.0])
    """
    return _Bpda(module, nn.Identity() if surrogate is None else surrogate)


class _Bpda(nn.Module):
    def __init__(self, module: nn.Module, surrogate: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.surrogate = surrogate

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Replaced.apply(x, self.module, self.surrogate)
        return result


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, surrogate: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        # A copy, for the part may work in place or hand its input through.
        output: Tensor = module(x.detach().clone())
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (saved,) = ctx.saved_tensors
        (gradient,) = gradients
        with torch.enable_grad():
            x = saved.detach().requires_grad_()
            output = ctx.surrogate(x)
        if output.shape != gradient.shape:
            raise ModelError(
                f"expected the surrogate's output in the shape of the part it stands in for, "
                f"{tuple(gradient.shape)}, got {tuple(output.shape)}; give bpda a surrogate "
                "that maps to this shape"
            )
        if not output.requires_grad:
            raise ModelError(
                "expected a differentiable surrogate, but its output carries no gradient; leave "
                "it out for the identity or give another"
            )
        (result,) = torch.autograd.grad(output, x, gradient, allow_unused=True)
        if result is None:
            raise ModelError(
                "expected the surrogate's output to depend on its input, but it does not; leave "
                "it out for the identity or give another"
            )
        return result, None, None
