"""Networks made on the word of a file, no larger than the weights that come with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from robustann.errors import ModelError

# What a network may have beside the numbers that its file holds: buffers that are not saved, what
# is tied. Its modules without weights are some times those with them.
_TIMES, _MORE = 4, 2**24
_MODULES_A_TENSOR, _MORE_MODULES = 20, 10_000


class NumbersOnCpu(TorchFunctionMode):
    """RegNet and networks of timm compute with tensors while they are made: they need values."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        options = dict(kwargs or {})
        if func in (torch.arange, torch.linspace, torch.tensor):
            if func is not torch.tensor and func(*args, **{**options, "device": "meta"}).numel() > (
                _MORE
            ):
                raise _TooLarge
            options["device"] = "cpu"
        return func(*args, **options)


def bounded(make: Callable[[], nn.Module], weights: Mapping[str, Tensor], where: str) -> nn.Module:
    """What ``make`` gives, stopped as soon as it is far larger than the weights for it.

    Args:
        make: makes the network.
        weights: that are to be loaded into it.
        where: what to call them in messages.

    Raises:
        ModelError: it has far more modules or numbers than the weights.

    >>> bounded(lambda: nn.Linear(1, 2), {"weight": torch.zeros(2, 1)}, "'m'")
    Linear(in_features=1, out_features=2, bias=True)
    """
    check_size(make, weights, where)
    with _limits(weights, where):
        return make()


def check_size(make: Callable[[], nn.Module], weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse a network that would be far larger than the weights for it, before it takes memory.

    A configuration of one line can ask for a billion layers, or for one that takes all memory.
    Whatever else ``make`` raises without memory is left for the real attempt to tell.

    Raises:
        ModelError: it has far more modules or numbers than the weights.

    >>> check_size(lambda: nn.Linear(10**6, 10**6), {"weight": torch.zeros(2, 2)}, "'m'")
    Traceback (most recent call last):
    robustann.errors.ModelError: the configuration asks for a network far larger than the weights
    in 'm'; use the files of one model
    """
    with (
        _limits(weights, where),
        contextlib.suppress(Exception),
        torch.device("meta"),
        NumbersOnCpu(),
    ):
        make()


class _TooLarge(BaseException):
    """Passes whatever a library catches."""


@contextlib.contextmanager
def _limits(weights: Mapping[str, Tensor], where: str) -> Iterator[None]:
    numbers = _TIMES * sum(tensor.numel() for tensor in weights.values()) + _MORE
    modules = _MODULES_A_TENSOR * len(weights) + _MORE_MODULES

    def count_tensor(_: nn.Module, __: str, tensor: object) -> None:
        nonlocal numbers
        numbers -= tensor.numel() if isinstance(tensor, Tensor) else 0
        if numbers < 0:
            raise _TooLarge

    def count_module(*_: object) -> None:
        nonlocal modules
        modules -= 1
        if modules < 0:
            raise _TooLarge

    handles = (
        hooks.register_module_parameter_registration_hook(count_tensor),
        hooks.register_module_buffer_registration_hook(count_tensor),
        hooks.register_module_module_registration_hook(count_module),
    )
    try:
        yield
    except _TooLarge as error:
        raise ModelError(
            f"the configuration asks for a network far larger than the weights in {where}; use the "
            "files of one model"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
