"""Which samples are audited, and which of these are looked at closely."""

from __future__ import annotations

import torch
from torch import Tensor

# Which these are must not hang on the seed of the attacks.
_SELECTION_SEED = 20_240_229
# Images that the trust checks look at.
TRUST_IMAGES = 64


def chosen_samples(count: int, wanted: int | None) -> Tensor:
    """Positions of ``wanted`` of ``count`` samples, in order: drawn at random, always the same.

    >>> len(chosen_samples(10, 4)), chosen_samples(3, None).tolist()
    (4, [0, 1, 2])
    """
    if wanted is None or wanted >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=_generator(0))[:wanted].sort().values


def shuffled(count: int) -> Tensor:
    """The audited samples' places, in an order that is always the same: the first of them are
    looked at closely, so that memory does not grow with the data.

    >>> sorted(shuffled(3).tolist())
    [0, 1, 2]
    """
    return torch.randperm(count, generator=_generator(1))


def _generator(purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed(_SELECTION_SEED + purpose)
