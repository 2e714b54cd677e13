"""The verdict of an audit as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from robustann.cli.options import share

if TYPE_CHECKING:
    from robustann.results import AttackOutcome, AuditResult, Corruptions, Interval, Weights


def _accuracy(kind: str, value: float, interval: Interval) -> str:
    return (
        f"{kind} accuracy {share(value)} (95 % interval {share(interval.low)} to "
        f"{share(interval.high)})"
    )


def _certified(result: AuditResult) -> list[str]:
    """What is proven, on a line of its own."""
    found = result.certificate
    if found is None:
        return []
    accuracy = _accuracy("certified", found.certified_accuracy, found.interval)
    line = f"{accuracy}, proven ({found.method})"
    if found.crossed:
        line += f"; but {len(found.crossed)} certified samples were broken: one of both is wrong"
    return [line]


def _protocol(result: AuditResult) -> list[str]:
    """What can be compared with published figures, where the headline counts more."""
    found = result.protocol
    if found is None:
        return []
    line = f"{_accuracy('robust', found.accuracy, found.interval)} by {found.words}"
    more = round((found.accuracy - result.robust_accuracy) * result.n)
    return [f"{line}; {more} more fell to what the audit added" if more else line]


def verdict(result: AuditResult) -> str:
    """Headline, threat model, the attacks, and whether to believe it."""
    from robustann.findings import unresolved

    worst = result.worst_case.scores
    lines = [
        f"{_accuracy('robust', worst.accuracy, worst.interval)}, clean accuracy "
        f"{share(result.clean_accuracy)}, {result.n} images",
        *_protocol(result),
        *_certified(result),
        result.threat.words,
        "",
    ]
    rows = [row for attacks in _in_turn(result.attacks) for row in _rows(attacks)]
    width = max(len(name) for name in ["attack", *(name for name, *_ in rows)])
    lines.append(f"{'attack':{width}} {'accuracy':>9} {'success rate':>20} {'passes/image':>13}")
    lines += [
        f"{name:{width}} {accuracy:>9} {rate:>20} {cost:>13}" for name, accuracy, rate, cost in rows
    ]
    if result.corruptions is not None:
        lines += ["", *_corruptions(result.corruptions)]
    if result.weights is not None:
        lines += ["", *_weights(result.weights)]
    open_questions = unresolved(result.findings)
    for finding in open_questions:
        lines += [
            "",
            f"do not believe this yet: {finding.check}: {finding.explanation} "
            f"(robustann explain {finding.check})",
        ]
    for finding in result.findings:
        if finding.remedy is not None:
            lines += ["", f"{finding.check}: {finding.remedy}"]
    if result.findings and not open_questions and not result.believable:
        lines += ["", "too few checks of the evaluation could be made to believe it"]
    elif result.findings and not open_questions:
        made = sum(finding.verdict != "not run" for finding in result.findings)
        lines += ["", f"{made} checks of the evaluation itself found nothing against it"]
    return "\n".join([*lines, ""])


def _in_turn(attacks: Sequence[AttackOutcome]) -> list[list[AttackOutcome]]:
    """The attacks, in stretches: those that a cascade repeats, as long as they break nothing, stand
    together; each other one alone."""
    labels = {attack.label for attack in attacks}

    def idle(attack: AttackOutcome) -> bool:
        repeated = "#" in attack.label or f"{attack.label}#2" in labels
        return repeated and attack.success_rate == 0

    stretches: list[list[AttackOutcome]] = []
    for repeated, members in groupby(attacks, idle):
        some = list(members)
        stretches += [some] if repeated else [[attack] for attack in some]
    return stretches


def _rows(attacks: Sequence[AttackOutcome]) -> list[tuple[str, str, str, str]]:
    """Cells of a stretch: one row where many broke nothing, otherwise a row each."""
    if len(attacks) > 3:
        most = max(attack.attempted for attack in attacks)
        spent = sum(attack.forwards + attack.backwards for attack in attacks) / most
        name, accuracy = f"({len(attacks)} more, in turn)", share(attacks[-1].scores.accuracy)
        return [(name, accuracy, f"{share(0.0)} of {most}", f"{spent:.1f}")]
    rows = []
    for attack in attacks:
        rate = "-" if attack.success_rate is None else share(attack.success_rate)
        cost = (attack.forwards + attack.backwards) / max(attack.attempted, 1)
        name = f"{attack.label} (control)" if attack.control else attack.label
        accuracy, of = share(attack.scores.accuracy), f"{rate} of {attack.attempted}"
        rows.append((name, accuracy, of, f"{cost:.1f}"))
    return rows


def _corruptions(found: Corruptions) -> list[str]:
    """What happens where nobody attacks, and what could not be measured."""
    lines = []
    if found.mean_accuracy is not None and found.worst is not None:
        kind, level = found.worst
        lines.append(
            f"corruptions (control, no attacker): accuracy {share(found.mean_accuracy)} in the "
            f"mean, {share(level.accuracy)} under the worst, {kind.replace('_', ' ')} at severity "
            f"{level.severity}"
        )
    return [*lines, *(f"corruption not measured: {reason}" for reason in found.not_measured)]


def _weights(weights: Weights) -> list[str]:
    """What wrong bits do: at random in one of 100, and the fewest chosen ones."""
    lines = [f"weights not measured: {reason}" for reason in weights.not_measured]
    fixed, search = weights.fixed, weights.search
    if fixed is not None:
        level = min(fixed.levels, key=lambda level: abs(level.rate - 0.01))
        lines.append(
            f"weights in {fixed.bits} bits, {100 * level.rate:.3g} % of them wrong: error "
            f"{share(level.mean)} in the mean, {share(level.worst)} in the worst of "
            f"{len(weights.seeds)} patterns, {share(fixed.stored_error)} with none wrong"
        )
    if search is not None:
        control = f", {share(min(search.control))} for random ones" if search.control else ""
        lines.append(
            f"{'fewest' if search.reached else 'not enough'} flips found: {len(search.flips)} of "
            f"{search.total_bits:,} bits, accuracy {share(search.accuracy)} instead of "
            f"{share(search.stored_accuracy)}{control}"
        )
    return lines
