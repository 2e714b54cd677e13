"""Attributions are checked where they are known in closed form, and for what they leave alone."""

from __future__ import annotations

import base64
import io
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robustann.auditing import Cases
from robustann.errors import UsageError
from robustann.reports import explain as module
from robustann.reports.explain import explain
from robustann.reports.explain.drift import bootstrap, ssim
from robustann.reports.explain.gallery import SHARES
from robustann.reports.explain.methods import More, methods, spatial_layer
from robustann.reports.explain.pictures import heat_palette, heat_picture
from robustann.reports.filters import image_size, image_source
from robustann.results import Drift, Explanation

METHODS = ["Saliency", "Integrated gradients", "LayerGradCam"]
NAMES = [str(i) for i in range(5)]


class SmallNet(nn.Module):
    """Everything that makes attribution methods stumble: a reused in-place ReLU, first of all
    layers, batch norm, dropout, and a mix of training flags."""

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.first = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(6 * 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(self.relu(x))))
        x = self.relu(self.second(x))
        return self.last(self.dropout(x.flatten(1)))


def linear(channels: int = 1, side: int = 8, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, classes))


def make_cases(n: int = 12, shape: tuple[int, int, int] = (3, 8, 8), **changes: Any) -> Cases:
    """All samples broken, at growing distances in a shuffled order, by sign noise."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand(n, *shape, generator=generator)
    signs = torch.randint(0, 2, clean.shape, generator=generator) * 2 - 1
    distance = (torch.randperm(n, generator=generator) + 1) / 100
    label = torch.arange(n) % len(NAMES)
    values: dict[str, Any] = {
        "index": torch.arange(n) * 7,
        "label": label,
        "clean": clean,
        "attacked": (clean + distance.view(-1, 1, 1, 1) * signs).clamp(0, 1),
        "clean_prediction": label,
        "attacked_prediction": (label + 1) % len(NAMES),
        "clean_confidence": torch.full((n,), 0.9),
        "attacked_confidence": torch.full((n,), 0.8),
        "success": torch.ones(n, dtype=torch.bool),
        "distance": distance,
        "attack": ["pgd"] * n,
        "eps": 0.12,
        "bounds": (0.0, 1.0),
    }
    return Cases(**{**values, **changes})


def maps_of(model: nn.Module, method: str, x: Tensor, labels: Tensor) -> Tensor:
    """Signed attributions, as the explanation computes them before it sums over channels."""
    with module.frozen(model, 0):
        found, _ = methods(model, x[:1].clone(), 0.0, 8)
        one = next(one for one in found if one.name == method)
        return one.attribute(x.clone(), labels).detach()


def of_true_class(found: Explanation) -> list[Drift]:
    return [one for one in found.drift if one.target == "true class" and one.group == "flipped"]


def decode(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def test_saliency_of_a_linear_model_is_its_weight() -> None:
    model = linear()
    labels = torch.tensor([0, 3, 4])
    found = maps_of(model, "Saliency", torch.rand(3, 1, 8, 8), labels)
    weight: Tensor = model[1].weight
    assert torch.equal(found, weight[labels].detach().view(3, 1, 8, 8))


def test_integrated_gradients_sum_to_the_difference_of_the_logits() -> None:
    torch.manual_seed(0)
    model = SmallNet().eval()
    x, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    found = maps_of(model, "Integrated gradients", x, labels)
    with torch.no_grad():
        rise = (model(x.clone()) - model(torch.zeros_like(x))).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found.flatten(1).sum(1), rise, atol=5e-3, rtol=0.02)


def test_integrated_gradients_of_a_linear_model_are_weight_times_input() -> None:
    model = linear()
    x, labels = torch.rand(2, 1, 8, 8), torch.tensor([1, 2])
    found = maps_of(model, "Integrated gradients", x, labels)
    weight: Tensor = model[1].weight
    torch.testing.assert_close(found, weight[labels].detach().view_as(x) * x)


def test_an_identity_attack_moves_no_explanation() -> None:
    cases = make_cases()
    found = explain(SmallNet(), make_cases(attacked=cases.clean), NAMES, 0)
    for drift in of_true_class(found):
        assert (drift.attacked.n, drift.attacked.spearman, drift.attacked.top5) == (12, 1.0, 1.0)
        assert drift.noise.spearman == pytest.approx(1.0, abs=1e-3)
    assert {sample.amplification for sample in found.gallery} == {1.0}
    assert decode(found.gallery[0].difference).min() == 128


def test_noise_of_the_same_kind_is_no_worse_than_noise() -> None:
    """The attack of these cases is random-sign noise, and so is the control."""
    torch.manual_seed(0)
    found = explain(SmallNet(), make_cases(40), NAMES, 0)
    for drift in of_true_class(found):
        # Grad-CAM is nothing where no map speaks for the class.
        assert drift.attacked.n == drift.noise.n
        assert drift.attacked.n == 40 or drift.method == "LayerGradCam"
        assert drift.attacked.spearman == pytest.approx(drift.noise.spearman, abs=0.1)
        low, high = drift.difference_interval.low, drift.difference_interval.high
        assert -0.15 < low < 0.05
        assert -0.05 < high < 0.15
        assert 0 < (drift.attacked.top5 or 0) < 1


def test_control_noise_has_the_size_of_the_attack_after_clipping() -> None:
    cases = make_cases(clean=torch.zeros(12, 3, 8, 8).index_fill_(0, torch.arange(6), 0.5))
    attacked = (cases.clean + 0.1).clamp(0, 1)
    noisy = module.noise_like(cases.clean, attacked, cases.index, (0.0, 1.0), seed=3)
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    wanted, got = ((image - cases.clean).flatten(1).norm(dim=1) for image in (attacked, noisy))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    alone = module.noise_like(cases.clean[4:5], attacked[4:5], cases.index[4:5], (0.0, 1.0), seed=3)
    assert torch.equal(alone[0], noisy[4])


class Detached(nn.Module):
    """Hides its gradient, as a preprocessing step in another library does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear(3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x.detach())
        return logits


