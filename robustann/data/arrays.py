"""A user's own arrays: checked, then held as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustann.data.splits import Split, TensorSplit
from robustann.errors import DataError

# Resizing leaves values such as 1.0000001, which are no mistake of the user's.
_TOLERANCE = 1e-6
MAX_CLASSES = 100_000
"""Above it a label is taken for a mistake; each class has a name, which takes memory."""


def tensor_split(x: Any, y: Any, *, num_classes: int | None = None) -> TensorSplit:
    """Check a user's images and labels and hold them as one part of a dataset.

    Args:
        x: images (N, C, H, W), NumPy or PyTorch: float in [0, 1] and finite, or uint8 in 0..255.
            Floats within 1e-6 outside [0, 1] are clipped.
        y: N integer labels from 0, NumPy, PyTorch or a list.
        num_classes: labels must be below it, where given.

    Raises:
        DataError: anything else; the message says what was expected, what came and what to do.

    >>> split = tensor_split(np.zeros((2, 1, 4, 4)), [0, 1])
    >>> len(split), split.images(slice(None)).dtype
    (2, torch.float32)
    >>> tensor_split(np.full((1, 1, 4, 4), 255.0), [0])
    Traceback (most recent call last):
    robustann.errors.DataError: expected image values in [0, 1], got 255 to 255; divide by 255
    """
    images, labels = _tensor(x, "images"), _tensor(y, "labels")
    images = check_images(images)
    labels = check_labels(labels, num_classes)
    if len(images) != len(labels):
        raise DataError(
            f"expected one label per image, got {len(images)} images and {len(labels)} labels; "
            "check that both come from the same samples"
        )
    return TensorSplit(images, labels)


def _tensor(values: Any, what: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DataError(
            f"expected {what} as one array, got a ragged sequence ({error}); "
            "bring them to one shape"
        ) from error
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"expected numeric {what}, got {type(values).__name__} with dtype {array.dtype}; "
            "give a NumPy array or a PyTorch tensor of numbers"
        )
    array = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    # PyTorch cannot promise to leave a read-only array unchanged.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def check_images(images: Tensor) -> Tensor:
    """The images as uint8, or as float32 in [0, 1], if that is what they are.

    Raises:
        DataError: wrong dimensions, type or range, NaN, none at all.

    >>> check_images(torch.zeros(1, 1, 2, 2, dtype=torch.float64)).dtype
    torch.float32
    """
    shape = tuple(images.shape)
    if images.ndim != 4:
        hint = "add the channel axis with x[:, None]" if images.ndim == 3 else "reshape them"
        raise DataError(f"expected images of shape (N, C, H, W), got {shape}; {hint}")
    if not images.numel():
        raise DataError(f"expected at least one image, got the shape {shape}; give some images")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(
            f"expected float images in [0, 1] or uint8 images, got {images.dtype}; "
            "convert values 0..255 with x.astype('uint8') or x.to(torch.uint8)"
        )
    if shape[3] in (1, 3, 4) and shape[1] > 4:
        raise DataError(
            f"expected images of shape (N, C, H, W), got {shape}, which looks like channels "
            "last; use x.transpose(0, 3, 1, 2) for NumPy, x.permute(0, 3, 1, 2) for PyTorch"
        )
    if images.dtype == torch.uint8:
        return images
    finite = torch.isfinite(images).flatten(1).all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten()
        raise DataError(
            f"expected finite image values, got NaN or infinity in {len(bad)} of {len(images)} "
            f"images (the first is image {int(bad[0])}); remove or repair them"
        )
    low, high = float(images.min()), float(images.max())
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        if low >= 0 and high <= 255:
            hint = "divide by 255"
        elif low < 0:
            hint = (
                "undo the normalisation: images stay in [0, 1], the model's first layer normalises"
            )
        else:
            hint = "scale them to [0, 1]"
        raise DataError(f"expected image values in [0, 1], got {low:.4g} to {high:.4g}; {hint}")
    images = images.to(torch.float32)
    return images if low >= 0 and high <= 1 else images.clamp(0, 1)


def numbered(parts: Iterable[Split]) -> tuple[str, ...]:
    """Names for classes that have none: their numbers, up to the largest label of all parts.

    Raises:
        DataError: a label so large that it counts no classes.

    >>> numbered([tensor_split(np.zeros((2, 1, 4, 4)), [0, 2])])
    ('0', '1', '2')
    """
    highest = max(int(part.labels.max()) for part in parts)
    if highest >= MAX_CLASSES:
        raise DataError(
            f"expected labels from 0 to the number of classes, got {highest}; number the classes "
            "from 0, without gaps"
        )
    return tuple(str(number) for number in range(max(2, highest + 1)))


def check_labels(labels: Tensor, num_classes: int | None) -> Tensor:
    """The labels as int64 on the CPU, if they are integers from 0 (to ``num_classes`` - 1).

    Raises:
        DataError: wrong dimensions, type or range, none at all.

    >>> check_labels(torch.tensor([0, 2], dtype=torch.int32), 3)
    tensor([0, 2])
    """
    if labels.ndim != 1:
        hint = "use argmax over the classes" if labels.ndim == 2 else "flatten them"
        raise DataError(
            f"expected labels of shape (N,), one integer per image, got {tuple(labels.shape)}; "
            f"{hint}"
        )
    if not labels.numel():
        raise DataError("expected at least one label, got none; give one an image")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"expected integer labels, got {labels.dtype}; "
            "convert them with y.astype('int64') or y.long()"
        )
    labels = labels.to("cpu", torch.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise DataError(f"expected labels from 0, got {low}; number the classes from 0")
    if num_classes is not None and high >= num_classes:
        raise DataError(
            f"expected labels from 0 to {num_classes - 1} for {num_classes} classes, got {high}; "
            "number the classes from 0 or name all of them"
        )
    return labels
