"""Docstrings as the site shows them: doctests as code, names of Python objects as code.

The docstrings are plain text with doctests and Sphinx's roles; the site's pages are Markdown.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`~?([^`]+)`")
# A doctest is a prompt and all that follows up to an empty line.
_DOCTEST = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)


def as_markdown(text: str) -> str:
    """The docstring with what Markdown would garble put into fences and code spans."""

    def fenced(found: re.Match[str]) -> str:
        indent = found["indent"]
        return f"{indent}```pycon\n{found[0]}\n{indent}```"

    text = _ROLE.sub(lambda found: f"`{found[1].removeprefix('robustann.')}`", text)
    return _DOCTEST.sub(fenced, text.replace("``", "`"))


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
