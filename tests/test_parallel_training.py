"""Training by two processes over gloo: the curve of one, also after one of them was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import robustann as ra
from robustann import parallel
from robustann.data import Augmentation
from robustann.launch import World
from robustann.training.distributed import SharedStatistics

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# Run by one process or by two; writes what training said, by step.
SCRIPT = '''
import json, os, sys
import torch
import robustann as ra
from robustann.attacks import PGD
from robustann.data import Augmentation
from robustann.defenses import AdversarialTraining, AdversarialWeightPerturbation, TRADES
from robustann.launch import world
from robustann.training import StandardStep

out, mode = sys.argv[1:]
threat = ra.ThreatModel("linf", 0.1)
digits = ra.load_data("digits")
x, y = digits.train.images(slice(0, 700)), digits.train.labels[:700]
data = ra.from_arrays(x, y, augmentation=Augmentation(pad=1, flip=True))


class Dying(StandardStep):
    def begin_epoch(self, epoch, epochs):
        if world().rank == 1 and world().restarts == 0 and epoch == 3:
            os.kill(os.getpid(), 9)


class Idle(torch.nn.Module):
    """With a parameter that takes no part."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        self.idle = torch.nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.used(x)


def pgd():
    return AdversarialTraining(PGD(steps=2), threat, eps_warmup_epochs=0)


steps = {
    "standard": (None, "small-cnn"),
    "pgd": (pgd(), "small-cnn"),
    "awp": (AdversarialWeightPerturbation(pgd(), gamma=0.01), "small-cnn"),
    "trades": (TRADES(threat, steps=2), "small-cnn"),
    "idle": (None, Idle()),
}
more = {}
if mode == "killed":
    steps = {"standard": (Dying(), "small-cnn")}
    more = {"checkpoint": out + ".pt", "epochs": 4}
elif mode == "plain":
    steps = {"pgd": (pgd(), "small-cnn")}
    more = {"ema": 0, "epochs": 3, "clip": 5.0}
elif mode == "spread":
    # Stopped after an epoch, and taken up: the curve is that of one that was not.
    class Stopping(type(pgd())):
        def begin_epoch(self, epoch, epochs):
            if epoch == 2 and not resuming:
                raise KeyboardInterrupt
            super().begin_epoch(epoch, epochs)

    resuming, step = False, Stopping(PGD(steps=2), threat, eps_warmup_epochs=0)
    steps = {"pgd": (step, "small-cnn")}
    more = {"ema": 0, "epochs": 3, "clip": 5.0, "fsdp": True, "checkpoint": out + ".pt"}
    try:
        ra.train("small-cnn", data, step=step, **{"batch_size": 32, **more})
    except KeyboardInterrupt:
        resuming, more["resume"] = True, True
elif mode == "whole":
    steps = {"standard": (StandardStep(), "small-cnn")}
    more = {"epochs": 4}
told = {}
for name, (step, model) in steps.items():
    found = ra.train(model, data, step=step, **{"epochs": 2, "batch_size": 32, **more})
    weights = torch.cat([p.detach().flatten() for p in found.model.parameters()])
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in found.history]
    told[name] = {"history": history, "metrics": found.metrics, "weights": weights.tolist()[::97]}
with open(f"{out}.{world().rank}.json", "w") as stream:
    json.dump(told, stream)
