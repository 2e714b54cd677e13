"""Folders of timm and transformers, and ONNX files, that lead out, overflow or are nonsense."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
from pathlib import Path

import formats
import pytest
from safetensors.torch import save_file

import robustann as ra
from robustann.errors import ModelError, RefusedError, RobustannError
from robustann.models.request import ModelRequest
from robustann.models.resolve import resolve_model

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")

LAYERS = 10**9


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    formats.image_folder(folder / "images")
    formats.save_transformers(folder / "vit")
    formats.save_timm(folder / "timm")
    save_timm_wrapper(folder / "wrapper")
    return folder


def save_timm_wrapper(folder: Path) -> None:
    """As transformers lays out a network of timm."""
    net = timm.create_model("resnet10t", pretrained=False, num_classes=3)
    folder.mkdir()
    save_file({f"timm_model.{k}": v for k, v in net.state_dict().items()},
              folder / "model.safetensors")  # fmt: skip
    config = {"model_type": "timm_wrapper", "architecture": "resnet10t", "num_classes": 3,
              "label_names": ["blue", "green", "red"], "do_pooling": True, "pretrained_cfg":
              {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32]}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def open_changed(source, tmp_path, monkeypatch):
    """Open a copy of a folder, one of its files changed; nothing may ask the network."""

    def connect(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)

    def call(kind: str, file: str = "config.json", raw: str | None = None, **changes):
        name = {"hf": "vit", "timm": "timm", "wrapper": "wrapper"}[kind]
        shutil.copytree(source / name, tmp_path / name)
        path = tmp_path / name / file
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**values, **changes}) if raw is None else raw)
        prefix = "timm" if kind == "timm" else "hf"
        data = []

        def images(size):
            data.append(ra.load_data(f"imagefolder:{source / 'images'}", usual_size=size))
            return data[0]

        return resolve_model(ModelRequest(model=f"{prefix}:{tmp_path / name}"), images)

    return call


@pytest.mark.parametrize("kind", ["hf", "timm", "wrapper"])
def test_the_folders_are_good_before_they_are_changed(open_changed, kind):
    assert open_changed(kind).model.spec.num_classes == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModel": "evil.Net"}},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"vision_config": {"deeper": [{"attn_implementation": {"": "evil/kernel"}}]}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"use_pretrained_backbone": True, "backbone": "resnet50"},
        {"transformers_weights": "../other.safetensors"},
        {"use_kernels": True},
    ],
)
def test_a_folder_of_transformers_that_leads_out_is_refused(open_changed, changes):
    with pytest.raises(RefusedError, match="not in its folder"):
        open_changed("hf", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "local-dir:/tmp/evil"},
        {"architecture": "hf-hub:evil/net"},
        {"architecture": ["resnet10t"]},
        {"model_args": {"checkpoint_path": "/tmp/evil.pth"}},
        {"model_args": "checkpoint"},
    ],
)
def test_timm_in_a_folder_of_transformers_stays_in_it(open_changed, changes):
    with pytest.raises((RefusedError, ModelError), match=r"timm|model_args"):
        open_changed("wrapper", **changes)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("hf", {"num_hidden_layers": LAYERS}),
        ("hf", {"hidden_size": 2**30}),
        ("hf", {"image_size": 10**6}),
        ("hf", {"num_labels": 10**12}),
        ("timm", {"num_classes": 10**12}),
        ("timm", {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": LAYERS}}),
        ("timm", {"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 3 * 2**20}}),
        ("timm", {"architecture": "resnet18", "model_args": {"layers": [LAYERS] * 4}}),
        ("wrapper", {"model_args": {"layers": [LAYERS] * 4}}),
    ],
)
def test_a_configuration_cannot_ask_for_more_than_its_weights(open_changed, kind, changes):
    with pytest.raises(ModelError):
        open_changed(kind, **changes)


@pytest.mark.parametrize("side", [0, -1, 10**9, 1e300, "32", [32], [1, 2, 3], None, True, {}])
@pytest.mark.parametrize(
    ("kind", "file", "change"),
    [
        ("hf", "config.json", lambda side: {"image_size": side}),
        ("hf", "preprocessor_config.json", lambda side: {"size": side, "crop_size": side}),
        ("timm", "config.json", lambda side: {
            "pretrained_cfg": {"input_size": [3, side, side], "mean": side, "std": [side] * 3}}),
    ],
)  # fmt: skip
def test_nonsense_for_a_size_is_told_or_left_alone(open_changed, kind, file, change, side):
    # Another error would be a traceback.
    with contextlib.suppress(RobustannError):
        resolved = open_changed(kind, file, **change(side))
        assert max(resolved.model.spec.shape) <= 2048


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": []},
        {"model_type": {"a": 1}},
        {"id2label": []},
        {"id2label": {"0": ["a"], "1": None, "x": 3}},
        {"id2label": {}},
        {"num_channels": "three"},
        {"patch_size": 0},
        {"hidden_act": "__import__"},
        {"layer_norm_eps": "x"},
        {"dtype": "os"},
    ],
)
def test_nonsense_in_a_configuration_is_told(open_changed, changes):
    with contextlib.suppress(RobustannError):
        open_changed("hf", **changes)


@pytest.mark.parametrize("raw", ["", "[]", "{", '{"a":1', "[" * 50_000, '{"a":' * 50_000, "NaN"])
@pytest.mark.parametrize("kind", ["hf", "timm"])
def test_a_damaged_configuration_is_told(open_changed, kind, raw):
    with pytest.raises(ModelError):
        open_changed(kind, raw=raw)


@pytest.mark.parametrize(
    "listed", [[], {"a": []}, {"a": {"b": 1}}, {"a": "../model.safetensors"}, {"a": "x.bin"}, {}]
)
def test_an_index_of_shards_names_files_beside_it(source, tmp_path, listed):
    shutil.copytree(source / "vit", tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = tmp_path / "vit" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    with pytest.raises((RefusedError, ModelError)):
        resolve_model(ModelRequest(model=f"hf:{tmp_path / 'vit'}"), lambda size: None)


def test_a_pin_holds_for_the_bytes_that_are_loaded(source, tmp_path, model_file, monkeypatch):
    """Our own files too: they are read once, and exchanged right after."""
    copy = tmp_path / "m.safetensors"
    shutil.copy(model_file, copy)
    shutil.copy(model_file.with_suffix(".json"), copy.with_suffix(".json"))
    pin = hashlib.sha256(copy.read_bytes()).hexdigest()
    reads = []
    from robustann.models import sniffing

    original = sniffing.read_once

    def once(path, **options):
        reads.append(Path(path).name)
        return original(path, **options)

    for module in ("weights", "resolve"):
        monkeypatch.setattr(f"robustann.models.{module}.read_once", once)
    digits = ra.load_data("digits")
    resolve_model(ModelRequest(model=str(copy), model_sha256=pin), lambda size: digits)
    assert reads == ["m.safetensors"]
    with pytest.raises(RefusedError, match="pinned"):
        resolve_model(ModelRequest(model=str(copy), model_sha256="0" * 64), lambda size: digits)


def test_a_switched_off_loader_is_refused_for_every_format(source, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for model in (f"hf:{source / 'vit'}", f"timm:{source / 'timm'}"):
        with pytest.raises(RefusedError, match="unset"):
            resolve_model(ModelRequest(model=model), lambda size: None)
