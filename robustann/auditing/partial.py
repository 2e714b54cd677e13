"""A running audit on disk: one file a finished batch, so that a stop loses at most one."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustann.auditing.rows import Batch
from robustann.errors import RobustannError, UsageError
from robustann.files import check_writable_folder
from robustann.training.checkpoint import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class Partial:
    """The folder of one audit.

    ``identity`` names, as JSON values, everything that the result depends on: what another audit
    left there is not taken up.
    """

    folder: Path
    identity: dict[str, Any]

    def save(self, batch: Batch) -> None:
        """Write a batch, whole or not at all; a later pass replaces it."""
        check_writable_folder(self.folder)
        save_checkpoint(self._path(batch.start), batch.state(), self.identity, [])

    def load(self) -> list[Batch]:
        """The batches of this audit that are there, in order, up to the first that is missing.

        What belongs to another audit is removed.

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
            except UsageError:
                forget(self.folder)
                return []
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


def forget(folder: Path) -> None:
    """Remove the state of an audit that has finished, or shall start afresh; nothing else.

    >>> forget(Path("no such folder"))
    """
    for path in folder.glob("batch-????????.pt"):
        path.unlink(missing_ok=True)
    # Somebody else's files may be in it, or it was never made.
    with contextlib.suppress(OSError):
        folder.rmdir()
