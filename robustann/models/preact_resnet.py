"""PreActResNet-18, the usual network for adversarial training on CIFAR."""

from __future__ import annotations

from torch import nn

from robustann.models.blocks import head, initialize, stage


def preact_resnet18(num_classes: int, in_channels: int) -> nn.Sequential:
    """Pre-activation ResNet of 18 layers for small images (He et al. 2016, arXiv:1603.05027).

    The stem keeps the size of the image, and a norm and ReLU stand before the pooling, as in
    Rice et al. (2020, arXiv:2002.11569).

    Args:
        num_classes: length of the logits.
        in_channels: of the images.

    >>> sum(p.numel() for p in preact_resnet18(10, 3).parameters())
    11172170
    """
    net = nn.Sequential(
        nn.Conv2d(in_channels, 64, 3, padding=1, bias=False),
        stage(64, 64, 1, 2),
        stage(64, 128, 2, 2),
        stage(128, 256, 2, 2),
        stage(256, 512, 2, 2),
        head(512, num_classes),
    )
    initialize(net)
    return net
