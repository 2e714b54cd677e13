"""Threat models: the region is never left, projections are exact, starts follow their law."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from attacking import streams
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor

from robustann.errors import DataError, UsageError
from robustann.rng import SampleRandom
from robustann.threat import NORMS, Region, ThreatModel, check_images, parse_number

FEW = settings(max_examples=40, derandomize=True, deadline=None, database=None)
CONVEX = ("linf", "l2", "l1")
Array = npt.NDArray[np.float64]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(*shape: int, seed: int = 0) -> Tensor:
    """Images with entries at both ends of the range, where the box binds at once."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (x * 1.4 - 0.2).clamp_(0, 1)


def assert_inside(threat: ThreatModel, x_adv: Tensor, x: Tensor) -> None:
    """By arithmetic of its own: neither float64 nor float32 may see the region left."""
    assert x_adv.dtype == x.dtype
    assert x_adv.shape == x.shape
    assert bool(x_adv.isfinite().all())
    low, high = threat.bounds
    if (low, high) == (0.0, 1.0):
        assert float(x_adv.min()) >= 0.0
        assert float(x_adv.max()) <= 1.0
    else:
        # A bound that float32 cannot hold means its nearest float32.
        assert float(x_adv.min()) >= float(np.float32(low))
        assert float(x_adv.max()) <= float(np.float32(high))
    delta = (x_adv.double() - x.double()).flatten(1).numpy()
    length = {
        "linf": np.abs(delta).max(1),
        "l2": np.sqrt(np.square(delta).sum(1)),
        "l1": np.abs(delta).sum(1),
        "l0": (delta != 0).sum(1),
    }[threat.norm]
    # Summation order moves a float64 sum by some 1e-16; what float32 could see is far above.
    slack = 1 + (0 if threat.norm in ("linf", "l0") else 1e-13)
    excess = length.max() - threat.eps
    assert length.max() <= threat.eps * slack, f"{excess:.3g} outside of {threat.eps}"
    if threat.norm == "linf":
        assert float((x_adv - x).abs().max()) <= threat.eps


# --------------------------------------------------------------------- projection: the region


@st.composite
def rows(draw: st.DrawFn, entries: int = 6) -> tuple[Tensor, Tensor]:
    """A few originals, some entries at the ends of the range, and points in and outside."""
    count = draw(st.integers(1, 3))
    width = draw(st.integers(1, entries))
    unit = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1, width=32))
    far = st.one_of(st.sampled_from([0.0, 2.0, -1.0]), st.floats(-3, 3, width=32))
    numbers = st.lists(unit, min_size=count * width, max_size=count * width)
    moved = st.lists(far, min_size=count * width, max_size=count * width)
    shape = (count, 1, 1, width)
    x = torch.tensor(draw(numbers), dtype=torch.float32).view(shape)
    return x, torch.tensor(draw(moved), dtype=torch.float32).view(shape)


radii = st.one_of(
    st.sampled_from([0.0, 8 / 255, 0.1, 1 / 3, 0.5, 1.0]), st.floats(1e-6, 1.0, width=64)
)


@pytest.mark.parametrize("norm", NORMS)
@FEW
@given(data=st.data())
def test_projection_stays_inside_and_settles(norm: Any, data: st.DataObject) -> None:
    x, point = data.draw(rows())
    eps = data.draw(st.integers(0, 7) if norm == "l0" else radii)
    threat = ThreatModel(norm, eps)
    once = threat.project(point, x)
    assert_inside(threat, once, x)
    assert float((threat.project(once, x) - once).abs().max()) <= 2e-7
    assert torch.equal(threat.project(x, x), x)


