"""Named sets of attacks, and what an audit is told to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from robustann.attacks import FGSM, PGD, Attack, UniformNoise
from robustann.attacks.base import at_least
from robustann.errors import UsageError, unknown_name
from robustann.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Attacks in the order in which they run, the steps of the curve over eps, and how many
    samples are explained."""

    description: str
    attacks: tuple[Attack, ...]
    curve_steps: int
    explained: int


PRESETS: Mapping[str, Preset] = {
    "quick": Preset(
        description="a first look: noise, FGSM, 20 steps of PGD with two losses",
        attacks=(
            UniformNoise(draws=5),
            FGSM(),
            PGD(steps=20),
            PGD(steps=20, loss="margin"),
        ),
        curve_steps=10,
        explained=32,
    ),
    "standard": Preset(
        description="noise, FGSM, PGD with three losses and restarts",
        attacks=(
            UniformNoise(),
            FGSM(),
            PGD(steps=40),
            PGD(steps=100, restarts=3, loss="margin"),
            PGD(steps=100, loss="dlr"),
        ),
        curve_steps=20,
        explained=64,
    ),
}


def get_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        UsageError: there is none of this name.

    >>> get_preset("quick").curve_steps
    10
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
        curve: whether to measure robust accuracy at other eps too.
        explain: whether to compute attributions.

    Raises:
        UsageError: a value is unfit, or no attack fits the norm.

    >>> config = AuditConfig(threat=ThreatModel("linf", 0.1), preset="quick")
    >>> [attack.label for attack in config.chosen]
    ['noise:draws=5', 'fgsm', 'pgd:steps=20', 'pgd:steps=20,loss=margin']
    """

    threat: ThreatModel
    preset: str = "standard"
    attacks: tuple[Attack, ...] | None = None
    seed: int = 0
    max_samples: int | None = None
    batch_size: int | Literal["auto"] = "auto"
    curve: bool = True
    explain: bool = True

    def __post_init__(self) -> None:
        get_preset(self.preset)
        if self.threat.targeted:
            raise UsageError(
                "expected an untargeted threat model: an audit counts any wrong class as broken; "
                "leave out targeted=True, or use robustann.attack for targeted attacks"
            )
        if self.max_samples is not None:
            at_least("max_samples", self.max_samples, 1)
        if self.batch_size != "auto":
            at_least("batch_size", self.batch_size, 1)
        if not any(not attack.control for attack in self.chosen):
            raise UsageError(
                f"expected at least one attack for the norm {self.threat.norm}, got none besides "
                "controls; name one with its norm supported (see 'robustann list attacks')"
            )
        for attack in self.chosen:
            attack.check(self.threat)
        labels = [attack.label for attack in self.chosen]
        for label in labels:
            if labels.count(label) > 1:
                raise UsageError(f"expected each attack once, got '{label}' twice; drop one")

    @property
    def chosen(self) -> tuple[Attack, ...]:
        """The attacks to run, in order."""
        if self.attacks is not None:
            return self.attacks
        return tuple(a for a in get_preset(self.preset).attacks if self.threat.norm in a.norms)
