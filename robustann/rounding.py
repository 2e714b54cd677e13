"""Numbers as results keep them, six significant digits and None for what is none; and in words."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator


def six_digits(value: object) -> object:
    """Six significant digits: finer ones are float32 noise, and JSON has no NaN or infinity.

    >>> six_digits(1 / 3), six_digits(float("nan"))
    (0.333333, None)
    """
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


Number = Annotated[float, BeforeValidator(six_digits)]
MaybeNumber = Annotated[float | None, BeforeValidator(six_digits)]


def percent(share: float) -> str:
    """A share as percent.

    >>> percent(0.4321)
    '43.2 %'
    """
    return f"{100 * share:.1f} %"
