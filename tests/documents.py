"""Runs a page of the documentation as a reader would: top to bottom, in one folder.

What a fence does is told by its language:

- ``sh``: every command runs; ``# exits with 1`` behind it is what it shall end with. ``make``,
  ``pip`` and ``docker`` are only checked, for what they would do takes a network and minutes.
- ``python``: runs, in one namespace for the whole page.
- any, with ``title="FILE"``: is written to that file, instead of being run.
- ``toml``, ``yaml``, ``json``: is parsed. ``text``, ``csv``: nothing.

``<!-- not run: REASON -->`` before a fence leaves it out; its commands must have options and
architectures that there are all the same.

A page that is followed in a checkout (a copy: the guides add files to it) has its commands run by
what is in there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from packaging.requirements import Requirement

from robustann.cli import main
from robustann.models import create_model

ROOT = Path(__file__).parent.parent
FENCE = re.compile(
    r"(?:^[ ]*<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"^(?P<indent>[ ]*)(?P<ticks>```+)(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=indent)(?P=ticks)[ ]*$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Fence:
    language: str
    title: str | None
    text: str
    reason: str | None
    line: int


def fences(path: Path) -> Iterator[Fence]:
    text = path.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        language, _, rest = found["info"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        body = re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        line = text.count("\n", 0, found.start("text")) + 1
        yield Fence(language, title[1] if title else None, body, found["reason"], line)


def commands(text: str) -> Iterator[tuple[str, int]]:
    """Each command of a shell fence, and the code that it shall end with."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        command, _, comment = line.partition("  #")
        if command.strip() and not command.startswith("#"):
            expected = re.search(r"exits with (\d+)", comment)
            yield command.strip(), int(expected[1]) if expected else 0


class Reader:
    """Somebody who follows one page, in the current folder."""

    def __init__(self, page: Path, checkout: Path | None = None) -> None:
        self.page = page
        self.checkout = checkout
        self.namespace: dict[str, object] = {"__name__": "__main__"}

    def follow(self) -> int:
        """Do all of it; the number of fences that did something."""
        done = 0
        for fence in fences(self.page):
            if fence.reason is not None:
                assert len(fence.reason) > 10, f"{self.page}:{fence.line}: why is it not run?"
                if fence.language == "sh":
                    for command, _ in commands(fence.text):
                        look_at(shlex.split(command, comments=True))
                continue
            try:
                self.do(fence)
            except BaseException as error:
                error.add_note(f"in {self.page}:{fence.line}")
                raise
            done += 1
        return done

    def do(self, fence: Fence) -> None:
        if fence.title is not None:
            target = Path(fence.title)
            assert not target.is_absolute()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(fence.text, encoding="utf-8")
        match fence.language:
            case "sh":
                for command, expected in commands(fence.text):
                    self.command(command, expected)
            case "python" if fence.title is None:
                name = f"{self.page.name}:{fence.line}"
                exec(compile(fence.text, name, "exec"), self.namespace)
            case "python":
                compile(fence.text, str(fence.title), "exec")
            case "toml":
                tomllib.loads(fence.text)
            case "yaml":
                assert yaml.safe_load(fence.text)
            case "json":
                json.loads(fence.text)
            case "text" | "csv" | "html" | "mermaid" | "jinja" | "bibtex":
                pass
            case _:
                raise AssertionError(f"no rule for the language '{fence.language}'")

    def command(self, command: str, expected: int) -> None:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            for target in (word for word in words[1:] if "=" not in word):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"
        elif words[0] in ("pip", "pipx", "uv"):
            check_install(words)
        elif words[0] == "docker":
            assert (ROOT / "Dockerfile").is_file()
        elif (
            words[0] == "robustann" and self.checkout is None and not set("|><&;$`") & set(command)
        ):
            code = run_robustann(words)
            assert code == expected, f"'{command}' ended with {code}, not {expected}"
        else:
            # This environment's python and robustann, and the checkout's code.
            paths = [str(self.checkout), os.environ.get("PYTHONPATH", "")]
            environment = {
                **os.environ,
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                "PYTHONPATH": os.pathsep.join(paths[self.checkout is None :]),
            }
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                capture_output=True, text=True, env=environment,
            )  # fmt: skip
            assert done.returncode == expected, f"'{command}': {done.stdout}{done.stderr}"


def run_robustann(words: list[str]) -> int:
    """The command in this process: a new one would take seconds to import torch."""
    before = sys.argv
    sys.argv = words
    try:
        return main._run()
    finally:
        sys.argv = before


def look_at(words: list[str]) -> None:
    """A command that is not run: whether it could be."""
    if words[0] == "torchrun":
        assert words[words.index("-m") + 1] == "robustann"
        words = words[words.index("-m") + 1 :]
    if words[0] == "robustann":
        # Required options and the types of all are looked at, too.
        command = main.cli.commands[words[1]]
        with command.make_context(words[1], words[2:]) as context:
            arch = context.params.get("arch")
        if arch is not None:
            create_model(arch, class_names=["a", "b"], shape=(3, 32, 32))
    elif words[0] == "python":
        text = (ROOT / words[1]).read_text(encoding="utf-8")
        for option in (word for word in words[2:] if word.startswith("--")):
            assert f'"{option}"' in text, f"{words[1]} has no {option}"
    else:
        assert words[0] == "pip", words
        check_install(words)


def check_install(words: list[str]) -> None:
    """An install that names this package names extras that there are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "install" in words
    for word in words[words.index("install") + 1 :]:
        if word.startswith("-"):
            continue
        if word.startswith("."):
            word = "robustann" + word[1:]
        wanted = Requirement(word)
        if wanted.name == "robustann":
            assert wanted.extras <= project["optional-dependencies"].keys(), word


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MkDocs make it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain))


def without_code(text: str) -> str:
    """A page without its fences and code spans, in which nothing is a link or a heading."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(path: Path) -> set[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    named = set(re.findall(r'(?:id|name)="([^"]+)"', text))
    return named | {slug(found) for found in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def links(path: Path) -> list[str]:
    text = without_code(path.read_text(encoding="utf-8"))
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    return (
        inline
        + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
        + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    )
