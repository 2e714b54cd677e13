"""Detection of adversarial images by feature squeezing, and what adaptive attackers leave of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from robustann.attacks import MM, PGD, Attack
from robustann.attacks.base import at_least
from robustann.attacks.engine import check_classes, check_labels, predict_logits, run
from robustann.defenses.sanitizers import BitDepth, Median, Sanitizer
from robustann.defenses.sanitizers.chain import attackable
from robustann.errors import DataError, UsageError
from robustann.metrics import wilson_interval
from robustann.rng import SampleRandom
from robustann.rounding import MaybeNumber, Number
from robustann.threat import ThreatModel, check_images

# Logits that one unit of score is worth to the refusing class. Where the argmax lies does not hang
# on it; how well attacks do does: on digits 1 to 3 led about as many images past detectors, 5 to 30
# fewer.
_PULL = 2.0


class FeatureSqueezing(nn.Module):
    """A model that refuses images on which it and its squeezed inputs disagree (Xu et al., 2018).

    The score of an image is the largest L1 distance, over the squeezers, between the softmax of
    the model on the image and on the squeezed image: from 0 to 2. Above ``threshold`` the image is
    refused.

    As a module it returns the K logits of the model and one more, which is the largest exactly
    where the image is refused (Carlini and Wagner, AISec 2017). So an attack that wants one of
    the K classes succeeds only if it evades the detector as well; gradients pass squeezers that
    have none by their surrogates.

    Helps against attackers who do not know of it and stop at the first success. Known not to help
    against those who evade it too (He et al., WOOT 2017; Carlini and Wagner, AISec 2017).

    Args:
        model: maps images in [0, 1] to logits.
        squeezers: at least one, none of which draws at random.
        threshold: see :meth:`fit`.

    Raises:
        UsageError: unfit squeezers or threshold.

    >>> from robustann.defenses import parse_sanitizer
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> detector = FeatureSqueezing(model, [parse_sanitizer("bit-depth:bits=1")], threshold=2.0)
    >>> detector(torch.rand(5, 1, 2, 2)).shape
    torch.Size([5, 4])
    """

    name: ClassVar[str] = "feature-squeezing"
    paper: ClassVar[str] = "https://arxiv.org/abs/1704.01155"
    helps: ClassVar[tuple[str, ...]] = (
        "attackers who do not know of the detector and stop at the first success",
    )
    limits: ClassVar[tuple[str, ...]] = (
        "attackers who evade the detector as they evade the model",
        "attackers who go on to high confidence, where squeezing no longer changes the output",
    )

    def __init__(
        self, model: nn.Module, squeezers: Sequence[Sanitizer], *, threshold: float
    ) -> None:
        super().__init__()
        fit = [isinstance(part, Sanitizer) and part.deterministic for part in squeezers]
        if not fit or not all(fit):
            came = "none" if not fit else type(squeezers[fit.index(False)]).__name__
            raise UsageError(
                f"expected at least one squeezer, none of them drawing at random, got {came}; make "
                "them with parse_sanitizer, for example parse_sanitizer('bit-depth:bits=3')"
            )
        if not 0 <= threshold <= 2:
            raise UsageError(
                f"expected a threshold from 0 to 2, got {threshold}; use FeatureSqueezing.fit"
            )
        self.model = model
        self.squeezers = tuple(squeezers)
        self.threshold = threshold
        self._seen = nn.ModuleList(map(attackable, self.squeezers))

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        squeezers: Sequence[Sanitizer],
        images: Tensor,
        *,
        fpr: float = 0.05,
        batch_size: int = 256,
    ) -> FeatureSqueezing:
        """The detector that refuses at most a share ``fpr`` of these clean images.

        Raises:
            UsageError: unfit squeezers, or fpr not between 0 and 1.
            DataError: the images are unfit, or too few.
            ModelError: the model's output is unfit.
        """
        open_wide = cls(model, squeezers, threshold=2.0)
        return open_wide.with_threshold(calibrate(open_wide.scores(images, batch_size), fpr))

    def with_threshold(self, threshold: float) -> FeatureSqueezing:
        """The same detector, stricter or laxer."""
        return FeatureSqueezing(self.model, self.squeezers, threshold=threshold)

    def scores(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """The score of each image, float32 (N,) on the CPU; the model stays as it was.

        Raises:
            DataError: the images are unfit.
            ModelError: the model's output is unfit.
        """
        check_images(images)
        views = [self.model, *(nn.Sequential(part, self.model) for part in self.squeezers)]
        plain, *squeezed = (
            predict_logits(view, images, batch_size=batch_size).softmax(1) for view in views
        )
        return _furthest(plain, squeezed)

    def detects(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Whether each image is refused, bool (N,)."""
        return self.scores(images, batch_size) > self.threshold

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        squeezed = [self.model(part(x)).softmax(1) for part in self._seen]
        above = _furthest(logits.softmax(1), squeezed) - self.threshold
        refusal = logits.amax(1) + _PULL * above
        return torch.cat([logits, refusal[:, None]], dim=1)


