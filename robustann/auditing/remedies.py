"""What an audit does about a model that would mislead its attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustann.attacks import MM, Attack, HopSkipJump, RayS, Square
from robustann.auditing.inner import Part, SeenThrough
from robustann.auditing.presets import Stage
from robustann.findings import Finding
from robustann.results import AttackOutcome
from robustann.threat import ThreatModel
from robustann.trust import Diagnosis

# Forwards averaged for a randomised model, as in AutoAttack's "rand" (Croce and Hein, 2020).
DRAWS = 20
# Finite differences that differ from a gradient by more of its length share nothing with it.
_USELESS = 0.9
# How many times the queries a search by the predicted class alone has where nothing else is left.
_LONGER = 3
# The checks that no search answers while it leaves more standing than guessing would get right.
_ALONE = ("gradient-missing", "gradient-mismatch", "unbounded-attack")
# The checks that a gradient fails which is there and leads astray.
MISLEADING = ("gradient-mismatch", "gradient-shattered", "dynamic-defense")
# The checks that doubt whether a success is one: of a figure that cannot be too high, too. The
# others say that attacks may have missed something.
_OF_SUCCESS = ("randomised", "batch-dependent", "training-mode", "certificate-crossed")


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
    """What to attack, with what, and what was found and done about it.

    Attributes:
        model: judges every success; the figures of the result are its.
        stages: the attacks.
        draws: forwards averaged for each answer.
        gradients: whether there are gradients to follow, the model's or a part's.
        findings: of the diagnosis, with what was done about it.
        propagations: forwards and backwards of single images that finding it took.
        seen: the model seen through a part of it, for the stages that ask for it.
        only_seen: whether the model itself has no gradients.
        searches: the searches that were added, and ``answered`` the checks that they answer.
        own: how many of the stages, from the first, are those that were asked for.
    """

    model: nn.Module
    stages: tuple[Stage, ...]
    draws: int
    gradients: bool
    findings: tuple[Finding, ...]
    propagations: int = 0
    seen: SeenThrough | None = None
    only_seen: bool = False
    searches: tuple[Attack, ...] = ()
    answered: frozenset[str] = frozenset()
    own: int = 0

    @property
    def attacked(self) -> nn.Module:
        """What gradients are taken of by default."""
        return self.seen if self.seen is not None and self.only_seen else self.model

    @property
    def leading(self) -> nn.Module:
        """What has gradients that lead somewhere: the part, where the model's own are useless."""
        return self.seen if self.seen is not None and self.useless else self.attacked

    @property
    def useless(self) -> bool:
        """Whether the model's own gradient was found to share nothing with its slope."""
        return any(map(_useless, self.findings))

    def draws_of(self, model: nn.Module) -> int:
        """Forwards to be averaged by who asks this model: seen through a part it does so itself."""
        return 1 if model is self.seen else self.draws

    def price_of(self, model: nn.Module, forwards: int, backwards: int) -> int:
        """The propagations that so many forwards and backwards of this model come to: seen through
        a part, a forward is one of the whole and one of the part, for each draw."""
        if self.seen is None or model is not self.seen:
            return forwards + backwards
        return self.seen.price * forwards + self.seen.draws * backwards

    def seen_by(self, stage: Stage) -> nn.Module:
        """The model as a stage attacks it."""
        return self.seen if self.seen is not None and stage.through else self.model

    def fitting(self, stages: Sequence[Stage]) -> tuple[Stage, ...]:
        """Those of further stages that can run: none by gradients where there are none, and
        through a part where only that has them."""
        if self.only_seen:
            return tuple(_through(stage) for stage in stages)
        return tuple(
            stage for stage in stages if self.gradients or stage.attack.access != "white-box"
        )


def _useless(one: Finding) -> bool:
    """A gradient that is off by its own length leads nowhere: as if there were none."""
    failed = one.check == "gradient-mismatch" and one.verdict == "fail"
    return failed and (one.value is None or one.value > _USELESS)


def _through(stage: Stage) -> Stage:
    """The stage through a part, unless it owes nothing to gradients: that is the whole model's."""
    owes = stage.attack.access == "white-box" or getattr(stage.attack, "start", "") == "best"
    return replace(stage, through=True) if owes else stage


