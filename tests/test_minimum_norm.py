"""Minimum-norm attacks: they reach known distances, and are no weaker than other libraries."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from attacking import generator, linear, streams
from torch import Tensor, nn

import robustann as ra
from robustann.attacks import Attack, AttackResult, parse_attack
from robustann.attacks.ddn import DDN
from robustann.attacks.engine import craft, predict_logits, run
from robustann.attacks.fmn import FMN
from robustann.attacks.sigma_zero import SigmaZero
from robustann.errors import UsageError
from robustann.rng import SampleRandom
from robustann.threat import NORMS, ThreatModel

CASES = [
    *(pytest.param(FMN(), norm, id=f"fmn-{norm}") for norm in NORMS),
    pytest.param(DDN(), "l2", id="ddn-l2"),
    pytest.param(SigmaZero(), "l0", id="sigma-zero-l0"),
]
WIDE = {"linf": 1.0, "l2": 1e3, "l1": 1e4, "l0": 1e4}


def images(*shape: int, seed: int = 0) -> Tensor:
    """Many entries lie at an end of the range, as in pictures: there the box binds at once."""
    return (torch.rand(shape, generator=generator(seed)) * 1.4 - 0.2).clamp_(0, 1)


def nearest(
    attack: Attack, model: nn.Module, x: Tensor, labels: Tensor, norm: Any, **options: Any
) -> AttackResult:
    """Whatever the distance, found is found."""
    random = options.pop("random", streams(len(x)))
    return run(attack, model, x, labels, ThreatModel(norm, WIDE[norm]), random=random, **options)


# ------------------------------------------------------------------------------ known distances


def least_distance(w: Tensor, missing: float, x: Tensor, norm: str) -> float:
    """The least change of ``x`` within [0, 1] that lets w @ x rise by ``missing``; all float64."""
    room = torch.where(w > 0, 1 - x, x)
    steep = w.abs()
    if float((steep * room).sum()) < missing:
        return math.inf
    if norm == "l0":
        gains = (steep * room).sort(descending=True).values.cumsum(0)
        return int((gains < missing).sum()) + 1
    if norm == "l1":
        order = steep.argsort(descending=True)
        spent = rise = 0.0
        for entry in order.tolist():
            part = min(float(room[entry]), (missing - rise) / float(steep[entry]))
            spent, rise = spent + part, rise + part * float(steep[entry])
            if rise >= missing * (1 - 1e-12):
                break
        return spent

    def change(reach: float) -> Tensor:
        return torch.minimum(steep * reach if norm == "l2" else torch.full_like(w, reach), room)

    low, high = 0.0, 1.0
    while float((steep * change(high)).sum()) < missing * (1 - 1e-12):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        short = float((steep * change(middle)).sum()) < missing
        low, high = (middle, high) if short else (low, middle)
    return float(change(high).norm() if norm == "l2" else change(high).max())


def known_distances(weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor, norm: str) -> Tensor:
    """The image is classified wrongly as soon as any one class overtakes the label's."""
    weight, bias, flat = weight.double(), bias.double(), x.flatten(1).double()
    answer = []
    for image, label in zip(flat, labels.tolist(), strict=True):
        logits = weight @ image + bias
        answer.append(
            min(
                least_distance(
                    weight[k] - weight[label], float(logits[label] - logits[k]), image, norm
                )
                for k in range(len(weight))
                if k != label
            )
        )
    return torch.tensor(answer, dtype=torch.float64)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_linear_models(attack: Attack, norm: str, classes: int) -> None:
    weight = torch.randn(classes, 48, generator=generator(classes))
    bias = -weight.sum(1) / 2
    model, x = linear(weight, bias), images(40, 1, 6, 8)
    labels = predict_logits(model, x).argmax(1)
    known = known_distances(weight, bias, x, labels, norm)
    result = nearest(attack, model, x, labels, norm)
    assert bool(result.success.all())
    # Nothing is nearer than the boundary: the closed form itself is held by the attacks.
    assert bool((result.distance >= known - 1e-6).all())
    if norm == "l0":
        # How many entries: mostly the fewest, never far from it.
        assert float((result.distance == known).double().mean()) >= 0.6
        assert float((result.distance - known).max()) <= 2
        return
    near = (result.distance <= 1.03 * known).double().mean()
    if classes == 2:
        assert float(near) == 1.0
    elif attack.name == "fmn":
        # Now and then a step leads to the boundary of another class than the nearest.
        assert float(near) >= 0.85
        assert float((result.distance / known).median()) <= 1.001
    else:
        # Cross-entropy pulls towards several classes at once; so does it in other libraries.
        assert float((result.distance / known).median()) <= 1.15


