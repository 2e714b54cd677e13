"""Defenses by name, and from text; found by themselves, as attacks are."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from robustann import defenses
from robustann.attacks import parse_attack
from robustann.defenses.adversarial import AdversarialTraining
from robustann.defenses.awp import AdversarialWeightPerturbation
from robustann.defenses.clipping import BitErrorTraining
from robustann.defenses.detection import Detector
from robustann.defenses.sanitizers import SANITIZERS, Sanitizer, parse_sanitizer
from robustann.errors import UsageError, unknown_name
from robustann.options import split_options
from robustann.threat import parse_number

Kind = Literal["objective", "wrapper", "sanitizer", "detector"]
Against = Literal["attacks", "bit errors", "proofs", "invalid inputs"]
# Arguments that the caller of a defense has anyway.
_GIVEN = ("self", "attack", "threat", "step")
# What a settings dictionary passes on (see AttackStep).
_PASSED_ON: Mapping[str, Any] = {
    "label_smoothing": 0.0,
    "mix": 0.0,
    "eps_warmup_epochs": None,
    "watch": True,
}
_ATTACK = "pgd:steps=10"


def _found(kind: Kind) -> dict[str, Any]:
    """By name, the classes of this folder's files that have a name and a paper of their own, and
    say that they are of this ``kind``."""
    found: dict[str, Any] = {}
    for listed in pkgutil.iter_modules(defenses.__path__):
        module = f"{defenses.__name__}.{listed.name}"
        if module == __name__ or listed.ispkg:
            continue
        for value in vars(importlib.import_module(module)).values():
            if isinstance(value, type) and {"name", "paper"} <= vars(value).keys():
                name, of = value.name, getattr(value, "kind", None)  # type: ignore[attr-defined]
                if of == kind:
                    found[name] = value
    return dict(sorted(found.items()))


OBJECTIVES: Mapping[str, Callable[..., Any]] = _found("objective")
WRAPPERS: Mapping[str, Callable[..., Any]] = _found("wrapper")
DETECTORS: Mapping[str, Callable[..., Detector]] = _found("detector")


@dataclass(frozen=True)
class Defense:
    """A defense as it was asked for.

    Attributes:
        name: of :data:`OBJECTIVES`, :data:`WRAPPERS`, :data:`DETECTORS` or
            :data:`~robustann.defenses.sanitizers.SANITIZERS`.
        label: the text that it was asked for with.
        kind: what it is: a training objective, what wraps one, a module in front of the model, or
            what refuses images beside it.
        made: makes it: an objective from a threat model, a wrapper from a step, others from
            nothing. An objective also takes options that the text leaves open, of ``takes``.
        paper, helps, limits: what it says of itself.
        takes: names of the options that an objective knows and the text does not set.
        against: what it is measured by in the first place: attacks on the images, wrong bits in the
            weights, what can be proven, or input that is no image.

    >>> parse_defense("weight-clipping").against, parse_defense("trades").against
    ('bit errors', 'attacks')
    """

    name: str
    label: str
    kind: Kind
    made: Callable[..., Any]
    paper: str
    helps: tuple[str, ...]
    limits: tuple[str, ...]
    takes: frozenset[str] = frozenset()
    against: Against = "attacks"


def defense_names() -> dict[str, str]:
    """Every defense with its kind, for listings.

    >>> defense_names()["trades"], defense_names()["jpeg"]
    ('objective', 'sanitizer')
    """
    return {
        **dict.fromkeys(OBJECTIVES, "objective"),
        **dict.fromkeys(WRAPPERS, "wrapper"),
        **dict.fromkeys(SANITIZERS, "sanitizer"),
        **dict.fromkeys(DETECTORS, "detector"),
    }


def defense_options() -> dict[str, tuple[str, tuple[str, ...], dict[str, Any]]]:
    """Kind, what it helps against, and options with defaults of every defense, for listings.

    >>> kind, helps, options = defense_options()["trades"]
    >>> kind, options["beta"]
    ('objective', 6.0)
    """
    listed = {}
    for name, kind in defense_names().items():
        if kind == "sanitizer":
            sanitizer = SANITIZERS[name]
            fields = dataclasses.fields(sanitizer)
            options = {field.name: field.default for field in fields}
            listed[name] = (kind, tuple(sanitizer.helps), options)
            continue
        maker: Any = {**OBJECTIVES, **WRAPPERS, **DETECTORS}[name]
        signature = inspect.signature(maker).parameters
        options = {
            option: "NUMBER" if one.default is inspect.Parameter.empty else one.default
            for option, one in signature.items()
            if option not in (*_GIVEN, "validation_attack")
            and one.kind is not inspect.Parameter.VAR_KEYWORD
        }
        if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.values()):
            options |= _PASSED_ON
        if "attack" in signature:
            options["attack"] = _ATTACK.partition(":")[0]
        listed[name] = (kind, _facts(maker)[0], options)
    return listed


def _facts(maker: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where it helps and where not; what takes that over from its inner step has adversarial
    training's."""
    if isinstance(maker.helps, property):
        return AdversarialTraining.helps, AdversarialTraining.limits
    return tuple(maker.helps), tuple(maker.limits)


