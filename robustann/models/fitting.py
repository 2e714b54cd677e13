"""Whether weights belong to a network: by names and shapes, before any memory is taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from robustann.errors import ModelError, UsageError
from robustann.models.classifier import ModelSpec
from robustann.models.escaped import escaped
from robustann.models.registry import expected_tensors

_SHOWN = 3
# Two numbers of classes that no architecture uses for anything else.
_PROBES = (1019, 1021)
# PyTorch before 0.4.1 did not save it, and nothing computes with it in evaluation.
_COUNTER = "num_batches_tracked"
_MAX_PREFIXES = 10


def check_state(
    expected: Mapping[str, Tensor], came: Mapping[str, Tensor], where: str, arch: str
) -> None:
    """Compare names, shapes and kinds of numbers.

    Raises:
        ModelError: they differ; says what is missing, unexpected and of another form.

    >>> check_state({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, "it", "small-cnn")
    Traceback (most recent call last):
    robustann.errors.ModelError: the weights of it do not fit 'small-cnn': 1 of another form: w
    float[3] instead of float[2]. Use the architecture, ...
    """
    missing = [name for name in expected if name not in came]
    more = sorted(escaped(name) for name in came if name not in expected)
    differ = [
        f"{name} {_form(came[name])} instead of {_form(expected[name])}"
        for name in expected
        if name in came and _form(came[name]) != _form(expected[name])
    ]
    kinds = {"missing": missing, "unexpected": more, "of another form": differ}
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}"
        for kind, names in kinds.items()
        if names
    ]
    if problems:
        raise ModelError(
            f"the weights of {where} do not fit '{arch}': {'; '.join(problems)}. "
            "Use the architecture, classes and image shape that they were trained with"
        )


def check_finite(tensors: Mapping[str, Tensor], where: str, remedy: str) -> None:
    """Refuse weights that are no numbers.

    Raises:
        ModelError: a floating-point tensor holds NaN or infinity.

    >>> check_finite({"w": torch.tensor([1.0, torch.nan])}, "it", "train it again")
    Traceback (most recent call last):
    robustann.errors.ModelError: expected finite weights in it, got NaN or infinity in 1 of 1 ...
    """
    bad = [
        name
        for name, value in tensors.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise ModelError(
            f"expected finite weights in {where}, got NaN or infinity in {len(bad)} of "
            f"{len(tensors)} tensors, for example {escaped(bad[0])}; {remedy}"
        )


def align(
    came: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights under the names that a network has, where a prefix makes the difference.

    Returns:
        The weights, and what was done to their names.

    >>> align({"model.w": torch.zeros(2)}, {"w": torch.zeros(2)})
    ({'w': tensor([0., 0.])}, ("took 'model.' off the names",))
    """
    best: tuple[int, str, str] = (_overlap(came, expected), "", "")
    for off in _prefixes(came):
        for before in _prefixes(expected):
            renamed = (before + name.removeprefix(off) for name in came)
            best = max(best, (_overlap(renamed, expected), off, before), key=lambda found: found[0])
    _, off, before = best
    tensors = {before + name.removeprefix(off): tensor for name, tensor in came.items()}
    notes = [f"took '{escaped(off)}' off the names"] * bool(off)
    notes += [f"put '{before}' before the names"] * bool(before)
    counters = [n for n in expected if n not in tensors and n.rpartition(".")[2] == _COUNTER]
    if counters:
        tensors |= {name: torch.zeros((), dtype=torch.int64) for name in counters}
        notes.append(f"set {len(counters)} missing {_COUNTER} to 0, which changes no answer")
    return tensors, tuple(notes)


def count_classes(arch: str, shape: tuple[int, int, int], came: Mapping[str, Tensor]) -> int:
    """How many classes the weights tell apart: the size that follows the number of classes.

    Raises:
        UsageError: they do not tell.

    >>> from robustann.models import create_model
    >>> net = create_model("small-cnn", class_names="abc", shape=(1, 8, 8)).net
    >>> count_classes("small-cnn", (1, 8, 8), net.state_dict())
    3
    """
    few, many = (_net_tensors(_blank(arch, classes, shape)) for classes in _PROBES)
    named, _ = align(came, few)
    found = {
        named[name].shape[place]
        for name in few
        if name in named and named[name].ndim == few[name].ndim
        for place, (low, high) in enumerate(zip(few[name].shape, many[name].shape, strict=True))
        if low != high
    }
    if len(found) != 1 or min(found) < 2:
        raise UsageError(
            f"expected weights of '{arch}', whose last layer tells the number of classes, got none "
            "that fit; correct arch, or name the classes with class_names"
        )
    return int(found.pop())


def _net_tensors(spec: ModelSpec) -> dict[str, Tensor]:
    """What the network itself holds, without the normalisation before it."""
    return {
        name.removeprefix("net."): tensor
        for name, tensor in expected_tensors(spec).items()
        if name.startswith("net.")
    }


def _blank(arch: str, classes: int, shape: tuple[int, int, int]) -> ModelSpec:
    return ModelSpec(
        arch=arch,
        class_names=tuple(map(str, range(classes))),
        shape=shape,
        mean=(0.0,) * shape[0],
        std=(1.0,) * shape[0],
    )


def _prefixes(names: Iterable[str]) -> list[str]:
    """The empty one, then those that all names share, ending at a dot."""
    found = [""]
    names = list(names)
    while names and len(found) < _MAX_PREFIXES:
        head, dot, _ = names[0][len(found[-1]) :].partition(".")
        longer = f"{found[-1]}{head}{dot}"
        if not dot or not all(name.startswith(longer) and name != longer for name in names):
            break
        found.append(longer)
    return found


def _overlap(names: Iterable[str], expected: Mapping[str, Tensor]) -> int:
    return sum(name in expected for name in names)


def _form(tensor: Tensor) -> str:
    # Half precision may be loaded into single precision; integers into floats may not.
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"{kind}{list(tensor.shape)}"
