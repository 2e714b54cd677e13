"""What an audit proves of its samples, to stand beside what its attacks break.

Proofs come first: what cannot be proven about a network is said before hours of attacks, and what
proofs cost comes off an audit's minutes. They hang on neither batch size nor attacks, so an audit
that was stopped makes the same ones again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from robustann.attacks.engine import ALIGNMENT, frozen, model_device
from robustann.auditing.batching import in_halves, is_out_of_memory
from robustann.auditing.presets import AuditConfig
from robustann.auditing.rows import Batch
from robustann.certificates import Smoothed, certify, certify_linf, predict
from robustann.certificates.intervals import propagate
from robustann.certificates.smoothing import ABSTAINED
from robustann.data import Split
from robustann.errors import ModelError, UsageError
from robustann.findings import Finding
from robustann.progress import progress_bar
from robustann.results import AuditResult, Certificate, CertifiedPoint, Interval
from robustann.rng import SampleRandom
from robustann.rounding import six_digits
from robustann.trust.checks import conclude, not_run

# Shares and multiples of the audited eps at which the curve of certified accuracy has points.
_BELOW, _ABOVE = (0.75, 0.5, 0.25), (1.25, 1.5, 2.0, 3.0)
# What linear bounds may keep at once; they keep about four float64 numbers for each input of an
# activation, image and class. Where eight images take more, intervals must do.
_MEMORY, _KEPT = 2**31, 4 * 8
_LARGEST = 256
# Draws that bound a class's probability: Cohen et al. took 100,000.
_DRAWS = {"quick": 1000, "thorough": 100_000}
_USUAL_DRAWS = 10_000
_FIRST_DRAWS, _ALPHA = 100, 0.001


@dataclass(frozen=True, eq=False)
class Proof:
    """What is proven, before any attack.

    Attributes:
        method: how.
        held: for each eps, rising, which samples withstand everything in it, bool (N,).
        settings: of the proof, as JSON values.
        smoothed: the classifier, where it is proven by smoothing.
    """

    method: Literal["crown", "ibp", "smoothing"]
    held: dict[float, Tensor]
    settings: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    smoothed: Smoothed | None = None


def check_provable(model: nn.Module, split: Split, config: AuditConfig) -> None:
    """Refuse what nothing can be proven about.

    Raises:
        UsageError: no certificate fits model and norm; says why, naming the layer if it is one.

    >>> from robustann.data import load_data
    >>> from robustann.threat import ThreatModel
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Sigmoid())
    >>> config = AuditConfig(threat=ThreatModel("linf", 0.1), certify=True)
    >>> check_provable(model, load_data("digits").test, config)
    Traceback (most recent call last):
    robustann.errors.UsageError: cannot certify: ... model.2 (Sigmoid) is of a kind ...
    """
    if isinstance(model, Smoothed) != (config.threat.norm == "l2"):
        raise UsageError(
            "expected to certify in l2 a smoothed classifier and in linf one that is not, got "
            f"{config.threat.norm} and {type(model).__name__}; for l2 audit "
            "robustann.certificates.Smoothed(model, sigma) (on the command line --smoothing "
            "SIGMA), for linf the model itself, or leave out certify"
        )
    if not isinstance(model, Smoothed):
        _way(model, split, config)


def prove(
    model: nn.Module,
    split: Split,
    positions: Tensor,
    config: AuditConfig,
    *,
    progress: bool = False,
) -> Proof:
    """Prove as much as possible about the samples there, in the threat model of ``config``.

    Raises:
        UsageError: as :func:`check_provable`.
        ModelError: the model computes something else than its layers say.

    >>> from robustann.data import load_data
    >>> from robustann.threat import ThreatModel
    >>> model, data = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), load_data("digits")
    >>> config = AuditConfig(threat=ThreatModel("linf", 0.1), certify=True)
    >>> list(prove(model, data.test, torch.arange(9), config).held)
    [0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.3]
    """
    check_provable(model, split, config)
    if isinstance(model, Smoothed):
        return _by_smoothing(model, split, positions, config, progress)
    return _by_bounds(model, split, positions, config, progress)


def _levels(config: AuditConfig, widest: float) -> list[float]:
    """The eps of the curve, rising; beyond ``widest`` is nothing to prove."""
    eps = config.threat.eps
    factors = (*_BELOW, *_ABOVE) if config.curve else ()
    found = {0.0, eps}
    found.update(level for factor in factors if (level := _rounded(factor * eps)) <= widest)
    return sorted(found)


def _rounded(eps: float) -> float:
    """As results are written: a level means the same after a round trip."""
    return float(six_digits(eps))  # type: ignore[arg-type]


def _way(
    model: nn.Module, split: Split, config: AuditConfig
) -> tuple[Literal["crown", "ibp"], int]:
    """How to bound this network, and how many images at once."""
    x = split.images([0]).to(model_device(model))
    low, high = config.threat.bounds
    eps = config.threat.eps
    lower, upper = (x - eps).clamp(min=low), (x + eps).clamp(max=high)
    try:
        with frozen(model, 0), torch.no_grad():
            logits, kept = propagate(model, lower, upper, rounding=True)
    except ModelError as error:
        raise UsageError(
            f"cannot certify: {error}; or leave out certify, and audit by attacks alone"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(
            "cannot certify: the bounds of a single image take more memory than there is; leave "
            "out certify, and audit by attacks alone"
        ) from error
    entries = sum(box.center[0].numel() for box in kept.inputs) + x[0].numel()
    method: Literal["crown", "ibp"] = "crown"
    cost = logits.center.shape[1] * entries * _KEPT
    if ALIGNMENT * cost > _MEMORY:
        method, cost = "ibp", entries * _KEPT
    return method, min(_LARGEST, max(ALIGNMENT, _MEMORY // cost // ALIGNMENT * ALIGNMENT))


def _by_bounds(
    model: nn.Module, split: Split, positions: Tensor, config: AuditConfig, progress: bool
) -> Proof:
    method, size = _way(model, split, config)
    low, high = config.threat.bounds
    levels = _levels(config, high - low)
    with progress_bar(len(positions), wanted=progress, unit="images") as advance:

        def work(part: Tensor) -> list[dict[float, Tensor]]:
            x, labels = split.images(part).cpu(), split.labels[part]
            found = _held(model, x, labels, config, method, levels)
            advance(len(part), f"certifying ({method})")
            return [found]

        parts = [
            one
            for part in positions.split(size)  # type: ignore[no-untyped-call]
            for one in in_halves(work, part)
        ]
    held = {level: torch.cat([part[level] for part in parts]) for level in levels}
    return Proof(method, held)


def _held(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    config: AuditConfig,
    method: Literal["crown", "ibp"],
    levels: Sequence[float],
) -> dict[float, Tensor]:
    """Which images withstand everything at each eps.

    What withstands it at one does so at every smaller one, so each goes only to what it can still
    tell apart.
    """
    threat = config.threat

    def proven(rows: Tensor, eps: float) -> Tensor:
        answer = torch.zeros(len(x), dtype=torch.bool)
        if bool(rows.any()):
            answer[rows] = certify_linf(
                model, x[rows], labels[rows], threat.with_eps(eps), method=method,
                batch_size=len(x),
            ).certified  # fmt: skip
        return answer

    first = certify_linf(model, x, labels, threat, method=method, batch_size=len(x))
    correct = first.prediction == labels.cpu()
    held = {threat.eps: first.certified}
    last = first.certified
    for level in reversed([level for level in levels if level < threat.eps]):
        # The original is all that the ball of radius 0 holds.
        last = held[level] = correct if level == 0 else last | proven(correct & ~last, level)
    last = first.certified
    for level in (level for level in levels if level > threat.eps):
        last = held[level] = proven(last, level)
    return held


def _by_smoothing(
    model: Smoothed, split: Split, positions: Tensor, config: AuditConfig, progress: bool
) -> Proof:
    n = _DRAWS.get(config.preset, _USUAL_DRAWS)
    found = []
    with progress_bar(len(positions), wanted=progress, unit="images") as advance:
        for part in positions.split(_LARGEST):  # type: ignore[no-untyped-call]
            found.append(
                certify(
                    model.model,
                    split.images(part).cpu(),
                    split.labels[part],
                    sigma=model.sigma,
                    n0=_FIRST_DRAWS,
                    n=n,
                    alpha=_ALPHA,
                    random=SampleRandom.create(config.seed, part).fork("certify"),
                )
            )
            advance(len(part), "certifying (smoothing)")
    levels = _levels(config, max(found[0].largest_radius, config.threat.eps))
    held = {level: torch.cat([one.certified(level) for one in found]) for level in levels}
    settings: dict[str, str | int | float | bool | None] = {
        "sigma": model.sigma,
        "n0": _FIRST_DRAWS,
        "n": n,
        "alpha": _ALPHA,
        "confidence": 1 - _ALPHA,
        "abstained": sum(int(one.abstained.sum()) for one in found),
        "largest_radius": _rounded(found[0].largest_radius),
    }
    return Proof("smoothing", held, settings, model)


def with_proof(
    result: AuditResult, proof: Proof, batches: Sequence[Batch], config: AuditConfig, draws: int
) -> AuditResult:
    """The result with its certificate, and with what certificate and attacks say of each other.

    ``batches`` are those of the attacks, which averaged over ``draws`` forwards.
    """
    n, eps = result.n, result.threat.eps
    audited = proof.held[config.threat.eps]
    settings = dict(proof.settings)
    if proof.smoothed is None:
        crossed = _broken_in_proven(proof, audited, batches)
        words = _bounds_in_words(proof.method, config)
    else:
        crossed, doubtful = _voted_out(proof, proof.smoothed, audited, batches, config)
        settings.update(attack_draws=proof.smoothed.draws * draws, unconfirmed=doubtful)
        words = _smoothing_in_words(proof.smoothed, settings)
    points = []
    for level, held in proof.held.items():
        share, span = int(held.sum()) / n, Interval.of_rate(int(held.sum()), n)
        points.append(CertifiedPoint(eps=level, certified_accuracy=share, interval=span))
    own = next(point for point in points if point.eps == eps)
    certificate = Certificate(
        method=proof.method,
        words=words,
        eps=eps,
        certified_accuracy=own.certified_accuracy,
        interval=own.interval,
        certified=tuple(audited.tolist()),
        settings=settings,
        curve=tuple(points),
        crossed=tuple(crossed.tolist()),
    )
    finding = _finding(certificate, n)
    findings = result.findings
    # Alone, the check passed would pass for the whole evaluation.
    if config.trust or finding.verdict == "fail":
        findings = (*findings, finding)
    return result.model_copy(update={"certificate": certificate, "findings": findings})


def _broken_in_proven(proof: Proof, audited: Tensor, batches: Sequence[Batch]) -> Tensor:
    """Places of samples with an adversarial image in a ball that is proven to hold none."""
    distance = torch.cat([batch.distance for batch in batches])
    wrong = torch.cat([batch.worst.success for batch in batches]) & audited
    for level, held in proof.held.items():
        # The ball of radius 0 holds the original alone, which is in the distance already.
        if level > 0:
            wrong |= held & (distance <= level)
    return wrong.nonzero().squeeze(1)


def _voted_out(
    proof: Proof,
    smoothed: Smoothed,
    audited: Tensor,
    batches: Sequence[Batch],
    config: AuditConfig,
) -> tuple[Tensor, int]:
    """Places of certified samples that fell, if a vote on the image that broke them confirms it;
    and how many it does not confirm.

    Attacks see a mean of softmax outputs over some draws, the certificate is of the majority vote:
    near a tie, a few draws may say otherwise.
    """
    crossed, doubtful = [], 0
    for batch in batches:
        places = batch.held + batch.start
        rows = (batch.worst.success[batch.held] & audited[places]).nonzero().squeeze(1)
        if not len(rows):
            continue
        fell = batch.held[rows]
        voted = predict(
            smoothed.model,
            batch.worst.x[rows],
            sigma=smoothed.sigma,
            n=int(proof.settings["n"] or 0),
            alpha=_ALPHA,
            random=SampleRandom.create(config.seed, batch.index[fell]).fork("confirm"),
        )
        confirmed = (voted != batch.labels[fell]) & (voted != ABSTAINED)
        crossed.append(places[rows][confirmed])
        doubtful += int((~confirmed).sum())
    return torch.cat(crossed) if crossed else torch.empty(0, dtype=torch.int64), doubtful


def _finding(certificate: Certificate, n: int) -> Finding:
    name, certified = "certificate-crossed", sum(certificate.certified)
    if not certified and not certificate.crossed:
        return not_run(name, "No sample is certified, so nothing can contradict the attacks.")
    crossed = len(certificate.crossed)
    seen = f"None of the {certified} certified samples was broken by an attack."
    if crossed:
        seen = f"{crossed} of {n} samples are certified and were broken by an attack all the same."
    return conclude(name, crossed > 0, seen, value=crossed / n)


def _bounds_in_words(method: str, config: AuditConfig) -> str:
    how = "intervals alone, for linear bounds would take too much memory (IBP)"
    if method == "crown":
        how = "intervals and linear bounds (CROWN)"
    return (
        f"Of a certified sample it is proven that the model classifies no image within "
        f"{config.threat.norm} eps {config.threat.eps_text} otherwise, rounding included: bounds "
        f"were carried through every layer, by {how}. A sample without a proof may be robust too."
    )


def _smoothing_in_words(
    model: Smoothed, settings: dict[str, str | int | float | bool | None]
) -> str:
    text = (
        "This is about the smoothed classifier, the class that the model gives most often under "
        f"Gaussian noise of standard deviation {model.sigma:g}, not about the model without noise. "
        f"Each certificate holds with a probability of at least {settings['confidence']:.3%}, from "
        f"{settings['n']:,} draws an image. The attacks went to the same smoothed classifier, as "
        f"the mean of {model.mean_of} outputs over {settings['attack_draws']} draws instead of a "
        "vote: its robust accuracy is as good an estimate as so many draws allow."
    )
    if settings["unconfirmed"]:
        text += (
            f" {settings['unconfirmed']} certified samples fell in that estimate, but a vote of "
            f"{settings['n']:,} draws did not confirm it: they do not count as broken against "
            "their certificates."
        )
    return text
