"""What a model looks at, before and under attack: attribution maps and how far they move.

The only file of the reports that runs a model. An audit calls :func:`explain` and stores the
:class:`~robustann.results.Explanation` that it returns; a report then only shows it.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from robustann.attacks.engine import frozen, model_device
from robustann.auditing import Cases
from robustann.results import Attribution, Drift, DriftStatistics, Explanation, GallerySample
from robustann.rng import SampleRandom

GALLERY_LIMIT = 12
DRIFT_LIMIT = 64
TOP_SHARE = 0.05
IG_STEPS = 32

RULE = (
    "From {n} audited samples drawn at random. Of those that broke: the one that did so at the "
    "smallest distance, the one at the median distance and the one at the largest, then the first "
    "of each class in class order; {limit} at most and none twice. If none broke: the first "
    "correctly classified sample of each class, or simply the first of each class."
)

Attribute = Callable[[Tensor, Tensor], Tensor]


def explain(
    model: nn.Module,
    cases: Cases,
    class_names: Sequence[str],
    seed: int,
    *,
    chunk: int = 8,
) -> Explanation:
    """Attribution maps of a gallery of samples, and how far an attack moves them.

    Two methods, both for the true class: saliency (absolute gradient; Simonyan et al. 2014,
    arXiv:1312.6034) and integrated gradients (from black; Sundararajan et al. 2017,
    arXiv:1703.01365). The maps of at most 64 broken samples are compared, clean with attacked, by
    Spearman's rank correlation of |attribution| (summed over channels) and by the share of the 5 %
    largest pixels in common; beside them the same comparison for random-sign noise of the sample's
    own L2 distance (the need for such a yardstick: Ghorbani et al. 2019, arXiv:1710.10547).
    A sample with a constant map (no gradient) is left out of both medians.

    Args:
        model: maps images in [0, 1] to logits; run in eval mode and left as it was.
        cases: audited samples with the worst image found for each, ``distance`` finite for all.
        class_names: one a class; the gallery goes through them in order.
        seed: of the noise, and of a model that draws random numbers.
        chunk: images a batch. Fixed, so that the result does not hang on what fits in memory.

    >>> from robustann.auditing import Cases
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> clean = torch.rand(2, 1, 2, 2) / 2
    >>> one = torch.tensor([0, 1])
    >>> cases = Cases(index=one, label=one, clean=clean, attacked=clean + 0.25,
    ...     clean_prediction=one, attacked_prediction=1 - one, clean_confidence=torch.ones(2),
    ...     attacked_confidence=torch.ones(2), success=torch.tensor([True, True]),
    ...     distance=torch.full((2,), 0.25), attack=["FGSM", "FGSM"], eps=0.25, bounds=(0.0, 1.0))
    >>> found = explain(model, cases, class_names=["a", "b"], seed=0)
    >>> found.drift[0].method, found.drift[0].attacked.spearman
    ('Saliency', 1.0)
    """
    chosen = _choose(cases, len(class_names))
    fallen = cases.success.nonzero().flatten().tolist()[:DRIFT_LIMIT]
    used = sorted({*fallen, *(position for position, _ in chosen)})
    row = {position: i for i, position in enumerate(used)}
    clean, attacked = cases.clean[used].detach().cpu(), cases.attacked[used].detach().cpu()
    labels = cases.label[used].cpu()
    kept = [row[position] for position in fallen]
    noisy = _noise_like(clean[kept], attacked[kept], cases.index[fallen].cpu(), cases.bounds, seed)

    attributions: list[list[Attribution]] = [[] for _ in chosen]
    drift = []
    device = model_device(model)
    with frozen(model, seed):
        for method, attribute in _methods(model, cases.bounds[0], chunk).items():
            before = _maps(attribute, clean, labels, chunk, device)
            after = _maps(attribute, attacked, labels, chunk, device)
            control = _maps(attribute, noisy, labels[kept], chunk, device)
            drift.append(_drift(method, before[kept], after[kept], control))
            for place, (position, _) in zip(attributions, chosen, strict=True):
                i = row[position]
                moved = _compare(before[i], after[i])
                place.append(
                    Attribution(
                        method=method,
                        target=int(labels[i]),
                        clean_png=_heat_png(before[i]),
                        attacked_png=_heat_png(after[i]),
                        spearman=moved[0] if moved else None,
                        top5=moved[1] if moved else None,
                    )
                )
    gallery = tuple(
        _gallery_sample(cases, position, why, tuple(maps))
        for (position, why), maps in zip(chosen, attributions, strict=True)
    )
    rule = RULE.format(n=len(cases.label), limit=GALLERY_LIMIT)
    return Explanation(rule=rule, gallery=gallery, drift=tuple(drift))


def _choose(cases: Cases, classes: int) -> list[tuple[int, str]]:
    """Positions to show and why, by :data:`RULE`."""
    fallen = cases.success.nonzero().flatten().tolist()
    chosen: dict[int, str] = {}
    if fallen:
        distance = cases.distance.tolist()
        by_distance = sorted(fallen, key=lambda i: (distance[i], i))
        for i, why in (
            (by_distance[0], "smallest distance"),
            (by_distance[len(by_distance) // 2], "median distance"),
            (by_distance[-1], "largest distance"),
        ):
            chosen.setdefault(i, why)
        pool, why = fallen, "first broken of its class"
    else:
        right = cases.label == cases.clean_prediction
        pool = right.nonzero().flatten().tolist()
        why = "not broken"
        if not pool:
            pool, why = list(range(len(cases.label))), "wrong before any attack"
    labels = cases.label.tolist()
    for wanted in range(classes):
        first = next((i for i in pool if labels[i] == wanted), None)
        if first is not None:
            chosen.setdefault(first, why)
    return list(chosen.items())[:GALLERY_LIMIT]


def _methods(model: nn.Module, black: float, chunk: int) -> dict[str, Attribute]:
    from captum.attr import IntegratedGradients, Saliency

    def logits(x: Tensor) -> Tensor:
        # A copy, because a model may start with an in-place layer, which a leaf does not allow.
        output: Tensor = model(x.clone())
        if not output.requires_grad:
            # A model that cuts the graph gets a zero map, which is reported as such, not an error.
            output = output + 0 * x.flatten(1).sum(1, keepdim=True)
        return output

    saliency, integrated = Saliency(logits), IntegratedGradients(logits)

    def by_saliency(x: Tensor, target: Tensor) -> Tensor:
        # Captum warns when it has to switch the input's gradient on by itself.
        found: Tensor = saliency.attribute(x.requires_grad_(), target=target, abs=True)
        return found

    def by_integration(x: Tensor, target: Tensor) -> Tensor:
        found: Tensor = integrated.attribute(
            x, baselines=black, target=target, n_steps=IG_STEPS, internal_batch_size=2 * chunk
        )
        return found

    return {"Saliency": by_saliency, "Integrated gradients": by_integration}


def _maps(
    attribute: Attribute, images: Tensor, labels: Tensor, chunk: int, device: torch.device
) -> Tensor:
    """|attribution| summed over channels, float32 of shape (n, H, W), on the CPU."""
    maps = [images.new_zeros(0, *images.shape[2:])]
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        x, y = (tensor[part].clone().to(device) for tensor in (images, labels))
        maps.append(attribute(x, y).detach().abs().sum(1).cpu())
    return torch.cat(maps)


def _noise_like(
    clean: Tensor, attacked: Tensor, index: Tensor, bounds: tuple[float, float], seed: int
) -> Tensor:
    """Clean images plus random-sign noise whose L2 norm, after clipping, is the attack's."""
    if not len(clean):
        return clean
    signs = SampleRandom.create(seed, index).fork("explain-noise").sign(*clean.shape[1:])
    wanted = (attacked - clean).flatten(1).norm(dim=1)
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, bounds[1] - bounds[0])
    noisy = clean
    # Clipping eats part of the noise, more of it on black or white images: bisect the amplitude,
    # or the control would be weaker than the attack that it is compared with.
    for _ in range(24):
        middle = (low + high) / 2
        noisy = (clean + middle.view(-1, 1, 1, 1) * signs).clamp(*bounds)
        short = (noisy - clean).flatten(1).norm(dim=1) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return noisy


