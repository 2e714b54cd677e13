"""Certificates against every attack within an linf radius."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robustann.attacks.engine import (
    ALIGNMENT,
    check_classes,
    check_labels,
    frozen,
    model_device,
    predict_logits,
)
from robustann.certificates.intervals import Box, margins_of, propagate
from robustann.certificates.relaxation import linear_margins
from robustann.errors import DataError, ModelError, UsageError, unknown_name
from robustann.metrics import wilson_interval
from robustann.progress import progress_bar
from robustann.threat import ThreatModel, check_images

Method = Literal["crown", "ibp"]


@dataclass(frozen=True, eq=False)
class LinfCertificate:
    """What is proven about N images. All tensors lie on the CPU, one row a sample.

    Attributes:
        certified: no image that the threat model allows is classified as another class; that
            the original is classified correctly is part of it.
        margin: a lower bound, float64, on the logit of the label minus the largest other one over
            all allowed images; certified where positive.
        prediction: the class predicted for the original.
        threat: the threat model.
        method: how it was proven.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.eye(2))  # each pixel is a logit
    >>> x = torch.tensor([[[[0.75, 0.25]]], [[[0.5, 0.25]]]])
    >>> found = certify_linf(model, x, torch.tensor([0, 0]), ThreatModel("linf", 0.2))
    >>> [round(margin, 3) for margin in found.margin.tolist()], found.certified_accuracy
    ([0.1, -0.15], 0.5)
    """

    certified: Tensor
    margin: Tensor
    prediction: Tensor
    threat: ThreatModel
    method: Method

    @property
    def certified_accuracy(self) -> float:
        """Share of the N images that are certified: robust accuracy is at least this."""
        return float(self.certified.double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the certified accuracy over the population."""
        return wilson_interval(int(self.certified.sum()), len(self.certified))


def certify_linf(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    method: Method = "crown",
    batch_size: int = 32,
    progress: bool = False,
) -> LinfCertificate:
    """Prove for as many images as possible that no attack within ``threat`` succeeds.

    A proof says nothing about the rest: they may be robust too. The bounds are computed in float64
    and allow for the rounding of a model that runs in float32 (see
    :func:`~robustann.certificates.intervals.interval_bounds`). The model stays as it was.

    Args:
        model: maps images in [0, 1] to logits; of the layers in
            :data:`~robustann.certificates.network.SUPPORTED`.
        x: float images (N, C, H, W) within the bounds of ``threat``.
        labels: int64 (N,), the true classes.
        threat: an untargeted linf threat.
        method: ``ibp``, intervals (https://arxiv.org/abs/1810.12715); ``crown``, also linear
            bounds from the logits backwards (https://arxiv.org/abs/1906.06316), of which the
            better one counts: tighter, at the price of as many more rows as there are classes.
        batch_size: images bounded at once.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        UsageError: another norm, a targeted threat, an unknown method, or no batch at all.
        ModelError: a layer for which no bound is known here.
        DataError: images or labels are unfit.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> x = torch.tensor([[[[0.75, 0.25]]]])
    >>> for eps in (0.2, 0.3):
    ...     print(certify_linf(model, x, torch.tensor([0]), ThreatModel("linf", eps)).certified)
    tensor([True])
    tensor([False])
    """
    if threat.norm != "linf" or threat.targeted:
        raise UsageError(
            "expected an untargeted linf threat model, got "
            f"{'a targeted' if threat.targeted else 'an'} {threat.norm} one; for l2 use "
            "randomised smoothing"
        )
    if method not in get_args(Method):
        raise unknown_name("method", method, get_args(Method))
    if batch_size < 1:
        raise UsageError(f"expected a batch_size of at least 1, got {batch_size}")
    check_images(x, threat.bounds)
    check_labels(labels, len(x))
    logits = predict_logits(model, x)
    check_classes(labels, logits.shape[1])
    parts = []
    with frozen(model, 0), progress_bar(len(x), wanted=progress, unit="images") as advance:
        for rows in torch.arange(len(x)).split(batch_size):  # type: ignore[no-untyped-call]
            # Filled up, so that the last bits do not hang on the batch.
            filled = torch.cat([rows, rows[:1].expand(-len(rows) % ALIGNMENT)])
            device = model_device(model)
            bounds = _bounds(model, x[filled].to(device), labels[filled].to(device), threat, method)
            parts.append(bounds[: len(rows)].cpu())
            advance(len(rows), f"certifying ({method})")
    bounds = torch.cat(parts)
    own = labels.cpu()[:, None]
    _check_originals(logits.double(), bounds, own)
    margin = bounds.scatter(1, own, torch.inf).amin(1)
    return LinfCertificate(margin > 0, margin, logits.argmax(1), threat, method)


def _bounds(
    model: nn.Module, x: Tensor, labels: Tensor, threat: ThreatModel, method: Method
) -> Tensor:
    wide = x.double() if x.device.type != "mps" else x.cpu().double()
    labels = labels.to(wide.device)
    low, high = threat.bounds
    lower, upper = (wide - threat.eps).clamp(min=low), (wide + threat.eps).clamp(max=high)
    with torch.no_grad():
        logits, first = propagate(model, lower, upper, rounding=True)
        bounds = margins_of(logits, labels)
    if method == "crown":
        images = Box((upper + lower) / 2, (upper - lower) / 2)
        bounds = bounds.fmax(linear_margins(model, images, logits, first, labels))
    # Infinite bounds leave differences that are no number.
    return bounds.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _check_originals(logits: Tensor, bounds: Tensor, own: Tensor) -> None:
    """The originals lie in their balls: what the model says of them must keep the bounds."""
    wrong = (logits.gather(1, own) - logits < bounds).any(1)
    if bool(wrong.any()):
        raise ModelError(
            f"expected logits within their bounds, but for {int(wrong.sum())} of {len(own)} "
            "images the model computes others than its layers say; look for code that changes "
            "features or weights on the way, or for float32 turned down to TF32 or bfloat16"
        )


def crossed(certified: Tensor, attacked: Tensor) -> Tensor:
    """Positions at which an attack succeeded on what was certified: none, if both are right.

    Certified accuracy bounds robust accuracy from below, attacks bound it from above. One such
    sample proves a fault in the certificate, in the attack's judgement, or two different threat
    models. Smoothing's certificates each fail with a probability of at most ``alpha``.

    Args:
        certified: bool (N,), at least against what the attack was allowed.
        attacked: bool (N,), whether it succeeded.

    Returns:
        int64, ascending.

    Raises:
        DataError: not two bool tensors of one length.

    >>> crossed(torch.tensor([True, True, False]), torch.tensor([False, True, True]))
    tensor([1])
    """
    for what, mask in (("certified", certified), ("attacked", attacked)):
        if mask.dtype != torch.bool or mask.dim() != 1 or len(mask) != len(certified):
            raise DataError(
                f"expected certified and attacked as bool tensors of one length, got {what} of "
                f"shape {tuple(mask.shape)} and type {mask.dtype}; give one value per sample"
            )
    return (certified.cpu() & attacked.cpu()).nonzero().squeeze(1)
