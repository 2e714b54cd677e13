"""How the model fares where nobody attacks: accuracy under common corruptions, as a control."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from robustann.attacks.corruptions import CORRUPTIONS, SEVERITIES, corruption_accuracy
from robustann.auditing.batching import in_halves
from robustann.data import Split
from robustann.errors import ModelError
from robustann.progress import progress_bar
from robustann.results import CorruptionLevel, Corruptions, CorruptionScores, Interval
from robustann.rng import SampleRandom

# Of images with these many channels JPEG files can be made.
_JPEG_CHANNELS = (1, 3)


def corruption_kinds(shape: Sequence[int]) -> tuple[str, ...]:
    """The corruptions of images of this shape (C, H, W).

    >>> corruption_kinds((4, 8, 8))
    ('gaussian_noise', 'gaussian_blur', 'brightness', 'contrast')
    """
    return tuple(kind for kind in CORRUPTIONS if kind != "jpeg" or shape[0] in _JPEG_CHANNELS)


def corruption_propagations(shape: Sequence[int], count: int, draws: int = 1) -> int:
    """Forwards of single images that :func:`measure_corruptions` makes.

    >>> corruption_propagations((3, 32, 32), 10)
    250
    """
    return len(corruption_kinds(shape)) * len(SEVERITIES) * count * draws


def measure_corruptions(
    model: nn.Module,
    split: Split,
    positions: Tensor,
    *,
    seed: int = 0,
    draws: int = 1,
    batch_size: int = 256,
    progress: bool = False,
) -> Corruptions:
    """Accuracy under each common corruption (Hendrycks and Dietterich, ICLR 2019) and severity.

    No attack: nobody looks for the worst, and nothing keeps within an eps. So no outcome counts in
    robust accuracy, and a corruption that cannot be measured loses nothing else of an audit.

    Args:
        model: maps images in [0, 1] to logits; left as it was.
        split: images and labels.
        positions: of the samples to corrupt, int64 (N,); the noise of each is its own.
        seed: of the noise.
        draws: forwards averaged for each answer of a randomised model.
        batch_size: images at a time; of no other effect, unless the model is randomised.
        progress: show a bar on stderr if that is a terminal.

    Raises:
        DataError: images or labels are unfit for this model.

    >>> from robustann.data import TensorSplit
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> split = TensorSplit(torch.rand(6, 1, 2, 2), torch.arange(6) % 3)
    >>> found = measure_corruptions(model, split, torch.arange(6))
    >>> len(found.kinds), found.forwards
    (5, 150)
    """
    kinds = corruption_kinds(split.shape)
    correct: dict[str, list[int]] = {kind: [0] * len(SEVERITIES) for kind in kinds}
    with progress_bar(len(positions) * len(kinds), wanted=progress, unit="images") as advance:
        for part in positions.split(batch_size):  # type: ignore[no-untyped-call]
            images, labels = split.images(part).cpu(), split.labels[part]

            def measured(kind: str, rows: Tensor) -> list[list[int]]:
                found = corruption_accuracy(
                    model,
                    images[rows],  # noqa: B023
                    labels[rows],  # noqa: B023
                    random=SampleRandom.create(seed, part[rows]).fork("corruptions"),  # noqa: B023
                    kinds=[kind],
                    batch_size=len(rows),
                    seed=seed,
                    draws=draws,
                )
                return [[int(one.correct.sum()) for one in found]]

            for kind in [kind for kind in kinds if kind in correct]:
                try:
                    counts = in_halves(partial(measured, kind), torch.arange(len(part)))
                except ModelError:
                    del correct[kind]
                    continue
                for place, hits in enumerate(zip(*counts, strict=True)):
                    correct[kind][place] += sum(hits)
                advance(len(part), kind.replace("_", " "))
    n = len(positions)
    # Not the error's words, which count the images of a batch, and in the order of the kinds: no
    # batch is to be seen in a result.
    reasons = {
        kind: "the model gave no finite logits"
        if kind in kinds
        else f"images of {split.shape[0]} channels do not allow it"
        for kind in CORRUPTIONS
        if kind not in correct
    }
    every = [count for counts in correct.values() for count in counts]
    return Corruptions(
        kinds=tuple(
            CorruptionScores(
                kind=kind,
                levels=tuple(
                    CorruptionLevel(
                        severity=severity,
                        accuracy=count / n,
                        interval=Interval.of_rate(count, n),
                    )
                    for severity, count in zip(SEVERITIES, counts, strict=True)
                ),
            )
            for kind, counts in correct.items()
        ),
        mean_accuracy=sum(every) / (n * len(every)) if every else None,
        # Of what was measured: where a kind was given up hangs on the batches.
        forwards=n * len(every) * draws,
        not_measured=tuple(f"{kind}: {reason}" for kind, reason in reasons.items()),
    )
