"""The kinds of adversarial training: each against its formula, and what it reaches."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attacking import streams
from torch import Tensor, nn

from robustann.attacks import FGSM, PGD, UniformNoise
from robustann.attacks.engine import craft, run
from robustann.data import ImageData, Split, load_data
from robustann.defenses import (
    MART,
    TRADES,
    AdversarialTraining,
    AdversarialWeightPerturbation,
    BitErrorTraining,
    FastAdversarialTraining,
    FreeAdversarialTraining,
    NoisyFastAdversarialTraining,
    StepWrapper,
    WeightClipping,
)
from robustann.errors import UsageError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel
from robustann.training import StandardStep, train

LINF = ThreatModel("linf", 0.1)
L2 = ThreatModel("l2", 0.5)

STEPS: dict[str, Callable[[ThreatModel], Any]] = {
    "fast": FastAdversarialTraining,
    "n-fgsm": NoisyFastAdversarialTraining,
    "free": lambda threat: FreeAdversarialTraining(threat, replays=2),
    "trades": lambda threat: TRADES(threat, steps=3),
    "mart": lambda threat: MART(PGD(steps=3), threat),
    "awp": lambda threat: AdversarialWeightPerturbation(AdversarialTraining(PGD(steps=3), threat)),
    "awp-trades": lambda threat: AdversarialWeightPerturbation(TRADES(threat, steps=3)),
    "awp-free": lambda threat: AdversarialWeightPerturbation(
        FreeAdversarialTraining(threat, replays=2)
    ),
}


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


def part(digits: ImageData, train: int, validation: int, test: int) -> ImageData:
    return replace(
        digits,
        name="part",
        train=digits.train.subset(slice(0, train)),
        validation=digits.validation.subset(slice(0, validation)),
        test=digits.test.subset(slice(0, test)),
    )


@pytest.fixture(scope="module")
def small(digits: ImageData) -> ImageData:
    return part(digits, 320, 50, 50)


@pytest.fixture(scope="module")
def most(digits: ImageData) -> ImageData:
    """Enough to get robust on."""
    return part(digits, 800, 100, 200)


@pytest.fixture(scope="module")
def ordinary(most: ImageData) -> nn.Module:
    return train("small-cnn", most, epochs=8).model


@pytest.fixture(scope="module")
def before(ordinary: nn.Module, most: ImageData) -> float:
    """The robust accuracy without hardening."""
    return robust_accuracy(ordinary, most.test)


def robust_accuracy(model: nn.Module, split: Split, threat: ThreatModel = LINF) -> float:
    """Under an attack stronger than any trained or validated with."""
    random = SampleRandom.create(9, torch.arange(len(split)))
    attack = PGD(steps=40, restarts=2, loss="margin")
    result = run(attack, model, split.images(slice(None)), split.labels, threat, random=random)
    return 1 - result.success_rate


def linear(classes: int = 3, entries: int = 16) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(entries, classes))


def batch(count: int = 8, entries: int = 16, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = int(entries**0.5)
    images = torch.rand(count, 1, side, side, generator=generator) * 0.6 + 0.2
    return images, torch.arange(count) % classes


class Recorder(nn.Module):
    """A model that keeps what it was shown."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        logits: Tensor = self.inner(x)
        return logits


