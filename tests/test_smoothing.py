"""Randomised smoothing: closed forms, determinism, abstention, and attacks on what it certifies."""

from __future__ import annotations

import math

import pytest
import torch
from attacking import streams
from scipy.stats import binomtest, norm
from torch import nn

import robustann as ra
from robustann.attacks import MM, PGD
from robustann.attacks.engine import craft, predict_logits, run
from robustann.certificates import (
    Smoothed,
    certified_radius,
    certify,
    crossed,
    lower_confidence,
    predict,
)
from robustann.defenses import NoiseTraining
from robustann.errors import DataError, ModelError, UsageError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel


def half_space(features: int = 16) -> tuple[nn.Sequential, torch.Tensor]:
    """Two classes on both sides of a hyperplane through the middle, and its unit normal."""
    normal = torch.randn(features, generator=torch.Generator().manual_seed(0))
    normal /= normal.norm()
    model = nn.Sequential(nn.Flatten(), nn.Linear(features, 2))
    model[1].weight.data = torch.stack([normal, -normal])
    model[1].bias.data = torch.tensor([-1.0, 1.0]) * 0.5 * normal.sum()
    return model, normal


def at_distances(normal: torch.Tensor, distances: list[float]) -> torch.Tensor:
    return 0.5 + torch.tensor(distances)[:, None, None, None] * normal.view(1, 1, 4, 4)


@pytest.fixture(scope="module")
def noisy_model(digits: ra.ImageData) -> nn.Module:
    return ra.train("small-cnn", digits, step=NoiseTraining(0.25), epochs=12).model


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (7, 10), (10, 10), (990, 1000)])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_lower_bound_is_scipys_exact_one(successes, n, alpha):
    reference = binomtest(successes, n, alternative="greater").proportion_ci(1 - alpha, "exact")
    assert lower_confidence(successes, n, alpha) == pytest.approx(reference.low, abs=1e-12)


def test_the_radius_in_closed_form():
    lower = 0.001 ** (1 / 1000)
    assert certified_radius(1000, 1000, sigma=0.5, alpha=0.001) == pytest.approx(
        0.5 * norm.ppf(lower)
    )
    assert certified_radius(500, 1000, sigma=0.5, alpha=0.001) == 0.0
    radii = [certified_radius(k, 1000, sigma=0.5, alpha=0.001) for k in range(560, 1001, 20)]
    assert radii == sorted(radii)
    assert radii[0] > 0


def test_a_linear_models_radius_is_its_distance_to_the_boundary():
    """P(class) = Phi(d / sigma), so sigma * Phi^-1 gives d itself: approached from below."""
    model, normal = half_space()
    distances = [0.1, 0.2, 0.3, 0.4, -0.2]
    x, labels = at_distances(normal, distances), torch.zeros(5, dtype=torch.int64)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    found = certify(model, x, labels, sigma=0.25, n=20_000, random=streams(5))
    true = torch.tensor(distances, dtype=torch.float64).abs()
    assert found.prediction.tolist() == [0, 0, 0, 0, 1]
    assert bool((found.radius <= true).all())
    assert bool((found.radius > true - 0.02).all())
    rate = found.counts / found.n
    expected = torch.from_numpy(norm.cdf(true.numpy() / 0.25))
    torch.testing.assert_close(rate.double(), expected, rtol=0, atol=0.015)
    assert found.correct.tolist() == [True, True, True, True, False]
    assert found.certified(0.25).tolist() == [False, False, True, True, False]


def test_more_draws_certify_further():
    model, normal = half_space()
    x, labels = at_distances(normal, [0.3]), torch.tensor([0])
    radii = [
        certify(model, x, labels, sigma=0.25, n=n, random=streams(1)).radius.item()
        for n in (50, 500, 5000)
    ]
    assert radii == sorted(radii)
    assert 0 < radii[0] < radii[2] - 0.05


def test_undecided_images_are_abstained_from():
    model, normal = half_space()
    x, labels = at_distances(normal, [0.0, 0.001, 0.4]), torch.zeros(3, dtype=torch.int64)
    found = certify(model, x, labels, sigma=0.25, n=1000, random=streams(3))
    assert found.abstained.tolist() == [True, True, False]
    assert found.prediction[:2].tolist() == [-1, -1]
    assert found.radius[:2].tolist() == [0.0, 0.0]
    assert not found.correct[:2].any()
    answers = predict(model, x, sigma=0.25, n=200, random=streams(3))
    assert answers.tolist() == [-1, -1, 0]


