"""Which weights decay, and their moving average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from robustann.errors import ModelError

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights, which decay, and biases and normalisation parameters, which do not."""
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORMS)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or id(parameter) in norms
            groups[0.0 if exempt else weight_decay].append(parameter)
    filled = [{"params": group, "weight_decay": decay} for decay, group in groups.items() if group]
    if not filled:
        raise ModelError(
            "expected a model with parameters to train, got none that requires a gradient; "
            "set requires_grad on some"
        )
    return filled


def moving_average(decay: float) -> Callable[..., None]:
    """Update of averaged weights and buffers (the statistics of batch normalisation among them)."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        if averaged[0].is_floating_point():
            # A short memory at first, or the random initial weights would weigh for long.
            seen = int(count)
            torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + seen) / (10 + seen)))
        else:
            torch._foreach_copy_(averaged, current)

    return update
