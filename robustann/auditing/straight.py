"""A model whose steps without a gradient are taken for the identity in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Steps of a staircase: their slope is zero wherever it exists.
_STAIRS = frozenset({"round", "floor", "ceil", "trunc", "fix", "sign", "sgn"})
# Comparisons, and which way the truth of one moves with its first operand.
_COMPARED = {
    "gt": 1, "ge": 1, "__gt__": 1, "__ge__": 1, "greater": 1, "greater_equal": 1,
    "lt": -1, "le": -1, "__lt__": -1, "__le__": -1, "less": -1, "less_equal": -1,
}  # fmt: skip
_CAST = frozenset({"float", "double", "half", "bfloat16", "to", "type", "type_as"})
# What leaves the order of the classes as it is, if the other operand is a number above zero.
_SCALED = frozenset({"mul", "__mul__", "__rmul__", "div", "true_divide", "__truediv__"})
_SHIFTED = frozenset({"add", "__add__", "__radd__", "sub", "__sub__", "clamp", "log", "contiguous"})
_ADDED = frozenset({"add", "__add__", "__radd__", "__iadd__", "add_"})
_OUT_OF_TORCH = frozenset({"numpy", "__array__", "tolist", "item"})
# What may be handed images; none of them works in place.
_TAKING_IMAGES = frozenset({
    "conv2d", "linear", "flatten", "reshape", "view", "pad", "interpolate", "permute", "unsqueeze",
    "batch_norm", "group_norm", "instance_norm", "layer_norm", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "cat", "matmul", "__matmul__", "clone", "contiguous", "unfold", "clamp",
    "relu", "add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub", "mul", "__mul__",
    "__rmul__", "div", "__truediv__", "true_divide", "expand", "repeat",
})  # fmt: skip
# A tensor of the images' shape that correlates with them so much is made from them.
_ALIKE = 0.7
_LOGITS, _TOLD_APART, _LARGEST = "_straight_logits", "_straight_compared", "_straight_argmax"
_STACKED = "_straight_stacked"


class Straightened(nn.Module):
    """The model itself, with a gradient where it has none (BPDA: Athalye et al., ICML 2018).

    Rounding, signs and comparisons, ``detach`` and ``no_grad`` count as the identity in the
    backward pass. So does every way from the images to a tensor that has their shape, looks like
    them and carries no gradient, such as a detour through NumPy or a codec. A softmax or a one-hot
    class at the very end is left off; where several of these vote, their logits do. What is
    computed is the same, except for that end; and what a model does in place, or compiled, stays as
    it is.

    >>> class Rounded(nn.Module):
    ...     def forward(self, x):
    ...         return (4 * x).round().flatten(1).softmax(1)
    >>> x = torch.tensor([[[[0.6, 0.7]]]], requires_grad=True)
    >>> logits = Straightened(Rounded())(x)
    >>> logits.tolist(), torch.autograd.grad(logits[0, 1], x)[0].tolist()
    ([[2.0, 3.0]], [[[[0.0, 4.0]]]])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            x = x.detach()
        with _Straight(x):
            answer: Tensor = self.model(x)
        logits: Tensor = getattr(answer, _LOGITS, answer)
        fits = isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(x)
        if x.requires_grad and fits:
            # A batch none of whose images is known again behind a detour has no gradient: that of
            # each is zero, as it is beside others.
            logits = logits + 0.0 * x.flatten(1).sum(1, keepdim=True).to(logits.dtype)
        return logits


