"""What tests of attacks share: random numbers, linear models, an attack that a test directs, and
results: as they are written, and when two are the same."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robustann.attacks.base import Access, Attack, State
from robustann.attacks.engine import AttackResult, Oracle, predict_logits, run
from robustann.results import AuditResult
from robustann.rng import SampleRandom
from robustann.threat import NORMS, ThreatModel


def streams(count: int, seed: int = 0) -> SampleRandom:
    """Of the first ``count`` samples."""
    return SampleRandom.create(seed, torch.arange(count))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True, kw_only=True)
class Scripted(Attack):
    """Proposes what a test tells it to."""

    name: ClassVar[str] = "scripted"
    paper: ClassVar[str] = ""
    access: ClassVar[Access] = "none"
    norms: ClassVar[frozenset[str]] = frozenset(NORMS)

    steps: int = 3

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def cost(self) -> tuple[int, int]:
        return self.steps + 1, 0

    def proposal(self, oracle: Oracle, iteration: int) -> Tensor:
        return oracle.x

    def init(self, oracle: Oracle) -> State:
        return {"x": self.proposal(oracle, 0)}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        oracle.forward(state["x"])
        return {"x": self.proposal(oracle, iteration + 1)}


class Decision(nn.Module):
    """The predicted class alone, one-hot."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(x.dtype)


def in_batches(
    attack: Attack, model: nn.Module, x: Tensor, labels: Tensor, threat: ThreatModel,
    size: int, seed: int = 0, limit: int | None = None, **options: Any,
) -> AttackResult:  # fmt: skip
    """In batches of that size; ``limit`` is of each sample."""
    parts = []
    for rows in torch.arange(len(x)).split(size):  # type: ignore[no-untyped-call]
        random = SampleRandom.create(seed, rows)
        most = None if limit is None else torch.full((len(rows),), limit)
        parts.append(
            run(attack, model, x[rows], labels[rows], threat, random=random, limit=most, **options)
        )
    return AttackResult.concatenate(parts)


def linear(weight: Tensor, bias: Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return nn.Sequential(nn.Flatten(), layer)


def centred(shape: tuple[int, int, int], classes: int, seed: int = 0) -> nn.Sequential:
    """A linear model whose logits are near zero in the middle of the box."""
    weight = torch.randn(classes, math.prod(shape), generator=generator(seed))
    return linear(weight, -weight.sum(1) / 2)


def some(
    model: nn.Module, count: int, shape: tuple[int, int, int], seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Images with many entries at an end of the box, and what the model takes them for."""
    x = (torch.rand((count, *shape), generator=generator(seed)) * 1.4 - 0.2).clamp(0, 1)
    return x, predict_logits(model, x).argmax(1)


class Watched(nn.Module):
    """Counts the images that it is asked about, and refuses what is not float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = 0
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        self.forwards += len(x)
        logits: Tensor = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._backward)  # type: ignore[no-untyped-call]
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def equal(first: AttackResult, second: AttackResult) -> bool:
    """The same to the last bit, whichever attack it was."""
    names = [field.name for field in fields(AttackResult) if field.name != "attack"]
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


def lasting(result: AuditResult) -> dict[str, Any]:
    """An audit's result as JSON, without what may differ between two runs."""
    values: dict[str, Any] = json.loads(result.to_json())
    del values["execution"]
    return values


def written(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a file that the attack command wrote."""
    with np.load(path) as archive:
        return dict(archive)
