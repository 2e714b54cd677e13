"""Named sets of attacks, and what an audit is told to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from robustann.attacks import APGD, FAB, MM, Attack, Square, UniformNoise
from robustann.attacks.base import at_least
from robustann.attacks.engine import LOW_PRECISION
from robustann.attacks.sigma_zero import SigmaZero
from robustann.errors import UsageError, unknown_name
from robustann.threat import ThreatModel


@dataclass(frozen=True)
class Stage:
    """An attack in a cascade. With ``near``, it goes only to the samples that are near to falling:
    whose smallest margin so far is at most this share of the clean one.

    What further effort breaks had nearly fallen before (measured on adversarially trained MNIST
    models: under 6 % of the clean margin was left), so effort goes there.
    """

    attack: Attack
    near: float | None = None
    # Share of the samples that it goes to, drawn one by one.
    share: float = 1.0
    # Through a part of the model that has gradients (see inner.py), where the plan has one.
    through: bool = False
    # The norms in which it pays, where these are not all that its attack knows.
    # In order: what a stopped audit left is known by this text.
    norms: tuple[str, ...] | None = None

    def fits(self, threat: ThreatModel) -> bool:
        """Whether it is of use against this threat model."""
        return threat.norm in (self.attack.norms if self.norms is None else self.norms)

    def aims(self, classes: int) -> bool:
        """Whether there is a runner-up of the rank that its attack goes for."""
        return getattr(self.attack, "rank", 0) < classes

    @property
    def label(self) -> str:
        """What the attack is called in the result."""
        return f"{self.attack.label} through a part" if self.through else self.attack.label


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Attacks in the order in which they run, the steps of the curve over eps, and how many
    samples are explained.

    They are a cascade: each goes only to the samples that still stand, and may start from the best
    image that those before it found.

    ``check`` is a search that owes nothing to gradients, on a share of what stands after the
    stages. If it breaks anything, the gradients mislead: all that stands then goes through
    ``escalation``.
    """

    description: str
    stages: tuple[Stage, ...]
    check: tuple[Stage, ...] = ()
    escalation: tuple[Stage, ...] = ()
    curve_steps: int
    explained: int
    # Forwards averaged for each answer, for randomised models.
    draws: int = 1
    # The published protocol that the stages are, by name.
    protocol: str | None = None
    # Of the search from scratch that stands in for gradients that are missing or mislead; 5,000
    # as in AutoAttack.
    queries: int = 5000


def _alternating(
    rounds: int, queries: int, *, near: float | None = None, p: float = 0.3
) -> tuple[Stage, ...]:
    """Random search and gradient ascent in turn, each from where the other ended.

    Where gradients are masked, ascent alone leaves what a random search finds, and the search
    alone is slow; each lifts the other out of where it is stuck. The true gradient settles what is
    close; a leaky one, every other time, leaves where that one ends.
    """
    search = Stage(Square(queries=queries, p=p, start="best"), near)
    climbs = [
        Stage(MM(steps=15, start="best", step_scale=0.33, leak=leak), near) for leak in (0.0, 0.02)
    ]
    return tuple(stage for number in range(rounds) for stage in (search, climbs[number % 2]))


# In l1, where a step changes few pixels, margins and cross-entropy find different images.
_L1 = ("l1",)
_LINF_L2 = ("linf", "l2")

