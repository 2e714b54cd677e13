"""What an accelerator gives, in one run of under eight minutes: time to accuracy, utilisation, the
share of the bare loop, and what each switch for speed changes.

    python benchmarks/accelerator.py --data cifar10 --data-root data
    python benchmarks/accelerator.py --data cifar10-jpeg.tar   # a folder a class, as train and test
    python benchmarks/accelerator.py --small --device cpu      # all of it, tiny, in seconds

Parts, in this order, each within its share of the time; the figures so far are in
``accelerator.json`` after each, should the run be stopped:

* ``standard``: PreActResNet-18, plain training, to 94 %;
* ``fast``: single-step adversarial training at linf 8/255, to 45 % under ``standard``;
* ``audit``: ``standard`` on 1,000 images of the latter;
* ``share``: PGD-40, APGD-50 and a step of PGD-7 training beside loops written by hand, where no
  image falls;
* ``switches``: PGD-20 and Square-200 in float32, bf16 and fp16, channels last, and compiled (calls
  without gradients then run as captured graphs): images x propagations a second, and how far
  robust accuracy is from float32's. Of the large model and of the small CNN.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bench
import click
import pgd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustann as ra
from robustann.attacks import APGD, PGD, Attack, Square
from robustann.attacks.engine import run
from robustann.auditing.speed import Quick
from robustann.data.augmentation import Augmentation
from robustann.defenses import AdversarialTraining, NoisyFastAdversarialTraining
from robustann.files import write_text
from robustann.models import resolve_device
from robustann.rng import SampleRandom

# Seconds of the device that training may take; its epochs are chosen by a timed one.
_STANDARD_SECONDS, _FAST_SECONDS = 90.0, 130.0
_FEWEST_EPOCHS, _MOST_EPOCHS = 8, 30
# Between two questions to the driver.
_SAMPLED = 0.25


@dataclass
class Bench:
    """What all parts share, and what they have found."""

    data: ra.ImageData
    device: torch.device
    small: bool
    until: float
    facts: dict[str, Any] = field(default_factory=dict)
    robust: nn.Module | None = None

    @property
    def arch(self) -> str:
        return "small-cnn" if self.small else "preact-resnet18"

    @property
    def threat(self) -> ra.ThreatModel:
        return ra.ThreatModel("linf", 0.1 if self.small else "8/255")  # type: ignore[arg-type]

    @property
    def left(self) -> float:
        return self.until - time.perf_counter()

    def wait(self) -> None:
        """Until all is computed that was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def training(self) -> dict[str, Any]:
        """Settings of both trainings."""
        if self.small:
            return {"batch_size": 64, "device": self.device}
        return {
            "batch_size": 256,
            "lr": 0.2,
            "precision": "bf16",
            "channels_last": True,
            "device": self.device,
        }

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """So many of the first test images, on the device, and their labels."""
        x = self.data.test.images(slice(0, count)).to(self.device)
        return x, self.data.test.labels[:count].to(self.device)


class Utilisation:
    """How busy the device is while the block runs, in percent, as its driver says."""

    def __init__(self, device: torch.device) -> None:
        self._wanted = device.type == "cuda" and shutil.which("nvidia-smi") is not None
        self._index = device.index or 0
        self._over = threading.Event()
        self._busy: list[float] = []

    def __enter__(self) -> Utilisation:
        self._thread = threading.Thread(target=self._look, daemon=True)
        if self._wanted:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._wanted:
            self._thread.join()

    def _look(self) -> None:
        asked = ["nvidia-smi", f"--id={self._index}", "--query-gpu=utilization.gpu",
                 "--format=csv,noheader,nounits"]  # fmt: skip
        while not self._over.wait(_SAMPLED):
            done = subprocess.run(asked, capture_output=True, text=True, check=False)
            with contextlib.suppress(ValueError):
                self._busy.append(float(done.stdout.strip()))

    @property
    def mean(self) -> float | None:
        return round(statistics.fmean(self._busy), 1) if self._busy else None