class Half(nn.Module):
    """Has no gradient for images that are darker than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SmallNet()

    def forward(self, x: Tensor) -> Tensor:
        bright = (x.detach().flatten(1).mean(1) > 0.25).float()[:, None]
        logits: Tensor = self.inner(x) * bright
        return logits


def test_maps_without_gradient_are_left_out_and_counted() -> None:
    found = explain(Detached(), make_cases(), NAMES, 0)
    for drift in found.drift:
        assert (drift.attacked.n, drift.attacked.spearman, drift.noise.top5) == (0, None, None)
    assert all(m.spearman is None for sample in found.gallery for m in sample.attributions)
    cases = make_cases()
    dark = torch.arange(12).view(-1, 1, 1, 1) % 3 == 0
    clean = torch.where(dark, cases.clean / 10, cases.clean)
    found = explain(Half(), make_cases(clean=clean, attacked=(clean + 0.02).clamp(0, 1)), NAMES, 0)
    assert [drift.attacked.n for drift in of_true_class(found)[:2]] == [8, 8]


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_is_left_exactly_as_it_was(guard: Any) -> None:
    torch.manual_seed(0)
    model = SmallNet().train()
    model.norm.eval()
    model.last.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    cases = make_cases()
    images = cases.clean.clone(), cases.attacked.clone()
    torch.manual_seed(5)
    with guard():
        explain(model, cases, NAMES, 0)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert torch.equal(cases.clean, images[0])
    assert torch.equal(cases.attacked, images[1])
    assert not cases.clean.requires_grad


def test_maps_of_a_model_that_hides_its_gradient_are_not_praised() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = linear(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((8 * x).round() / 8)

    saliency, integrated = explain(Rounded(), make_cases(), NAMES, 0).quality
    assert (saliency.max_sensitivity, integrated.max_sensitivity) == (None, None)
    # All maps are empty, the logits are not those of black: none is complete.
    assert integrated.completeness_error is None
    assert (integrated.incomplete or 0) >= integrated.n


def test_the_model_is_restored_after_an_error() -> None:
    class Broken(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="out of memory"):
        explain(model, make_cases(), NAMES, 0)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_the_same_cases_give_the_same_explanation() -> None:
    torch.manual_seed(0)
    model = SmallNet()
    first = explain(model, make_cases(), NAMES, 3)
    torch.manual_seed(99)
    assert explain(model, make_cases(), NAMES, 3) == first
    assert explain(model, make_cases(), NAMES, 4) != first


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_grey_colour_and_other_images(channels: int) -> None:
    cases = make_cases(6, (channels, 8, 8))
    found = explain(SmallNet(channels), cases, NAMES, 0)
    sample = found.gallery[0]
    position = cases.index.tolist().index(sample.index)
    image = cases.attacked[position].mul(255).round().byte()
    shown = decode(sample.attacked)
    if channels == 1:
        assert np.array_equal(shown, image[0].numpy())
    elif channels == 3:
        assert np.array_equal(shown, image.permute(1, 2, 0).numpy())
    else:
        assert shown.shape == (8, 8)
    for attribution in sample.attributions:
        assert decode(attribution.clean).shape == (8, 8)


def test_resnet18_with_its_reused_relus() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    found = explain(resnet18(num_classes=5), make_cases(2, (3, 32, 32)), NAMES, 0)
    assert [drift.method for drift in of_true_class(found)] == METHODS
    assert found.left_out == ()
    for drift in of_true_class(found):
        assert drift.attacked.n == 2
        assert 0 < (drift.attacked.spearman or 0) < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_model_on_an_accelerator_is_explained_there() -> None:
    torch.manual_seed(0)
    model = SmallNet()
    wanted = explain(model, make_cases(), NAMES, 0)
    found = explain(model.cuda(), make_cases(), NAMES, 0)
    assert chosen(found) == chosen(wanted)
    for ours, theirs in zip(found.drift, wanted.drift, strict=True):
        assert ours.attacked.spearman == pytest.approx(theirs.attacked.spearman, abs=0.01)
        assert ours.noise.spearman == pytest.approx(theirs.noise.spearman, abs=0.01)
    assert next(model.parameters()).is_cuda


def test_the_difference_is_amplified_by_a_power_of_two_around_grey() -> None:
    cases = make_cases()
    for sample in explain(linear(3), cases, NAMES, 0).gallery:
        position = cases.index.tolist().index(sample.index)
        delta = cases.attacked[position] - cases.clean[position]
        assert math.log2(sample.amplification).is_integer()
        assert 0.25 < sample.amplification * float(delta.abs().max()) <= 0.5
        wanted = (0.5 + sample.amplification * delta).mul(255).round().byte().permute(1, 2, 0)
        assert np.array_equal(decode(sample.difference), wanted.numpy())


def chosen(found: Explanation) -> list[tuple[int, str]]:
    return [(sample.index // 7, sample.why) for sample in found.gallery]


def test_gallery_holds_the_easiest_the_median_the_hardest_then_one_a_class() -> None:
    success = torch.arange(12) != 11
    cases = make_cases(distance=torch.arange(12, 0, -1) / 100, success=success)
    found = explain(linear(3), cases, NAMES, 0)
    assert chosen(found) == [
        (10, "easiest to break"),
        (5, "median"),
        (0, "hardest to break"),
        *((i, "first broken of its class") for i in (1, 2, 3, 4)),
    ]
    assert "12 audited samples" in found.rule


def test_gallery_tells_easy_from_hard_where_the_attack_uses_up_its_eps() -> None:
    cases = make_cases(distance=torch.full((12,), 0.12))
    # What a minimum-norm attack found: the last is the easiest; of the first nothing nearer.
    reach = torch.arange(12, 0, -1).view(-1, 1, 1, 1) / 100
    away = torch.where(cases.clean > 0.5, -reach, reach)
    cases = make_cases(distance=torch.full((12,), 0.12), nearest=cases.clean + away)
    found = explain(linear(3), cases, NAMES, 0)
    assert chosen(found)[:3] == [(11, "easiest to break"), (5, "median"), (0, "hardest to break")]
    nearest = [one.nearest for one in found.gallery[:3]]
    assert nearest == pytest.approx([0.01, 0.07, 0.12], abs=1e-6)
    assert [one.distance for one in found.gallery[:3]] == pytest.approx([0.12] * 3)
    # What stood has no error to be near to, within the threat model.
    stood = make_cases(success=torch.zeros(12, dtype=torch.bool), nearest=cases.clean + away)
    assert {one.nearest for one in explain(linear(3), stood, NAMES, 0).gallery} == {None}


def test_gallery_is_never_longer_than_its_limit() -> None:
    cases = make_cases(40, label=torch.arange(40), clean_prediction=torch.arange(40))
    found = explain(linear(3, classes=40), cases, [str(i) for i in range(40)], 0)
    assert len(found.gallery) == 12
    assert len({sample.index for sample in found.gallery}) == 12


def test_gallery_of_survivors_is_marked_as_not_broken() -> None:
    none = torch.zeros(12, dtype=torch.bool)
    wrong_at_once = torch.where(torch.arange(12) == 0, 4, torch.arange(12) % 5)
    cases = make_cases(success=none, clean_prediction=wrong_at_once)
    found = explain(linear(3), cases, NAMES, 0)
    assert chosen(found) == [(i, "not broken") for i in (5, 1, 2, 3, 4)]
    assert found.drift[0].attacked.n == 0
    cases = make_cases(success=none, clean_prediction=(torch.arange(12) + 1) % 5)
    found = explain(linear(3), cases, NAMES, 0)
    assert chosen(found) == [(i, "wrong before any attack") for i in range(5)]


def test_maps_are_scaled_to_their_99th_percentile_and_rise_in_lightness() -> None:
    palette = np.array(heat_palette()).reshape(256, 3)
    lightness = palette @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -0.5).all()
    values = torch.arange(100.0).view(10, 10)
    values[9, 9] = 1e6
    levels = decode(heat_picture(values))
    assert levels.max() == 255
    assert levels[4, 9] == round(49 / 98 * 255)
    assert decode(heat_picture(torch.zeros(4, 4))).max() == 0


def test_targets_and_groups_are_told_apart() -> None:
    success = torch.arange(12) < 8
    cases = make_cases(success=success)
    prediction = torch.where(success, cases.attacked_prediction, cases.label)
    cases = make_cases(success=success, attacked_prediction=prediction)
    torch.manual_seed(0)
    found = explain(SmallNet(), cases, NAMES, 0)
    rows = [(one.method, one.target, one.group, one.attacked.n) for one in found.drift]
    assert [row[:3] for row in rows[6:]] == [("LayerGradCam", *row[1:3]) for row in rows[:3]]
    assert rows[:6] == [
        (method, target, group, n)
        for method in METHODS[:2]
        for target, group, n in (
            ("true class", "flipped", 8),
            ("own prediction", "flipped", 8),
            ("true class", "not flipped", 4),
        )
    ]
    for one in found.drift:
        # Another image of the class: those without another are left out.
        assert one.other is not None
        assert one.other.n <= 8
        assert one.attacked.spearman_interval is None or (
            one.attacked.spearman_interval.low
            <= (one.attacked.spearman or 0)
            <= one.attacked.spearman_interval.high
        )


def test_own_prediction_explains_what_the_model_says_of_each_image() -> None:
    """Of a linear model the map of a class is its weight: moved wherever the prediction is."""
    model = linear()
    weight = model[1].weight.detach()
    x = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    label = (x.flatten(1) @ weight.T + model[1].bias.detach()).argmax(1)
    other = (label + 1) % 5
    towards = (weight[other] - weight[label]).sign().view_as(x)
    attacked = (x + 0.5 * towards).clamp(0, 1)
    said = model(attacked).argmax(1)
    cases = make_cases(
        10, (1, 8, 8), clean=x, attacked=attacked, label=label, clean_prediction=label,
        attacked_prediction=said, success=said != label,
    )  # fmt: skip
    found = [one for one in explain(model, cases, NAMES, 0).drift if one.method == "Saliency"]
    true_class, own = found[0], found[1]
    assert true_class.attacked.n == int((said != label).sum()) > 4
    assert true_class.attacked.spearman == 1.0
    assert own.target == "own prediction"
    assert (own.attacked.spearman or 0) < 0.5


def test_ssim_equals_scikit_image() -> None:
    structural = pytest.importorskip("skimage.metrics").structural_similarity
    generator = np.random.default_rng(0)
    for shape in ((8, 8), (28, 28), (7, 9), (5, 5), (3, 4)):
        first, second = generator.random(shape), generator.random(shape)
        window = min(7, *shape) - (1 - min(7, *shape) % 2)
        wanted = structural(first, second, data_range=1.0, win_size=window)
        assert ssim(first, second) == pytest.approx(wanted, abs=1e-12)
    assert math.isnan(ssim(np.ones((2, 2)), np.ones((2, 2))))


def test_bootstrap_covers_the_median_and_narrows() -> None:
    generator = np.random.default_rng(1)
    hits, widths = 0, {20: 0.0, 200: 0.0}
    for n in widths:
        for _ in range(40):
            found = bootstrap(generator.normal(size=n), 0)
            assert found is not None
            hits += found.low <= 0 <= found.high
            widths[n] += found.high - found.low
    # 95 % of 80, less what chance and a discrete median take.
    assert hits >= 70
    assert widths[200] < widths[20] / 2
    assert bootstrap(np.ones(4), 0) is None


def test_weights_drawn_anew_change_the_map_of_a_network_and_not_that_of_a_ruler() -> None:
    class Ruler(nn.Module):
        """Answers by fixed weights, which no re-initialisation reaches."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("fixed", torch.rand(5, 192, generator=torch.Generator()))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.fixed.T

    torch.manual_seed(0)
    learned = explain(SmallNet(), make_cases(), NAMES, 0).quality
    fixed = explain(Ruler(), make_cases(), NAMES, 0).quality
    assert [one.method for one in learned] == METHODS
    assert learned[0].reinitialised is not None
    assert learned[0].reinitialised < 0.5
    assert [one.reinitialised for one in fixed] == [1.0, 1.0]
    # A linear model's gradient is the same everywhere, and says how the output changes.
    assert fixed[0].max_sensitivity == 0
    assert fixed[0].infidelity == pytest.approx(0, abs=1e-6)
    assert learned[0].max_sensitivity > 0
    assert learned[2].infidelity is None


