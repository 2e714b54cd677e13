"""The watch for catastrophic overfitting: training against a single-step attack may, within one
epoch, turn to masking its gradient and lose all robustness (Wong et al., ICLR 2020,
https://arxiv.org/abs/2001.03994)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from robustann.training.randomness import generator

# By so much the robust accuracy on the images set aside may fall below the best so far. Of 60
# images, the fewest of digits, that is three standard deviations and more.
DROP = 0.2
_MOST = 256
_FEWEST = 20
_SHARE = 20


def set_aside(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions to train on and positions to watch, int64: one in 20 of ``count``, at most 256.

    Fewer than 20 would tell nothing: then none is set aside.
    """
    watched = min(_MOST, count // _SHARE)
    if watched < _FEWEST:
        return torch.arange(count), torch.arange(0)
    order = torch.randperm(count, generator=generator("watch", seed, 0))
    return order[watched:].sort().values, order[:watched].sort().values


def collapsed(accuracy: float, history: Sequence[dict[str, Any]]) -> bool:
    """Whether the robust accuracy on the watched images fell too far below the best so far, that
    of a model which came trained (``watch_before``) included.

    >>> collapsed(0.5, [{"watch_accuracy": 0.75}]), collapsed(0.5, [{"watch_accuracy": 0.6}])
    (True, False)
    >>> collapsed(0.5, [{"watch_before": 0.75}])
    True
    """
    kept = ("watch_before", "watch_accuracy")
    return (
        accuracy
        < max((row[name] for row in history for name in kept if name in row), default=0.0) - DROP
    )
