"""Adversarial training on MNIST, audited before and after on the same images.

    python examples/harden_mnist.py --data-root data
    python examples/harden_mnist.py --epochs 2 --train-images 2000 --samples 100

Where MNIST is not in --data-root, the bundled digits stand in, at a smaller eps.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

import robustann as ra


@click.command()
@click.option("--data-root", type=click.Path(path_type=Path), help="Where MNIST lies.")
@click.option("--defense", default="fast-adversarial-training", show_default=True)
@click.option("--epochs", default=5, show_default=True)
@click.option("--train-images", type=int, help="Train on so many alone.")
@click.option("--samples", default=300, show_default=True, help="Images to audit.")
@click.option("--preset", default="quick", show_default=True)
@click.option("--out", default="runs/example-harden", type=click.Path(path_type=Path))
def main(
    data_root: Path | None, defense: str, epochs: int, train_images: int | None, samples: int,
    preset: str, out: Path,
) -> None:  # fmt: skip
    """Harden and compare."""
    try:
        data, threat = ra.load_data("mnist", root=data_root), ra.ThreatModel("linf", 0.3)
    except ra.UsageError as error:
        print(f"{error}\nthe bundled digits stand in")
        data, threat = ra.load_data("digits"), ra.ThreatModel("linf", 0.1)
    if train_images is not None:
        data = dataclasses.replace(data, train=data.train.subset(range(train_images)))
    result = ra.harden(
        "small-cnn", data, threat, defense, preset=preset, epochs=epochs, max_samples=samples,
        notify=print,
    )  # fmt: skip
    for stage in result.comparison.stages:
        print(
            f"{stage.name:8} clean {stage.clean_accuracy:.1%}, robust {stage.robust_accuracy:.1%}"
        )
    change = result.comparison.robust
    print(f"robust accuracy {change.difference:+.1%}, McNemar p = {change.p:.2g}")
    result.save(out)
    print(f"report: {out / 'after' / 'report.html'}")


if __name__ == "__main__":
    main()
