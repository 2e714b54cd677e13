"""Where a model jumps its gradient may be right, and says nothing of what lies behind."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

import robustann as ra
from robustann.attacks.engine import predict_logits
from robustann.trust import diagnose
from robustann.trust.jumps import jumps, ways

THREAT = ra.ThreatModel("linf", eps=0.2)


class NearestImage(nn.Module):
    """Mixes the nearest of stored images into what it is given (a projection onto a "manifold")."""

    def __init__(self, inner: nn.Module, images: Tensor, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share
        self.register_buffer("images", images)

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), self.images.flatten(1)).argmin(1)
        return self.inner((1 - self.share) * x + self.share * self.images[nearest])


def finding(result, check: str):
    return next(one for one in result.findings if one.check == check)


def nearest_image(model, digits: ra.ImageData, share: float = 0.7) -> NearestImage:
    return NearestImage(model, digits.train.images(slice(0, len(digits.train))), share)


@pytest.mark.parametrize("height", [0.0, 0.2, 1.5])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_the_height_of_a_step_is_found(height, norm):
    def answer(x: Tensor) -> Tensor:
        first = x.flatten(1).sum(1)
        # A slope, and somewhere on it a step.
        return torch.stack([3 * first + height * (first > 2.1), torch.zeros_like(first)], 1)

    x = torch.full((6, 1, 2, 2), 0.5)
    x[3:] = 0.55
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    threat = ra.ThreatModel(norm, eps={"linf": 0.1, "l2": 0.2, "l1": 0.4, "l0": 4}[norm])
    ends = ways(x, labels, torch.ones_like(x), threat)
    found = jumps(answer, x, [*ends.values()])
    spread = answer(x).diff(dim=1).abs().median().item()
    if norm == "l0":
        # There is no way up: on the way to the others.
        assert found[0].item() == pytest.approx(height / spread, abs=1e-3)
        return
    below = answer(x[:1]).diff(dim=1).abs().item()
    assert found[:3].tolist() == pytest.approx([height / below] * 3, abs=0.06 * height + 1e-3)
    assert found[3:].max() < 1e-2 or height > 0


class Half(nn.Module):
    """Computes in bfloat16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = copy.deepcopy(inner).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.bfloat16())


def pooling(_: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


CONTINUOUS = {
    "bare": lambda inner: inner,
    "in half precision": Half,
    "max-pooling": pooling,
    **{name: ZOO[name].make for name in ("saturated", "softmax inside", "batch statistics")},
}


@pytest.mark.parametrize("eps", [0.05, 0.3])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_what_is_continuous_does_not_jump(name, eps, model, digits):
    subject = CONTINUOUS[name](model)
    x = digits.test.images(slice(0, 48))
    labels = predict_logits(subject, x).argmax(1)
    one = finding(diagnose(subject, x, labels, ra.ThreatModel("linf", eps)), "discontinuous")
    # In half precision the gradient may be too coarse to begin with.
    assert (one.verdict, one.value) == ("pass", 0) or "half" in name
    assert one.verdict != "fail"


def test_a_nearest_neighbour_inside_is_found_and_searched_and_not_believed(model, digits):
    defended = nearest_image(model, digits)
    asked = {"max_samples": 32, "explain": False, "curve": False}
    blind = ra.audit(defended, digits, THREAT, "quick", **asked, trust=False)
    result = ra.audit(defended, digits, THREAT, "quick", **asked)
    found = finding(result, "discontinuous")
    assert found.verdict == "fail"
    # Nothing else about the gradient looks wrong.
    for check in ("gradient-missing", "gradient-mismatch", "gradient-shattered"):
        assert finding(result, check).verdict == "pass"
    added = {one.label: one.added for one in result.attacks if "(remedy)" in one.label}
    assert {"square:queries=1000 (remedy)", "rays:queries=1000 (remedy)"} <= {*added}
    assert result.robust_accuracy <= blind.robust_accuracy - 0.1
    # The last of them still broke some.
    assert added["rays:queries=1000 (remedy)"] > 1
    assert "more would break more" in found.explanation
    assert not result.believable


def test_jumps_without_consequence_are_answered(model, digits):
    class Flicker(nn.Module):
        """All logits of the losing classes jump together, far below the leading ones."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            logits = self.inner(x)
            low = logits.argmin(1, keepdim=True)
            wave = (20 * x.flatten(1).sum(1, keepdim=True)).floor() % 2
            return logits.scatter_add(1, low, -wave * logits.detach().abs().amax(1, keepdim=True))

    asked = {"max_samples": 24, "explain": False, "curve": False}
    result = ra.audit(Flicker(), digits, ra.ThreatModel("linf", 0.1), "quick", **asked)
    found = finding(result, "discontinuous")
    assert found.verdict == "fail"
    assert "went through searches" in (found.remedy or "")
    assert result.believable


def test_nothing_is_asked_where_nothing_may_change(model, digits):
    x, labels = digits.test.images(slice(0, 8)), digits.test.labels[:8]
    assert finding(diagnose(model, x, labels, ra.ThreatModel("linf", 0)),
                   "discontinuous").verdict == "not run"  # fmt: skip
    found = finding(diagnose(model, x, labels, ra.ThreatModel("l0", 3)), "discontinuous")
    assert found.verdict == "pass"
    assert not math.isnan(found.value or 0.0)
    assert "On the way to an image of another class a logit" in found.explanation


@pytest.mark.parametrize(("norm", "eps", "verdict"), [("linf", 0.1, "pass"), ("l0", 3, "not run")])
def test_without_another_class_there_is_one_way_less(norm, eps, verdict, model, digits):
    rows = (digits.test.labels == 3).nonzero().squeeze(1)[:8]
    x, labels = digits.test.images(rows), digits.test.labels[rows]
    found = finding(diagnose(model, x, labels, ra.ThreatModel(norm, eps)), "discontinuous")
    assert found.verdict == verdict
    assert "an image of another class" not in found.explanation


class Step(nn.Module):
    """A plane with a step."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.flatten(1).sum(1)
        return torch.stack([3 - total - 2 * (total > 1.9), total], 1)


@pytest.mark.parametrize(("near", "verdict"), [(1, "pass"), (2, "fail")])
def test_one_image_alone_does_not_make_a_model_jump(near, verdict):
    x = torch.full((8, 1, 2, 2), 0.05)
    x[:near] = 0.5
    labels = Step()(x).argmax(1)
    x[:near] -= torch.arange(near).view(-1, 1, 1, 1) / 100
    found = finding(diagnose(Step(), x, labels, ra.ThreatModel("linf", 0.1)), "discontinuous")
    assert (found.verdict, found.value) == (verdict, near / 8)
