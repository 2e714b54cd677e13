"""A user's model is after every call as it was before: weights, statistics, modes, gradients and
the caller's random numbers."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attacking import streams
from torch import Tensor, nn

import robustann as ra
from robustann import certificates
from robustann.attacks import registered
from robustann.attacks.transfer import transfer
from robustann.attacks.weights import (
    progressive_bit_search,
    quantized_model,
    random_bit_errors,
    random_flips,
)
from robustann.defenses import WeightGuard, parse_sanitizer
from robustann.defenses.detection import evaluate_detector
from robustann.defenses.registry import defense_names
from robustann.hardening import measure_sanitizer

LINF, L2 = ra.ThreatModel("linf", 0.1), ra.ThreatModel("l2", 0.5)
QUICK: dict[str, Any] = {"preset": "quick", "max_samples": 8}


class Network(nn.Module):
    """Of all that a call could disturb, something: normalisation in both modes, dropout, frozen
    parameters and ones that are not, a gradient that waits to be used, a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)
        )
        self.still = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.dropout(self.still(self.features(x)).flatten(1)))
        return logits


@pytest.fixture(scope="module")
def learned(digits: ra.ImageData) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ra.train(Network(), digits, epochs=1, device="cpu").model


@pytest.fixture
def mine(learned: nn.Module, digits: ra.ImageData) -> nn.Module:
    model = copy.deepcopy(learned).train()
    assert isinstance(model, Network)
    model.still.eval().requires_grad_(False)
    model.features[0].requires_grad_(False)
    model.dropout.eval()
    model.last(torch.rand(2, 64)).sum().backward()
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a call could change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "addresses": {name: value.data_ptr() for name, value in model.state_dict().items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {
            name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        },
        "hooks": [len(getattr(module, h)) for module in model.modules() for h in hooks],
        "names": [sorted(vars(module)) for module in model.modules()],
    }


def assert_as_before(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what in ("addresses", "modes", "trained", "hooks", "names"):
        assert after[what] == before[what], what
    for what in ("tensors", "gradients"):
        for name, value in before[what].items():
            came = after[what][name]
            same = came is value if came is None or value is None else torch.equal(came, value)
            assert same, (what, name)


def pair(digits: ra.ImageData, count: int = 8) -> tuple[Tensor, Tensor]:
    return digits.test.images(slice(0, count)), digits.test.labels[:count]


Call = Callable[[nn.Module, ra.ImageData], Any]


def _attack(name: str) -> Call:
    def call(model: nn.Module, digits: ra.ImageData) -> Any:
        norms = registered()[name].norms
        threat = LINF if "linf" in norms else L2 if "l2" in norms else ra.ThreatModel("l0", 3)
        short = {"steps": 2, "queries": 20}
        known = {field.name for field in dataclasses.fields(registered()[name])}
        made = registered()[name](**{key: n for key, n in short.items() if key in known})
        return ra.attack(made, model, *pair(digits, 4), threat)

    return call


def _harden(defense: str, **settings: Any) -> Call:
    settings = {**QUICK, "curve": False, "trust": False, "explain": False, **settings}

    def call(model: nn.Module, digits: ra.ImageData) -> Any:
        if defense_names()[defense.partition(":")[0]] in ("objective", "wrapper"):
            settings["epochs"] = 1
        return ra.harden(model, digits, LINF, defense, **settings)

    return call


CALLS: dict[str, Call] = {
    **{f"attack {name}": _attack(name) for name in registered()},
    "audit with everything": lambda m, d: ra.audit(
        m, d, LINF, weights=True, corruptions=True, **QUICK
    ),
    "audit in l2": lambda m, d: ra.audit(m, d, L2, curve=False, **QUICK),
    "audit that certifies": lambda m, d: ra.audit(
        m, d, ra.ThreatModel("linf", 0.01), certify=True, curve=False, trust=False, **QUICK
    ),
    "audit of the smoothed": lambda m, d: ra.audit(
        certificates.Smoothed(m, 0.25),
        d,
        L2,
        certify=True,
        curve=False,
        trust=False,
        preset="quick",
        max_samples=2,
    ),
    "harden, adversarially": _harden("fast-adversarial-training", explain=True),
    "harden, all of the weights": _harden("weight-clipping", weights=True),
    "harden, by a sanitizer": _harden("bit-depth", max_samples=2),
    "measure a sanitizer": lambda m, d: measure_sanitizer(
        m, parse_sanitizer("noise"), pair(d, 2), LINF, queries=20, attacks=[ra.PGD(steps=2)]
    ),
    "detect": lambda m, d: evaluate_detector(
        m,
        [parse_sanitizer("bit-depth:bits=2")],
        d.validation.images(slice(0, 30)),
        *pair(d),
        LINF,
        adaptive=[ra.PGD(steps=2)],
    ),
    "transfer": lambda m, d: transfer(
        ra.PGD(steps=2), m, copy.deepcopy(m), *pair(d), LINF, random=streams(8)
    ),
    "certify in l2": lambda m, d: certificates.certify(
        m, *pair(d, 2), sigma=0.2, n=64, random=streams(2)
    ),
    "predict smoothed": lambda m, d: certificates.predict(
        m, pair(d, 2)[0], sigma=0.2, n=64, random=streams(2)
    ),
    "certify in linf": lambda m, d: certificates.certify_linf(m, *pair(d, 4), LINF),
    "bit errors": lambda m, d: random_bit_errors(m, *pair(d), rates=(0.01,), seeds=2),
    "bit errors in float32": lambda m, d: random_bit_errors(
        m, *pair(d), rates=(0.01,), seeds=2, bits=32, repair=WeightGuard.record(m).repaired
    ),
    "bit search": lambda m, d: progressive_bit_search(m, *pair(d), attack_size=4, max_flips=3),
    "random flips": lambda m, d: random_flips(m, *pair(d), count=5, seeds=2),
    "quantise": lambda m, d: quantized_model(m),
    "record a guard": lambda m, d: WeightGuard.record(m),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_no_trace(name: str, mine: nn.Module, digits: ra.ImageData) -> None:
    before = state(mine)
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    numbers = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[union-attr]
    graph = torch.is_grad_enabled()
    CALLS[name](mine, digits)
    assert_as_before(before, state(mine))
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert np.array_equal(np.random.get_state()[1], numbers[1])
    assert random.getstate() == numbers[2]
    assert torch.is_grad_enabled() is graph


DISTURBANCES: dict[str, Callable[[nn.Module], Any]] = {
    "a forward in training": lambda m: m(torch.rand(4, 1, 8, 8)),
    "evaluation mode": lambda m: m.eval(),
    "thawed": lambda m: m.requires_grad_(True),
    "a gradient lost": lambda m: m.zero_grad(),
    "a gradient more": lambda m: m(torch.rand(4, 1, 8, 8)).sum().backward(),
    "a hook": lambda m: m.register_forward_hook(lambda *facts: None),
    "a mark": lambda m: setattr(m, "mark", 1),
    "a copy of a parameter": lambda m: setattr(m.last, "bias", nn.Parameter(m.last.bias.detach())),
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_the_comparison_would_notice(name: str, mine: nn.Module) -> None:
    before = state(mine)
    assert_as_before(before, state(mine))
    DISTURBANCES[name](mine)
    with pytest.raises(AssertionError):
        assert_as_before(before, state(mine))
