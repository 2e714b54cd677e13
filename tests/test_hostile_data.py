"""Data that would run something, open what is elsewhere, or take all time and memory."""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import robustann as ra
from robustann.errors import DataError, RobustannError

HUGE = 10**12


@pytest.fixture
def folder(tmp_path):
    """Twelve images in two folders, and a manifest of them."""
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            path = tmp_path / "images" / name / f"{number}.png"
            Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(path)
    return tmp_path / "images"


def manifest(folder: Path, *lines: str) -> str:
    every = [f"{path.relative_to(folder)},{path.parent.name}" for path in folder.glob("*/*.png")]
    (folder / "list.csv").write_text("\n".join(["path,label", *every, *lines]))
    return f"csv:{folder / 'list.csv'}"


def arrays(path: Path, **more: object) -> str:
    given = {"images": np.zeros((20, 1, 2, 2), np.uint8), "labels": np.arange(20) % 2, **more}
    np.savez(path, **given)
    return f"npz:{path}"


# --- images


def test_postscript_called_png_reaches_no_program(folder, tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, told by the content."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path / 'canary'}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    evil = folder / "ant" / "z.png"
    evil.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with Image.open(evil) as opened, contextlib.suppress(Exception):
        opened.load()
    assert (tmp_path / "canary").exists()
    (tmp_path / "canary").unlink()
    for spec in (f"imagefolder:{folder}", manifest(folder)):
        with pytest.raises(DataError, match="none of BMP"):
            ra.load_data(spec)
    assert not (tmp_path / "canary").exists()


def test_what_is_no_file_is_not_waited_for(folder):
    os.mkfifo(folder / "ant" / "z.png")
    for spec in (f"imagefolder:{folder}", manifest(folder)):
        with pytest.raises(DataError, match=r"it is a pipe|no image"):
            ra.load_data(spec)
    (folder / "ant" / "z.png").unlink()
    (folder / "ant" / "z.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="a device"):
        ra.load_data(f"imagefolder:{folder}")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_too_many_pixels_is_not_decoded(folder):
    # A header alone: nothing behind it is ever asked.
    (folder / "ant" / "z.ppm").write_bytes(b"P6 12000 12000 255\n")
    with pytest.raises(DataError, match="12000x12000 pixels"):
        ra.load_data(f"imagefolder:{folder}")


def test_names_of_classes_from_a_folder_do_not_steer_the_terminal(folder, capsys, monkeypatch):
    import sys

    from robustann.cli import main

    (folder / "\x1b[2Jevil").mkdir()
    monkeypatch.setattr(sys, "argv", ["robustann", "train", "--data", f"imagefolder:{folder}"])
    monkeypatch.chdir(folder)
    assert main._run() == 3
    told = capsys.readouterr().err
    assert "evil" in told
    assert "\x1b" not in told


# --- labels


@pytest.mark.parametrize("label", [100_000, HUGE])
def test_labels_that_count_no_classes_are_told(tmp_path, folder, label):
    labels = np.r_[np.arange(10), np.full(10, label)]
    with pytest.raises(DataError, match="without gaps"):
        ra.load_data(arrays(tmp_path / "a.npz", labels=labels))
    with pytest.raises(DataError, match="without gaps"):
        ra.from_arrays(torch.zeros(20, 1, 2, 2), torch.from_numpy(labels))
    (folder / "list.csv").write_text(f"path,label\nant/0.png,0\nbee/0.png,{label}\n")
    with pytest.raises(DataError, match="without gaps"):
        ra.load_data(f"csv:{folder / 'list.csv'}")


# --- .npz


def test_arrays_named_twice_are_refused(tmp_path):
    spec = arrays(tmp_path / "a.npz")
    stream = io.BytesIO()
    np.save(stream, np.zeros(20, int))
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("labels.npy", stream.getvalue())
    with pytest.raises(DataError, match="expected the arrays"):
        ra.load_data(spec)


def test_arrays_that_unpack_to_more_than_there_is_memory_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", bytes(1000))
    content = (tmp_path / "a.npz").read_bytes()
    # Both headers claim four gigabytes.
    claimed = content.replace((1000).to_bytes(4, "little"), (2**32 - 2).to_bytes(4, "little"))
    (tmp_path / "a.npz").write_bytes(claimed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustann.data.splits._free_memory", lambda device: 2**32)
        with pytest.raises(DataError, match="fit into memory"):
            ra.load_data(f"npz:{tmp_path / 'a.npz'}")


# --- CSV


@pytest.mark.parametrize(
    "line",
    [
        "ant/0.png," + "9" * 5000,
        "a/" * 3000 + "0.png,ant",
        "a" * 200_000 + ",ant",
        "ant/0.png\0,ant",
        "loop/0.png,ant",
        "ant,ant",
        "https://example.org/a.png,ant",
        "file:///etc/passwd,ant",
        "~/secret.png,ant",
        "\\\\server\\share\\a.png,ant",
        '"ant/0.png,ant',
        ",",
    ],
)
def test_a_line_of_a_manifest_that_is_unfit_is_told(folder, line):
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "list.csv").write_text(f"path,label\n{line}\nbee/0.png,1\n")
    with pytest.raises(DataError) as caught:
        ra.load_data(f"csv:{folder / 'list.csv'}")
    assert len(str(caught.value)) < 1000


# --- Hugging Face datasets


def test_a_column_of_labels_is_not_decoded(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    secret = tmp_path / "elsewhere.png"
    secret.write_bytes(stream.getvalue())
    held = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = {
        "image": [{"bytes": stream.getvalue(), "path": None}] * 6,
        "label": [{"bytes": None, "path": str(secret)}] * 6,
    }
    features = datasets.Features({"image": held, "label": held})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    info = tmp_path / "saved" / "dataset_info.json"
    told = json.loads(info.read_text())
    told["features"] = {"image": {"_type": "Image"}, "label": {"_type": "Image"}}
    info.write_text(json.dumps(told))
    with pytest.raises(DataError, match="class labels or whole numbers"):
        ra.load_data(f"datasets:{tmp_path / 'saved'}")


def test_labels_beyond_the_names_of_a_dataset_are_not_counted(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [Image.new("RGB", (8, 8))] * 12, "label": [0, 1] * 5 + [HUGE] * 2}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    info = tmp_path / "saved" / "dataset_info.json"
    told = json.loads(info.read_text())
    told["features"]["label"] = {"_type": "ClassLabel", "names": ["a", "b"]}
    info.write_text(json.dumps(told))
    with pytest.raises(DataError, match="labels from 0"):
        ra.load_data(f"datasets:{tmp_path / 'saved'}")


# --- noise

FUZZ = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def _survives(spec: str) -> None:
    # Another error would be a traceback.
    with contextlib.suppress(RobustannError):
        ra.load_data(spec)


@FUZZ
@given(data=st.data())
def test_a_changed_archive_of_arrays(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "noise.npz"
    spec = arrays(path, class_names=np.array(["a", "b"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(bytes(content))
    _survives(spec)


@FUZZ
@given(text=st.text(alphabet=st.sampled_from('pathlbe,"\n\r\t0123./\\\0é\ufeff:'), max_size=80))
def test_any_manifest(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "noise.csv"
    path.write_text(f"path,label\n{text}", encoding="utf-8", newline="")
    _survives(f"csv:{path}")


@FUZZ
@given(data=st.data())
def test_changed_images(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "noise"
    stream = io.BytesIO()
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "PPM", "WEBP"]))
    Image.linear_gradient("L").resize((8, 8)).save(stream, kind)
    content = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(3):
            (folder / name / f"{number}.png").write_bytes(content)
    with warnings.catch_warnings():
        # Of Pillow, about strange metadata and bombs.
        warnings.simplefilter("ignore")
        _survives(f"imagefolder:{folder}")
