"""Attacks of the Adversarial Robustness Toolbox (ART), judged by our engine: ``art:HopSkipJump``.

ART only proposes. Two images of each sample are projected into the region and judged by the engine
in float32: the one that ART returns, and the nearest adversarial one among all that it asked about
(some of its attacks walk away from the best image that they have seen; of an attack within eps
only images within eps are taken). That ART calls an image a success counts for nothing.

Every image that ART passes forward or backward is counted, for the sample it belongs to: ART is
called once for each sample, with that sample alone. So counts are exact, not shared out, and a
result does not depend on the batch; the price is that ART's gradient attacks lose the speed of
batches. What of a query the engine itself fills up to aligned batches is not counted. ART runs to
its end: ``limit`` of :func:`~robustann.attacks.engine.run` ends a sample only after it.

Random numbers: some of ART's attacks draw from the global states of NumPy, Python and torch, and
some from fresh ``np.random.RandomState()``, which takes its seed from the operating system. During
each call all of them run from the sample's own seed; afterwards they are as they were.

ART is imported when the first such attack runs or is given options. (Its import writes a small
configuration file to ``~/.art``.)
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from robustann.attacks.base import Access, Attack, State
from robustann.errors import ModelError, RobustannError, UsageError, unknown_name
from robustann.threat import ThreatModel, parse_number

if TYPE_CHECKING:
    from robustann.attacks.engine import Oracle

Value = str | int | float | bool | None


@dataclass(frozen=True)
class ArtFacts:
    """What ART's classes do not say of themselves.

    Attributes:
        access: what the attacker needs.
        norms: those in which ART's attack searches.
        paper: where it comes from.
        minimum_norm: whether it looks for the nearest adversarial image.
        rows: images passed forward and backward in one of its iterations, about; for estimates.
        softmax: whether it expects probabilities instead of logits.
        targets_only: whether labels handed to it always mean wanted classes.
        defaults: options where ART's own default cannot work.

    >>> ART_ATTACKS["HopSkipJump"].access
    'decision'
    """

    access: Access
    norms: frozenset[str]
    paper: str
    minimum_norm: bool = False
    rows: tuple[int, int] = (1, 1)
    softmax: bool = False
    targets_only: bool = False
    defaults: tuple[tuple[str, Value], ...] = ()


def _facts(access: Access, norms: str, paper: str, **more: Any) -> ArtFacts:
    link = f"https://doi.org/{paper}" if "/" in paper else f"https://arxiv.org/abs/{paper}"
    return ArtFacts(access, frozenset(norms.split()), link, **more)


# Those of ART's evasion attacks that change single images, each within a norm, and need nothing
# but the classifier. Left out: patches, universal perturbations, videos, speech, detectors,
# tables, other frameworks, and what needs a further model or image as an option.
ART_ATTACKS: Mapping[str, ArtFacts] = {
    "AutoAttack": _facts("white-box", "linf l2 l1", "2003.01690", rows=(77_000, 2000)),
    "AutoConjugateGradient": _facts("white-box", "linf l2 l1", "2206.09628", rows=(2, 1)),
    "AutoProjectedGradientDescent": _facts("white-box", "linf l2 l1", "2003.01690", rows=(2, 1)),
    "BasicIterativeMethod": _facts("white-box", "linf", "1607.02533"),
    "BoundaryAttack": _facts("decision", "l2", "1712.04248", minimum_norm=True, rows=(50, 0)),
    "CarliniL0Method": _facts("white-box", "l0", "1608.04644", minimum_norm=True, rows=(8, 2)),
    "CarliniL2Method": _facts("white-box", "l2", "1608.04644", minimum_norm=True, rows=(7, 2)),
    "CarliniLInfMethod": _facts(
        "white-box", "linf", "1608.04644", minimum_norm=True, rows=(180, 80)
    ),
    "DeepFool": _facts("white-box", "l2", "1511.04599", minimum_norm=True, rows=(2, 10)),
    "ElasticNet": _facts("white-box", "l1", "1709.04114", minimum_norm=True, rows=(4, 2)),
    "FastGradientMethod": _facts("white-box", "linf l2 l1", "1412.6572"),
    "HopSkipJump": _facts("decision", "linf l2", "1904.02144", minimum_norm=True, rows=(600, 0)),
    "MomentumIterativeMethod": _facts("white-box", "linf l2 l1", "1710.06081"),
    "NewtonFool": _facts(
        "white-box", "l2", "10.1145/3134600.3134635", minimum_norm=True, softmax=True
    ),
    "PixelAttack": _facts("score", "l0", "1710.08864", minimum_norm=True, rows=(400, 0)),
    "ProjectedGradientDescent": _facts("white-box", "linf l2 l1", "1706.06083"),
    "RescalingAutoConjugateGradient": _facts("white-box", "linf l2 l1", "2408.03972", rows=(2, 1)),
    "SaliencyMapMethod": _facts(
        "white-box", "l0", "1511.07528", minimum_norm=True, targets_only=True
    ),
    "SignOPTAttack": _facts("decision", "l2", "1909.10773", minimum_norm=True, rows=(50, 0)),
    "SimBA": _facts("score", "l2", "1905.07121", minimum_norm=True, softmax=True),
    "SquareAttack": _facts("score", "linf l2", "1912.00049", rows=(3, 0)),
    "ThresholdAttack": _facts(
        "score", "linf", "1906.06026", minimum_norm=True, defaults=(("es", 1),)
    ),
    "VirtualAdversarialMethod": _facts(
        # ART takes the gradient from differences, and the default one is lost in float32.
        "score",
        "l2",
        "1507.00677",
        softmax=True,
        defaults=(("finite_diff", 0.01),),
    ),
    "ZooAttack": _facts("score", "l2", "1708.03999", minimum_norm=True, rows=(256, 0)),
}

# Set from the threat model or by the adapter, so they are no options.
_TAKEN = frozenset(
    {"self", "classifier", "estimator", "estimator_orig", "attacks", "norm", "eps", "targeted"}
    | {"verbose", "verbose_es", "summary_writer", "parallel_pool_size", "adv_criterion", "loss"}
)
# Options that say how often something is done.
_REPEATED = ("max_iter", "binary_search_steps", "nb_random_init", "num_random_init", "nb_restarts")
_NORM = {"linf": math.inf, "l2": 2, "l1": 1}
# What ART and its attacks raise where options, shapes and models do not suit each other.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
)


@cache
def _signature(kind: str) -> dict[str, inspect.Parameter]:
    """The arguments of ART's class."""
    return dict(inspect.signature(_art_class(kind).__init__).parameters)


