"""Training on noisy images."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.errors import UsageError
from robustann.rng import SampleRandom


class NoiseTraining:
    """Cross-entropy on images with Gaussian noise (Cohen et al., ICML 2019).

    Makes a base model for randomised smoothing with the same ``sigma``
    (:func:`robustann.certificates.certify`), as a step for :func:`robustann.training.train`. The
    noisy images are not clipped, nor are those that get certified. Validation uses noisy images
    too, so the epoch chosen is the one best under noise.

    Helps only together with smoothing. Known not to make the model by itself robust against
    white-box attacks, whatever its accuracy under noise; nor does the l2 certificate reach far in
    linf: eps in linf is up to eps * sqrt(C * H * W) in l2.

    Args:
        sigma: standard deviation of the noise, for images in [0, 1].
        label_smoothing: share of the target spread over all classes.

    Raises:
        UsageError: a value out of range.

    >>> step = NoiseTraining(0.25)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> images, labels = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 2])
    >>> loss, logits = step(model, images, labels, random=SampleRandom.create(0, torch.arange(2)))
    >>> bool((logits[0] - logits[1]).abs().max() > 1e-3)  # the same image, other noise
    True
    """

    name: ClassVar[str] = "noise-training"
    kind: ClassVar[str] = "objective"
    paper: ClassVar[str] = "https://arxiv.org/abs/1902.02918"
    helps: ClassVar[tuple[str, ...]] = (
        "certified l2 radii of the smoothed model, of the order of sigma",
    )
    limits: ClassVar[tuple[str, ...]] = (
        "white-box attacks on the model itself, without smoothing",
        "certificates in linf, l1 and l0 worth having",
        "faults in the weights",
    )

    def __init__(self, sigma: float, *, label_smoothing: float = 0.0) -> None:
        if not 0 < sigma < math.inf:
            raise UsageError(f"sigma: expected a finite number above 0, got {sigma!r}")
        if not 0 <= label_smoothing < 1:
            raise UsageError(
                f"label_smoothing: expected a number from 0 to below 1, got {label_smoothing!r}"
            )
        self.sigma = sigma
        self.label_smoothing = label_smoothing

    def parameters(self) -> dict[str, Any]:
        """The noise and the label smoothing, as JSON values."""
        return {"sigma": self.sigma, "label_smoothing": self.label_smoothing}

    def _noisy(self, images: Tensor, random: SampleRandom) -> Tensor:
        return images + self.sigma * random.normal(*images.shape[1:])

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        """Return the loss on the noisy images and their logits (N, K).

        Args:
            model: in training mode; maps images in [0, 1] plus noise to logits.
            images: float (N, C, H, W) in [0, 1].
            labels: int64 (N,).
            random: one stream a sample.
        """
        logits = model(self._noisy(images, random))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return loss, logits

    def validation_logits(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> Tensor:
        """The logits (N, K) on noisy images; arguments as above."""
        with torch.no_grad():
            logits: Tensor = model(self._noisy(images, random))
        return logits
