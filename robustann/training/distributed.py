"""One model trained by several processes (DistributedDataParallel: Li et al., VLDB 2020,
https://arxiv.org/abs/2006.15704)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robustann import parallel
from robustann.rng import SampleRandom
from robustann.training.steps import TrainingStep

Objective = Callable[[Tensor, Tensor, SampleRandom], tuple[Tensor, Tensor]]


class _Objective(nn.Module):
    """A whole training step as one forward pass.

    So whatever a step does (crafting in eval mode, several passes, a forward of its own) happens on
    the bare model, and only the gradients of its loss are averaged, once a backward pass.
    """

    def __init__(self, step: TrainingStep, forward: nn.Module) -> None:
        super().__init__()
        self.inner = forward
        self._step = step

    def forward(
        self, images: Tensor, labels: Tensor, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        return self._step(self.inner, images, labels, random=random)


def joint(step: TrainingStep, forward: Any, images: Tensor, *, averages: bool = True) -> Objective:
    """The step's loss and logits, with gradients that are the mean over all processes.

    ``forward`` is the model as the step shall call it; a few ``images`` show which parameters take
    part. Unless it ``averages``, the model does so itself.
    """
    if not (averages and parallel.together()):
        return lambda x, labels, random: step(forward, x, labels, random=random)
    idle = _idle(forward, images)
    return nn.parallel.DistributedDataParallel(
        _Objective(step, forward), find_unused_parameters=idle
    )


def _idle(model: nn.Module, images: Tensor) -> bool:
    """Whether some parameters that shall be trained have no say in the logits."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logits = model.eval()(images)
    gradients = torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    return any(gradient is None for gradient in gradients)


class SharedStatistics:
    """Batch normalisation over the images of all processes, while they train.

    Layers are replaced by ``SyncBatchNorm``, which has the same parameters and buffers; there is
    none for the CPU, where each process takes the statistics of its share.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        if not parallel.together() or device.type != "cuda":
            return
        self.replace(model)

    def replace(self, model: nn.Module) -> None:
        """Put ``SyncBatchNorm`` in the place of each layer."""
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        found = [
            (module, name, child)
            for module in model.modules()
            for name, child in module.named_children()
            if type(child) in kinds
        ]
        for module, name, child in found:
            synced = nn.SyncBatchNorm.convert_sync_batchnorm(child)  # type: ignore[no-untyped-call]
            setattr(module, name, synced)
            self._replaced.append((module, name, child))

    def put_back(self) -> None:
        """Put the layers back; they have learned with those that stood in for them."""
        for module, name, child in self._replaced:
            child.train(getattr(module, name).training)
            setattr(module, name, child)
        self._replaced = []