def test_completeness_takes_more_steps_where_few_do_not_do() -> None:
    class Steep(nn.Module):
        """Saturates at once, so that a few steps along the line miss where it rises."""

        def forward(self, x: Tensor) -> Tensor:
            rise = torch.sigmoid(400 * (x.flatten(1).mean(1) - 0.013))
            return torch.stack([rise, -rise, 0 * rise, 0 * rise, 0 * rise], 1)

    cases = make_cases(label=torch.zeros(12, dtype=torch.int64))
    steep = explain(Steep(), cases, NAMES, 0).quality[1]
    assert (steep.steps or 0) > 32
    straight = explain(linear(3), make_cases(), NAMES, 0).quality[1]
    assert (straight.steps, straight.incomplete) == (32, 0)
    assert straight.completeness_error == pytest.approx(0, abs=1e-4)


def test_layer_gradcam_finds_a_layer_whatever_the_architecture() -> None:
    from torchvision.models import resnet18
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(
        image_size=16, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8,
        num_classes=5,
    ).eval()  # fmt: skip
    x = torch.rand(1, 3, 16, 16)
    assert spatial_layer(vit, x) is vit.conv_proj
    resnet = resnet18(num_classes=5).eval()
    assert spatial_layer(resnet, torch.rand(1, 3, 64, 64)) is resnet.layer4
    assert spatial_layer(linear(3), torch.rand(1, 3, 8, 8)) is None
    found = explain(vit, make_cases(3, (3, 16, 16)), NAMES, 0)
    assert [one.method for one in of_true_class(found)] == METHODS
    without = explain(linear(3), make_cases(3), NAMES, 0)
    assert without.left_out == (
        "LayerGradCam: this model has no spatial layer that sees each image once",
    )


