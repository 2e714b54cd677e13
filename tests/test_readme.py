"""Every snippet of the README runs as printed."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from robustann.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    rate, _ = capsys.readouterr().out.split(maxsplit=1)
    assert 0 < float(rate) < 1


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [
        shlex.split(line)
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("robustann ")
    ]
    assert len(commands) >= 5
    for command in commands:
        monkeypatch.setattr(sys, "argv", command)
        code = main._run()
        captured = capsys.readouterr()
        assert code == 0, (command, captured.err)
        assert captured.out
    assert Path("report.html").read_text() == Path("runs/audit-model/report.html").read_text()


def test_make_targets_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"\bmake (\w+)", README)
    assert targets
    for target in targets:
        if not re.search(rf"^{target}:", makefile, re.MULTILINE):
            pytest.fail(f"README names 'make {target}', the Makefile has no such target")
