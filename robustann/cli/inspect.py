"""``robustann inspect``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from robustann.models.inspecting import Inspection

_ROWS = 20


@click.command(short_help="Tell what a model file is, without running it.")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--all", "everything", is_flag=True, help=f"Show all tensors, not {_ROWS} a list.")
@click.option(
    "--max-bytes",
    type=click.IntRange(min=1),
    metavar="NUMBER",
    help="Refuse a larger file.  [default: 8 GiB]",
)
def inspect(file: Path, as_json: bool, everything: bool, max_bytes: int | None) -> None:
    """Tell what a model file is, what it holds, what it would run, and its SHA-256.

    Nothing in the file is run. What is found is no proof that nothing else is there. Ends with 0
    for every file that could be looked into, be it one that an audit refuses. Install
    'robustann[scan]' for picklescan's opinion too.

    \b
    Example:
      robustann inspect weights.pt
    """
    from robustann.models.inspecting import inspect_file
    from robustann.models.sniffing import MAX_BYTES

    found = inspect_file(file, max_bytes=max_bytes or MAX_BYTES)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    for line in _lines(found, None if everything else _ROWS):
        click.echo(line)


def _lines(found: Inspection, rows: int | None) -> Iterable[str]:
    from robustann.models.escaped import escaped

    yield f"{escaped(found.path, 4096)}: {found.description}, {found.size} bytes"
    if found.link is not None:
        yield f"a symbolic link to {escaped(found.link, 4096)}"
    yield f"SHA-256: {found.sha256}"
    if found.refusal is None:
        yield "robustann reads its tensors, and runs nothing in it"
    else:
        why = " ".join(escaped(line, 2000) for line in found.refusal.splitlines())
        yield f"robustann reads no weights from it (exit code {found.exit_code}): {why}"
    yield from (f"note: {escaped(note, 500)}" for note in found.notes)
    yield from _pickles(found, rows)
    if found.code:
        yield f"code in {len(found.code)} entries, which loading it would run or could reach:"
        yield from _some([escaped(name) for name in found.code], rows)
    yield from _onnx(found, rows)
    yield from _tensors([(t.name, t.dtype, t.shape, t.numbers) for t in found.tensors], rows)
    if found.metadata:
        yield f"texts in its header: {len(found.metadata)}"
        yield from _some([f"{escaped(k)}: {escaped(v)}" for k, v in found.metadata.items()], rows)
    if found.entries:
        yield f"entries of the archive: {len(found.entries)}"
        yield from _some([f"{escaped(name)}  {size} bytes" for name, size in found.entries], rows)


def _pickles(found: Inspection, rows: int | None) -> Iterable[str]:
    from robustann.models.escaped import escaped

    for pickle in found.pickles:
        where = f"pickle in {escaped(pickle.place)}" if pickle.place else "pickle"
        known = len(pickle.tensors_only)
        if pickle.beyond_tensors:
            yield (
                f"{where}: unpickling it whole would make {pickle.calls} calls or changes, and "
                f"import {len(pickle.beyond_tensors)} things beyond tensors (and {known} for "
                "tensors):"
            )
            yield from _some([escaped(name) for name in pickle.beyond_tensors], rows)
        else:
            yield f"{where}: names {known} things, all of them parts of tensors and dicts"
        if pickle.fault is not None:
            yield f"  it cannot be read to the end: {escaped(pickle.fault)}"
        yield from _some([f"picklescan: {escaped(text)}" for text in pickle.advice], rows)
    if found.pickles and not found.picklescan:
        yield "picklescan was not asked; pip install 'robustann[scan]'"


def _onnx(found: Inspection, rows: int | None) -> Iterable[str]:
    from robustann.models.escaped import escaped

    if found.onnx is None:
        return
    facts = found.onnx
    yield f"written by {escaped(facts.producer) or 'an unnamed program'}, IR {facts.ir_version}"
    if facts.fault is not None:
        yield f"it cannot be read to the end: {escaped(facts.fault)}"
    yield f"operators: {sum(facts.operators.values())}"
    yield from _some([f"{escaped(name)}  {n}" for name, n in facts.operators.items()], rows)
    for title, names in (
        ("operators that need a library of their own, which is code", facts.foreign),
        ("files beside it that it reads", facts.external),
        ("files outside its folder that it asks for", facts.outside),
    ):
        if names:
            yield f"{title}: {len(names)}"
            yield from _some([escaped(name) for name in names], rows)
    yield from _tensors(
        [(name, dtype, shape, _product(shape)) for name, dtype, shape in facts.weights], rows
    )


def _tensors(
    tensors: list[tuple[str, str, tuple[int, ...], int]], rows: int | None
) -> Iterable[str]:
    from robustann.models.escaped import escaped

    if tensors:
        yield f"tensors: {len(tensors)}, {sum(numbers for *_, numbers in tensors)} numbers"
        yield from _some(
            [
                f"{escaped(name)}  {escaped(dtype)}{list(shape)}"
                for name, dtype, shape, _ in tensors
            ],
            rows,
        )


def _some(lines: list[str], rows: int | None) -> Iterable[str]:
    kept = lines[:rows]
    yield from (f"  {line}" for line in kept)
    if len(lines) > len(kept):
        yield f"  and {len(lines) - len(kept)} more; --all shows them"


def _product(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)
