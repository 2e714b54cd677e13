"""Every registered attack keeps the contract; PGD is held against two other libraries."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacking import equal, in_batches, streams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustann.attacks import (
    FGSM,
    PGD,
    Attack,
    AttackResult,
    UniformNoise,
    parse_attack,
    registered,
)
from robustann.attacks.base import at_least
from robustann.attacks.engine import Oracle, predict_logits, run
from robustann.attacks.losses import LOSSES, cross_entropy, dlr, get_loss, margin, slope_of
from robustann.errors import UsageError
from robustann.threat import NORMS, ThreatModel

EPS = {"linf": 0.15, "l2": 1.0, "l1": 6.0, "l0": 8.0}
# Small settings for whatever hyper-parameter has one of these names: the contract holds for any.
QUICK: dict[str, Any] = {"steps": 12, "restarts": 2, "draws": 4, "queries": 100, "trials": 2}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return networks.digits()


@pytest.fixture(scope="module")
def weak(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A small network without any defense, trained for a second."""
    return networks.convolutional()


@pytest.fixture(scope="module")
def held_out(digits: tuple[Tensor, Tensor], weak: nn.Module) -> tuple[Tensor, Tensor]:
    """What the network gets right of the last 360 digits."""
    x, labels = digits[0][-360:], digits[1][-360:]
    right = predict_logits(weak, x).argmax(1) == labels
    assert float(right.double().mean()) > 0.85
    return x[right], labels[right]


# ------------------------------------------------------------------------------- the contract


def quick(kind: type[Attack]) -> Attack:
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in QUICK.items() if name in known})


CASES = [
    pytest.param(name, norm, id=f"{name}-{norm}")
    for name, kind in registered().items()
    for norm in NORMS
    if norm in kind.norms
]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_contract(
    name: str, norm: Any, targeted: bool, weak: nn.Module, held_out: tuple[Tensor, Tensor]
) -> None:
    x, labels = (part[:40] for part in held_out)
    # Half of the originals are adversarial already.
    labels = torch.where(torch.arange(40) % 2 == 0, labels, (labels + 1) % 10)
    attack = quick(registered()[name])
    threat = ThreatModel(norm, EPS[norm], targeted=targeted)
    result = run(attack, weak, x, labels, threat, random=streams(40))

    shapes = {field.name: getattr(result, field.name) for field in fields(AttackResult)}
    assert shapes.pop("attack") == attack
    assert shapes.pop("adversarial").shape == x.shape
    assert all(value.shape == (40,) for value in shapes.values())
    types = {name: value.dtype for name, value in shapes.items()}
    assert types == {
        "success": torch.bool, "distance": torch.float64, "margin": torch.float32,
        "prediction": torch.int64, "forwards": torch.int64, "backwards": torch.int64,
        "first_success": torch.int64,
    }  # fmt: skip
    assert result.adversarial.dtype == torch.float32
    assert all(value.device.type == "cpu" for value in (*shapes.values(), result.adversarial))

    delta = (result.adversarial.double() - x.double()).flatten(1)
    order = {"linf": math.inf, "l2": 2, "l1": 1, "l0": 0}[norm]
    distance = torch.linalg.vector_norm(delta, ord=order, dim=1)
    assert torch.allclose(result.distance, distance, rtol=1e-12)
    assert float(result.adversarial.min()) >= 0.0
    assert float(result.adversarial.max()) <= 1.0
    within = distance <= threat.eps * (1 + 1e-12)
    if not attack.minimum_norm:
        assert bool(within.all())

    predicted = predict_logits(weak, result.adversarial).argmax(1)
    assert torch.equal(result.prediction, predicted)
    hit = predicted == labels
    assert torch.equal(result.success, (hit if targeted else ~hit) & within)
    assert bool((result.margin[result.success] <= 0).all())
    already = predict_logits(weak, x).argmax(1) == labels
    already = already if targeted else ~already
    assert bool(result.success[already].all())
    assert torch.equal(result.adversarial[already], x[already])
    assert float(result.distance[already].max()) == 0.0

    forwards, backwards = attack.cost
    # One clean look before, one verification of what fell, within eps or beyond.
    verified = result.success | ~within
    assert bool((result.forwards <= forwards + 1 + verified).all())
    assert bool((result.backwards <= backwards).all())
    assert torch.equal(result.first_success > 0, result.success)
    assert bool((result.first_success < result.forwards).all())
    assert result.first_success[already].tolist() == [1] * int(already.sum())
    if not attack.minimum_norm:
        # Nobody pays for what is over.
        assert result.forwards[already].tolist() == [2] * int(already.sum())
        assert result.backwards[already].tolist() == [0] * int(already.sum())

    assert equal(run(attack, weak, x, labels, threat, random=streams(40)), result)
    assert equal(in_batches(attack, weak, x, labels, threat, 7), result)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_every_attack_breaks_something(
    name: str, norm: Any, weak: nn.Module, held_out: tuple[Tensor, Tensor]
) -> None:
    """An attack that does nothing fails here, and so does one that no longer beats noise."""
    x, labels = (part[:120] for part in held_out)
    attack = quick(registered()[name])
    threat = ThreatModel(norm, EPS[norm])
    random = streams(120)
    broken = run(attack, weak, x, labels, threat, random=random, known_correct=True).success
    if attack.control:
        return
    noise = run(UniformNoise(), weak, x, labels, threat, random=random, known_correct=True).success
    assert int(broken.sum()) > int(noise.sum())
    assert int(broken.sum()) >= 12


