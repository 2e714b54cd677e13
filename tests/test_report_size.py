"""How large a page grows, and what it takes to write it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up import make_result
from torch import Tensor, nn

from robustann.auditing import Cases
from robustann.reports import render
from robustann.reports.explain import explain


def photos(n: int) -> Tensor:
    """As detailed as photographs are: structure of every scale, falling with it, and some noise."""
    generator = torch.Generator().manual_seed(0)
    found = 0.03 * torch.randn(n, 3, 224, 224, generator=generator)
    for side in (7, 14, 28, 56, 112):
        coarse = torch.randn(n, 3, side, side, generator=generator) * (7 / side) ** 0.7
        found += nn.functional.interpolate(coarse, size=224, mode="bicubic")
    return torch.sigmoid(found)


class Sharp(nn.Module):
    """Its maps are as restless as those of a deep network."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 7, stride=2, padding=3)
        self.last = nn.Linear(4 * 16, 12)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.first(x))
        return self.last(nn.functional.adaptive_max_pool2d(features, 4).flatten(1))


def test_twelve_samples_of_224_pixels_stay_under_three_megabytes(monkeypatch) -> None:
    # Fewer steps of integrated gradients: it is the pictures that count here.
    methods = sys.modules["robustann.reports.explain.methods"]
    monkeypatch.setattr(methods, "IG_STEPS", 2)
    monkeypatch.setattr(methods, "IG_MOST", 2)
    monkeypatch.setattr(sys.modules["robustann.reports.explain"], "IMAGES", 1)
    torch.manual_seed(0)
    clean = photos(12)
    label = torch.arange(12)
    signs = torch.randint(0, 2, clean.shape) * 2 - 1
    cases = Cases(
        index=label, label=label, clean=clean, attacked=(clean + 8 / 255 * signs).clamp(0, 1),
        clean_prediction=label, attacked_prediction=(label + 1) % 12,
        clean_confidence=torch.ones(12), attacked_confidence=torch.ones(12),
        success=torch.ones(12, dtype=torch.bool), distance=torch.full((12,), 8 / 255),
        attack=["pgd"] * 12, eps=8 / 255, bounds=(0.0, 1.0),
    )  # fmt: skip
    names = [f"class {i}" for i in range(12)]
    found = explain(Sharp(), cases, names, 0)
    assert len(found.gallery) == 12
    assert all(len(sample.path) == 9 and len(sample.attributions) == 3 for sample in found.gallery)
    page = render(make_result(names, explanation=found))
    assert len(page.encode()) < 3_000_000
    # Not because nothing is shown.
    assert page.count("data:image/webp") == 12 * (3 + 6 + 9)


def test_ten_thousand_samples_are_rendered_without_a_model(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    result = make_result([f"class {i}" for i in range(100)], n=10_000, explanation=None)
    path.write_text(result.to_json(), encoding="utf-8")
    program = (
        "import json, sys; from robustann.results import AuditResult; "
        "AuditResult.load(sys.argv[1]).save_report(sys.argv[2]); "
        "print(json.dumps([name for name in ('torch', 'captum') if name in sys.modules]))"
    )
    out = tmp_path / "report.html"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(out)],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout) == []
    assert len(out.read_bytes()) < 500_000


@pytest.mark.parametrize("n", [7, 400])
def test_calibration_equals_scikit_learn(n: int) -> None:
    import numpy as np
    from sklearn.calibration import calibration_curve

    from robustann.reports.views import calibration

    generator = np.random.default_rng(n)
    confidence = generator.random(n)
    right = generator.random(n) < confidence**2
    found = calibration(confidence.tolist(), right.tolist())
    accuracy, mean = calibration_curve(right, confidence, n_bins=15)
    assert [one.accuracy for one in found.bins] == pytest.approx(accuracy.tolist())
    assert [one.confidence for one in found.bins] == pytest.approx(mean.tolist())
    counts, _ = np.histogram(confidence, bins=15, range=(0, 1))
    assert [one.samples for one in found.bins] == [k for k in counts.tolist() if k]
    wanted = (counts[counts > 0] * np.abs(accuracy - mean)).sum() / n
    assert found.error == pytest.approx(wanted, abs=1e-6)
    assert (found.confidence, found.accuracy) == pytest.approx((confidence.mean(), right.mean()))


def test_intervals_and_mcnemar_equal_statsmodels() -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    from robustann.hardening.comparing import paired
    from robustann.results import Interval

    for hits, n in ((0, 10), (3, 10), (500, 1000), (1000, 1000)):
        found = Interval.of_rate(hits, n)
        wanted = proportion.proportion_confint(hits, n, method="wilson")
        assert (found.low, found.high) == pytest.approx(wanted, abs=1e-6)
    before = [True] * 30 + [False] * 20
    after = [True] * 22 + [False] * 8 + [True] * 3 + [False] * 17
    one = paired(before, after)
    table = [[one.both, one.lost], [one.gained, one.neither]]
    assert one.p == pytest.approx(tables.mcnemar(table, exact=True).pvalue, rel=1e-5)
