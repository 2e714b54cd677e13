"""Common corruptions: how the model fares where nobody attacks, only the world gets worse.

They are no attacks here, on purpose. A corruption is not bounded by eps: severe blur moves an
image much farther than any threat model of an audit allows. Run as an attack, it would either
count as a success outside the threat model, or be projected back into it, and then it is neither
the corruption that its name says nor comparable with published corruption accuracies. Both would
make a headline dishonest. So corrupted images are never projected, never judged against eps and
never part of robust accuracy. They yield an accuracy of its own, :func:`corruption_accuracy`, in
an audit ``result.corruptions``. That is a control to read beside the attacks: a model that fails
under noise of severity 1 needs no attacker.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.attacks.engine import check_classes, check_labels, predict_logits
from robustann.errors import DataError, UsageError, unknown_name
from robustann.metrics import wilson_interval
from robustann.rng import SampleRandom
from robustann.threat import check_images

# Images up to this side take the parameters of the 32x32 variant.
_SMALL_SIDE = 64


@dataclass(frozen=True)
class _Kind:
    apply: Callable[[Tensor, float, SampleRandom], Tensor]
    small: tuple[float, ...]
    large: tuple[float, ...]


def _gaussian_noise(images: Tensor, size: float, random: SampleRandom) -> Tensor:
    return images + size * random.to(images.device).normal(*images.shape[1:])


def _gaussian_blur(images: Tensor, size: float, random: SampleRandom) -> Tensor:
    """Cut off at four standard deviations, edges repeated.

    Sums of shifted images instead of a convolution: no image's last bits hang on its batch.
    """
    reach = int(4 * size + 0.5)
    weights = [np.exp(-0.5 * (step / size) ** 2) for step in range(-reach, reach + 1)]
    total = sum(weights)
    padded = F.pad(images, (reach, reach, 0, 0), mode="replicate")
    width, height = images.shape[3], images.shape[2]
    rows = torch.zeros_like(images)
    for step, weight in enumerate(weights):
        rows += padded[..., step : step + width] * float(weight / total)
    padded = F.pad(rows, (0, 0, reach, reach), mode="replicate")
    blurred = torch.zeros_like(images)
    for step, weight in enumerate(weights):
        blurred += padded[..., step : step + height, :] * float(weight / total)
    return blurred


def _brightness(images: Tensor, size: float, random: SampleRandom) -> Tensor:
    """The value of HSV raised; hue and saturation stay, so the channels keep their proportions."""
    value = images.amax(1, keepdim=True)
    raised = (value + size).clamp(max=1.0)
    tiny = torch.finfo(images.dtype).tiny
    # Black has no proportions: it becomes grey.
    share = torch.where(value > tiny, images / value.clamp(min=tiny), torch.ones_like(images))
    return share * raised


def _contrast(images: Tensor, size: float, random: SampleRandom) -> Tensor:
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * size + mean


def _jpeg(images: Tensor, size: float, random: SampleRandom) -> Tensor:
    from PIL import Image

    if images.shape[1] not in (1, 3):
        raise DataError(
            f"expected images of 1 or 3 channels for jpeg, got {images.shape[1]}; "
            "leave this corruption out"
        )
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    decoded = []
    for image in pixels:
        stream = io.BytesIO()
        shaped = image[..., 0] if image.shape[-1] == 1 else image
        Image.fromarray(shaped).save(stream, format="JPEG", quality=int(size))
        decoded.append(np.asarray(Image.open(stream)).reshape(image.shape))
    back = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)
    return (back.float() / 255).to(images.device)


_KINDS: Mapping[str, _Kind] = {
    "gaussian_noise": _Kind(
        _gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    "gaussian_blur": _Kind(_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "brightness": _Kind(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": _Kind(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "jpeg": _Kind(_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
CORRUPTIONS: tuple[str, ...] = tuple(_KINDS)
SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """One corruption at one severity (Hendrycks and Dietterich, ICLR 2019). No attack: see above.

    Images with a shorter side of at most 64 take the parameters of the paper's 32x32 variant
    (CIFAR-10-C), larger ones those of ImageNet-C. Unlike the published image sets, results are
    not rounded to 8 bits, except by JPEG.

    Args:
        kind: ``gaussian_noise``, ``gaussian_blur``, ``brightness``, ``contrast`` or ``jpeg``.
        severity: 1 to 5.

    Raises:
        UsageError: another kind or severity.

    >>> Corruption(kind="contrast", severity=5).label
    'contrast:5'
    """

    kind: str = "gaussian_noise"
    severity: int = 3

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise unknown_name("corruption", self.kind, _KINDS)
        if self.severity not in SEVERITIES:
            raise UsageError(
                f"expected a severity from 1 to 5, got {self.severity}; 5 is the worst"
            )

    @property
    def label(self) -> str:
        """Kind and severity."""
        return f"{self.kind}:{self.severity}"

    def __call__(self, images: Tensor, random: SampleRandom) -> Tensor:
        """Corrupted images, float32 in [0, 1], of the shape and on the device of ``images``.

        Args:
            images: float images (N, C, H, W) in [0, 1].
            random: one stream a sample; only noise draws from it.

        Raises:
            DataError: the images are unfit.
        """
        check_images(images)
        if len(random) != len(images):
            raise DataError(
                f"expected one random stream for each of {len(images)} images, got {len(random)}; "
                "make them with SampleRandom.create"
            )
        chosen = _KINDS[self.kind]
        sizes = chosen.small if min(images.shape[2:]) <= _SMALL_SIDE else chosen.large
        corrupted = chosen.apply(images.detach().float(), sizes[self.severity - 1], random)
        return corrupted.clamp(0.0, 1.0)


def corrupt(images: Tensor, kind: str, severity: int, random: SampleRandom) -> Tensor:
    """Corrupted images; nothing bounds their distance (see :class:`Corruption`).

    Raises:
        UsageError: unknown kind, or a severity outside 1 to 5.
        DataError: the images are unfit.

    >>> x = torch.tensor([[[[0.0, 1.0]]]])
    >>> corrupt(x, "contrast", 2, SampleRandom.create(0, torch.arange(1)))
    tensor([[[[0.2500, 0.7500]]]])
    """
    return Corruption(kind=kind, severity=severity)(images, random)


@dataclass(frozen=True)
class CorruptionAccuracy:
    """What a model gets right of corrupted images.

    Attributes:
        corruption: which one.
        correct: whether each of the N images is classified correctly, bool (N,), on the CPU.

    >>> CorruptionAccuracy(Corruption(), torch.tensor([True, False])).accuracy
    0.5
    """

    corruption: Corruption
    correct: Tensor

    @property
    def accuracy(self) -> float:
        """Share of all N images that are classified correctly."""
        return float(self.correct.double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of :attr:`accuracy` (Wilson)."""
        return wilson_interval(int(self.correct.sum()), len(self.correct))


