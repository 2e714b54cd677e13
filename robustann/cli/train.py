"""``robustann train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from robustann.cli.options import (
    check_targets,
    data_options,
    device_option,
    quiet_option,
    read_data,
    seed_option,
    share,
)
from robustann.cli.training_options import training_config, training_options


@click.command(short_help="Train a classifier.")
@data_options
@click.option(
    "--arch",
    default="small-cnn",
    show_default=True,
    metavar="NAME",
    help="An architecture (see 'robustann list models') or pkg.module:factory.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The model file to write.  [default: runs/DATA-ARCH/model.safetensors]",
)
@training_options
@click.option("--resume", is_flag=True, help="Go on from the checkpoint of a stopped run.")
@seed_option
@device_option
@quiet_option
def train(
    data_spec: str,
    data_root: Path | None,
    download: bool,
    image_size: int | None,
    arch: str,
    out: Path | None,
    resume: bool,
    seed: int,
    device: str | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Train a classifier and write it as .safetensors with a .json beside it.

    Checkpoints (FILE.checkpoint.pt) and a log (FILE.log.jsonl) are kept beside it, so that a
    stopped run can go on with --resume and ends as if it had not been stopped.

    \b
    Examples:
      robustann train --data mnist --data-root data --download --out mnist.safetensors
      torchrun --nproc-per-node 8 -m robustann train --data cifar10 --batch-size 512
    """
    from robustann.errors import UsageError
    from robustann.launch import world
    from robustann.models import save_model
    from robustann.training import TrainConfig
    from robustann.training import train as run

    # Of several processes one speaks, and writes.
    first = world().rank == 0
    quiet = quiet or not first
    config = training_config(settings, seed) or TrainConfig(seed=seed)
    if out is None:
        name = "".join(c if c.isalnum() or c == "-" else "-" for c in f"{data_spec}-{arch}")
        out = Path("runs", name, "model.safetensors")
    if out.suffix != ".safetensors":
        raise UsageError(f"expected --out FILE.safetensors, got '{out}'; change the ending")
    checkpoint, log = out.with_suffix(".checkpoint.pt"), out.with_suffix(".log.jsonl")
    check_targets(out, out.with_suffix(".json"), checkpoint, log)
    data = read_data(data_spec, data_root, download, image_size, quiet)
    result = run(
        arch,
        data,
        config=config,
        device=device,
        checkpoint=checkpoint,
        keep_checkpoint=True,
        log=log,
        resume=resume,
        progress=not quiet,
    )
    if not first:
        return
    save_model(result.model, out, training=result.training, metrics=result.metrics)
    # Only now: where saving fails, --resume saves again without training again.
    checkpoint.unlink(missing_ok=True)
    if not quiet:
        metrics = result.metrics
        click.echo(
            f"test accuracy {share(metrics['accuracy'])}, precision {share(metrics['precision'])}, "
            f"recall {share(metrics['recall'])}, F1 {share(metrics['f1'])} (macro) on "
            f"{metrics['test_size']} images; best epoch {result.best_epoch} of "
            f"{result.epochs_run}, {result.seconds:.0f} s"
        )
        click.echo(f"model: {out}")