@pytest.mark.parametrize("far", [1e-4, 0.01, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("fill", [None, 0.0, 0.9, 1.0])
@pytest.mark.parametrize(
    ("norm", "eps", "size"),
    [
        ("linf", 8 / 255, 32),
        ("linf", 0.3, 28),
        ("linf", 1e-9, 8),
        ("l2", 0.5, 32),
        ("l2", 1e-3, 96),
        ("l2", 3.0, 96),
        ("l2", 1e-6, 8),
        ("l1", 12.0, 32),
        ("l1", 0.1, 96),
        ("l1", 1e-6, 8),
        ("l0", 10, 32),
    ],
)
def test_rounding_never_leaves_the_ball(
    norm: Any, eps: float, size: int, fill: float | None, far: float
) -> None:
    threat = ThreatModel(norm, eps)
    shape = (8, 3, size, size)
    x = images(*shape) if fill is None else torch.full(shape, fill)
    once = threat.project(x + far * noise(*shape, seed=1), x)
    assert_inside(threat, once, x)
    # Nothing is given away either, beyond what float32 makes of so many entries.
    full = float(threat.distance(threat.project(x + 100 * noise(*shape, seed=1), x), x).min())
    lost = {"linf": 1e-7, "l2": 3e-7 * size, "l1": 3e-7 * size**2, "l0": 0.0}[norm]
    assert full >= min(eps, threat.eps) - lost or fill in (0.0, 1.0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.0, 255.0), (0.3, 0.9), (0.7, 0.9)])
