"""The engine: it reaches known optima, judges alone, counts exactly and leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attacking import Scripted, generator, in_batches, linear, streams
from torch import Tensor, nn

from robustann.attacks import FGSM, PGD, Attack, AttackResult, UniformNoise
from robustann.attacks.base import State
from robustann.attacks.engine import ALIGNMENT, Oracle, craft, predict_logits, run
from robustann.errors import DataError, ModelError, UsageError
from robustann.rng import SampleRandom
from robustann.threat import NORMS, ThreatModel

DUAL = {"linf": 1.0, "l2": 2.0, "l1": math.inf}


def images(*shape: int, low: float = 0.0, high: float = 1.0, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed)) * (high - low) + low


def network(shape: tuple[int, int, int], classes: int, seed: int = 0) -> nn.Sequential:
    """Untrained; batch norm and dropout would show a wrong mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(shape[0], 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(8 * shape[1] * shape[2], classes),
        ).eval()


def predictions(model: nn.Module, x: Tensor) -> Tensor:
    return predict_logits(model, x).argmax(1)


def same(first: AttackResult, second: AttackResult) -> bool:
    """Bit for bit, NaN included."""
    names = [field.name for field in fields(AttackResult) if field.name != "attack"]
    return all(
        torch.equal(
            getattr(first, name).contiguous().view(torch.uint8),
            getattr(second, name).contiguous().view(torch.uint8),
        )
        for name in names
    )


def assert_honest(
    result: AttackResult, model: nn.Module, x: Tensor, labels: Tensor, threat: ThreatModel
) -> None:
    """What the result says of its images is what a fresh look at them says."""
    x_adv = result.adversarial
    assert x_adv.dtype == torch.float32
    assert x_adv.shape == x.shape
    assert float(x_adv.min()) >= threat.bounds[0]
    assert float(x_adv.max()) <= threat.bounds[1]
    assert float((threat.distance(x_adv, x) - threat.eps).max()) <= 0
    assert torch.allclose(result.distance, threat.distance(x_adv, x), rtol=1e-14)
    logits = predict_logits(model, x_adv)
    predicted = logits.argmax(1)
    hit = predicted == labels
    assert torch.equal(result.success, hit if threat.targeted else ~hit)
    assert torch.equal(result.prediction, predicted)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    gap = own - logits.scatter(1, labels[:, None], -math.inf).amax(1)
    assert torch.allclose(result.margin, -gap if threat.targeted else gap, atol=1e-5)
    assert torch.equal(result.first_success > 0, result.success)
    assert bool((result.first_success <= result.forwards).all())
    assert result.success_rate == pytest.approx(float(result.success.double().mean()))


# -------------------------------------------------------------------------- known optima


