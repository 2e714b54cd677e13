"""Model files: weights as safetensors, everything else in a JSON sidecar; and bare weights."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from robustann import files
from robustann.errors import DamagedError, ModelError, UsageError
from robustann.models.classifier import ImageClassifier, ModelSpec, Origin
from robustann.models.escaped import escaped
from robustann.models.fitting import align, check_finite, check_state, count_classes
from robustann.models.registry import (
    build,
    check_logits,
    expected_tensors,
    first_problem,
    is_code,
)
from robustann.models.sniffing import MAX_BYTES, Kind
from robustann.models.weights import Weights, read_weights

SCHEMA_VERSION = 1

_SUFFIX = ".safetensors"
_MAX_SIDECAR = 16 * 2**20
_MOST_CHANNELS = 4096


class Sidecar(BaseModel):
    """What the JSON file beside the weights holds.

    Attributes:
        schema_version: of this format.
        model: what the network is made from.
        training: how it was trained (any JSON values).
        metrics: how well it did (any JSON values).
        versions: of robustann, torch and python that wrote it.
        sha256: of the weight file, in hex.
        num_parameters: how many numbers are trained.

    >>> "sha256" in Sidecar.model_fields
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    model: ModelSpec
    training: dict[str, JsonValue]
    metrics: dict[str, JsonValue]
    versions: dict[str, str]
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    num_parameters: int = Field(ge=0)