def test_a_vote_under_noise_is_explained_without_maps_of_its_copies() -> None:
    from robustann.certificates import Smoothed

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, len(NAMES))
    )
    vote = Smoothed(net.eval(), 0.25, draws=4)
    assert spatial_layer(net, torch.rand(1, 3, 8, 8)) is net[1]
    assert spatial_layer(vote, torch.rand(1, 3, 8, 8)) is None
    found = explain(vote, make_cases(3), NAMES, 0)
    assert "LayerGradCam" not in {one.method for one in of_true_class(found)}


def test_a_path_leads_through_the_nearest_image_and_says_what_the_model_says() -> None:
    model = linear(3)
    cases = make_cases()
    nearest = (cases.clean + 0.07).clamp(0, 1)
    found = explain(model, make_cases(nearest=nearest), NAMES, 0)
    for sample in found.gallery:
        i = cases.index.tolist().index(sample.index)
        assert [point.distance for point in sample.path] == sorted(
            point.distance for point in sample.path
        )
        first, middle = sample.path[0], sample.path[SHARES.index(1.0)]
        assert first.distance == 0
        assert first.image == sample.clean
        assert middle.distance == pytest.approx(float((nearest[i] - cases.clean[i]).abs().max()))
        said = model(nearest[i : i + 1]).detach().softmax(1)[0]
        assert middle.prediction == int(said.argmax())
        assert middle.confidence == pytest.approx(float(said.max()), abs=1e-5)
    # Nothing was changed: nowhere to go.
    still = explain(model, make_cases(attacked=cases.clean), NAMES, 0)
    assert all(sample.path == () for sample in still.gallery)