def trained(
    bench: Bench, step: Any, seconds: float, target: float
) -> tuple[nn.Module, dict[str, Any]]:
    """A model, trained for as many epochs as fit, and what it took."""
    # The first epoch pays for set-up; the second one tells the price.
    trial = ra.train(bench.arch, bench.data, step=step, epochs=2, **bench.training())
    price = max(trial.history[-1]["seconds"], 1e-3)
    epochs = min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, int(min(seconds, bench.left / 2) / price)))
    if bench.small:
        epochs = 3
    begin = time.perf_counter()
    with Utilisation(bench.device) as busy:
        done = ra.train(bench.arch, bench.data, step=step, epochs=epochs, **bench.training())
        bench.wait()
    spent = time.perf_counter() - begin
    reached, passed = None, 0.0
    for row in done.history:
        passed += row["seconds"]
        if reached is None and row["validation_accuracy"] >= target:
            reached = passed
    return done.model, {
        "epochs": epochs,
        "seconds": spent,
        "seconds_an_epoch": done.seconds / epochs,
        "images_a_second": epochs * len(bench.data.train) / done.seconds,
        "test_accuracy": done.metrics["accuracy"],
        "seconds_to_target_on_validation": reached,
        "target": target,
        "utilisation": busy.mean,
        "events": done.training.get("events", []),
    }


def standard_part(bench: Bench) -> dict[str, Any]:
    """Plain training."""
    return trained(bench, None, _STANDARD_SECONDS, 0.94)[1]


def fast_part(bench: Bench) -> dict[str, Any]:
    """Single-step adversarial training; its model is what the other parts attack."""
    step = NoisyFastAdversarialTraining(bench.threat)
    bench.robust, row = trained(bench, step, _FAST_SECONDS, math.inf)
    return row


def _model(bench: Bench) -> nn.Module:
    if bench.robust is None:
        bench.robust = ra.train(
            bench.arch, bench.data, step=NoisyFastAdversarialTraining(bench.threat),
            **{**bench.training(), "epochs": 2},
        ).model  # fmt: skip
    return bench.robust.eval()


def audit_part(bench: Bench) -> dict[str, Any]:
    """The verdict, without what AutoAttack does not have either, and what it cost."""
    model = _model(bench)
    samples = 40 if bench.small else 1000
    preset = "quick" if bench.small else "standard"
    begin = time.perf_counter()
    with Utilisation(bench.device) as busy:
        found = ra.audit(
            model, bench.data, bench.threat, preset, max_samples=samples, explain=False,
            curve=False, trust=False,
        )  # fmt: skip
        bench.wait()
    spent = time.perf_counter() - begin
    asked = sum(sum(one.samples.forwards) + sum(one.samples.backwards) for one in found.attacks)
    return {
        "preset": preset,
        "images": found.n,
        "clean_accuracy": found.clean_accuracy,
        "robust_accuracy": found.robust_accuracy,
        "seconds": spent,
        "propagations_an_image": asked / found.n,
        "propagations_a_second": asked / spent,
        "utilisation": busy.mean,
    }


