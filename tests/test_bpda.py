"""BPDA: the forward pass is untouched, and gradients see through what has none."""

from __future__ import annotations

import networks
import pytest
import torch
from torch import Tensor, nn

from robustann.attacks import PGD
from robustann.attacks.bpda import bpda
from robustann.attacks.engine import predict_logits, run
from robustann.errors import ModelError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel


class Quantiser(nn.Module):
    """Eight grey levels: its derivative is zero almost everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 7).round() / 7


class Half(nn.Module):
    """Half the resolution, by a way that autograd cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().copy()[..., ::2, ::2])


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return networks.digits()


@pytest.fixture(scope="module")
def classifier(digits: tuple[Tensor, Tensor]) -> nn.Module:
    return networks.perceptron()


def test_a_quantiser_does_not_protect(digits: tuple[Tensor, Tensor], classifier: nn.Module) -> None:
    defended = nn.Sequential(Quantiser(), classifier)
    seen_through = nn.Sequential(bpda(Quantiser()), classifier)
    x, labels = digits[0][1400:1550], digits[1][1400:1550]
    right = predict_logits(defended, x).argmax(1) == labels
    right &= predict_logits(classifier, x).argmax(1) == labels
    x, labels = x[right], labels[right]
    threat = ThreatModel("linf", 0.15)
    rates, results = [], []
    for model in (classifier, defended, seen_through):
        random = SampleRandom.create(0, torch.arange(len(x)))
        # From the original: a random start would break some by chance.
        attack = PGD(steps=20, random_start=False)
        results.append(run(attack, model, x, labels, threat, random=random))
        rates.append(results[-1].success_rate)
    undefended, plain, recovered = rates
    assert undefended > 0.6
    assert plain == 0
    assert recovered > 0.9 * undefended
    # What was found through the stand-in breaks the defended model itself.
    broken = predict_logits(defended, results[2].adversarial).argmax(1) != labels
    assert torch.equal(broken, results[2].success)


def test_forward_is_bit_for_bit_and_backward_is_the_surrogates() -> None:
    x = torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pooled = bpda(Half(), nn.AvgPool2d(2))
    y = pooled(x)
    assert torch.equal(y, x.detach()[..., ::2, ::2])
    weight = torch.rand(y.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    (expected,) = torch.autograd.grad((nn.AvgPool2d(2)(x) * weight).sum(), x)
    assert torch.equal(gradient, expected)


def test_the_surrogates_derivative_is_taken_at_the_input() -> None:
    x = torch.tensor([[-2.0, 3.0]], requires_grad=True)
    y = bpda(Quantiser(), nn.ReLU())(x)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[0.0, 1.0]]


def test_parts_that_work_in_place_or_do_nothing() -> None:
    x = torch.tensor([[-2.0, 3.0]], requires_grad=True)
    for part in (nn.ReLU(inplace=True), nn.Identity()):
        y = bpda(part)(x * 1)
        assert torch.equal(y, part(x.detach().clone()))
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[1.0, 1.0]]
    assert x.tolist() == [[-2.0, 3.0]]


def test_both_parts_follow_the_module() -> None:
    wrapped = bpda(nn.Dropout(0.5), nn.Linear(3, 3))
    wrapped.eval()
    assert not any(module.training for module in wrapped.modules())
    assert len(list(wrapped.parameters())) == 2
    x = torch.ones(2, 3, requires_grad=True)
    wrapped(x).sum().backward()
    # Crafting must not train the stand-in.
    assert all(parameter.grad is None for parameter in wrapped.parameters())


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


class Elsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand_as(x)


@pytest.mark.parametrize(
    ("part", "surrogate", "message"),
    [
        (Half(), None, r"shape of the part .* \(1, 1, 2, 2\), got \(1, 1, 4, 4\)"),
        (Quantiser(), Constant(), "carries no gradient"),
        (Quantiser(), Elsewhere(), "depend on its input"),
    ],
)
def test_unfit_surrogates(part: nn.Module, surrogate: nn.Module | None, message: str) -> None:
    x = torch.rand(1, 1, 4, 4, requires_grad=True)
    y = bpda(part, surrogate)(x)
    with pytest.raises(ModelError, match=message):
        torch.autograd.grad(y.sum(), x)
