"""What an audit does about a model that would mislead its attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustann.attacks import Square
from robustann.auditing.presets import Stage
from robustann.findings import Finding
from robustann.threat import ThreatModel
from robustann.trust import Diagnosis

# Forwards averaged for a randomised model, as in AutoAttack's "rand" (Croce and Hein, 2020).
_DRAWS = 20


class LogProbabilities(nn.Module):
    """A model that returns probabilities, seen through a logarithm.

    Predictions stay the same; gradients do not vanish where the softmax is saturated.

    >>> LogProbabilities(nn.Softmax(dim=1))(torch.tensor([[0.0, 0.0]])).exp()
    tensor([[0.5000, 0.5000]])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        probabilities: Tensor = self.model(x)
        return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()


@dataclass(frozen=True)
class Plan:
    """What to attack, with what, averaged over how many draws, whether there are gradients to
    follow; and what was found, with what was done about it."""

    model: nn.Module
    stages: tuple[Stage, ...]
    draws: int
    gradients: bool
    findings: tuple[Finding, ...]


def searched(stages: Sequence[Stage], findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The findings of the whole audit, where its own search from scratch answers one of them."""
    queries = [
        stage.attack.queries
        for stage in stages
        if isinstance(stage.attack, Square) and stage.attack.start != "best"
    ]
    if not queries:
        return tuple(findings)
    remedy = f"The worst case includes a search from scratch, {max(queries)} queries an image."
    return tuple(
        one.remedied(remedy) if one.check == "black-box-wins" and one.verdict == "fail" else one
        for one in findings
    )


def plan(
    model: nn.Module,
    stages: Sequence[Stage],
    diagnosis: Diagnosis,
    threat: ThreatModel,
    *,
    queries: int,
    draws: int = 1,
    fixed: bool = False,
) -> Plan:
    """Adapt an audit to what the diagnosis says.

    A randomised model is averaged (EOT), probabilities are attacked through their logarithm, and
    where gradients are missing or mislead, a search from scratch without gradients, of so many
    ``queries`` an image, is added. ``fixed`` keeps the attacks as they are, since the caller named
    them.
    """
    done: dict[str, str] = {}
    attacked = model
    if diagnosis.softmax_output:
        attacked = LogProbabilities(model)
        done["softmax-output"] = "The attacks saw the logarithm of the output."
    if diagnosis.saturated:
        done["saturated-loss"] = (
            "The attacks maximise margins or log-odds, which do not saturate in float32."
        )
    if diagnosis.randomised:
        draws = max(draws, _DRAWS)
        done["randomised"] = (
            f"Logits and gradients were averaged over {draws} draws (EOT), and a success had to "
            "hold for the average."
        )
    chosen = tuple(stages)
    search = Square(queries=queries)
    searches = not fixed and threat.norm in search.norms
    if diagnosis.gradient_missing and not fixed:
        chosen = tuple(stage for stage in stages if stage.attack.access != "white-box")
    if searches and (diagnosis.gradient_missing or diagnosis.gradient_unreliable):
        chosen = (*chosen, Stage(search))
        # Where gradients are missing altogether the search stands alone, and what withstands it
        # proves little: that check stays failed.
        for check in ("gradient-mismatch", "gradient-shattered"):
            done[check] = f"A search without gradients, {queries} queries an image, was added."
    findings = tuple(
        one.remedied(done[one.check]) if one.verdict == "fail" and one.check in done else one
        for one in diagnosis.findings
    )
    return Plan(attacked, chosen, draws, not diagnosis.gradient_missing, findings)