def rounds_of(bench: Bench, contenders: dict[str, Callable[[], Any]], rounds: int) -> Any:
    """Seconds of each contender and ratios to the first, in turn; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in list(contenders) if number % 2 else list(reversed(contenders)):
            bench.wait()
            begin = time.perf_counter()
            contenders[name]()
            bench.wait()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    first = seconds[next(iter(contenders))]
    rows = {}
    for name, own in seconds.items():
        ratios = [one / other for one, other in zip(own, first, strict=True)]
        rows[name] = {
            "seconds": statistics.median(own),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
    return rows


def share_part(bench_: Bench) -> dict[str, Any]:
    """Beside loops written by hand."""
    held = pgd.Held(_model(bench_)).to(bench_.device).eval().requires_grad_(False)
    count, steps, rounds = (16, 3, 3) if bench_.small else (256, 40, 5)
    x, _ = bench_.images(count)
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    threat, eps = bench_.threat, bench_.threat.eps
    size = eps / 4

    def ours(attack: Attack) -> Callable[[], Any]:
        random = SampleRandom.create(0, torch.arange(len(x)))
        return lambda: run(attack, held, x, labels, threat, random=random, known_correct=True)

    loop = pgd.bare_loop(eps, size, steps)
    loops = {
        f"PGD-{steps}": {
            "bare loop": lambda: loop(held, x, labels, 0),
            "robustann": ours(PGD(steps=steps, step_size=size)),
        },
        f"APGD-{steps}": {
            "bare loop": lambda: bench._bare_apgd(held, x, labels, eps, steps),
            "robustann": ours(APGD(steps=steps)),
        },
        "a batch of PGD-7 training": _training(bench_, x, eps),
    }
    with Utilisation(bench_.device) as busy:
        found = {name: rounds_of(bench_, loop, rounds) for name, loop in loops.items()}
    return {"loops": found, "utilisation": busy.mean}


def _training(bench_: Bench, x: Tensor, eps: float) -> dict[str, Callable[[], Any]]:
    model = ra.create_model(
        bench_.arch, class_names=bench_.data.class_names, shape=bench_.data.shape, seed=0
    ).to(bench_.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    labels = bench_.data.test.labels[: len(x)].to(x.device)
    step = AdversarialTraining(PGD(steps=7, step_size=eps / 4), bench_.threat, eps_warmup_epochs=0)
    loop, rows = pgd.bare_loop(eps, eps / 4, 7), torch.arange(len(x))

    def updated(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def by_hand() -> None:
        model.eval().requires_grad_(False)
        crafted = loop(model, x, labels, 0)
        model.train().requires_grad_(True)
        updated(F.cross_entropy(model(crafted.detach()), labels))

    def ours() -> None:
        model.train()
        random = SampleRandom.create(0, rows).to(x.device)
        updated(step(model, x, labels, random=random)[0])

    return {"bare loop": by_hand, "robustann": ours}


# Name: precision, channels last, compiled.
_SWITCHES: dict[str, tuple[str, bool, bool]] = {
    "float32": ("float32", False, False),
    # PyTorch lets convolutions round their factors to ten bits where the device can.
    "float32 without TF32": ("float32", False, False),
    "bf16": ("bf16", False, False),
    "fp16": ("fp16", False, False),
    "channels_last": ("float32", True, False),
    "bf16 + channels_last": ("bf16", True, False),
    "compile": ("float32", False, True),
    "bf16 + compile": ("bf16", False, True),
}


def switches_part(bench_: Bench) -> dict[str, Any]:
    """Each switch alone, on a large and on a small model."""
    models: dict[str, nn.Module] = {bench_.arch: _model(bench_)}
    if not bench_.small:
        step = NoisyFastAdversarialTraining(bench_.threat)
        told = {"epochs": 3, "batch_size": 256, "device": bench_.device}
        models["small-cnn"] = ra.train("small-cnn", bench_.data, step=step, **told).model.eval()
    return {"models": {name: _switched(bench_, model) for name, model in models.items()}}


def _switched(bench_: Bench, model: nn.Module) -> dict[str, Any]:
    # Of 1,000 images one is a tenth of a point.
    x, labels = bench_.images(24 if bench_.small else 1000)
    steps, queries = (3, 8) if bench_.small else (20, 200)
    attacks = {f"PGD-{steps}": PGD(steps=steps), f"Square-{queries}": Square(queries=queries)}
    random = SampleRandom.create(0, torch.arange(len(x)))
    rows: dict[str, Any] = {}
    for switch, (precision, last, compiled) in _SWITCHES.items():
        if compiled and bench_.device.type != "cuda":
            # It takes a minute there, and captures nothing.
            continue
        if bench_.left < 30:
            rows[switch] = {"left out": "no time was left"}
            continue
        quick = Quick(model, channels_last=last, compiled=compiled)
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = before and not switch.endswith("without TF32")
        rows[switch] = {
            name: _rate(bench_, attack, quick, x, labels, random, precision)
            for name, attack in attacks.items()
        }
        torch.backends.cudnn.allow_tf32 = before
    plain = rows["float32"]
    for row in rows.values():
        for name, one in row.items():
            if isinstance(one, dict) and "robust_accuracy" in one:
                one["rate"] = one["propagations_a_second"] / plain[name]["propagations_a_second"]
                one["points"] = 100 * (one["robust_accuracy"] - plain[name]["robust_accuracy"])
    return rows


def _rate(
    bench_: Bench, attack: Attack, model: nn.Module, x: Tensor, labels: Tensor,
    random: SampleRandom, precision: str,
) -> dict[str, Any]:  # fmt: skip
    times = []
    try:
        # The first one compiles, and captures.
        for _ in range(3):
            bench_.wait()
            begin = time.perf_counter()
            found = run(attack, model, x, labels, bench_.threat, random=random,
                        precision=precision)  # fmt: skip
            bench_.wait()
            times.append(time.perf_counter() - begin)
    except Exception as error:
        # What fails on this machine is a finding, and the others are still to be measured.
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    asked = int(found.forwards.sum() + found.backwards.sum())
    return {
        "first_seconds": times[0],
        "seconds": min(times[1:]),
        "propagations_a_second": asked / min(times[1:]),
        "robust_accuracy": float((~found.success).double().mean()),
    }


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "standard": standard_part,
    "fast": fast_part,
    "audit": audit_part,
    "share": share_part,
    "switches": switches_part,
}


def _part(name: str, bench_: Bench) -> dict[str, Any]:
    if bench_.left < 0:
        return {"left out": "no time was left"}
    try:
        return PARTS[name](bench_)
    except Exception:
        # The time on the device is dear: the other parts go on.
        return {"failed": traceback.format_exc()[-2000:]}


def told(device: torch.device) -> dict[str, Any]:
    """What it ran on and with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": name,
        "versions": {one: importlib.metadata.version(one) for one in ("torch", "robustann")},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def show(name: str, row: dict[str, Any], indent: int = 0) -> None:
    """A part's figures, one a line."""
    print(f"{'  ' * indent}{name}")
    for key, value in row.items():
        if isinstance(value, dict):
            show(key, value, indent + 1)
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            print(f"{'  ' * (indent + 1)}{key:<34}{text}")


