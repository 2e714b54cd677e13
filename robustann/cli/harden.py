"""``robustann harden``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from robustann.cli.options import (
    check_model_file,
    check_targets,
    data_options,
    device_option,
    quiet_option,
    read_data,
    read_model,
    read_threat,
    seed_option,
    share,
    threat_options,
)


@click.command()
@click.option(
    "--model",
    "model_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A .safetensors file to harden, with its .json beside it; training goes on from there.",
)
@click.option(
    "--arch",
    metavar="NAME",
    help="Without --model: train this architecture, once plainly and once hardened.  "
    "[default: small-cnn]",
)
@data_options
@threat_options
@click.option(
    "--defense",
    "defenses",
    multiple=True,
    metavar="NAME[:OPTION=VALUE,...]",
    help="A defense (see 'robustann list defenses'); can be repeated: at most one training "
    "objective, any wrappers, any sanitizers in order.  [default: adversarial-training]",
)
@click.option("--preset", default="standard", show_default=True, metavar="NAME",
              help="Of the audits: quick, standard or thorough.")  # fmt: skip
@click.option("--epochs", type=int, help="Passes over the training part.  [default: by the data]")
@click.option("--lr", type=float, help="Peak learning rate.  [default: the defense's]")
@click.option("--max-samples", type=click.IntRange(min=1), metavar="NUMBER",
              help="Audit so many images, the same ones before and after.")  # fmt: skip
@click.option("--explain/--no-explain", default=True, show_default=True,
              help="Compute attributions.")  # fmt: skip
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="For model.safetensors, before/ and after/.  [default: runs/harden-MODEL]",
)
@seed_option
@device_option
@quiet_option
def harden(
    model_path: Path | None,
    arch: str | None,
    data_spec: str,
    data_root: Path | None,
    download: bool,
    image_size: int | None,
    norm: str,
    eps: str | None,
    defenses: tuple[str, ...],
    preset: str,
    epochs: int | None,
    lr: float | None,
    max_samples: int | None,
    explain: bool,
    output_dir: Path | None,
    seed: int,
    device: str | None,
    quiet: bool,
) -> int:
    """Harden a model, and audit it before and after, through the defense.

    \b
    Examples:
      robustann harden --model model.safetensors --data digits --eps 0.1
      robustann harden --arch small-cnn --data digits --eps 0.1 \\
          --defense trades:beta=6 --defense weight-clipping:w_max=0.2
    """
    from robustann.api import harden as run
    from robustann.auditing import get_preset
    from robustann.defenses.registry import check_together, parse_defense
    from robustann.training import TrainConfig

    chosen = [parse_defense(text) for text in defenses or ("adversarial-training",)]
    check_together(chosen)
    get_preset(preset)
    threat = read_threat(norm, eps)
    name = arch or "small-cnn" if model_path is None else model_path.stem
    folder = output_dir or Path("runs", f"harden-{name.replace(':', '-')}")
    if model_path is not None:
        check_model_file(model_path)
    check_targets(
        folder / "model.safetensors",
        *(folder / part / "results.json" for part in ("before", "after")),
    )
    model = name if model_path is None else read_model(model_path, arch, device, quiet)
    data = read_data(data_spec, data_root, download, image_size, quiet)
    result = run(
        model,
        data,
        threat,
        chosen,
        preset,
        training=TrainConfig(epochs=epochs, lr=lr, seed=seed),
        seed=seed,
        max_samples=max_samples,
        explain=explain,
        device=device,
        progress=not quiet,
        model_name=name,
        checkpoint=folder / "training.pt",
        command=shlex.join(["robustann", *sys.argv[1:]]),
        notify=lambda message: None if quiet else click.echo(message, err=True),
    )
    result.save(folder)
    if not quiet:
        compared = result.comparison
        width = max(len(stage.name) for stage in compared.stages)
        click.echo(f"{'':{width}} {'clean':>8} {'robust':>8}")
        for stage in compared.stages:
            click.echo(
                f"{stage.name:{width}} {share(stage.clean_accuracy):>8} "
                f"{share(stage.robust_accuracy):>8}"
                + ("" if stage.believable else "  (not to be believed yet; see the report)")
            )
        if compared.sanitizer_verdict is not None:
            click.echo(f"robust against all attackers of the sanitizers too: "
                       f"{share(compared.robust_accuracy)}")  # fmt: skip
        changed = compared.robust
        click.echo(
            f"robust accuracy {100 * changed.difference:+.1f} points (95 % interval "
            f"{100 * changed.interval.low:+.1f} to {100 * changed.interval.high:+.1f}, "
            f"McNemar p = {changed.p:.2g})"
        )
        click.echo(f"model: {folder / 'model.safetensors'}")
        click.echo(f"report: {folder / 'after' / 'report.html'}")
    return 0
