"""Sanitizers: fixed steps in front of a model, one family a file, found by themselves.

To add one, write a file in this folder with a dataclass derived from
:class:`~robustann.defenses.sanitizers.base.Sanitizer`. Most lose what they seem to give as soon as
the attacker knows of them; :func:`robustann.hardening.sanitized.measure_sanitizer` says how much.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import types
import typing
from collections.abc import Mapping
from typing import Any

from robustann.defenses.sanitizers.base import Sanitizer
from robustann.defenses.sanitizers.bit_depth import BitDepth
from robustann.defenses.sanitizers.chain import Sanitized
from robustann.defenses.sanitizers.check import InputCheck, check_input
from robustann.defenses.sanitizers.jpeg import Jpeg
from robustann.defenses.sanitizers.randomised import GaussianNoise, ResizePad
from robustann.defenses.sanitizers.smoothing import GaussianBlur, Median
from robustann.defenses.sanitizers.total_variation import TotalVariation
from robustann.errors import UsageError, unknown_name
from robustann.options import split_options
from robustann.threat import parse_number

__all__ = [
    "SANITIZERS",
    "BitDepth",
    "GaussianBlur",
    "GaussianNoise",
    "InputCheck",
    "Jpeg",
    "Median",
    "ResizePad",
    "Sanitized",
    "Sanitizer",
    "TotalVariation",
    "check_input",
    "parse_sanitizer",
]


def _found() -> dict[str, type[Sanitizer]]:
    found: dict[str, type[Sanitizer]] = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Sanitizer) and "name" in vars(value):
                found[value.name] = value
    return dict(sorted(found.items()))


SANITIZERS: Mapping[str, type[Sanitizer]] = _found()


def parse_sanitizer(text: str) -> Sanitizer:
    """A sanitizer from its name and options: ``name`` or ``name:option=value,option=value``.

    Raises:
        UsageError: unknown sanitizer or option (with the nearest known one), or an unfit value.

    >>> parse_sanitizer("jpeg:quality=50").hyperparameters
    {'quality': 50}
    """
    name, _, rest = text.strip().partition(":")
    if name not in SANITIZERS:
        raise unknown_name("sanitizer", name, SANITIZERS)
    sanitizer = SANITIZERS[name]
    hints = typing.get_type_hints(sanitizer)
    known = {field.name: hints[field.name] for field in dataclasses.fields(sanitizer)}
    values: dict[str, Any] = {}
    for option, value in split_options(name, rest, next(iter(known), "option")).items():
        if option not in known:
            raise unknown_name(f"option of sanitizer {name}", option, known)
        values[option] = _number(f"{name}:{option}", value, known[option])
    return sanitizer(**values)


def _number(what: str, value: str, wanted: Any) -> int | float | None:
    """Text to the type of a field: int, float, or int with None."""
    if isinstance(wanted, types.UnionType) and value.lower() == "none":
        return None
    if wanted is float:
        return parse_number(value, what)
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"expected {what} as a whole number, got '{value}'") from None
