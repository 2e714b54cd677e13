"""A model seen through a part of itself that has gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustann.attacks import FMN
from robustann.attacks.engine import frozen, run
from robustann.attacks.losses import margin
from robustann.auditing.batching import is_out_of_memory
from robustann.auditing.straight import Straightened
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel
from robustann.trust.reviewing import compare

# Of the images, so many must get the same class from the part alone ...
_AGREEMENT = 0.8
# ... and so many a gradient.
_SLOPED = 0.9
# A step of this share of the images' range must lead uphill for so many.
_STEP, _UPHILL = 1 / 16, 0.75
# Of two views that will do, each looks for nearest adversarial images in so many steps; what one
# finds nearer by so much counts for it.
_LOOKED, _NEARER = 20, 0.98
# How unlikely by chance it must be that it is more often nearer than by the model's own gradient.
_UNLIKELY = 0.1


@dataclass(frozen=True)
class Part:
    """A part of a model that takes the same images and answers for the same classes.

    ``name`` says where it is; ``agreement`` is the share of images that it puts into the same class
    as the whole model does. ``whole`` says that it is no part but the model itself, straightened.
    """

    name: str
    module: nn.Module
    agreement: float
    whole: bool = False

    @property
    def words(self) -> str:
        """Through what gradients are taken, and as if what were the identity."""
        if self.whole:
            return (
                "through the model as if its steps without a gradient (rounding, comparisons, "
                "detours) were the identity (BPDA)"
            )
        return (
            f"through '{self.name}', a part of the model that has them and agrees with it on "
            f"{self.agreement:.0%} of the images, as if the rest were the identity (BPDA)"
        )


class SeenThrough(nn.Module):
    """The whole model's prediction, with the logits and the gradient of a part of it.

    What surrounds the part (a quantised input, a one-hot output, a detour without a graph) is
    taken for the identity in the backward pass (BPDA: Athalye et al., ICML 2018). The predicted
    class is always the whole model's: where the part's differs, its logit and the highest one
    change places. Of a randomised model both are averaged over so many ``draws`` (EOT), before the
    class is told.

    >>> class Rounded(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.inner = nn.Flatten()
    ...     def forward(self, x):
    ...         return nn.functional.one_hot(self.inner(x.round()).argmax(1), 2).float()
    >>> model = Rounded()
    >>> x = torch.tensor([[[[0.6, 0.7]]]])
    >>> SeenThrough(model, model.inner)(x), model(x)
    (tensor([[0.7000, 0.6000]]), tensor([[1., 0.]]))
    """

    def __init__(self, model: nn.Module, part: nn.Module, draws: int = 1) -> None:
        super().__init__()
        self.model = model
        self.part = part
        self.draws = draws

    @property
    def price(self) -> int:
        """Forwards that one answer costs; its gradient costs ``draws`` backwards."""
        return 2 * self.draws

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            whole = _mean(self.model, x, self.draws)
            predicted = whole.argmax(1, keepdim=True)
        logits = _mean(self.part, x, self.draws)
        highest = logits.argmax(1, keepdim=True)
        order = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
        order = order.scatter(1, predicted, highest).scatter(1, highest, predicted)
        seen = logits.gather(1, order)
        # Equal logits are told apart by their place: the predicted one has to be ahead of others.
        top = seen.detach().amax(1, keepdim=True)
        ahead = torch.nextafter(top, torch.full_like(top, torch.inf))
        tied = seen.detach().argmax(1, keepdim=True) != predicted
        raised = seen.scatter_add(
            1, predicted, torch.where(tied, ahead - top, torch.zeros_like(top))
        )
        seen = torch.where(tied, raised, seen)
        # What one of them cannot compute is the whole model's to answer for.
        finite = (whole.isfinite() & logits.detach().isfinite()).all(1, keepdim=True)
        return torch.where(finite, seen, whole)


def _mean(model: nn.Module, x: Tensor, draws: int) -> Tensor:
    """The answer, averaged over calls of a randomised model."""
    total: Tensor = model(x)
    for _ in range(draws - 1):
        total = total + model(x)
    return total / draws if draws > 1 else total


class _Asked:
    """What models answer to a few images, each averaged over ``draws``, and what asking costs: in
    forwards and backwards of single images."""

    def __init__(self, x: Tensor, draws: int) -> None:
        self.x, self.draws = x, draws
        self.propagations = 0

    def answer(self, model: nn.Module, images: Tensor) -> Tensor:
        self.propagations += self.draws * len(images)
        return _mean(model, images, self.draws)

    def slope(self, total: Tensor, images: Tensor, *, again: bool = False) -> Tensor:
        """The gradient of a sum over images; ``again`` if another will be asked for."""
        self.propagations += self.draws * len(images)
        (gradient,) = torch.autograd.grad(total, images, retain_graph=again)
        return gradient


def differentiable_part(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    seed: int,
    draws: int = 1,
) -> tuple[Part | None, int]:
    """The part of a model that could best be attacked in its place, None if there is none; and
    the propagations that looking for it took, forwards and backwards of single images.

    It takes images of the same shape (where it stands in the model they may be changed ones),
    answers for the same classes, mostly agrees with the whole model on ``x`` (N, C, H, W), and has
    gradients there. Of several the one that agrees most is taken, the outermost of equals. Parts
    are submodules and the tails of sequences of them. Or it is the model itself, if it has
    gradients once its steps without one are taken for the identity: a part knows nothing of what
    stands before it, such as the levels that an image is rounded to, and the model as a whole may
    have steps that the identity stands in for badly. An attack tells which leads nearer: one of
    minimum norm, in the norm of ``threat``, on ``x``; where neither leads nearer than the model's
    own gradient, there is no part. Of a randomised model, whose answers are averaged over
    ``draws``, the model itself comes first: a part may know nothing of what is drawn.
    """
    parts: list[Part] = []
    asked = _Asked(x, draws)
    with frozen(model, seed):
        called = _called(model, asked)
        with torch.no_grad():
            whole = asked.answer(model, x)
        straight = _straightened(model, asked, labels, whole)
        if straight is None or draws == 1:
            for name, module in _parts(model, called):
                agreement = _agreement(module, asked, labels, whole)
                if agreement is not None:
                    parts.append(Part(name, module, agreement))
    part = max(parts, key=lambda one: one.agreement, default=None)
    views = [one for one in (part, straight) if one is not None]
    if draws > 1 or not views or threat.eps == 0:
        return next(iter(views), None), asked.propagations
    own = _distances(model, None, asked, labels, threat, seed)
    best, nearest = None, own
    for view in views:
        found = _distances(model, view, asked, labels, threat, seed)
        # What takes the place of a gradient must be better than that, and not by chance.
        if sum(_nearer(found, nearest)) > sum(_nearer(nearest, found)) and (
            compare(_nearer(found, own), _nearer(own, found)).p < _UNLIKELY
        ):
            best, nearest = view, found
    return best, asked.propagations


def _nearer(first: Tensor, second: Tensor) -> list[bool]:
    """Where the first is nearer by as much as counts."""
    return (first < _NEARER * second).tolist()


def _straightened(model: nn.Module, asked: _Asked, labels: Tensor, whole: Tensor) -> Part | None:
    straight = Straightened(model)
    agreement = _agreement(straight, asked, labels, whole)
    if agreement is None or not _uphill(straight, asked, labels):
        return None
    return Part("the model", straight, agreement, whole=True)


def _distances(
    model: nn.Module,
    view: Part | None,
    asked: _Asked,
    labels: Tensor,
    threat: ThreatModel,
    seed: int,
) -> Tensor:
    """How near the adversarial images are that are found through a part, or by the model's own
    gradient (N,); infinite where none is."""
    seen = model if view is None else SeenThrough(model, view.module)
    random = SampleRandom.create(seed, torch.arange(len(asked.x))).fork("views")
    price = seen.price if isinstance(seen, SeenThrough) else 1
    try:
        found = run(FMN(steps=_LOOKED), seen, asked.x, labels, threat, random=random)
    except Exception as error:
        # There may be no gradient; but no memory says nothing of it.
        if is_out_of_memory(error):
            raise
        return torch.full((len(asked.x),), torch.inf, dtype=torch.float64)
    asked.propagations += int(price * found.forwards.sum() + found.backwards.sum())
    fell = found.prediction != labels.to(found.prediction.device)
    return torch.where(fell, found.distance, torch.inf)


def _agreement(module: nn.Module, asked: _Asked, labels: Tensor, whole: Tensor) -> float | None:
    """The share of images that a part puts into the same class; None where it is of no use."""
    try:
        images = asked.x.clone().requires_grad_()
        logits = asked.answer(module, images)
        fits = isinstance(logits, Tensor) and logits.shape == whole.shape
        if not fits or not logits.requires_grad or not bool(logits.isfinite().all()):
            return None
        slope = asked.slope(margin(logits, labels).sum(), images, again=logits.shape[1] > 2)
        towards = slope
        if logits.shape[1] > 2:
            # Of the runner-up alone: without it nothing tells an attack where to go.
            rest = logits.scatter(1, logits.argmax(1, keepdim=True), -torch.inf)
            towards = asked.slope(rest.amax(1).sum(), images)
    except Exception as error:
        # A part need not run by itself; but no memory says nothing of the part.
        if is_out_of_memory(error):
            raise
        return None
    agreement = float((logits.argmax(1) == whole.argmax(1)).double().mean())
    steep = [one.flatten(1).abs().amax(1) for one in (slope, towards)]
    sloped = [(one > 0) & one.isfinite() for one in steep]
    share = float((sloped[0] & sloped[1]).double().mean())
    return agreement if agreement >= _AGREEMENT and share >= _SLOPED else None


def _uphill(module: nn.Module, asked: _Asked, labels: Tensor) -> bool:
    """Whether a step along the gradient serves an attack better than one against it, for most
    images. A backward pass that tells nothing is no better for being looked at once more."""
    x, images = asked.x, asked.x.clone().requires_grad_()
    slope = asked.slope(margin(asked.answer(module, images), labels).sum(), images)
    step = _STEP * (x.max() - x.min()) * slope.sign()
    with torch.no_grad():
        along, against = (margin(asked.answer(module, x + way * step), labels) for way in (1, -1))
    return float((along > against).double().mean()) >= _UPHILL


def _called(model: nn.Module, asked: _Asked) -> set[nn.Module]:
    """The submodules that are given images of the shape of the asked ones in a forward pass."""
    x = asked.x
    called: set[nn.Module] = set()

    def note(module: nn.Module, inputs: tuple[Any, ...], *_: Any) -> None:
        first = inputs[0] if inputs else None
        if isinstance(first, Tensor) and first.shape == x.shape:
            called.add(module)

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            asked.propagations += len(x)
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _parts(model: nn.Module, called: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if module not in called:
            continue
        if module is not model:
            yield name, module
        if isinstance(module, nn.Sequential):
            children = list(module.children())
            for start in range(1, len(children)):
                if children[start] in called:
                    yield f"{name or 'the model'}[{start}:]", nn.Sequential(*children[start:])
