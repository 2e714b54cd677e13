"""The attribution methods: what each looks like as a function of images and classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robustann.errors import unknown_name

# Steps of integrated gradients: doubled, up to the most, for maps that are not complete.
IG_STEPS, IG_MOST = 32, 128
# Completeness: how far the sum may be from the difference of the logits, relative to the sum of
# |attribution|.
IG_TOLERANCE = 0.02
# A difference of logits above which an empty map is not complete.
_RISE = 1e-4

# What is computed on demand, beside what is computed always.
More = Literal["input-x-gradient", "smoothgrad", "gradient-shap", "occlusion"]

# Draws of SmoothGrad and GradientShap, and their noise as a share of the range of a pixel.
_DRAWS, _SPREAD = 16, 0.1
# Occlusion: windows along a side, each moved by half its width.
_WINDOWS = 8

Attribute = Callable[[Tensor, Tensor], Tensor]
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Method:
    """An attribution method on one model.

    Attributes:
        name: as it is called in results.
        attribute: images (n, C, H, W) and classes (n,) to signed attributions: of the images'
            shape, or (n, 1, H, W).
        of_pixels: whether the attributions are of the shape of the images.
        completeness: what was found about it, where the method has it.
    """

    name: str
    attribute: Attribute
    of_pixels: bool = True
    completeness: Completeness | None = None


@dataclass
class Completeness:
    """Whether attributions sum to the difference of the logits: worst error (None where all maps
    are empty), most steps, and how many maps stayed above the tolerance. An empty map beside a
    difference is one of them: the model hides its gradient."""

    error: float | None = None
    steps: int = IG_STEPS
    incomplete: int = 0


def check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The names of methods on demand, if they are known.

    Raises:
        UsageError: one is not.

    >>> check_methods(["occlusion"])
    ('occlusion',)
    """
    for name in names:
        if name not in get_args(More):
            raise unknown_name("attribution method", name, get_args(More))
    return tuple(names)


def methods(
    model: nn.Module,
    example: Tensor,
    black: float,
    chunk: int,
    more: Sequence[str] = (),
    span: float = 1.0,
) -> tuple[list[Method], list[str]]:
    """Saliency, integrated gradients, LayerGradCam where there is a spatial layer, and those of
    ``more``; and why there is one less, if so. ``example`` is an image of shape (1, C, H, W) on the
    model's device, ``span`` the range of a pixel.

    >>> found, without = methods(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)),
    ...     torch.zeros(1, 1, 2, 2), 0.0, 8)
    >>> [one.name for one in found], without
    (['Saliency', 'Integrated gradients'], ['LayerGradCam: this model has no spatial layer...'])
    """
    from captum.attr import Saliency

    def logits(x: Tensor) -> Tensor:
        # A copy, because a model may start with an in-place layer, which a leaf does not allow.
        output: Tensor = model(x.clone())
        if not output.requires_grad:
            # A model that cuts the graph gets a zero map, which is reported as such, not an error.
            output = output + 0 * x.flatten(1).sum(1, keepdim=True)
        return output

    saliency = Saliency(logits)

    def by_saliency(x: Tensor, target: Tensor) -> Tensor:
        # Captum warns when it has to switch the input's gradient on by itself.
        found: Tensor = saliency.attribute(x.requires_grad_(), target=target, abs=False)
        return found

    completeness = Completeness()
    found = [
        Method("Saliency", by_saliency),
        Method(
            "Integrated gradients",
            _integrated(logits, black, chunk, completeness),
            completeness=completeness,
        ),
    ]
    layered, left_out = _gradcam(model, logits, example)
    wanted = _on_demand(logits, black, span)
    return [*found, *layered, *(wanted[name] for name in dict.fromkeys(more))], left_out


