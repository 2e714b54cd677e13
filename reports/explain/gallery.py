"""Which samples a report shows, and their pictures."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from torch import Tensor, nn

from robustann.attacks.engine import predict_logits
from robustann.auditing import Cases
from robustann.reports.explain.pictures import image_picture
from robustann.results import Attribution, GallerySample, PathPoint
from robustann.threat import ThreatModel

LIMIT = 12
RULE = (
    "From {n} audited samples drawn at random. Of those that broke, by the distance to the nearest "
    "error that was found: the easiest, the median and the hardest to break, then the first of "
    "each class in class order; {limit} at most and none twice. If none broke: the first correctly "
    "classified sample of each class, or simply the first of each class."
)
# Places on the line from the clean image (0) through the nearest adversarial one (1).
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.5, 2.0)


def choose(cases: Cases, classes: int) -> list[tuple[int, str]]:
    """Positions to show and why, by :data:`RULE`."""
    fallen = cases.success.nonzero().flatten().tolist()
    chosen: dict[int, str] = {}
    if fallen:
        distance = _to_nearest(cases).tolist()
        by_distance = sorted(fallen, key=lambda i: (distance[i], i))
        for i, why in (
            (by_distance[0], "easiest to break"),
            (by_distance[len(by_distance) // 2], "median"),
            (by_distance[-1], "hardest to break"),
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
    return list(chosen.items())[:LIMIT]


def sample(
    model: nn.Module,
    cases: Cases,
    i: int,
    why: str,
    attributions: tuple[Attribution, ...],
    seed: int,
) -> GallerySample:
    """One sample with its pictures."""
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
        nearest=float(_to_nearest(cases)[i]) if bool(cases.success[i]) else None,
        amplification=amplification,
        clean=image_picture(clean),
        attacked=image_picture(attacked),
        difference=image_picture(0.5 + amplification * delta),
        attributions=attributions,
        path=_path(model, cases, i, seed),
    )


def _path(model: nn.Module, cases: Cases, i: int, seed: int) -> tuple[PathPoint, ...]:
    """Along the line through the nearest adversarial image; none where nothing was changed."""
    clean, nearest = cases.clean[i].detach().cpu(), _nearest(cases)[i].detach().cpu()
    if torch.equal(clean, nearest):
        return ()
    low, high = cases.bounds
    threat = ThreatModel(cases.norm, cases.eps, bounds=cases.bounds)
    frames = torch.stack([(clean + share * (nearest - clean)).clamp(low, high) for share in SHARES])
    # Exactly the image that was found, not what rounding makes of it.
    frames[SHARES.index(1.0)] = nearest
    # In between the model may give answers that are no numbers: of no confidence.
    logits = predict_logits(model, frames, seed=seed, finite=False)
    confidence, prediction = logits.softmax(1).nan_to_num(0.0).max(1)
    distance = threat.distance(frames, clean.expand_as(frames))
    return tuple(
        PathPoint(
            distance=float(distance[k]),
            image=image_picture(frames[k]),
            prediction=int(prediction[k]),
            confidence=float(confidence[k]),
        )
        for k in range(len(SHARES))
    )


def _nearest(cases: Cases) -> Tensor:
    return cases.attacked if cases.nearest is None else cases.nearest


def _to_nearest(cases: Cases) -> Tensor:
    """How far the nearest error found lies. An attack that uses up its eps, as most do, says
    nothing of that: by its own distance all samples would be equally hard."""
    if cases.nearest is None:
        return cases.distance
    threat = ThreatModel(cases.norm, cases.eps, bounds=cases.bounds)
    found = threat.distance(cases.nearest, cases.clean).to(cases.distance)
    return torch.minimum(found, cases.distance)


def tensors(cases: Cases, chosen: list[tuple[int, str]]) -> bytes:
    """The exact images as the bytes of an ``.npz`` file, the same for the same images."""
    rows = [i for i, _ in chosen]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        index=cases.index[rows].cpu().numpy(),
        label=cases.label[rows].cpu().numpy(),
        clean=cases.clean[rows].detach().cpu().numpy(),
        attacked=cases.attacked[rows].detach().cpu().numpy(),
        nearest=_nearest(cases)[rows].detach().cpu().numpy(),
    )
    return buffer.getvalue()
