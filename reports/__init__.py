"""Turns audits into pages that explain themselves: one audit, several side by side, or many.

A section of an audit's page is one template in ``templates/sections``; files there are found and
shown in the order of their names. Those of a comparison lie in ``templates/compare``, those of an
overview in ``templates/index``. Templates are autoescaped and see ``result``, the figures of
``views``, the charts of ``charts``, what is ``explained`` of checks, and the filters of
``filters.py``.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustann.explained import explained
from robustann.reports import charts, filters, views
from robustann.reports.views.comparing import compare
from robustann.reports.views.overview import Found, overview
from robustann.results import AuditResult

__all__ = ["render", "render_comparison", "render_overview"]

_FILES = {"style": "style.css", "script": "page.js"}


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

    >>> page = render(result)
    >>> page == render(AuditResult.model_validate_json(result.to_json()))
    True
    >>> "<h1" in page, "<script src" in page
    (True, False)
    """
    return _page("audit", "sections", result=result)


def render_comparison(results: Sequence[tuple[str, AuditResult]]) -> str:
    """A page of two or more audits, each with the name that it goes by (a path): paired
    differences to the first, which samples changed sides, curves over each other.

    Raises:
        UsageError: fewer than two audits, or more than can be told apart.
        DataError: no sample was audited in all of them, or their classes or labels differ.

    >>> page = render_comparison([("before", defended.before), ("after", defended.after)])
    >>> 'id="difference"' in page, 'id="trends"' in page
    (True, False)
    """
    return _page("compare", "compare", comparison=compare(results))


def render_overview(folder: str, found: Sequence[Found]) -> str:
    """An overview of the audits that were found in a folder, with trends over time.

    >>> found = Found("a/results.json", "a/report.html", result)
    >>> 'href="a/report.html"' in render_overview("runs", [found])
    True
    """
    return _page("index", "index", overview=overview(folder, found))


def _page(template: str, folder: str, **context: object) -> str:
    environment = _environment()
    pattern = re.compile(rf"{folder}/\d+-([a-z-]+)\.html\.j2")
    sections = []
    for name in environment.list_templates():
        if match := pattern.fullmatch(name):
            module = environment.get_template(name).make_module(context)
            body = Markup(str(module)).strip()
            if body:
                sections.append(_Section(match[1], getattr(module, "title"), Markup(body)))  # noqa: B009
    return environment.get_template(f"{template}.html.j2").render(
        **context, sections=sections, **_inline("style"), **_inline("script")
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
    environment.globals.update(views=views, charts=charts, explained=explained)
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
