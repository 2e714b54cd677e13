"""Image files in one folder a class."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from robustann.data.splits import (
    Split,
    StreamSplit,
    TensorSplit,
    default_threads,
    fits_in_memory,
)
from robustann.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# As Pillow calls the kinds that the endings stand for.
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Where Pillow begins to warn: a quarter of a gigabyte in colour.
_MAX_PIXELS = 89_478_485
_SAMPLED = 512
LARGEST_KEPT = 128
DEFAULT_SIZE = 224


def load_folder(
    path: Path, image_size: int | None = None, usual_size: int | None = None
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """The parts that a folder holds (``train`` or ``test`` alone, or more) and its class names.

    PATH/train with PATH/test, PATH/val or both, each with a folder a class; PATH/test or PATH/val
    alone; or PATH with a folder a class, which gives ``train`` alone. PATH/val is the test part
    where PATH/test is missing. Classes are numbered by name.

    Args:
        path: the folder.
        image_size: side in pixels of the square that images are resized and cropped to. By
            default images stay as they are where all those sampled have one size of at most
            128 pixels, and become squares of the usual size otherwise.
        usual_size: that side; 224 where None.

    Raises:
        UsageError: no such folder, or an image size under 1.
        DataError: no classes, a class without images, classes that differ between the parts,
            an image that cannot be decoded.

    >>> load_folder(Path("nowhere"))
    Traceback (most recent call last):
    robustann.errors.UsageError: expected a folder of images, got 'nowhere', which is no folder...
    """
    if image_size is not None and image_size < 1:
        raise UsageError(f"expected an image size of at least 1 pixel, got {image_size}")
    if not path.is_dir():
        raise UsageError(
            f"expected a folder of images, got '{path}', which is no folder; correct the path"
        )
    folders = _parts(path)
    first = next(iter(folders.values()))
    class_names = tuple(_folders_in(first))
    if len(class_names) < 2:
        raise DataError(
            f"expected '{first}' to hold one folder per class, at least two, "
            f"got {list(class_names)}; sort the images into folders"
        )
    listed = {part: _list_files(folder, class_names) for part, folder in folders.items()}
    everything = [file for files, _ in listed.values() for file in files]
    shape = image_shape(everything, image_size, usual_size)
    keep = fits_in_memory(len(everything) * shape[0] * shape[1] * shape[2])
    parts = {
        part: image_files(files, labels, shape, keep=keep)
        for part, (files, labels) in listed.items()
    }
    return parts, class_names


def image_files(
    files: Sequence[Path], labels: Tensor, shape: tuple[int, int, int], *, keep: bool
) -> Split:
    """One part of a dataset from image files: decoded now to ``keep`` them, or on demand.

    Raises:
        DataError: a file that cannot be decoded, if they are kept.

    >>> len(image_files([Path("a.png")], torch.tensor([0]), (3, 8, 8), keep=False))
    1
    """
    reader = _Reader(tuple(files), shape)
    return TensorSplit(_read_all(reader), labels) if keep else StreamSplit(reader, labels, shape)


@contextmanager
def open_image(source: Path | bytes) -> Iterator[Image]:
    """An image file, if it is of a usual kind and size; not decoded yet.

    Kinds are told by content, and Pillow hands some to other programs: PostScript goes to
    Ghostscript, whatever the file is called.

    Raises:
        DataError: no regular file, of another kind, or with more pixels than any photograph has.
        Exception: whatever Pillow raises, at once or where the image is decoded.

    >>> with open_image(b"P5 2 1 255 ab") as image:
    ...     image.size
    (2, 1)
    """
    from PIL import Image, UnidentifiedImageError

    with _stream(source) as stream:
        try:
            image = Image.open(stream, formats=_FORMATS)
        except UnidentifiedImageError as error:
            raise DataError(f"it is none of {', '.join(_FORMATS)}, whatever its name") from error
        if image.width * image.height > _MAX_PIXELS:
            raise DataError(
                f"{image.width}x{image.height} pixels, at most {_MAX_PIXELS} are read, for a small "
                "file can claim any number; make it smaller"
            )
        yield image


def _stream(source: Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    # Opening a pipe would wait for somebody to write to it.
    handle = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) |
                     getattr(os, "O_BINARY", 0))  # fmt: skip
    stream = os.fdopen(handle, "rb")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        stream.close()
        raise DataError("it is a pipe, a socket, a device or a folder, and no file")
    return stream


def reason(error: Exception) -> str:
    """Why an image cannot be read, in words.

    >>> reason(DataError("it is a pipe")), reason(ValueError("no"))
    ('it is a pipe', 'ValueError: no')
    """
    kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
    return f"{kind}{str(error)[:200]}"


def pixels(image: Image, *, grey: bool) -> Tensor:
    """uint8 (C, H, W) of a PIL image: one channel if ``grey``, else three.

    >>> from PIL import Image
    >>> pixels(Image.new("L", (4, 2), 7), grey=False).shape
    torch.Size([3, 2, 4])
    """
    array = np.array(_in_mode(image, grey))
    return torch.from_numpy(array[None] if grey else array.transpose(2, 0, 1).copy())


def fitted_pixels(image: Image, shape: tuple[int, int, int]) -> Tensor:
    """uint8 (C, H, W) of ``shape`` from a PIL image: resized to cover it, then cropped.

    >>> from PIL import Image
    >>> fitted_pixels(Image.new("L", (4, 2), 7), (3, 2, 2)).shape
    torch.Size([3, 2, 2])
    """
    channels, height, width = shape
    return pixels(_fitted(_in_mode(image, channels == 1), height, width), grey=channels == 1)


@dataclass(frozen=True)
class _Reader:
    """Decodes file ``i`` to uint8 (C, H, W)."""

    files: tuple[Path, ...]
    shape: tuple[int, int, int]

    def __call__(self, index: int) -> Tensor:
        path = self.files[index]
        try:
            with open_image(path) as opened:
                return fitted_pixels(opened, self.shape)
        # Pillow's decoders raise what they like: OSError, SyntaxError, ValueError, struct.error.
        except Exception as error:
            raise DataError(
                f"expected an image in '{path}', decoding it failed: {reason(error)}; repair or "
                "remove the file"
            ) from error


def _parts(path: Path) -> dict[str, Path]:
    train, test, val = path / "train", path / "test", path / "val"
    # A class may be called "train" too; then it holds images, not folders.
    if not train.is_dir() or not _folders_in(train):
        alone = [part for part in (test, val) if part.is_dir() and _folders_in(part)]
        # Beside other folders they are classes of strange names.
        if alone and _folders_in(path) == [part.name for part in alone]:
            return dict(zip(("test", "validation"), alone, strict=False))
        return {"train": path}
    if test.is_dir() and val.is_dir():
        return {"train": train, "validation": val, "test": test}
    if not test.is_dir() and not val.is_dir():
        raise DataError(
            f"expected '{test}' or '{val}' beside '{train}', got neither; add one, or name the "
            f"folder '{train}' itself to have a test part cut from it"
        )
    return {"train": train, "test": test if test.is_dir() else val}


def _folders_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _list_files(folder: Path, class_names: Sequence[str]) -> tuple[list[Path], Tensor]:
    here = set(_folders_in(folder))
    if here != set(class_names):
        missing, extra = sorted(set(class_names) - here), sorted(here - set(class_names))
        raise DataError(
            f"expected the same class folders in '{folder}' as in train, got "
            f"{len(missing)} missing {missing[:5]} and {len(extra)} more {extra[:5]}; "
            "give every part the same classes"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = sorted(
            Path(where, file)
            for where, _, names in os.walk(folder / name)
            for file in names
            if file.lower().endswith(_EXTENSIONS) and not file.startswith(".")
        )
        if not found:
            raise DataError(
                f"expected images ({', '.join(_EXTENSIONS)}) in '{folder / name}', got none; "
                "add some or remove the folder"
            )
        files += found
        labels += [label] * len(found)
    return files, torch.tensor(labels)


def image_shape(
    files: Sequence[Path], image_size: int | None, usual_size: int | None = None
) -> tuple[int, int, int]:
    """(C, H, W) that suits a sample of the files; only their headers are read.

    Raises:
        DataError: a file that is no image.

    >>> image_shape([Path("nowhere.png")], 32)
    Traceback (most recent call last):
    robustann.errors.DataError: expected an image in 'nowhere.png', opening it failed: ...
    """
    sizes, grey = set(), True
    for file in files[:: -(-len(files) // _SAMPLED)]:
        try:
            with open_image(file) as image:
                sizes.add(image.size)
                grey = grey and image.mode == "L"
        except Exception as error:
            raise DataError(
                f"expected an image in '{file}', opening it failed: {reason(error)}; repair or "
                "remove the file"
            ) from error
    channels = 1 if grey else 3
    if image_size is None and len(sizes) == 1 and max(next(iter(sizes))) <= LARGEST_KEPT:
        width, height = sizes.pop()
        return channels, height, width
    size = image_size or usual_size or DEFAULT_SIZE
    return channels, size, size


def _in_mode(image: Image, grey: bool) -> Image:
    mode = "L" if grey else "RGB"
    if image.mode == mode:
        image.load()
        return image
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        from PIL import Image as ImageModule

        values = np.asarray(image).astype(np.float64) / 257
        image = ImageModule.fromarray(values.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        # Pillow warns where such an image goes to RGB at once.
        image = image.convert("RGBA")
    return image.convert(mode)


def _fitted(image: Image, height: int, width: int) -> Image:
    """Resize until the image covers height x width, then crop the centre."""
    from PIL import Image as ImageModule

    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    wide, high = (
        max(width, round(image.width * scale)),
        max(height, round(image.height * scale)),
    )
    image = image.resize((wide, high), ImageModule.Resampling.BILINEAR)
    left, top = (wide - width) // 2, (high - height) // 2
    return image.crop((left, top, left + width, top + height))


def _read_all(reader: _Reader) -> Tensor:
    images = torch.empty((len(reader.files), *reader.shape), dtype=torch.uint8)

    def read(index: int) -> None:
        images[index] = reader(index)

    with ThreadPoolExecutor(default_threads()) as pool:
        # Consuming the results raises the first error.
        for _ in pool.map(read, range(len(images))):
            pass
    return images
