"""Images that were found elsewhere, and are put before the audited model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from robustann.attacks.base import Access, Attack, State
from robustann.attacks.engine import Oracle
from robustann.threat import NORMS


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown(Attack):
    """What an attacker outside the audit found, for the audit to judge by its own rule.

    Attributes:
        name: what it is called in the result.
        access: what that attacker may look at.
        paper: where he is described.
        attempted: positions in the test part of the samples that he attacked, rising, int64 (n,).
        forwards: that it cost him on each of these, int64 (n,); ``backwards`` likewise.
        found: positions of the samples that he says he broke, rising, int64 (m,).
        images: those that broke them, (m, C, H, W).
    """

    name: str  # type: ignore[misc]
    access: Access  # type: ignore[misc]
    paper: str  # type: ignore[misc]
    attempted: Tensor
    forwards: Tensor
    backwards: Tensor
    found: Tensor
    images: Tensor

    norms = frozenset(NORMS)

    @property
    def iterations(self) -> int:
        """None: the engine looks at the last proposal itself, and there is one."""
        return 0

    @property
    def cost(self) -> tuple[int, int]:
        """One look."""
        return 1, 0

    @property
    def label(self) -> str:
        """The name."""
        return self.name

    @property
    def parameters(self) -> dict[str, str | int | float | bool | None]:
        """How many images there are."""
        return {"images": len(self.found)}

    @property
    def digest(self) -> str:
        """Of everything that a result depends on."""
        told = hashlib.sha256(self.name.encode())
        for one in (self.attempted, self.forwards, self.backwards, self.found, self.images):
            told.update(one.contiguous().numpy().tobytes())
        return told.hexdigest()

    def places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """For each position, where it stands in ``attempted`` and in ``found``; -1 for nowhere."""
        return _places(self.attempted, positions), _places(self.found, positions)

    def only(self, places: Tensor) -> Shown:
        """The same with those of the found images alone, in this order."""
        return Shown(
            name=self.name,
            access=self.access,
            paper=self.paper,
            attempted=self.attempted,
            forwards=self.forwards,
            backwards=self.backwards,
            found=self.found[places],
            images=self.images[places],
        )

    def init(self, oracle: Oracle) -> State:
        """The images of the samples that stand."""
        return {"x": self.images.to(oracle.x)[oracle.rows]}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        """Nothing more to show."""
        return state


def _places(known: Tensor, wanted: Tensor) -> Tensor:
    """Where each of ``wanted`` stands in ``known``, which rises; -1 for nowhere."""
    if not len(known):
        return torch.full_like(wanted, -1)
    place = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    return torch.where(known[place] == wanted, place, -1)