def two_classes(seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A linear model, and its w, b: class 1 where w @ x + b > 0."""
    weight = torch.randn(2, 48, generator=generator(seed))
    bias = torch.tensor([0.0, -float((weight[1] - weight[0]).sum()) / 2])
    return linear(weight, bias), (weight[1] - weight[0]).double(), bias[1] - bias[0]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("eps", [0.02, 0.1, 0.25])
def test_pgd_reaches_the_optimum_of_a_linear_model(norm: Any, eps: float) -> None:
    """Far from the box, the least margin over the ball is margin - eps * |w|_dual."""
    model, w, b = two_classes()
    x = images(200, 1, 6, 8, low=0.3, high=0.7)
    score = x.flatten(1).double() @ w + b
    labels = (score > 0).long()
    slope = float(w.norm(p=DUAL[norm]))
    worst = score.abs() - eps * slope
    threat = ThreatModel(norm, eps)

    attack = PGD(steps=40, step_size=eps)
    crafted = craft(attack, model, x, labels, threat, random=streams(200))
    reached = (crafted.flatten(1).double() @ w + b) * (labels * 2 - 1)
    assert torch.allclose(reached, worst, atol=2e-5 * slope)

    result = run(PGD(), model, x, labels, threat, random=streams(200))
    assert_honest(result, model, x, labels, threat)
    # From a random start, forty l2 steps turn towards the optimum and end a little beside it.
    slack = 0.04 if norm == "l2" else 1e-4
    clear = worst.abs() > slack * eps * slope
    assert int(clear.sum()) > 150
    assert torch.equal(result.success[clear], (worst < 0)[clear])
    stands = clear & ~result.success
    assert torch.allclose(
        result.margin[stands].double(), worst[stands], atol=slack * eps * slope, rtol=0
    )


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.25])
def test_fgsm_is_exact_on_two_linear_classes(eps: float) -> None:
    model, w, b = two_classes()
    x = images(200, 1, 6, 8, low=0.3, high=0.7)
    score = x.flatten(1).double() @ w + b
    labels = (score > 0).long()
    worst = score.abs() - eps * float(w.abs().sum())
    threat = ThreatModel("linf", eps)
    result = run(FGSM(), model, x, labels, threat, random=streams(200))
    assert_honest(result, model, x, labels, threat)
    assert torch.equal(result.success, worst < 0)
    assert torch.allclose(result.margin.double(), worst, atol=1e-4)
    # PGD can do no better here, and no worse.
    pgd = run(PGD(steps=10), model, x, labels, threat, random=streams(200))
    assert torch.equal(pgd.success, result.success)


@pytest.mark.parametrize("eps", [0.05, 0.3])
@pytest.mark.parametrize("attack", [FGSM(), PGD()])
def test_the_box_is_part_of_the_optimum(attack: Attack, eps: float) -> None:
    """In linf each entry by itself goes as far as ball and box let it."""
    model, w, b = two_classes()
    x = (images(200, 1, 6, 8) * 1.5 - 0.25).clamp(0, 1)
    score = x.flatten(1).double() @ w + b
    labels = (score > 0).long()
    side = (labels * 2 - 1)[:, None].double()
    best = (x.flatten(1).double() - eps * side * w.sign()).clamp(0, 1)
    worst = (best @ w + b) * side.squeeze(1)
    threat = ThreatModel("linf", eps)
    result = run(attack, model, x, labels, threat, random=streams(200))
    assert_honest(result, model, x, labels, threat)
    assert torch.equal(result.success, worst < 0)
    stands = ~result.success
    assert torch.allclose(result.margin[stands].double(), worst[stands], atol=1e-4)


@pytest.mark.parametrize(
    ("entries", "eps"), [((6, 8), 1.5), ((6, 8), 5.0), ((20, 20), 5.0), ((28, 28), 10.0)]
)
def test_l1_fills_one_pixel_after_another(entries: tuple[int, int], eps: float) -> None:
    """The optimum takes the steepest pixels to the end of their range, as many as eps pays for.
    An attack that goes on pushing pixels that have arrived moves one of them alone."""
    size = math.prod(entries)
    w = torch.randn(size, generator=generator(1))
    model = linear(torch.stack([torch.zeros(size), w]), torch.tensor([0.0, -float(w.sum()) / 2]))
    x = images(60, 1, *entries)
    score = x.flatten(1).double() @ w.double() - w.double().sum() / 2
    labels = (score > 0).long()
    flat, side = x.flatten(1).double(), (labels * 2 - 1)[:, None].double()
    reach = torch.where(side * w > 0, flat, 1 - flat)
    order = w.abs().argsort(descending=True)
    paid = reach[:, order].cumsum(1).clamp(max=eps).diff(dim=1, prepend=torch.zeros(60, 1))
    fall = paid @ w[order].abs().double()
    threat = ThreatModel("l1", eps)
    crafted = craft(PGD(steps=100), model, x, labels, threat, random=streams(60))
    score_adv = crafted.flatten(1).double() @ w.double() - w.double().sum() / 2
    fell = ((score - score_adv) * side.squeeze(1)) / fall
    assert float(fell.max()) <= 1 + 1e-5
    assert float(fell.mean()) > 0.85


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_finds_the_nearest_of_many_classes(norm: Any, classes: int) -> None:
    """Classes with weights on pixels of their own: every pair of them is equally steep, so the
    runner-up is the nearest class and stays it all the way."""
    part = 6
    weight = torch.zeros(classes, classes * part)
    for k in range(classes):
        sign = torch.randn(part, generator=generator(k)).sign()
        weight[k, k * part : (k + 1) * part] = sign
    bias = -weight.sum(1) / 2
    model = linear(weight, bias)
    x = images(200, 1, classes, part, low=0.35, high=0.65)
    eps = 0.02 if norm == "linf" else 0.1
    logits = x.flatten(1).double() @ weight.double().T + bias
    labels = logits.argmax(1)
    gaps = logits.gather(1, labels[:, None]) - logits
    gaps.scatter_(1, labels[:, None], math.inf)
    slope = float((weight[0] - weight[1]).norm(p=DUAL[norm]))
    worst = gaps.amin(1) - eps * slope
    threat = ThreatModel(norm, eps)
    assert 100 < int((worst < 0).sum()) < 195
    clear = worst.abs() > 0.01 * eps * slope
    attack = PGD(loss="margin", random_start=False)
    result = run(attack, model, x, labels, threat, random=streams(200))
    assert_honest(result, model, x, labels, threat)
    assert torch.equal(result.success[clear], (worst < 0)[clear])
    stands = clear & ~result.success
    assert torch.allclose(result.margin[stands].double(), worst[stands], atol=1e-4)
    # A random start may put another class ahead, and lead to a boundary a little further off.
    result = run(PGD(loss="margin"), model, x, labels, threat, random=streams(200))
    assert_honest(result, model, x, labels, threat)
    assert not bool((result.success & clear & (worst > 0)).any())
    assert int((clear & (worst < 0) & ~result.success).sum()) <= 4


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_nothing_beats_the_bound(norm: Any, loss: str) -> None:
    """On any linear model: no margin below the analytic bound, and nearly all reach it."""
    weight = torch.randn(10, 48, generator=generator())
    model = linear(weight, -weight.sum(1) / 2)
    x = images(100, 1, 6, 8, low=0.3, high=0.7)
    logits = x.flatten(1).double() @ weight.double().T - weight.double().sum(1) / 2
    labels = logits.argmax(1)
    eps = {"linf": 0.02, "l2": 0.1, "l1": 0.25}[norm]
    apart = (weight[labels][:, None].double() - weight.double()).norm(p=DUAL[norm], dim=2)
    gaps = (logits.gather(1, labels[:, None]) - logits) - eps * apart
    worst = gaps.scatter(1, labels[:, None], math.inf).amin(1)
    threat = ThreatModel(norm, eps)
    result = run(PGD(restarts=3, loss=loss), model, x, labels, threat, random=streams(100))
    assert_honest(result, model, x, labels, threat)
    assert bool((result.margin.double() >= worst - 1e-4).all())
    assert not bool((result.success & (worst > 1e-4)).any())
    # The loss may climb towards another class than the nearest.
    missed = (worst < -1e-4) & ~result.success
    assert int(missed.sum()) <= 6
    assert int(result.success.sum()) > 20


# ------------------------------------------------------------- attacks that mean no good


def towards(oracle: Oracle, length: float) -> Tensor:
    """Along the pixel that decides :func:`first_pixel`, away from the label."""
    side = (1 - 2 * oracle.labels).view(-1, 1, 1, 1).float()
    moved = oracle.x.clone()
    moved[:, :, :1, :1] += length * side
    return moved


def first_pixel() -> nn.Sequential:
    """Class 1 where the first of 16 pixels is above one half."""
    weight = torch.zeros(2, 16)
    weight[1, 0] = 1.0
    return linear(weight, torch.tensor([0.0, -0.5]))


@pytest.mark.parametrize("norm", NORMS)
def test_identity_breaks_nothing(norm: Any) -> None:
    model, x = network((1, 4, 4), 3), images(21, 1, 4, 4)
    labels = predictions(model, x)
    threat = ThreatModel(norm, 1)
    for known in (False, True):
        result = run(Scripted(), model, x, labels, threat, random=streams(21), known_correct=known)
        assert_honest(result, model, x, labels, threat)
        assert not result.success.any()
        assert torch.equal(result.adversarial, x)
        assert result.forwards.tolist() == [4 if known else 5] * 21


def test_a_wrong_original_is_its_own_adversarial_image() -> None:
    model, x = network((1, 4, 4), 3), images(21, 1, 4, 4)
    labels = (predictions(model, x) + 1) % 3
    threat = ThreatModel("linf", 0.1)
    result = run(PGD(steps=3), model, x, labels, threat, random=streams(21))
    assert_honest(result, model, x, labels, threat)
    assert result.success.all()
    assert torch.equal(result.adversarial, x)
    assert result.first_success.tolist() == [1] * 21
    assert result.backwards.tolist() == [0] * 21


@dataclass(frozen=True, kw_only=True)
class Far(Scripted):
    length: float = 100.0

    def proposal(self, oracle: Oracle, iteration: int) -> Tensor:
        return towards(oracle, self.length)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("length", [0.7, 100.0, 1e12, math.inf])
def test_an_attack_that_leaves_the_region(norm: Any, length: float) -> None:
    """It is brought back, and only what is wrong inside counts."""
    x = images(40, 1, 4, 4)
    model = first_pixel()
    labels = predictions(model, x)
    for eps in (0.0, 0.2):
        threat = ThreatModel(norm, eps)
        result = run(Far(length=length), model, x, labels, threat, random=streams(40))
        assert_honest(result, model, x, labels, threat)
        within = (x[:, 0, 0, 0] - 0.5).abs() < eps - 1e-6
        if norm == "l0":
            within[:] = False
        assert not bool((result.success & ~within).any())


@dataclass(frozen=True, kw_only=True)
class NotANumber(Scripted):
    """NaN in some or all pixels, in all iterations but those that a test keeps clean."""

    pixels: int = 16
    clean_from: int = 99
    value: float = math.nan

    def proposal(self, oracle: Oracle, iteration: int) -> Tensor:
        if iteration >= self.clean_from:
            return oracle.region.project(towards(oracle, 1.0))
        broken = oracle.x.flatten(1).clone()
        broken[:, : self.pixels] = self.value
        return broken.view_as(oracle.x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pixels", [1, 16])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_images_are_no_success(norm: Any, pixels: int, label: int, value: float) -> None:
    """argmax over NaN logits is an index like any other."""
    x = images(10, 1, 4, 4, low=0.8, high=0.9) if label else images(10, 1, 4, 4, high=0.2)
    labels = torch.full((10,), label)
    model = first_pixel()
    threat = ThreatModel(norm, 0.1 if norm != "l0" else 0)
    attack = NotANumber(pixels=pixels, value=value)
    for known in (False, True):
        result = run(attack, model, x, labels, threat, random=streams(10), known_correct=known)
        assert not result.success.any()
        assert result.first_success.tolist() == [-1] * 10
        assert torch.equal(result.adversarial, x)
        if not known:
            # Otherwise no image was ever judged.
            assert_honest(result, model, x, labels, threat)


def test_nan_images_do_not_end_the_attack() -> None:
    x = images(10, 1, 4, 4, low=0.4, high=0.6)
    model = first_pixel()
    labels = predictions(model, x)
    threat = ThreatModel("linf", 0.2)
    result = run(NotANumber(clean_from=2), model, x, labels, threat, random=streams(10))
    assert_honest(result, model, x, labels, threat)
    assert result.success.all()


@dataclass(frozen=True, kw_only=True)
class InPassing(Scripted):
    """Adversarial in one iterate alone."""

    steps: int = 6
    at: int = 3

    def proposal(self, oracle: Oracle, iteration: int) -> Tensor:
        return oracle.region.project(towards(oracle, 1.0)) if iteration == self.at else oracle.x


@pytest.mark.parametrize("at", [0, 3, 6])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_success_in_passing_is_kept(at: int, every: int) -> None:
    """Only one pixel in ``every`` image is within reach; the others must not be touched."""
    x = images(17, 1, 4, 4)
    x[:, 0, 0, 0] = torch.where(torch.arange(17) % every == 0, 0.55, 0.95)
    model = first_pixel()
    labels = predictions(model, x)
    threat = ThreatModel("linf", 0.1)
    result = run(InPassing(at=at), model, x, labels, threat, random=streams(17))
    assert_honest(result, model, x, labels, threat)
    hit = torch.arange(17) % every == 0
    assert torch.equal(result.success, hit)
    # The clean look is the first forward.
    assert result.first_success[hit].tolist() == [at + 2] * int(hit.sum())
    assert result.forwards[hit].tolist() == [at + 3] * int(hit.sum())
    assert torch.equal(result.adversarial[hit][:, 0, 0, 0], x[hit][:, 0, 0, 0] - 0.1)


def test_the_smallest_margin_is_kept_where_nothing_falls() -> None:
    x = images(9, 1, 4, 4)
    x[:, 0, 0, 0] = 0.9
    model = first_pixel()
    labels = torch.ones(9, dtype=torch.int64)
    result = run(InPassing(at=3), model, x, labels, ThreatModel("linf", 0.1), random=streams(9))
    assert not result.success.any()
    assert torch.allclose(result.margin, torch.full((9,), 0.3), atol=1e-6)


@dataclass(frozen=True, kw_only=True)
class WithLuggage(Scripted):
    """Carries a tensor of its own, which must follow its rows."""

    steps: int = 5

    def init(self, oracle: Oracle) -> State:
        return {"x": oracle.x, "origin": oracle.x.clone(), "label": oracle.labels.clone()}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        assert torch.equal(state["origin"], oracle.x)
        assert torch.equal(state["label"], oracle.labels)
        assert torch.equal(oracle.region.x, oracle.x)
        assert len(oracle.random) == len(oracle) == len(oracle.x)
        logits = oracle.forward(state["x"])
        assert logits.shape == (len(oracle), 2)
        # A few fall in every step: those whose pixel is nearest to the border.
        return state | {"x": oracle.region.project(towards(oracle, 0.02 * (iteration + 1)))}


def test_what_an_attack_carries_follows_its_rows() -> None:
    x = images(83, 1, 4, 4, low=0.35, high=0.65)
    model = first_pixel()
    labels = predictions(model, x)
    threat = ThreatModel("linf", 0.09)
    result = run(WithLuggage(), model, x, labels, threat, random=streams(83))
    assert_honest(result, model, x, labels, threat)
    near = (x[:, 0, 0, 0] - 0.5).abs()
    clear = (near - 0.09).abs() > 1e-6
    assert torch.equal(result.success[clear], (near < 0.09)[clear])
    assert len(result.first_success.unique()) >= 5


# ------------------------------------------------------------------------------- counting


class Counting(nn.Module):
    """Notes how many rows each forward and each backward had."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.forwards: list[int] = []
        self.backwards: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.append(len(x))
        logits: Tensor = self.inner(x)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self.backwards.append(len(gradient)))
        return logits


