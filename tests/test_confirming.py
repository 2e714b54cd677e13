"""Successes are confirmed together, at the end: what it costs, and that it changes no bit.

A search with a limit confirms each success at once. One that is never reached changes nothing else:
it is what the others are held against.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from attacking import Scripted, centred, equal, generator, in_batches, some, streams
from torch import Tensor, nn

from robustann.attacks import APGD, FGSM, MM, PGD, Attack, Square, UniformNoise
from robustann.attacks.base import State
from robustann.attacks.engine import ALIGNMENT, AttackResult, Oracle, run
from robustann.attacks.fmn import FMN
from robustann.attacks.mifgsm import MIFGSM
from robustann.attacks.rays import RayS
from robustann.threat import ThreatModel

SHAPE = (1, 8, 8)
COUNT = 75
NEVER = 10**9


class Calls(nn.Module):
    """Notes how many images each call had."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        logits: Tensor = self.inner(x)
        return logits


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    """Some images fall at once, some late, some never."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
        ).eval()


@pytest.fixture(scope="module")
def cases(network: nn.Module) -> tuple[Tensor, Tensor]:
    """The last ones are wrong before any attack."""
    x, labels = some(network, COUNT, SHAPE)
    labels[70:] = (labels[70:] + 1) % 4
    return x, labels


def attacked(
    attack: Attack, model: nn.Module, cases: tuple[Tensor, Tensor], threat: ThreatModel,
    size: int = COUNT, at_once: bool = False, **options: Any,
) -> AttackResult:  # fmt: skip
    """In batches of that size."""
    limit = NEVER if at_once else None
    return in_batches(attack, model, *cases, threat, size, 5, limit, **options)


EPS = {"linf": 0.03, "l2": 0.2, "l1": 1.5}
ATTACKS = [
    (FGSM(), "linf"), (PGD(steps=12, restarts=2), "linf"), (PGD(steps=12), "l2"),
    (PGD(steps=12), "l1"), (MIFGSM(steps=8), "linf"), (APGD(steps=12, targets=2), "linf"),
    (MM(steps=9, start="best"), "linf"), (Square(queries=40), "linf"),
    (UniformNoise(draws=6), "l1"),
]  # fmt: skip


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("attack", "norm"), [pytest.param(*case, id=f"{case[1]}-{case[0].label}") for case in ATTACKS]
)
def test_together_as_at_once(attack, norm, known, network, cases):
    threat = ThreatModel(norm, EPS[norm])
    early, late = Calls(network), Calls(network)
    options = {"known_correct": known}
    expected = attacked(attack, early, cases, threat, at_once=True, **options)
    assert 0 < int(expected.success.sum()) < COUNT
    assert equal(attacked(attack, late, cases, threat, **options), expected)
    # One call for all of them.
    steps = len(expected.first_success[expected.success].unique())
    assert len(late.sizes) == len(early.sizes) - steps + 1
    fell = int(expected.success.sum())
    assert late.sizes[-1] == fell + -fell % ALIGNMENT
    if known:
        # Batches that are no multiple of the alignment.
        assert equal(attacked(attack, network, cases, threat, 29, **options), expected)
    else:
        assert equal(attacked(attack, network, cases, threat, spacing=4, **options), expected)


def test_targeted_too(network, cases):
    threat = ThreatModel("linf", 2 * EPS["linf"], targeted=True)
    expected = attacked(PGD(steps=12), network, cases, threat, at_once=True)
    assert 0 < int(expected.success.sum()) < COUNT
    assert equal(attacked(PGD(steps=12), network, cases, threat), expected)


@pytest.mark.parametrize(
    ("attack", "options"),
    [(PGD(steps=8), {"draws": 2}), (PGD(steps=8), {"precision": "bf16"}), (FMN(steps=8), {}),
     (RayS(queries=60), {}), (PGD(steps=8), {"judge": None})],
)  # fmt: skip
def test_where_it_is_not_put_off(attack, options, network, cases, monkeypatch):
    """Several draws, low precision, another judge, the nearest image."""
    if "judge" in options:
        options = {"judge": network}

    def never(self: Oracle, *_: Any) -> Tensor:
        raise AssertionError("confirmed at the end")

    threat = ThreatModel("linf", EPS["linf"])
    expected = attacked(attack, network, cases, threat, at_once=True, **options)
    monkeypatch.setattr(Oracle, "confirm", never)
    assert equal(attacked(attack, network, cases, threat, **options), expected)
    with pytest.raises(AssertionError, match="at the end"):
        attacked(PGD(steps=8), network, cases, threat)


class Weighing(Calls):
    """Notes how much memory tensors held at each call."""

    def forward(self, x: Tensor) -> Tensor:
        held = {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
            for one in gc.get_objects() if type(one) is Tensor
        }  # fmt: skip
        self.sizes.append(sum(held.values()))
        logits: Tensor = self.inner(x)
        return logits


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_confirming_together_needs_hardly_more_memory_than_a_step(norm, network):
    x, labels = some(network, 800, SHAPE)
    model, threat = Weighing(network), ThreatModel(norm, 20 * EPS[norm])
    found = run(PGD(steps=4), model, x, labels, threat, random=streams(800))
    assert bool(found.success.all())
    # The images that are to be confirmed, and what they become; no copies kept for the purpose.
    assert model.sizes[-1] < model.sizes[1] + 3 * x.nbytes


# ---------------------------------------------------------------- successes that do not hold


@dataclass(frozen=True, kw_only=True)
class Beyond(Scripted):
    """Proposes what lies far outside of the region, but for the last image."""

    name: ClassVar[str] = "beyond"

    def proposal(self, oracle: Oracle, iteration: int) -> Tensor:
        sign = oracle.random.sign(*oracle.x.shape[1:])
        return oracle.x + (5.0 if iteration < self.steps else 0.0) * sign


@pytest.mark.parametrize("norm", ["linf", "l2", "l0"])
def test_images_outside_of_the_region(norm):
    model = centred(SHAPE, 5)
    cases = some(model, COUNT, SHAPE)
    threat = ThreatModel(norm, {"linf": 0.05, "l2": 0.4, "l0": 3}[norm])
    options = {"known_correct": True}
    expected = attacked(Beyond(), model, cases, threat, at_once=True, **options)
    found = attacked(Beyond(), model, cases, threat, **options)
    for name in ("adversarial", "success", "distance", "margin", "prediction"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    again = found.forwards != expected.forwards
    # Some hold at first, some after that, some never.
    assert bool((found.success & ~again).any())
    assert bool((found.success & again).any())
    assert bool((~found.success & again).any())
    # What a sample has spent until its first success that did not hold, with the forward that
    # refuted it: the second search is counted from there.
    before = (found.forwards - expected.forwards)[again]
    assert set(before.tolist()) <= {2, 3, 4}
    fell = again & found.success
    after = (found.first_success - expected.first_success)[fell]
    assert torch.equal(after, (found.forwards - expected.forwards)[fell])
    assert bool((found.first_success[~found.success] == -1).all())
    # Whatever the batch: the sample alone decides.
    for size in (1, 7, 32):
        assert equal(attacked(Beyond(), model, cases, threat, size, **options), found)
    for spacing in (2, 1000):
        assert equal(attacked(Beyond(), model, cases, threat, spacing=spacing, **options), found)


class Lucky(nn.Module):
    """Is wrong about an image only while a gradient is asked for; brightness says which ones."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        lucky = x.requires_grad & (x[:, 0, 0, 0] < self.share)
        return torch.where(lucky[:, None], -logits, logits)


