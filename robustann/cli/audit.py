"""``robustann audit``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robustann.cli.options import check_targets, quiet_option, read_model_and_data
from robustann.cli.settings import audit_options, settings_of
from robustann.cli.verdict import verdict

if TYPE_CHECKING:
    from robustann.auditing import Estimate
    from robustann.outputs import Verdict


@click.command(short_help="Attack a model in every way, and report what falls.")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A TOML file with all of this and several threat models (see 'robustann config init'). "
    "Options given here override it.",
)
@audit_options
@click.option(
    "--fresh",
    is_flag=True,
    help="Start anew. Otherwise an audit that was stopped goes on when it is run again.",
)
@click.option(
    "--shared",
    is_flag=True,
    help="Share the work with all processes that run the same command with the same --output-dir, "
    "such as the jobs of an array. Under torchrun that is so without it.",
)
@click.option("--dry-run", is_flag=True, help="Time one batch and say what the audit will cost.")
@quiet_option
@click.pass_context
def audit(
    context: click.Context,
    /,
    config_path: Path | None,
    fresh: bool,
    shared: bool,
    dry_run: bool,
    quiet: bool,
    **_: Any,
) -> int:
    """Attack a model in every way of a preset and report what it withstands.

    \b
    Examples:
      robustann audit --model model.safetensors --data digits --eps 0.1
      robustann audit --model m.safetensors --data cifar10 --norm l2 --eps 0.5 \\
          --attack pgd:steps=100,restarts=5 --fail-under robust_accuracy=0.40
      robustann audit --config audit.toml --junit junit.xml
      torchrun --nproc-per-node 8 -m robustann audit --model m.safetensors --data cifar10
    """
    from robustann.config import prepare
    from robustann.errors import ModelError, RefusedError, RobustannError, UsageError
    from robustann.launch import world

    launched = world()
    # One of several speaks for all.
    quiet = quiet or launched.rank > 0
    shared = shared or launched.size > 1
    if fresh and shared:
        raise UsageError(
            "expected --fresh without others that share the work, for each would remove what the "
            "others have done; remove the folder 'unfinished' in the output folder beforehand"
        )
    # Everything that can be refused is refused before the first minute of work.
    settings = settings_of(context, config_path)
    allowed = context.params["allow_code_execution"]
    settings.check_code(allowed=allowed)
    request = settings.request(allow_code_execution=allowed)
    values = settings.values
    run = prepare(settings, Path(values.output.folder or Path("runs", f"audit-{request.name}")))
    request.check()
    if not dry_run:
        check_targets(*run.targets)
    try:
        model, data = read_model_and_data(
            request,
            values.data.name,
            None if values.data.root is None else Path(values.data.root),
            values.data.download,
            values.data.image_size,
            values.model.device,
            quiet,
        )
    except RobustannError as error:
        # CI has its files then too, so that yesterday's are not taken for today's.
        if not dry_run and launched.rank == 0 and not isinstance(error, UsageError):
            about = request.path if isinstance(error, ModelError | RefusedError) else None
            run.tell_refused(error, request.name, str(about) if request.model and about else None)
        raise
    if dry_run:
        for threat, estimate in run.estimates(model, data):
            click.echo((f"{threat}: " if len(run.jobs) > 1 else "") + _in_words(estimate))
        return 0
    if fresh:
        run.forget()
    found = run.run(
        model,
        data,
        model_name=request.label(model),
        progress=not quiet,
        command=shlex.join(["robustann", *sys.argv[1:]]),
        notify=lambda message: None if quiet else click.echo(message, err=True),
        shared=shared,
    )
    _tell(found, quiet)
    return found.exit_code


def _tell(found: Verdict, quiet: bool) -> None:
    """The verdict on stdout; what failed on stderr, even if quiet."""
    from robustann.outputs.text import answer, plain

    several = len(found.audits) > 1
    for one in found.audits:
        if one.result is None:
            click.echo(f"error: {one.threat}: {one.error}", err=True)
        elif not quiet:
            if several:
                click.echo(f"== {one.threat} ==")
            click.echo(verdict(one.result))
            click.echo(f"report: {Path(one.folder, 'report.html')}")
            if several:
                click.echo()
    for one in found.audits:
        for gate in one.failed:
            threat = f"{one.threat}: " if several else ""
            click.echo(f"gate failed: {threat}{plain(answer(gate))}", err=True)
    if several and not quiet:
        click.echo(f"verdict: {found.word}")


def _in_words(estimate: Estimate) -> str:
    minutes, seconds = divmod(round(estimate.seconds), 60)
    return (
        f"at most {estimate.propagations:,} propagations for {estimate.samples} images, "
        f"about {minutes} min {seconds} s on {estimate.device} in batches of "
        f"{estimate.batch_size}; less where images fall early. Attributions and certificates come "
        "on top"
    )
