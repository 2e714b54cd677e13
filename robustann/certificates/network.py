"""Following a network layer by layer, for whatever is to be carried through it.

A network is taken apart along its module tree; a module whose ``forward`` is its owner's own code
is followed by ``torch.fx``, its children in turn by this rule. Each step reaches a
:class:`Domain` as one of five operations. What is not known for sure is refused, for a bound on
a network that differs from the one that runs would prove nothing.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustann.errors import ModelError
from robustann.models import ImageClassifier

SUPPORTED = (
    "Linear, Conv2d, ReLU, LeakyReLU, AvgPool2d, AdaptiveAvgPool2d, MaxPool2d, BatchNorm, Flatten, "
    "Dropout, Identity, Sequential, and own modules that combine these by sums, constants, "
    "flatten, view, reshape and mean"
)

V = TypeVar("V")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Affine:
    """``apply(x) + bias``, where ``apply`` is linear.

    Attributes:
        apply: the linear part, on a batch.
        apply_abs: the same with the absolute values of its weights.
        bias: broadcasts against the output; None for zero.
        bias_size: what the roundings of the bias are relative to; None means ``|bias|``.
        roundings: how often a float32 program rounds on the way to one output at most; 0 if it
            only moves numbers about.
        weight: of a linear layer, (K, F).
    """

    apply: Callable[[Tensor], Tensor]
    apply_abs: Callable[[Tensor], Tensor]
    roundings: int
    bias: Tensor | None = None
    bias_size: Tensor | None = None
    weight: Tensor | None = None


class Domain(ABC, Generic[V]):
    """What is carried through a network, as values of the type ``kind``.

    Attributes:
        kind: the class of the values.
        reference: a tensor of the type and on the device to compute with.
    """

    kind: type[V]
    reference: Tensor

    @abstractmethod
    def affine(self, x: V, op: Affine) -> V:
        """Through an affine map."""

    @abstractmethod
    def relu(self, x: V, slope: float) -> V:
        """Through ``max(x, slope * x)``, 0 <= slope <= 1."""

    @abstractmethod
    def max_pool(self, x: V, pool: nn.MaxPool2d) -> V:
        """Through the largest of each window."""

    @abstractmethod
    def add(self, x: V, y: V) -> V:
        """Of two branches, the sum."""

    @abstractmethod
    def shape(self, x: V) -> torch.Size:
        """That of the tensor which the network has here."""


def walk(module: nn.Module, value: V, domain: Domain[V], path: str = "model") -> V:
    """``value`` carried through ``module`` as it is in eval mode.

    Raises:
        ModelError: the module, or one inside it, is not supported; names it and what is.
    """
    # torch.compile wraps what it compiles.
    module = getattr(module, "_orig_mod", module)
    if module._forward_hooks or module._forward_pre_hooks:
        raise _unsupported(path, module, "has forward hooks, which may change what it computes")
    if _runs(module, ImageClassifier):
        hidden = walk(module.normalize, value, domain, f"{path}.normalize")
        return walk(module.net, hidden, domain, f"{path}.net")
    if _runs(module, nn.Sequential):
        for name, child in module.named_children():
            value = walk(child, value, domain, f"{path}.{name}")
        return value
    for kind, rule in _LAYERS.items():
        if _runs(module, kind):
            answer: V = rule(module, value, domain, path)
            return answer
    if type(module).__module__.startswith("torch."):
        raise _unsupported(path, module, "is of a kind for which no bound is known here")
    return _traced(module, value, domain, path)


def _runs(module: Any, kind: type[M]) -> TypeGuard[M]:
    """Whether calling it runs the code of ``kind``: a subclass may have code of its own."""
    own = vars(module).get("forward") is not None
    return isinstance(module, kind) and type(module).forward is kind.forward and not own


def _unsupported(path: str, module: nn.Module, why: str) -> ModelError:
    return ModelError(
        f"expected a network made of {SUPPORTED}, but {path} ({type(module).__name__}) {why}; "
        "replace it, or certify by randomised smoothing, which takes any model"
    )


# Layers. The arguments of each rule: the module, the value, the domain, the path for errors.


def _linear(module: nn.Linear, x: V, domain: Domain[V], path: str) -> V:
    weight = module.weight.to(domain.reference)
    size = weight.abs()
    return domain.affine(
        x,
        Affine(
            apply=lambda v: F.linear(v, weight),
            apply_abs=lambda v: F.linear(v, size),
            bias=None if module.bias is None else module.bias.to(domain.reference),
            roundings=module.in_features + 2,
            weight=weight,
        ),
    )


def _conv(module: nn.Conv2d, x: V, domain: Domain[V], path: str) -> V:
    if module.padding_mode != "zeros":
        raise _unsupported(path, module, f"pads with '{module.padding_mode}' instead of zeros")
    weight = module.weight.to(domain.reference)
    size = weight.abs()
    settings: Any = (module.stride, module.padding, module.dilation, module.groups)
    bias = None if module.bias is None else module.bias.to(domain.reference).view(-1, 1, 1)
    return domain.affine(
        x,
        Affine(
            apply=lambda v: F.conv2d(v, weight, None, *settings),
            apply_abs=lambda v: F.conv2d(v, size, None, *settings),
            bias=bias,
            roundings=weight[0].numel() + 2,
        ),
    )


def _batch_norm(module: _BatchNorm, x: V, domain: Domain[V], path: str) -> V:
    if module.running_mean is None or module.running_var is None:
        raise _unsupported(path, module, "has no running statistics, so each image's logits "
                                         "depend on its batch")  # fmt: skip
    ones = (-1,) + (1,) * (len(domain.shape(x)) - 2)
    mean = module.running_mean.to(domain.reference).view(ones)
    scale = (module.running_var.to(domain.reference) + module.eps).rsqrt().view(ones)
    shift = torch.zeros_like(mean)
    if module.weight is not None:
        scale = scale * module.weight.to(domain.reference).view(ones)
        shift = module.bias.to(domain.reference).view(ones)
    size = scale.abs()
    return domain.affine(
        x,
        Affine(
            apply=lambda v: v * scale,
            apply_abs=lambda v: v * size,
            bias=shift - mean * scale,
            # Some kernels subtract the mean first, some fold all into one product and one sum.
            bias_size=shift.abs() + mean.abs() * size,
            roundings=16,
        ),
    )


def _average(x: V, domain: Domain[V], apply: Callable[[Tensor], Tensor], window: int) -> V:
    return domain.affine(x, Affine(apply=apply, apply_abs=apply, roundings=window + 2))


def _avg_pool(module: nn.AvgPool2d, x: V, domain: Domain[V], path: str) -> V:
    sides = module.kernel_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    if module.divisor_override is not None and module.divisor_override < 0:
        raise _unsupported(path, module, "divides by a negative number")
    return _average(x, domain, module.forward, height * width)


def _adaptive_pool(module: nn.AdaptiveAvgPool2d, x: V, domain: Domain[V], path: str) -> V:
    height, width = domain.shape(x)[-2:]
    return _average(x, domain, module.forward, height * width)


def _max_pool(module: nn.MaxPool2d, x: V, domain: Domain[V], path: str) -> V:
    if module.return_indices:
        raise _unsupported(path, module, "returns indices")
    return domain.max_pool(x, module)


def _relu(module: nn.ReLU, x: V, domain: Domain[V], path: str) -> V:
    return domain.relu(x, 0.0)


def _leaky(module: nn.LeakyReLU, x: V, domain: Domain[V], path: str) -> V:
    if not 0 <= module.negative_slope <= 1:
        raise _unsupported(path, module, f"has a slope of {module.negative_slope:g}, not 0 to 1")
    return domain.relu(x, module.negative_slope)


def _moved(x: V, domain: Domain[V], move: Callable[[Tensor], Tensor]) -> V:
    return domain.affine(x, Affine(apply=move, apply_abs=move, roundings=0))


def _flatten(module: nn.Flatten, x: V, domain: Domain[V], path: str) -> V:
    return _moved(x, domain, module.forward)


def _same(module: nn.Module, x: V, domain: Domain[V], path: str) -> V:
    return x


_LAYERS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.MaxPool2d: _max_pool,
    nn.ReLU: _relu,
    nn.LeakyReLU: _leaky,
    nn.Flatten: _flatten,
    nn.Dropout: _same,
    nn.Dropout2d: _same,
    nn.Identity: _same,
}


# Modules with code of their own.


class _OwnForward(fx.Tracer):
    """Records what one module's own code does; its children are single calls."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            known = [*self.root.buffers(), *vars(self.root).values()]
            # It would be recorded as a constant, though it may be another one each time.
            if not any(a is tensor for tensor in known):
                raise TypeError("forward makes a tensor of its own; register it as a buffer")
        return super().create_arg(a)


