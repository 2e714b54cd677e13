"""What is installed only with an extra, such as ``robustann[onnx]``."""

from __future__ import annotations

import importlib
from types import ModuleType

from robustann.errors import UsageError


def need(module: str, extra: str) -> ModuleType:
    """Import a module that comes with an extra.

    Raises:
        UsageError: it is not installed; the message names the extra.

    >>> need("no_such_module", "onnx")
    Traceback (most recent call last):
    robustann.errors.UsageError: this needs 'no_such_module', which is not installed; install it
    with: pip install 'robustann[onnx]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "") == module
        why = "is not installed" if missing else f"cannot be imported ({error})"
        raise UsageError(
            f"this needs '{module}', which {why}; install it with: pip install 'robustann[{extra}]'"
        ) from error
