"""Extra runs on a few images: is the attack itself sound on this model?"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustann.attacks import FGSM, MM, PGD, Attack, AttackResult, Square, UniformNoise
from robustann.attacks.engine import craft, model_device, predict_logits, run
from robustann.attacks.losses import margin
from robustann.findings import Finding
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel
from robustann.trust.checks import conclude, not_run
from robustann.trust.reviewing import (
    black_box,
    compare,
    compare_losses,
    last_tenth,
    lost_on_the_way,
    no_answer,
    noise,
    single_step,
    twice_the_steps,
    unbounded,
)

_GRADIENT_CHECKS = (
    "single-step-wins",
    "noise-wins",
    "rising-curve",
    "unbounded-attack",
    "loss-choice",
    "steps-help",
    "incomplete-optimisation",
    "silent-success",
    "answer-missing",
)


@dataclass(frozen=True)
class Probed:
    """What :func:`probe` found: iterates over its findings.

    Attributes:
        findings: one a check, ``not run`` where the norm or the model does not allow it.
        propagations: forwards and backwards of single images spent, and ``backwards`` those among
            them.

    >>> len(Probed((not_run("noise-wins", "No images."),), propagations=3))
    1
    """

    findings: tuple[Finding, ...]
    propagations: int
    backwards: int = 0

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)


def probe(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    random: SampleRandom,
    images: int = 64,
    attack: MM | PGD | None = None,
    queries: int = 200,
    draws: int = 1,
    gradients: bool = True,
    losses: Collection[str] = (),
) -> Probed:
    """Run small experiments that a working attack passes, on a few images.

    About 500 propagations for an image that stands throughout, far fewer for one that falls.

    Args:
        model: maps images to logits; left as it was.
        x: float images (N, C, H, W) within the bounds of ``threat``.
        labels: int64 (N,), the true classes.
        threat: what the attacker may do, untargeted.
        random: one stream a sample.
        images: how many of the correctly classified images to take, the first ones.
        attack: whose steps are doubled; None takes ``MM()``, the cascade's first.
        queries: of the random search from scratch that gradient attacks are held against.
        draws: forwards averaged for each answer of a randomised model.
        gradients: False where the model is known to have none: only the random search runs.
        losses: those of ``ce`` and ``margin`` that the audit's own attacks climb: where one of the
            two fails, the other is the remedy.

    Returns:
        The findings, and what they cost.

    Raises:
        DataError: images or labels are unfit.
        ModelError: the model's output is no row of finite logits an image, or carries no
            gradient though ``gradients`` is true.

    Sources: Carlini et al. 2019 (arXiv:1902.06705), Pintor et al. 2022 (arXiv:2106.09947).

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> x = torch.rand(8, 1, 4, 4)
    >>> random = SampleRandom.create(0, torch.arange(8))
    >>> found = probe(model, x, model(x).argmax(1), ThreatModel("linf", 0.3), random=random)
    >>> [one.check for one in found if one.verdict == "fail"]
    []
    """
    logits = predict_logits(model, x, seed=random.seed, draws=draws)
    rows = (logits.argmax(1) == labels.cpu()).nonzero().squeeze(1)[:images]
    names = (*_GRADIENT_CHECKS, "black-box-wins")
    if not len(rows):
        none = (not_run(name, "No image was classified correctly.") for name in names)
        return Probed(tuple(none), draws * len(logits))
    if threat.eps == 0 or threat.norm not in PGD.norms:
        why = f"Its attacks do not apply to {threat.norm} with eps {threat.eps_text}."
        return Probed(tuple(not_run(name, why) for name in names), draws * len(logits))
    x, labels = x[rows.to(x.device)], labels[rows.to(labels.device)]
    device = model_device(model)
    trial = _Trial(
        model,
        x.detach().to(device, torch.float32),
        labels.to(device),
        threat,
        random.to("cpu").select(rows),
        draws,
    )
    clean = -margin(logits[rows], labels.cpu())
    broken = torch.zeros(len(rows), dtype=torch.bool)
    findings = [not_run(name, "The model has no usable gradient.") for name in _GRADIENT_CHECKS]
    if gradients:
        findings, broken = _gradient_checks(trial, clean, logits.shape[1], attack or MM(), losses)
    findings = [*findings, _black_box(trial, broken, queries)]
    spent = draws * len(logits) + trial.forwards + trial.backwards
    return Probed(tuple(findings), spent, trial.backwards)


class _Trial:
    """The images, how attacks are run on them, and the propagations that they cost."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        random: SampleRandom,
        draws: int,
    ) -> None:
        self.model, self.x, self.labels = model, x, labels
        self.threat, self.random, self.draws = threat, random, draws
        self.forwards = self.backwards = 0

    def run(
        self,
        attack: Attack,
        *,
        eps: float | None = None,
        rows: Tensor | None = None,
        limit: int | None = None,
    ) -> AttackResult:
        held = torch.arange(len(self.x)) if rows is None else rows
        here = held.to(self.x.device)
        result = run(
            attack,
            self.model,
            self.x[here],
            self.labels[here],
            self.threat if eps is None else self.threat.with_eps(eps),
            random=self.random.select(held).fork("probe"),
            known_correct=True,
            limit=None if limit is None else torch.full((len(held),), limit),
            draws=self.draws,
        )
        self.forwards += int(result.forwards.sum())
        self.backwards += int(result.backwards.sum())
        return result


