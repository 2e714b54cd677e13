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


def _default(field: griffe.Attribute) -> str:
    """What a field has where nothing is given for it."""
    value = str(field.value)
    if field.value is None or (value.startswith("Field(") and "default" not in value):
        return "required"
    found = re.search(r"\bdefault=([^,()]*(?:\([^)]*\))?)", value)
    return f"by default `{found[1] if found else value}`"


def fields_of(cls: griffe.Class) -> str:
    """The fields of a pydantic model as a section; its docstring tells of them in running text."""
    lines = [
        f"    {name} ({field.annotation}): {_default(field)}"
        for name, field in cls.attributes.items()
        if field.annotation is not None
        if not name.startswith("_") and "property" not in field.labels
        if "ClassVar" not in str(field.annotation)
    ]
    return "\n\nAttributes:\n" + "\n".join(lines) if lines else ""


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Fields of dataclasses are in their signature; pydantic's have none."""
        text = cls.docstring.value if cls.docstring is not None else ""
        told = "Attributes:" in text or "Args:" in text or "dataclass" in cls.labels
        if cls.docstring is not None and not told:
            cls.docstring.value = text + fields_of(cls)

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
