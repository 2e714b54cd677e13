"""The command ``robustann`` and its exit codes."""

from __future__ import annotations

import errno
import os
import sys

import click

from robustann import __version__
from robustann.cli.attack import attack
from robustann.cli.audit import audit
from robustann.cli.compare import compare
from robustann.cli.completion import completion
from robustann.cli.config import config
from robustann.cli.explain import explain
from robustann.cli.harden import harden
from robustann.cli.index import index
from robustann.cli.inspect import inspect
from robustann.cli.listing import listing
from robustann.cli.report import report
from robustann.cli.seal import seal, verify
from robustann.cli.train import train
from robustann.errors import RobustannError, printable

DONE, WRONG_USAGE, NOT_FINISHED, INTERRUPTED = 0, 2, 3, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="robustann")
def cli() -> None:
    """Train, attack, harden and explain PyTorch image classifiers.

    \b
    Example, from nothing to a report:
      robustann train --data digits --out model.safetensors
      robustann audit --model model.safetensors --data digits --eps 0.1

    \b
    Exit codes: 0 done, 1 a gate failed, 2 wrong usage, 3 could not finish,
    4 a model was refused, 5 not to be believed (audit --strict), 130 interrupted.
    Set ROBUSTANN_DEBUG=1 to see tracebacks.
    """


for command in (
    train, attack, audit, config, harden, report, compare, index, inspect, seal, verify, listing,
    explain, completion,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(_run())


def _run() -> int:
    try:
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else DONE
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "\ninterrupted; finished files are whole. An audit goes on when it is run again, "
            "training with --resume",
            err=True,
        )
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return WRONG_USAGE
    except RobustannError as error:
        _reraise_if_debugging()
        click.echo(f"error: {printable(str(error))}", err=True)
        return error.exit_code
    except BrokenPipeError:
        # The reader (head, less) has gone; leave nothing for the interpreter to flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        _reraise_if_debugging()
        click.echo(f"error: {printable(_in_words(error))}", err=True)
        return NOT_FINISHED


def _reraise_if_debugging() -> None:
    if os.environ.get("ROBUSTANN_DEBUG"):
        raise


def _in_words(error: Exception) -> str:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "memory ran out even for one image a batch; free some, or use a smaller model"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free space and run the same command again"
    return (
        f"{type(error).__name__}: {error}; this was not foreseen. Set ROBUSTANN_DEBUG=1 and run "
        "again to see where, and please report it"
    )
