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

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustann.reports import charts, filters, views
from robustann.results import AuditResult

__all__ = ["render"]

_SECTION = re.compile(r"sections/\d+-([a-z-]+)\.html\.j2")


@dataclass(frozen=True)
class _Section:
    id: str
    title: str
    body: Markup


def render(result: AuditResult) -> str:
    """The report of an audit: one HTML page that needs no other file, no network and no script.

    The same result gives the same page, byte for byte. Whatever strings the result holds (class
    names, paths, a command line) are shown as text, and a Content-Security-Policy in the page
    forbids everything but its own style sheet and its inline images.

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
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        result=result, sections=sections, style=Markup(style), style_hash=f"sha256-{digest}"
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
def _style() -> str:
    """The style sheet, with line ends as a browser hashes them."""
    environment = _environment()
    if environment.loader is None:
        raise RuntimeError("the report's environment has no loader")
    source, _, _ = environment.loader.get_source(environment, "style.css")
    return "\n" + "\n".join(source.splitlines()) + "\n"
