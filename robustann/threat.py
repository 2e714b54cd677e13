"""What an attacker may do: the only code that knows what a norm is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from robustann.errors import DataError, UsageError, unknown_name
from robustann.rng import SampleRandom

Norm = Literal["linf", "l2", "l1", "l0"]
NORMS: tuple[str, ...] = get_args(Norm)
# Further out, squares overflow float32; no image is.
_FAR = 1e15
# Rounds of the projection onto the l2 ball where asking for more would wait for the device. Random
# images needed at most 10; a sample that needs more ends a little inside the ball.
_ROUNDS = 12


def asking_waits(device: torch.device) -> bool:
    """Whether reading a value makes the processor wait for this device.

    It then stands still until all is computed that was asked for before: inner loops take a way
    without questions, to the same images.

    >>> asking_waits(torch.device("cpu"))
    False
    """
    return device.type != "cpu"


def parse_number(value: float | str, what: str) -> float:
    """A finite number from a number or from text such as ``"0.1"`` or ``"8/255"``.

    Raises:
        UsageError: the text is no number, divides by zero, or is not finite.

    >>> round(parse_number("8/255", "eps"), 6)
    0.031373
    """
    try:
        if isinstance(value, str) and "/" in value:
            # Fraction reads "2/3" by itself: 1/2/3 must not become 1/(2/3).
            numerator, denominator = value.split("/")
            number = float(Fraction(numerator.strip()) / Fraction(denominator.strip()))
        else:
            number = float(value)
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(
            f"expected {what} as a finite number such as 0.1 or 8/255, got '{value}'; "
            "write it as a decimal or as a fraction with a denominator other than 0"
        )
    return number


def _down(value: float) -> float:
    """The largest float32 that is not above ``value``.

    An image whose float32 difference is at most this is within ``value`` for every reader,
    whether it computes in float32 or float64.
    """
    with np.errstate(over="ignore"):
        rounded = np.float32(value)
    return float(np.nextafter(rounded, np.float32(0)) if float(rounded) > value else rounded)


@dataclass(frozen=True)
class ThreatModel:
    """An attacker who may move an image by at most ``eps`` in ``norm``, within ``bounds``.

    Args:
        norm: ``linf`` (largest change of an entry), ``l2`` (Euclidean length), ``l1`` (sum of
            absolute changes) or ``l0`` (number of changed entries). An entry is one channel of
            one pixel.
        eps: the radius, as a number or as text such as ``"8/255"``.
        bounds: the range of valid images.
        targeted: whether the attacker wants one given class instead of any wrong one. The
            labels handed to an attack are then the wanted classes.

    Raises:
        UsageError: unknown norm; eps negative, not finite, or (linf) wider than the bounds.

    >>> ThreatModel("linf", eps="8/255").eps_text
    '8/255'
    """

    norm: Norm
    eps: float
    bounds: tuple[float, float] = (0.0, 1.0)
    targeted: bool = False
    eps_text: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown_name("norm", str(self.norm), NORMS)
        try:
            low, high = (float(bound) for bound in self.bounds)
        except (TypeError, ValueError):
            low = high = math.nan
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(
                f"expected bounds as two finite numbers, the lower first, got {self.bounds}; "
                "for images in [0, 1] leave the default"
            )
        given: object = self.eps
        eps = parse_number(self.eps, "eps")
        text = given if isinstance(given, str) else f"{eps:.6g}"
        # dataclasses.replace hands the text on, with the same eps or with another one.
        if self.eps_text and parse_number(self.eps_text, "eps_text") == eps:
            text = self.eps_text
        if eps < 0:
            raise UsageError(f"expected eps >= 0, got {text}; name the radius as a positive number")
        if self.norm == "linf" and eps > high - low:
            advice = f"did you mean {eps:g}/255?" if "/" not in text else "name a smaller radius"
            raise UsageError(
                f"expected an linf eps of at most {high - low:g}, the width of the image range, "
                f"got {text}; images are in [{low:g}, {high:g}]: {advice}"
            )
        object.__setattr__(self, "bounds", (low, high))
        object.__setattr__(self, "eps", eps)
        object.__setattr__(self, "eps_text", text)

    def with_eps(self, eps: float) -> ThreatModel:
        """The same attacker with another radius.

        >>> ThreatModel("l2", 1.0).with_eps(0.5).eps
        0.5
        """
        return ThreatModel(self.norm, eps, self.bounds, self.targeted)

    def region(self, x: Tensor) -> Region:
        """The images that this attacker may make out of ``x`` (N, C, H, W); see :class:`Region`."""
        return Region(self, x)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The allowed images nearest to ``x_adv`` (see :meth:`Region.project`).

        >>> x = torch.zeros(1, 1, 1, 2)
        >>> [round(v, 3) for v in ThreatModel("l2", 1.0).project(x + 3.0, x).flatten().tolist()]
        [0.707, 0.707]
        """
        return self.region(x).project(x_adv)

    def random_start(self, x: Tensor, random: SampleRandom) -> Tensor:
        """A random allowed image around each ``x`` (see :meth:`Region.random_start`).

        >>> x = torch.full((1, 1, 2, 2), 0.5)
        >>> random = SampleRandom.create(0, torch.arange(1))
        >>> bool((ThreatModel("linf", 0.1).random_start(x, random) - x).abs().max() <= 0.1)
        True
        """
        return self.region(x).random_start(random)

    def steepest_step(self, gradient: Tensor, size: float) -> Tensor:
        """The step of length ``size`` in this norm along which ``gradient`` promises most.

        linf: ``size * sign``; l2: ``size`` along the gradient; l1: ``size`` shared equally by the
        1 % largest entries (SLIDE: Tramer and Boneh, NeurIPS 2019), since the exact answer, one
        entry alone, makes no progress on images. A zero gradient gives a zero step.

        Raises:
            UsageError: l0, which has no steepest direction.

        >>> ThreatModel("linf", 0.1).steepest_step(torch.tensor([[[[-3.0, 0.5]]]]), 0.01)
        tensor([[[[-0.0100,  0.0100]]]])
        """
        if self.norm == "linf":
            return gradient.sign().mul_(size)
        flat = gradient.flatten(1)
        if self.norm == "l2":
            # Divided by the largest entry first: squares of tiny gradients underflow.
            scaled = flat / _positive(flat.abs().amax(1, keepdim=True))
            unit: Tensor = scaled / _positive(scaled.norm(dim=1, keepdim=True))
            return unit.mul_(size).view_as(gradient)
        if self.norm == "l1":
            count = max(1, round(0.01 * flat.shape[1]))
            top = flat.abs().topk(count, dim=1)
            step = torch.zeros_like(flat).scatter_(1, top.indices, flat.gather(1, top.indices))
            return step.sign_().mul_(size / count).view_as(gradient)
        raise UsageError("expected linf, l2 or l1 for a gradient step, got l0; l0 has no steepest "
                         "direction, choose another norm")  # fmt: skip

    def slope(self, gradient: Tensor) -> Tensor:
        """How much a linear function rises a unit of distance in this norm, (N,): the dual norm.

        At least the smallest normal number, so that one can divide by it.

        Raises:
            UsageError: l0, which has no dual norm.

        >>> ThreatModel("linf", 0.1).slope(torch.tensor([[[[-3.0, 0.5]]]]))
        tensor([3.5000])
        """
        dual = {"linf": 1.0, "l2": 2.0, "l1": math.inf}
        if self.norm not in dual:
            raise UsageError("expected linf, l2 or l1 for a slope, got l0; l0 has none, choose "
                             "another norm")  # fmt: skip
        return _positive(torch.linalg.vector_norm(gradient.flatten(1), dual[self.norm], dim=1))

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Distance of each image to its original in this norm, float64 of shape (N,).

        >>> ThreatModel("l1", 5.0).distance(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
        tensor([4.], dtype=torch.float64)
        """
        delta = (wide(x_adv) - wide(x)).flatten(1)
        if self.norm == "linf":
            return delta.abs().amax(1)
        if self.norm == "l2":
            length: Tensor = delta.norm(dim=1)
            return length
        if self.norm == "l1":
            return delta.abs().sum(1)
        return wide((delta != 0).sum(1))

    def holds(self, x_adv: Tensor, distance: Tensor) -> bool:
        """Whether all images, at these distances (N,) to their originals, are allowed as they are.

        >>> threat, x = ThreatModel("linf", 0.25), torch.full((1, 1, 1, 1), 0.5)
        >>> threat.holds(x + 0.25, torch.tensor([0.25])), threat.holds(x, torch.tensor([0.5]))
        (True, False)
        """
        low, high = self.bounds
        lowest, highest = x_adv.aminmax()
        # A comparison with NaN is false.
        return bool((distance <= _down(self.eps)).all() & (lowest >= low) & (highest <= high))

    def widest(self, entries: int) -> float:
        """The eps from which on an image of so many entries may be changed without limit.

        >>> ThreatModel("linf", 0.1).widest(64), ThreatModel("l2", 1.0).widest(64)
        (1.0, 8.0)
        """
        span = self.bounds[1] - self.bounds[0]
        return {
            "linf": span,
            "l2": span * math.sqrt(entries),
            "l1": span * entries,
            "l0": float(entries),
        }[self.norm]

    def words(self) -> str:
        """The threat model as a sentence.

        >>> ThreatModel("linf", "8/255").words()
        'An attacker who may change every pixel by at most 8/255 and wants any wrong class.'
        """
        budget = {
            "linf": f"may change every pixel by at most {self.eps_text}",
            "l2": f"may change the image by a Euclidean distance of at most {self.eps_text}",
            "l1": f"may change pixels by at most {self.eps_text} in sum",
            "l0": f"may change at most {self.eps_text} pixel values, each by any amount",
        }[self.norm]
        aim = "one given wrong class" if self.targeted else "any wrong class"
        return f"An attacker who {budget} and wants {aim}."


class Region:
    """The images that a threat model allows around each of N originals: the ball cut by the box.

    Made once for a batch and cut down with ``select`` as samples leave, so that inner loops do
    not compute the limits again.
    """

    def __init__(self, threat: ThreatModel, x: Tensor) -> None:
        self.threat = threat
        self.x = x
        low, high = threat.bounds
        self._eps = _down(threat.eps)
        if threat.norm == "linf":
            lower, upper = _interval(x, self._eps)
            self._lower, self._upper = lower.clamp_(min=low), upper.clamp_(max=high)
        else:
            self._lower, self._upper = torch.full_like(x, low), torch.full_like(x, high)

    def select(self, rows: Tensor) -> Region:
        """The regions of the given rows (a mask or positions)."""
        part = object.__new__(Region)
        part.threat, part._eps = self.threat, self._eps
        part.x, part._lower, part._upper = self.x[rows], self._lower[rows], self._upper[rows]
        return part

    def project(self, x_adv: Tensor, radius: Tensor | None = None) -> Tensor:
        """The allowed image nearest to ``x_adv`` in Euclidean distance: exact, box included.

        linf: clamping. l2 and l1: the multiplier of the ball is found so that the clipped image
        lies on the sphere (clipping after a plain projection would end inside it). l0: the
        entries whose change matters most are kept. The result never leaves the box, nor the
        ball in float32 or float64 arithmetic.

        Args:
            x_adv: any images, (N, C, H, W).
            radius: float32 (N,), at least 0: a radius for each image, for attacks that look for
                the nearest one. It counts where it is below the threat model's eps.

        >>> region = ThreatModel("linf", 0.5).region(torch.zeros(2, 1, 1, 1))
        >>> region.project(torch.ones(2, 1, 1, 1), torch.tensor([0.25, 2.0])).flatten()
        tensor([0.2500, 0.5000])
        """
        clipped = torch.clamp(x_adv, self._lower, self._upper)
        if radius is None and self.threat.norm == "linf":
            return clipped
        if radius is None:
            eps = torch.full((len(self.x), 1), self._eps, device=self.x.device)
        else:
            eps = radius.clamp(max=self._eps)[:, None]
        if self.threat.norm == "linf":
            return torch.clamp(clipped, *_interval(self.x, eps.view(-1, 1, 1, 1)))
        # What fits stays as it is, to the last bit: an image that was judged is handed out.
        fits = self.threat.distance(clipped, self.x) <= eps.squeeze(1)
        if not asking_waits(self.x.device) and bool(fits.all()):
            return clipped
        delta = (x_adv - self.x).flatten(1).clamp_(-_FAR, _FAR)
        low, high = (self._lower - self.x).flatten(1), (self._upper - self.x).flatten(1)
        nearest = {"l2": _project_l2, "l1": _project_l1, "l0": _project_l0}[self.threat.norm]
        moved = nearest(delta, low, high, eps)
        inside = self._inside(self.x + moved.view_as(self.x), eps.squeeze(1))
        return torch.where(fits.view((-1,) + (1,) * (self.x.dim() - 1)), clipped, inside)

    def _inside(self, x_adv: Tensor, eps: Tensor) -> Tensor:
        """Undo what rounding put outside: clamp to the box, shrink what is a float too long."""
        x_adv = torch.clamp(x_adv, self._lower, self._upper)
        if self.threat.norm == "l0":
            return x_adv
        waits = asking_waits(self.x.device) and self.x.device.type != "mps"
        rounds = 0
        while True:
            distance = self.threat.distance(x_adv, self.x)
            outside = distance > eps
            if rounds == 2 if waits else not bool(outside.any()):
                return x_adv
            shorter = self._shorter(x_adv, eps / _positive(distance), certain=rounds > 0)
            x_adv = torch.where(outside.view((-1,) + (1,) * (x_adv.dim() - 1)), shorter, x_adv)
            rounds += 1

    def _shorter(self, x_adv: Tensor, share: Tensor, *, certain: bool) -> Tensor:
        """``x_adv`` with a little less than this share of its change.

        The sum is rounded, which may make it as long as it was: for next to every image the first
        attempt is enough. A ``certain`` one rounds every entry towards the original, in float64:
        it never fails.
        """
        factor = share.clamp(max=1.0).view((-1,) + (1,) * (x_adv.dim() - 1)) * (1 - 2**-22)
        if certain:
            origin = wide(self.x)
            exact = (wide(x_adv) - origin) * factor
            shrunk = (origin + exact).to(x_adv.dtype)
            beyond = (wide(shrunk) - origin).abs() > exact.abs()
            return torch.where(beyond, shrunk.nextafter(self.x), shrunk)
        delta = x_adv - self.x
        shrunk = self.x + delta * factor.float()
        nearer = (shrunk - self.x).abs() < delta.abs()
        return torch.where(nearer, shrunk, x_adv.nextafter(self.x))

    def step(self, x_adv: Tensor, gradient: Tensor, size: float) -> Tensor:
        """``x_adv`` moved by the steepest step of length ``size`` and projected.

        l1: an entry that stands at the end of its range and is pushed further gives its share of
        the step to others, which else would never move; it is pushed all the same, so that the
        projection takes what is too long from the others and not from it.
        """
        if self.threat.norm == "l1":
            stuck = torch.where(gradient > 0, x_adv >= self._upper, x_adv <= self._lower)
            step = self.threat.steepest_step(gradient.masked_fill(stuck, 0.0), size)
            step = torch.where(stuck, gradient.sign() * size, step)
            return self.project(step.add_(x_adv))
        if self.threat.norm == "linf":
            # Fewer passes over the image than by way of its parts, to the same bits.
            step = gradient.sign()
            return torch.add(x_adv, step, alpha=size, out=step).clamp_(self._lower, self._upper)
        return self.project(self.threat.steepest_step(gradient, size).add_(x_adv))

    def random_start(self, random: SampleRandom) -> Tensor:
        """A random image of the region: uniform in the ball, then projected into the box.

        l0: as many entries as allowed, chosen at random, get uniform values.
        """
        shape = self.x.shape[1:]
        size = math.prod(shape)
        norm, eps = self.threat.norm, self._eps
        if norm == "linf":
            return self.project(random.uniform(*shape).mul_(2 * eps).sub_(eps).add_(self.x))
        if norm == "l0":
            count = min(int(eps), size)
            chosen = random.uniform(size).topk(count, dim=1).indices
            low, high = self.threat.bounds
            values = random.uniform(count) * (high - low) + low
            return self.x.flatten(1).scatter(1, chosen, values).view_as(self.x)
        if norm == "l2":
            ray = random.normal(size)
            # Not pow: in vector instructions it rounds otherwise than in the rows left over.
            length = random.uniform(1).log_().div_(size).exp_() * eps
            delta = ray * (length / _positive(ray.norm(dim=1, keepdim=True)))
        else:
            # Exponential numbers divided by a sum that has one more of them: uniform in the
            # simplex (Devroye 1986, chapter 11); random signs make it the l1 ball.
            weight = random.uniform(size + 1).neg_().add_(1.0).log_().neg_()
            share = weight[:, :-1] / _positive(weight.sum(1, keepdim=True))
            delta = share * random.sign(size) * eps
        return self.project(self.x + delta.view_as(self.x))


def check_images(x: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
    """Refuse what is not a batch of float images (N, C, H, W) within ``bounds``.

    Raises:
        DataError: with what was expected, what came, and what to do.

    >>> check_images(torch.rand(2, 1, 8, 8))
    >>> check_images(torch.rand(2, 8, 8))
    Traceback (most recent call last):
    robustann.errors.DataError: expected ...
    """
    low, high = bounds
    expected = f"expected float images (N, C, H, W) in [{low:g}, {high:g}]"
    if x.dim() != 4 or not x.is_floating_point():
        raise DataError(
            f"{expected}, got shape {tuple(x.shape)} and type {x.dtype}; "
            "stack single images with x[None] and convert bytes with x / 255"
        )
    if x.numel() == 0:
        raise DataError(f"{expected}, got none: shape {tuple(x.shape)}; name at least one image")
    smallest, largest = (float(value) for value in x.detach().aminmax())
    if math.isnan(smallest) or math.isnan(largest):
        count = int((~x.isfinite()).flatten(1).any(1).sum())
        raise DataError(f"{expected}, got NaN in {count} of {len(x)} images; mend or drop them")
    # Images hold the bounds as rounded to their own type.
    lowest, highest = torch.tensor(bounds, dtype=x.dtype).tolist()
    if smallest < lowest or largest > highest:
        raise DataError(
            f"{expected}, got values from {smallest:.4g} to {largest:.4g}; scale the images and "
            "put the normalisation (mean, std) into the model's first layer"
        )


def wide(value: Tensor) -> Tensor:
    """In float64, except where the device has none (mps).

    >>> wide(torch.zeros(2)).dtype
    torch.float64
    """
    return value.float() if value.device.type == "mps" else value.double()


def _positive(value: Tensor) -> Tensor:
    """Zero replaced by the smallest normal number: a zero vector divided by it stays zero."""
    return value.clamp(min=torch.finfo(value.dtype).tiny)


def _interval(x: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest float32 images within ``eps`` of ``x`` in linf."""
    lower, upper = x - eps, x + eps
    # The sum is rounded: one float inwards where it came out too far.
    lower = torch.where(wide(x) - wide(lower) > eps, lower.nextafter(x), lower)
    upper = torch.where(wide(upper) - wide(x) > eps, upper.nextafter(x), upper)
    return lower, upper


def _project_l2(delta: Tensor, low: Tensor, high: Tensor, eps: Tensor) -> Tensor:
    """argmin ||z - delta|| over low <= z <= high, ||z|| <= eps, for low <= 0 <= high.

    By the optimality conditions z = clip(s * delta) for one factor s in [0, 1] a sample. From
    s = eps / ||delta||, each round fixes the entries that are clipped and solves for s over the
    others; s only grows, and ends when no further entry is clipped.
    """
    clipped = torch.clamp(delta, low, high)
    scale = (eps / _positive(delta.norm(dim=1, keepdim=True))).clamp(max=1.0)
    # What fits after clipping alone is already the answer.
    inside = clipped.norm(dim=1, keepdim=True) <= eps
    scale = torch.where(inside, torch.ones_like(scale), scale)
    waits = asking_waits(delta.device)
    for _ in range(min(delta.shape[1], _ROUNDS) if waits else delta.shape[1]):
        scaled = delta * scale
        z = torch.clamp(scaled, low, high)
        fixed = z != scaled
        used = (z * fixed).square().sum(1, keepdim=True)
        free = (delta * ~fixed).square().sum(1, keepdim=True)
        longer = ((eps * eps - used).clamp(min=0.0) / _positive(free)).sqrt()
        longer = torch.where(inside, scale, torch.minimum(longer, torch.ones_like(longer)))
        # A sample that has converged keeps its factor: it must not depend on its batch.
        grows = longer > scale * (1 + 1e-6)
        if not waits and not bool(grows.any()):
            return z
        scale = torch.where(grows, longer, scale)
    return torch.clamp(delta * scale, low, high)


def _project_l1(delta: Tensor, low: Tensor, high: Tensor, eps: Tensor) -> Tensor:
    """argmin ||z - delta|| over low <= z <= high, sum |z| <= eps, for low <= 0 <= high.

    z = clip(soft(delta, t)) for one threshold t >= 0 a sample (Croce and Hein, ICML 2021, show
    why the box belongs inside). |z| summed falls with t, piecewise linearly: bisection in
    float64, then the small remainder is scaled away.
    """
    magnitude, reach = wide(delta.abs()), wide(torch.where(delta > 0, high, -low))

    def length(threshold: Tensor) -> Tensor:
        return torch.minimum((magnitude - threshold).clamp_(min=0.0), reach)

    lower = torch.zeros_like(magnitude[:, :1])
    upper = magnitude.amax(1, keepdim=True)
    if not asking_waits(delta.device) and bool((length(lower).sum(1, keepdim=True) <= eps).all()):
        return torch.clamp(delta, low, high)
    for _ in range(50):
        middle = (lower + upper) / 2
        long = length(middle).sum(1, keepdim=True) > eps
        lower, upper = torch.where(long, middle, lower), torch.where(long, upper, middle)
    fits = length(torch.zeros_like(upper)).sum(1, keepdim=True) <= eps
    z = length(torch.where(fits, torch.zeros_like(upper), upper))
    return (z * delta.sign()).to(delta.dtype)


def _project_l0(delta: Tensor, low: Tensor, high: Tensor, eps: Tensor) -> Tensor:
    """The ``eps`` entries whose (clipped) change brings the image nearest to the wanted one."""
    clipped = torch.clamp(delta, low, high)
    # delta^2 - (delta - clipped)^2, without the cancellation.
    gain = clipped * (2 * delta - clipped)
    order = gain.argsort(dim=1, descending=True, stable=True)
    kept = torch.arange(1, delta.shape[1] + 1, device=delta.device) <= eps
    return clipped * torch.zeros_like(delta).scatter_(1, order, kept.to(delta.dtype))
