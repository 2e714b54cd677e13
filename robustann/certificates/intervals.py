"""Interval bound propagation (Gowal et al. 2018, https://arxiv.org/abs/1810.12715)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.certificates.network import Affine, Domain, walk
from robustann.errors import DataError, ModelError

# Half the distance from 1 to the next float32, with one percent for the float64 arithmetic here.
_ROUNDING = 1.01 * 2.0**-24


@dataclass(frozen=True, eq=False)
class Box:
    """All tensors within ``radius`` of ``center``, entry by entry.

    Attributes:
        center: (N, ...).
        radius: of the same shape, at least 0.
        made: the affine map, the box it came from and the rounding allowed for, if it did.
    """

    center: Tensor
    radius: Tensor
    made: tuple[Affine, Box, Tensor | None] | None = None

    @property
    def lower(self) -> Tensor:
        """The smallest values."""
        return self.center - self.radius

    @property
    def upper(self) -> Tensor:
        """The largest values."""
        return self.center + self.radius


class Intervals(Domain[Box]):
    """Carries boxes; keeps on the way what a second, tighter pass needs.

    With ``rounding`` each box is widened by what a float32 program may round away there: a sum of
    n products comes out within ``n * 2^-24`` of the exact one, relative to the sum of their
    absolute values, in whatever order it is added up (Higham 2002, section 3.1).

    Attributes:
        errors: of each affine map and sum in order, the rounding allowed for (None for none).
        inputs: of each activation and pooling in order, the box that goes in.
    """

    kind = Box

    def __init__(self, reference: Tensor, *, rounding: bool) -> None:
        self.reference = reference
        self.errors: list[Tensor | None] = []
        self.inputs: list[Box] = []
        self._rounding = rounding

    def affine(self, x: Box, op: Affine) -> Box:
        center, radius = op.apply(x.center), op.apply_abs(x.radius)
        if op.bias is not None:
            center = center + op.bias
        error = None
        if self._rounding and op.roundings:
            error = op.apply_abs(x.center.abs() + x.radius)
            if op.bias is not None:
                error = error + (op.bias.abs() if op.bias_size is None else op.bias_size)
            error = error * (op.roundings * _ROUNDING)
            radius = radius + error
        self.errors.append(error)
        return Box(center, radius, (op, x, error))

    def relu(self, x: Box, slope: float) -> Box:
        self.inputs.append(x)
        lower, upper = (
            F.leaky_relu(end, slope) if slope else end.relu() for end in (x.lower, x.upper)
        )
        box = Box((upper + lower) / 2, (upper - lower) / 2)
        # A closed ReLU is exact, a leaky one rounds its product.
        return self._rounded(box) if slope else box

    def max_pool(self, x: Box, pool: nn.MaxPool2d) -> Box:
        self.inputs.append(x)
        lower, upper = pool.forward(x.lower), pool.forward(x.upper)
        return Box((upper + lower) / 2, (upper - lower) / 2)

    def add(self, x: Box, y: Box) -> Box:
        return self._rounded(Box(x.center + y.center, x.radius + y.radius))

    def shape(self, x: Box) -> torch.Size:
        return x.center.shape

    def _rounded(self, x: Box) -> Box:
        error = None
        if self._rounding:
            error = (x.center.abs() + x.radius) * (4 * _ROUNDING)
            x = Box(x.center, x.radius + error)
        self.errors.append(error)
        return x


def propagate(
    model: nn.Module, lower: Tensor, upper: Tensor, *, rounding: bool
) -> tuple[Box, Intervals]:
    """The box of the logits, and what was kept on the way; see :func:`interval_bounds`."""
    if lower.shape != upper.shape or lower.dim() < 2 or not bool((lower <= upper).all()):
        raise DataError(
            "expected lower and upper of one shape (N, ...) with lower <= upper everywhere, got "
            f"shapes {tuple(lower.shape)} and {tuple(upper.shape)}; "
            "for a ball take x - eps and x + eps"
        )
    if rounding:
        # Apple's accelerator has no float64.
        lower, upper = (x.cpu() if x.device.type == "mps" else x for x in (lower, upper))
        lower, upper = lower.double(), upper.double()
    domain = Intervals(lower, rounding=rounding)
    logits = walk(model, Box((upper + lower) / 2, (upper - lower) / 2), domain)
    if logits.center.dim() != 2 or len(logits.center) != len(lower):
        raise ModelError(
            f"expected the model to return logits of shape ({len(lower)}, classes), got "
            f"{tuple(logits.center.shape)}; wrap it so that it returns one row per image"
        )
    return logits, domain


def interval_bounds(
    model: nn.Module, lower: Tensor, upper: Tensor, *, rounding: bool = True
) -> tuple[Tensor, Tensor]:
    """Bounds on the logits of every image between ``lower`` and ``upper``.

    Args:
        model: followed as it is in eval mode, whatever mode it is in.
        lower: (N, C, H, W).
        upper: of the same shape, nowhere smaller.
        rounding: compute in float64 and allow for what the model, run in float32, rounds away:
            the bounds then hold for the logits that the program computes, with kernels that sum
            up products (not with TF32, bfloat16 or Winograd). Without it, bounds on the exact
            logits in the type of ``lower``, through which gradients pass to the weights.

    Returns:
        Lower and upper bounds, (N, K) each.

    Raises:
        ModelError: a layer for which no bound is known here; names it and what is supported.
        DataError: ``lower`` and ``upper`` do not fit together.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 1), nn.ReLU())
    >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, -2.0]])), model[1].bias.data.zero_()
    >>> x = torch.tensor([[[[0.5, 0.125]]]])
    >>> low, high = interval_bounds(model, x - 0.125, x + 0.125)
    >>> round(low.item(), 3), round(high.item(), 3)
    (0.0, 0.625)
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not rounding):
        box, _ = propagate(model, lower, upper, rounding=rounding)
        return box.lower, box.upper


def margin_bounds(
    model: nn.Module, lower: Tensor, upper: Tensor, labels: Tensor, *, rounding: bool = True
) -> Tensor:
    """Lower bounds on how far the label's logit stays above each other one.

    A last linear layer is merged with the subtraction of logits, which is tighter than the
    difference of their bounds. Arguments as for :func:`interval_bounds`.

    Args:
        labels: int64 (N,).

    Returns:
        (N, K): at [i, j] a lower bound on ``logits[i, labels[i]] - logits[i, j]``; 0 at the label.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    >>> x = torch.full((1, 1, 1, 2), 0.5)
    >>> bounds = margin_bounds(model, x - 0.1, x + 0.1, torch.tensor([0]), rounding=False)
    >>> [round(value, 3) for value in bounds[0].tolist()]
    [0.0, 0.8]
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not rounding):
        box, _ = propagate(model, lower, upper, rounding=rounding)
        return margins_of(box, labels)


def margins_of(logits: Box, labels: Tensor) -> Tensor:
    """:func:`margin_bounds` from the box of the logits."""
    labels = labels.to(logits.center.device)
    if logits.made is None or (weight := logits.made[0].weight) is None:
        own = logits.lower.gather(1, labels[:, None])
        return (own - logits.upper).scatter(1, labels[:, None], 0.0)
    _, hidden, error = logits.made
    rows = weight[labels][:, None] - weight  # (N, K, F)
    # The products of the center are those of the logits already.
    center = logits.center.gather(1, labels[:, None]) - logits.center
    radius = (rows.abs() @ hidden.radius[:, :, None]).squeeze(2)
    if error is not None:
        radius = radius + (error.gather(1, labels[:, None]) + error)
    return (center - radius).scatter(1, labels[:, None], 0.0)
