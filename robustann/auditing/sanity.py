"""Before an audit: does the model see the images as it did in training?

A wrong normalisation is the commonest mistake when a model of someone else's is loaded: nothing
fails, the accuracy is merely low, and an audit would measure that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustann.attacks.engine import frozen, model_device
from robustann.data import Split
from robustann.metrics import wilson_interval
from robustann.rounding import percent

_IMAGES = 256
# What else is tried goes to so many of them.
_TRIED = 64
# How much better another normalisation must be, and how unlikely that by chance.
_BETTER, _UNLIKELY = 0.1, 0.01
_DIM = 1 / 16
_RANGE_TOLERANCE = 1e-6

Channels = tuple[float, ...]


@dataclass(frozen=True)
class _Habit:
    """A normalisation that networks are commonly trained with."""

    words: str
    option: str
    mean: Channels
    std: Channels
    reverse: bool = False


_HABITS = (
    _Habit("no normalisation", "--mean 0 --std 1", (0.0,), (1.0,)),
    _Habit(
        "ImageNet's normalisation",
        "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    ),
    _Habit("images in [-1, 1]", "--bounds=-1,1", (0.5,), (0.5,)),
    _Habit("images in [0, 255]", "--bounds 0,255", (0.0,), (1 / 255,)),
    _Habit(
        "CIFAR-10's normalisation",
        "--mean 0.4914,0.4822,0.4465 --std 0.247,0.2435,0.2616",
        (0.4914, 0.4822, 0.4465),
        (0.247, 0.2435, 0.2616),
    ),
    _Habit("MNIST's normalisation", "--mean 0.1307 --std 0.3081", (0.1307,), (0.3081,)),
    _Habit(
        "Caffe's colours (blue first, means of [0, 255] taken off)",
        "a factory that turns the channels round (images.flip(1)), --bounds 0,255 and "
        "--mean 103.939,116.779,123.68",
        (103.939 / 255, 116.779 / 255, 123.68 / 255),
        (1 / 255,),
        reverse=True,
    ),
)


def advise(
    model: nn.Module,
    split: Split,
    positions: Tensor,
    *,
    clean_accuracy: float | None = None,
    seed: int = 0,
) -> tuple[str, ...]:
    """What looks wrong about how the model is fed, and what to try.

    It looks at up to 256 images, and tries other normalisations on up to 64: some 700 forward
    passes of single images.

    Args:
        model: maps images in [0, 1] to logits; left as it was.
        split: the images and labels.
        positions: which of them are audited.
        clean_accuracy: on all of them, where it is known already.
        seed: of a model that draws random numbers.

    Returns:
        Sentences; none where nothing looks wrong.

    >>> from robustann.data import load_data
    >>> data = load_data("digits").test
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> _ = nn.init.zeros_(model[1].weight)
    >>> _ = nn.init.zeros_(model[1].bias)
    >>> print(advise(model, data, torch.arange(len(data)))[0])
    clean accuracy 8.9 % is no better than guessing among 10 classes on 180 images: attacks on ...
    """
    step = max(1, math.ceil(len(positions) / _IMAGES))
    chosen = positions[::step]
    images, labels = split.images(chosen).cpu(), split.labels[chosen]
    found = [*_range(images)]
    mean, std = _own(model, images.shape[1])
    predicted, classes = _predict(model, images, seed)
    right = predicted == labels
    count, share = len(right), float(right.double().mean())
    if clean_accuracy is not None:
        count, share = len(positions), clean_accuracy
    chance = 1 / classes
    # Of few images all that are right may be luck; that is no reason to doubt them.
    guessing = share < 1 and wilson_interval(round(share * count), count)[0] <= chance
    if guessing:
        found.append(
            f"clean accuracy {percent(share)} is no better than guessing among {classes} classes "
            f"on {count} images: attacks on such a model tell nothing. Usual causes: another "
            "normalisation than in training (--mean, --std, --bounds), another order of classes "
            "(--class-names), another image size (--input-size), weights that were never loaded"
        )
    better = _tried(model, images[:_TRIED], labels[:_TRIED], right[:_TRIED], mean, std, seed)
    order = _order(predicted, labels, classes, share)
    layer = None if _plain(mean, std) else _own_layer(model, images.shape[1])
    explained = [one for one in (better, order) if one is not None]
    if explained:
        # Whichever makes more images right.
        found.append(max(explained)[1])
    elif layer is not None:
        found.append(
            f"the network seems to normalise by itself (its part '{layer}'), and mean and std are "
            "applied before it: images may be normalised twice. If so, pass --mean 0 --std 1"
        )
    return tuple(found)


def _range(images: Tensor) -> list[str]:
    low, high = float(images.min()), float(images.max())
    if low < -_RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
        return [
            f"images leave [0, 1]: they go from {low:.3g} to {high:.3g}, so a threat model of "
            "[0, 1] does not fit. Undo their normalisation, or divide them by 255; mean and std "
            "belong into the model"
        ]
    if high < _DIM:
        return [
            f"no image is brighter than {high:.3g} of 1: they were probably divided by 255 twice. "
            "Hand them over as uint8, or as float in [0, 1]"
        ]
    return []


def _tried(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    right: Tensor,
    mean: Tensor,
    std: Tensor,
    seed: int,
) -> tuple[float, str] | None:
    """What share of the images is right with a common normalisation that suits the model far
    better than its own, and which; None if there is none."""
    from scipy.stats import binomtest

    best, found = 0, None
    now = int(right.sum())
    for habit in _HABITS:
        if len(habit.mean) > 1 and images.shape[1] != len(habit.mean):
            continue
        other_mean, other_std = _column(habit.mean), _column(habit.std)
        turned = images.flip(1) if habit.reverse else images
        # What the model's own normalisation turns into the other one.
        fed = (turned - other_mean) / other_std * std + mean
        try:
            hit = _predict(model, fed, seed)[0] == labels
        except Exception:
            # A model may check its input, with an error of any kind; what it refuses it was not
            # trained on, and what is merely tried must not end an audit.
            continue
        gained, lost = int((hit & ~right).sum()), int((right & ~hit).sum())
        enough = gained - lost >= _BETTER * len(images) and gained + lost > 0
        if not enough or gained - lost <= best:
            continue
        if binomtest(gained, gained + lost, 0.5, alternative="greater").pvalue > _UNLIKELY:
            continue
        best = gained - lost
        twice = (
            " The network probably normalises by itself, so that it was done twice."
            if _plain(other_mean, other_std)
            else ""
        )
        share = int(hit.sum()) / len(hit)
        found = (
            share,
            f"with {habit.words} the model gets {percent(share)} of {len(hit)} right "
            f"instead of {percent(now / len(hit))}: it was probably trained so.{twice} Try "
            f"{habit.option}",
        )
    return found


def _order(
    predicted: Tensor, labels: Tensor, classes: int, share: float
) -> tuple[float, str] | None:
    """What share would be right if the classes were in another order, if that is much more."""
    from scipy.optimize import linear_sum_assignment

    # With few images a class any model could be made right.
    if len(labels) < 3 * classes or classes < 3:
        return None
    seen = torch.zeros(classes, classes, dtype=torch.int64)
    seen.index_put_((predicted, labels), torch.ones_like(labels), accumulate=True)
    rows, columns = linear_sum_assignment(seen.numpy(), maximize=True)
    matched = float(seen[torch.from_numpy(rows), torch.from_numpy(columns)].sum()) / len(labels)
    if matched < max(0.6, share + 0.3):
        return None
    first = next(i for i, (row, column) in enumerate(zip(rows, columns, strict=True))
                 if row != column)  # fmt: skip
    return (
        matched,
        "the classes are probably in another order: renumbered, the model gets "
        f"{percent(matched)} of {len(labels)} images right instead of {percent(share)} (its "
        f"output {int(rows[first])} goes with class {int(columns[first])} of the data). Name its "
        "outputs in their order with --class-names",
    )


def _predict(model: nn.Module, images: Tensor, seed: int) -> tuple[Tensor, int]:
    """Predicted classes, and how many classes there are."""
    device = model_device(model)
    rows = []
    classes = 2
    with frozen(model, seed), torch.no_grad():
        for part in images.split(_TRIED):  # type: ignore[no-untyped-call]
            logits = model(part.to(device)).float().cpu()
            classes = logits.shape[1]
            rows.append(logits.argmax(1))
    return torch.cat(rows), classes


def _own(model: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and std that the model applies first; 0 and 1 where it is not known to."""
    spec = getattr(model, "spec", None)
    mean, std = getattr(spec, "mean", None), getattr(spec, "std", None)
    if not mean or not std or len(mean) != len(std) or len(mean) not in (1, channels):
        return _column((0.0,)), _column((1.0,))
    return _column(mean), _column(std)


def _own_layer(model: nn.Module, channels: int) -> str | None:
    """A part of the network that looks like a normalisation of images."""
    net = getattr(model, "net", None)
    if not isinstance(net, nn.Module):
        return None
    for name, module in net.named_modules():
        if type(module).__name__ in ("Normalize", "Normalization", "NormalizeLayer"):
            return name or type(module).__name__
        held = dict(module.named_buffers(recurse=False))
        held |= dict(module.named_parameters(recurse=False))
        if all(
            kind in held and held[kind].numel() in (1, channels) for kind in ("mean", "std")
        ):  # fmt: skip
            return name or type(module).__name__
    return None


def _plain(mean: Tensor, std: Tensor) -> bool:
    return bool((mean == 0).all() and (std == 1).all())


def _column(values: Channels) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
