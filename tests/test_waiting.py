"""Inner loops ask no accelerator for a value: whoever asks waits until all before it is computed.

There need be no accelerator here. Operations are counted as they reach the dispatcher, on the CPU
with the code told that asking waits; and the same steps run on PyTorch's meta device, whose tensors
have no values: there is nothing to be read from them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustann import threat as threats
from robustann.attacks import (
    APGD,
    FAB,
    FGSM,
    MM,
    PGD,
    Attack,
    Square,
    UniformNoise,
    engine,
    registered,
)
from robustann.attacks.base import State
from robustann.attacks.ddn import DDN
from robustann.attacks.engine import AttackResult, Oracle, craft, predict_logits, run
from robustann.attacks.fmn import FMN
from robustann.attacks.hopskipjump import HopSkipJump
from robustann.attacks.losses import cross_entropy
from robustann.attacks.mifgsm import MIFGSM
from robustann.attacks.rays import RayS
from robustann.attacks.sigma_zero import SigmaZero
from robustann.defenses import (
    MART,
    TRADES,
    AdversarialTraining,
    AdversarialWeightPerturbation,
    FastAdversarialTraining,
    NoiseTraining,
    NoisyFastAdversarialTraining,
)
from robustann.errors import UsageError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel
from robustann.training.steps import StandardStep

EPS = {"linf": 0.1, "l2": 0.7, "l1": 3.0, "l0": 6.0}
CHOSEN: tuple[Attack, ...] = (
    FGSM(), PGD(steps=10, restarts=2), MIFGSM(steps=6), MM(steps=9), MM(steps=9, rank=2),
    MM(steps=9, start="best"), APGD(steps=12), APGD(steps=12, loss="dlr", targets=2),
    Square(queries=24), Square(queries=24, start="best"), FMN(steps=9), FAB(steps=6, restarts=2),
    FAB(steps=6, targets=2), DDN(steps=9), SigmaZero(steps=9), RayS(queries=24),
    HopSkipJump(queries=99),
    UniformNoise(draws=4),
)  # fmt: skip
# And whatever attack is added.
ATTACKS = (
    *CHOSEN,
    *(kind() for name, kind in registered().items() if name not in {one.name for one in CHOSEN}),
)
CASES = [
    pytest.param(attack, norm, id=f"{norm}-{attack.label}")
    for norm in EPS
    for attack in ATTACKS
    if norm in attack.norms
]
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount",
    "unique_dim", "unique_consecutive", "_unique", "_unique2", "repeat_interleave",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts what would make the processor wait for an accelerator, or copy to or from one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        masks = name.startswith("index") and any(
            one.dtype in (torch.bool, torch.uint8) for one in tree_leaves(args[1])
            if isinstance(one, Tensor)
        )  # fmt: skip
        result = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        # A number of the CPU goes along with the call.
        places = {one.device for one in (*tensors, *made) if one.dim()}
        if name in WAITING or masks or len(places) > 1:
            self.counts[name] += 1
        return result


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device is one that is waited for."""
    for module in (threats, engine):
        monkeypatch.setattr(module, "asking_waits", lambda device: True)