PRESETS: Mapping[str, Preset] = {
    "quick": Preset(
        description="a first look: short ascents and a short search; about 150 propagations, 190 "
        "in l1",
        stages=(
            Stage(UniformNoise(draws=3)),
            Stage(SigmaZero(steps=50)),
            Stage(MM(steps=15)),
            # The nearest class falls to the untargeted ascent; the second is what it hides.
            Stage(MM(steps=15, rank=2)),
            Stage(APGD(steps=15), norms=_L1),
            *_alternating(1, 40),
        ),
        check=(Stage(Square(queries=200), share=0.1),),
        escalation=(Stage(Square(queries=500)), *_alternating(1, 200)),
        curve_steps=20,
        explained=32,
        queries=1000,
    ),
    "standard": Preset(
        description="the verdict: ascents with several leaks and to runner-up classes, then search "
        "and ascent in turn, longest where a sample has nearly fallen; 300 to 450 propagations",
        stages=(
            Stage(UniformNoise(draws=3)),
            # Of these attacks the only one in l0.
            Stage(SigmaZero(steps=150)),
            Stage(MM()),
            Stage(MM(rank=2, steps=20)),
            Stage(APGD(steps=30), norms=_L1),
            # A margin follows the class that leads; cross-entropy goes for several at once, and
            # finds the one that gives in where that one hides it: with half of the margin left.
            Stage(APGD(steps=20), near=0.6, norms=_LINF_L2),
            # What still falls after these had at most a seventh of its margin left on any model
            # that was tried; the bounds leave room.
            Stage(MM(rank=3, steps=20), near=0.4),
            Stage(MM(leak=0.01), near=0.4),
            Stage(MM(rank=2, steps=20, leak=0.03), near=0.3),
            Stage(MM(rank=4, steps=20), near=0.3),
            # Some give in to one far class alone, and to that one at once.
            *(Stage(MM(rank=rank, steps=15), near=0.2) for rank in range(5, 10)),
            # From where leaky gradients led, the true one goes on: of what still falls after the
            # stages above it finds the most for its cost.
            Stage(MM(steps=20, start="best", leak=0.0), near=0.2),
            *_alternating(1, 40, near=0.3),
            # Where activations are smooth no leak helps; large squares get away from where the
            # ascents end.
            Stage(Square(queries=500, start="best"), near=0.25),
            *_alternating(2, 80, near=0.12),
            # Search and ascent stay near one image; some fall only from another side.
            Stage(MM(leak=0.01, restarts=2), near=0.12),
            Stage(MM(leak=0.0, restarts=2), near=0.12),
            *_alternating(2, 80, near=0.12),
            *_alternating(2, 160, near=0.06),
            # On colour images, and in l2, what has all but fallen falls to the true gradient from
            # another start more often than to any search.
            Stage(MM(steps=50, leak=0.0, restarts=4), near=0.04),
            *_alternating(4, 250, near=0.04, p=0.1),
        ),
        check=(Stage(Square(queries=400), share=0.1),),
        # On adversarially trained models, whatever it broke had a tenth of its margin left or less.
        escalation=(
            *_alternating(2, 300, near=0.3),
            Stage(Square(queries=1000)),
            *(Stage(FAB(targets=target, steps=50), near=0.3) for target in range(1, 4)),
            *_alternating(1, 500, near=0.3),
        ),
        curve_steps=50,
        explained=64,
    ),
    "thorough": Preset(
        description="the same with more of everything; about 2,500 propagations",
        stages=(
            Stage(UniformNoise(draws=10)),
            Stage(SigmaZero(steps=1000)),
            *(
                Stage(MM(steps=50, restarts=2, leak=leak, rank=rank))
                for rank in (0, 2)
                for leak in (0.02, 0.01, 0.03, 0.0)
            ),
            *(Stage(MM(steps=50, rank=rank)) for rank in range(3, 8)),
            Stage(APGD()),
            *_alternating(2, 100),
            Stage(Square(queries=500, start="best")),
            *_alternating(5, 300, near=0.3),
            *_alternating(2, 2000, near=0.15),
        ),
        check=(Stage(Square(queries=1000), share=0.2),),
        escalation=(
            Stage(Square()),
            *(Stage(FAB(targets=target)) for target in range(1, 4)),
            *_alternating(3, 1000),
        ),
        curve_steps=200,
        explained=128,
    ),
    "autoattack": Preset(
        description="AutoAttack 'standard' as published for linf and l2: APGD-CE, targeted "
        "APGD-DLR, FAB-T, Square",
        stages=(
            Stage(APGD()),
            *(Stage(APGD(loss="dlr", targets=target)) for target in range(1, 10)),
            *(Stage(FAB(targets=target)) for target in range(1, 10)),
            Stage(Square()),
        ),
        curve_steps=50,
        explained=64,
        protocol="AutoAttack 'standard'",
    ),
    "autoattack-rand": Preset(
        description="AutoAttack 'rand' as published, for randomised models: APGD-CE and APGD-DLR, "
        "averaged over 20 draws",
        stages=(Stage(APGD()), Stage(APGD(loss="dlr"))),
        curve_steps=50,
        explained=64,
        draws=20,
        protocol="AutoAttack 'rand'",
    ),
}


