"""Sanitizers in front of a model, and what an attacker makes of them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from robustann.attacks.bpda import bpda
from robustann.defenses.sanitizers.base import Sanitizer
from robustann.errors import UsageError

Backward = Literal["identity", "surrogate"]


class Sanitized(nn.Module):
    """A model behind sanitizers, applied in the order given.

    Args:
        model: maps images in [0, 1] to logits.
        sanitizers: at least one.

    Raises:
        UsageError: none, or what is no sanitizer.

    >>> import torch
    >>> from robustann.defenses.sanitizers import BitDepth
    >>> defended = Sanitized(nn.Flatten(), BitDepth(bits=1))
    >>> defended(torch.tensor([[[[0.2, 0.7]]]]))
    tensor([[0., 1.]])
    """

    def __init__(self, model: nn.Module, *sanitizers: Sanitizer) -> None:
        super().__init__()
        wrong = [part for part in sanitizers if not isinstance(part, Sanitizer)]
        if wrong or not sanitizers:
            came = type(wrong[0]).__name__ if wrong else "none"
            raise UsageError(
                f"expected at least one sanitizer after the model, got {came}; make them with "
                "parse_sanitizer, for example parse_sanitizer('jpeg:quality=75')"
            )
        self.sanitizers = nn.Sequential(*sanitizers)
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(self.sanitizers(x))
        return logits

    @property
    def parts(self) -> tuple[Sanitizer, ...]:
        """The sanitizers in order."""
        return tuple(part for part in self.sanitizers if isinstance(part, Sanitizer))

    @property
    def deterministic(self) -> bool:
        """Whether no part draws random numbers."""
        return all(part.deterministic for part in self.parts)

    def seen_through(self, backward: Backward) -> nn.Module:
        """The same function with other derivatives, for attackers (BPDA: Athalye et al., 2018).

        Args:
            backward: ``identity``, as if the sanitizers were not there; ``surrogate``, the true
                derivative of each where there is one, else that of its stand-in.

        >>> import torch
        >>> from robustann.defenses.sanitizers import BitDepth
        >>> x = torch.tensor([[[[0.2, 0.7]]]], requires_grad=True)
        >>> Sanitized(nn.Flatten(), BitDepth()).seen_through("identity")(x).sum().backward()
        >>> x.grad.tolist()
        [[[[1.0, 1.0]]]]
        """
        if backward == "identity":
            return nn.Sequential(bpda(self.sanitizers), self.model)
        return nn.Sequential(*map(attackable, self.parts), self.model)


def attackable(sanitizer: Sanitizer) -> nn.Module:
    """The sanitizer as it is where it has a derivative, else with its surrogate's.

    >>> from robustann.defenses.sanitizers import Median
    >>> median = Median()
    >>> attackable(median) is median
    True
    """
    return sanitizer if sanitizer.differentiable else bpda(sanitizer, _Surrogate(sanitizer))


class _Surrogate(nn.Module):
    def __init__(self, sanitizer: Sanitizer) -> None:
        super().__init__()
        self.sanitizer = sanitizer

    def forward(self, x: Tensor) -> Tensor:
        return self.sanitizer.surrogate(x)
