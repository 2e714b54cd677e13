"""Before the attacks: what about this model would make an attack fail for the wrong reason?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustann.attacks.engine import (
    check_classes,
    check_labels,
    frozen,
    model_device,
    predict_logits,
)
from robustann.attacks.losses import cross_entropy
from robustann.findings import Finding
from robustann.rng import SampleRandom, stable_hash
from robustann.threat import ThreatModel, check_images
from robustann.trust.checks import CHECKS, conclude, not_run
from robustann.trust.jumps import jumps, ways

_IMAGES = 32
_DIRECTIONS = 4
# Steps of finite differences, as shares of the image range: one at which a network is linear in
# float64; one that float32 can resolve; and bounds of one that an attack takes.
_FINE, _FINE_SINGLE, _COARSE = 1e-7, 2.0**-10, (2.0**-10, 2.0**-8)
# The images leave the ends of the range (where models may clip) and the grid of grey levels
# (where pooling has ties) by up to this much.
_INWARDS = 2.0**-5
# A jump of a logit counts from this share of the spread of the logits.
_JUMP = 0.05
# Logits of a smaller spread are looked at magnified.
_TINY = 1e-2


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found; the booleans decide which remedies an audit takes.

    Attributes:
        findings: one a check.
        randomised: repeated forwards differ: average over draws.
        batch_dependent: an image's logits hang on its batch.
        gradient_missing: next to no image has a usable gradient: gradients cannot be attacked.
        gradient_partly_missing: too many images have none, or none towards any other class.
        gradient_unreliable: the gradient is not the slope, or none that leads anywhere.
        softmax_output: the model returns probabilities.
        saturated: softmax is exactly 0 and 1 in float32.
        dynamic: the model calls autograd while it predicts.
        propagations: forwards and backwards of single images spent.

    >>> class Noisy(nn.Module):
    ...     def forward(self, x):
    ...         return x.flatten(1) + 0.1 * torch.rand(len(x), 3)
    >>> x, labels = torch.eye(3).reshape(3, 1, 1, 3), torch.arange(3)
    >>> found = diagnose(Noisy(), x, labels, ThreatModel("linf", 0.1))
    >>> found.randomised, found.gradient_missing
    (True, False)
    """

    findings: tuple[Finding, ...]
    randomised: bool = False
    batch_dependent: bool = False
    gradient_missing: bool = False
    gradient_partly_missing: bool = False
    gradient_unreliable: bool = False
    softmax_output: bool = False
    saturated: bool = False
    dynamic: bool = False
    propagations: int = 0


