"""Networks in every format, audited from the command line: the same answers from all of them."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import formats
import numpy as np
import pytest
import torch
from torch import nn

import robustann as ra
from robustann.cli import main
from robustann.models import tensor_digest
from robustann.models.request import ModelRequest
from robustann.models.resolve import resolve_model

NAMES = ("--class-names", ",".join(formats.NAMES))
IMAGENET = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
RESNET = ("--arch", "torchvision:resnet18")
SHORT = ("--no-explain", "--no-curve", "--no-trust", "--attack", "pgd:steps=2,loss=margin")


def needs(*modules: str):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


TIMM, HF = needs("timm"), needs("transformers")
ONNX = needs("onnx", "onnxruntime", "onnx2torch")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("formats")
    formats.image_folder(path / "images")
    return path


@pytest.fixture(scope="session")
def net():
    return formats.resnet()


@pytest.fixture(scope="session")
def resnet(folder, net):
    formats.save_resnet(net, folder / "resnet")
    return folder / "resnet"


@pytest.fixture(scope="session")
def onnx_file(folder, net):
    formats.save_onnx(net, folder / "onnx" / "net.onnx")
    return folder / "onnx" / "net.onnx"


@pytest.fixture(scope="session")
def timm_folder(folder):
    return formats.save_timm(folder / "timm")


@pytest.fixture(scope="session")
def hf_folder(folder):
    return formats.save_transformers(folder / "vit")


@pytest.fixture
def data(folder):
    return ra.load_data(f"imagefolder:{folder / 'images'}")


@pytest.fixture
def audit(folder, monkeypatch, capsys, tmp_path):
    """Audit by one command: (exit code, results or None, predictions, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        line = ["robustann", "audit", "--data", f"imagefolder:{folder / 'images'}", "--device",
                "cpu", "--preset", "quick", "--max-samples", "12", "--eps", "2/255",
                "--output-dir", "out", *map(str, arguments)]  # fmt: skip
        monkeypatch.setattr(sys, "argv", line)
        code = main._run()
        if code:
            return code, None, None, capsys.readouterr().err
        with open("out/samples.csv", newline="") as stream:
            rows = list(csv.DictReader(stream))
        results = json.loads(Path("out/results.json").read_text())
        return code, results, rows, capsys.readouterr().err

    return call


def request(path, **more):
    return ModelRequest(model=str(path), class_names=formats.NAMES, **more)


# The same model in every format


COMMANDS = {
    "pt": ("resnet", "net.pt", (*RESNET, *NAMES, *IMAGENET)),
    "safetensors": ("resnet", "net.safetensors", (*RESNET, *NAMES, *IMAGENET)),
    "torchscript": ("resnet", "net.ts", ("--allow-code-execution", *NAMES, *IMAGENET)),
    "pt2": ("resnet", "net.pt2", ("--allow-code-execution", *NAMES, *IMAGENET)),
}


def clean_accuracy(folder) -> float:
    """What a model that knows the colours gets right of the audited images."""
    from robustann.auditing import chosen_samples

    data = ra.load_data(f"imagefolder:{folder / 'images'}").test
    chosen = chosen_samples(len(data), 12)
    brightest = data.images(chosen).mean((2, 3)).argmax(1)
    # Red is the first channel and the last name.
    return float((2 - brightest == data.labels[chosen]).double().mean())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_resnet_is_audited_by_one_command(audit, folder, resnet, name):
    _, file, options = COMMANDS[name]
    code, results, _, told = audit("--model", resnet / file, *options, *SHORT)
    assert code == 0
    expected = clean_accuracy(folder)
    assert results["clean"]["accuracy"] == pytest.approx(expected)
    assert 1 / 3 < expected < 1
    assert "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225" in told
    assert "from --mean and --std" in told
    assert results["attacks"][-1]["backwards"] > 0
    ran = results["provenance"]["config"].get("code", [])
    assert len(ran) == (name in ("torchscript", "pt2"))
    assert ("ran code: " in Path("out/report.html").read_text()) == bool(ran)


@ONNX
def test_onnx_is_audited_by_one_command(audit, folder, onnx_file):
    code, results, _, told = audit("--model", onnx_file, *NAMES, *IMAGENET, *SHORT)
    assert code == 0
    assert results["clean"]["accuracy"] == pytest.approx(clean_accuracy(folder))
    assert "converted by onnx2torch, which agrees with onnxruntime on 16 images" in told
    assert results["attacks"][-1]["backwards"] > 0


@TIMM
def test_a_timm_folder_is_audited_by_one_command(audit, folder, timm_folder):
    code, results, _, told = audit("--model", f"timm:{timm_folder}", *SHORT)
    assert code == 0
    assert results["clean"]["accuracy"] == pytest.approx(clean_accuracy(folder))
    assert "mean 0.485, 0.456, 0.406" in told
    assert "from config.json in timm" in told


@TIMM
def test_timm_weights_are_audited_by_one_command(audit, folder, timm_folder):
    code, results, _, told = audit(
        *("--model", timm_folder / "model.safetensors", "--arch", "timm:resnet10t"),
        *(*NAMES, "--input-size", "32", *SHORT),
    )
    assert code == 0
    assert results["clean"]["accuracy"] == pytest.approx(clean_accuracy(folder))
    assert "from timm's configuration of resnet10t" in told


@HF
def test_a_transformers_folder_is_audited_by_one_command(audit, folder, hf_folder):
    code, results, _, told = audit("--model", f"hf:{hf_folder}", *SHORT)
    assert code == 0
    assert results["clean"]["accuracy"] == pytest.approx(clean_accuracy(folder))
    assert "mean 0.5, std 0.5" in told
    assert "from preprocessor_config.json in vit" in told
    # Its classes are red, blue, green.
    assert "another order" in told


def test_every_format_gives_the_same_logits(net, resnet, data):
    x = data.test.images(slice(0, 6))
    with torch.no_grad():
        expected = net.eval()(formats.normalized(x * 255, formats.MEAN, formats.STD))
    for file in ("net.pt", "net.safetensors", "net.ts", "net.pt2"):
        arch = "torchvision:resnet18" if file in ("net.pt", "net.safetensors") else None
        asked = request(
            resnet / file, arch=arch, mean=formats.MEAN, std=formats.STD, allow_code_execution=True
        )
        resolved = resolve_model(asked, lambda size: data)
        with torch.no_grad():
            torch.testing.assert_close(resolved.model(x), expected, rtol=1e-4, atol=1e-4)
        assert not any(module.training for module in resolved.model.modules())
        spec = resolved.model.spec
        assert (spec.class_names, spec.shape) == (formats.NAMES, (3, 32, 32))
        leaf = x.clone().requires_grad_()
        assert torch.autograd.grad(resolved.model(leaf).sum(), leaf)[0].abs().max() > 0


# What runs code


@pytest.mark.parametrize("file", ["net.ts", "net.pt2"])
def test_programs_are_refused_unless_allowed(audit, resnet, file, tmp_path):
    code, _, _, told = audit("--model", resnet / file, *NAMES)
    assert code == 4
    assert "--allow-code-execution" in told
    # The ending of the name says nothing.
    disguised = tmp_path / "weights.safetensors"
    disguised.write_bytes((resnet / file).read_bytes())
    assert audit("--model", disguised, *NAMES, *RESNET)[0] in (2, 4)
    assert audit("--model", disguised, *NAMES)[0] == 4


def test_ci_is_told_of_a_refused_model(audit, resnet):
    code, _, _, _ = audit(
        *("--model", resnet / "net.ts", *NAMES),
        *("--sarif", "s.sarif", "--junit", "j.xml", "--markdown", "m.md"),
    )
    assert code == 4
    (found,) = json.loads(Path("s.sarif").read_text())["runs"][0]["results"]
    assert found["ruleId"] == "loading/refused"
    assert "net.ts" in found["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert 'errors="1"' in Path("j.xml").read_text()
    assert "allow" in Path("m.md").read_text()
    assert json.loads(Path("out/summary.json").read_text())["exit_code"] == 4


def test_another_file_than_the_pinned_one_is_refused(audit, resnet):
    for file, more in (("net.ts", ()), ("net.pt", RESNET)):
        code, _, _, told = audit(
            "--model", resnet / file, *more, *NAMES, "--model-sha256", "0" * 64
        )
        assert code == 4
        assert "SHA-256" in told


# Normalisation, sizes, classes


def test_bounds_work_into_mean_and_std(resnet, data):
    x = data.test.images(slice(0, 3))
    plain = request(
        resnet / "net.pt", arch="torchvision:resnet18", mean=formats.MEAN, std=formats.STD
    )
    scaled = request(
        resnet / "net.pt",
        arch="torchvision:resnet18",
        bounds=(0, 255),
        mean=tuple(255 * value for value in formats.MEAN),
        std=tuple(255 * value for value in formats.STD),
    )
    one, other = (resolve_model(asked, lambda size: data).model for asked in (plain, scaled))
    torch.testing.assert_close(one(x), other(x), rtol=1e-4, atol=1e-4)
    assert other.spec.mean == pytest.approx(formats.MEAN)
    signed = request(resnet / "net.pt", arch="torchvision:resnet18", bounds=(-1, 1))
    spec = resolve_model(signed, lambda size: data).model.spec
    assert (spec.mean, spec.std) == ((0.5,) * 3, (0.5,) * 3)


def test_without_a_word_images_go_in_as_they_are_and_it_is_said(resnet, data):
    asked = request(resnet / "net.pt", arch="torchvision:resnet18")
    resolved = resolve_model(asked, lambda size: data)
    assert resolved.model.spec.mean == (0.0, 0.0, 0.0)
    assert any("pass --mean and --std" in note for note in resolved.notes)


def test_images_of_another_size_are_resized_in_front_of_the_network(resnet, data):
    asked = request(resnet / "net.pt", arch="torchvision:resnet18", input_size=(48, 64))
    resolved = resolve_model(asked, lambda size: data)
    assert resolved.model.spec.shape == (3, 48, 64)
    seen = []
    resolved.model.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    leaf = data.test.images(slice(0, 2)).requires_grad_()
    logits = resolved.model(leaf)
    assert seen[0].shape == (2, 3, 48, 64)
    expected = torch.nn.functional.interpolate(leaf, (48, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen[0], expected)
    assert torch.autograd.grad(logits.sum(), leaf)[0].abs().max() > 0


def test_grey_images_are_repeated_for_a_colour_network(resnet):
    grey = ra.load_data("digits")
    asked = ModelRequest(model=str(resnet / "net.ts"), allow_code_execution=True)
    resolved = resolve_model(asked, lambda size: grey)
    x = grey.test.images(slice(0, 2)).expand(-1, 3, -1, -1)
    assert resolved.model.spec.shape == (3, 8, 8)
    with pytest.raises(ra.ModelError, match="images of shape"):
        resolved.model.fit(torch.zeros(1, 2, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(resolved.model(x[:, :1]), resolved.model(x))


def test_another_number_of_classes_is_told(audit, resnet):
    code, _, _, told = audit("--model", resnet / "net.pt", *RESNET, "--class-names", "a,b")
    assert code == 3
    assert "fc.weight float[3, 512] instead of float[2, 512]" in told
    code, _, _, told = audit(
        "--model", resnet / "net.ts", "--allow-code-execution", "--class-names", "a,b"
    )
    assert code == 3
    assert "expected 2 outputs" in told


def test_other_classes_than_the_datas_are_told(audit, resnet):
    code, _, _, told = audit(
        "--model", resnet / "net.pt", *RESNET, "--class-names", "blue,green,pink"
    )
    assert code == 3
    assert "does not know 1 (red)" in told
    assert "missing: pink" in told


def test_class_names_from_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("tench, Tinca tinca\n\ngoldfish\n")
    asked = ModelRequest.from_text(model="m", class_names=str(tmp_path / "names.txt"))
    assert asked.class_names == ("tench, Tinca tinca", "goldfish")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mean": "a,b"}, "--mean"),
        ({"std": "0"}, "std above 0"),
        ({"bounds": "1"}, "--bounds LOW,HIGH"),
        ({"bounds": "1,0"}, "LOW < HIGH"),
        ({"input_size": "0"}, "--input-size"),
        ({"class_names": "cat"}, "--class-names"),
        ({"class_names": "cat,cat"}, "twice"),
        ({"factory": "no factory"}, "pkg.module:function"),
        ({"factory": "a:b", "arch": "c"}, "got both"),
    ],
)
def test_options_that_cannot_be_meant(given, says):
    with pytest.raises(ra.UsageError, match=says):
        ModelRequest.from_text(model="m.pt", **given)


def test_what_is_not_there_is_told(audit, tmp_path):
    for options, says in (
        ((), "no model; pass --model"),
        (("--model", "nowhere.pt"), "no model file"),
        (("--model", "hf:nowhere"), "no folder"),
        (("--model", "timm:resnet18"), "nothing is downloaded"),
    ):
        code, _, _, told = audit(*options)
        assert code == 2
        assert says in told


def test_weights_alone_ask_for_an_architecture(audit, resnet):
    code, _, _, told = audit("--model", resnet / "net.pt")
    assert code == 2
    assert "--arch torchvision:resnet50" in told


def test_a_sidecar_is_overridden_and_said(model_file, digits):
    asked = ModelRequest(model=str(model_file), mean=(0.25,), std=(0.5,))
    resolved = resolve_model(asked, lambda size: digits)
    saved = ra.load_model(model_file)
    x = digits.test.images(slice(0, 4))
    with torch.no_grad():
        torch.testing.assert_close(resolved.model(x), saved.net((x - 0.25) / 0.5))
    plain = resolve_model(ModelRequest(model=str(model_file)), lambda size: digits)
    with torch.no_grad():
        torch.testing.assert_close(plain.model(x), saved(x))
    assert "from model.json" in plain.notes[0]


def test_a_factory_brings_a_trained_network_or_takes_weights(
    audit, folder, resnet, tmp_path, monkeypatch
):
    (tmp_path / "own_nets_for_formats.py").write_text(
        "import torch, torchvision\n"
        "def empty(num_classes):\n"
        "    return torchvision.models.resnet18(num_classes=num_classes)\n"
        "def trained():\n"
        "    net = empty(3)\n"
        f"    net.load_state_dict(torch.load({str(resnet / 'net.pt')!r}, weights_only=True))\n"
        "    return net\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for options in (
        ("--factory", "own_nets_for_formats:trained"),
        ("--factory", "own_nets_for_formats:empty", "--model", resnet / "net.pt"),
    ):
        code, results, _, told = audit(*options, *NAMES, *IMAGENET, *SHORT)
        assert code == 0
        assert results["clean"]["accuracy"] == pytest.approx(clean_accuracy(folder))
        assert "importing own_nets_for_formats:" in told
        assert f" from {tmp_path / 'own_nets_for_formats.py'}: it runs as you" in told
        assert "own_nets_for_formats" in results["provenance"]["config"]["code"][0]
        assert "ran code: " in Path("out/report.html").read_text()


@pytest.mark.parametrize(
    ("module", "extra", "model"),
    [("timm", "timm", "timm:"), ("transformers", "hf", "hf:"), ("onnxruntime", "onnx", "")],
)
def test_a_missing_extra_is_named(module, extra, model, tmp_path, monkeypatch, digits):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "num_classes": 3, "model_type": "vit"})
    )
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    target = f"{model}{tmp_path}"
    if not model:
        pytest.importorskip("onnx")
        target = str(tmp_path / "net.onnx")
        write_onnx(Path(target))
    with pytest.raises(ra.UsageError, match=rf"pip install 'robustann\[{extra}\]'"):
        resolve_model(ModelRequest(model=target), lambda size: digits)


