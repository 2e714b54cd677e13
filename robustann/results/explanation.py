"""What attributions say before and under attack."""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, Field

from robustann.results.scores import Interval
from robustann.results.value import Value
from robustann.rounding import MaybeNumber, Number


class Attribution(Value):
    """One method's attribution maps of a gallery sample, as pictures in base64.

    ``target`` is the class that both maps explain.

    >>> result.explanation.gallery[0].attributions[0].method
    'Saliency'
    """

    method: str
    target: int
    clean: str = Field(validation_alias=AliasChoices("clean", "clean_png"))
    attacked: str = Field(validation_alias=AliasChoices("attacked", "attacked_png"))
    spearman: MaybeNumber
    top5: MaybeNumber
    ssim: MaybeNumber = None


class PathPoint(Value):
    """An image on the line from a sample to its nearest adversarial image and beyond it, at this
    ``distance`` in the audited norm, and what the model says of it.

    >>> path = result.explanation.gallery[0].path
    >>> [(point.distance, point.prediction) for point in (path[0], path[-1])]
    [(0.0, 1), (0.2, 0)]
    """

    distance: Number
    image: str
    prediction: int
    confidence: Number


class GallerySample(Value):
    """One sample shown in the report: pictures are PNG, or WebP where they are larger than 64
    pixels and made smaller, in base64.

    ``why`` says by which rule it was chosen; ``difference`` shows the difference multiplied
    by ``amplification`` around mid-grey; ``path`` leads through the nearest adversarial image that
    a minimum-norm attack found. ``distance`` is that of the attacked image, ``nearest`` that of the
    nearest adversarial one, None where none is known within the threat model.

    >>> shown = result.explanation.gallery[0]
    >>> shown.why, shown.label, shown.attacked_prediction, shown.nearest
    ('easiest to break', 1, 0, 0.1)
    """

    index: int
    label: int
    why: str
    attack: str
    clean_prediction: int
    clean_confidence: Number
    attacked_prediction: int
    attacked_confidence: Number
    distance: Number
    nearest: Number | None = None
    amplification: Number
    clean: str = Field(validation_alias=AliasChoices("clean", "clean_png"))
    attacked: str = Field(validation_alias=AliasChoices("attacked", "attacked_png"))
    difference: str = Field(validation_alias=AliasChoices("difference", "difference_png"))
    attributions: tuple[Attribution, ...]
    path: tuple[PathPoint, ...] = ()


class DriftStatistics(Value):
    """Medians over ``n`` samples of how alike two maps are (1 = same explanation): Spearman's rank
    correlation of |attribution|, the share of the 5 % largest pixels in common, and SSIM. Intervals
    are percentile bootstraps of the median.

    >>> drift = result.explanation.drift[0].attacked
    >>> drift.n, drift.spearman  # maps of a single pixel have no order
    (0, None)
    """

    n: int
    spearman: MaybeNumber
    top5: MaybeNumber
    ssim: MaybeNumber = None
    spearman_interval: Interval | None = None
    top5_interval: Interval | None = None
    ssim_interval: Interval | None = None


class Drift(Value):
    """How far explanations move under attack, beside two controls: random-sign ``noise`` of the
    same size, and an ``other`` image of the same class.

    ``target`` is the class that is explained: the true one, or what the model says of each image.
    ``group`` are samples that the attack flipped, or those that it did not. ``difference`` is the
    median, over samples, of Spearman for noise minus Spearman for the attack.

    >>> drift = result.explanation.drift[0]
    >>> drift.method, drift.target, drift.group
    ('Saliency', 'true class', 'flipped')
    """

    method: str
    attacked: DriftStatistics
    noise: DriftStatistics
    other: DriftStatistics | None = None
    target: Literal["true class", "own prediction"] = "true class"
    group: Literal["flipped", "not flipped"] = "flipped"
    difference: MaybeNumber = None
    difference_interval: Interval | None = None


class MapQuality(Value):
    """Whether the maps of a method are to be read at all, as medians over ``n`` clean images.

    ``reinitialised`` is Spearman between the map and that of the same network with re-initialised
    weights (Adebayo et al. 2018): near 1, the map does not show what was learned. ``infidelity``
    and ``max_sensitivity`` (Yeh et al. 2019) are lower for better maps; infidelity is not defined
    for maps of a layer. For integrated gradients ``completeness_error`` is the largest gap to the
    difference of the logits, relative to the sum of |attribution|, after up to ``steps`` steps;
    ``incomplete`` maps stayed above the tolerance, or are empty where the logits differ. What only
    empty maps would tell (no gradient) is None.

    >>> quality = {one.method: one for one in result.explanation.quality}
    >>> quality["Integrated gradients"].completeness_error < 0.01
    True
    """

    method: str
    n: int
    reinitialised: MaybeNumber = None
    infidelity: MaybeNumber = None
    max_sensitivity: MaybeNumber = None
    completeness_error: MaybeNumber = None
    steps: int | None = None
    incomplete: int | None = None


class Explanation(Value):
    """What the attributions say; ``rule`` tells how the gallery was chosen, ``left_out`` which
    methods this model does not allow. ``tensors`` are the gallery's exact images, as an ``.npz``
    file's bytes; they are written beside the results, not into them.

    >>> [shown.index for shown in result.explanation.gallery]
    [2, 1]
    """

    rule: str
    gallery: tuple[GallerySample, ...]
    drift: tuple[Drift, ...]
    quality: tuple[MapQuality, ...] = ()
    left_out: tuple[str, ...] = ()
    tensors: bytes = Field(default=b"", exclude=True, repr=False)

    def __eq__(self, other: object) -> bool:
        """Equal if all is that is written into results."""
        if not isinstance(other, Explanation):
            return NotImplemented
        return self.model_dump() == other.model_dump()
