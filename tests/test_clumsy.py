"""What clumsy, tired or hurried users do to the command line, and what must not be lost by it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from attacking import written

import robustann as ra
from robustann.training import TrainConfig


def audit_arguments(model_file: Path, *more: str) -> list[str]:
    return [
        *("audit", "--model", str(model_file), "--data", "digits", "--eps", "0.1"),
        *("--attack", "fgsm", "--max-samples", "16", "--no-trust", "--no-curve", "--no-explain"),
        *("--output-dir", "out", *more),
    ]


@pytest.mark.parametrize("shares", [("0.99", "0.01"), ("0.01", "0.99")])
def test_the_largest_threshold_of_a_metric_counts(run, model_file, shares):
    gates = [f"--fail-under=robust_accuracy={share}" for share in shares]
    code, _, err = run(*audit_arguments(model_file, *gates))
    assert code == 1
    assert "under 99.0 %" in err


def test_help_says_what_a_gate_compares(run):
    code, out, _ = run("audit", "--help")
    words = " ".join(out.split())
    assert code == 0
    assert "lower end of the 95 % interval is compared, which never reaches 1.0" in words


@pytest.mark.parametrize("name", ["d.safetensors", "d.json", "d.checkpoint.pt", "d.log.jsonl"])
def test_training_is_refused_where_its_model_cannot_be_written(run, name, monkeypatch):
    monkeypatch.setattr("robustann.training.train", None)
    Path(name).mkdir()
    code, _, err = run("train", "--data", "digits", "--epochs", "1", "--out", "d.safetensors")
    assert code == 2
    assert f"'{name}', got a folder" in err


def test_a_finished_training_outlives_a_save_that_fails(run, monkeypatch):
    command = ("train", "--data", "digits", "--epochs", "1", "--out", "d.safetensors")
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        patch.setattr("robustann.models.save_model", full)
        code, _, err = run(*command)
    assert code == 3
    assert "disk is full" in err
    assert Path("d.checkpoint.pt").is_file()
    with monkeypatch.context() as patch:
        patch.setattr("robustann.training.run.Run.epoch", None)
        code, *_ = run(*command, "--resume")
    assert code == 0
    assert ra.load_model("d.safetensors").spec.arch == "small-cnn"
    assert not Path("d.checkpoint.pt").exists()


@pytest.mark.parametrize("name", ["results.json", "samples.csv", "report.html"])
def test_an_audit_is_refused_where_its_results_cannot_be_written(
    run, model_file, name, monkeypatch
):
    monkeypatch.setattr("robustann.auditing.Audit.run", None)
    Path("out", name).mkdir(parents=True)
    code, _, err = run(*audit_arguments(model_file))
    assert code == 2
    assert "got a folder" in err


@pytest.mark.parametrize("name", ["adversarial.npz", "sheet.png"])
def test_an_attack_is_refused_where_its_images_cannot_be_written(
    run, model_file, name, monkeypatch
):
    monkeypatch.setattr("robustann.api.attack", None)
    Path("out", name).mkdir(parents=True)
    code, _, err = run("attack", "--model", model_file, "--output-dir", "out")
    assert code == 2
    assert "got a folder" in err


@pytest.mark.parametrize("command", ["audit", "attack"])
def test_a_missing_model_leaves_no_folder(run, command, tmp_path):
    code, _, err = run(command, "--model", "absent.safetensors", "--output-dir", "out")
    assert code == 2
    assert "no model file 'absent.safetensors'" in err
    assert not list(tmp_path.iterdir())


def test_a_seed_of_any_size_is_taken(run):
    big = "99999999999999999999999"
    code, _, err = run(
        *("train", "--data", "digits", "--epochs", "1", "--out", "m.safetensors", "--seed", big)
    )
    assert (code, err) == (0, "")
    code, _, err = run(
        *("audit", "--model", "m.safetensors", "--data", "digits", "--eps", "0.05", "--seed", big),
        *("--preset", "quick", "--max-samples", "8", "--output-dir", "out"),
    )
    assert code == 0
    assert "error" not in err
    assert json.loads(Path("out/results.json").read_text())["provenance"]["seed"] == int(big)
    code, _, err = run("attack", "--model", "m.safetensors", "--seed", big, "--max-samples", "8")
    assert (code, err.split(":")[0]) == (0, "normalisation")


def test_a_seed_that_fits_keeps_its_meaning():
    model = ra.create_model("small-cnn", class_names=["a", "b"], shape=(1, 8, 8), seed=7)
    torch.manual_seed(7)
    same = ra.create_model("small-cnn", class_names=["a", "b"], shape=(1, 8, 8))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a user's module, importable under a name of its own for as long as the test runs."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"users_{tmp_path.name}".replace("-", "_")

    def write(text: str) -> str:
        Path(tmp_path, f"{name}.py").write_text(text)
        return name

    yield write
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "text", ["import sys\nsys.exit(7)\n", "def make():\n    raise SystemExit(7)\n"]
)
def test_a_factory_that_exits_is_an_error(run, module, text):
    name = module(text)
    code, _, err = run("train", "--data", f"{name}:make", "--epochs", "1")
    assert code == 3
    assert "SystemExit: 7" in err
    code, _, err = run("train", "--data", "digits", "--arch", f"{name}:make", "--epochs", "1")
    assert code == 3
    assert "SystemExit: 7" in err


PARTS = """
import torch
from robustann.data import ImageData, TensorSplit

