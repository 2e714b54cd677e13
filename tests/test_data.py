"""Datasets: what comes is what lies in the files, in three parts that never overlap."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import robustann as ra
from robustann.cli.options import read_data
from robustann.data import (
    DATASETS,
    Augmentation,
    ImageData,
    StreamSplit,
    TensorSplit,
    folders,
    load_data,
    loading,
    splits,
    tensor_split,
)
from robustann.errors import DataError, UsageError

MNIST_ROOT = Path(__file__).parents[2] / "shared" / "data"
needs_mnist = pytest.mark.skipif(
    not (MNIST_ROOT / "MNIST" / "raw").is_dir(), reason="no MNIST in ../shared/data"
)


def _parts(data: ImageData) -> dict[str, splits.Split]:
    return {"train": data.train, "validation": data.validation, "test": data.test}


def _hashes(split: splits.Split) -> list[str]:
    return [
        hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in split.images(slice(None))
    ]


def _write_images(
    folder: Path, count: int, seed: int, size: tuple[int, int] = (12, 10), mode: str = "RGB"
) -> list[Path]:
    """``count`` noise images as PNG, which loses nothing."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    paths = []
    for i in range(count):
        values = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        paths.append(folder / f"{i:03}.png")
        Image.fromarray(values).convert(mode).save(paths[-1])
    return paths


# --- digits and MNIST


def test_digits_keep_their_values_exactly() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = load_data("digits")
    assert (data.shape, data.class_names) == ((1, 8, 8), tuple("0123456789"))
    assert [len(split) for split in _parts(data).values()] == [1293, 144, 360]
    original = {
        hashlib.sha256((image / 16).astype(np.float32).tobytes()).hexdigest(): int(label)
        for image, label in zip(bunch.images, bunch.target, strict=True)
    }
    assert len(original) == 1797  # no duplicates, so a hash stands for an image
    seen: dict[str, int] = {}
    for split in _parts(data).values():
        hashes = _hashes(split)
        assert not seen.keys() & set(hashes)
        seen |= dict(zip(hashes, split.labels.tolist(), strict=True))
    assert seen == original


def test_parts_are_stratified_and_always_the_same() -> None:
    torch.manual_seed(1)
    first = load_data("digits")
    torch.manual_seed(2)
    np.random.seed(2)  # the global state must not matter
    second = load_data("digits")
    for name, split in _parts(first).items():
        assert split.digest() == _parts(second)[name].digest()
        shares = torch.bincount(split.labels, minlength=10) / len(split)
        assert shares.sub(0.1).abs().max() < 0.02


@needs_mnist
def test_mnist_test_part_is_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    monkeypatch.setenv("ROBUSTANN_DATA", str(MNIST_ROOT))
    data = load_data("mnist")
    assert [len(split) for split in _parts(data).values()] == [54000, 6000, 10000]
    assert data.class_names == tuple("0123456789")
    original = torchvision.datasets.MNIST(str(MNIST_ROOT), train=False)
    assert torch.equal(data.test.labels, original.targets)
    some = slice(0, 10_000, 97)
    assert torch.equal(data.test.images(some)[:, 0], original.data[some] / 255)
    assert data.augmentation == Augmentation()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_absent_dataset_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--download .* --data-root"):
        load_data(name, root=tmp_path)


