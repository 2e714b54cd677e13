"""Training for interval bounds: schedules, the loss by hand, and what gets certified."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attacking import streams
from torch import nn

import robustann as ra
from robustann.attacks import MM, PGD
from robustann.attacks.engine import run
from robustann.certificates import certify_linf, crossed
from robustann.defenses import IBPTraining
from robustann.errors import UsageError
from robustann.threat import ThreatModel

LINF = ThreatModel("linf", 0.1)


@pytest.fixture(scope="module")
def trained(digits: ra.ImageData) -> nn.Module:
    return ra.train(
        "small-cnn", digits, step=IBPTraining(ThreatModel("linf", 0.05)), epochs=10, batch_size=64
    ).model


def batch() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    return model, 0.2 + 0.6 * torch.rand(5, 1, 3, 4), torch.arange(5) % 4


@pytest.mark.parametrize("kappa", [0.0, 0.25, 1.0])
def test_the_loss_of_a_linear_model_by_hand(kappa):
    """The worst z_j - z_y of a linear model is (w_j - w_y).x + b_j - b_y + eps * |w_j - w_y|_1."""
    model, x, labels = batch()
    step = IBPTraining(LINF, kappa=kappa)
    loss, logits = step(model, x, labels, random=streams(5))
    weight = model[1].weight
    rows = weight - weight[labels][:, None]
    clean = model(x)
    worst = clean - clean.gather(1, labels[:, None]) + 0.1 * rows.abs().sum(2)
    expected = kappa * F.cross_entropy(clean, labels) + (1 - kappa) * F.cross_entropy(worst, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, clean)
    torch.testing.assert_close(step.validation_logits(model, x, labels, random=streams(5)), worst)
    (found,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(found, wanted)


def test_radius_and_kappa_follow_their_schedules():
    step = IBPTraining(LINF, kappa=0.5)
    seen = []
    for epoch in range(1, 13):
        step.begin_epoch(epoch, 12)
        for half in (0.0, 0.5):
            step.begin_update(epoch - 1 + half)
            seen.append((step.eps, step.current_kappa))
    radii, kappas = zip(*seen, strict=True)
    assert radii[:5] == (0.0,) * 5  # a sixth of 12 epochs, then half of them
    assert kappas[:5] == (1.0,) * 5
    assert list(radii) == sorted(radii)
    assert radii[5] == pytest.approx(0.1 / 12)
    assert radii[10] == pytest.approx(0.05)
    assert radii[16:] == (0.1,) * 8
    assert kappas[16:] == (0.5,) * 8
    # A resumed run takes up where it was: the position alone decides.
    other = IBPTraining(LINF, kappa=0.5)
    other.begin_epoch(5, 12)
    assert (other.eps, other.current_kappa) == seen[8]
    other = IBPTraining(LINF, warmup_epochs=0, ramp_epochs=0)
    other.begin_epoch(1, 12)
    assert other.eps == 0.1


def test_even_few_epochs_begin_without_a_radius(digits: ra.ImageData) -> None:
    seen: list[float] = []

    class Watched(IBPTraining):
        def __call__(self, *arguments, **named):
            seen.append(self.eps)
            return super().__call__(*arguments, **named)

    ra.train("small-cnn", digits, step=Watched(LINF), epochs=1, batch_size=128)
    assert seen[0] == seen[1] == 0.0
    assert seen == sorted(seen)
    assert seen[-1] == 0.1
    # From a larger radius at the start, three epochs ended at chance level, 10 %.
    threat = ThreatModel("linf", 0.05)
    few = ra.train("small-cnn", digits, step=IBPTraining(threat), epochs=3, batch_size=64)
    x, labels = digits.test.images(slice(None)), digits.test.labels
    assert few.metrics["accuracy"] > 0.8
    assert certify_linf(few.model, x, labels, threat, method="ibp").certified_accuracy > 0.4


def test_without_a_radius_it_is_plain_training():
    model, x, labels = batch()
    step = IBPTraining(LINF, warmup_epochs=1)
    step.begin_epoch(1, 10)
    loss, _ = step(model, x, labels, random=streams(5))
    torch.testing.assert_close(loss, F.cross_entropy(model(x), labels))


def test_batch_norm_and_dropout_in_training_mode():
    """The bounds use the running statistics; the mode is left as it was and gradients flow."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(108, 4),
    ).train()  # fmt: skip
    x, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 4
    loss, _ = IBPTraining(LINF, kappa=0.0)(model, x, labels, random=streams(6))
    loss.backward()
    assert all(module.training for module in model.modules())
    assert int(model[1].num_batches_tracked) == 1
    assert all(bool((p.grad != 0).any()) for p in model.parameters())


def test_it_certifies_what_plain_training_does_not(trained, model, digits):
    x, labels = digits.test.images(slice(None)), digits.test.labels
    threat = ThreatModel("linf", 0.05)
    proven = certify_linf(trained, x, labels, threat, method="ibp")
    assert proven.certified_accuracy > 0.6
    assert certify_linf(model, x, labels, threat).certified_accuracy < 0.1


def test_certified_from_below_never_crosses_attacked_from_above(trained, digits):
    x, labels = digits.test.images(slice(0, 200)), digits.test.labels[:200]
    for eps in (0.03, 0.05, 0.08):
        threat = ThreatModel("linf", eps)
        certificate = certify_linf(trained, x, labels, threat)
        fallen = torch.zeros(200, dtype=torch.bool)
        for attack in (PGD(steps=20, restarts=2, loss="margin"), MM(steps=20, restarts=2)):
            result = run(attack, trained, x, labels, threat, random=streams(200))
            fallen |= result.success
            # The bound is below every margin that an attack saw.
            assert bool((certificate.margin <= result.margin.double()).all())
        assert bool(certificate.certified.any())
        assert bool(fallen.any())
        assert not len(crossed(certificate.certified, fallen))


@pytest.mark.parametrize(
    ("threat", "options", "message"),
    [
        (ThreatModel("l2", 1.0), {}, "an l2 one"),
        (ThreatModel("linf", 0.1, targeted=True), {}, "a targeted linf"),
        (LINF, {"kappa": 1.5}, "kappa: expected a number from 0 to 1"),
        (LINF, {"warmup_epochs": -1}, "warmup_epochs: expected at least 0"),
        (LINF, {"ramp_epochs": -1}, "ramp_epochs: expected at least 0"),
    ],
)
def test_wrong_settings(threat, options, message):
    with pytest.raises(UsageError, match=message):
        IBPTraining(threat, **options)


def test_its_parameters_are_json_values():
    assert IBPTraining(LINF, ramp_epochs=3).parameters() == {
        "norm": "linf",
        "eps": 0.1,
        "bounds": [0.0, 1.0],
        "kappa": 0.5,
        "warmup_epochs": None,
        "ramp_epochs": 3,
    }