def save_model(
    model: ImageClassifier,
    path: str | os.PathLike[str],
    *,
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights to ``path`` and the rest to the ``.json`` of the same name.

    Args:
        model: what :func:`robustann.models.create_model` or :func:`load_model` returned.
        path: ends in ``.safetensors``; missing folders are made, an older file is replaced.
        training: how it was trained, JSON values.
        metrics: how well it did, JSON values.

    Raises:
        UsageError: another ending, a folder that cannot be written to, no JSON values.
        ModelError: weights that are NaN or infinite, or that do not belong to the
            architecture, so that the file could not be loaded.

    >>> import tempfile
    >>> from robustann.models import create_model
    >>> model = create_model("small-cnn", class_names=["a", "b"], shape=(1, 8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(model, f"{folder}/model.safetensors", metrics={"accuracy": 0.5})
    ...     sorted(file.name for file in Path(folder).iterdir())
    ['model.json', 'model.safetensors']
    """
    from safetensors.torch import save

    target = Path(path)
    if target.suffix != _SUFFIX:
        raise UsageError(f"expected a path that ends in {_SUFFIX}, got '{target}'; rename it")
    # torch.compile wraps the model.
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, ImageClassifier):
        raise ModelError(
            f"expected a robustann.models.ImageClassifier, got {type(model).__name__}; "
            "make the model with create_model"
        )
    # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
    tensors = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
    }
    check_finite(tensors, "the model", "train it again with a lower learning rate")
    if not is_code(model.spec.arch):
        check_state(expected_tensors(model.spec), tensors, "the model", model.spec.arch)
    content = save(tensors, metadata={"format": "pt"})
    sidecar = Sidecar(
        schema_version=SCHEMA_VERSION,
        model=model.spec,
        training=_json(training, "training"),
        metrics=_json(metrics, "metrics"),
        versions={
            "robustann": _version("robustann"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        sha256=hashlib.sha256(content).hexdigest(),
        num_parameters=sum(p.numel() for p in model.parameters()),
    )
    files.write_bytes(target, content)
    files.write_text(sidecar_path(target), sidecar.model_dump_json(indent=2) + "\n")


def load_model(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    device: str | torch.device = "cpu",
    sha256: str | None = None,
    class_names: Sequence[str] | None = None,
    shape: tuple[int, int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_bytes: int = MAX_BYTES,
) -> ImageClassifier:
    """Read a model; it comes in evaluation mode, with ``origin`` saying what it came from.

    Either a file that :func:`save_model` wrote, or bare weights (safetensors, or a PyTorch
    checkpoint of tensors) with the architecture that they belong to. What the file is called does
    not matter. Nothing in it is run as code; a ``pkg.module:factory`` is called only where the
    caller names it.

    Args:
        path: the weights; for a saved model its ``.json`` lies beside it.
        arch: the architecture that the file must have; needed for bare weights and for
            ``pkg.module:factory``.
        device: where the model goes.
        sha256: what the file's SHA-256 must be, in hex.
        class_names: of bare weights, one a logit. Default: numbers from 0.
        shape: (C, H, W) of the images, needed for bare weights.
        mean: of bare weights, subtracted from images in [0, 1]; default 0.
        std: of bare weights, then divides; default 1.
        max_bytes: of the file, and of what it unpacks to.

    Raises:
        UsageError: a file that is not there, another architecture than ``arch``, or values that
            are missing or are not what the file says.
        RefusedError: the file could run code, is of a kind that is not read, exceeds a limit, or
            is another one than was pinned.
        DamagedError: it is damaged, or not the file that the one beside it states.
        ModelError: weights that do not fit or are not finite.

    >>> load_model("nowhere.safetensors")
    Traceback (most recent call last):
    robustann.errors.UsageError: no model file 'nowhere.safetensors'; correct the path
    """
    source = Path(path)
    weights = read_weights(source, sha256=sha256, max_bytes=max_bytes)
    if weights.kind == Kind.SAFETENSORS and (sidecar_path(source).exists() or arch is None):
        asked = {"class_names": class_names, "shape": shape, "mean": mean, "std": std}
        model, notes = _load_saved(source, weights, arch, asked)
    else:
        model, notes = _load_bare(source, weights, arch, class_names, shape, mean, std)
    model.origin = Origin(str(source), weights.sha256, weights.kind, (*weights.notes, *notes))
    return model.to(device).eval()


def _load_saved(
    source: Path,
    weights: Weights,
    arch: str | None,
    asked: Mapping[str, Sequence[str] | Sequence[float] | None],
) -> tuple[ImageClassifier, tuple[str, ...]]:
    sidecar = _read_sidecar(source)
    spec = sidecar.model
    if weights.sha256 != sidecar.sha256:
        raise DamagedError(
            f"expected '{source}' to have the SHA-256 {sidecar.sha256[:16]}... that "
            f"'{sidecar_path(source)}' states, got {weights.sha256[:16]}...; the file is damaged, "
            "or the two do not belong together. Copy both again"
        )
    if arch is not None and arch != spec.arch:
        raise UsageError(
            f"expected '{source}' to be a '{arch}', got '{escaped(spec.arch)}'; correct or leave "
            "out arch"
        )
    for name, value in asked.items():
        if value is not None and tuple(value) != getattr(spec, name):
            raise UsageError(
                f"'{sidecar_path(source)}' states another {name} than was asked for "
                f"({getattr(spec, name)!r:.80}, not {tuple(value)!r:.80}); leave out {name}"
            )
    if is_code(spec.arch):
        if arch is None:
            raise ModelError(
                f"'{source}' needs the code of '{spec.arch}', which is never run on the word of "
                f"a file; if you trust it, pass arch='{spec.arch}' (--arch {spec.arch})"
            )
    else:
        # Before any memory is taken, because the sidecar may ask for a huge network.
        check_state(_expected(spec, source), weights.tensors, f"'{source}'", spec.arch)
    return _filled(spec, weights.tensors, source, f"'{sidecar_path(source)}'"), ()


def _load_bare(
    source: Path,
    weights: Weights,
    arch: str | None,
    class_names: Sequence[str] | None,
    shape: tuple[int, int, int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[ImageClassifier, tuple[str, ...]]:
    lacking = [name for name, value in (("arch", arch), ("shape", shape)) if value is None]
    if arch is None or shape is None:
        raise UsageError(
            f"'{source}' holds weights and does not say what they belong to; pass "
            f"{' and '.join(lacking)}, for example arch='torchvision:resnet50' and "
            "shape=(3, 224, 224)"
        )
    tensors, notes = weights.tensors, []
    own = {f"normalize.{name}" for name in ("mean", "std")} <= tensors.keys()
    if own:
        # Written by save_model, its sidecar lost. Its normalisation holds unless it is contested.
        mean, std = (
            _stated(tensors, name, value) for name, value in (("mean", mean), ("std", std))
        )
        notes.append("took mean and std from the file")
        tensors = {n.removeprefix("net."): t for n, t in tensors.items() if n.startswith("net.")}
    elif mean is None and std is None:
        notes.append("no mean and std were given: the network gets images in [0, 1] as they are")
    if class_names is None:
        if is_code(arch):
            raise UsageError(
                f"pass class_names, for '{source}' does not say how many classes '{arch}' has"
            )
        class_names = tuple(map(str, range(count_classes(arch, shape, tensors))))
        notes.append(
            f"{len(class_names)} classes, by the shape of the last layer; they are numbered"
        )
    channels = shape[0]
    try:
        spec = ModelSpec(
            arch=arch,
            class_names=tuple(class_names),
            shape=shape,
            mean=tuple(mean) if mean is not None else (0.0,) * channels,
            std=tuple(std) if std is not None else (1.0,) * channels,
        )
    except ValidationError as error:
        raise UsageError(f"cannot make a model: {first_problem(error)}") from error
    model = build(spec) if is_code(arch) else None
    expected = expected_tensors(spec) if model is None else model.state_dict()
    net = {name.removeprefix("net."): t for name, t in expected.items() if name.startswith("net.")}
    tensors, renamed = align(tensors, net)
    check_state(net, tensors, f"'{source}'", arch)
    state = {
        **{f"net.{name}": tensor for name, tensor in tensors.items()},
        "normalize.mean": torch.tensor(spec.mean).view(-1, 1, 1),
        "normalize.std": torch.tensor(spec.std).view(-1, 1, 1),
    }
    return _filled(spec, state, source, "what was asked for", model), (*notes, *renamed)


def _stated(
    tensors: Mapping[str, Tensor], name: str, asked: Sequence[float] | None
) -> tuple[float, ...]:
    values = tuple(
        float(value) for value in tensors[f"normalize.{name}"].flatten()[:_MOST_CHANNELS]
    )
    if asked is not None and tuple(torch.tensor(asked).tolist()) != values:
        raise UsageError(
            f"the file states another {name} than was asked for ({values!r:.80}, not "
            f"{tuple(asked)!r:.80}); leave out {name}"
        )
    return values


def _filled(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    source: Path,
    other: str,
    model: ImageClassifier | None = None,
) -> ImageClassifier:
    """The model with the weights in it, proved to be whole."""
    model = build(spec) if model is None else model
    check_state(model.state_dict(), tensors, f"'{source}'", spec.arch)
    for name in ("mean", "std"):
        if not torch.equal(tensors[f"normalize.{name}"], model.get_buffer(f"normalize.{name}")):
            raise ModelError(
                f"'{source}' and {other} state different values for the normalisation's {name}; "
                "one of the files was changed. Copy both again"
            )
    model.load_state_dict(tensors)
    check_finite(model.state_dict(), f"'{source}'", "train the model again")
    if is_code(spec.arch):
        # The code may have changed since it made the model that was saved.
        check_logits(model)
    return model


def sidecar_path(path: str | os.PathLike[str]) -> Path:
    """Where the JSON beside a weight file lies.

    >>> sidecar_path("runs/model.safetensors").name
    'model.json'
    """
    return Path(path).with_suffix(".json")


def read_sidecar(path: str | os.PathLike[str]) -> Sidecar:
    """What the JSON beside the weight file ``path`` holds; the weights are not read.

    Raises:
        UsageError: there is none.
        DamagedError: it is damaged.

    >>> read_sidecar("nowhere.safetensors")
    Traceback (most recent call last):
    robustann.errors.UsageError: no 'nowhere.json' beside 'nowhere.safetensors'; it says ...
    """
    return _read_sidecar(Path(path))


def _readable(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(
            f"expected a file that can be read, got '{path}' ({error.strerror}); "
            "change its permissions or choose another one"
        ) from error


def _read_sidecar(source: Path) -> Sidecar:
    path = sidecar_path(source)
    if not path.is_file():
        raise UsageError(
            f"no '{path.name}' beside '{source}'; it says which architecture and classes the "
            "weights belong to. Copy it there too, make both with save_model, or pass arch and "
            "shape (--arch)"
        )
    if path.stat().st_size > _MAX_SIDECAR:
        raise DamagedError(
            f"expected '{path}' to be at most {_MAX_SIDECAR} bytes, "
            f"got {path.stat().st_size}; it is no sidecar of a model"
        )
    with _readable(path) as stream:
        text = stream.read()
    try:
        version = json.loads(text)["schema_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedError(
            f"expected JSON with a schema_version in '{path}', reading it failed with "
            f"{type(error).__name__}: {error}; copy it again"
        ) from error
    if version != SCHEMA_VERSION:
        raise ModelError(
            f"expected schema_version {SCHEMA_VERSION} in '{path}', got {version!r:.40}; "
            "load it with the version of robustann that wrote it"
        )
    try:
        return Sidecar.model_validate_json(text)
    except ValidationError as error:
        raise DamagedError(f"'{path}' is damaged: {first_problem(error)}; copy it again") from error


def _expected(spec: ModelSpec, source: Path) -> dict[str, Tensor]:
    try:
        return expected_tensors(spec)
    except UsageError as error:
        # What is wrong is the file's content here, not a choice of the caller's.
        raise ModelError(f"'{sidecar_path(source)}' asks for what cannot be made: {error}") from (
            error
        )


def _json(values: Mapping[str, Any] | None, what: str) -> dict[str, JsonValue]:
    try:
        # JSON has no NaN or infinity; they become null.
        plain: dict[str, JsonValue] = json.loads(
            json.dumps(dict(values or {})), parse_constant=lambda _: None
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"expected {what} to hold JSON values (numbers, text, lists, dicts), got one that is "
            f"not: {error}; convert it"
        ) from error
    return plain


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
