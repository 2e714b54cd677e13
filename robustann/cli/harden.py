"""``robustann harden``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robustann.cli.options import (
    check_targets,
    data_options,
    device_option,
    quiet_option,
    read_data,
    read_model_and_data,
    read_threat,
    seed_option,
    share,
    start_options,
    threat_options,
)
from robustann.cli.training_options import training_config, training_options

if TYPE_CHECKING:
    from torch import nn

    from robustann.hardening import HardenResult
    from robustann.models.request import ModelRequest


@click.command(short_help="Harden a model, and audit it before and after.")
@start_options
@data_options
@threat_options
@click.option(
    "--defense",
    "defenses",
    multiple=True,
    metavar="NAME[:OPTION=VALUE,...]",
    help="A defense (see 'robustann list defenses'); can be repeated: at most one training "
    "objective, any wrappers, any sanitizers in order, a detector.  "
    "[default: adversarial-training]",
)
@click.option("--preset", default="standard", show_default=True, metavar="NAME",
              help="Of the audits: quick, standard or thorough.")  # fmt: skip
@training_options
@click.option("--max-samples", type=click.IntRange(min=1), metavar="NUMBER",
              help="Audit so many images, the same ones before and after.")  # fmt: skip
@click.option("--budget", type=click.IntRange(min=1), metavar="NUMBER",
              help="Propagations that an image may cost in the attacks of an audit.")  # fmt: skip
@click.option("--trust/--no-trust", default=True, show_default=True,
              help="Check that the audits can be believed, and adapt the attacks where "
              "they would be misled.")  # fmt: skip
@click.option("--weights", is_flag=True,
              help="Ask too what wrong bits in the weights do, before and after.")  # fmt: skip
@click.option("--certify", is_flag=True,
              help="Prove too what no attack can break, before and after.")  # fmt: skip
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
    request: ModelRequest,
    data_spec: str,
    data_root: Path | None,
    download: bool,
    image_size: int | None,
    norm: str,
    eps: str | None,
    defenses: tuple[str, ...],
    preset: str,
    max_samples: int | None,
    budget: int | None,
    trust: bool,
    weights: bool,
    certify: bool,
    explain: bool,
    output_dir: Path | None,
    seed: int,
    device: str | None,
    quiet: bool,
    **settings: Any,
) -> int:
    """Harden a model, and audit it before and after, through the defense.

    What is done is kept in OUTPUT/unfinished: stopped, the same command goes on from there.

    \b
    Examples:
      robustann harden --model model.safetensors --data digits --eps 0.1
      robustann harden --arch small-cnn --data digits --eps 0.1 \\
          --defense trades:beta=6 --defense weight-clipping:w_max=0.2
    """
    from robustann.api import harden as run
    from robustann.auditing import get_preset
    from robustann.defenses.registry import check_together, parse_defense
    from robustann.launch import world

    # Of several processes one speaks, and writes.
    first = world().rank == 0
    quiet = quiet or not first
    chosen = [parse_defense(text) for text in defenses or ("adversarial-training",)]
    check_together(chosen)
    get_preset(preset)
    threat = read_threat(norm, eps)
    name = request.name if request.given else request.arch or "small-cnn"
    folder = output_dir or Path("runs", f"harden-{name.replace(':', '-')}")
    if request.given:
        request.check()
    check_targets(
        folder / "model.safetensors",
        *(folder / part / "results.json" for part in ("before", "after")),
    )
    model: nn.Module | str = name
    if request.given:
        model, data = read_model_and_data(
            request, data_spec, data_root, download, image_size, device, quiet
        )
    else:
        data = read_data(data_spec, data_root, download, image_size, quiet)
    result = run(
        model,
        data,
        threat,
        chosen,
        preset,
        training=training_config(settings, seed),
        seed=seed,
        max_samples=max_samples,
        budget=budget,
        trust=trust,
        weights=weights,
        certify=certify,
        explain=explain,
        device=device,
        progress=not quiet,
        model_name=name,
        state=folder / "unfinished",
        command=shlex.join(["robustann", *sys.argv[1:]]),
        notify=lambda message: None if quiet else click.echo(message, err=True),
    )
    if not first:
        return 0
    result.save(folder)
    if not quiet:
        told = ["--data", data_spec, "--norm", threat.norm, "--eps", threat.eps_text]
        for line in _in_words(result, folder, told):
            click.echo(line)
    return 0


def _in_words(result: HardenResult, folder: Path, told: list[str]) -> list[str]:
    """Before and after, line by line, and how to audit what was saved."""
    compared, changed = result.comparison, result.comparison.robust
    width = max(len(stage.name) for stage in compared.stages)
    proven = any(stage.certified_accuracy is not None for stage in compared.stages)
    lines = [f"{'':{width}} {'clean':>8} {'robust':>8}" + (f" {'proven':>8}" if proven else "")]
    for stage in compared.stages:
        line = (
            f"{stage.name:{width}} {share(stage.clean_accuracy):>8} "
            f"{share(stage.robust_accuracy):>8}"
        )
        if proven:
            at_least = stage.certified_accuracy
            line += f" {'-' if at_least is None else share(at_least):>8}"
        lines.append(line + ("" if stage.believable else "  (not to be believed yet; see report)"))
    if changed.lost + changed.gained:
        tested = f"McNemar p = {changed.p:.2g}"
    else:
        tested = "no sample changed sides"
    lines.append(
        f"robust accuracy {100 * changed.difference:+.1f} points (95 % interval "
        f"{100 * changed.interval.low:+.1f} to {100 * changed.interval.high:+.1f}, {tested})"
    )
    for stage in compared.stages:
        lines += [
            f"{stage.name}: error {share(one.mean)} with {100 * one.rate:g} % of the bits wrong, "
            f"in weights of 8 bits"
            for one in stage.bit_errors
        ]
    if compared.sanitizer_verdict is not None:
        lines.append(compared.sanitizer_verdict)
    if result.detected is not None:
        lines.append(result.detected.words)
    lines += compared.notes
    path = folder / "model.safetensors"
    asked = [text for part in result.sanitizers for text in ("--sanitize", part)]
    if result.smoothing is not None:
        asked += ["--smoothing", f"{result.smoothing:g}", "--certify"]
    again = shlex.join(["robustann", "audit", "--model", str(path), *told, *asked])
    return [
        *lines,
        f"model: {path}",
        f"report: {folder / 'after' / 'report.html'}",
        f"audit it again: {again}",
    ]
