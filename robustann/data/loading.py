"""``load_data``: a dataset named by text, always in three parts."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from robustann.data.arrays import check_images, check_labels, numbered, tensor_split
from robustann.data.augmentation import Augmentation
from robustann.data.files import load_disk_dataset, load_manifest, load_npz
from robustann.data.folders import load_folder
from robustann.data.splits import Split, StreamSplit, TensorSplit, fits_in_memory
from robustann.errors import DataError, UsageError, unknown_name
from robustann.factory import call_factory, is_factory

DATASETS: dict[str, str] = {
    "digits": "8x8 grey digits, 10 classes, 1,797 images; comes with scikit-learn, no download",
    "mnist": "28x28 grey digits, 10 classes, 60,000 + 10,000 images",
    "fashion-mnist": "28x28 grey clothes, 10 classes, 60,000 + 10,000 images",
    "cifar10": "32x32 colour objects, 10 classes, 50,000 + 10,000 images",
    "cifar100": "32x32 colour objects, 100 classes, 50,000 + 10,000 images",
    "imagefolder:PATH": "your images: PATH/train/CLASS/ and PATH/test/CLASS/, or PATH/CLASS/",
    "npz:FILE": "arrays images (N, C, H, W) and labels; or train_images, train_labels, test_...",
    "csv:FILE": "columns path, label and, if there, split; paths from the file's folder",
    "datasets:FOLDER": "what Hugging Face's save_to_disk wrote; extra datasets",
    "pkg.module:factory": "your function, which returns the images and labels",
}

# Never the seed of a run: two runs that are compared must hold out the same images.
_SPLIT_SEED = 1797
_TEST_FRACTION = 0.2
_VALIDATION_FRACTION = 0.1

# What a path follows, which may look like a factory.
_IMAGE_FILES = {"imagefolder": load_folder, "csv": load_manifest, "datasets": load_disk_dataset}
_PATH_PREFIXES = ("npz", *_IMAGE_FILES)

_TORCHVISION = {
    "mnist": ("MNIST", Augmentation()),
    "fashion-mnist": ("FashionMNIST", Augmentation(pad=2)),
    "cifar10": ("CIFAR10", Augmentation(pad=4, flip=True)),
    "cifar100": ("CIFAR100", Augmentation(pad=4, flip=True)),
}


@dataclass(frozen=True)
class ImageData:
    """A dataset in three parts, with the names of its classes.

    ``test`` is for the final evaluation alone; choices are made on ``validation``.

    Attributes:
        test_part: "own" where the data came with a test part; "cut" where it is a share of a
            single part; "all" where there was nothing but test images, which then stand in for
            the other parts too: such data are audited, and nothing is trained on them.

    Raises:
        DataError: parts of different image shapes, labels without a class name, names that
            are not unique, an empty part.

    >>> data = load_data("digits")
    >>> data.num_classes, data.shape
    (10, (1, 8, 8))
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    augmentation: Augmentation = field(default_factory=Augmentation)
    test_part: Literal["own", "cut", "all"] = "own"

    def __post_init__(self) -> None:
        if len(self.class_names) < 2 or len(set(self.class_names)) < len(self.class_names):
            raise DataError(
                f"expected at least two classes with unique names for '{self.name}', "
                f"got {list(self.class_names[:10])}; name every class once"
            )
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        for part, split in parts.items():
            if not len(split):
                raise DataError(f"the {part} part of '{self.name}' is empty; give it images")
            if split.shape != self.train.shape:
                raise DataError(
                    f"expected all parts of '{self.name}' to have images of the shape "
                    f"{self.train.shape}, got {split.shape} in {part}; resize them to one size"
                )
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.num_classes:
                raise DataError(
                    f"expected labels from 0 to {self.num_classes - 1} in the {part} part of "
                    f"'{self.name}', got {low} to {high}; give a name for every class"
                )

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.train.shape

    def check_trainable(self) -> None:
        """Refuse to train on test images.

        Raises:
            DataError: there are no others.

        >>> load_data("digits").check_trainable()
        """
        if self.test_part == "all":
            raise DataError(
                f"expected images to train on in '{self.name}', got a test part alone; add a "
                "training part"
            )

    def to(self, device: str | torch.device) -> ImageData:
        """The same data; images come on ``device``."""
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
        )


