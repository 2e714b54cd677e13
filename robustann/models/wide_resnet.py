"""Wide residual networks, the standard of robustness leaderboards."""

from __future__ import annotations

from torch import nn

from robustann.errors import UsageError
from robustann.models.blocks import head, initialize, stage

_MAX_DEPTH, _MAX_WIDTH = 202, 64


def wide_resnet(depth: int, width: int, num_classes: int, in_channels: int) -> nn.Sequential:
    """WideResNet (Zagoruyko & Komodakis 2016, arXiv:1605.07146), without dropout.

    Args:
        depth: 6 n + 4 layers, from 10 to 202: 16, 28, 34, 70, ...
        width: factor on the widths 16, 32, 64 of the three stages, from 1 to 64.
        num_classes: length of the logits.
        in_channels: of the images.

    Raises:
        UsageError: no such depth or width.

    >>> sum(p.numel() for p in wide_resnet(10, 1, 10, 3).parameters())
    77850
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1 or depth > _MAX_DEPTH or not 1 <= width <= _MAX_WIDTH:
        raise UsageError(
            f"expected wideresnet-DEPTH-WIDTH with a depth of 6 n + 4 from 10 to {_MAX_DEPTH} "
            f"and a width from 1 to {_MAX_WIDTH}, got depth {depth} and width {width}; "
            "use for example wideresnet-28-10"
        )
    widths = [16 * width, 32 * width, 64 * width]
    net = nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
        stage(16, widths[0], 1, blocks),
        stage(widths[0], widths[1], 2, blocks),
        stage(widths[1], widths[2], 2, blocks),
        head(widths[2], num_classes),
    )
    initialize(net)
    return net
