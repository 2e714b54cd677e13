"""What the pre-activation residual networks share (He et al. 2016, arXiv:1603.05027)."""

from __future__ import annotations

from torch import Tensor, nn


class PreActBlock(nn.Module):
    """Norm, ReLU, convolution, twice, added to a shortcut.

    Every ReLU is a module of its own and works out of place, because attribution methods hook
    modules and their inputs.

    Args:
        width_in: channels that come.
        width_out: channels that go.
        stride: of the first convolution; 2 halves height and width.

    >>> import torch
    >>> PreActBlock(4, 8, 2)(torch.zeros(1, 4, 8, 8)).shape
    torch.Size([1, 8, 4, 4])
    """

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width_in)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.projects = stride != 1 or width_in != width_out
        if self.projects:
            self.shortcut = nn.Conv2d(width_in, width_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, width_out, H / stride, W / stride)."""
        active = self.relu1(self.norm1(x))
        # A projection sees the activated features, an identity the raw ones.
        passed: Tensor = self.shortcut(active) if self.projects else x
        out: Tensor = self.conv2(self.relu2(self.norm2(self.conv1(active))))
        return out + passed


def stage(width_in: int, width_out: int, stride: int, blocks: int) -> nn.Sequential:
    """``blocks`` blocks, of which the first changes width and stride.

    >>> len(stage(4, 8, 2, 3))
    3
    """
    first = PreActBlock(width_in, width_out, stride)
    return nn.Sequential(first, *(PreActBlock(width_out, width_out, 1) for _ in range(blocks - 1)))


def head(width: int, num_classes: int) -> nn.Sequential:
    """Norm, ReLU, mean over all pixels, linear layer: logits for images of any size.

    >>> head(8, 10)[-1].out_features
    10
    """
    return nn.Sequential(
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


def initialize(net: nn.Module) -> None:
    """Draw the convolutions by He et al. (2015, arXiv:1502.01852), fan-out, and zero the biases.

    >>> net = head(8, 10)
    >>> initialize(net)
    >>> net[-1].bias.abs().max().item()
    0.0
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