def _against(one: Any) -> Against:
    """As it says; attacks on the images where it says nothing."""
    against: Against = getattr(one, "against", "attacks")
    return against


def parse_defense(text: str) -> Defense:
    """A defense from its name and options: ``name`` or ``name:option=value,option=value``.

    Adversarial training and MART take any attack as ``attack=NAME``; options that they do not know
    themselves are the attack's.

    Raises:
        UsageError: unknown defense or option (with the nearest known one), or an unfit value.

    >>> from robustann.threat import ThreatModel
    >>> step = parse_defense("trades:beta=4").made(ThreatModel("linf", 0.1))
    >>> step.beta
    4.0
    >>> parse_defense("adversarial-training:steps=3").made(ThreatModel("linf", 0.1)).attack.label
    'pgd:steps=3'
    """
    text = text.strip()
    name, _, rest = text.partition(":")
    if name in SANITIZERS:
        return _of_sanitizer(parse_sanitizer(text), text)
    if name in DETECTORS:
        return _of_detector(_detector(name, rest), text)
    known = {**OBJECTIVES, **WRAPPERS}
    if name not in known:
        raise unknown_name("defense", name, defense_names())
    maker = known[name]
    options, others = _options(name, maker, rest)
    wrapper = name in WRAPPERS
    takes_attack = "attack" in inspect.signature(maker).parameters

    def made(over: Any, **more: Any) -> Any:
        given = {**more, **options}
        if wrapper:
            return maker(over, **given)
        if takes_attack:
            return maker(_attack(others), over, **given)
        return maker(**given) if _threatless(maker) else maker(over, **given)

    if takes_attack:
        _attack(others)
    elif others:
        raise unknown_name(f"option of defense {name}", next(iter(others)), _known(maker))
    cls: Any = maker
    helps, limits = _facts(cls)
    left = frozenset() if wrapper else frozenset(_known(maker)) - frozenset(options)
    kind: Kind = "wrapper" if wrapper else "objective"
    return Defense(name, text, kind, made, cls.paper, helps, limits, left, _against(cls))


def as_defense(one: Any) -> Defense:
    """A defense from text, a sanitizer, or a training step made by the caller.

    Raises:
        UsageError: it is none of these.

    >>> from robustann.defenses import TRADES
    >>> from robustann.threat import ThreatModel
    >>> as_defense(TRADES(ThreatModel("linf", 0.1))).name
    'trades'
    """
    if isinstance(one, Defense):
        return one
    if isinstance(one, str):
        return parse_defense(one)
    if isinstance(one, Sanitizer):
        return _of_sanitizer(one, one.label)
    if isinstance(one, Detector):
        return _of_detector(one, one.label)
    if isinstance(one, type):
        raise UsageError(
            f"expected a defense as text, a sanitizer or a training step, got the class "
            f"{one.__name__} itself; make one of it, or name it as text, for example "
            f"'{getattr(one, 'name', 'trades')}'"
        )
    if callable(one) and hasattr(one, "parameters") and isinstance(getattr(one, "name", None), str):
        facts = (getattr(one, fact, ()) for fact in ("helps", "limits"))
        helps, limits = (tuple(fact) for fact in facts)
        paper = getattr(one, "paper", "")
        label = _label(one)
        return Defense(
            one.name,
            label,
            "objective",
            lambda threat: one,
            paper,
            helps,
            limits,
            against=_against(one),
        )
    raise UsageError(
        f"expected a defense as text, a sanitizer or a training step, got {type(one).__name__}; "
        f"for example 'adversarial-training:steps=10'"
    )


