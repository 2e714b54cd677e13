"""APGD and MI-FGSM: known optima, their schedules, and torchattacks with the same effort."""

from __future__ import annotations

import math
import warnings
from typing import Any

import networks
import pytest
import torch
from attacking import centred, equal, generator, some, streams
from torch import Tensor, nn

from robustann.attacks import PGD, Attack, AttackResult, parse_attack
from robustann.attacks.apgd import APGD, _l1_period, _sparse, checkpoints
from robustann.attacks.engine import craft, predict_logits, run
from robustann.attacks.losses import dlr
from robustann.attacks.mifgsm import MIFGSM
from robustann.attacks.ranking import lead, runner_up
from robustann.errors import UsageError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel

NORMS = ["linf", "l2", "l1"]


def _reference_fall(w: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """How far ``w @ z`` can fall below ``w @ x`` over the ball cut by the box (N,), in float64."""
    w, x = w.double(), x.double()
    room = torch.where(w > 0, x, 1 - x)
    slope = w.abs()
    if norm == "linf":
        return (slope * room.clamp(max=eps)).sum(1)
    if norm == "l1":
        order = slope.argsort(dim=1, descending=True)
        spent = room.gather(1, order).cumsum(1).clamp(max=eps)
        return (spent.diff(dim=1, prepend=torch.zeros(len(x), 1)) * slope.gather(1, order)).sum(1)
    # l2: as far along the slopes as the length allows, stopped by the box; found by bisection.
    low, high = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 1e9).double()
    for _ in range(200):
        middle = (low + high) / 2
        long = torch.minimum(slope * middle, room).norm(dim=1, keepdim=True) > eps
        low, high = torch.where(long, low, middle), torch.where(long, middle, high)
    return (torch.minimum(slope * low, room) * slope).sum(1)


def pair_optimum(
    model: nn.Sequential, x: Tensor, labels: Tensor, rival: Tensor, threat: ThreatModel
) -> tuple[Tensor, Tensor]:
    """The least margin over one rival class that the threat model allows, and the clean one."""
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    w, b = weight[labels] - weight[rival], bias[labels] - bias[rival]
    clean = (x.flatten(1).double() * w).sum(1) + b
    return clean - _reference_fall(w, x.flatten(1), threat.norm, threat.eps), clean


def optimum(
    model: nn.Sequential, x: Tensor, labels: Tensor, threat: ThreatModel
) -> tuple[Tensor, Tensor]:
    """The least margin over all rivals, and the clean margin."""
    pairs = []
    for k in range(int(predict_logits(model, x[:1]).shape[1])):
        least, clean = pair_optimum(model, x, labels, torch.full_like(labels, k), threat)
        own = labels == k
        pairs.append((least.masked_fill(own, math.inf), clean.masked_fill(own, math.inf)))
    least, clean = (torch.stack(part).amin(0) for part in zip(*pairs, strict=True))
    return least, clean


# Half of the images of a two-class linear model with 48 entries can fall at these radii.
EPS = {"linf": 0.05, "l2": 0.4, "l1": 0.6}


# ------------------------------------------------------------------------------- known optima


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_optimum_of_two_classes(norm: Any, loss: str) -> None:
    """Where an image stands, the best margin is the least one of ball and box."""
    model = centred((1, 6, 8), 2)
    x, labels = some(model, 120, (1, 6, 8))
    threat = ThreatModel(norm, EPS[norm])
    worst, clean = optimum(model, x, labels, threat)
    fall = clean - worst
    assert 20 < int((worst < 0).sum()) < 100
    result = run(APGD(loss=loss), model, x, labels, threat, random=streams(120))
    clear = worst.abs() > 0.005 * fall
    assert torch.equal(result.success[clear], (worst < 0)[clear])
    missing = (result.margin.double() - worst)[~result.success] / fall[~result.success]
    assert float(missing.min()) > -1e-5
    assert float(missing.max()) < 0.005
    assert int(clear.sum()) > 110


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("norm", NORMS)
def test_the_optimum_of_many_classes_by_targets(norm: Any, classes: int) -> None:
    """One run for each runner-up: the best of them is the optimum over all classes."""
    model = centred((3, 4, 4), classes)
    x, labels = some(model, 40, (3, 4, 4))
    threat = ThreatModel(norm, EPS[norm])
    worst, clean = optimum(model, x, labels, threat)
    margins, fallen = [], torch.zeros(40, dtype=torch.bool)
    for k in range(1, classes):
        attack = APGD(targets=k, loss="margin", steps=60)
        result = run(attack, model, x, labels, threat, random=streams(40))
        margins.append(result.margin.double())
        fallen |= result.success
    clear = worst.abs() > 0.01 * (clean - worst)
    assert torch.equal(fallen[clear], (worst < 0)[clear])
    least = torch.stack(margins).amin(0)[~fallen]
    assert bool((least >= worst[~fallen] - 1e-4).all())
    assert float(((least - worst[~fallen]) / (clean - worst)[~fallen]).max()) < 0.01


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_a_target_is_the_runner_up_that_was_named(classes: int, norm: Any, loss: str) -> None:
    """The last image is where the wanted class leads the label by nearly as much as can be."""
    model = centred((1, 5, 7), classes)
    x, labels = some(model, 16, (1, 5, 7))
    rival = runner_up(predict_logits(model, x), labels, 2)
    expected = predict_logits(model, x).argsort(1, descending=True)[:, min(2, classes - 1)]
    assert torch.equal(rival, expected)
    threat = ThreatModel(norm, EPS[norm] / 3)
    worst, clean = pair_optimum(model, x, labels, rival, threat)
    attack = APGD(targets=2, loss=loss, steps=100)
    crafted = craft(attack, model, x, labels, threat, random=streams(16))
    gap = -lead(predict_logits(model, crafted), labels, rival).double()
    assert bool((gap >= worst - 1e-4).all())
    if loss == "margin":
        # The last step is no longer small in l1; the other losses also weigh other classes.
        slack = 0.15 if norm == "l1" else 0.03
        assert float(((gap - worst) / (clean - worst)).max()) < slack
    else:
        assert float((gap - clean).mean()) < 0


