"""``robustann attack``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from robustann.cli.options import (
    check_targets,
    data_options,
    device_option,
    model_options,
    quiet_option,
    read_model_and_data,
    read_threat,
    seed_option,
    share,
    threat_options,
)

if TYPE_CHECKING:
    from torch import Tensor

    from robustann.attacks import AttackResult
    from robustann.models.request import ModelRequest

_SHEET_COLUMNS = 12


@click.command(short_help="Make adversarial images with one attack.")
@model_options
@data_options
@threat_options
@click.option(
    "--attack",
    "attack_text",
    default="pgd",
    show_default=True,
    metavar="NAME[:OPTION=VALUE,...]",
    help="See 'robustann list attacks'.",
)
@click.option(
    "--target",
    type=click.IntRange(min=0),
    metavar="CLASS",
    help="Want this class instead of any wrong one.",
)
@click.option(
    "--max-samples",
    default=100,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="NUMBER",
    help="Attack so many test images, drawn at random; an audit of as many takes the same.",
)
@click.option(
    "--batch-size",
    default=256,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="NUMBER",
    help="Images a batch.",
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="For adversarial.npz and sheet.png.  [default: runs/attack-MODEL]",
)
@seed_option
@device_option
@quiet_option
def attack(
    request: ModelRequest,
    data_spec: str,
    data_root: Path | None,
    download: bool,
    image_size: int | None,
    norm: str,
    eps: str | None,
    attack_text: str,
    target: int | None,
    max_samples: int,
    batch_size: int,
    output_dir: Path | None,
    seed: int,
    device: str | None,
    quiet: bool,
) -> None:
    """Make adversarial images: adversarial.npz with the exact arrays, sheet.png to look at.

    \b
    Example:
      robustann attack --model model.safetensors --data digits --attack pgd:steps=100 --eps 0.1
    """
    import torch

    from robustann import api
    from robustann.attacks import parse_attack
    from robustann.attacks.engine import predict_logits
    from robustann.auditing import chosen_samples
    from robustann.errors import UsageError

    chosen = parse_attack(attack_text)
    threat = read_threat(norm, eps, targeted=target is not None)
    chosen.check(threat)
    folder = output_dir or Path("runs", f"attack-{request.name}")
    request.check()
    arrays, sheet = folder / "adversarial.npz", folder / "sheet.png"
    check_targets(arrays, sheet)
    model, data = read_model_and_data(
        request, data_spec, data_root, download, image_size, device, quiet
    )
    if target is not None and target >= data.num_classes:
        raise UsageError(
            f"expected --target from 0 to {data.num_classes - 1}, got {target}; "
            "classes are numbered from 0"
        )
    # The images that an audit of as many takes: the first of a folder are of one class alone.
    positions = chosen_samples(len(data.test), max_samples)
    images, labels = data.test.images(positions), data.test.labels[positions]
    wanted = labels if target is None else torch.full_like(labels, target)
    before = predict_logits(model, images, batch_size=batch_size, seed=seed).argmax(1)
    attempted = before == labels if target is None else before != target
    result = api.attack(chosen, model, images, wanted, threat, seed=seed, batch_size=batch_size)
    _write_arrays(arrays, images.cpu(), labels, result)
    _write_sheet(sheet, images.cpu(), result)
    if not quiet:
        won = result.success & attempted
        others = int(attempted.sum())
        rate = f" ({share(int(won.sum()) / others)})" if others else ""
        away = f", median distance {float(result.distance[won].median()):.4g}" if won.any() else ""
        click.echo(
            f"{int(result.success.sum())} of {len(labels)} images are classified "
            f"{'wrongly' if target is None else f'as class {target}'} after {chosen.label}; "
            f"{len(labels) - others} were before, success on {int(won.sum())} of the other "
            f"{others}{rate}{away}"
        )
        click.echo(f"images: {arrays}, {sheet}")


def _write_arrays(path: Path, images: Tensor, labels: Tensor, result: AttackResult) -> None:
    import numpy as np

    from robustann.files import atomic_path

    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(
            stream,
            clean=images.numpy(),
            adversarial=result.adversarial.numpy(),
            label=labels.numpy(),
            prediction=result.prediction.numpy(),
            success=result.success.numpy(),
            distance=result.distance.numpy(),
            margin=result.margin.numpy(),
        )


def _write_sheet(path: Path, images: Tensor, result: AttackResult) -> None:
    """Three rows: originals, attacked images, differences around mid-grey (scaled to the range);
    successful ones first."""
    import torch
    from torchvision.transforms.functional import resize, to_pil_image
    from torchvision.utils import make_grid

    from robustann.files import atomic_path

    order = torch.argsort(result.success.logical_not().to(torch.uint8), stable=True)
    chosen = order[:_SHEET_COLUMNS]
    clean, adversarial = images[chosen], result.adversarial[chosen]
    delta = adversarial - clean
    difference = 0.5 + delta / (2 * delta.abs().max().clamp(min=1e-6))
    rows = torch.cat([clean, adversarial, difference])
    # Tiny images are enlarged without smoothing, so that single pixels can be told apart.
    scale = max(1, 64 // max(rows.shape[-2:]))
    rows = rows.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    if max(rows.shape[-2:]) > 256:
        rows = resize(rows, [256])
    grid = make_grid(rows, nrow=len(chosen), padding=2, pad_value=1.0)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        to_pil_image(grid.clamp(0, 1)).save(stream, format="PNG")
