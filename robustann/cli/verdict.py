"""The verdict of an audit as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from robustann.cli.options import share

if TYPE_CHECKING:
    from robustann.results import AuditResult


def verdict(result: AuditResult) -> str:
    """Headline, threat model, and a line for each attack."""
    worst = result.worst_case.scores
    lines = [
        f"robust accuracy {share(worst.accuracy)} (95 % interval {share(worst.interval.low)} to "
        f"{share(worst.interval.high)}), clean accuracy {share(result.clean_accuracy)}, "
        f"{result.n} images",
        result.threat.words,
        "",
        f"{'attack':34} {'accuracy':>9} {'success rate':>22} {'propagations/image':>19}",
    ]
    for attack in result.attacks:
        rate = "-" if attack.success_rate is None else share(attack.success_rate)
        of = f"{rate} of {attack.attempted}"
        cost = (attack.forwards + attack.backwards) / max(attack.attempted, 1)
        name = f"{attack.label} (control)" if attack.control else attack.label
        lines.append(f"{name:34} {share(attack.scores.accuracy):>9} {of:>22} {cost:>19.1f}")
    return "\n".join([*lines, ""])
