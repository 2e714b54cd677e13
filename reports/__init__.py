"""Turns an :class:`~robustann.results.AuditResult` into a page that explains itself.

A section is one template in ``templates/sections``; files there are found and shown in the order
of their names. Templates are autoescaped and see ``result``, the figures of ``views.py``, the
charts of ``charts.py`` and the filters of ``filters.py``.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustann.reports import charts, filters, views
from robustann.results import AuditResult

__all__ = ["render"]

_FILES = {"style": "style.css", "script": "page.js"}
_SECTION = re.compile(r"sections/\d+-([a-z-]+)\.html\.j2")


@dataclass(frozen=True)
class _Section:
    id: str
    title: str
    body: Markup


def render(result: AuditResult) -> str:
    """The report of an audit: one HTML page that needs no other file and no network.

    The same result gives the same page, byte for byte. Whatever strings the result holds (class
    names, paths, a command line) are shown as text, and a Content-Security-Policy in the page
    forbids everything but its own style sheet, its own script and its inline images. The script
    sorts tables, copies them as CSV and moves sliders; without it the page says the same.

    Every section has a template that sets ``title``; one that renders to nothing is left out.
    """
    environment = _environment()
    sections = []
    for name in environment.list_templates():
        if match := _SECTION.fullmatch(name):
            module = environment.get_template(name).make_module({"result": result})
            body = Markup(str(module)).strip()
            if body:
                sections.append(_Section(match[1], getattr(module, "title"), Markup(body)))  # noqa: B009
    return environment.get_template("page.html.j2").render(
        result=result, sections=sections, **_inline("style"), **_inline("script")
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("robustann.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters.FILTERS)
    environment.globals.update(views=views, charts=charts)
    return environment


@cache
def _inline(what: Literal["style", "script"]) -> dict[str, str]:
    """The style sheet or the script with the hash that the policy allows, with line ends as a
    browser hashes them."""
    environment = _environment()
    if environment.loader is None:
        raise RuntimeError("the report's environment has no loader")
    source, _, _ = environment.loader.get_source(environment, _FILES[what])
    text = "\n" + "\n".join(source.splitlines()) + "\n"
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {what: Markup(text), f"{what}_hash": f"sha256-{digest}"}
