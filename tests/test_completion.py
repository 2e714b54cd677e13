"""Shells complete commands, options and choices: the scripts as printed, where a shell is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from robustann.cli.completion import SHELLS
from robustann.cli.main import cli


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_for_each_shell(shell: str) -> None:
    script = CliRunner().invoke(cli, ["completion", shell])
    assert script.exit_code == 0
    assert f"_ROBUSTANN_COMPLETE={shell}_complete" in script.output
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script.output, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_unknown_shell() -> None:
    assert CliRunner().invoke(cli, ["completion", "tcsh"]).exit_code == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("robustann aud", ["audit"]),
        ("robustann audit --fail", ["--fail-under"]),
        ("robustann audit --gate-on po", ["point"]),
        ("robustann list at", ["attacks"]),
    ],
)
@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes(words: str, expected: list[str], tmp_path: Path) -> None:
    """The script is sourced by bash, and its function asked as bash would."""
    command = tmp_path / "robustann"
    # As an installation puts it there.
    command.write_text(f"#!{sys.executable}\nfrom robustann.cli.main import main\nmain()\n")
    command.chmod(0o755)
    script = CliRunner().invoke(cli, ["completion", "bash"]).output
    ask = (
        f"{script}\nCOMP_WORDS=({words})\nCOMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        '_robustann_completion robustann\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", ask], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == expected, done.stderr