def split(value, label):
    images = torch.full((40, 1, 4, 4), 0.5)
    images[3] = value
    labels = torch.arange(40) % 2
    labels[3] = label
    return TensorSplit(images, labels)

def whole():
    good = split(0.5, 1)
    return ImageData("mine", good, good, split(VALUE, 1), ("a", "b"))

def parts():
    return {"train": split(0.5, 1), "test": split(VALUE, LABEL), "class_names": ["a", "b"]}
"""


@pytest.mark.parametrize(
    ("value", "label", "factory", "words"),
    [
        ("float('nan')", 1, "whole", "NaN or infinity in 1 of 40"),
        ("255.0", 1, "whole", "divide by 255"),
        ("-1.0", 1, "parts", "undo the normalisation"),
        ("float('inf')", 1, "parts", "NaN or infinity in 1 of 40"),
        ("0.5", -1, "parts", "labels"),
        ("0.5", 2, "parts", "labels"),
    ],
)
def test_splits_of_a_factory_are_checked(run, module, value, label, factory, words):
    name = module(PARTS.replace("VALUE", value).replace("LABEL", str(label)))
    code, _, err = run("train", "--data", f"{name}:{factory}", "--epochs", "1")
    assert code == 3
    assert words in err
    assert f"the test part of '{name}:{factory}'" in err


def test_rounding_beyond_the_range_is_clipped_in_splits_too(module):
    name = module(PARTS.replace("VALUE", "1 + 5e-7").replace("LABEL", "1"))
    for factory in ("whole", "parts"):
        assert float(ra.load_data(f"{name}:{factory}").test.images(slice(None)).max()) == 1.0


NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        if CONDITION:
            raise KeyError("no such thing")
        return self.layers(x)

def make():
    return Net()
"""


@pytest.mark.parametrize("condition", ["self.training", "len(x) == 2", "len(x) > 200", "True"])
def test_a_model_that_raises_is_named(run, module, condition):
    name = module(NETS.replace("CONDITION", condition))
    code, _, err = run("train", "--data", "digits", "--arch", f"{name}:make", "--epochs", "1")
    assert code == 3
    assert f"'{name}:make'" in err
    assert "KeyError: 'no such thing'" in err
    assert "not foreseen" not in err


def test_an_attack_takes_the_images_of_an_audit(run, model_file, digits):
    code, _, _ = run("attack", "--model", model_file, "--max-samples", "16", "--output-dir", "o")
    assert code == 0
    run(*audit_arguments(model_file))
    labels = written("o/adversarial.npz")["label"]
    rows = Path("out/samples.csv").read_text().splitlines()
    column = rows[0].split(",").index("label")
    assert [row.split(",")[column] for row in rows[1:]] == [str(label) for label in labels]
    assert labels.tolist() != digits.test.labels[:16].tolist()


@pytest.mark.parametrize("target", [None, 3])
def test_an_attack_counts_what_was_wrong_before_apart(run, model_file, target):
    wanted = [] if target is None else ["--target", str(target)]
    code, out, _ = run(
        *("attack", "--model", model_file, "--eps", "0.2", "--attack", "pgd:steps=5"),
        *("--max-samples", "200", "--output-dir", "o", *wanted),
    )
    assert code == 0
    arrays = written("o/adversarial.npz")
    before = ra.load_model(model_file)(torch.tensor(arrays["clean"])).argmax(1).numpy()
    attempted = before == arrays["label"] if target is None else before != target
    won = int((arrays["success"] & attempted).sum())
    assert 0 < attempted.sum() < 200
    assert won > 0
    assert f"{int(arrays['success'].sum())} of 200 images are classified" in out
    rate = f"{100 * won / attempted.sum():.1f} %"
    assert (
        f"{200 - attempted.sum()} were before, success on {won} of the other "
        f"{attempted.sum()} ({rate})" in out
    )


def test_descriptions_of_attacks_are_whole_sentences(run):
    code, out, _ = run("list", "attacks")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("apgd "))
    assert "(Croce and Hein, ICML 2020). " in line


def test_help_of_train_states_the_defaults(run):
    config = TrainConfig()
    code, out, _ = run("train", "--help")
    # The examples name options too.
    words = " ".join(out.split()).partition("Options:")[2]
    assert code == 0
    for name in ("batch_size", "momentum", "weight_decay", "label_smoothing", "ema", "precision"):
        option = words.index(f"--{name.replace('_', '-')} ")
        assert words[option:].split("[default: ")[1].startswith(f"{getattr(config, name)}]"), name
    assert "--clip" in words


def test_momentum_and_clip_are_passed_on(run):
    code, *_ = run(
        *("train", "--data", "digits", "--epochs", "1", "--out", "m.safetensors"),
        *("--momentum", "0.5", "--clip", "1"),
    )
    assert code == 0
    made = json.loads(Path("m.json").read_text())["training"]["config"]
    assert (made["momentum"], made["clip"]) == (0.5, 1.0)
    code, _, err = run("train", "--data", "digits", "--momentum", "1")
    assert code == 2
    assert "momentum: expected" in err
