"""Sanitizers measured: five ways, the minimum first, averages where something is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import networks
import pytest
import torch
from torch import Tensor, nn

from robustann.attacks import MM, Square
from robustann.data import load_data
from robustann.defenses.sanitizers import BitDepth, Median, Sanitizer, parse_sanitizer
from robustann.errors import DataError, UsageError
from robustann.hardening.sanitized import SanitizedResult, measure_sanitizer
from robustann.threat import ThreatModel

WAYS = ["transfer", "identity", "gradient", "eot", "score"]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return networks.digits()


@pytest.fixture(scope="module")
def classifier(digits: tuple[Tensor, Tensor]) -> nn.Module:
    return networks.perceptron()


@pytest.fixture(scope="module")
def quantised(digits: tuple[Tensor, Tensor], classifier: nn.Module) -> SanitizedResult:
    held_out = digits[0][1400:1500], digits[1][1400:1500]
    return measure_sanitizer(
        classifier, BitDepth(bits=2), held_out, ThreatModel("l2", 0.45), queries=150
    )


def test_a_quantiser_fools_only_those_who_do_not_know_of_it(quantised: SanitizedResult) -> None:
    assert quantised.clean_accuracy > 0.85
    assert quantised.bare_clean_accuracy - quantised.bare_robust_accuracy > 0.3
    # Whoever looks at transfer alone sees a defense ...
    transferred = quantised.way("transfer").robust_accuracy
    assert transferred > quantised.bare_robust_accuracy + 0.05
    assert transferred > quantised.robust_accuracy + 0.2
    # ... and there is none.
    assert quantised.robust_accuracy <= quantised.bare_robust_accuracy + 0.02
    assert quantised.verdict == "useless"


def test_the_headline_is_the_minimum_sample_by_sample(quantised: SanitizedResult) -> None:
    assert [way.name for way in quantised.ways] == WAYS
    correct = torch.tensor(quantised.clean_correct)
    fallen = torch.tensor([way.success for way in quantised.ways])
    assert not (fallen & ~correct).any()
    left = correct & ~fallen.any(0)
    assert quantised.robust_accuracy == pytest.approx(float(left.double().mean()), rel=1e-5)
    assert quantised.interval.low < quantised.robust_accuracy < quantised.interval.high
    for row, name in enumerate(quantised.broken_by):
        broke = [way.name for way in quantised.ways if way.success[row]]
        assert name == (broke[0] if broke else None)
    for way in quantised.ways:
        assert way.attempted == int(correct.sum())
        assert way.succeeded == sum(way.success)
        assert way.robust_accuracy == pytest.approx((way.attempted - way.succeeded) / quantised.n)
        assert quantised.robust_accuracy <= way.robust_accuracy


def test_words_say_the_minimum_before_anything_else(quantised: SanitizedResult) -> None:
    words = str(quantised)
    assert words.startswith(f"Robust accuracy {100 * quantised.robust_accuracy:.1f} %")
    for later in ("Useless against an adaptive attacker", "transfer", "identity", "score"):
        assert words.index(later) > words.index("minimum")
    assert "bit-depth:bits=2" in words
    assert f"{100 * quantised.bare_robust_accuracy:.1f} % of the bare model" in words


def test_json_there_and_back(quantised: SanitizedResult) -> None:
    again = SanitizedResult.model_validate_json(quantised.model_dump_json())
    assert again == quantised
    assert again.sanitizers[0].hyperparameters == {"bits": 2}
    assert again.sanitizers[0].limits == BitDepth.limits


def test_where_nothing_is_drawn_averaging_costs_nothing(quantised: SanitizedResult) -> None:
    eot, gradient = quantised.way("eot"), quantised.way("gradient")
    assert eot.same_as == "gradient"
    assert eot.success == gradient.success
    assert eot.forwards == eot.backwards == 0 < gradient.forwards
    assert quantised.draws == 1
    assert quantised.way("transfer").backwards == quantised.way("score").backwards == 0


def test_the_result_is_the_same_whatever_the_batch(
    digits: tuple[Tensor, Tensor], classifier: nn.Module
) -> None:
    held_out = digits[0][1400:1440], digits[1][1400:1440]
    flags = [module.training for module in classifier.modules()]
    first, second = (
        measure_sanitizer(
            classifier,
            [Median(size=2), BitDepth(bits=3)],
            held_out,
            ThreatModel("linf", 0.1),
            attacks=(MM(steps=5),),
            queries=10,
            batch_size=size,
        )
        for size in (7, 40)
    )
    assert first == second
    assert [part.name for part in first.sanitizers] == ["median", "bit-depth"]
    assert flags == [module.training for module in classifier.modules()]


def test_the_same_samples_as_an_audit(classifier: nn.Module) -> None:
    from robustann.auditing import chosen_samples

    data = load_data("digits")
    result = measure_sanitizer(
        classifier,
        parse_sanitizer("gaussian:sigma=0.4"),
        data,
        ThreatModel("linf", 0.1),
        max_samples=11,
        attacks=(MM(steps=3),),
        queries=5,
    )
    assert list(result.index) == chosen_samples(len(data.test), 11).tolist()


def test_a_defense_that_holds_is_said_to_help() -> None:
    class Counts(nn.Module):
        """Which of the two halves of an image is brighter."""

        def forward(self, x: Tensor) -> Tensor:
            return 5 * x.flatten(1).unflatten(1, (2, -1)).sum(2)

    # Black and white, each half at most one pixel brighter: without rounding easily turned over.
    x = torch.zeros(40, 1, 4, 4)
    labels = torch.arange(40) % 2
    x[torch.arange(40), 0, 2 * labels, 0] = 1.0
    result = measure_sanitizer(
        Counts(), BitDepth(bits=1), (x, labels), ThreatModel("linf", 0.3), queries=50
    )
    assert result.bare_robust_accuracy == 0
    assert result.robust_accuracy == 1
    assert result.verdict == "helps"
    assert all(way.succeeded == 0 for way in result.ways)


@dataclass(kw_only=True, eq=False, repr=False)
class Blackout(Sanitizer):
    """Every fifth image comes out black."""

    name: ClassVar[str] = "blackout"
    paper: ClassVar[str] = ""
    helps: ClassVar[tuple[str, ...]] = ("nobody",)
    limits: ClassVar[tuple[str, ...]] = ("everybody",)
    differentiable: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1, 1, 1, device=x.device) >= 0.2)


def test_luck_is_no_success(digits: tuple[Tensor, Tensor], classifier: nn.Module) -> None:
    x, labels = digits[0][1400:1424], digits[1][1400:1424]
    with torch.no_grad():
        far = classifier(x).topk(2).values.diff().squeeze(1) < -5
        black = int(classifier(torch.zeros(1, 1, 8, 8)).argmax())
    chosen = far & (classifier(x).argmax(1) == labels) & (labels != black)
    assert chosen.sum() >= 10
    result = measure_sanitizer(
        classifier,
        Blackout(),
        (x[chosen], labels[chosen]),
        ThreatModel("linf", 1e-4),
        attacks=(MM(steps=8),),
        queries=15,
    )
    # One draw in five is wrong without any attack; on average none is.
    assert result.clean_accuracy == result.robust_accuracy == 1
    assert result.verdict == "untested"
    assert "choose a larger eps" in result.words
    assert "mean of 20 draws" in result.words
    n = int(chosen.sum())
    counts = {way.name: (way.forwards / n, way.backwards / n) for way in result.ways}
    assert counts["score"] == (15 * 20, 0)
    assert counts["identity"] == counts["gradient"] == (9 * 20, 8)
    assert counts["eot"] == (9 * 20, 8 * 20)
    assert result.way("eot").same_as is None


def test_a_randomised_defense_falls_on_average(
    digits: tuple[Tensor, Tensor], classifier: nn.Module
) -> None:
    result = measure_sanitizer(
        classifier,
        parse_sanitizer("noise:sigma=0.05"),
        (digits[0][1400:1424], digits[1][1400:1424]),
        ThreatModel("linf", 0.15),
        attacks=(MM(steps=10),),
        queries=20,
    )
    assert result.clean_accuracy > 0.8
    assert result.verdict == "useless"
    assert result.way("eot").succeeded > 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threat": ThreatModel("l1", 1.0)}, "linf or l2"),
        ({"threat": ThreatModel("linf", 0.1, targeted=True)}, "untargeted.*got targeted"),
        ({"threat": ThreatModel("linf", 0.1, (-1.0, 1.0))}, "bounds"),
        ({"draws": 19}, "draws >= 20, got 19"),
        ({"attacks": ()}, "at least one, got none"),
        ({"attacks": (Square(),)}, "follow gradients.*got square"),
        ({"sanitizers": []}, "at least one sanitizer"),
        ({"max_samples": 0}, "max_samples >= 1"),
    ],
)
def test_unfit_values_are_refused(
    options: dict[str, object], said: str, classifier: nn.Module
) -> None:
    usual = {"sanitizers": Median(), "threat": ThreatModel("linf", 0.1)}
    data = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UsageError, match=said):
        measure_sanitizer(classifier, data=data, **{**usual, **options})  # type: ignore[arg-type]


def test_labels_without_a_logit_are_refused(classifier: nn.Module) -> None:
    data = torch.rand(2, 1, 8, 8), torch.tensor([0, 10])
    with pytest.raises(DataError, match="labels from 0 to 9"):
        measure_sanitizer(classifier, Median(), data, ThreatModel("linf", 0.1))