def padded(count: int) -> int:
    return count + -count % ALIGNMENT


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("count", [1, 8, 30, 75])
@pytest.mark.parametrize(
    "attack", [PGD(steps=6), PGD(steps=4, restarts=3), FGSM(), UniformNoise(draws=5)]
)
def test_every_row_is_counted(attack: Attack, count: int, known: bool) -> None:
    """A sample stays until the forward it falls in; only then come rows of padding."""
    model, w, b = two_classes()
    x = images(count, 1, 6, 8)
    labels = (x.flatten(1).double() @ w + b > 0).long()
    if not known:
        labels[::5] = 1 - labels[::5]
    counting = Counting(model)
    threat = ThreatModel("linf", 0.05)
    result = run(attack, counting, x, labels, threat, random=streams(count), known_correct=known)
    first, looks = result.first_success, 0 if known else 1
    full_forwards, full_backwards = attack.cost
    calls = full_forwards - (1 if isinstance(attack, FGSM) else 0)
    if isinstance(attack, FGSM):
        calls = 2
    fell = result.success
    assert torch.equal(result.forwards[~fell], torch.full_like(first, looks + calls)[~fell])
    assert torch.equal(result.forwards[fell], first[fell] + 1)

    # Call k is seen by those that had not fallen before it; in the end all that fell are confirmed.
    expected = []
    for call in range(1, looks + calls + 1):
        standing = int((~fell | (first >= call)).sum())
        if standing:
            expected.append(padded(standing))
    if fell.any():
        expected.append(padded(int(fell.sum())))
    assert counting.forwards == expected

    per_start = calls // attack.starts
    with_gradient = full_backwards // attack.starts
    spent = torch.zeros_like(first)
    passed = torch.where(fell, first, looks + calls)
    sizes = []
    for call in range(1, looks + calls + 1):
        if call > looks and (call - looks - 1) % per_start < with_gradient:
            spent += passed >= call
            standing = int((~fell | (first >= call)).sum())
            if standing:
                sizes.append(padded(standing))
    assert torch.equal(result.backwards, spent)
    assert counting.backwards == sizes
    assert int(result.backwards.max()) <= full_backwards


