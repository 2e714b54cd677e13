"""What to do next, as far as it follows from what was found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from robustann.findings import unresolved
from robustann.reports.filters import percent
from robustann.reports.views.attacks import spent
from robustann.reports.views.classes import weakest
from robustann.reports.views.confidence import sure
from robustann.reports.views.verdict import measured, verdict
from robustann.results import AuditResult

# From which gaps on something is worth a word: of a class under the average, of an interval's
# width, and of what still fell in the last fifth of the effort.
_BEHIND, _WIDE, _SINKING = 0.15, 0.1, 0.01
# Confidence of wrong answers from which on it warns of nothing.
_SURE = 0.7


@dataclass(frozen=True)
class Advice:
    """One thing to do, why, and a command for it, if there is one; ``subject`` is a name from
    outside that it is about.

    >>> next_steps = {one.what: one for one in advice(result)}
    >>> next_steps["Harden the model"].command
    'robustann harden'
    """

    what: str
    why: str
    command: str = ""
    subject: str = ""


def advice(result: AuditResult) -> list[Advice]:
    """What follows from the findings, most urgent first.

    >>> advice(result)[0].what  # the interval of four samples is wide
    'Take more samples'
    """
    return [*_evaluation(result), *_model(result), *_further(result)]


def _evaluation(result: AuditResult) -> Iterator[Advice]:
    """First what was audited, and the audit itself."""
    if result.seal is not None and not result.seal.intact:
        yield Advice(
            "Do not use this model file",
            "It is not what was sealed: Weights says what differs. Copy it again from where you "
            "trust it.",
            "robustann verify",
        )
    wrong = unresolved(result.findings)
    if result.certificate is not None and result.certificate.crossed:
        yield Advice(
            "Find out which of proof and attack is wrong",
            "Certified samples were broken: one of the two is no more than a mistake.",
        )
    if wrong:
        yield Advice(
            "Mend the evaluation before anything else",
            f"{len(wrong)} check{'s' * (len(wrong) != 1)} failed without a remedy; Trust says of "
            "each what to do. Until then the robust accuracy may be far too high.",
        )
    elif not result.findings:
        yield Advice(
            "Let the audit check itself",
            "Nobody looked whether the attacks work on this model.",
            "robustann audit --trust",
        )
    elif not result.believable:
        yield Advice(
            "Make more checks possible",
            "Too few could be made to believe the figures; Trust says what each of them needs.",
        )
    span = result.worst_case.scores.interval
    if verdict(result).state == "unsure" or span.high - span.low > _WIDE:
        yield Advice(
            "Take more samples",
            f"The interval of the robust accuracy reaches from {percent(span.low)} to "
            f"{percent(span.high)}.",
            "robustann audit --max-samples",
        )
    steps = spent(result)
    late = [share for propagations, share in steps if propagations >= 0.8 * steps[-1][0]]
    before = [share for propagations, share in steps if propagations < 0.8 * steps[-1][0]]
    if len(steps) > 2 and before and before[-1] - late[-1] >= _SINKING:
        yield Advice(
            "Attack for longer",
            f"In the last fifth of the effort robust accuracy still fell from "
            f"{percent(before[-1])} to {percent(late[-1])}.",
            "robustann audit --preset thorough",
        )


def _model(result: AuditResult) -> Iterator[Advice]:
    """Then the model."""
    state = measured(result).state
    if state in ("broken", "most", "part") and result.hardening is None:
        yield Advice(
            "Harden the model",
            "Its accuracy does not survive this attacker. Adversarial training is what is known to "
            "help; audits before and after tell by how much.",
            "robustann harden",
        )
    lowest, robust = weakest(result), result.robust_accuracy
    if len(lowest) == 1 and robust - lowest[0].worst.recall >= _BEHIND:
        yield Advice(
            "Look at the weakest class",
            f"Its worst-case recall is {percent(lowest[0].worst.recall)}, against "
            f"{percent(robust)} over all.",
            subject=lowest[0].worst.name,
        )
    found = sure(result)
    wrong = _confidence_when_wrong(result) if found is not None else None
    if wrong is not None and wrong >= _SURE:
        yield Advice(
            "Do not rely on confidence to notice attacks",
            f"Where the model is wrong in the worst case it is {percent(wrong)} sure in the mean.",
        )


def _confidence_when_wrong(result: AuditResult) -> float | None:
    rows = zip(
        result.worst_case.confidence,
        result.worst_case.broken_by,
        strict=True,
    )
    held = [confidence for confidence, by in rows if by is not None and confidence is not None]
    return sum(held) / len(held) if held else None


def _further(result: AuditResult) -> Iterator[Advice]:
    """Then what this audit did not ask."""
    yield Advice(
        "Ask about other attackers",
        f"This audit knows one threat model, {result.threat.norm}; a model that withstands it may "
        "fall to another.",
        "robustann audit --config",
    )
    if result.certificate is None and result.threat.norm in ("linf", "l2"):
        yield Advice(
            "Bound it from below too",
            "Attacks bound the robust accuracy from above alone.",
            "robustann audit --certify",
        )
    if result.weights is None:
        yield Advice(
            "Ask what wrong bits in the weights do",
            "Memory fails, and stored weights can be attacked like images.",
            "robustann audit --weights",
        )
    if not result.gates:
        yield Advice(
            "Keep what was reached",
            "A gate lets CI fail when a later model falls below it.",
            "robustann audit --fail-under robust_accuracy=",
        )
