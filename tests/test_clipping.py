"""Weight clipping and training on bit errors: the constraint holds, and it is worth it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustann as ra
from robustann.attacks import FGSM, PGD
from robustann.attacks.weights import quantized_model, random_bit_errors
from robustann.data import ImageData
from robustann.defenses import (
    MART,
    TRADES,
    AdversarialTraining,
    AdversarialWeightPerturbation,
    BitErrorTraining,
    FastAdversarialTraining,
    FreeAdversarialTraining,
    IBPTraining,
    WeightClipping,
)
from robustann.defenses.clipping import clip_weights
from robustann.defenses.registry import check_together, parse_defense
from robustann.errors import UsageError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel
from robustann.training import StandardStep, train

LINF = ThreatModel("linf", 0.1)


def small(digits: ImageData, images: int = 256) -> ImageData:
    return ImageData(
        "small",
        digits.train.subset(slice(0, images)),
        digits.validation.subset(slice(0, 64)),
        digits.test.subset(slice(0, 64)),
        digits.class_names,
    )


def test_the_projection_is_onto_the_box_and_about_one_for_scales() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-3, 3, parameter.numel()).view_as(parameter))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    clip_weights(model, 0.25)
    for name, value in model.named_parameters():
        centre = 1.0 if name in ("1.weight", "2.weight") else 0.0
        assert torch.equal(value, before[name].clamp(centre - 0.25, centre + 0.25))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    again = copy.deepcopy(model)
    clip_weights(again, 0.25)
    assert all(
        torch.equal(one, two)
        for one, two in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_a_scale_about_one_and_its_difference_from_one_have_the_same_steps() -> None:
    # Why the paper's reparametrisation of the scale needs no code of its own.
    scale = torch.tensor([0.9, 1.0, 1.06, 1.1], dtype=torch.float64)
    one = nn.ParameterDict({"w": scale})
    other = nn.ParameterDict({"w": scale - 1})
    found = quantized_model(one, 4)["w"] - quantized_model(other, 4)["w"]
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-12)


def test_trained_weights_stay_in_the_box_in_the_average_too(digits: ImageData) -> None:
    result = train(
        "small-cnn", small(digits), step=WeightClipping(StandardStep(), w_max=0.05), epochs=3
    )
    largest = [float(parameter.detach().abs().max()) for parameter in result.model.parameters()]
    # Reached, not just respected.
    assert max(largest) == pytest.approx(0.05, abs=1e-3)
    assert max(largest) <= 0.05 + 1e-6
    last = [value for name, value in result.last_weights.items() if "normalize" not in name]
    assert all(float(value.abs().max()) <= 0.05 + 1e-6 for value in last)
    assert result.training["step"] == {
        "name": "weight-clipping",
        "w_max": 0.05,
        "step": {"name": "standard", "label_smoothing": 0.0},
    }
    json.dumps(result.training)


def test_clipping_withstands_the_bit_errors_that_break_plain_training(digits: ImageData) -> None:
    plain = train("small-cnn", digits, epochs=10)
    step = WeightClipping(StandardStep(), w_max=0.1)
    clipped = train("small-cnn", digits, step=step, epochs=10)
    assert clipped.metrics["accuracy"] > 0.95
    rates, seeds = (0.1,), 4
    broken = random_bit_errors(plain.model, digits.test, rates=rates, seeds=seeds).points[0]
    held = random_bit_errors(clipped.model, digits.test, rates=rates, seeds=seeds).points[0]
    assert held.mean < broken.mean - 0.3
    assert held.worst < broken.mean
    # As it says itself, it does not help float32.
    floats = random_bit_errors(clipped.model, digits.test, rates=(1e-3,), seeds=3, bits=32)
    assert floats.points[0].mean > 0.6


def test_it_wraps_adversarial_training(digits: ImageData) -> None:
    inner = AdversarialTraining(FGSM(), ThreatModel("linf", 0.1))
    step = WeightClipping(inner, w_max=0.1)
    # Hooks and facts are those of the step inside.
    assert step.default_lr == inner.default_lr
    step.begin_epoch(1, 30)
    assert inner.eps == pytest.approx(0.1 / 11)
    result = train("small-cnn", small(digits), step=step, epochs=2)
    assert "validation_robust_accuracy" in result.metrics
    assert max(float(p.detach().abs().max()) for p in result.model.parameters()) <= 0.1 + 1e-6
    assert not hasattr(WeightClipping(StandardStep()), "validation_logits")


def test_all_three_together(digits: ImageData) -> None:
    inner = AdversarialTraining(PGD(steps=2), ThreatModel("linf", 0.1))
    step = WeightClipping(BitErrorTraining(inner, rate=0.01, start_below=100), w_max=0.2)
    assert [step.name, step.step.name, step.step.step.name] == [
        "weight-clipping", "bit-error-training", "adversarial-training",
    ]  # fmt: skip
    result = train("small-cnn", small(digits, 128), step=step, epochs=2)
    assert result.training["step"]["step"]["step"]["attack"] == "pgd"
    assert max(float(p.detach().abs().max()) for p in result.model.parameters()) <= 0.2 + 1e-6
    assert all(parameter.requires_grad for parameter in result.model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdversarialTraining(PGD(steps=2), LINF),
        lambda: TRADES(LINF, steps=2),
        lambda: MART(PGD(steps=2), LINF),
        lambda: FastAdversarialTraining(LINF),
        lambda: FreeAdversarialTraining(LINF, replays=2),
        lambda: IBPTraining(LINF),
    ],
    ids=["adversarial-training", "trades", "mart", "fast", "free", "ibp"],
)
def test_what_crafts_for_faulty_weights_leaves_the_graph_of_the_clean_ones_alone(
    make: Any,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)

    def gradient(step: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        own = copy.deepcopy(model)
        loss, _ = step(own, images, labels, random=SampleRandom.create(0, torch.arange(8)))
        loss.backward()
        statistics = {name: value.clone() for name, value in own.named_buffers()}
        return loss.detach(), own[0].weight.grad, statistics

    clean_loss, clean, statistics = gradient(make())
    loss, both, kept = gradient(BitErrorTraining(make(), rate=0.02, start_below=100))
    # Twice the mean less the clean part is the faulty part: there, and another one.
    faulty = 2 * both - clean
    assert float((faulty - clean).norm()) > 0.01 * float(clean.norm())
    assert float(faulty.norm()) > 0.1 * float(clean.norm())
    assert not torch.equal(loss, clean_loss)
    assert all(torch.equal(kept[name], statistics[name]) for name in statistics)


def test_weights_that_move_until_the_backward_pass_are_refused() -> None:
    moving = AdversarialWeightPerturbation(AdversarialTraining(FGSM(), LINF))
    for step in (moving, WeightClipping(moving)):
        with pytest.raises(UsageError, match=r"got awp.*use bit-error-training or awp, not both"):
            BitErrorTraining(step)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
def test_awp_and_bit_error_training_are_not_combined(order: tuple[int, ...]) -> None:
    names = ("trades:steps=1", "awp:gamma=0.01", "bit-error-training:rate=0.1")
    with pytest.raises(UsageError, match=r"awp or bit-error-training, got both.*drop one"):
        check_together([parse_defense(names[at]) for at in order])
    check_together([parse_defense(name) for name in (*names[:2], "weight-clipping")])
    check_together([parse_defense(name) for name in (names[0], names[2], "weight-clipping")])


def test_the_hook_of_the_step_inside_is_called_first() -> None:
    class Doubling(StandardStep):
        def after_update(self, model: nn.Module) -> None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(2)

    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(0.2)
        layer.bias.fill_(0.01)
    WeightClipping(Doubling(), w_max=0.3).after_update(layer)
    assert layer.weight.item() == pytest.approx(0.3)
    assert layer.bias.item() == pytest.approx(0.02)


def two_losses(step: BitErrorTraining, model: nn.Module) -> tuple[Tensor, Tensor]:
    images, labels = torch.full((4, 1, 2, 2), 0.5), torch.arange(4) % 3
    random = SampleRandom.create(0, torch.arange(4))
    loss, logits = step(model, images, labels, random=random)
    assert torch.equal(logits, model(images))
    return loss, F.cross_entropy(model(images), labels)


def test_the_loss_of_bit_error_training_is_the_mean_over_clean_and_faulty_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    # Hardly any error: what remains is quantisation to two bits.
    loss, clean = two_losses(BitErrorTraining(StandardStep(), rate=1e-6, bits=2), model)
    images, labels = torch.full((4, 1, 2, 2), 0.5), torch.arange(4) % 3
    quantised = F.cross_entropy(quantized_model(model, 2)(images), labels)
    torch.testing.assert_close(loss, (clean + quantised) / 2)
    assert abs((quantised - clean).item()) > 1e-4
    # Before the clean loss is low enough, nothing is added.
    loss, clean = two_losses(BitErrorTraining(StandardStep(), rate=0.1, start_below=0.1), model)
    torch.testing.assert_close(loss, clean)


def test_the_gradient_passes_straight_through() -> None:
    # The gradient of a linear loss in the weights is that of the weights as they are used, and
    # lands on the clean ones unchanged.
    class Sum(StandardStep):
        def __call__(
            self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
        ) -> tuple[Tensor, Tensor]:
            logits = model(images)
            return logits.sum(), logits

    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    images, labels = torch.rand(5, 1, 2, 2), torch.arange(5) % 3
    step = BitErrorTraining(Sum(), rate=0.3, start_below=100)
    loss, _ = step(model, images, labels, random=SampleRandom.create(0, torch.arange(5)))
    loss.backward()
    torch.testing.assert_close(model[1].weight.grad, images.flatten(1).sum(0).expand(3, 4))
    assert loss.item() != pytest.approx(model(images).sum().item())


def test_statistics_of_batch_normalisation_see_the_clean_pass_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    plain = copy.deepcopy(model)
    plain(images)
    step = BitErrorTraining(StandardStep(), rate=0.2, start_below=100)
    step(model, images, labels, random=SampleRandom.create(0, torch.arange(8)))
    assert torch.equal(model[1].running_mean, plain[1].running_mean)
    assert int(model[1].num_batches_tracked) == 1
    assert torch.equal(model[0].weight, plain[0].weight)
    assert model.training


def test_the_pattern_changes_with_the_batch_and_not_with_the_caller() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images, labels = torch.full((4, 1, 2, 2), 0.5), torch.arange(4) % 3
    step = BitErrorTraining(StandardStep(), rate=0.2)

    def loss(*names: str | int) -> float:
        torch.rand(3)
        random = SampleRandom.create(0, torch.arange(4)).fork("train", *names)
        return step(model, images, labels, random=random)[0].item()

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)


def test_resuming_is_exact(digits: ImageData, tmp_path: Path) -> None:
    class CrashError(Exception):
        pass

    class Stopping(StandardStep):
        def begin_epoch(self, epoch: int, epochs: int) -> None:
            if epoch == 3:
                raise CrashError

    def step(inner: Any) -> WeightClipping:
        return WeightClipping(BitErrorTraining(inner, rate=0.01), w_max=0.2)

    data = small(digits, 128)
    settings: dict[str, Any] = {"epochs": 4, "checkpoint": tmp_path / "checkpoint.pt"}
    whole = train("small-cnn", data, step=step(StandardStep()), **settings)
    with pytest.raises(CrashError):
        train("small-cnn", data, step=step(Stopping()), **settings)
    with pytest.raises(UsageError, match=r"w_max: expected 0\.2, got 0\.3"):
        other = WeightClipping(BitErrorTraining(StandardStep(), rate=0.01), w_max=0.3)
        train("small-cnn", data, step=other, resume=True, **settings)
    resumed = train("small-cnn", data, step=step(StandardStep()), resume=True, **settings)
    assert ra.models.tensor_digest(whole.model) == ra.models.tensor_digest(resumed.model)


def test_they_say_where_they_help_and_where_not() -> None:
    for defense in (WeightClipping, BitErrorTraining):
        assert "2006.13977" in defense.paper
        assert any("fixed-point" in help_ for help_ in defense.helps)
        for word in ("adversarial inputs", "float32", "chooses the bits", "file"):
            assert any(word in limit for limit in defense.limits)


@pytest.mark.parametrize(
    ("defense", "arguments", "message"),
    [
        (WeightClipping, {"w_max": 0}, "w_max: expected a number above 0 and up to 1, got 0"),
        (WeightClipping, {"w_max": float("nan")}, "w_max"),
        (WeightClipping, {"w_max": 2.0}, "w_max"),
        (BitErrorTraining, {"rate": 0.0}, "rate: expected"),
        (BitErrorTraining, {"rate": 0.6}, "rate: expected"),
        (BitErrorTraining, {"bits": 1}, "bits: expected"),
        (BitErrorTraining, {"start_below": 0}, "start_below: expected"),
    ],
    ids=str,
)
def test_wrong_arguments(defense: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        defense(StandardStep(), **arguments)