@pytest.fixture(scope="module")
def digits_model(digits: Any) -> nn.Module:
    """A network that some images fall on in few steps, and some do not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(144, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        x, y = digits.train.images(slice(0, 512)), digits.train.labels[:512]
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def attacked(attack: Attack, model: nn.Module, digits: Any, norm: Any, **options: Any) -> Any:
    count = 43
    x, y = digits.test.images(slice(0, count)), digits.test.labels[:count]
    threat = ThreatModel(norm, EPS[norm])
    random = SampleRandom.create(3, torch.arange(count))
    return run(attack, model, x, y, threat, random=random, **options)


def counted(
    attack: Attack, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]
) -> tuple[Counter[str], int]:
    """What the steps of an attack ask for while ``work`` is done, and how many steps there were."""
    counter, steps = Waits(), 0
    original = type(attack).step

    def step(self: Attack, oracle: Oracle, state: State, iteration: int) -> State:
        nonlocal steps
        steps += 1
        with counter:
            return original(self, oracle, state, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(type(attack), "step", step)
        work()
    return counter.counts, steps


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_a_step_asks_for_nothing(attack, norm, digits_model, digits, monkeypatch):
    counts, steps = counted(
        attack, monkeypatch, lambda: attacked(attack, digits_model, digits, norm)
    )
    assert steps
    assert not counts


class Asking(PGD):
    """Asks whether it is done, as one writes it without thinking."""

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        state = super().step(oracle, state, iteration)
        assert (state["x"] - oracle.x).abs().max().item() < 1
        return state


class Choosing(PGD):
    """Moves chosen rows alone."""

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        x = super().step(oracle, state, iteration)["x"].clone()
        x[oracle.fallen] = oracle.x[oracle.fallen]
        return {"x": x}


class Branching(PGD):
    """Branches on a tensor."""

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        state = super().step(oracle, state, iteration)
        return state if (state["x"] > oracle.x).any() else {"x": oracle.x}


class Curious(PGD):
    """Asks for what the engine has judged."""

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        state = super().step(oracle, state, iteration)
        return {"x": torch.where(oracle.standing[:, None, None, None], state["x"], oracle.best)}


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("kind", [Asking, Choosing, Branching, Curious])
def test_what_asks_at_every_step_is_found(kind, digits_model, digits, monkeypatch):
    attack = kind(steps=5)
    # Two draws: what is judged is confirmed at once, and not with all else in the end.
    counts, steps = counted(
        attack, monkeypatch, lambda: attacked(attack, digits_model, digits, "linf", draws=2)
    )
    assert counts.total() >= steps


def on_meta(attack: Attack, norm: Any, digits: Any) -> Waits:
    """Three steps on tensors without values."""
    shape = digits.test.shape
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
        x, labels = torch.rand(16, *shape), torch.zeros(16, dtype=torch.int64)
    model.requires_grad_(False)
    random = SampleRandom.create(0, torch.arange(16)).to("meta")
    oracle = Oracle(
        model, x, labels, ThreatModel(norm, EPS[norm]), random,
        minimum_norm=attack.minimum_norm, patient=True,
    )  # fmt: skip
    # Labels are looked through once, before the first step.
    oracle._classes = 10
    state, counter = attack.init(oracle), Waits()
    with counter:
        for iteration in range(min(3, attack.iterations)):
            state = attack.step(oracle, state, iteration)
    assert state["x"].shape == x.shape
    return counter


@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_steps_need_no_values(attack, norm, digits):
    assert not on_meta(attack, norm, digits).counts


def test_a_tensor_without_values_answers_no_question(digits):
    for attack in (Asking(), Branching(), Choosing(), Curious()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            on_meta(attack, "linf", digits)


class Sent(PGD):
    """Brings something from the CPU at every step."""

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        noise = torch.zeros(oracle.x.shape).to(oracle.x.device)
        return super().step(oracle, {"x": state["x"] + noise}, iteration)


def test_a_copy_from_the_processor_is_found(digits):
    assert on_meta(Sent(), "linf", digits).counts.total() == 3


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_crafting_for_training_asks_for_nothing(norm, digits_model, digits, monkeypatch):
    x, y = digits.train.images(slice(0, 24)), digits.train.labels[:24]
    random = SampleRandom.create(0, torch.arange(24))
    threat = ThreatModel(norm, EPS[norm])
    counts, steps = counted(
        PGD(steps=4),
        monkeypatch,
        lambda: craft(PGD(steps=4), digits_model, x, y, threat, random=random),
    )
    assert (steps, counts) == (4, Counter())


TINY = ThreatModel("linf", 0.1)
STEPS = (
    StandardStep(), AdversarialTraining(PGD(steps=3), TINY), TRADES(TINY), MART(PGD(steps=3), TINY),
    FastAdversarialTraining(TINY), NoisyFastAdversarialTraining(TINY), NoiseTraining(0.1),
    AdversarialWeightPerturbation(AdversarialTraining(PGD(steps=3), TINY)),
)  # fmt: skip


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_training_step_asks_for_nothing(step, digits_model, digits):
    model = copy.deepcopy(digits_model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    x, y = digits.train.images(slice(0, 24)), digits.train.labels[:24]
    random = SampleRandom.create(0, torch.arange(24))
    with Waits() as counter:
        loss, _ = step(model, x, y, random=random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not counter.counts


def same(first: AttackResult, second: AttackResult) -> bool:
    names = [field.name for field in dataclasses.fields(AttackResult) if field.name != "attack"]
    return all(
        torch.equal(
            getattr(first, name).contiguous().view(torch.uint8),
            getattr(second, name).contiguous().view(torch.uint8),
        )
        for name in names
    )


@pytest.fixture(scope="module")
def at_once(digits_model: nn.Module, digits: Any) -> Callable[..., AttackResult]:
    known: dict[tuple[Any, ...], AttackResult] = {}

    def result(attack: Attack, norm: str, **options: Any) -> AttackResult:
        key = (attack, norm, *sorted((name, str(value)) for name, value in options.items()))
        if key not in known:
            known[key] = attacked(attack, digits_model, digits, norm, spacing=1, **options)
        return known[key]

    return result


@pytest.mark.parametrize("spacing", [3, 1000])
@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_the_spacing_changes_no_bit(attack, norm, spacing, digits_model, digits, at_once):
    found = attacked(attack, digits_model, digits, norm, spacing=spacing)
    assert same(found, at_once(attack, norm))


def test_samples_fall_between_the_looks(at_once):
    # Or the tests above would say nothing.
    found = at_once(PGD(steps=10, restarts=2), "linf")
    assert found.success.any()
    assert not found.success.all()
    assert len(set(found.first_success.tolist())) > 3


@pytest.mark.parametrize("options", [{"limit": torch.full((43,), 9), "known_correct": True},
                                     {"precision": "bf16"}])  # fmt: skip
@pytest.mark.parametrize("attack", [PGD(steps=10), Square(queries=40), MM(steps=9, rank=2)])
def test_nor_with_a_limit_or_in_low_precision(attack, options, digits_model, digits, at_once):
    found = attacked(attack, digits_model, digits, "linf", spacing=8, **options)
    assert same(found, at_once(attack, "linf", **options))


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_nor_does_the_way_without_questions(attack, norm, digits_model, digits, at_once):
    assert same(attacked(attack, digits_model, digits, norm), at_once(attack, norm))


class Rewriting(PGD):
    """Writes over an image that it has shown."""

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        x = state["x"].clone()
        gradient = oracle.gradient(x, cross_entropy)
        following = oracle.region.step(x, gradient, 0.02)
        x.fill_(0.5)
        return {"x": following}


@pytest.mark.parametrize("spacing", [1, 8])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_what_was_shown_must_not_be_overwritten(digits_model, digits, spacing, eps):
    # Whether something falls, and all is judged at once, or not.
    x, labels = digits.test.images(slice(0, 8)), digits.test.labels[:8]
    random = SampleRandom.create(0, torch.arange(8))
    threat = ThreatModel("linf", eps)
    with pytest.raises(UsageError, match="changed in place"):
        run(Rewriting(steps=9), digits_model, x, labels, threat, random=random, spacing=spacing)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.5, 4.0])
def test_the_second_attempt_to_shorten_never_fails(norm, eps):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 3, 8, 8, generator=generator)
    x_adv = (x + torch.randn(x.shape, generator=generator)).clamp(0, 1)
    region = ThreatModel(norm, eps).region(x)
    distance = region.threat.distance(x_adv, x)
    shorter = region._shorter(x_adv, eps / distance, certain=True)
    outside = distance > eps
    assert outside.any()
    assert bool((region.threat.distance(shorter, x) <= eps)[outside].all())
    # It goes as far as it may.
    assert bool((region.threat.distance(shorter, x) >= 0.99 * eps - 1e-6 * 192)[outside].all())


class Blinded(PGD):
    """Shows in each third step images of which some are no numbers, though the logits are."""

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        if iteration % 3 == 2:
            x = state["x"].clone()
            x[::2, :, 4, 4] = torch.nan
            oracle.forward(x)
        return super().step(oracle, state, iteration)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("kind", [PGD, Blinded])
@pytest.mark.parametrize("eps", [0.02, 0.1])
def test_judged_together_as_one_by_one(digits_model, digits, monkeypatch, kind, targeted, eps):
    # A pixel that is no number counts as a dark one.
    model = nn.Sequential(_Mended(), digits_model)
    x, labels = digits.test.images(slice(0, 43)), digits.test.labels[:43]
    if targeted:
        labels = (labels + 1) % 10
    threat = ThreatModel("linf", eps, targeted=targeted)
    found = []
    for most in (1, 8):
        monkeypatch.setattr(engine, "_TOGETHER", most)
        random = SampleRandom.create(3, torch.arange(43))
        found.append(run(kind(steps=12), model, x, labels, threat, random=random))
    assert same(*found)
    assert found[0].adversarial.isfinite().all()
    assert not found[0].success.all()


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("eps", [0.02, 0.1])
def test_images_that_are_no_numbers_have_no_say_where_asking_waits(digits_model, digits, eps):
    model, threat = nn.Sequential(_Mended(), digits_model), ThreatModel("linf", eps)
    x, labels = digits.test.images(slice(0, 43)), digits.test.labels[:43]
    random = SampleRandom.create(3, torch.arange(43))
    found, often = (
        run(Blinded(steps=12), model, x, labels, threat, random=random, spacing=spacing)
        for spacing in (8, 1)
    )
    assert same(found, often)


class Back(PGD):
    """Ends each step with a look at the originals, in which nothing falls."""

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        state = super().step(oracle, state, iteration)
        oracle.forward(state["x"])
        oracle.forward(oracle.x)
        return state


def test_what_fell_leaves_whatever_was_shown_after_it(digits_model, digits):
    x = digits.test.images(slice(0, 16))
    labels, shown = predict_logits(digits_model, x).argmax(1), []

    def counted(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shown.append(len(inputs[0]))

    random = SampleRandom.create(0, torch.arange(16))
    with digits_model.register_forward_pre_hook(counted):
        threat = ThreatModel("linf", 0.5)
        found = run(Back(steps=20), digits_model, x, labels, threat, random=random)
    assert found.success.all()
    # Not as many as 20 steps would ask.
    assert sum(shown) < 16 * 20


class _Mended(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.nan_to_num(0.0)
