"""Tensors from a file that a stranger may have made, without running anything in it.

The rule of the exit codes: 4 (:class:`~robustann.errors.RefusedError`) for a file that could run
code, is of a kind that is not read, exceeds a limit, could mean two things, is not the one that was
pinned, is damaged or holds no weights; 3 (:class:`~robustann.errors.ModelError`) for weights that
do not fit.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustann.errors import DamagedError, RefusedError, UsageError
from robustann.models.archives import Archive
from robustann.models.escaped import escaped
from robustann.models.layout import Layout
from robustann.models.pickles import Budget, Pickle, scan_pickle
from robustann.models.sniffing import MAX_BYTES, MAX_HEADER, Kind, read_once, sniff

_SHOWN = 8
_MAX_DEPTH = 20
_MAX_TENSORS = 1_000_000
# Of all names of tensors together, and of one.
_MAX_NAMES = 2**27
_MAX_NAME = 1000
# A network's structure takes some hundred bytes a tensor.
_MAX_STRUCTURE = 64 * 2**20

# Under which training scripts keep the weights, in the order they are looked for.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights", "params")
# What DataParallel and torch.compile put before each name.
_PREFIXES = ("module.", "_orig_mod.")

_SWITCHES = ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",)
_OFF = ("", "0", "n", "no", "false", "off")

_CONVERT = (
    "robustann reads no format that can run code when it is opened. Where you trust the file, "
    "best in a container without network, run\n"
    "  found = torch.load(FILE, map_location='cpu', weights_only=False)\n"
    "  torch.save(found.state_dict(), 'weights.pt')  # of a dict: found['state_dict'], or its key\n"
    "and give robustann the result with its architecture; or ask the file's maker for safetensors"
)
_UNLOADABLE = (
    "robustann reads safetensors alone, and PyTorch's files of tensors. Copy the weights into a "
    "model from robustann.models.create_model, and call robustann.models.save_model"
)


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and what is known of the file they came from.

    Attributes:
        tensors: on the CPU; no gradients.
        sha256: of the file, in hex.
        kind: of the file, a value of :class:`robustann.models.sniffing.Kind`.
        notes: what was done to get at them, one sentence each.

    >>> Weights({}, "0" * 64, "safetensors", ()).notes
    ()
    """

    tensors: dict[str, Tensor]
    sha256: str
    kind: str
    notes: tuple[str, ...]


def read_weights(
    path: str | os.PathLike[str], *, sha256: str | None = None, max_bytes: int = MAX_BYTES
) -> Weights:
    """The tensors in a safetensors file or a PyTorch checkpoint, whatever the file is called.

    The file is read once; what is hashed is what is loaded. Nothing in it is run.

    Args:
        path: the file.
        sha256: what its SHA-256 must be, in hex.
        max_bytes: of the file, and of what it unpacks to.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        RefusedError: it could run code, is of a kind that is not read, exceeds a limit, or its
            hash is another one.
        DamagedError: it is damaged, or holds something else than tensors.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"state_dict": {"module.w": torch.ones(2)}}, f"{folder}/m.pt")
    ...     weights = read_weights(f"{folder}/m.pt")
    >>> weights.tensors, weights.kind
    ({'w': tensor([1., 1.])}, 'torch')
    >>> weights.notes
    ("took the tensors under 'state_dict'", "took 'module.' off the names")
    """
    source = Path(path)
    check_environment()
    content = read_once(source, max_bytes=max_bytes)
    return parse_weights(content, f"'{source}'", sha256=sha256, max_bytes=max_bytes)


def check_sha256(content: bytes, expected: str | None, where: str) -> str:
    """The SHA-256 of a file's content, in hex, which must be ``expected`` unless that is None.

    Raises:
        UsageError: ``expected`` is no SHA-256.
        RefusedError: it is another one.

    >>> check_sha256(b"", None, "it")[:8]
    'e3b0c442'
    """
    came = hashlib.sha256(content).hexdigest()
    check_pin(came, expected, where)
    return came


def check_pin(came: str, expected: str | None, where: str, hint: str = "") -> None:
    """Refuse a file whose SHA-256 ``came``, in hex, is not ``expected``, unless that is None.

    Raises:
        UsageError: ``expected`` is no SHA-256.
        RefusedError: it is another one.

    >>> check_pin("0" * 64, "SHA256:" + "0" * 64, "it")
    """
    if expected is None:
        return
    wanted = expected.strip().lower().removeprefix("sha256:")
    if len(wanted) != 64 or not set(wanted) <= set("0123456789abcdef"):
        raise UsageError(
            f"expected a SHA-256 of 64 hexadecimal digits, got '{escaped(expected)}'; "
            "'sha256sum FILE' prints it"
        )
    if came != wanted:
        raise RefusedError(
            f"{where} is refused: expected the SHA-256 {wanted}, got {came}; it is another file "
            "than the one that was pinned. Get the right one, or pin this one if you trust it"
            f"{hint}"
        )


