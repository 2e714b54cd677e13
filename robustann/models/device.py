"""Where to compute."""

from __future__ import annotations

import torch

from robustann.errors import UsageError
from robustann.launch import world


def resolve_device(name: str | None = None) -> torch.device:
    """The device called ``name``; ``None`` and ``"auto"`` take CUDA, else MPS, else the CPU.

    Each of several processes that ``torchrun`` launched on a machine takes a GPU of its own, unless
    a number is named.

    Raises:
        UsageError: no such device on this machine.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    mps = torch.backends.mps.is_available()
    if name in (None, "auto", "cuda") and torch.cuda.is_available():
        launched = world()
        if launched.size > 1:
            return torch.device("cuda", launched.local_rank % torch.cuda.device_count())
        return torch.device("cuda")
    if name is None or name == "auto":
        return torch.device("mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"expected a device such as cpu, cuda, cuda:1 or mps, got '{name}'; "
            "use 'auto' to take the fastest"
        ) from error
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(mps),
    }.get(device.type, 0)
    if (device.index or 0) >= count:
        raise UsageError(
            f"expected a device that this machine has, got '{name}', of which PyTorch sees "
            f"{count}; use 'cpu' or 'auto', or install a PyTorch built for that device"
        )
    return device
