"""``robustann audit``."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from robustann.cli.options import (
    check_model_file,
    check_targets,
    data_options,
    device_option,
    model_options,
    quiet_option,
    read_data,
    read_model,
    read_threat,
    seed_option,
    share,
    threat_options,
)
from robustann.cli.verdict import verdict

if TYPE_CHECKING:
    from torch import nn

    from robustann.auditing import Estimate


@click.command()
@model_options
@data_options
@threat_options
@click.option(
    "--preset",
    default="standard",
    show_default=True,
    metavar="NAME",
    help="quick, standard or thorough (see 'robustann list presets').",
)
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    metavar="NAME[:OPTION=VALUE,...]",
    help="Run this attack instead of the preset's; can be repeated. "
    "For example pgd:steps=100,loss=margin.",
)
@click.option(
    "--max-samples",
    type=click.IntRange(min=1),
    metavar="NUMBER",
    help="Audit so many images, drawn at random, the same for every seed.",
)
@click.option(
    "--batch-size",
    default="auto",
    show_default=True,
    metavar="NUMBER|auto",
    help="Images a batch; auto tries. It changes speed and memory, not the result.",
)
@click.option(
    "--budget",
    metavar="NUMBER|TIME",
    help="Propagations that an image may cost in all attacks together, or the time that the audit "
    "may take, such as 90s, 10min or 2h.  [default: the preset's]",
)
@click.option(
    "--trust/--no-trust",
    default=True,
    show_default=True,
    help="Check that the evaluation can be believed; adapt to a model that would mislead it.",
)
@click.option("--strict", is_flag=True, help="Exit with 5 where it cannot be believed.")
@click.option(
    "--curve/--no-curve",
    default=True,
    show_default=True,
    help="Measure robust accuracy at other eps too.",
)
@click.option(
    "--explain/--no-explain", default=True, show_default=True, help="Compute attributions."
)
@click.option(
    "--weights",
    is_flag=True,
    help="Ask too what happens if bits of the stored weights are wrong, by accident or by choice.",
)
@click.option(
    "--certify",
    is_flag=True,
    help="Prove too what no attack can break: in linf by bounds through the layers, in l2 with "
    "--smoothing.",
)
@click.option(
    "--smoothing",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SIGMA",
    help="Audit the smoothed classifier: what the model says most often under Gaussian noise of "
    "this standard deviation.",
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="For results.json, samples.csv and report.html.  [default: runs/audit-MODEL]",
)
@click.option(
    "--fail-under",
    multiple=True,
    metavar="METRIC=SHARE",
    help="Exit with 1 where clean_accuracy or robust_accuracy is lower; can be "
    "repeated, the largest share of a metric counts. For example robust_accuracy=0.40. "
    "By default the lower end of the 95 % interval is compared, which never reaches 1.0; "
    "--gate-on point compares the figure.",
)
@click.option(
    "--gate-on",
    type=click.Choice(["lower", "point"]),
    default="lower",
    show_default=True,
    help="Compare the lower end of the 95 % interval, or the figure.",
)
@click.option(
    "--fresh",
    is_flag=True,
    help="Start anew. Otherwise an audit that was stopped goes on when it is run again.",
)
@click.option("--dry-run", is_flag=True, help="Time one batch and say what the audit will cost.")
@seed_option
@device_option
@quiet_option
def audit(
    model_path: Path,
    arch: str | None,
    data_spec: str,
    data_root: Path | None,
    download: bool,
    image_size: int | None,
    norm: str,
    eps: str | None,
    preset: str,
    attacks: tuple[str, ...],
    max_samples: int | None,
    batch_size: str,
    budget: str | None,
    trust: bool,
    strict: bool,
    curve: bool,
    explain: bool,
    certify: bool,
    smoothing: float | None,
    weights: bool,
    output_dir: Path | None,
    fail_under: tuple[str, ...],
    gate_on: Literal["lower", "point"],
    fresh: bool,
    dry_run: bool,
    seed: int,
    device: str | None,
    quiet: bool,
) -> int:
    """Attack a model in every way of a preset and report what it withstands.

    \b
    Examples:
      robustann audit --model model.safetensors --data digits --eps 0.1
      robustann audit --model m.safetensors --data cifar10 --norm l2 --eps 0.5 \\
          --attack pgd:steps=100,restarts=5 --fail-under robust_accuracy=0.40
    """
    from robustann.attacks import parse_attack
    from robustann.auditing import Audit, AuditConfig, forget, parse_gate, with_gates
    from robustann.certificates import Smoothed
    from robustann.reports.explain import explain as explanations

    if strict and not trust:
        raise click.UsageError("--strict asks the trust checks, --no-trust leaves them out")
    # Everything that can be refused is refused before the first minute of work.
    demands: dict[str, float] = {}
    for metric, threshold in map(parse_gate, fail_under):
        demands[metric] = max(threshold, demands.get(metric, threshold))
    propagations, minutes = _budget(budget)
    config = AuditConfig(
        threat=read_threat(norm, eps),
        preset=preset,
        attacks=tuple(parse_attack(text) for text in attacks) or None,
        seed=seed,
        max_samples=max_samples,
        batch_size=_batch_size(batch_size),
        budget=propagations,
        minutes=minutes,
        trust=trust,
        curve=curve,
        explain=explain,
        certify=certify,
        weights=weights,
    )
    folder = output_dir or Path("runs", f"audit-{model_path.stem}")
    state = folder / "unfinished"
    check_model_file(model_path)
    if not dry_run:
        check_targets(*(folder / name for name in ("results.json", "samples.csv", "report.html")))
    model = read_model(model_path, arch, device, quiet)
    data = read_data(data_spec, data_root, download, image_size, quiet)
    model_name = f"{model.spec.arch} ({model_path.name})"
    audited: nn.Module = model
    if smoothing is not None:
        audited = Smoothed(model, smoothing)
        model_name += f", smoothed with sigma {smoothing:g}"
    if dry_run:
        click.echo(
            _in_words(Audit(config).estimate(audited, data.test, class_names=data.class_names))
        )
        return 0
    if fresh:
        forget(state)
    result = Audit(config).run(
        audited,
        data.test,
        class_names=data.class_names,
        model_name=model_name,
        data_name=data.name,
        explainer=explanations,
        progress=not quiet,
        command=shlex.join(["robustann", *sys.argv[1:]]),
        state=state,
        notify=lambda message: None if quiet else click.echo(message, err=True),
    )
    result = with_gates(result, demands, gate_on)
    result.save(folder)
    forget(state)
    if not quiet:
        click.echo(verdict(result))
        click.echo(f"report: {folder / 'report.html'}")
    failed = [gate for gate in result.gates if not gate.passed]
    for gate in failed:
        of = "lower end of the 95 % interval" if gate.on == "lower" else "figure"
        click.echo(
            f"gate failed: {gate.metric} {share(gate.value)} ({of}) is under "
            f"{share(gate.threshold)}",
            err=True,
        )
    if failed:
        return 1
    return 5 if strict and not result.believable else 0


def _batch_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(
            f"expected a number or 'auto', got '{text}'", param_hint="--batch-size"
        ) from None


def _budget(text: str | None) -> tuple[int | None, float | None]:
    """Propagations, or minutes: one of them, or neither."""
    if text is None:
        return None, None
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text.strip()[len(number) :].strip()
    per_minute = {"s": 1 / 60, "min": 1.0, "h": 60.0}
    try:
        if not unit and int(number) >= 1:
            return int(number), None
        if unit in per_minute and 0 < float(number) < math.inf:
            return None, float(number) * per_minute[unit]
    except ValueError:
        pass
    raise click.BadParameter(
        f"expected propagations an image such as 300, or a time such as 90s, 10min or 2h, got "
        f"'{text}'",
        param_hint="--budget",
    )


def _in_words(estimate: Estimate) -> str:
    minutes, seconds = divmod(round(estimate.seconds), 60)
    return (
        f"at most {estimate.propagations:,} propagations for {estimate.samples} images, "
        f"about {minutes} min {seconds} s on {estimate.device} in batches of "
        f"{estimate.batch_size}; less where images fall early. Attributions and certificates come "
        "on top"
    )
