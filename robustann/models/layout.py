"""Where each tensor lies in a safetensors file, for what looks at its bytes.

The format (https://github.com/huggingface/safetensors): the length of the header as a 64-bit
little-endian number, the header in JSON, padded with blanks, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robustann.errors import DamagedError, RefusedError
from robustann.models.escaped import escaped

_LENGTH = 8
_ALIGNMENT = 8
_METADATA = "__metadata__"
# PyTorch takes no more; products of huge numbers would take hours.
_MAX_DIMENSIONS = 64
_MAX_NUMBER = 2**63
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        dtype: as safetensors names it, for example ``F32``.
        shape: of the tensor.
        begin: of its bytes, counted from the end of the header.
        end: one past them.

    >>> Entry("F32", (2, 3), 0, 24).width
    4
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def width(self) -> int:
        """Bytes of one number."""
        return _BITS[self.dtype] // 8


@dataclass(frozen=True)
class Layout:
    """The header of a safetensors file.

    Attributes:
        tensors: by name, in the order of the header.
        metadata: texts about the file.
        start: where the tensors' bytes begin in the file.

    >>> content = Layout({"w": Entry("U8", (2,), 0, 2)}, {}, 0).assemble(b"ab")
    >>> layout = Layout.of(content)
    >>> layout.content(content, "w").tobytes()
    b'ab'
    """

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    start: int

    @classmethod
    def of(cls, content: bytes) -> Layout:
        """Read the header of a whole file.

        Raises:
            DamagedError: it is none, or does not fit the bytes after it.
            RefusedError: it says something twice.
        """
        length = int.from_bytes(content[:_LENGTH], "little")
        start = _LENGTH + length
        try:
            if len(content) < _LENGTH or start > len(content):
                raise ValueError(f"a header of {length} bytes in a file of {len(content)}")
            header = json.loads(content[_LENGTH:start], object_pairs_hook=_once)
            metadata = header.pop(_METADATA, {})
            if not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("what it says about itself is no text")
            tensors = {str(name): _entry(facts) for name, facts in header.items()}
            _check(tensors, len(content) - start)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedError(
                f"expected a whole safetensors file, its header is damaged "
                f"({type(error).__name__}: {error!s:.200}); copy it again"
            ) from error
        return cls(tensors, metadata, start)

    def content(self, content: bytes, name: str) -> memoryview:
        """The bytes of one tensor in the whole file."""
        entry = self.tensors[name]
        return memoryview(content)[self.start + entry.begin : self.start + entry.end]

    def assemble(self, data: bytes) -> bytes:
        """A whole file with this header before the tensors' bytes."""
        header: dict[str, Any] = {_METADATA: dict(self.metadata)} if self.metadata else {}
        for name, entry in self.tensors.items():
            header[name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [entry.begin, entry.end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(_LENGTH, "little") + text + data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict; of a name that is there twice, each reader may take another one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RefusedError(
            f"refused: the header names '{escaped(twice)}' twice, so that two readers may see two "
            "models. Ask its maker for another copy"
        )
    return found


def _entry(facts: Mapping[str, Any]) -> Entry:
    begin, end = facts["data_offsets"]
    shape = tuple(facts["shape"])
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has more than {_MAX_DIMENSIONS} dimensions")
    if not all(type(one) is int and 0 <= one < _MAX_NUMBER for one in (begin, end, *shape)):
        raise ValueError("a place or a size is no number from 0")
    return Entry(str(facts["dtype"]), shape, begin, end)


def _check(tensors: Mapping[str, Entry], size: int) -> None:
    """The tensors lie one after the other and fill the file."""
    place = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.dtype not in _BITS:
            raise ValueError(f"{name!r:.80} has the unknown type {entry.dtype!r:.20}")
        if entry.begin != place or entry.end - entry.begin != math.prod(entry.shape) * entry.width:
            raise ValueError(f"{name!r:.80} does not lie where its shape says")
        place = entry.end
    if place != size:
        raise ValueError(f"{place} bytes of tensors are stated, {size} are there")