'''


def trained(folder, mode: str, processes: int, *options: str) -> list[dict]:
    """What each process says of its training."""
    script, out = folder / "script.py", folder / f"{mode}-{processes}"
    script.write_text(SCRIPT)
    launcher = [
        "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone", *options,
    ] if processes > 1 else []  # fmt: skip
    command = [sys.executable, *launcher, str(script), str(out), mode]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{out.name}.{rank}.json").read_text())
            for rank in range(processes)]  # fmt: skip


def same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        # Sums in another order round otherwise, and may turn the class of an image or two.
        assert one[name]["weights"] == pytest.approx(other[name]["weights"], abs=3e-3)
        for row, wanted in zip(one[name]["history"], other[name]["history"], strict=True):
            assert row["train_loss"] == pytest.approx(wanted["train_loss"], abs=2e-3), name
            assert row == pytest.approx(wanted, abs=0.04), name


def test_two_processes_train_like_one(tmp_path):
    (alone,) = trained(tmp_path, "steps", 1)
    first, second = trained(tmp_path, "steps", 2)
    assert first == second
    same(first, alone)
    # Something was learned, or anything would be the same.
    losses = [row["train_loss"] for row in alone["standard"]["history"]]
    assert losses[1] < losses[0] - 0.02


def test_after_a_kill_they_go_on_from_the_checkpoint(tmp_path):
    (alone,) = trained(tmp_path, "whole", 1)
    first, second = trained(tmp_path, "killed", 2, "--max-restarts", "1")
    assert first == second
    same(first, alone)


# Registered before the group, so run after it was left.
LEAVING = """
import atexit, os, pathlib, sys
import torch


def told():
    names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    pathlib.Path(sys.argv[1] + os.environ["RANK"]).write_text(" ".join(names))


atexit.register(told)
from robustann import parallel

parallel.join(torch.device("cpu"))
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
model(torch.ones(3, 4)).sum().backward()
del model
parallel.gathered(None)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no list of threads here")
def test_no_thread_of_the_group_outlives_the_interpreter(tmp_path):
    # It would abort the process as soon as it puts a tensor away.
    script, out = tmp_path / "script.py", tmp_path / "threads-"
    script.write_text(LEAVING)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [sys.executable, *launcher, str(script), str(out)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        names = (tmp_path / f"threads-{rank}").read_text()
        assert "python" in names
        assert "gloo" not in names


def test_a_model_that_is_spread_trains_like_a_whole_one(tmp_path):
    (alone,) = trained(tmp_path, "plain", 1)
    first, second = trained(tmp_path, "spread", 2)
    assert first == second
    same(first, alone)


def test_what_a_spread_model_cannot_bear_is_refused(digits):
    with pytest.raises(ra.UsageError, match="ema=0"):
        ra.TrainConfig(fsdp=True)
    with pytest.raises(ra.UsageError, match="torchrun"):
        ra.train("small-cnn", digits, fsdp=True, ema=0)


def test_hardening_by_two_processes(tmp_path):
    command = [
        "-m", "robustann", "harden", "--arch", "small-cnn", "--data", "digits", "--eps", "0.1",
        "--defense", "fast-adversarial-training", "--epochs", "2", "--preset", "quick",
        "--max-samples", "32", "--no-explain",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for name, before in (("one", []), ("two", launcher)):
        arguments = [sys.executable, *before, *command, "--output-dir", str(tmp_path / name)]
        done = subprocess.run(
            arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report:") == 1
        assert not (tmp_path / name / "unfinished").exists()
    one, two = (
        [
            ra.AuditResult.load(tmp_path / name / part / "results.json")
            for part in ("before", "after")
        ]
        for name in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert a.clean_accuracy == pytest.approx(b.clean_accuracy, abs=0.04)
        assert a.robust_accuracy == pytest.approx(b.robust_accuracy, abs=0.04)


def test_a_batch_that_cannot_be_shared_is_refused(digits, monkeypatch):
    # Without the others: refused before anything is said to them.
    monkeypatch.setattr(parallel, "join", lambda device: World(0, 3))
    monkeypatch.setattr("robustann.training.run.world", lambda: World(0, 3))
    with pytest.raises(ra.UsageError, match="multiple of the 3 processes"):
        ra.train("small-cnn", digits, batch_size=64)


def test_a_part_of_a_batch_is_augmented_as_in_the_whole():
    images = torch.rand(8, 3, 6, 6)
    change = Augmentation(pad=2, flip=True)
    whole = change(images, torch.Generator().manual_seed(1))
    rows = slice(4, 8)
    part = change(images[rows], torch.Generator().manual_seed(1), rows=rows, of=8)
    assert torch.equal(part, whole[rows])
    assert not torch.equal(part, images[rows])


def test_shared_statistics_are_put_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    before = [model[1], model[2][0]]
    shared = SharedStatistics(model, torch.device("cpu"))
    assert model[1] is before[0]
    shared.replace(model)
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert isinstance(model[2][0], nn.SyncBatchNorm)
    assert model[1].weight is before[0].weight
    assert model[1].running_mean is before[0].running_mean
    model.eval()
    shared.put_back()
    assert [model[1], model[2][0]] == before
    assert not before[0].training
