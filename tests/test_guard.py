"""The guard: it repairs what is out of range, exactly that, and says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import robustann as ra
from robustann.attacks.weights import random_bit_errors
from robustann.attacks.weights.bit_errors import error_masks, flipped
from robustann.attacks.weights.tampering import flip_bit
from robustann.data import ImageData
from robustann.defenses import WeightGuard
from robustann.errors import ModelError, UsageError
from robustann.models import tensor_digest


def test_exactly_the_values_out_of_range_are_set_to_zero() -> None:
    layer = nn.Linear(6, 1)
    layer.weight.data = torch.tensor([[-1.0, -0.5, 0.0, 0.25, 0.5, 1.0]])
    layer.bias.data.fill_(0.5)
    guard = WeightGuard.record(layer, margin=0.01)
    assert guard.ranges["weight"] == pytest.approx((-1.02, 1.02))
    assert guard.repair(layer).total == 0
    layer.weight.data = torch.tensor([[-1.01, 1.03, math.nan, -math.inf, 0.5, 1e38]])
    found = guard.repair(layer)
    assert dict(found.tensors) == {"weight": 4}
    assert found.total == 4
    assert found.checked == 7
    expected = torch.tensor([[-1.01, 0.0, 0.0, 0.0, 0.5, 0.0]])
    assert torch.equal(layer.weight.detach(), expected)
    assert layer.bias.item() == 0.5
    assert guard.repair(layer).total == 0


def test_no_zero_where_zero_is_out_of_range() -> None:
    norm = nn.BatchNorm2d(2)
    norm.running_var = torch.tensor([2.0, 3.0])  # type: ignore[assignment]
    norm.running_mean = torch.tensor([-3.0, -1.0])  # type: ignore[assignment]
    guard = WeightGuard.record(norm, margin=0)
    norm.running_var[0] = math.inf
    norm.running_mean[1] = 1e9
    norm.num_batches_tracked.fill_(10**9)
    assert dict(guard.repair(norm).tensors) == {"running_mean": 1, "running_var": 1}
    assert norm.running_var.tolist() == [2.0, 3.0]
    assert norm.running_mean.tolist() == [-3.0, -1.0]
    # Integers have no range.
    assert int(norm.num_batches_tracked) == 10**9


def test_a_model_hit_by_float32_bit_errors_works_again(model: nn.Module, digits: ImageData) -> None:
    guard = WeightGuard.record(model)
    before = tensor_digest(model)
    settings: dict[str, Any] = {"rates": (1e-3,), "seeds": 4, "bits": 32}
    broken = random_bit_errors(model, digits.test, **settings)
    mended = random_bit_errors(model, digits.test, repair=guard.repaired, **settings)
    assert broken.points[0].mean > 0.7
    assert mended.points[0].worst < mended.clean_error + 0.05
    assert mended.stored_error == mended.clean_error
    assert tensor_digest(model) == before


def test_in_place_and_as_a_copy_are_the_same_and_what_is_counted_is_what_changed(
    model: nn.Module,
) -> None:
    guard = WeightGuard.record(model, margin=0)
    hit = {}
    for name, parameter in model.named_parameters():
        (mask,) = error_masks(name, parameter.shape, rates=(1e-3,), seed=0, bits=32)
        hit[name] = flipped(parameter.detach(), mask)
    copies = guard.repaired(hit)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(hit[name])
    found = guard.repair(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, copies[name])
        # NaN differs from itself, so it counts as changed.
        changed = int((parameter != hit[name]).sum())
        assert found.tensors.get(name, 0) == changed
        low, high = guard.ranges[name]
        outside = ~((hit[name] >= low) & (hit[name] <= high))
        assert changed == int(outside.sum())
    assert found.total > 50


def test_flags_stay_and_gradients_pass_as_before() -> None:
    layer = nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    guard = WeightGuard.record(layer)
    weight = layer.weight
    layer.weight.data[0, 0] = math.nan
    guard.repair(layer)
    assert layer.weight is weight
    assert [p.requires_grad for p in layer.parameters()] == [True, False]
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None


def test_tied_weights_are_repaired() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    # Zero lies between them.
    first.weight.data.copy_(torch.tensor([[-1.0, 1.0], [0.5, -0.5]]))
    second.weight = first.weight
    model = nn.Sequential(first, second)
    guard = WeightGuard.record(model)
    first.weight.data[0, 0] = math.inf
    guard.repair(model)
    assert second.weight[0, 0].item() == 0


def test_the_file_of_a_guard_brings_back_the_same_guard(model: nn.Module, tmp_path: Path) -> None:
    guard = WeightGuard.record(model)
    guard.save(tmp_path / "guard.json")
    assert WeightGuard.load(tmp_path / "guard.json") == guard
    assert json.loads((tmp_path / "guard.json").read_text())["schema_version"] == 1


def test_a_rotten_file_can_be_read_with_a_guard(
    model: nn.Module, model_file: Path, tmp_path: Path, digits: ImageData
) -> None:
    guard = WeightGuard.record(model)
    rotten = tmp_path / "rotten.safetensors"
    rotten.with_suffix(".json").write_bytes(model_file.with_suffix(".json").read_bytes())
    # Bit 30 makes a weight below 1 huge.
    flip_bit(model_file, "net.0.weight", element=3, bit=30, out=rotten)
    with pytest.raises(ModelError, match="SHA-256"):
        ra.load_model(rotten)
    fresh = ra.load_model(model_file)
    assert dict(guard.load_weights(fresh, rotten).tensors) == {"net.0.weight": 1}
    weight = dict(fresh.named_parameters())["net.0.weight"]
    expected = dict(model.named_parameters())["net.0.weight"].detach().clone()
    expected.view(-1)[3] = 0
    assert torch.equal(weight, expected)
    with pytest.raises(ModelError, match="reading them failed"):
        guard.load_weights(nn.Linear(2, 2), rotten)
    (tmp_path / "cut.safetensors").write_bytes(rotten.read_bytes()[:5000])
    with pytest.raises(ModelError, match="reading them failed"):
        guard.load_weights(fresh, tmp_path / "cut.safetensors")
    with pytest.raises(UsageError, match="no model file"):
        guard.load_weights(fresh, tmp_path / "nowhere.safetensors")


def test_a_guard_of_another_model_is_refused() -> None:
    guard = WeightGuard.record(nn.Linear(2, 1))
    with pytest.raises(ModelError, match="1 are missing: bias"):
        guard.repair(nn.Linear(2, 1, bias=False))
    with pytest.raises(ModelError, match="got 2 others: running_mean"):
        guard.repair(nn.BatchNorm2d(1))
    with pytest.raises(ModelError, match="got 1 others: other"):
        guard.repaired({"other": torch.zeros(1)})


def test_only_a_model_that_is_whole_can_be_recorded() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.data[0, 1] = math.nan
    with pytest.raises(ModelError, match=r"finite weights.* in weight"):
        WeightGuard.record(layer)
    with pytest.raises(ModelError, match="nothing to guard"):
        WeightGuard.record(nn.ReLU())
    with pytest.raises(UsageError, match="margin"):
        WeightGuard.record(nn.Linear(2, 1), margin=-1)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"ranges": 3}', '{"ranges": {"w": [0, NaN]}}', '{"ranges": {"w": [1, 0]}}',
     '{"schema_version": 2, "ranges": {}}', '{"ranges": {"\\u001b[2J": [1, "x"]}}'],
)  # fmt: skip
def test_a_damaged_file_of_a_guard(text: str, tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    path.write_text(text)
    with pytest.raises(ModelError, match="expected the ranges of a guard") as caught:
        WeightGuard.load(path)
    assert "\x1b" not in str(caught.value)


def test_it_says_where_it_helps_and_where_not() -> None:
    assert "float32" in WeightGuard.helps[0]
    for word in ("adversarial inputs", "fixed-point", "chooses the bits"):
        assert any(word in limit for limit in WeightGuard.limits)
