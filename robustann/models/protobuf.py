"""The few fields of an ONNX file (a protobuf) that tell what it is, read by hand.

The wire format (https://protobuf.dev/programming-guides/encoding): a varint of field number and
type, then a varint, eight bytes, a length and as many bytes, or four bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
# ModelProto of onnx.proto: field number to type.
_MODEL = {1: _VARINT, 2: _BYTES, 3: _BYTES, 4: _BYTES, 5: _VARINT, 6: _BYTES, 7: _BYTES,
          8: _BYTES, 14: _BYTES, 20: _BYTES, 25: _BYTES, 26: _BYTES}  # fmt: skip
_IR_VERSION = 1
_LATEST_IR_VERSION = 100
# Before a graph there are a version, names and a few texts.
_MAX_PROBED = 1000

Value = int | memoryview


def walk(content: bytes | memoryview) -> Iterator[tuple[int, Value]]:
    """The fields of one message: number and value.

    Raises:
        ValueError: it is damaged.

    >>> [(number, value) for number, value in walk(b"\\x08\\x07")]
    [(1, 7)]
    """
    view = memoryview(content)
    place = 0
    while place < len(view):
        tag, place = _varint(view, place)
        number, kind = tag >> 3, tag & 7
        value: Value
        if kind == _VARINT:
            value, place = _varint(view, place)
        elif kind in (_BYTES, _EIGHT, _FOUR):
            size, place = _varint(view, place) if kind == _BYTES else ({1: 8, 5: 4}[kind], place)
            if place + size > len(view):
                raise ValueError(f"field {number} is cut off")
            value, place = view[place : place + size], place + size
        else:
            raise ValueError(f"field {number} has the unknown type {kind}")
        yield number, value


def looks_like_onnx(content: bytes) -> bool:
    """Whether a file begins as an ONNX model does, be it whole or cut off.

    >>> looks_like_onnx(b"\\x08\\x08\\x12\\x07pytorch"), looks_like_onnx(b"weights")
    (True, False)
    """
    known = 0
    version = False
    try:
        for number, value in walk(content):
            if number not in _MODEL or isinstance(value, int) != (_MODEL[number] == _VARINT):
                return False
            known += 1
            if number == _IR_VERSION:
                version = isinstance(value, int) and 0 < value < _LATEST_IR_VERSION
            if version and known > 1:
                return True
            if known > _MAX_PROBED:
                return False
    except ValueError:
        pass
    return False


def _varint(view: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if place >= len(view):
            raise ValueError("a number is cut off")
        byte = view[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number is longer than 64 bits")
