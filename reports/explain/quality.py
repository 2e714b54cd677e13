"""Whether the maps of a method are to be read at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from robustann.reports.explain.drift import compare, flat
from robustann.reports.explain.methods import Method
from robustann.results import MapQuality

# Images that a method is tried on, and repetitions: a look, not a study.
IMAGES, PERTURBATIONS, NEIGHBOURS, NEIGHBOUR_IMAGES = 16, 10, 4, 8
# Standard deviation of the noise of infidelity, and the radius of max-sensitivity, as shares of the
# range of a pixel.
_NOISE, _RADIUS = 0.05, 0.02


def quality(
    model: nn.Module, method: Method, x: Tensor, labels: Tensor, span: float, chunk: int
) -> MapQuality:
    """Try a method on clean images (n, C, H, W) on the model's device, with their true classes.

    The model is frozen and its random state forked by the caller; its weights are exchanged and
    put back.

    >>> from robustann.attacks.engine import frozen
    >>> from robustann.reports.explain.methods import methods
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    >>> with frozen(model, 0):
    ...     saliency = methods(model, torch.zeros(1, 1, 8, 8), 0.0, 8)[0][0]
    ...     found = quality(model, saliency, torch.rand(4, 1, 8, 8), torch.zeros(4).long(), 1.0, 8)
    >>> found.reinitialised < 0.5, found.max_sensitivity
    (True, 0.0)
    """
    trained = _maps(method, x, labels, chunk)
    with reinitialised(model):
        random = _maps(method, x, labels, chunk)
    pairs = zip(flat(trained).cpu(), flat(random).cpu(), strict=True)
    alike = [one.spearman for one in (compare(a, b) for a, b in pairs) if one is not None]
    few = slice(0, NEIGHBOUR_IMAGES)
    return MapQuality(
        method=method.name,
        n=len(x),
        reinitialised=_median(alike),
        infidelity=_infidelity(model, x, labels, trained, span) if method.of_pixels else None,
        max_sensitivity=_sensitivity(method, x[few], labels[few], trained[few], span),
    )


def _maps(method: Method, x: Tensor, labels: Tensor, chunk: int) -> Tensor:
    parts = [
        method.attribute(x[start : start + chunk].clone(), labels[start : start + chunk]).detach()
        for start in range(0, len(x), chunk)
    ]
    return torch.cat(parts)


@contextmanager
def reinitialised(model: nn.Module) -> Iterator[None]:
    """The model with weights drawn anew: for each tensor, normal with its own mean and spread.

    >>> layer = nn.Linear(9, 9)
    >>> before = layer.weight.clone()
    >>> with reinitialised(layer):
    ...     (layer.weight == before).any().item()
    False
    >>> torch.equal(layer.weight, before)
    True
    """
    kept = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    try:
        with torch.no_grad():
            for parameter, values in kept:
                if values.is_floating_point() and values.numel() > 1:
                    # Drawn on the CPU: the same on every device.
                    fresh = torch.randn(values.shape).to(values)
                    parameter.copy_(values.mean() + values.std() * fresh)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in kept:
                parameter.copy_(values)


def _infidelity(
    model: nn.Module, x: Tensor, labels: Tensor, maps: Tensor, span: float
) -> float | None:
    from captum.metrics import infidelity

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(inputs) * _NOISE * span
        return noise, inputs - noise

    found = infidelity(
        lambda images: model(images.clone()),
        perturb,
        x,
        maps,
        target=labels,
        n_perturb_samples=PERTURBATIONS,
        max_examples_per_batch=max(len(x), 1),
        normalize=True,
    )
    return _median(found.detach().cpu().tolist())


def _sensitivity(
    method: Method, x: Tensor, labels: Tensor, maps: Tensor, span: float
) -> float | None:
    from captum.metrics import sensitivity_max

    # Of an empty map nothing can move: it is not the steadiest of all.
    told = maps.flatten(1).abs().sum(1) > 0
    if not bool(told.any()):
        return None
    x, labels = x[told], labels[told]

    def explained(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor]:
        images = inputs if isinstance(inputs, Tensor) else inputs[0]
        # Captum repeats the images one by one: so do the classes.
        target = labels.repeat_interleave(len(images) // len(labels))
        return (method.attribute(images.detach().clone(), target),)

    found = sensitivity_max(
        explained,
        x,
        perturb_radius=_RADIUS * span,
        n_perturb_samples=NEIGHBOURS,
        max_examples_per_batch=max(len(x), 1),
    )
    return _median(found.detach().cpu().tolist())


def _median(values: list[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.median(finite)) if finite else None