def load_data(
    spec: str,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    image_size: int | None = None,
    usual_size: int | None = None,
) -> ImageData:
    """Load a dataset in three parts: train, validation, test.

    The test part is the dataset's own where it has one, otherwise a stratified fifth; of files
    with a test part alone it is all there is, and nothing can be trained on them. The validation
    part is a stratified tenth cut from train, always the same one.

    What takes under a quarter of the free memory is decoded once; the rest is decoded on demand.

    Args:
        spec: a name in :data:`DATASETS`. ``imagefolder:PATH`` takes PATH/train with PATH/test
            (or PATH/val, which is the validation part where both are there), PATH/test or
            PATH/val alone, which can be audited, or PATH with one folder a class.
            ``npz:FILE``, ``csv:FILE`` and ``datasets:FOLDER`` are told in
            :mod:`robustann.data.files`. ``pkg.module:factory`` returns an :class:`ImageData`, or a
            dict with ``train`` and ``test``, each an (x, y) pair or a PyTorch Dataset of (image,
            label), and if it likes ``validation``, ``class_names`` and ``augmentation``.
        root: where MNIST, Fashion-MNIST and CIFAR lie; default: the environment variable
            ``ROBUSTANN_DATA``, else ``data``.
        download: fetch those into ``root`` where they are absent.
        image_size: side in pixels that image files are resized and cropped to; default: as
            they are where all have one size of at most 128 pixels, else the usual size.
        usual_size: that side, such as what a model takes; 224 where None.

    Raises:
        UsageError: an unknown name, a path that is not there, a dataset that is absent.
        DataError: damaged files, too few images, what a factory returned or raised.

    >>> data = load_data("digits")
    >>> len(data.train), len(data.validation), len(data.test)
    (1293, 144, 360)
    """
    prefix, colon, rest = spec.partition(":")
    path = Path(rest).expanduser()
    if colon and prefix == "npz" and image_size is None:
        parts, names = load_npz(path)
        return _in_three(spec, parts, names, Augmentation())
    if colon and prefix in _IMAGE_FILES:
        parts, names = _IMAGE_FILES[prefix](path, image_size, usual_size)
        shape = next(iter(parts.values())).shape
        side = min(shape[1:])
        # A shift of 4 pixels suits 32x32; smaller images bear less.
        pad = min(4, side // 8) if side <= 64 else 0
        return _in_three(spec, parts, names, Augmentation(pad=pad, flip=True))
    if image_size is not None:
        raise UsageError(
            f"image_size {image_size} applies to image files alone "
            f"({':PATH, '.join(_IMAGE_FILES)}:PATH), got '{spec}'; leave it out"
        )
    if spec == "digits":
        return _digits()
    if spec in _TORCHVISION:
        folder = Path(root or os.environ.get("ROBUSTANN_DATA") or "data").expanduser()
        return _torchvision(spec, folder, download)
    if runs_code(spec):
        return _from_factory(spec)
    check_name(spec)
    raise unknown_name("dataset", spec, DATASETS)


def check_name(spec: str) -> str:
    """``spec`` as it is, if :func:`load_data` knows what it means; nothing is opened.

    Raises:
        UsageError: it does not.

    >>> check_name("imagefolder:nowhere"), check_name("cifar10")
    ('imagefolder:nowhere', 'cifar10')
    """
    prefix, colon, _ = spec.partition(":")
    if (colon and prefix in _PATH_PREFIXES) or runs_code(spec) or (not colon and spec in DATASETS):
        return spec
    if Path(spec).is_dir():
        raise UsageError(f"expected a dataset, got the folder '{spec}'; use 'imagefolder:{spec}'")
    raise unknown_name("dataset", spec, DATASETS)


def runs_code(spec: str) -> bool:
    """Whether loading the dataset ``spec`` runs a user's ``pkg.module:factory``.

    >>> runs_code("mine.data:make"), runs_code("npz:images"), runs_code("digits")
    (True, False, False)
    """
    return is_factory(spec) and spec.partition(":")[0] not in _PATH_PREFIXES


def _cut(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Positions of what stays and of a stratified part, both ascending; always the same ones."""
    from sklearn.model_selection import train_test_split

    # scikit-learn wants at least one image a class in the part.
    size = max(math.ceil(fraction * len(labels)), len(set(labels.tolist())))
    stay, part = train_test_split(
        torch.arange(len(labels)).numpy(),
        test_size=size,
        random_state=_SPLIT_SEED,
        stratify=labels.numpy(),
    )
    return torch.from_numpy(stay).sort().values, torch.from_numpy(part).sort().values


def _in_three(
    name: str, parts: Mapping[str, Split], names: Sequence[str], augmentation: Augmentation
) -> ImageData:
    """Cut what is missing of validation and test from train; a test part alone stays whole."""
    for split in parts.values():
        # Before they are counted: a label of billions would take as many places.
        check_labels(split.labels, len(names))
    if "train" not in parts:
        whole = parts["test"]
        other = parts.get("validation", whole)
        return ImageData(name, whole, other, whole, tuple(names), augmentation, "all")
    train, test, validation = parts["train"], parts.get("test"), parts.get("validation")
    origin: Literal["own", "cut"] = "cut" if test is None else "own"
    needed = 1 + (test is None) + (validation is None)
    counts = torch.bincount(train.labels, minlength=len(names)).tolist()
    scarce = [name for name, n in zip(names, counts, strict=False) if 0 < n < needed]
    if scarce:
        raise DataError(
            f"expected at least {needed} training images of every class of '{name}', so that "
            f"every part gets one, got fewer of {scarce[:5]}; add images or remove the class"
        )
    if test is None:
        stay, part = _cut(train.labels, _TEST_FRACTION)
        train, test = train.subset(stay), train.subset(part)
    if validation is None:
        stay, part = _cut(train.labels, _VALIDATION_FRACTION)
        train, validation = train.subset(stay), train.subset(part)
    return ImageData(name, train, validation, test, tuple(names), augmentation, origin)


def from_arrays(
    images: Any,
    labels: Any,
    *,
    class_names: Sequence[str] | None = None,
    name: str = "images",
    augmentation: Augmentation | None = None,
) -> ImageData:
    """A dataset from images (N, C, H, W) in [0, 1] and N integer labels.

    A fifth is kept for testing and a tenth of the rest for validation, stratified by class and
    always the same ones.

    Args:
        images: tensor or array, floating point in [0, 1] or unsigned bytes.
        labels: integers from 0.
        class_names: one a class; None takes the numbers.
        name: what to call the data.
        augmentation: of the training part; None leaves it as it is.

    Raises:
        DataError: images or labels are unfit, or a class has too few images for three parts.

    >>> data = from_arrays(torch.rand(30, 1, 4, 4), torch.arange(30) % 3)
    >>> len(data.train), len(data.validation), len(data.test), data.class_names
    (21, 3, 6, ('0', '1', '2'))
    """
    split = tensor_split(images, labels, num_classes=len(class_names) if class_names else None)
    names = class_names or numbered([split])
    return _in_three(name, {"train": split}, names, augmentation or Augmentation())


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype("uint8")).unsqueeze(1)
    split = TensorSplit(images, torch.from_numpy(bunch.target.astype("int64")), scale=16)
    return _in_three("digits", {"train": split}, [str(i) for i in range(10)], Augmentation())


def _torchvision(name: str, root: Path, download: bool) -> ImageData:
    import torchvision

    class_name, augmentation = _TORCHVISION[name]
    source = getattr(torchvision.datasets, class_name)
    parts: dict[str, Split] = {}
    names: Sequence[str] = ()
    for part, is_train in (("train", True), ("test", False)):
        try:
            with warnings.catch_warnings():
                # NumPy 2.4 warns about how CIFAR's own files were pickled long ago.
                warnings.simplefilter("ignore")
                dataset = source(root=str(root), train=is_train, download=download)
        except Exception as error:
            if isinstance(error, RuntimeError) and not download:
                raise UsageError(
                    f"no whole copy of {name} in '{root}'; pass --download (download=True) to "
                    "fetch it, or --data-root (root=...) to say where it lies"
                ) from error
            problem = "could not be downloaded to" if download else "is damaged in"
            raise DataError(
                f"{name} {problem} '{root}' ({type(error).__name__}: {error}); check the "
                "connection, or delete the folder and download it again"
            ) from error
        images = torch.as_tensor(dataset.data)
        # MNIST is (N, H, W), CIFAR (N, H, W, C).
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        parts[part] = TensorSplit(
            images.contiguous(), torch.as_tensor(dataset.targets, dtype=torch.int64)
        )
        names = dataset.classes
    if name == "mnist":
        # torchvision calls them "0 - zero".
        names = [str(i) for i in range(10)]
    return _in_three(name, parts, names, augmentation)


def _from_factory(spec: str) -> ImageData:
    made = call_factory(spec, "dataset", DataError)
    if isinstance(made, ImageData):
        train, validation, test = (
            _checked(f"the {part} part of '{spec}'", getattr(made, part), made.num_classes)
            for part in ("train", "validation", "test")
        )
        return replace(made, train=train, validation=validation, test=test)
    allowed = {"train", "test", "validation", "class_names", "augmentation"}
    if not isinstance(made, Mapping) or not {"train", "test"} <= made.keys() <= allowed:
        came = (
            f"keys {sorted(map(str, made))}" if isinstance(made, Mapping) else type(made).__name__
        )
        raise DataError(
            f"expected '{spec}' to return an ImageData, or a dict with 'train' and 'test' (and "
            f"'validation', 'class_names', 'augmentation' if it likes), got {came}"
        )
    given = made.get("class_names")
    names = [] if given is None else [str(name) for name in given]
    parts = {
        part: _user_part(f"the {part} part of '{spec}'", made[part], len(names) or None)
        for part in ("train", "validation", "test")
        if made.get(part) is not None
    }
    names = names or list(numbered(parts.values()))
    augmentation = made.get("augmentation") or Augmentation()
    if not isinstance(augmentation, Augmentation):
        raise DataError(
            f"expected 'augmentation' of '{spec}' to be a robustann.data.Augmentation, "
            f"got {type(augmentation).__name__}"
        )
    return _in_three(spec, parts, names, augmentation)


def _checked(where: str, split: Split, num_classes: int | None) -> Split:
    """The split, its values judged like those of an (x, y) pair where they are in memory."""
    if not isinstance(split, TensorSplit):
        return split
    try:
        labels = check_labels(split.labels, num_classes)
        images = check_images(split._images)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if images is split._images:
        return split
    clipped = TensorSplit(images, labels)
    clipped.device = split.device
    return clipped


def _user_part(where: str, part: Any, num_classes: int | None) -> Split:
    try:
        if isinstance(part, Split):
            return _checked(where, part, num_classes)
        if isinstance(part, (tuple, list)) and len(part) == 2:
            return tensor_split(part[0], part[1], num_classes=num_classes)
        if hasattr(part, "__getitem__") and hasattr(part, "__len__") and len(part):
            return from_dataset(part, num_classes)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    raise DataError(
        f"expected {where} to be an (x, y) pair or a PyTorch Dataset of (image, label) that is "
        f"not empty, got {type(part).__name__}; return one of these"
    )


def from_dataset(dataset: Any, num_classes: int | None = None) -> Split:
    """A map-style PyTorch Dataset of (image, label), read once if that fits in memory.

    Args:
        dataset: images are tensors or arrays (C, H, W), uint8 or float in [0, 1], or PIL images.
        num_classes: labels must be below it, where given.

    Raises:
        DataError: an item is something else; the message names it.

    >>> dataset = torch.utils.data.TensorDataset(torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 0]))
    >>> len(from_dataset(dataset))
    3
    """

    def item(index: int) -> tuple[Tensor, int]:
        try:
            image, label = dataset[index]
            return _as_image(image), int(label)
        except Exception as error:
            raise DataError(
                f"expected item {index} to be (image, label), reading it raised "
                f"{type(error).__name__}: {error}; correct the Dataset"
            ) from error

    def read(index: int) -> Tensor:
        return check_images(item(index)[0].unsqueeze(0))[0]

    first, _ = item(0)
    keep = fits_in_memory(first.nbytes * len(dataset))
    images, labels = [], []
    for index in range(len(dataset)):
        image, label = item(index)
        if image.shape != first.shape:
            raise DataError(
                f"expected all images of the shape {tuple(first.shape)}, got "
                f"{tuple(image.shape)} at {index}; resize them to one size"
            )
        labels.append(label)
        if keep:
            images.append(image)
    if keep:
        return tensor_split(torch.stack(images), labels, num_classes=num_classes)
    channels, height, width = read(0).shape
    # One thread: a Dataset is written for worker processes and may not bear threads.
    return StreamSplit(
        read,
        check_labels(torch.tensor(labels), num_classes),
        (channels, height, width),
        threads=1,
    )


def _as_image(image: Any) -> Tensor:
    from PIL import Image

    if isinstance(image, Image.Image):
        from robustann.data.folders import pixels

        return pixels(image, grey=image.mode == "L")
    return torch.as_tensor(image)