@contextlib.contextmanager
def loaded(spec: str, root: Path | None) -> Iterator[ra.ImageData]:
    """The data; an archive of a folder a class is unpacked for as long as they are used."""
    with tempfile.TemporaryDirectory() as folder:
        if spec.endswith(".tar"):
            with tarfile.open(spec) as archive:
                archive.extractall(folder, filter="data")
            (inner,) = {path.parent for path in Path(folder).rglob("train")}
            spec = f"imagefolder:{inner}"
        data = ra.load_data(spec, root=root)
        if data.shape == (3, 32, 32):
            # That of CIFAR, where the files do not say that it is.
            data = dataclasses.replace(data, augmentation=Augmentation(pad=4, flip=True))
        yield data


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--data", default="cifar10", show_default=True)
@click.option("--data-root", type=click.Path(path_type=Path))
@click.option("--device", default=None, help="Default: the fastest there is.")
@click.option("--only", multiple=True, type=click.Choice(list(PARTS)), help="Can be repeated.")
@click.option("--minutes", default=8.0, show_default=True, help="No part begins after so long.")
@click.option("--small", is_flag=True, help="Tiny sizes, on digits: does all of it run?")
@click.option("--output-dir", default="runs/accelerator", type=click.Path(path_type=Path))
def main(
    data: str, data_root: Path | None, device: str | None, only: tuple[str, ...], minutes: float,
    small: bool, output_dir: Path,
) -> None:  # fmt: skip
    place = resolve_device(device)
    begin = time.perf_counter()
    facts = told(place)
    print(json.dumps(facts))
    with loaded("digits" if small else data, data_root) as images:
        bench_ = Bench(images, place, small, begin + 60 * minutes)
        results: dict[str, Any] = {}
        for name in only or PARTS:
            started = time.perf_counter()
            results[name] = _part(name, bench_)
            if "left out" not in results[name]:
                results[name]["part_seconds"] = time.perf_counter() - started
            show(name, results[name])
            write_text(
                output_dir / "accelerator.json",
                json.dumps({**facts, "small": small, "results": results}, indent=1) + "\n",
            )
    print(f"\n{time.perf_counter() - begin:.0f} s; {output_dir / 'accelerator.json'}")


if __name__ == "__main__":
    main()
