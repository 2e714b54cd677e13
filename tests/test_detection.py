"""Detection by feature squeezing: the score, the threshold, and attackers who know of it."""

from __future__ import annotations

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustann.attacks import MM, PGD
from robustann.attacks.engine import predict_logits, run
from robustann.defenses.detection import (
    DetectionResult,
    FeatureSqueezing,
    calibrate,
    evaluate_detector,
)
from robustann.defenses.sanitizers import BitDepth, GaussianNoise, Jpeg, Median, Sanitizer
from robustann.errors import DataError, UsageError
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel

LINF = ThreatModel("linf", 0.12)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return networks.digits()


@pytest.fixture(scope="module")
def classifier(digits: tuple[Tensor, Tensor]) -> nn.Module:
    return networks.perceptron()


@pytest.fixture(scope="module")
def squeezers() -> list[Sanitizer]:
    return [Jpeg(quality=75), BitDepth(bits=3)]


@pytest.fixture(scope="module")
def result(
    digits: tuple[Tensor, Tensor], classifier: nn.Module, squeezers: list[Sanitizer]
) -> DetectionResult:
    x, labels = digits
    return evaluate_detector(
        classifier,
        squeezers,
        x[1200:1400],
        x[1400:1470],
        labels[1400:1470],
        LINF,
        adaptive=(MM(steps=40), PGD(loss="margin")),
    )


def test_the_score_is_the_furthest_softmax(
    digits: tuple[Tensor, Tensor], classifier: nn.Module, squeezers: list[Sanitizer]
) -> None:
    x = digits[0][1400:1450]
    with torch.no_grad():
        plain = classifier(x).softmax(1).numpy()
        moved = [np.abs(plain - classifier(s(x)).softmax(1).numpy()).sum(1) for s in squeezers]
    assert (moved[0] > moved[1]).any()
    assert (moved[1] > moved[0]).any()
    detector = FeatureSqueezing(classifier, squeezers, threshold=0.1)
    assert np.allclose(detector.scores(x).numpy(), np.maximum(*moved), atol=1e-5)
    assert torch.equal(detector.scores(x, batch_size=7), detector.scores(x))
    assert torch.equal(detector.detects(x), detector.scores(x) > 0.1)


def test_the_last_class_says_refused(
    digits: tuple[Tensor, Tensor], classifier: nn.Module, squeezers: list[Sanitizer]
) -> None:
    x = digits[0][1400:1600]
    scores = FeatureSqueezing(classifier, squeezers, threshold=0.0).scores(x)
    detector = FeatureSqueezing(classifier, squeezers, threshold=float(scores.quantile(0.7)))
    logits = predict_logits(detector, x)
    assert logits.shape == (200, 11)
    assert torch.allclose(logits[:, :10], classifier(x), atol=1e-5)
    refused = logits.argmax(1) == 10
    assert torch.equal(refused, detector.detects(x))
    assert 50 < int(refused.sum()) < 70


def test_an_attacker_sees_the_score_through_squeezers_without_gradient(
    digits: tuple[Tensor, Tensor], classifier: nn.Module, squeezers: list[Sanitizer]
) -> None:
    x = digits[0][1400:1408].clone().requires_grad_()
    logits = FeatureSqueezing(classifier, squeezers, threshold=0.0)(x)
    score = logits[:, 10] - logits[:, :10].amax(1)
    (gradient,) = torch.autograd.grad(score.sum(), x)
    downhill = (x - 0.01 * gradient.sign()).clamp(0, 1).detach()
    detector = FeatureSqueezing(classifier, squeezers, threshold=0.0)
    assert detector.scores(downhill).mean() < 0.8 * detector.scores(x.detach()).mean()


def test_the_threshold_gives_the_stated_rate(
    digits: tuple[Tensor, Tensor], classifier: nn.Module, squeezers: list[Sanitizer]
) -> None:
    validation = digits[0][1000:1400]
    for fpr in (0.01, 0.05, 0.29, 0.5):
        detector = FeatureSqueezing.fit(classifier, squeezers, validation, fpr=fpr)
        assert int(detector.detects(validation).sum()) == round(fpr * 400)
    # Ties must not lift the rate.
    assert calibrate(torch.tensor([0.0] * 90 + [1.0] * 10), 0.05) == 1.0
    with pytest.raises(DataError, match=r"at least 20 clean images.*got 19"):
        calibrate(torch.rand(19), 0.05)
    with pytest.raises(UsageError, match="between 0 and 1, got 1"):
        calibrate(torch.rand(19), 1.0)


