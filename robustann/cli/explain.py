"""``robustann explain``."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


def _names(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from robustann.explained import explained

    return [CompletionItem(name) for name in explained() if name.startswith(incomplete)]


@click.command(short_help="Explain a trust check.")
@click.argument("check", shell_complete=_names)
def explain(check: str) -> None:
    """Explain a trust check: what it measures, what a failure means, and what to do.

    \b
    Example:
      robustann explain gradient-missing
    """
    from robustann.explained import section

    found = section(check)
    for heading, words in (("", found.check), *found.parts, ("More:", found.place)):
        click.echo(click.wrap_text(f"{heading} {words}".strip(), 78, subsequent_indent="  "))