@pytest.mark.parametrize("name", registered())
def test_class_facts(name: str) -> None:
    kind = registered()[name]
    assert kind.name == name
    assert name == name.lower()
    assert not set(name) & set(":,= ")
    assert kind.norms
    assert kind.norms <= set(NORMS)
    assert kind.access in ("white-box", "score", "decision", "none")
    assert kind.control or kind.paper.startswith("https://")
    attack = kind()
    assert min(attack.cost) >= 0
    assert attack.iterations >= 0
    assert attack.starts >= 1
    assert attack.label == name
    assert attack == kind()
    assert hash(attack) == hash(kind())
    assert set(attack.parameters) == {field.name for field in fields(kind)}
    for field in fields(kind):
        assert field.kw_only
        assert field.default is not dataclasses.MISSING
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.name = "other"  # type: ignore[misc]
    for norm in set(NORMS) - kind.norms:
        with pytest.raises(UsageError, match=f"got {norm}"):
            attack.check(ThreatModel(norm, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", [n for n, kind in registered().items() if kind.access != "white-box"]
)
def test_black_boxes_take_no_gradients(
    name: str, weak: nn.Module, held_out: tuple[Tensor, Tensor]
) -> None:
    class Deployed(nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = weak(x)
            return logits

    kind = registered()[name]
    x, labels = (part[:8] for part in held_out)
    threat = ThreatModel(min(kind.norms), EPS[min(kind.norms)])  # type: ignore[arg-type]
    result = run(quick(kind), Deployed(), x, labels, threat, random=streams(8))
    assert result.backwards.tolist() == [0] * 8


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_nothing_is_broken_where_nothing_is_allowed(
    name: str, norm: Any, weak: nn.Module, held_out: tuple[Tensor, Tensor]
) -> None:
    x, labels = (part[:8] for part in held_out)
    attack = quick(registered()[name])
    result = run(attack, weak, x, labels, ThreatModel(norm, 0), random=streams(8))
    assert not result.success.any()
    assert result.first_success.tolist() == [-1] * 8
    if not attack.minimum_norm:
        assert torch.equal(result.adversarial, x)


# ------------------------------------------------------------------------- parity with others


def _stands(
    attack: Attack, weak: nn.Module, x: Tensor, labels: Tensor, threat: ThreatModel, seed: int = 0
) -> Tensor:
    random = streams(len(x), seed)
    return ~run(attack, weak, x, labels, threat, random=random, known_correct=True).success


def _strength(
    attack: Attack, weak: nn.Module, x: Tensor, labels: Tensor, threat: ThreatModel, seed: int = 0
) -> int:
    return int(_stands(attack, weak, x, labels, threat, seed).sum())


def assert_no_weaker(
    reference: Callable[[int | None], Tensor], weak: nn.Module, x: Tensor, labels: Tensor,
    threat: ThreatModel, steps: int, size: float,
) -> None:  # fmt: skip
    """No more images stand under ours than under the reference, but for one.

    ``reference`` maps a seed, or None for no random start, to adversarial images; those that it
    leaves a little outside of the region are brought back. From random starts three seeds are
    taken together: where they begin decides over a handful of images, and more so for l2, where
    torchattacks begins nearer to the original than the uniform law does. One image of noise is
    allowed, for rounding and starts move an image that is next to the edge.
    """
    for seeds in ((None,), (0, 1, 2), (3, 4, 5)):
        ours = theirs = torch.ones(len(x), dtype=torch.bool)
        for seed in seeds:
            attack = PGD(steps=steps, step_size=size, random_start=seed is not None)
            ours = ours & _stands(attack, weak, x, labels, threat, seed or 0)
            x_adv = threat.project(reference(seed), x)
            theirs = theirs & (predict_logits(weak, x_adv).argmax(1) == labels)
        assert 0.02 < float(theirs.double().mean()) < 0.98, "such an eps tells nothing"
        assert int(ours.sum()) <= int(theirs.sum()) + 1, seeds


SETTINGS = pytest.mark.parametrize(
    ("norm", "eps", "size", "steps"),
    [("linf", 0.05, 0.0125, 10), ("linf", 0.1, 0.01, 40), ("l2", 0.5, 0.125, 10),
     ("l2", 0.8, 0.1, 40)],
)  # fmt: skip


@SETTINGS
def test_pgd_against_torchattacks(
    norm: Any, eps: float, size: float, steps: int, weak: nn.Module, held_out: tuple[Tensor, Tensor]
) -> None:
    """Reference: torchattacks.PGD and PGDL2 with the same settings."""
    with warnings.catch_warnings():
        # Its import touches deprecated names of other packages.
        warnings.simplefilter("ignore")
        torchattacks = pytest.importorskip("torchattacks")
    kind = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    x, labels = held_out

    def reference(seed: int | None) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            theirs = kind(weak, eps=eps, alpha=size, steps=steps, random_start=seed is not None)
            x_adv: Tensor = theirs(x, labels)
        return x_adv

    assert_no_weaker(reference, weak, x, labels, ThreatModel(norm, eps), steps, size)


@SETTINGS
def test_pgd_against_art(
    norm: Any, eps: float, size: float, steps: int, weak: nn.Module, held_out: tuple[Tensor, Tensor]
) -> None:
    """Reference: ProjectedGradientDescentPyTorch of the Adversarial Robustness Toolbox."""
    with warnings.catch_warnings():
        # ART imports names of optional packages that warn of their removal.
        warnings.simplefilter("ignore")
        pytest.importorskip("art")
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier
    x, labels = held_out

    def reference(seed: int | None) -> Tensor:
        classifier = PyTorchClassifier(
            weak, nn.CrossEntropyLoss(), input_shape=(1, 8, 8), nb_classes=10,
            clip_values=(0.0, 1.0), device_type="cpu",
        )  # fmt: skip
        theirs = ProjectedGradientDescentPyTorch(
            classifier, norm=np.inf if norm == "linf" else 2, eps=eps, eps_step=size,
            max_iter=steps, num_random_init=int(seed is not None), batch_size=512, verbose=False,
        )  # fmt: skip
        state = np.random.get_state()
        np.random.seed(seed or 0)
        x_adv = torch.from_numpy(theirs.generate(x.numpy(), labels.numpy()))
        np.random.set_state(state)
        weak.eval()
        return x_adv

    assert_no_weaker(reference, weak, x, labels, ThreatModel(norm, eps), steps, size)


def test_more_effort_breaks_no_less(weak: nn.Module, held_out: tuple[Tensor, Tensor]) -> None:
    x, labels = held_out
    threat = ThreatModel("linf", 0.05)
    fgsm = _strength(FGSM(), weak, x, labels, threat)
    short = _strength(PGD(steps=5), weak, x, labels, threat)
    long = _strength(PGD(steps=50), weak, x, labels, threat)
    again = _strength(PGD(steps=50, restarts=4), weak, x, labels, threat)
    assert fgsm >= short >= long >= again
    stands = [
        _strength(PGD(steps=10), weak, x, labels, ThreatModel("linf", eps), 0)
        for eps in (0.01, 0.03, 0.1, 0.3)
    ]
    assert stands == sorted(stands, reverse=True)
    assert stands[0] > stands[-1]


# ----------------------------------------------------------------------------------- losses

LOGITS = torch.tensor([[2.0, 0.5, 1.0, -1.0, 0.0], [0.0, 3.0, 3.0, 1.0, -2.0]])


def test_margin_by_hand() -> None:
    assert margin(LOGITS, torch.tensor([0, 3])).tolist() == [-1.0, 2.0]
    assert margin(LOGITS, torch.tensor([2, 1])).tolist() == [1.0, 0.0]
    assert margin(LOGITS, torch.tensor([2, 1]), targeted=True).tolist() == [-1.0, 0.0]


def test_cross_entropy_by_hand() -> None:
    labels = torch.tensor([0, 3])
    expected = torch.tensor(
        [math.log(sum(math.exp(v) for v in (0.5, 1.0, -1.0, 0.0))) - 2.0,
         math.log(sum(math.exp(v) for v in (0.0, 3.0, 3.0, -2.0))) - 1.0]
    )  # fmt: skip
    assert torch.allclose(cross_entropy(LOGITS, labels), expected)
    assert torch.allclose(cross_entropy(LOGITS, labels, targeted=True), -expected)
    # Cross-entropy is softplus of these log-odds.
    plain = F.cross_entropy(LOGITS, labels, reduction="none")
    assert torch.allclose(F.softplus(cross_entropy(LOGITS, labels)), plain)


def test_dlr_by_hand() -> None:
    # Sorted: 2, 1, .5, 0, -1 and 3, 3, 1, 0, -2.
    assert dlr(LOGITS, torch.tensor([0, 3])).tolist() == pytest.approx([-1 / 1.5, 2 / 2])
    assert dlr(LOGITS, torch.tensor([4, 1])).tolist() == pytest.approx([2 / 1.5, 0.0])
    targeted = dlr(LOGITS, torch.tensor([1, 3]), targeted=True)
    assert targeted.tolist() == pytest.approx([-1.5 / (2 - 0.25), -2 / (3 - 0.5)])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_dlr_is_free_of_scale_and_shift(scale: float) -> None:
    labels = torch.tensor([0, 3])
    for targeted in (False, True):
        expected = dlr(LOGITS, labels, targeted)
        assert torch.allclose(dlr(LOGITS * scale, labels, targeted), expected, rtol=1e-4)
        assert torch.allclose(dlr(LOGITS + 100, labels, targeted), expected, rtol=1e-4)


@pytest.mark.parametrize(("classes", "targeted"), [(2, False), (3, False), (4, True), (2, True)])
def test_dlr_falls_back_to_the_margin(classes: int, targeted: bool) -> None:
    logits, labels = LOGITS[:, :classes], torch.tensor([0, 1])
    assert torch.equal(dlr(logits, labels, targeted), margin(logits, labels, targeted))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_slopes_in_closed_form_are_those_that_autograd_finds(loss, classes, targeted):
    generator = torch.Generator().manual_seed(0)
    # Whole numbers tie, and large ones saturate what saturates.
    logits = (torch.randn(64, classes, generator=generator) * 3).round()
    logits[:16] *= 40
    labels = torch.randint(classes, (64,), generator=generator)
    logits.requires_grad_()
    (wanted,) = torch.autograd.grad(loss(logits, labels, targeted).sum(), logits)
    slope = slope_of(loss)
    assert slope is not None
    torch.testing.assert_close(slope(logits.detach(), labels, targeted), wanted)
    assert slope_of(lambda logits, labels, targeted: logits[:, 0]) is None


@dataclass
class Scaled:
    """A loss with a setting, which Python cannot hash."""

    factor: float = 3.0

    def __call__(self, logits, labels, targeted=False):
        return self.factor * margin(logits, labels, targeted)


def test_a_loss_need_not_be_hashable() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    oracle = Oracle(model, x, labels, ThreatModel("linf", 0.1), streams(2))
    gradient, scaled = oracle.gradients(oracle.x, [margin, Scaled()])
    torch.testing.assert_close(scaled, 3 * gradient)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10, 100])