@pytest.mark.parametrize("attack", [FMN(), SigmaZero()], ids=["fmn", "sigma-zero"])
def test_fewest_entries_by_trying_all(attack: Attack) -> None:
    """Each of eight entries stays, goes to 0 or goes to 1: a linear model needs nothing else."""
    weight = torch.randn(3, 8, generator=generator(1))
    bias = -weight.sum(1) / 2
    model = linear(weight, bias)
    x = torch.rand(24, 1, 2, 4, generator=generator(2))
    labels = predict_logits(model, x).argmax(1)
    moves = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=8)))
    fewest = []
    for image, label in zip(x.flatten(1), labels, strict=True):
        tried = torch.where(moves < 0, image, moves)
        wrong = (tried @ weight.T + bias).argmax(1) != label
        fewest.append(int((moves >= 0).sum(1)[wrong].min()) if bool(wrong.any()) else 99)
    known = torch.tensor(fewest)
    assert int(known.max()) < 99
    found = nearest(attack, model, x, labels, "l0").distance
    assert bool((found >= known).all())
    assert float((found == known).double().mean()) >= 0.85
    assert float((found - known).max()) <= 1


# ------------------------------------------------------------------------------- what they keep


def network(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(shape[0], 6, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(6 * shape[1] * shape[2], classes),
        ).eval()  # fmt: skip


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("shape", "classes", "count"),
    [((1, 6, 6), 2, 9), ((3, 5, 7), 3, 9), ((1, 4, 9), 10, 1), ((3, 6, 6), 100, 9)],
)
@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_shapes_and_classes(
    attack: Attack, norm: Any, shape: tuple[int, int, int], classes: int, count: int, targeted: bool
) -> None:
    model, x = network(shape, classes), images(count, *shape)
    labels = predict_logits(model, x).argmax(1)
    if targeted:
        labels = (labels + 1) % classes
    threat = ThreatModel(norm, WIDE[norm], targeted=targeted)
    result = run(attack, model, x, labels, threat, random=streams(count))
    x_adv = result.adversarial
    assert x_adv.dtype == torch.float32
    assert x_adv.shape == x.shape
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    predicted = predict_logits(model, x_adv).argmax(1)
    assert torch.equal(result.prediction, predicted)
    assert torch.equal(result.success, (predicted == labels) == targeted)
    assert float(result.success.double().mean()) >= (0.8 if targeted else 1.0)
    order = {"linf": math.inf, "l2": 2, "l1": 1, "l0": 0}[norm]
    delta = (x_adv.double() - x.double()).flatten(1)
    length = torch.linalg.vector_norm(delta, ord=order, dim=1)
    assert torch.allclose(result.distance, length, rtol=1e-12)
    assert bool((result.distance[result.success] > 0).all())
    forwards, backwards = attack.cost
    assert result.backwards.tolist() == [backwards] * count
    assert torch.equal(result.forwards, forwards + 1 + result.success)


@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_other_bounds(attack: Attack, norm: Any) -> None:
    """The same pictures in [-1, 3] are four times as far from the boundary (l0: as far)."""
    model, x = network((1, 6, 6), 3), images(16, 1, 6, 6)
    labels = predict_logits(model, x).argmax(1)

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = model((x + 1) / 4)
            return logits

    usual = nearest(attack, model, x, labels, norm)
    threat = ThreatModel(norm, 4 * WIDE[norm], bounds=(-1.0, 3.0))
    other = run(attack, Scaled(), x * 4 - 1, labels, threat, random=streams(16))
    assert float(other.adversarial.min()) >= -1
    assert float(other.adversarial.max()) <= 3
    assert bool(other.success.all())
    ratio = (other.distance / usual.distance).median()
    assert float(ratio) == pytest.approx(1 if norm == "l0" else 4, rel=0.03)


