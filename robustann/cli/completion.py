"""``robustann completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command(short_help="Teach the shell to complete commands and options.")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete robustann's commands and options.

    \b
    Examples:
      eval "$(robustann completion bash)"      # in ~/.bashrc
      eval "$(robustann completion zsh)"       # in ~/.zshrc
      robustann completion fish > ~/.config/fish/completions/robustann.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"click knows no completion for {shell}; update click")
    script = kind(context.find_root().command, {}, "robustann", "_ROBUSTANN_COMPLETE")
    # Not source(): for bash that first asks the bash of this machine how old it is.
    click.echo(script.source_template % script.source_vars())
