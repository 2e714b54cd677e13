"""Bounds in linf: against closed forms, random images, attacks, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import robustann as ra
from robustann.attacks import MM, PGD
from robustann.attacks.engine import run
from robustann.certificates import certify_linf, crossed, interval_bounds, margin_bounds
from robustann.errors import DataError, ModelError, UsageError
from robustann.models import create_model
from robustann.models.blocks import head, stage
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel

METHODS = ("ibp", "crown")


def linear(features: int = 12, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes))


def images(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def residual(pool: nn.Module) -> nn.Sequential:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *stage(4, 6, 2, 2), pool, head(6, 3))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net.eval()


class Own(nn.Module):
    """Code of its own: constants, a branch, leaky and plain activations, functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1, groups=1)
        self.leaky = nn.LeakyReLU(0.2)
        self.side = nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(4, 3)
        self.register_buffer("mean", torch.tensor([0.3]))

    def forward(self, x):
        x = (x - self.mean[:, None, None]) / 0.5
        x = self.leaky(self.conv(x))
        out = F.relu(self.side(x))
        out += x
        out = 1.5 - out * 2
        x = out.mean([2, 3]) + torch.flatten(F.adaptive_avg_pool2d(out, 1), 1)
        return self.last(x.view(x.size(0), -1))


