"""A backward pass that sees through dead units."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _LeakyBackward(torch.autograd.Function):
    """max(0, x) forward; backward the gradient of a leaky ReLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(x > 0)
        ctx.slope = slope
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (alive,) = ctx.saved_tensors
        (gradient,) = gradients
        return torch.where(alive, gradient, gradient * ctx.slope), None


# F.relu with inplace=True is among them, for its result is what the caller goes on with; relu_ is
# not, for its caller may go on with the tensor itself.
_RECTIFIERS: frozenset[Callable[..., Any]] = frozenset({torch.relu, F.relu, Tensor.relu})


_ACTIVE = threading.local()


def _modes() -> int:
    return getattr(_ACTIVE, "modes", 0)


def leaking() -> bool:
    """Whether a leaky backward pass is wanted here and now: compiled code would not know.

    >>> with leaky_backward(0.1):
    ...     leaking()
    True
    """
    return _modes() > 0


class _Mode(TorchFunctionMode):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self._slope = slope

    def __enter__(self) -> Any:
        _ACTIVE.modes = _modes() + 1
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.modes = _modes() - 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _RECTIFIERS and args and isinstance(args[0], Tensor):
            return _LeakyBackward.apply(args[0], self._slope)
        return func(*args, **(kwargs or {}))


def leaky_backward(slope: float) -> AbstractContextManager[Any]:
    """Within this context ReLUs compute as ever, but pass ``slope`` of the gradient when closed.

    Adversarially trained networks often mask their gradients by closing units: on the flat side
    of a ReLU the gradient is exactly zero, though a larger step would open it. Letting a little of
    the gradient through points the attack across. It is the backward pass that is replaced (BPDA:
    Athalye et al., ICML 2018; for transfer: Guo et al., "Backpropagating Linearly", NeurIPS 2020);
    every forward pass, and so every judgement, is the model's own. Reaches ``nn.ReLU`` and the
    functional forms in eager models; compiled and scripted models run as they are. A slope of 0
    changes nothing.

    >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
    >>> with leaky_backward(0.1):
    ...     y = torch.relu(x)
    >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
    ([0.0, 2.0], [0.10000000149011612, 1.0])
    """
    return _Mode(slope) if slope else nullcontext()
