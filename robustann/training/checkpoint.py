"""Checkpoints: tensors and plain values, tied to the run that they belong to."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from robustann.errors import RobustannError, UsageError
from robustann.files import write_bytes

_FORMAT = 1


def save_checkpoint(
    path: Path, state: dict[str, Any], identity: dict[str, Any], history: list[dict[str, Any]]
) -> None:
    """Write ``state`` (tensors and plain values) to ``path``, whole or not at all.

    ``identity`` names, as JSON values, everything that the final weights depend on.
    """
    buffer = io.BytesIO()
    # Text for what is JSON anyway: floats and nested names come back exactly as they were.
    texts = {"identity": json.dumps(identity), "history": json.dumps(history)}
    torch.save({"format": _FORMAT, **texts, "state": state}, buffer)
    write_bytes(path, buffer.getvalue())


def load_checkpoint(
    path: Path, identity: dict[str, Any], restore: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Hand the state in ``path`` to ``restore`` and return the history.

    Raises:
        UsageError: it belongs to a run of another ``identity``; says what differs.
        RobustannError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not compare checksums: a flipped bit would go unnoticed.
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(bad)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        kind, theirs = saved["format"], json.loads(saved["identity"])
        history: list[dict[str, Any]] = json.loads(saved["history"])
        state = saved["state"]
    # What a damaged file raises hangs on where the damage is: a dozen unrelated types.
    except Exception as error:
        raise _damaged(path, error) from error
    if kind != _FORMAT:
        raise UsageError(
            f"expected a checkpoint of format {_FORMAT}, got format {kind} in '{path}'; "
            "resume with the version that wrote it, or remove it to start afresh"
        )
    differences = list(_differences(theirs, identity))
    if differences:
        raise UsageError(
            f"the checkpoint '{path}' belongs to another run: {'; '.join(differences[:5])}. "
            "Resume with the same settings, data and model, or remove it to start afresh"
        )
    try:
        restore(state)
    except Exception as error:
        raise _damaged(path, error) from error
    return history


def _differences(saved: Any, wanted: Any, name: str = "") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in {**saved, **wanted}:
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(saved.get(key), wanted.get(key), inner)
    elif saved != wanted:
        yield f"{name}: expected {_short(saved)}, got {_short(wanted)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _damaged(path: Path, error: Exception) -> RobustannError:
    return RobustannError(
        f"expected a checkpoint in '{path}', got a damaged file ({type(error).__name__}); "
        "remove it to start afresh"
    )
