"""Defenses: that they do what they say, and restore what they touch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.attacks import FGSM, PGD
from robustann.attacks.engine import run
from robustann.data import ImageData, Split, load_data
from robustann.defenses import AdversarialTraining
from robustann.errors import UsageError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel
from robustann.training import train

LINF = ThreatModel("linf", 0.1)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


def robust_accuracy(model: nn.Module, split: Split, threat: ThreatModel) -> float:
    """Under an attack stronger than the one trained with."""
    random = SampleRandom.create(9, torch.arange(len(split)))
    attack = PGD(steps=40, restarts=2)
    result = run(attack, model, split.images(slice(None)), split.labels, threat, random=random)
    return 1 - result.success_rate


def two_classes(weights: Tensor) -> nn.Module:
    layer = nn.Linear(weights.shape[1], len(weights), bias=False)
    layer.weight.data.copy_(weights)
    return nn.Sequential(nn.Flatten(), layer)


def test_adversarial_training_withstands_the_attack_that_breaks_standard_training(
    digits: ImageData,
) -> None:
    standard = train("small-cnn", digits, epochs=20)
    step = AdversarialTraining(PGD(steps=5), LINF)
    hardened = train("small-cnn", digits, step=step, epochs=20)
    before = robust_accuracy(standard.model, digits.test, LINF)
    after = robust_accuracy(hardened.model, digits.test, LINF)
    assert after > before + 0.15
    assert after > 0.75
    assert hardened.metrics["accuracy"] > 0.95
    # What the best epoch was chosen by is an honest estimate of it.
    assert hardened.metrics["validation_robust_accuracy"] == pytest.approx(after, abs=0.12)


def test_trains_on_the_worst_images_of_a_linear_model() -> None:
    # For two classes and a linear model the worst image in linf is known: eps * sign(w_j - w_y).
    weights = torch.tensor([[1.0, -2.0, 0.5, 3.0], [-1.0, 1.0, 2.0, 0.5]])
    model = two_classes(weights)
    images = torch.full((6, 1, 2, 2), 0.5)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    random = SampleRandom.create(0, torch.arange(6))
    loss, logits = AdversarialTraining(FGSM(), LINF)(model, images, labels, random=random)
    direction = (weights[1 - labels] - weights[labels]).sign().view(6, 1, 2, 2)
    expected = model(images + 0.1 * direction)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, F.cross_entropy(expected, labels))


def test_mix_keeps_a_share_clean() -> None:
    model = two_classes(torch.tensor([[1.0, -2.0, 0.5, 3.0], [-1.0, 1.0, 2.0, 0.5]]))
    images, labels = torch.full((8, 1, 2, 2), 0.5), torch.arange(8) % 2
    step = AdversarialTraining(FGSM(), LINF, mix=0.25)
    _, logits = step(model, images, labels, random=SampleRandom.create(0, torch.arange(8)))
    same = (logits == model(images)).all(1)
    assert same.tolist() == [True] * 2 + [False] * 6


def test_label_smoothing() -> None:
    model = two_classes(torch.eye(2, 4))
    images, labels = torch.full((4, 1, 2, 2), 0.5), torch.arange(4) % 2
    step = AdversarialTraining(FGSM(), LINF, label_smoothing=0.3)
    loss, logits = step(model, images, labels, random=SampleRandom.create(0, torch.arange(4)))
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=0.3))


@pytest.mark.parametrize(
    ("warmup", "epochs", "expected"),
    [
        (0, 4, [0.1, 0.1, 0.1, 0.1]),
        (3, 5, [0.025, 0.05, 0.075, 0.1, 0.1]),
        (None, 6, [0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.1, 0.1]),
        (None, 1, [0.1]),
    ],
)
def test_the_radius_grows(warmup: int | None, epochs: int, expected: list[float]) -> None:
    step = AdversarialTraining(PGD(), LINF, eps_warmup_epochs=warmup)
    found = []
    for epoch in range(1, epochs + 1):
        step.begin_epoch(epoch, epochs)
        found.append(step.eps)
    assert found == pytest.approx(expected)


def test_training_stays_within_the_radius_of_the_epoch_and_validation_uses_the_full_one() -> None:
    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            furthest.append(float((x.detach() - 0.5).abs().max()))
            return x.flatten(1) * 1.0

    furthest: list[float] = []
    images, labels = torch.full((8, 1, 2, 2), 0.5), torch.arange(8) % 4
    step = AdversarialTraining(PGD(steps=3), LINF, eps_warmup_epochs=4)
    step.begin_epoch(1, 9)
    step(Spy(), images, labels, random=SampleRandom.create(0, torch.arange(8)))
    assert max(furthest) <= 0.02
    furthest.clear()
    step.validation_logits(Spy(), images, labels, random=SampleRandom.create(0, torch.arange(8)))
    assert 0.09 < max(furthest) <= 0.1


def test_crafting_leaves_no_trace_in_the_model() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10)
    )
    model[1].eval()
    model[4].bias.requires_grad_(False)
    model[0].train()
    norm = nn.BatchNorm2d(1)
    whole = nn.Sequential(norm, model)
    flags = [module.training for module in whole.modules()]
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    step = AdversarialTraining(PGD(steps=3), LINF)
    step(whole, images, labels, random=SampleRandom.create(0, torch.arange(16)))
    assert [module.training for module in whole.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]
    assert all(parameter.grad is None for parameter in whole.parameters())
    # The statistics saw the batch once, in the training pass.
    assert int(norm.num_batches_tracked) == 1  # type: ignore[arg-type]


def test_resuming_is_exact(digits: ImageData, tmp_path: Path) -> None:
    class CrashError(Exception):
        pass

    class Stopping(AdversarialTraining):
        def begin_epoch(self, epoch: int, epochs: int) -> None:
            if epoch == 3:
                raise CrashError
            super().begin_epoch(epoch, epochs)

    data = ImageData(
        "small",
        digits.train.subset(slice(0, 200)),
        digits.validation.subset(slice(0, 50)),
        digits.test.subset(slice(0, 50)),
        digits.class_names,
    )
    attack = PGD(steps=2)
    settings: dict[str, Any] = {"epochs": 4, "checkpoint": tmp_path / "checkpoint.pt"}
    whole = train("small-cnn", data, step=AdversarialTraining(attack, LINF), **settings)
    with pytest.raises(CrashError):
        train("small-cnn", data, step=Stopping(attack, LINF), **settings)
    other = AdversarialTraining(attack, LINF.with_eps(0.2))
    with pytest.raises(UsageError, match=r"step\.eps: expected 0\.1, got 0\.2"):
        train("small-cnn", data, step=other, resume=True, **settings)
    step = AdversarialTraining(attack, LINF)
    resumed = train("small-cnn", data, step=step, resume=True, **settings)
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_says_where_it_helps_and_where_not() -> None:
    step = AdversarialTraining(PGD(), LINF)
    assert step.helps
    assert any("norm" in limit for limit in step.limits)
    assert any("weights" in limit for limit in step.limits)
    assert step.parameters()["attack"] == "pgd"
    assert step.parameters()["eps"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mix": 1.0}, "mix: expected a number from 0 to below 1, got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected"),
        ({"eps_warmup_epochs": -1}, "eps_warmup_epochs: expected at least 0"),
        ({"threat": ThreatModel("linf", 0.1, targeted=True)}, "untargeted"),
        ({"threat": ThreatModel("l0", 3)}, "norms of pgd"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AdversarialTraining(PGD(), **{"threat": LINF, **arguments})
