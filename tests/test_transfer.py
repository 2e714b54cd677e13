"""Transfer: a copy gives the white-box result, a stranger nothing; costs are kept apart."""

from __future__ import annotations

import copy

import networks
import pytest
import torch
import torch.nn.functional as F
from attacking import Watched, streams
from torch import Tensor, nn

from robustann.attacks import PGD, Attack, UniformNoise, engine, parse_attack, registered
from robustann.attacks.engine import predict_logits, run
from robustann.attacks.transfer import transfer
from robustann.threat import ThreatModel


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return networks.digits()


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 10)
        ).eval()


def trained(seed: int, digits: tuple[Tensor, Tensor]) -> nn.Sequential:
    x, labels = digits
    model = network(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:1400]), labels[:1400]).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def target(digits: tuple[Tensor, Tensor]) -> nn.Sequential:
    return trained(0, digits)


@pytest.fixture(scope="module")
def other(digits: tuple[Tensor, Tensor]) -> nn.Sequential:
    return trained(1, digits)


@pytest.fixture(scope="module")
def held_out(digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return digits[0][1400:1520], digits[1][1400:1520]


THREAT = ThreatModel("linf", 0.12)


@pytest.mark.parametrize(
    "attack",
    [
        PGD(steps=10),
        PGD(steps=5, restarts=2),
        UniformNoise(),
        parse_attack("art:DeepFool:max_iter=10"),
    ],
    ids=lambda attack: attack.label,
)
def test_from_a_copy_it_is_the_white_box_result(
    attack: Attack, target: nn.Module, held_out: tuple[Tensor, Tensor]
) -> None:
    count = 10 if attack.name.startswith("art:") else 40
    x, labels = (part[:count] for part in held_out)
    threat = THREAT if "linf" in attack.norms else ThreatModel("l2", 0.5)
    white = run(attack, target, x, labels, threat, random=streams(count))
    found = transfer(
        attack, copy.deepcopy(target), target, x, labels, threat, random=streams(count)
    )
    assert found.agreement == 1.0
    assert torch.equal(found.target.success, white.success)
    assert torch.equal(found.surrogate.success, white.success)
    assert torch.equal(found.surrogate.forwards, white.forwards)
    assert found.target.attack == attack
    if not attack.control:
        assert 0.2 < white.success_rate < 1


def test_from_a_like_model_some_and_from_a_random_one_about_none(
    target: nn.Module, other: nn.Module, held_out: tuple[Tensor, Tensor]
) -> None:
    x, labels = held_out
    correct = predict_logits(target, x).argmax(1) == labels
    x, labels = x[correct], labels[correct]
    attack = PGD(steps=10)
    like = transfer(attack, other, target, x, labels, THREAT, random=streams(len(x)))
    strange = transfer(attack, network(7), target, x, labels, THREAT, random=streams(len(x)))
    white = run(attack, target, x, labels, THREAT, random=streams(len(x)))
    assert like.agreement > 0.9
    assert 0.25 < like.target.success_rate < white.success_rate
    assert strange.agreement < 0.3
    assert strange.target.success_rate < 0.1
    # What stops at the surrogate's boundary transfers less than the full attack.
    barely = predict_logits(target, like.surrogate.adversarial).argmax(1) != labels
    assert int(barely.sum()) < int(like.target.success.sum())
    for result in (like.target, strange.target):
        predicted = predict_logits(target, result.adversarial).argmax(1)
        assert torch.equal(result.prediction, predicted)
        assert torch.equal(result.success, predicted != labels)
        assert float(result.distance.max()) <= THREAT.eps


def test_costs_are_kept_apart(
    target: nn.Module,
    other: nn.Module,
    held_out: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "ALIGNMENT", 1)
    x, labels = (part[:30] for part in held_out)
    judge, stand_in = Watched(target), Watched(other)
    found = transfer(PGD(steps=6), stand_in, judge, x, labels, THREAT, random=streams(30))
    # The clean look for the agreement is not charged.
    assert int(found.target.forwards.sum()) == judge.forwards - 30
    assert judge.backwards == 0
    assert found.target.backwards.tolist() == [0] * 30
    assert int(found.target.forwards.max()) <= 4
    surrogate = found.surrogate.forwards + found.full_forwards
    assert int(surrogate.sum()) == stand_in.forwards - 30
    assert int((found.surrogate.backwards + found.full_backwards).sum()) == stand_in.backwards
    assert found.full_forwards.tolist() == found.full_backwards.tolist() == [6] * 30


def test_originals_that_the_target_gets_wrong_count_as_they_are(
    target: nn.Module, other: nn.Module, held_out: tuple[Tensor, Tensor]
) -> None:
    x, labels = held_out[0][:9], (held_out[1][:9] + 1) % 10
    found = transfer(PGD(steps=3), other, target, x, labels, THREAT, random=streams(9))
    assert bool(found.target.success.all())
    assert torch.equal(found.target.adversarial, x)


def test_targeted(target: nn.Module, held_out: tuple[Tensor, Tensor]) -> None:
    x, wanted = held_out[0][:40], (held_out[1][:40] + 1) % 10
    threat = ThreatModel("linf", 0.25, targeted=True)
    white = run(PGD(steps=10), target, x, wanted, threat, random=streams(40))
    found = transfer(
        PGD(steps=10), copy.deepcopy(target), target, x, wanted, threat, random=streams(40)
    )
    assert torch.equal(found.target.success, white.success)
    assert int(white.success.sum()) > 5
    broken = found.target.success
    assert torch.equal(found.target.prediction[broken], wanted[broken])


def test_models_are_left_as_they_were(
    target: nn.Module, other: nn.Module, held_out: tuple[Tensor, Tensor]
) -> None:
    models = [copy.deepcopy(model).train() for model in (target, other)]
    for model in models:
        model.zero_grad(set_to_none=True)
    x, labels = (part[:9] for part in held_out)
    transfer(PGD(steps=2), models[0], models[1], x, labels, THREAT, random=streams(9))
    for model in models:
        assert all(module.training for module in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_showing_given_images_is_no_attack_of_its_own() -> None:
    assert not any(kind.__name__.startswith("_") for kind in registered().values())
