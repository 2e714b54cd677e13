"""What an audit has done so far, shard by shard: in memory, or in a folder that a stopped audit is
taken up from and that several workers share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from robustann.auditing.claims import Claims
from robustann.auditing.rows import Batch
from robustann.errors import RobustannError, UsageError
from robustann.files import check_writable_folder, write_text
from robustann.results import AuditResult
from robustann.training.checkpoint import load_checkpoint, save_checkpoint

_OWN_FOLDER = re.compile(r"audit-[0-9a-f]{16}")
_SHARD = re.compile(r"batch-\d{8}\.(1|2|3|facts)\.(pt|json)")
_OWN_FILE = re.compile(rf"{_SHARD.pattern}|(plan|findings|result)\.json|lock")
_PASSES = 3


class Kept(Protocol):
    """What is kept of the shards, each known by the place of its first sample, after each pass."""

    @property
    def shared(self) -> bool:
        """Whether other workers take part."""

    def decided(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What all workers, and those that go on after a stop, must agree on: made once."""

    def finished(self, start: int, through: int) -> bool:
        """Whether the shard has been through this pass, or a later one."""

    def keep(
        self, start: int, through: int, batches: Sequence[Batch], facts: dict[str, Any]
    ) -> None:
        """Keep a shard that has been through a pass, in the place of what was kept before."""

    def batches(self, start: int, through: int) -> list[Batch]:
        """The shard as it was after that pass."""

    def facts(self, start: int) -> dict[str, Any]:
        """What was told of the shard after the first pass."""

    def claim(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """Whether this worker has that work to itself, while the block runs."""


@dataclass
class InMemory:
    """Everything in this process, where it is small."""

    shared = False
    _shards: dict[int, tuple[int, list[Batch], dict[str, Any]]] = field(default_factory=dict)

    def decided(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Whatever is made."""
        return make()

    def finished(self, start: int, through: int) -> bool:
        """Whether it was kept."""
        return start in self._shards and self._shards[start][0] >= through

    def keep(
        self, start: int, through: int, batches: Sequence[Batch], facts: dict[str, Any]
    ) -> None:
        """Hold it."""
        self._shards[start] = (through, list(batches), facts)

    def batches(self, start: int, through: int) -> list[Batch]:
        """As they were handed over."""
        return self._shards[start][1]

    def facts(self, start: int) -> dict[str, Any]:
        """As they were handed over."""
        return self._shards[start][2]

    def claim(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """There is nobody else."""
        return contextlib.nullcontext(True)


@dataclass(frozen=True)
class Partial:
    """The shards of one audit on disk, in a folder of its own within ``root``.

    ``identity`` names, as JSON values, everything that the result depends on, and with it the
    folder: what another audit left is neither taken up nor touched. The workers of a ``shared``
    audit meet there.
    """

    root: Path
    identity: dict[str, Any]
    shared: bool = False

    @property
    def folder(self) -> Path:
        """The folder of this audit."""
        text = json.dumps(self.identity, sort_keys=True)
        return self.root / f"audit-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def others(self) -> bool:
        """Whether another audit has left something there."""
        return any(path != self.folder for path in _own_folders(self.root))

    @contextlib.contextmanager
    def held(self) -> Iterator[Partial]:
        """Keep others from running the same audit into the same folder, unless all share it.

        Raises:
            UsageError: one does already, or the folder cannot be written.
        """
        check_writable_folder(self.folder)
        with (self.folder / "lock").open("a", encoding="utf-8") as lock:
            try:
                import fcntl
            except ImportError:
                # No such locks on this system.
                yield self
                return
            kind = fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"the same audit is running already, with its state in '{self.folder}'; wait "
                    "for it, choose another output folder, or start all that shall work on it as "
                    "shared (--shared)"
                ) from error
            except OSError:
                # Not on every file system: workers agree through claims, which need no locks.
                if not self.shared:
                    raise
            yield self

    @property
    def _claims(self) -> Claims:
        # One for all the time: it remembers what it has seen.
        known = self.__dict__.get("_known_claims")
        if known is None:
            known = Claims(self.folder / "claims")
            object.__setattr__(self, "_known_claims", known)
        return known

    def claim(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """Whether this worker has that work to itself; alone it has everything."""
        return self._claims.claim(name) if self.shared else contextlib.nullcontext(True)

    def decided(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the first worker decided."""
        path = self.folder / f"{name}.json"
        try:
            self.once(name, path, lambda: write_text(path, json.dumps(make()) + "\n"))
        except RobustannError:
            # Taken for dead, and overtaken: what it was made from may be gone.
            if not (self.shared and path.exists()):
                raise
        try:
            decision: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise self._damaged(path) from error
        return decision

    def once(self, name: str, path: Path, work: Callable[[], None]) -> None:
        """Have one worker do what makes the file at ``path``; return when that is there."""
        if self.shared:
            self._claims.once(name, path.exists, work)
        elif not path.exists():
            work()

    def finished(self, start: int, through: int) -> bool:
        """Whether its file is there."""
        return any(self._path(start, later).exists() for later in range(through, _PASSES + 1))

    def keep(
        self, start: int, through: int, batches: Sequence[Batch], facts: dict[str, Any]
    ) -> None:
        """Write the shard, whole or not at all."""
        if through == 1:
            # First: whoever sees the shard must find them.
            write_text(self._facts(start), json.dumps(facts) + "\n")
        state = {"batches": [batch.state() for batch in batches]}
        save_checkpoint(self._path(start, through), state, self.identity, [])
        if through > 1:
            self._path(start, through - 1).unlink(missing_ok=True)

    def batches(self, start: int, through: int) -> list[Batch]:
        """Read the shard.

        Raises:
            RobustannError: the file is damaged.
        """
        path = self._path(start, through)
        found: list[Batch] = []

        def restore(state: dict[str, Any]) -> None:
            found.extend(Batch.restored(one) for one in state["batches"])

        try:
            load_checkpoint(path, self.identity, restore)
        except RobustannError as error:
            raise self._damaged(path) from error
        return found

    def reached(self, start: int) -> int:
        """The last pass that the shard has been through, 0 if none."""
        return max(
            (one for one in range(1, _PASSES + 1) if self._path(start, one).exists()), default=0
        )

    def facts(self, start: int) -> dict[str, Any]:
        """Read them.

        Raises:
            RobustannError: the file is damaged.
        """
        path = self._facts(start)
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise self._damaged(path) from error
        return facts

    def check(self, starts: Sequence[int]) -> None:
        """Refuse a damaged state before hours of work are put on top of it.

        Raises:
            RobustannError: a file is damaged.
        """
        for start in starts:
            if self.finished(start, 1):
                self.facts(start)
                self.batches(start, self.reached(start))

    @property
    def result_path(self) -> Path:
        """Where the workers of a shared audit find its result."""
        return self.folder / "result.json"

    def result(self) -> AuditResult | None:
        """What a shared audit came to, if it is over."""
        return AuditResult.load(self.result_path) if self.result_path.exists() else None

    def keep_result(self, result: AuditResult) -> None:
        """Leave the result for the other workers, those to come too; the shards are not needed."""
        write_text(self.result_path, result.to_json())
        for path in self.folder.iterdir():
            if _SHARD.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _damaged(self, path: Path) -> RobustannError:
        return RobustannError(
            f"expected the state of a stopped audit in '{path}', got a damaged file; "
            f"remove the folder '{self.folder}' to start afresh"
        )

    def _path(self, start: int, through: int) -> Path:
        return self.folder / f"batch-{start:08d}.{through}.pt"

    def _facts(self, start: int) -> Path:
        return self.folder / f"batch-{start:08d}.facts.json"


def _own_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if path.is_dir() and _OWN_FOLDER.fullmatch(path.name)]


def forget(root: Path) -> None:
    """Remove the states of audits within ``root``, which have finished or shall start afresh.

    Files that no audit wrote stay.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> forget(root)
    >>> root.exists()
    False
    """
    for folder in _own_folders(root):
        for path in folder.iterdir():
            if _OWN_FILE.fullmatch(path.name):
                path.unlink(missing_ok=True)
        shutil.rmtree(folder / "claims", ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
    # Somebody else's files may be in it, or it was never made.
    with contextlib.suppress(OSError):
        root.rmdir()
