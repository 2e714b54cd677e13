"""Images and maps as small pictures in base64."""

from __future__ import annotations

import base64
import io
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL import Image

# Up to so many pixels a side a picture is exact, as PNG; larger ones are made smaller, as WebP.
EXACT, SHOWN = 64, 160
_QUALITY = 80

# Dark to light with steadily rising lightness, so it reads the same in grey and to a colour-blind
# eye: night blue, violet, brick, amber, cream.
_HEAT = ((8, 9, 32), (62, 34, 112), (154, 52, 96), (226, 112, 58), (250, 190, 92), (255, 250, 226))


def image_picture(image: Tensor) -> str:
    """A (C, H, W) image in [0, 1]: grey for one channel, colour for three, else their mean.

    >>> len(image_picture(torch.zeros(1, 8, 8))) > 0
    True
    """
    from PIL import Image

    if image.shape[0] not in (1, 3):
        image = image.mean(0, keepdim=True)
    levels = image.mul(255).round().clamp(0, 255).to(torch.uint8)
    pixels = levels[0] if len(levels) == 1 else levels.permute(1, 2, 0).contiguous()
    return _encoded(Image.fromarray(pixels.numpy()))


def heat_picture(values: Tensor) -> str:
    """An (H, W) map in false colours; full brightness is its 99th percentile.

    >>> len(heat_picture(torch.zeros(8, 8))) > 0
    True
    """
    from PIL import Image

    values = values.nan_to_num(0.0, 0.0, 0.0)
    rank = max(1, math.ceil(0.99 * values.numel()))
    scale = float(values.flatten().kthvalue(rank).values) or float(values.max()) or 1.0
    levels = (values / scale * 255).round().clamp(0, 255).to(torch.uint8)
    picture = Image.fromarray(levels.numpy())
    picture.putpalette(heat_palette())
    return _encoded(picture)


def heat_palette() -> list[int]:
    """Red, green and blue of 256 levels, one after the other."""
    anchors = torch.tensor(_HEAT, dtype=torch.float64).T[None]
    colours = nn.functional.interpolate(anchors, size=256, mode="linear", align_corners=True)
    palette: list[int] = colours[0].T.round().to(torch.int64).flatten().tolist()
    return palette


def _encoded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    if max(picture.size) <= EXACT:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        picture = picture.convert("RGB" if picture.mode != "L" else "L")
        picture.thumbnail((SHOWN, SHOWN))
        picture.save(buffer, format="WEBP", quality=_QUALITY, method=4)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
