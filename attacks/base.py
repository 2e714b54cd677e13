"""What an attack is: hyper-parameters and a rule that proposes the next image."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from robustann.errors import UsageError
from robustann.threat import ThreatModel

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle

Access = Literal["white-box", "score", "decision", "none"]

State = dict[str, Tensor]
"""What an attack carries from step to step: tensors with one row a sample. ``"x"`` is the image
that it proposes next; everything else is its own affair. The engine drops rows of samples that
have fallen."""


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Base of all attacks. An attack only proposes; the engine judges, counts and stops.

    A subclass is a frozen dataclass in a file of its own in this package; its fields are its
    hyper-parameters with the paper's defaults, and the command line offers them by name. It sets
    the class facts below and writes ``init`` and ``step``. The engine makes ``restarts`` fresh
    starts of ``steps`` steps each, for the samples that have not fallen yet.

    >>> from robustann.attacks import PGD
    >>> attack = PGD(steps=10, loss="margin")
    >>> attack.label, attack.access, attack.cost
    ('pgd:steps=10,loss=margin', 'white-box', (11, 10))
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    access: ClassVar[Access]
    norms: ClassVar[frozenset[str]]
    # A control is no attack but a yardstick; the report marks it.
    control: ClassVar[bool] = False
    # Whether it looks for the nearest adversarial image instead of any within eps. The engine
    # then keeps the nearest, drops nothing, and allows the whole box.
    minimum_norm: ClassVar[bool] = False

    @property
    @abstractmethod
    def iterations(self) -> int:
        """Steps of one start."""

    @property
    def starts(self) -> int:
        """Fresh starts made, the first included."""
        return 1

    @property
    @abstractmethod
    def cost(self) -> tuple[int, int]:
        """Forwards and backwards spent on a sample that never falls."""

    @abstractmethod
    def init(self, oracle: Oracle) -> State:
        """The state of a fresh start, for the samples that ``oracle`` holds."""

    @abstractmethod
    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        """One step. Every image shown to the oracle is judged in passing; the last proposal,
        ``state["x"]`` of the last step, is judged by the engine.

        It may be judged a few steps later: images that were shown must not be changed in place.
        """

    def check(self, threat: ThreatModel) -> None:
        """Refuse a threat model that this attack does not know.

        Raises:
            UsageError: with the norms it supports.
        """
        if threat.norm not in self.norms:
            raise UsageError(
                f"expected one of the norms of {self.name} ({', '.join(sorted(self.norms))}), "
                f"got {threat.norm}; choose another norm or another attack"
            )

    @property
    def parameters(self) -> dict[str, str | int | float | bool | None]:
        """The hyper-parameters by name."""
        return dataclasses.asdict(self)

    @property
    def label(self) -> str:
        """The name, with the hyper-parameters that differ from their defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}:{','.join(changed)}" if changed else self.name


@dataclass(frozen=True, kw_only=True)
class QueryAttack(Attack):
    """Base of attacks that ask for one forward a step and for no gradient.

    Args:
        queries: forwards a sample.

    >>> from robustann.attacks import Square
    >>> attack = Square(queries=100)
    >>> attack.iterations, attack.cost
    (99, (100, 0))
    """

    queries: int = 5000

    def __post_init__(self) -> None:
        at_least("queries", self.queries, 1)

    @property
    def iterations(self) -> int:
        # The engine looks at the last proposal itself.
        return self.queries - 1

    @property
    def cost(self) -> tuple[int, int]:
        return self.queries, 0


def at_least(what: str, value: float, least: float) -> None:
    """Refuse a hyper-parameter below its least value.

    Raises:
        UsageError: with what was expected and what came.

    >>> at_least("steps", 0, 1)
    Traceback (most recent call last):
    robustann.errors.UsageError: expected steps >= 1, got 0; choose a larger one
    """
    if not value >= least:
        raise UsageError(f"expected {what} >= {least:g}, got {value}; choose a larger one")