def _art_class(kind: str) -> Any:
    from art.attacks import evasion

    if not hasattr(evasion, kind):
        raise UsageError(
            f"the installed ART has no {kind}; install adversarial-robustness-toolbox 1.20 or newer"
        )
    return getattr(evasion, kind)


@dataclass(frozen=True, kw_only=True)
class ArtAttack(Attack):
    """One attack of ART with its options; what it finds is judged here like anything else.

    The norm, eps and the aim come from the threat model and are no options. Unless given,
    ``eps_step`` keeps ART's default share of eps. Images of an attack that looks for the nearest
    one may lie beyond eps and then are no success, as everywhere.

    Args:
        kind: the class in ``art.attacks.evasion``, in any case: ``HopSkipJump``.
        options: its arguments by name, as a mapping or pairs.

    Raises:
        UsageError: an attack or option that ART does not have, or that needs more than a
            classifier and single images.

    >>> ArtAttack(kind="hopskipjump").label
    'art:HopSkipJump'
    """

    kind: str
    options: tuple[tuple[str, Value], ...] | Mapping[str, Value] = ()

    def __post_init__(self) -> None:
        by_lower = {name.lower(): name for name in ART_ATTACKS}
        if self.kind.lower() not in by_lower:
            raise unknown_name(
                "attack", f"art:{self.kind}", [f"art:{name}" for name in ART_ATTACKS]
            )
        object.__setattr__(self, "kind", by_lower[self.kind.lower()])
        options = dict(self.options)
        for name in options:
            if name in _TAKEN:
                raise UsageError(
                    f"expected options of {self.name} other than {name}, which the threat model "
                    "or this package sets; leave it out"
                )
            possible = set(_signature(self.kind)) - _TAKEN
            if name not in possible:
                raise unknown_name(f"option of attack {self.name}", name, possible)
        object.__setattr__(self, "options", tuple(options.items()))

    @property
    def _facts(self) -> ArtFacts:
        return ART_ATTACKS[self.kind]

    @property
    def _aims(self) -> bool:
        """Whether it can go for a wanted class. AutoAttack means something else by targeted, and
        Sign-OPT then wants an image of the class to start from."""
        odd = self.kind in ("AutoAttack", "SignOPTAttack")
        return "targeted" in _signature(self.kind) and not odd

    @property
    def name(self) -> str:  # type: ignore[override]
        """``art:`` and ART's name of the attack."""
        return f"art:{self.kind}"

    @property
    def paper(self) -> str:  # type: ignore[override]
        """Where the attack comes from."""
        return self._facts.paper

    @property
    def access(self) -> Access:  # type: ignore[override]
        """What the attacker needs."""
        return self._facts.access

    @property
    def norms(self) -> frozenset[str]:  # type: ignore[override]
        """The norms in which ART's attack searches."""
        return self._facts.norms

    @property
    def minimum_norm(self) -> bool:  # type: ignore[override]
        """Whether it looks for the nearest adversarial image."""
        return self._facts.minimum_norm

    @property
    def parameters(self) -> dict[str, Value]:
        """The options that were set."""
        return dict(self.options)

    @property
    def label(self) -> str:
        """As :func:`~robustann.attacks.parse_attack` reads it."""
        options = ",".join(f"{name}={value}" for name, value in dict(self.options).items())
        return f"{self.name}:{options}" if options else self.name

    @property
    def iterations(self) -> int:
        # ART goes all the way in ``init``; a step shows the second image.
        return 1

    @property
    def cost(self) -> tuple[int, int]:
        """About what a sample costs: ART sets no limit that it would tell beforehand."""
        steps = 1
        for name in _REPEATED:
            if name in _signature(self.kind):
                value = dict(self.options).get(name, _signature(self.kind)[name].default)
                steps *= max(1, value) if isinstance(value, int) else 1
        forwards, backwards = self._facts.rows
        return 3 + steps * forwards, steps * backwards if self.access == "white-box" else 0

    def check(self, threat: ThreatModel) -> None:
        """Refuse a norm or an aim that ART's attack does not know.

        Raises:
            UsageError: with what it supports.
        """
        super().check(threat)
        if threat.targeted and not (self._aims or self._facts.targets_only):
            raise UsageError(
                f"expected an untargeted threat model for {self.name}, got a targeted one; "
                "choose another attack"
            )

    def init(self, oracle: Oracle) -> State:
        logits = oracle.logits if len(oracle.logits) else oracle.forward(oracle.x)
        x_adv = oracle.x.clone()
        if oracle.threat.eps == 0 and not self.minimum_norm:
            # ART refuses a ball of radius zero.
            return {"x": x_adv, "seen": x_adv}
        already = (logits.argmax(1) == oracle.labels) == oracle.threat.targeted
        seen = x_adv.clone()
        spent = torch.zeros((2, len(oracle)), dtype=torch.int64)
        seeds = (oracle.random.uniform(2) * 2.0**24).long().tolist()
        # One by one: see the head of this file.
        for row in (oracle.standing & ~already).nonzero().squeeze(1).tolist():
            queries = _Queries(oracle, row, self)
            with _seeded(seeds[row], oracle.x.device):
                found = self._generate(oracle, queries, row, logits.shape[1])
            # What is no image (NaN) is no proposal either.
            if bool(found.isfinite().all()):
                x_adv[row] = found
            seen[row] = x_adv[row] if queries.nearest is None else queries.nearest
            spent[:, row] = torch.tensor([queries.forwards, queries.backwards])
        oracle.count(*spent.to(oracle.x.device))
        return {"x": oracle.region.project(x_adv), "seen": oracle.region.project(seen)}

    def step(self, oracle: Oracle, state: State, iteration: int) -> State:
        """Show the second image."""
        oracle.forward(state["x"])
        return {**state, "x": state["seen"]}

    def _generate(self, oracle: Oracle, queries: _Queries, row: int, classes: int) -> Tensor:
        """ART's adversarial image for one sample, (C, H, W)."""
        image = oracle.x[row : row + 1].cpu().numpy()
        label = np.eye(classes, dtype=np.float32)[[int(oracle.labels[row])]]
        try:
            classifier = _classifier_class()(
                queries,
                loss=nn.CrossEntropyLoss(),
                input_shape=image.shape[1:],
                nb_classes=classes,
                clip_values=oracle.threat.bounds,
                # The model stays where it is; queries are carried to it.
                device_type="cpu",
            )
            attack = _art_class(self.kind)(classifier, **self._arguments(oracle.threat))
            for part in getattr(attack, "attacks", ()):
                # ART's ensemble does not pass this on.
                part.verbose = False
            aimless = self._facts.targets_only and not oracle.threat.targeted
            found = attack.generate(image.copy(), y=None if aimless else label)
        except RobustannError:
            raise
        except ImportError as error:
            raise UsageError(
                f"ART's {self.kind} needs the package {error.name}, which is not installed; "
                "install it or choose another attack"
            ) from error
        except _FAILURES as error:
            raise UsageError(
                f"ART's {self.kind} failed on images of shape {image.shape[1:]} with "
                f"{type(error).__name__}: {error}; change its options or choose another attack"
            ) from error
        return torch.from_numpy(np.asarray(found, dtype=np.float32))[0].to(oracle.x.device)

    def _arguments(self, threat: ThreatModel) -> dict[str, Any]:
        """ART's arguments: what the threat model says, silence, and the options."""
        known = _signature(self.kind)
        arguments: dict[str, Any] = {**dict(self._facts.defaults), **dict(self.options)}
        if "norm" in known:
            arguments["norm"] = _NORM[threat.norm]
        if "targeted" in known:
            arguments["targeted"] = threat.targeted and self._aims
        if "eps" in known:
            arguments["eps"] = threat.eps
            if "eps_step" in known and "eps_step" not in arguments:
                share = known["eps_step"].default / known["eps"].default
                arguments["eps_step"] = threat.eps * share
        if "verbose" in known:
            arguments["verbose"] = False
        return arguments


