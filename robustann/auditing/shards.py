"""The shards of an audit: which there are, and the passes through them, by one worker or several.

All that hangs on more than one shard is derived from what every shard has kept, never from who did
what: so it comes out the same for any number of workers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustann.auditing.batching import in_halves
from robustann.auditing.partial import Kept
from robustann.auditing.passes import Labelled, Passes
from robustann.auditing.rows import Batch
from robustann.errors import RobustannError
from robustann.launch import expected_workers
from robustann.progress import Advance, progress_bar

# Seconds between two looks at what other workers are doing.
_POLL = 0.25
# Images a shard at the most: a stop loses a shard for each worker.
LARGEST_SHARD = 256
# Shards a worker at the least, where there are enough images: the last ones are waited for.
_EACH = 4
# Shards that one worker alone makes at the least, where it has more images.
_KEPT = 200
# Workers that are prepared for where nobody says how many come.
_WORKERS = 8


def shard_size(count: int, batch: int, *, keeps_batches: bool) -> int:
    """Images a shard of ``count``, for several workers; whole batches where it ``keeps_batches``.

    >>> shard_size(50_000, 64, keeps_batches=False), shard_size(100, 64, keeps_batches=True)
    (256, 64)
    """
    wanted = -(-count // (_EACH * (expected_workers() or _WORKERS)))
    if keeps_batches:
        return max(1, min(wanted, LARGEST_SHARD) // batch) * batch
    return min(LARGEST_SHARD, -(-wanted // 8) * 8)


def own_shard(count: int, batch: int) -> int:
    """Images a shard of ``count``, for one worker that keeps them on disk: whole batches.

    Each is written and synchronised three times, which takes as long as a batch of a cheap model;
    and a stop loses one, which should be little of the whole.

    >>> own_shard(50_000, 8), own_shard(1000, 8), own_shard(1000, 256)
    (248, 8, 256)
    """
    return batch * max(1, min(LARGEST_SHARD, count // _KEPT) // batch)


@dataclass(frozen=True)
class Shards:
    """The shards of the samples at ``positions``, of ``size`` images each, and what is kept of
    them; batches within them have ``batch`` images."""

    kept: Kept
    positions: Tensor
    size: int
    batch: int

    @property
    def starts(self) -> list[int]:
        """Where each shard begins."""
        return list(range(0, len(self.positions), self.size))

    def images(self, start: int) -> int:
        """How many images a shard has."""
        return min(self.size, len(self.positions) - start)

    def done(self, through: int) -> int:
        """Images that have been through this pass."""
        return sum(self.images(one) for one in self.starts if self.kept.finished(one, through))

    def first(self, passes: Passes, progress: bool) -> None:
        """Run the first pass on every shard that has not been through it."""

        def work(start: int, advance: Advance) -> None:
            batches: list[Batch] = []
            places = torch.arange(start, start + self.images(start))
            for part in places.split(self.batch):  # type: ignore[no-untyped-call]
                # While this one is attacked the next one is read.
                coming = self._after(int(part[-1]))
                if len(coming):
                    passes.split.prepare(self.positions[coming])
                batches += in_halves(
                    lambda some: [passes.first(int(some[0]), self.positions[some], advance)], part
                )
            found = (batch.attacks[label]["success"] for batch in batches
                     for label, _ in passes.check)  # fmt: skip
            self.kept.keep(start, 1, batches, {"broken": any(bool(one.any()) for one in found)})

        steps = 1 + len(passes.stages) + len(passes.check) + len(passes.shown)
        self._through(1, steps, work, progress)

    def _after(self, last: int) -> Tensor:
        """The places of the batch that this worker turns to after the one that ends there: of the
        same shard, or where nobody else takes shards, of the next one."""
        begin = last + 1
        shard = begin - begin % self.size
        ended = begin == shard and self.kept.shared
        if ended or begin >= len(self.positions) or self.kept.finished(shard, 1):
            return torch.arange(0)
        return torch.arange(begin, min(begin + self.batch, shard + self.images(shard)))

    @property
    def misled(self) -> bool:
        """Whether the check after the first pass broke anything, in any shard."""
        return any(self.kept.facts(start)["broken"] for start in self.starts)

    def second(self, passes: Passes, escalate: bool, progress: bool) -> None:
        """Run the second pass on every shard that has not been through it."""

        def work(start: int, advance: Advance) -> None:
            batches = self.kept.batches(start, 1)
            # One after the other: with its images, a batch is large.
            for place, batch in enumerate(batches):
                batches[place] = passes.second(batch, escalate, advance)
            self.kept.keep(start, 2, batches, self.kept.facts(start))

        steps = (len(passes.escalation) if escalate else 0) + (passes.distances is not None)
        self._through(2, steps, work, progress)

    def third(self, passes: Passes, remedies: Labelled, progress: bool) -> None:
        """Run remedies on every shard that they have not been run on."""

        def work(start: int, advance: Advance) -> None:
            batches = self.kept.batches(start, 2)
            for place, batch in enumerate(batches):
                batches[place] = passes.third(batch, remedies, advance)
            self.kept.keep(start, 3, batches, self.kept.facts(start))

        self._through(3, len(remedies), work, progress)

    def all(self, through: int = 2) -> list[Batch]:
        """Everything, in order, after this pass, but for images that only attacks need: memory
        must not grow with what stands."""
        return [
            batch.light() for start in self.starts for batch in self.kept.batches(start, through)
        ]

    def _through(
        self, through: int, steps: int, work: Callable[[int, Advance], None], progress: bool
    ) -> None:
        """Bring every shard through a pass, whoever does it; return when all are."""
        kept = self.kept
        pending = [start for start in self.starts if not kept.finished(start, through)]
        if kept.shared and pending:
            # Workers that begin at different places do not queue for the same shard.
            turn = os.getpid() * 7919 % len(pending)
            pending = pending[turn:] + pending[:turn]
        total = sum(map(self.images, pending)) * steps
        with progress_bar(total, wanted=progress, unit="images") as advance:
            while pending:
                waiting = []
                for start in pending:
                    if kept.finished(start, through):
                        advance(self.images(start) * steps, "by other workers")
                        continue
                    with kept.claim(f"shard-{start:08d}-{through}") as mine:
                        # Between the look and the claim it may have been finished.
                        if mine and not kept.finished(start, through):
                            self._worked(start, through, lambda: work(start, advance))  # noqa: B023
                        elif not mine:
                            waiting.append(start)
                if len(waiting) == len(pending):
                    time.sleep(_POLL)
                pending = waiting

    def _worked(self, start: int, through: int, work: Callable[[], None]) -> None:
        try:
            work()
        except RobustannError:
            # Taken for dead, and overtaken: then the state before the pass is gone.
            if not (self.kept.shared and self.kept.finished(start, through)):
                raise
