"""Passes over a part of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from robustann.copies import ahead
from robustann.data import Split
from robustann.errors import RobustannError


def channel_statistics(split: Split, batch_size: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all images."""
    sums = torch.zeros(2, split.shape[0], dtype=torch.float64)
    for indices in torch.split(torch.arange(len(split)), batch_size):
        # Sums of millions of float32 pixels lose digits; not every accelerator has float64.
        images = split.images(indices).cpu().double()
        sums += torch.stack([images.sum((0, 2, 3)), images.square().sum((0, 2, 3))])
    mean, square = sums / (len(split) * split.shape[1] * split.shape[2])
    std = (square - mean.square()).clamp_min(0).sqrt()
    # A channel that never varies has no scale.
    return mean.tolist(), torch.where(std > 1e-6, std, 1.0).tolist()


def predictions(model: nn.Module, split: Split, batch_size: int, positions: Tensor) -> Tensor:
    """The predicted classes of the images there, on the CPU; the model is then in eval mode."""
    model.eval()
    found = []
    with torch.no_grad():
        for indices in torch.split(positions, batch_size):
            logits = model(split.images(indices))
            if not bool(torch.isfinite(logits).all()):
                raise RobustannError(
                    "expected finite logits, got NaN or infinity from the model in training; "
                    "try a lower learning rate, or clip the gradient (clip=1)"
                )
            found.append(logits.argmax(1).cpu())
    return torch.cat(found)


def fetched(split: Split, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch of positions with its images; what does not lie on the device is decoded and
    copied one batch ahead."""
    if split.resident:
        for batch in batches:
            yield batch, split.images(batch)
        return
    yield from zip(batches, ahead(split.images, batches, split.device), strict=True)