def test_losses_of_equal_logits_are_finite(name: str, classes: int) -> None:
    for value in (0.0, 1e4, -1e4):
        for targeted in (False, True):
            logits = torch.full((3, classes), value, requires_grad=True)
            loss = get_loss(name)(logits, torch.tensor([0, 1, 1]), targeted)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert loss.isfinite().all()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("gap", [1.0, 20.0, 200.0, 700.0])
@pytest.mark.parametrize("targeted", [False, True])
def test_cross_entropy_keeps_its_direction_when_saturated(gap: float, targeted: bool) -> None:
    """Against the gradient of cross-entropy in float64: p_k, and for the label minus the sum of
    all others, for 1 - p_label has no digits left."""
    logits = torch.tensor([[gap, 0.0, 1.0, -2.0], [0.0, gap, 0.5, 0.25]])
    labels = torch.tensor([2, 3] if targeted else [0, 1])
    expected = logits.double().softmax(1)
    expected.scatter_(1, labels[:, None], 0.0)
    expected.scatter_(1, labels[:, None], -expected.sum(1, keepdim=True))
    expected = F.normalize(expected / expected.abs().amax(1, keepdim=True), dim=1)
    expected = -expected if targeted else expected

    given = logits.clone().requires_grad_()
    (ours,) = torch.autograd.grad(cross_entropy(given, labels, targeted).sum(), given)
    assert ours.dtype == torch.float32
    ours = F.normalize(ours.double(), dim=1)
    assert torch.allclose(ours, expected, atol=1e-6)
    plain = given.clone().detach().requires_grad_()
    loss = F.cross_entropy(plain, labels, reduction="sum") * (-1 if targeted else 1)
    (lost,) = torch.autograd.grad(loss, plain)
    lost = F.normalize(lost.double(), dim=1)
    assert torch.allclose(lost, expected, atol=1e-6) == (gap == 1.0 or targeted)


