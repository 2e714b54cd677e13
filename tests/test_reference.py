"""Every public name has a docstring, types, an executed doctest, and its place in the reference.

Public is what a package lists in ``__all__``, and what the modules below define without
underscore.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import robustann

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs" / "api.md", ROOT / "docs" / "report-parts.md")

# Modules without ``__all__`` that users import from by their own names.
MODULES = (
    "robustann.errors",
    "robustann.findings",
    "robustann.interop",
    "robustann.metrics",
    "robustann.rng",
    "robustann.threat",
    "robustann.attacks.base",
    "robustann.attacks.bpda",
    "robustann.attacks.corruptions",
    "robustann.attacks.engine",
    "robustann.attacks.losses",
    "robustann.attacks.transfer",
)
# Names without a doctest of their own, and why.
WITHOUT_DOCTEST = {
    "robustann.auditing.presets.Preset": "a record that get_preset, whose doctest shows it, gives",
    "robustann.errors.DataError": "an exception; that of its base shows what there is to see",
    "robustann.errors.ModelError": "likewise",
    "robustann.errors.UsageError": "shown by that of its base",
    "robustann.interop.to_foolbox": "importing foolbox warns, and a doctest cannot tell it not to",
}


@dataclass(frozen=True)
class Public:
    """A public name: the module that lists it, and the place where it is defined."""

    module: str
    name: str
    home: str
    value: object

    @property
    def constant(self) -> bool:
        return not isinstance(self.value, type | types.FunctionType)


def plain(module: types.ModuleType, name: str) -> object:
    """A value; of a function with a cache around it, the function."""
    value = getattr(module, name)
    return inspect.unwrap(value) if callable(value) else value


def home(module: types.ModuleType, name: str) -> str:
    """Where a name is defined, which may be another module than the one that lists it."""
    value = plain(module, name)
    if isinstance(value, type | types.FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if module.__file__ is None:
        return f"{module.__name__}.{name}"
    for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return home(importlib.import_module(node.module), alias.name)
    return f"{module.__name__}.{name}"


def modules() -> Iterator[tuple[types.ModuleType, list[str]]]:
    yield robustann, robustann.__all__
    for found in pkgutil.walk_packages(robustann.__path__, "robustann."):
        if found.ispkg:
            package = importlib.import_module(found.name)
            if hasattr(package, "__all__"):
                yield package, package.__all__
    for name in MODULES:
        module = importlib.import_module(name)
        assert not hasattr(module, "__all__")
        defined = [
            key
            for key in vars(module)
            if not key.startswith("_")
            for value in [plain(module, key)]
            if isinstance(value, type | types.FunctionType) and value.__module__ == name
        ]
        yield module, defined


PUBLIC = {
    one.home: one
    for module, names in modules()
    for name in names
    if name != "__version__"
    for one in [Public(module.__name__, name, home(module, name), plain(module, name))]
}
CODE = [one for one in PUBLIC.values() if not one.constant]


# ------------------------------------------------------------------------ what is asked of each


def undocumented(value: object) -> bool:
    """Whether it has no docstring of its own; an inherited one says nothing of it."""
    text = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    # What a dataclass writes by itself.
    generated = isinstance(value, type) and (text or "").startswith(f"{value.__name__}(")
    return not (text or "").strip() or generated


def shows_something(value: type | types.FunctionType) -> bool:
    """Whether a doctest of it, or of a public method, is run and has an outcome."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = finder.find(value, value.__qualname__, module=inspect.getmodule(value))
    return any(
        example.want.strip() and not example.options.get(doctest.SKIP)
        for test in tests
        if not test.name.rpartition(".")[2].startswith("_") or test.name.endswith("__call__")
        for example in test.examples
    )


def functions(value: object) -> Iterator[types.FunctionType]:
    """A function; or a class's constructor and public methods, where it writes them itself."""
    if isinstance(value, types.FunctionType):
        yield value
        return
    for name, member in vars(value).items():
        if name.startswith("_") and name not in ("__init__", "__call__"):
            continue
        member = member.fget if isinstance(member, property) else member
        member = getattr(member, "__func__", member)
        if isinstance(member, types.FunctionType) and member.__module__ == value.__module__:
            yield member


def untyped(value: object) -> list[str]:
    """What has no annotation: parameters, or what is returned."""
    missing = []
    for function in functions(value):
        # Of a constructor that a dataclass wrote, the fields are annotated.
        if "<string>" in function.__code__.co_filename:
            continue
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        if parameters and parameters[0].name in ("self", "cls"):
            parameters = parameters[1:]
        bare = [one.name for one in parameters if one.annotation is inspect.Parameter.empty]
        if signature.return_annotation is inspect.Signature.empty:
            bare.append("return")
        missing += [f"{function.__qualname__}: {name}" for name in bare]
    return missing


