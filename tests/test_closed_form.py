"""Linear models, whose worst image is known: margin ascent, momentum, and search reach it.

Images lie well within the box, so a ball of radius eps lowers the lead over a class by eps times
the dual norm of the difference of weights, and no image does more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustann.attacks import MM, Attack, Square
from robustann.attacks.engine import predict_logits, run
from robustann.attacks.mifgsm import MIFGSM
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel

EPS = {"linf": 0.05, "l2": 0.2, "l1": 0.4}
DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}
# Attack, norm, and how much of the largest fall of the margin may be missing at the end.
CASES = [
    *((MM(), norm, 0.01) for norm in EPS),
    *((MM(leak=0.0), norm, 0.01) for norm in EPS),
    *((MM(start="best"), norm, 0.01) for norm in EPS),
    (MIFGSM(steps=20), "linf", 0.01),
    (MIFGSM(steps=20), "l2", 0.01),
    (Square(queries=1500), "linf", 0.01),
    # Its bumps are three entries wide at the least: on so few entries no image is the worst one.
    (Square(queries=1500), "l2", 0.65),
    (Square(queries=1500), "l1", 0.1),
]


def linear(classes: int, shape: tuple[int, int, int]) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(classes)
        model = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
    return model.eval()


def images(count: int, shape: tuple[int, int, int]) -> Tensor:
    return 0.45 + 0.1 * torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


def falls(model: nn.Sequential, x: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """The predicted classes, the lead over each class (infinite over the own), and how far the
    ball lets each lead fall."""
    logits = predict_logits(model, x).double()
    labels = logits.argmax(1)
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.detach().double()
    apart = (weight[labels][:, None] - weight).norm(p=DUAL[norm], dim=2)
    leads = logits.gather(1, labels[:, None]) - logits
    leads = leads.scatter(1, labels[:, None], torch.inf)
    return labels, leads, EPS[norm] * apart


def logits_apart(model: nn.Module, x: Tensor) -> Tensor:
    logits = predict_logits(model, x)
    return logits[:, 0] - logits[:, 1]


@pytest.mark.parametrize(("attack", "norm", "missing"), CASES)
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 3, 4)])
def test_two_classes(
    attack: Attack, norm: Any, missing: float, shape: tuple[int, int, int]
) -> None:
    model, x = linear(2, shape), images(24, shape)
    labels, leads, fall = falls(model, x, norm)
    # Moved to where half of the images can fall.
    first = logits_apart(model, x)
    with torch.no_grad():
        model[1].bias[0] += float(fall.amax()) - float(first.median())
    labels, leads, fall = falls(model, x, norm)
    leads, fall = leads.amin(1), fall.amax(1)
    random = SampleRandom.create(0, torch.arange(24))
    result = run(attack, model, x, labels, ThreatModel(norm, EPS[norm]), random=random)
    worst = leads - fall
    clear = worst.abs() > missing * fall
    assert torch.equal(result.success[clear], (worst < 0)[clear])
    stands = ~result.success
    short = (result.margin.double() - worst)[stands] / fall[stands]
    assert bool((short > -1e-4).all())
    assert bool((short <= missing).all()), short.max()
    assert 4 < int((worst < 0).sum()) < 20


@pytest.mark.parametrize("classes", [3, 10, 100])
@pytest.mark.parametrize("norm", list(EPS))
def test_the_nearest_of_many_classes_by_ranks(norm: Any, classes: int) -> None:
    """Untargeted and to each of the next runner-ups: what can fall to one of them falls."""
    model, x = linear(classes, (1, 5, 5)), images(24, (1, 5, 5))
    labels, leads, fall = falls(model, x, norm)
    worst = leads - fall
    random = SampleRandom.create(0, torch.arange(24))
    broken = torch.zeros(24, dtype=torch.bool)
    for attack in (MM(), *(MM(rank=rank) for rank in range(2, min(classes, 10)))):
        threat = ThreatModel(norm, EPS[norm])
        broken |= run(attack, model, x, labels, threat, random=random).success
    clear = (worst.abs() > 0.02 * fall).all(1)
    assert int(clear.sum()) >= 8
    assert not bool((broken & ~(worst < 0).any(1)).any())
    near = worst.masked_fill(~worst.isfinite(), torch.inf).topk(min(classes - 1, 9), largest=False)
    # Ranks go by logits, so a far-off class may be the only one that is reachable.
    reachable = (near.values < 0).any(1)
    assert float((broken == reachable)[clear].double().mean()) > 0.9


@pytest.mark.parametrize("norm", list(EPS))
def test_a_search_from_scratch_owes_nothing_to_what_others_found(norm: Any) -> None:
    """Its queries are those of a search that knows of nobody's images; from the best image they
    are others."""
    model, x = linear(2, (1, 5, 5)), images(24, (1, 5, 5))
    labels, *_ = falls(model, x, norm)
    threat, streams = ThreatModel(norm, EPS[norm]), SampleRandom.create(0, torch.arange(24))
    asked: list[Tensor] = []

    class Listening(nn.Module):
        def forward(self, seen: Tensor) -> Tensor:
            asked.append(seen.detach().clone())
            answer: Tensor = model(seen)
            return answer

    climbed = run(MM(steps=2), model, x, labels, threat, random=streams)
    best = (climbed.adversarial, climbed.margin)
    told: dict[tuple[str, bool], list[Tensor]] = {}
    for start in ("stripes", "best"):
        for handed in (None, best):
            asked.clear()
            attack = Square(queries=30, start=start)
            found = run(attack, Listening(), x, labels, threat, random=streams,
                        known_correct=True, best=handed)  # fmt: skip
            told[start, handed is not None] = list(asked)
            if handed is not None:
                # What was handed on stays the best, where the search comes to nothing nearer.
                assert bool((found.success | (found.margin <= climbed.margin)).all())
    alone, after = told["stripes", False], told["stripes", True]
    assert len(alone) == len(after) >= 30
    assert all(torch.equal(one, other) for one, other in zip(alone, after, strict=True))
    assert not torch.equal(told["best", False][0], told["best", True][0])