def test_a_saturated_model_is_no_defense(weak: nn.Module, held_out: tuple[Tensor, Tensor]) -> None:
    """Logits times a thousand: plain float32 cross-entropy would see no gradient at all."""

    class Loud(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = weak(x)
            return logits * 1000

    x, labels = (part[:100] for part in held_out)
    threat = ThreatModel("linf", 0.1)
    for loss in LOSSES:
        attack = PGD(steps=20, loss=loss)
        plain = _strength(attack, weak, x, labels, threat)
        assert _strength(attack, Loud(), x, labels, threat) <= plain + 5


def test_unknown_loss() -> None:
    with pytest.raises(UsageError, match="did you mean 'margin'"):
        get_loss("margn")
    for kind in (PGD, FGSM):
        with pytest.raises(UsageError, match="unknown loss"):
            kind(loss="hinge")


# ------------------------------------------------------------------------------ parse_attack


def _other(field: dataclasses.Field[Any]) -> Any:
    """A value unlike the default, as far as one can be told from the default alone."""
    value = field.default
    if field.name == "loss":
        return next(name for name in LOSSES if name != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.75 if value < 1 else value * 1.25
    if value is None:
        return {"float | None": 2 / 255, "int | None": 3}.get(str(field.type))
    return value


@pytest.mark.parametrize("name", registered())
def test_labels_lead_back_to_the_attack(name: str) -> None:
    kind = registered()[name]
    others = {field.name: _other(field) for field in fields(kind)}
    for attack in (kind(), kind(**others), quick(kind), *(
        kind(**{option: value}) for option, value in others.items()
    )):  # fmt: skip
        again = parse_attack(attack.label)
        assert again == attack
        assert type(again) is kind
        assert again.label == attack.label


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(
    steps=st.integers(1, 10**6),
    step_size=st.one_of(st.none(), st.floats(1e-300, 1e300)),
    restarts=st.integers(1, 99),
    loss=st.sampled_from(sorted(LOSSES)),
    random_start=st.booleans(),
)
def test_any_pgd_survives_its_label(**options: Any) -> None:
    attack = PGD(**options)
    assert parse_attack(attack.label) == attack


@pytest.mark.parametrize(
    ("text", "attack"),
    [
        ("pgd", PGD()),
        (" pgd ", PGD()),
        ("pgd:steps=3", PGD(steps=3)),
        ("pgd:steps=3,loss=dlr", PGD(steps=3, loss="dlr")),
        ("pgd: steps = 3 , loss = dlr ", PGD(steps=3, loss="dlr")),
        ("pgd:step_size=0.5", PGD(step_size=0.5)),
        ("pgd:step_size=1e-3", PGD(step_size=1e-3)),
        ("pgd:step_size=2", PGD(step_size=2.0)),
        ("pgd:step_size=none", PGD()),
        ("pgd:step_size=None", PGD()),
        ("pgd:step_size=2/255", PGD(step_size=2 / 255)),
        ("pgd:random_start=false", PGD(random_start=False)),
        ("pgd:random_start=No", PGD(random_start=False)),
        ("pgd:random_start=0", PGD(random_start=False)),
        ("pgd:random_start=TRUE", PGD()),
        ("pgd:random_start=yes", PGD()),
        ("pgd:random_start=1", PGD()),
        ("fgsm:loss=margin", FGSM(loss="margin")),
        ("noise:draws=3", UniformNoise(draws=3)),
    ],
)
def test_texts(text: str, attack: Attack) -> None:
    parsed = parse_attack(text)
    assert parsed == attack
    assert [type(v) for v in parsed.parameters.values()] == [
        type(v) for v in attack.parameters.values()
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("pdg", "did you mean 'pgd'"),
        ("PGD", "did you mean 'pgd'"),
        ("", "unknown attack ''"),
        (":", "unknown attack ''"),
        ("pgd steps=3", "unknown attack"),
        ("pgd,steps=3", "unknown attack"),
        ("attacks.pgd", "unknown attack"),
        ("pgd:stepz=3", "did you mean 'steps'"),
        ("pgd:name=x", "unknown option"),
        ("pgd:__class__=x", "unknown option"),
        ("pgd:=3", "unknown option"),
        ("pgd:steps", "name=value"),
        ("pgd:steps=3,loss", "name=value"),
        ("pgd:steps=three", "steps as int, got 'three'"),
        ("pgd:steps=", "steps as int, got ''"),
        ("pgd:steps=3.0", "steps as int"),
        ("pgd:steps=none", "steps as int"),
        ("pgd:steps=3=4", "steps as int"),
        ("pgd:steps=3;loss=dlr", "steps as int"),
        ("pgd:steps=3:loss=dlr", "steps as int"),
        ("pgd:steps=0", "steps >= 1"),
        ("pgd:steps=-3", "steps >= 1"),
        ("pgd:restarts=0", "restarts >= 1"),
        ("noise:draws=0", "draws >= 1"),
        ("pgd:step_size=x", "step_size"),
        ("pgd:step_size=0", "step_size > 0"),
        ("pgd:step_size=-1", "step_size > 0"),
        ("pgd:step_size=nan", "step_size"),
        ("pgd:step_size=inf", "step_size"),
        ("pgd:step_size=1/0", "step_size"),
        ("pgd:random_start=maybe", "random_start as bool"),
        ("pgd:loss=cee", "did you mean 'ce'"),
        ("pgd:loss=", "unknown loss"),
        ("fgsm:steps=3", "unknown option of attack fgsm"),
        ("pgd:steps=3,steps=4", "steps"),
    ],
)
def test_texts_that_are_refused(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        parse_attack(text)


@pytest.mark.parametrize(
    "build",
    [
        lambda: PGD(steps=0),
        lambda: PGD(restarts=0),
        lambda: PGD(step_size=0.0),
        lambda: PGD(step_size=-1.0),
        lambda: PGD(step_size=math.nan),
        lambda: PGD(step_size=math.inf),
        lambda: PGD(steps=math.nan),  # type: ignore[arg-type]
        lambda: UniformNoise(draws=0),
    ],
)
def test_values_that_are_refused(build: Callable[[], Attack]) -> None:
    with pytest.raises(UsageError):
        build()


def test_at_least() -> None:
    at_least("steps", 1, 1)
    for value in (0, -1, math.nan):
        with pytest.raises(UsageError, match="expected steps >= 1"):
            at_least("steps", value, 1)
