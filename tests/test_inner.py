"""A model seen through a part of itself: its predictions, and nobody else's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import Closed, Detached, Quantised, Shattered, winners_take_all

import robustann as ra
from robustann.auditing import inner, runner
from robustann.auditing.inner import SeenThrough, differentiable_part

THREAT = ra.ThreatModel("linf", 0.1)


class Fixed(nn.Module):
    """Answers with the same logits for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1) + 0 * x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("whole", [(0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize(
    "part", [(5.0, 5.0, 0.0), (0.0, 0.0, 0.0), (1.0, 2.0, 3.0), (0.0, float("-inf"), 1.0),
             (-1e30, -1e30, 1e30), (float("nan"), 0.0, 1.0)]
)  # fmt: skip
def test_the_prediction_is_always_the_whole_models(whole, part):
    x = torch.rand(3, 1, 2, 2)
    seen = SeenThrough(Fixed(*whole), Fixed(*part))(x)
    assert seen.isfinite().all()
    assert torch.equal(seen.argmax(1), Fixed(*whole)(x).argmax(1))


def test_what_the_whole_model_cannot_compute_is_not_hidden():
    seen = SeenThrough(Fixed(float("nan"), 0.0), Fixed(1.0, 2.0))
    assert not seen(torch.rand(1, 1, 2, 2)).isfinite().all()


def test_the_gradient_is_the_parts(model, digits):
    x = digits.test.images(slice(0, 4)).requires_grad_()
    seen = SeenThrough(Quantised(model), model)(x)
    (slope,) = torch.autograd.grad(seen.sum(), x)
    (own,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.allclose(slope, own, atol=1e-5)


class Aside(nn.Module):
    """Has a part that is of no use, before the one that is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.aside = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.inner = inner

    def forward(self, x):
        with torch.no_grad():
            return self.inner(x) + 0.02 * self.aside(x)


def test_of_several_parts_the_one_that_agrees_most_is_taken(model, digits):
    x, labels = digits.test.images(slice(0, 32)), digits.test.labels[:32]
    found, spent = differentiable_part(Aside(model), x, labels, THREAT, 0)
    assert found is not None
    assert found.name.startswith("inner")
    assert found.agreement == 1
    assert spent > 0
    assert differentiable_part(Closed(model), x, labels, THREAT, 0)[0] is None


class Stepped(nn.Module):
    """Rounds to few levels, and then calls its part."""

    def __init__(self, inner: nn.Module, levels: int) -> None:
        super().__init__()
        self.inner = inner
        self.levels = levels

    def forward(self, x):
        return self.inner((self.levels * x).round() / self.levels)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_of_two_views_the_one_that_leads_nearer_is_taken(norm, model, digits):
    """The part alone knows nothing of the levels before it; where there are none, it need not."""
    x, labels = digits.test.images(slice(0, 32)), digits.test.labels[:32]
    threat = ra.ThreatModel(norm, 1)
    coarse, spent = differentiable_part(Stepped(model, 4), x, labels, threat, 0)
    assert coarse is not None
    assert coarse.whole
    # What finds nothing is not near.
    for make in (Detached, Shattered):
        cut, _ = differentiable_part(make(model), x, labels, threat, 0)
        assert cut is not None
        assert not cut.whole
    # That is an attack by either.
    assert spent > 32 * 2 * 3 * 15


def test_the_same_gradient_is_no_other_view(model, digits):
    """Where no step was taken for the identity, what misled goes on misleading."""
    x, labels = digits.test.images(slice(0, 32)), digits.test.labels[:32]
    threat = ra.ThreatModel("l2", 0.5)
    assert differentiable_part(winners_take_all(model), x, labels, threat, 0)[0] is None


@pytest.mark.parametrize(("better", "taken"), [(5, False), (12, True)])
def test_a_view_that_is_nearer_by_chance_is_none(better, taken, model, digits, monkeypatch):
    """Than the model's own gradient, on a few images more than it is farther on."""
    x, labels = digits.test.images(slice(0, 32)), digits.test.labels[:32]

    def distances(model, view, asked, labels, threat, seed):
        away = torch.ones(32, dtype=torch.float64)
        if view is not None:
            away[:better], away[better : better + 4] = 0.5, 2.0
        return away

    monkeypatch.setattr(inner, "_distances", distances)
    found, _ = differentiable_part(Stepped(model, 4), x, labels, THREAT, 0)
    assert (found is not None) == taken


def test_what_lies_beyond_eps_tells_which_is_nearer_too(model, digits):
    x, labels = digits.test.images(slice(0, 32)), digits.test.labels[:32]
    found, _ = differentiable_part(Stepped(model, 4), x, labels, ra.ThreatModel("l2", 1e-6), 0)
    assert found is not None
    assert found.whole


class Grainy(nn.Module):
    """Adds noise, rounds to few levels, and then calls its part."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = Stepped(inner, 4)

    def forward(self, x):
        return self.inner(x + 0.1 * torch.randn_like(x))


def test_of_a_model_that_draws_the_whole_comes_first(model, digits):
    """A part knows nothing of the draws."""
    x, labels = digits.test.images(slice(0, 32)), digits.test.labels[:32]
    found, _ = differentiable_part(Grainy(model), x, labels, THREAT, 0, draws=4)
    assert found is not None
    assert found.whole


def test_memory_that_runs_out_while_views_are_tried_is_no_missing_view(model, digits, monkeypatch):
    def empty(*args, **kwargs):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(inner, "run", empty)
    x, labels = digits.test.images(slice(0, 8)), digits.test.labels[:8]
    with pytest.raises(torch.OutOfMemoryError):
        differentiable_part(Stepped(model, 4), x, labels, THREAT, 0)


class Counting(nn.Module):
    """A layer that counts the images that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))
        self.images = 0

    def forward(self, x):
        self.images += len(x)
        return x.flatten(1) @ self.weight


@pytest.fixture
def slopes(monkeypatch):
    """The gradients of whole batches that were asked for, as the images in them."""
    genuine, asked = torch.autograd.grad, []

    def grad(outputs, inputs, *args, **kwargs):
        asked.append(len(inputs))
        return genuine(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    return asked


class Coarse(nn.Module):
    """Rounds, in one piece with its layer."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = [layer]

    def forward(self, x):
        return self.layer[0]((8 * x).round() / 8)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("make", [Quantised, Coarse, lambda inner: Closed(Quantised(inner))])
def test_what_looking_for_a_part_costs_is_counted(make, draws, slopes):
    layer = Counting()
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = layer(x).argmax(1)
    layer.images = 0
    _, spent = differentiable_part(make(layer), x, labels, THREAT, 0, draws=draws)
    assert len(slopes) > 0
    # Each gradient goes through all draws.
    measured = layer.images + draws * sum(slopes)
    if make in (Quantised, Coarse) and draws == 1:
        # Views are tried by attacks, whose batches are filled up to whole groups of rows.
        assert 0.85 * measured < spent < measured
        assert spent > 16 * 20 * (2 + 3)
    else:
        assert spent == measured


def test_looking_for_a_part_and_probing_through_it_are_part_of_the_price(slopes, monkeypatch):
    layer = Counting()
    x = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels, model = layer(x).argmax(1), Quantised(layer)
    asked = {"attacks": ("pgd",), "explain": False, "curve": False, "batch_size": 24}
    trial = (model, (x, labels), ra.ThreatModel("linf", 0.02))
    found = ra.audit(*trial, **asked)
    assert "through a part" in found.attacks[0].label
    slopes.clear()
    layer.images = 0
    found = ra.audit(*trial, **asked)
    # Batches are filled up to whole groups of rows, and what fits, and how fast, is looked at too.
    measured = layer.images + sum(slopes)
    assert 0.75 * measured < found.propagations <= measured

    def dearer(*args, **kwargs):
        part, spent = differentiable_part(*args, **kwargs)
        return part, spent + 1000

    monkeypatch.setattr(runner, "differentiable_part", dearer)
    assert ra.audit(*trial, **asked).propagations == found.propagations + 1000


def test_tails_of_sequences_are_parts(model, digits):
    class Cut(nn.Module):
        def forward(self, x):
            return x.detach()

    x, labels = digits.test.images(slice(0, 32)), digits.test.labels[:32]
    found, _ = differentiable_part(nn.Sequential(Cut(), model), x, labels, THREAT, 0)
    assert found is not None
    assert found.name == "the model[1:]"
    assert torch.equal(found.module(x), model(x))


def test_memory_that_runs_out_is_no_missing_part(model, digits, monkeypatch):
    def empty(*args, **kwargs):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(torch.autograd, "grad", empty)
    x, labels = digits.test.images(slice(0, 8)), digits.test.labels[:8]
    with pytest.raises(torch.OutOfMemoryError):
        differentiable_part(Detached(model), x, labels, THREAT, 0)


def test_figures_of_a_model_seen_through_a_part_are_its_own(model, digits):
    x, labels = digits.test.images(slice(0, 24)), digits.test.labels[:24]
    quantised = Quantised(model)
    threat = ra.ThreatModel("linf", 0.1)
    result = ra.audit(quantised, (x, labels), threat, "quick", explain=False, curve=False)
    with torch.no_grad():
        logits = quantised(x)
    own = logits.softmax(1).amax(1)
    assert list(result.clean_samples.confidence) == pytest.approx(own.tolist(), abs=1e-5)
    through = [one for one in result.attacks if "through a part" in one.label]
    searches = [one for one in result.attacks if one.label in ("square:queries=1000",
                                                               "rays:queries=1000")]  # fmt: skip
    assert through
    assert len(searches) == 2
    # Each look at it is one at the model and one at its part.
    assert all(count % 2 == 0 for one in through for count in one.samples.forwards)


def test_the_attacked_images_fool_the_model_itself(model, digits):
    from robustann.auditing import Audit, AuditConfig

    kept = []

    def spy(model, cases, class_names, seed):
        kept.append(cases)
        return

    threat = ra.ThreatModel("linf", 0.1)
    config = AuditConfig(threat=threat, preset="quick", max_samples=32, curve=False)
    quantised = Quantised(model)
    Audit(config).run(quantised, digits.test, class_names=digits.class_names, explainer=spy)
    (cases,) = kept
    with torch.no_grad():
        found = quantised(cases.attacked).argmax(1)
    assert cases.success.any()
    assert (found[cases.success] != cases.label[cases.success]).all()
    assert torch.equal(found, cases.attacked_prediction)
