"""From what a user asked for to a module that maps images in [0, 1] to logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from robustann.errors import ModelError, RobustannError, UsageError
from robustann.factory import call_factory
from robustann.models.bounded import bounded
from robustann.models.classifier import ImageClassifier, ModelSpec
from robustann.models.fitting import align, check_finite, check_state
from robustann.models.foreign.adapters import Carried, ForeignClassifier, Network
from robustann.models.foreign.onnx_models import open_onnx
from robustann.models.foreign.programs import check_allowed, open_exported, open_torchscript
from robustann.models.foreign.timm_models import read_timm_folder, timm_carried, timm_network
from robustann.models.foreign.transformers_models import open_transformers
from robustann.models.io import load_model, read_sidecar, sidecar_path
from robustann.models.registry import TIMM_PREFIX, build, check_logits, first_problem
from robustann.models.request import ModelRequest
from robustann.models.sniffing import Kind, read_once, sniff
from robustann.models.weights import (
    Weights,
    check_environment,
    check_sha256,
    parse_weights,
)

_IMAGES = 16


class Known(Protocol):
    """The data that a model is for: what fills in where the model's files do not say."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One a class."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""

    @property
    def test(self) -> Any:
        """The part that is audited."""


Data = Callable[[int | None], Known]


@dataclass(frozen=True)
class Resolved:
    """A model, ready to use.

    Attributes:
        model: in evaluation mode on the CPU; maps images in [0, 1] to logits, and has a ``spec``
            with class names, shape, mean and std.
        class_names: as the model's files or the user name the outputs; None where nobody does.
        notes: what was taken from where, a line each.
        sha256: of the file, in hex; None where the user's code made it all.

    >>> from robustann.data import load_data
    >>> request = ModelRequest(factory="torch.nn:Flatten", mean=(0.5,), std=(0.25,))
    >>> found = resolve_model(request, lambda size: load_data("digits"))
    >>> found.sha256, found.class_names[:3], found.model.spec.mean  # from code, not from a file
    (None, ('0', '1', '2'), (0.5,))
    """

    model: nn.Module
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]
    sha256: str | None


def resolve_model(request: ModelRequest, data: Data) -> Resolved:
    """Open the model that is asked for, whatever its format; nothing in a file is run unasked.

    Args:
        request: what is asked for. What it states replaces what the files say.
        data: gives the data that the model is for, asked only when the file has been read and was
            not refused. It is told the size that the model takes, where that is known.

    Raises:
        UsageError: a file that is not there, options that do not fit, an extra that is missing.
        RefusedError: a file that could run code, or is another one than it should be.
        ModelError: damage, weights that do not fit, a network that is no image classifier.

    >>> from robustann.data import load_data
    >>> request = ModelRequest(factory="torch.nn:Flatten", mean=(0.5,), std=(0.25,))
    >>> resolved = resolve_model(request, lambda size: load_data("digits"))
    >>> resolved.model(torch.full((1, 1, 8, 8), 0.75)).unique(), resolved.model.spec.num_classes
    (tensor([1.]), 64)
    """
    request.check()
    check_environment()
    if request.model is None:
        return _finished(_from_factory(request, data), request, data)
    if request.is_folder:
        if request.model.startswith(TIMM_PREFIX):
            return _timm_folder(request, data)
        network = open_transformers(request.path, request.model_sha256)
        return _finished(network, request, data)
    path = request.path
    if _is_ours(path, request):
        return _ours(request)
    content = read_once(path)
    kind = sniff(content)
    if kind in (Kind.ONNX, Kind.TORCHSCRIPT, Kind.EXPORT):
        if request.arch is not None or request.factory is not None:
            raise UsageError(
                f"'{path}' is {kind.words}, a whole network; leave out --arch and --factory"
            )
        if kind is Kind.ONNX:
            return _finished(open_onnx(path, content, request.model_sha256), request, data)
        sha256 = check_sha256(content, request.model_sha256, f"'{path}'")
        check_allowed(kind, path, request.allow_code_execution)
        opened = open_torchscript if kind is Kind.TORCHSCRIPT else open_exported
        return _finished(opened(content, path, sha256), request, data)
    weights = parse_weights(content, f"'{path}'", sha256=request.model_sha256)
    return _from_weights(weights, request, data)