NETS = {
    "mlp": nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)),
    "max": residual(nn.MaxPool2d(3, 1, padding=1)),
    "avg": residual(nn.AvgPool2d(2)),
    "own": Own(),
    "small-cnn": create_model(
        "small-cnn", class_names=["a", "b", "c"], shape=(1, 8, 8), mean=[0.2], std=[0.3], seed=0
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_models_margin_is_exact(method):
    """min over the ball of w.x + b is w.x + b - eps * |w|_1, where the box does not cut it."""
    model, x, labels = linear(), 0.3 + 0.4 * images(9, 1, 3, 4), torch.arange(9) % 4
    eps = 0.2
    weight, bias = model[1].weight.detach().double(), model[1].bias.detach().double()
    rows = weight[labels][:, None] - weight
    values = (rows * x.double().flatten(1)[:, None]).sum(2) + bias[labels][:, None] - bias
    exact = values - eps * rows.abs().sum(2)
    wide = x.double()
    found = margin_bounds(model.double(), wide - eps, wide + eps, labels, rounding=False)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    bound = certify_linf(model.float(), x, labels, ThreatModel("linf", eps), method=method).margin
    least = exact.scatter(1, labels[:, None], torch.inf).amin(1)
    assert bool((bound < least).all())
    torch.testing.assert_close(bound, least, rtol=0, atol=2e-5)


def test_the_box_of_images_cuts_the_ball():
    """At the edge of the box no attacker may go on: a black image can only get brighter."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    model[1].weight.data = torch.tensor([[1.0], [-1.0]])
    found = certify_linf(model, torch.zeros(1, 1, 1, 1), torch.tensor([0]), ThreatModel("linf", 1))
    assert found.margin.item() == pytest.approx(0.0, abs=1e-5)
    found = certify_linf(model, torch.ones(1, 1, 1, 1), torch.tensor([0]), ThreatModel("linf", 0.5))
    assert found.margin.item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_relu_by_hand(method):
    """relu(x) - 0.1 on x in [-0.5, 0.5], hidden by a shift: its least value is -0.1, exactly."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    for layer, weight, bias in ((1, [[1.0]], [-0.5]), (3, [[1.0], [0.0]], [-0.1, 0.0])):
        model[layer].weight.data = torch.tensor(weight)
        model[layer].bias.data = torch.tensor(bias)
    x, label = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    margin = certify_linf(model, x, label, ThreatModel("linf", 0.5), method=method).margin
    assert margin.item() == pytest.approx(-0.1, abs=1e-6)
    low, high = interval_bounds(model, x - 0.5, x + 0.5)
    assert low.flatten().tolist() == pytest.approx([-0.1, 0.0], abs=1e-6)
    assert high.flatten().tolist() == pytest.approx([0.4, 0.0], abs=1e-6)
    # Class 1 wins by at least 0.1 - relu(x): the chord meets the function at its end.
    other = certify_linf(model, x, 1 - label, ThreatModel("linf", 0.5), method=method).margin
    assert other.item() == pytest.approx(-0.4, abs=1e-6)


def test_crown_sees_what_intervals_do_not():
    """x - x is 0, but intervals forget that both are the same x."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight.data = torch.tensor([[1.0], [1.0]])
    model[2].weight.data = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    x, label, threat = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), ThreatModel("linf", 0.2)
    for method, expected in (("ibp", -0.4), ("crown", 0.0)):
        margin = certify_linf(model, x, label, threat, method=method).margin.item()
        assert margin == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), eps=st.sampled_from([0.0, 0.003, 0.05, 0.4]))
def test_no_image_of_the_ball_escapes_the_bounds(name, seed, eps):
    model, x = NETS[name].eval(), images(4, 1, 8, 8, seed=seed)
    labels = torch.arange(4) % 3
    threat = ThreatModel("linf", eps)
    lower, upper = (x.double() - eps).clamp(min=0), (x.double() + eps).clamp(max=1)
    low, high = interval_bounds(model, lower, upper)
    margins = {method: certify_linf(model, x, labels, threat, method=method) for method in METHODS}
    assert bool((margins["crown"].margin >= margins["ibp"].margin).all())
    random = SampleRandom.create(seed, torch.arange(4))
    for draw in range(12):
        near = threat.random_start(x, random)
        if draw % 2:  # corners, where extremes are
            near = threat.project(x + eps * random.sign(1, 8, 8), x)
        with torch.no_grad():
            logits = model(near).double()
        assert bool((low <= logits).all())
        assert bool((logits <= high).all())
        gap = logits.gather(1, labels[:, None]) - logits
        least = gap.scatter(1, labels[:, None], torch.inf).amin(1)
        for found in margins.values():
            assert bool((found.margin <= least).all())


@pytest.mark.parametrize("name", NETS)
def test_bounds_of_a_point_are_its_logits(name):
    """With radius 0, what is left is the rounding allowed for: the walk follows the network."""
    model, x = NETS[name].eval(), images(3, 1, 8, 8)
    low, high = interval_bounds(model, x, x)
    with torch.no_grad():
        logits = model(x).double()
    torch.testing.assert_close((low + high) / 2, logits, rtol=1e-5, atol=1e-5)
    assert float((high - low).max()) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_margins_fall_with_eps(method):
    model, x = NETS["small-cnn"], images(6, 1, 8, 8)
    labels = model.eval()(x).argmax(1)
    margins = [
        certify_linf(model, x, labels, ThreatModel("linf", eps), method=method).margin
        for eps in (0.0, 0.001, 0.01, 0.1)
    ]
    for wider, tighter in zip(margins[1:], margins, strict=False):
        assert bool((wider < tighter).all())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_whatever_the_batch(model, digits, method):
    x, labels = digits.test.images(slice(0, 20)), digits.test.labels[:20]
    threat = ThreatModel("linf", 0.01)
    found = [
        certify_linf(model, x, labels, threat, method=method, batch_size=size)
        for size in (1, 7, 20)
    ]
    for other in found[1:]:
        assert torch.equal(other.margin, found[0].margin)
        assert torch.equal(other.certified, found[0].certified)


def test_attacks_and_certificates_meet_on_a_plain_model(model, digits):
    """Certified from below never crosses attacked from above; in between they are close here."""
    x, labels = digits.test.images(slice(0, 100)), digits.test.labels[:100]
    threat = ThreatModel("linf", 0.006)
    certificate = certify_linf(model, x, labels, threat)
    fallen = torch.zeros(100, dtype=torch.bool)
    for attack in (PGD(steps=20, restarts=2, loss="margin"), MM(steps=25, restarts=2)):
        random = SampleRandom.create(0, torch.arange(100))
        fallen |= run(attack, model, x, labels, threat, random=random).success
    assert not len(crossed(certificate.certified, fallen))
    assert 0.5 < certificate.certified_accuracy <= 1 - float(fallen.float().mean())
    low, high = certificate.interval
    assert low < certificate.certified_accuracy < high


def test_tracing_leaves_nothing_behind_and_reads_the_code_of_eval_mode():
    class Doubling(nn.Module):
        def forward(self, x):
            return (x * 2 if self.training else x).flatten(1)

    model, x = Doubling().train(), images(2, 1, 2, 2)
    before = set(vars(model))
    low, high = interval_bounds(model, x, x)
    torch.testing.assert_close((low + high) / 2, x.flatten(1).double())
    assert model.training
    assert set(vars(model)) == before


def test_the_model_stays_as_it_was():
    model = residual(nn.AvgPool2d(2)).train()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    certify_linf(model, images(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64),
                 ThreatModel("linf", 0.1))  # fmt: skip
    assert model.training
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_crossed_names_the_offenders_and_refuses_what_is_no_pair_of_masks():
    mask = torch.tensor([True, False, True])
    assert crossed(mask, torch.tensor([True, True, True])).tolist() == [0, 2]
    assert crossed(mask, ~mask).tolist() == []
    with pytest.raises(DataError, match="bool tensors of one length"):
        crossed(mask, mask[:2])
    with pytest.raises(DataError, match="got attacked"):
        crossed(mask, mask.long())


class Twice(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inner, self.flat = nn.ReLU(inplace=inplace), nn.Flatten()

    def forward(self, x):
        x = x - 0.5
        return self.flat(self.inner(x) + x)


class Branching(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Squared(nn.Module):
    def forward(self, x):
        return (x * x).flatten(1)


class Odd(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


class Random(nn.Module):
    def forward(self, x):
        return x.flatten(1) + torch.randn(4)


REFUSED = {
    "layer": (nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sigmoid(), nn.Flatten()), "model.1 \\(Sigmoid"),
    "in place": (Twice(True), "model.inner .*changes in place"),
    "branch": (Branching(), "cannot be followed"),
    "product": (Squared(), "calls mul"),
    "noise": (Random(), "makes a tensor of its own"),
    "subclass": (nn.Sequential(nn.Flatten(), Odd(4, 2)), "model.1 \\(Odd"),
    "padding": (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), "circular"),
    "statistics": (nn.BatchNorm2d(1, track_running_stats=False), "no running statistics"),
    "mixing": (nn.Flatten(0), "logits of shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_bounded_is_refused_by_name(name):
    model, message = REFUSED[name]
    x = images(2, 1, 2, 2)
    with pytest.raises(ModelError, match=message):
        interval_bounds(model, x, x)


def test_hooks_are_refused():
    model, x = linear(4), images(2, 1, 2, 2)
    model[1].register_forward_hook(lambda module, args, out: out + 1)
    with pytest.raises(ModelError, match=r"model\.1 \(Linear\) has forward hooks"):
        interval_bounds(model, x, x)


def test_out_of_place_the_same_network_is_fine():
    x = images(2, 1, 2, 2)
    low, high = interval_bounds(Twice(False), x, x)
    exact = ((x - 0.5).relu() + x - 0.5).flatten(1).double()
    assert bool((low <= exact).all() & (exact <= high).all())


def test_a_model_that_computes_other_than_its_layers_say_is_found_out(monkeypatch):
    """A bound on what does not run would prove nothing: the originals must keep it."""
    model, x = linear(), images(4, 1, 3, 4)
    real = F.linear
    monkeypatch.setattr("robustann.certificates.network.F.linear", lambda v, w: real(v, w.flip(0)))
    monkeypatch.setattr(model[1], "forward", lambda v: real(v, model[1].weight, model[1].bias))
    with pytest.raises(ModelError):
        certify_linf(model, x, torch.zeros(4, dtype=torch.int64), ThreatModel("linf", 0.01))


@pytest.mark.parametrize(
    ("threat", "options", "message"),
    [
        (ThreatModel("l2", 1.0), {}, "an l2 one"),
        (ThreatModel("linf", 0.1, targeted=True), {}, "a targeted linf"),
        (ThreatModel("linf", 0.1), {"method": "crwon"}, "did you mean 'crown'"),
        (ThreatModel("linf", 0.1), {"batch_size": 0}, "at least 1"),
    ],
)
def test_wrong_settings(threat, options, message):
    with pytest.raises(UsageError, match=message):
        certify_linf(linear(), images(1, 1, 3, 4), torch.tensor([0]), threat, **options)


def test_wrong_data():
    model, x = linear(), images(2, 1, 3, 4)
    with pytest.raises(DataError, match="returns 4 logits"):
        certify_linf(model, x, torch.tensor([0, 4]), ThreatModel("linf", 0.1))
    with pytest.raises(DataError, match="lower <= upper"):
        interval_bounds(model, x + 0.1, x)


def test_an_audited_models_own_floor():
    """The certificate of a public name is a plain value for others to keep."""
    model, x = linear(), images(2, 1, 3, 4)
    found = certify_linf(model, x, model(x).argmax(1), ra.ThreatModel("linf", 0.0))
    assert found.certified.all()
    assert torch.equal(found.prediction, model(x).argmax(1))
    assert found.certified_accuracy == 1.0
