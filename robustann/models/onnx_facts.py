"""What an ONNX file holds, read from its protobuf by hand, so that no library needs to be there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from robustann.models.protobuf import Value, walk

_MAX_DEPTH = 10
# Two bytes can be a tensor, and take a hundred in memory.
_MAX_FIELDS = 2_000_000
_MAX_DIMENSIONS = 64
_STANDARD = ("", "ai.onnx", "ai.onnx.ml")
# TensorProto.DataType of onnx.proto.
_TYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
          8: "string", 9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64",
          14: "complex64", 15: "complex128", 16: "bfloat16"}  # fmt: skip


@dataclass(frozen=True)
class OnnxFacts:
    """An ONNX model.

    Attributes:
        producer: what wrote it.
        ir_version: of the format.
        operators: how often each is used, subgraphs and functions included.
        foreign: operators that ONNX does not define: they need a library, which is code.
        weights: name, type and shape of each stored tensor.
        external: files beside it that it wants to read.
        outside: those of them that lie outside its folder.
        fault: why it cannot be read to the end; None for a whole one.

    >>> onnx_facts(b"\\x08\\x08\\x12\\x07pytorch").producer
    'pytorch'
    """

    producer: str
    ir_version: int
    operators: dict[str, int]
    foreign: tuple[str, ...]
    weights: tuple[tuple[str, str, tuple[int, ...]], ...]
    external: tuple[str, ...]
    outside: tuple[str, ...]
    fault: str | None


@dataclass
class _Found:
    producer: str = ""
    ir_version: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    foreign: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)
    weights: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    external: set[str] = field(default_factory=set)
    fields: int = 0

    def walk(self, content: bytes | memoryview) -> Iterator[tuple[int, Value]]:
        """The fields of a message, as long as the file has not too many."""
        for number, value in walk(content):
            self.fields += 1
            if self.fields > _MAX_FIELDS:
                raise ValueError(f"it has more than {_MAX_FIELDS} fields")
            yield number, value


def onnx_facts(content: bytes) -> OnnxFacts:
    """Read a serialised ``ModelProto``; a damaged one up to where it breaks off.

    >>> onnx_facts(b"\\x08\\x08\\x12\\x07pyt").fault
    'field 2 is cut off'
    """
    found = _Found()
    fault = None
    try:
        for number, value in found.walk(content):
            if number == 1 and isinstance(value, int):
                found.ir_version = value
            elif number == 2:
                found.producer = _text(value)
            elif number == 7:
                _graph(value, found, 0)
            elif number == 20:
                for part, graph in found.walk(_message(value)):
                    if part in (1, 2):
                        _graph(graph, found, 0)
            elif number == 25:
                _function(value, found)
    except ValueError as error:
        fault = str(error)
    return OnnxFacts(
        producer=found.producer,
        ir_version=found.ir_version,
        operators=dict(found.operators.most_common()),
        foreign=tuple(sorted(found.foreign - found.functions)),
        weights=tuple(found.weights),
        external=tuple(sorted(found.external)),
        outside=tuple(sorted(filter(_leaves, found.external))),
        fault=fault,
    )


def _graph(value: Value, found: _Found, depth: int) -> None:
    if isinstance(value, int) or depth > _MAX_DEPTH:
        raise ValueError("a graph is no message, or they are nested too deeply")
    for number, part in found.walk(value):
        if number == 1:
            _node(part, found, depth)
        elif number == 5:
            _tensor(part, found)
        elif number == 15:
            for _, inner in found.walk(_message(part)):
                if not isinstance(inner, int):
                    _tensor(inner, found)


def _function(value: Value, found: _Found) -> None:
    name = domain = ""
    for number, part in found.walk(_message(value)):
        if number == 1:
            name = _text(part)
        elif number == 7:
            _node(part, found, 0)
        elif number == 10:
            domain = _text(part)
        elif number == 11:
            _attribute(part, found, 0)
    found.functions.add(f"{domain}.{name}")


def _node(value: Value, found: _Found, depth: int) -> None:
    operator = domain = ""
    for number, part in found.walk(_message(value)):
        if number == 4:
            operator = _text(part)
        elif number == 7:
            domain = _text(part)
        elif number == 5:
            _attribute(part, found, depth)
    name = operator if domain in _STANDARD else f"{domain}.{operator}"
    found.operators[name] += 1
    if domain not in _STANDARD:
        found.foreign.add(name)


def _attribute(value: Value, found: _Found, depth: int) -> None:
    for number, part in found.walk(_message(value)):
        if number in (5, 10):
            _tensor(part, found, stored=False)
        elif number in (6, 11):
            _graph(part, found, depth + 1)


def _tensor(value: Value, found: _Found, *, stored: bool = True) -> None:
    name, kind = "", 0
    shape: list[int] = []
    for number, part in found.walk(_message(value)):
        if number == 1:
            shape += [part] if isinstance(part, int) else _packed(part)
            if len(shape) > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor has more than {_MAX_DIMENSIONS} dimensions")
        elif number == 2 and isinstance(part, int):
            kind = part
        elif number == 8:
            name = _text(part)
        elif number == 13:
            entry = {key: _text(text) for key, text in found.walk(_message(part))}
            if entry.get(1) == "location":
                found.external.add(entry.get(2, ""))
    if stored:
        found.weights.append((name, _TYPES.get(kind, f"type {kind}"), tuple(shape)))


def _packed(part: memoryview) -> list[int]:
    # Numbers without tags: put one before each, so that the walk reads them.
    numbers, current = [], bytearray()
    for byte in part:
        current.append(byte)
        if byte < 0x80:
            numbers += [n for _, n in walk(b"\x08" + bytes(current)) if isinstance(n, int)]
            current.clear()
        if len(numbers) > _MAX_DIMENSIONS:
            break
    return numbers


def _leaves(location: str) -> bool:
    parts = location.replace("\\", "/").split("/")
    return ".." in parts or parts[0] == "" or ":" in parts[0]


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a message was expected, a number is there")
    return value


def _text(value: Value) -> str:
    return "" if isinstance(value, int) else bytes(value).decode("utf-8", "replace")
