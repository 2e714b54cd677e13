"""A running audit on disk: one file a finished batch, so that a stop loses at most one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustann.auditing.rows import Batch
from robustann.errors import RobustannError, UsageError
from robustann.files import check_writable_folder
from robustann.training.checkpoint import load_checkpoint, save_checkpoint

_OWN_FOLDER = re.compile(r"audit-[0-9a-f]{16}")
_OWN_FILE = re.compile(r"batch-\d{8}\.pt|lock")


@dataclass(frozen=True)
class Partial:
    """Where the batches of one audit are kept: in a folder of its own within ``root``.

    ``identity`` names, as JSON values, everything that the result depends on, and with it the
    folder: what another audit left is neither taken up nor touched.
    """

    root: Path
    identity: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of this audit."""
        text = json.dumps(self.identity, sort_keys=True)
        return self.root / f"audit-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def others(self) -> bool:
        """Whether another audit has left something there."""
        return any(path != self.folder for path in _own_folders(self.root))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from running the same audit into the same folder.

        Raises:
            UsageError: one does already, or the folder cannot be written.
        """
        check_writable_folder(self.folder)
        with (self.folder / "lock").open("w", encoding="utf-8") as lock:
            try:
                import fcntl
            except ImportError:
                # No such locks on this system.
                yield
                return
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UsageError(
                    f"the same audit is running already, with its state in '{self.folder}'; wait "
                    "for it, or choose another output folder"
                ) from error
            yield

    def save(self, batch: Batch) -> None:
        """Write a batch, whole or not at all; a later pass replaces it."""
        save_checkpoint(self._path(batch.start), batch.state(), self.identity, [])

    def load(self) -> list[Batch]:
        """The batches of this audit that are there, in order, up to the first that is missing.

        Raises:
            RobustannError: a file is damaged.
        """
        found: list[Batch] = []
        done = 0
        while (path := self._path(done)).exists():
            taken: list[Batch] = []

            def restore(state: dict[str, Any], to: list[Batch] = taken) -> None:
                to.append(Batch.restored(state))

            try:
                load_checkpoint(path, self.identity, restore)
            except RobustannError as error:
                raise RobustannError(
                    f"expected the state of a stopped audit in '{path}', got a damaged file; "
                    f"remove the folder '{self.folder}' to start afresh"
                ) from error
            found += taken
            done += len(taken[0])
        return found

    def _path(self, start: int) -> Path:
        return self.folder / f"batch-{start:08d}.pt"


def _own_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if path.is_dir() and _OWN_FOLDER.fullmatch(path.name)]


def forget(root: Path) -> None:
    """Remove the states of audits within ``root``, which have finished or shall start afresh.

    Files that no audit wrote stay.

    >>> forget(Path("no such folder"))
    """
    for folder in _own_folders(root):
        for path in folder.iterdir():
            if _OWN_FILE.fullmatch(path.name):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
    # Somebody else's files may be in it, or it was never made.
    with contextlib.suppress(OSError):
        root.rmdir()