def test_cifar_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR's arrays are channels last, with labels in a list."""
    import torchvision

    rng = np.random.default_rng(0)
    arrays = {part: rng.integers(0, 256, (60, 32, 32, 3), np.uint8) for part in (True, False)}

    class FakeCIFAR10:
        classes = [f"c{i}" for i in range(10)]  # noqa: RUF012 - as torchvision has it

        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.data, self.targets = arrays[train], [i % 10 for i in range(60)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    data = load_data("cifar10")
    assert data.shape == (3, 32, 32)
    expected = arrays[False].transpose(0, 3, 1, 2) / np.float32(255)
    assert np.array_equal(data.test.images(slice(None)).numpy(), expected)
    assert data.augmentation == Augmentation(pad=4, flip=True)


def test_damaged_download_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def broken(**_: object) -> None:
        raise EOFError("Ran out of input")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", broken)
    with pytest.raises(DataError, match="cifar10 is damaged"):
        load_data("cifar10")
    with pytest.raises(DataError, match="could not be downloaded"):
        load_data("cifar10", download=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("cifar-10", "did you mean 'cifar10'"), ("nothing-like-it", "Known: .*mnist")],
)
def test_unknown_dataset(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_data(spec)


def test_a_bare_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="use 'imagefolder:"):
        load_data(str(tmp_path))


def test_image_size_elsewhere_is_refused() -> None:
    with pytest.raises(UsageError, match="image files alone"):
        load_data("digits", image_size=32)


def test_datasets_are_described() -> None:
    assert {"digits", "mnist", "cifar10", "imagefolder:PATH"} <= DATASETS.keys()
    assert all(DATASETS.values())


# --- image folders


def test_folder_with_train_and_test(tmp_path: Path) -> None:
    files = {
        part: {
            name: _write_images(tmp_path / part / name, 10, hash_seed)
            for hash_seed, name in enumerate(("ant", "bee"), start)
        }
        for start, part in ((0, "train"), (2, "test"))
    }
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    data = load_data(f"imagefolder:{tmp_path}")
    assert (data.class_names, data.shape) == (("ant", "bee"), (3, 10, 12))
    assert [len(split) for split in _parts(data).values()] == [18, 2, 20]
    originals = [np.asarray(Image.open(f)) for name in ("ant", "bee") for f in files["test"][name]]
    expected = np.stack(originals).transpose(0, 3, 1, 2) / np.float32(255)
    assert np.array_equal(data.test.images(slice(None)).numpy(), expected)
    assert data.test.labels.tolist() == [0] * 10 + [1] * 10
    held_out = set(_hashes(data.validation))
    assert len(held_out) == 2
    assert not held_out & set(_hashes(data.train))
    assert not held_out & set(_hashes(data.test))
    assert sorted(data.validation.labels.tolist()) == [0, 1]


def test_folder_of_classes_alone_is_split(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        _write_images(tmp_path / name, 20, seed)
    data = load_data(f"imagefolder:{tmp_path}")
    assert [len(split) for split in _parts(data).values()] == [43, 5, 12]
    assert torch.bincount(data.test.labels).tolist() == [4, 4, 4]
    hashes = [h for split in _parts(data).values() for h in _hashes(split)]
    assert len(set(hashes)) == 60


def test_folder_val_is_test_where_there_is_no_test(tmp_path: Path) -> None:
    for i, part in enumerate(("train", "val")):
        for j, name in enumerate("ab"):
            _write_images(tmp_path / part / name, 5, 2 * i + j)
    two = load_data(f"imagefolder:{tmp_path}")
    assert [len(split) for split in _parts(two).values()] == [8, 2, 10]
    for j, name in enumerate("ab"):
        _write_images(tmp_path / "test" / name, 3, 10 + j)
    three = load_data(f"imagefolder:{tmp_path}")
    assert [len(split) for split in _parts(three).values()] == [10, 10, 6]
    assert three.validation.digest() == two.test.digest()


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for seed, name in enumerate(("car", "train")):
        _write_images(tmp_path / name, 6, seed)
    assert load_data(f"imagefolder:{tmp_path}").class_names == ("car", "train")


@pytest.mark.parametrize(("modes", "channels"), [("LL", 1), (("L", "RGB"), 3), ("1L", 3)])
def test_folder_stays_grey_only_if_all_is_grey(
    tmp_path: Path, modes: tuple[str, str], channels: int
) -> None:
    for seed, (name, mode) in enumerate(zip("ab", modes, strict=True)):
        _write_images(tmp_path / name, 4, seed, mode=mode)
    data = load_data(f"imagefolder:{tmp_path}")
    assert data.shape == (channels, 10, 12)
    if channels == 1:
        expected = {
            (np.asarray(Image.open(f)) / np.float32(255)).tobytes() for f in tmp_path.glob("*/*")
        }
        came = {
            image.numpy().tobytes()
            for split in _parts(data).values()
            for image in split.images(slice(None))
        }
        assert came == expected


def test_folder_of_mixed_sizes_is_resized_and_cropped(tmp_path: Path) -> None:
    # Left third red, middle green, right blue: the centre crop of a wide image is green.
    wide = np.zeros((30, 90, 3), np.uint8)
    for i in range(3):
        wide[:, 30 * i : 30 * (i + 1), i] = 255
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(wide).save(tmp_path / name / f"{i}.png")
            Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / name / f"{i}t.png")
    data = load_data(f"imagefolder:{tmp_path}", image_size=20)
    assert data.shape == (3, 20, 20)
    images = data.train.images(slice(None))
    assert (images[:, 1, 2:-2, 2:-2] == 1).all()
    assert (images[:, [0, 2], 2:-2, 2:-2] == 0).all()
    assert load_data(f"imagefolder:{tmp_path}").shape == (3, 224, 224)


