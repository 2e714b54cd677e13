"""A model whose parameters are spread over the processes: FSDP (Zhao et al., VLDB 2023,
https://arxiv.org/abs/2304.11277).

Each process holds a part of every parameter, of its gradient and of its momentum; a layer is whole
only while it computes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def spread(model: nn.Module) -> nn.Module:
    """A copy of the model, on the processes' devices, with its parameters spread over them."""
    # Slow to import, and seldom wanted: here and below.
    from torch.distributed.fsdp import fully_shard

    model = copy.deepcopy(model)
    for module in model.modules():
        # Each layer by itself: that is what is whole at a time.
        if module is not model and next(module.parameters(recurse=False), None) is not None:
            fully_shard(module)
    fully_shard(model)
    return model


def whole(values: Any) -> Any:
    """Nested dicts and lists with every tensor whole and on the CPU; all processes must ask."""
    from torch.distributed.tensor import DTensor

    if isinstance(values, DTensor):
        return values.full_tensor().detach().cpu()
    if isinstance(values, Tensor):
        return values.detach().cpu().clone()
    if isinstance(values, dict):
        return {name: whole(value) for name, value in values.items()}
    if isinstance(values, list):
        return [whole(value) for value in values]
    return values


@torch.no_grad()
def take_up(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write whole weights and buffers into a model that is spread."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(_like(weights[name], tensor))


def optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, whole, as one of a spread model takes it."""
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    spread_out = {
        number: {
            name: _like(value, listed[number])
            if isinstance(value, Tensor) and value.shape == listed[number].shape
            else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": spread_out}


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """The value, spread as ``tensor`` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(tensor, DTensor):
        return value
    local = value.to(tensor.device)
    return distribute_tensor(local, tensor.device_mesh, tensor.placements)
