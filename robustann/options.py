"""Options in text: what attacks, sanitizers and defenses are asked for with."""

from __future__ import annotations

from robustann.errors import UsageError


def split_options(name: str, rest: str, example: str = "option") -> dict[str, str]:
    """The options of ``name:option=value,option=value`` after the colon, as text by their names.

    ``example`` is an option to show where one is malformed.

    Raises:
        UsageError: one has no value, or is given twice.

    >>> split_options("pgd", "steps=100, loss=margin")
    {'steps': '100', 'loss': 'margin'}
    """
    options: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UsageError(
                f"expected options of {name} as name=value, got '{part}'; "
                f"for example {name}:{example}=..."
            )
        if option in options:
            raise UsageError(f"expected {option} once in '{name}:{rest}', got it again; keep one")
        options[option] = value
    return options