@dataclass(frozen=True, kw_only=True)
class Detector:
    """Feature squeezing as hardening is asked for it: by bit depth and median, as in the paper.

    Args:
        bits: of each channel that are left, from 1 to 8.
        median: side of the window of the median, from 2 to 11.
        fpr: share of clean images that may be refused.

    Raises:
        UsageError: a value out of range.

    >>> Detector(bits=1).label
    'feature-squeezing:bits=1'
    """

    name: ClassVar[str] = FeatureSqueezing.name
    kind: ClassVar[str] = "detector"
    paper: ClassVar[str] = FeatureSqueezing.paper
    helps: ClassVar[tuple[str, ...]] = FeatureSqueezing.helps
    limits: ClassVar[tuple[str, ...]] = FeatureSqueezing.limits

    bits: int = 4
    median: int = 2
    fpr: float = 0.05

    def __post_init__(self) -> None:
        _check_fpr(self.fpr)
        _ = self.squeezers

    @property
    def squeezers(self) -> tuple[Sanitizer, ...]:
        """What squeezes."""
        return BitDepth(bits=self.bits), Median(size=self.median)

    @property
    def label(self) -> str:
        """The name, with what differs from its default."""
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}:{','.join(changed)}" if changed else self.name


def _furthest(plain: Tensor, squeezed: Sequence[Tensor]) -> Tensor:
    return torch.stack([(plain - other).abs().sum(1) for other in squeezed]).amax(0)


def calibrate(scores: Tensor, fpr: float) -> float:
    """The least threshold that at most a share ``fpr`` of these clean scores (N,) exceeds.

    Raises:
        UsageError: fpr is not above 0 and below 1.
        DataError: too few scores to tell: fewer than 1 / fpr.

    >>> round(calibrate(torch.arange(100.0) / 100, 0.05), 2)
    0.94
    """
    _check_fpr(fpr)
    # 0.05 * 360 is a little over 18, and 0.29 * 100 a little under 29.
    allowed = math.floor(fpr * len(scores) + 1e-9)
    if allowed < 1:
        raise DataError(
            f"expected at least {math.ceil(1 / fpr)} clean images for a false-positive rate of "
            f"{fpr:g}, got {len(scores)}; give more or allow a higher rate"
        )
    return float(scores.sort(descending=True).values[allowed])


def _check_fpr(fpr: float) -> None:
    if not 0 < fpr < 1:
        raise UsageError(f"expected a false-positive rate between 0 and 1, got {fpr}; try 0.05")


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Detection(_Value):
    """How the detector fares against one kind of attacker.

    Of the ``attacked`` samples, which the model classifies correctly, ``fooled`` came to be
    classified wrongly, and ``evaded`` wrongly and not refused. ``auc`` is the area under the ROC
    curve of the scores of fooled images against those of clean ones (0.5: no better than chance),
    None where none was fooled; the curve has no points then. ``scores`` has one entry for each of
    all samples: the lowest of an image of it that is classified wrongly, None where there is none.
    """

    attacks: tuple[str, ...]
    attacked: int
    fooled: int
    evaded: int
    auc: MaybeNumber
    false_positive_rates: tuple[Number, ...]
    true_positive_rates: tuple[Number, ...]
    scores: tuple[MaybeNumber, ...]