def _compare(before: Tensor, after: Tensor) -> tuple[float, float] | None:
    """Spearman's correlation and the shared part of the largest 5 %; None if a map is constant."""
    from scipy.stats import spearmanr

    if any(not bool(x.isfinite().all()) or x.min() == x.max() for x in (before, after)):
        return None
    first, second = before.flatten().double(), after.flatten().double()
    top_first, top_second = _top(first), _top(second)
    shared = len(top_first & top_second) / max(len(top_first), len(top_second))
    return float(spearmanr(first.numpy(), second.numpy()).statistic), shared


def _top(values: Tensor) -> set[int]:
    """Where the largest 5 % lie; zeros never count, or sparse maps would agree on nothing."""
    count = max(1, math.ceil(TOP_SHARE * len(values)))
    order = values.argsort(descending=True, stable=True)[:count]
    return set(order[values[order] > 0].tolist())


def _drift(method: str, before: Tensor, after: Tensor, control: Tensor) -> Drift:
    pairs = [
        (attacked, noise)
        for attacked, noise in zip(
            map(_compare, before, after), map(_compare, before, control), strict=True
        )
        # The two medians are over the same samples, or their difference would say nothing.
        if attacked is not None and noise is not None
    ]
    return Drift(
        method=method,
        attacked=_median([attacked for attacked, _ in pairs]),
        noise=_median([noise for _, noise in pairs]),
    )


