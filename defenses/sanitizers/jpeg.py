"""JPEG compression, and a smooth stand-in for it."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustann.defenses.sanitizers.base import Sanitizer, in_range, smooth_round
from robustann.errors import DataError


@dataclass(kw_only=True, eq=False, repr=False)
class Jpeg(Sanitizer):
    """Compresses and decompresses each image (Dziugaite et al., 2016; Guo et al., ICLR 2018).

    Real JPEG by Pillow, in 8 bits, colour at half the resolution (4:2:0); it runs on the CPU,
    image by image. The surrogate is the same codec in torch with smoothed rounding (after Shin
    and Song, 2017).

    Args:
        quality: 1 to 95, as Pillow counts.

    Raises:
        DataError: in use, on images of other than 1 or 3 channels.

    >>> Jpeg(quality=75)(torch.full((1, 1, 8, 8), 0.2))[0, 0, 0, 0]
    tensor(0.2000)
    """

    name: ClassVar[str] = "jpeg"
    paper: ClassVar[str] = "https://arxiv.org/abs/1608.00853"
    helps: ClassVar[tuple[str, ...]] = (
        "attackers who do not know of it, with small changes of high frequency",
    )
    limits: ClassVar[tuple[str, ...]] = (
        "attackers who take the backward pass through a stand-in (Athalye et al., ICML 2018; Shin "
        "and Song, 2017)",
        "changes in low frequencies, which it keeps",
    )
    differentiable: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True

    quality: int = 75

    def check(self) -> None:
        in_range("quality", self.quality, 1, 95)

    def forward(self, x: Tensor) -> Tensor:
        from PIL import Image

        _check_channels(x)
        pixels = (x.detach() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        decoded = np.empty_like(pixels)
        for row, image in enumerate(pixels):
            stream = io.BytesIO()
            grey = image.shape[-1] == 1
            Image.fromarray(image[..., 0] if grey else image).save(
                stream, format="JPEG", quality=self.quality
            )
            decoded[row] = np.asarray(Image.open(stream)).reshape(image.shape)
        back = torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous()
        return back.to(x.device, x.dtype) / 255

    def surrogate(self, x: Tensor) -> Tensor:
        """The codec in torch, with smoothed rounding of the coefficients and none of pixels."""
        _check_channels(x)
        return codec(x, self.quality, smooth_round)


def _check_channels(x: Tensor) -> None:
    if x.shape[1] not in (1, 3):
        raise DataError(
            f"expected images of 1 or 3 channels for jpeg, got {x.shape[1]}; leave jpeg out"
        )


def codec(x: Tensor, quality: int, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """JPEG in torch: colour transform, DCT of 8x8 blocks, ``rounding`` of the coefficients, back.

    Colour is halved by the mean of 2x2 pixels and enlarged linearly. Where ``rounding`` rounds,
    this differs from Pillow by its integer arithmetic, by about one of 255 levels on average.

    Args:
        x: images (N, 1 or 3, H, W) in [0, 1].
        quality: 1 to 95.
        rounding: of the coefficients in units of their quantisation step.

    >>> bool((codec(torch.full((1, 3, 9, 7), 0.5), 75, torch.round) - 0.5).abs().max() < 0.01)
    True
    """
    height, width = x.shape[2:]
    luminance, chrominance = _tables(quality)
    levels = x * 255
    if x.shape[1] == 1:
        return (_blocks(levels, luminance, rounding) / 255).clamp(0.0, 1.0)
    red, green, blue = levels.unbind(1)
    # ITU-R BT.601, as in JFIF; both colours around 0 here.
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    colours = torch.stack([(blue - grey) / 1.772, (red - grey) / 1.402], dim=1)
    colours = F.pad(colours, (0, width % 2, 0, height % 2), mode="replicate")
    colours = _blocks(F.avg_pool2d(colours, 2) + 128, chrominance, rounding) - 128
    colours = F.interpolate(colours, scale_factor=2, mode="bilinear")[..., :height, :width]
    grey = _blocks(grey[:, None], luminance, rounding)[:, 0]
    to_blue, to_red = colours.unbind(1)
    red, blue = grey + 1.402 * to_red, grey + 1.772 * to_blue
    green = (grey - 0.299 * red - 0.114 * blue) / 0.587
    return (torch.stack([red, green, blue], dim=1) / 255).clamp(0.0, 1.0)


def _blocks(levels: Tensor, table: tuple[int, ...], rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Quantise the DCT of each 8x8 block of channels (N, C, H, W) in [0, 255]."""
    count, channels, height, width = levels.shape
    padded = F.pad(levels, (0, -width % 8, 0, -height % 8), mode="replicate") - 128
    tall, wide = padded.shape[2] // 8, padded.shape[3] // 8
    blocks = padded.view(count, channels, tall, 8, wide, 8).transpose(3, 4)
    basis = _basis().to(levels)
    steps = torch.tensor(table, dtype=levels.dtype, device=levels.device).view(8, 8)
    coefficients = rounding(basis @ blocks @ basis.T / steps) * steps
    back = (basis.T @ coefficients @ basis).transpose(3, 4).reshape_as(padded)
    return back[..., :height, :width] + 128


@functools.cache
def _basis() -> Tensor:
    """The orthonormal DCT-II of eight values as a matrix, float64."""
    frequency, place = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    basis = torch.cos(math.pi * (2 * place.double() + 1) * frequency.double() / 16) / 2
    basis[0] /= math.sqrt(2)
    return basis


@functools.cache
def _tables(quality: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The encoder's own quantisation steps, row by row: of luminance, of chrominance."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format="JPEG", quality=quality)
    tables = Image.open(stream).quantization  # type: ignore[attr-defined]
    return tuple(tables[0]), tuple(tables[1])