@cache
def _classifier_class() -> Any:
    from art.estimators.classification import PyTorchClassifier

    class Classifier(PyTorchClassifier):  # type: ignore[misc]
        def predict(self, x: Any, batch_size: int = 128, **_: Any) -> Any:
            # ART's own makes a DataLoader each time, which takes longer than most queries.
            images = torch.from_numpy(np.asarray(x, dtype=np.float32))
            with torch.no_grad():
                parts = [
                    self.model(images[start : start + batch_size])
                    for start in range(0, len(images), batch_size)
                ]
            return torch.cat(parts).numpy()

    return Classifier


class _Queries(nn.Module):
    """The model as ART sees it for one sample: float32, every image and gradient counted, the
    nearest adversarial image kept.

    Holds no parameters, so that ART can neither move nor switch the model.
    """

    def __init__(self, oracle: Oracle, row: int, attack: ArtAttack) -> None:
        super().__init__()
        self.forwards = 0
        self.backwards = 0
        self.nearest: Tensor | None = None
        self._oracle = oracle
        self._original = oracle.x[row : row + 1]
        self._label = oracle.labels[row]
        self._softmax = attack._facts.softmax
        within = math.nextafter(oracle.threat.eps, math.inf)
        self._distance = math.inf if attack.minimum_norm else within

    def forward(self, x: Tensor) -> Tensor:
        # Under NumPy 2 some of ART's attacks pass float64.
        images = x.to(self._original.device, torch.float32)
        logits = self._oracle.ask(images)
        self.forwards += len(x)
        self._look(images.detach(), logits.detach())
        if torch.is_grad_enabled() and x.requires_grad:
            if not logits.requires_grad:
                raise ModelError(
                    "expected a differentiable model, but its output carries no gradient; use an "
                    "attack that needs no gradients"
                )
            logits.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return (logits.softmax(1) if self._softmax else logits).to(x.device)

    def _look(self, images: Tensor, logits: Tensor) -> None:
        threat = self._oracle.threat
        low, high = threat.bounds
        fooled = (logits.argmax(1) == self._label) == threat.targeted
        fooled &= ((images >= low) & (images <= high)).flatten(1).all(1)
        if not bool(fooled.any()):
            return
        images = images[fooled]
        distance, place = threat.distance(images, self._original).min(0)
        if float(distance) < self._distance:
            self._distance, self.nearest = float(distance), images[int(place)]

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