def _gradient_checks(
    trial: _Trial, clean: Tensor, classes: int, main: MM | PGD, losses: Collection[str]
) -> tuple[list[Finding], Tensor]:
    """The findings about gradient attacks, and which images these broke."""
    count, threat = len(trial.x), trial.threat
    base = PGD(steps=20, loss="margin")
    by_margin = trial.run(base)
    by_ce = trial.run(replace(base, loss="ce"))
    by_step = trial.run(FGSM())
    many = by_margin.success | by_ce.success
    short, long = trial.run(main), trial.run(replace(main, steps=2 * main.steps))
    broken = many | by_step.success | short.success | long.success
    widest = threat.widest(trial.x[0].numel())
    wide = trial.run(MM(), eps=widest)
    findings = [
        single_step(compare(by_step.success.tolist(), many.tolist())),
        _noise(trial, ~broken),
        _rising(trial, main, short, min(2 * threat.eps, widest)),
        unbounded(float((~wide.success).double().mean()), count, 1 / classes),
        compare_losses(by_ce.success.tolist(), by_margin.success.tolist(), losses),
        twice_the_steps(long.success.tolist(), short.success.tolist(), main.steps),
        _incomplete(trial, base, by_margin, clean),
        *_at_the_end(trial, base, by_margin),
    ]
    return findings, broken


def _noise(trial: _Trial, standing: Tensor) -> Finding:
    rows = standing.nonzero().squeeze(1)
    if not len(rows):
        return conclude("noise-wins", False, "No image stands that noise could fool.", value=0.0)
    return noise(int(trial.run(UniformNoise(draws=20), rows=rows).success.sum()), len(rows))


def _rising(trial: _Trial, main: Attack, at_eps: AttackResult, wider: float) -> Finding:
    name = "rising-curve"
    if wider <= trial.threat.eps:
        return not_run(name, "Everything is allowed already at the audited eps.")
    beyond = trial.run(main, eps=wider)
    pair = compare(at_eps.success.tolist(), beyond.success.tolist())
    seen = (
        f"The same attack breaks {pair.first:.1%} of {pair.n} images at the audited eps and "
        f"{pair.second:.1%} at {wider:.3g}."
    )
    return conclude(name, pair.beats(0.0), seen, value=max(pair.first - pair.second, 0.0))


def _incomplete(trial: _Trial, base: PGD, full: AttackResult, clean: Tensor) -> Finding:
    rows = (~full.success).nonzero().squeeze(1)
    if not len(rows):
        name = "incomplete-optimisation"
        return conclude(name, False, "Every image fell before the attack ended.", value=0.0)
    # The same start and the same steps, cut off: rows do not hang on their batch.
    early = trial.run(base, rows=rows, limit=round(0.9 * 2 * base.steps) * trial.draws)
    return last_tenth(
        clean[rows].tolist(), early.margin.tolist(), full.margin[rows].tolist(), base.steps
    )


def _at_the_end(trial: _Trial, base: PGD, full: AttackResult) -> tuple[Finding, Finding]:
    # As the engine forks the streams: the same starts, hence the same path to its end.
    streams = trial.random.fork("probe").fork(base.label).fork("start", 0)
    last = craft(
        base,
        trial.model,
        trial.x,
        trial.labels,
        trial.threat,
        random=streams.to(trial.x.device),
    )
    # A forward and a backward a step, and the look at the end.
    trial.forwards += len(last) * (base.steps + 1)
    trial.backwards += len(last) * base.steps
    logits = predict_logits(trial.model, last.cpu(), seed=streams.seed, finite=False)
    answered = no_answer(logits.isfinite().all(1).tolist())
    if answered.verdict == "fail":
        why = "The model does not answer every image at the end of PGD."
        return not_run("silent-success", why), answered
    still = (logits.argmax(1) != trial.labels.cpu()).tolist()
    return lost_on_the_way(full.success.tolist(), still), answered


def _black_box(trial: _Trial, broken: Tensor, queries: int) -> Finding:
    name = "black-box-wins"
    search = Square(queries=queries)
    if trial.threat.norm not in search.norms:
        return not_run(name, f"Random search does not know {trial.threat.norm}.")
    rows = (~broken).nonzero().squeeze(1)
    fell = int(trial.run(search, rows=rows).success.sum()) if len(rows) else 0
    return black_box(fell, len(broken))
