"""``pkg.module:factory``: a user's own code, named by text, that builds data or a model."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys

from robustann.errors import RobustannError, UsageError


def is_factory(text: str) -> bool:
    """Whether ``text`` has the form ``pkg.module:factory``.

    >>> is_factory("mine.data:make"), is_factory("imagefolder:/a/b"), is_factory("digits")
    (True, False, False)
    """
    module, colon, attribute = text.partition(":")
    names = [*module.split("."), *attribute.split(".")]
    return bool(colon) and all(name.isidentifier() for name in names)


def origin(text: str) -> str | None:
    """The file that importing ``text`` begins with, found without running anything.

    None if there is none. It is where the outermost package lies: what is inside could only be
    found by running that.

    >>> origin("json.decoder:JSONDecoder").endswith("__init__.py"), origin("nowhere:net")
    (True, None)
    """
    _allow_current_folder()
    try:
        spec = importlib.util.find_spec(text.partition(":")[0].partition(".")[0])
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or [])
    return spec.origin or (folders[0] if folders else None)


def _allow_current_folder() -> None:
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        # Last, so that nothing in the folder hides an installed package.
        sys.path.append(folder)


def call_factory(
    text: str, kind: str, failure: type[RobustannError], **arguments: object
) -> object:
    """Import ``pkg.module:factory``, call it, return what it returns.

    The current folder is importable. The factory is given those of ``arguments`` that its
    signature accepts. This runs the user's code: never call it with text read from a file that
    somebody else may have written.

    Args:
        text: what to import, as ``pkg.module:factory``.
        kind: what the factory builds, for messages ("dataset", "model").
        failure: class of the error raised where the user's code fails.

    Raises:
        UsageError: no such module or attribute, or it is nothing that can be called.
        RobustannError: of class ``failure``, the code itself raised; the cause is chained.

    >>> call_factory("collections:Counter", "dataset", RobustannError)
    Counter()
    """
    if not is_factory(text):
        raise UsageError(f"expected a {kind} factory as 'pkg.module:factory', got '{text}'")
    module_name, _, attribute = text.partition(":")
    _allow_current_folder()
    try:
        target: object = importlib.import_module(module_name)
    # A script that ends itself must not end the caller with its own exit code.
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{error.name}."
        ):
            raise UsageError(
                f"no module '{error.name}' for the {kind} '{text}'; run from the folder that "
                "holds it, install it, or correct the name"
            ) from error
        raise failure(
            f"importing '{module_name}' for the {kind} '{text}' failed with "
            f"{type(error).__name__}: {error}; correct that module"
        ) from error
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise UsageError(
                f"module '{module_name}' has no '{attribute}' for the {kind} '{text}'; "
                "define it there or correct the name"
            )
        target = getattr(target, name)
    if not callable(target):
        raise UsageError(
            f"expected '{text}' to be a function that builds the {kind}, "
            f"got a {type(target).__name__}; name a function"
        )
    try:
        return target(**_accepted(target, arguments))
    except RobustannError:
        raise
    except (Exception, SystemExit) as error:
        raise failure(
            f"the {kind} factory '{text}' raised {type(error).__name__}: {error}; correct it there"
        ) from error


def _accepted(target: object, arguments: dict[str, object]) -> dict[str, object]:
    try:
        parameters = inspect.signature(target).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        # Some built-in callables have no signature.
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: value
        for name, value in arguments.items()
        if name in parameters and parameters[name].kind in by_name
    }
