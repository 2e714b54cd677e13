"""What wrong bits in the weights do after plain training, clipping, and training on bit errors.

The settings are the defaults of the defenses, chosen on no test image. Each model is stored in
8-bit fixed point; ten patterns of errors. Beside it float32, with and without a guard, and how
many bits, if chosen, bring the 8-bit model down to guessing.

    python benchmarks/bit_errors.py --data digits --epochs 20
    python benchmarks/bit_errors.py --data mnist --data-root data --epochs 3 --samples 2000
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

import robustann as ra
from robustann.attacks.weights import progressive_bit_search, random_bit_errors
from robustann.defenses import BitErrorTraining, WeightClipping, WeightGuard
from robustann.files import write_text
from robustann.training import StandardStep

STEPS: dict[str, Callable[[], Any]] = {
    "plain": StandardStep,
    "clipped": lambda: WeightClipping(StandardStep()),
    "clipped, bit errors": lambda: WeightClipping(BitErrorTraining(StandardStep())),
}
RATES, FLOAT_RATE = (0.01, 0.1), 1e-3


def measure(
    step: Any, data: ra.ImageData, seed: int, epochs: int | None, samples: int
) -> dict[str, float]:
    """One model: its error clean, with wrong bits (mean and worst), and the flips that ruin it."""
    cpu = time.process_time()
    # A checkpoint chosen by clean validation accuracy: bit errors choose nothing.
    model = ra.train("small-cnn", data, step=step, seed=seed, epochs=epochs).model
    cpu = time.process_time() - cpu
    part = data.test.subset(range(min(samples, len(data.test))))
    fixed = random_bit_errors(model, part, rates=RATES)
    bare = random_bit_errors(model, part, rates=(FLOAT_RATE,), bits=32)
    guard = WeightGuard.record(model).repaired
    guarded = random_bit_errors(model, part, rates=(FLOAT_RATE,), bits=32, repair=guard)
    search = progressive_bit_search(model, part, max_flips=200, seed=seed)
    row = {"clean": fixed.clean_error, "stored": fixed.stored_error, "cpu_seconds": cpu}
    for point in fixed.points:
        row |= {f"mean {point.rate:g}": point.mean, f"worst {point.rate:g}": point.worst}
    row |= {"float32": bare.points[0].mean, "guarded": guarded.points[0].mean}
    return row | {"flips": len(search.flips), "after flips": 1 - search.accuracy}


@click.command()
@click.option("--data", "name", default="digits", show_default=True)
@click.option("--data-root", type=click.Path(path_type=Path))
@click.option("--epochs", type=int, help="Of training.  [default: by the data]")
@click.option("--seeds", default=3, show_default=True)
@click.option("--samples", default=2000, show_default=True, help="Test images.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(
    name: str,
    data_root: Path | None,
    epochs: int | None,
    seeds: int,
    samples: int,
    output: Path | None,
) -> None:
    """Train with each step and each seed, and count what wrong bits do."""
    data = ra.load_data(name, root=data_root)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    rows: dict[str, list[dict[str, float]]] = {}
    for label, make in STEPS.items():
        rows[label] = [measure(make(), data, seed, epochs, samples) for seed in range(seeds)]
        shown = {
            key: statistics.mean(row[key] for row in rows[label])
            for key in rows[label][0]
            if not key.startswith("worst")
        }
        shown |= {
            key: max(row[key] for row in rows[label])
            for key in rows[label][0]
            if key.startswith("worst")
        }
        told = (
            f"{key} {value:.1f}" if key in ("flips", "cpu_seconds") else f"{key} {value:.1%}"
            for key, value in shown.items()
        )
        print(f"{label}: {'; '.join(told)}", flush=True)
    if output is not None:
        write_text(output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
