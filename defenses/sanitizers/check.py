"""Input validation: images as the model expects them, or a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustann.attacks.base import at_least
from robustann.defenses.sanitizers.base import Sanitizer
from robustann.errors import DataError
from robustann.threat import check_images


def check_input(x: object, shape: Sequence[int | None] = (None, None, None)) -> None:
    """Refuse what is no batch of images in [0, 1]: type, dimensions, size, range, NaN, infinity.

    Args:
        x: what came.
        shape: the (C, H, W) that the model wants; None where any size will do.

    Raises:
        DataError: with what was expected, what came, and what to do.

    >>> import torch
    >>> check_input(torch.rand(2, 1, 8, 8), (1, None, None))
    >>> check_input(torch.rand(2, 3, 8, 8), (1, 8, 8))
    Traceback (most recent call last):
    ...
    robustann.errors.DataError: expected images of shape (N, 1, 8, 8), got (2, 3, 8, 8); ...
    """
    if not isinstance(x, Tensor):
        raise DataError(
            f"expected a float tensor of images (N, C, H, W), got {type(x).__name__}; convert it "
            "with torch.as_tensor(...).float()"
        )
    if x.dim() == 4 and x.is_floating_point() and x.numel():
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        if bad:
            raise DataError(
                f"expected finite values in every image, got NaN or infinity in {bad} of {len(x)} "
                "images; mend or drop them"
            )
    check_images(x.detach())
    if any(want not in (None, got) for want, got in zip(shape, x.shape[1:], strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise DataError(
            f"expected images of shape (N, {wanted}), got {tuple(x.shape)}; resize or convert "
            "them to what the model was trained on"
        )


@dataclass(kw_only=True, eq=False, repr=False)
class InputCheck(Sanitizer):
    """Hands images on unchanged, and refuses what is none (see :func:`check_input`).

    Args:
        channels: expected; None for any number. Likewise ``height`` and ``width``.

    >>> InputCheck(channels=3).label
    'check:channels=3'
    """

    name: ClassVar[str] = "check"
    against: ClassVar[str] = "invalid inputs"
    paper: ClassVar[str] = ""
    helps: ClassVar[tuple[str, ...]] = (
        "inputs that are no images: wrong shape or type, values outside [0, 1], NaN, infinity",
    )
    limits: ClassVar[tuple[str, ...]] = (
        "adversarial images, which are valid images",
        "images of another kind than the model was trained on",
    )
    differentiable: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    channels: int | None = None
    height: int | None = None
    width: int | None = None

    def check(self) -> None:
        for what, size in self.hyperparameters.items():
            if isinstance(size, int):
                at_least(what, size, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, (self.channels, self.height, self.width))
        return x
