"""Attacks on images: one file each, found by themselves, driven by one engine.

To add one, write a file in this folder with a frozen dataclass derived from
:class:`~robustann.attacks.base.Attack`. Its name then works on the command line, its fields are
its options (``pgd:steps=100,loss=margin``), and the contract tests pick it up.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import types
import typing
from typing import Any

from robustann.attacks.apgd import APGD
from robustann.attacks.art_adapter import parse_art
from robustann.attacks.base import Attack
from robustann.attacks.ddn import DDN
from robustann.attacks.engine import AttackResult
from robustann.attacks.fab import FAB
from robustann.attacks.fgsm import FGSM
from robustann.attacks.fmn import FMN
from robustann.attacks.hopskipjump import HopSkipJump
from robustann.attacks.mifgsm import MIFGSM
from robustann.attacks.mm import MM
from robustann.attacks.noise import UniformNoise
from robustann.attacks.pgd import PGD
from robustann.attacks.rays import RayS
from robustann.attacks.sigma_zero import SigmaZero
from robustann.attacks.square import Square
from robustann.errors import UsageError, unknown_name
from robustann.options import split_options
from robustann.threat import parse_number

__all__ = [
    "APGD",
    "DDN",
    "FAB",
    "FGSM",
    "FMN",
    "MIFGSM",
    "MM",
    "PGD",
    "Attack",
    "AttackResult",
    "HopSkipJump",
    "RayS",
    "SigmaZero",
    "Square",
    "UniformNoise",
    "parse_attack",
    "registered",
]


@functools.cache
def registered() -> dict[str, type[Attack]]:
    """All attacks by name.

    >>> {"apgd", "fgsm", "pgd", "square"} <= registered().keys()
    True
    """
    found: dict[str, type[Attack]] = {}
    for module in pkgutil.iter_modules(__path__):
        contents = vars(importlib.import_module(f"{__name__}.{module.name}"))
        for value in contents.values():
            if isinstance(value, type) and issubclass(value, Attack):
                # What takes its name from what it wraps is a family, not one attack.
                own = vars(value).get("name")
                if isinstance(own, str):
                    found[own] = value
    return dict(sorted(found.items()))


def parse_attack(text: str) -> Attack:
    """An attack from its name and options: ``name`` or ``name:option=value,option=value``.

    ``art:NAME``, or ``art:NAME:option=value``, is an attack of the Adversarial Robustness Toolbox
    (see :mod:`robustann.attacks.art_adapter`).

    Raises:
        UsageError: unknown attack or option (with the nearest known one), or an unfit value.

    >>> parse_attack("pgd:steps=100,loss=margin").steps
    100
    """
    name, _, rest = text.strip().partition(":")
    if name == "art":
        return parse_art(rest)
    if name not in registered():
        raise unknown_name("attack", name, registered())
    attack = registered()[name]
    types_of = typing.get_type_hints(attack)
    known = {field.name: types_of[field.name] for field in dataclasses.fields(attack)}
    values: dict[str, Any] = {}
    for option, value in split_options(name, rest, next(iter(known), "option")).items():
        if option not in known:
            raise unknown_name(f"option of attack {name}", option, known)
        values[option] = _convert(f"{name}:{option}", value, known[option])
    return attack(**values)


def _convert(what: str, value: str, wanted: Any) -> Any:
    """Text to the type of a field: int, float, bool, str, or one of them with None."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if type(None) in options and value.lower() == "none":
        return None
    (kind,) = (option for option in options if option is not type(None))
    try:
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[
                value.lower()
            ]
        if kind is float:
            return parse_number(value, what)
        return kind(value)
    except (ValueError, KeyError):
        raise UsageError(f"expected {what} as {kind.__name__}, got '{value}'") from None
