"""A guard against bit errors in float32 weights: ranges recorded from a trusted model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from robustann import files
from robustann.errors import ModelError, UsageError, first_invalid

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_SHOWN = 3


@dataclass(frozen=True)
class Repair:
    """What a guard repaired.

    Attributes:
        tensors: how many values were out of range or not finite, by tensor; only those with any.
        checked: values looked at.

    >>> Repair({"fc.weight": 3}, 100).total
    3
    """

    tensors: Mapping[str, int]
    checked: int

    @property
    def total(self) -> int:
        """Values replaced."""
        return sum(self.tensors.values())


class WeightGuard(BaseModel):
    """The range of each tensor of a trusted model, and the repair of what lies outside.

    A flipped exponent bit turns a float32 weight into a number of up to 1e38, and one such weight
    is enough to break a network. In a trained model no weight is anywhere near: what is not finite
    or outside the recorded range is a fault, and is set to zero, as if the connection had been
    cut. Where zero is itself outside (a scale, a standard deviation) it is set to the nearest
    value inside. Faults that stay inside the range are not noticed. Measured on MNIST (small-cnn,
    clean error 1.2 %): at a bit error rate of 1e-3 no image is right without, 1.2 % are wrong with
    it.

    Helps against random bit errors in float32 weights. Known not to help against adversarial
    inputs, against errors in fixed-point weights, which cannot leave their range, or against
    somebody who chooses the bits or alters the file: see :mod:`robustann.defenses.seal`.

    It is the idea of restricting values to the range seen without faults (Chen, Li and
    Pattabiraman, "A Low-cost Fault Corrector for Deep Neural Networks through Range Restriction",
    DSN 2021, https://arxiv.org/abs/2003.13874), there of activations, here of the weights
    themselves.

    Attributes:
        ranges: smallest and largest value allowed, by tensor: all floating-point parameters and
            buffers.

    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[-1.0, 1.0]]))
    >>> guard = WeightGuard.record(layer)
    >>> _ = layer.weight.data.view(-1)[0].fill_(1e30)
    >>> guard.repair(layer).tensors, layer.weight[0, 0].item()
    ({'weight': 1}, 0.0)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str] = "weight-guard"
    paper: ClassVar[str] = "https://arxiv.org/abs/2003.13874"
    helps: ClassVar[tuple[str, ...]] = ("random bit errors in float32 weights",)
    limits: ClassVar[tuple[str, ...]] = (
        "adversarial inputs",
        "bit errors in fixed-point quantised weights, which stay in their range",
        "an attacker who chooses the bits, or who alters the weight file",
    )

    schema_version: Literal[1] = 1
    ranges: dict[str, tuple[_Finite, _Finite]]

    @model_validator(mode="after")
    def _ordered(self) -> WeightGuard:
        for name, (low, high) in self.ranges.items():
            if low > high:
                raise ValueError(f"expected a range from low to high for {name!r:.80}")
        return self

    @classmethod
    def record(cls, model: nn.Module, *, margin: float = 0.01) -> WeightGuard:
        """The guard of a model that is known to be whole.

        Args:
            model: its parameters and buffers are recorded.
            margin: by which share of its width each range is widened at both ends.

        Raises:
            UsageError: a negative margin.
            ModelError: a tensor is not finite, or there is none.

        >>> sorted(WeightGuard.record(nn.BatchNorm2d(1)).ranges)
        ['bias', 'running_mean', 'running_var', 'weight']
        """
        tensors = {name: value for name, value in _tensors(model).items() if value.numel()}
        if not tensors:
            raise ModelError(
                "expected a model with floating-point weights, got none; there is nothing to guard"
            )
        ends = {name: torch.stack(torch.aminmax(value)) for name, value in tensors.items()}
        found: dict[str, tuple[float, float]] = {}
        for name, end in ends.items():
            low, high = end.tolist()
            if not (abs(low) < torch.inf and abs(high) < torch.inf):
                raise ModelError(
                    f"expected finite weights, got values from {low} to {high} in {name}; "
                    "record the guard from a model that is whole"
                )
            found[name] = low, high
        return cls.from_ranges(found, margin=margin)

    @classmethod
    def from_ranges(
        cls, ranges: Mapping[str, tuple[float, float]], *, margin: float = 0.01
    ) -> WeightGuard:
        """The guard of tensors whose smallest and largest values are known.

        Raises:
            UsageError: a negative margin.

        >>> WeightGuard.from_ranges({"w": (-1.0, 3.0)}, margin=0.25).ranges
        {'w': (-2.0, 4.0)}
        """
        if not 0 <= margin < torch.inf:
            raise UsageError(f"margin: expected a number of at least 0, got {margin!r}")
        return cls(
            ranges={
                name: (low - margin * (high - low), high + margin * (high - low))
                for name, (low, high) in ranges.items()
            }
        )

    def repaired(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors in which what is not finite or out of range is replaced.

        Raises:
            ModelError: a tensor has no recorded range.

        >>> guard = WeightGuard(ranges={"w": (-1.0, 1.0)})
        >>> guard.repaired({"w": torch.tensor([0.5, -2.0, float("nan")])})["w"].tolist()
        [0.5, 0.0, 0.0]
        """
        return {
            name: torch.where(bad, rest, values)
            for name, (values, bad, rest) in self._judged(tensors).items()
        }

    def repair(self, model: nn.Module) -> Repair:
        """Replace, in place, what is not finite or out of range.

        Raises:
            ModelError: the model does not have the tensors of which the ranges were recorded.

        >>> layer = nn.Linear(2, 1)
        >>> WeightGuard.record(layer).repair(layer).total
        0
        """
        tensors = _tensors(model)
        missing = sorted(self.ranges.keys() - tensors.keys())
        if missing:
            raise ModelError(
                f"expected a model with the {len(self.ranges)} tensors recorded, {len(missing)} "
                f"are missing: {', '.join(missing[:_SHOWN])}; use the guard of this model"
            )
        judged = self._judged({name: value for name, value in tensors.items() if value.numel()})
        with torch.no_grad():
            counts = {name: bad.sum() for name, (_, bad, _) in judged.items()}
            for values, bad, rest in judged.values():
                values.copy_(torch.where(bad, rest, values))
        found = {name: int(count) for name, count in counts.items()}
        checked = sum(values.numel() for values, _, _ in judged.values())
        return Repair({name: count for name, count in found.items() if count}, checked)

    def load_weights(self, model: nn.Module, path: str | os.PathLike[str]) -> Repair:
        """Read the weights of a damaged file into a model, repaired.

        For a file that :func:`robustann.models.load_model` refuses because a few of its bits have
        rotted. Only for files that nobody had a reason to alter: a guard does not notice what
        stays in range.

        Args:
            model: made with the same architecture; in place.
            path: a ``.safetensors`` file, whose header must be whole.

        Raises:
            UsageError: no such file.
            ModelError: another format, or tensors that do not fit the model or the guard.

        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> layer = nn.Linear(2, 1)
        >>> guard = WeightGuard.record(layer)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rotten = {"weight": torch.full((1, 2), 1e30), "bias": layer.bias.data}
        ...     save_file(rotten, f"{folder}/m.safetensors")
        ...     guard.load_weights(layer, f"{folder}/m.safetensors").total
        2
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        source = Path(path)
        if not source.is_file():
            raise UsageError(f"no model file '{source}'; correct the path")
        try:
            model.load_state_dict(load_file(source))
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ModelError(
                f"expected in '{source}' the weights of this model, reading them failed with "
                f"{type(error).__name__}: {error}; what the guard cannot repair must be copied "
                "from a backup"
            ) from error
        return self.repair(model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ranges as JSON, whole or not at all."""
        files.write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WeightGuard:
        """Read ranges that :meth:`save` wrote.

        Raises:
            UsageError: the file cannot be read.
            ModelError: it holds no ranges.

        >>> WeightGuard.load("nowhere.json")
        Traceback (most recent call last):
        robustann.errors.UsageError: expected the file of a guard, could not read 'nowhere.json' ...
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise UsageError(
                f"expected the file of a guard, could not read '{path}' "
                f"({error.strerror or error}); correct the path"
            ) from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            place, reason = first_invalid(error)
            raise ModelError(
                f"expected the ranges of a guard in '{path}', but at {place!r:.80}: "
                f"{reason}; record them again from a model that is whole"
            ) from error

    def _judged(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Values, which of them are at fault, and what to put there instead."""
        unknown = sorted(tensors.keys() - self.ranges.keys())
        if unknown:
            raise ModelError(
                f"expected the tensors of which ranges were recorded, got {len(unknown)} others: "
                f"{', '.join(unknown[:_SHOWN])}; use the guard of this model"
            )
        judged = {}
        for name, values in tensors.items():
            low, high = self.ranges[name]
            # NaN fails both comparisons.
            bad = ~((values >= low) & (values <= high))
            rest = torch.tensor(min(max(0.0, low), high), dtype=values.dtype, device=values.device)
            judged[name] = (values, bad, rest)
        return judged


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