def check_environment() -> None:
    """Refuse to load anything while PyTorch is told to unpickle whatever comes.

    Raises:
        RefusedError: an environment variable that does so is set.

    >>> check_environment()
    """
    for name in _SWITCHES:
        value = os.environ.get(name, "")
        if value.strip().lower() not in _OFF:
            raise RefusedError(
                f"the environment variable {name} is set to '{escaped(value)}', which lets PyTorch "
                f"run code that is in a model file; run 'unset {name}' and try again"
            )


def parse_weights(
    content: bytes, where: str, *, sha256: str | None = None, max_bytes: int = MAX_BYTES
) -> Weights:
    """:func:`read_weights` for a file in memory.

    Args:
        content: the whole file.
        where: what to call it in messages.
        sha256: what its SHA-256 must be, in hex.
        max_bytes: of what it unpacks to.

    >>> import safetensors.torch
    >>> parse_weights(safetensors.torch.save({"w": torch.ones(2)}), "it").tensors
    {'w': tensor([1., 1.])}
    """
    came = check_sha256(content, sha256, where)
    kind = sniff(content)
    notes: list[str] = []
    if kind is Kind.SAFETENSORS:
        tensors = _read_safetensors(content, where)
    elif kind in (Kind.TORCH, Kind.TORCH_LEGACY):
        tensors, notes = _read_torch(content, where, kind, max_bytes)
    elif kind is Kind.ZIP:
        # Damage says more than "a zip archive".
        Archive.of(content, where, max_bytes)
        raise refusal(kind, where)
    elif kind is Kind.PICKLE:
        raise _refuse_globals(scan_pickle(content), kind, where)
    elif kind in (Kind.EMPTY, Kind.TEXT, Kind.LFS_POINTER, Kind.UNKNOWN):
        raise DamagedError(
            f"expected a safetensors file or a PyTorch checkpoint in {where}, got {kind.words}; "
            f"{_UNLOADABLE}"
        )
    else:
        raise refusal(kind, where)
    notes += _strip_prefixes(tensors)
    return Weights(tensors, came, kind.value, tuple(notes))


def read_checkpoint(content: bytes, where: str = "the file", *, max_bytes: int = MAX_BYTES) -> Any:
    """What is in a file of ``torch.save``, if it is plain data and tensors.

    Its opcodes are read first and may name nothing beyond tensors; then PyTorch's weights-only
    unpickler reads the same bytes. There is no other way in.

    Args:
        content: the whole file.
        where: what to call it in messages.
        max_bytes: of what it unpacks to.

    Raises:
        RefusedError: it names anything beyond tensors, or is another kind of file.
        DamagedError: it is damaged.

    >>> stream = io.BytesIO()
    >>> torch.save({"epoch": 3}, stream)
    >>> read_checkpoint(stream.getvalue())
    {'epoch': 3}
    """
    check_environment()
    kind = sniff(content)
    if kind is Kind.TORCH:
        _check_pickle(_structure(content, where, max_bytes), kind, where)
    elif kind is Kind.TORCH_LEGACY:
        for part in _legacy_parts(content):
            _check_pickle(part, kind, where)
    else:
        raise refusal(kind, where)
    try:
        with warnings.catch_warnings():
            # Deprecations of old storages: nothing that the user could change.
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RefusedError(
            f"{where} is refused: PyTorch's weights-only unpickler does not read it "
            f"({_first_line(error)}); {_CONVERT}"
        ) from error
    # Damaged structures raise nearly anything; they were built from plain data alone.
    except Exception as error:
        raise DamagedError(
            f"expected a whole PyTorch checkpoint in {where}, reading it failed with "
            f"{type(error).__name__}: {_first_line(error)}; it is damaged. Copy it again"
        ) from error