def _on_demand(logits: Forward, black: float, span: float) -> dict[str, Method]:
    from captum.attr import GradientShap, InputXGradient, NoiseTunnel, Occlusion, Saliency

    by_input, shap = InputXGradient(logits), GradientShap(logits)
    smooth, occlusion = NoiseTunnel(Saliency(logits)), Occlusion(logits)

    def input_x_gradient(x: Tensor, target: Tensor) -> Tensor:
        found: Tensor = by_input.attribute(x.requires_grad_(), target=target)
        return found

    def smoothgrad(x: Tensor, target: Tensor) -> Tensor:
        found: Tensor = smooth.attribute(
            x.requires_grad_(),
            nt_type="smoothgrad",
            nt_samples=_DRAWS,
            stdevs=_SPREAD * span,
            target=target,
            abs=False,
        )
        return found

    def gradient_shap(x: Tensor, target: Tensor) -> Tensor:
        found: Tensor = shap.attribute(
            x.requires_grad_(),
            baselines=torch.full_like(x[:1], black).detach(),
            n_samples=_DRAWS,
            stdevs=_SPREAD * span,
            target=target,
        )
        return found

    def occluded(x: Tensor, target: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        window = (channels, max(1, height // _WINDOWS), max(1, width // _WINDOWS))
        with torch.no_grad():
            found: Tensor = occlusion.attribute(
                x,
                sliding_window_shapes=window,
                strides=(channels, (window[1] + 1) // 2, (window[2] + 1) // 2),
                baselines=black,
                target=target,
            )
        return found

    return {
        "input-x-gradient": Method("Input x gradient", input_x_gradient),
        "smoothgrad": Method("SmoothGrad", smoothgrad),
        "gradient-shap": Method("GradientShap", gradient_shap),
        "occlusion": Method("Occlusion", occluded),
    }


def _gradcam(model: nn.Module, logits: Forward, example: Tensor) -> tuple[list[Method], list[str]]:
    from captum.attr import LayerAttribution, LayerGradCam

    layer = spatial_layer(model, example)
    if layer is None:
        return [], ["LayerGradCam: this model has no spatial layer that sees each image once"]
    gradcam = LayerGradCam(logits, layer)

    def by_gradcam(x: Tensor, target: Tensor) -> Tensor:
        at_layer = gradcam.attribute(x.requires_grad_(), target=target, relu_attributions=True)
        wide: Tensor = LayerAttribution.interpolate(at_layer, tuple(x.shape[2:]), "bilinear")
        return wide

    try:
        by_gradcam(example.clone(), torch.zeros(1, dtype=torch.int64, device=example.device))
    except Exception as error:
        # Captum hooks into the model, which not every model allows.
        return [], [f"LayerGradCam: {type(error).__name__}: {error}"[:300]]
    return [Method("LayerGradCam", by_gradcam, of_pixels=False)], []


def _integrated(
    logits: Callable[[Tensor], Tensor], black: float, chunk: int, found: Completeness
) -> Attribute:
    """Integrated gradients from black, with twice the steps for what is not complete."""
    from captum.attr import IntegratedGradients

    integrated = IntegratedGradients(logits)

    def attribute(x: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            rise = _chosen(logits(x), target) - _chosen(logits(torch.full_like(x, black)), target)
        maps = torch.zeros_like(x)
        rows, steps = torch.arange(len(x), device=x.device), IG_STEPS
        while True:
            maps[rows] = integrated.attribute(
                x[rows],
                baselines=black,
                target=target[rows],
                n_steps=steps,
                internal_batch_size=max(2 * chunk, len(rows)),
            ).detach()
            some = maps[rows].flatten(1)
            error = (some.sum(1) - rise[rows]).abs() / some.abs().sum(1).clamp_min(1e-12)
            short = error > IG_TOLERANCE
            # What there is no gradient for, no number of steps completes.
            short &= some.abs().sum(1) > 1e-12
            if not bool(short.any()) or 2 * steps > IG_MOST:
                break
            rows, steps = rows[short], 2 * steps
        found.steps = max(found.steps, steps)
        found.incomplete += int(short.sum())
        done = (maps.flatten(1).sum(1) - rise).abs()
        whole = maps.flatten(1).abs().sum(1)
        shown = whole > 1e-12
        found.incomplete += int((~shown & (rise.abs() > _RISE)).sum())
        if bool(shown.any()):
            worst = float((done / whole.clamp_min(1e-12))[shown].max())
            found.error = worst if found.error is None else max(found.error, worst)
        return maps

    return attribute


def _chosen(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None]).squeeze(1)


def spatial_layer(model: nn.Module, example: Tensor) -> nn.Module | None:
    """The last module after a convolution that runs once and yields maps of more than one pixel.

    Reused modules (a ReLU that a block calls twice) are left out: Captum could not tell their
    calls apart. So are those that see several copies of an image at once, as under the noise of a
    vote: which map is whose only the model knows.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten())
    >>> spatial_layer(net, torch.zeros(1, 1, 4, 4))
    ReLU()
    """
    calls: dict[nn.Module, int] = {}
    last: list[nn.Module] = []
    convolved = [False]

    def look(module: nn.Module, _: object, output: object) -> None:
        calls[module] = calls.get(module, 0) + 1
        kind = type(module).__name__.lower()
        convolved[0] = convolved[0] or "conv" in kind
        if (
            convolved[0]
            and isinstance(output, Tensor)
            and output.dim() == 4
            and min(output.shape[2:]) > 1
            and len(output) == len(example)
            and not isinstance(module, nn.Unfold)
        ):
            last.append(module)

    try:
        hooks = [module.register_forward_hook(look) for module in model.modules()]
    except RuntimeError:
        # A scripted module takes no such hooks.
        return None
    try:
        with torch.no_grad():
            model(example.clone())
    finally:
        for hook in hooks:
            hook.remove()
    once = [module for module in last if calls[module] == 1 and module is not model]
    return once[-1] if once else None
