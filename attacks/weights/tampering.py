"""Alterations of a model file, to prove that :mod:`robustann.defenses.seal` notices them.

Each works on a ``.safetensors`` file and writes a valid one: what they change is the model, so a
reader that trusts the format alone loads it. :func:`forge_sidecar` then makes the file beside it
agree, as anybody can who may write there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

from robustann import files
from robustann.errors import UsageError, unknown_name
from robustann.models.io import sidecar_path
from robustann.models.layout import Entry, Layout

PathLike = str | os.PathLike[str]


def flip_bit(
    path: PathLike, tensor: str, element: int = 0, bit: int = 0, *, out: PathLike | None = None
) -> None:
    """Invert one bit of one number.

    Args:
        path: the ``.safetensors`` file.
        tensor: name of the tensor.
        element: position in the flattened tensor.
        bit: of the number, 0 being the lowest; 31 is the sign of a float32.
        out: file to write; None overwrites ``path``.

    Raises:
        UsageError: no such file, tensor, element or bit.
        ModelError: the file is damaged.

    >>> import tempfile, torch
    >>> from safetensors.torch import load_file, save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"w": torch.tensor([1.0, 2.0])}, f"{folder}/m.safetensors")
    ...     flip_bit(f"{folder}/m.safetensors", "w", element=1, bit=31)
    ...     load_file(f"{folder}/m.safetensors")["w"].tolist()
    [1.0, -2.0]
    """
    content, layout = _read(path)
    entry = _entry(layout, tensor)
    count = math.prod(entry.shape)
    if not 0 <= element < count:
        raise UsageError(f"element: expected from 0 to {count - 1} in {tensor}, got {element}")
    if not 0 <= bit < 8 * entry.width:
        raise UsageError(f"bit: expected from 0 to {8 * entry.width - 1} in {tensor}, got {bit}")
    changed = bytearray(content)
    # Little-endian, as the format prescribes.
    changed[layout.start + entry.begin + element * entry.width + bit // 8] ^= 1 << (bit % 8)
    files.write_bytes(path if out is None else out, bytes(changed))


def swap_tensors(path: PathLike, first: str, second: str, *, out: PathLike | None = None) -> None:
    """Exchange two tensors, that is, their names; of unequal shapes, the model no longer loads.

    Args:
        path: the ``.safetensors`` file.
        first: name of one tensor.
        second: name of the other.
        out: file to write; None overwrites ``path``.

    Raises:
        UsageError: no such file or tensor, or twice the same.
        ModelError: the file is damaged.

    >>> import tempfile, torch
    >>> from safetensors.torch import load_file, save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"a": torch.zeros(1), "b": torch.ones(1)}, f"{folder}/m.safetensors")
    ...     swap_tensors(f"{folder}/m.safetensors", "a", "b")
    ...     load_file(f"{folder}/m.safetensors")["a"].item()
    1.0
    """
    content, layout = _read(path)
    if first == second:
        raise UsageError(f"expected two tensors to swap, got '{first}' twice; name another one")
    one, other = _entry(layout, first), _entry(layout, second)
    _write(path if out is None else out, content, layout, {first: other, second: one})


def change_shape(
    path: PathLike, tensor: str, shape: tuple[int, ...], *, out: PathLike | None = None
) -> None:
    """State another shape for a tensor, of as many numbers.

    Args:
        path: the ``.safetensors`` file.
        tensor: name of the tensor.
        shape: to state.
        out: file to write; None overwrites ``path``.

    Raises:
        UsageError: no such file or tensor, or a shape of another size.
        ModelError: the file is damaged.

    >>> import tempfile, torch
    >>> from safetensors.torch import load_file, save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"a": torch.zeros(2, 3)}, f"{folder}/m.safetensors")
    ...     change_shape(f"{folder}/m.safetensors", "a", (3, 2))
    ...     load_file(f"{folder}/m.safetensors")["a"].shape
    torch.Size([3, 2])
    """
    content, layout = _read(path)
    entry = _entry(layout, tensor)
    if math.prod(shape) != math.prod(entry.shape):
        raise UsageError(
            f"shape: expected {math.prod(entry.shape)} numbers, as {tensor} has, got {shape}"
        )
    changed = {tensor: replace(entry, shape=tuple(shape))}
    _write(path if out is None else out, content, layout, changed)


def forge_sidecar(path: PathLike) -> None:
    """Make the ``.json`` beside an altered file state the altered file's SHA-256.

    Raises:
        UsageError: one of the two is not there.

    >>> forge_sidecar("nowhere.safetensors")
    Traceback (most recent call last):
    robustann.errors.UsageError: no model file 'nowhere.safetensors'; correct the path
    """
    content = _content(path)
    target = sidecar_path(path)
    if not target.is_file():
        raise UsageError(f"no '{target.name}' beside '{path}'; there is nothing to forge")
    sidecar = json.loads(target.read_text(encoding="utf-8"))
    sidecar["sha256"] = hashlib.sha256(content).hexdigest()
    files.write_text(target, json.dumps(sidecar, indent=2) + "\n")


def _content(path: PathLike) -> bytes:
    source = Path(path)
    if not source.is_file():
        raise UsageError(f"no model file '{source}'; correct the path")
    return source.read_bytes()


def _read(path: PathLike) -> tuple[bytes, Layout]:
    content = _content(path)
    return content, Layout.of(content)


def _entry(layout: Layout, tensor: str) -> Entry:
    if tensor not in layout.tensors:
        raise unknown_name("tensor", tensor, layout.tensors)
    return layout.tensors[tensor]


def _write(path: PathLike, content: bytes, layout: Layout, changed: dict[str, Entry]) -> None:
    altered = replace(layout, tensors={**layout.tensors, **changed})
    files.write_bytes(path, altered.assemble(content[layout.start :]))
