"""Losses that attacks maximise: one number a sample, larger = nearer to success.

``logits`` has shape (N, K), ``labels`` (N,). Untargeted, the labels are the true classes and the
loss rises as another class overtakes them; targeted, they are the wanted classes and the loss
rises as they overtake the others. All are differentiable and safe in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from robustann.errors import unknown_name


class Loss(Protocol):
    """Maps (logits (N, K), labels (N,), targeted) to one loss a sample, (N,).

    >>> loss: Loss = margin
    >>> loss(torch.tensor([[3.0, 1.0]]), torch.tensor([0]), False)
    tensor([-2.])
    """

    def __call__(self, logits: Tensor, labels: Tensor, targeted: bool) -> Tensor: ...


def _own_and_others(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The label's logit (N,), and all logits with the label's set to -inf (N, K)."""
    own = logits.gather(1, labels[:, None])
    return own.squeeze(1), logits.scatter(1, labels[:, None], -torch.inf)


def cross_entropy(logits: Tensor, labels: Tensor, targeted: bool = False) -> Tensor:
    """Cross-entropy, as the log-odds of the other classes against the label.

    The log-odds are ``m = log sum_{j != y} exp(z_j) - z_y``; cross-entropy is softplus(m), so
    both grow together and their gradients point in the same direction. But softplus saturates in
    float32 on confident models (p_y rounds to 1 and the gradient loses the label's part), while m
    does not; and attacks normalise the gradient's length anyway.

    >>> cross_entropy(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    tensor([-2.])
    """
    own, others = _own_and_others(logits, labels)
    odds = others.logsumexp(1) - own
    return -odds if targeted else odds


def _odds_slope(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    # Softmax over the other classes, and -1 at the label.
    own = labels[:, None]
    slope = logits.scatter(1, own, -torch.inf).softmax(1).scatter_(1, own, -1.0)
    return slope.neg_() if targeted else slope


def margin(logits: Tensor, labels: Tensor, targeted: bool = False) -> Tensor:
    """Largest other logit minus the label's (Carlini and Wagner, S&P 2017).

    Positive where the prediction differs from the label.

    >>> margin(torch.tensor([[2.0, 0.5, 1.0]]), torch.tensor([0]))
    tensor([-1.])
    """
    own, others = _own_and_others(logits, labels)
    gap = others.amax(1) - own
    return -gap if targeted else gap


def _margin_slope(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    # +1 at the largest other logit, shared where several are largest, and -1 at the label.
    own = labels[:, None]
    others = logits.scatter(1, own, -torch.inf)
    slope = (others == others.amax(1, keepdim=True)).to(logits.dtype)
    slope = slope.div_(slope.sum(1, keepdim=True)).scatter_(1, own, -1.0)
    return slope.neg_() if targeted else slope


def dlr(logits: Tensor, labels: Tensor, targeted: bool = False) -> Tensor:
    """Difference of logits ratio (Croce and Hein, ICML 2020): the margin, free of scale.

    Untargeted: the margin divided by the distance from the largest to the third largest logit.
    Targeted: the divisor is the largest minus the mean of the third and fourth. Both need enough
    classes to be more than a sign (four, targeted five); with fewer it is the plain margin.

    >>> dlr(torch.tensor([[4.0, 3.0, 2.0, 0.0]]), torch.tensor([0]))
    tensor([-0.5000])
    """
    gap = margin(logits, labels, targeted)
    if logits.shape[1] < (5 if targeted else 4):
        return gap
    top = logits.topk(4, dim=1).values
    rest = (top[:, 2] + top[:, 3]) / 2 if targeted else top[:, 2]
    return gap / (top[:, 0] - rest).clamp(min=1e-12)


LOSSES: Mapping[str, Callable[..., Tensor]] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


# Derivatives with respect to the logits, (N, K), of losses for which they are known.
_SLOPES: tuple[tuple[Loss, Loss], ...] = ((cross_entropy, _odds_slope), (margin, _margin_slope))


def slope_of(loss: Loss) -> Loss | None:
    """What gives the derivative of a loss with respect to the logits (N, K) in closed form.

    It takes what the loss takes, and costs less than to let autograd find the same. None where no
    such form is known.

    >>> slope = slope_of(margin)
    >>> slope(torch.tensor([[2.0, 0.5, 1.0]]), torch.tensor([0]), False)
    tensor([[-1.,  0.,  1.]])
    """
    # By identity: a loss of one's own need not be hashable.
    return next((slope for known, slope in _SLOPES if known is loss), None)


def get_loss(name: str) -> Loss:
    """The loss of this name: ``ce``, ``margin`` or ``dlr``.

    Raises:
        UsageError: there is none of this name.

    >>> get_loss("margin") is margin
    True
    """
    if name not in LOSSES:
        raise unknown_name("loss", name, LOSSES)
    return LOSSES[name]
