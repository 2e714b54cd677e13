"""What a model looks at, before and under attack: attribution maps and how far they move.

The only part of the reports that runs a model. An audit calls :func:`explain` and stores the
:class:`~robustann.results.Explanation` that it returns; a report then only shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from robustann.attacks.engine import frozen, model_device, predict_logits
from robustann.auditing import Cases
from robustann.reports.explain import gallery
from robustann.reports.explain.drift import compare, drift, flat
from robustann.reports.explain.methods import Method, check_methods, methods
from robustann.reports.explain.pictures import heat_picture
from robustann.reports.explain.quality import IMAGES, quality
from robustann.results import Attribution, Drift, Explanation, MapQuality
from robustann.rng import SampleRandom

__all__ = ["explain"]

# Samples whose maps are compared: flipped ones, and ones that the attack did not flip.
FLIPPED_LIMIT, STANDING_LIMIT = 64, 32

Group = Literal["flipped", "not flipped"]


def explain(
    model: nn.Module,
    cases: Cases,
    class_names: Sequence[str],
    seed: int,
    *,
    chunk: int = 8,
    more: Sequence[str] = (),
) -> Explanation:
    """Attribution maps of a gallery of samples, and how far an attack moves them.

    Three methods: saliency (Simonyan et al. 2014, arXiv:1312.6034), integrated gradients from black
    (Sundararajan et al. 2017, arXiv:1703.01365) with twice the steps where they are not complete,
    and LayerGradCam (Selvaraju et al. 2017, arXiv:1610.02391) at the last spatial layer, if there
    is one. Maps of |attribution|, summed over channels, are compared, clean with attacked, by
    Spearman's rank correlation, the share of the 5 % largest pixels in common, and SSIM: for up to
    64 samples that the attack flipped and 32 that it did not, for the true class, and of the
    flipped also for what the model says of each image. Two controls stand beside them: random-sign
    noise of the sample's own L2 distance (the need for such a yardstick: Ghorbani et al. 2019,
    arXiv:1710.10547), and another clean image of the same class. A sample with a constant map (no
    gradient) is left out.

    Each method is also tried itself on at most 16 clean images: whether re-initialised weights
    change its maps (Adebayo et al. 2018, arXiv:1810.03292), infidelity and max-sensitivity (Yeh et
    al. 2019, arXiv:1901.09392), and completeness.

    Args:
        model: maps images in [0, 1] to logits; run in eval mode and left as it was.
        cases: audited samples with the worst image found for each, ``distance`` finite for all.
        class_names: one a class; the gallery goes through them in order.
        seed: of the noise, of resampling, and of a model that draws random numbers.
        chunk: images a batch. Fixed, so that the result does not hang on what fits in memory.
        more: further methods: ``input-x-gradient``, ``smoothgrad`` (Smilkov et al. 2017,
            arXiv:1706.03825), ``gradient-shap`` (Lundberg and Lee 2017, arXiv:1705.07874),
            ``occlusion`` (Zeiler and Fergus 2014, arXiv:1311.2901).

    Raises:
        UsageError: a method of ``more`` is not known.

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
    more = check_methods(more)
    chosen = gallery.choose(cases, len(class_names))
    right = cases.label == cases.clean_prediction
    fallen = cases.success.nonzero().flatten().tolist()[:FLIPPED_LIMIT]
    moved = (cases.clean != cases.attacked).flatten(1).any(1)
    standing = (right & ~cases.success & moved).nonzero().flatten().tolist()[:STANDING_LIMIT]
    used = sorted({*fallen, *standing, *(position for position, _ in chosen)})
    work = _Work(model, cases, used, chunk, seed)
    groups: dict[Group, list[int]] = {
        "flipped": [used.index(position) for position in fallen],
        "not flipped": [used.index(position) for position in standing],
    }
    maps: list[list[Attribution]] = [[] for _ in chosen]
    drifts: list[Drift] = []
    tried: list[MapQuality] = []
    with frozen(model, seed):
        low, high = cases.bounds
        example = work.clean[:1].clone().to(work.device)
        found, left_out = methods(model, example, low, chunk, more, high - low)
        for method in found:
            looked = _Looked(work, method, groups)
            drifts += looked.drifts()
            for place, (position, _) in zip(maps, chosen, strict=True):
                place.append(looked.attribution(used.index(position)))
            tried.append(_tried(work, method, right[used].cpu()))
    samples = tuple(
        gallery.sample(model, cases, position, why, tuple(some), seed)
        for (position, why), some in zip(chosen, maps, strict=True)
    )
    rule = gallery.RULE.format(n=len(cases.label), limit=gallery.LIMIT)
    return Explanation(
        rule=rule,
        gallery=samples,
        drift=tuple(drifts),
        quality=tuple(tried),
        left_out=tuple(left_out),
        tensors=gallery.tensors(cases, chosen),
    )


