"""Writes docs/commands.md: what --help says of every command.

python docs/commands.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from robustann.cli.main import cli

HEAD = """\
# Command line

What `--help` says of each command. [First audit](first-audit.md) shows some of them at work; they
end with [these exit codes](ci.md#exit-codes).
"""


def commands(
    command: click.Command, name: str, above: click.Context | None = None
) -> Iterator[tuple[str, str]]:
    """The name of each command, and its help."""
    context = click.Context(command, above, info_name=name.rpartition(" ")[2], max_content_width=84)
    context.help_option_names = ["-h", "--help"]
    yield name, context.get_help()
    if isinstance(command, click.Group):
        for below in command.commands.values():
            yield from commands(below, f"{name} {below.name}", context)


def page() -> str:
    """The page as Markdown."""
    parts = [f"## {name}\n\n```text\n{text}\n```\n" for name, text in commands(cli, "robustann")]
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
