"""Which class an attack goes for: the runner-up of some rank, and how far it lies behind."""

from __future__ import annotations

import torch
from torch import Tensor

from robustann.attacks.base import at_least
from robustann.errors import UsageError
from robustann.threat import ThreatModel


def runner_up(logits: Tensor, labels: Tensor, rank: int) -> Tensor:
    """The class (N,) that comes ``rank``-th among all but the label, counted from 1.

    With fewer classes it is the last one.

    >>> runner_up(torch.tensor([[3.0, 0.0, 1.0, 2.0]]), torch.tensor([0]), 2)
    tensor([2])
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    rank = max(1, min(rank, logits.shape[1] - 1))
    return others.topk(rank, dim=1).indices[:, -1]


def lead(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Logit of the wanted class minus the label's (N,): positive where it has overtaken.

    >>> lead(torch.tensor([[3.0, 0.0, 1.0]]), torch.tensor([0]), torch.tensor([2]))
    tensor([-2.])
    """
    pair = logits.gather(1, torch.stack([wanted, labels], dim=1))
    return pair[:, 0] - pair[:, 1]


def check_targets(targets: int, threat: ThreatModel) -> None:
    """Refuse a rank below 0, and ranked targets where the threat model names the class itself.

    Raises:
        UsageError: with what was expected and what came.

    >>> check_targets(3, ThreatModel("linf", 0.1))
    """
    at_least("targets", targets, 0)
    if targets and threat.targeted:
        raise UsageError(
            f"expected targets=0 with a targeted threat model, got {targets}; "
            "the labels already name the wanted classes"
        )