class _Straight(TorchFunctionMode):
    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self._images = images

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = getattr(func, "__name__", "")
        options = dict(kwargs or {})
        if named == "_set_grad_enabled" and self._images.requires_grad:
            # Under no_grad nothing could be taken for anything.
            return None
        first = args[0] if args else options.get("input")
        if not isinstance(first, Tensor):
            if named == "cat" and isinstance(first, (tuple, list)):
                args = ([self._linked(one) for one in first], *args[1:])
            value = func(*args, **options)
            if named == "stack" and isinstance(first, (tuple, list)):
                _note_stack(first, args, options, value)
            return value
        if named == "detach":
            return first.view_as(first)
        if named in _OUT_OF_TORCH:
            return func(first.detach(), *args[1:], **options)
        if named in _TAKING_IMAGES and args:
            args = tuple(self._linked(one) for one in args)
            first = args[0]
        value = func(*args, **options)
        if not isinstance(value, Tensor):
            return value
        if named in _STAIRS and value.is_floating_point():
            value = _straight(value, first)
        elif named in _CAST and value.is_floating_point() and hasattr(first, _TOLD_APART):
            value = _straight(value, getattr(first, _TOLD_APART))
        elif named in _COMPARED and len(args) > 1:
            apart = first - args[1]
            if apart.is_floating_point() and apart.requires_grad:
                setattr(value, _TOLD_APART, apart * _COMPARED[named])
        _pass_on(named, first, args, options, value)
        return value

    def _linked(self, one: Any) -> Any:
        """The tensor, with the images' gradient if it seems to be made from them."""
        images = self._images
        if not isinstance(one, Tensor) or one is images or one.requires_grad:
            return one
        if one.shape != images.shape or not one.is_floating_point() or not images.requires_grad:
            return one
        # Row by row: what is made of an image must not hang on the others.
        rows = [part.detach().flatten(1).double() for part in (one, images)]
        rows = [part - part.mean(1, keepdim=True) for part in rows]
        lengths = rows[0].norm(dim=1) * rows[1].norm(dim=1)
        alike = (rows[0] * rows[1]).sum(1) > _ALIKE * lengths
        if not bool(alike.any()):
            return one
        share = alike.to(images.dtype).view(-1, *[1] * (one.dim() - 1))
        return one + (share * (images - images.detach())).to(one.dtype)


def _straight(value: Tensor, source: Tensor) -> Tensor:
    """``value``, with the gradient of ``source``."""
    if not source.requires_grad:
        return value
    return value.detach() + (source - source.detach()).to(value.dtype)


def _note_stack(
    stacked: Sequence[Tensor], args: tuple[Any, ...], options: Mapping[str, Any], value: Tensor
) -> None:
    """Remember of which logits each layer of a stack was made."""
    dim = args[1] if len(args) > 1 else options.get("dim", 0)
    if dim == 0 and all(hasattr(one, _LOGITS) for one in stacked):
        setattr(value, _STACKED, torch.stack([getattr(one, _LOGITS) for one in stacked]))


def _pass_on(
    named: str, first: Tensor, args: tuple[Any, ...], options: Mapping[str, Any], value: Tensor
) -> None:
    """Remember of which logits a probability or a class was made."""
    dim = args[1] if len(args) > 1 else options.get("dim")
    if named in ("softmax", "log_softmax", "argmax") and first.dim() == 2 and dim in (1, -1):
        setattr(value, _LARGEST if named == "argmax" else _LOGITS, first)
    elif named in _ADDED and all(hasattr(one, _LOGITS) for one in args[:2]) and len(args) > 1:
        # A vote of several: the logits vote.
        setattr(value, _LOGITS, getattr(first, _LOGITS) + getattr(args[1], _LOGITS))
    elif named in ("sum", "mean") and hasattr(first, _STACKED) and dim == 0:
        setattr(value, _LOGITS, getattr(first, _STACKED).sum(0))
    elif named == "one_hot" and hasattr(first, _LARGEST):
        setattr(value, _LOGITS, getattr(first, _LARGEST))
    elif hasattr(first, _LOGITS) and value.shape == first.shape:
        other = args[1] if len(args) > 1 else 1
        number = isinstance(other, (int, float))
        if (
            named in _STAIRS | _CAST
            or (named in _SCALED and number and other > 0)
            or (named in _SHIFTED and (number or named in ("clamp", "log", "contiguous")))
        ):
            setattr(value, _LOGITS, getattr(first, _LOGITS))