def test_the_batch_shrinks() -> None:
    model, w, b = two_classes()
    x = images(256, 1, 6, 8)
    labels = (x.flatten(1).double() @ w + b > 0).long()
    counting = Counting(model)
    run(PGD(steps=20), counting, x, labels, ThreatModel("linf", 0.1), random=streams(256))
    assert counting.forwards[0] == 256
    assert counting.backwards[-1] < 64
    assert counting.backwards == sorted(counting.backwards, reverse=True)


def test_a_lucky_draw_does_not_save_a_sample() -> None:
    """What one draw of a randomised model breaks and the next does not is attacked further."""

    class Noisy(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x + 0.1 * torch.randn_like(x))

    model, w, b = two_classes()
    x = images(128, 1, 6, 8)
    labels = (x.flatten(1).double() @ w + b > 0).long()
    threat = ThreatModel("linf", 0.2)
    plain = run(PGD(steps=20), model, x, labels, threat, random=streams(128))
    noisy = run(PGD(steps=20), Noisy(model), x, labels, threat, random=streams(128))
    assert noisy.success_rate >= plain.success_rate - 0.02


def test_logits_that_are_not_finite_prove_nothing_for_any_label() -> None:
    class Overflowing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            away = (x - 0.5).flatten(1).abs().amax(1, keepdim=True) > 1e-4
            logits = x.flatten(1)[:, :3] * 0
            return torch.where(away, logits / 0.0, logits + torch.eye(3)[:1] * 0)

    x = torch.full((6, 1, 2, 2), 0.5)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    threat = ThreatModel("linf", 0.1)
    result = run(PGD(steps=3), Overflowing(), x, labels, threat, random=streams(6),
                 known_correct=True)  # fmt: skip
    assert not result.success.any()
    assert torch.equal(result.prediction, labels)