@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_batches_change_nothing(attack: Attack, norm: Any) -> None:
    model, x = network((3, 6, 7), 10), images(15, 3, 6, 7)
    labels = predict_logits(model, x).argmax(1)
    labels[::5] = (labels[::5] + 1) % 10
    attack = replace(attack, steps=25)  # type: ignore[call-arg]
    whole = nearest(attack, model, x, labels, norm)
    for size in (1, 7):
        parts = [
            nearest(attack, model, x[rows], labels[rows], norm, random=SampleRandom.create(0, rows))
            for rows in torch.arange(15).split(size)  # type: ignore[no-untyped-call]
        ]
        joined = AttackResult.concatenate(parts)
        for field in fields(AttackResult):
            if field.name != "attack":
                assert torch.equal(getattr(joined, field.name), getattr(whole, field.name)), field


@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_the_curve(attack: Attack, norm: Any) -> None:
    """One run answers for every eps: the distances do not hang on it, success falls out of them."""
    model, x = network((1, 6, 6), 10), images(30, 1, 6, 6)
    labels = predict_logits(model, x).argmax(1)
    labels[:4] = (labels[:4] + 1) % 10
    attack = replace(attack, steps=40)  # type: ignore[call-arg]
    whole = nearest(attack, model, x, labels, norm)
    # What is wrong already has no distance to go, and is not worked on.
    assert whole.distance[:4].tolist() == [0.0] * 4
    assert torch.equal(whole.adversarial[:4], x[:4])
    assert whole.forwards[:4].tolist() == [2] * 4
    assert whole.backwards[:4].tolist() == [0] * 4
    assert bool((whole.distance[4:] > 0).all())
    rates = []
    for eps in [
        0.0,
        *whole.distance.quantile(torch.tensor([0.3, 0.5, 0.7, 0.9]).double()).tolist(),
    ]:
        result = run(attack, model, x, labels, ThreatModel(norm, eps), random=streams(30))
        assert torch.equal(result.distance, whole.distance)
        assert torch.equal(result.adversarial, whole.adversarial)
        assert torch.equal(result.success, whole.distance <= eps)
        assert torch.equal(result.first_success > 0, result.success)
        rates.append(result.success_rate)
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(4 / 30)
    assert rates[-1] >= 0.85


