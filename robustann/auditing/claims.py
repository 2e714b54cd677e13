"""Which worker does what, agreed on through a folder that all of them see.

A claim is a file that only one worker can create. Its owner touches it every few seconds; where
that ends (the worker was killed, its machine lost), others take the work up. Claims save work and
decide nothing: results are written whole, are the same bytes whoever computes them, and a worker
that was only slow does no harm. So neither clocks nor locks of the file system are trusted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Seconds between two touches, and without one before a claim counts as abandoned. A network file
# system may show the attributes of a file a minute late.
_BEAT, _STALE = 5.0, 90.0
# Seconds between two looks at what others are doing.
_POLL = 0.25


class Claims:
    """The claims of all workers, as this one sees them.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     mine, theirs = Claims(Path(folder)), Claims(Path(folder))
    ...     with mine.claim("a") as got, theirs.claim("a") as other:
    ...         print(got, other)
    True False
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # When this worker saw which state of a claim first, by its own clock.
        self._seen: dict[Path, tuple[float, float]] = {}

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Yield whether this worker has the work ``name`` to itself, while the block runs."""
        own = self._taken(name)
        if own is None:
            yield False
            return
        over = threading.Event()
        beat = threading.Thread(target=_touching, args=(own, over), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            over.set()
            beat.join()
            # Those of the dead whose work this was go too.
            for _, path in self._of(name):
                if _generation(path) <= _generation(own):
                    path.unlink(missing_ok=True)

    def once(self, name: str, done: Callable[[], bool], work: Callable[[], None]) -> None:
        """Have ``work`` done by one worker; return when it is ``done``."""
        while not done():
            with self.claim(name) as mine:
                if mine and not done():
                    work()
                    return
            time.sleep(_POLL)

    def _taken(self, name: str) -> Path | None:
        """The file that makes ``name`` this worker's, or None where it is another's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        held = self._of(name)
        number = 0
        if held:
            number, path = held[-1]
            if not self._abandoned(path):
                return None
            number += 1
        own = self.folder / f"{name}.{number}"
        try:
            handle = os.open(own, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return None
        with open(handle, "w", encoding="utf-8") as stream:
            json.dump(_identity(os.getpid()), stream)
        return own

    def _of(self, name: str) -> list[tuple[int, Path]]:
        """The claims on ``name`` that are there, the latest last."""
        pattern = re.compile(rf"{re.escape(name)}\.\d+")
        found = [path for path in self.folder.iterdir() if pattern.fullmatch(path.name)]
        return sorted((_generation(path), path) for path in found)

    def _abandoned(self, path: Path) -> bool:
        """Whether the owner of a claim is gone."""
        try:
            # Opening makes a network file system ask its server.
            with path.open(encoding="utf-8") as stream:
                text, touched = stream.read(), os.fstat(stream.fileno()).st_mtime
        except OSError:
            # Given back by now.
            return False
        if _is_dead(text):
            return True
        now = time.monotonic()
        known = self._seen.get(path)
        if known is None or known[0] != touched:
            self._seen[path] = (touched, now)
            return False
        return now - known[1] > _STALE


def _generation(path: Path) -> int:
    return int(path.suffix[1:])


def _touching(path: Path, over: threading.Event) -> None:
    while not over.wait(_BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _identity(process: int) -> dict[str, Any] | None:
    """A process as others on the same machine can look it up; None where that cannot be told."""
    try:
        # The boot, the numbering of processes (containers have their own), and when it began: the
        # number alone may come again.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # Ended, though nobody has asked how.
    state = "ended" if fields[0] in "ZX" else "running"
    return {
        "machine": f"{boot} {space}",
        "process": process,
        "began": fields[19],
        "state": state,
    }


def _is_dead(text: str) -> bool:
    """Whether the process that a claim names ran on this machine and has ended."""
    try:
        told = json.loads(text)
        here = _identity(os.getpid())
        if here is None or told["machine"] != here["machine"]:
            return False
        now = _identity(told["process"])
    # Not written yet, or by a machine that cannot tell.
    except (ValueError, TypeError, KeyError):
        return False
    return bool(now != told)
