"""FAB: the exact projection, distances known in closed form, and torchattacks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import networks
import numpy as np
import pytest
import torch
from attacking import centred, equal, generator, some, streams
from torch import Tensor, nn

from robustann.attacks import AttackResult, parse_attack
from robustann.attacks.engine import craft, predict_logits, run
from robustann.attacks.fab import FAB, nearest_on_plane
from robustann.errors import UsageError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel

NORMS = ["linf", "l2", "l1"]


def wide(norm: Any, eps: float = 1.0, targeted: bool = False) -> ThreatModel:
    return ThreatModel(norm, eps, targeted=targeted)


# ----------------------------------------------------------------------------- the projection


def _reference_nearest(x: np.ndarray, w: np.ndarray, gap: float, norm: str) -> float | None:
    """The distance from ``x`` to ``gap + w @ (z - x) = 0`` in the box by scipy; None where the
    plane misses the box."""
    from scipy.optimize import linprog, minimize

    size = len(x)
    if norm == "l1":
        # z - x = up - down.
        answer = linprog(
            np.ones(2 * size), A_eq=np.concatenate([w, -w])[None], b_eq=[-gap],
            bounds=[(0, 1 - v) for v in x] + [(0, v) for v in x],
        )  # fmt: skip
        return float(answer.fun) if answer.success else None
    if norm == "linf":
        above = np.hstack([np.eye(size), -np.ones((size, 1))])
        below = np.hstack([-np.eye(size), -np.ones((size, 1))])
        answer = linprog(
            np.r_[np.zeros(size), 1], A_ub=np.vstack([above, below]), b_ub=np.zeros(2 * size),
            A_eq=np.r_[w, 0][None], b_eq=[-gap],
            bounds=[(-v, 1 - v) for v in x] + [(0, 1)],
        )  # fmt: skip
        return float(answer.fun) if answer.success else None
    if abs(gap) > np.abs(w) @ np.where(gap * w > 0, x, 1 - x):
        return None
    answer = minimize(
        lambda d: d @ d, np.zeros(size), jac=lambda d: 2 * d, method="SLSQP",
        bounds=[(-v, 1 - v) for v in x], options={"ftol": 1e-14, "maxiter": 500},
        constraints={"type": "eq", "fun": lambda d: gap + w @ d, "jac": lambda d: w},
    )  # fmt: skip
    assert answer.success
    return math.sqrt(float(answer.fun))


def planes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images with entries at the ends of the box; normals with zeros and ties; gaps of both signs
    from near to out of reach."""
    draw = generator(seed)
    x = (torch.rand(count, 1, 1, size, generator=draw) * 1.6 - 0.3).clamp(0, 1)
    normal = (torch.randn(count, 1, 1, size, generator=draw) * 2).round() / 2
    gap = torch.randn(count, generator=draw) * 0.4 * size
    return x, normal, gap


