"""What a published protocol alone found."""

from __future__ import annotations

from robustann.results.scores import Interval
from robustann.results.value import Share, Value


class Protocol(Value):
    """Robust accuracy by a published protocol alone, for figures that can be compared.

    The audit's own robust accuracy counts more: what fell to the curve, to remedies for failed
    checks, to a surrogate. ``attacks`` are the labels of the protocol's; ``departures`` say where
    it ran otherwise than published, in clauses: with any, the figure compares with none.

    >>> found = Protocol(name="AutoAttack 'standard'", attacks=("apgd",), accuracy=0.5,
    ...                  interval=Interval.of_rate(50, 100))
    >>> found.words
    "AutoAttack 'standard' alone, as published"
    """

    name: str
    attacks: tuple[str, ...]
    accuracy: Share
    interval: Interval
    departures: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """What it is, and whether it ran as published."""
        if not self.departures:
            return f"{self.name} alone, as published"
        return f"{self.name} alone, not as published ({'; '.join(self.departures)})"
