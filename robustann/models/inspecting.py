"""What is in a model file, told without running any of it, for whoever must decide to trust it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import logging
import math
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustann.errors import DamagedError, RefusedError, RobustannError
from robustann.models.archives import UNREADABLE, Archive, open_archive
from robustann.models.escaped import escaped
from robustann.models.layout import Layout
from robustann.models.onnx_facts import OnnxFacts, onnx_facts
from robustann.models.pickles import Budget, Pickle, scan_pickle
from robustann.models.sniffing import MAX_BYTES, Kind, read_once, sniff
from robustann.models.weights import parse_weights

_MAX_DEPTH = 3
_MAX_PICKLES = 1000
_MAX_ENTRY = 64 * 2**20
_MAX_UNPACKED = 2**30
_MAX_ENTRIES = 10_000
_MAX_HEAD = 10_000
_ZIPPED = (
    Kind.ZIP, Kind.TORCH, Kind.TORCHSCRIPT, Kind.EXPORT, Kind.TORCH_PACKAGE, Kind.NPZ, Kind.KERAS,
)  # fmt: skip
_PICKLE_NAMES = (".pkl", ".pickle", ".debug_pkl")
_CODE_NAMES = (".py", ".so", ".dll", ".dylib", ".cubin", ".cpp")


@dataclass(frozen=True)
class TensorFacts:
    """A tensor in a file: its name, its type, its shape.

    >>> TensorFacts("w", "float32", (2, 3)).numbers
    6
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PickleFacts:
    """A pickle in a file.

    Attributes:
        place: the entry of the archive that holds it; empty for the file itself.
        beyond_tensors: what unpickling it would import that no weights need.
        tensors_only: what it would import that weights need.
        calls: how many calls or changes it would make.
        fault: why it cannot be read to the end; None for a whole one.
        advice: what picklescan calls dangerous or suspicious in it, where it is installed.

    >>> PickleFacts("", ("os.system",), (), 1, None, ()).beyond_tensors
    ('os.system',)
    """

    place: str
    beyond_tensors: tuple[str, ...]
    tensors_only: tuple[str, ...]
    calls: int
    fault: str | None
    advice: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What a file is and holds.

    Attributes:
        path: as it was given.
        link: where it leads to, if it is a symbolic link.
        size: in bytes.
        sha256: in hex.
        kind: by its content.
        description: the kind in words.
        refusal: why robustann reads no weights from it; None where it does.
        exit_code: what reading weights from it would end with.
        tensors: what it holds, where that can be told without running code.
        metadata: texts that a safetensors file carries.
        entries: of an archive, with their unpacked sizes.
        code: entries that hold code.
        pickles: what each would do.
        onnx: of an ONNX file.
        notes: further findings, one sentence each.
        picklescan: whether its advice was asked.

    >>> Inspection.__name__
    'Inspection'
    """

    path: str
    link: str | None
    size: int
    sha256: str
    kind: str
    description: str
    refusal: str | None
    exit_code: int
    tensors: tuple[TensorFacts, ...]
    metadata: dict[str, str]
    entries: tuple[tuple[str, int], ...]
    code: tuple[str, ...]
    pickles: tuple[PickleFacts, ...]
    onnx: OnnxFacts | None
    notes: tuple[str, ...]
    picklescan: bool


def inspect_file(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Inspection:
    """Tell what a file is, what it holds and what it would run; nothing in it is run.

    Raises:
        UsageError: there is no such file, it is a folder, or it cannot be read.
        RefusedError: it is no regular file, or larger than allowed.

    >>> import pickle, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "m.pt").write_bytes(pickle.dumps(print))
    ...     found = inspect_file(f"{folder}/m.pt")
    >>> found.kind, found.pickles[0].beyond_tensors, found.exit_code
    ('pickle', ('builtins.print',), 4)
    """
    source = Path(path)
    content = read_once(source, max_bytes=max_bytes)
    kind = sniff(content)
    found = _Found()
    refusal, exit_code = None, 0
    try:
        weights = parse_weights(content, f"'{source}'", max_bytes=max_bytes)
        found.tensors = [
            TensorFacts(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in weights.tensors.items()
        ]
        found.notes += weights.notes
    except RobustannError as error:
        refusal, exit_code = str(error), error.exit_code
    if kind is Kind.SAFETENSORS and refusal is None:
        found.metadata = dict(Layout.of(content).metadata)
    elif kind is Kind.ONNX:
        found.onnx = onnx_facts(content)
    elif kind is Kind.NPY:
        _look_into_array(content, "", found)
    elif kind in (Kind.PICKLE, Kind.TORCH_LEGACY):
        _look_into_pickles(content, "", found)
    elif kind in _ZIPPED:
        _look_into_zip(content, "", found, 0, max_bytes)
    return Inspection(
        path=str(source),
        link=os.readlink(source) if source.is_symlink() else None,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        kind=kind.value,
        description=kind.words,
        refusal=refusal,
        exit_code=exit_code,
        tensors=tuple(found.tensors),
        metadata=found.metadata,
        entries=tuple(found.entries),
        code=tuple(found.code),
        pickles=tuple(found.pickles),
        onnx=found.onnx,
        notes=tuple(found.notes),
        picklescan=_has_picklescan(),
    )


@dataclass
class _Found:
    tensors: list[TensorFacts] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    entries: list[tuple[str, int]] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    pickles: list[PickleFacts] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    onnx: OnnxFacts | None = None
    unpacked: int = 0
    budget: Budget = field(default_factory=Budget)


def _look_into_zip(content: bytes, place: str, found: _Found, depth: int, max_bytes: int) -> None:
    try:
        Archive.of(content, "it", max_bytes)
    except DamagedError:
        return  # told by the refusal
    except RefusedError as error:
        if place:
            found.notes.append(f"{escaped(place)}: {error}")
    try:
        opened = open_archive(content, "it")
    except RefusedError:
        return  # told too
    with opened as file:
        for entry in file.infolist():
            if len(found.entries) >= _MAX_ENTRIES:
                found.notes.append(f"not looked into after {_MAX_ENTRIES} entries")
                return
            name = f"{place}!{entry.filename}" if place else entry.filename
            found.entries.append((name, entry.file_size))
            if entry.filename.casefold().endswith(_CODE_NAMES):
                found.code.append(name)
            if not entry.filename.endswith("/"):
                _look_into_entry(file, entry, name, found, depth, max_bytes)


def _look_into_entry(
    file: zipfile.ZipFile,
    entry: zipfile.ZipInfo,
    name: str,
    found: _Found,
    depth: int,
    max_bytes: int,
) -> None:
    named = entry.filename.casefold().endswith(_PICKLE_NAMES)
    try:
        with file.open(entry) as stream:
            head = stream.read(8)
            inner = head[:2] == b"PK"
            array = head[:6] == b"\x93NUMPY"
            if not (named or inner or array or (head[:1] == b"\x80" and head[1:2] <= b"\x05")):
                return
            if found.unpacked > _MAX_UNPACKED or found.budget.opcodes < 0:
                found.notes.append(f"{escaped(name)} was not looked into: there is too much")
                return
            content = head + stream.read(_MAX_HEAD if array else _MAX_ENTRY)
            found.unpacked += len(content)
    except UNREADABLE as error:
        found.notes.append(f"{escaped(name)} cannot be unpacked: {escaped(str(error))}")
        return
    if array:
        _look_into_array(content, name, found)
    elif inner and depth < _MAX_DEPTH:
        _look_into_zip(content, name, found, depth + 1, max_bytes)
    elif not inner:
        _look_into_pickles(content, name, found, by_chance=not named)


def _look_into_pickles(
    content: bytes, place: str, found: _Found, *, by_chance: bool = False
) -> None:
    """All pickles that lie one after the other from the start, as in old files of PyTorch."""
    for number, (start, part) in enumerate(_pickles(content, found.budget)):
        # Numbers may look like the beginning of a pickle, and what follows one is raw numbers.
        if part.fault is not None and not part.globals and (by_chance or number):
            break
        if len(found.pickles) >= _MAX_PICKLES:
            break
        known = tuple(name for name in part.globals if name not in part.beyond_tensors)
        advice = _advice(content[start : start + part.size])
        found.pickles.append(
            PickleFacts(place, part.beyond_tensors, known, part.calls, part.fault, advice)
        )


def _pickles(content: bytes, budget: Budget) -> Iterator[tuple[int, Pickle]]:
    place = 0
    while place < len(content) and content[place : place + 1] != b"\0":
        part = scan_pickle(content, place, budget)
        yield place, part
        if part.fault is not None or part.size <= 0:
            return
        place += part.size


def _look_into_array(content: bytes, place: str, found: _Found) -> None:
    from numpy.lib import format as npy

    stream = io.BytesIO(content)
    try:
        with warnings.catch_warnings():
            # Of headers that Python 2 wrote.
            warnings.simplefilter("ignore")
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(stream, max_header_size=_MAX_HEAD)
    # It parses the header as a Python literal, which fails in any way a parser can.
    except Exception as error:
        found.notes.append(f"{escaped(place) or 'the array'} is damaged: {escaped(str(error))}")
        return
    found.tensors.append(TensorFacts(place, str(dtype), tuple(shape)))
    if dtype.hasobject:
        _look_into_pickles(content[stream.tell() :], place, found)


def _has_picklescan() -> bool:
    return importlib.util.find_spec("picklescan") is not None


def _advice(content: bytes) -> tuple[str, ...]:
    if not _has_picklescan() or len(content) > _MAX_ENTRY:
        return ()
    scanner: Any = importlib.import_module("picklescan.scanner")
    # What it says about damage is told here already.
    logger = logging.getLogger("picklescan")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        found = scanner.scan_pickle_bytes(io.BytesIO(content), "pickle", multiple_pickles=False)
    except Exception as error:
        return (f"picklescan failed: {type(error).__name__}",)
    finally:
        logger.setLevel(level)
    # Only what it warns of is passed on: its word for the rest would promise too much.
    counted = Counter(
        f"{part.safety.value}: {part.module}.{part.name}"
        for part in found.globals
        if part.safety is not scanner.SafetyLevel.Innocuous
    )
    return tuple(counted)