def _median(values: Sequence[tuple[float, float]]) -> DriftStatistics:
    if not values:
        return DriftStatistics(n=0, spearman=None, top5=None)
    spearman, top5 = torch.tensor(values, dtype=torch.float64).quantile(0.5, dim=0).tolist()
    return DriftStatistics(n=len(values), spearman=spearman, top5=top5)


def _gallery_sample(
    cases: Cases, i: int, why: str, attributions: tuple[Attribution, ...]
) -> GallerySample:
    clean, attacked = cases.clean[i].detach().cpu(), cases.attacked[i].detach().cpu()
    delta = attacked - clean
    largest = float(delta.abs().max())
    amplification = 2.0 ** math.floor(math.log2(0.5 / largest)) if largest > 0 else 1.0
    return GallerySample(
        index=int(cases.index[i]),
        label=int(cases.label[i]),
        why=why,
        attack=cases.attack[i],
        clean_prediction=int(cases.clean_prediction[i]),
        clean_confidence=float(cases.clean_confidence[i]),
        attacked_prediction=int(cases.attacked_prediction[i]),
        attacked_confidence=float(cases.attacked_confidence[i]),
        distance=float(cases.distance[i]),
        amplification=amplification,
        clean_png=_image_png(clean),
        attacked_png=_image_png(attacked),
        difference_png=_image_png(0.5 + amplification * delta),
        attributions=attributions,
    )


def _image_png(image: Tensor) -> str:
    """A (C, H, W) image in [0, 1] as PNG in base64: grey for one channel, colour for three."""
    if image.shape[0] not in (1, 3):
        image = image.mean(0, keepdim=True)
    levels = image.mul(255).round().clamp(0, 255).to(torch.uint8)
    return _png(levels[0] if len(levels) == 1 else levels.permute(1, 2, 0).contiguous())


# Dark to light with steadily rising lightness, so it reads the same in grey and to a colour-blind
# eye: night blue, violet, brick, amber, cream.
_HEAT = ((8, 9, 32), (62, 34, 112), (154, 52, 96), (226, 112, 58), (250, 190, 92), (255, 250, 226))


def _heat_palette() -> list[int]:
    anchors = torch.tensor(_HEAT, dtype=torch.float64).T[None]
    colours = nn.functional.interpolate(anchors, size=256, mode="linear", align_corners=True)
    palette: list[int] = colours[0].T.round().to(torch.int64).flatten().tolist()
    return palette


def _heat_png(values: Tensor) -> str:
    """An (H, W) map as PNG in base64; full brightness is its 99th percentile."""
    values = values.nan_to_num(0.0, 0.0, 0.0)
    rank = max(1, math.ceil(0.99 * values.numel()))
    scale = float(values.flatten().kthvalue(rank).values) or float(values.max()) or 1.0
    levels = (values / scale * 255).round().clamp(0, 255).to(torch.uint8)
    return _png(levels, _heat_palette())


def _png(levels: Tensor, palette: list[int] | None = None) -> str:
    from PIL import Image

    picture = Image.fromarray(levels.numpy())
    if palette is not None:
        picture.putpalette(palette)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