def test_wrong_certificates_are_as_rare_as_stated():
    """At the very boundary no radius is true: each one issued is wrong, at most alpha of them."""
    model, normal = half_space()
    x = at_distances(normal, [0.0] * 300)
    labels = torch.zeros(300, dtype=torch.int64)
    found = certify(model, x, labels, sigma=0.25, n0=10, n=100, alpha=0.1, random=streams(300))
    wrong = int((~found.abstained).sum())
    # The lower bound is one-sided and the class chosen beforehand.
    assert wrong > 0
    assert binomtest(wrong, 300, 0.1, alternative="greater").pvalue > 0.001


def test_the_same_numbers_whatever_the_batch(noisy_model, digits):
    x, labels = digits.test.images(slice(0, 9)), digits.test.labels[:9]
    found = [
        certify(noisy_model, x, labels, sigma=0.25, n=200, batch_size=size, random=streams(9))
        for size in (1, 7, 64, 1000)
    ]
    alone = certify(
        noisy_model, x[4:5], labels[4:5], sigma=0.25, n=200,
        random=SampleRandom.create(0, torch.tensor([4])),
    )  # fmt: skip
    for other in found[1:]:
        assert torch.equal(other.counts, found[0].counts)
        assert torch.equal(other.radius, found[0].radius)
    assert alone.counts.item() == found[0].counts[4].item()
    other = certify(noisy_model, x, labels, sigma=0.25, n=200, random=streams(9, seed=1))
    assert not torch.equal(other.counts, found[0].counts)


def test_a_certificate_and_its_curve(noisy_model, digits):
    x, labels = digits.test.images(slice(0, 100)), digits.test.labels[:100]
    found = certify(noisy_model, x, labels, sigma=0.25, n=500, random=streams(100))
    curve = found.curve([0.0, 0.1, 0.25, 0.5, found.largest_radius])
    shares = [point.accuracy for point in curve]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.75
    assert shares[2] > 0.4
    assert shares[-1] == 0.0
    assert float(found.radius.max()) <= found.largest_radius
    assert curve[1].interval[0] < curve[1].accuracy < curve[1].interval[1]
    assert curve[1].certified == round(100 * curve[1].accuracy)
    with pytest.raises(UsageError, match="finite radii"):
        found.curve([-1.0])


def test_no_attack_on_the_smoothed_model_crosses_its_certificate(noisy_model, digits):
    """Just inside each radius the smoothed class must hold, judged with many draws."""
    x, labels = digits.test.images(slice(0, 60)), digits.test.labels[:60]
    found = certify(noisy_model, x, labels, sigma=0.25, n=500, random=streams(60))
    for radius in (0.15, 0.3):
        certified = found.certified(radius)
        assert int(certified.sum()) > 10
        threat = ThreatModel("l2", radius)
        fallen = torch.zeros(60, dtype=torch.bool)
        for attack in (MM(steps=10), PGD(steps=10, loss="margin")):
            result = run(
                attack, Smoothed(noisy_model, 0.25, draws=8), x, labels, threat,
                random=streams(60),
            )  # fmt: skip
            # Not the few draws of the attack count, but what the smoothed classifier says.
            judged = predict(noisy_model, result.adversarial, sigma=0.25, n=500, random=streams(60))
            fallen |= (judged != -1) & (judged != labels)
        assert not len(crossed(certified, fallen))
        # The attack is no formality: of what was classified correctly but not certified, it
        # takes some.
        assert bool((fallen & found.correct).any()) or radius < 0.2


def test_the_smoothed_module_is_the_mean_over_noise():
    """Of a linear model: the mean of logits is the logits, of P(class) it is near Phi(d/sigma)."""
    model, normal = half_space()
    sharp = nn.Sequential(model, nn.Linear(2, 2, bias=False))
    sharp[1].weight.data = 1000 * torch.eye(2)
    x = at_distances(normal, [0.1, 0.3])
    torch.manual_seed(0)
    mean = Smoothed(model, 0.25, draws=4000, mean_of="logits")(x)
    torch.testing.assert_close(mean, model(x), rtol=0, atol=0.02)
    share = Smoothed(sharp, 0.25, draws=4000)(x).exp()[:, 0]
    assert share.tolist() == pytest.approx(norm.cdf([0.1 / 0.25, 0.3 / 0.25]), abs=0.03)
    # Fresh noise each time.
    once = Smoothed(model, 0.25, draws=1)
    assert not torch.equal(once(x), once(x))