def test_luck_is_no_success_and_costs_no_more_than_twice():
    inner = centred(SHAPE, 5)
    x, labels = some(inner, COUNT, SHAPE)
    x[:, 0, 0, 0] = torch.rand(COUNT, generator=generator(3))
    labels = inner(x).argmax(1)
    # It takes no step, so all is known beforehand.
    attack = PGD(steps=6, step_size=1e-9, random_start=False)
    calls = Calls(Lucky(inner, 0.5))
    found = run(attack, calls, x, labels, ThreatModel("linf", 1e-6), random=streams(COUNT))
    lucky = x[:, 0, 0, 0] < 0.5
    assert 10 < int(lucky.sum()) < 60
    assert not found.success.any()
    assert found.first_success.tolist() == [-1] * COUNT
    assert torch.equal(found.prediction, labels)
    assert float(found.margin.min()) > 0
    # The first look, six gradients, the last look.
    assert found.forwards[~lucky].tolist() == [8] * int((~lucky).sum())
    assert found.backwards[~lucky].tolist() == [6] * int((~lucky).sum())
    # Refuted after the first look and a gradient; then each of six gradients is a claim.
    assert found.forwards[lucky].tolist() == [3 + 8 + 6] * int(lucky.sum())
    assert found.backwards[lucky].tolist() == [1 + 6] * int(lucky.sum())
    # Those that stand, what confirms, and those that are run again, and confirmed at once.
    alone, rest = (count + -count % ALIGNMENT for count in map(int, (lucky.sum(), (~lucky).sum())))
    whole = COUNT + -COUNT % ALIGNMENT
    first = [whole, whole, *[rest] * 6]
    assert calls.sizes == [*first, alone, alone, *[alone, alone] * 6, alone]


