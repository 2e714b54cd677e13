"""Common corruptions as a control within an audit: counted, repeatable, no part of the headline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustann as ra
from robustann.attacks.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from robustann.attacks.engine import predict_logits
from robustann.auditing import AuditConfig, runner
from robustann.auditing import corruptions as measuring
from robustann.auditing.corruptions import measure_corruptions
from robustann.data import ImageData, TensorSplit
from robustann.defenses.sanitizers import parse_sanitizer
from robustann.results import AuditResult, Corruptions
from robustann.rng import SampleRandom

THREAT = ra.ThreatModel("linf", 0.05)
ASKED: dict[str, Any] = {
    "attacks": ["fgsm"], "max_samples": 40, "explain": False, "curve": False, "trust": False,
    "seed": 2,
}  # fmt: skip


def figures(found: Corruptions | None) -> dict[str, list[float]]:
    assert found is not None
    return {one.kind: [level.accuracy for level in one.levels] for one in found.kinds}


def by_hand(model: nn.Module, digits: ImageData, result: AuditResult) -> dict[str, list[float]]:
    """One image at a time."""
    index = torch.tensor(result.clean_samples.index)
    x, labels = digits.test.images(index), digits.test.labels[index]
    found: dict[str, list[float]] = {}
    for kind in CORRUPTIONS:
        found[kind] = []
        for severity in SEVERITIES:
            one = Corruption(kind=kind, severity=severity)
            right = 0
            for place in range(len(index)):
                random = SampleRandom.create(2, index[place, None]).fork("corruptions")
                image = one(x[place, None], random.fork(one.label))
                right += int(predict_logits(model, image).argmax() == labels[place])
            found[kind].append(round(right / len(index), 6))
    return found


@pytest.fixture(scope="module")
def audited(model_file: Path, digits: ImageData) -> AuditResult:
    return ra.audit(ra.load_model(model_file), digits, THREAT, corruptions=True, **ASKED)


def test_the_figures_are_those_of_the_audited_samples_one_by_one(
    model: nn.Module, digits: ImageData, audited: AuditResult
) -> None:
    found = audited.corruptions
    assert found is not None
    assert figures(found) == by_hand(model, digits, audited)
    every = [level for one in found.kinds for level in one.levels]
    assert found.mean_accuracy == pytest.approx(sum(one.accuracy for one in every) / 25, abs=1e-5)
    assert found.forwards == 25 * 40
    for level in every:
        interval = ra.results.Interval.of_rate(round(level.accuracy * 40), 40)
        assert level.interval == interval
    # They do something: the worst noise or blur costs this model more than a sample.
    assert min(one.accuracy for one in every) < audited.clean_accuracy - 0.05
    assert found.not_measured == ()


def test_nothing_else_of_the_result_hangs_on_them(
    model: nn.Module, digits: ImageData, audited: AuditResult
) -> None:
    without = ra.audit(model, digits, THREAT, **ASKED)
    assert without.corruptions is None
    assert "corruptions" not in without.provenance.config
    assert audited.provenance.config["corruptions"] is True
    assert audited.worst_case == without.worst_case
    assert audited.attacks == without.attacks
    assert audited.propagations == without.propagations + 25 * 40


def test_the_batch_changes_nothing(
    model: nn.Module, digits: ImageData, audited: AuditResult
) -> None:
    for size in (1, 7):
        again = ra.audit(model, digits, THREAT, corruptions=True, batch_size=size, **ASKED)
        assert again.corruptions == audited.corruptions


def test_where_memory_runs_out_the_halves_say_the_same(
    model: nn.Module, digits: ImageData, audited: AuditResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = measuring.corruption_accuracy

    def small_memory(model: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(x) > 12:
            raise torch.OutOfMemoryError("too much")
        return genuine(model, x, *args, **kwargs)

    monkeypatch.setattr(measuring, "corruption_accuracy", small_memory)
    again = ra.audit(model, digits, THREAT, corruptions=True, **ASKED)
    assert again.corruptions == audited.corruptions


def test_a_stopped_and_a_shared_audit_say_the_same(
    model: nn.Module,
    digits: ImageData,
    audited: AuditResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {**ASKED, "corruptions": True, "batch_size": 16, "state": tmp_path / "state"}

    def stop(*args: Any, **kwargs: Any) -> Corruptions:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(runner, "measure_corruptions", stop)
        ra.audit(model, digits, THREAT, **asked)
    assert ra.audit(model, digits, THREAT, **asked).corruptions == audited.corruptions
    shared = {**asked, "state": tmp_path / "shared", "shared": True}
    first, second = (ra.audit(model, digits, THREAT, **shared) for _ in range(2))
    assert first.corruptions == second.corruptions == audited.corruptions


def test_the_same_samples_go_through_the_sanitizers_too(
    model: nn.Module, digits: ImageData, audited: AuditResult
) -> None:
    behind = nn.Sequential(parse_sanitizer("gaussian:sigma=2"), model)
    few = {**ASKED, "max_samples": 16}
    result = ra.audit(behind, digits, THREAT, corruptions=True, **few)
    assert figures(result.corruptions) == by_hand(behind, digits, result)
    assert figures(result.corruptions) != figures(audited.corruptions)


def test_a_randomised_model_answers_in_the_mean_of_draws(
    digits: ImageData, model: nn.Module
) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.model(x + 0.3 * torch.randn_like(x))
            return answer

    positions = torch.arange(64)
    one, many = (
        measure_corruptions(Noisy(), digits.test, positions, draws=draws) for draws in (1, 20)
    )
    assert (one.forwards, many.forwards) == (25 * 64, 20 * 25 * 64)
    assert many.mean_accuracy is not None
    assert one.mean_accuracy is not None
    assert many.mean_accuracy > one.mean_accuracy
    assert measure_corruptions(Noisy(), digits.test, positions, draws=20) == many


def test_what_cannot_be_measured_says_why_and_loses_nothing_else() -> None:
    class Fragile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            # The last image when it is brighter, and any without contrast, make it overflow.
            flat = x.flatten(1)
            bad = (flat.mean(1) > 0.45) | (flat.std(1) < 0.018)
            return flat[:, :3].masked_fill(bad[:, None], torch.inf)

    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.rand(20, 4, 6, 6, generator=generator)
    x[-1] *= 0.7 / 0.3
    split = TensorSplit(x, torch.zeros(20, dtype=torch.int64))
    found = [
        measure_corruptions(Fragile(), split, torch.arange(20), batch_size=size) for size in (3, 20)
    ]
    assert found[0] == found[1]
    assert found[0].not_measured == (
        "brightness: the model gave no finite logits",
        "contrast: the model gave no finite logits",
        "jpeg: images of 4 channels do not allow it",
    )
    assert [*figures(found[0])] == ["gaussian_noise", "gaussian_blur"]
    assert found[0].forwards == 20 * 5 * 2


def test_the_estimate_tells_them(model: nn.Module, digits: ImageData) -> None:
    def told(*, corruptions: bool) -> int:
        config = AuditConfig(
            threat=THREAT, preset="quick", max_samples=30, explain=False, corruptions=corruptions
        )
        audit = runner.Audit(config)
        return audit.estimate(model, digits.test, class_names=digits.class_names).propagations

    assert told(corruptions=True) == told(corruptions=False) + 25 * 30


def test_json_there_and_back_and_of_older_results(audited: AuditResult, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(audited.to_json(), encoding="utf-8")
    assert AuditResult.load(path) == audited
    content = json.loads(audited.to_json())
    del content["corruptions"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert AuditResult.load(path).corruptions is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda found: found.update(mean_accuracy=0.123), "expected a mean accuracy of"),
        (lambda found: found.update(mean_accuracy=None), "where, and only where"),
        (lambda found: found["kinds"].append(found["kinds"][0]), "each corruption once"),
        (lambda found: found["kinds"][0]["levels"].reverse(), "severities that rise"),
        (lambda found: found["kinds"][0]["levels"][0].update(accuracy=1.5), "less than or equal"),
    ],
)
def test_what_no_audit_yields_is_refused(
    audited: AuditResult, tmp_path: Path, change: Any, match: str
) -> None:
    content = json.loads(audited.to_json())
    change(content["corruptions"])
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ra.DataError, match=match):
        AuditResult.load(path)
