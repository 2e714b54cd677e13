"""Seal a model file, and verify later that it is still the one that was sealed.

A manifest beside the file states the SHA-256 of the whole, of each tensor, and of the sidecar. With
a key, an HMAC-SHA256 (RFC 2104) signs the manifest: who does not know the key cannot make another
that passes. Without one, it detects accidents alone, for who can alter the model can write a new
manifest too. Nothing in the files is ever run.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from robustann import files
from robustann.defenses.guard import WeightGuard
from robustann.errors import ModelError, RefusedError, UsageError, first_invalid
from robustann.models.io import read_sidecar, sidecar_path
from robustann.models.layout import Layout

SCHEMA_VERSION = 1

PathLike = str | os.PathLike[str]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Finite = Annotated[float, Field(allow_inf_nan=False)]

# Half the digest: below that, the key is what is easiest to guess (RFC 2104, section 3).
_LEAST_KEY = 16
_MOST_KEY = 2**16
_MAX_MANIFEST = 64 * 2**20
# Keeps a signature from being one of anything else made with the same key.
_PURPOSE = b"robustann seal 1\n"


class SealedTensor(BaseModel):
    """What a manifest states of a tensor.

    Attributes:
        dtype: as safetensors names it.
        shape: of the tensor.
        sha256: of its bytes, in hex.
        low: smallest value; None where it holds no floating-point numbers.
        high: largest value, likewise.

    >>> SealedTensor(dtype="F32", shape=(2,), sha256="0" * 64, low=-1, high=1).high
    1.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[int, ...]
    sha256: _Sha256
    low: _Finite | None
    high: _Finite | None