# TorchScript and torch.export


def test_torchscript_answers_the_same_each_time(resnet, data):
    asked = request(resnet / "net.ts", allow_code_execution=True)
    model = resolve_model(asked, lambda size: data).model
    x = data.test.images(slice(0, 8))
    with torch.no_grad():
        first, *others = (model(x) for _ in range(4))
    assert all(one.equal(first) for one in others)


def test_a_program_of_a_fixed_batch_takes_any(tmp_path, data):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 3)).eval()
    program = torch.export.export(net, (torch.zeros(4, 3, 32, 32),))
    torch.export.save(program, tmp_path / "net.pt2")
    asked = request(tmp_path / "net.pt2", allow_code_execution=True)
    model = resolve_model(asked, lambda size: data).model
    x = data.test.images(slice(0, 7))
    with torch.no_grad():
        torch.testing.assert_close(model(x), net(x))
    leaf = x.clone().requires_grad_()
    ours = torch.autograd.grad(model(leaf).square().sum(), leaf)[0]
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(ours, torch.autograd.grad(net(leaf).square().sum(), leaf)[0])


def test_a_program_that_is_no_image_classifier_is_told(tmp_path, data):
    net = nn.Linear(4, 2)
    torch.export.save(torch.export.export(net, (torch.zeros(2, 4),)), tmp_path / "net.pt2")
    with pytest.raises(ra.ModelError, match="one batch of images"):
        resolve_model(request(tmp_path / "net.pt2", allow_code_execution=True), lambda size: data)