def test_exact_images_of_the_gallery_are_kept_beside_the_results() -> None:
    cases = make_cases()
    found = explain(linear(3), cases, NAMES, 0)
    kept = np.load(io.BytesIO(found.tensors))
    assert sorted(kept) == ["attacked", "clean", "index", "label", "nearest"]
    assert kept["index"].tolist() == [sample.index for sample in found.gallery]
    rows = [cases.index.tolist().index(one) for one in kept["index"]]
    assert np.array_equal(kept["clean"], cases.clean[rows].numpy())
    assert np.array_equal(kept["attacked"], cases.attacked[rows].numpy())
    assert "tensors" not in found.model_dump()


def test_large_pictures_are_small_files() -> None:
    cases = make_cases(2, (3, 224, 224))
    wide = nn.functional.interpolate(torch.rand(2, 3, 14, 14), size=224, mode="bicubic")
    model = nn.Sequential(nn.AvgPool2d(28), nn.Flatten(), nn.Linear(192, 5))
    found = explain(model, make_cases(2, clean=wide.clamp(0, 1), attacked=cases.attacked), NAMES, 0)
    picture = Image.open(io.BytesIO(base64.b64decode(found.gallery[0].clean)))
    assert (picture.format, picture.size) == ("WEBP", (160, 160))
    assert image_size(found.gallery[0].clean) == (160, 160)
    assert image_source(found.gallery[0].clean).startswith("data:image/webp;base64,")


