"""Random numbers of a training run: derived from (seed, epoch), apart from the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robustann.rng import stable_hash


@contextmanager
def global_state_kept(device: torch.device) -> Iterator[None]:
    """Restore torch's global generators, of the CPU and of ``device``, at the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # fork_rng does not know the one generator of mps.
        state = torch.mps.get_rng_state() if device.type == "mps" else None
        try:
            yield
        finally:
            if state is not None:
                torch.mps.set_rng_state(state)


def seed_global(device: torch.device, seed: int, epoch: int) -> None:
    """Seed the generators that a model's dropout draws from, and no other device's."""
    value = stable_hash("dropout", seed, epoch)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


def generator(purpose: str, seed: int, epoch: int) -> torch.Generator:
    """A generator for one purpose in one epoch; on the CPU, so that every device sees the same."""
    return torch.Generator().manual_seed(stable_hash(purpose, seed, epoch))
