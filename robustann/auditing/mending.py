"""What an audit does about attacks of its own that were found wanting: more of what works."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from robustann.attacks import APGD, FGSM, MM, PGD, Square, UniformNoise
from robustann.auditing.presets import Preset, Stage, labelled
from robustann.auditing.remedies import MISLEADING, Plan, by_decisions
from robustann.findings import Finding
from robustann.results import AttackOutcome, AuditResult
from robustann.threat import ThreatModel

# What the last of several attacks may still add, as a share of the attacked samples, where they
# were to go on until nothing more falls; one sample is chance.
_SETTLED = 0.01
# Nearly all that stand, where a budget leaves some out.
_ALL = 0.95
# What remedies are told by among the attacks.
_MARK = " (remedy)"


@dataclass(frozen=True)
class Within(Stage):
    """An attack that looks within a share of eps alone.

    >>> Within(MM(), reach=0.5).label
    'mm within 0.5 eps'
    """

    reach: float = 1.0

    @property
    def label(self) -> str:
        """With the share."""
        plain = self.attack.label
        within = f"{plain} within {self.reach:g} eps" if self.reach < 1 else plain
        return f"{within} through a part" if self.through else within

    def allowed(self, threat: ThreatModel) -> ThreatModel:
        """What it may do."""
        return threat if self.reach == 1 else threat.with_eps(self.reach * threat.eps)


@dataclass(frozen=True)
class Mend:
    """Attacks that are the remedy for a failed check, on all samples that stand.

    Attributes:
        check: which.
        what: what they are, in words.
        stages: the attacks, in order.
        until_settled: it is a remedy only if the last of them adds next to nothing.
        enough: whether it makes the evaluation one to be believed; else its images only count.
    """

    check: str
    what: str
    stages: tuple[Stage, ...]
    until_settled: bool = False
    enough: bool = True


@dataclass(frozen=True)
class Doubts:
    """What experiments and outcomes say against the attacks after two passes, what finding it
    cost, and what is done about it."""

    seen: tuple[Finding, ...] = ()
    propagations: int = 0
    mends: tuple[Mend, ...] = ()


def mends(
    checks: Collection[str],
    plan: Plan,
    threat: ThreatModel,
    preset: Preset,
    *,
    escalated: bool,
) -> tuple[Mend, ...]:
    """What there is to be done about these checks, which failed and were not answered yet.

    >>> from robustann.auditing.presets import get_preset
    >>> plan = Plan(None, (), 1, True, ())
    >>> (mend,) = mends(["steps-help"], plan, ThreatModel("linf", 0.1), get_preset("quick"),
    ...                 escalated=False)
    >>> [stage.label for stage in mend.stages]
    ['mm:steps=50', 'mm:steps=100']
    """
    found = []
    for mend in _known(threat, preset, escalated):
        # More of what goes astray is no remedy where gradients lead nowhere at all.
        if mend.check not in checks or (mend.check in MISLEADING and plan.useless):
            continue
        fitting = [one for one in mend.stages if one.fits(threat)]
        # What the plan searched with already is not bought again, but for the last: it tells
        # whether more would break more.
        fitting = [one for one in fitting if one is fitting[-1] or one.attack not in plan.searches]
        stages = plan.fitting(fitting)
        if stages:
            lacks = _searches(mend.stages) and not _searches(stages)
            found.append(
                Mend(mend.check, mend.what, stages, mend.until_settled, mend.enough and not lacks)
            )
    return tuple(found)


def _known(threat: ThreatModel, preset: Preset, escalated: bool) -> tuple[Mend, ...]:
    """In the order in which they run: what is cheap first, searches last."""
    steps = MM().steps
    longer = (Stage(MM(steps=2 * steps)), Stage(MM(steps=4 * steps)))
    search = Stage(Square(queries=preset.queries))
    again = Stage(MM(restarts=4))
    rounds = (
        again, Stage(MM(rank=2, restarts=2)), Stage(APGD(loss="margin")),
        Stage(MM(restarts=4, leak=0.0)), again,
    )  # fmt: skip
    return (
        Mend("noise-wins", "more noise, and a search from scratch", (
            Stage(UniformNoise(draws=100)), search,
        )),
        Mend("single-step-wins", "single steps of several lengths, and a search from scratch", (
            *(Within(FGSM(), reach=reach) for reach in (1.0, 0.75, 0.5, 0.25)), search,
        )),
        Mend("rising-curve", "attacks within smaller eps, whose images count here too", tuple(
            Within(MM(), reach=reach) for reach in (0.75, 0.5, 0.25)
        )),
        Mend("steps-help", "attacks of two and four times the steps", longer, until_settled=True),
        Mend(
            "incomplete-optimisation",
            "attacks of two and four times the steps",
            longer,
            until_settled=True,
        ),
        Mend("loss-choice", "attacks that climb cross-entropy", (
            Stage(PGD(loss="ce")), Stage(APGD()), Stage(PGD(loss="ce", restarts=4)),
        ), until_settled=True),
        *(
            # On rough surfaces rounds settle too early: their images count, and answer nothing.
            Mend(check, "more rounds", rounds, True, enough=check != "gradient-shattered")
            for check in ("restarts-help", *MISLEADING)
        ),
        Mend("black-box-wins", "a search from scratch on all that stood", (
            *(() if escalated else preset.escalation), search,
        )),
        # The one by the predicted class alone finds the most behind jumps.
        Mend("discontinuous", "searches without gradients", (
            search, Stage(by_decisions(threat, preset.queries)),
        ), until_settled=True),
        # What withstands searches where gradients fail proves little.
        Mend("unbounded-attack", "searches without gradients", (
            search, Stage(by_decisions(threat, preset.queries)),
        ), enough=False),
    )  # fmt: skip


def _searches(stages: Sequence[Stage]) -> bool:
    return any(stage.attack.access != "white-box" and not stage.attack.control for stage in stages)


def labelled_mends(found: Sequence[Mend]) -> list[tuple[str, Stage]]:
    """All their attacks with what they are called in the result; what several checks ask for runs
    once.

    >>> mend = Mend("steps-help", "more steps", (Stage(MM(steps=50)), Stage(MM(steps=50))))
    >>> [label for label, _ in labelled_mends([mend, mend])]
    ['mm:steps=50 (remedy)', 'mm:steps=50 (remedy)#2']
    """
    ran: dict[str, Stage] = {}
    for mend in found:
        ran |= dict(labelled(mend.stages, _MARK))
    return list(ran.items())


def mended(
    findings: Sequence[Finding], found: Sequence[Mend], result: AuditResult
) -> tuple[Finding, ...]:
    """The findings, with what remedies did, once they have run; ``result`` holds their outcomes.

    A remedy that a budget kept from most of what stood is none, nor is one after which more of it
    would still break more.
    """
    known = {mend.check: mend for mend in found}
    changed = []
    for one in findings:
        mend = known.get(one.check)
        if mend is not None and one.verdict == "fail" and one.remedy is None:
            told, done = _told(mend, result)
            one = (
                one.remedied(told)
                if done
                else one.model_copy(update={"explanation": f"{one.explanation} {told}"})
            )
        changed.append(one)
    return tuple(changed)


def _told(mend: Mend, result: AuditResult) -> tuple[str, bool]:
    """What a remedy did, and whether that answers the check."""
    # Nothing went to a runner-up that there is not.
    stages = [stage for stage in mend.stages if stage.aims(len(result.class_names))]
    labels = [label for label, _ in labelled(stages, _MARK)]
    places = {one.label: place for place, one in enumerate(result.attacks)}
    ran = [result.attacks[places[label]] for label in labels]
    stood = [_standing(result, places[label]) for label in labels]
    added = sum(one.added for one in ran)
    told = (
        f"All that stood ({stood[0]} images) went through {mend.what} ({', '.join(labels)}): "
        f"{added} fell, and count."
    )
    if any(
        # What goes to those near to falling alone leaves the others out on purpose.
        stage.near is None and one.attempted < _ALL * left
        for stage, one, left in zip(stages, ran, stood, strict=True)
    ):
        return f"There was no budget for {mend.what}.", False
    if _cut(result, places[labels[-1]]):
        return f"{told} The budget cut that short.", False
    last = ran[-1].added
    attacked = max((one.attempted for one in result.attacks), default=0)
    if mend.until_settled and last > 1 and last > _SETTLED * attacked:
        return f"{told} The last of them still broke {last}: more would break more.", False
    if not mend.enough:
        return f"{told} What withstands that alone proves little.", False
    return told, True


def _standing(result: AuditResult, place: int) -> int:
    """How many samples stood before the attack at this place."""
    return len(_left(result, result.attacks[:place]))


def _left(result: AuditResult, attacks: Sequence[AttackOutcome]) -> list[int]:
    """The samples that none of these attacks broke."""
    samples = result.clean_samples
    return [
        row
        for row, (guess, label) in enumerate(zip(samples.prediction, samples.label, strict=True))
        if guess == label and not any(one.samples.success[row] for one in attacks)
    ]


def _cut(result: AuditResult, place: int) -> bool:
    """Whether too many of the samples that stood after the attack at this place had by then spent
    their budget: it may have begun on all of them, and ended on few."""
    budget = result.provenance.config.get("budget")
    if not isinstance(budget, int):
        return False
    ran = result.attacks[: place + 1]
    left = _left(result, ran)
    # The curve comes on top of a budget.
    counted = [one for one in ran if not one.label.endswith("(curve)")]
    spent = (sum(one.samples.forwards[row] + one.samples.backwards[row] for one in counted)
             for row in left)  # fmt: skip
    return sum(price >= budget for price in spent) > (1 - _ALL) * len(left)
