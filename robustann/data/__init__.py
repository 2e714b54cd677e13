"""Image data: three parts (train, validation, test) of images in [0, 1] with integer labels."""

from __future__ import annotations

from robustann.data.arrays import tensor_split
from robustann.data.augmentation import Augmentation
from robustann.data.loading import (
    DATASETS,
    ImageData,
    check_name,
    from_arrays,
    from_dataset,
    load_data,
    runs_code,
)
from robustann.data.matching import in_order_of, renumbering
from robustann.data.splits import Split, StreamSplit, TensorSplit

__all__ = [
    "DATASETS",
    "Augmentation",
    "ImageData",
    "Split",
    "StreamSplit",
    "TensorSplit",
    "check_name",
    "from_arrays",
    "from_dataset",
    "in_order_of",
    "load_data",
    "renumbering",
    "runs_code",
    "tensor_split",
]
