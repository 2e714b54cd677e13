"""Sanitizers against references and closed forms; their stand-ins; their names."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.defenses.sanitizers import (
    SANITIZERS,
    BitDepth,
    GaussianBlur,
    GaussianNoise,
    InputCheck,
    Jpeg,
    Median,
    ResizePad,
    Sanitized,
    Sanitizer,
    TotalVariation,
    check_input,
    parse_sanitizer,
)
from robustann.defenses.sanitizers.base import smooth_round
from robustann.defenses.sanitizers.jpeg import codec
from robustann.defenses.sanitizers.total_variation import objective
from robustann.errors import DataError, UsageError

NAMES = sorted(SANITIZERS)
DETERMINISTIC = [name for name in NAMES if SANITIZERS[name].deterministic]
RANDOM = [name for name in NAMES if not SANITIZERS[name].deterministic]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def photos(*shape: int) -> Tensor:
    """Smooth images, on which JPEG does what it was made for."""
    count, channels, height, width = shape
    coarse = images(count, channels, 4, 4)
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


# Everything registered keeps the contract.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 9, 14), (1, 3, 17, 8)])
def test_images_to_images(name: str, shape: tuple[int, ...]) -> None:
    sanitizer = SANITIZERS[name]()
    x = images(*shape)
    given = x.clone()
    for batch in (x, torch.zeros_like(x), torch.ones_like(x)):
        y = sanitizer(batch)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert float(y.min()) >= 0
        assert float(y.max()) <= 1
        assert sanitizer.surrogate(batch).shape == x.shape
    assert torch.equal(x, given)
    if name != "check":
        assert not torch.equal(sanitizer(x), x)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_batch_of_one_is_a_row_of_the_batch(name: str) -> None:
    sanitizer = SANITIZERS[name]()
    x = images(5, 3, 10, 13)
    whole = sanitizer(x)
    assert torch.equal(whole, sanitizer(x))
    for row in range(len(x)):
        assert torch.equal(sanitizer(x[row : row + 1])[0], whole[row])


@pytest.mark.parametrize("name", RANDOM)
def test_random_ones_draw_anew_from_the_global_generator(name: str) -> None:
    sanitizer = SANITIZERS[name]().eval()
    x = images(4, 1, 8, 8)
    first, second = sanitizer(x), sanitizer(x)
    assert not torch.equal(first, second)
    # Equal images in one batch have draws of their own.
    same = sanitizer(x[:1].expand(64, -1, -1, -1))
    assert len(same.flatten(1).unique(dim=0)) > 1
    torch.manual_seed(7)
    first = sanitizer(x)
    torch.manual_seed(7)
    assert torch.equal(sanitizer(x), first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_surrogates_have_the_gradient_they_claim(name: str, channels: int) -> None:
    sanitizer = SANITIZERS[name]()
    # Well inside the range, and no two values equal: clipping and medians have corners there.
    order = torch.randperm(channels * 30, generator=torch.Generator().manual_seed(1))
    x = (0.25 + 0.5 * order.double() / len(order)).view(1, channels, 5, 6).requires_grad_()

    def seeded(given: Tensor) -> Tensor:
        torch.manual_seed(3)
        return sanitizer.surrogate(given)

    if name == "noise":
        sanitizer = GaussianNoise(sigma=0.02)
    assert torch.autograd.gradcheck(seeded, (x,), atol=1e-4)
    (gradient,) = torch.autograd.grad(seeded(x).square().sum(), x)
    assert gradient.abs().sum() > 0
    if sanitizer.differentiable:
        torch.manual_seed(3)
        assert torch.equal(sanitizer(x), seeded(x))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_on_flat_images(name: str) -> None:
    sanitizer = SANITIZERS[name]()
    for value in (0.0, 0.5, 1.0):
        x = torch.full((2, 1, 8, 8), value, requires_grad=True)
        (gradient,) = torch.autograd.grad(sanitizer.surrogate(x).sum(), x)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_facts_and_fixed_hyperparameters(name: str) -> None:
    sanitizer = SANITIZERS[name]()
    assert sanitizer.name == name
    assert sanitizer.helps
    assert sanitizer.limits
    assert sanitizer.label == name
    assert name == "check" or sanitizer.paper.startswith("https://arxiv.org/abs/")
    assert not list(sanitizer.parameters())
    for option, value in sanitizer.hyperparameters.items():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(sanitizer, option, value)
    copied = copy.deepcopy(sanitizer)
    assert copied.hyperparameters == sanitizer.hyperparameters
    assert not copied.eval().training
    assert name in repr(sanitizer).lower() or sanitizer.__class__.__name__ in repr(sanitizer)


# Each does what its name says.


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_bit_depth_is_the_nearest_level(bits: int) -> None:
    x = images(2, 3, 6, 7)
    levels = torch.arange(2**bits) / (2**bits - 1)
    nearest = levels[(x[..., None] - levels).abs().argmin(-1)]
    assert torch.allclose(BitDepth(bits=bits)(x), nearest, atol=1e-7)


def test_the_smooth_staircase_goes_through_the_levels_and_never_falls() -> None:
    t = torch.linspace(-2, 3, 1001, dtype=torch.float64)
    y = smooth_round(t)
    assert (y.diff() > 0).all()
    assert torch.allclose(y[::100], t[::100], atol=1e-12)
    assert (y - t.round()).abs().mean() < 0.7 * (t - t.round()).abs().mean()


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_median_is_scipys(size: int) -> None:
    from scipy import ndimage

    x = images(2, 3, 9, 11)
    expected = ndimage.median_filter(x.numpy(), size=(1, 1, size, size), mode="nearest")
    assert np.array_equal(Median(size=size)(x).numpy(), expected)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_gaussian_is_scipys(sigma: float) -> None:
    from scipy import ndimage

    x = images(2, 3, 9, 11)
    expected = ndimage.gaussian_filter(
        x.double().numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0
    )
    assert np.allclose(GaussianBlur(sigma=sigma)(x).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("quality", [10, 50, 75, 95])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(quality: int, channels: int) -> None:
    from PIL import Image

    x = images(2, channels, 13, 18)
    y = Jpeg(quality=quality)(x)
    for image, result in zip(x, y, strict=True):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        stream = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(stream, "jpeg", quality=quality)
        expected = np.asarray(Image.open(stream)).reshape(pixels.shape)
        assert np.array_equal((result.permute(1, 2, 0) * 255).round().byte().numpy(), expected)


@pytest.mark.parametrize("quality", [20, 75])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_codec_in_torch_is_jpeg(quality: int, channels: int) -> None:
    # Whole pixels, so that both codecs start from the same.
    x = (photos(3, channels, 24, 20) * 255).round() / 255
    real = Jpeg(quality=quality)(x)
    ours = codec(x, quality, torch.round)
    smooth = Jpeg(quality=quality).surrogate(x)
    changed = (real - x).abs().mean()
    if channels == 1:
        # Pillow's own integer arithmetic, and its rounding to whole pixels.
        assert (real - ours).abs().max() <= 1.5 / 255
    assert (real - ours).abs().mean() < 0.2 * changed
    assert (real - smooth).abs().mean() < changed


def test_jpeg_refuses_other_channels() -> None:
    for call in (Jpeg(), Jpeg().surrogate):
        with pytest.raises(DataError, match="1 or 3 channels for jpeg, got 2"):
            call(images(1, 2, 8, 8))


def test_total_variation_is_the_closed_form_of_a_step() -> None:
    # Rudin-Osher-Fatemi of a step in one dimension: each plateau moves by weight / its length.
    step = torch.tensor([0.2] * 4 + [0.8] * 6)
    weight = 0.1
    for x in (step.view(1, 1, 1, 10), step.view(1, 1, 10, 1)):
        y = TotalVariation(weight=weight, steps=300)(x).flatten()
        assert torch.allclose(y[:4], torch.tensor(0.2 + weight / 4), atol=1e-3)
        assert torch.allclose(y[4:], torch.tensor(0.8 - weight / 6), atol=1e-3)


def test_total_variation_minimises_its_objective() -> None:
    x = images(4, 1, 8, 8).double()
    values = [objective(x, x, 0.1)] + [
        objective(TotalVariation(weight=0.1, steps=steps)(x), x, 0.1) for steps in (5, 40, 1000)
    ]
    for before, after in itertools.pairwise(values):
        assert (after < before).all()
    # Forty steps are nearly there, and no small change of the result is better.
    best = TotalVariation(weight=0.1, steps=1000)(x)
    assert (values[2] < values[3] * 1.01).all()
    for seed in range(5):
        other = best + 0.01 * (images(4, 1, 8, 8, seed=seed).double() - 0.5)
        assert (objective(other, x, 0.1) > values[3]).all()


def test_total_variation_keeps_what_is_constant_and_each_channels_mean() -> None:
    x = torch.tensor([0.0, 0.3, 1.0]).view(1, 3, 1, 1).expand(1, 3, 6, 7)
    assert torch.equal(TotalVariation()(x), x)
    y = images(2, 3, 8, 8)
    assert torch.allclose(TotalVariation()(y).mean((2, 3)), y.mean((2, 3)), atol=1e-5)


def test_resize_pad_is_bilinear_on_black() -> None:
    x = images(40, 3, 10, 12) * 0.5 + 0.5
    y = ResizePad(scale=0.5)(x)
    heights, corners = set(), set()
    for image, result in zip(x, y, strict=True):
        inside = result.amax(0) > 0
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        height, width = len(rows), len(columns)
        assert inside.sum() == height * width
        expected = F.interpolate(image[None], (height, width), mode="bilinear")[0]
        found = result[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert torch.allclose(found, expected, atol=1e-6)
        heights.add(height)
        corners.add((int(rows[0]), int(columns[0])))
    assert heights == {5, 6, 7, 8, 9, 10}
    assert len(corners) > 10
    assert torch.allclose(ResizePad(scale=1.0)(x), x)


def test_noise_has_its_size() -> None:
    y = GaussianNoise(sigma=0.1)(torch.full((1, 1, 200, 200), 0.5))
    assert math.isclose(float(y.std()), 0.1, rel_tol=0.02)
    assert math.isclose(float(y.mean()), 0.5, abs_tol=0.002)


# Input validation.


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.zeros((1, 1, 4, 4)), "expected a float tensor.*got ndarray"),
        (torch.rand(1, 4, 4), "got shape"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "type torch.uint8"),
        (torch.zeros(0, 1, 4, 4), "got none"),
        (torch.full((2, 1, 4, 4), torch.nan), "NaN or infinity in 2 of 2"),
        (torch.full((2, 1, 4, 4), -torch.inf), "NaN or infinity in 2 of 2"),
        (torch.full((1, 1, 4, 4), 255.0), "got values from 255 to 255"),
        (torch.rand(1, 3, 4, 4), r"expected images of shape \(N, 1, 4, any\), got \(1, 3, 4, 4\)"),
    ],
)
def test_what_is_no_image_is_refused(x: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_input(x, (1, 4, None))
    with pytest.raises(DataError, match=said):
        InputCheck(channels=1, height=4)(x)


def test_an_image_passes() -> None:
    x = images(2, 1, 4, 9)
    assert InputCheck(channels=1, height=4)(x) is x


# In front of a model.


def test_sanitized_chains_in_order() -> None:
    x = images(3, 1, 8, 8)
    first, second = GaussianBlur(), BitDepth(bits=2)
    defended = Sanitized(nn.Flatten(), first, second)
    assert torch.equal(defended(x), second(first(x)).flatten(1))
    assert not torch.equal(defended(x), first(second(x)).flatten(1))
    assert defended.parts == (first, second)
    assert defended.deterministic
    assert not Sanitized(nn.Flatten(), first, GaussianNoise()).deterministic


def test_seen_through_changes_derivatives_alone() -> None:
    x = images(3, 1, 8, 8).requires_grad_()
    defended = Sanitized(nn.Flatten(), GaussianBlur(), BitDepth(bits=2))
    weight = images(3, 64, seed=5)

    def gradient(model: nn.Module) -> Tensor:
        y = model(x)
        assert torch.equal(y, defended(x))
        return torch.autograd.grad((y * weight).sum(), x)[0]

    assert torch.equal(gradient(defended.seen_through("identity")), weight.view_as(x))
    smooth = BitDepth(bits=2).surrogate(GaussianBlur()(x)).flatten(1)
    (expected,) = torch.autograd.grad((smooth * weight).sum(), x)
    assert torch.allclose(gradient(defended.seen_through("surrogate")), expected)
    assert not defended(x).requires_grad


def test_sanitized_wants_sanitizers() -> None:
    with pytest.raises(UsageError, match=r"at least one sanitizer.*got none"):
        Sanitized(nn.Flatten())
    with pytest.raises(UsageError, match=r"at least one sanitizer.*got Flatten"):
        Sanitized(nn.Flatten(), nn.Flatten())  # type: ignore[arg-type]


# By name.


def test_text_to_sanitizer_and_back() -> None:
    for text in ("bit-depth:bits=2", "tv:weight=0.5,steps=7", "gaussian:sigma=0.25", "check"):
        made = parse_sanitizer(text)
        assert isinstance(made, Sanitizer)
        assert made.label == text
    assert parse_sanitizer("gaussian:sigma=1/4").hyperparameters == {"sigma": 0.25}
    check = parse_sanitizer("check:channels=1,height=none")
    assert check.hyperparameters == {"channels": 1, "height": None, "width": None}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jpg", "unknown sanitizer 'jpg'; did you mean 'jpeg'"),
        ("jpeg:qualty=3", "unknown option of sanitizer jpeg 'qualty'; did you mean 'quality'"),
        ("jpeg:75", "expected options of jpeg as name=value, got '75'"),
        ("jpeg:quality=good", "expected jpeg:quality as a whole number, got 'good'"),
        ("jpeg:quality=0", "expected quality from 1 to 95, got 0"),
        ("jpeg:quality=5,quality=6", "expected quality once"),
        ("tv:weight=nan", "finite number"),
        ("tv:steps=0", "steps >= 1"),
        ("check:channels=0", "channels >= 1"),
    ],
)
def test_unfit_text_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_sanitizer(text)


def test_unfit_values_are_refused() -> None:
    with pytest.raises(UsageError, match=r"bits as a whole number, got 2\.5"):
        BitDepth(bits=2.5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="sigma from"):
        GaussianBlur(sigma=math.nan)