def _is_ours(path: Path, request: ModelRequest) -> bool:
    """Whether the JSON beside the file is what ``save_model`` wrote."""
    if path.suffix != ".safetensors" or request.factory is not None:
        return False
    beside = sidecar_path(path)
    if not beside.is_file():
        return False
    if request.arch is None:
        return True
    # Another project's file of that name, beside weights whose architecture is told.
    try:
        return bool(read_sidecar(path))
    except RobustannError:
        return False


def _ours(request: ModelRequest) -> Resolved:
    path = request.path
    model = load_model(path, arch=request.arch, sha256=request.model_sha256)
    sidecar = read_sidecar(path)
    carried = Carried(
        sidecar_path(path).name,
        mean=model.spec.mean,
        std=model.spec.std,
        size=model.spec.shape[1:],
        channels=model.spec.shape[0],
        class_names=model.spec.class_names,
    )
    if not _overridden(request):
        note = _normalisation(model.spec, carried, request)
        return Resolved(model, model.spec.class_names, (note,), sidecar.sha256)
    spec, notes = _spec(model.spec.arch, carried, request, model.spec.shape, None)
    changed: nn.Module = ImageClassifier(model.net, spec).eval()
    if spec.shape != model.spec.shape:
        changed = ForeignClassifier(model.net, spec, sidecar.sha256).eval()
    return Resolved(_checked(changed, spec), spec.class_names, notes, sidecar.sha256)


def _overridden(request: ModelRequest) -> bool:
    given = (request.class_names, request.mean, request.std, request.bounds, request.input_size)
    return any(value is not None for value in given)


def _from_factory(request: ModelRequest, data: Data) -> Network:
    factory = request.factory or ""
    known = data(_side(request, Carried(factory)))
    names = request.class_names or known.class_names
    net = call_factory(
        factory,
        "model",
        ModelError,
        num_classes=len(names),
        shape=known.shape,
        in_channels=known.shape[0],
    )
    if not isinstance(net, nn.Module):
        raise ModelError(
            f"expected '{factory}' to return a torch.nn.Module that gives logits, "
            f"got {type(net).__name__}; return the network"
        )
    carried = Carried(factory)
    notes: tuple[str, ...] = (f"{factory} is code, which was run",)
    spec = getattr(net, "spec", None)
    if isinstance(spec, ModelSpec):
        carried = replace(
            carried, size=spec.shape[1:], channels=spec.shape[0], class_names=spec.class_names
        )
        notes = (*notes, "it is a model of robustann, which normalises by itself")
    return Network(net, factory, carried, notes=notes)