@pytest.mark.parametrize("size", [1, 2, 7, 12])
@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_is_scipys(norm: Any, size: int) -> None:
    x, normal, gap = planes(40, size, size)
    z = nearest_on_plane(x, normal, gap, wide(norm))
    away = wide(norm).distance(z, x)
    assert z.shape == x.shape
    assert z.dtype == x.dtype
    assert float(z.min()) >= 0
    assert float(z.max()) <= 1
    left = gap.double() + (normal.double() * (z.double() - x.double())).flatten(1).sum(1)
    reached = missed = 0
    for row in range(40):
        point, w = (part[row].flatten().double().numpy() for part in (x, normal))
        expected = _reference_nearest(point, w, float(gap[row]), norm)
        if expected is None:
            missed += 1
            room = np.where(float(gap[row]) * w > 0, point, 1 - point)
            least = abs(float(gap[row])) - np.abs(w) @ room
            assert abs(float(left[row])) == pytest.approx(least, abs=1e-5)
            assert torch.equal(z[row].flatten()[w == 0], x[row].flatten()[w == 0])
        else:
            reached += 1
            assert float(left[row]) == pytest.approx(0, abs=1e-5)
            assert float(away[row]) == pytest.approx(expected, abs=1e-5)
    assert reached > 5
    assert missed > 2


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_at_its_edges(norm: Any) -> None:
    x = torch.tensor([[0.5, 0.5, 0.0]]).view(1, 1, 1, 3)
    normal = torch.tensor([[1.0, 2.0, 0.0]]).view(1, 1, 1, 3)
    for gap, w in ((0.0, normal), (3.0, torch.zeros_like(normal)), (0.0, torch.zeros_like(normal))):
        assert torch.equal(nearest_on_plane(x, w, torch.tensor([gap]), wide(norm)), x)
    corner = nearest_on_plane(x, normal, torch.tensor([1.5]), wide(norm))
    assert torch.allclose(corner.flatten(), torch.tensor([0.0, 0.0, 0.0]), atol=1e-6)
    # Tiny and huge gradients mean the same plane.
    for scale in (1e-30, 1e30):
        gap = torch.tensor([0.7])
        assert torch.allclose(
            nearest_on_plane(x, normal * scale, gap * scale, wide(norm)),
            nearest_on_plane(x, normal, gap, wide(norm)), atol=1e-6,
        )  # fmt: skip
    assert bool(nearest_on_plane(x, normal, torch.tensor([math.inf]), wide(norm)).isfinite().all())


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_of_an_image_does_not_hang_on_others(norm: Any) -> None:
    x, normal, gap = planes(40, 50, 5)
    whole = nearest_on_plane(x, normal, gap, wide(norm))
    parts = [
        nearest_on_plane(x[rows], normal[rows], gap[rows], wide(norm))
        for rows in torch.arange(40).split(8)  # type: ignore[no-untyped-call]
    ]
    assert torch.equal(torch.cat(parts), whole)


# ------------------------------------------------------------------------------- linear models