def check_together(defenses: Sequence[Defense]) -> None:
    """Refuse what cannot be combined.

    Raises:
        UsageError: none, two training objectives, the same defense twice, or AWP beside bit-error
            training.
    """
    if not defenses:
        raise UsageError(
            "expected at least one defense, got none; for example 'adversarial-training:steps=10'"
        )
    objectives = [one.label for one in defenses if one.kind == "objective"]
    if len(objectives) > 1:
        raise UsageError(
            f"expected one training objective, got {' and '.join(objectives)}; a model is trained "
            "by one at a time: choose one, beside wrappers and sanitizers"
        )
    names = [one.name for one in defenses]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"expected each defense once, got '{name}' twice; drop one")
    if {AdversarialWeightPerturbation.name, BitErrorTraining.name} <= set(names):
        raise UsageError(
            "expected awp or bit-error-training, got both: one moves the weights until the "
            "backward pass, the other takes the loss at weights of its own; drop one"
        )


def _label(step: Any) -> str:
    """A training step as text: its name and its parameters; what it wraps follows."""
    told = dict(step.parameters())
    inner = told.pop("step", None)
    text = f"{step.name}:" + ",".join(f"{name}={value}" for name, value in told.items())
    while isinstance(inner, Mapping):
        own = {name: value for name, value in inner.items() if name not in ("name", "step")}
        listed = ",".join(f"{name}={value}" for name, value in own.items())
        text += f" around {inner.get('name', 'a step')}" + (f":{listed}" if listed else "")
        inner = inner.get("step")
    return text.removesuffix(":")


def _of_sanitizer(module: Sanitizer, text: str) -> Defense:
    return Defense(
        module.name,
        text,
        "sanitizer",
        lambda: module,
        module.paper,
        tuple(module.helps),
        tuple(module.limits),
        against=_against(module),
    )


def _detector(name: str, rest: str) -> Detector:
    maker = DETECTORS[name]
    options, others = _options(name, maker, rest)
    if others:
        raise unknown_name(f"option of defense {name}", next(iter(others)), _known(maker))
    return maker(**options)


def _of_detector(one: Detector, text: str) -> Defense:
    return Defense(one.name, text, "detector", lambda: one, one.paper, one.helps, one.limits)


def _known(maker: Callable[..., Any]) -> dict[str, Any]:
    """Options by name with a default, whose type a value must have."""
    known: dict[str, Any] = {}
    for name, parameter in inspect.signature(maker).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            known |= _PASSED_ON
        elif name not in _GIVEN and name != "validation_attack":
            default = parameter.default
            # A parameter that may be left to the defense is a number.
            known[name] = 0.0 if default is None or default is inspect.Parameter.empty else default
    for name in ("eps_warmup_epochs", "warmup_epochs", "ramp_epochs"):
        if name in known:
            known[name] = 0
    return known


def _threatless(maker: Callable[..., Any]) -> bool:
    return "threat" not in inspect.signature(maker).parameters


def _options(
    name: str, maker: Callable[..., Any], rest: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The maker's own options, with values of their types; and all others, as text."""
    known = _known(maker)
    own: dict[str, Any] = {}
    others: dict[str, str] = {}
    for option, value in split_options(name, rest, next(iter(known), "option")).items():
        if option in known:
            own[option] = _converted(f"{name}:{option}", value, known[option])
        else:
            others[option] = value
    for option, parameter in inspect.signature(maker).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        if required and option in known and option not in own:
            raise UsageError(f"expected {name} with {option}, got none; write {name}:{option}=...")
    return own, others


def _attack(others: Mapping[str, str]) -> Any:
    """The inner attack that the options left over describe."""
    rest = dict(others)
    name = rest.pop("attack", None)
    if name is None:
        name, _, usual = _ATTACK.partition(":")
        option, _, value = usual.partition("=")
        rest = {option: value, **rest}
    listed = ",".join(f"{option}={value}" for option, value in rest.items())
    return parse_attack(f"{name}:{listed}" if listed else name)


def _converted(what: str, value: str, like: Any) -> Any:
    if isinstance(like, bool):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if value.lower() not in words:
            raise UsageError(f"expected {what} as true or false, got '{value}'")
        return words[value.lower()]
    if isinstance(like, int):
        try:
            return int(value)
        except ValueError:
            raise UsageError(f"expected {what} as a whole number, got '{value}'") from None
    return parse_number(value, what)