def get_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        UsageError: there is none of this name.

    >>> get_preset("quick").curve_steps
    20
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What to audit with.

    Args:
        threat: what the attacker may do; untargeted.
        preset: a name of :data:`PRESETS`; it also sets the effort of curve and explanations.
        attacks: run these instead of the preset's.
        seed: of everything random in the audit.
        max_samples: audit so many samples, drawn at random from the whole part, the same ones
            for every seed, so that audits can be compared sample by sample; None means all.
        batch_size: images a batch, or ``auto``. It changes speed and memory, not the result.
        budget: propagations that an image may cost in all attacks together; None means as many
            as the attacks take. Curve and attributions come on top.
        minutes: how long the audit may take, as an estimate: a batch is timed, and what the time
            allows after checks and curve becomes the ``budget``. Attributions come on top.
        trust: whether to check that the evaluation can be believed, and to adapt the attacks to
            a model that would mislead them.
        curve: whether to measure robust accuracy at other eps too.
        explain: whether to compute attributions.
        attributions: methods of attribution beside the usual ones; the explainer knows which.
        certify: whether to prove too what no attack can break: in linf by bounds through the
            layers; in l2 by smoothing, of a :class:`robustann.certificates.Smoothed` model. Refused
            where nothing can be proven.
        weights: whether to ask too what happens if bits of the stored weights are wrong.
        corruptions: whether to measure accuracy under common corruptions too, as a control.
        precision: ``bf16`` or ``fp16`` lets attacks search under autocast; what they find is judged
            in float32. Faster on a GPU with tensor cores, often slower on a CPU.
        channels_last: run attacks in this memory format.
        compile: run attacks through ``torch.compile``; it takes about a minute first.
        tune: time a batch with bf16, with fp16 on an accelerator, and channels last first, and use
            what is more than 5 % faster; ``execution.tuned`` tells. Results then hang on the
            machine. It never compiles.

    Raises:
        UsageError: a value is unfit, or no attack fits the norm.

    >>> config = AuditConfig(threat=ThreatModel("linf", 0.1), preset="quick")
    >>> [stage.attack.label for stage in config.stages[:3]]
    ['noise:draws=3', 'mm:steps=15', 'mm:steps=15,rank=2']
    """

    threat: ThreatModel
    preset: str = "standard"
    attacks: tuple[Attack, ...] | None = None
    seed: int = 0
    max_samples: int | None = None
    batch_size: int | Literal["auto"] = "auto"
    budget: int | None = None
    minutes: float | None = None
    trust: bool = True
    curve: bool = True
    explain: bool = True
    attributions: tuple[str, ...] = ()
    certify: bool = False
    weights: bool = False
    corruptions: bool = False
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    tune: bool = False

    def __post_init__(self) -> None:
        get_preset(self.preset)
        if self.threat.targeted:
            raise UsageError(
                "expected an untargeted threat model: an audit counts any wrong class as broken; "
                "leave out targeted=True, or use robustann.attack for targeted attacks"
            )
        if self.max_samples is not None:
            at_least("max_samples", self.max_samples, 1)
        if self.budget is not None:
            at_least("budget", self.budget, 1)
        if self.minutes is not None:
            if self.budget is not None:
                raise UsageError(
                    "expected a budget in propagations or in minutes, got both; give one of them"
                )
            if not 0 < self.minutes < math.inf:
                raise UsageError(f"expected minutes > 0, got {self.minutes}; give more time")
        if self.certify and self.threat.norm not in ("linf", "l2"):
            raise UsageError(
                f"expected the norm linf or l2 to certify, got {self.threat.norm}; name one of "
                "these, or leave out certify"
            )
        if self.precision not in ("float32", *LOW_PRECISION):
            raise unknown_name("precision", self.precision, ("float32", *LOW_PRECISION))
        if self.tune and self.compile:
            raise UsageError(
                "expected compile or tune, got both: what is timed would not be what runs; leave "
                "out one of them"
            )
        if self.batch_size != "auto":
            at_least("batch_size", self.batch_size, 1)
        if not any(not attack.control for attack in self.chosen):
            raise UsageError(
                f"expected at least one attack for the norm {self.threat.norm}, got none besides "
                "controls; name one with its norm supported (see 'robustann list attacks')"
            )
        for attack in self.chosen:
            attack.check(self.threat)
        names = [attack.label for attack in self.attacks or ()]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"expected each attack once, got '{name}' twice; drop one")

    @property
    def chosen(self) -> tuple[Attack, ...]:
        """The attacks to run, in order."""
        return tuple(stage.attack for stage in self.stages)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The attacks with the samples that they go to."""
        if self.attacks is not None:
            return tuple(Stage(attack) for attack in self.attacks)
        return self._fitting(get_preset(self.preset).stages)

    @property
    def check(self) -> tuple[Stage, ...]:
        """What a share of the samples is checked with; nothing where the attacks are named."""
        return self._fitting(() if self.attacks is not None else get_preset(self.preset).check)

    @property
    def escalation(self) -> tuple[Stage, ...]:
        """What follows for all that stands where the check broke something."""
        return self._fitting(get_preset(self.preset).escalation) if self.check else ()

    def _fitting(self, stages: Sequence[Stage]) -> tuple[Stage, ...]:
        return tuple(stage for stage in stages if stage.fits(self.threat))

    @property
    def cascade(self) -> bool:
        """Whether each attack goes only to what still stands; attacks named one by one do not."""
        return self.attacks is None


def labelled(stages: Sequence[Stage], mark: str = "") -> list[tuple[str, Stage]]:
    """Stages with what their attacks are called in the result: the second of a name is told apart
    by its number, and so on. Not the first: whether another follows may hang on what it finds.

    >>> [label for label, _ in labelled([Stage(MM()), Stage(MM(steps=9)), Stage(MM())])]
    ['mm', 'mm:steps=9', 'mm#2']
    """
    names = [stage.label + mark for stage in stages]
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [
        (f"{name}#{count}" if count > 1 else name, stage)
        for name, count, stage in zip(names, counts, stages, strict=True)
    ]