def diagnose(
    model: nn.Module, x: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int = 0
) -> Diagnosis:
    """Look at a model before attacking it, on the first 32 images that it classifies correctly.

    Some 80 propagations an image. The model is left as it was, buffers included.

    Args:
        model: maps images to logits.
        x: float images (N, C, H, W) within the bounds of ``threat``.
        labels: int64 (N,), the true classes.
        threat: what the attacker may do; here only its bounds matter.
        seed: of everything random.

    Raises:
        DataError: images or labels are unfit.
        ModelError: the model's output is no row of finite logits an image.

    Sources: Carlini et al. 2019 (arXiv:1902.06705), Athalye et al. 2018 (arXiv:1802.00420),
    Pintor et al. 2022 (arXiv:2106.09947), and the checks that AutoAttack makes.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> x = torch.rand(8, 1, 4, 4)
    >>> found = diagnose(model, x, model(x).argmax(1), ThreatModel("linf", 0.1))
    >>> [one.check for one in found.findings if one.verdict == "fail"]
    []
    """
    check_images(x, threat.bounds)
    check_labels(labels, len(x))
    x, labels, looked = _correct(model, x, labels, seed)
    if not len(x):
        why = "No image was classified correctly, so there was nothing to look at."
        checks = ("randomised", "batch-dependent", "training-mode", "softmax-output",
                  "dynamic-defense", "gradient-missing", "saturated-loss", "gradient-mismatch",
                  "gradient-shattered", "discontinuous")  # fmt: skip
        return Diagnosis(tuple(not_run(check, why) for check in checks), propagations=looked)
    flags = [(module, module.training) for module in model.modules()]
    device = model_device(model)
    x, labels = x.to(device, torch.float32), labels.to(device)
    with frozen(model, seed):
        subject = _Subject(model, seed)
        with torch.no_grad():
            logits = subject.logits(x)
            randomised, repeatable = _randomised(subject, x, logits)
            odds = logits.double()
            if _simplex(odds):
                odds = odds.log()
            findings = [
                randomised,
                _batch_dependent(subject, x, logits, repeatable),
                _training_mode(subject, x, logits, flags, repeatable),
                _softmax_output(logits),
                _dynamic(subject, x),
                _saturated(odds, labels),
            ]
        point = _off_the_grid(x, threat, seed)
        gradient, lost, missing = _gradient_missing(subject, x, point, labels)
        findings.append(missing)
        slopes = _finite_differences(subject, point, labels, gradient, threat, repeatable)
        findings += slopes
        right = missing.verdict == "pass" and all(one.verdict == "pass" for one in slopes)
        findings.append(_discontinuous(subject, x, labels, gradient if right else None, threat))
    failed = {one.check for one in findings if one.verdict == "fail"}
    order = list(CHECKS)
    return Diagnosis(
        tuple(sorted(findings, key=lambda one: order.index(one.check))),
        randomised="randomised" in failed,
        batch_dependent="batch-dependent" in failed,
        gradient_missing=lost > 0.9,
        gradient_partly_missing="gradient-missing" in failed,
        gradient_unreliable=bool(failed & {"gradient-mismatch", "gradient-shattered"}),
        softmax_output="softmax-output" in failed,
        saturated="saturated-loss" in failed,
        dynamic="dynamic-defense" in failed,
        propagations=looked + subject.propagations,
    )


class _Subject:
    """A model under examination: counts what it is asked, and lets it draw the same numbers."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model = model
        self.seed = seed
        self.propagations = 0
        self.classes = 0
        # Of the logits in the loss.
        self.scale = 1.0

    def logits(self, x: Tensor, *, reseed: bool = True) -> Tensor:
        if reseed:
            # PyTorch takes no larger seed.
            fits = self.seed < 2**63
            torch.manual_seed(self.seed if fits else stable_hash("torch", self.seed))
        self.propagations += len(x)
        logits: Tensor = self.model(x)
        self.classes = logits.shape[1]
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.scale * self.logits(x), labels)


def _correct(model: nn.Module, x: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor, int]:
    """The first images that are classified correctly, their labels, and the forwards it took."""
    rows: list[int] = []
    looked = 0
    for start in range(0, len(x), _IMAGES):
        part = slice(start, start + _IMAGES)
        logits = predict_logits(model, x[part], seed=seed)
        check_classes(labels[part].cpu(), logits.shape[1])
        looked += len(logits)
        hit = logits.argmax(1) == labels[part].cpu()
        rows += (hit.nonzero().flatten() + start).tolist()
        if len(rows) >= _IMAGES:
            break
    chosen = torch.tensor(rows[:_IMAGES], dtype=torch.int64, device=x.device)
    return x[chosen].detach(), labels[chosen.to(labels.device)], looked


def _change(first: Tensor, second: Tensor) -> float:
    """The largest change of a logit, as a share of the spread of an image's logits."""
    spread = (first.amax(1) - first.amin(1)).median()
    # Rounding grows with the logits' size, not only with their spread.
    scale = float(torch.maximum(spread, 0.01 * first.abs().max()))
    change = float((first - second).abs().nan_to_num(nan=torch.inf).max())
    return change / scale if scale > 0 else float(change > 0)


def _flipped(first: Tensor, second: Tensor) -> str:
    share = float((first.argmax(1) != second.argmax(1)).double().mean())
    return f"{share:.0%} of the predictions change"