def test_large_images_of_one_size_become_224(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        _write_images(tmp_path / name, 3, seed, size=(129, 100))
    data = load_data(f"imagefolder:{tmp_path}")
    assert data.shape == (3, 224, 224)
    assert data.augmentation == Augmentation(flip=True)


def test_unusual_modes_are_brought_to_rgb(tmp_path: Path) -> None:
    for name in "ab":
        _write_images(tmp_path / name, 3, ord(name), size=(8, 8))
    grey16 = np.full((8, 8), 257 * 100, np.uint16)
    Image.fromarray(grey16).save(tmp_path / "a" / "grey16.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "a" / "palette.png", transparency=b"\x00\xff")
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(tmp_path / "b" / "alpha.png")
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "b" / "cmyk.jpg")
    loaded, _ = folders.load_folder(tmp_path)
    images = loaded["train"].images(slice(None)) * 255
    corners = images[:, :, 0, 0].round().int().tolist()
    for expected in ([100] * 3, [10, 20, 30], [1, 2, 3], [255] * 3):
        assert expected in corners


def test_stream_and_memory_give_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate("ab"):
        _write_images(tmp_path / name, 20, seed, size=(9 + seed, 7))
    spec = f"imagefolder:{tmp_path}"
    memory = load_data(spec, image_size=8)
    monkeypatch.setattr(splits, "_free_memory", lambda device: 0)
    stream = load_data(spec, image_size=8)
    for name, split in _parts(memory).items():
        other = _parts(stream)[name]
        assert isinstance(split, TensorSplit)
        assert isinstance(other, StreamSplit)
        for indices in (slice(None), slice(None, None, -1), [2, 0, 2], torch.tensor([1]), []):
            assert torch.equal(split.images(indices), other.images(indices))
        assert torch.equal(split.labels, other.labels)
        assert split.digest() == other.digest()
        assert split.digest([1, 0]) == other.subset([1, 0]).digest() != other.digest([0, 1])


@pytest.mark.parametrize("free", [0, 2**40])
@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_damaged_image_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, damage: str
) -> None:
    for seed, name in enumerate("ab"):
        _write_images(tmp_path / name, 6, seed)
    bad = tmp_path / "b" / "003.png"
    bad.write_bytes(bad.read_bytes()[:200] if damage == "truncated" else b"not an image")
    monkeypatch.setattr(splits, "_free_memory", lambda device: free)

    def use() -> None:
        for split in _parts(load_data(f"imagefolder:{tmp_path}")).values():
            split.images(slice(None))

    with pytest.raises(DataError, match=r"003\.png"):
        use()