@pytest.mark.parametrize("shape", [(1, 5, 9), (3, 4, 7), (4, 1, 6)])
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("attack", [APGD(steps=8), APGD(steps=8, targets=1), MIFGSM()])
def test_shapes(attack: Attack, count: int, shape: tuple[int, int, int]) -> None:
    model = centred(shape, 4)
    x, labels = some(model, count, shape)
    for norm in sorted(attack.norms):
        threat = ThreatModel(norm, 0.2)  # type: ignore[arg-type]
        result = run(attack, model, x, labels, threat, random=streams(count))
        assert result.adversarial.shape == x.shape
        assert bool((threat.distance(result.adversarial, x) <= 0.2).all())


# ----------------------------------------------------------------------------- the schedules


def test_checkpoints() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1000) == [220, 410, 570, 700, 800, 870, 930, 990]
    assert checkpoints(5) == [2, 3, 4, 5]
    assert checkpoints(1) == [1]
    assert [_l1_period(steps) for steps in (1, 10, 25, 26, 100)] == [1, 1, 1, 2, 4]


class Recording(nn.Module):
    """Keeps every image that it is shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        logits: Tensor = self.model(x)
        return logits


class Bowl(nn.Module):
    """Two classes; what is maximised is minus the squared distance to a point within the ball."""

    def __init__(self, goal: Tensor) -> None:
        super().__init__()
        self.register_buffer("goal", goal)

    def forward(self, x: Tensor) -> Tensor:
        away = (x - self.goal).flatten(1).square().sum(1)
        return torch.stack([10 + away, torch.zeros_like(away)], dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_step_shrinks_onto_an_optimum_inside(norm: Any) -> None:
    """With a fixed step of 2 * eps nothing comes near; halving it is what does."""
    x = torch.full((8, 1, 4, 4), 0.5)
    goal = 0.5 + 0.1 * (torch.rand(1, 4, 4, generator=generator()) - 0.5)
    threat = ThreatModel(norm, 0.2)
    labels = torch.zeros(8, dtype=torch.int64)
    found = run(APGD(loss="margin"), Bowl(goal), x, labels, threat, random=streams(8))
    assert float((found.margin - 10).max()) < 1e-3
    model = Recording(Bowl(goal))
    run(APGD(loss="margin"), model, x, labels, threat, random=streams(8))
    jumps = [
        float((b - a).flatten(1).norm(dim=1).mean())
        for a, b in zip(model.seen[1:], model.seen[2:], strict=False)
    ]
    assert sum(jumps[90:98]) < 0.1 * sum(jumps[1:9])


def _reference_rows(
    goal: Tensor, x: Tensor, start: Tensor, threat: ThreatModel, steps: int
) -> list[Tensor]:
    """Algorithm 1 of the paper for one image, written out with floats and lists."""

    def value(z: Tensor) -> float:
        return -10 - float((z - goal).square().sum())

    def gradient(z: Tensor) -> Tensor:
        return -2 * (z - goal)

    def ascend(z: Tensor, size: float) -> Tensor:
        g = gradient(z)
        unit = g.sign() if threat.norm == "linf" else g / g.norm()
        return threat.project(z + size * unit, x)

    size, points, values = 2 * threat.eps, [start], [value(start)]
    current, before, now = start, start, values[0]
    best, best_value = start, values[0]
    rises, mark, kept, last = 0, best_value, True, 0
    for k in range(steps):
        if k in checkpoints(steps):
            halve = rises < 0.75 * (k - last) or (kept and best_value == mark)
            if halve:
                size, current, now = size / 2, best, best_value
            rises, mark, kept, last = 0, best_value, not halve, k
        z = ascend(current, size)
        if k:
            z = threat.project(current + 0.75 * (z - current) + 0.25 * (current - before), x)
        before, current = current, z
        points.append(z)
        rises += value(z) > now
        now = value(z)
        if now > best_value:
            best, best_value = z, now
    return points


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_path_is_the_papers(norm: Any) -> None:
    """Every image that the model is shown, against the algorithm written out for one image."""
    shape = (1, 3, 3)
    x = torch.full((1, *shape), 0.5)
    goal = 0.5 + 0.15 * (torch.rand(shape, generator=generator(3)) - 0.5)
    threat = ThreatModel(norm, 0.2)
    model = Recording(Bowl(goal))
    labels = torch.zeros(1, dtype=torch.int64)
    run(
        APGD(loss="margin", steps=30), model, x, labels, threat, random=streams(1),
        known_correct=True,
    )  # fmt: skip
    path = [seen[:1] for seen in model.seen]
    expected = _reference_rows(goal, x, path[0], threat, 30)
    assert len(path) == len(expected) == 31
    for seen, wanted in zip(path, expected, strict=True):
        assert torch.allclose(seen, wanted, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_start_lies_on_the_sphere(norm: Any) -> None:
    x = torch.full((8, 1, 4, 4), 0.5)
    model = Recording(centred((1, 4, 4), 2))
    threat = ThreatModel(norm, 0.1)
    labels = predict_logits(model, x).argmax(1)
    model.seen.clear()
    run(APGD(steps=2), model, x, labels, threat, random=streams(8), known_correct=True)
    assert threat.distance(model.seen[0], x).tolist() == pytest.approx([0.1] * 8, rel=1e-5)


def test_an_l1_step_moves_the_largest_entries() -> None:
    gradient = torch.tensor([[3.0, -2.0, 0.5, 1.0], [0.0, 0.0, -1.0, 0.0]]).view(2, 1, 2, 2)
    step = _sparse(gradient, torch.tensor([2.9, 3.0])).flatten(1)
    assert step.tolist() == [[0.5, -0.5, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0]]
    assert _sparse(gradient, torch.tensor([0.0, 99.0])).flatten(1)[0].tolist() == [1, 0, 0, 0]
    assert not _sparse(torch.zeros(1, 1, 2, 2), torch.tensor([2.0])).any()


# --------------------------------------------------------------------------------- the losses


def test_the_targeted_ratio_by_hand() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 1.0, 0.0]])
    attack, labels = APGD(targets=3, loss="dlr"), torch.tensor([0])
    state = {"wanted": runner_up(logits, labels, 3)}
    assert state["wanted"].tolist() == [3]
    loss = attack._loss(state)(logits, labels, False)
    assert float(loss) == pytest.approx((1 - 5) / (5 - (3 + 1) / 2))
    # Like the untargeted ratio, it has no scale; with four classes it is the plain difference.
    assert torch.allclose(attack._loss(state)(logits * 7, labels, False), loss)
    assert float(attack._loss(state)(logits[:, :4], labels, False)) == -4
    assert float(APGD(targets=3, loss="margin")._loss(state)(logits, labels, False)) == -4
    odds = logits[0, 3] - torch.cat([logits[0, :3], logits[0, 4:]]).logsumexp(0)
    assert float(APGD(targets=3)._loss(state)(logits, labels, False)) == pytest.approx(float(odds))
    assert APGD(loss="dlr")._loss({}) is dlr


def test_runner_up() -> None:
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.0], [9.0, 1.0, 3.0, 2.0]])
    labels = torch.tensor([1, 3])
    assert runner_up(logits, labels, 1).tolist() == [2, 0]
    assert runner_up(logits, labels, 3).tolist() == [0, 1]
    assert runner_up(logits, labels, 9).tolist() == [0, 1]
    assert lead(logits, labels, torch.tensor([2, 0])).tolist() == [-1, 7]


# ------------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network, and what it gets right of the digits held out."""
    x, labels = networks.digits()
    model = networks.convolutional()
    x, labels = x[-200:], labels[-200:]
    right = predict_logits(model, x).argmax(1) == labels
    assert float(right.double().mean()) > 0.85
    return model, x[right], labels[right]