def _reference_distance(w: Tensor, gap: Tensor, x: Tensor, norm: str) -> Tensor:
    """Distance (N,) from ``x`` to where ``w @ z`` has fallen by ``gap`` within the box, in float64:
    how far to go is found by bisection, inf where it cannot fall so far."""
    w, x, gap = w.double(), x.double(), gap.double()[:, None]
    room, slope = torch.where(w > 0, x, 1 - x), w.abs()
    order = slope.argsort(dim=1, descending=True)

    def moved(time: Tensor) -> Tensor:
        if norm == "linf":
            return torch.minimum(time.expand_as(room), room)
        if norm == "l2":
            return torch.minimum(time * slope, room)
        spent = torch.minimum(room.gather(1, order).cumsum(1), time)
        shares = spent.diff(dim=1, prepend=torch.zeros(len(x), 1))
        return torch.zeros_like(room).scatter(1, order, shares)

    low, high = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 1e6).double()
    for _ in range(120):
        middle = (low + high) / 2
        short = (slope * moved(middle)).sum(1, keepdim=True) < gap
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    length = moved(high).norm(p={"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1)
    return torch.where(high[:, 0] > 9e5, torch.inf, length)


def nearest(
    model: nn.Sequential, x: Tensor, labels: Tensor, norm: str, only: Tensor | None = None
) -> Tensor:
    """Distance to the nearest image of another class (or where one class draws level)."""
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    logits = x.flatten(1).double() @ weight.double().T + bias
    distances = []
    for k in range(len(weight)) if only is None else [None]:
        rival = only if k is None else torch.full_like(labels, k)
        assert rival is not None
        w = weight[labels] - weight[rival]
        gap = (logits.gather(1, labels[:, None]) - logits.gather(1, rival[:, None])).squeeze(1)
        away = _reference_distance(w, gap, x.flatten(1), norm)
        distances.append(away.masked_fill(rival == labels, math.inf))
    return torch.stack(distances).amin(0)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_boundary(norm: Any, classes: int) -> None:
    """Within 1 % of the closed form, box included, and never nearer."""
    shape = (1, 5, 7)
    model = centred(shape, classes)
    x, labels = some(model, 60, shape)
    expected = nearest(model, x, labels, norm)
    threat = ThreatModel(norm, float(expected.median()))
    result = run(FAB(steps=20), model, x, labels, threat, random=streams(60))
    assert torch.equal(result.prediction == labels, torch.zeros(60, dtype=torch.bool))
    assert torch.allclose(result.distance, threat.distance(result.adversarial, x))
    # Logits are rounded: an image may seem to be across a little early.
    assert bool((result.distance >= expected * (1 - 1e-5) - 1e-6).all())
    assert float((result.distance / expected).max()) < 1.01
    assert torch.equal(result.success, result.distance <= threat.eps)
    assert 20 < int(result.success.sum()) < 40


@pytest.mark.parametrize("norm", NORMS)
def test_a_hundred_classes(norm: Any) -> None:
    """All of them weighed: exact. The nine strongest: nearly always the nearest is among them."""
    shape = (3, 3, 4)
    model = centred(shape, 100)
    x, labels = some(model, 16, shape)
    expected = nearest(model, x, labels, norm)
    threat = ThreatModel(norm, 0.5)
    result = run(FAB(steps=10, classes=99), model, x, labels, threat, random=streams(16))
    assert bool((result.distance >= expected * (1 - 1e-5)).all())
    assert float((result.distance / expected).max()) < 1.01
    result = run(FAB(steps=10), model, x, labels, threat, random=streams(16))
    assert float((result.distance / expected).median()) < 1.01
    assert float((result.distance / expected).max()) < 1.5


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("norm", NORMS)
def test_all_targets_together(norm: Any, classes: int) -> None:
    """FAB-T: one run for each runner-up, one gradient a step."""
    shape = (1, 6, 4)
    model = centred(shape, classes)
    x, labels = some(model, 24, shape)
    order = predict_logits(model, x).argsort(1, descending=True)
    found = []
    for k in range(1, classes):
        result = run(
            FAB(steps=20, targets=k), model, x, labels, ThreatModel(norm, 0.5), random=streams(24)
        )
        found.append(result.distance.masked_fill(result.prediction == labels, math.inf))
        # Where another class draws level first, that is an adversarial image, too.
        own = nearest(model, x, labels, norm, order[:, k])
        assert bool((found[-1] <= own * 1.01).all())
    ratio = torch.stack(found).amin(0) / nearest(model, x, labels, norm)
    assert float(ratio.min()) > 1 - 1e-5
    assert float(ratio.max()) < 1.01


@pytest.mark.parametrize("norm", NORMS)
def test_a_wanted_class(norm: Any) -> None:
    """Targeted: near the nearest image of the wanted class; with two classes as near as can be."""
    shape = (1, 4, 6)
    for classes in (2, 5):
        model = centred(shape, classes)
        x, labels = some(model, 30, shape)
        wanted = predict_logits(model, x).argsort(1, descending=True)[:, 1]
        threat = wide(norm, ThreatModel(norm, 0).widest(24), targeted=True)
        result = run(FAB(steps=30), model, x, wanted, threat, random=streams(30))
        assert bool(result.success.all())
        assert torch.equal(predict_logits(model, result.adversarial).argmax(1), wanted)
        ratio = result.distance / nearest(model, x, labels, norm, wanted)
        assert float(ratio.min()) > 1 - 1e-5
        assert float(ratio.max() if classes == 2 else ratio.median()) < 1.01


# ------------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network, and what it gets right of the digits held out."""
    x, labels = networks.digits()
    model = networks.convolutional()
    x, labels = x[-160:], labels[-160:]
    right = predict_logits(model, x).argmax(1) == labels
    assert float(right.double().mean()) > 0.85
    return model, x[right], labels[right]


DIGITS_EPS = {"linf": 0.08, "l2": 0.5, "l1": 1.5}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_against_torchattacks(
    norm: Any, several: bool, trained: tuple[nn.Module, Tensor, Tensor]
) -> None:
    """Reference: torchattacks.FAB with as many steps, untargeted and with nine targets."""
    model, x, labels = trained
    threat = ThreatModel(norm, DIGITS_EPS[norm])
    with warnings.catch_warnings():
        # Its import touches deprecated names of other packages.
        warnings.simplefilter("ignore")
        torchattacks = pytest.importorskip("torchattacks")
        spelled = {"linf": "Linf", "l2": "L2"}[norm]
        theirs = torchattacks.FAB(
            model, norm=spelled, eps=threat.eps, steps=15, multi_targeted=several
        )
        with torch.random.fork_rng(devices=[]):
            x_adv = theirs(x, labels).detach()
    model.eval()
    stands = predict_logits(model, threat.project(x_adv, x)).argmax(1) == labels
    left = torch.ones(len(x), dtype=torch.bool)
    for targets in range(1, 10) if several else [0]:
        attack = FAB(steps=15, targets=targets)
        left &= ~run(attack, model, x, labels, threat, random=streams(len(x))).success
    assert 0.02 < float(stands.double().mean()) < 0.98, "such an eps tells nothing"
    assert int(left.sum()) <= int(stands.sum()) + 1


@pytest.mark.parametrize("norm", NORMS)
def test_more_effort_finds_nearer_ones(
    norm: Any, trained: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, x, labels = trained[0], trained[1][:40], trained[2][:40]
    threat = ThreatModel(norm, DIGITS_EPS[norm])
    short, long, again = (
        run(attack, model, x, labels, threat, random=streams(40))
        for attack in (FAB(steps=2), FAB(steps=15), FAB(steps=15, restarts=2))
    )
    assert bool((long.prediction != labels).all())
    assert bool((again.prediction != labels).all())
    both = short.prediction != labels
    assert float(both.double().mean()) > 0.5
    assert float(long.distance[both].mean()) < float(short.distance[both].mean())
    # Random starts come on top of the first; nothing that was found is lost.
    assert bool((again.distance <= long.distance + 1e-6).all())
    assert bool((again.distance < long.distance - 1e-6).any())


# ----------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("attack", [FAB(steps=6, classes=3, restarts=2), FAB(steps=8, targets=2)])
@pytest.mark.parametrize("norm", NORMS)
def test_the_batch_does_not_matter(
    attack: FAB, norm: Any, trained: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, x, labels = trained[0], trained[1][:16], trained[2][:16]
    threat = ThreatModel(norm, DIGITS_EPS[norm])
    whole = run(attack, model, x, labels, threat, random=streams(16))
    for size in (1, 7):
        parts = [
            run(attack, model, x[rows], labels[rows], threat, random=SampleRandom.create(0, rows))
            for rows in torch.arange(16).split(size)  # type: ignore[no-untyped-call]
        ]
        assert equal(AttackResult.concatenate(parts), whole)


@pytest.mark.parametrize("attack", [FAB(steps=5), FAB(steps=5, restarts=3, targets=1)])
@pytest.mark.parametrize("classes", [2, 4, 12])
def test_the_cost(attack: FAB, classes: int) -> None:
    """Every row is charged all of it; fewer classes than are weighed cost less."""
    model = centred((1, 4, 4), classes)
    x, labels = some(model, 11, (1, 4, 4))
    result = run(
        attack, model, x, labels, ThreatModel("l2", 0.3), random=streams(11), known_correct=True
    )
    forwards, backwards = attack.cost
    if not attack.targets:
        spared = attack.steps * (attack.classes - min(attack.classes, classes - 1))
        backwards -= spared
    # What was found is looked at once more.
    assert result.forwards.tolist() == [forwards + 1] * 11
    assert result.backwards.tolist() == [backwards] * 11


@pytest.mark.parametrize("shape", [(1, 5, 9), (3, 4, 7), (4, 1, 6)])
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("norm", NORMS)
def test_shapes_and_the_box(norm: Any, count: int, shape: tuple[int, int, int]) -> None:
    model = centred(shape, 4)
    x, labels = some(model, count, shape)
    result = run(FAB(steps=4), model, x, labels, ThreatModel(norm, 0.1), random=streams(count))
    assert result.adversarial.shape == x.shape
    assert float(result.adversarial.min()) >= 0
    assert float(result.adversarial.max()) <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_other_bounds(norm: Any) -> None:
    """A shifted and stretched box: the same distances, stretched."""
    model = centred((1, 4, 5), 3)
    x, labels = some(model, 12, (1, 4, 5))
    here = run(FAB(steps=8), model, x, labels, ThreatModel(norm, 0.5), random=streams(12))

    class Stretched(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            logits: Tensor = model((z + 1) / 2)
            return logits

    threat = ThreatModel(norm, 1.0, bounds=(-1.0, 1.0))
    there = run(FAB(steps=8), Stretched(), x * 2 - 1, labels, threat, random=streams(12))
    assert torch.allclose(there.distance, 2 * here.distance, rtol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_a_wrong_original_is_its_own_nearest(norm: Any) -> None:
    model = centred((1, 4, 4), 3)
    x, labels = some(model, 9, (1, 4, 4))
    wrong = (labels + 1) % 3
    for restarts in (1, 2):
        attack = FAB(steps=4, restarts=restarts)
        result = run(attack, model, x, wrong, ThreatModel(norm, 0.1), random=streams(9))
        assert bool(result.success.all())
        assert torch.equal(result.adversarial, x)


def test_models_without_a_boundary() -> None:
    """Zero gradients and holes: nothing is found, and nothing that is no image comes out."""

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3] * 0 + torch.tensor([1.0, 0.0, -1.0])

    class Holes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = x.flatten(1)[:, :3]
            away = (x - 0.5).abs().flatten(1).amax(1, keepdim=True)
            return torch.where(away > 0, z * math.nan, z + torch.tensor([1.0, 0.0, 0.0]))

    x, labels = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    for norm in NORMS:
        threat = ThreatModel(norm, 0.3)  # type: ignore[arg-type]
        for attack in (FAB(steps=4, restarts=2), FAB(steps=4, targets=1)):
            flat = run(attack, Flat(), x, labels, threat, random=streams(3))
            assert not flat.success.any()
            holes = run(attack, Holes(), x, labels, threat, random=streams(3))
            assert bool(holes.adversarial.isfinite().all())


@pytest.mark.parametrize("norm", NORMS)
def test_crafting_stays_within_the_threat_model(norm: Any) -> None:
    model = centred((1, 4, 5), 3)
    x, labels = some(model, 10, (1, 4, 5))
    threat = ThreatModel(norm, 0.05)
    crafted = craft(FAB(steps=5), model, x, labels, threat, random=streams(10))
    assert bool((threat.distance(crafted, x) <= 0.05).all())
    assert not torch.equal(crafted, x)


def test_options() -> None:
    assert parse_attack("fab:targets=3,steps=20") == FAB(targets=3, steps=20)
    for wrong in (
        {"steps": 0}, {"restarts": 0}, {"targets": -1}, {"classes": 0}, {"alpha_max": 1.5},
        {"beta": -0.1}, {"beta": math.nan}, {"eta": -1.0}, {"eta": math.nan},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            FAB(**wrong)
    with pytest.raises(UsageError, match="already name the wanted"):
        FAB(targets=1).check(ThreatModel("linf", 0.1, targeted=True))
    with pytest.raises(UsageError, match="got l0"):
        FAB().check(ThreatModel("l0", 3))