def directives(pages: tuple[Path, ...] = REFERENCE) -> Iterator[str]:
    """The names that the reference asks MkDocs to show."""
    for page in pages:
        yield from re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def shown(name: str) -> str:
    """What MkDocs makes of a name: it reads the code, and takes a module before a function of the
    same name."""
    package, _, last = name.rpartition(".")
    module = importlib.import_module(package)
    if hasattr(module, "__path__") and importlib.util.find_spec(name):
        raise AssertionError(f"'::: {name}' shows a module; name what is in it")
    return home(module, last)


ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`~?([\w.]+)`")


def reaches(value: object, names: list[str]) -> bool:
    """Whether the names lead somewhere; fields of a class are only annotated."""
    for name in names:
        if hasattr(value, name):
            value = getattr(value, name)
        elif name in getattr(value, "__annotations__", {}) or (
            name in getattr(value, "model_fields", {})
        ):
            return name == names[-1]
        else:
            return False
    return True


def broken_roles(path: Path, name: str) -> list[str]:
    """Links of a file's docstrings that lead nowhere: to a name of robustann, of the module, or of
    one of its classes."""
    text = path.read_text(encoding="utf-8")
    wanted = set(ROLE.findall(text))
    if not wanted:
        return []
    module = importlib.import_module(name.removesuffix(".__init__"))
    places = [module, *(one for one in vars(module).values() if isinstance(one, type))]
    wrong = []
    for target in sorted(wanted):
        if target.startswith("robustann."):
            try:
                pkgutil.resolve_name(target)
            except (ImportError, AttributeError):
                # A field, perhaps.
                owner, _, field = target.rpartition(".")
                try:
                    good = reaches(pkgutil.resolve_name(owner), [field])
                except (ImportError, AttributeError):
                    good = False
            else:
                good = True
        else:
            good = any(reaches(place, target.split(".")) for place in places)
        if not good:
            wrong.append(f"{path.relative_to(ROOT)}: {target}")
    return wrong


# ------------------------------------------------------------------------------------ the tests


def test_doctests_are_run() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    options = settings["tool"]["pytest"]["ini_options"]
    assert "--doctest-modules" in options["addopts"]
    assert "robustann" in options["testpaths"]


def test_every_public_name_has_a_docstring() -> None:
    assert [one.home for one in CODE if undocumented(one.value)] == []


def test_every_public_name_is_shown_at_work() -> None:
    bare = {one.home for one in CODE if not shows_something(one.value)}
    assert sorted(bare - WITHOUT_DOCTEST.keys()) == []
    assert sorted(WITHOUT_DOCTEST.keys() - bare) == [], "no longer exceptions"


def test_every_public_name_is_typed() -> None:
    assert [missing for one in CODE for missing in untyped(one.value)] == []


def test_every_public_name_is_in_the_reference() -> None:
    named = [shown(name) for name in directives()]
    assert len(named) == len(set(named)), "a name is in the reference twice"
    text = "".join(page.read_text(encoding="utf-8") for page in REFERENCE)
    missing = [
        f"`{one.module}.{one.name}`" if one.constant else f"::: {one.home}"
        for one in PUBLIC.values()
        if not (f"`{one.module}.{one.name}`" in text if one.constant else one.home in named)
    ]
    assert missing == [], "add these to docs/api.md, or begin the names with an underscore"


def test_every_name_that_a_docstring_links_to_exists() -> None:
    wrong = []
    # These are links, which glob does not follow.
    for part in (".", "attacks", "defenses", "reports"):
        for path in sorted((ROOT / "robustann" / part).glob("**/*.py")):
            wrong += broken_roles(path, ".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert wrong == []


# --------------------------------------------------------------------- the checks can fail


def no_docstring(x):
    return x


def filler(x: int) -> int:
    """A docstring.

    >>> filler(1)  # doctest: +SKIP
    1
    >>> _ = filler(1)
    """
    return x


class Inherits(robustann.RobustannError):
    def method(self, x) -> None:
        """A docstring."""


def test_what_is_missing_is_found() -> None:
    assert undocumented(no_docstring)
    assert undocumented(Inherits)
    assert not undocumented(filler)
    assert not shows_something(no_docstring)
    assert not shows_something(filler)
    assert shows_something(robustann.load_data)
    assert untyped(no_docstring) == ["no_docstring: x", "no_docstring: return"]
    assert untyped(Inherits) == ["Inherits.method: x"]
    assert untyped(filler) == []
    with pytest.raises(AssertionError, match="shows a module"):
        shown("robustann.outputs.junit")
