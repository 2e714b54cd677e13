"""The command line as its user meets it: what it prints, writes, and exits with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from attacking import written
from made_up import no_attack_fell
from PIL import Image
from safetensors.torch import load_file, save_file

import robustann as ra
from robustann.cli.verdict import verdict


def audit_arguments(model_file: Path, *more: str) -> list[str]:
    return [
        *("audit", "--model", str(model_file), "--data", "digits", "--norm", "linf"),
        *("--eps", "0.1", "--preset", "quick", "--max-samples", "24", *more),
    ]


def test_train_audit_report_attack(run, tmp_path):
    code, out, _ = run("train", "--data", "digits", "--out", "m.safetensors", "--epochs", "3")
    assert code == 0
    assert "test accuracy" in out
    assert {path.name for path in tmp_path.iterdir()} == {
        "m.safetensors",
        "m.json",
        "m.log.jsonl",
    }
    code, out, _ = run(*audit_arguments(Path("m.safetensors"), "--output-dir", "out"))
    assert code == 0
    assert "robust accuracy" in out
    assert "out/report.html" in out
    results = json.loads(Path("out/results.json").read_text())
    assert results["n"] == 24
    assert results["execution"]["command"].startswith("robustann audit --model m.safetensors")
    page = Path("out/report.html").read_text()
    assert page.startswith(("<!DOCTYPE html>", "<!doctype html>"))

    Path("out/report.html").unlink()
    Path("m.safetensors").unlink()
    code, out, _ = run("report", "out/results.json")
    assert code == 0
    assert Path("out/report.html").read_text() == page


def test_attack_writes_arrays_within_the_threat_model_and_a_sheet(run, model_file):
    code, out, _ = run(
        *("attack", "--model", model_file, "--attack", "pgd:steps=10", "--eps", "0.1"),
        *("--max-samples", "30", "--output-dir", "out"),
    )
    assert code == 0
    assert "of 30 images are classified wrongly" in out
    arrays = written("out/adversarial.npz")
    assert arrays["adversarial"].shape == (30, 1, 8, 8)
    assert np.abs(arrays["adversarial"] - arrays["clean"]).max() <= 0.1
    logits = ra.load_model(model_file)(torch.tensor(arrays["adversarial"]))
    assert np.array_equal(logits.argmax(1).numpy(), arrays["prediction"])
    assert np.array_equal(arrays["success"], arrays["prediction"] != arrays["label"])
    with Image.open("out/sheet.png") as sheet:
        assert sheet.width > sheet.height > 100


def test_targeted_attack(run, model_file):
    code, _out, _ = run(
        *("attack", "--model", model_file, "--eps", "0.3", "--target", "3", "--output-dir", "o"),
        "--max-samples=20",
    )
    assert code == 0
    arrays = written("o/adversarial.npz")
    assert np.array_equal(arrays["success"], arrays["prediction"] == 3)
    assert arrays["success"].mean() > 0.5
    assert run("attack", "--model", model_file, "--target", "10", "--eps", "0.1")[0] == 2


def test_quiet_prints_nothing(run, model_file):
    code, out, err = run(*audit_arguments(model_file, "--quiet", "--output-dir", "out"))
    assert (code, out, err) == (0, "", "")


def test_same_seed_same_files_for_every_batch_size(run, model_file):
    lasting = []
    for size in ("1", "64", "1000"):
        arguments = audit_arguments(model_file, "--batch-size", size, "--output-dir", size)
        assert run(*arguments)[0] == 0
        results = json.loads(Path(size, "results.json").read_text())
        del results["execution"]
        lasting.append((results, Path(size, "samples.csv").read_text()))
    assert lasting[0] == lasting[1] == lasting[2]


def test_gates_decide_the_exit_code(run, model_file):
    failing = audit_arguments(model_file, "--fail-under", "robust_accuracy=1", "--no-explain")
    code, _out, err = run(*failing, "--output-dir", "out")
    assert code == 1
    assert "\ngate failed: robust_accuracy" in err
    assert json.loads(Path("out/results.json").read_text())["gates"][0]["passed"] is False
    passing = audit_arguments(model_file, "--fail-under", "robust_accuracy=0", "--no-explain")
    assert run(*passing, "--output-dir", "out")[0] == 0


def test_dry_run_says_the_cost_and_writes_nothing(run, model_file, tmp_path):
    code, out, _ = run(*audit_arguments(model_file, "--dry-run"))
    assert code == 0
    assert "at most" in out
    assert "propagations for 24 images" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["attacks", "models", "datasets", "presets"])
def test_lists(run, what):
    code, out, _ = run("list", what)
    assert code == 0
    expected = {"attacks": "pgd", "models": "small-cnn", "datasets": "digits", "presets": "quick"}
    assert expected[what] in out


def test_listed_presets_say_where_a_stage_runs(run):
    _, out, _ = run("list", "presets")
    quick = [" ".join(line.split()) for line in out.split("standard ")[0].splitlines()]
    assert {"mm:steps=15", "apgd:steps=15 in l1 alone"} <= {*quick}


@pytest.mark.parametrize(
    "command", ["train", "attack", "audit", "report", "seal", "verify", "list"]
)
def test_every_help_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"  robustann {command} " in out


# Wrong input: one clear line, the documented exit code, nothing written.


def wrong(run, *arguments: str | Path, code: int, says: str) -> None:
    came, out, err = run(*arguments)
    assert (came, out) == (code, "")
    assert says in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--eps", "8/0"], "8/255"),
        (["--eps", "8"], "did you mean 8/255?"),
        (["--eps", "-0.1"], "eps >= 0"),
        (["--norm", "l3"], "unknown norm 'l3'"),
        (["--attack", "pdg"], "did you mean 'pgd'"),
        (["--attack", "pgd:step=3"], "did you mean 'steps'"),
        (["--attack", "pgd:steps=many"], "pgd:steps as int, got 'many'"),
        (["--attack", "pgd:loss=hinge"], "unknown loss 'hinge'"),
        (["--preset", "quik"], "did you mean 'quick'"),
        (["--data", "digist"], "did you mean 'digits'"),
        (["--batch-size", "few"], "number or 'auto'"),
        (["--batch-size", "0"], "batch_size >= 1"),
        (["--fail-under", "accuracy=0.4"], "unknown gate metric"),
        (["--model", "absent.safetensors"], "absent.safetensors"),
        (["--sed", "1"], "--seed"),
    ],
)
def test_wrong_usage_exits_with_2(run, model_file, arguments, says, tmp_path):
    wrong(run, *audit_arguments(model_file), *arguments, code=2, says=says)
    assert not list(tmp_path.glob("**/*.json"))


def test_folder_that_cannot_be_written(run, model_file, tmp_path):
    (tmp_path / "file").write_text("in the way")
    arguments = audit_arguments(model_file, "--output-dir", "file/out")
    wrong(run, *arguments, code=2, says="a folder that can be written to")


def test_damaged_model_exits_with_4(run, model_file, tmp_path):
    content = model_file.read_bytes()
    damaged = tmp_path / "model.safetensors"
    damaged.with_suffix(".json").write_text(model_file.with_suffix(".json").read_text())
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        damaged.write_bytes(content[:size])
        wrong(run, *audit_arguments(damaged), code=4, says="model.safetensors")


def test_model_of_other_data_exits_with_3(run, model_file, tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(12):
                pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    arguments = [*audit_arguments(model_file), "--data", f"imagefolder:{tmp_path / 'pictures'}"]
    wrong(run, *arguments, code=3, says="one output for each of the 2 classes of the data")


def test_weights_that_are_not_finite_exit_with_3(run, model_file, tmp_path):
    weights = load_file(model_file)
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, tmp_path / "nan.safetensors")
    sidecar = json.loads(model_file.with_suffix(".json").read_text())
    import hashlib

    digest = hashlib.sha256((tmp_path / "nan.safetensors").read_bytes()).hexdigest()
    text = json.dumps({**sidecar, "sha256": digest})
    (tmp_path / "nan.json").write_text(text)
    wrong(run, *audit_arguments(tmp_path / "nan.safetensors"), code=3, says="finite")


def test_results_of_another_schema_exit_with_3(run, tmp_path):
    (tmp_path / "results.json").write_text('{"schema_version": 99}')
    wrong(run, "report", "results.json", code=3, says="schema version 1")
    wrong(run, "report", "absent.json", code=2, says="absent.json")


def test_ctrl_c_in_mid_audit_exits_with_130_and_leaves_nothing(model_file, tmp_path):
    command = [
        *(sys.executable, "-m", "robustann", "audit", "--model", str(model_file)),
        *("--eps", "0.001", "--attack", "pgd:steps=1000000", "--output-dir", "out"),
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, such as this test may run in, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        # The folder is made right before the work begins.
        for _ in range(600):
            if (tmp_path / "out").exists():
                break
            time.sleep(0.1)
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    # No results; what a rerun goes on from may be there.
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"unfinished"}


def test_a_broken_pipe_is_no_error(tmp_path):
    command = f"{sys.executable} -m robustann list attacks | head -n 0"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_rounds_of_a_cascade_that_broke_nothing_share_a_line():
    result = no_attack_fell()
    attack = next(one for one in result.attacks if not one.control)
    labels = ["square", *(f"square#{number}" for number in range(2, 6))]
    named = [attack.model_copy(update={"label": label}) for label in labels]
    broke = named[0].model_copy(update={"label": "square#6", "success_rate": 0.5})
    text = verdict(result.model_copy(update={"attacks": (attack, *named, broke)}))
    spent = 5 * (attack.forwards + attack.backwards) / attack.attempted
    (line,) = [line for line in text.splitlines() if line.startswith("(5 more, in turn)")]
    assert line.endswith(f"0.0 % of {attack.attempted} {spent:>13.1f}")
    assert "square " not in text
    assert "square#6" in text
    assert "square#3" in verdict(result.model_copy(update={"attacks": tuple(named[:3])}))
