"""How numbers and names are written in a report."""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime

from markupsafe import Markup

from robustann.results import Interval

# A thin space that does not break a line, between a number and its unit.
THIN = "\u202f"
NOTHING = "\u2013"

# Control characters, line and paragraph separators, and marks that turn the reading direction:
# they could make a title, an alternative text or a row read as something else than it is.
_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)
# No written language puts more on one letter.
_ACCENTS = 3
_BASE64 = re.compile("[A-Za-z0-9+/]+={0,2}")


def plain(value: object, limit: int = 300) -> str:
    """``value`` as one safe run of text: odd control characters shown as U+FFFD, accents beyond
    the third of a letter left out, then clipped.

    >>> plain("cat\\x00", 10), plain("abcdefgh", 5), len(plain("a" + 99 * "\\u0301"))
    ('cat�', 'abcd…', 4)
    """
    text = str(value)
    if not text[: limit + 1].isascii():
        text = _low(text[: 4 * limit + 4])
    shown = _UNSHOWN.sub("\ufffd", text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _low(text: str) -> str:
    """Without the marks that pile up: a tower of them strikes through the lines above."""
    kept, marks = [], 0
    for one in text:
        marks = marks + 1 if unicodedata.category(one) in ("Mn", "Me") else 0
        if marks <= _ACCENTS:
            kept.append(one)
    return "".join(kept)


def name(value: object, limit: int = 40) -> Markup:
    """A name from outside, isolated from the text around it; clipped, with more in its title.

    >>> name("<b>")
    Markup('<bdi class="name">&lt;b&gt;</bdi>')
    """
    short, full = plain(value, limit), plain(value)
    if short == full:
        return Markup('<bdi class="name">{}</bdi>').format(short)
    return Markup('<bdi class="name" title="{}">{}</bdi>').format(full, short)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as percent.

    >>> percent(0.4321)
    '43.2\\u202f%'
    """
    return NOTHING if value is None else f"{100 * value:.{digits}f}{THIN}%"


def points(value: float) -> str:
    """A difference of two shares in percentage points, with its sign.

    >>> points(0.0312), points(0.0)
    ('+3.1 points', '0.0 points')
    """
    text = f"{100 * abs(value):.1f} points"
    if text.startswith("0.0 "):
        return text
    return f"+{text}" if value > 0 else f"\N{MINUS SIGN}{text}"


def interval(value: Interval | None) -> str:
    """A confidence interval of a share.

    >>> interval(Interval(low=0.4, high=0.5))
    '40.0 to 50.0\\u202f%'
    """
    if value is None:
        return NOTHING
    return f"{100 * value.low:.1f} to {100 * value.high:.1f}{THIN}%"


def count(value: int) -> str:
    """A whole number with thousands apart.

    >>> count(12345)
    '12,345'
    """
    return f"{value:,}"


def significant(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, without needless zeros.

    >>> significant(0.031372), significant(12345.0)
    ('0.0314', '12,345')
    """
    if value is None:
        return NOTHING
    large = abs(value) >= 10 ** (digits - 1)
    text = f"{value:,.0f}" if large else f"{value:.{digits}g}"
    return text.replace("-", "\N{MINUS SIGN}", 1) if value < 0 else text


def duration(seconds: float | None) -> str:
    """Seconds in the unit that reads best.

    >>> duration(0.0421), duration(75.0), duration(4000.0)
    ('0.04\\u202fs', '1\\u202fmin 15\\u202fs', '1\\u202fh 06\\u202fmin')
    """
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.{2 if seconds < 10 else 0}f}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min {rest:02d}{THIN}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{THIN}h {minutes:02d}{THIN}min"


def moment(text: str) -> str:
    """An ISO 8601 time in words; other text as it is.

    >>> moment("2025-01-02T03:04:05+00:00"), moment("yesterday")
    ('2 January 2025, 03:04 UTC', 'yesterday')
    """
    try:
        when = datetime.fromisoformat(text)
        if when.utcoffset() is None:
            return text
        when = when.astimezone(UTC)
    except (ValueError, OverflowError):
        # The first and last day of the calendar have no UTC in it.
        return text
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def slug(text: str) -> str:
    """A text as part of an id.

    >>> slug("top 5 %")
    'top-5'
    """
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def image_source(picture: str) -> str:
    """A PNG or WebP in base64 as the address of an image; what is no base64 becomes an empty one.

    >>> image_source("AAAA"), image_source('"><b>')
    ('data:image/png;base64,AAAA', 'data:,')
    """
    kind = "webp" if picture.startswith("UklGR") else "png"
    return f"data:image/{kind};base64,{picture}" if _BASE64.fullmatch(picture) else "data:,"


def image_size(picture: str) -> tuple[int, int] | None:
    """Width and height of a PNG or a WebP (lossy, as reports hold it) in base64, from its header;
    None if it is neither.

    >>> image_size("bm8gaW1hZ2U=") is None
    True
    """
    try:
        head = base64.b64decode(picture[:40], validate=True)
    except (binascii.Error, ValueError):
        return None
    if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) >= 24:
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8 " and len(head) >= 30:
        # 14 bits each; the two above scale.
        width, height = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))
        return width & 0x3FFF, height & 0x3FFF
    return None


FILTERS: dict[str, Callable[..., object]] = {
    "plain": plain,
    "points": points,
    "name": name,
    "percent": percent,
    "interval": interval,
    "count": count,
    "significant": significant,
    "duration": duration,
    "moment": moment,
    "slug": slug,
    "image_source": image_source,
    "image_size": image_size,
}
