"""The verdict of ``standard`` beside AutoAttack's: robust accuracy and propagations an image.

Both see the same images of each model, those that it classifies correctly. AutoAttack is
torchattacks' (Kim, 2020); its forwards and backwards are counted by a wrapper, ours by the engine.
A setting is a kind of model: it is trained first. ``--model`` takes one that was trained before.

    python benchmarks/verdict.py --list
    python benchmarks/verdict.py --setting strided-pgd --data-root data --samples 200
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from counting import Counting
from torch import nn

import robustann as ra
from robustann.attacks.engine import predict_logits
from robustann.defenses import MART, TRADES, AdversarialTraining, FastAdversarialTraining
from robustann.files import write_text


def strided_cnn(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """Half as wide as the small CNN: the network that Wong and Kolter (2018) certify on MNIST."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


def pooling_cnn(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """Narrow, with maxima in place of strides: attacks find its gradients harder to follow."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 8, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (height // 4) * (width // 4), 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


NETWORKS: dict[str, Callable[[tuple[int, int, int], int], nn.Module] | None] = {
    "small-cnn": None,
    "strided": strided_cnn,
    "pooling": pooling_cnn,
}


def _pgd(steps: int) -> Callable[[ra.ThreatModel], Any]:
    # Unwatched: where few steps mask the gradients, that is what the row is about.
    attack = ra.PGD(steps=steps)
    return lambda threat: AdversarialTraining(attack, threat, watch=False, validation_attack=attack)


def _fgsm(threat: ra.ThreatModel) -> Any:
    return AdversarialTraining(ra.FGSM(), threat, watch=False, validation_attack=ra.FGSM())


def _fgsm_rs(threat: ra.ThreatModel) -> Any:
    return FastAdversarialTraining(threat, watch=False, validation_attack=ra.FGSM())


@dataclasses.dataclass(frozen=True)
class Setting:
    """A kind of model: the network, how it is trained, and for how many epochs of MNIST."""

    network: str
    step: Callable[[ra.ThreatModel], Any]
    epochs: int


SETTINGS = {
    "small-cnn-pgd": Setting("small-cnn", _pgd(7), 8),
    "pooling-trades": Setting("pooling", TRADES, 8),
    "pooling-two-step": Setting("pooling", _pgd(2), 8),
    "strided-pgd": Setting("strided", _pgd(7), 8),
    "strided-trades": Setting("strided", TRADES, 8),
    "pooling-pgd": Setting("pooling", _pgd(7), 8),
    "strided-mart": Setting("strided", lambda threat: MART(ra.PGD(steps=5), threat), 8),
    "small-cnn-single-step": Setting("small-cnn", _pgd(1), 8),
    "small-cnn-two-step": Setting("small-cnn", _pgd(2), 8),
    "small-cnn-fgsm-rs": Setting("small-cnn", _fgsm_rs, 2),
    "strided-fgsm-rs": Setting("strided", _fgsm_rs, 8),
    "pooling-fgsm-rs": Setting("pooling", _fgsm_rs, 3),
    "strided-fgsm": Setting("strided", _fgsm, 8),
}


def trained(setting: Setting, data: ra.ImageData, threat: ra.ThreatModel) -> nn.Module:
    """A model of this kind, from fixed seeds."""
    make = NETWORKS[setting.network]
    model: nn.Module | str = setting.network
    if make is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make(data.test.shape, data.num_classes)
    return ra.train(model, data, step=setting.step(threat), epochs=setting.epochs).model


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
@click.option("--setting", "names", multiple=True, default=["small-cnn-pgd"], show_default=True)
@click.option("--list", "listing", is_flag=True, help="Print the settings and stop.")
@click.option("--epochs", type=int, help="Train for so many instead; digits take 60.")
@click.option("--model", "models", multiple=True, type=click.Path(path_type=Path))
@click.option("--data", default="mnist", show_default=True)
@click.option("--data-root", type=click.Path(path_type=Path))
@click.option("--norm", default="linf", show_default=True)
@click.option("--eps", default="0.3", show_default=True)
@click.option("--samples", default=500, show_default=True)
@click.option("--preset", default="standard", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(
    names: tuple[str, ...],
    listing: bool,
    epochs: int | None,
    models: tuple[Path, ...],
    data: str,
    data_root: Path | None,
    norm: Any,
    eps: Any,
    samples: int,
    preset: str,
    output: Path | None,
) -> None:
    """Compare the verdict of a preset with AutoAttack's on the same images."""
    unknown = sorted(set(names) - SETTINGS.keys())
    if unknown:
        raise click.BadParameter(f"expected some of {', '.join(SETTINGS)}, got {unknown[0]}")
    if listing:
        for name, one in SETTINGS.items():
            print(f"{name:22} {one.network}, {one.epochs} epochs")
        return
    settings = {
        name: dataclasses.replace(SETTINGS[name], epochs=epochs or SETTINGS[name].epochs)
        for name in names
    }
    images, threat = ra.load_data(data, root=data_root), ra.ThreatModel(norm, eps)
    subjects: dict[str, Callable[[], nn.Module]] = {
        path.stem: lambda path=path: ra.load_model(path) for path in models
    } or {name: lambda one=one: trained(one, images, threat) for name, one in settings.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{'model':22} {'clean':>7} {'robust':>7} {'AA':>7} {'passes':>8} {'AA':>8} {'ratio':>6}")
    rows = {}
    for name, model in subjects.items():
        row = rows[name] = compare(model(), images, threat, samples, preset)
        ratio = row["propagations_autoattack"] / row["propagations"]
        print(
            f"{name:22} {row['clean']:7.1%} {row['robust']:7.1%} {row['robust_autoattack']:7.1%} "
            f"{row['propagations']:8.0f} {row['propagations_autoattack']:8.0f} {ratio:6.1f}",
            flush=True,
        )
    if output is not None:
        write_text(output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
