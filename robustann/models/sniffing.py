"""What a file is, by its content; the ending of its name is never asked."""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

from robustann.errors import ModelError, RefusedError, UsageError
from robustann.models.archives import open_archive
from robustann.models.pickles import scan_pickle
from robustann.models.protobuf import looks_like_onnx

MAX_BYTES = 8 * 2**30
"""Of a file, unless the caller allows more."""

MAX_HEADER = 25 * 2**20
"""Of a safetensors file's header: some 200,000 tensors. The library reads four times as much, which
takes gigabytes of memory where the header is made for it."""

# torch.serialization.MAGIC_NUMBER: what files of torch.save began with before version 1.6.
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_TEXT_PROBE = 4096
_IMPORTABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
# Before PyTorch 2.8; since then there is an entry archive_format.
_EXPORTED = ("serialized_exported_program", "serialized_state_dict")


class Kind(StrEnum):
    """What a file can be.

    >>> Kind.SAFETENSORS.words
    'a safetensors file'
    """

    EMPTY = "empty"
    SAFETENSORS = "safetensors"
    TORCH = "torch"
    TORCH_LEGACY = "torch-legacy"
    TORCHSCRIPT = "torchscript"
    EXPORT = "torch-export"
    TORCH_PACKAGE = "torch-package"
    PICKLE = "pickle"
    ONNX = "onnx"
    HDF5 = "hdf5"
    KERAS = "keras"
    NPY = "npy"
    NPZ = "npz"
    GGUF = "gguf"
    TFLITE = "tflite"
    ZIP = "zip"
    TAR = "tar"
    COMPRESSED = "compressed"
    PROGRAM = "program"
    LFS_POINTER = "lfs-pointer"
    TEXT = "text"
    UNKNOWN = "unknown"

    @property
    def words(self) -> str:
        """The kind in a few words, with its article."""
        return _WORDS[self]


_WORDS = {
    Kind.EMPTY: "an empty file",
    Kind.SAFETENSORS: "a safetensors file",
    Kind.TORCH: "a zip archive, as torch.save writes",
    Kind.TORCH_LEGACY: "a file of torch.save from before PyTorch 1.6",
    Kind.TORCHSCRIPT: "a TorchScript archive",
    Kind.EXPORT: "an archive of torch.export (.pt2)",
    Kind.TORCH_PACKAGE: "an archive of torch.package",
    Kind.PICKLE: "a Python pickle",
    Kind.ONNX: "an ONNX file",
    Kind.HDF5: "an HDF5 file, as Keras writes",
    Kind.KERAS: "a Keras archive",
    Kind.NPY: "a NumPy file",
    Kind.NPZ: "a NumPy archive (.npz)",
    Kind.GGUF: "a GGUF file",
    Kind.TFLITE: "a TensorFlow Lite file",
    Kind.ZIP: "a zip archive",
    Kind.TAR: "a tar archive",
    Kind.COMPRESSED: "a compressed file",
    Kind.PROGRAM: "a program",
    Kind.LFS_POINTER: "a Git LFS pointer, which 'git lfs pull' replaces by the file",
    Kind.TEXT: "a text",
    Kind.UNKNOWN: "something else",
}

_STARTS = {
    b"\x89HDF\r\n\x1a\n": Kind.HDF5,
    b"\x93NUMPY": Kind.NPY,
    b"GGUF": Kind.GGUF,
    b"\x1f\x8b": Kind.COMPRESSED,
    b"BZh": Kind.COMPRESSED,
    b"\xfd7zXZ\x00": Kind.COMPRESSED,
    b"\x28\xb5\x2f\xfd": Kind.COMPRESSED,
    b"7z\xbc\xaf\x27\x1c": Kind.COMPRESSED,
    b"\x7fELF": Kind.PROGRAM,
    b"MZ": Kind.PROGRAM,
    b"\xcf\xfa\xed\xfe": Kind.PROGRAM,
    b"version https://git-lfs": Kind.LFS_POINTER,
}


def sniff(content: bytes) -> Kind:
    """What a file with this content is.

    >>> sniff(b"\\x89HDF\\r\\n\\x1a\\n"), sniff(b""), sniff(b"weights, soon")
    (<Kind.HDF5: 'hdf5'>, <Kind.EMPTY: 'empty'>, <Kind.TEXT: 'text'>)
    """
    if not content:
        return Kind.EMPTY
    # Asked first, because a header's length may begin with the bytes of another format.
    if is_safetensors(content):
        return Kind.SAFETENSORS
    if content.startswith(_ZIP):
        return _sniff_zip(content)
    for start, kind in _STARTS.items():
        if content.startswith(start):
            return kind
    if content[4:8] == b"TFL3":
        return Kind.TFLITE
    if content[257:262] == b"ustar":
        return Kind.TAR
    if looks_like_onnx(content):
        return Kind.ONNX
    return _sniff_pickle_or_text(content)