def test_what_is_crafted_does_not_hang_on_the_batch(noisy_model, digits):
    """The engine seeds each call alike; a row's noise must not depend on its place."""
    x, labels = digits.test.images(slice(0, 40)), digits.test.labels[:40]
    smoothed, threat = Smoothed(noisy_model, 0.25, draws=4), ThreatModel("l2", 0.6)
    attack, found = PGD(steps=5, loss="margin"), []
    for split in ([range(40)], [range(7), range(7, 40)], [range(20, 40), range(20)]):
        crafted, logits = torch.zeros_like(x), torch.zeros(40, 10)
        for rows in map(torch.tensor, split):
            random = SampleRandom.create(0, rows)
            crafted[rows] = craft(attack, smoothed, x[rows], labels[rows], threat, random=random)
            logits[rows] = predict_logits(smoothed, crafted[rows], draws=2)
        found.append((crafted, logits))
    fallen = found[0][1].argmax(1) != labels
    assert 5 < int(fallen.sum()) < 35
    for crafted, logits in found[1:]:
        assert torch.equal(crafted, found[0][0])
        assert torch.equal(logits, found[0][1])


def test_noise_training_prepares_for_noise(model, digits):
    x, labels = digits.test.images(slice(None)), digits.test.labels
    # At 0.25 the digits stay legible and both do well.
    step = NoiseTraining(0.5)
    prepared = ra.train("small-cnn", digits, step=step, epochs=12).model

    def under_noise(judged: nn.Module) -> float:
        random = streams(len(x))
        return sum(
            float((step.validation_logits(judged, x, labels, random=random).argmax(1) == labels)
                  .double().mean())
            for _ in range(20)
        ) / 20  # fmt: skip

    assert under_noise(prepared) > under_noise(model) + 0.05
    assert step.parameters() == {"sigma": 0.5, "label_smoothing": 0.0}
    for options in ({"sigma": 0.0}, {"sigma": math.nan}, {"sigma": 1.0, "label_smoothing": 1.0}):
        with pytest.raises(UsageError, match="expected a"):
            NoiseTraining(**options)


def test_the_noise_is_gaussian_and_belongs_to_the_sample():
    step, images = NoiseTraining(0.5), torch.full((64, 1, 8, 8), 0.5)
    flat = nn.Flatten()
    labels = torch.zeros(64, dtype=torch.int64)
    _, noisy = step(flat, images, labels, random=streams(64))
    noise = (noisy - 0.5) / 0.5
    assert abs(float(noise.mean())) < 0.05
    assert float(noise.std()) == pytest.approx(1.0, abs=0.05)
    _, alone = step(flat, images[3:4], labels[3:4],
                    random=SampleRandom.create(0, torch.tensor([3])))  # fmt: skip
    assert torch.equal(alone[0], noisy[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma: expected finite and above 0"),
        ({"alpha": 1.0}, "alpha: expected between 0 and 1"),
        ({"n": 0}, "n: expected an integer of at least 1"),
        ({"n0": 2.5}, "n0: expected an integer"),
        ({"batch_size": 0}, "batch_size: expected an integer"),
    ],
)
def test_wrong_settings(options, message):
    model, normal = half_space()
    with pytest.raises(UsageError, match=message):
        certify(model, at_distances(normal, [0.1]), torch.tensor([0]),
                **{"sigma": 0.25, "random": streams(1), **options})  # fmt: skip


def test_wrong_data_and_models():
    model, normal = half_space()
    x = at_distances(normal, [0.1, 0.2])
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(DataError, match="one random stream an image"):
        certify(model, x, labels, sigma=0.25, random=streams(1))
    with pytest.raises(DataError, match="returns 2 logits"):
        certify(model, x, labels + 2, sigma=0.25, random=streams(2))
    with pytest.raises(ModelError, match="classes"):
        certify(nn.Flatten(0), x, labels, sigma=0.25, random=streams(2))
    model[1].bias.data[0] = math.nan
    with pytest.raises(ModelError, match="finite"):
        predict(model, x, sigma=0.25, random=streams(2))
    with pytest.raises(UsageError, match="mean_of"):
        Smoothed(model, 0.25, mean_of="votes")
    with pytest.raises(UsageError, match="draws"):
        Smoothed(model, 0.25, draws=0)
    with pytest.raises(UsageError, match="check the counts"):
        lower_confidence(3, 2, 0.1)
