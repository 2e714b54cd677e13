"""What the doctests of results and of the report's parts have at hand: an audit and a hardening."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

# Where they are made for the reader too.
PAGE = Path(__file__).parent / "docs" / "api.md"
USERS = (
    "robustann/results/",
    "robustann/auditing/gates.py",
    "robustann/hardening/",
    "robustann/outputs/",
    "robustann/reports/",
)


@pytest.fixture(scope="session")
def example() -> dict[str, object]:
    """``result`` and ``defended``, as the reference says."""
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    return {name: names[name] for name in ("result", "defended")}


@pytest.fixture(autouse=True)
def at_hand(request: pytest.FixtureRequest, doctest_namespace: dict[str, object]) -> Iterator[None]:
    """For these doctests alone: elsewhere they would hide what is missing."""
    if not (isinstance(request.node, pytest.DoctestItem) and request.node.nodeid.startswith(USERS)):
        yield
        return
    given = request.getfixturevalue("example")
    doctest_namespace.update(given)
    yield
    for name in given:
        del doctest_namespace[name]