def corruption_accuracy(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    random: SampleRandom,
    kinds: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    batch_size: int = 256,
    seed: int = 0,
    draws: int = 1,
) -> tuple[CorruptionAccuracy, ...]:
    """Accuracy under each kind and severity: plain accuracies, not robustness to an attacker.

    Args:
        model: maps images in [0, 1] to logits; left as it was.
        x: float images (N, C, H, W) in [0, 1].
        labels: the true classes, int64 (N,).
        random: one stream a sample; the same noise whatever the batch size.
        kinds: which corruptions.
        severities: which of 1 to 5.
        batch_size: images a batch.
        seed: of a randomised model's own draws.
        draws: forwards averaged for each answer of a randomised model.

    Returns:
        One entry for each kind and severity, kinds first.

    Raises:
        UsageError: unknown kind, or a severity outside 1 to 5.
        DataError: images or labels are unfit.
        ModelError: the model's output is unfit.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64)
    >>> random = SampleRandom.create(0, torch.arange(6))
    >>> len(corruption_accuracy(model, x, y, random=random, kinds=["contrast"]))
    5
    """
    check_images(x)
    check_labels(labels, len(x))
    labels = labels.cpu()
    corruptions = [
        Corruption(kind=kind, severity=severity) for kind in kinds for severity in severities
    ]
    found = []
    for corruption in corruptions:
        streams = random.fork(corruption.label)
        correct = []
        for rows in torch.arange(len(x)).split(batch_size):  # type: ignore[no-untyped-call]
            images = corruption(x[rows.to(x.device)], streams.select(rows))
            logits = predict_logits(model, images, batch_size=batch_size, seed=seed, draws=draws)
            check_classes(labels, logits.shape[1])
            correct.append(logits.argmax(1) == labels[rows])
        found.append(CorruptionAccuracy(corruption, torch.cat(correct)))
    return tuple(found)
