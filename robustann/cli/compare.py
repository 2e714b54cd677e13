"""``robustann compare``."""

from __future__ import annotations

from pathlib import Path

import click

from robustann.cli.options import check_targets, quiet_option, share


@click.command(short_help="Set audits side by side on one page.")
@click.argument(
    "results", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="A.JSON B.JSON ..."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("compare.html"),
    show_default=True,
    metavar="FILE",
    help="Where to write the page.",
)
@quiet_option
def compare(results: tuple[Path, ...], out: Path, quiet: bool) -> None:
    """Write a page of two to six audits side by side, from their results.json alone.

    Each is paired with the first on the samples that both audited: differences with intervals,
    which samples changed sides, curves over each other.

    \b
    Example:
      robustann compare runs/before/results.json runs/after/results.json --out compare.html
    """
    from robustann import files
    from robustann.reports import render_comparison
    from robustann.reports.views.comparing import compare as paired
    from robustann.results import AuditResult

    check_targets(out)
    found = [(path.as_posix(), AuditResult.load(path)) for path in results]
    page = render_comparison(found)
    files.write_text(out, page)
    if quiet:
        return
    comparison = paired(found)
    means = [
        None if one.result.corruptions is None else one.result.corruptions.mean_accuracy
        for one in comparison.entries
    ]
    for one, mean in zip(comparison.entries, means, strict=True):
        # One alone compares with nothing.
        corrupted = "" if None in means else f", under corruptions {share(mean or 0.0)}"
        click.echo(
            f"{one.letter} {one.name}: robust accuracy {share(one.result.robust_accuracy)}, clean "
            f"{share(one.result.clean_accuracy)}{corrupted}"
        )
    for pair in comparison.pairs:
        low, high = pair.robust.interval.low, pair.robust.interval.high
        click.echo(
            f"{pair.entry.letter} {pair.words}, on {pair.samples} samples (95 % interval "
            f"{100 * low:+.1f} to {100 * high:+.1f} points, McNemar p = {pair.robust.p:.2g})"
        )
    for note in comparison.notes:
        click.echo(f"note: {note}")
    click.echo(f"page: {out}")