class _Work:
    """The images that are explained, on the CPU, with the noise that each is compared with."""

    def __init__(
        self, model: nn.Module, cases: Cases, used: list[int], chunk: int, seed: int
    ) -> None:
        self.model, self.chunk, self.seed = model, chunk, seed
        self.device = model_device(model)
        self.clean = cases.clean[used].detach().cpu()
        self.attacked = cases.attacked[used].detach().cpu()
        self.labels = cases.label[used].cpu()
        self.said = cases.attacked_prediction[used].cpu()
        self.bounds = cases.bounds
        self.noisy = noise_like(
            self.clean, self.attacked, cases.index[used].cpu(), cases.bounds, seed
        )
        answers = predict_logits(model, self.noisy, batch_size=chunk, seed=seed, finite=False)
        # No number says nothing against the label.
        self.said_of_noise = torch.where(answers.isfinite().all(1), answers.argmax(1), self.labels)
        self.others = _others(self.labels, (cases.label == cases.clean_prediction)[used].cpu())

    def maps(self, method: Method, images: Tensor, classes: Tensor) -> Tensor:
        """|attribution| summed over channels, float32 of shape (n, H, W), on the CPU."""
        found = [images.new_zeros(0, *images.shape[2:])]
        for start in range(0, len(images), self.chunk):
            part = slice(start, start + self.chunk)
            x, y = (tensor[part].clone().to(self.device) for tensor in (images, classes))
            found.append(flat(method.attribute(x, y)).cpu())
        return torch.cat(found)


class _Looked:
    """The maps of one method, and what they say."""

    def __init__(
        self,
        work: _Work,
        method: Method,
        groups: dict[Group, list[int]],
    ) -> None:
        self.work, self.method, self.groups = work, method, groups
        self.before = work.maps(method, work.clean, work.labels)
        self.after = work.maps(method, work.attacked, work.labels)
        self.noise = work.maps(method, work.noisy, work.labels)

    def drifts(self) -> list[Drift]:
        """For each target and group, where there are samples; of the flipped even if not."""
        work, rows = self.work, self.groups["flipped"]
        found = [self._drift("true class", "flipped", self.after, self.noise)]
        own_after = self._own(self.after, work.attacked, work.said, rows)
        own_noise = self._own(self.noise, work.noisy, work.said_of_noise, rows)
        found.append(self._drift("own prediction", "flipped", own_after, own_noise))
        if self.groups["not flipped"]:
            found.append(self._drift("true class", "not flipped", self.after, self.noise))
        return found

    def _own(self, known: Tensor, images: Tensor, said: Tensor, rows: list[int]) -> Tensor:
        """Maps for what the model says of each image; where that is the true class they are
        known."""
        new = [row for row in rows if said[row] != self.work.labels[row]]
        found = known.clone()
        found[new] = self.work.maps(self.method, images[new], said[new])
        return found

    def _drift(
        self,
        target: str,
        group: Group,
        after: Tensor,
        noise: Tensor,
    ) -> Drift:
        rows, others = self.groups[group], self.work.others
        pairs = [(row, others[row]) for row in rows]
        return drift(
            self.method.name,
            target,
            group,
            [compare(self.before[row], after[row]) for row in rows],
            [compare(self.before[row], noise[row]) for row in rows],
            [
                None if other is None else compare(self.before[row], self.before[other])
                for row, other in pairs
            ],
            self.work.seed,
        )

    def attribution(self, row: int) -> Attribution:
        """The maps of one sample as pictures."""
        alike = compare(self.before[row], self.after[row])
        return Attribution(
            method=self.method.name,
            target=int(self.work.labels[row]),
            clean=heat_picture(self.before[row]),
            attacked=heat_picture(self.after[row]),
            spearman=alike.spearman if alike else None,
            top5=alike.top5 if alike else None,
            ssim=alike.ssim if alike else None,
        )


def _tried(work: _Work, method: Method, right: Tensor) -> MapQuality:
    """The method itself, on clean images that the model gets right, or else on any."""
    rows = (right if bool(right.any()) else torch.ones_like(right)).nonzero().flatten()[:IMAGES]
    x, labels = work.clean[rows].to(work.device), work.labels[rows].to(work.device)
    told = method.completeness
    complete = (
        {}
        if told is None
        else {
            "completeness_error": told.error,
            "steps": told.steps,
            "incomplete": told.incomplete,
        }
    )
    span = work.bounds[1] - work.bounds[0]
    found = quality(work.model, method, x, labels, span, work.chunk)
    return MapQuality.model_validate({**found.model_dump(), **complete})


def _others(labels: Tensor, right: Tensor) -> list[int | None]:
    """For each sample the next correctly classified one of its class, in a circle."""
    of_class: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        if right[row]:
            of_class.setdefault(label, []).append(row)
    found: list[int | None] = []
    for row, label in enumerate(labels.tolist()):
        rest = [other for other in of_class.get(label, []) if other != row]
        found.append(next((other for other in rest if other > row), rest[0] if rest else None))
    return found


def noise_like(
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
