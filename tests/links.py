"""The links that lead out: where they are, whether they look right, and, online, whether they hold.

make links
"""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import documents
from documents import ROOT

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / part / "README.md" for part in ("examples", "benchmarks")),
]
# Papers are named in docstrings and in what attacks and checks say of themselves.
# The folders are links in a checkout, and none in the source archive.
_FOLDERS = ("robustann", *(f"robustann/{part}" for part in ("attacks", "defenses", "reports")))
SOURCES = sorted(
    {path for part in (*_FOLDERS, "benchmarks") for path in (ROOT / part).rglob("*.py")}
)
_ADDRESS = re.compile(r"""https?://[^\s<>"'`)\]}\\]*""")
_ARXIV = re.compile(r"arXiv:\s?([\w./-]*\w)")
# Form: a host with a dot, and no end that belongs to the sentence around it.
_GOOD = re.compile(r"https://[a-z0-9-]+(\.[a-z0-9-]+)*\.[a-z]{2,}(/\S*)?(?<![.,:;!])")
_PAPER = re.compile(r"https://arxiv\.org/abs/\d\d(0[1-9]|1[0-2])\.\d{5}|"
                    r"https://arxiv\.org/abs/(0[7-9]|1[0-4])(0[1-9]|1[0-2])\.\d{4}")  # fmt: skip
# What says that it takes no programs, which is no word on the address.
_ONLY_PEOPLE = (401, 403, 405, 429, 503)


def external() -> Iterator[tuple[str, str]]:
    """Every address that a reader may follow, and the file that it is in."""
    for path in (*PAGES, *SOURCES):
        text = path.read_text(encoding="utf-8")
        found = set(_ARXIV.findall(text))
        addresses = {f"https://arxiv.org/abs/{paper}" for paper in found}
        if path.suffix == ".md":
            text = documents.without_code(text)
            addresses |= {one for one in documents.links(path) if "://" in one}
        addresses |= {one.rstrip(".,:;") for one in _ADDRESS.findall(text)}
        for one in sorted(addresses):
            # What a program fills in, and what an example makes up, is no link.
            if "{" not in one and "example" not in one and len(one) > len("https://arxiv.org/abs/"):
                yield one, str(path.relative_to(ROOT))


def fault(address: str) -> str | None:
    """What is wrong with the form of an address."""
    if not _GOOD.fullmatch(address):
        return "expected https:// and a host"
    if "arxiv.org/" in address and not _PAPER.fullmatch(address):
        return "expected https://arxiv.org/abs/ and the number of a paper"
    return None


def ask(address: str, timeout: float = 20) -> str | None:
    """What is wrong with an address, asked online."""
    request = urllib.request.Request(address, headers={"User-Agent": "robustann link check"})
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code in _ONLY_PEOPLE else f"status {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def main() -> int:
    """Ask for every address once; 1 if any did not answer well, 2 if none could be asked."""
    places: dict[str, str] = {}
    for address, place in external():
        places.setdefault(address, place)
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(places, pool.map(ask, places), strict=True))
    wrong = {address: reason for address, reason in answers.items() if reason is not None}
    if wrong.keys() == places.keys() and not any(
        one.startswith("status") for one in wrong.values()
    ):
        sys.stdout.write(f"none of {len(places)} links could be asked: is there a network?\n")
        return 2
    for address, reason in wrong.items():
        sys.stdout.write(f"{places[address]}: {address}: {reason}\n")
    sys.stdout.write(f"{len(places)} links, {len(wrong)} wrong\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