def _timm_folder(request: ModelRequest, data: Data) -> Resolved:
    folder = request.path
    name, options, classes, carried = read_timm_folder(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UsageError(
            f"expected 'model.safetensors' in '{folder}'; save the weights again as safetensors"
        )
    weights = parse_weights(read_once(path), f"'{path}'", sha256=request.model_sha256)
    size = request.input_size or carried.size or data(None).shape[1:]
    channels = carried.channels or 3
    net = bounded(
        lambda: timm_network(name, classes, (channels, *size), options),
        weights.tensors,
        f"'{path}'",
    )
    fit_weights(net, weights.tensors, f"'{path}'", f"timm:{name}")
    network = Network(
        net, f"timm:{name}", replace(carried, size=size, channels=channels), weights.sha256
    )
    return _finished(network, request, data)


def _from_weights(weights: Weights, request: ModelRequest, data: Data) -> Resolved:
    path = request.path
    arch = request.arch or request.factory
    if arch is None:
        raise UsageError(
            f"'{path}' holds weights and nothing that says which network they belong to; pass "
            "--arch, for example --arch torchvision:resnet50 (see 'robustann list models'), or "
            "--factory pkg.module:function"
        )
    tensors, own = _without_ours(weights.tensors)
    carried = Carried(f"{path.name}", mean=own.get("mean"), std=own.get("std"))
    if arch.startswith(TIMM_PREFIX):
        told = timm_carried(arch.removeprefix(TIMM_PREFIX))
        carried = told if not own else replace(told, mean=carried.mean, std=carried.std)
        # Its weights say more about colours than what the library assumes.
        carried = replace(carried, channels=None)
    known = data(_side(request, carried))
    names = request.class_names or known.class_names
    spec, notes = _spec(arch, carried, request, known.shape, names)
    try:
        model = build(spec)
    except ValidationError as error:
        raise UsageError(f"cannot make a model: {first_problem(error)}") from error
    renamed = fit_weights(model.net, tensors, f"'{path}'", arch)
    model.eval()
    shown = tuple(f"{path.name}: {note}" for note in (*weights.notes, *renamed))
    if spec.shape == known.shape:
        result: nn.Module = model
    else:
        result = ForeignClassifier(model.net, spec, weights.sha256).eval()
    return Resolved(_checked(result, spec), request.class_names, (*shown, *notes), weights.sha256)


def fit_weights(
    net: nn.Module, tensors: Mapping[str, Tensor], where: str, arch: str
) -> tuple[str, ...]:
    """Load weights into a network, every one of them and no others; says what was done to names.

    Raises:
        ModelError: what is missing, unexpected or of another form; NaN or infinity.

    >>> fit_weights(nn.Linear(2, 1), {"weight": torch.zeros(1, 3)}, "'m.pt'", "mine")
    Traceback (most recent call last):
    robustann.errors.ModelError: the weights of 'm.pt' do not fit 'mine': 1 missing: bias; ...
    """
    expected = net.state_dict()
    named, notes = align(tensors, expected)
    check_state(expected, named, where, arch)
    check_finite(named, where, "train the model again")
    net.load_state_dict(named)
    return notes


def _without_ours(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, tuple[float, ...]]]:
    """The network's tensors, and the normalisation, of an ImageClassifier's whole state."""
    ours = {"normalize.mean", "normalize.std"}
    others = [name for name in tensors if name not in ours]
    if not ours <= tensors.keys() or not all(name.startswith("net.") for name in others):
        return tensors, {}
    own = {name: tuple(tensors[f"normalize.{name}"].flatten().tolist()) for name in ("mean", "std")}
    return {name.removeprefix("net."): tensors[name] for name in others}, own


def _finished(network: Network, request: ModelRequest, data: Data) -> Resolved:
    """A network with what it needs around it."""
    carried = network.carried
    known = data(_side(request, carried))
    names = request.class_names or carried.class_names
    net = network.net
    images = known.test.images(slice(0, _IMAGES)).cpu()
    channels = _channels(net, carried, request, known)
    carried = replace(carried, channels=channels)
    spec, told = _spec(network.arch, carried, request, known.shape, names or known.class_names)
    shape = spec.shape
    model = ForeignClassifier(net, spec, network.sha256).eval()
    outputs = _outputs(model, images, spec)
    notes: tuple[str, ...] = ()
    if network.replace is not None:
        with torch.no_grad():
            net, notes = network.replace(model.normalize(model.fit(images)))
    if outputs != spec.num_classes:
        if names is not None:
            raise ModelError(
                f"expected {len(names)} outputs, one for each class name, got {outputs}; name "
                "every output with --class-names, in their order"
            )
        # Whose they are is settled where the model meets the data.
        names = tuple(str(number) for number in range(outputs))
        spec = spec.model_copy(update={"class_names": names})
    model = ForeignClassifier(net, spec, network.sha256).eval()
    resized = f"; images of {_by(known.shape)} are resized in front of it"
    return Resolved(
        model,
        names,
        (
            *network.notes,
            *notes,
            *told,
            *([f"input: {_by(shape)}{resized}"] if shape[1:] != known.shape[1:] else []),
        ),
        network.sha256,
    )


def _channels(net: nn.Module, carried: Carried, request: ModelRequest, known: Known) -> int:
    """How many channels the network takes: what its file says, else what it does not fail on."""
    told = carried.channels or max(len(request.mean or ()), len(request.std or ()))
    if told > 1 or carried.channels:
        return told
    channels = known.shape[0]
    if channels == 1:
        size = request.input_size or carried.size or known.shape[1:]
        try:
            with torch.no_grad():
                net.eval()(torch.zeros(1, 1, *size))
        # Whatever a network for colour images raises.
        except Exception:
            return 3
    return channels


