"""Audits a torchvision model on a folder of images, a folder a class.

    python examples/audit_image_folder.py
    python examples/audit_image_folder.py --images pictures --arch torchvision:resnet50 \
        --weights resnet50.pt --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225

Without --images it writes digits as PNG files first; without --weights it trains the network on
them for a few epochs, so that there is something to audit.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from PIL import Image
from torch import nn

import robustann as ra


def make_pictures(folder: Path) -> None:
    """Digits as PNG files of 32 pixels, a folder a class, train and test apart."""
    digits = ra.load_data("digits")
    for part, split in (("train", digits.train), ("test", digits.test)):
        for position, label in enumerate(split.labels.tolist()):
            path = folder / part / digits.class_names[label] / f"{position:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = (split.images([position])[0, 0].numpy() * 255).astype(np.uint8)
            Image.fromarray(grey).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR).save(
                path
            )


def numbers(text: str | None) -> list[float] | None:
    """``0.5,0.5,0.5`` as numbers."""
    return None if text is None else [float(part) for part in text.split(",")]


@click.command()
@click.option("--images", type=click.Path(path_type=Path), help="FOLDER/train and FOLDER/test.")
@click.option("--arch", default="torchvision:shufflenet_v2_x0_5", show_default=True)
@click.option("--weights", type=click.Path(path_type=Path), help="A state dict or safetensors.")
@click.option("--mean", help="What the network was trained with, for example 0.5,0.5,0.5.")
@click.option("--std")
@click.option("--eps", default="4/255", show_default=True)
@click.option("--preset", default="quick", show_default=True)
@click.option("--samples", default=30, show_default=True, help="Images to audit.")
@click.option("--epochs", default=4, show_default=True, help="Where the network is trained here.")
@click.option("--out", default="runs/example-folder", type=click.Path(path_type=Path))
def main(
    images: Path | None, arch: str, weights: Path | None, mean: str | None, std: str | None,
    eps: str, preset: str, samples: int, epochs: int, out: Path,
) -> None:  # fmt: skip
    """Load, audit, write the report."""
    if images is None:
        images = out / "images"
        if not images.exists():
            make_pictures(images)
    data = ra.load_data(f"imagefolder:{images}")
    model: nn.Module
    if weights is None:
        model = ra.train(arch, data, epochs=epochs).model
    else:
        model = ra.load_model(weights, arch=arch, shape=data.test.shape,
                              class_names=data.class_names, mean=numbers(mean),
                              std=numbers(std))  # fmt: skip
    # eps as text is read as what it says.
    threat = ra.ThreatModel("linf", eps=eps)  # type: ignore[arg-type]
    result = ra.audit(model, data, threat, preset=preset, max_samples=samples)
    result.save(out)
    result.save_report(out / "report.html")
    print(f"clean {result.clean_accuracy:.1%}, robust {result.robust_accuracy:.1%} of {result.n}")
    if not result.believable:
        print("not to be believed yet:", *(f.check for f in result.findings if f.verdict == "fail"))
    print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    main()