def test_buffers_are_restored_in_place_or_replaced() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("in_place", torch.zeros(1))
            self.register_buffer("replaced", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.in_place += 1
            self.replaced = self.replaced + 1
            return self.linear(x.flatten(1))

    model = Counter()
    x = images(8, 1, 2, 2)
    labels = torch.zeros(8, dtype=torch.int64)
    run(PGD(steps=3), model, x, labels, ThreatModel("linf", 0.1), random=streams(8))
    assert (model.in_place.item(), model.replaced.item()) == (0, 0)


def test_restarts_are_for_those_that_stand() -> None:
    model = network((1, 4, 4), 3)
    x = images(64, 1, 4, 4)
    labels = predictions(model, x)
    threat = ThreatModel("linf", 0.02)
    attack = PGD(steps=2, step_size=1e-6, restarts=8)
    many = run(attack, model, x, labels, threat, random=streams(64))
    assert_honest(many, model, x, labels, threat)
    starts = (many.first_success[many.success] - 2) // 3
    assert len(starts.unique()) > 1, "no sample fell in a later start"


# ------------------------------------------------------------------------------ no trace


class Fragile(nn.Module):
    """Raises at the call it is told to; draws random numbers at every other."""

    def __init__(self, inner: nn.Module, error: BaseException | None, at: int) -> None:
        super().__init__()
        self.inner, self.error, self.at, self.calls = inner, error, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.error is not None and self.calls == self.at:
            raise self.error
        noise = torch.randn_like(x)
        logits: Tensor = self.inner(x + 0.0 * noise)
        return logits


def attack_once(model: nn.Module, x: Tensor, labels: Tensor, threat: ThreatModel) -> object:
    return run(PGD(steps=4), model, x, labels, threat, random=streams(len(x)))


def craft_once(model: nn.Module, x: Tensor, labels: Tensor, threat: ThreatModel) -> object:
    return craft(PGD(steps=4), model, x, labels, threat, random=streams(len(x)))


def look_once(model: nn.Module, x: Tensor, labels: Tensor, threat: ThreatModel) -> object:
    return [predict_logits(model, x) for _ in range(4)]


@pytest.mark.parametrize("work", [attack_once, craft_once, look_once])
@pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt()])
def test_the_model_is_left_as_it_was(
    work: Callable[..., object], error: BaseException | None
) -> None:
    inner = network((1, 4, 4), 3).train()
    inner[1].eval()
    inner[5].weight.requires_grad_(False)
    inner[0].bias.grad = torch.full_like(inner[0].bias, 7.0)
    model = Fragile(inner, error, at=3)
    flags = [module.training for module in model.modules()]
    assert len(set(flags)) == 2
    grads = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in
             model.parameters()]  # fmt: skip
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    x = images(11, 1, 4, 4)
    labels = torch.randint(3, (11,), generator=generator())
    given = x.clone(), labels.clone()
    torch.manual_seed(1234)
    state = torch.get_rng_state()

    threat = ThreatModel("linf", 0.1)
    if error is None:
        work(model, x, labels, threat)
        assert model.calls >= 4
    else:
        with pytest.raises(type(error)):
            work(model, x, labels, threat)

    assert [module.training for module in model.modules()] == flags
    for p, (flag, grad) in zip(model.parameters(), grads, strict=True):
        assert p.requires_grad == flag
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert torch.equal(x, given[0])
    assert torch.equal(labels, given[1])


@pytest.mark.parametrize("work", [attack_once, craft_once])
def test_it_runs_in_eval_mode(work: Callable[..., object]) -> None:
    """Batch norm in training mode would mix the batch, and dropout would hide the gradient."""
    modes = []
    model = network((1, 4, 4), 3).train()
    for module in model:
        module.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    x = images(8, 1, 4, 4)
    work(model, x, torch.zeros(8, dtype=torch.int64), ThreatModel("linf", 0.1))
    assert modes
    assert not any(modes)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("work", [attack_once, craft_once])
def test_the_callers_grad_mode_does_not_matter(mode: Any, work: Callable[..., Any]) -> None:
    model = network((1, 4, 4), 3)
    threat = ThreatModel("linf", 0.1)
    expected = work(model, images(11, 1, 4, 4), torch.arange(11) % 3, threat)
    with mode():
        x, labels = images(11, 1, 4, 4), torch.arange(11) % 3
        result = work(model, x, labels, threat)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    if isinstance(expected, Tensor):
        assert torch.equal(result, expected)
        assert not result.requires_grad
    else:
        assert same(result, expected)
        assert int(result.backwards.sum()) > 0


def test_a_model_made_in_inference_mode_is_refused_untouched() -> None:
    """Its weights can carry no gradient, now or later."""
    with torch.inference_mode():
        model = network((1, 4, 4), 3)
        model[0].weight.requires_grad_(True)
    flags = [p.requires_grad for p in model.parameters()]
    x = images(3, 1, 4, 4)
    with pytest.raises(ModelError, match="inference"):
        attack_once(model, x, torch.zeros(3, dtype=torch.int64), ThreatModel("linf", 0.1))
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_model_that_draws_random_numbers_repeats_itself() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network((1, 4, 4), 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x + 0.1 * torch.randn_like(x))
            return logits

    model, x = Noisy(), images(24, 1, 4, 4)
    labels = predictions(model.inner, x)
    threat = ThreatModel("linf", 0.1)
    torch.manual_seed(1)
    first = run(PGD(steps=3), model, x, labels, threat, random=streams(24))
    torch.manual_seed(2)
    second = run(PGD(steps=3), model, x, labels, threat, random=streams(24))
    assert same(first, second)
    assert bool((first.first_success[~first.success] == -1).all())


