"""What the processes of one training run tell each other; alone, a process tells nobody.

Every process must call these in the same order.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robustann.launch import World, world


def join(device: torch.device) -> World:
    """Meet the other processes that ``torchrun`` launched, once: NCCL on GPUs, else gloo.

    >>> join(torch.device("cpu")).size
    1
    """
    launched = world()
    if launched.size > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Their functions keep, as default arguments, the group that exists when they are imported,
        # as a wrapped model imports them: kept so, it would outlive _leave.
        for module in ("nn.functional", "optim"):
            importlib.import_module(f"torch.distributed.{module}")
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        # The store may live through a restart, and in it the addresses of those that died.
        store = dist.PrefixStore(f"robustann-{launched.restarts}", store)  # type: ignore[attr-defined]
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        # Not after each run: a program may train several times.
        atexit.register(_leave)
    return launched


def _leave() -> None:
    """End the group and its threads, while there is an interpreter.

    A thread of gloo that lets go of a tensor after that aborts the process.
    """
    if not dist.is_initialized():
        return
    left = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    # Wrapped models in cycles hold it too.
    gc.collect()
    if left() is not None:
        # The meshes of a spread model are never let go of. All work was waited for; its threads
        # need no more than a turn to put it away.
        time.sleep(0.1)


def together() -> bool:
    """Whether there are other processes that train the same.

    >>> together()
    False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes.

    >>> total(torch.ones(1))
    tensor([1.])
    """
    if together():
        values = values.clone()
        dist.all_reduce(values)
    return values


def averaged(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors, such as gradients, averaged over all processes; None stays None.

    >>> averaged([torch.ones(1), None])
    [tensor([1.]), None]
    """
    if not together():
        return list(tensors)
    size = dist.get_world_size()
    return [None if one is None else total(one) / size for one in tensors]


def from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with those of the first process."""
    if together():
        for one in tensors:
            dist.broadcast(one, 0)


def agreed(value: Any) -> Any:
    """What the first process says.

    >>> agreed(3)
    3
    """
    if not together():
        return value
    told = [value]
    dist.broadcast_object_list(told, 0)
    return told[0]


def gathered(value: Any) -> list[Any]:
    """What each process says, in the order of their ranks.

    >>> gathered("a")
    ['a']
    """
    if not together():
        return [value]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return told