# transformers and timm


@HF
def test_a_transformers_folder_with_code_of_its_own_is_refused(audit, hf_folder, tmp_path):
    copy = copied(hf_folder, tmp_path / "copy")
    change(copy / "config.json", auto_map={"AutoModel": "evil.Net"})
    (copy / "evil.py").write_text("open('canary', 'w')")
    code, _, _, told = audit("--model", f"hf:{copy}")
    assert code == 4
    assert "auto_map" in told
    assert not Path("canary").exists()


@HF
def test_a_transformers_folder_without_safetensors_is_told(audit, hf_folder, tmp_path):
    copy = copied(hf_folder, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    code, _, _, told = audit("--model", f"hf:{copy}")
    assert code == 2
    assert "safe_serialization" in told


@HF
def test_weights_of_another_transformers_model_are_told(audit, hf_folder, tmp_path):
    copy = copied(hf_folder, tmp_path / "copy")
    change(copy / "config.json", num_hidden_layers=3)
    code, _, _, told = audit("--model", f"hf:{copy}")
    assert code == 3
    assert "missing" in told


@HF
def test_the_image_processors_scale_is_taken(hf_folder, tmp_path, data):
    copy = copied(hf_folder, tmp_path / "copy")
    change(
        copy / "preprocessor_config.json", do_rescale=False, image_mean=[127.5], image_std=[51.0]
    )
    spec = resolve_model(ModelRequest(model=f"hf:{copy}"), lambda size: data).model.spec
    assert spec.mean == pytest.approx((0.5,) * 3)
    assert spec.std == pytest.approx((0.2,) * 3)
    change(copy / "preprocessor_config.json", do_normalize=False, do_rescale=True,
           rescale_factor=1 / 127.5, rescale_offset=True)  # fmt: skip
    spec = resolve_model(ModelRequest(model=f"hf:{copy}"), lambda size: data).model.spec
    assert spec.mean == pytest.approx((0.5,) * 3)
    assert spec.std == pytest.approx((0.5,) * 3)


@TIMM
def test_a_timm_folder_reads_no_other_files(audit, timm_folder, tmp_path):
    copy = copied(timm_folder, tmp_path / "copy")
    change(copy / "config.json", model_args={"checkpoint_path": "/tmp/evil.pth"})
    code, _, _, told = audit("--model", f"timm:{copy}")
    assert code == 4
    assert "checkpoint_path" in told


@TIMM
def test_timm_architectures_are_made_for_the_size_asked():
    model = ra.create_model("timm:vit_tiny_patch16_224", class_names="abc", shape=(3, 32, 32))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(ra.UsageError, match=r"timm architecture 'resnet19'.*resnet1"):
        ra.create_model("timm:resnet19", class_names="abc", shape=(3, 32, 32))


def copied(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ONNX


def write_onnx(path: Path, *, location: str | None = None, batch="n", scale: float = 1.0) -> None:
    """A linear classifier of the colours; its weights elsewhere if there is a location."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    # Class i is the mean of channel 2 - i: red is the first channel and the last name.
    means = np.kron(np.eye(3)[::-1], np.ones((1024, 1))) / 1024
    weight = numpy_helper.from_array((scale * means).astype(np.float32), "w")
    content = weight.raw_data
    if location is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(len(content)))):
            entry = weight.external_data.add()
            entry.key, entry.value = key, value
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["f"]),
            helper.make_node("MatMul", ["f", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    (path.parent / "data.bin").write_bytes(content)
    assert onnx.load_model_from_string(path.read_bytes()).graph.node


def unconvertible(monkeypatch):
    import onnx2torch

    def convert(model):
        raise NotImplementedError("Converter is not implemented (Zeta)")

    monkeypatch.setattr(onnx2torch, "convert", convert)


@ONNX
def test_onnx_that_does_not_convert_is_audited_as_a_black_box(audit, folder, tmp_path, monkeypatch):
    unconvertible(monkeypatch)
    write_onnx(tmp_path / "net.onnx")
    code, results, _, told = audit("--model", tmp_path / "net.onnx", *NAMES, "--eps", "0.25")
    assert code == 0
    assert results["clean"]["accuracy"] == pytest.approx(clean_accuracy(folder))
    assert results["worst_case"]["scores"]["accuracy"] < clean_accuracy(folder) - 0.1
    assert "onnx2torch cannot convert it (Converter is not implemented (Zeta))" in told
    assert "black box" in told
    labels = [one["label"] for one in results["attacks"]]
    assert not [label for label in labels if label.startswith("mm")]
    assert [label for label in labels if label.startswith("square")]
    assert [label for label in labels if label.startswith("rays")]
    assert [one for one in results["findings"] if one["check"] == "gradient-missing"]
    assert Path("out/report.html").stat().st_size > 10_000


@ONNX
def test_onnx_that_converts_to_another_network_stays_a_black_box(tmp_path, data, monkeypatch):
    import onnx2torch

    write_onnx(tmp_path / "net.onnx")
    original = onnx2torch.convert

    class Wrong(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x) + 0.1 * x.mean() * torch.tensor([1.0, 0.0, 0.0])

    monkeypatch.setattr(onnx2torch, "convert", lambda model: Wrong(original(model)))
    resolved = resolve_model(request(tmp_path / "net.onnx"), lambda size: data)
    assert any("differs from onnxruntime" in note for note in resolved.notes)
    assert not resolved.model(data.test.images([0]).requires_grad_()).requires_grad


@ONNX
def test_onnx_both_ways_gives_the_same_logits(tmp_path, data, monkeypatch):
    write_onnx(tmp_path / "net.onnx")
    x = data.test.images(slice(0, 5))
    converted = resolve_model(request(tmp_path / "net.onnx"), lambda size: data)
    with torch.no_grad():
        expected = converted.model(x)
    assert converted.model(x.clone().requires_grad_()).requires_grad
    unconvertible(monkeypatch)
    box = resolve_model(request(tmp_path / "net.onnx"), lambda size: data)
    torch.testing.assert_close(box.model(x), expected)
    # What PyTorch cannot see is in the digest all the same.
    write_onnx(tmp_path / "other.onnx", scale=2.0)
    other = resolve_model(request(tmp_path / "other.onnx"), lambda size: data)
    assert tensor_digest(box.model) != tensor_digest(other.model)


@ONNX
def test_onnx_of_a_fixed_batch_takes_any(tmp_path, data):
    write_onnx(tmp_path / "free.onnx")
    write_onnx(tmp_path / "fixed.onnx", batch=4)
    free, fixed = (
        resolve_model(request(tmp_path / name), lambda size: data).model
        for name in ("free.onnx", "fixed.onnx")
    )
    x = data.test.images(slice(0, 6))
    torch.testing.assert_close(free(x), fixed(x))


@ONNX
def test_onnx_data_in_its_folder_is_read_and_hashed(tmp_path, data):
    write_onnx(tmp_path / "whole.onnx")
    write_onnx(tmp_path / "split.onnx", location="data.bin")
    whole, split = (
        resolve_model(request(tmp_path / name), lambda size: data)
        for name in ("whole.onnx", "split.onnx")
    )
    x = data.test.images(slice(0, 3))
    torch.testing.assert_close(whole.model(x), split.model(x))
    (tmp_path / "data.bin").write_bytes(bytes((tmp_path / "data.bin").stat().st_size))
    changed = resolve_model(request(tmp_path / "split.onnx"), lambda size: data)
    assert changed.sha256 != split.sha256
    (tmp_path / "data.bin").write_bytes(b"short")
    with pytest.raises(ra.ModelError, match="not there"):
        resolve_model(request(tmp_path / "split.onnx"), lambda size: data)


@ONNX
@pytest.mark.parametrize(
    "location", ["../data.bin", "/etc/passwd", "a/../../data.bin", "..\\data.bin", "link.bin", ""]
)
def test_onnx_data_elsewhere_is_refused(audit, tmp_path, location):
    inside = tmp_path / "inside"
    inside.mkdir()
    write_onnx(inside / "net.onnx", location=location)
    (tmp_path / "data.bin").write_bytes((inside / "data.bin").read_bytes())
    (inside / "link.bin").symlink_to(tmp_path / "data.bin")
    code, _, _, told = audit("--model", inside / "net.onnx", *NAMES)
    assert code == 4
    assert "outside its own folder" in told


@ONNX
def test_onnx_data_elsewhere_is_refused_wherever_a_tensor_can_be(tmp_path, data):
    import onnx
    from onnx import helper

    from robustann.models.inspecting import inspect_file

    outside = onnx.TensorProto(data_type=1, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
    entry = outside.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    attribute = helper.make_attribute("value", helper.make_tensor("t", 1, [1], [0.0]))
    attribute.t.CopyFrom(outside)
    for place in ("node", "function", "default", "training"):
        write_onnx(tmp_path / "net.onnx")
        model = onnx.load_model_from_string((tmp_path / "net.onnx").read_bytes())
        node = helper.make_node("Constant", [], ["c"])
        node.attribute.append(attribute)
        if place == "node":
            model.graph.node.append(node)
        elif place == "function":
            model.functions.add(name="f", domain="x").node.append(node)
        elif place == "default":
            model.functions.add(name="f", domain="x").attribute_proto.append(attribute)
        else:
            model.training_info.add().algorithm.node.append(node)
        (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ra.RefusedError, match="outside its own folder"):
            resolve_model(request(tmp_path / "net.onnx"), lambda size: data)
        assert inspect_file(tmp_path / "net.onnx").onnx.outside == ("/etc/passwd",)


@ONNX
def test_a_pin_of_onnx_covers_its_data(tmp_path, data):
    write_onnx(tmp_path / "net.onnx", location="data.bin")
    alone = hashlib.sha256((tmp_path / "net.onnx").read_bytes())
    with pytest.raises(ra.RefusedError, match=r"cat net.onnx data.bin \| sha256sum"):
        asked = request(tmp_path / "net.onnx", model_sha256=alone.hexdigest())
        resolve_model(asked, lambda size: data)
    alone.update((tmp_path / "data.bin").read_bytes())
    asked = request(tmp_path / "net.onnx", model_sha256=alone.hexdigest())
    assert resolve_model(asked, lambda size: data).sha256 == alone.hexdigest()


@ONNX
def test_onnx_that_is_damaged_is_told(audit, data, tmp_path, capsys):
    write_onnx(tmp_path / "net.onnx")
    content = (tmp_path / "net.onnx").read_bytes()
    for length in range(16, len(content), len(content) // 8):
        (tmp_path / "net.onnx").write_bytes(content[:length])
        assert audit("--model", tmp_path / "net.onnx", *NAMES)[0] in (3, 4)
    import onnx

    model = onnx.load_model_from_string(content)
    for number in (onnx.TensorProto.INT64, 127):
        model.graph.input[0].type.tensor_type.elem_type = number
        (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
        assert audit("--model", tmp_path / "net.onnx", *NAMES)[0] == 3
    # A name that is no text: onnxruntime would print that it tries again.
    (tmp_path / "net.onnx").write_bytes(content.replace(b"MatMul", b"Mat\xfful"))
    with pytest.raises(ra.ModelError, match="onnxruntime cannot run"):
        resolve_model(request(tmp_path / "net.onnx"), lambda size: data)
    assert capsys.readouterr().out == ""
