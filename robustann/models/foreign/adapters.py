"""What foreign networks need around them, and what their files say about their input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.errors import ModelError
from robustann.models.classifier import ModelSpec, Normalize

MAX_SIDE = 2048
"""Of images, in pixels, that a file may ask for."""


@dataclass(frozen=True)
class Carried:
    """What a format says about the images that its network takes; None where it does not say.

    Attributes:
        source: what said it, in words.
        mean: per channel, of images in ``bounds``.
        std: per channel.
        bounds: what black and white are to the network, before mean and std.
        size: (height, width).
        channels: how many.
        class_names: one an output.

    Raises:
        ModelError: sizes that no images have.

    >>> Carried("config.json").mean is None
    True
    """

    source: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bounds: tuple[float, float] | None = None
    size: tuple[int, int] | None = None
    channels: int | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        # Images are resized on this word: a side of a million pixels takes all memory.
        sizes = [*(self.size or ()), *([] if self.channels is None else [self.channels])]
        if not all(1 <= one <= MAX_SIDE for one in sizes):
            raise ModelError(
                f"{self.source} states images of {sizes} (height, width, channels), where "
                f"robustann takes 1 to {MAX_SIDE}; correct it"
            )


@dataclass(frozen=True)
class Network:
    """A network as a file gave it, and all that is known of it.

    Attributes:
        net: takes images as ``carried`` says, gives logits.
        arch: what it is, for reports.
        carried: what the file says about its input.
        sha256: of the bytes it was made from, in hex; None where the user's code made it.
        notes: what the user should know.
        replace: called with images and the network's normalised view of them before the first
            use, returns the network to use instead and further notes.

    >>> Network(nn.Flatten(), "mine", Carried("the code")).notes
    ()
    """

    net: nn.Module
    arch: str
    carried: Carried
    sha256: str | None = None
    notes: tuple[str, ...] = ()
    replace: Callable[[Tensor], tuple[nn.Module, tuple[str, ...]]] | None = field(
        default=None, repr=False
    )


class Fit(nn.Module):
    """Images of any size to those that a network takes: (C, H, W).

    Grey images are repeated for three channels; other sizes are resized, bilinear with
    antialiasing, which gradients pass through.

    Raises:
        ModelError: images of other channels.

    >>> Fit((3, 8, 8))(torch.zeros(2, 1, 4, 4)).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W)."""
        channels, height, width = self.shape
        if images.ndim != 4 or images.shape[1] not in (channels, 1):
            raise ModelError(
                f"expected images of shape (N, {channels}, {height}, {width}) in [0, 1], "
                f"got {tuple(images.shape)}; choose data that belong to the model"
            )
        if images.shape[1] != channels:
            images = images.expand(-1, channels, -1, -1)
        if images.shape[2:] != (height, width):
            images = F.interpolate(
                images, (height, width), mode="bilinear", antialias=True, align_corners=False
            )
        return images


class FixedBatch(nn.Module):
    """A network that takes batches of one size alone, for batches of any size.

    >>> FixedBatch(nn.Flatten(), 2)(torch.zeros(5, 1, 2, 2)).shape
    torch.Size([5, 4])
    """

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net = net
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes)."""
        outputs = []
        for part in images.split(self.size):  # type: ignore[no-untyped-call]
            lacking = self.size - len(part)
            full = torch.cat([part, part[:1].expand(lacking, -1, -1, -1)]) if lacking else part
            outputs.append(self.net(full)[: len(part)])
        return torch.cat(outputs)


class ForeignClassifier(nn.Module):
    """Images in [0, 1] to logits, by a network that another project's files hold.

    It cannot be made anew from its ``spec``, as an
    :class:`~robustann.models.ImageClassifier` can.

    Args:
        net: takes normalised images, gives logits.
        spec: ``shape`` is what the network takes; images of other sizes are resized for it.
        sha256: of the bytes that it was made from, in hex; kept as a buffer, so that two networks
            whose weights PyTorch cannot see have different digests.

    >>> spec = ModelSpec(arch="ONNX", class_names=("a", "b"), shape=(1, 1, 2), mean=(0.5,),
    ...                  std=(0.5,))
    >>> ForeignClassifier(nn.Flatten(), spec)(torch.ones(1, 1, 1, 2))
    tensor([[1., 1.]])
    """

    def __init__(self, net: nn.Module, spec: ModelSpec, sha256: str | None = None) -> None:
        super().__init__()
        self.fit = Fit(spec.shape)
        self.normalize = Normalize(spec.mean, spec.std)
        self.net = net
        self.spec = spec
        self.register_buffer(
            "sha256", torch.tensor(list(bytes.fromhex(sha256 or "")), dtype=torch.uint8)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images in [0, 1]."""
        logits: Tensor = self.net(self.normalize(self.fit(images)))
        return logits
