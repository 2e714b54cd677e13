"""What sanitizers in front of a model are worth, against attackers who know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from robustann.attacks import MM, PGD, Attack, Square
from robustann.attacks.base import Access, at_least
from robustann.attacks.engine import check_classes, predict_logits, run
from robustann.attacks.transfer import transfer
from robustann.auditing import chosen_samples
from robustann.auditing.shown import Shown
from robustann.data import ImageData, Split, tensor_split
from robustann.defenses.sanitizers import InputCheck, Sanitized, Sanitizer
from robustann.errors import UsageError
from robustann.progress import Advance, progress_bar
from robustann.results import Interval, Threat
from robustann.rng import SampleRandom
from robustann.rounding import Number, percent
from robustann.threat import ThreatModel

# A gain of so little is none, however many samples were measured.
_NO_GAIN = 0.02
# Averages over fewer draws hang on luck, and with them every success and failure.
LEAST_DRAWS = 20
_PAPER = "https://arxiv.org/abs/1802.00420"
# In which all five ways were tried.
MEASURED_NORMS = ("linf", "l2")

_CASCADE: tuple[Attack, ...] = (
    MM(),
    MM(rank=2),
    PGD(steps=40, loss="margin", restarts=2),
)

WayName = Literal["transfer", "identity", "gradient", "eot", "score"]
Verdict = Literal["useless", "helps", "untested", "no claim"]
_ACCESS: dict[WayName, Access] = {
    "transfer": "none",
    "identity": "white-box",
    "gradient": "white-box",
    "eot": "white-box",
    "score": "score",
}
_WORDS: dict[WayName, str] = {
    "transfer": "does not know of the sanitizers: images crafted on the bare model",
    "identity": "passes gradients over the sanitizers as if they were not there (BPDA)",
    "gradient": "takes gradients through the sanitizers, or through smooth stand-ins for them",
    "eot": "averages those gradients over draws of the sanitizers (EOT)",
    "score": "searches at random through the whole defense, without gradients",
}


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SanitizerFacts(_Value):
    """A sanitizer as measured; ``helps`` and ``limits`` are what is known of it beforehand.

    >>> facts = defended.sanitized.sanitizers[0]
    >>> facts.label, facts.differentiable
    ('bit-depth:bits=1', False)
    """

    name: str
    label: str
    paper: str
    hyperparameters: dict[str, str | int | float | bool | None]
    helps: tuple[str, ...]
    limits: tuple[str, ...]
    differentiable: bool
    deterministic: bool


class Way(_Value):
    """What one kind of attacker achieves, on all samples that the defense classifies correctly.

    ``robust_accuracy`` counts all samples, those wrong from the start among the failures;
    ``success`` has one entry a sample. ``forwards`` and ``backwards`` count images through the
    defense, each draw by itself; what the bare model was asked in crafting is not in them. Where
    nothing is drawn at random, ``eot`` is the ``same_as`` ``gradient``, at no further cost.

    >>> way = defended.sanitized.way("gradient")
    >>> way.succeeded, way.attempted, way.robust_accuracy
    (10, 20, 0.5)
    """

    name: WayName
    words: str
    attacks: tuple[str, ...]
    robust_accuracy: Number
    interval: Interval
    attempted: int
    succeeded: int
    success: tuple[bool, ...]
    forwards: int
    backwards: int
    same_as: WayName | None = None


class SanitizedResult(_Value):
    """Sanitizers measured in five ways; :func:`measure_sanitizer` makes it.

    The headline, ``robust_accuracy``, is the per-sample minimum over all five ``ways``: a sample
    counts only where no attacker breaks it. ``broken_by`` names the first that did; None where
    none did, or where ``clean_correct`` is false.

    ``verdict``: see :func:`judged`.

    >>> found = defended.sanitized
    >>> found.verdict, found.robust_accuracy, found.bare_robust_accuracy
    ('useless', 0.5, 0.5)
    """

    sanitizers: tuple[SanitizerFacts, ...]
    threat: Threat
    n: int
    seed: int
    draws: int
    robust_accuracy: Number
    interval: Interval
    verdict: Verdict
    bare_robust_accuracy: Number
    bare_interval: Interval
    clean_accuracy: Number
    clean_interval: Interval
    bare_clean_accuracy: Number
    bare_clean_interval: Interval
    ways: tuple[Way, ...]
    index: tuple[int, ...]
    clean_correct: tuple[bool, ...]
    broken_by: tuple[WayName | None, ...]

    def way(self, name: WayName) -> Way:
        """The figures of one kind of attacker."""
        return next(way for way in self.ways if way.name == name)

    @property
    def words(self) -> str:
        """The result in sentences, the minimum first."""
        names = ", ".join(part.label for part in self.sanitizers)
        verdict = in_words(self.verdict, self.bare_robust_accuracy)
        rule = f" Judged on the mean of {self.draws} draws." if self.draws > 1 else ""
        ways = "; ".join(
            f"{way.name}, who {way.words}: {percent(way.robust_accuracy)}" for way in self.ways
        )
        return (
            f"Robust accuracy {percent(self.robust_accuracy)} (95 % interval "
            f"{percent(self.interval.low)} to {percent(self.interval.high)}) behind {names}: the "
            f"minimum for each of {self.n} samples over five attackers. {verdict} Clean accuracy "
            f"{percent(self.clean_accuracy)} with, {percent(self.bare_clean_accuracy)} without."
            f"{rule} {self.threat.words} By attacker: {ways}."
        )

    def __str__(self) -> str:
        return self.words


def judged(
    sanitizers: Sequence[Sanitizer],
    *,
    robust: float,
    bare: float,
    bare_high: float,
    bare_clean: float,
) -> Verdict:
    """What sanitizers are worth against attacks, from the minimum over all attackers.

    ``no claim``, they only refuse what is no image; ``untested``, the attacks leave the bare model
    within 2 points of its clean accuracy, so there was nothing to defend; ``useless``, the minimum
    is within the bare model's interval or 2 points of it, or below; ``helps``, it is higher.

    >>> judged([InputCheck()], robust=0.1, bare=0.1, bare_high=0.2, bare_clean=0.9)
    'no claim'
    """
    if all(isinstance(part, InputCheck) for part in sanitizers):
        return "no claim"
    if bare_clean - bare <= _NO_GAIN:
        return "untested"
    return "useless" if robust <= max(bare + _NO_GAIN, bare_high) else "helps"


def in_words(verdict: Verdict, bare: float) -> str:
    """A verdict as a sentence, beside the robust accuracy of the bare model.

    >>> in_words("useless", 0.5)
    'Useless against an adaptive attacker: no clear gain against 50.0 % of the bare model.'
    """
    of = f"{percent(bare)} of the bare model"
    return {
        "useless": f"Useless against an adaptive attacker: no clear gain against {of}.",
        "helps": f"More than chance against {of}.",
        "untested": f"Untested: these attacks hardly harm the bare model ({percent(bare)}); "
        "choose a larger eps.",
        "no claim": "Claims nothing against adversarial images, which are valid ones: it refuses "
        f"what is no image. Beside it, {of}.",
    }[verdict]


def measure_sanitizer(
    model: nn.Module,
    sanitizers: Sanitizer | Sequence[Sanitizer],
    data: ImageData | Split | tuple[Any, Any],
    threat: ThreatModel,
    *,
    seed: int = 0,
    max_samples: int | None = None,
    draws: int = LEAST_DRAWS,
    attacks: Sequence[Attack] = _CASCADE,
    queries: int = 1000,
    batch_size: int = 256,
    progress: bool = False,
) -> SanitizedResult:
    """Attack a model behind sanitizers, always in five ways, and take the minimum.

    What an attacker who does not know of a sanitizer fails at says nothing about one who does
    (Athalye et al., ICML 2018; Tramer et al., NeurIPS 2020). So: images crafted on the bare model;
    gradients passed over the sanitizers; through them or their stand-ins; averaged over draws;
    and a search without gradients. Each gradient way is a cascade, in which an attack goes to
    what those before it left; each way attacks every sample that the defense classifies correctly.
    The bare model faces the same cascade and the same search.

    A randomised defense is judged by the mean of its logits over ``draws`` draws, clean and
    attacked; a success has to hold for fresh draws. Its figures then hang on ``batch_size`` too,
    as the draws do.

    Args:
        model: maps images in [0, 1] to logits; left as it was.
        sanitizers: in the order in which images pass them.
        data: images and labels: a split, a dataset (its test part), or arrays (x, y).
        threat: what the attacker may do: untargeted, linf or l2, images in [0, 1].
        seed: of the attacks and of the draws.
        max_samples: measure so many samples, the same ones as in an audit; None means all.
        draws: of a randomised defense, at least 20.
        attacks: the cascade of the gradient ways; white-box.
        queries: of the search, for each image.
        batch_size: images a batch.
        progress: show a bar on stderr if that is a terminal.

    Raises:
        UsageError: no sanitizer, or an unfit value.
        DataError: images or labels are unfit for this model.
        ModelError: the model's output is unfit or carries no gradient.

    >>> from robustann.defenses import parse_sanitizer
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64)
    >>> result = measure_sanitizer(
    ...     model, parse_sanitizer("bit-depth:bits=2"), (x, y), ThreatModel("linf", 0.2), queries=20
    ... )
    >>> [way.name for way in result.ways]
    ['transfer', 'identity', 'gradient', 'eot', 'score']
    >>> result.robust_accuracy <= min(way.robust_accuracy for way in result.ways)
    True
    """
    return attack_sanitizer(
        model,
        sanitizers,
        data,
        threat,
        seed=seed,
        max_samples=max_samples,
        draws=draws,
        attacks=attacks,
        queries=queries,
        batch_size=batch_size,
        progress=progress,
    )[0]


def attack_sanitizer(
    model: nn.Module,
    sanitizers: Sanitizer | Sequence[Sanitizer],
    data: ImageData | Split | tuple[Any, Any],
    threat: ThreatModel,
    *,
    seed: int = 0,
    max_samples: int | None = None,
    draws: int = LEAST_DRAWS,
    attacks: Sequence[Attack] = _CASCADE,
    queries: int = 1000,
    batch_size: int = 256,
    progress: bool = False,
) -> tuple[SanitizedResult, tuple[Shown, ...]]:
    """:func:`measure_sanitizer`, with the images that each attacker found, for an audit to judge.

    An attacker who is the same as another one has none of his own.
    """
    parts = (sanitizers,) if isinstance(sanitizers, Sanitizer) else tuple(sanitizers)
    defended = Sanitized(model, *parts)
    _check(threat, attacks, draws, max_samples, batch_size)
    draws = 1 if defended.deterministic else draws
    split = _split(data)
    positions = chosen_samples(len(split), max_samples)
    search = Square(queries=queries)
    asked: dict[WayName, _Asked] = {
        "transfer": _Asked(_Averaged(defended, draws), tuple(attacks)),
        "identity": _Asked(_Averaged(defended.seen_through("identity"), draws), tuple(attacks)),
        "gradient": _Asked(_Averaged(defended.seen_through("surrogate"), draws), tuple(attacks)),
        "eot": _Asked(defended.seen_through("surrogate"), tuple(attacks), draws),
        "score": _Asked(_Averaged(defended, draws), (search,)),
    }
    if defended.deterministic:
        del asked["eot"]
    bare = _Asked(model, (*attacks, search))
    batches = []
    work = len(positions) * (1 + len(asked))
    with progress_bar(work, wanted=progress, unit="images") as advance:
        for part in positions.split(batch_size):  # type: ignore[no-untyped-call]
            batch = (split.images(part).cpu(), split.labels[part], part)
            batches.append(_measure(model, defended, bare, asked, batch, threat, seed, advance))
    columns = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    found = tuple(_shown(name, columns, positions) for name in asked)
    return _result(parts, threat, positions, seed, asked, columns), found


def _shown(name: WayName, columns: dict[str, Tensor], positions: Tensor) -> Shown:
    attempted = columns["correct"]
    return Shown(
        name=shown_as(name),
        access=_ACCESS[name],
        paper=_PAPER,
        attempted=positions[attempted],
        forwards=columns[f"{name}.forwards"][attempted],
        backwards=columns[f"{name}.backwards"][attempted],
        found=positions[columns[f"{name}.success"]],
        images=columns[f"{name}.images"],
    )


def shown_as(name: str) -> str:
    """What a kind of attacker is called among the attacks of an audit.

    >>> shown_as("gradient")
    'sanitizer: gradient'
    """
    return f"sanitizer: {name}"


@dataclass(frozen=True)
class _Asked:
    """A model as one attacker sees it, and what he does."""

    model: nn.Module
    attacks: tuple[Attack, ...]
    draws: int = 1

    @property
    def shown(self) -> int:
        """Images that the defense is shown for each that the engine counts."""
        return self.model.draws if isinstance(self.model, _Averaged) else 1


class _Averaged(nn.Module):
    """The mean logits of so many draws, with the derivative of the first draw alone."""

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model = model
        self.draws = draws

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.model(x)
        if self.draws == 1:
            return first
        with torch.no_grad():
            total = first.clone()
            for _ in range(self.draws - 1):
                total += self.model(x)
        return first + (total / self.draws - first).detach()


def _check(
    threat: ThreatModel,
    attacks: Sequence[Attack],
    draws: int,
    max_samples: int | None,
    batch_size: int,
) -> None:
    if threat.targeted or threat.bounds != (0.0, 1.0) or threat.norm not in MEASURED_NORMS:
        aim = "targeted" if threat.targeted else "untargeted"
        raise UsageError(
            "expected an untargeted threat model in linf or l2 with bounds (0, 1), which all five "
            f"ways can take, got {aim}, {threat.norm}, {threat.bounds}; choose one of these"
        )
    if not attacks or any(one.access != "white-box" or one.minimum_norm for one in attacks):
        came = ", ".join(one.label for one in attacks) or "none"
        raise UsageError(
            "expected attacks within eps that follow gradients, at least one, got "
            f"{came}; leave attacks out for the usual cascade"
        )
    for one in attacks:
        one.check(threat)
    at_least("draws", draws, LEAST_DRAWS)
    at_least("batch_size", batch_size, 1)
    if max_samples is not None:
        at_least("max_samples", max_samples, 1)


def _split(data: ImageData | Split | tuple[Any, Any]) -> Split:
    if isinstance(data, ImageData):
        return data.test
    return data if isinstance(data, Split) else tensor_split(*data)


def _measure(
    model: nn.Module,
    defended: Sanitized,
    bare: _Asked,
    asked: dict[WayName, _Asked],
    batch: tuple[Tensor, Tensor, Tensor],
    threat: ThreatModel,
    seed: int,
    advance: Advance,
) -> dict[str, Tensor]:
    """What every attacker does to one batch of images, labels and positions."""
    x, labels, positions = batch
    random = SampleRandom.create(seed, positions)
    logits = predict_logits(model, x, batch_size=len(x))
    check_classes(labels, logits.shape[1])
    right = logits.argmax(1) == labels
    columns = {"bare.correct": right}
    found = _cascade(bare, x, labels, right, threat, random.fork("bare"))
    columns["bare.success"] = found["success"]
    advance(len(x), "bare model")
    logits = predict_logits(asked["score"].model, x, batch_size=len(x), seed=seed)
    right = columns["correct"] = logits.argmax(1) == labels
    for name, attacker in asked.items():
        known = model if name == "transfer" else None
        found = _cascade(attacker, x, labels, right, threat, random.fork(name), known)
        columns |= {f"{name}.{key}": column for key, column in found.items()}
        advance(len(x), name)
    return columns


def _cascade(
    asked: _Asked,
    x: Tensor,
    labels: Tensor,
    correct: Tensor,
    threat: ThreatModel,
    random: SampleRandom,
    known: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Success, forwards and backwards of each sample, the attacks going to what still stands.

    With ``known``, the attacks see that model, and the one asked is only shown their images.
    """
    success = torch.zeros_like(correct)
    forwards, backwards = torch.zeros_like(labels), torch.zeros_like(labels)
    best, margins = x.clone(), torch.full((len(x),), torch.inf)
    for place, attack in enumerate(asked.attacks):
        rows = (correct & ~success).nonzero().squeeze(1)
        if not len(rows):
            break
        streams = random.select(rows).fork(place)
        images, wanted = x[rows], labels[rows]
        if known is None:
            result = run(
                attack,
                asked.model,
                images,
                wanted,
                threat,
                random=streams,
                known_correct=True,
                best=(best[rows], margins[rows]) if place else None,
                draws=asked.draws,
            )
        else:
            result = transfer(
                attack, known, asked.model, images, wanted, threat, random=streams
            ).target
        success[rows] = result.success
        best[rows], margins[rows] = result.adversarial, result.margin
        forwards[rows] += result.forwards * asked.shown
        backwards[rows] += result.backwards
    return {
        "success": success,
        "forwards": forwards,
        "backwards": backwards,
        # Of the broken alone: those of all, five times, would fill the memory.
        "images": best[success],
    }


