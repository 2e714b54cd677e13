"""HopSkipJump: the nearest boundary in closed form, and what it breaks where there is no score."""

from __future__ import annotations

import pytest
import torch
from attacking import Decision, in_batches, streams
from torch import Tensor, nn

import robustann as ra
from robustann.attacks import HopSkipJump, Square, parse_attack
from robustann.attacks.engine import predict_logits, run
from robustann.errors import UsageError
from robustann.threat import NORMS, ThreatModel

EPS = {"linf": 0.4, "l2": 1.0, "l1": 2.0}


def _linear(side: int, count: int, offset: float) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Two classes of square images far from the ends of the range, the labels, and what lies
    between two classes."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(side**2, 2)).eval()
    weight = torch.randn(2, side**2, generator=generator)
    x = 0.4 + 0.2 * torch.rand((count, 1, side, side), generator=generator)
    with torch.no_grad():
        model[1].weight.copy_(weight)
        model[1].bias.copy_(-0.5 * weight.sum(1) + torch.tensor([offset, 0.0]))
        labels = model(x).argmax(1)
    return model, x, labels, weight[0] - weight[1]


def _exact(model: nn.Module, x: Tensor, weight: Tensor, dual: float) -> Tensor:
    """How far the boundary is."""
    with torch.no_grad():
        logits = model(x).double()
    return (logits[:, 0] - logits[:, 1]).abs() / torch.linalg.vector_norm(weight.double(), dual)


@pytest.fixture(scope="module")
def linear_case() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    return _linear(side=4, count=16, offset=0.5)


@pytest.fixture(scope="module")
def wide_case() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Of more pixels, which tell a good estimate of the normal from a bad one."""
    return _linear(side=8, count=64, offset=1.0)


@pytest.mark.parametrize(("norm", "dual", "near"), [("linf", 1, 0.1), ("l2", 2, 0.03),
                                                    ("l1", float("inf"), 0.1)])  # fmt: skip
def test_finds_the_nearest_boundary_of_a_linear_model(norm, dual, near, linear_case) -> None:
    model, x, labels, weight = linear_case
    exact, threat = _exact(model, x, weight, dual), ThreatModel(norm, EPS[norm])

    def ratio(queries: int) -> Tensor:
        attack = HopSkipJump(queries=queries)
        found = run(attack, Decision(model), x, labels, threat, random=streams(16))
        assert bool((found.distance >= exact * (1 - 1e-5)).all())
        assert torch.equal(found.success, found.distance <= threat.eps)
        assert float(found.adversarial.min()) >= 0
        assert float(found.adversarial.max()) <= 1
        return found.distance / exact

    assert float(ratio(1000).median()) < 1 + near
    # That is the work of its queries.
    assert float(ratio(40).median()) > 1 + 3 * near


# What it comes to over three other seeds, rounded up: worse by 1 to 3 %, in l1 by 5 to 10 %. Fewer
# or more starts, steps and probes, other lengths of both, and coarser ways back lie beyond one of
# these.
@pytest.mark.parametrize(
    ("norm", "dual", "soon", "late"),
    [("linf", 1, 1.67, 1.16), ("l2", 2, 1.61, 1.095), ("l1", float("inf"), 2.75, 1.31)],
)
def test_comes_so_near_within_so_many_queries(norm, dual, soon, late, wide_case) -> None:
    model, x, labels, weight = wide_case
    exact, threat = _exact(model, x, weight, dual), ThreatModel(norm, EPS[norm])
    for queries, limit in ((250, soon), (1000, late)):
        found = run(
            HopSkipJump(queries=queries), Decision(model), x, labels, threat, random=streams(64)
        )
        assert float((found.distance / exact).log().mean().exp()) < limit


def test_asks_no_more_than_it_says_and_for_predictions_alone(linear_case) -> None:
    model, x, labels, _ = linear_case
    attack, threat = HopSkipJump(queries=120), ThreatModel("l2", 1.0)
    first, other = (
        run(attack, one, x, labels, threat, random=streams(16), known_correct=True)
        for one in (model, Decision(model))
    )
    # The engine confirms the nearest image by one more.
    assert int(first.forwards.max()) <= attack.cost[0] + 1
    assert first.backwards.tolist() == [0] * 16
    assert torch.equal(first.adversarial, other.adversarial)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_breaks_what_has_no_scores(norm, model: nn.Module, digits: ra.ImageData) -> None:
    """Where a search by scores finds next to nothing, this does about as well as with scores."""
    x, labels = digits.test.images(slice(0, 40)), digits.test.labels[:40]
    right = predict_logits(model, x).argmax(1) == labels
    x, labels = x[right], labels[right]
    hard, threat = Decision(model), ThreatModel(norm, {"l2": 0.6, "l1": 1.6}[norm])

    def stands(attack, target: nn.Module) -> float:
        result = run(attack, target, x, labels, threat, random=streams(len(x)), known_correct=True)
        return float((~result.success).float().mean())

    by_gradients = stands(parse_attack("fmn:steps=50"), model)
    assert by_gradients < 0.6
    if norm in Square.norms:
        assert stands(Square(queries=300), hard) > 0.75
    assert stands(HopSkipJump(queries=600), hard) <= by_gradients + 0.25


def test_rows_do_not_hang_on_their_batch(model: nn.Module, digits: ra.ImageData) -> None:
    x, labels = digits.test.images(slice(0, 13)), digits.test.labels[:13]
    threat, attack = ThreatModel("l2", 0.5), HopSkipJump(queries=150)
    whole = run(attack, Decision(model), x, labels, threat, random=streams(13))
    joined = in_batches(attack, Decision(model), x, labels, threat, 5)
    assert torch.equal(whole.adversarial, joined.adversarial)
    assert torch.equal(whole.forwards, joined.forwards)


class Rarely(nn.Module):
    """Class 1 for next to nothing but images that are dark on the left and bright on the right."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[..., :2].mean((1, 2, 3)), x[..., 2:].mean((1, 2, 3))
        return torch.stack([torch.full_like(left, 0.6), right - left], 1)


def test_goes_on_looking_where_no_first_image_is_adversarial() -> None:
    x, labels = torch.full((8, 1, 4, 4), 0.5), torch.zeros(8, dtype=torch.int64)
    threat = ThreatModel("l2", 4.0)
    short, long = (
        run(HopSkipJump(queries=queries), Rarely(), x, labels, threat, random=streams(8))
        for queries in (5, 600)
    )
    assert int(short.success.sum()) < int(long.success.sum()) == 8
    # Half of either side by 0.3 is the nearest: 1.2 in Euclidean terms.
    assert float(long.distance.max()) < 1.25


def test_targeted(model: nn.Module, digits: ra.ImageData) -> None:
    x = digits.test.images(slice(0, 12))
    wanted = (predict_logits(model, x).argmax(1) + 1) % 10
    threat = ThreatModel("l2", 6.0, targeted=True)
    result = run(HopSkipJump(queries=300), model, x, wanted, threat, random=streams(12))
    assert bool(result.success.any())
    assert torch.equal(
        predict_logits(model, result.adversarial).argmax(1)[result.success], wanted[result.success]
    )


def test_values() -> None:
    assert parse_attack("hopskipjump:queries=500") == HopSkipJump(queries=500)
    assert set(NORMS) - HopSkipJump.norms == {"l0"}
    for options in ({"queries": 0}, {"probes": 0}):
        with pytest.raises(UsageError):
            HopSkipJump(**options)
