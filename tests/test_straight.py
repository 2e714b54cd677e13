"""A model seen as if its steps without a gradient were the identity."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.auditing.straight import Straightened

WEIGHT = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


class Before(nn.Module):
    """Something in front of a linear model."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x).flatten(1) @ WEIGHT


class Behind(nn.Module):
    """Something behind a linear model."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x.flatten(1) @ WEIGHT)


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def slope(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    return found


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        return 0.9 * x + 0.05


@pytest.mark.parametrize(
    "step",
    [
        lambda x: (8 * x).round() / 8,
        lambda x: torch.floor(8 * x) / 8,
        lambda x: x.detach(),
        lambda x: torch.from_numpy(x.detach().numpy().clip(0, 1)),
        lambda x: torch.stack([torch.tensor(one.tolist()) for one in x]),
        lambda x: x + ((8 * x).round() / 8 - x).detach(),
        lambda x: (x > 0.5).float(),
        lambda x: (x >= 0.5).to(x.dtype),
        lambda x: 1 - (x < 0.5).float(),
        lambda x: (x > torch.tensor([0.25, 0.5, 0.75]).view(-1, 1, 1, 1, 1)).float().mean(0),
    ],
)
def test_steps_in_front_count_as_the_identity(step: Callable[[Tensor], Tensor]) -> None:
    model, x = Before(step), images()
    straight = Straightened(model)
    torch.testing.assert_close(straight(x.clone().requires_grad_()).detach(), model(x).detach())
    expected = WEIGHT[:, 0].view(1, 1, 4, 4).expand_as(x)
    torch.testing.assert_close(slope(straight, x), expected)


def test_no_grad_counts_for_nothing() -> None:
    found = slope(Straightened(Before(without_gradient)), images())
    torch.testing.assert_close(found, 0.9 * WEIGHT[:, 0].view(1, 1, 4, 4).expand_as(found))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "step",
    [
        lambda z: z.softmax(1),
        lambda z: (100 * F.softmax(z, dim=1)).round() / 100,
        lambda z: F.one_hot(z.argmax(1), 3).float(),
        lambda z: F.one_hot(z.argmax(dim=1), num_classes=3).to(torch.float32) * 10,
        lambda z: torch.log(torch.softmax(z, 1).clamp(min=1e-6)),
    ],
)
def test_what_stands_at_the_end_is_left_off(step: Callable[[Tensor], Tensor]) -> None:
    x = images().requires_grad_()
    torch.testing.assert_close(Straightened(Behind(step))(x), x.flatten(1) @ WEIGHT)


def test_noise_is_not_taken_for_the_image() -> None:
    noise = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    found = slope(Straightened(Before(lambda x: x + 0.1 * noise)), images())
    torch.testing.assert_close(found, WEIGHT[:, 0].view(1, 1, 4, 4).expand_as(found))


def test_an_image_does_not_hang_on_its_batch() -> None:
    def mixed(x: Tensor) -> Tensor:
        # The first image comes back as noise, which looks like no image.
        made = x.detach().clone()
        if len(x) > 1:
            made[0] = torch.linspace(1, 0, 16).view(1, 4, 4) ** 3
        return torch.from_numpy(made.numpy())

    x = images()
    straight = Straightened(Before(mixed))
    expected = WEIGHT[:, 0].view(1, 1, 4, 4).expand(4, 1, 4, 4)
    torch.testing.assert_close(slope(straight, x)[1:], expected)
    # Alone it has no gradient either, and ends no attack.
    assert not slope(Straightened(Before(lambda x: mixed(torch.cat([x, x]))[:1])), x[:1]).any()


@pytest.mark.parametrize(
    "vote",
    [
        lambda votes: torch.stack(votes).mean(0),
        lambda votes: torch.stack(votes, dim=0).sum(dim=0),
        lambda votes: sum(votes) / len(votes),
    ],
)
@pytest.mark.parametrize(
    "answer", [lambda z: F.one_hot(z.argmax(1), 3).float(), lambda z: z.softmax(1)]
)
def test_in_a_vote_of_several_their_logits_vote(vote: Callable, answer: Callable) -> None:
    def voted(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return vote([answer(flat @ WEIGHT), answer(2 * flat @ WEIGHT)])

    class Voting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return voted(x)

    x = images()
    expected = (3 * WEIGHT[:, 0]).view(1, 1, 4, 4).expand_as(x)
    found = slope(Straightened(Voting()), x)
    torch.testing.assert_close(found / found.norm(), expected / expected.norm())
