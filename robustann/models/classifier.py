"""What every model of robustann is: normalisation first, then a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from robustann.errors import ModelError

# Bounds on what a file may ask for; far above any real classifier.
_MAX_CLASSES = 100_000
_MAX_CHANNELS = 4096
_MAX_SIDE = 8192

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Side = Annotated[int, Field(ge=1, le=_MAX_SIDE)]


class ModelSpec(BaseModel):
    """What a model is made from.

    Attributes:
        arch: name of the architecture, as :func:`robustann.models.create_model` takes it.
        class_names: one name a logit.
        shape: (C, H, W) of the images it was made for.
        mean: subtracted from each channel of images in [0, 1].
        std: then divides each channel.

    >>> ModelSpec(arch="small-cnn", class_names=("a", "b"), shape=(1, 8, 8),
    ...           mean=(0.0,), std=(1.0,)).num_classes
    2
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arch: str = Field(min_length=1, max_length=200)
    class_names: tuple[Annotated[str, Field(max_length=1000)], ...] = Field(
        min_length=2, max_length=_MAX_CLASSES
    )
    shape: tuple[Annotated[int, Field(ge=1, le=_MAX_CHANNELS)], _Side, _Side]
    mean: tuple[_Finite, ...] = Field(max_length=_MAX_CHANNELS)
    std: tuple[_Positive, ...] = Field(max_length=_MAX_CHANNELS)

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> ModelSpec:
        if not len(self.mean) == len(self.std) == self.shape[0]:
            raise ValueError(
                f"expected one mean and one std for each of {self.shape[0]} channels, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        return self

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)


@dataclass(frozen=True)
class Origin:
    """The file that a model was loaded from.

    Attributes:
        path: as it was given.
        sha256: of its content, in hex.
        kind: what it is, by its content.
        notes: what was done to get at the weights, one sentence each.

    >>> Origin("m.pt", "0" * 64, "torch", ()).kind
    'torch'
    """

    path: str
    sha256: str
    kind: str
    notes: tuple[str, ...]


class Normalize(nn.Module):
    """``(images - mean) / std``, channel by channel.

    >>> Normalize((0.5,), (0.25,))(torch.ones(1, 1, 1, 1)).item()
    2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images, of the same shape."""
        return (images - self.mean) / self.std


class ImageClassifier(nn.Module):
    """Images (N, C, H, W) in [0, 1] to logits (N, classes).

    Args:
        net: takes normalised images, gives logits.
        spec: what it was made from.

    Attributes:
        origin: the file it was loaded from; None for a new model.

    Raises:
        ModelError: when called with images of other dimensions or channels.

    >>> spec = ModelSpec(arch="mine:net", class_names=("a", "b"), shape=(1, 2, 2),
    ...                  mean=(0.0,), std=(1.0,))
    >>> model = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), spec)
    >>> model(torch.zeros(3, 1, 2, 2)).shape
    torch.Size([3, 2])
    """

    def __init__(self, net: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.normalize = Normalize(spec.mean, spec.std)
        self.net = net
        self.spec = spec
        self.origin: Origin | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images in [0, 1]."""
        _check(images, self.spec.shape)
        logits: Tensor = self.net(self.normalize(images))
        return logits


def _check(images: Tensor, shape: tuple[int, int, int]) -> None:
    # Sizes are tensors while torch.jit traces, and the graph would keep the comparison.
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return
    if images.ndim != 4 or images.shape[1] != shape[0]:
        raise ModelError(
            f"expected images of shape (N, {shape[0]}, {shape[1]}, {shape[2]}) in [0, 1], "
            f"got {tuple(images.shape)}; reshape them, or choose a model made for them"
        )


# torch.fx records the call whole instead of following the comparison.
torch.fx.wrap("_check")