def withdrawn(
    made: Plan, findings: Sequence[Finding], outcomes: Sequence[AttackOutcome]
) -> tuple[Finding, ...]:
    """The findings without those answers of the plan that did not hold.

    A search that was planned and did not run, for lack of budget, answers nothing; nor is a model
    well seen through a part if searches of the whole break what attacks through the part do not.
    Where its own gradient only misleads, more rounds may then answer that: see
    :mod:`robustann.auditing.mending`.
    """
    ran = {one.label: one for one in outcomes}
    standing = sum(fell is None for fell in _last_broken(outcomes))
    left_out = [
        one.label for one in made.searches if not _went(ran.get(one.label), standing, made.draws)
    ]
    beaten = any(one.check == "black-box-wins" and one.verdict == "fail" for one in findings)
    why = (
        f"There was no budget for {' and '.join(left_out)}."
        if left_out
        else "Searches of the whole model break more than attacks through its part."
    )
    of_part = ("gradient-missing", *MISLEADING)
    return tuple(
        one.model_copy(
            update={"remedy": None, "explanation": f"{one.explanation} {one.remedy or ''} {why}"}
        )
        if one.verdict == "fail"
        and one.check in made.answered
        and (left_out or (beaten and one.check in of_part))
        else one
        for one in findings
    )


def answered(
    made: Plan,
    findings: Sequence[Finding],
    outcomes: Sequence[AttackOutcome],
    *,
    robust_accuracy: float = 1.0,
    chance: float = 0.0,
) -> tuple[Finding, ...]:
    """The findings of the whole audit, with the remedies that its own searches are, or are not.

    A search from scratch answers that gradient attacks were beaten by one, if all that stood went
    through it. It answers gradients that are missing, or wrong altogether, only where the
    searches, alone or together, leave a ``robust_accuracy`` of no more than ``chance``: what
    withstands a search proves little.

    Where nothing stands any more, nothing can have been missed: all is answered but what doubts the
    successes themselves.
    """
    standing = sum(fell is None for fell in _last_broken(outcomes))
    whole = [
        made_of
        for one in outcomes
        if one.access != "white-box" and not one.control and one.parameters.get("start") != "best"
        and (made_of := _queries(one, standing, made.draws)) is not None
    ]  # fmt: skip
    changed = []
    for one in findings:
        doubted = one.verdict == "fail" and one.remedy is None
        # What was planned for these and did not hold is known here.
        if doubted and whole and one.check not in made.answered:
            if one.check == "black-box-wins":
                one = one.remedied(
                    f"The worst case includes a search from scratch, {max(whole)} queries an image."
                )
            elif one.check in _ALONE and robust_accuracy <= chance:
                one = one.remedied(
                    f"Searches without gradients, {max(whole)} queries an image, left no more "
                    "than guessing would get right."
                )
        if doubted and robust_accuracy == 0 and one.remedy is None and one.check not in _OF_SUCCESS:
            one = one.remedied(
                "Nothing stands any more, each success confirmed by a forward of its own: robust "
                "accuracy cannot be lower."
            )
        changed.append(one)
    return tuple(changed)


