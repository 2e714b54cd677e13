"""docs/trust.md says of every check what it measures, its threshold, and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from robustann.explained import explained
from robustann.trust import CHECKS

TEXT = (Path(__file__).parent.parent / "docs" / "trust.md").read_text(encoding="utf-8")
PARTS = re.split(r"^### (.+)$", TEXT, flags=re.MULTILINE)
SECTIONS = dict(zip(PARTS[1::2], PARTS[2::2], strict=True))


def test_each_check_has_its_section_in_order() -> None:
    # A heading in lower case with hyphens is its own anchor: findings can be linked by name.
    assert PARTS[1::2] == list(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_section_says_what_there_is_to_know(name: str) -> None:
    section = SECTIONS[name].split("\n## ")[0]
    for part in ("- Measures: ", "- A failure means ", "- What to do: ", "- Source: "):
        assert section.count(part) == 1
    # It is also printed where no link would lead anywhere.
    assert "](" not in section
    threshold = CHECKS[name].threshold
    if threshold is None:
        return
    measured = " ".join(section.split("- A failure means ")[0].split())
    assert re.search(rf"(?<![\d.]){re.escape(f'{threshold:g}')}(?!\.?\d)", measured), measured


def test_the_installed_sections_are_those_of_the_page() -> None:
    assert list(explained()) == list(CHECKS)
    for name, found in explained().items():
        section = " ".join(SECTIONS[name].split("\n## ")[0].split())
        section = section.replace("<https", "https").replace(">", "")
        told = [*(f"{heading} {words}" for heading, words in found.parts)]
        assert section == " ".join(f"- {one}" for one in told)
