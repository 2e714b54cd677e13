"""Backward linear bounds: CROWN (Zhang et al. 2018, https://arxiv.org/abs/1811.00866).

With the intervals of :mod:`robustann.certificates.intervals` around the activations, as in
CROWN-IBP (Zhang et al. 2020, https://arxiv.org/abs/1906.06316). A lower bound on a margin is a
linear function of the image: its coefficients are what autograd hands backwards if each activation
passes a positive coefficient on through a line below it and a negative one through a line above.
So sums of branches cost no thought of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustann.certificates.intervals import Box, Intervals
from robustann.certificates.network import Affine, Domain, walk


@dataclass(frozen=True, eq=False)
class Rows:
    """What autograd goes back through: one row for each image and class, (N * K, ...)."""

    tensor: Tensor


@dataclass(eq=False)
class Constant:
    """The constant part of the bounds (N * K,), which grows on the way back."""

    total: Tensor

    def add(self, parts: Tensor) -> None:
        """Add up (N, K, ...) for each row."""
        self.total += parts.flatten(2).sum(2).flatten()


def _by_image(rows: Tensor, images: int) -> Tensor:
    return rows.view(images, -1, *rows.shape[1:])


class _Shift(torch.autograd.Function):
    """Adds a bias, and an error of at most so much; going back, both enter the constant."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, error: Tensor | None, constant: Constant
    ) -> Tensor:
        ctx.parts = (bias, error, constant)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        bias, error, constant = ctx.parts
        (gradient,) = gradients
        if bias is not None:
            constant.add((gradient * bias)[:, None].view(len(constant.total), 1, -1))
        if error is not None:
            constant.add(-_by_image(gradient, len(error)).abs() * error[:, None])
        return gradient, None, None, None


class _Between(torch.autograd.Function):
    """An activation between two lines: ``below * x`` and ``above * x + offset``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, below: Tensor, above: Tensor, offset: Tensor, constant: Constant
    ) -> Tensor:
        ctx.parts = (below, above, offset, constant)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        below, above, offset, constant = ctx.parts
        gradient = _by_image(gradients[0], len(below))
        falling = gradient.clamp(max=0.0)
        constant.add(falling * offset[:, None])
        back = gradient.clamp(min=0.0) * below[:, None] + falling * above[:, None]
        return back.view_as(gradients[0]), None, None, None, None


class _Largest(torch.autograd.Function):
    """A maximum: at least its likely winner, at most the highest upper bound."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, winner: Tensor, upper: Tensor, constant: Constant) -> Tensor:
        ctx.parts = (winner, upper, constant, x.shape)
        return (
            _by_image(x, len(winner))
            .flatten(3)
            .gather(3, winner.flatten(2)[:, None].expand(-1, len(x) // len(winner), -1, -1))
            .view(len(x), *winner.shape[1:])
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        winner, upper, constant, shape = ctx.parts
        gradient = _by_image(gradients[0], len(winner))
        constant.add(gradient.clamp(max=0.0) * upper[:, None])
        rising = gradient.clamp(min=0.0).flatten(3)
        back = rising.new_zeros(*rising.shape[:3], shape[2] * shape[3]).scatter_add(
            3, winner.flatten(2)[:, None].expand_as(rising), rising
        )
        return back.view(shape), None, None, None


class Relaxation(Domain[Rows]):
    """The second pass, which reads what the intervals kept on the first one."""

    kind = Rows

    def __init__(self, first: Intervals, constant: Constant) -> None:
        self.reference = first.reference
        self._errors = iter(first.errors)
        self._inputs = iter(first.inputs)
        self._constant = constant

    def _shifted(self, x: Tensor, bias: Tensor | None = None) -> Rows:
        error = next(self._errors)
        if bias is None and error is None:
            return Rows(x)
        if bias is not None:
            bias = bias.broadcast_to(x.shape[1:])
        return Rows(_Shift.apply(x, bias, error, self._constant))

    def affine(self, x: Rows, op: Affine) -> Rows:
        return self._shifted(op.apply(x.tensor), op.bias)

    def relu(self, x: Rows, slope: float) -> Rows:
        box = next(self._inputs)
        lower, upper = box.lower, box.upper
        kinked = (lower < 0) & (upper > 0)
        passes = (lower >= 0).to(lower)
        straight = passes + slope * (1 - passes)
        chord = (upper - slope * lower) / torch.where(kinked, upper - lower, 1.0)
        # Of the lines below through the kink, the one that cuts off the smaller triangle.
        steep = (upper > -lower).to(lower)
        below = torch.where(kinked, steep + slope * (1 - steep), straight)
        above = torch.where(kinked, chord, straight)
        offset = torch.where(kinked, lower * (slope - chord), 0.0)
        out: Tensor = _Between.apply(x.tensor, below, above, offset, self._constant)
        return self._shifted(out) if slope else Rows(out)

    def max_pool(self, x: Rows, pool: nn.MaxPool2d) -> Rows:
        box = next(self._inputs)
        upper = pool.forward(box.upper)
        _, winner = nn.functional.max_pool2d(
            box.lower,
            pool.kernel_size,
            pool.stride,
            pool.padding,
            pool.dilation,
            pool.ceil_mode,
            return_indices=True,
        )
        return Rows(_Largest.apply(x.tensor, winner, upper, self._constant))

    def add(self, x: Rows, y: Rows) -> Rows:
        return self._shifted(x.tensor + y.tensor)

    def shape(self, x: Rows) -> torch.Size:
        return x.tensor.shape


def linear_margins(
    model: nn.Module, images: Box, logits: Box, first: Intervals, labels: Tensor
) -> Tensor:
    """Lower bounds (N, K) on the margins over each class; infinite differences give NaN.

    Args:
        model: with frozen parameters.
        images: the box of the images.
        logits: the box that the first pass found.
        first: that pass.
        labels: int64 (N,), on the device of ``images``.
    """
    count, classes = logits.center.shape
    constant = Constant(images.center.new_zeros(count * classes))
    with torch.enable_grad():
        x = images.center.repeat_interleave(classes, 0).requires_grad_()
        out = walk(model, Rows(x), Relaxation(first, constant)).tensor
        own = out.gather(1, labels.repeat_interleave(classes)[:, None])
        others = out.gather(1, torch.arange(classes, device=x.device).repeat(count)[:, None])
        (gradient,) = torch.autograd.grad((own - others).sum(), x)
    slopes = _by_image(gradient, count)
    reach = slopes * images.center[:, None] - slopes.abs() * images.radius[:, None]
    constant.add(reach)
    return constant.total.view(count, classes).scatter(1, labels[:, None], 0.0)
