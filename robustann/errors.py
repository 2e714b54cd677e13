"""The error family: every error says what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pydantic import ValidationError

# Of text from files: what moves a terminal's cursor, turns the direction, or cannot be written.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text, fit for a terminal; lines and tabs stay.

    >>> printable("a\x1b[2Jb")
    'a�[2Jb'
    """
    return _CONTROL.sub("\ufffd", text)


class RobustannError(Exception):
    """Base of every error that robustann raises on purpose.

    ``exit_code`` is what the command line returns for it.

    >>> issubclass(UsageError, RobustannError), UsageError("eps").exit_code
    (True, 2)
    """

    exit_code: ClassVar[int] = 3


class UsageError(RobustannError, ValueError):
    """A value that the caller chose is wrong: an option, a name, a path, a parameter."""

    exit_code: ClassVar[int] = 2


class DataError(RobustannError, ValueError):
    """The images or labels cannot be used: shape, range, NaN, labels out of range, no files."""


class ModelError(RobustannError):
    """The model cannot be used: weights that do not fit, a mismatch with the data, no gradients."""


class RefusedError(RobustannError):
    """A model is refused: it could run code, or it is not the one that was sealed or pinned.

    >>> RefusedError("altered").exit_code
    4
    """

    exit_code: ClassVar[int] = 4


class DamagedError(RefusedError, ModelError):
    """A model file is refused because it is damaged, cut off, or holds no weights.

    Such a file may have been made to harm its reader, so it ends as one that could run code.

    >>> DamagedError("cut off").exit_code, isinstance(DamagedError("cut off"), ModelError)
    (4, True)
    """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Error for a name that is not among ``known``, with the nearest one as a suggestion.

    >>> print(unknown_name("attack", "pdg", ["pgd", "fgsm"]))
    unknown attack 'pdg'; did you mean 'pgd'? Known: fgsm, pgd
    """
    options = sorted(known)
    near = difflib.get_close_matches(name.lower(), options, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return UsageError(f"unknown {kind} '{name}'; {hint}Known: {', '.join(options)}")


def first_invalid(error: ValidationError) -> tuple[str, str]:
    """Where in a file the first value is that does not fit, and why it does not.

    >>> from pydantic import TypeAdapter, ValidationError
    >>> try:
    ...     TypeAdapter(dict[str, int]).validate_python({"bits": "many"}, strict=True)
    ... except ValidationError as error:
    ...     print(*first_invalid(error), sep=": ")
    bits: Input should be a valid integer
    """
    first = error.errors()[0]
    return ".".join(str(part) for part in first["loc"]) or "the top level", first["msg"]