def refusal(kind: Kind, where: str) -> RefusedError:
    """The error for a kind of file from which no weights are read.

    >>> print(str(refusal(Kind.HDF5, "'m.h5'"))[:46])
    'm.h5' is refused: it is an HDF5 file, as Kera
    """
    if kind in (Kind.TORCHSCRIPT, Kind.EXPORT):
        return RefusedError(
            f"{where} is refused: it is {kind.words}, which can run code when it is loaded. Ask "
            "its maker for the weights as safetensors; if you trust it as you would a program, "
            "the command line opens it with --allow-code-execution"
        )
    if kind is Kind.ONNX:
        return RefusedError(
            f"{where} is refused: it is {kind.words}, a whole model and not weights for an "
            "architecture; leave out arch"
        )
    if kind in (Kind.HDF5, Kind.KERAS, Kind.NPY, Kind.NPZ, Kind.GGUF, Kind.TFLITE):
        return RefusedError(f"{where} is refused: it is {kind.words}; {_UNLOADABLE}")
    return RefusedError(f"{where} is refused: it is {kind.words}; {_CONVERT}")


def _read_safetensors(content: bytes, where: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    length = int.from_bytes(content[:8], "little")
    if length > MAX_HEADER:
        raise RefusedError(
            f"{where} is refused: it states a header of {length} bytes, where safetensors allow "
            f"{MAX_HEADER}; it is damaged, or made to exhaust the memory. Copy it again from where "
            "you trust it"
        )
    if 8 + length > len(content):
        raise DamagedError(
            f"expected a whole safetensors file in {where}, got {len(content)} bytes, where its "
            f"header alone takes {8 + length}; it was cut off. Copy it again"
        )
    try:
        layout = Layout.of(content)
        _check_names(layout.tensors, where)
        tensors = dict(load(content))
    except RefusedError as error:
        raise type(error)(f"{where}: {error}") from error
    # Damaged headers raise ValueError, KeyError and more beside its own class.
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError,
            RecursionError) as error:  # fmt: skip
        raise DamagedError(
            f"expected a whole safetensors file in {where}, reading it failed with "
            f"{type(error).__name__}: {_first_line(error)}; copy it again"
        ) from error
    if tensors.keys() != layout.tensors.keys():
        raise RefusedError(
            f"{where} is refused: two readers see different tensors in it. Ask its maker for "
            "another copy"
        )
    return tensors


def _check_names(names: Iterable[str], where: str) -> None:
    for name in names:
        if len(name) > _MAX_NAME:
            raise RefusedError(
                f"{where} is refused: a tensor's name takes {len(name)} characters, at most "
                f"{_MAX_NAME} are allowed. Ask its maker for another copy"
            )


def _read_torch(
    content: bytes, where: str, kind: Kind, max_bytes: int
) -> tuple[dict[str, Tensor], list[str]]:
    found = read_checkpoint(content, where, max_bytes=max_bytes)
    if not isinstance(found, Mapping):
        raise DamagedError(
            f"expected a dict of tensors in {where}, got {_kind_of(found)}; save the model's "
            "state_dict()"
        )
    notes: list[str] = []
    for name in _WRAPPERS:
        inner = found.get(name)
        if isinstance(inner, Mapping) and any(
            isinstance(value, Tensor | Mapping) for value in inner.values()
        ):
            rest = [escaped(str(other), 30) for other in found if other != name]
            left = f", left {_some(rest)}" if rest else ""
            notes.append(f"took the tensors under '{name}'{left}")
            found = inner
            break
    tensors = _flatten(found, where)
    if not tensors:
        raise DamagedError(f"expected tensors in {where}, got none; save the model's state_dict()")
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > max_bytes:
        raise RefusedError(
            f"{where} is refused: its tensors take {total} bytes, at most {max_bytes} are allowed; "
            "if you trust it, raise max_bytes"
        )
    if any("." in name for name in tensors) and any(
        isinstance(value, Mapping) for value in found.values()
    ):
        notes.append("joined the names of nested dicts by dots")
    return tensors, notes