def _tolerance(check: str, model: nn.Module, device: torch.device) -> float:
    """What rounding alone may change."""
    threshold = CHECKS[check].threshold or 0.0
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if kinds & {torch.float16, torch.bfloat16}:
        return max(threshold, 0.05)
    # Convolutions may run in TF32 there, and by other kernels for other batch sizes.
    return threshold if device.type == "cpu" else max(threshold, 0.01)


def _randomised(subject: _Subject, x: Tensor, logits: Tensor) -> tuple[Finding, bool]:
    """Whether repeated forwards differ; and whether they do even with the same random numbers."""
    tolerance = _tolerance("randomised", subject.model, x.device)
    repeats = [subject.logits(x, reseed=False) for _ in range(3)]
    change, other = max(((_change(logits, one), one) for one in repeats), key=lambda pair: pair[0])
    failed = change > tolerance
    repeatable = not failed or _change(logits, subject.logits(x)) <= tolerance
    seen = "Repeated forwards of the same images give the same logits."
    if failed:
        seen = (
            f"Repeated forwards of the same images differ by up to {change:.3g} of the spread of "
            f"the logits; {_flipped(logits, other)}."
        )
    finding = conclude("randomised", failed, seen, value=change, threshold=tolerance)
    return finding, repeatable


def _batch_dependent(subject: _Subject, x: Tensor, logits: Tensor, repeatable: bool) -> Finding:
    name = "batch-dependent"
    if len(x) < 2:
        return not_run(name, "One image alone has no neighbours.")
    if not repeatable or _change(logits, subject.logits(x, reseed=False)) > 0:
        return not_run(
            name, "The model's answers change by themselves, so the batch's part cannot be told."
        )
    tolerance = _tolerance(name, subject.model, x.device)
    others = {"another order": subject.logits(x.flip(0)).flip(0)}
    for size in (1, max(2, len(x) // 2)):
        try:
            parts = [subject.logits(x[i : i + size]) for i in range(0, len(x), size)]
        except ValueError:
            # Batch statistics of one image.
            return conclude(
                name, True, f"The model refuses batches of {size} image(s).", threshold=tolerance
            )
        others[f"batches of {size}"] = torch.cat(parts)
    change, how = max((_change(logits, one), how) for how, one in others.items())
    failed = change > tolerance
    seen = "Logits are the same in another order and in batches of other sizes."
    if failed:
        seen = (
            f"In {how}, logits differ by up to {change:.3g} of their spread; "
            f"{_flipped(logits, others[how])}."
        )
    return conclude(name, failed, seen, value=change, threshold=tolerance)


def _training_mode(
    subject: _Subject,
    x: Tensor,
    logits: Tensor,
    flags: list[tuple[nn.Module, bool]],
    repeatable: bool,
) -> Finding:
    name = "training-mode"
    stubborn = sorted({type(module).__name__ for module, _ in flags if module.training})
    if stubborn:
        return conclude(
            name, True, f"Layers stay in training mode after eval(): {', '.join(stubborn)}."
        )
    if not any(training for _, training in flags):
        return conclude(name, False, "The model came in eval mode.")
    if not repeatable:
        return not_run(name, "The model's answers change by themselves in eval mode too.")
    buffers = [(buffer, buffer.clone()) for buffer in subject.model.buffers()]
    try:
        for module, training in flags:
            module.training = training
        change = _change(logits, subject.logits(x))
    except ValueError:
        # BatchNorm in training mode refuses a single value a channel.
        change = torch.inf
    finally:
        for module, _ in flags:
            module.training = False
        for buffer, held in buffers:
            buffer.copy_(held)
    tolerance = _tolerance(name, subject.model, x.device)
    failed = change > tolerance
    seen = "The model came in training mode, which changes nothing about its answers."
    if failed:
        kinds = sorted({type(m).__name__ for m, on in flags if on and not list(m.children())})
        seen = (
            "The model came in training mode, and answers otherwise than in eval mode (layers in "
            f"training mode: {', '.join(kinds)})."
        )
    return conclude(
        name,
        failed,
        seen,
        value=change,
        threshold=tolerance,
        remedy="The audit set eval mode for every forward pass.",
    )


def _simplex(rows: Tensor) -> bool:
    sums = rows.sum(1)
    # Half precision and rounded probabilities miss 1 by some thousandths.
    return rows.shape[1] > 1 and bool((rows >= 0).all() & ((sums - 1).abs() < 0.01).all())


def _softmax_output(logits: Tensor) -> Finding:
    if _simplex(logits.double()):
        return conclude(
            "softmax-output", True, "Each row of the output is non-negative and sums to 1."
        )
    seen = "The model returns logits."
    if bool(logits.max() <= 0) and _simplex(logits.double().exp()):
        seen = (
            "The model returns logarithms of probabilities: logits up to a constant, which "
            "changes no attack."
        )
    return conclude("softmax-output", False, seen)


class _Watch(TorchFunctionMode):
    """Notes calls of autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.autograd.grad, Tensor.backward):
            self.calls += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _watching() -> Iterator[_Watch]:
    watch = _Watch()
    backward = torch.autograd.backward

    def watched(*args: Any, **kwargs: Any) -> None:
        watch.calls += 1
        backward(*args, **kwargs)

    # The one entry that function modes do not see.
    torch.autograd.backward = watched
    try:
        with watch:
            yield watch
    finally:
        torch.autograd.backward = backward


def _dynamic(subject: _Subject, x: Tensor) -> Finding:
    with _watching() as watch:
        subject.logits(x)
    failed = watch.calls > 0
    seen = "A forward pass calls no autograd."
    if failed:
        seen = f"One forward pass calls autograd {watch.calls} time(s)."
    return conclude("dynamic-defense", failed, seen, value=float(watch.calls), threshold=0.0)


def _saturated(logits: Tensor, labels: Tensor) -> Finding:
    name = "saturated-loss"
    odds = -cross_entropy(logits, labels)
    sure = float((odds > math.log(1e6)).double().mean())
    # float32 loses the label's share of the gradient at log-odds of 17 and all of it at 88.
    # Plain training reaches 30, so the line lies between.
    middle = float(odds.median())
    limit = CHECKS[name].threshold or 0.0
    seen = f"The median log-odds of the label are {middle:.3g}; p_y > 1 - 1e-6 for {sure:.0%}."
    return conclude(name, middle > limit, seen, value=middle)


def _off_the_grid(x: Tensor, threat: ThreatModel, seed: int) -> Tensor:
    """The images a little disturbed, away from the ends of their range and from grey levels."""
    low, high = threat.bounds
    span = high - low
    random = SampleRandom.create(seed, torch.arange(len(x))).fork("off the grid").to(x.device)
    moved = x - low + (random.uniform(*x.shape[1:]) - 0.5) * _INWARDS * span
    return low + moved.clamp(0, span) * (1 - 2 * _INWARDS) + _INWARDS * span


def _gradient_missing(
    subject: _Subject, x: Tensor, point: Tensor, labels: Tensor
) -> tuple[Tensor | None, float, Finding]:
    """The gradient at the disturbed images, None if there is none at all; the share of images that
    have none; and the finding, also about those whose gradient leads to no other class."""
    name = "gradient-missing"
    gradient, why = _gradient(subject, x, labels)
    beside, _ = _gradient(subject, point, labels)
    if gradient is None or beside is None:
        return None, 1.0, conclude(name, True, f"No image has a gradient: {why}.", value=1.0)
    # At a black image all units of a network may sit at the kink of their ReLU; attacks start
    # beside it.
    lost = [one.flatten(1) for one in (gradient, beside)]
    broken = ~lost[0].isfinite().all(1) & ~lost[1].isfinite().all(1)
    zero = (lost[0] == 0).all(1) & (lost[1] == 0).all(1)
    lost_rows = broken | zero
    hidden = _leads_nowhere(subject, x, labels) & _leads_nowhere(subject, point, labels)
    hidden &= ~lost_rows
    count = int((lost_rows | hidden).sum())
    share = count / len(x)
    seen = (
        f"The gradient is zero for {int(zero.sum())} and not finite for {int(broken.sum())} "
        f"of {len(x)} images."
    )
    if bool(hidden.any()):
        seen += (
            f" For {int(hidden.sum())} more no class but the label has one: nothing tells an "
            "attack where to go."
        )
    # One image alone may sit in a dead corner.
    failed = share > (CHECKS[name].threshold or 0.0) and (count > 1 or count == len(x))
    return beside, float(lost_rows.double().mean()), conclude(name, failed, seen, value=share)


def _leads_nowhere(subject: _Subject, x: Tensor, labels: Tensor) -> Tensor:
    """For which images the logits of all classes but the label have no gradient."""

    def others(logits: Tensor) -> Tensor:
        # Of different weight, so that they do not cancel.
        weights = torch.linspace(0.5, 1.5, logits.shape[1], device=logits.device)
        weights = weights.expand_as(logits).scatter(1, labels[:, None], 0.0)
        return (weights.to(logits.dtype) * logits).sum(1)

    slope, _ = _gradient(subject, x, labels, others)
    if slope is None or subject.classes < 3:
        # Of two classes one may be fixed: the other says it all.
        return torch.zeros_like(labels, dtype=torch.bool)
    return (slope.flatten(1) == 0).all(1)


def _gradient(
    subject: _Subject,
    x: Tensor,
    labels: Tensor,
    of: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, str]:
    """The gradient of the loss, or ``of`` the logits; None if there is none, and why."""
    leaf = x.detach().clone().requires_grad_()
    try:
        loss = subject.loss(leaf, labels) if of is None else of(subject.logits(leaf))
    except torch.OutOfMemoryError:
        # It says nothing of the gradient.
        raise
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise
        # Such as numpy() of a tensor that requires grad: fine without a gradient, not with one.
        return None, f"the forward pass fails with one ({str(error).splitlines()[0][:200]})"
    if not loss.requires_grad:
        return None, "the output is detached from the input"
    subject.propagations += len(x)
    try:
        found: tuple[Tensor | None, ...] = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return None, f"the backward pass fails ({str(error).splitlines()[0][:200]})"
    return found[0], "the output does not depend on the input" if found[0] is None else ""


def _finite_differences(
    subject: _Subject,
    point: Tensor,
    labels: Tensor,
    gradient: Tensor | None,
    threat: ThreatModel,
    repeatable: bool,
) -> list[Finding]:
    names = ("gradient-mismatch", "gradient-shattered")
    if gradient is None or not repeatable:
        why = "There is no gradient to compare." if gradient is None else (
            "The model's answers change by themselves, even with the same random numbers."
        )  # fmt: skip
        return [not_run(name, why) for name in names]
    span = threat.bounds[1] - threat.bounds[0]
    random = SampleRandom.create(subject.seed, torch.arange(len(point))).to(point.device)
    twin = _double(subject, point)
    observed = twin or subject
    point = point.double() if twin else point
    fine = (_FINE if twin else _FINE_SINGLE) * span
    coarse = _COARSE[1] * span
    if threat.norm == "linf":
        coarse = min(max(threat.eps / 8, _COARSE[0] * span), coarse)
    with torch.no_grad():
        logits = observed.logits(point)
    spread = float((logits.amax(1) - logits.amin(1)).median())
    if 0 < spread < _TINY:
        # The loss of tiny logits is near log(classes - 1), and rounding all that would be seen.
        observed.scale = 1 / spread
    slope, _ = _gradient(observed, point, labels)
    findings = [not_run(name, "No image has a gradient to compare.") for name in names]
    usable = torch.zeros_like(labels, dtype=torch.bool)
    if slope is not None:
        length = slope.flatten(1).norm(dim=1)
        with torch.no_grad():
            size = observed.scale * observed.logits(point).abs().amax(1)
        # What rounding alone puts into the finest quotient must stay small beside the gradient.
        rounding = torch.finfo(size.dtype).eps * size / fine
        usable = length.isfinite() & (length > 0) & (rounding < 0.05 * length)
    if slope is not None and bool(usable.any()):
        point, labels, slope = point[usable], labels[usable], slope[usable]
        random = random.select(usable)
        with torch.no_grad():
            # In float32 the fine step is nearly as long as the coarse one.
            findings = [
                _disagreement(names[0], observed, point, labels, slope, random, fine, not twin),
                _disagreement(names[1], observed, point, labels, slope, random, coarse),
            ]
    if twin:
        subject.propagations += twin.propagations
    return findings


def _discontinuous(
    subject: _Subject, x: Tensor, labels: Tensor, slope: Tensor | None, threat: ThreatModel
) -> Finding:
    """Whether logits jump within the threat model, though the ``slope`` of the loss is right."""
    name = "discontinuous"
    if slope is None:
        return not_run(name, "The gradient was not found to be the slope where it is taken.")
    if threat.eps == 0:
        return not_run(name, "Nothing may be changed.")
    ends = ways(x, labels, slope.nan_to_num(), threat)
    if not ends:
        return not_run(name, "In l0 it takes images of several classes, for there is no way up.")
    with torch.no_grad():
        found = jumps(subject.logits, x, [*ends.values()])
    large = found > _JUMP
    count, share = int(large.sum()), float(large.double().mean())
    # One image alone may be a chance of rounding.
    failed = share > (CHECKS[name].threshold or 0.0) and count > 1
    seen = (
        f"On the way {' and '.join(ends)} a logit jumps by more than {_JUMP:.0%} of the spread of "
        f"the logits for {count} of {len(x)} images, at most by {float(found.max()):.1%}."
    )
    return conclude(name, failed, seen, value=share)


def _double(subject: _Subject, x: Tensor) -> _Subject | None:
    """A float64 copy of the model, if it computes the same; else None."""
    try:
        twin = _Subject(copy.deepcopy(subject.model).double(), subject.seed)
        with torch.no_grad():
            single, double = subject.logits(x), twin.logits(x.double())
    except Exception:
        # Whatever a model raises that cannot be copied or has float32 written into it.
        return None
    # Discontinuous models may differ for a few images by rounding alone.
    same = (single - double).abs().amax(1) <= 0.01 * single.abs().amax(1)
    return twin if double.dtype == torch.float64 and float(same.double().mean()) >= 0.5 else None


def _disagreement(
    name: str,
    subject: _Subject,
    x: Tensor,
    labels: Tensor,
    slope: Tensor,
    random: SampleRandom,
    step: float,
    single: bool = False,
) -> Finding:
    """Along random directions: finite differences against autograd, in units of the gradient."""
    length = slope.flatten(1).norm(dim=1)
    errors = []
    for _ in range(_DIRECTIONS):
        direction = random.sign(*x.shape[1:]).to(x)
        ahead = subject.loss(x + step * direction, labels)
        behind = subject.loss(x - step * direction, labels)
        promised = (slope * direction).flatten(1).sum(1)
        # A random sign direction changes the loss by the gradient's length, on average.
        errors.append(((ahead - behind) / (2 * step) - promised).abs() / length)
    error = torch.stack(errors).square().mean(0).sqrt()
    value = float(error.nan_to_num(nan=torch.inf).median())
    threshold = CHECKS["gradient-shattered" if single else name].threshold or 0.0
    seen = (
        f"Finite differences of step {step:.1g} along random directions differ from autograd by "
        f"{value:.3g} of the gradient (median over {len(x)} images)."
    )
    return conclude(name, not value <= threshold, seen, value=value, threshold=threshold)
