"""Text from a stranger's file, made fit for a terminal."""

from __future__ import annotations

_LONGEST = 100


def escaped(text: str, longest: int = _LONGEST) -> str:
    """The text itself if it is short and printable, else escaped and cut.

    Whoever made a file chose the names in it: no control characters, no reversed writing.

    >>> escaped("net.0.weight"), escaped("a\\x1b[2Jb"), escaped("x" * 200, 5)
    ('net.0.weight', 'a\\\\x1b[2Jb', 'xxxxx...')
    """
    if not text.isprintable():
        text = text[: longest + 1].encode("unicode_escape").decode("ascii")
    return text if len(text) <= longest else f"{text[:longest]}..."