class Manifest(BaseModel):
    """What is stated of a sealed model.

    Attributes:
        schema_version: of this format.
        file: name of the weight file; it may be renamed.
        size: of the file in bytes.
        sha256: of the file, in hex.
        sidecar_sha256: of the ``.json`` beside it; None where there was none.
        tensors: by name.
        versions: of robustann, torch and python that sealed it.
        signature: HMAC-SHA256 of all the rest, in hex; None where no key was given.

    Helps against a weight file or sidecar altered by accident and, signed, by somebody who does
    not know the key. Known not to help against adversarial inputs, against a model that was bad
    when it was sealed, or against faults in memory after loading, unless
    :func:`changed_tensors` is asked again.

    >>> "signature" in Manifest.model_fields
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str] = "seal"
    paper: ClassVar[str] = "https://www.rfc-editor.org/rfc/rfc2104"
    helps: ClassVar[tuple[str, ...]] = (
        "a weight file or sidecar altered by accident",
        "with a key: one altered by somebody who does not know the key",
    )
    limits: ClassVar[tuple[str, ...]] = (
        "adversarial inputs",
        "faults in memory after loading, unless changed_tensors is asked again",
        "a model that was bad when it was sealed",
        "somebody who knows the key",
    )

    schema_version: Literal[1] = 1
    file: str
    size: int = Field(ge=0)
    sha256: _Sha256
    sidecar_sha256: _Sha256 | None
    tensors: dict[str, SealedTensor]
    versions: dict[str, str]
    signature: _Sha256 | None = None

    def guard(self, *, margin: float = 0.01) -> WeightGuard:
        """The guard with the sealed ranges; see :class:`robustann.defenses.WeightGuard`."""
        ranges = {
            name: (tensor.low, tensor.high)
            for name, tensor in self.tensors.items()
            if tensor.low is not None and tensor.high is not None
        }
        return WeightGuard.from_ranges(ranges, margin=margin)

    def save(self, path: PathLike) -> None:
        """Write the manifest as JSON, whole or not at all."""
        files.write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: PathLike) -> Manifest:
        """Read a manifest; its signature is not checked.

        Raises:
            UsageError: the file cannot be read.
            RefusedError: it is damaged, so it vouches for nothing.

        >>> Manifest.load("nowhere.json")
        Traceback (most recent call last):
        robustann.errors.UsageError: expected a manifest, could not read 'nowhere.json' (No such ...
        """
        try:
            with files.open_regular(path) as stream:
                text = stream.read(_MAX_MANIFEST + 1)
        except OSError as error:
            raise UsageError(
                f"expected a manifest, could not read '{path}' ({error.strerror or error}); "
                "name the file that 'robustann seal' wrote"
            ) from error
        if len(text) > _MAX_MANIFEST:
            raise RefusedError(
                f"expected '{path}' to be at most {_MAX_MANIFEST} bytes, got more; it is no "
                "manifest, and vouches for nothing"
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            place, reason = first_invalid(error)
            raise RefusedError(
                f"expected a manifest of schema version {SCHEMA_VERSION} in '{path}', but at "
                f"{_shown(place)}: {reason:.200}; it vouches for nothing. Seal a copy of "
                "the model that you trust again"
            ) from error


@dataclass(frozen=True)
class Verification:
    """What verifying found.

    Attributes:
        changes: what differs from what was sealed, one sentence each; none for an intact model.
        tensors: names of the tensors that were changed, added or removed.
        signed: whether a signature was checked with a key. Otherwise only accidents are ruled out.

    >>> Verification((), (), signed=False).intact
    True
    """

    changes: tuple[str, ...]
    tensors: tuple[str, ...]
    signed: bool

    intact_means: ClassVar[str] = "the file, every tensor and the sidecar are as they were sealed"

    @property
    def intact(self) -> bool:
        """Whether nothing differs."""
        return not self.changes


def read_key(path: PathLike) -> bytes:
    """The key in a file: all its bytes, a line break at the end included.

    Raises:
        UsageError: it cannot be read, or is too short or too long.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "key").write_bytes(b"secret")
    ...     read_key(f"{folder}/key")
    Traceback (most recent call last):
    robustann.errors.UsageError: expected a key of 16 to 65536 bytes in ..., got 6; make ...
    """
    try:
        with Path(path).open("rb") as stream:
            key = stream.read(_MOST_KEY + 1)
    except OSError as error:
        raise UsageError(
            f"expected a key file, could not read '{path}' ({error.strerror or error}); "
            "correct the path"
        ) from error
    if not _LEAST_KEY <= len(key) <= _MOST_KEY:
        came = len(key) if len(key) <= _MOST_KEY else "more"
        raise UsageError(
            f"expected a key of {_LEAST_KEY} to {_MOST_KEY} bytes in '{path}', got {came}; make "
            "one with 'openssl rand -hex 32'"
        )
    return key


def manifest_path(path: PathLike) -> Path:
    """Where the manifest of a weight file lies, if no other place is named.

    >>> manifest_path("runs/model.safetensors").name
    'model.seal.json'
    """
    return Path(path).with_suffix(".seal.json")


def seal_model(path: PathLike, *, key: bytes | None = None) -> Manifest:
    """The manifest of a weight file and of the ``.json`` beside it, if there is one.

    Args:
        path: a ``.safetensors`` file.
        key: signs the manifest; see :func:`read_key`.

    Raises:
        UsageError: no such file.
        ModelError: the file or its sidecar is damaged, they do not belong together, or weights
            are not finite: what is bad already is not sealed.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"w": torch.tensor([0.5, 2.0])}, f"{folder}/m.safetensors")
    ...     manifest = seal_model(f"{folder}/m.safetensors")
    >>> manifest.tensors["w"].high, manifest.signature
    (2.0, None)
    """
    source = Path(path)
    content, sidecar = _read(source)
    layout = Layout.of(content)
    if sidecar is not None and read_sidecar(source).sha256 != hashlib.sha256(content).hexdigest():
        raise ModelError(
            f"expected '{source}' to be the file that '{sidecar_path(source)}' describes, their "
            "SHA-256 differ; it is damaged, or the two do not belong together. Copy both again"
        )
    manifest = Manifest(
        file=source.name,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        sidecar_sha256=None if sidecar is None else hashlib.sha256(sidecar).hexdigest(),
        tensors=_tensors(content, layout, source),
        versions={
            "robustann": metadata.version("robustann"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    )
    if key is None:
        return manifest
    return manifest.model_copy(update={"signature": _sign(manifest, key)})


def verify_model(path: PathLike, manifest: Manifest, *, key: bytes | None = None) -> Verification:
    """Compare a weight file, and the ``.json`` beside it, with what was sealed.

    Args:
        path: the ``.safetensors`` file.
        manifest: from :meth:`Manifest.load`.
        key: the one that it was signed with; None leaves the signature unchecked.

    Raises:
        UsageError: no such file.
        RefusedError: a key is given, and the manifest is unsigned or its signature does not fit.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"w": torch.tensor([0.5, 2.0])}, f"{folder}/m.safetensors")
    ...     manifest = seal_model(f"{folder}/m.safetensors")
    ...     save_file({"w": torch.tensor([0.5, 2.5])}, f"{folder}/m.safetensors")
    ...     verify_model(f"{folder}/m.safetensors", manifest).changes
    ('tensor w: other values',)
    """
    if key is not None:
        check_signature(manifest, key)
    content, sidecar = _read(Path(path))
    changes: list[str] = []
    changed: list[str] = []
    if not _same(hashlib.sha256(content).hexdigest(), manifest.sha256):
        found = _changed_in_file(content, manifest)
        if found is None:
            changes.append("weight file: its header is damaged, no tensor can be read from it")
        else:
            changed = sorted(found)
            changes += [f"tensor {_shown(name)}: {found[name]}" for name in changed]
        if not changes:
            changes.append("weight file: its header was altered, but all tensors are the same")
    changes += _changed_sidecar(sidecar, manifest)
    return Verification(tuple(changes), tuple(changed), signed=key is not None)


def check_signature(manifest: Manifest, key: bytes) -> None:
    """Refuse a manifest that was not signed with this key, or altered since.

    Raises:
        RefusedError: it is unsigned, or the signature does not fit.

    >>> manifest = Manifest(file="m", size=0, sha256="0" * 64, sidecar_sha256=None, tensors={},
    ...                     versions={})
    >>> check_signature(manifest, b"0123456789abcdef")
    Traceback (most recent call last):
    robustann.errors.RefusedError: expected a signed manifest, for a key was given, got one ...
    """
    if manifest.signature is None:
        raise RefusedError(
            "expected a signed manifest, for a key was given, got one without signature; anybody "
            "can write that. Use the manifest that was signed, or seal a trusted copy again"
        )
    if not _same(_sign(manifest, key), manifest.signature):
        raise RefusedError(
            "expected a manifest signed with this key, its signature does not fit; the manifest "
            "was altered, or the key is another one"
        )


def changed_tensors(model: nn.Module, manifest: Manifest) -> tuple[str, ...]:
    """Names of the tensors in memory that differ from the sealed ones, bit by bit.

    After loading it rules out that the file was exchanged between verifying and loading; later
    that bits have flipped in memory since. Parameters and buffers must have the types that they
    had in the file.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> layer = nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(layer.state_dict(), f"{folder}/m.safetensors")
    ...     manifest = seal_model(f"{folder}/m.safetensors")
    >>> layer.weight.data[0, 1] += 1e-6
    >>> changed_tensors(layer, manifest)
    ('weight',)
    """
    came = model.state_dict()
    changed = set(came.keys() ^ manifest.tensors.keys())
    for name in came.keys() & manifest.tensors.keys():
        values, sealed = came[name].detach().cpu().contiguous(), manifest.tensors[name]
        if tuple(values.shape) != sealed.shape or not _same(_digest(_bytes(values)), sealed.sha256):
            changed.add(name)
    return tuple(sorted(changed))


def _read(source: Path) -> tuple[bytes, bytes | None]:
    """The weight file, and the file beside it if there is one."""
    if not source.is_file():
        raise UsageError(f"no model file '{source}'; correct the path")
    beside = sidecar_path(source)
    try:
        return source.read_bytes(), beside.read_bytes() if beside.exists() else None
    except OSError as error:
        raise UsageError(
            f"expected files that can be read, got '{error.filename}' ({error.strerror}); "
            "change its permissions"
        ) from error


def _tensors(content: bytes, layout: Layout, source: Path) -> dict[str, SealedTensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        values: dict[str, Tensor] = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"expected a whole safetensors file in '{source}', reading it failed with "
            f"{type(error).__name__}: {error}; copy it again"
        ) from error
    found = {}
    for name, entry in layout.tensors.items():
        low = high = None
        if values[name].is_floating_point() and values[name].numel():
            low, high = (float(end) for end in torch.aminmax(values[name].float()))
            if not (abs(low) < torch.inf and abs(high) < torch.inf):
                raise ModelError(
                    f"expected finite weights in '{source}', got NaN or infinity in {name}; "
                    "seal a model that is whole"
                )
        digest = _digest(layout.content(content, name))
        found[name] = SealedTensor(
            dtype=entry.dtype, shape=entry.shape, sha256=digest, low=low, high=high
        )
    return found


def _changed_in_file(content: bytes, manifest: Manifest) -> dict[str, str] | None:
    """What is wrong with each tensor that differs; None where the header cannot be read."""
    try:
        layout = Layout.of(content)
    except ModelError:
        return None
    found = {}
    for name in layout.tensors.keys() | manifest.tensors.keys():
        entry, sealed = layout.tensors.get(name), manifest.tensors.get(name)
        if entry is None or sealed is None:
            found[name] = "removed" if entry is None else "added"
        elif (entry.dtype, entry.shape) != (sealed.dtype, sealed.shape):
            found[name] = (
                f"{entry.dtype}{list(entry.shape)} instead of "
                f"{_shown(sealed.dtype)}{list(sealed.shape)}"
            )
        elif not _same(_digest(layout.content(content, name)), sealed.sha256):
            found[name] = "other values"
    return found


def _changed_sidecar(sidecar: bytes | None, manifest: Manifest) -> list[str]:
    sealed = manifest.sidecar_sha256
    if sidecar is None:
        return [] if sealed is None else ["sidecar: removed"]
    if sealed is None:
        return ["sidecar: added, there was none when the model was sealed"]
    return [] if _same(_digest(sidecar), sealed) else ["sidecar: altered"]


def _sign(manifest: Manifest, key: bytes) -> str:
    # Through JSON, so that what is signed does not hang on how the file is laid out.
    facts: Mapping[str, Any] = manifest.model_dump(mode="json", exclude={"signature"})
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, _PURPOSE + text.encode(), hashlib.sha256).hexdigest()


def _shown(text: str) -> str:
    # Whoever altered a file chose the names in it: no control characters for a terminal.
    return text if text.isprintable() and len(text) <= 100 else f"{text!a:.100}"


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one, other)


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _bytes(values: Tensor) -> memoryview:
    return values.reshape(-1).view(torch.uint8).numpy().data
