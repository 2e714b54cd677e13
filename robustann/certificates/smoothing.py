"""Randomised smoothing (Cohen et al., ICML 2019, https://arxiv.org/abs/1902.02918)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustann.attacks.engine import (
    ALIGNMENT,
    check_classes,
    check_labels,
    frozen,
    model_device,
)
from robustann.errors import DataError, ModelError, UsageError
from robustann.metrics import wilson_interval
from robustann.progress import Advance, progress_bar
from robustann.rng import SampleRandom
from robustann.threat import check_images

ABSTAINED = -1
# Draws of an image's noise made in one go: fixed, so that the noise never hangs on the batch.
_BLOCK = 32


@dataclass(frozen=True)
class CurvePoint:
    """Certified accuracy at one radius.

    Attributes:
        radius: l2.
        certified: how many images are classified correctly with a certified radius beyond it.
        accuracy: their share of all images.
        interval: 95 % Wilson interval of the share.

    >>> found = SmoothingCertificate(
    ...     prediction=torch.tensor([0, 1]), radius=torch.tensor([0.4, 0.2]),
    ...     labels=torch.tensor([0, 1]), guess=torch.tensor([0, 1]), counts=torch.tensor([99, 80]),
    ...     sigma=0.25, n0=10, n=100, alpha=0.001,
    ... )
    >>> [(point.radius, point.accuracy) for point in found.curve([0.0, 0.25, 0.5])]
    [(0.0, 1.0), (0.25, 0.5), (0.5, 0.0)]
    """

    radius: float
    certified: int
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True, eq=False)
class SmoothingCertificate:
    """What is proven about the smoothed classifier at N images, one row an image, on the CPU.

    Of each image, with a probability of at least 1 - ``alpha`` over the draws: the smoothed
    classifier predicts ``prediction`` on every image less than ``radius`` away in l2.

    Attributes:
        prediction: the class, -1 where it abstained.
        radius: float64; 0 where it abstained.
        labels: the true classes.
        guess: the class that won the first ``n0`` draws, which the others were to confirm.
        counts: how many of the ``n`` further draws did.
        sigma: standard deviation of the noise, for images in [0, 1].
        n0: draws to choose the class.
        n: draws to bound its probability.
        alpha: share of certificates that may be wrong by chance.

    >>> found = SmoothingCertificate(
    ...     prediction=torch.tensor([0, -1]), radius=torch.tensor([0.4, 0.0]),
    ...     labels=torch.tensor([0, 1]), guess=torch.tensor([0, 1]), counts=torch.tensor([99, 50]),
    ...     sigma=0.25, n0=10, n=100, alpha=0.001,
    ... )
    >>> found.abstained.tolist(), found.certified(0.25).tolist(), round(found.largest_radius, 3)
    ([False, True], [True, False], 0.375)
    """

    prediction: Tensor
    radius: Tensor
    labels: Tensor
    guess: Tensor
    counts: Tensor
    sigma: float
    n0: int
    n: int
    alpha: float

    @property
    def abstained(self) -> Tensor:
        """Where the draws were too few to tell, or no class has more than half of them."""
        return self.prediction == ABSTAINED

    @property
    def correct(self) -> Tensor:
        """Where the prediction is certified and equals the label."""
        return self.prediction == self.labels

    @property
    def largest_radius(self) -> float:
        """What an image gets of whose ``n`` draws every one agrees; further needs more draws."""
        return certified_radius(self.n, self.n, sigma=self.sigma, alpha=self.alpha)

    def certified(self, radius: float) -> Tensor:
        """Which images are correct on the whole closed ball of this l2 radius, bool (N,)."""
        return self.correct & (self.radius > radius)

    def curve(self, radii: Sequence[float]) -> tuple[CurvePoint, ...]:
        """Certified accuracy at each radius, for a report."""
        points = []
        for radius in radii:
            if not (math.isfinite(radius) and radius >= 0):
                raise UsageError(f"expected finite radii >= 0, got {radius}; leave it out")
            count, total = int(self.certified(radius).sum()), len(self.labels)
            interval = wilson_interval(count, total)
            points.append(CurvePoint(float(radius), count, count / total, interval))
        return tuple(points)


def lower_confidence(successes: int, n: int, alpha: float) -> float:
    """The one-sided lower bound on a rate, by Clopper and Pearson (1934), at 1 - ``alpha``.

    >>> round(lower_confidence(100, 100, 0.001), 4)  # 0.001 ** (1 / 100)
    0.9333
    """
    if n < 1 or not 0 <= successes <= n or not 0 < alpha < 1:
        raise UsageError(
            f"expected 0 <= successes <= n, n >= 1 and 0 < alpha < 1, got {successes} of {n} and "
            f"alpha {alpha}; check the counts"
        )
    if successes == 0:
        return 0.0
    from scipy.stats import beta

    return float(beta.ppf(alpha, successes, n - successes + 1))


def certified_radius(successes: int, n: int, *, sigma: float, alpha: float) -> float:
    """The l2 radius for a class that won so many of ``n`` draws; 0 where that proves nothing.

    ``sigma * Phi^-1(p)`` for the lower bound p on the class's probability, if above one half.

    >>> round(certified_radius(990, 1000, sigma=0.25, alpha=0.001), 3)
    0.495
    """
    lower = lower_confidence(successes, n, alpha)
    if lower <= 0.5:
        return 0.0
    from scipy.stats import norm

    return float(sigma * norm.ppf(lower))


def certify(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    batch_size: int = 256,
    random: SampleRandom,
    progress: bool = False,
) -> SmoothingCertificate:
    """Certify the smoothed classifier: the class that ``model`` most often gives under noise.

    It is the smoothed classifier that is certified, not ``model`` itself, which stays as it was.
    The draws of an image depend on its stream in ``random`` alone.

    Args:
        model: maps images in [0, 1] plus noise, not clipped, to logits; best one trained with the
            same noise (:class:`robustann.defenses.NoiseTraining`).
        x: float images (N, C, H, W) in [0, 1].
        labels: int64 (N,), the true classes.
        sigma: standard deviation of the Gaussian noise.
        n0: draws to choose the class.
        n: draws to bound its probability.
        alpha: chance that an image's certificate is wrong.
        batch_size: noisy images passed through the model at once.
        random: one stream a sample.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        UsageError: a value out of its range.
        DataError: images or labels are unfit.
        ModelError: the output is no row of finite logits an image.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> x, labels = torch.tensor([[[[0.5]]], [[[0.0]]]]), torch.tensor([0, 0])
    >>> random = SampleRandom.create(0, torch.arange(2))
    >>> found = certify(model, x, labels, sigma=0.5, n=1000, random=random)
    >>> found.abstained.tolist(), bool(0.4 < found.radius[0] < 0.5)
    ([False, True], True)
    """
    _check_draws(x, random, sigma=sigma, alpha=alpha, batch_size=batch_size, n0=n0, n=n)
    check_labels(labels, len(x))
    with progress_bar(len(x) * (n0 + n), wanted=progress, unit="draws") as advance:
        first = _votes(model, x, sigma, n0, random.fork("choose"), batch_size, advance)
        check_classes(labels, first.shape[1])
        guess = first.argmax(1)
        votes = _votes(model, x, sigma, n, random.fork("bound"), batch_size, advance)
    counts = votes.gather(1, guess[:, None]).squeeze(1)
    radius = torch.tensor(
        [certified_radius(int(c), n, sigma=sigma, alpha=alpha) for c in counts],
        dtype=torch.float64,
    )
    return SmoothingCertificate(
        prediction=torch.where(radius > 0, guess, ABSTAINED),
        radius=radius,
        labels=labels.cpu(),
        guess=guess,
        counts=counts,
        sigma=sigma,
        n0=n0,
        n=n,
        alpha=alpha,
    )


def predict(
    model: nn.Module,
    x: Tensor,
    *,
    sigma: float,
    n: int = 1000,
    alpha: float = 0.001,
    batch_size: int = 256,
    random: SampleRandom,
) -> Tensor:
    """The smoothed classifier's class of each image, or -1 where it abstains, int64 (N,).

    Abstains where a two-sided binomial test between the two most frequent classes does not reject
    a tie at level ``alpha`` (Hung and Fithian 2019); an answer differs from the smoothed
    classifier's with a probability of at most ``alpha``. Arguments and errors as in
    :func:`certify`.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> x, random = torch.tensor([[[[0.5]]], [[[0.0]]]]), SampleRandom.create(0, torch.arange(2))
    >>> predict(model, x, sigma=0.5, n=100, random=random).tolist()
    [0, -1]
    """
    from scipy.stats import binomtest

    _check_draws(x, random, sigma=sigma, alpha=alpha, batch_size=batch_size, n=n)
    votes = _votes(model, x, sigma, n, random.fork("predict"), batch_size, lambda count, what: None)
    top = votes.topk(2, dim=1)
    sure = [
        binomtest(first, first + second, 0.5).pvalue <= alpha
        for first, second in top.values.tolist()
    ]
    return torch.where(torch.tensor(sure), top.indices[:, 0], ABSTAINED)


class Smoothed(nn.Module):
    """The smoothed classifier, roughly and differentiably: to be attacked, not to certify.

    Each forward draws fresh noise from PyTorch's global random numbers, so attacks should average
    over several (``draws`` of :func:`robustann.attacks.engine.run`: EOT). The images of a forward
    share its noise, so that what is found out about one does not hang on the others; the noise of
    a certificate is each image's own. The mean of softmax
    outputs, returned as its logarithm, follows Salman et al. (NeurIPS 2019,
    https://arxiv.org/abs/1906.04584).

    Args:
        model: maps images to logits.
        sigma: standard deviation of the noise.
        draws: noisy copies of each image in one forward.
        mean_of: ``softmax`` or ``logits``.

    Raises:
        UsageError: a value out of its range.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> Smoothed(model, 0.25, draws=8)(torch.rand(5, 1, 2, 2)).exp().sum(1).shape
    torch.Size([5])
    """

    def __init__(
        self, model: nn.Module, sigma: float, draws: int = 16, mean_of: str = "softmax"
    ) -> None:
        super().__init__()
        _check_settings(sigma=sigma, draws=draws)
        if mean_of not in ("softmax", "logits"):
            raise UsageError(f"expected mean_of as softmax or logits, got '{mean_of}'")
        self.model = model
        self.sigma = sigma
        self.draws = draws
        self.mean_of = mean_of

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K), or the logarithm of mean probabilities."""
        # The same for all images of a call: noise of their own would hang on their places in it.
        noise = torch.randn(
            self.draws, 1, *images.shape[1:], dtype=images.dtype, device=images.device
        )
        noisy = (images + self.sigma * noise).flatten(0, 1)
        logits: Tensor = self.model(noisy).view(self.draws, len(images), -1)
        if self.mean_of == "logits":
            return logits.mean(0)
        # The logarithm of a mean, without leaving logarithms: tiny probabilities survive.
        return logits.log_softmax(2).logsumexp(0) - math.log(self.draws)


def _check_settings(**values: float) -> None:
    for name, value in values.items():
        if name == "alpha":
            expected, fits = "between 0 and 1", 0 < value < 1
        elif name == "sigma":
            expected, fits = "finite and above 0", 0 < value < math.inf
        else:
            expected, fits = "an integer of at least 1", isinstance(value, int) and value >= 1
        if not fits:
            raise UsageError(f"{name}: expected {expected}, got {value!r}")


def _check_draws(x: Tensor, random: SampleRandom, **settings: float) -> None:
    _check_settings(**settings)
    check_images(x)
    if len(random) != len(x):
        raise DataError(
            f"expected one random stream an image, got {len(random)} for {len(x)} images; "
            "make them with SampleRandom.create(seed, indices)"
        )


def _votes(
    model: nn.Module,
    x: Tensor,
    sigma: float,
    n: int,
    random: SampleRandom,
    batch_size: int,
    advance: Advance,
) -> Tensor:
    """How often each class won among ``n`` draws, int64 (N, K), on the CPU."""
    device = model_device(model)
    groups = max(1, batch_size // _BLOCK)
    parts = []
    with frozen(model, random.seed), torch.no_grad():
        for rows in torch.arange(len(x)).split(groups):  # type: ignore[no-untyped-call]
            images = x[rows].to(device, torch.float32)
            streams = random.to("cpu").select(rows).to(device)
            votes = torch.zeros(0)
            for noise in _noise(streams, n, images.shape[1:]):
                noisy = (images[:, None] + sigma * noise).flatten(0, 1)
                classes, width = _winners(model, noisy, batch_size)
                if not len(votes):
                    votes = torch.zeros(len(rows), width, dtype=torch.int64, device=device)
                won = classes.view(len(rows), -1)
                votes.scatter_add_(1, won, torch.ones_like(won))
                advance(won.numel(), "drawing")
            parts.append(votes.cpu())
    return torch.cat(parts)


def _noise(streams: SampleRandom, n: int, shape: torch.Size) -> Iterator[Tensor]:
    """Standard normal noise (M, draws, C, H, W), ``n`` draws in all."""
    for start in range(0, n, _BLOCK):
        # Whole blocks: a draw is the same however many are asked for.
        yield streams.normal(_BLOCK, *shape)[:, : n - start]


def _winners(model: nn.Module, noisy: Tensor, batch_size: int) -> tuple[Tensor, int]:
    found, width = [], 0
    for part in noisy.split(batch_size):  # type: ignore[no-untyped-call]
        # Filled up, so that the last bits do not hang on the batch.
        filled = torch.cat([part, part[:1].expand(-len(part) % ALIGNMENT, *part.shape[1:])])
        logits = model(filled)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(filled):
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits)
            raise ModelError(
                f"expected logits of shape ({len(filled)}, classes), got {came}; wrap the model "
                "so that it returns one row per image"
            )
        logits = logits[: len(part)]
        if not bool(logits.isfinite().all()):
            raise ModelError(
                "expected finite logits, got NaN or infinity for a noisy image; check the weights"
            )
        found.append(logits.argmax(1))
        width = logits.shape[1]
    return torch.cat(found), width
