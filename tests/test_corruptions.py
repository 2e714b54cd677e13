"""Corruptions: as strong as published, growing, in range, independent of the batch."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacking import streams
from torch import Tensor, nn

from robustann.attacks import registered
from robustann.attacks.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    Corruption,
    corrupt,
    corruption_accuracy,
)
from robustann.attacks.engine import predict_logits
from robustann.errors import DataError, UsageError
from robustann.metrics import wilson_interval
from robustann.rng import SampleRandom


def textured(count: int, channels: int, height: int, width: int) -> Tensor:
    """Smooth colours with fine grain, away from the edges of the range."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")
    grain = torch.rand(count, channels, height, width, generator=generator)
    return 0.2 + 0.4 * smooth + 0.1 * grain


@pytest.mark.parametrize("side", [8, 32, 80])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_strength_grows_with_severity(kind: str, channels: int, side: int) -> None:
    x = textured(6, channels, side, side + 2)
    before = x.clone()
    strength = []
    for severity in SEVERITIES:
        y = corrupt(x, kind, severity, streams(6))
        assert y.shape == x.shape
        assert y.dtype == torch.float32
        assert float(y.min()) >= 0
        assert float(y.max()) <= 1
        strength.append(float((y - x).square().mean().sqrt()))
    assert torch.equal(x, before)
    assert strength[0] > 0.002
    # Between near qualities JPEG is not monotonous on every image, nor from one to the next.
    if kind == "jpeg":
        assert strength[4] > strength[0] * 1.05
    else:
        assert all(a < b for a, b in itertools.pairwise(strength))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_an_image_does_not_hang_on_its_batch(kind: str) -> None:
    x = textured(11, 3, 12, 12)
    whole = corrupt(x, kind, 3, streams(11))
    rows = torch.tensor([7, 2])
    part = corrupt(x[rows], kind, 3, SampleRandom.create(0, rows))
    assert torch.equal(part, whole[rows])
    assert torch.equal(corrupt(x, kind, 3, streams(11)), whole)
    other = corrupt(x, kind, 3, streams(11, seed=1))
    assert torch.equal(other, whole) == (kind != "gaussian_noise")


def test_noise_has_the_published_size() -> None:
    x = torch.full((50, 3, 32, 32), 0.5)
    for severity, size in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noise = corrupt(x, "gaussian_noise", severity, streams(50)) - x
        assert float(noise.std()) == pytest.approx(size, rel=0.01)
        assert abs(float(noise.mean())) < 0.001
    large = torch.full((4, 3, 96, 96), 0.5)
    noise = corrupt(large, "gaussian_noise", 1, streams(4)) - large
    assert float(noise.std()) == pytest.approx(0.08, rel=0.01)


@pytest.mark.parametrize("side", [5, 32, 70])
def test_blur_is_scipys(side: int) -> None:
    from scipy.ndimage import gaussian_filter

    x = textured(2, 3, side, side + 3)
    sizes = (0.4, 0.6, 0.7, 0.8, 1.0) if side <= 64 else (1, 2, 3, 4, 6)
    for severity, size in zip(SEVERITIES, sizes, strict=True):
        expected = gaussian_filter(
            x.double().numpy(), (0, 0, size, size), mode="nearest", truncate=4.0
        )
        blurred = corrupt(x, "gaussian_blur", severity, streams(2))
        assert np.abs(blurred.numpy() - expected).max() < 1e-6


def test_brightness_raises_the_value_of_hsv() -> None:
    import colorsys

    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = 0
    y = corrupt(x, "brightness", 4, streams(2))
    for image, bright in zip(x, y, strict=True):
        for before, after in zip(image.flatten(1).T, bright.flatten(1).T, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*before.tolist())
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.2, 1.0))
            assert after.tolist() == pytest.approx(expected, abs=1e-5)


def test_contrast_keeps_the_mean_and_shrinks_the_rest() -> None:
    x = textured(3, 3, 16, 16)
    y = corrupt(x, "contrast", 5, streams(3))
    assert torch.allclose(y.mean((2, 3)), x.mean((2, 3)), atol=1e-6)
    assert torch.allclose(y.std((2, 3)), 0.15 * x.std((2, 3)), rtol=1e-4)


def test_jpeg_is_pillows_at_the_published_quality() -> None:
    from PIL import Image

    x = textured(2, 3, 32, 32)
    y = corrupt(x, "jpeg", 5, streams(2))
    for image, found in zip(x, y, strict=True):
        stream = io.BytesIO()
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(stream, format="JPEG", quality=40)
        expected = np.asarray(Image.open(stream)).transpose(2, 0, 1) / 255
        assert np.abs(found.numpy() - expected).max() < 1e-6


def test_accuracy_is_what_the_model_says_of_the_corrupted_images() -> None:
    from sklearn.datasets import load_digits

    data, target = load_digits(return_X_y=True)
    x = torch.from_numpy(data / 16).float().view(-1, 1, 8, 8)
    labels = torch.from_numpy(target).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[:1400]), labels[:1400]).backward()
            optimizer.step()
    x, labels = x[1400:], labels[1400:]
    random = streams(len(x))
    found = corruption_accuracy(model, x, labels, random=random)
    assert model.training
    assert [one.corruption.label for one in found] == [
        f"{kind}:{severity}" for kind in CORRUPTIONS for severity in SEVERITIES
    ]
    clean = float((predict_logits(model, x).argmax(1) == labels).double().mean())
    for one in found:
        images = one.corruption(x, random.fork(one.corruption.label))
        correct = predict_logits(model, images).argmax(1) == labels
        assert torch.equal(one.correct, correct)
        assert one.accuracy == float(correct.double().mean())
        assert one.interval == wilson_interval(int(correct.sum()), len(x))
    worst = {one.corruption.kind: one.accuracy for one in found if one.corruption.severity == 5}
    assert worst["gaussian_blur"] < clean - 0.02
    assert worst["jpeg"] > 0.7
    small = corruption_accuracy(
        model, x, labels, random=random, kinds=["gaussian_noise"], severities=[5], batch_size=50
    )
    assert torch.equal(small[0].correct, found[4].correct)


def test_they_are_no_attacks() -> None:
    """Projected they would not be what they are called, unprojected outside the threat model."""
    assert "corruption" not in registered()


def test_unfit_use() -> None:
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(UsageError, match="did you mean 'gaussian_blur'"):
        Corruption(kind="gausian_blur")
    for severity in (0, 6):
        with pytest.raises(UsageError, match="from 1 to 5"):
            corrupt(x, "contrast", severity, streams(2))
    with pytest.raises(DataError, match="values from"):
        corrupt(x * 255, "contrast", 1, streams(2))
    with pytest.raises(DataError, match="random stream"):
        corrupt(x, "gaussian_noise", 1, streams(3))
    with pytest.raises(DataError, match="1 or 3 channels"):
        corrupt(torch.rand(2, 4, 8, 8), "jpeg", 1, streams(2))
    with pytest.raises(DataError, match="integer labels"):
        corruption_accuracy(nn.Flatten(), x, torch.zeros(3).long(), random=streams(2))