def test_the_rates_and_areas_are_scikit_learns(result: DetectionResult) -> None:
    from sklearn.metrics import auc, roc_auc_score

    assert result.validation_fpr == 0.05
    clean = np.array(result.clean_scores)
    assert result.test_fpr == pytest.approx((clean > result.threshold).mean())
    for found in (result.ordinary, result.adaptive):
        fooled = np.array([score for score in found.scores if score is not None])
        truth = np.r_[np.zeros(len(clean)), np.ones(len(fooled))]
        expected = roc_auc_score(truth, np.r_[clean, fooled])
        assert found.auc == pytest.approx(expected, abs=1e-4)
        # The share of pairs in which the fooled image scores higher.
        pairs = (fooled[:, None] > clean).mean()
        assert found.auc == pytest.approx(pairs, abs=1e-3)
        assert auc(found.false_positive_rates, found.true_positive_rates) == pytest.approx(
            expected, abs=1e-4
        )
        assert found.fooled == len(fooled) <= found.attacked
        assert found.evaded == (fooled <= result.threshold).sum()


def test_who_knows_of_the_detector_evades_it(result: DetectionResult) -> None:
    assert result.clean_accuracy > 0.9
    assert result.ordinary.fooled > 35
    assert result.ordinary.auc is not None
    assert result.adaptive.auc is not None
    assert result.ordinary.auc > 0.8
    assert result.adaptive.auc < result.ordinary.auc - 0.2
    assert result.ordinary.evaded < 0.5 * result.ordinary.fooled
    assert result.adaptive.evaded > 2 * result.ordinary.evaded
    assert result.adaptive.evaded > 0.5 * result.adaptive.attacked
    low, high = result.interval
    assert low < result.robust_accuracy < high


def test_no_attacker_who_knows_more_does_worse(result: DetectionResult) -> None:
    ordinary, adaptive = result.ordinary.scores, result.adaptive.scores
    for known, knowing in zip(ordinary, adaptive, strict=True):
        assert known is None or (knowing is not None and knowing <= known)


def test_words_begin_with_the_adaptive_attacker(result: DetectionResult) -> None:
    words = str(result)
    assert words.startswith(f"Robust accuracy at most {100 * result.robust_accuracy:.1f} %")
    assert words.index("evades it too") < words.index("does not know of it")
    assert "jpeg, bit-depth:bits=3" in words
    assert DetectionResult.model_validate_json(result.model_dump_json()) == result


def test_the_engine_judges_evasion_by_itself(
    digits: tuple[Tensor, Tensor], classifier: nn.Module, squeezers: list[Sanitizer]
) -> None:
    x, labels = digits[0][1400:1450], digits[1][1400:1450]
    detector = FeatureSqueezing.fit(classifier, squeezers, digits[0][1000:1400])
    wanted = (labels + 1) % 10
    found = run(
        PGD(steps=30, loss="margin"),
        detector,
        x,
        wanted,
        ThreatModel("linf", 0.25, targeted=True),
        random=SampleRandom.create(0, torch.arange(50)),
    )
    assert found.success.sum() > 10
    hit = found.adversarial[found.success]
    assert torch.equal(predict_logits(classifier, hit).argmax(1), wanted[found.success])
    assert not detector.detects(hit).any()


def test_nothing_to_detect(classifier: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    x = digits[0][1400:1430]
    labels = (predict_logits(classifier, x).argmax(1) + 1) % 10
    found = evaluate_detector(classifier, [Median(size=2)], x, x, labels, LINF, fpr=0.1)
    assert found.clean_accuracy == found.robust_accuracy == 0
    for attacked in (found.ordinary, found.adaptive):
        assert (attacked.attacked, attacked.fooled, attacked.evaded) == (0, 0, 0)
        assert attacked.auc is None
    assert "no AUC" in found.words


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"squeezers": []}, "at least one squeezer.*got none"),
        ({"squeezers": [GaussianNoise()]}, "drawing at random, got GaussianNoise"),
        ({"threat": ThreatModel("linf", 0.1, targeted=True)}, "untargeted.*got targeted"),
        ({"threat": ThreatModel("l0", 3)}, "norms of pgd"),
        ({"adaptive": ()}, "at least one adaptive attack, got none"),
        ({"targets": 0}, "targets >= 1"),
        ({"fpr": 0.0}, "between 0 and 1, got 0"),
    ],
)
def test_unfit_values_are_refused(
    options: dict[str, object], said: str, classifier: nn.Module
) -> None:
    x, labels = torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64)
    usual = {"squeezers": [Median()], "threat": LINF, "adaptive": (MM(steps=2),)}
    with pytest.raises(UsageError, match=said):
        evaluate_detector(
            classifier,
            validation=x,
            x=x,
            labels=labels,
            **{**usual, **options},  # type: ignore[arg-type]
        )


def test_a_threshold_out_of_range_is_refused(classifier: nn.Module) -> None:
    with pytest.raises(UsageError, match="threshold from 0 to 2, got 3"):
        FeatureSqueezing(classifier, [Median()], threshold=3.0)