DIGITS_EPS = {"linf": 0.08, "l2": 0.5, "l1": 2.0}


def standing(
    attacks: list[Attack], digits: tuple[nn.Module, Tensor, Tensor], threat: ThreatModel
) -> int:
    """How many stand after all of these attacks."""
    model, x, labels = digits
    left = torch.ones(len(x), dtype=torch.bool)
    for attack in attacks:
        result = run(attack, model, x, labels, threat, random=streams(len(x)), known_correct=True)
        left &= ~result.success
    return int(left.sum())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_breaks_no_less_than_pgd(norm: Any, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    threat = ThreatModel(norm, DIGITS_EPS[norm])
    for loss in ("ce", "margin", "dlr"):
        apgd = standing([APGD(loss=loss)], trained, threat)
        pgd = standing([PGD(steps=100, loss=loss)], trained, threat)
        assert 0.02 < pgd / len(trained[1]) < 0.98, "such an eps tells nothing"
        assert apgd <= pgd


def test_it_keeps_up_with_pgd_in_l1(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    """PGD moves one pixel of these 64 at a time, the best choice for so small an image."""
    threat = ThreatModel("l1", DIGITS_EPS["l1"])
    apgd = standing([APGD(restarts=2)], trained, threat)
    pgd = standing([PGD(steps=100, restarts=2)], trained, threat)
    assert 0.02 < pgd / len(trained[1]) < 0.98, "such an eps tells nothing"
    assert apgd <= pgd + 3


@pytest.mark.parametrize("norm", NORMS)
def test_all_targets_break_more_than_one(
    norm: Any, trained: tuple[nn.Module, Tensor, Tensor]
) -> None:
    threat = ThreatModel(norm, DIGITS_EPS[norm])
    targeted: list[Attack] = [APGD(targets=k, loss="dlr", steps=20) for k in range(1, 10)]
    every = standing(targeted, trained, threat)
    assert every <= standing([APGD(loss="dlr")], trained, threat)
    assert every < standing(targeted[-1:], trained, threat)


def _reference_standing(
    name: str, digits: tuple[nn.Module, Tensor, Tensor], threat: ThreatModel, **settings: Any
) -> int:
    """How many stand after torchattacks; images a little outside are brought back first."""
    model, x, labels = digits
    with warnings.catch_warnings():
        # Its import touches deprecated names of other packages.
        warnings.simplefilter("ignore")
        torchattacks = pytest.importorskip("torchattacks")
        spelled = {"linf": "Linf", "l2": "L2"}[threat.norm]
        attack = getattr(torchattacks, name)(model, norm=spelled, eps=threat.eps, **settings)
        with torch.random.fork_rng(devices=[]):
            x_adv = attack(x, labels).detach()
    model.eval()
    return int((predict_logits(model, threat.project(x_adv, x)).argmax(1) == labels).sum())


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_against_torchattacks(
    norm: Any, loss: str, trained: tuple[nn.Module, Tensor, Tensor]
) -> None:
    """Reference: torchattacks.APGD. Which image falls from which random start is luck on both
    sides, so the sum over three radii and three seeds counts, with one image of grace in each."""
    ours = theirs = 0
    model, x, labels = trained
    for factor in (0.8, 1.0, 1.3):
        threat = ThreatModel(norm, DIGITS_EPS[norm] * factor)
        for seed in range(3):
            random, attack = streams(len(x), seed), APGD(loss=loss, steps=30)
            ours += int((~run(attack, model, x, labels, threat, random=random).success).sum())
            theirs += _reference_standing("APGD", trained, threat, steps=30, loss=loss, seed=seed)
    assert 0.1 < theirs / (9 * len(x)) < 0.9, "such an eps tells nothing"
    assert ours <= theirs + 9


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_t_against_torchattacks(norm: Any, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Reference: torchattacks.APGDT, nine targets."""
    threat = ThreatModel(norm, DIGITS_EPS[norm])
    ours = standing([APGD(targets=k, loss="dlr", steps=20) for k in range(1, 10)], trained, threat)
    theirs = _reference_standing("APGDT", trained, threat, steps=20)
    assert 0.02 < theirs / len(trained[1]) < 0.98, "such an eps tells nothing"
    assert ours <= theirs + 1


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_mifgsm_against_torchattacks(
    decay: float, trained: tuple[nn.Module, Tensor, Tensor]
) -> None:
    """Reference: torchattacks.MIFGSM, linf; both start at the image, so they go the same way."""
    model, x, labels = trained
    threat = ThreatModel("linf", DIGITS_EPS["linf"])
    with warnings.catch_warnings():
        # Its import touches deprecated names of other packages.
        warnings.simplefilter("ignore")
        torchattacks = pytest.importorskip("torchattacks")
        theirs = torchattacks.MIFGSM(
            model, eps=threat.eps, alpha=threat.eps / 10, steps=10, decay=decay
        )(x, labels)
    model.eval()
    ours = craft(MIFGSM(decay=decay), model, x, labels, threat, random=streams(len(x)))
    # The log-odds and cross-entropy agree in direction; a gradient near zero may round elsewhere.
    assert float(((ours - theirs).abs() < 1e-5).double().mean()) > 0.99


def test_mifgsm_in_l2(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    threat = ThreatModel("l2", DIGITS_EPS["l2"])
    one = standing([MIFGSM(steps=1)], trained, threat)
    assert standing([MIFGSM()], trained, threat) < one < len(trained[1])


# ----------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "attack", [APGD(steps=15, restarts=2), APGD(steps=15, targets=2, loss="dlr")]
)
def test_the_batch_does_not_matter(
    attack: Attack, norm: Any, trained: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, x, labels = trained[0], trained[1][:16], trained[2][:16]
    threat = ThreatModel(norm, DIGITS_EPS[norm] / 2)
    whole = run(attack, model, x, labels, threat, random=streams(16))
    assert int(whole.success.sum()) > 0
    for size in (1, 7):
        parts = [
            run(attack, model, x[rows], labels[rows], threat, random=SampleRandom.create(0, rows))
            for rows in torch.arange(16).split(size)  # type: ignore[no-untyped-call]
        ]
        assert equal(AttackResult.concatenate(parts), whole)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "attack", [APGD(steps=9), APGD(steps=9, restarts=3, targets=1), MIFGSM(steps=4)]
)
def test_what_stands_pays_the_cost(attack: Attack, norm: Any) -> None:
    if norm not in attack.norms:
        return
    model = centred((1, 4, 4), 3)
    x, labels = some(model, 11, (1, 4, 4))
    threat = ThreatModel(norm, 0)
    result = run(attack, model, x, labels, threat, random=streams(11), known_correct=True)
    forwards, backwards = attack.cost
    assert result.forwards.tolist() == [forwards] * 11
    assert result.backwards.tolist() == [backwards] * 11
    assert torch.equal(result.adversarial, x)


@pytest.mark.parametrize("norm", NORMS)
def test_a_targeted_threat(norm: Any, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, labels = trained[0], trained[1][:30], trained[2][:30]
    threat = ThreatModel(norm, 3 * DIGITS_EPS[norm], targeted=True)
    wanted = (labels + 1) % 10
    for loss in ("ce", "margin", "dlr"):
        result = run(APGD(loss=loss), model, x, wanted, threat, random=streams(30))
        assert torch.equal(predict_logits(model, result.adversarial).argmax(1) == wanted,
                           result.success)  # fmt: skip
        assert int(result.success.sum()) > 15


class Holes(nn.Module):
    """NaN in some places, infinite in others."""

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1)[:, :3] * 10
        z = torch.where(z.sum(1, keepdim=True) > 15.2, z * math.nan, z)
        return torch.where(z.sum(1, keepdim=True) < 14.8, z * math.inf, z)


@pytest.mark.parametrize("norm", NORMS)
def test_holes_in_the_model_are_survived(norm: Any) -> None:
    x = torch.full((5, 1, 2, 2), 0.5)
    x[:, :, 0, 0] += 1e-3
    labels = torch.zeros(5, dtype=torch.int64)
    result = run(APGD(steps=12), Holes(), x, labels, ThreatModel(norm, 0.1), random=streams(5))
    assert bool(result.adversarial.isfinite().all())


def test_options() -> None:
    assert parse_attack("apgd:targets=3,loss=dlr") == APGD(targets=3, loss="dlr")
    assert parse_attack("mifgsm:decay=0.5") == MIFGSM(decay=0.5)
    for wrong in (
        {"steps": 0}, {"restarts": 0}, {"targets": -1}, {"rho": 1.5}, {"rho": math.nan},
        {"loss": "x"},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            APGD(**wrong)
    for wrong in ({"steps": 0}, {"decay": -0.1}, {"decay": math.nan}, {"loss": "x"}):
        with pytest.raises(UsageError):
            MIFGSM(**wrong)
    with pytest.raises(UsageError, match="already name the wanted"):
        APGD(targets=1).check(ThreatModel("linf", 0.1, targeted=True))
    with pytest.raises(UsageError, match="got l0"):
        APGD().check(ThreatModel("l0", 3))
