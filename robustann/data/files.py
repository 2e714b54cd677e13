"""Datasets in single files and folders: ``.npz``, CSV manifests, Hugging Face datasets on disk."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustann.data.arrays import MAX_CLASSES, numbered, tensor_split
from robustann.data.folders import (
    DEFAULT_SIZE,
    LARGEST_KEPT,
    fitted_pixels,
    image_files,
    image_shape,
    open_image,
    reason,
)
from robustann.data.splits import Split, StreamSplit, fits_in_memory
from robustann.errors import DataError, UsageError
from robustann.extras import need

Parts = tuple[dict[str, Split], tuple[str, ...]]

_PARTS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation",
          "test": "test"}  # fmt: skip
_IMAGES = ("images", "x", "image", "img", "data")
_LABELS = ("labels", "y", "label", "fine_label", "class", "targets")
_MAX_MANIFEST = 2**27
_MAX_ARRAYS = 20


def load_npz(path: Path) -> Parts:
    """The parts in a NumPy archive, and the class names.

    Keys ``images`` (N, C, H, W) and ``labels`` (N,) for one part; or the same with ``train_``,
    ``validation_`` and ``test_`` before them. ``class_names``, an array of text, if it likes.
    Pickled objects are never read.

    Raises:
        UsageError: no such file.
        DataError: other keys, objects instead of numbers, unfit images or labels.

    >>> load_npz(Path("nowhere.npz"))
    Traceback (most recent call last):
    robustann.errors.UsageError: no file 'nowhere.npz'; correct the path
    """
    _check_file(path)
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(
                    f"expected a .npz archive in '{path}', got one array; write it with "
                    "numpy.savez(path, images=..., labels=...)"
                )
            _check_entries(path)
            arrays = {name: archive[name] for name in archive.files}
    except DataError:
        raise
    # Damage and pickles raise ValueError, BadZipFile, EOFError, zlib.error and more.
    except Exception as error:
        hint = (
            "it holds Python objects, which are never read; save plain arrays of numbers and text"
            if "pickle" in str(error)
            else "copy it again"
        )
        raise DataError(
            f"expected arrays in '{path}', reading failed with {type(error).__name__}: "
            f"{str(error)[:200]}; {hint}"
        ) from error
    given = arrays.pop("class_names", None)
    names = None if given is None else tuple(str(name) for name in np.atleast_1d(given))
    found: dict[str, dict[str, Any]] = {}
    for key, array in arrays.items():
        part, kind = _meaning(key)
        if not kind or kind in found.get(part, {}):
            raise DataError(_npz_keys(path, [*arrays]))
        found.setdefault(part, {})[kind] = array
    if not found.keys() & {"train", "test"} or any(len(pair) != 2 for pair in found.values()):
        raise DataError(_npz_keys(path, [*arrays]))
    parts: dict[str, Split] = {}
    for part, pair in found.items():
        try:
            parts[part] = tensor_split(
                pair["images"], pair["labels"], num_classes=len(names) if names else None
            )
        except DataError as error:
            raise DataError(f"the {part} part of '{path}': {error}") from error
    return parts, names or numbered(parts.values())


def _meaning(key: str) -> tuple[str, str]:
    """Part and kind of an array by its name: train_images, x_train, labels; an empty kind if none.

    >>> _meaning("x_train"), _meaning("test_labels"), _meaning("images"), _meaning("w")
    (('train', 'images'), ('test', 'labels'), ('train', 'images'), ('train', ''))
    """
    words = key.lower().split("_")
    parts = [_PARTS[word] for word in words if word in _PARTS]
    rest = "_".join(word for word in words if word not in _PARTS)
    kind = "images" if rest in _IMAGES else "labels" if rest in _LABELS else ""
    return (parts or ["train"])[0], kind if len(parts) < 2 else ""


def load_manifest(
    path: Path, image_size: int | None = None, usual_size: int | None = None
) -> Parts:
    """The parts that a CSV file lists, and the class names.

    Columns ``path`` and ``label``, and if it likes ``split`` (train, validation or test), named in
    the first line. Paths are relative to the file and stay in its folder. Labels are names, which
    are numbered by name, or numbers from 0.

    Args:
        path: the file.
        image_size: side in pixels that images are resized and cropped to.
        usual_size: that side where they differ and nothing else is said.

    Raises:
        UsageError: no such file.
        DataError: other columns, a path that leads elsewhere, an image that is not there.

    >>> load_manifest(Path("nowhere.csv"))
    Traceback (most recent call last):
    robustann.errors.UsageError: no file 'nowhere.csv'; correct the path
    """
    _check_file(path)
    if path.stat().st_size > _MAX_MANIFEST:
        raise DataError(f"expected at most {_MAX_MANIFEST} bytes in '{path}'; split it")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"expected a CSV file in '{path}', reading failed with {type(error).__name__}: "
            f"{error}; correct it"
        ) from error
    columns = {str(name).strip().lower(): name for name in (rows[0] if rows else {})}
    if not {"path", "label"} <= columns.keys():
        raise DataError(
            f"expected the columns path and label in '{path}', with a line for each image, got "
            f"{sorted(columns) or 'no lines'}; name them in the first line"
        )
    root = path.parent.resolve()
    listed: dict[str, tuple[list[Path], list[str]]] = {}
    for line, row in enumerate(rows, 2):
        where = f"line {line} of '{path}'"
        values = [row.get(columns[name]) for name in ("path", "label")]
        part_name = (row.get(columns["split"]) or "") if "split" in columns else "train"
        part = _PARTS.get(part_name.strip().lower())
        if part is None or not all(values):
            raise DataError(
                f"expected a path, a label and (if there is such a column) a split of train, "
                f"validation or test in {where}, got {values} and {part_name!r}"
            )
        files, labels = listed.setdefault(part, ([], []))
        files.append(_inside(root, str(values[0]).strip(), where))
        labels.append(str(values[1]).strip())
    if not listed.keys() & {"train", "test"}:
        raise DataError(
            f"expected lines of the split train or test in '{path}', got none; add some"
        )
    every = {label for _, labels in listed.values() for label in labels}
    by_number = all(label.isascii() and label.isdigit() for label in every)
    if by_number:
        longest = max(every, key=len)
        if len(longest) > 9 or max(map(int, every)) >= MAX_CLASSES:
            raise DataError(
                f"expected labels from 0 to the number of classes in '{path}', got {longest:.20}; "
                "number the classes from 0, without gaps, or give names"
            )
        names = tuple(str(number) for number in range(max(map(int, every)) + 1))
    else:
        names = tuple(sorted(every))
    if len(names) < 2:
        raise DataError(f"expected at least two classes in '{path}', got {sorted(every)[:3]}")
    place = {name: number for number, name in enumerate(names)}
    everything = [file for files, _ in listed.values() for file in files]
    shape = image_shape(everything, image_size, usual_size)
    keep = fits_in_memory(len(everything) * shape[0] * shape[1] * shape[2])
    parts = {
        part: image_files(
            files,
            torch.tensor([place[str(int(one)) if by_number else one] for one in labels]),
            shape,
            keep=keep,
        )
        for part, (files, labels) in listed.items()
    }
    return parts, names


def load_disk_dataset(
    path: Path, image_size: int | None = None, usual_size: int | None = None
) -> Parts:
    """The parts in a folder that Hugging Face's ``save_to_disk`` wrote, and the class names.

    A ``DatasetDict`` with ``train`` (and ``test``, ``validation``), or one ``Dataset``. The column
    of images is the one of that type; that of labels the one of class labels. No script runs and
    nothing is fetched.

    Args:
        path: the folder.
        image_size: side in pixels that images are resized and cropped to.
        usual_size: that side where they differ and nothing else is said.

    Raises:
        UsageError: no such folder, or the extra ``datasets`` is not installed.
        DataError: no images, no labels, damage.

    >>> load_disk_dataset(Path("nowhere"))
    Traceback (most recent call last):
    robustann.errors.UsageError: no folder 'nowhere' of a dataset; correct the path
    """
    if not path.is_dir():
        raise UsageError(f"no folder '{path}' of a dataset; correct the path")
    datasets = need("datasets", "datasets")
    try:
        # Places in a damaged file that lie outside of it end the process where it is mapped into
        # memory; where it is read, they are an error.
        size = sum(file.stat().st_size for file in path.rglob("*.arrow"))
        loaded = datasets.load_from_disk(str(path), keep_in_memory=fits_in_memory(size))
        for table in loaded.values() if isinstance(loaded, Mapping) else (loaded,):
            if fits_in_memory(size):
                table.data.table.validate(full=True)
    except Exception as error:
        raise DataError(
            f"expected a dataset that save_to_disk wrote in '{path}', reading failed with "
            f"{type(error).__name__}: {str(error)[:200]}; save it again"
        ) from error
    named = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    tables = {_PARTS[name]: table for name, table in named.items() if name in _PARTS}
    if "train" not in tables and "test" not in tables:
        if len(tables) != 1:
            raise DataError(f"expected a part 'train' or 'test' in '{path}', got {sorted(named)}")
        tables = {"test": tables["validation"]}
    features = next(iter(tables.values())).features
    image = _column(path, features, "images", [
        name for name, kind in features.items() if isinstance(kind, datasets.Image)
    ], _IMAGES)  # fmt: skip
    label = _column(path, features, "labels", [
        name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)
    ], _LABELS)  # fmt: skip
    kind = features[label]
    # Anything else would be decoded, which may open files and addresses that the dataset names.
    if not isinstance(kind, datasets.ClassLabel) and not str(getattr(kind, "dtype", "")).startswith(
        ("int", "uint")
    ):
        raise DataError(
            f"expected a column of class labels or whole numbers in '{path}', got '{label}', which "
            f"is {kind}; cast it with datasets.ClassLabel()"
        )
    parts: dict[str, Split] = {}
    for part, table in tables.items():
        parts[part] = _from_table(path, table, image, label, image_size, usual_size)
    names = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else numbered(parts.values())
    return parts, names


def _from_table(
    path: Path, table: Any, image: str, label: str, image_size: int | None, usual_size: int | None
) -> Split:
    labels = [int(value) for value in table[label]]
    if min(labels, default=0) < 0:
        raise DataError(
            f"'{path}' has images without a label (-1); a test part often has none. Use one that "
            "is labelled"
        )
    datasets = need("datasets", "datasets")

    # Decoded here, because a dataset may name files and addresses elsewhere, which its own
    # decoder would open.
    rows = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))

    def decoded(index: int) -> Any:
        content = rows[index][image]["bytes"]
        if content is None:
            raise DataError(
                f"expected the images themselves in '{path}', got the name of a file elsewhere in "
                f"row {index}; save the dataset again with save_to_disk"
            )
        try:
            with open_image(content) as opened:
                opened.load()
                return opened.copy()
        except Exception as error:
            raise DataError(
                f"expected an image in row {index} of '{path}', decoding failed: "
                f"{reason(error)}; repair the dataset"
            ) from error

    sampled = range(0, len(labels), max(1, len(labels) // 64))
    seen = [decoded(index) for index in sampled]
    sizes = {one.size for one in seen}
    grey = all(one.mode == "L" for one in seen)
    side = image_size or usual_size or DEFAULT_SIZE
    same = sizes.pop() if len(sizes) == 1 else (side, side)
    width, height = same if image_size is None and max(same) <= LARGEST_KEPT else (side, side)
    shape = (1 if grey else 3, height, width)

    def read(index: int) -> Tensor:
        return fitted_pixels(decoded(index), shape)

    if fits_in_memory(len(labels) * shape[0] * height * width):
        images = torch.stack([read(index) for index in range(len(labels))])
        return tensor_split(images, labels)
    return StreamSplit(read, torch.tensor(labels), shape, threads=1)


def _column(
    path: Path, features: Mapping[str, Any], what: str, typed: Sequence[str], usual: Sequence[str]
) -> str:
    chosen = list(typed) if len(typed) == 1 else [name for name in usual if name in features]
    if what == "images" and not typed:
        chosen = []
    if not chosen:
        raise DataError(
            f"expected one column of {what} in '{path}', got the columns "
            f"{', '.join(map(str, features))}; cast it with datasets.{what.title()[:-1]}() or "
            "rename it"
        )
    return chosen[0]


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"no file '{path}'; correct the path")


def _check_entries(path: Path) -> None:
    """Refuse an archive that unpacks to more than there is memory, or names arrays twice."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries) or len(entries) > _MAX_ARRAYS:
        raise DataError(_npz_keys(path, [entry.filename for entry in entries]))
    total = sum(entry.file_size for entry in entries)
    if not fits_in_memory(total, share=0.75):
        raise DataError(
            f"expected arrays that fit into memory in '{path}', got {total} bytes; give fewer "
            "images, or a folder of image files"
        )


def _inside(root: Path, text: str, where: str) -> Path:
    parts = PurePosixPath(text.replace("\\", "/"))
    outside = parts.is_absolute() or ".." in parts.parts or "\0" in text or ":" in text
    target = root if outside else root / Path(*parts.parts)
    try:
        # A link inside the folder may lead out of it.
        outside = outside or not target.resolve().is_relative_to(root)
        there = target.is_file()
    except (OSError, RuntimeError) as error:  # too long a name, a loop of links
        raise DataError(f"expected the path of an image in {where}, got {text!r:.100}; correct "
                        "it") from error  # fmt: skip
    if outside:
        raise DataError(
            f"expected a path inside the folder of the file in {where}, got {text!r:.100}; put the "
            "images beside it, and name them from there"
        )
    if not there:
        raise DataError(f"no image '{target}', which {where} names; correct the path")
    return target


def _npz_keys(path: Path, keys: list[str]) -> str:
    return (
        f"expected the arrays images and labels in '{path}', or train_images, train_labels, "
        "test_images, test_labels (and validation_...), and class_names if you like, got "
        f"{', '.join(keys[:8]) or 'none'}; name them so"
    )
