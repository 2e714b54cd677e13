"""Data in files of other forms, and classes that do not match; what looks wrong and what to try."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import robustann as ra
from robustann.auditing.sanity import advise
from robustann.data import in_order_of, renumbering

NAMES = ("ant", "bee", "cow")


def arrays(seed: int = 0, count: int = 30):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    return images, np.arange(count) % 3


def write_images(folder: Path, count: int = 30) -> list[tuple[str, str]]:
    """PNG files; their paths and labels."""
    images, labels = arrays(count=count)
    listed = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = f"pictures/{number:02}.png"
        (folder / "pictures").mkdir(exist_ok=True, parents=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / name)
        listed.append((name, NAMES[label]))
    return listed


def manifest(path: Path, rows: list, head: tuple = ("path", "label")) -> str:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([head, *rows])
    return f"csv:{path}"


# .npz


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("train_images", "y_train")])
def test_npz_of_one_part_is_cut_in_three(tmp_path, keys):
    images, labels = arrays()
    np.savez(tmp_path / "a.npz", **dict(zip(keys, (images, labels), strict=True)))
    data = ra.load_data(f"npz:{tmp_path / 'a.npz'}")
    parts = (data.train, data.validation, data.test)
    assert sum(map(len, parts)) == 30
    assert data.class_names == ("0", "1", "2")
    found = {bytes((part.images([i]) * 255).byte().numpy()): int(part.labels[i])
             for part in parts for i in range(len(part))}  # fmt: skip
    assert found == {bytes(image): label for image, label in zip(images, labels, strict=True)}


def test_npz_with_parts_and_names(tmp_path):
    (a, b), (c, d) = arrays(0), arrays(1, 12)
    np.savez(tmp_path / "a.npz", x_train=a, y_train=b, x_test=c / 255, y_test=d,
             class_names=np.array(NAMES))  # fmt: skip
    data = ra.load_data(f"npz:{tmp_path / 'a.npz'}")
    assert data.class_names == NAMES
    assert len(data.train) + len(data.validation) == 30
    np.testing.assert_allclose(data.test.images(slice(None)), c / 255, atol=1e-7)
    assert data.test.labels.tolist() == d.tolist()


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("canary"),))


def test_npz_never_unpickles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, _ = arrays()
    np.savez("a.npz", images=images, labels=np.array([Payload()] * 30, dtype=object))
    with pytest.raises(ra.DataError, match="never read"):
        ra.load_data("npz:a.npz")
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"pictures": np.zeros((3, 1, 2, 2)), "labels": np.arange(3)}, "images and labels"),
        ({"images": np.zeros((3, 1, 2, 2))}, "images and labels"),
        ({"images": np.zeros((3, 1, 2, 2)), "x": np.zeros(3), "labels": np.arange(3)}, "name them"),
        ({"images": np.full((3, 1, 2, 2), 2.0), "labels": np.arange(3)}, "divide by 255"),
        ({"images": np.zeros((3, 8, 8, 3)), "labels": np.arange(3)}, "channels last"),
        ({"images": np.zeros((3, 1, 2, 2)), "labels": np.arange(2)}, "one label per image"),
    ],
)
def test_npz_that_is_unfit_is_told(tmp_path, content, says):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ra.DataError, match=says):
        ra.load_data(f"npz:{tmp_path / 'a.npz'}")


def test_npz_that_is_none(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 but no more")
    with pytest.raises(ra.DataError, match="copy it again"):
        ra.load_data(f"npz:{tmp_path / 'a.npz'}")
    with pytest.raises(ra.UsageError, match="no file"):
        ra.load_data("npz:nowhere")


# CSV


def test_a_manifest_with_splits(tmp_path):
    rows = [(path, label, "test" if i % 5 == 0 else "train")
            for i, (path, label) in enumerate(write_images(tmp_path))]  # fmt: skip
    data = ra.load_data(manifest(tmp_path / "list.csv", rows, ("path", "label", "split")))
    assert data.class_names == NAMES
    images, labels = arrays()
    torch.testing.assert_close(
        data.test.images(slice(None)), torch.from_numpy(images[::5] / 255).float()
    )
    assert data.test.labels.tolist() == labels[::5].tolist()


def test_a_manifest_of_numbers_and_of_resized_images(tmp_path):
    rows = [(path, NAMES.index(label)) for path, label in write_images(tmp_path)]
    data = ra.load_data(manifest(tmp_path / "list.csv", rows), image_size=4)
    assert data.class_names == ("0", "1", "2")
    assert data.shape == (3, 4, 4)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "C:\\secret.png", "link.png"])
def test_a_manifest_stays_in_its_folder(tmp_path, path):
    folder = tmp_path / "here"
    rows = write_images(folder)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ra.DataError, match="inside the folder"):
        ra.load_data(manifest(folder / "list.csv", [*rows, (path, "ant")]))


def test_a_manifest_that_is_unfit_is_told(tmp_path):
    rows = write_images(tmp_path)
    with pytest.raises(ra.DataError, match="columns path and label"):
        ra.load_data(manifest(tmp_path / "a.csv", rows, ("file", "label")))
    with pytest.raises(ra.DataError, match=r"a path, a label .* in line 32 of"):
        ra.load_data(manifest(tmp_path / "a.csv", [*rows, ("pictures/00.png", "")]))
    with pytest.raises(ra.DataError, match="no image"):
        ra.load_data(manifest(tmp_path / "a.csv", [*rows, ("pictures/99.png", "ant")]))
    with pytest.raises(ra.DataError, match="two classes"):
        ra.load_data(manifest(tmp_path / "a.csv", [row for row in rows if row[1] == "ant"]))
    with pytest.raises(ra.UsageError, match="no file"):
        ra.load_data("csv:nowhere.csv")


# Hugging Face datasets


@pytest.fixture
def disk(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
    datasets.disable_progress_bars()

    def save(count: int = 30, labels=None, **columns):
        images, numbers = arrays(count=count)
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))}
        )
        rows = {
            "image": [Image.fromarray(one.transpose(1, 2, 0)) for one in images],
            "label": numbers.tolist() if labels is None else labels,
        }
        return datasets.Dataset.from_dict(rows, features=features)

    return datasets, save, tmp_path / "saved"


def test_a_dataset_on_disk(disk):
    datasets, make, folder = disk
    datasets.DatasetDict({"train": make(), "test": make(12)}).save_to_disk(str(folder))
    data = ra.load_data(f"datasets:{folder}")
    assert data.class_names == NAMES
    images, labels = arrays(count=12)
    torch.testing.assert_close(
        data.test.images(slice(None)), torch.from_numpy(images / 255).float()
    )
    assert data.test.labels.tolist() == labels.tolist()


def test_a_dataset_on_disk_that_is_unfit_is_told(disk, tmp_path):
    _, make, folder = disk
    make(labels=[-1] * 30).save_to_disk(str(folder))
    with pytest.raises(ra.DataError, match="without a label"):
        ra.load_data(f"datasets:{folder}")
    make().remove_columns("image").save_to_disk(str(tmp_path / "b"))
    with pytest.raises(ra.DataError, match="one column of images"):
        ra.load_data(f"datasets:{tmp_path / 'b'}")
    (tmp_path / "c").mkdir()
    with pytest.raises(ra.DataError, match="save_to_disk"):
        ra.load_data(f"datasets:{tmp_path / 'c'}")


def test_a_dataset_on_disk_opens_no_other_files(disk, tmp_path):
    datasets, _, folder = disk
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere.png")
    rows = {
        "image": [{"bytes": None, "path": str(tmp_path / "elsewhere.png")}] * 6,
        "label": [0, 1, 2] * 2,
    }
    storage = datasets.Features({
        "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "label": datasets.ClassLabel(names=list(NAMES)),
    })  # fmt: skip
    datasets.Dataset.from_dict(rows, features=storage).save_to_disk(str(folder))
    # As somebody would who wants our files read: the type is changed on the disk.
    info = folder / "dataset_info.json"
    told = json.loads(info.read_text())
    told["features"]["image"] = {"_type": "Image"}
    info.write_text(json.dumps(told))
    with pytest.raises(ra.DataError, match="elsewhere"):
        ra.load_data(f"datasets:{folder}")


# Classes of model and data


def test_another_order_is_renumbered_by_name():
    images, labels = arrays()
    data = ra.from_arrays(images, labels, class_names=NAMES)
    matched, told = in_order_of(data, ["Cow", "ant", "BEE"])
    assert matched.class_names == ("Cow", "ant", "BEE")
    for part in ("train", "validation", "test"):
        before, after = getattr(data, part), getattr(matched, part)
        assert [NAMES[i] for i in before.labels] == [
            matched.class_names[i].lower() for i in after.labels
        ]
        assert before.images(slice(None)).equal(after.images(slice(None)))
    assert "another order" in told[0]


def test_the_same_order_says_nothing():
    images, labels = arrays()
    data = ra.from_arrays(images, labels, class_names=NAMES)
    matched, told = in_order_of(data, NAMES)
    assert told == ()
    assert matched.test.labels.equal(data.test.labels)


def test_some_of_the_models_classes_are_enough():
    numbers, names, told = renumbering(["dog", "ant"], ["ant", "bee", "cow", "dog"])
    assert numbers.tolist() == [3, 0]
    assert len(names) == 4
    assert "2 of the model's 4" in told


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (["ant", "dog"], ["ant", "bee"], r"does not know 1 \(dog\).*--class-names ant,dog"),
        (["ant", "bee", "cow"], ["ant", "bee"], "does not know 1"),
        (["0", "1", "2"], ["ant", "bee"], "got 2 outputs"),
        (["ant", "bee", "cow"], ["LABEL_0", "LABEL_1"], "got 2 outputs"),
    ],
)
def test_other_classes_are_an_error_that_says_how(ours, theirs, says):
    with pytest.raises(ra.DataError, match=says):
        renumbering(ours, theirs)


def test_numbers_are_no_names():
    assert renumbering(["ant", "bee"], ["LABEL_0", "LABEL_1"]) == (None, ("ant", "bee"), "")
    assert renumbering(["0", "1"], ["ant", "bee"]) == (None, ("ant", "bee"), "")


# What looks wrong


def classifier(net, mean=(0.0,), std=(1.0,)):
    from robustann.models import ModelSpec
    from robustann.models.foreign import ForeignClassifier

    spec = ModelSpec(arch="x", class_names=NAMES, shape=(3, 8, 8), mean=mean * (3 // len(mean)),
                     std=std * (3 // len(std)))  # fmt: skip
    return ForeignClassifier(net, spec).eval()


class Brightness(nn.Module):
    """Three classes by the mean of normalised images, -0.8, 0 and 0.8, again each 2.4."""

    def forward(self, x):
        level = x.flatten(1).mean(1, keepdim=True)
        return torch.cos((level - torch.tensor([-0.8, 0.0, 0.8])) * 2 * torch.pi / 2.4) * 10


def shades(count: int = 90):
    """Dark, middle and bright images: the right answers where [-1, 1] is what the network takes."""
    labels = torch.arange(count) % 3
    base = torch.tensor([0.1, 0.5, 0.9])[labels].view(-1, 1, 1, 1)
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 20
    return ra.tensor_split(base + noise, labels)


def test_nothing_wrong_says_nothing():
    split = shades()
    assert advise(classifier(Brightness(), (0.5,), (0.5,)), split, torch.arange(90)) == ()


def test_a_forgotten_normalisation_is_found():
    split = shades()
    texts = advise(classifier(Brightness()), split, torch.arange(90))
    assert any("--bounds=-1,1" in text and "100.0 %" in text for text in texts)


def test_a_wrong_normalisation_is_found():
    split = shades()
    net = classifier(Brightness(), (0.9,), (0.1,))
    texts = advise(net, split, torch.arange(90))
    assert any("--bounds=-1,1" in text and "100.0 %" in text for text in texts)


def test_normalising_twice_is_found():
    from robustann.models.classifier import Normalize

    net = nn.Sequential(Normalize((0.5,) * 3, (0.5,) * 3), Brightness())
    split = shades()
    assert advise(classifier(net), split, torch.arange(90)) == ()
    texts = advise(classifier(net, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), split,
                   torch.arange(90))  # fmt: skip
    assert any("twice" in text and "--mean 0 --std 1" in text for text in texts)


def test_a_model_that_guesses_is_told():
    split = shades()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    nn.init.zeros_(net[1].weight)
    texts = advise(net, split, torch.arange(90))
    assert "no better than guessing among 3 classes on 90 images" in texts[0]


def test_few_images_that_are_all_right_are_no_guess():
    net = classifier(Brightness(), (0.5,), (0.5,))
    assert advise(net, shades(), torch.arange(1)) == ()


class Checked(Brightness):
    def forward(self, x):
        if x.min() < 0 or x.max() > 1:
            raise ValueError("no image")
        return super().forward(x)


def test_a_model_that_refuses_what_is_tried_is_none_the_worse():
    texts = advise(Checked(), shades(), torch.arange(90))
    assert not any("it was probably trained so" in text for text in texts)


def test_classes_in_another_order_are_found():
    split = shades()
    turned = split.relabelled((split.labels + 1) % 3)
    texts = advise(classifier(Brightness(), (0.5,), (0.5,)), turned, torch.arange(90))
    assert any("another order" in text and "100.0 %" in text for text in texts)


def test_images_divided_twice_and_images_out_of_range():
    split = shades()
    dark = ra.tensor_split(split.images(slice(None)) / 255, split.labels)
    assert any("divided by 255 twice" in text
               for text in advise(Brightness(), dark, torch.arange(90)))  # fmt: skip
    from robustann.data import StreamSplit

    wild = StreamSplit(lambda i: split.images([i])[0] * 4 - 2, split.labels, (3, 8, 8), threads=1)
    assert any("leave [0, 1]" in text for text in advise(Brightness(), wild, torch.arange(90)))
