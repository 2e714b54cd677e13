"""What an audit does about a model that would mislead its attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from robustann.attacks import Attack, Square
from robustann.attacks.rays import RayS
from robustann.auditing.inner import Part, SeenThrough
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
    follow; what was found, with what was done about it; and the forwards and backwards of single
    images that finding it took."""

    model: nn.Module
    stages: tuple[Stage, ...]
    draws: int
    gradients: bool
    findings: tuple[Finding, ...]
    propagations: int = 0

    def fitting(self, stages: Sequence[Stage]) -> tuple[Stage, ...]:
        """Those of further stages that can run: none by gradients where there are none."""
        return tuple(
            stage for stage in stages if self.gradients or stage.attack.access != "white-box"
        )


def searched(
    stages: Sequence[Stage],
    findings: Sequence[Finding],
    *,
    robust_accuracy: float = 1.0,
    chance: float = 0.0,
) -> tuple[Finding, ...]:
    """The findings of the whole audit, where its own searches answer one of them.

    A search from scratch answers that gradient attacks were beaten by one. It answers missing
    gradients only where the searches, alone or together, leave a ``robust_accuracy`` of no more
    than ``chance``: what withstands a search proves little.

    >>> from robustann.trust.checks import conclude
    >>> missing = conclude("gradient-missing", True, "No image has a gradient.")
    >>> stages = [Stage(Square(queries=1000))]
    >>> [searched(stages, [missing], robust_accuracy=left, chance=0.1)[0].remedy is not None
    ...  for left in (0.05, 0.3)]
    [True, False]
    """
    queries = [stage.attack.queries for stage in stages if _from_scratch(stage.attack)]
    if not queries:
        return tuple(findings)
    done = {
        "black-box-wins": f"The worst case includes a search from scratch, {max(queries)} queries "
        "an image.",
    }
    if robust_accuracy <= chance:
        done["gradient-missing"] = (
            f"Searches without gradients, {max(queries)} queries an image, left no more than "
            "guessing would get right."
        )
    return tuple(
        one.remedied(done[one.check]) if one.verdict == "fail" and one.check in done else one
        for one in findings
    )


def _from_scratch(attack: Attack) -> TypeGuard[Square | RayS]:
    return isinstance(attack, (Square, RayS)) and attack.start != "best"


def plan(
    model: nn.Module,
    stages: Sequence[Stage],
    diagnosis: Diagnosis,
    threat: ThreatModel,
    *,
    queries: int,
    draws: int = 1,
    fixed: bool = False,
    part: Part | None = None,
) -> Plan:
    """Adapt an audit to what the diagnosis says.

    A randomised model is averaged (EOT), and probabilities are attacked through their logarithm.
    Where gradients are missing or mislead, where the model optimises while it predicts, and where
    predictions hang on the batch, a search from scratch by scores, of so many ``queries`` an
    image, is added; where gradients are missing, also one that needs the predicted class alone,
    of as many, and attacks by gradients are left out; unless there is a ``part`` of the model
    through which they can see it. ``fixed`` keeps the attacks as they are, since the caller named
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
    seen = ""
    if part is not None:
        attacked = SeenThrough(model, part.module)
        seen = (
            f"Gradients were taken through '{part.name}', a part of the model that has them and "
            f"agrees with it on {part.agreement:.0%} of the images, as if the rest were the "
            "identity (BPDA); successes are the whole model's. "
        )
    gradients = not diagnosis.gradient_missing or part is not None
    chosen = tuple(stages)
    added: list[str] = []
    if not gradients and not fixed:
        chosen = tuple(stage for stage in stages if stage.attack.access != "white-box")
    suspect = (
        diagnosis.gradient_missing
        or diagnosis.gradient_unreliable
        or diagnosis.dynamic
        or diagnosis.batch_dependent
    )
    searches: dict[Attack, str] = {Square(queries=queries): "by scores"} if suspect else {}
    if diagnosis.gradient_missing:
        searches[RayS(queries=queries)] = "by the predicted class alone"
    for search, how in searches.items():
        if not fixed and threat.norm in search.norms:
            chosen = (*chosen, Stage(search))
            added.append(f"{how} ({search.label})")
    told = f"{seen}Searches without gradients were added: {', '.join(added)}."
    if added:
        for check in (
            "gradient-mismatch", "gradient-shattered", "dynamic-defense", "batch-dependent"
        ):  # fmt: skip
            done[check] = told
        if part is not None:
            done["gradient-missing"] = told
    findings = tuple(
        one.remedied(done[one.check]) if one.verdict == "fail" and one.check in done else one
        for one in diagnosis.findings
    )
    if added and not gradients:
        # The searches stand alone there. That check stays failed, unless next to nothing stands:
        # see :func:`searched`.
        findings = tuple(
            one.model_copy(
                update={
                    "explanation": f"{one.explanation} {told} What withstands them alone proves "
                    "little."
                }
            )
            if one.check == "gradient-missing"
            else one
            for one in findings
        )
    return Plan(
        attacked,
        chosen,
        draws,
        gradients,
        findings,
        diagnosis.propagations,
    )
