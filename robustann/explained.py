"""What each trust check looks at, why, and what to do: the sections of docs/trust.md.

The page is the one source: ``explained.md`` beside this file is a link to it, and a file in what is
installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from robustann.errors import unknown_name

PAGE = "docs/trust.md"


@dataclass(frozen=True)
class Section:
    """What there is to know of one check, in plain text with code between backticks.

    Attributes:
        check: its name; also the anchor of the section in the page.
        measures: what is measured, and when it fails.
        means: what a failure means for the robust accuracy.
        advice: what to do, and what an audit does by itself.
        source: who proposed to look.
    """

    check: str
    measures: str
    means: str
    advice: str
    source: str

    @property
    def place(self) -> str:
        """Where it is in the documentation.

        >>> explained()["randomised"].place
        'docs/trust.md#randomised'
        """
        return f"{PAGE}#{self.check}"

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """Each part with its heading."""
        return (
            ("Measures:", self.measures),
            ("A failure means", self.means),
            ("What to do:", self.advice),
            ("Source:", self.source),
        )

    @property
    def text(self) -> str:
        """The section as plain text, a paragraph a part."""
        return "\n".join(f"{heading} {words}" for heading, words in self.parts)

    @property
    def markdown(self) -> str:
        """The section as a list in Markdown."""
        return "\n".join(f"- **{heading}** {words}" for heading, words in self.parts)


_ITEM = re.compile(
    r"- Measures: (?P<measures>.+?)\n- A failure means (?P<means>.+?)"
    r"\n- What to do: (?P<advice>.+?)\n- Source: (?P<source>.+?)\s*(?:\n#|$)",
    re.DOTALL,
)


@cache
def explained() -> Mapping[str, Section]:
    """The sections by the names of their checks, in the order of the page.

    >>> explained()["softmax-output"].measures
    'whether each row of the output is non-negative and sums to 1; yes or no.'
    """
    text = resources.files("robustann").joinpath("explained.md").read_text(encoding="utf-8")
    parts = re.split(r"^### (.+)$", text, flags=re.MULTILINE)
    found = {}
    for check, body in zip(parts[1::2], parts[2::2], strict=True):
        item = _ITEM.search(body)
        if item is None:
            raise ValueError(f"expected the four parts of a section on '{check}' in {PAGE}")
        # An address is one without its brackets too, which Markdown alone needs.
        words = {
            name: " ".join(re.sub(r"<(https://[^>]+)>", r"\1", part).split())
            for name, part in item.groupdict().items()
        }
        found[check] = Section(check, **words)
    return found


def section(check: str) -> Section:
    """The section on this check.

    Raises:
        UsageError: there is no such check.

    >>> section("budget-cut").advice
    'give a larger budget, or none.'
    """
    if check not in explained():
        raise unknown_name("check", check, explained())
    return explained()[check]