class DetectionResult(_Value):
    """A detector measured; :func:`evaluate_detector` makes it.

    ``robust_accuracy`` is the share of all ``n`` samples that are classified correctly and not
    refused, and for which neither attacker found an image that is classified wrongly and not
    refused; ``bare_robust_accuracy`` that of the model alone under the ordinary attack. Both are
    upper bounds: evading a detector is a hard search, and a longer one leads more images past it.
    ``fpr`` is what was asked for, ``validation_fpr`` and ``test_fpr`` what came out;
    ``clean_scores`` has one entry a sample.
    """

    squeezers: tuple[str, ...]
    threat: str
    n: int
    seed: int
    threshold: Number
    fpr: Number
    validation_fpr: Number
    test_fpr: Number
    clean_accuracy: Number
    robust_accuracy: Number
    interval: tuple[Number, Number]
    bare_robust_accuracy: Number
    clean_scores: tuple[Number, ...]
    ordinary: Detection
    adaptive: Detection

    @property
    def words(self) -> str:
        """The result in sentences, the adaptive attacker first."""
        texts = []
        for who, found in (
            ("an attacker who evades it too", self.adaptive),
            ("one who does not know of it", self.ordinary),
        ):
            auc = "no AUC" if found.auc is None else f"AUC {found.auc:.3f}"
            texts.append(f"against {who} {auc}, {found.evaded} of {found.attacked} images pass")
        return (
            f"Robust accuracy at most {100 * self.robust_accuracy:.1f} % with the detector, "
            f"{100 * self.bare_robust_accuracy:.1f} % without. Detection by "
            f"{', '.join(self.squeezers)}: {'; '.join(texts)}. It refuses "
            f"{100 * self.test_fpr:.1f} % of clean images. {self.threat}"
        )

    def __str__(self) -> str:
        return self.words


def evaluate_detector(
    model: nn.Module,
    squeezers: Sequence[Sanitizer],
    validation: Tensor,
    x: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    fpr: float = 0.05,
    seed: int = 0,
    ordinary: Attack | None = None,
    adaptive: Sequence[Attack] = (MM(steps=40), PGD(steps=80, loss="margin", restarts=2)),
    targets: int = 3,
    batch_size: int = 256,
) -> DetectionResult:
    """Set a detector's threshold on clean images and attack it, knowing of it and not.

    The ordinary attacker goes for the model alone, until its first success. The adaptive one
    wants one of the classes and not to be refused: for the nearest classes in turn, first at the
    strict threshold that half of the clean images exceed, then at the detector's; of all images
    found for a sample, the ordinary one among them, he keeps the one of lowest score. Each attack
    goes only to samples not yet below the threshold in question.

    Args:
        model: maps images in [0, 1] to logits; left as it was.
        squeezers: see :class:`FeatureSqueezing`.
        validation: clean images (M, C, H, W) that set the threshold.
        x: other images (N, C, H, W).
        labels: their classes, int64 (N,).
        threat: what the attacker may do, untargeted.
        fpr: share of clean images that may be refused.
        seed: of the attacks.
        ordinary: PGD by default.
        adaptive: white-box attacks within eps.
        targets: how many of the runner-up classes the adaptive attacker tries.
        batch_size: images a batch.

    Raises:
        UsageError: an unfit value.
        DataError: images or labels are unfit.
        ModelError: the model's output is unfit or carries no gradient.

    >>> from robustann.defenses import parse_sanitizer
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(40, 1, 2, 2), torch.zeros(40, dtype=torch.int64)
    >>> squeezers = [parse_sanitizer("bit-depth:bits=2")]
    >>> evaluate_detector(model, squeezers, x, x, y, ThreatModel("linf", 0.2)).validation_fpr
    0.05
    """
    ordinary = PGD() if ordinary is None else ordinary
    check_detection(threat, (ordinary, *adaptive), targets, batch_size)
    check_images(x)
    check_labels(labels, len(x))
    x, labels = x.detach().cpu().float(), labels.cpu()
    detector = FeatureSqueezing.fit(model, squeezers, validation, fpr=fpr, batch_size=batch_size)
    validated = detector.scores(validation, batch_size)
    strict = detector.with_threshold(min(calibrate(validated, 0.5), detector.threshold))
    logits = predict_logits(model, x, batch_size=batch_size)
    check_classes(labels, logits.shape[1])
    right = logits.argmax(1) == labels
    clean_scores = detector.scores(x, batch_size)
    random = SampleRandom.create(seed, torch.arange(len(x)))
    known, knowing = _Found(detector, x, batch_size), _Found(detector, x, batch_size)

    rows = right.nonzero().squeeze(1)
    shown = _attacked(ordinary, model, x, labels, rows, threat, random, batch_size)
    for found in (known, knowing):
        found.add(rows, shown, labels)
    aimed = replace(threat, targeted=True)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    order = others.argsort(dim=1, descending=True)[:, : logits.shape[1] - 1]
    tries = itertools.product((strict, detector), adaptive, order.T[:targets])
    for turn, (guard, attack, wanted) in enumerate(tries):
        rows = (right & (knowing.scores > guard.threshold)).nonzero().squeeze(1)
        streams = random.fork("adaptive", turn)
        shown = _attacked(attack, guard, x, wanted, rows, aimed, streams, batch_size)
        knowing.add(rows, shown, labels)
    passed = clean_scores <= detector.threshold
    stands = right & passed & (knowing.scores > detector.threshold)
    low, high = wilson_interval(int(stands.sum()), len(x))
    return DetectionResult(
        squeezers=tuple(part.label for part in detector.squeezers),
        threat=threat.words(),
        n=len(x),
        seed=seed,
        threshold=detector.threshold,
        fpr=fpr,
        validation_fpr=_share(validated > detector.threshold),
        test_fpr=_share(~passed),
        clean_accuracy=_share(right),
        robust_accuracy=_share(stands),
        interval=(low, high),
        bare_robust_accuracy=_share(right & known.scores.isinf()),
        clean_scores=tuple(clean_scores.tolist()),
        ordinary=_detection((ordinary,), known, clean_scores, right, detector.threshold),
        adaptive=_detection(
            (ordinary, *adaptive), knowing, clean_scores, right, detector.threshold
        ),
    )


