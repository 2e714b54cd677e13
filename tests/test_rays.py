"""RayS: the nearest boundary in closed form, and what it breaks where there are no scores."""

from __future__ import annotations

import pytest
import torch
from attacking import Decision, in_batches, streams
from torch import Tensor, nn

import robustann as ra
from robustann.attacks import Square, parse_attack
from robustann.attacks.engine import predict_logits, run
from robustann.attacks.rays import RayS
from robustann.errors import UsageError
from robustann.threat import ThreatModel


def linear() -> nn.Sequential:
    """Two classes on 4 x 4 images: the middle grey lies 0.12 from the boundary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        weight = model[1].weight[0] - model[1].weight[1]
        model[1].bias[1] = 0.0
        model[1].bias[0] = 0.12 * weight.abs().sum() - 0.5 * weight.sum()
    return model


@pytest.fixture(scope="module")
def linear_case() -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """A linear model, images far from the ends of the range, their labels, and how far each is
    from the boundary: |w x + b| / ||w||_1."""
    model = linear()
    generator = torch.Generator().manual_seed(1)
    x = 0.4 + 0.2 * torch.rand((24, 1, 4, 4), generator=generator)
    with torch.no_grad():
        logits = model(x)
    weight = (model[1].weight[0] - model[1].weight[1]).detach()
    exact = (logits[:, 0] - logits[:, 1]).abs() / weight.abs().sum()
    labels = logits.argmax(1)
    assert 0.05 < float(exact.min()) < float(exact.max()) < 0.3
    return model, x, labels, exact


def test_finds_the_nearest_boundary_of_a_linear_model(
    linear_case: tuple[nn.Sequential, Tensor, Tensor, Tensor],
) -> None:
    model, x, labels, exact = linear_case
    attack = RayS(queries=800, tolerance=1e-4)
    result = run(attack, Decision(model), x, labels, ThreatModel("linf", 0.4), random=streams(24))
    assert bool(result.success.all())
    assert bool((result.distance >= exact.double() - 1e-6).all())
    assert float((result.distance / exact - 1).max()) < 0.03
    # With few queries it is not there yet.
    short = run(
        RayS(queries=20), Decision(model), x, labels, ThreatModel("linf", 0.4), random=streams(24)
    )
    assert float((short.distance / exact - 1).median()) > 0.1


def test_success_is_within_eps(
    linear_case: tuple[nn.Sequential, Tensor, Tensor, Tensor],
) -> None:
    model, x, labels, exact = linear_case
    eps = float(exact.median())
    attack = RayS(queries=800, tolerance=1e-4)
    result = run(attack, Decision(model), x, labels, ThreatModel("linf", eps), random=streams(24))
    sure = (exact < 0.95 * eps) | (exact > eps)
    assert torch.equal(result.success[sure], (exact < eps)[sure])
    assert 0 < int(result.success.sum()) < 24
    assert float(result.distance[result.success].max()) <= eps
    assert float(result.adversarial.min()) >= 0
    assert float(result.adversarial.max()) <= 1


def test_asks_no_more_than_it_says_and_for_predictions_alone(
    linear_case: tuple[nn.Sequential, Tensor, Tensor, Tensor],
) -> None:
    model, x, labels, _ = linear_case

    class Loud(nn.Module):
        """The same classes, other scores."""

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = model(images)
            return (logits - logits.amax(1, keepdim=True)).exp() ** 9

    attack = RayS(queries=90)
    threat = ThreatModel("linf", 0.4)
    first, *others = (
        run(attack, one, x, labels, threat, random=streams(24), known_correct=True)
        for one in (model, Decision(model), Loud())
    )
    # The engine confirms the nearest image by one more.
    assert int(first.forwards.max()) <= attack.cost[0] + 1
    assert first.backwards.tolist() == [0] * 24
    for other in others:
        assert torch.equal(first.adversarial, other.adversarial)
        assert torch.equal(first.forwards, other.forwards)


def test_rows_do_not_hang_on_their_batch(model: nn.Module, digits: ra.ImageData) -> None:
    x, labels = digits.test.images(slice(0, 21)), digits.test.labels[:21]
    threat = ThreatModel("linf", 0.15)
    # Long enough for some to begin anew.
    attack = RayS(queries=600)
    whole = run(attack, Decision(model), x, labels, threat, random=streams(21))
    joined = in_batches(attack, Decision(model), x, labels, threat, 5)
    assert torch.equal(whole.adversarial, joined.adversarial)
    assert torch.equal(whole.forwards, joined.forwards)


def test_breaks_what_has_no_scores(model: nn.Module, digits: ra.ImageData) -> None:
    """Where a search by scores finds next to nothing, this does about as well as with scores."""
    x, labels = digits.test.images(slice(0, 80)), digits.test.labels[:80]
    right = predict_logits(model, x).argmax(1) == labels
    x, labels = x[right], labels[right]
    threat = ThreatModel("linf", 0.1)

    def stands(attack: RayS | Square, target: nn.Module) -> int:
        result = run(attack, target, x, labels, threat, random=streams(len(x)), known_correct=True)
        return int((~result.success).sum())

    by_scores = stands(Square(queries=500), model)
    assert by_scores < 0.7 * len(x)
    assert stands(Square(queries=500), Decision(model)) > 0.9 * len(x)
    by_decisions = stands(RayS(queries=1000), Decision(model))
    assert by_decisions <= by_scores + 0.06 * len(x)
    # That is the work of its queries.
    assert stands(RayS(queries=100), Decision(model)) > by_decisions


def test_starts_from_the_best_image(
    linear_case: tuple[nn.Sequential, Tensor, Tensor, Tensor],
) -> None:
    model, x, labels, exact = linear_case
    weight = (model[1].weight[0] - model[1].weight[1]).detach().view(1, 1, 4, 4)
    # The best direction of all: one bisection along it is enough.
    away = torch.where(labels == 0, -1.0, 1.0).view(-1, 1, 1, 1) * weight.sign()
    best = (x + 0.05 * away, torch.ones(24))
    threat = ThreatModel("linf", 0.4)
    result = run(
        RayS(queries=40, start="best", tolerance=1e-3), Decision(model), x, labels, threat,
        random=streams(24), known_correct=True, best=best,
    )  # fmt: skip
    assert float((result.distance - exact).max()) < 2e-3


def test_targeted(model: nn.Module, digits: ra.ImageData) -> None:
    x = digits.test.images(slice(0, 20))
    wanted = (predict_logits(model, x).argmax(1) + 1) % 10
    threat = ThreatModel("linf", 0.6, targeted=True)
    result = run(RayS(queries=400), model, x, wanted, threat, random=streams(20))
    assert bool(result.success.any())
    assert torch.equal(
        predict_logits(model, result.adversarial).argmax(1)[result.success], wanted[result.success]
    )


def test_values() -> None:
    assert parse_attack("rays:queries=500,start=best") == RayS(queries=500, start="best")
    for options in ({"queries": 0}, {"tolerance": 0.0}, {"tolerance": 1.0}, {"start": "random"}):
        with pytest.raises(UsageError):
            RayS(**options)
    with pytest.raises(UsageError, match="got l2"):
        RayS().check(ThreatModel("l2", 1.0))
