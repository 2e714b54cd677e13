"""The state of the headline, and what stands beside it at a glance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robustann.findings import unresolved
from robustann.results import AuditResult

State = Literal["doubted", "unknown", "broken", "unsure", "most", "part", "held"]


@dataclass(frozen=True)
class Verdict:
    """The state of the headline, by :data:`VERDICT_RULES`: a colour class, a symbol and words.

    >>> verdict(result).state, verdict(result).words
    ('broken', 'No better than guessing')
    """

    state: State
    symbol: str
    words: str


VERDICTS = (
    Verdict("doubted", "!", "Not to be believed yet"),
    Verdict("unknown", "?", "Not measured"),
    Verdict("broken", "×", "No better than guessing"),  # noqa: RUF001
    Verdict("unsure", "?", "Too few samples to tell it from guessing"),
    Verdict("most", "▼", "Most of the accuracy is lost"),
    Verdict("part", "▽", "Part of the accuracy is lost"),
    Verdict("held", "●", "No clear loss found"),
)
VERDICT_RULES: dict[str, str] = {
    "doubted": (
        "a check of the evaluation failed and nothing was done about it, too few checks could be "
        "made, or a certified sample was broken: see Trust"
    ),
    "unknown": "no attack ran",
    "broken": "the robust accuracy is not above chance",
    "unsure": "it is above chance, but its interval reaches down to it: take more samples",
    "most": "the robust accuracy is less than half of the clean accuracy",
    "part": "at least half is left, but the interval lies under the clean accuracy",
    "held": "the interval reaches the clean accuracy, as it also does when attacks are too weak",
}


def verdict(result: AuditResult) -> Verdict:
    """The verdict on a result, by the rule that the report states.

    >>> verdict(result).words, VERDICT_RULES[verdict(result).state]
    ('No better than guessing', 'the robust accuracy is not above chance')
    """
    return next(known for known in VERDICTS if known.state == _state(result))


def measured(result: AuditResult) -> Verdict:
    """What the figures alone say, whether or not they are to be believed.

    >>> doubted = result.model_copy(update={"findings": ()})
    >>> measured(doubted) == measured(result)
    True
    """
    return next(known for known in VERDICTS if known.state == _measured(result))


def _state(result: AuditResult) -> State:
    contradicted = result.certificate is not None and bool(result.certificate.crossed)
    if contradicted or (result.findings and not result.believable):
        return "doubted"
    return _measured(result)


def _measured(result: AuditResult) -> State:
    worst = result.worst_case.scores
    if all(attack.control for attack in result.attacks):
        return "unknown"
    if worst.accuracy <= result.chance or worst.interval.high <= result.chance:
        return "broken"
    if worst.interval.low <= result.chance:
        return "unsure"
    if worst.accuracy < result.clean.accuracy / 2:
        return "most"
    if worst.interval.high < result.clean.accuracy:
        return "part"
    return "held"


@dataclass(frozen=True)
class Glance:
    """One answer beside the headline: pass, fail, partly, or nobody asked.

    >>> gates = glance(result)[1]
    >>> gates.about, gates.state, gates.words
    ('Gates', 'none', 'No gate set')
    """

    state: Literal["pass", "fail", "warn", "none"]
    symbol: str
    about: str
    words: str
    more: str
    section: str


def glance(result: AuditResult) -> list[Glance]:
    """Whether to believe it, and whether it is good enough: what a reader asks first.

    >>> [(one.about, one.state) for one in glance(result)]
    [('Evaluation', 'pass'), ('Gates', 'none')]
    """
    return [_trust(result), _gates(result)]


def _trust(result: AuditResult) -> Glance:
    about, section = "Evaluation", "trust"
    passed = sum(one.verdict == "pass" for one in result.findings)
    failed = sum(one.verdict == "fail" for one in result.findings)
    total = len(result.findings)
    wrong = len(unresolved(result.findings))
    if result.certificate is not None and result.certificate.crossed:
        told = "A proof and an attack contradict each other: see the certificate"
        return Glance("fail", "×", about, told, "", "certificate")  # noqa: RUF001
    if not total or passed + failed == 0:
        return Glance(
            "none", "?", about, "Not checked", "Nobody looked whether attacks work", section
        )
    more = f"{passed} of {total} checks passed"
    if wrong:
        told = f"{wrong} check{'s' * (wrong != 1)} failed"
        return Glance("fail", "×", about, told, more, section)  # noqa: RUF001
    if not result.believable:
        return Glance("warn", "?", about, "Too few checks could be made", more, section)
    if failed:
        return Glance("warn", "▽", about, f"{failed} failed, remedied", more, section)
    return Glance("pass", "✓", about, "No reason for doubt", more, section)


def _gates(result: AuditResult) -> Glance:
    about, section = "Gates", "gates"
    total = len(result.gates)
    failed = sum(not gate.passed for gate in result.gates)
    if not total:
        return Glance("none", "–", about, "No gate set", "--fail-under sets one", "")  # noqa: RUF001
    more = f"{total - failed} of {total} passed"
    if failed:
        return Glance("fail", "×", about, f"{failed} failed", more, section)  # noqa: RUF001
    return Glance("pass", "✓", about, "All passed", more, section)


def knowledge(result: AuditResult) -> str:
    """What the attackers of the audit knew of the model, in a sentence.

    >>> knowledge(result)
    'The attacker knows the weights, and every defense that belongs to the model.'
    """
    access = {attack.access for attack in result.attacks if not attack.control}
    if "white-box" in access:
        return "The attacker knows the weights, and every defense that belongs to the model."
    if "score" in access:
        return "The attacker sees the scores of all classes, and knows nothing else of the model."
    if "decision" in access:
        return "The attacker sees the predicted class alone, and knows nothing else of the model."
    return "No attacker tried."