def _attacked(
    attack: Attack,
    model: nn.Module,
    x: Tensor,
    classes: Tensor,
    rows: Tensor,
    threat: ThreatModel,
    random: SampleRandom,
    batch_size: int,
) -> Tensor:
    """The images that an attack makes of the samples at ``rows``."""
    if not len(rows):
        return x[:0]
    parts = rows.split(batch_size)  # type: ignore[no-untyped-call]
    return torch.cat(
        [
            run(
                attack, model, x[part], classes[part], threat, random=random.select(part)
            ).adversarial
            for part in parts
        ]
    )


class _Found:
    """Of each sample, the score of the least suspicious image found that is classified wrongly;
    infinite where there is none."""

    def __init__(self, detector: FeatureSqueezing, x: Tensor, batch_size: int) -> None:
        self.scores = torch.full((len(x),), torch.inf)
        self._detector = detector
        self._batch_size = batch_size

    def add(self, rows: Tensor, images: Tensor, labels: Tensor) -> None:
        """Take note of images for the samples at ``rows``."""
        if not len(rows):
            return
        logits = predict_logits(self._detector.model, images, batch_size=self._batch_size)
        wrong = logits.argmax(1) != labels[rows]
        scores = self._detector.scores(images, self._batch_size)
        self.scores[rows] = torch.where(
            wrong, torch.minimum(scores, self.scores[rows]), self.scores[rows]
        )


def _detection(
    attacks: Sequence[Attack], found: _Found, clean: Tensor, attacked: Tensor, threshold: float
) -> Detection:
    fooled = found.scores[found.scores.isfinite()]
    auc, false_positives, true_positives = None, [], []
    if len(fooled):
        from sklearn.metrics import roc_auc_score, roc_curve

        truth = torch.cat([torch.zeros(len(clean)), torch.ones(len(fooled))]).numpy()
        scores = torch.cat([clean, fooled]).numpy()
        auc = float(roc_auc_score(truth, scores))
        rates = roc_curve(truth, scores)
        false_positives, true_positives = rates[0].tolist(), rates[1].tolist()
    return Detection(
        attacks=tuple(attack.label for attack in attacks),
        attacked=int(attacked.sum()),
        fooled=len(fooled),
        evaded=int((fooled <= threshold).sum()),
        auc=auc,
        false_positive_rates=tuple(false_positives),
        true_positive_rates=tuple(true_positives),
        scores=tuple(found.scores.tolist()),
    )


def check_detection(
    threat: ThreatModel,
    attacks: Sequence[Attack] = (PGD(), MM()),
    targets: int = 1,
    batch_size: int = 1,
) -> None:
    """Refuse what a detector cannot be measured in or with.

    Raises:
        UsageError: with what was expected and what came.

    >>> check_detection(ThreatModel("l2", 0.5))
    """
    if threat.targeted or threat.bounds != (0.0, 1.0):
        aim = "targeted" if threat.targeted else "untargeted"
        raise UsageError(
            "expected an untargeted threat model with bounds (0, 1), got "
            f"{aim}, {threat.bounds}; the adaptive attacker chooses targets himself"
        )
    for attack in attacks:
        attack.check(threat)
        if attack.minimum_norm:
            raise UsageError(f"expected attacks within eps, got {attack.label}; take pgd or mm")
    if len(attacks) < 2:
        raise UsageError("expected at least one adaptive attack, got none; take pgd or mm")
    at_least("targets", targets, 1)
    at_least("batch_size", batch_size, 1)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