def test_methods_on_demand_stand_beside_the_usual_ones() -> None:
    model = linear()
    names = get_args(More)
    cases = make_cases(4, (1, 8, 8))
    found = explain(model, cases, NAMES, 0, more=names)
    shown = ["Saliency", "Integrated gradients", "Input x gradient", "SmoothGrad", "GradientShap",
             "Occlusion"]  # fmt: skip
    assert [one.method for one in found.quality] == shown
    assert [one.method for one in found.gallery[0].attributions] == shown
    assert explain(model, cases, NAMES, 0, more=names) == found
    # Of a linear model all but the gradient itself are weight times input.
    x, labels = cases.clean, cases.label
    weight = model[1].weight.detach()[labels].view_as(x)
    with module.frozen(model, 0):
        made = {one.name: one for one in methods(model, x[:1], 0.0, 8, names)[0]}
        for name in ("Input x gradient", "Occlusion"):
            maps = made[name].attribute(x.clone(), labels).detach()
            torch.testing.assert_close(maps, weight * x, atol=1e-5, rtol=1e-4)
        smooth = made["SmoothGrad"].attribute(x.clone(), labels).detach()
    torch.testing.assert_close(smooth, weight, atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="occlusion"):
        explain(model, cases, NAMES, 0, more=["oclusion"])


class Silenced(nn.Module):
    """Gives no number for images other than those it knows."""

    def __init__(self, inner: nn.Module, known: Tensor) -> None:
        super().__init__()
        self.inner, self.known = inner, known.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        off = (x.flatten(1)[:, None] - self.known).abs().amax(2).amin(1) > 1e-6
        return torch.where(off[:, None], torch.full_like(logits, torch.nan), logits)


def test_answers_that_are_no_numbers_end_no_explanation() -> None:
    cases = make_cases()
    known = torch.cat([cases.clean, cases.attacked])
    found = explain(Silenced(SmallNet().eval(), known), cases, class_names=NAMES, seed=0)
    ends = [sample.path for sample in found.gallery if sample.path]
    assert ends
    for path in ends:
        assert path[SHARES.index(1.0)].confidence > 0
        assert any(point.confidence == 0 for point in path)