def _outputs(model: nn.Module, images: Tensor, spec: ModelSpec) -> int:
    """How many scores the model gives for an image."""
    try:
        with torch.no_grad():
            logits: object = model(images)
    except RobustannError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"'{spec.arch}' cannot take images of shape {spec.shape} ({type(error).__name__}: "
            f"{lines[0][:300]}); say what it takes with --input-size, and check that the data "
            "belong to it"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"expected '{spec.arch}' to give logits of shape ({len(images)}, classes), got {came}; "
            "wrap it so that it returns one row of logits an image"
        )
    return int(logits.shape[1])


def _checked(model: nn.Module, spec: ModelSpec) -> nn.Module:
    if isinstance(model, ImageClassifier):
        check_logits(model)
        return model
    outputs = _outputs(model, torch.zeros(1, *spec.shape), spec)
    if outputs != spec.num_classes:
        raise ModelError(
            f"expected {spec.num_classes} outputs, one a class, got {outputs}; name every output "
            "with --class-names"
        )
    return model


def _spec(
    arch: str,
    carried: Carried,
    request: ModelRequest,
    fallback: tuple[int, int, int],
    names: Sequence[str] | None,
) -> tuple[ModelSpec, tuple[str, ...]]:
    """What the model is, put together from the request, the file and the data."""
    size = request.input_size or carried.size or fallback[1:]
    channels = carried.channels or fallback[0]
    mean, std = _mean_and_std(carried, request, channels)
    chosen = request.class_names or names or carried.class_names or ()
    try:
        spec = ModelSpec(
            arch=arch,
            class_names=tuple(chosen),
            shape=(channels, int(size[0]), int(size[1])),
            mean=mean,
            std=std,
        )
    except ValidationError as error:
        raise UsageError(f"cannot make a model: {first_problem(error)}") from error
    return spec, (_normalisation(spec, carried, request),)


def _mean_and_std(
    carried: Carried, request: ModelRequest, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of images in [0, 1], with the bounds worked into them."""
    low, high = request.bounds or carried.bounds or (0.0, 1.0)
    # The user's bounds without a mean are all that the user wants.
    bare = request.bounds is not None
    mean = request.mean or (None if bare else carried.mean) or (0.0,)
    std = request.std or (None if bare else carried.std) or (1.0,)

    def each(values: tuple[float, ...], option: str) -> tuple[float, ...]:
        # One for all; three of a colour model for grey images become their average.
        if len(values) == 1:
            return values * channels
        if channels == 1 and len(values) == 3 and getattr(request, option) is None:
            return (sum(values) / 3,)
        return values

    # low + (high - low) x - mean, divided by std.
    width = high - low
    return (
        tuple((value - low) / width for value in each(mean, "mean")),
        tuple(value / width for value in each(std, "std")),
    )


def _normalisation(spec: ModelSpec, carried: Carried, request: ModelRequest) -> str:
    """Which normalisation is used, and who says so."""
    given = [f"--{name}" for name in ("mean", "std", "bounds") if getattr(request, name)]
    inside = carried.mean is not None or carried.std is not None or carried.bounds is not None
    plain = set(spec.mean) == {0.0} and set(spec.std) == {1.0}
    if not given and not inside:
        return (
            "normalisation: none, the network gets images in [0, 1] as they are, for nothing says "
            "otherwise; if it was trained on normalised images, pass --mean and --std"
        )
    values = "none" if plain else f"mean {_list(spec.mean)}, std {_list(spec.std)}"
    lacking = inside and len(given) < 2 and request.bounds is None
    sources = [*given, *([carried.source] if not given or lacking else [])]
    return f"normalisation: {values}, of images in [0, 1] (from {' and '.join(sources)})"


def _side(request: ModelRequest, carried: Carried) -> int | None:
    size = request.input_size or carried.size
    return None if size is None else max(size)


def _list(values: Sequence[float]) -> str:
    shown = values[:1] if len(set(values)) == 1 else values
    return ", ".join(f"{value:.4g}" for value in shown[:4])


def _by(shape: Sequence[int]) -> str:
    return f"{shape[-2]}x{shape[-1]}"
