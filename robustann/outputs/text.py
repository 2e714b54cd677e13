"""Text from outside (class names, paths, commands) made harmless, and figures in words."""

from __future__ import annotations

import re

from robustann.results import Gate, Interval
from robustann.rounding import percent

# What XML 1.0 forbids, other control characters, and marks that turn the reading direction.
_UNSHOWN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)
_MARKS = re.compile(r"([\\`*_{}\[\]<>~&$|])")
_LIVE = re.compile(r"(@|#(?=\d)|:(?=//)|www(?=\.)|^[-+#=]|^\d+(?=[.)]))", re.IGNORECASE)


def plain(value: object, limit: int = 2000) -> str:
    """``value`` on one line, with what cannot be shown as U+FFFD, clipped.

    >>> plain("cat\\x00\\nrow"), plain("abcdefgh", 5)
    ('cat\ufffd row', 'abcd…')
    """
    text = _UNSHOWN.sub("\ufffd", re.sub(r"[\t\r\n]+", " ", str(value)[: 2 * limit]))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def markdown(value: object, limit: int = 2000) -> str:
    """``value`` so that Markdown shows it as it is: no markup, no link, nobody mentioned.

    >>> markdown("<b> [x](y) | @me")
    '\\\\<b\\\\> \\\\[x\\\\](y) \\\\| @\\u2060me'
    """
    # A word joiner shows as nothing, and what it parts is neither a mention nor a link.
    text = _LIVE.sub(lambda found: f"{found[0]}\u2060", plain(value, limit).strip())
    return _MARKS.sub(r"\\\1", text)


def with_interval(value: float, interval: Interval) -> str:
    """A share with its 95 % interval.

    >>> with_interval(0.5, Interval(low=0.4, high=0.6))
    '50.0 % (40.0 to 60.0)'
    """
    return f"{percent(value)} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def demand(gate: Gate) -> str:
    """What a gate asks.

    >>> demand(Gate(metric="robust_accuracy", on="lower", threshold=0.4, value=0.5, passed=True))
    'robust_accuracy >= 40.0 %'
    """
    if gate.metric == "believable":
        return "believable"
    if gate.metric.startswith("change_of_"):
        name = gate.metric.removeprefix("change_of_")
        return f"{name} falls by at most {-100 * gate.threshold:g} points"
    return f"{gate.metric} >= {percent(gate.threshold)}"


def answer(gate: Gate) -> str:
    """What a gate found, in a sentence.

    >>> answer(Gate(metric="robust_accuracy", on="lower", threshold=0.4, value=0.3, passed=False))
    'robust_accuracy 30.0 % (lower end of the 95 % interval) is under 40.0 %'
    """
    of = "lower end of the 95 % interval" if gate.on == "lower" else "figure"
    detail = f" ({gate.detail})" if gate.detail else ""
    if gate.metric == "believable":
        return "the evaluation can be believed" if gate.passed else (
            "the evaluation cannot be believed yet"
        )  # fmt: skip
    if gate.metric.startswith("change_of_"):
        name = gate.metric.removeprefix("change_of_")
        said = "no more than" if gate.passed else "more than"
        return (
            f"{name} changed by {100 * gate.value:+.1f} points ({of}), a fall of {said} the "
            f"{-100 * gate.threshold:g} points allowed{detail}"
        )
    said = "reaches" if gate.passed else "is under"
    return f"{gate.metric} {percent(gate.value)} ({of}) {said} {percent(gate.threshold)}{detail}"