def _flatten(tree: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """The tensors in dicts of dicts, their names joined by dots.

    One dict may lie in many others, so that a small file stands for billions of entries: every
    entry met is counted, be there a tensor in it or not.
    """
    tensors: dict[str, Tensor] = {}
    below = [("", iter(tree.items()))]
    entries = characters = 0
    while below:
        prefix, items = below[-1]
        pair = next(items, None)
        if pair is None:
            below.pop()
            continue
        key, value = pair
        entries += 1
        if entries > _MAX_TENSORS:
            raise RefusedError(f"{where} is refused: it holds more than {_MAX_TENSORS} tensors")
        if not isinstance(key, str):
            raise DamagedError(
                f"expected names of tensors as text in {where}, got {_kind_of(key)}; save the "
                "model's state_dict()"
            )
        _check_names((prefix, key), where)
        name = prefix + key
        characters += len(name)
        if characters > _MAX_NAMES:
            raise RefusedError(
                f"{where} is refused: the names in it take more than {_MAX_NAMES} characters"
            )
        if isinstance(value, Mapping):
            if len(below) > _MAX_DEPTH:
                raise RefusedError(
                    f"{where} is refused: its dicts are nested deeper than {_MAX_DEPTH}"
                )
            below.append((f"{name}.", iter(value.items())))
        elif name in tensors:
            raise DamagedError(
                f"expected each name of a tensor once in {where}, got '{escaped(name)}' twice; "
                "save the model's state_dict()"
            )
        elif isinstance(value, Tensor):
            tensors[name] = _plain(value, name, where)
        else:
            raise DamagedError(
                f"expected nothing but tensors in {where}, got {_kind_of(value)} under "
                f"'{escaped(name)}'; save the model's state_dict()"
            )
    _check_names(tensors, where)
    return tensors


def _plain(tensor: Tensor, name: str, where: str) -> Tensor:
    """The tensor without gradient; refused where it is no array of numbers that lie in memory."""
    plain = tensor.detach()
    if plain.layout is not torch.strided or plain.is_quantized or plain.device.type != "cpu":
        raise DamagedError(
            f"expected plain tensors in {where}, got a {plain.layout} one on {plain.device} under "
            f"'{escaped(name)}'; convert it with to_dense() or dequantize()"
        )
    # A stride of 0 makes a few bytes look like any number of them.
    if plain.numel() * plain.element_size() > plain.untyped_storage().nbytes():
        raise RefusedError(
            f"{where} is refused: '{escaped(name)}' states {list(plain.shape)} numbers, more than "
            "the file holds, as a bomb does. Ask its maker for safetensors"
        )
    return plain


def _strip_prefixes(tensors: dict[str, Tensor]) -> list[str]:
    notes = []
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if tensors and all(name.startswith(prefix) and name != prefix for name in tensors):
                for name in list(tensors):
                    tensors[name.removeprefix(prefix)] = tensors.pop(name)
                notes.append(f"took '{prefix}' off the names")
                stripped = True
    return notes


def _structure(content: bytes, where: str, max_bytes: int) -> Pickle:
    """The one pickle in an archive of torch.save, after the archive itself was judged."""
    archive = Archive.of(content, where, max_bytes)
    names = [name for name in archive.entries if name.casefold().endswith(".pkl")]
    if len(names) != 1 or names[0].count("/") != 1:
        raise RefusedError(
            f"{where} is refused: expected one pickle in an archive of torch.save, got "
            f"{_some([escaped(name) for name in names])}; {_CONVERT}"
        )
    if archive.entries[names[0]].file_size > _MAX_STRUCTURE:
        raise RefusedError(
            f"{where} is refused: its structure takes {archive.entries[names[0]].file_size} bytes, "
            f"at most {_MAX_STRUCTURE} are allowed; {_CONVERT}"
        )
    archive.check_sums()
    return scan_pickle(archive.read(names[0]))


def _legacy_parts(content: bytes) -> list[Pickle]:
    """The pickles at the start: magic number, protocol, system, structure, keys of storages."""
    parts = []
    place = 0
    budget = Budget()
    for _ in range(5):
        parts.append(scan_pickle(content, place, budget))
        place += parts[-1].size
        if parts[-1].fault is not None:
            break
    return parts


def _check_pickle(found: Pickle, kind: Kind, where: str) -> None:
    if found.beyond_tensors:
        raise _refuse_globals(found, kind, where)
    if found.fault is not None:
        raise DamagedError(
            f"expected a whole PyTorch checkpoint in {where}, its pickle cannot be read to the "
            f"end ({escaped(found.fault)}); it was cut off or damaged. Copy it again"
        )


def _refuse_globals(found: Pickle, kind: Kind, where: str) -> RefusedError:
    if not found.beyond_tensors:
        return RefusedError(f"{where} is refused: it is {kind.words}; {_CONVERT}")
    names = _some([escaped(name) for name in found.beyond_tensors])
    return RefusedError(
        f"{where} is refused: it is {kind.words}, and loading it whole would import and could run "
        f"{names}, which is more than weights need; {_CONVERT}"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}" if names else "none"


def _kind_of(value: object) -> str:
    return f"a {type(value).__name__}"


def _first_line(error: BaseException) -> str:
    return escaped(str(error).strip().partition("\n")[0], 200)