# ---------------------------------------------------------------- seeds, batches and shapes


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6), (1, 2, 2)])
def test_results_do_not_depend_on_the_batch(norm: Any, shape: tuple[int, int, int]) -> None:
    """Entries and features are multiples of four here: with others, the matrix kernels of the
    CPU see rows at changing memory alignments and may round their sums differently."""
    model = network(shape, 4)
    x = images(100, *shape)
    labels = predictions(model, x)
    labels[::7] = (labels[::7] + 1) % 4
    eps = {"linf": 0.02, "l2": 0.1, "l1": 0.5}[norm]
    threat = ThreatModel(norm, eps)
    attack = PGD(steps=6, restarts=2)
    whole = run(attack, model, x, labels, threat, random=streams(100))
    assert 10 < int(whole.success.sum()) < 98
    for size in (1, 7, 64):
        assert same(in_batches(attack, model, x, labels, threat, size), whole)
    order = torch.randperm(100, generator=generator())
    mixed = run(
        attack, model, x[order], labels[order], threat, random=SampleRandom.create(0, order)
    )
    assert torch.equal(mixed.adversarial, whole.adversarial[order])
    assert torch.equal(mixed.first_success, whole.first_success[order])


def test_seeds() -> None:
    model, x = network((1, 4, 4), 3), images(16, 1, 4, 4)
    labels = predictions(model, x)
    threat = ThreatModel("linf", 1e-4)
    for attack in (PGD(steps=1, step_size=1e-9), UniformNoise(draws=1)):
        first, again, other = (
            run(attack, model, x, labels, threat, random=streams(16, seed), known_correct=True)
            for seed in (0, 0, 1)
        )
        assert same(first, again)
        assert bool((other.adversarial != first.adversarial).flatten(1).any(1).all())
    for seed in (0, -1, 2**63, 2**64, -(2**70)):
        run(PGD(steps=1), model, x, labels, threat, random=streams(16, seed=seed))


def test_restarts_start_elsewhere() -> None:
    seen: list[Tensor] = []
    model, x = network((1, 4, 4), 3), images(8, 1, 4, 4)
    labels = predictions(model, x)
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    attack = PGD(steps=1, step_size=1e-9, restarts=3)
    run(attack, model, x, labels, ThreatModel("linf", 1e-4), random=streams(8), known_correct=True)
    starts = seen[::2]
    assert len(starts) == 3
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 7, 4), (4, 3, 9)])
@pytest.mark.parametrize("count", [1, 9])
def test_shapes(classes: int, shape: tuple[int, int, int], count: int) -> None:
    model = network(shape, classes)
    x = images(count, *shape)
    labels = predictions(model, x)
    for norm, eps in (("linf", 0.02), ("l2", 0.2), ("l1", 1.0)):
        threat = ThreatModel(norm, eps)  # type: ignore[arg-type]
        for loss in ("ce", "margin", "dlr"):
            attack = PGD(steps=3, loss=loss)
            result = run(attack, model, x, labels, threat, random=streams(count))
            assert_honest(result, model, x, labels, threat)
    noise = UniformNoise(draws=2)
    threat = ThreatModel("l0", 3)
    result = run(noise, model, x, labels, threat, random=streams(count))
    assert_honest(result, model, x, labels, threat)


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.0, 255.0)])
def test_other_bounds(bounds: tuple[float, float]) -> None:
    low, high = bounds
    scale = high - low
    inner = network((1, 4, 4), 3)
    inner[0].weight.data /= scale
    x = (images(24, 1, 4, 4) * scale + low).clamp(low, high)
    with torch.no_grad():
        labels = inner(x).argmax(1)
    threat = ThreatModel("linf", 0.2 * scale, bounds=bounds)
    result = run(PGD(steps=10), inner, x, labels, threat, random=streams(24))
    assert float(result.adversarial.min()) >= low
    assert float(result.adversarial.max()) <= high
    assert float((result.distance - threat.eps).max()) <= 0
    assert result.success_rate > 0.5


def test_other_float_types_are_read_as_float32() -> None:
    model, x = network((1, 4, 4), 3), images(8, 1, 4, 4)
    labels = predictions(model, x)
    threat = ThreatModel("linf", 0.05)
    expected = run(PGD(steps=2), model, x, labels, threat, random=streams(8))
    assert same(run(PGD(steps=2), model, x.double(), labels, threat, random=streams(8)), expected)


def test_concatenate() -> None:
    model, x = network((1, 4, 4), 3), images(8, 1, 4, 4)
    labels = predictions(model, x)
    threat = ThreatModel("linf", 0.05)
    result = run(PGD(steps=2), model, x, labels, threat, random=streams(8))
    both = AttackResult.concatenate([result, result])
    assert len(both.success) == 16
    assert both.attack == result.attack
    assert torch.equal(both.margin[8:], result.margin)


# ----------------------------------------------------------------------------------- targeted


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_targeted_pgd_reaches_the_wanted_class(norm: Any, loss: str) -> None:
    weight = torch.randn(6, 48, generator=generator())
    model = linear(weight, -weight.sum(1) / 2)
    x = images(60, 1, 6, 8, low=0.2, high=0.8)
    wanted = (predictions(model, x) + 1 + torch.arange(60) % 5) % 6
    eps = {"linf": 0.25, "l2": 1.5, "l1": 8.0}[norm]
    threat = ThreatModel(norm, eps, targeted=True)
    result = run(PGD(loss=loss), model, x, wanted, threat, random=streams(60))
    assert_honest(result, model, x, wanted, threat)
    assert result.success.all()
    small = ThreatModel(norm, eps / 100, targeted=True)
    result = run(PGD(steps=5, loss=loss), model, x, wanted, small, random=streams(60))
    assert_honest(result, model, x, wanted, small)
    assert not result.success.all()