def _queries(outcome: AttackOutcome, standing: int, draws: int) -> int | None:
    """Queries of a search that what it left standing faced (the median); None where it did not
    face nearly all that stands, or was cut short."""
    samples = outcome.samples
    left = sorted(
        count
        for count, fell in zip(samples.forwards, samples.success, strict=True)
        if count and not fell
    )
    planned = outcome.parameters.get("queries")
    if not isinstance(planned, int):
        return None
    if not left:
        return planned if not standing else None
    made = min(left[len(left) // 2] // draws, planned)
    return made if len(left) >= 0.95 * standing and made >= 0.9 * planned else None


def _went(outcome: AttackOutcome | None, standing: int, draws: int) -> bool:
    return outcome is not None and _queries(outcome, standing, draws) is not None


def _last_broken(outcomes: Sequence[AttackOutcome]) -> list[str | None]:
    """Which attack broke each sample that was attacked; None where none did."""
    if not outcomes:
        return []
    found: list[str | None] = []
    for row in range(len(outcomes[0].samples.success)):
        if any(one.samples.forwards[row] for one in outcomes):
            found.append(next((o.label for o in outcomes if o.samples.success[row]), None))
    return found


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
    image, is added; where the gradient does not only mislead, also one that needs the predicted
    class alone, of as many, or of three times as many if there is nothing else to go by. Where
    gradients are missing, attacks by gradients, and some more, go through a ``part`` of the model
    that has them, or are left out; where they mislead, the same attacks follow through the part,
    from starts of their own. Where they mislead and there is no part, what answers that is for
    :mod:`robustann.auditing.mending`.
    ``fixed`` adds and leaves out none, since the caller named the attacks.
    """
    done: dict[str, str] = {}
    judged = model
    if diagnosis.softmax_output:
        judged = LogProbabilities(model)
        done["softmax-output"] = "The attacks saw the logarithm of the output."
    if diagnosis.saturated:
        done["saturated-loss"] = (
            "The attacks maximise margins or log-odds, which do not saturate in float32."
        )
    if diagnosis.randomised:
        draws = max(draws, DRAWS)
        done["randomised"] = (
            f"Logits and gradients were averaged over {draws} draws (EOT), and a success had to "
            "hold for the average. What is drawn for an image depends on its batch, so figures "
            "vary a little with the batch size."
        )
    # For some images only: that is reason enough to go through a part, if there is one.
    partly = diagnosis.gradient_partly_missing
    missing = diagnosis.gradient_missing or (partly and part is not None)
    suspect = (
        missing
        or partly
        or (diagnosis.gradient_unreliable or diagnosis.dynamic or diagnosis.batch_dependent)
    )
    chosen = tuple(stages)
    if missing and part is not None:
        chosen = tuple(_through(stage) for stage in chosen)
    elif missing and not fixed:
        chosen = tuple(stage for stage in chosen if stage.attack.access != "white-box")
    own = len(chosen)
    seen, told = None, ""
    if part is not None:
        seen = SeenThrough(judged, part.module, draws)
        told = (
            f"Gradients were{'' if missing else ' also'} taken {part.words}; successes are the "
            "whole model's. "
        )
        if not fixed:
            chosen = (*chosen, *_further(chosen, threat, afresh=not missing))
    wanted: list[Attack] = [Square(queries=queries)] if suspect and not fixed else []
    if (missing or partly or diagnosis.dynamic or diagnosis.batch_dependent) and not fixed:
        alone = missing and part is None
        wanted.append(by_decisions(threat, _LONGER * queries if alone else queries))
    added = _fitted(wanted, threat)
    chosen = (*chosen, *added)
    if added:
        how = {"score": "by scores", "decision": "by the predicted class alone"}
        listed = ", ".join(f"{how[one.attack.access]} ({one.label})" for one in added)
        told += f"Searches without gradients were added: {listed}."
    answering: set[str] = set()
    if added or seen is not None:
        if seen is not None:
            answering = set(MISLEADING)
            if not missing and not any(map(_useless, diagnosis.findings)):
                # The part may be as rough as the whole: rounds have to settle.
                answering.discard("gradient-shattered")
        if seen is not None and added:
            answering.add("gradient-missing")
        if added:
            answering.add("batch-dependent")
        done |= dict.fromkeys(answering, told.strip())
    findings = []
    for one in diagnosis.findings:
        alone = one.check == "gradient-missing" or (_useless(one) and seen is None)
        if one.verdict == "fail" and one.check in done and not (alone and seen is None):
            one = one.remedied(done[one.check])
        elif one.verdict == "fail" and added and (alone or one.check in MISLEADING):
            # The searches stand alone there. Where there is no gradient at all, that check stays
            # failed, unless next to nothing stands: see :func:`answered`.
            more = f"{one.explanation} {told.strip()} What withstands them alone proves little."
            one = one.model_copy(update={"explanation": more})
        findings.append(one)
    return Plan(
        judged,
        chosen,
        draws,
        not missing or seen is not None,
        tuple(findings),
        diagnosis.propagations,
        seen,
        missing and seen is not None,
        tuple(stage.attack for stage in added),
        frozenset(answering),
        own,
    )


def by_decisions(threat: ThreatModel, queries: int) -> Attack:
    """The search that needs the predicted class alone: in linf along directions of signs.

    >>> by_decisions(ThreatModel("l2", 0.5), 100).label
    'hopskipjump:queries=100'
    """
    fits = threat.norm in RayS.norms
    return RayS(queries=queries) if fits else HopSkipJump(queries=queries)


def _further(stages: Sequence[Stage], threat: ThreatModel, *, afresh: bool) -> tuple[Stage, ...]:
    """What goes through a part beside the stages: three rounds that a short cascade lacks, for what
    stands in for a gradient is worse than one. Where the stages have followed the model's own, also
    those of them that start afresh: on all that stands, for how near a sample is to falling was
    told by a gradient that misleads."""
    ran = {stage.attack for stage in stages}
    again = [
        stage.attack
        for stage in stages
        if stage.attack.access == "white-box" and getattr(stage.attack, "start", "") != "best"
    ]
    rounds = (MM(), MM(rank=2), MM(leak=0.0))
    wanted = (*again, *rounds) if afresh else [one for one in rounds if one not in ran]
    fitted = _fitted(tuple(dict.fromkeys(wanted)), threat)
    return tuple(replace(stage, through=True) for stage in fitted)


def _fitted(attacks: Sequence[Attack], threat: ThreatModel) -> tuple[Stage, ...]:
    return tuple(Stage(one) for one in attacks if threat.norm in one.norms)
