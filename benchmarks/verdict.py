"""The verdict of ``standard`` beside AutoAttack's: robust accuracy and propagations an image.

Both see the same images of each model, those that it classifies correctly. AutoAttack's four
attacks are torchattacks' (Kim, 2020) with the published steps; their forwards and backwards are
counted by a wrapper, ours by the engine. A setting is a kind of model: it is trained first.
``--model`` takes one that was trained before. A suite is the settings of one table, with its data
and threat; single ones can be given otherwise.

    python benchmarks/verdict.py --list
    python benchmarks/verdict.py --suite digits
    python benchmarks/verdict.py --suite cifar10 --data imagefolder:cifar10
    python benchmarks/verdict.py --setting strided-pgd --data-root data --samples 200
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from counting import Counting
from torch import nn

import robustann as ra
from robustann.attacks.engine import predict_logits
from robustann.data.splits import Split
from robustann.defenses import MART, TRADES, AdversarialTraining, FastAdversarialTraining
from robustann.files import write_text
from robustann.models.blocks import head, stage


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


def residual(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """Three pre-activation blocks with batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, stride=2, padding=1, bias=False),
        stage(16, 16, 1, 1),
        stage(16, 32, 2, 1),
        stage(32, 64, 2, 1),
        head(64, classes),
    )


NETWORKS: dict[str, Callable[[tuple[int, int, int], int], nn.Module] | None] = {
    "small-cnn": None,
    "strided": strided_cnn,
    "pooling": pooling_cnn,
    "residual": residual,
}


def _pgd(steps: int) -> Callable[[ra.ThreatModel], Any]:
    # Unwatched: where few steps mask the gradients, that is what the row is about.
    attack = ra.PGD(steps=steps)
    return lambda threat: AdversarialTraining(attack, threat, watch=False, validation_attack=attack)


def _fgsm(threat: ra.ThreatModel) -> Any:
    return AdversarialTraining(ra.FGSM(), threat, watch=False, validation_attack=ra.FGSM())


def _fgsm_rs(threat: ra.ThreatModel) -> Any:
    return FastAdversarialTraining(threat, watch=False, validation_attack=ra.FGSM())