class First(nn.Module):
    """Is wrong about the first image of a call alone, and about all while a gradient is asked for:
    as a model that draws for each row may be."""

    def forward(self, x: Tensor) -> Tensor:
        wrong = (torch.arange(len(x)) == 0) | x.requires_grad
        right = x.flatten(1).sum(1, keepdim=True) * 0 + torch.tensor([1.0, 0.0])
        return torch.where(wrong[:, None], right.flip(1), right)


@pytest.mark.parametrize("at_once", [False, True])
def test_what_fills_up_a_batch_confirms_nothing(at_once):
    """The copies of an image may be answered otherwise than the image."""
    x, labels = torch.full((1, *SHAPE), 0.5), torch.tensor([0])
    threat = ThreatModel("linf", 0.1)
    options = {"at_once": at_once, "known_correct": True}
    found = attacked(PGD(steps=3), First(), (x, labels), threat, **options)
    assert found.success.tolist() == [True]
    assert found.prediction.tolist() == [1]
    assert found.margin.tolist() == [-1.0]
    assert found.forwards.tolist() == [2]


class Noisy(nn.Module):
    """Randomised, with one draw for all images of a call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits + 2.0 * torch.randn_like(logits[:1])


def test_a_sample_that_is_run_again_meets_the_draws_of_the_start():
    """What it comes to is what confirming at once comes to, whatever the batch."""
    model = Noisy(centred(SHAPE, 5))
    cases = some(model.inner, COUNT, SHAPE)
    threat, attack = ThreatModel("linf", 0.02), PGD(steps=10)
    found = attacked(attack, model, cases, threat)
    at_once = attacked(attack, model, cases, threat, at_once=True)
    again = found.forwards > at_once.forwards
    assert 5 < int(again.sum()) < COUNT - 5
    assert torch.equal(found.adversarial[again], at_once.adversarial[again])
    assert torch.equal(found.success[again], at_once.success[again])
    for size in (1, 7, 32):
        assert equal(attacked(attack, model, cases, threat, size), found)
    # No more than it would have cost, and once more.
    assert bool((found.forwards <= 2 * at_once.forwards.max()).all())


def test_a_second_search_leaves_no_trace():
    model = Noisy(centred(SHAPE, 5))
    cases = some(model.inner, COUNT, SHAPE)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = attacked(PGD(steps=10), model, cases, ThreatModel("linf", 0.02))
    assert torch.equal(torch.get_rng_state(), state)
    second = attacked(PGD(steps=10), model, cases, ThreatModel("linf", 0.02))
    assert equal(first, second)


def test_a_second_search_knows_which_samples_it_holds():
    """Attacks that bring their images look them up by their rows."""
    model = centred(SHAPE, 5)
    x, labels = some(model, COUNT, SHAPE)
    held = []

    class Placed(Beyond):
        def init(self, oracle: Oracle) -> State:
            held.append(len(oracle))
            assert torch.equal(x[oracle.rows], oracle.x)
            return super().init(oracle)

    threat = ThreatModel("linf", 0.05)
    found = run(Placed(), model, x, labels, threat, random=streams(COUNT))
    assert equal(found, run(Beyond(), model, x, labels, threat, random=streams(COUNT)))
    assert len(held) == 2
    assert held[1] < held[0]