# What a forward may call, by the name under which it is handled.
_CALLS: dict[Any, str] = {
    operator.add: "add", operator.iadd: "add", torch.add: "add", "add": "add",
    operator.sub: "sub", operator.isub: "sub", torch.sub: "sub", "sub": "sub",
    operator.mul: "mul", operator.imul: "mul", torch.mul: "mul", "mul": "mul",
    operator.truediv: "div", operator.itruediv: "div", torch.div: "div", "div": "div",
    operator.neg: "neg",
    F.relu: "relu", torch.relu: "relu", "relu": "relu",
    torch.flatten: "flatten", "flatten": "flatten",
    torch.reshape: "reshape", "reshape": "reshape", "view": "reshape",
    torch.mean: "mean", "mean": "mean",
    "contiguous": "contiguous",
    F.adaptive_avg_pool2d: "adaptive_avg_pool2d",
}  # fmt: skip
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
# On sizes and on constants; nothing here draws random numbers or changes its operand.
_CONSTANT_METHODS = {"size", "dim", "view", "reshape", "unsqueeze", "to"}


def _traced(module: nn.Module, value: V, domain: Domain[V], path: str) -> V:
    training = module.training
    try:
        module.training = False
        graph = _OwnForward().trace(module)
    # A forward is anyone's code: it may raise anything when it meets a placeholder.
    except Exception as error:
        raise _unsupported(
            path, module, f"cannot be followed by torch.fx ({type(error).__name__}: {error})"
        ) from error
    finally:
        module.training = training
    found: dict[fx.Node, Any] = {}
    taken = False
    for node in graph.nodes:
        args = fx.node.map_arg(node.args, found.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, found.__getitem__)
        if node.op == "placeholder":
            if taken and not args:
                raise _unsupported(path, module, "takes more than one input")
            found[node], taken = (args[0] if taken else value), True
        elif node.op == "get_attr":
            found[node] = operator.attrgetter(node.target)(module)
        elif node.op == "call_module":
            child = module.get_submodule(node.target)
            inner = f"{path}.{node.target}"
            if len(args) != 1 or kwargs or not isinstance(args[0], domain.kind):
                raise _unsupported(inner, child, "is called with more than one tensor of features")
            if any(getattr(part, "inplace", False) for part in child.modules()):
                _only_use(node, inner, child)
            found[node] = walk(child, args[0], domain, inner)
        elif node.op == "output":
            if not isinstance(args[0], domain.kind):
                raise _unsupported(path, module, "returns something else than one tensor")
            return args[0]
        else:
            found[node] = _called(node, args, kwargs, domain, module, path)
    raise _unsupported(path, module, "returns nothing")