class Constant(nn.Module):
    """Differentiable, and always sure of class 0."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x.flatten(1)[:, :3] + torch.tensor([1.0, 0.0, 0.0])


@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_a_constant_model_is_never_wrong(attack: Attack, norm: Any) -> None:
    x, labels = images(5, 1, 3, 3), torch.zeros(5, dtype=torch.int64)
    result = nearest(attack, Constant(), x, labels, norm)
    assert not bool(result.success.any())
    assert result.prediction.tolist() == [0] * 5
    assert bool(result.adversarial.isfinite().all())


class Cliff(nn.Module):
    """NaN for bright images: what is no answer is no success, and does not stop the search."""

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1).mean(1)
        dark = torch.stack([score - 0.3, 0.3 - score], 1)
        return torch.where((score > 0.7)[:, None], torch.full_like(dark, math.nan), dark)


@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_nan_logits(attack: Attack, norm: Any) -> None:
    x = images(6, 1, 4, 4) * 0.2 + 0.4
    labels = torch.zeros(6, dtype=torch.int64)
    result = nearest(attack, Cliff(), x, labels, norm)
    assert bool(result.success.all())
    assert bool((result.adversarial.flatten(1).mean(1) < 0.3 + 1e-4).all())


@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_crafting_stays_in_the_ball(attack: Attack, norm: Any) -> None:
    model, x = network((1, 6, 6), 10), images(8, 1, 6, 6)
    labels = predict_logits(model, x).argmax(1)
    eps = {"linf": 0.1, "l2": 0.5, "l1": 2.0, "l0": 3.0}[norm]
    crafted = craft(attack, model, x, labels, ThreatModel(norm, eps), random=streams(8))
    distance = ThreatModel(norm, eps).distance(crafted, x)
    assert 0 < float(distance.max()) <= eps
    assert float(crafted.min()) >= 0
    assert float(crafted.max()) <= 1


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("fmn:steps=0", "steps >= 1"),
        ("fmn:alpha_init=0", "alpha_init > 0"),
        ("fmn:gamma_init=0.25", "below 0.25"),
        ("fmn:gamma_init=0", "below 0.25"),
        ("fmn:leak=-1", "leak >= 0"),
        ("ddn:steps=0", "steps >= 1"),
        ("ddn:gamma=1", "below 1"),
        ("ddn:init_norm=0", "init_norm > 0"),
        ("sigma-zero:steps=0", "steps >= 1"),
        ("sigma-zero:sigma=0", "sigma > 0"),
        ("sigma-zero:lr=-1", "lr > 0"),
        ("sigma-zero:threshold=2", "threshold from 0 to 1"),
    ],
)
def test_values_that_are_refused(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        parse_attack(text)


# --------------------------------------------------------------------- a radius for each image


@pytest.mark.parametrize("norm", NORMS)
def test_projection_with_a_radius_for_each_image(norm: Any) -> None:
    """Row by row the same as a threat model of that eps."""
    x = images(24, 3, 5, 7)
    point = x + torch.randn(x.shape, generator=generator(1))
    wide = {"linf": 0.5, "l2": 3.0, "l1": 9.0, "l0": 20.0}[norm]
    radius = torch.linspace(0, 1.5 * wide, 24)
    region = ThreatModel(norm, wide).region(x)
    moved = region.project(point, radius)
    limit = radius.clamp(max=wide)
    assert bool((ThreatModel(norm, wide).distance(moved, x) <= limit.double()).all())
    for row in range(24):
        one = slice(row, row + 1)
        alone = ThreatModel(norm, float(limit[row])).project(point[one], x[one])
        # Eight at a time, as the engine does: rows left over are rounded otherwise.
        assert torch.allclose(moved[one], alone, atol=1e-6), (row, float(limit[row]))
    order = torch.randperm(24, generator=generator(2))[:16]
    part = ThreatModel(norm, wide).region(x[order]).project(point[order], radius[order])
    assert torch.equal(part, moved[order])
    assert torch.equal(region.project(x, radius), x)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_slope_is_the_dual_norm(norm: Any) -> None:
    gradient = torch.randn(4, 1, 3, 3, generator=generator())
    dual = {"linf": 1.0, "l2": 2.0, "l1": math.inf}[norm]
    slope = ThreatModel(norm, 0.1).slope(gradient)
    assert torch.allclose(slope, torch.linalg.vector_norm(gradient.flatten(1), dual, dim=1))
    if norm != "l1":
        step = ThreatModel(norm, 0.1).steepest_step(gradient, 1.0)
        assert torch.allclose((step * gradient).flatten(1).sum(1), slope)
    assert float(ThreatModel(norm, 0.1).slope(torch.zeros(1, 1, 2, 2))) > 0


def test_l0_has_no_slope() -> None:
    with pytest.raises(UsageError, match="got l0"):
        ThreatModel("l0", 1).slope(torch.ones(1, 1, 2, 2))


# ------------------------------------------------------------------------- parity with foolbox


# Some of its modules leave files open or use old names of their own dependencies.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("attack", "norm", "reference"),
    [
        (FMN(steps=60), "linf", "LInfFMNAttack"),
        (FMN(steps=60), "l2", "L2FMNAttack"),
        (FMN(steps=60), "l1", "L1FMNAttack"),
        (FMN(steps=60), "l0", "L0FMNAttack"),
        (FMN(steps=60), "l2", "DDNAttack"),
        (DDN(steps=60), "l2", "DDNAttack"),
        (SigmaZero(steps=60), "l0", "L0FMNAttack"),
    ],
)
def test_no_weaker_than_foolbox(
    attack: Attack, norm: Any, reference: str, model: nn.Module, digits: ra.ImageData
) -> None:
    foolbox = pytest.importorskip("foolbox")
    x, labels = digits.test.images(slice(0, 120)), digits.test.labels[:120]
    right = predict_logits(model, x).argmax(1) == labels
    x, labels = x[right], labels[right]
    assert len(x) > 90
    there = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    theirs = getattr(foolbox.attacks, reference)(steps=60)(there, x, labels, epsilons=None)[1]
    wrong = predict_logits(model, theirs.clamp(0, 1)).argmax(1) != labels
    distance = ThreatModel(norm, 1).distance(theirs.clamp(0, 1), x)
    distance = torch.where(wrong, distance, math.inf)
    ours = nearest(attack, model, x, labels, norm)
    assert bool(ours.success.all())
    assert float(ours.distance.median()) <= 1.03 * float(distance.median())
    assert float((ours.distance <= 1.1 * distance).double().mean()) >= 0.9
