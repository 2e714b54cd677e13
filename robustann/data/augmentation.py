"""Random crops and flips of a whole batch at once, on whatever device it lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustann.copies import sent
from robustann.errors import UsageError


@dataclass(frozen=True)
class Augmentation:
    """Random crop from a zero-padded image, then a random left-right flip.

    Args:
        pad: zero pixels added on each side before the crop (0: no crop).
        flip: whether each image is flipped with probability one half.

    Calling it with images (N, C, H, W) and a ``torch.Generator`` returns images of the same
    shape; every image has its own shift and flip. The random numbers are drawn on the
    generator's device, so a CPU generator gives the same batch on any device. Images that are the
    ``rows`` of a larger batch of ``of`` images get what they would get in it.

    Raises:
        UsageError: ``pad`` is negative.

    >>> images = torch.rand(4, 3, 8, 8)
    >>> Augmentation(pad=2, flip=True)(images, torch.Generator().manual_seed(0)).shape
    torch.Size([4, 3, 8, 8])
    >>> Augmentation()(images, torch.Generator()) is images
    True
    """

    pad: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise UsageError(f"expected pad >= 0 pixels, got {self.pad}; use 0 for no crop")

    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator,
        *,
        rows: slice = slice(None),
        of: int | None = None,
    ) -> Tensor:
        if not self.pad and not self.flip:
            return images
        n, _, height, width = images.shape
        whole = n if of is None else of
        here, there = images.device, generator.device
        lines = torch.arange(height, device=here).expand(n, -1)
        columns = torch.arange(width, device=here).expand(n, -1)
        if self.flip:
            drawn = torch.rand(whole, 1, generator=generator, device=there)[rows]
            columns = torch.where(sent(drawn, here) < 0.5, width - 1 - columns, columns)
        if self.pad:
            shift = torch.randint(
                0, 2 * self.pad + 1, (2, whole, 1), generator=generator, device=there
            )
            shift = sent(shift[:, rows], here)
            lines, columns = lines + shift[0], columns + shift[1]
            images = F.pad(images, (self.pad,) * 4)
        # One gather does crop and flip: index (N,1,1,1), all channels, (N,1,H,1), (N,1,1,W).
        sample = torch.arange(n, device=here).view(n, 1, 1, 1)
        channel = torch.arange(images.shape[1], device=here).view(1, -1, 1, 1)
        return images[sample, channel, lines[:, None, :, None], columns[:, None, None, :]]
