"""What a sanitizer is: a fixed step in front of a model, with a stand-in for the attacker."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustann.errors import UsageError

# Slope left on the flat parts of a smoothed staircase: an attacker at rest must still move.
_SLOPE = 0.1


@dataclass(kw_only=True, eq=False, repr=False)
class Sanitizer(nn.Module, ABC):
    """Base of all sanitizers: images (N, C, H, W) in [0, 1] to such images of the same shape.

    A subclass is a dataclass in a file of this package; its fields are its hyper-parameters with
    the paper's defaults, fixed once made. It has no weights, works alike in training and eval
    mode, and draws what it draws at random from torch's global generator, so that attacks can
    average over it (EOT). It sets the class facts below and writes ``forward``.

    ``differentiable`` says whether its own derivative is of use; where it is not (it rounds, or
    leaves torch), :meth:`surrogate` is a stand-in for the backward pass of an attacker who knows
    it. ``helps`` and ``limits`` are repeated in reports.

    >>> from robustann.defenses.sanitizers import BitDepth
    >>> one = BitDepth(bits=3)
    >>> one.label, one.hyperparameters, one.differentiable, list(one.parameters())
    ('bit-depth:bits=3', {'bits': 3}, False, [])
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    helps: ClassVar[tuple[str, ...]]
    limits: ClassVar[tuple[str, ...]]
    differentiable: ClassVar[bool]
    deterministic: ClassVar[bool]

    def __post_init__(self) -> None:
        # Only now: what a dataclass sets before are plain numbers, which a module takes as such.
        nn.Module.__init__(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not isinstance(value, int):
                raise UsageError(f"expected {field.name} as a whole number, got {value!r}")
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ and name in type(self).__dataclass_fields__:
            raise dataclasses.FrozenInstanceError(f"cannot assign to field '{name}'")
        super().__setattr__(name, value)

    def check(self) -> None:
        """Refuse unfit hyper-parameters.

        Raises:
            UsageError: with what was expected and what came.
        """
        return

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The sanitized images, of the shape, type and device of ``x``."""

    def surrogate(self, x: Tensor) -> Tensor:
        """A differentiable stand-in for :meth:`forward`, for an attacker's backward pass.

        The function itself where that can be differentiated, else the identity unless a
        subclass knows better.
        """
        result: Tensor = self(x) if self.differentiable else x
        return result

    @property
    def hyperparameters(self) -> dict[str, str | int | float | bool | None]:
        """The hyper-parameters by name (``parameters()`` lists a module's weights: none)."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def label(self) -> str:
        """The name, with the hyper-parameters that differ from their defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}:{','.join(changed)}" if changed else self.name

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.hyperparameters.items())


def smooth_round(values: Tensor) -> Tensor:
    """A smooth, strictly rising stand-in for rounding: steepest where rounding jumps.

    ``t - 0.9 sin(2 pi t) / (2 pi)``: equal to rounding at integers, with slopes from 0.1 there
    to 1.9 in the middle between.

    >>> smooth_round(torch.tensor([0.0, 0.25, 0.5, 1.0]))
    tensor([0.0000, 0.1068, 0.5000, 1.0000])
    """
    full = 2 * math.pi
    return values - (1 - _SLOPE) * torch.sin(full * values) / full


def in_range(what: str, value: float, least: float, most: float) -> None:
    """Refuse a hyper-parameter outside its range.

    Raises:
        UsageError: with what was expected and what came.
    """
    if not least <= value <= most:
        raise UsageError(
            f"expected {what} from {least:g} to {most:g}, got {value}; choose one in between"
        )