def test_targeted_needs_the_wanted_class_not_any_wrong_one() -> None:
    """Two steps of the first pixel: 0 -> 1 -> 2. Class 1 is wrong but not wanted."""
    weight = torch.zeros(3, 16)
    weight[:, 0] = torch.tensor([0.0, 10.0, 20.0])
    model = linear(weight, torch.tensor([0.0, -3.0, -9.0]))
    x = images(8, 1, 4, 4)
    x[:, 0, 0, 0] = 0.1
    wanted = torch.full((8,), 2)
    for eps, reached in ((0.4, False), (0.6, True)):
        threat = ThreatModel("linf", eps, targeted=True)
        result = run(PGD(), model, x, wanted, threat, random=streams(8))
        assert_honest(result, model, x, wanted, threat)
        assert result.success.tolist() == [reached] * 8
        assert predictions(model, result.adversarial).tolist() == [2 if reached else 1] * 8


# ------------------------------------------------------------------------------------- craft


def by_hand(
    model: nn.Module, start: Tensor, x: Tensor, labels: Tensor, threat: ThreatModel,
    steps: int, size: float,
) -> Tensor:  # fmt: skip
    """PGD as the paper writes it; the normalised step in l2."""
    at = start
    for _ in range(steps):
        at = at.detach().requires_grad_()
        loss = F.cross_entropy(model(at), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, at)
        if threat.norm == "linf":
            moved = at.detach() + size * gradient.sign()
            at = torch.max(torch.min(moved, x + threat.eps), x - threat.eps).clamp(0, 1)
        else:
            length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            at = threat.project(at.detach() + size * gradient / length, x)
    return at


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("count", [3, 16])
def test_craft_is_the_loop_written_by_hand(norm: Any, random_start: bool, count: int) -> None:
    model = network((1, 6, 6), 4)
    x = images(count, 1, 6, 6)
    labels = torch.arange(count) % 4
    eps = 0.1 if norm == "linf" else 0.8
    threat = ThreatModel(norm, eps)
    attack = PGD(steps=7, step_size=eps / 4, random_start=random_start)
    ours = craft(attack, model, x, labels, threat, random=streams(count))
    start = threat.random_start(x, streams(count)) if random_start else x
    expected = by_hand(model, start, x, labels, threat, 7, eps / 4)
    assert torch.allclose(ours, expected, atol=1e-5)
    assert ours.shape == x.shape
    assert ours.dtype == torch.float32
    assert float((threat.distance(ours, x) - eps).max()) <= 0
    assert not ours.requires_grad
    assert not torch.equal(ours, x)


def test_craft_does_not_judge() -> None:
    """As many forwards as gradients, all rows to the end, labels right or wrong."""
    counting = Counting(network((1, 4, 4), 3))
    x = images(20, 1, 4, 4)
    labels = (predictions(counting.inner, x) + torch.arange(20)) % 3
    craft(PGD(steps=5), counting, x, labels, ThreatModel("linf", 0.3), random=streams(20))
    assert counting.forwards == [24] * 5
    assert counting.backwards == [24] * 5


# ------------------------------------------------------------------------------------ errors


class Returns(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inner = nn.Linear(16, 3)
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.inner(x.flatten(1)))


