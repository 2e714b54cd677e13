"""``robustann report``."""

from __future__ import annotations

from pathlib import Path

import click

from robustann.cli.options import quiet_option
from robustann.cli.verdict import verdict


@click.command(short_help="Write the report of an audit again.")
@click.argument("results", type=click.Path(path_type=Path), metavar="RESULTS.JSON")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where to write the page.  [default: report.html beside the results]",
)
@quiet_option
def report(results: Path, out: Path | None, quiet: bool) -> None:
    """Write the HTML report of an audit again, from its results.json alone.

    \b
    Example:
      robustann report runs/audit-model/results.json --out report.html
    """
    from robustann.results import AuditResult

    result = AuditResult.load(results)
    target = out or results.with_name("report.html")
    result.save_report(target)
    if not quiet:
        click.echo(verdict(result))
        click.echo(f"report: {target}")