def _mart(threat: ra.ThreatModel) -> Any:
    return MART(ra.PGD(steps=5), threat)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A kind of model: the network, how it is trained, and for how many epochs."""

    network: str
    step: Callable[[ra.ThreatModel], Any]
    epochs: int


@dataclasses.dataclass(frozen=True)
class Suite:
    """The settings of one table, and what they are trained and attacked on.

    ``images`` is how many are trained on, drawn from the training part; None takes all.
    """

    settings: Mapping[str, Setting]
    data: str
    norm: str
    eps: str
    samples: int
    seeds: int = 1
    images: int | None = None


_GREY = {
    "small-cnn-pgd": Setting("small-cnn", _pgd(7), 8),
    "pooling-trades": Setting("pooling", TRADES, 8),
    "pooling-two-step": Setting("pooling", _pgd(2), 8),
    "strided-pgd": Setting("strided", _pgd(7), 8),
    "strided-trades": Setting("strided", TRADES, 8),
    "pooling-pgd": Setting("pooling", _pgd(7), 8),
    "strided-mart": Setting("strided", _mart, 8),
    "small-cnn-single-step": Setting("small-cnn", _pgd(1), 8),
    "small-cnn-two-step": Setting("small-cnn", _pgd(2), 8),
    "small-cnn-fgsm-rs": Setting("small-cnn", _fgsm_rs, 2),
    "strided-fgsm-rs": Setting("strided", _fgsm_rs, 8),
    "pooling-fgsm-rs": Setting("pooling", _fgsm_rs, 3),
    "strided-fgsm": Setting("strided", _fgsm, 8),
}

SUITES = {
    "mnist": Suite(_GREY, "mnist", "linf", "0.3", 500),
    "digits": Suite(
        {name: dataclasses.replace(one, epochs=60) for name, one in _GREY.items()},
        "digits",
        "linf",
        "0.1",
        200,
    ),
    # No stage of a preset was chosen on what follows.
    "cifar10": Suite(
        {
            "residual-pgd": Setting("residual", _pgd(7), 15),
            "small-cnn-pgd": Setting("small-cnn", _pgd(7), 15),
            "residual-fgsm-rs": Setting("residual", _fgsm_rs, 20),
            "strided-fgsm": Setting("strided", _fgsm, 20),
        },
        "cifar10",
        "linf",
        "8/255",
        200,
        seeds=2,
        images=10_000,
    ),
    "cifar10-l2": Suite(
        {
            "residual-pgd": Setting("residual", _pgd(7), 15),
            "strided-pgd": Setting("strided", _pgd(7), 15),
        },
        "cifar10",
        "l2",
        "0.5",
        200,
        seeds=2,
        images=10_000,
    ),
    "mnist-l2": Suite(
        {"strided-pgd": Setting("strided", _pgd(7), 4)},
        "mnist",
        "l2",
        "2.0",
        100,
        seeds=2,
        images=20_000,
    ),
}


def fewer(data: ra.ImageData, images: int | None) -> ra.ImageData:
    """The same data with so many images to train on, and a tenth as many to validate on."""
    if images is None:
        return data

    def drawn(part: Split, size: int) -> Split:
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
        return part.subset(order[:size])

    return dataclasses.replace(
        data, train=drawn(data.train, images), validation=drawn(data.validation, images // 10)
    )


def trained(setting: Setting, data: ra.ImageData, threat: ra.ThreatModel) -> nn.Module:
    """A model of this kind, from fixed seeds."""
    make = NETWORKS[setting.network]
    model: nn.Module | str = setting.network
    if make is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make(data.test.shape, data.num_classes)
    return ra.train(model, data, step=setting.step(threat), epochs=setting.epochs).model


def autoattack(model: nn.Module, threat: ra.ThreatModel, classes: int, steps: int = 100) -> Any:
    """torchattacks' AutoAttack "standard", by default with the steps that were published.

    Its own class of that name leaves the three gradient attacks at ten ``steps``.
    """
    import torchattacks

    shared = {"eps": threat.eps, "norm": threat.norm.capitalize(), "seed": 0, "n_restarts": 1}
    return torchattacks.MultiAttack(
        [
            torchattacks.APGD(model, steps=steps, loss="ce", **shared),
            torchattacks.APGDT(model, steps=steps, n_classes=classes, **shared),
            torchattacks.FAB(model, steps=steps, multi_targeted=True, n_classes=classes, **shared),
            torchattacks.Square(model, n_queries=5000, **shared),
        ]
    )


def compare(
    model: nn.Module,
    data: ra.ImageData,
    threat: ra.ThreatModel,
    samples: int,
    preset: str,
    seeds: int = 1,
    steps: int = 100,
) -> dict[str, Any]:
    """One row of the table.

    ``robust`` and the costs of the preset are of seed 0, ``robust_seeds`` of each. ``only_here``
    and ``only_autoattack`` are, for each seed, the test images that one broke and the other did
    not.
    """
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:samples]
    x, y = data.test.images(order), data.test.labels[order]
    correct = predict_logits(model, x).argmax(1) == y

    audits, seconds = [], []
    for seed in range(seeds):
        begin = time.perf_counter()
        audits.append(
            ra.audit(
                model,
                (x, y),
                threat,
                preset=preset,
                seed=seed,
                curve=False,
                explain=False,
                trust=False,
            )
        )
        seconds.append(time.perf_counter() - begin)

    counting = Counting(model).eval()
    peer = autoattack(counting, threat, data.num_classes, steps)
    begin = time.perf_counter()
    adversarial = peer(x[correct], y[correct])
    peer_seconds = time.perf_counter() - begin
    adversarial = threat.project(adversarial, x[correct])
    standing = predict_logits(model, adversarial).argmax(1) == y[correct]
    by_peer = set(order[correct][~standing].tolist())
    broken = []
    for one in audits:
        place = dict(zip(one.clean_samples.index, one.worst_case.broken_by, strict=True))
        broken.append({int(order[row]) for row, by in place.items() if by is not None})
    return {
        "clean": float(correct.float().mean()),
        "robust": audits[0].robust_accuracy,
        "robust_seeds": [one.robust_accuracy for one in audits],
        "robust_autoattack": int(standing.sum()) / samples,
        "only_here": [sorted(one - by_peer) for one in broken],
        "only_autoattack": [sorted(by_peer - one) for one in broken],
        "propagations": audits[0].propagations / samples,
        "propagations_autoattack": counting.propagations / samples,
        "seconds": seconds[0],
        "seconds_autoattack": peer_seconds,
    }


@click.command()
@click.option(
    "--suite", "name", type=click.Choice(list(SUITES)), default="mnist", show_default=True
)
@click.option("--setting", "names", multiple=True, help="These alone of the suite.")
@click.option("--list", "listing", is_flag=True, help="Print the settings and stop.")
@click.option("--epochs", type=int, help="Train for so many instead.")
@click.option("--model", "models", multiple=True, type=click.Path(path_type=Path))
@click.option("--data", help="Instead of the suite's, as are --norm, --eps and --samples.")
@click.option("--data-root", type=click.Path(path_type=Path))
@click.option("--norm")
@click.option("--eps")
@click.option("--samples", type=int)
@click.option("--preset", default="standard", show_default=True)
@click.option("--seeds", type=int, help="Audit with so many seeds.")
@click.option(
    "--steps",
    default=100,
    show_default=True,
    help="Of AutoAttack's gradient attacks; torchattacks: 10.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(
    name: str,
    names: tuple[str, ...],
    listing: bool,
    epochs: int | None,
    models: tuple[Path, ...],
    data: str | None,
    data_root: Path | None,
    norm: Any,
    eps: Any,
    samples: int | None,
    preset: str,
    seeds: int | None,
    steps: int,
    output: Path | None,
) -> None:
    """Compare the verdict of a preset with AutoAttack's on the same images."""
    suite = SUITES[name]
    unknown = sorted(set(names) - suite.settings.keys())
    if unknown:
        raise click.BadParameter(f"expected some of {', '.join(suite.settings)}, got {unknown[0]}")
    if listing:
        for title, shown in SUITES.items():
            print(f"{title}: {shown.data}, {shown.norm} {shown.eps}")
            for setting, one in shown.settings.items():
                print(f"  {setting:22} {one.network}, {one.epochs} epochs")
        return
    settings = {
        one: dataclasses.replace(suite.settings[one], epochs=epochs or suite.settings[one].epochs)
        for one in names or suite.settings
    }
    images = fewer(ra.load_data(data or suite.data, root=data_root), suite.images)
    threat = ra.ThreatModel(norm or suite.norm, eps or suite.eps)
    samples, seeds = samples or suite.samples, seeds or suite.seeds
    subjects: dict[str, Callable[[], nn.Module]] = {
        path.stem: lambda path=path: ra.load_model(path) for path in models
    } or {
        one: lambda setting=setting: trained(setting, images, threat)
        for one, setting in settings.items()
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(
        f"{'model':22} {'clean':>7} {'AA':>7} {'passes':>8} {'passes':>8} {'ratio':>6} "
        f"{'robust (images that AA alone broke, that AA did not)':>8}"
    )
    rows = {}
    for title, model in subjects.items():
        row = rows[title] = compare(model(), images, threat, samples, preset, seeds, steps)
        ratio = row["propagations_autoattack"] / row["propagations"]
        robust = ", ".join(
            f"{one:.1%} ({len(theirs)}, {len(ours)})"
            for one, theirs, ours in zip(
                row["robust_seeds"], row["only_autoattack"], row["only_here"], strict=True
            )
        )
        print(
            f"{title:22} {row['clean']:7.1%} {row['robust_autoattack']:7.1%} "
            f"{row['propagations_autoattack']:8.0f} {row['propagations']:8.0f} {ratio:6.1f} "
            f"{robust}",
            flush=True,
        )
    if output is not None:
        write_text(output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
