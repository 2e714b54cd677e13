"""Images crafted on a surrogate model, shown to the audited one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustann.attacks import APGD, MM, Attack
from robustann.attacks.base import Access, State
from robustann.attacks.engine import Oracle, craft, model_device, predict_logits
from robustann.attacks.mifgsm import MIFGSM
from robustann.errors import ModelError
from robustann.findings import Finding
from robustann.models import tensor_digest
from robustann.threat import ThreatModel
from robustann.trust import surrogate_agrees


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FromSurrogate(Attack):
    """What gradient attacks end at on a model that the attacker has, tried on one that he has not
    (Papernot et al., 2016).

    None stops where the surrogate falls: an image that has only just crossed its boundary seldom
    crosses another model's. The surrogate's propagations are counted with the target's.

    Attributes:
        surrogate: maps images to logits of the same classes; left as it was.
        crafting: the attacks on it, one image each.

    >>> FromSurrogate(surrogate=nn.Flatten(), crafting=(MM(steps=5),)).cost
    (6, 5)
    """

    name = "transfer"
    paper = "https://arxiv.org/abs/1605.07277"
    access: Access = "decision"  # type: ignore[misc]
    norms = MM.norms

    surrogate: nn.Module
    crafting: tuple[Attack, ...]

    @property
    def iterations(self) -> int:
        """The engine looks at the last image itself."""
        return len(self.crafting) - 1

    @property
    def cost(self) -> tuple[int, int]:
        """One look at the target for each image, and what crafting it takes."""
        spent = [self._price(attack) for attack in self.crafting]
        return len(spent) + sum(one for one, _ in spent), sum(other for _, other in spent)

    @property
    def label(self) -> str:
        """The name."""
        return self.name

    @property
    def parameters(self) -> dict[str, str | int | float | bool | None]:
        """Which surrogate, and what ran on it."""
        crafting = ", ".join(attack.label for attack in self.crafting)
        return {"surrogate": tensor_digest(self.surrogate), "crafting": crafting}

    def __repr__(self) -> str:
        return f"FromSurrogate({self.parameters})"

    def init(self, oracle: Oracle) -> State:
        """The first image."""
        return {"x": self._crafted(oracle, 0)}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        """Show one image, craft the next."""
        oracle.forward(state["x"])
        return {"x": self._crafted(oracle, iteration + 1)}

    def _crafted(self, oracle: Oracle, place: int) -> Tensor:
        attack = self.crafting[place]
        forwards, backwards = self._price(attack)
        one = torch.ones_like(oracle.labels)
        oracle.count(forwards * one, backwards * one)
        device = model_device(self.surrogate)
        crafted = craft(
            attack,
            self.surrogate,
            oracle.x.to(device),
            oracle.labels.to(device),
            oracle.threat,
            random=oracle.random.fork(attack.label).to(device),
        )
        return crafted.to(oracle.x)

    @staticmethod
    def _price(attack: Attack) -> tuple[int, int]:
        # Crafting leaves out the look at the end.
        return attack.cost[0] - 1, attack.cost[1]


def from_surrogate(surrogate: nn.Module, threat: ThreatModel) -> FromSurrogate | None:
    """The attack through this surrogate; None in a norm that none of its attacks knows.

    >>> attack = from_surrogate(nn.Flatten(), ThreatModel("linf", 0.1))
    >>> attack.parameters["crafting"]
    'mm, mifgsm:steps=20, apgd:steps=50'
    """
    attacks = (MM(), MIFGSM(steps=20), APGD(steps=50))
    crafting = tuple(attack for attack in attacks if threat.norm in attack.norms)
    return FromSurrogate(surrogate=surrogate, crafting=crafting) if crafting else None


def agreement(surrogate: nn.Module, model: nn.Module, x: Tensor, *, seed: int) -> Finding:
    """Whether a surrogate puts these images where its target does.

    Raises:
        ModelError: it answers for another number of classes.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> agreement(model, model, torch.rand(5, 1, 2, 2), seed=0).value
    0.0
    """
    theirs, own = (predict_logits(one, x, seed=seed) for one in (surrogate, model))
    if theirs.shape != own.shape:
        raise ModelError(
            f"expected a surrogate for the {own.shape[1]} classes of the model, got one with "
            f"{theirs.shape[1]} logits; choose another surrogate"
        )
    same = float((theirs.argmax(1) == own.argmax(1)).double().mean())
    found = surrogate_agrees(same, len(x))
    if found.verdict == "fail":
        found = found.remedied("The attacks on the model itself owe nothing to the surrogate.")
    return found
