"""One number that says whether two models hold the same values."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def tensor_digest(module: nn.Module) -> str:
    """SHA-256, in hex, over names, types, shapes and bytes of all parameters and buffers.

    It depends on neither the device nor the memory layout.

    >>> one, two = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> tensor_digest(one) == tensor_digest(two)
    False
    >>> _ = two.load_state_dict(one.state_dict())
    >>> tensor_digest(one) == tensor_digest(two)
    True
    """
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    sha = hashlib.sha256()
    for name in sorted(tensors):
        # contiguous() keeps a channels-last tensor's strides out of the bytes.
        values = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        sha.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