# --- all of them ---


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_what_is_crafted_lies_within_reach_and_the_model_is_left_alone(
    name: str, threat: ThreatModel
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    images, labels = batch()
    step = STEPS[name](threat)
    before = copy.deepcopy(model.state_dict())
    step.begin_epoch(1, 1)
    for _ in range(3):
        crafted = step.crafted(model, images, labels, random=streams(8)).detach()
        loss, logits = step(model, images, labels, random=streams(8))
        loss.backward()
        if hasattr(step, "after_backward"):
            step.after_backward(model)
    reach = threat.eps * (3.001 if name == "n-fgsm" else 1.001)
    assert float(threat.distance(crafted, images).max()) <= reach
    assert float(threat.distance(crafted, images).min()) > 0.1 * threat.eps
    assert crafted.min() >= 0
    assert crafted.max() <= 1
    assert logits.shape == (8, 3)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    # Perturbed weights are taken back, and statistics see the passes that count alone.
    after = model.state_dict()
    for key in before:
        if "running" not in key and "tracked" not in key:
            assert torch.equal(before[key], after[key])
    passes = 6 if name in ("trades", "mart", "awp-trades") else 3
    assert int(after["1.num_batches_tracked"]) == passes


@pytest.mark.parametrize("name", ["fast", "n-fgsm", "free", "trades", "mart", "awp"])
def test_they_harden(name: str, most: ImageData, before: float) -> None:
    settings: dict[str, Any] = {"epochs": 6 if name == "free" else 4, "batch_size": 32, "lr": 0.1}
    result = train("small-cnn", most, step=STEPS[name](LINF), **settings)
    after = robust_accuracy(result.model, most.test)
    assert after > before + 0.1
    assert after > 0.65
    assert result.metrics["accuracy"] > 0.9
    assert json.loads(json.dumps(result.training)) == result.training
    assert result.training["events"] == []


@pytest.mark.parametrize("name", STEPS)
def test_facts_and_parameters(name: str) -> None:
    step = STEPS[name](LINF)
    assert step.name
    assert step.paper.startswith("https://")
    assert step.helps
    assert any("norm" in limit for limit in step.limits)
    facts = json.loads(json.dumps(step.parameters()))
    assert {"norm": "linf", "eps": 0.1}.items() <= (facts.get("step") or facts).items()
    assert step.parameters() == STEPS[name](LINF).parameters()
    assert step.parameters() != STEPS[name](LINF.with_eps(0.2)).parameters()


@pytest.mark.parametrize("name", ["fast", "free", "awp-free"])
def test_resuming_is_exact(name: str, small: ImageData, tmp_path: Path) -> None:
    class CrashError(Exception):
        pass

    class Stopping(StepWrapper):
        @property
        def name(self) -> str:  # type: ignore[override]
            return str(self.step.name)

        def parameters(self) -> dict[str, Any]:
            return dict(self.step.parameters())

        def begin_epoch(self, epoch: int, epochs: int) -> None:
            if epoch == 3:
                raise CrashError
            self.step.begin_epoch(epoch, epochs)

    settings: dict[str, Any] = {"epochs": 4, "checkpoint": tmp_path / "checkpoint.pt"}
    whole = train("small-cnn", small, step=STEPS[name](LINF), **settings)
    with pytest.raises(CrashError):
        train("small-cnn", small, step=Stopping(STEPS[name](LINF)), **settings)
    resumed = train("small-cnn", small, step=STEPS[name](LINF), resume=True, **settings)
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- single-step ---


def test_fast_starts_beyond_the_image_range_and_ends_within() -> None:
    # All pixels black, as most are on MNIST: the start must keep its negative half.
    model = Recorder(linear())
    images, labels = torch.zeros(64, 1, 4, 4), torch.arange(64) % 3
    step = FastAdversarialTraining(LINF)
    crafted = step.crafted(model, images, labels, random=streams(64))
    (start,) = model.seen
    assert start.abs().max() <= 0.1
    assert float((start < -0.09).float().mean()) == pytest.approx(0.05, abs=0.02)
    assert float((start > 0.09).float().mean()) == pytest.approx(0.05, abs=0.02)
    # Of a linear model the gradient is known; the step is 1.25 eps from the start, then projected.
    x = start.clone().requires_grad_()
    F.cross_entropy(model.inner(x), labels, reduction="sum").backward()
    assert x.grad is not None
    expected = (start + 0.125 * x.grad.sign()).clamp(-0.1, 0.1).clamp(0, 1)
    torch.testing.assert_close(crafted, expected)


def test_noisy_fast_has_twice_the_noise_and_leaves_the_ball() -> None:
    model = Recorder(linear())
    images, labels = torch.full((64, 1, 4, 4), 0.5), torch.arange(64) % 3
    step = NoisyFastAdversarialTraining(LINF)
    crafted = step.crafted(model, images, labels, random=streams(64))
    (start,) = model.seen
    assert 0.19 < float((start - images).abs().max()) <= 0.2
    x = start.clone().requires_grad_()
    F.cross_entropy(model.inner(x), labels, reduction="sum").backward()
    assert x.grad is not None
    torch.testing.assert_close(crafted, start + 0.1 * x.grad.sign())
    assert float((crafted - images).abs().max()) > 0.28


@pytest.mark.parametrize("kind", [FastAdversarialTraining, NoisyFastAdversarialTraining])
def test_in_l2_noise_and_step_have_their_length(kind: Any) -> None:
    model = Recorder(linear())
    images, labels = torch.full((64, 1, 4, 4), 0.5), torch.arange(64) % 3
    small = L2.with_eps(0.05)
    step = kind(small)
    crafted = step.crafted(model, images, labels, random=streams(64))
    start = model.seen[0]
    reach, size = (0.05, 0.0625) if kind is FastAdversarialTraining else (0.1, 0.05)
    assert float(small.distance(start, images).max()) <= reach * (1 + 1e-6)
    # Uniform in a ball of 16 dimensions, nearly all lie in its outer part.
    assert float(small.distance(start, images).mean()) > 0.9 * reach
    moved = small.distance(crafted, start)
    if kind is NoisyFastAdversarialTraining:
        torch.testing.assert_close(moved, torch.full_like(moved, size))
    else:
        assert float(small.distance(crafted, images).max()) <= 0.05


@pytest.mark.parametrize(
    ("attack", "validation", "watched"),
    [
        (FGSM(), "pgd:steps=10", True),
        (PGD(steps=1), "pgd:steps=10", True),
        (PGD(steps=5), "pgd:steps=10", False),
        (PGD(steps=20), "pgd:steps=20", False),
        (UniformNoise(), "pgd:steps=10", False),
    ],
    ids=lambda value: getattr(value, "label", str(value)),
)
def test_validation_is_no_weaker_than_ten_steps(
    attack: Any, validation: str, watched: bool
) -> None:
    step = AdversarialTraining(attack, LINF)
    assert step.validation_attack.label == validation
    assert step.watched is watched
    assert AdversarialTraining(attack, LINF, watch=False).watched is False


def test_validation_uses_its_attack_at_the_full_radius(
    digits: ImageData, ordinary: nn.Module
) -> None:
    images, labels = digits.test.images(slice(0, 60)), digits.test.labels[:60]
    step = FastAdversarialTraining(LINF, eps_warmup_epochs=9)
    step.begin_epoch(1, 10)
    logits = step.validation_logits(ordinary, images, labels, random=streams(60))
    crafted = craft(PGD(steps=10), ordinary, images, labels, LINF, random=streams(60))
    with torch.no_grad():
        assert torch.equal(logits, ordinary(crafted))


# --- the watch ---


class Collapsing(FastAdversarialTraining):
    """Unlearns from the fifth epoch on, as long as it takes single steps."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        super().begin_epoch(epoch, epochs)
        self.bad = epoch >= 5 and self._inner is self.attack

    def loss(
        self, model: nn.Module, images: Tensor, crafted: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, logits = super().loss(model, images, crafted, labels)
        return -loss if self.bad else loss, logits


def test_after_a_collapse_pgd_goes_on(most: ImageData, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"epochs": 7, "lr": 0.1, "batch_size": 64, "ema": 0.9, "clip": 5.0}
    unwatched = train("small-cnn", most, step=Collapsing(LINF, watch=False), **settings)
    step = Collapsing(LINF)
    result = train("small-cnn", most, step=step, **settings)
    (event,) = result.training["events"]
    assert event["epoch"] == 5
    assert event["event"].endswith("from now on with pgd:steps=4")
    assert "catastrophic overfitting" in caplog.text
    assert step.state() == {"steps": 4}
    last = [r.training["last"]["validation_robust_accuracy"] for r in (unwatched, result)]
    assert last[0] < 0.2
    assert last[1] > 0.6
    # The settings beside the model are those that were asked for.
    assert result.training["step"]["attack"] == "noisy-step"


def test_a_model_that_comes_robust_and_collapses_at_once_is_taken_back(
    most: ImageData, ordinary: nn.Module, tmp_path: Path
) -> None:
    class AtOnce(Collapsing):
        def begin_epoch(self, epoch: int, epochs: int) -> None:
            super().begin_epoch(epoch, epochs)
            self.bad = epoch == 1

    settings: dict[str, Any] = {"epochs": 2, "batch_size": 64, "clip": 5.0}
    weak = LINF.with_eps(0.03)
    model, log = copy.deepcopy(ordinary), tmp_path / "log.jsonl"
    result = train(model, most, step=AtOnce(weak), log=log, **settings)
    (event,) = result.training["events"]
    assert event["epoch"] == 1
    first, second = (json.loads(line) for line in log.read_text().splitlines())
    assert first["watch_before"] > 0.7 > first["watch_accuracy"] + 0.2
    # Epoch 1 is that of the model as it came.
    assert first["validation_robust_accuracy"] > 0.7
    assert "watch_before" not in second
    assert second["watch_accuracy"] > 0.7


@pytest.mark.parametrize("kind", [FastAdversarialTraining, lambda t: TRADES(t, steps=1)])
def test_a_safer_step_takes_more_steps_and_is_restored(kind: Any) -> None:
    images, labels = batch()
    step = kind(LINF)
    before = step.state()
    assert step.watched
    step.safer()
    safe, attack = step.state(), step._inner
    model = Recorder(linear())
    step.crafted(model, images, labels, random=streams(8))
    assert len(model.seen) == attack.cost[1] + isinstance(step, TRADES)
    assert attack.iterations == 4
    other = kind(LINF)
    other.restore(safe)
    assert other._inner == attack
    # A second run with the same step begins as the first did.
    step.begin_epoch(1, 3)
    assert step.state() == before
    assert step.safer() != step.safer()


def test_free_halves_its_step_when_safer() -> None:
    images, labels = torch.full((4, 1, 4, 4), 0.5), torch.arange(4) % 3
    step, model = FreeAdversarialTraining(LINF, replays=2), linear()
    assert step.watched
    assert step.safer() == "from now on with steps of 0.5 eps"
    loss, _ = step(model, images, labels, random=streams(4))
    loss.backward()  # type: ignore[no-untyped-call]
    step.after_backward(model)
    crafted = step.crafted(model, images, labels, random=streams(4))
    torch.testing.assert_close((crafted - images).abs(), torch.full_like(images, 0.05))


# --- free ---


def test_free_steps_by_the_gradient_that_the_weights_were_updated_with() -> None:
    step, model = FreeAdversarialTraining(LINF, replays=2), linear()
    images, labels = batch()
    x, shift = images, torch.zeros_like(images)
    for _ in range(3):
        loss, logits = step(model, images, labels, random=streams(8))
        leaf = x.clone().requires_grad_()
        expected = model(leaf)
        torch.testing.assert_close(logits, expected)
        (gradient,) = torch.autograd.grad(F.cross_entropy(expected, labels), leaf)
        loss.backward()  # type: ignore[no-untyped-call]
        step.after_backward(model)
        shift = (shift + 0.1 * gradient.sign()).clamp(-0.1, 0.1)
        x = (images + shift).clamp(0, 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)  # type: ignore[operator]
    torch.testing.assert_close(step.crafted(model, images, labels, random=streams(8)), x)


def test_free_carries_the_perturbation_over_and_replays(small: ImageData) -> None:
    shown: list[float] = []

    class Watching(FreeAdversarialTraining):
        def crafted(
            self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
        ) -> Tensor:
            crafted = super().crafted(model, images, labels, random=random)
            shown.append(float((crafted - images).detach().abs().max()))
            return crafted

    step = Watching(LINF, replays=3, eps_warmup_epochs=0)
    train("small-cnn", small, step=step, epochs=1, batch_size=100)
    assert shown[0] == 0
    assert shown[1:] == pytest.approx([0.1] * 8, abs=1e-6)


# --- TRADES and MART ---


def test_the_loss_of_trades() -> None:
    model, (images, labels) = linear(), batch()
    crafted = (images + 0.1).clamp(0, 1)
    step = TRADES(LINF, beta=4.0, label_smoothing=0.2)
    loss, logits = step.loss(model, images, crafted, labels)
    p, q = model(images).double().softmax(1), model(crafted).double().softmax(1)
    expected = F.cross_entropy(model(images), labels, label_smoothing=0.2).double()
    expected = expected + 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, model(crafted))


def test_trades_crafts_for_divergence_and_not_for_error() -> None:
    # Two classes and one direction: near an image that is already wrong, the divergence grows
    # most towards being right by far, and cross-entropy in the other direction.
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data = torch.tensor([[4.0], [-4.0]])
    model = nn.Sequential(nn.Flatten(), layer)
    images, labels = torch.full((8, 1, 1, 1), 0.1), torch.ones(8, dtype=torch.int64)
    threat = ThreatModel("linf", 0.3, bounds=(-1, 1))
    random = streams(8)
    crafted = TRADES(threat, steps=20, step_size=0.05).crafted(model, images, labels, random=random)
    p = model(images).softmax(1)

    def divergence(x: Tensor) -> Tensor:
        q = model(x).softmax(1)
        return (p * (p / q).log()).sum(1)

    # Either end of the ball is a local maximum; cross-entropy has but one, the upper end.
    ends = (images - 0.3, images + 0.3)
    assert divergence(ends[0])[0] > divergence(ends[1])[0]
    distance = torch.stack([(crafted - end).abs() for end in ends]).amin(0)
    assert float(distance.max()) < 1e-6
    assert (crafted < images).any()
    by_error = craft(PGD(steps=20), model, images, labels, threat, random=random)
    torch.testing.assert_close(by_error, ends[1])


def test_the_loss_of_mart() -> None:
    model, (images, labels) = linear(), batch()
    crafted = (images + 0.1).clamp(0, 1)
    loss, logits = MART(PGD(), LINF, beta=3.0).loss(model, images, crafted, labels)
    p, q = model(images).double().softmax(1), model(crafted).double().softmax(1)
    rows = torch.arange(8)
    wrong = q.clone()
    wrong[rows, labels] = 0
    boosted = -q[rows, labels].log() - (1 - wrong.amax(1)).log()
    expected = boosted + 3 * (p * (p / q).log()).sum(1) * (1 - p[rows, labels])
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, model(crafted))


@pytest.mark.parametrize("step", [TRADES(LINF), MART(PGD(), LINF)], ids=["trades", "mart"])
def test_batch_normalisation_sees_the_crafted_images_last(step: Any) -> None:
    # As in the authors' code. With a momentum of 0.1 the last batch weighs 0.1, that before 0.09.
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3))
    images, labels = batch()
    crafted = (images + 0.1).clamp(0, 1)
    step.loss(model, images, crafted, labels)
    expected = 0.09 * images.mean() + 0.1 * crafted.mean()
    torch.testing.assert_close(model[0].running_mean, expected.view(1))


def test_the_loss_of_mart_stays_finite_on_a_confident_model() -> None:
    layer = nn.Linear(4, 3)
    layer.weight.data = 1e3 * torch.eye(3, 4)
    model = nn.Sequential(nn.Flatten(), layer)
    images, labels = torch.eye(4)[:3].view(3, 1, 2, 2), torch.tensor([1, 2, 0])
    loss, _ = MART(PGD(steps=1), LINF)(model, images, labels, random=streams(3))
    loss.backward()  # type: ignore[no-untyped-call]
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(layer.weight.grad).all())  # type: ignore[arg-type]


# --- adversarial weight perturbation ---


def test_the_gradient_is_that_at_the_perturbed_weights() -> None:
    model, (images, labels) = linear(), batch()
    weight = model[1].weight  # type: ignore[index]
    inner = AdversarialTraining(FGSM(), LINF)
    crafted = inner.crafted(model, images, labels, random=streams(8))
    before = weight.detach().clone()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(crafted), labels), weight)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[1].weight.add_(0.1 * before.norm() * gradient / gradient.norm())
    expected = F.cross_entropy(moved(crafted), labels)
    expected.backward()  # type: ignore[no-untyped-call]

    step = AdversarialWeightPerturbation(inner, gamma=0.1)
    loss, _ = step(model, images, labels, random=streams(8))
    assert not torch.equal(weight, before)
    loss.backward()  # type: ignore[no-untyped-call]
    step.after_backward(model)
    assert torch.equal(weight, before)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(weight.grad, moved[1].weight.grad)


def test_in_bfloat16_the_weights_move_as_in_float32() -> None:
    images, labels = batch(count=32)

    def found(gamma: float, *, low: bool) -> tuple[float, Tensor]:
        model = linear()
        step = AdversarialWeightPerturbation(AdversarialTraining(FGSM(), LINF), gamma=gamma)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss, _ = step(model, images, labels, random=streams(32))
        loss.backward()  # type: ignore[no-untyped-call]
        step.after_backward(model)
        gradient = model[1].weight.grad  # type: ignore[index]
        assert gradient is not None
        return float(loss.detach()), gradient

    still, (loss, gradient) = found(1e-6, low=False)[0], found(0.5, low=False)
    assert loss > still + 0.2
    assert found(1e-6, low=True)[0] == pytest.approx(still, rel=0.02)
    rough, rough_gradient = found(0.5, low=True)
    assert rough == pytest.approx(loss, rel=0.02)
    torch.testing.assert_close(rough_gradient, gradient, rtol=0.1, atol=0.01)


def test_an_error_on_the_way_leaves_the_weights_as_they_were() -> None:
    class Failing(AdversarialTraining):
        def loss(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            calls.append(1)
            if len(calls) == 2:
                raise ValueError
            return super().loss(*arguments)

    calls: list[int] = []
    model, (images, labels) = linear(), batch()
    before = copy.deepcopy(model.state_dict())
    step = AdversarialWeightPerturbation(Failing(FGSM(), LINF))
    with pytest.raises(ValueError):  # noqa: PT011
        step(model, images, labels, random=streams(8))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Interrupted(torch.autograd.Function):
    """The identity, whose backward pass raises once it is told to."""

    armed = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        if Interrupted.armed:
            raise KeyboardInterrupt
        return gradient


@pytest.mark.parametrize("where", ["backward", "after_backward"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_interrupt_leaves_a_model_trained_in_place_unperturbed(
    where: str, wrapped: bool, small: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = Interrupted.apply(self.layer(x.flatten(1)))  # type: ignore[no-untyped-call]
            return logits

    class Arming(FastAdversarialTraining):
        calls = 0

        def loss(
            self, model: nn.Module, images: Tensor, crafted: Tensor, labels: Tensor
        ) -> tuple[Tensor, Tensor]:
            self.calls += 1
            # The first is for the direction, the second at the weights that moved.
            if self.calls == 2:
                assert not torch.equal(net.layer.weight, before)
                monkeypatch.setattr(Interrupted, "armed", where == "backward")
            return super().loss(model, images, crafted, labels)

        def after_backward(self, model: nn.Module) -> None:
            raise KeyboardInterrupt

    net = Net()
    before = net.layer.weight.detach().clone()
    step: Any = AdversarialWeightPerturbation(Arming(LINF), gamma=0.1)
    if where == "after_backward":
        monkeypatch.setattr(step, "after_backward", step.step.after_backward)
    step = WeightClipping(step, w_max=1.0) if wrapped else step
    with pytest.raises(KeyboardInterrupt):
        train(net, small, step=step, epochs=1)
    assert torch.equal(net.layer.weight, before)


def test_no_step_is_wrapped_whose_own_loss_would_be_passed_by() -> None:
    inner = AdversarialTraining(FGSM(), LINF)
    # What leaves the loss alone may lie between.
    step = AdversarialWeightPerturbation(WeightClipping(inner))
    assert step.parameters()["step"]["name"] == "weight-clipping"

    class Doubled(AdversarialTraining):
        name = "doubled"

        def __call__(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
            loss, logits = super().__call__(*arguments, **named)
            return 2 * loss, logits

    for unfit, name in {
        BitErrorTraining(inner): "bit-error-training",
        WeightClipping(BitErrorTraining(inner)): "bit-error-training",
        WeightClipping(AdversarialWeightPerturbation(inner)): "awp",
        Doubled(FGSM(), LINF): "doubled",
    }.items():
        with pytest.raises(UsageError, match=f"got {name}, which computes a loss of its own"):
            AdversarialWeightPerturbation(unfit)


def test_the_hooks_of_the_inner_step_stay() -> None:
    inner = FreeAdversarialTraining(LINF, replays=3)
    step = AdversarialWeightPerturbation(inner)
    assert step.replays == 3
    assert step.watched
    assert step.default_lr == inner.default_lr
    assert not hasattr(step, "after_update")
    assert copy.copy(step).step is inner
    model, (images, labels) = linear(), batch()
    loss, _ = step(model, images, labels, random=streams(8))
    loss.backward()  # type: ignore[no-untyped-call]
    step.after_backward(model)
    shift = inner.state()["shift"]
    assert float(shift.abs().min()) == pytest.approx(0.1)


# --- fine-tuning ---


def test_a_trained_model_is_hardened_in_three_epochs(
    most: ImageData, ordinary: nn.Module, before: float
) -> None:
    model = copy.deepcopy(ordinary)
    step = AdversarialTraining(PGD(steps=7), LINF)
    result = train(model, most, step=step, epochs=3, batch_size=64)
    assert result.model is model
    assert robust_accuracy(model, most.test) > before + 0.1
    assert result.metrics["accuracy"] > 0.95
    # No epoch on the way loses what the model knew.
    assert min(row["validation_accuracy"] for row in result.history) > 0.9


# --- errors ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastAdversarialTraining(LINF, step_size=0), "step_size: expected a number above"),
        (lambda: NoisyFastAdversarialTraining(LINF, noise=-1), "noise: expected a number above 0"),
        (lambda: FastAdversarialTraining(ThreatModel("l1", 3)), "norms of noisy-step"),
        (lambda: FreeAdversarialTraining(LINF, replays=0), "replays >= 1, got 0"),
        (lambda: FreeAdversarialTraining(LINF, label_smoothing=1), "label_smoothing: expected"),
        (lambda: FreeAdversarialTraining(ThreatModel("l0", 3)), "norms of pgd"),
        (lambda: TRADES(LINF, beta=-1), "beta: expected a finite number of at least 0"),
        (lambda: TRADES(LINF, steps=0), "steps >= 1"),
        (lambda: TRADES(LINF, step_size=0), "step_size: expected a number above 0 or None"),
        (lambda: MART(PGD(), LINF, beta=float("nan")), "beta: expected"),
        (
            lambda: AdversarialWeightPerturbation(StandardStep()),
            "step: expected an adversarial step.*got StandardStep",
        ),
        (
            lambda: AdversarialWeightPerturbation(FastAdversarialTraining(LINF), gamma=0),
            "gamma: expected a number above 0 and below 1",
        ),
        (
            lambda: FastAdversarialTraining(ThreatModel("linf", 0.1, targeted=True)),
            "untargeted",
        ),
    ],
)
def test_wrong_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