def test_other_bounds(norm: Any, bounds: tuple[float, float]) -> None:
    low, high = bounds
    threat = ThreatModel(norm, 3 if norm == "l0" else 0.17, bounds=bounds)
    x = images(16, 1, 3, 5).mul(high - low).add(low).clamp(low, high)
    check_images(x, bounds)
    scale = high - low
    assert_inside(threat, threat.project(x + scale * noise(16, 1, 3, 5), x), x)
    for seed in range(20):
        assert_inside(threat, threat.random_start(x, streams(16, seed)), x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("far", [100.0, 1e4, 1e12, 1e20, 3e38, math.inf])
def test_projection_of_points_far_outside(norm: Any, far: float) -> None:
    threat = ThreatModel(norm, 2 if norm == "l0" else 0.25)
    x = torch.full((1, 1, 2, 2), 0.5)
    point = torch.tensor([[[[0.5 + far, 0.5 - far], [0.5, 0.5]]]])
    once = threat.project(point, x)
    assert_inside(threat, once, x)
    if norm == "l1" and far > 1e4:
        # Its threshold would have to be known to more digits than float64 has.
        return
    # By symmetry both entries share the budget.
    share = {"linf": 0.25, "l2": 0.25 / math.sqrt(2), "l1": 0.125, "l0": 0.5}[norm]
    expected = torch.tensor([[[[0.5 + share, 0.5 - share], [0.5, 0.5]]]])
    assert torch.allclose(once, expected, atol=1e-5)


# ------------------------------------------------------------ projection: the nearest point


def _bisect(shrunk: Any, length: Any, eps: float, top: float) -> Array:
    """``shrunk(t)`` for the least t in [0, top] at which it is no longer than eps."""
    if length(shrunk(0.0)) <= eps:
        return np.asarray(shrunk(0.0))
    low, high = 0.0, top
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if length(shrunk(middle)) > eps else (low, middle)
    return np.asarray(shrunk(high))


def _reference_projection(norm: str, delta: Array, low: Array, high: Array, eps: float) -> Array:
    """The nearest allowed change in float64, from the optimality conditions by bisection."""
    if norm == "linf":
        return np.clip(np.clip(delta, low, high), -eps, eps)
    if norm == "l2":
        # The multiplier of the ball grows without limit as eps falls.
        return _bisect(
            lambda t: np.clip(delta / (1 + t), low, high), np.linalg.norm, max(eps, 1e-300), 1e13
        )
    return _bisect(
        lambda t: np.clip(np.sign(delta) * np.maximum(np.abs(delta) - t, 0), low, high),
        lambda z: np.abs(z).sum(),
        eps,
        float(np.abs(delta).max()),
    )


def _reference_minimizer(norm: str, delta: Array, low: Array, high: Array, eps: float) -> Array:
    """The nearest allowed change by a general solver that knows no more than the constraints."""
    n = len(delta)
    with warnings.catch_warnings():
        # SLSQP says where a trial point leaves the bounds; the result does not.
        warnings.simplefilter("ignore", RuntimeWarning)
        if norm == "l2":
            found = optimize.minimize(
                lambda z: 0.5 * np.square(z - delta).sum(),
                np.zeros(n),
                jac=lambda z: z - delta,
                bounds=list(zip(low, high, strict=True)),
                constraints={
                    "type": "ineq",
                    "fun": lambda z: eps**2 - np.square(z).sum(),
                    "jac": lambda z: -2 * z,
                },
                method="SLSQP",
                options={"ftol": 1e-13, "maxiter": 500},
            )
            return np.asarray(found.x)
        # Rise and fall apart make the l1 norm linear.
        found = optimize.minimize(
            lambda z: 0.5 * np.square(z[:n] - z[n:] - delta).sum(),
            np.zeros(2 * n),
            jac=lambda z: np.concatenate([z[:n] - z[n:] - delta, -(z[:n] - z[n:] - delta)]),
            bounds=[(0, top) for top in high] + [(0, -bottom) for bottom in low],
            constraints={
                "type": "ineq",
                "fun": lambda z: eps - z.sum(),
                "jac": lambda z: -np.ones(2 * n),
            },
            method="SLSQP",
            options={"ftol": 1e-13, "maxiter": 500},
        )
        return np.asarray(found.x[:n] - found.x[n:])


def _apart(x: Tensor, point: Tensor) -> Iterator[tuple[int, Array, Array, Array]]:
    for row in range(len(x)):
        original = x[row].flatten().double().numpy()
        yield row, point[row].flatten().double().numpy() - original, -original, 1 - original


@pytest.mark.parametrize("norm", CONVEX)
@FEW
@given(data=st.data())
def test_projection_is_the_nearest_point(norm: Any, data: st.DataObject) -> None:
    x, point = data.draw(rows())
    eps = data.draw(st.one_of(st.sampled_from([0.1, 0.5, 1.0]), st.floats(0.01, 1.0)))
    threat = ThreatModel(norm, eps)
    ours = threat.project(point, x)
    for row, delta, low, high in _apart(x, point):
        moved = (ours[row].double() - x[row].double()).flatten().numpy()
        reference = _reference_projection(norm, delta, low, high, eps)
        assert np.abs(moved - reference).max() <= 2e-6 * max(1.0, np.abs(delta).max())


@pytest.mark.parametrize("norm", ["l2", "l1"])
@settings(FEW, max_examples=15)
@given(data=st.data())
def test_no_solver_finds_a_nearer_point(norm: Any, data: st.DataObject) -> None:
    x, point = data.draw(rows(entries=4))
    eps = data.draw(st.floats(0.05, 1.0))
    ours = ThreatModel(norm, eps).project(point, x)
    for row, delta, low, high in _apart(x, point):
        moved = (ours[row].double() - x[row].double()).flatten().numpy()
        theirs = _reference_minimizer(norm, delta, low, high, eps)
        near, nearest = np.square(moved - delta).sum(), np.square(theirs - delta).sum()
        assert near <= nearest + 1e-5 * (1 + nearest)


@FEW
@given(data=st.data())
def test_l0_projection_keeps_the_best_subset(data: st.DataObject) -> None:
    x, point = data.draw(rows())
    count = data.draw(st.integers(0, 6))
    ours = ThreatModel("l0", count).project(point, x)
    for row, delta, low, high in _apart(x, point):
        moved = (ours[row].double() - x[row].double()).flatten().numpy()
        clipped = np.clip(delta, low, high)
        best = min(
            np.square(np.where(np.isin(range(len(delta)), chosen), clipped, 0) - delta).sum()
            for size in range(min(count, len(delta)) + 1)
            for chosen in itertools.combinations(range(len(delta)), size)
        )
        assert np.square(moved - delta).sum() <= best + 1e-5


def test_l0_budget_is_rounded_down() -> None:
    x = torch.zeros(1, 1, 1, 4)
    point = torch.tensor([[[[0.9, 0.8, 0.7, 0.6]]]])
    assert ThreatModel("l0", 2.9).project(point, x).flatten().tolist() == pytest.approx(
        [0.9, 0.8, 0, 0]
    )


@pytest.mark.parametrize("norm", NORMS)
def test_points_inside_stay_where_they_are(norm: Any) -> None:
    """Up to float noise; what the engine has judged must be what it hands out."""
    threat = ThreatModel(norm, 6 if norm == "l0" else 0.4)
    x = images(32, 1, 4, 5)
    inside = threat.random_start(x, streams(32))
    assert float((threat.project(inside, x) - inside).abs().max()) <= 6e-8
    assert_inside(threat, inside, x)


@pytest.mark.parametrize("norm", NORMS)
def test_the_arguments_are_left_alone(norm: Any) -> None:
    threat = ThreatModel(norm, 2 if norm == "l0" else 0.2)
    x, gradient = images(8, 1, 3, 3), noise(8, 1, 3, 3, seed=2)
    point = x + noise(8, 1, 3, 3)
    copies = x.clone(), point.clone(), gradient.clone()
    region = threat.region(x)
    region.project(point)
    region.random_start(streams(8))
    if norm != "l0":
        region.step(point, gradient, 0.1)
    threat.distance(point, x)
    assert all(map(torch.equal, copies, (x, point, gradient)))


# -------------------------------------------------------------------- rows and their batch


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1, 7), (1, 5, 7), (3, 8, 8), (1, 28, 28)])
def test_rows_do_not_depend_on_each_other(norm: Any, shape: tuple[int, int, int]) -> None:
    count = 200
    size = math.prod(shape)
    threat = ThreatModel(norm, max(1, size // 10) if norm == "l0" else 0.3)
    x = images(count, *shape)
    spread = torch.logspace(-3, 2, count).view(-1, 1, 1, 1)
    point = x + spread * noise(count, *shape, seed=1)
    projected = threat.project(point, x)
    started = threat.random_start(x, streams(count))
    for first in range(0, count, 8):
        group = slice(first, first + 8)
        assert torch.equal(threat.project(point[group], x[group]), projected[group])
        alone = SampleRandom.create(0, torch.arange(count)[group])
        assert torch.equal(threat.random_start(x[group], alone), started[group])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(5))
    assert torch.equal(threat.project(point[order], x[order]), projected[order])


@pytest.mark.parametrize("norm", NORMS)
def test_selected_rows_of_a_region(norm: Any) -> None:
    threat = ThreatModel(norm, 3 if norm == "l0" else 0.2)
    x = images(16, 1, 4, 4)
    point = x + noise(16, 1, 4, 4)
    keep = torch.tensor([1, 3, 4, 8, 9, 11, 14, 15])
    part = threat.region(x).select(keep)
    assert isinstance(part, Region)
    assert torch.equal(part.project(point[keep]), threat.project(point, x)[keep])
    start = threat.random_start(x, streams(16))[keep]
    assert torch.equal(part.random_start(streams(16).select(keep)), start)


# --------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("norm", NORMS)
@FEW
@given(data=st.data())
def test_random_start_is_in_the_region(norm: Any, data: st.DataObject) -> None:
    x, _ = data.draw(rows())
    eps = data.draw(st.integers(0, 7) if norm == "l0" else radii)
    threat = ThreatModel(norm, eps)
    assert_inside(threat, threat.random_start(x, streams(len(x), data.draw(st.integers()))), x)


def test_linf_start_spreads_over_the_ball() -> None:
    x = torch.full((500, 1, 4, 4), 0.5)
    offset = (ThreatModel("linf", 0.1).random_start(x, streams(500)) - x).flatten() / 0.1
    assert stats.kstest(offset.double().numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    assert float(offset.min()) < -0.99
    assert float(offset.max()) > 0.99


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_start_is_uniform_in_the_ball(norm: Any) -> None:
    """The volume of a ball of radius r is r**d: (length / eps)**d is uniform."""
    d, count = 12, 3000
    x = torch.full((count, 1, 3, 4), 0.5)
    threat = ThreatModel(norm, 0.4)
    start = threat.random_start(x, streams(count))
    share = (threat.distance(start, x) / threat.eps).numpy() ** d
    assert stats.kstest(share, "uniform").pvalue > 0.01
    offset = (start - x).flatten(1).double().numpy()
    # No entry and no direction is preferred.
    assert stats.kstest(np.sign(offset).sum(1), stats.norm(0, math.sqrt(d)).cdf).statistic < 0.15
    assert np.abs(offset.mean(0)).max() < 4 * offset.std() / math.sqrt(count)
    spread = np.square(offset).mean(0)
    assert spread.max() / spread.min() < 1.3
    if norm == "l1":
        # In the l1 ball each |entry| follows Beta(1, d); in the l2 ball it is far from that.
        beta = stats.kstest(np.abs(offset[:, 0]) / 0.4, stats.beta(1, d).cdf)
        assert beta.pvalue > 0.01


def test_l0_start_changes_as_many_entries_as_allowed() -> None:
    count = 2000
    x = torch.full((count, 1, 2, 5), 0.5)
    start = ThreatModel("l0", 3).random_start(x, streams(count))
    changed = (start != x).flatten(1)
    assert changed.sum(1).unique().tolist() == [3]
    assert float((changed.double().mean(0) - 0.3).abs().max()) < 0.05
    assert stats.kstest(start[start != x].double().numpy(), "uniform").pvalue > 0.01


def test_starts_differ_between_seeds_and_draws() -> None:
    threat, x = ThreatModel("l2", 0.5), torch.full((4, 1, 3, 3), 0.5)
    random = streams(4)
    first, second = threat.random_start(x, random), threat.random_start(x, random)
    assert not torch.equal(first, second)
    assert not torch.equal(first, threat.random_start(x, streams(4, seed=1)))
    assert torch.equal(first, threat.random_start(x, streams(4)))


# ---------------------------------------------------------------------------- steepest step


def _lengths(norm: str, step: Tensor) -> Array:
    flat = step.flatten(1).double().numpy()
    return np.asarray(np.linalg.norm(flat, {"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=1))


@pytest.mark.parametrize("norm", CONVEX)
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-20, 1.0, 1e20, 1e38])
def test_steepest_step_has_its_length(norm: Any, scale: float) -> None:
    gradient = noise(16, 1, 6, 6).clamp_(-3, 3).double().mul(scale).float()
    assert int(gradient.count_nonzero()) > 0.98 * gradient.numel()
    step = ThreatModel(norm, 1.0).steepest_step(gradient, 0.25)
    assert _lengths(norm, step) == pytest.approx(np.full(16, 0.25), rel=1e-5)


@pytest.mark.parametrize("norm", CONVEX)
def test_no_step_of_that_length_promises_more(norm: Any) -> None:
    gradient = noise(8, 1, 4, 4)
    step = ThreatModel(norm, 1.0).steepest_step(gradient, 0.25)
    gain = (step * gradient).flatten(1).double().sum(1).numpy()
    for seed in range(200):
        other = noise(8, 1, 4, 4, seed=seed + 10).double()
        if seed % 4 == 1:
            other = other.sign()
        if seed % 4 == 2:
            other = gradient.double() + 0.1 * other
        if seed % 4 == 3:
            other = torch.where(other.abs() > 2, other, 0.0)
        size = np.maximum(_lengths(norm, other), 1e-9)
        rival = (other * gradient).flatten(1).sum(1).numpy() * 0.25 / size
        assert bool((rival <= gain + 1e-6).all())


def test_l1_step_is_shared_by_the_largest_percent() -> None:
    gradient = noise(2, 3, 20, 20)
    step = ThreatModel("l1", 1.0).steepest_step(gradient, 0.6).flatten(1)
    for row, flat in zip(step, gradient.flatten(1), strict=True):
        top = flat.abs().argsort(descending=True)[:12]
        assert sorted(row.nonzero().flatten().tolist()) == sorted(top.tolist())
        assert torch.allclose(row[top], flat[top].sign() * 0.05)


@pytest.mark.parametrize("norm", CONVEX)
def test_zero_gradient_gives_no_step(norm: Any) -> None:
    gradient = noise(8, 1, 4, 4)
    gradient[3] = 0.0
    step = ThreatModel(norm, 1.0).steepest_step(gradient, 0.25)
    assert step.isfinite().all()
    assert int(step[3].count_nonzero()) == 0
    lengths = np.delete(_lengths(norm, step), 3)
    assert lengths == pytest.approx(np.full(7, 0.25), rel=1e-5)


def test_l0_has_no_steepest_step() -> None:
    with pytest.raises(UsageError, match="linf, l2 or l1"):
        ThreatModel("l0", 3).steepest_step(noise(1, 1, 2, 2), 1.0)


@pytest.mark.parametrize("norm", CONVEX)
def test_a_step_of_the_region_is_projected(norm: Any) -> None:
    threat = ThreatModel(norm, 0.2)
    # Away from the ends of the range: there, l1 steps pass on what would be cut off.
    x = images(8, 1, 4, 4) * 0.4 + 0.3
    at, gradient = threat.random_start(x, streams(8)), noise(8, 1, 4, 4, seed=3)
    stepped = threat.region(x).step(at, gradient, 0.15)
    assert_inside(threat, stepped, x)
    expected = threat.project(at + threat.steepest_step(gradient, 0.15), x)
    assert torch.equal(stepped, expected)


# --------------------------------------------------------------------------------- distance


@pytest.mark.parametrize("norm", NORMS)
def test_distance_against_numpy(norm: Any) -> None:
    x, other = images(7, 3, 5, 6), images(7, 3, 5, 6, seed=1)
    other[2] = x[2]
    ours = ThreatModel(norm, 1.0).distance(other, x)
    delta = (other.numpy().astype(np.float64) - x.numpy().astype(np.float64)).reshape(7, -1)
    order = {"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}[norm]
    assert ours.dtype == torch.float64
    assert ours.shape == (7,)
    np.testing.assert_allclose(ours.numpy(), np.linalg.norm(delta, order, axis=1), rtol=1e-14)
    assert float(ours[2]) == 0.0


def test_widest() -> None:
    x, far = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    for norm in NORMS:
        threat = ThreatModel(norm, 1.0)  # type: ignore[arg-type]
        assert threat.widest(16) == pytest.approx(float(threat.distance(far, x)))


# ---------------------------------------------------------------------- values that are wrong


@pytest.mark.parametrize(
    ("text", "number"),
    [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("0.1", 0.1), ("1e-3", 1e-3), ("3", 3.0), (2, 2.0),
     ("0", 0.0), ("0/7", 0.0), ("0.5/255", 0.5 / 255)],
)  # fmt: skip
def test_numbers(text: Any, number: float) -> None:
    assert parse_number(text, "eps") == number
    assert ThreatModel("l2", text).eps == number


@pytest.mark.parametrize(
    "text",
    ["8/0", "abc", "", " ", "/", "8/", "/255", "1/2/3", "nan", "inf", "-inf", "1e999", "1e999/2",
     "8/abc", None, [], math.nan, math.inf],
)  # fmt: skip
def test_what_is_no_number(text: Any) -> None:
    with pytest.raises(UsageError, match="expected eps as a finite number"):
        ThreatModel("l2", text)


@pytest.mark.parametrize("eps", [-1, -1e-9, "-8/255", "-0.1"])
@pytest.mark.parametrize("norm", NORMS)
def test_negative_eps(norm: Any, eps: Any) -> None:
    with pytest.raises(UsageError, match="eps >= 0"):
        ThreatModel(norm, eps)


@pytest.mark.parametrize("eps", [8, "8", 8.0])
def test_eps_in_bytes_is_explained(eps: Any) -> None:
    with pytest.raises(UsageError, match=r"did you mean 8/255\?"):
        ThreatModel("linf", eps)
    assert ThreatModel("linf", 8, bounds=(0, 255)).eps == 8.0
    assert ThreatModel("l2", 8).eps == 8.0


def test_eps_wider_than_the_range_suggests_nothing_absurd() -> None:
    with pytest.raises(UsageError) as caught:
        ThreatModel("linf", "300/255")
    assert "300/255/255" not in str(caught.value)


def test_unknown_norm() -> None:
    with pytest.raises(UsageError, match="did you mean 'linf'"):
        ThreatModel("Linf", 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bounds", [(1, 0), (0, 0), (0, math.inf), (math.nan, 1), (0,), (0, 1, 2), ("a", "b"), None]
)
def test_bounds_that_are_none(bounds: Any) -> None:
    with pytest.raises(UsageError, match="two finite numbers"):
        ThreatModel("l2", 0.1, bounds=bounds)


def test_a_huge_eps_is_no_error() -> None:
    """It means the whole box, and warnings are errors here."""
    x = images(2, 1, 2, 2)
    point = x + noise(2, 1, 2, 2)
    for norm in ("l2", "l1", "l0"):
        threat = ThreatModel(norm, 1e39)  # type: ignore[arg-type]
        assert torch.allclose(threat.project(point, x), point.clamp(0, 1))


@pytest.mark.parametrize("norm", NORMS)
def test_eps_zero_allows_nothing(norm: Any) -> None:
    threat, x = ThreatModel(norm, 0), images(8, 1, 3, 3)
    assert torch.equal(threat.project(x + noise(8, 1, 3, 3), x), x)
    assert torch.equal(threat.random_start(x, streams(8)), x)


def test_the_value_itself() -> None:
    threat = ThreatModel("linf", "8/255", targeted=True)  # type: ignore[arg-type]
    assert threat.targeted
    assert threat != ThreatModel("linf", 8 / 255)
    assert threat == ThreatModel("linf", 8 / 255, targeted=True)
    assert "one given wrong class" in threat.words()
    assert "any wrong class" in ThreatModel("l2", 1).words()
    assert threat.eps_text == "8/255"
    assert ThreatModel("l2", 0.5).eps_text == "0.5"
    smaller = ThreatModel("l2", "1/2", (-1, 1), targeted=True).with_eps(0.25)  # type: ignore[arg-type]
    assert (smaller.eps, smaller.eps_text, smaller.bounds) == (0.25, "0.25", (-1.0, 1.0))
    assert smaller.targeted
    with pytest.raises(dataclasses.FrozenInstanceError):
        threat.eps = 1.0  # type: ignore[misc]


def test_replace_does_not_keep_the_old_text() -> None:
    threat = ThreatModel("linf", "8/255")  # type: ignore[arg-type]
    assert "8/255" not in dataclasses.replace(threat, eps=0.1).words()


# ---------------------------------------------------------------------------- check_images


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 4), r"got shape \(2, 3, 4\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "type torch.uint8"),
        (torch.zeros(0, 1, 4, 4), "got none"),
        (torch.zeros(2, 0, 4, 4), "got none"),
        (torch.full((2, 1, 4, 4), 1.01), "values from 1.01 to 1.01"),
        (torch.full((2, 1, 4, 4), -0.01), "values from -0.01"),
        (torch.full((2, 1, 4, 4), 128.0), "to 128"),
        (torch.full((2, 1, 4, 4), math.inf), "inf"),
        (torch.full((2, 1, 4, 4), -math.inf), "inf"),
        (torch.tensor([[[[0.5]]], [[[math.nan]]], [[[0.1]]]]), "NaN in 1 of 3"),
    ],
)
def test_images_that_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_images(x)


def test_images_at_the_ends_are_fine() -> None:
    check_images(torch.tensor([[[[0.0, 1.0]]]]))
    check_images(torch.tensor([[[[-1.0, 1.0]]]]), (-1.0, 1.0))
    check_images(torch.tensor([[[[0.0, 1.0]]]], dtype=torch.float64))
