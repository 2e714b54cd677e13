"""Real photographs: one network in every format, by one command each, with the same accuracy."""

from __future__ import annotations

import csv
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

import formats
import pytest
import torch
from torch import nn

import robustann as ra
from robustann.cli import main

ARCHIVE = Path(__file__).parents[2] / "shared" / "data" / "cifar10-jpeg.tar"
EACH = {"train": 20, "test": 6}

pytestmark = pytest.mark.skipif(
    not ARCHIVE.is_file(), reason="no cifar10-jpeg.tar in ../shared/data"
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Some of the images of each class."""
    folder = tmp_path_factory.mktemp("cifar10")
    seen: Counter[str] = Counter()
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            part, _, rest = member.name.partition("/")
            place = str(Path(member.name).parent)
            if member.isfile() and rest and seen[place] < EACH.get(part, 0):
                archive.extract(member, folder, filter="data")
                seen[place] += 1
            if len(seen) == 20 and all(
                count == EACH[name.partition("/")[0]] for name, count in seen.items()
            ):
                break
    return folder


@pytest.fixture(scope="module")
def files(photographs, tmp_path_factory):
    """A ResNet, random but for its last layer, in five formats."""
    from torchvision.models import resnet18

    folder = tmp_path_factory.mktemp("resnet")
    data = ra.load_data(f"imagefolder:{photographs}")
    torch.manual_seed(0)
    net = resnet18(weights=None, num_classes=10)
    images = formats.normalized(data.train.images(slice(None)) * 255, formats.MEAN, formats.STD)
    formats.fit_head(net, net.fc, images, data.train.labels)
    net.eval()
    formats.save_resnet(net, folder)
    if_onnx = []
    try:
        formats.save_onnx(net, folder / "net.onnx")
        if_onnx.append("net.onnx")
    except ImportError:
        pass
    test = formats.normalized(data.test.images(slice(None)) * 255, formats.MEAN, formats.STD)
    with torch.no_grad():
        right = net(test).argmax(1) == data.test.labels
    return folder, if_onnx, right


def test_the_same_accuracy_on_photographs_from_every_format(
    photographs, files, tmp_path, monkeypatch
):
    folder, if_onnx, right = files
    assert 0.1 < float(right.double().mean()) < 1
    monkeypatch.chdir(tmp_path)
    for file in ("net.pt", "net.safetensors", "net.ts", "net.pt2", *if_onnx):
        arch = ["--arch", "torchvision:resnet18"] if file in ("net.pt", "net.safetensors") else []
        line = [
            "robustann", "audit", "--model", str(folder / file), *arch,
            "--data", f"imagefolder:{photographs}", "--allow-code-execution",
            "--mean", ",".join(map(str, formats.MEAN)), "--std", ",".join(map(str, formats.STD)),
            "--attack", "fgsm", "--no-trust", "--no-curve", "--no-explain", "--eps", "1/255",
            "--device", "cpu", "--quiet", "--output-dir", "out",
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", line)
        assert main._run() == 0, file
        results = json.loads(Path("out/results.json").read_text())
        assert results["clean"]["accuracy"] == pytest.approx(
            float(right.double().mean()), abs=1e-4
        ), file
        with open("out/samples.csv", newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert [row["label"] == row["clean_prediction"] for row in rows] == right.tolist(), file


def test_an_own_network_in_a_folder_of_its_own_attacks(photographs, tmp_path, monkeypatch, capsys):
    """As somebody new does it: a class, its weights, and files called as ours are."""
    monkeypatch.chdir(tmp_path)
    for name in ("attacks", "defenses", "reports"):
        Path(f"{name}.py").write_text("raise RuntimeError('not this one')\n")
    Path("own_network_of_a_user.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes=10):\n"
        "        super().__init__(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, num_classes))\n"
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, "best.pth")
    line = ["robustann", "audit", "--model", "best.pth", "--arch", "own_network_of_a_user:Net",
            "--data", f"imagefolder:{photographs}", "--preset", "quick", "--max-samples", "8",
            "--device", "cpu", "--no-explain"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", line)
    assert main._run() == 0
    told = capsys.readouterr()
    assert f"from {tmp_path / 'own_network_of_a_user.py'}" in told.err
    assert "report: runs/audit-best/report.html" in told.out
    assert Path("runs/audit-best/report.html").is_file()
