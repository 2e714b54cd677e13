"""What the audit of one batch yields, row by row, before it is summed up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from robustann.threat import Norm


@dataclass(frozen=True, eq=False, kw_only=True)
class Cases:
    """Audited samples with the worst image found for each: what an explainer explains.

    One entry a sample: ``index`` is its position in the test part (int64), ``clean`` and
    ``attacked`` are images (n, C, H, W). ``success`` says that the sample was classified
    correctly and fell; ``distance`` is that of the attacked image in the audited norm,
    ``attack`` the label of the attack that made it. ``nearest`` is the nearest adversarial image
    that a minimum-norm attack found, wherever it lies, or the attacked one where it found none;
    ``norm`` is the audited one.

    >>> image = torch.zeros(1, 1, 2, 2)
    >>> one, sure = torch.tensor([1]), torch.tensor([0.9])
    >>> cases = Cases(
    ...     index=one, label=one, clean=image, attacked=image + 0.1, clean_prediction=one,
    ...     attacked_prediction=one - 1, clean_confidence=sure, attacked_confidence=sure,
    ...     success=one > 0, distance=0.1 * one, attack=["pgd"], eps=0.1, bounds=(0.0, 1.0),
    ... )
    >>> cases.norm, cases.nearest is None
    ('linf', True)
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
    nearest: Tensor | None = None
    norm: Norm = "linf"


@dataclass
class Worst:
    """The worst image of each sample so far: the first success, else that of smallest margin."""

    x: Tensor
    prediction: Tensor
    margin: Tensor
    success: Tensor
    distance: Tensor
    attack: list[str]

    @classmethod
    def unattacked(cls, x: Tensor, prediction: Tensor, margin: Tensor) -> Worst:
        """The originals themselves."""
        return cls(
            x.clone(),
            prediction.clone(),
            margin.clone(),
            torch.zeros(len(x), dtype=torch.bool),
            torch.zeros(len(x), dtype=torch.float64),
            ["none"] * len(x),
        )

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


@dataclass
class Batch:
    """What the audit of one batch yields, one row a sample, on the CPU.

    Attributes:
        start: place of the first row among all audited samples.
        index: positions in the test part.
        gap: clean margins, as the attacks see the model.
        worst: the worst image of each sample. Between the passes only the images of ``held`` rows
            are kept, after them none, or those that a certificate by smoothing asks about.
        attacks: the columns of each attack by its label.
        propagations: forwards and backwards spent on a sample by all attacks together.
        distance: the smallest at which a sample is known to be broken: 0 where it is wrong already,
            infinity where nothing broke it.
        confidence: softmax probability of the worst case's prediction, NaN where the model gave no
            finite answer; ``label_margin`` is the logit of the label minus the largest other one.
        curve_propagations: spent on the curve alone.
        seconds: spent on each attack.
        explained: the samples to be explained, with their images.
    """

    start: int
    index: Tensor
    labels: Tensor
    logits: Tensor
    gap: Tensor
    worst: Worst
    propagations: Tensor
    distance: Tensor
    confidence: Tensor
    label_margin: Tensor
    attacks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    curve_propagations: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    explained: list[dict[str, Tensor | str]] = field(default_factory=list)
    held: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> Tensor:
        """Which samples are classified correctly, unattacked."""
        return self.logits.argmax(1) == self.labels

    def park(self, rows: Tensor) -> None:
        """Keep the worst images of ``rows`` alone."""
        self.held, self.worst.x = rows, self.worst.x[rows].clone()

    def unpark(self, x: Tensor) -> None:
        """Take up the kept images again, beside the originals ``x`` of all others."""
        images = x.clone()
        images[self.held] = self.worst.x
        self.worst.x = images

    def light(self) -> Batch:
        """The same without the images of what stands: those are kept for attacks to come."""
        fell = self.worst.success[self.held]
        worst = replace(self.worst, x=self.worst.x[fell].clone())
        return replace(self, worst=worst, held=self.held[fell])

    def state(self) -> dict[str, Any]:
        """Everything as tensors and plain values; :meth:`restored` takes it back."""
        return {**vars(self), "worst": dict(vars(self.worst))}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Batch:
        """The batch that :meth:`state` described.

        Raises:
            KeyError: something is missing.
        """
        values = {one.name: state[one.name] for one in fields(cls)}
        return cls(**{**values, "worst": Worst(**values["worst"])})


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