def test_folder_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which is no folder"):
        load_data(f"imagefolder:{tmp_path}/none")
    with pytest.raises(UsageError, match="at least 1 pixel"):
        load_data(f"imagefolder:{tmp_path}", image_size=0)
    with pytest.raises(DataError, match="one folder per class, at least two"):
        load_data(f"imagefolder:{tmp_path}")
    _write_images(tmp_path / "train" / "a", 3, 0)
    _write_images(tmp_path / "train" / "b", 3, 1)
    with pytest.raises(DataError, match=r"beside .* got neither"):
        load_data(f"imagefolder:{tmp_path}")
    _write_images(tmp_path / "test" / "a", 3, 2)
    _write_images(tmp_path / "test" / "c", 3, 3)
    with pytest.raises(DataError, match=r"1 missing \['b'\] and 1 more \['c'\]"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "test" / "c").rename(tmp_path / "test" / "b")
    for file in (tmp_path / "test" / "b").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"in '.*test.b', got none"):
        load_data(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_of_a_class(tmp_path: Path, count: int) -> None:
    _write_images(tmp_path / "many", 10, 0)
    _write_images(tmp_path / "few", count, 1)
    with pytest.raises(DataError, match=r"at least 3 training images .* fewer of \['few'\]"):
        load_data(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("counts", [(3, 3), (3, 40), (3, 4, 5, 6, 100), (10,) * 30])
def test_every_class_is_trained_on(counts: tuple[int, ...]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    split = TensorSplit(torch.zeros(len(labels), 1, 1, 1), labels)
    names = [str(i) for i in range(len(counts))]
    data = loading._in_three("made", {"train": split}, names, Augmentation())
    assert torch.bincount(data.train.labels, minlength=len(counts)).min() >= 1
    assert sum(len(part) for part in _parts(data).values()) == len(labels)


# --- splits


def test_split_indices() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    split = TensorSplit(images, torch.arange(5))

    def at(indices: splits.Indices) -> list[int]:
        return (split.images(indices).flatten() * 255).round().int().tolist()

    assert at(slice(1, 3)) == [1, 2]
    assert at([4, 0]) == [4, 0]
    assert at(torch.tensor([True, False, False, False, True])) == [0, 4]
    assert split.subset([3, 1]).labels.tolist() == [3, 1]
    assert split.subset([3, 1]).subset([1]).labels.tolist() == [1]
    for wrong in ([5], [-1], [0.5], [[0]], torch.tensor([True])):
        with pytest.raises(UsageError, match="expected"):
            split.images(wrong)  # type: ignore[arg-type]


def test_images_are_copies() -> None:
    split = tensor_split(torch.zeros(2, 1, 2, 2), [0, 1])
    split.images(slice(None)).add_(1)
    assert split.images(slice(None)).max() == 0


def test_digest_depends_on_content_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(0, 256, (7, 2, 3, 3), dtype=torch.uint8)
    labels = torch.arange(7)
    split = TensorSplit(values, labels)
    digest = split.digest()
    assert TensorSplit(values / 255, labels).digest() == digest
    monkeypatch.setattr(splits, "_DIGEST_VALUES", 40)
    assert split.digest() == digest
    changed = values.clone()
    changed[6, 1, 2, 2] ^= 1
    assert TensorSplit(changed, labels).digest() != digest
    assert TensorSplit(values, labels.flip(0)).digest() != digest
    assert TensorSplit(values.view(7, 2, 9, 1), labels).digest() != digest


def test_moving_keeps_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data("digits")
    moved = data.to("cpu")
    assert moved.test.digest() == data.test.digest()
    assert moved.class_names == data.class_names
    # What does not fit stays, and every batch moves; "meta" shows where a batch went.
    monkeypatch.setattr(splits, "_free_memory", lambda device: 0)
    away = data.test.to("meta")
    assert away.images([0]).device.type == "meta"
    assert away.digest() == data.test.digest()
    assert away.subset([0]).device.type == "meta"


def test_stream_refuses_images_of_another_shape() -> None:
    split = StreamSplit(lambda i: torch.zeros(1, 2, 2 + i), torch.tensor([0, 1]), (1, 2, 2))
    with pytest.raises(DataError, match="image 1"):
        split.images([0, 1])


@pytest.mark.parametrize("threads", [None, 1])
def test_stream_order_whatever_the_threads(threads: int | None) -> None:
    split = StreamSplit(
        lambda i: torch.full((1, 1, 1), i, dtype=torch.uint8),
        torch.arange(200),
        (1, 1, 1),
        threads=threads,
    )
    order = torch.randperm(200)
    came = split.subset(order).images(slice(None)).flatten() * 255
    assert torch.equal(came.round().long(), order)


def test_container_memory_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    monkeypatch.setattr(
        splits, "Path", lambda *names: tmp_path / names[1] if len(names) == 2 else Path(*names)
    )
    assert splits.fits_in_memory(149)
    assert not splits.fits_in_memory(150)
    (tmp_path / "memory.max").write_text("max\n")
    assert splits.fits_in_memory(150)


def test_tensor_split_constructor_refuses() -> None:
    images = torch.zeros(2, 1, 2, 2)
    with pytest.raises(DataError, match="uint8 or float32"):
        TensorSplit(images.double(), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="one an image"):
        TensorSplit(images, torch.tensor([0]))
    with pytest.raises(DataError, match="scale 16"):
        TensorSplit(torch.full((2, 1, 2, 2), 17, dtype=torch.uint8), torch.tensor([0, 1]), 16)


# --- a user's arrays


@pytest.mark.parametrize(
    "x",
    [
        np.full((2, 1, 3, 3), 0.2),
        np.full((2, 1, 3, 3), 0.2, dtype=">f4"),
        np.full((2, 1, 3, 3), 0.2)[:, :, ::-1],
        np.full((2, 1, 3, 3), 51, np.uint8),
        torch.full((2, 1, 3, 3), 0.2, dtype=torch.float64, requires_grad=True),
        torch.full((2, 1, 3, 3), 0.2).tolist(),
    ],
    ids=["float64", "big-endian", "reversed", "uint8", "torch", "list"],
)
@pytest.mark.parametrize(
    "y", [[0, 1], np.array([0, 1], np.uint8), torch.tensor([0, 1], dtype=torch.int32)]
)
def test_tensor_split_takes(x: object, y: object) -> None:
    split = tensor_split(x, y, num_classes=2)
    images = split.images(slice(None))
    assert images.dtype == torch.float32
    assert not images.requires_grad
    assert torch.equal(images, torch.full((2, 1, 3, 3), 0.2))
    assert split.labels.tolist() == [0, 1]


def test_tensor_split_takes_read_only_arrays() -> None:
    x = np.zeros((1, 1, 2, 2), np.float32)
    x.flags.writeable = False
    assert len(tensor_split(x, [0])) == 1


def test_tensor_split_clips_rounding_alone() -> None:
    x = np.array([1 + 5e-7, -5e-7]).reshape(2, 1, 1, 1)
    assert tensor_split(x, [0, 1]).images(slice(None)).flatten().tolist() == [1, 0]


_OK = np.zeros((2, 1, 4, 4), np.float32)


def _with(value: float) -> np.ndarray:
    x = _OK.copy()
    x[1, 0, 2, 2] = value
    return x


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (_with(np.nan), [0, 1], "NaN or infinity in 1 of 2 images .* image 1"),
        (_with(np.inf), [0, 1], "NaN or infinity"),
        (_with(255), [0, 1], "got 0 to 255; divide by 255"),
        (_with(-2.1), [0, 1], "undo the normalisation"),
        (_with(1000), [0, 1], "scale them"),
        (_OK[:, 0], [0, 1], r"\(N, C, H, W\), got \(2, 4, 4\); add the channel axis"),
        (_OK[0, 0, 0], [0, 1], "reshape them"),
        (np.zeros((2, 8, 8, 3)), [0, 1], "channels last"),
        (_OK.astype(np.int64), [0, 1], "got torch.int64; convert values"),
        (_OK.astype(bool), [0, 1], "got torch.bool"),
        (_OK.astype(complex), [0, 1], "numeric images"),
        (np.array(["a"]), [0], "numeric images"),
        (None, [0], "numeric images, got NoneType"),
        ([[1.0], [1.0, 2.0]], [0], "ragged"),
        (_OK[:0], [], "at least one image"),
        (_OK[:, :, :0], [0, 1], "at least one image"),
        (_OK, [0], "2 images and 1 labels"),
        (_OK, [0.0, 1.0], "integer labels, got torch.float64"),
        (_OK, [True, False], "integer labels, got torch.bool"),
        (_OK, ["a", "b"], "numeric labels"),
        (_OK, [0, -1], "labels from 0, got -1"),
        (_OK, [0, 3], "from 0 to 2 for 3 classes, got 3"),
        (_OK, np.eye(2, dtype=int), "argmax"),
        (_OK, [], "at least one label"),
        (_OK, 0, r"got \(\)"),
    ],
)
def test_tensor_split_refuses(x: object, y: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tensor_split(x, y, num_classes=3)


def test_image_data_refuses_parts_that_do_not_fit() -> None:
    one = tensor_split(np.zeros((2, 1, 4, 4)), [0, 1])
    large = tensor_split(np.zeros((2, 1, 5, 5)), [0, 1])
    with pytest.raises(DataError, match="in validation"):
        ImageData("mine", one, large, one, ("a", "b"))
    with pytest.raises(DataError, match="validation part of 'mine' is empty"):
        ImageData("mine", one, one.subset([]), one, ("a", "b"))
    three = tensor_split(np.zeros((2, 1, 4, 4)), [0, 2])
    with pytest.raises(DataError, match="labels from 0 to 1 in the test part"):
        ImageData("mine", one, one, three, ("a", "b"))
    for names in (("a",), ("a", "a")):
        with pytest.raises(DataError, match="unique names"):
            ImageData("mine", one, one, one, names)


# --- augmentation


def _coded(n: int, height: int, width: int) -> torch.Tensor:
    """Images in which every pixel of every channel has its own value, none of them 0."""
    return torch.arange(1, n * 2 * height * width + 1, dtype=torch.float32).view(
        n, 2, height, width
    )


def test_crops_are_shifted_copies() -> None:
    images, pad = _coded(64, 6, 5), 2
    out = Augmentation(pad=pad)(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    shifts = []
    for i in range(64):
        found = [
            (r, c)
            for r in range(2 * pad + 1)
            for c in range(2 * pad + 1)
            if torch.equal(out[i], padded[i, :, r : r + 6, c : c + 5])
        ]
        assert len(found) == 1
        shifts += found
    # 64 draws of 25 shifts: every row and column shift comes up.
    assert {r for r, _ in shifts} == {c for _, c in shifts} == set(range(5))


def test_flips_are_mirrored_copies() -> None:
    images = _coded(200, 4, 5)
    out = Augmentation(flip=True)(images, torch.Generator().manual_seed(0))
    same = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 70 < int(mirrored.sum()) < 130


def test_crop_and_flip_together() -> None:
    images = _coded(100, 5, 5)
    out = Augmentation(pad=1, flip=True)(images, torch.Generator().manual_seed(0))
    kinds = set()
    for i in range(100):
        for flipped in (False, True):
            base = images[i].flip(-1) if flipped else images[i]
            padded = torch.nn.functional.pad(base, (1,) * 4)
            kinds |= {
                (i, flipped)
                for r in range(3)
                for c in range(3)
                if torch.equal(out[i], padded[:, r : r + 5, c : c + 5])
            }
    assert len(kinds) == 100
    assert {flipped for _, flipped in kinds} == {False, True}


def test_augmentation_follows_its_generator() -> None:
    images, change = _coded(8, 6, 6), Augmentation(pad=2, flip=True)
    first, second, other = (
        change(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    with pytest.raises(UsageError, match="pad >= 0"):
        Augmentation(pad=-1)


# --- factories

_FACTORIES = """
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from robustann.data import Augmentation, load_data, tensor_split

def pair(n, seed=0, size=6):
    x = np.random.default_rng(seed).random((n, 1, size, size), dtype=np.float32)
    return x, np.arange(n) % 2

def arrays():
    return {"train": pair(20), "test": pair(6, 1)}

def everything():
    return {"train": pair(20), "test": pair(6, 1), "validation": pair(4, 2),
            "class_names": np.array(["cat", "dog"]), "augmentation": Augmentation(pad=1)}

def whole():
    return load_data("digits")

class Pictures(Dataset):
    def __init__(self, n):
        self.n = n
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        return Image.new("RGB", (4, 3), (i, 2, 3)), i % 2

def datasets():
    x, y = pair(20)
    return {"train": TensorDataset(torch.from_numpy(x).double(), torch.from_numpy(y)),
            "test": TensorDataset(*map(torch.from_numpy, pair(6, 1)))}

def pictures():
    return {"train": Pictures(20), "test": Pictures(6)}

def raises():
    raise KeyError("no such file")

def wrong_type():
    return 3

def wrong_keys():
    return {"training": 1}

def wrong_values():
    x, y = pair(20)
    return {"train": (x * 255, y), "test": (x, y)}

def wrong_part():
    return {"train": pair(20), "test": 3}

def wrong_labels():
    return {"train": pair(20), "test": pair(6), "class_names": ["a"]}

def wrong_item():
    return {"train": [1, 2, 3], "test": pair(6)}

def wrong_augmentation():
    return {"train": pair(20), "test": pair(6), "augmentation": print}

not_callable = 3
"""


def test_factory_of_arrays(here: Path) -> None:
    (here / "mine.py").write_text(_FACTORIES)
    data = load_data("mine:arrays")
    assert (data.name, data.class_names) == ("mine:arrays", ("0", "1"))
    assert [len(split) for split in _parts(data).values()] == [18, 2, 6]
    full = load_data("mine:everything")
    assert [len(split) for split in _parts(full).values()] == [20, 4, 6]
    assert (full.class_names, full.augmentation) == (("cat", "dog"), Augmentation(pad=1))
    assert load_data("mine:whole").name == "digits"
    # The test part is the factory's, in its order.
    assert data.test.digest() == full.test.digest()


@pytest.mark.parametrize("free", [2**40, 0])
def test_factory_of_datasets(here: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    (here / "mine.py").write_text(_FACTORIES)
    monkeypatch.setattr(splits, "_free_memory", lambda device: free)
    arrays, datasets = load_data("mine:arrays"), load_data("mine:datasets")
    assert isinstance(datasets.train, TensorSplit if free else StreamSplit)
    for name, split in _parts(arrays).items():
        assert split.digest() == _parts(datasets)[name].digest()
    pictures = load_data("mine:pictures")
    assert pictures.shape == (3, 3, 4)
    values = pictures.test.images(slice(None))[:, :, 0, 0] * 255
    assert values.round().int().tolist() == [[i, 2, 3] for i in range(6)]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere:make", UsageError, "no module 'nowhere'"),
        ("mine.inner:make", UsageError, "no module 'mine.inner'"),
        ("mine:nothing", UsageError, "has no 'nothing'"),
        ("mine:not_callable", UsageError, "to be a function"),
        ("mine:raises", DataError, "raised KeyError: 'no such file'"),
        ("mine:wrong_type", DataError, "got int"),
        ("mine:wrong_keys", DataError, r"got keys \['training'\]"),
        ("mine:wrong_values", DataError, "the train part of 'mine:wrong_values': .* divide by 255"),
        ("mine:wrong_part", DataError, "the test part .* got int"),
        ("mine:wrong_labels", DataError, "from 0 to 0 for 1 classes"),
        ("mine:wrong_item", DataError, "item 0 to be .image, label."),
        ("mine:wrong_augmentation", DataError, "got builtin_function_or_method"),
        ("broken:make", DataError, "importing 'broken' .* SyntaxError"),
        ("needy:make", DataError, "importing 'needy' .* No module named 'absent_package'"),
    ],
)
def test_factory_refusals(here: Path, name: str, error: type[Exception], message: str) -> None:
    (here / "mine.py").write_text(_FACTORIES)
    (here / "broken.py").write_text("def make(:\n")
    (here / "needy.py").write_text("import absent_package\n")
    with pytest.raises(error, match=message) as caught:
        load_data(name)
    if "raises" in name or "needy" in name:
        assert caught.value.__cause__ is not None


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = textwrap.dedent(
        """
        import sys
        import robustann.data, robustann.metrics, robustann.models
        heavy = {"sklearn", "scipy", "torchvision", "captum", "art", "matplotlib", "PIL"}
        print(sorted(heavy & sys.modules.keys()))
        """
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def _test_alone(kind: str, folder: Path) -> str:
    """Six images that are a test part, and nothing else, as ``--data`` takes them."""
    if kind in ("test", "val", "test and val"):
        for part in kind.split(" and "):
            _write_images(folder / part / "a", 3, 0)
            _write_images(folder / part / "b", 3, 1)
        return f"imagefolder:{folder}"
    if kind == "npz":
        images = np.random.default_rng(0).integers(0, 255, (6, 3, 8, 8), dtype=np.uint8)
        np.savez(folder / "t.npz", test_images=images, test_labels=np.arange(6) % 2)
        return f"npz:{folder / 't.npz'}"
    _write_images(folder / "a", 6, 0)
    names = sorted(path.name for path in (folder / "a").iterdir())
    lines = [f"a/{name},{'xy'[place % 2]},test" for place, name in enumerate(names)]
    (folder / "t.csv").write_text("\n".join(["path,label,split", *lines]))
    return f"csv:{folder / 't.csv'}"


@pytest.mark.parametrize("kind", ["test", "val", "test and val", "npz", "csv"])
def test_a_test_part_alone_is_audited_whole_and_nothing_is_trained_on_it(
    kind: str, tmp_path: Path
) -> None:
    data = load_data(_test_alone(kind, tmp_path))
    assert data.test_part == "all"
    assert len(data.test) == 6
    assert torch.bincount(data.test.labels).tolist() == [3, 3]
    assert data.to("cpu").test_part == "all"
    with pytest.raises(DataError, match="a test part alone"):
        ra.train("small-cnn", data, epochs=1)
    threat = ra.ThreatModel("linf", 0.1)
    for defenses in (["trades"], ["feature-squeezing"]):
        with pytest.raises(DataError, match="a test part alone"):
            ra.harden(torch.nn.Flatten(), data, threat, defenses)


def test_a_cut_test_part_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_images(tmp_path / "a", 6, 0)
    _write_images(tmp_path / "b", 4, 1)
    assert load_data(f"imagefolder:{tmp_path}").test_part == "cut"
    read_data(f"imagefolder:{tmp_path}", None, False, None, False)
    assert "2 of its 10 images were set aside" in capsys.readouterr().err
    read_data(f"imagefolder:{tmp_path}", None, False, None, True)
    read_data("digits", None, False, None, False)
    assert not capsys.readouterr().err
