"""Model files: weights as safetensors, everything else in a JSON sidecar. No pickle, ever."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from robustann import files
from robustann.errors import ModelError, UsageError
from robustann.models.classifier import ImageClassifier, ModelSpec
from robustann.models.registry import (
    build,
    check_logits,
    expected_tensors,
    first_problem,
    is_code,
)

SCHEMA_VERSION = 1

_SUFFIX = ".safetensors"
_MAX_SIDECAR = 16 * 2**20
_MAX_HEADER = 100 * 2**20  # what the safetensors library accepts
_SHOWN = 3

_CONVERT = (
    "robustann reads safetensors alone, because other formats can run code when they are opened. "
    "Load the file where you trust it, copy the weights into a model from "
    "robustann.models.create_model, and call robustann.models.save_model"
)

# First bytes of what people may try to load.
_FORMATS = {
    b"PK\x03\x04": "a zip archive, as torch.save and TorchScript write",
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"\x1f\x8b": "a gzip archive",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a NumPy file",
    b"\x80": "a Python pickle, as old torch.save writes",
    b"\x08": "perhaps an ONNX file",
    b"version https://": "a Git LFS pointer, which 'git lfs pull' replaces by the file",
}


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
        model: what :func:`create_model` or :func:`load_model` returned.
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
    _check_finite(tensors, "the model", "train it again with a lower learning rate")
    if not is_code(model.spec.arch):
        _check_state(expected_tensors(model.spec), tensors, "the model", model.spec.arch)
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
) -> ImageClassifier:
    """Read a model that :func:`save_model` wrote; it comes in evaluation mode.

    Nothing in the files is run as code. A model whose architecture is ``pkg.module:factory`` is
    loaded only where the caller names the same factory.

    Args:
        path: the ``.safetensors`` file; its ``.json`` lies beside it.
        arch: the architecture that the file must have; needed for ``pkg.module:factory``.
        device: where the model goes.

    Raises:
        UsageError: a file that is not there, or another architecture than ``arch``.
        ModelError: another format, damage, weights that do not fit or are not finite.

    >>> load_model("nowhere.safetensors")
    Traceback (most recent call last):
    robustann.errors.UsageError: no model file 'nowhere.safetensors'; correct the path
    """
    source = Path(path)
    if not source.is_file():
        raise UsageError(f"no model file '{source}'; correct the path")
    content = _read_weights(source)
    sidecar = _read_sidecar(source)
    spec = sidecar.model
    came = hashlib.sha256(content).hexdigest()
    if came != sidecar.sha256:
        raise ModelError(
            f"expected '{source}' to have the SHA-256 {sidecar.sha256[:16]}... that "
            f"'{sidecar_path(source)}' states, got {came[:16]}...; the file is damaged, or the "
            "two do not belong together. Copy both again"
        )
    tensors = _parse(content, source)
    if arch is not None and arch != spec.arch:
        raise UsageError(
            f"expected '{source}' to be a '{arch}', got '{spec.arch}'; correct or leave out arch"
        )
    if is_code(spec.arch):
        if arch is None:
            raise ModelError(
                f"'{source}' needs the code of '{spec.arch}', which is never run on the word of "
                f"a file; if you trust it, pass arch='{spec.arch}' (--arch {spec.arch})"
            )
    else:
        # Before any memory is taken, because the sidecar may ask for a huge network.
        _check_state(_expected(spec, source), tensors, f"'{source}'", spec.arch)
    model = build(spec)
    _check_state(model.state_dict(), tensors, f"'{source}'", spec.arch)
    for name in ("mean", "std"):
        if not torch.equal(tensors[f"normalize.{name}"], model.get_buffer(f"normalize.{name}")):
            raise ModelError(
                f"'{source}' and '{sidecar_path(source)}' state different values for the "
                f"normalisation's {name}; one of the files was changed. Copy both again"
            )
    model.load_state_dict(tensors)
    _check_finite(model.state_dict(), f"'{source}'", "train the model again")
    if is_code(spec.arch):
        # The code may have changed since it made the model that was saved.
        check_logits(model)
    return model.to(device).eval()


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
        ModelError: it is damaged.

    >>> read_sidecar("nowhere.safetensors")
    Traceback (most recent call last):
    robustann.errors.UsageError: no 'nowhere.json' beside 'nowhere.safetensors'; it says ...
    """
    return _read_sidecar(Path(path))


def _read_weights(source: Path) -> bytes:
    size = source.stat().st_size
    with _readable(source) as stream:
        head = stream.read(16)
        length = int.from_bytes(head[:8], "little")
        # Safetensors: the header's length, then the header, which is JSON. Asked first, because
        # a length may begin with the bytes of another format.
        if head[8:9] != b"{" or length > _MAX_HEADER:
            name = next((n for b, n in _FORMATS.items() if head.startswith(b)), "something else")
            found = "an empty file" if not head else name
            raise ModelError(f"expected a safetensors file in '{source}', got {found}; {_CONVERT}")
        if 8 + length > size:
            raise ModelError(
                f"expected a whole safetensors file in '{source}', got {size} bytes, where its "
                f"header alone takes {8 + length}; it was cut off. Copy it again"
            )
        return head + stream.read()


def _readable(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(
            f"expected a file that can be read, got '{path}' ({error.strerror}); "
            "change its permissions or choose another one"
        ) from error


def _parse(content: bytes, source: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(content))
    # Damaged headers raise ValueError, KeyError and more beside its own class.
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"expected a whole safetensors file in '{source}', reading it failed with "
            f"{type(error).__name__}: {error}; copy it again"
        ) from error


def _read_sidecar(source: Path) -> Sidecar:
    path = sidecar_path(source)
    if not path.is_file():
        raise UsageError(
            f"no '{path.name}' beside '{source}'; it says which architecture and classes the "
            "weights belong to. Copy it there too, or make both with save_model"
        )
    if path.stat().st_size > _MAX_SIDECAR:
        raise ModelError(
            f"expected '{path}' to be at most {_MAX_SIDECAR} bytes, "
            f"got {path.stat().st_size}; it is no sidecar of a model"
        )
    with _readable(path) as stream:
        text = stream.read()
    try:
        version = json.loads(text)["schema_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(
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
        raise ModelError(f"'{path}' is damaged: {first_problem(error)}; copy it again") from error


def _expected(spec: ModelSpec, source: Path) -> dict[str, Tensor]:
    try:
        return expected_tensors(spec)
    except UsageError as error:
        # What is wrong is the file's content here, not a choice of the caller's.
        raise ModelError(f"'{sidecar_path(source)}' asks for what cannot be made: {error}") from (
            error
        )


def _check_state(
    expected: Mapping[str, Tensor], came: Mapping[str, Tensor], where: str, arch: str
) -> None:
    missing = [name for name in expected if name not in came]
    more = sorted(name for name in came if name not in expected)
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


def _form(tensor: Tensor) -> str:
    # Half precision may be loaded into single precision; integers into floats may not.
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"{kind}{list(tensor.shape)}"


def _check_finite(tensors: Mapping[str, Tensor], where: str, remedy: str) -> None:
    bad = [
        name
        for name, value in tensors.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise ModelError(
            f"expected finite weights in {where}, got NaN or infinity in {len(bad)} of "
            f"{len(tensors)} tensors, for example {bad[0]}; {remedy}"
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
