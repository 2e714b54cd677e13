"""What adversarial training reaches, and what it costs: train, then audit with ``standard``.

Each setting was chosen by robust accuracy on the validation part alone; the test part is audited
once for each seed. Beside wall time stands processor time, which tells more on a busy machine.

    python benchmarks/hardening.py --list
    python benchmarks/hardening.py --setting digits --seeds 3
    python benchmarks/hardening.py --setting mnist-0.3 --data-root data --samples 1000
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

import robustann as ra
from robustann.defenses import (
    MART,
    TRADES,
    AdversarialTraining,
    AdversarialWeightPerturbation,
    FastAdversarialTraining,
    FreeAdversarialTraining,
    NoisyFastAdversarialTraining,
)
from robustann.files import write_text


@dataclass(frozen=True)
class Setting:
    """What is trained, on what, and how."""

    data: str
    eps: float
    step: Callable[[ra.ThreatModel], Any] | None
    training: dict[str, Any] = field(default_factory=dict)
    # Epochs of five-step PGD that follow, on the model that the first training gave.
    tuning: int = 0


def _settings() -> dict[str, Setting]:
    long = {"epochs": 20, "lr": 0.1, "batch_size": 32}
    steps: dict[str, Callable[[ra.ThreatModel], Any] | None] = {
        "standard": None,
        "pgd": lambda threat: AdversarialTraining(ra.PGD(steps=7), threat),
        "fast": FastAdversarialTraining,
        "n-fgsm": NoisyFastAdversarialTraining,
        "free": lambda threat: FreeAdversarialTraining(threat, replays=4),
        "trades": TRADES,
        "mart": lambda threat: MART(ra.PGD(steps=7), threat),
        "awp": lambda threat: AdversarialWeightPerturbation(
            AdversarialTraining(ra.PGD(steps=7), threat)
        ),
    }
    digits = {
        f"digits-{name}": Setting(
            "digits", 0.1, step, {**long, "epochs": 5} if name == "free" else long
        )
        for name, step in steps.items()
    }
    # Steps of half the radius: more robust for the same price than the usual 2.5 * eps / steps.
    three = ra.PGD(steps=3, step_size=0.15)
    whole = {"channels_last": True}
    return {
        "digits": digits["digits-n-fgsm"],
        "mnist-0.1-float32": Setting(
            "mnist",
            0.1,
            lambda threat: NoisyFastAdversarialTraining(threat, eps_warmup_epochs=0),
            {"epochs": 3, "lr": 0.1, **whole},
        ),
        "mnist-0.1": Setting(
            "mnist",
            0.1,
            lambda threat: NoisyFastAdversarialTraining(threat, eps_warmup_epochs=0),
            {"epochs": 2, "lr": 0.1, "precision": "bf16"},
        ),
        "mnist-0.3-single": Setting("mnist", 0.3, FastAdversarialTraining, {"epochs": 5, **whole}),
        "mnist-0.3-tuned": Setting(
            "mnist", 0.3, FastAdversarialTraining, {"epochs": 5, **whole}, tuning=4
        ),
        "mnist-0.3": Setting(
            "mnist",
            0.3,
            lambda threat: AdversarialTraining(three, threat),
            {"epochs": 6, "precision": "bf16"},
        ),
        "mnist-0.3-long": Setting(
            "mnist",
            0.3,
            lambda threat: AdversarialTraining(three, threat),
            {"epochs": 15, "precision": "bf16"},
        ),
        **digits,
    }


def measure(
    setting: Setting, seed: int, data_root: Path | None, samples: int | None
) -> dict[str, Any]:
    """One row: train with this seed, then audit the model of the best epoch, and of the last."""
    data, threat = ra.load_data(setting.data, root=data_root), ra.ThreatModel("linf", setting.eps)
    step = setting.step(threat) if setting.step is not None else None
    wall, cpu = time.perf_counter(), time.process_time()
    result = ra.train("small-cnn", data, step=step, seed=seed, **setting.training)
    if setting.tuning:
        tuner = AdversarialTraining(ra.PGD(steps=5), threat, eps_warmup_epochs=0)
        again = {**setting.training, "epochs": setting.tuning}
        result = ra.train(result.model, data, step=tuner, seed=seed, **again)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu

    def audited() -> ra.AuditResult:
        return ra.audit(
            result.model,
            data,
            threat,
            preset="standard",
            explain=False,
            curve=False,
            trust=False,
            max_samples=samples,
        )

    best = audited()
    result.model.load_state_dict(result.last_weights)
    last = audited() if result.best_epoch != result.epochs_run else best
    return {
        "seed": seed,
        "clean": best.clean_accuracy,
        "robust": best.robust_accuracy,
        "robust_last": last.robust_accuracy,
        "validation": result.metrics.get("validation_robust_accuracy"),
        "best_epoch": result.best_epoch,
        "events": result.training["events"],
        "seconds": wall,
        "cpu_seconds": cpu,
    }


@click.command()
@click.option("--setting", "names", multiple=True, default=["digits"], show_default=True)
@click.option("--list", "listing", is_flag=True, help="Print the settings and stop.")
@click.option("--data-root", type=click.Path(path_type=Path))
@click.option("--seeds", default=3, show_default=True)
@click.option("--first-seed", default=0, show_default=True)
@click.option("--samples", type=int, help="Audit so many test images.  [default: all]")
@click.option("--output", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(
    names: tuple[str, ...],
    listing: bool,
    data_root: Path | None,
    seeds: int,
    first_seed: int,
    samples: int | None,
    output: Path | None,
) -> None:
    """Train with each setting and each seed, and audit what came out."""
    settings = _settings()
    unknown = sorted(set(names) - settings.keys())
    if unknown:
        raise click.BadParameter(f"expected some of {', '.join(settings)}, got {unknown[0]}")
    if listing:
        for name, setting in settings.items():
            then = f", then {setting.tuning} of PGD-5" if setting.tuning else ""
            print(f"{name:18} {setting.data}, linf {setting.eps:g}, {setting.training}{then}")
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{'setting':18} {'clean':>7} {'robust':>14} {'last':>7} {'seconds':>8} {'cpu':>6}")
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        found = [
            measure(settings[name], seed, data_root, samples)
            for seed in range(first_seed, first_seed + seeds)
        ]
        rows[name] = found

        def mean(key: str, found: list[dict[str, Any]] = found) -> float:
            return float(statistics.mean(row[key] for row in found))

        spread = statistics.stdev(row["robust"] for row in found) if seeds > 1 else 0.0
        print(
            f"{name:18} {mean('clean'):7.1%} {mean('robust'):7.1%} ± {spread:4.1%} "
            f"{mean('robust_last'):7.1%} {mean('seconds'):8.1f} {mean('cpu_seconds'):6.1f}",
            flush=True,
        )
    if output is not None:
        write_text(output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
