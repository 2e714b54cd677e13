"""How well a model does with other weights than its own, which it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustann.attacks.engine import check_labels, model_device
from robustann.data import Split
from robustann.errors import DataError, ModelError, UsageError
from robustann.threat import check_images


class Samples:
    """Labelled images, from tensors or from a part of a dataset, batch by batch.

    Args:
        images: float (N, C, H, W) in [0, 1], or a :class:`~robustann.data.Split`.
        labels: int64 (N,); None takes those of the split.

    Raises:
        UsageError: tensors without labels.
        DataError: no samples, or unfit images or labels.

    >>> samples = Samples(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 0]))
    >>> [len(labels) for _, labels in samples.batches(2, torch.device("cpu"))]
    [2, 1]
    """

    def __init__(self, images: Tensor | Split, labels: Tensor | None = None) -> None:
        if labels is None:
            if not isinstance(images, Split):
                raise UsageError("expected labels beside a tensor of images, got none; give both")
            labels = images.labels
        if not isinstance(images, Split):
            check_images(images)
        check_labels(labels, len(images))
        if not len(labels):
            raise DataError("expected at least one image, got none; choose another part")
        self._images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: Tensor) -> Samples:
        """Those at the positions, int64 on the CPU."""
        if isinstance(self._images, Split):
            return Samples(self._images.subset(positions), self.labels[positions])
        return Samples(self._images[positions.to(self._images.device)],
                       self.labels[positions.to(self.labels.device)])  # fmt: skip

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels on the device, at most ``size`` at a time."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            images = self._images
            batch = images.images(part) if isinstance(images, Split) else images[part]
            yield batch.to(device, torch.float32), self.labels[part].to(device)


def logits_with(model: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The logits (N, K) that ``model`` would give if these were its parameters.

    Raises:
        ModelError: the output is no row of logits an image.

    >>> layer = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> logits_with(layer, {"1.bias": torch.tensor([5.0, 6.0])}, torch.zeros(1, 1, 2, 2)).tolist()
    [[5.0, 6.0]]
    """
    logits = functional_call(model, dict(weights), (images,))
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"expected the model to return logits of shape ({len(images)}, classes), got {came}; "
            "wrap it so that it maps images to one row of logits each"
        )
    return logits.float()


@torch.no_grad()
def accuracy_with(
    model: nn.Module, weights: Mapping[str, Tensor], samples: Samples, batch_size: int
) -> float:
    """Share of the samples that ``model`` would classify correctly with these parameters.

    A row of logits with NaN among them is no answer, hence wrong. The model is expected in eval
    mode.

    >>> layer = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> samples = Samples(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))
    >>> accuracy_with(layer, {"1.bias": torch.tensor([5.0, 6.0])}, samples, 8)
    0.5
    """
    device = model_device(model)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in samples.batches(batch_size, device):
        logits = logits_with(model, weights, images)
        # argmax takes NaN for the largest.
        right = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
        correct += right.sum()
    return int(correct) / len(samples)


def check_batch_size(size: int) -> None:
    """Refuse sizes that are no positive integer.

    Raises:
        UsageError: with what came.

    >>> check_batch_size(256)
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UsageError(f"batch_size: expected a positive integer, got {size!r}")