class _SeededState(np.random.RandomState):
    """A RandomState that asks the global one, not the operating system, for a missing seed."""

    def __init__(self, seed: Any = None) -> None:
        super().__init__(np.random.randint(2**31) if seed is None else seed)


@contextmanager
def _seeded(seed: list[int], device: torch.device) -> Iterator[None]:
    """All global random numbers from ``seed`` (two numbers below 2**24); as before at the end."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        mock.patch.object(np.random, "RandomState", _SeededState),
        # Search tries what divides by zero; its result is judged anyway.
        np.errstate(all="ignore"),
    ):
        np.random.seed(seed)
        random.seed(seed[0] << 24 | seed[1])
        torch.manual_seed(seed[0] << 24 | seed[1])
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def parse_art(text: str) -> ArtAttack:
    """An attack of ART from ``NAME`` or ``NAME:option=value,option=value``.

    Raises:
        UsageError: unknown attack or option (with the nearest known one), or an unfit value.

    >>> parse_art("CarliniL2Method").norms
    frozenset({'l2'})
    """
    kind, _, rest = text.partition(":")
    bare = ArtAttack(kind=kind.strip())
    options: dict[str, Value] = {}
    for part in filter(None, rest.split(",")):
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UsageError(f"expected options of {bare.name} as name=value, got '{part}'")
        argument = _signature(bare.kind).get(option)
        default = None if argument is None else argument.default
        options[option] = _convert(f"{bare.name}:{option}", value, default)
    return ArtAttack(kind=bare.kind, options=options)


def _convert(what: str, text: str, default: object) -> Value:
    """Text to the type of ART's default: bool, int, float or str; to a number if there is none."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        raise UsageError(f"expected {what} as true or false, got '{text}'")
    number = parse_number(text, what)
    if isinstance(default, float) or number != int(number):
        return number
    return int(number)
