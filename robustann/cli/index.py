"""``robustann index``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from robustann.cli.options import check_targets, quiet_option
from robustann.errors import RobustannError, UsageError

if TYPE_CHECKING:
    from robustann.reports.views.overview import Found


@click.command(short_help="List all audits in a folder on one page.")
@click.argument("folder", type=click.Path(path_type=Path), metavar="FOLDER")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where to write the page.  [default: index.html in the folder]",
)
@quiet_option
def index(folder: Path, out: Path | None, quiet: bool) -> None:
    """Write an overview page of all audits in a folder and below it, with trends over time.

    What is no readable results.json is listed with the reason.

    \b
    Example:
      robustann index runs
    """
    from robustann import files
    from robustann.reports import render_overview

    if not folder.is_dir():
        raise UsageError(f"expected a folder of audits, got '{folder}'; for example runs")
    target = out or folder / "index.html"
    check_targets(target)
    found = _found(folder, target.absolute().parent)
    files.write_text(target, render_overview(folder.as_posix(), found))
    if not quiet:
        read = sum(one.result is not None for one in found)
        click.echo(f"{read} audits" + (f", {len(found) - read} not read" * (read < len(found))))
        click.echo(f"page: {target}")


def _found(folder: Path, page: Path) -> list[Found]:
    """Every results.json, in the order of the paths; links lead from the folder of the page."""
    from robustann.reports.views.overview import Found
    from robustann.results import AuditResult

    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "unfinished")
        if "results.json" not in names:
            continue
        path = Path(root, "results.json")
        told = path.relative_to(folder).as_posix()
        link = None
        if "report.html" in names:
            way = os.path.relpath(Path(root, "report.html").absolute(), page)
            link = "./" + quote(Path(way).as_posix())
        try:
            found.append(Found(told, link, AuditResult.load(path)))
        except RobustannError as error:
            found.append(Found(told, link, None, str(error)))
    return found
