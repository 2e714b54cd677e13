"""``robustann config``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from robustann.cli.options import check_targets, quiet_option
from robustann.cli.settings import audit_options, settings_of

file_argument = click.argument("file", type=click.Path(path_type=Path), metavar="FILE")


@click.group(short_help="Write, check and show an audit's configuration.")
def config() -> None:
    """Write, check and show configurations of 'robustann audit --config'.

    \b
    Example:
      robustann config init audit.toml
      robustann config validate audit.toml
      robustann audit --config audit.toml
    """


@config.command(short_help="Write a commented configuration to start from.")
@click.argument(
    "path", type=click.Path(path_type=Path), default=Path("audit.toml"), metavar="[PATH]"
)
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
@quiet_option
def init(path: Path, force: bool, quiet: bool) -> None:
    """Write a commented configuration to start from, audit.toml unless named.

    \b
    Example:
      robustann config init audit.toml
    """
    from robustann.config import TEMPLATE
    from robustann.errors import UsageError
    from robustann.files import write_text

    if path.exists() and not force:
        raise UsageError(
            f"expected a file that is not there yet, got '{path}'; choose another name, or "
            "overwrite it with --force"
        )
    check_targets(path)
    write_text(path, TEMPLATE)
    if not quiet:
        click.echo(f"configuration: {path}; run it with 'robustann audit --config {path}'")


@config.command(short_help="Check a configuration without running it.")
@file_argument
@quiet_option
def validate(file: Path, quiet: bool) -> None:
    """Check a configuration without running it: keys, values, and whether they go together.

    \b
    Example:
      robustann config validate audit.toml
    """
    from robustann.config import resolve

    settings = resolve(file)
    if not quiet:
        names = ", ".join(job.slug for job in settings.jobs)
        click.echo(f"fine: {file} ({names})")
        for code in settings.code_of_file:
            click.echo(f"it names code: {code}, which runs only with --allow-code-execution")


@config.command(short_help="Print the configuration that a run would use.")
@file_argument
@audit_options
@click.pass_context
def show(context: click.Context, /, file: Path, **_: Any) -> None:
    """Print the configuration that a run would use: FILE, overridden by options of 'audit'.

    \b
    Example:
      robustann config show audit.toml --preset quick --eps 4/255 --norm linf
    """
    from robustann.config import to_toml

    click.echo(to_toml(settings_of(context, file).values), nl=False)


@config.command(short_help="Print the JSON Schema of a configuration.")
def schema() -> None:
    """Print the JSON Schema of a configuration, for editors.

    \b
    Example:
      robustann config schema > audit.schema.json
    """
    from robustann.config import json_schema

    click.echo(json_schema(), nl=False)