def _result(
    parts: tuple[Sanitizer, ...],
    threat: ThreatModel,
    positions: Tensor,
    seed: int,
    asked: dict[WayName, _Asked],
    columns: dict[str, Tensor],
) -> SanitizedResult:
    correct, count = columns["correct"], len(positions)
    ways = []
    broken_by: list[WayName | None] = [None] * count
    for name in _WORDS:
        source: WayName = name if name in asked else "gradient"
        success = columns[f"{source}.success"]
        spent = [int(columns[f"{source}.{key}"].sum()) for key in ("forwards", "backwards")]
        for row in success.nonzero().squeeze(1).tolist():
            broken_by[row] = broken_by[row] or name
        accuracy, interval = _rate(correct & ~success)
        ways.append(
            Way(
                name=name,
                words=_WORDS[name],
                attacks=tuple(attack.label for attack in asked[source].attacks),
                robust_accuracy=accuracy,
                interval=interval,
                attempted=int(correct.sum()),
                succeeded=int(success.sum()),
                success=tuple(success.tolist()),
                forwards=spent[0] if source == name else 0,
                backwards=spent[1] if source == name else 0,
                same_as=None if source == name else source,
            )
        )
    stands = torch.tensor([name is None for name in broken_by])
    robust, interval = _rate(correct & stands)
    bare, bare_interval = _rate(columns["bare.correct"] & ~columns["bare.success"])
    clean, clean_interval = _rate(correct)
    bare_clean, bare_clean_interval = _rate(columns["bare.correct"])
    verdict = judged(
        parts, robust=robust, bare=bare, bare_high=bare_interval.high, bare_clean=bare_clean
    )
    return SanitizedResult(
        sanitizers=tuple(
            SanitizerFacts(
                name=part.name,
                label=part.label,
                paper=part.paper,
                hyperparameters=part.hyperparameters,
                helps=part.helps,
                limits=part.limits,
                differentiable=part.differentiable,
                deterministic=part.deterministic,
            )
            for part in parts
        ),
        threat=Threat(
            norm=threat.norm,
            eps=threat.eps,
            eps_text=threat.eps_text,
            bounds=threat.bounds,
            targeted=threat.targeted,
            words=threat.words(),
        ),
        n=count,
        seed=seed,
        draws=asked["eot"].draws if "eot" in asked else 1,
        robust_accuracy=robust,
        interval=interval,
        verdict=verdict,
        bare_robust_accuracy=bare,
        bare_interval=bare_interval,
        clean_accuracy=clean,
        clean_interval=clean_interval,
        bare_clean_accuracy=bare_clean,
        bare_clean_interval=bare_clean_interval,
        ways=tuple(ways),
        index=tuple(positions.tolist()),
        clean_correct=tuple(correct.tolist()),
        broken_by=tuple(broken_by),
    )


def _rate(hits: Tensor) -> tuple[float, Interval]:
    return float(hits.double().mean()), Interval.of_rate(int(hits.sum()), len(hits))
