"""How many processes were launched together, as ``torchrun`` tells each in its environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The processes that were launched together.

    Attributes:
        rank: which of them this one is, from 0.
        size: how many there are.
        local_rank: which of those on this machine this one is.
        restarts: how often they were started again.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0


def world() -> World:
    """This process among those that ``torchrun`` launched; alone without it.

    >>> world()
    World(rank=0, size=1, local_rank=0, restarts=0)
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
    told = [os.environ.get(name, "") for name in names]
    # Other launchers set some of them: a rank means something only among others.
    if not (told[0].isdigit() and told[1].isdigit() and int(told[1]) > 1):
        return World()
    return World(*(int(text) if text.isdigit() else 0 for text in told))


def expected_workers() -> int | None:
    """How many processes will work side by side, where ``torchrun`` or Slurm tells; else None.

    >>> expected_workers() is None or expected_workers() >= 1
    True
    """
    counts = [
        int(text)
        for name in ("WORLD_SIZE", "SLURM_ARRAY_TASK_COUNT", "SLURM_NTASKS")
        if (text := os.environ.get(name, "")).isdigit()
    ]
    most = max(counts, default=0)
    return most if most > 1 else None