def _only_use(node: fx.Node, path: str, module: nn.Module) -> None:
    """Refuse to change in place what is read elsewhere: the recorded graph would not show it."""
    changed = node.args[0]
    if isinstance(changed, fx.Node) and len(changed.users) > 1:
        raise _unsupported(path, module, "changes in place what is also used elsewhere")


def _called(
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    domain: Domain[V],
    module: nn.Module,
    path: str,
) -> Any:
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    values = [arg for arg in args if isinstance(arg, domain.kind)]
    if not values:
        if node.op == "call_function" and target.__module__ in ("_operator", "builtins"):
            return target(*args, **kwargs)
        if node.op == "call_method" and name in _CONSTANT_METHODS:
            return getattr(args[0], name)(*args[1:], **kwargs)
    elif name in ("size", "dim"):
        shape = domain.shape(values[0])
        return len(shape) if name == "dim" else shape[args[1]] if len(args) > 1 else shape
    elif target is getattr and args[1] == "shape":
        return domain.shape(values[0])
    elif target in _CALLS:
        if target in _IN_PLACE or kwargs.get("inplace", False):
            _only_use(node, path, module)
        answer = _applied(_CALLS[target], args, kwargs, domain)
        if answer is not None:
            return answer
    raise _unsupported(path, module, f"calls {name} in a way for which no bound is known here")


def _applied(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], domain: Domain[V]) -> Any:
    """The outcome of a call, or None if it is not one of those known."""
    x, rest = args[0], args[1:]
    kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
    if name in ("add", "sub", "mul", "div"):
        return None if kwargs or len(rest) != 1 else _arithmetic(name, x, rest[0], domain)
    if name in ("flatten", "reshape"):
        before = domain.shape(x)
        move = torch.flatten if name == "flatten" else Tensor.reshape
        moved = _moved(x, domain, lambda v: move(v, *rest, **kwargs))
        # Images must not be mixed.
        return moved if domain.shape(moved)[:1] == before[:1] else None
    if name == "mean":
        dims = rest[0] if rest else kwargs.get("dim")
        dims = (dims,) if isinstance(dims, int) else dims
        rank = len(domain.shape(x))
        if not dims or any(dim % rank == 0 for dim in dims):
            return None
        window = 1
        for dim in dims:
            window *= domain.shape(x)[dim]
        return _average(x, domain, lambda v: v.mean(*rest, **kwargs), window)
    if name == "adaptive_avg_pool2d":
        return _adaptive_pool(nn.AdaptiveAvgPool2d(*rest, **kwargs), x, domain, "")
    if rest or kwargs:
        return None
    if name == "relu":
        return domain.relu(x, 0.0)
    if name == "neg":
        return _negated(x, domain)
    return x


def _negated(x: V, domain: Domain[V]) -> V:
    return domain.affine(x, Affine(apply=torch.neg, apply_abs=lambda v: v, roundings=0))


def _arithmetic(name: str, x: Any, y: Any, domain: Domain[V]) -> Any:
    both = isinstance(x, domain.kind) and isinstance(y, domain.kind)
    if both:
        if name in ("mul", "div"):
            return None
        return domain.add(x, y if name == "add" else _negated(y, domain))
    first = isinstance(x, domain.kind)
    value, other = (x, y) if first else (y, x)
    if not isinstance(other, int | float | Tensor) or (name == "div" and not first):
        return None
    constant = torch.as_tensor(other).to(domain.reference)
    if name in ("mul", "div"):
        if name == "div":
            constant = 1 / constant
        size = constant.abs()
        return domain.affine(
            value,
            Affine(apply=lambda v: v * constant, apply_abs=lambda v: v * size, roundings=4),
        )
    if name == "sub":
        value, constant = (value, -constant) if first else (_negated(value, domain), constant)
    return domain.affine(
        value,
        Affine(apply=lambda v: v, apply_abs=lambda v: v, bias=constant, roundings=4),
    )