def is_safetensors(content: bytes) -> bool:
    """Whether a file begins as safetensors do: eight bytes of length, then JSON in braces.

    >>> is_safetensors((2).to_bytes(8, "little") + b"{}")
    True
    """
    text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in content[:8])
    return content[8:9] == b"{" and not text and not content.startswith(_ZIP)


def classify(names: Iterable[str]) -> Kind:
    """What a zip archive with these entries is.

    >>> classify(["m/data.pkl", "m/data/0", "m/version"]), classify(["a.npy", "b.npy"])
    (<Kind.TORCH: 'torch'>, <Kind.NPZ: 'npz'>)
    """
    # Without regard to case, as PyTorch's reader looks them up.
    entries = [name.casefold() for name in names]
    last = {name.rpartition("/")[2] for name in entries}
    # What can run code goes first: an archive of two kinds is the more dangerous of them.
    if "archive_format" in last or any(name.startswith(_EXPORTED) for name in last):
        return Kind.EXPORT
    if "constants.pkl" in last or any("/code/" in f"/{name}" for name in entries):
        return Kind.TORCHSCRIPT
    if "extern_modules" in last:
        return Kind.TORCH_PACKAGE
    if "data.pkl" in last:
        return Kind.TORCH
    if {"config.json", "metadata.json"} <= last and "model.weights.h5" in last:
        return Kind.KERAS
    if entries and all(name.endswith(".npy") for name in entries):
        return Kind.NPZ
    return Kind.ZIP


def read_once(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> bytes:
    """The whole content of a regular file, so that what is hashed is what is loaded.

    A symbolic link is followed: what counts is what it leads to.

    Raises:
        UsageError: there is no such file, it is a folder, or it cannot be read.
        RefusedError: it is no regular file (a pipe, a device), or larger than allowed.
        ModelError: it changed while it was read, or does not fit into memory.

    >>> read_once("nowhere.pt")
    Traceback (most recent call last):
    robustann.errors.UsageError: no model file 'nowhere.pt'; correct the path
    """
    source = Path(path)
    try:
        _check_file(source.stat(), source, max_bytes)
        # Should a pipe take the file's place in between, opening it must not wait for a writer.
        handle = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) |
                         getattr(os, "O_BINARY", 0))  # fmt: skip
        with os.fdopen(handle, "rb") as stream:
            size = _check_file(os.fstat(handle), source, max_bytes)
            content = stream.read(size + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"no model file '{source}'; correct the path") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"expected a file that can be read, got '{source}' ({why}); "
            "change its permissions or choose another one"
        ) from error
    except MemoryError as error:
        raise ModelError(
            f"'{source}' does not fit into memory; free some, or use a smaller model"
        ) from error
    if len(content) != size:
        raise ModelError(
            f"expected '{source}' to keep its {size} bytes while it was read, it changed; wait "
            "until it is written, and try again"
        )
    return content


def _check_file(facts: os.stat_result, source: Path, max_bytes: int) -> int:
    if stat.S_ISDIR(facts.st_mode):
        raise UsageError(f"no model file '{source}', it is a folder; name the file inside it")
    if not stat.S_ISREG(facts.st_mode):
        raise RefusedError(
            f"expected a regular file, got '{source}', which is a pipe, a socket or a device; "
            "copy its content into a file"
        )
    if facts.st_size > max_bytes:
        raise RefusedError(
            f"expected at most {max_bytes} bytes in '{source}', got {facts.st_size}; if you trust "
            "it, raise max_bytes"
        )
    return facts.st_size


def _sniff_zip(content: bytes) -> Kind:
    try:
        with open_archive(content, "it") as file:
            return classify(file.namelist())
    except (ModelError, RefusedError):
        return Kind.ZIP


def _sniff_pickle_or_text(content: bytes) -> Kind:
    found = scan_pickle(content)
    if content[:1] == b"\x80" and content[1:2] <= b"\x05":
        return Kind.TORCH_LEGACY if found.magic == _TORCH_MAGIC else Kind.PICKLE
    # The first protocols have no mark of their own: what can be read as one is taken for one.
    if any(map(_IMPORTABLE.fullmatch, found.globals)) or (found.fault is None and found.size > 2):
        return Kind.PICKLE
    try:
        # Incremental, for the probe may end inside a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(content[:_TEXT_PROBE])
    except UnicodeDecodeError:
        return Kind.UNKNOWN
    return Kind.TEXT if all(c.isprintable() or c in "\t\n\r\f" for c in text) else Kind.UNKNOWN