class Meddling(nn.Module):
    """Changes the images that it is given."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = network((1, 4, 4), 3)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        logits: Tensor = self.inner(x)
        return logits


def refuse(
    error: type[Exception], match: str, *, model: nn.Module | None = None,
    x: Tensor | None = None, labels: Tensor | None = None, attack: Attack | None = None,
    threat: ThreatModel | None = None, known: bool = False,
) -> None:  # fmt: skip
    x = images(4, 1, 4, 4) if x is None else x
    labels = torch.zeros(4, dtype=torch.int64) if labels is None else labels
    with pytest.raises(error, match=match):
        run(
            attack or PGD(steps=2), model or network((1, 4, 4), 3), x, labels,
            threat or ThreatModel("linf", 0.1), random=streams(4), known_correct=known,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda z: z.detach(), "carries no gradient"),
        (lambda z: z.argmax(1), "logits of shape"),
        (lambda z: z[:, :, None], "logits of shape"),
        (lambda z: z.sum(), "logits of shape"),
        (lambda z: z[:-1], "logits of shape"),
        (lambda z: z[:, :1], "logits of shape"),
        (lambda z: {"logits": z}, "dict"),
        (lambda z: (z, z), "tuple"),
        (lambda z: F.one_hot(z.argmax(1), 3), "carries no gradient"),
        (lambda z: torch.zeros_like(z, requires_grad=True), "to depend on the image"),
    ],
)
def test_models_that_are_refused(answer: Callable[[Tensor], Any], match: str) -> None:
    model = Returns(answer)
    # Right ones: what has fallen at the first look needs no gradient.
    logits = model(images(4, 1, 4, 4))
    fit = isinstance(logits, Tensor) and logits.shape == (4, 3)
    labels = logits.argmax(1) if fit else torch.zeros(4, dtype=torch.int64)
    for known in (False, True):
        refuse(ModelError, match, model=model, labels=labels, known=known)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.sub_(0.5),
        lambda x: x[:, 0].sub_(0.5),
        lambda x: x.flatten(1).mul_(2.0),
        lambda x: x.detach().add_(0.1),
        lambda x: F.relu(x, inplace=True),
        lambda x: x.__setitem__((slice(None), 0), 0.25),
    ],
)
def test_a_model_that_changes_its_images_is_refused(change: Callable[[Tensor], Any]) -> None:
    model, x = Meddling(change), images(5, 1, 4, 4)
    kept, labels, threat = x.clone(), torch.arange(5) % 3, ThreatModel("linf", 0.1)
    options: dict[str, Any] = {"random": streams(5)}
    # Where no gradient is asked for it has a copy of its own, for each draw.
    once = predict_logits(model, x)
    assert torch.equal(predict_logits(model, x, draws=2), once)
    assert torch.equal(x, kept)
    asked: list[Callable[[], object]] = [
        # With a gradient first, and without one.
        lambda: run(PGD(steps=2), model, x, labels, threat, known_correct=True, **options),
        lambda: run(PGD(steps=2), model, x, labels, threat, draws=2, **options),
        lambda: run(UniformNoise(), model, x, labels, threat, known_correct=True, **options),
        lambda: craft(PGD(steps=2), model, x, labels, threat, **options),
    ]
    for work in asked:
        with pytest.raises(ModelError, match=r"changes them in place; make new ones .* x - mean"):
            work()
        assert torch.equal(x, kept)


def test_another_error_of_the_model_stays_what_it_is() -> None:
    def fail(x: Tensor) -> None:
        raise RuntimeError("no room left")

    x, labels, threat = images(5, 1, 4, 4), torch.arange(5) % 3, ThreatModel("linf", 0.1)
    with pytest.raises(RuntimeError, match="no room left"):
        run(PGD(steps=2), Meddling(fail), x, labels, threat, random=streams(5))
    # Its own copy is its own affair.
    model = Meddling(lambda x: x.clone().sub_(0.5))
    run(PGD(steps=2), model, x, labels, threat, random=streams(5))


def test_a_model_under_no_grad_is_refused() -> None:
    class Deployed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network((1, 4, 4), 3)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x)
            return logits

    x = images(4, 1, 4, 4)
    labels = predictions(Deployed(), x)
    refuse(ModelError, "no gradient", model=Deployed(), x=x, labels=labels)
    # Noise needs none.
    threat = ThreatModel("linf", 0.1)
    run(UniformNoise(), Deployed(), x, labels, threat, random=streams(4))


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (torch.tensor([0, 1, 2, 3]), "labels from 0 to 2"),
        (torch.tensor([0, 1, 2, 10**9]), "labels from 0 to 2"),
        (torch.tensor([0, -1, 2, 1]), "at least 0"),
        (torch.tensor([0, 1, 2]), "expected 4 integer labels"),
        (torch.tensor([0, 1, 2, 1, 1]), "expected 4 integer labels"),
        (torch.zeros(4), "torch.float32"),
        (torch.zeros(4, dtype=torch.int32), "torch.int32"),
        (torch.zeros(4, dtype=torch.bool), "torch.bool"),
        (torch.zeros(4, 3, dtype=torch.int64), "one-hot"),
        (torch.zeros(4, 1, dtype=torch.int64), r"\(4, 1\)"),
    ],
)
def test_labels_that_are_refused(labels: Tensor, match: str) -> None:
    for known in (False, True):
        refuse(DataError, match, labels=labels, known=known)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.full((4, 1, 4, 4), math.nan), "NaN in 4 of 4"),
        (torch.full((4, 1, 4, 4), 2.0), "values from 2"),
        (torch.full((4, 1, 4, 4), -0.5), "values from -0.5"),
        (torch.full((4, 1, 4, 4), math.inf), "inf"),
        (torch.zeros(4, 16), r"\(4, 16\)"),
        (torch.zeros(4, 1, 4, 4, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(0, 1, 4, 4), "got none"),
    ],
)
def test_images_that_are_refused(x: Tensor, match: str) -> None:
    refuse(DataError, match, x=x)


def test_norms_that_are_refused() -> None:
    for attack in (PGD(), FGSM()):
        refuse(UsageError, "got l0", attack=attack, threat=ThreatModel("l0", 3))
    with pytest.raises(UsageError, match="got l0"):
        craft(
            PGD(), network((1, 4, 4), 3), images(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64),
            ThreatModel("l0", 3), random=streams(4),
        )  # fmt: skip


def test_nothing_is_left_frozen_by_a_refusal() -> None:
    model = Returns(lambda z: z.argmax(1)).train()
    refuse(ModelError, "logits of shape", model=model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_that_are_not_finite_count_as_zero() -> None:
    """The square root has an infinite slope at a pixel of zero."""
    model = Returns(lambda z: z)
    x = images(6, 1, 4, 4)
    x[0] = 0.0
    rooted = nn.Sequential(_Root(), model)
    labels = predictions(rooted, x)
    threat = ThreatModel("l2", 0.5)
    attack = PGD(steps=5, random_start=False)
    result = run(attack, rooted, x, labels, threat, random=streams(6))
    assert_honest(result, rooted, x, labels, threat)


class _Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


# -------------------------------------------------------------------------- predict_logits


def test_predict_logits() -> None:
    model, x = network((1, 4, 4), 3).train(), images(21, 1, 4, 4)
    logits = predict_logits(model, x, batch_size=5)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(logits, model(x), atol=1e-6)
    assert logits.shape == (21, 3)
    assert torch.equal(predict_logits(model, x), logits)
    with pytest.raises(ModelError, match="NaN or infinity for 21 of 21"):
        predict_logits(Returns(lambda z: z * math.nan), x)
    with pytest.raises(DataError):
        predict_logits(model, x * 2)


class SharedNoise(nn.Module):
    """Randomised, with one draw for all images of a call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + 0.1 * torch.randn_like(x[:1]))


def test_a_randomised_model_answers_the_same_whatever_the_batch():
    torch.manual_seed(0)
    model = SharedNoise(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    x = torch.rand(20, 1, 4, 4)
    labels = predict_logits(model, x).argmax(1)
    whole = predict_logits(model, x, batch_size=20)
    assert torch.equal(predict_logits(model, x, batch_size=3), whole)
    threat = ThreatModel("linf", 0.15)

    def attacked(rows: torch.Tensor):
        return run(
            PGD(steps=6), model, x[rows], labels[rows], threat,
            random=SampleRandom.create(0, rows), draws=2,
        )  # fmt: skip

    together = attacked(torch.arange(20))
    apart = [attacked(rows) for rows in torch.arange(20).split(7)]
    assert 0 < together.success.sum() < 20
    assert torch.equal(torch.cat([part.adversarial for part in apart]), together.adversarial)
    assert torch.equal(torch.cat([part.success for part in apart]), together.success)
