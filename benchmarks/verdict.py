"""The verdict of ``standard`` beside AutoAttack's: robust accuracy and propagations an image.

Both see the same images of each model, those that it classifies correctly. AutoAttack is
torchattacks' (Kim, 2020); its forwards and backwards are counted by a wrapper, ours by the engine.
Without ``--model`` it trains three small MNIST models first: with PGD, with TRADES, and with a
single step, which masks gradients.

    python benchmarks/verdict.py --data-root data --samples 500
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import click
import torch
from counting import Counting
from torch import nn

import robustann as ra
from robustann.attacks.engine import predict_logits
from robustann.defenses import TRADES, AdversarialTraining
from robustann.files import write_text


def trained(data: ra.ImageData, threat: ra.ThreatModel, images: int) -> dict[str, nn.Module]:
    """Small CNNs, trained with PGD, with TRADES, and with a single step, unwatched."""
    part = dataclasses.replace(data, train=data.train.subset(range(images)))
    single = ra.PGD(steps=1)
    steps: dict[str, Any] = {
        "pgd-trained": AdversarialTraining(ra.PGD(steps=7), threat),
        "trades-trained": TRADES(threat),
        # Masked gradients are what this one is for.
        "single-step-trained": AdversarialTraining(
            single, threat, watch=False, validation_attack=single
        ),
    }
    return {
        name: ra.train("small-cnn", part, step=step, epochs=8).model for name, step in steps.items()
    }


def compare(
    model: nn.Module, data: ra.ImageData, threat: ra.ThreatModel, samples: int, preset: str
) -> dict[str, Any]:
    """One row of the table."""
    import torchattacks

    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    x, y = data.test.images(order[:samples]), data.test.labels[order[:samples]]
    correct = predict_logits(model, x).argmax(1) == y

    begin = time.perf_counter()
    ours = ra.audit(model, (x, y), threat, preset=preset, curve=False, explain=False, trust=False)
    our_seconds = time.perf_counter() - begin

    counting = Counting(model).eval()
    peer = torchattacks.AutoAttack(
        counting, norm=threat.norm.capitalize(), eps=threat.eps, n_classes=data.num_classes, seed=0
    )
    begin = time.perf_counter()
    adversarial = peer(x[correct], y[correct])
    peer_seconds = time.perf_counter() - begin
    adversarial = threat.project(adversarial, x[correct])
    standing = predict_logits(model, adversarial).argmax(1) == y[correct]
    return {
        "clean": float(correct.float().mean()),
        "robust": ours.robust_accuracy,
        "robust_autoattack": int(standing.sum()) / samples,
        "propagations": ours.propagations / samples,
        "propagations_autoattack": counting.propagations / samples,
        "seconds": our_seconds,
        "seconds_autoattack": peer_seconds,
    }


@click.command()
@click.option("--model", "models", multiple=True, type=click.Path(path_type=Path))
@click.option("--data", default="mnist", show_default=True)
@click.option("--data-root", type=click.Path(path_type=Path))
@click.option("--norm", default="linf", show_default=True)
@click.option("--eps", default="0.3", show_default=True)
@click.option("--samples", default=500, show_default=True)
@click.option("--preset", default="standard", show_default=True)
@click.option("--train-images", default=24_000, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(
    models: tuple[Path, ...],
    data: str,
    data_root: Path | None,
    norm: Any,
    eps: Any,
    samples: int,
    preset: str,
    train_images: int,
    output: Path | None,
) -> None:
    """Compare the verdict of a preset with AutoAttack's on the same images."""
    images, threat = ra.load_data(data, root=data_root), ra.ThreatModel(norm, eps)
    subjects: dict[str, nn.Module] = {path.stem: ra.load_model(path) for path in models}
    subjects = subjects or trained(images, threat, train_images)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{'model':24} {'clean':>7} {'robust':>7} {'AA':>7} {'passes':>8} {'AA':>8} {'ratio':>6}")
    rows = {}
    for name, model in subjects.items():
        row = rows[name] = compare(model, images, threat, samples, preset)
        ratio = row["propagations_autoattack"] / row["propagations"]
        print(
            f"{name:24} {row['clean']:7.1%} {row['robust']:7.1%} {row['robust_autoattack']:7.1%} "
            f"{row['propagations']:8.0f} {row['propagations_autoattack']:8.0f} {ratio:6.1f}",
            flush=True,
        )
    if output is not None:
        write_text(output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
