"""What attribution maps say, and whether they are to be read at all."""

from __future__ import annotations

from dataclasses import dataclass

from robustann.reports.filters import significant
from robustann.results import Drift, Explanation, GallerySample

# Spearman with random weights from which on a map does not show what was learned.
SANE = 0.5


@dataclass(frozen=True)
class DriftGroup:
    """Rows of the drift table that belong together: one target, one group of samples.

    >>> group = drift_groups(result.explanation)[-1]
    >>> group.title, [row.method for row in group.rows]
    ('Samples that the attack did not flip', ['Saliency', 'Integrated gradients'])
    """

    title: str
    rows: tuple[Drift, ...]


def drift_groups(explanation: Explanation) -> list[DriftGroup]:
    """Flipped samples first, by what is explained; then those that the attack did not flip.

    >>> [group.title for group in drift_groups(result.explanation)][:1]
    ['Flipped samples, maps of the true class']
    """
    titles = {
        ("true class", "flipped"): "Flipped samples, maps of the true class",
        ("own prediction", "flipped"): "Flipped samples, maps of what the model says of each image",
        ("true class", "not flipped"): "Samples that the attack did not flip",
    }
    return [
        DriftGroup(title, rows)
        for (target, group), title in titles.items()
        if (rows := tuple(one for one in explanation.drift
                          if (one.target, one.group) == (target, group)))
    ]  # fmt: skip


def reading(drift: Drift) -> str:
    """What a row of the drift table says, and what it does not.

    >>> from robustann.results import DriftStatistics as Alike
    >>> moved = Drift(method="Saliency", attacked=Alike(n=64, spearman=0.4, top5=0.3),
    ...               noise=Alike(n=64, spearman=0.9, top5=0.8))
    >>> reading(moved)
    'The attack moves this map further than random noise of the same size does.'
    """
    attacked, noise = drift.attacked, drift.noise
    if not attacked.n or attacked.spearman is None or noise.spearman is None:
        return (
            "No broken sample had maps to compare: either nothing broke, or the maps are constant "
            "because the model has no gradient there."
        )
    further, less = _moved(drift)
    if further:
        text = "The attack moves this map further than random noise of the same size does."
    elif less:
        text = "The attack moves this map less than random noise of the same size does."
    else:
        text = (
            "The attack moves this map about as far as random noise of the same size does: the "
            "drift shows how restless the map is, not what the attack did."
        )
    if noise.spearman < 0.5:
        text += " Noise alone already reorders it, so a single map says little."
    other = drift.other.spearman if drift.other else None
    if other is not None and attacked.spearman <= other:
        text += " It ends no more like the clean map than that of another image of the class."
    if attacked.n < 20:
        text += f" With {attacked.n} samples this is no more than a hint."
    return text


def _moved(drift: Drift) -> tuple[bool, bool]:
    """Whether the attack moves a map further, or less far, than noise does: by the interval of the
    paired difference where there is one, and by at least 0.05."""
    gap = drift.difference
    if gap is None:
        # An older result: the difference of the medians.
        gap = (drift.noise.spearman or 0.0) - (drift.attacked.spearman or 0.0)
    span = drift.difference_interval
    low, high = (gap, gap) if span is None else (span.low, span.high)
    return gap >= 0.05 and low > 0, gap <= -0.05 and high < 0


def sanity(explanation: Explanation) -> list[tuple[str, str]]:
    """Each method, and in a sentence whether it passes the check with random weights.

    >>> [method for method, _ in sanity(result.explanation)]
    ['Saliency', 'Integrated gradients']
    """
    said = []
    for one in explanation.quality:
        if one.reinitialised is None:
            text = (
                "not known. Its maps, of the trained network or with random weights, are constant."
            )
        elif one.reinitialised >= SANE:
            text = (
                f"fails. With random weights the maps stay alike "
                f"({significant(one.reinitialised, 2)}, from {SANE} on counts as alike): they show "
                "the image more than what the network learned."
            )
        else:
            text = (
                f"passes. Random weights change the maps ({significant(one.reinitialised, 2)}, "
                f"under {SANE})."
            )
        said.append((one.method, text))
    return said


@dataclass(frozen=True)
class ShownPath:
    """Where on a path the nearest adversarial image stands.

    >>> shown = result.explanation.gallery[0]
    >>> shown.path[ShownPath(5).found].distance == shown.nearest
    True
    """

    found: int


def shown_path(sample: GallerySample) -> ShownPath:
    """The first place at which the prediction is wrong, from the clean side; the middle if none.

    >>> shown = result.explanation.gallery[0]
    >>> shown.path[shown_path(shown).found].distance == shown.nearest
    True
    """
    wrong = [place for place, one in enumerate(sample.path) if one.prediction != sample.label]
    return ShownPath(wrong[0] if wrong else len(sample.path) // 2)
