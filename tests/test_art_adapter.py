"""Attacks of ART: they come near known optima, and are counted, seeded and judged by us."""

from __future__ import annotations

import random as python_random
from importlib.util import find_spec
from typing import Any

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacking import Watched, equal, streams
from click.testing import CliRunner
from torch import Tensor, nn

from robustann.attacks import AttackResult, engine, parse_attack, registered
from robustann.attacks.art_adapter import ART_ATTACKS, ArtAttack, parse_art
from robustann.attacks.engine import predict_logits, run
from robustann.cli.main import cli
from robustann.errors import ModelError, UsageError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel

pytestmark = [
    # ART's PGD turns tensors into arrays the way NumPy 1 did.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
]
EPS = {"linf": 0.15, "l2": 1.0, "l1": 6.0, "l0": 8.0}
QUICK = {
    "AutoConjugateGradient": "max_iter=10,nb_random_init=1",
    "AutoProjectedGradientDescent": "max_iter=10,nb_random_init=1",
    "BasicIterativeMethod": "max_iter=10",
    "BoundaryAttack": "max_iter=60,num_trial=5,sample_size=5",
    "CarliniL0Method": "max_iter=5,binary_search_steps=2",
    "CarliniL2Method": "max_iter=5,binary_search_steps=3",
    "CarliniLInfMethod": "max_iter=5,initial_const=1,largest_const=2,learning_rate=0.1",
    "ElasticNet": "max_iter=10,binary_search_steps=4,initial_const=1,learning_rate=0.1",
    "HopSkipJump": "max_iter=4,init_eval=20",
    "MomentumIterativeMethod": "max_iter=10",
    "NewtonFool": "max_iter=40",
    "PixelAttack": "th=8,max_iter=3",
    "ProjectedGradientDescent": "max_iter=10,num_random_init=1",
    "RescalingAutoConjugateGradient": "max_iter=10,nb_random_init=1",
    "SignOPTAttack": "max_iter=3,query_limit=500,num_trial=20,k=30",
    "SimBA": "freq_dim=8,attack=px",
    "SquareAttack": "max_iter=60",
    "ThresholdAttack": "th=60,max_iter=10",
    "VirtualAdversarialMethod": "max_iter=2",
    "ZooAttack": "use_resize=false,use_importance=false,nb_parallel=32,max_iter=150,"
    "learning_rate=0.1",
}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Paler digits: the edges of the pixel range are far from all of them."""
    x, labels = networks.digits()
    return x * 0.5 + 0.25, labels


@pytest.fixture(scope="module")
def linear(digits: tuple[Tensor, Tensor]) -> nn.Sequential:
    x, labels = digits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            F.cross_entropy(model(x[:1400]), labels[:1400]).backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture(scope="module")
def correct(digits: tuple[Tensor, Tensor], linear: nn.Sequential) -> tuple[Tensor, Tensor, Tensor]:
    """Correctly classified images, their labels, and their l2 distance to the decision boundary
    in closed form."""
    x, labels = digits[0][1400:], digits[1][1400:]
    right = predict_logits(linear, x).argmax(1) == labels
    x, labels = x[right], labels[right]
    layer = linear[1]
    assert isinstance(layer, nn.Linear)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    logits = x.flatten(1).double() @ weight.T + bias
    gap = logits.gather(1, labels[:, None]) - logits
    slope = (weight[labels][:, None] - weight[None]).norm(dim=2)
    distance = (gap / slope).scatter(1, labels[:, None], torch.inf).amin(1)
    return x, labels, distance


# ----------------------------------------------------------------------------- known optima


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        ("art:HopSkipJump:max_iter=12,init_eval=100", 1.6),
        ("art:DeepFool", 1.01),
        ("art:CarliniL2Method:max_iter=20,binary_search_steps=3,initial_const=1", 1.5),
        ("art:BoundaryAttack:max_iter=80", 1.8),
        ("art:SignOPTAttack:max_iter=5,query_limit=500,num_trial=20", 1.6),
    ],
)
def test_distance_is_near_the_closed_form(
    text: str, factor: float, linear: nn.Module, correct: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, labels, optimum = (part[:6] for part in correct)
    attack = parse_attack(text)
    threat = ThreatModel("l2", 0.3)
    result = run(attack, linear, x, labels, threat, random=streams(6))
    assert bool((result.prediction != labels).all())
    assert bool((result.distance > optimum * (1 - 1e-4)).all())
    assert bool((result.distance < optimum * factor).all())
    assert torch.equal(result.success, result.distance <= 0.3)
    assert 0 < int(result.success.sum()) < 6
    assert torch.equal(predict_logits(linear, result.adversarial).argmax(1), result.prediction)


def test_pgd_breaks_what_can_be_broken(
    linear: nn.Module, correct: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, labels, optimum = (part[:40] for part in correct)
    eps = float(optimum.median())
    attack = parse_attack("art:ProjectedGradientDescent:max_iter=15")
    result = run(attack, linear, x, labels, ThreatModel("l2", eps), random=streams(40))
    assert float(result.distance.max()) <= eps
    assert not result.success[optimum > eps].any()
    assert bool(result.success[optimum < 0.85 * eps].all())


# -------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("kind", ART_ATTACKS)
def test_each_attack_breaks_something_and_is_judged_here(
    kind: str, linear: nn.Module, correct: tuple[Tensor, Tensor, Tensor]
) -> None:
    if kind == "AutoAttack" and find_spec("multiprocess") is None:
        pytest.skip("ART's AutoAttack needs multiprocess, which ART does not require")
    rows = correct[2].argsort()[:3]
    x, labels = correct[0][rows], correct[1][rows]
    attack = parse_art(f"{kind}:{QUICK.get(kind, '')}")
    norm: Any = max(attack.norms)
    threat = ThreatModel(norm, EPS[norm])
    result = run(attack, linear, x, labels, threat, random=streams(3))
    assert torch.allclose(result.distance, threat.distance(result.adversarial, x))
    assert float(result.adversarial.min()) >= 0
    assert float(result.adversarial.max()) <= 1
    predicted = predict_logits(linear, result.adversarial).argmax(1)
    assert torch.equal(result.prediction, predicted)
    within = result.distance <= threat.eps
    assert torch.equal(result.success, (predicted != labels) & within)
    assert bool((predicted != labels).any())
    if not attack.minimum_norm:
        assert bool(within.all())
    if attack.access != "white-box":
        assert result.backwards.tolist() == [0, 0, 0]
    else:
        assert bool((result.backwards > 0).all())
    assert bool((result.forwards >= 4).all())
    assert attack.paper.startswith("https://")
    assert min(attack.cost) >= 0


@pytest.mark.parametrize(
    "text",
    [
        "art:HopSkipJump:max_iter=3,init_eval=20",
        "art:DeepFool:max_iter=5",
        "art:ProjectedGradientDescent:max_iter=4,num_random_init=2",
    ],
)
def test_counts_are_what_the_model_saw(
    text: str,
    linear: nn.Module,
    correct: tuple[Tensor, Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without the engine's padding, what is counted and what is seen is the same.
    monkeypatch.setattr(engine, "ALIGNMENT", 1)
    x, labels = correct[0][:5], correct[1][:5]
    model = Watched(linear)
    attack = parse_attack(text)
    (norm,) = attack.norms & {"l2"}
    threat = ThreatModel(norm, 0.5)  # type: ignore[arg-type]
    result = run(attack, model, x, labels, threat, random=streams(5))
    assert int(result.forwards.sum()) == model.forwards
    assert int(result.backwards.sum()) == model.backwards
    for row in range(5):
        alone = Watched(linear)
        random = SampleRandom.create(0, torch.tensor([row]))
        run(attack, alone, x[[row]], labels[[row]], threat, random=random)
        assert int(result.forwards[row]) == alone.forwards
        assert int(result.backwards[row]) == alone.backwards


def test_queries_of_a_randomised_model_are_counted_by_draw(
    linear: nn.Module, correct: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, labels = correct[0][:2], correct[1][:2]
    attack = parse_attack("art:ProjectedGradientDescent:max_iter=4")
    threat = ThreatModel("l2", 0.01)
    one = run(attack, linear, x, labels, threat, random=streams(2))
    three = run(attack, linear, x, labels, threat, random=streams(2), draws=3)
    assert torch.equal(three.forwards, one.forwards * 3)
    assert torch.equal(three.backwards, one.backwards * 3)


@pytest.mark.parametrize(
    "text",
    [
        "art:HopSkipJump:max_iter=2,init_eval=20",
        "art:BoundaryAttack:max_iter=10,num_trial=3,sample_size=3",
        "art:ProjectedGradientDescent:max_iter=3,num_random_init=1",
        "art:SquareAttack:max_iter=20",
    ],
)
def test_repeatable_whatever_the_batch_and_the_global_random_state(
    text: str, linear: nn.Module, correct: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, labels = correct[0][:7], correct[1][:7]
    attack = parse_attack(text)
    threat = ThreatModel("l2", 0.3)
    np.random.seed(1)
    first = run(attack, linear, x, labels, threat, random=streams(7))
    np.random.seed(2)
    python_random.seed(2)
    states = np.random.get_state()[1].tolist(), python_random.getstate(), torch.get_rng_state()
    own = np.random.RandomState
    parts = [
        run(attack, linear, x[rows], labels[rows], threat, random=SampleRandom.create(0, rows))
        for rows in (torch.tensor([0, 1]), torch.tensor([2]), torch.arange(3, 7))
    ]
    assert equal(AttackResult.concatenate(parts), first)
    assert np.random.get_state()[1].tolist() == states[0]
    assert python_random.getstate() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert np.random.RandomState is own
    other = run(attack, linear, x, labels, threat, random=streams(7, seed=1))
    assert not torch.equal(other.adversarial, first.adversarial)


def test_the_model_is_left_alone_and_nothing_is_printed(
    linear: nn.Module,
    correct: tuple[Tensor, Tensor, Tensor],
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = nn.Sequential(linear, nn.Dropout(0.5)).train()
    linear.eval()
    x, labels = correct[0][:2], correct[1][:2]
    for text in ("art:HopSkipJump:max_iter=1,init_eval=10", "art:DeepFool:max_iter=2"):
        run(parse_attack(text), model, x, labels, ThreatModel("l2", 0.5), random=streams(2))
    assert model.training
    assert model[1].training
    assert not linear.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert capfd.readouterr() == ("", "")


def test_what_is_wrong_already_is_not_attacked(
    linear: nn.Module, correct: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, labels = correct[0][:4], (correct[1][:4] + 1) % 10
    attack = parse_attack("art:HopSkipJump")
    result = run(attack, linear, x, labels, ThreatModel("l2", 0.5), random=streams(4))
    assert bool(result.success.all())
    assert torch.equal(result.adversarial, x)
    # The clean look and the verification: ART itself was not asked, nothing proposed.
    assert result.forwards.tolist() == [2] * 4


@pytest.mark.parametrize(
    "text", ["art:HopSkipJump:max_iter=3,init_eval=20", "art:SaliencyMapMethod"]
)
def test_targeted(text: str, linear: nn.Module, correct: tuple[Tensor, Tensor, Tensor]) -> None:
    x, wanted = correct[0][:3], (correct[1][:3] + 1) % 10
    attack = parse_attack(text)
    norm: Any = max(attack.norms - {"linf"})
    threat = ThreatModel(norm, 64, targeted=True)
    result = run(attack, linear, x, wanted, threat, random=streams(3))
    assert result.prediction.tolist() == wanted.tolist()
    assert bool(result.success.all())


def test_nothing_is_allowed_at_eps_0(
    linear: nn.Module, correct: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, labels = correct[0][:2], correct[1][:2]
    attack = parse_attack("art:ProjectedGradientDescent")
    result = run(attack, linear, x, labels, ThreatModel("linf", 0), random=streams(2))
    assert torch.equal(result.adversarial, x)
    assert not result.success.any()


# ---------------------------------------------------------------------------- names, errors


def test_names_and_options() -> None:
    attack = parse_attack("art:hopskipjump:max_iter=10,max_eval=1000")
    assert attack == ArtAttack(kind="HopSkipJump", options={"max_iter": 10, "max_eval": 1000})
    assert attack.name == "art:HopSkipJump"
    assert attack.label == "art:HopSkipJump:max_iter=10,max_eval=1000"
    assert parse_attack(attack.label) == attack
    assert hash(attack) == hash(parse_attack(attack.label))
    assert attack.parameters == {"max_iter": 10, "max_eval": 1000}
    assert (attack.access, attack.minimum_norm, attack.iterations) == ("decision", True, 1)
    assert parse_art("ElasticNet:decision_rule=L1,beta=1/100").parameters == {
        "decision_rule": "L1",
        "beta": 0.01,
    }
    assert parse_art("ZooAttack:abort_early=False").parameters == {"abort_early": False}
    assert parse_art("CarliniL0Method:mask=none").parameters == {"mask": None}
    # A family of attacks, not one: the contract tests have their own list of it.
    assert "art" not in registered()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("art:HopSkipJmp", "did you mean 'art:HopSkipJump'"),
        ("art:boundary", "did you mean 'art:BoundaryAttack'"),
        ("art:", "unknown attack 'art:'"),
        ("art:AdversarialPatch", "unknown attack 'art:AdversarialPatch'"),
        ("art:HopSkipJump:max_itr=3", "did you mean 'max_iter'"),
        ("art:HopSkipJump:norm=2", "other than norm"),
        ("art:HopSkipJump:max_iter", "name=value"),
        ("art:HopSkipJump:max_iter=many", "finite number"),
        ("art:ZooAttack:abort_early=3", "true or false"),
    ],
)
def test_unfit_text(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_attack(text)


def test_unfit_use(linear: nn.Module, correct: tuple[Tensor, Tensor, Tensor]) -> None:
    x, labels = correct[0][:1], correct[1][:1]
    l2 = ThreatModel("l2", 0.5)
    with pytest.raises(UsageError, match="norms of art:DeepFool"):
        parse_attack("art:DeepFool").check(ThreatModel("linf", 0.1))
    for kind in ("DeepFool", "SignOPTAttack"):
        with pytest.raises(UsageError, match="untargeted"):
            parse_attack(f"art:{kind}").check(ThreatModel("l2", 0.5, targeted=True))
    with pytest.raises(UsageError, match="ART's HopSkipJump failed"):
        run(parse_attack("art:HopSkipJump:max_iter=-1"), linear, x, labels, l2, random=streams(1))
    if find_spec("cma") is None:
        pixels = parse_attack("art:PixelAttack:es=0")
        with pytest.raises(UsageError, match="needs the package cma"):
            run(pixels, linear, x, labels, ThreatModel("l0", 4), random=streams(1))

    class Rounded(nn.Module):
        @torch.no_grad()
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = linear(images)
            return logits

    with pytest.raises(ModelError, match="carries no gradient"):
        run(parse_attack("art:DeepFool"), Rounded(), x, labels, l2, random=streams(1))
    hop = parse_attack("art:HopSkipJump:max_iter=1,init_eval=5")
    assert run(hop, Rounded(), x, labels, l2, random=streams(1)).prediction != labels


def test_the_list_names_them() -> None:
    shown = CliRunner().invoke(cli, ["list", "attacks"])
    assert shown.exit_code == 0
    assert "art:NAME" in shown.output
    assert "art:HopSkipJump" in shown.output
