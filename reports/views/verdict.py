"""The state of the headline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robustann.results import AuditResult


@dataclass(frozen=True)
class Verdict:
    """The state of the headline, by :data:`VERDICT_RULE`: a colour class, a symbol and words."""

    state: Literal["unknown", "broken", "unsure", "most", "part", "held"]
    symbol: str
    words: str


VERDICTS = (
    Verdict("broken", "×", "No better than guessing"),  # noqa: RUF001
    Verdict("unsure", "?", "Too few samples to tell it from guessing"),
    Verdict("most", "▼", "Most of the accuracy is lost"),
    Verdict("part", "▽", "Part of the accuracy is lost"),
    Verdict("held", "●", "No clear loss found"),
    Verdict("unknown", "?", "Not measured"),
)
VERDICT_RULES = {
    "broken": "the robust accuracy is not above chance",
    "unsure": "it is above chance, but its interval reaches down to it: take more samples",
    "most": "the robust accuracy is less than half of the clean accuracy",
    "part": "at least half is left, but the interval lies under the clean accuracy",
    "held": "the interval reaches the clean accuracy, as it also does when attacks are too weak",
    "unknown": "no attack ran",
}


def verdict(result: AuditResult) -> Verdict:
    """The verdict on a result, by the rule that the report states."""
    worst = result.worst_case.scores
    state = "held"
    if all(attack.control for attack in result.attacks):
        state = "unknown"
    elif worst.accuracy <= result.chance or worst.interval.high <= result.chance:
        state = "broken"
    elif worst.interval.low <= result.chance:
        state = "unsure"
    elif worst.accuracy < result.clean.accuracy / 2:
        state = "most"
    elif worst.interval.high < result.clean.accuracy:
        state = "part"
    return next(known for known in VERDICTS if known.state == state)
