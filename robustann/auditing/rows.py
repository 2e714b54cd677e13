"""What the audit of one batch yields, row by row, before it is summed up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Cases:
    """Audited samples with the worst image found for each: what an explainer explains.

    One entry a sample: ``index`` is its position in the test part (int64), ``clean`` and
    ``attacked`` are images (n, C, H, W). ``success`` says that the sample was classified
    correctly and fell; ``distance`` is that of the attacked image in the audited norm,
    ``attack`` the label of the attack that made it.
    """

    index: Tensor
    label: Tensor
    clean: Tensor
    attacked: Tensor
    clean_prediction: Tensor
    attacked_prediction: Tensor
    clean_confidence: Tensor
    attacked_confidence: Tensor
    success: Tensor
    distance: Tensor
    attack: Sequence[str]
    eps: float
    bounds: tuple[float, float]


@dataclass
class Batch:
    """What the audit of one batch yields, one row a sample, on the CPU."""

    index: Tensor
    labels: Tensor
    logits: Tensor
    attacks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # Smallest distance at which a sample is known to be broken: 0 where it is wrong already,
    # infinity where nothing broke it.
    distance: Tensor = field(default_factory=lambda: torch.empty(0))
    # Forwards and backwards spent on a sample by all attacks together.
    propagations: Tensor = field(default_factory=lambda: torch.empty(0))
    curve_propagations: int = 0
    # The worst image of each sample: what it is taken for, and what broke it at which distance.
    worst_prediction: Tensor = field(default_factory=lambda: torch.empty(0))
    broken_by: list[str | None] = field(default_factory=list)
    broken_at: Tensor = field(default_factory=lambda: torch.empty(0))
    explained: list[dict[str, Tensor | str]] = field(default_factory=list)


@dataclass
class Worst:
    """The worst image of each sample so far: the first success, else that of smallest margin."""

    x: Tensor
    prediction: Tensor
    margin: Tensor

    def __post_init__(self) -> None:
        self.x = self.x.clone()
        self.prediction, self.margin = self.prediction.clone(), self.margin.clone()
        self.success = torch.zeros(len(self.x), dtype=torch.bool)
        self.distance = torch.zeros(len(self.x), dtype=torch.float64)
        self.attack = ["none"] * len(self.x)

    def update(self, rows: Tensor, label: str, images: Tensor, columns: dict[str, Tensor]) -> None:
        success, gap = columns["success"][rows], columns["margin"][rows]
        held = self.success[rows]
        # What broke a sample first stays: prediction, distance and attack belong together.
        worse = ~held & (success | (gap < self.margin[rows]))
        chosen = rows[worse]
        self.x[chosen] = images[worse]
        for name in ("prediction", "margin", "success", "distance"):
            getattr(self, name)[chosen] = columns[name][chosen]
        for row in chosen.tolist():
            self.attack[row] = label


def empty_columns(prediction: Tensor, gap: Tensor) -> dict[str, Tensor]:
    """Columns of an attack for samples that it was not run on."""
    zeros = torch.zeros(len(prediction), dtype=torch.int64)
    return {
        "prediction": prediction.clone(),
        "attempted": torch.zeros(len(prediction), dtype=torch.bool),
        "success": torch.zeros(len(prediction), dtype=torch.bool),
        "distance": torch.full((len(prediction),), torch.nan, dtype=torch.float64),
        "margin": gap.clone(),
        "forwards": zeros.clone(),
        "backwards": zeros.clone(),
        "first_success": zeros - 1,
    }
