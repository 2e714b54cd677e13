"""Faults in weights: quantisation, random bit errors, and the search for the worst bits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from robustann.attacks import registered
from robustann.attacks.engine import predict_logits
from robustann.attacks.weights import (
    BitErrorPoint,
    progressive_bit_search,
    quantize,
    quantized_model,
    random_bit_errors,
    random_flips,
)
from robustann.attacks.weights.bit_errors import error_masks, flipped
from robustann.attacks.weights.evaluation import Samples, accuracy_with
from robustann.attacks.weights.quantization import quantized_parameters
from robustann.data import ImageData, TensorSplit
from robustann.errors import DataError, ModelError, UsageError
from robustann.models import tensor_digest


def linear(weights: list[list[float]]) -> nn.Module:
    layer = nn.Linear(len(weights[0]), len(weights), bias=False)
    layer.weight.data = torch.tensor(weights)
    return nn.Sequential(nn.Flatten(), layer)


def touchy() -> nn.Module:
    """A model with everything that a measurement might leave changed."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(144, 10),
    )  # fmt: skip
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones(10, 144)
    return model


def traces(model: nn.Module) -> tuple[Any, ...]:
    return (
        tensor_digest(model),
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [id(parameter) for parameter in model.parameters()],
        [None if p.grad is None else float(p.grad.sum()) for p in model.parameters()],
        torch.get_rng_state().tolist(),
    )


def test_no_weight_attack_is_an_attack_on_images() -> None:
    assert not any("weights" in cls.__module__ for cls in registered().values())


# Quantisation


@hypothesis.given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.integers(2, 8)
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_rounding_is_off_by_at_most_half_a_step(values: list[float], bits: int) -> None:
    tensor = torch.tensor(values)
    stored = quantize(tensor, bits)
    back = stored.dequantize()
    assert int(stored.codes.max()) < 2**bits
    # The values return to float32, which rounds once more.
    slack = 1e-6 * float(tensor.abs().max())
    assert float((back.double() - tensor.double()).abs().max()) <= stored.step / 2 + slack
    assert back.min() == tensor.min()
    assert back.max() == tensor.max()
    again = quantize(back, bits)
    torch.testing.assert_close(again.dequantize(), back, rtol=0, atol=slack)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_level_survives_the_round_trip(bits: int) -> None:
    levels = torch.linspace(-0.3, 1.7, 2**bits)
    stored = quantize(levels, bits)
    assert stored.codes.tolist() == list(range(2**bits))
    torch.testing.assert_close(stored.dequantize(), levels, rtol=0, atol=1e-6)


def test_values_are_rounded_and_not_truncated() -> None:
    # Step 1: 1.6 is nearer to 2.
    assert quantize(torch.tensor([0.0, 1.6, 3.0]), 2).codes.tolist() == [0, 2, 3]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 1e-30])
def test_a_constant_tensor_is_exact(value: float) -> None:
    stored = quantize(torch.full((2, 3), value))
    assert stored.dequantize().unique().tolist() == [torch.tensor(value).item()]
    # What is stored can be hit, except where there is nothing to store.
    hit = stored.dequantize(torch.full((2, 3), 255, dtype=torch.uint8))
    assert bool((hit == value).all()) == (value == 0)


def test_the_top_bit_is_worth_half_the_range() -> None:
    stored = quantize(torch.tensor([-1.0, -0.2, 1.0]))
    flips = torch.tensor([128, 0, 128], dtype=torch.uint8)
    assert stored.dequantize(flips).tolist() == pytest.approx(
        [-1 + 128 * 2 / 255, stored.dequantize()[1].item(), 1 - 128 * 2 / 255]
    )


def test_offset_binary_and_twos_complement_suffer_the_same_from_each_bit() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    signed = (codes.int() - 128).to(torch.int8)
    for bit in range(8):
        ours = (codes ^ (1 << bit)).int() - codes.int()
        theirs = (signed.view(torch.uint8) ^ (1 << bit)).view(torch.int8).int() - signed.int()
        assert torch.equal(ours, theirs)


def test_a_model_is_copied_unless_asked() -> None:
    model = touchy()
    before = traces(model)
    copy = quantized_model(model, 3)
    assert traces(model) == before
    assert copy[5].weight.unique().numel() <= 8
    assert torch.equal(copy[1].running_mean, model[1].running_mean)
    assert quantized_model(model, 3, in_place=True) is model
    assert torch.equal(model[5].weight, copy[5].weight)


def test_tied_weights_are_stored_once() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    assert sorted(quantized_parameters(model)) == ["0.bias", "0.weight", "1.bias"]
    copy = quantized_model(model, 2)
    assert copy[0].weight is copy[1].weight


@pytest.mark.parametrize(
    ("values", "bits", "error", "message"),
    [
        (torch.ones(2), 1, UsageError, "from 2 to 8, got 1"),
        (torch.ones(2), 9, UsageError, "from 2 to 8, got 9"),
        (torch.tensor([1.0, math.nan]), 8, ModelError, "finite"),
        (torch.tensor([1.0, math.inf]), 8, ModelError, "finite"),
        (torch.tensor([1, 2]), 8, ModelError, "floating-point"),
        (torch.empty(0), 8, ModelError, "got 0 values"),
    ],
    ids=str,
)
def test_what_cannot_be_quantised(
    values: Tensor, bits: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize(values, bits)


def test_a_bad_parameter_is_named() -> None:
    model = nn.Linear(2, 2)
    model.bias.data[0] = math.nan
    with pytest.raises(ModelError, match="bias: expected finite"):
        quantized_parameters(model)
    with pytest.raises(ModelError, match="got none"):
        quantized_parameters(nn.ReLU())


# Random bit errors


@pytest.mark.parametrize(
    ("bit", "expected"),
    [(31, -1.5), (22, 1.0), (30, math.nan), (23, 0.75), (0, 1.5 + 2**-23)],
    ids=["sign", "half", "all exponent bits", "exponent", "last"],
)
def test_bits_of_a_float(bit: int, expected: float) -> None:
    # 1.5 is sign 0, exponent 01111111, fraction 100...0.
    mask = torch.tensor([1 << bit if bit < 31 else -(2**31)], dtype=torch.int32)
    found = flipped(torch.tensor([1.5]), mask)
    assert found.item() == pytest.approx(expected, nan_ok=True, rel=0, abs=0)


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5])
def test_as_many_bits_flip_as_a_binomial_says(bits: int, rate: float) -> None:
    (mask,) = error_masks("w", (50, 400), rates=(rate,), seed=1, bits=bits)
    counts = [int(((mask >> bit) & 1).sum()) for bit in range(bits)]
    # Each bit for itself, and all together, within five standard deviations.
    for count, trials in [*((one, 20_000) for one in counts), (sum(counts), 20_000 * bits)]:
        assert abs(count - trials * rate) < 5 * math.sqrt(trials * rate * (1 - rate))
    if bits < 8:
        assert int(mask.max()) < 2**bits


@pytest.mark.parametrize("bits", [8, 32])
def test_errors_at_a_rate_are_errors_at_every_higher_one(bits: int) -> None:
    masks = error_masks("w", (5000,), rates=(0.0, 0.01, 0.02, 0.2, 1.0), seed=3, bits=bits)
    assert int(masks[0].count_nonzero()) == 0
    for fewer, more in itertools.pairwise(masks):
        assert bool(((fewer & ~more) == 0).all())
        assert not torch.equal(fewer, more)
    assert masks[-1].unique().tolist() == [255 if bits == 8 else -1]


def test_errors_depend_on_seed_name_and_position_alone() -> None:
    def draw(name: str = "w", count: int = 500, seed: int = 0, **options: Any) -> Tensor:
        settings: dict[str, Any] = {"rates": (0.2,), "bits": 8, **options}
        return error_masks(name, (count,), seed=seed, **settings)[0]

    first = draw()
    assert torch.equal(draw(), first)
    assert torch.equal(draw(count=900)[:500], first)
    assert torch.equal(draw(rates=(0.1, 0.2))[...], draw(rates=(0.1,)))
    assert torch.equal(draw(bits=4), first & 15)
    assert not torch.equal(draw(name="v"), first)
    assert not torch.equal(draw(seed=1), first)


def test_all_bits_flipped_in_closed_form() -> None:
    # At rate 1 a code c becomes 255 - c: the weights are mirrored about the middle of the range.
    model = linear([[1.0, 0.0], [0.0, 1.0]])
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 1, 1, 2)
    curve = random_bit_errors(model, images, torch.tensor([0, 1]), rates=(0.0, 1.0), seeds=3)
    assert curve.clean_error == curve.stored_error == 0
    assert curve.points[0].errors == (0, 0, 0)
    assert curve.points[1].errors == (1, 1, 1)
    # In float32 the ones become NaN or of another sign; a row with NaN is no right answer.
    curve = random_bit_errors(model, images, torch.tensor([0, 1]), rates=(1.0,), seeds=1, bits=32)
    assert curve.points[0].worst > 0


def test_nan_is_never_a_right_answer() -> None:
    model = linear([[math.nan], [0.0]])
    samples = Samples(torch.ones(2, 1, 1, 1), torch.tensor([0, 1]))
    assert accuracy_with(model, {}, samples, 8) == 0


def test_the_error_grows_with_the_rate(model: nn.Module, digits: ImageData) -> None:
    curve = random_bit_errors(model, digits.test, rates=(0.001, 0.05, 0.2), seeds=4)
    assert curve.stored_error == pytest.approx(curve.clean_error, abs=0.02)
    low, middle, high = curve.points
    assert low.mean < curve.clean_error + 0.03
    assert middle.mean + 0.2 < high.mean
    assert high.mean > 0.6
    assert high.worst == max(high.errors)
    assert high.std == pytest.approx(float(torch.tensor(high.errors).std()), abs=1e-6)
    assert BitErrorPoint(0.1, (0.5,)).std == 0
    # Neither the batch nor how the samples come makes a difference.
    images = digits.test.images(slice(None))
    assert curve == random_bit_errors(
        model, images, digits.test.labels, rates=(0.001, 0.05, 0.2), seeds=4, batch_size=77
    )


def test_float32_is_more_fragile_than_fixed_point(model: nn.Module, digits: ImageData) -> None:
    rates = (0.001,)
    floats = random_bit_errors(model, digits.test, rates=rates, seeds=3, bits=32)
    codes = random_bit_errors(model, digits.test, rates=rates, seeds=3, bits=8)
    assert floats.stored_error == floats.clean_error
    assert floats.points[0].mean > 0.7
    assert codes.points[0].mean < 0.05


def test_measuring_leaves_no_trace() -> None:
    model = touchy()
    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    before = traces(model)
    for bits in (8, 32):
        random_bit_errors(model, images, labels, rates=(0.01, 0.3), seeds=2, bits=bits)
        assert traces(model) == before
    progressive_bit_search(model, images, labels, attack_size=16, max_flips=3, target=0)
    assert traces(model) == before
    random_flips(model, images, labels, count=20, seeds=2)
    assert traces(model) == before


def test_an_error_in_the_model_leaves_no_trace_either() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = touchy(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 3:
                raise RuntimeError("broken")
            answer: Tensor = self.inner(x)
            return answer

    model = Failing()
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    before = traces(model)
    with pytest.raises(RuntimeError, match="broken"):
        random_bit_errors(model, images, labels, rates=(0.5,), seeds=5)
    assert traces(model) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rates": (1e-9,)}, UsageError, "0 or from 1e-06 to 1, got 1e-09"),
        ({"rates": (1.5,)}, UsageError, "rates"),
        ({"rates": (math.nan,)}, UsageError, "rates"),
        ({"rates": ()}, UsageError, "at least one bit error rate"),
        ({"seeds": 0}, UsageError, "seeds: expected at least one"),
        ({"bits": 16}, UsageError, "bits: expected"),
        ({"batch_size": 0}, UsageError, "batch_size"),
        ({"labels": None}, UsageError, "labels beside a tensor"),
        ({"labels": torch.zeros(3)}, DataError, "integer labels"),
        ({"images": torch.full((4, 1, 2, 2), 7.0)}, DataError, r"in \[0, 1\]"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    settings = {"images": torch.rand(4, 1, 2, 2), "labels": torch.arange(4) % 2, **arguments}
    with pytest.raises(error, match=message):
        random_bit_errors(linear([[1.0] * 4] * 2), **settings)


def test_half_precision_has_no_float32_bits() -> None:
    model = linear([[1.0] * 4] * 2).bfloat16()
    with pytest.raises(ModelError, match=r"float32 parameters.*bfloat16 in 1\.weight"):
        random_bit_errors(model, torch.rand(4, 1, 2, 2), torch.arange(4) % 2, bits=32)


# Bit search


def test_the_search_beats_random_flips_by_far(model: nn.Module, digits: ImageData) -> None:
    found = progressive_bit_search(model, digits.test, max_flips=60)
    count = len(found.flips)
    control = random_flips(model, digits.test, count=count, seeds=4)
    assert found.clean_accuracy > 0.95
    assert found.accuracy < 0.6
    assert min(control) > found.accuracy + 0.3
    assert min(control) > 0.9
    assert found.samples + found.attack_samples == len(digits.test)
    assert len({(flip.tensor, flip.index, flip.bit) for flip in found.flips}) == count
    # The losses that made the choice are those of the flips together: they grow.
    losses = [flip.loss for flip in found.flips]
    assert losses[-1] > losses[0]


def test_flips_are_what_they_are_said_to_be(model: nn.Module, digits: ImageData) -> None:
    found = progressive_bit_search(model, digits.test, max_flips=8, target=0, seed=4)
    stored = quantized_parameters(model)
    masks = {name: torch.zeros_like(tensor.codes) for name, tensor in stored.items()}
    for flip in found.flips:
        assert flip.before ^ flip.after == 1 << flip.bit
        codes = stored[flip.tensor].codes ^ masks[flip.tensor]
        assert int(codes[flip.index]) == flip.before
        masks[flip.tensor][flip.index] ^= 1 << flip.bit
    # Replayed on a copy, outside the search, they give the accuracy that was reported.
    copy = quantized_model(model)
    parameters = dict(copy.named_parameters())
    with torch.no_grad():
        for name, tensor in stored.items():
            parameters[name].copy_(tensor.dequantize(masks[name]))
    logits = predict_logits(copy, digits.test.images(slice(None)))
    right = int((logits.argmax(1) == digits.test.labels).sum())
    # All images but the attacker's were evaluated.
    least = right - found.attack_samples
    assert least <= found.accuracy * found.samples <= right
    assert found == progressive_bit_search(model, digits.test, max_flips=8, target=0, seed=4)


def test_the_first_flip_is_the_best_of_all_in_a_linear_model() -> None:
    # Codes 0 and 255 of a range of one: the top bit moves a weight furthest. Of the four weights
    # those matter whose pixel is bright; taking from the right class is as good as giving to the
    # wrong one, except that a full code can only lose and an empty one only gain.
    model = linear([[1.0, 0.5], [0.0, 0.5]])
    images = torch.tensor([1.0, 0.1]).view(1, 1, 1, 2).expand(8, 1, 1, 2).contiguous()
    labels = torch.zeros(8, dtype=torch.int64)
    found = progressive_bit_search(model, images, labels, attack_size=4, target=0, max_flips=5)
    first = found.flips[0]
    assert (first.tensor, first.bit) == ("1.weight", 7)
    assert first.index in ((0, 0), (1, 0))
    assert first.loss == pytest.approx(-1 + 128 / 255, abs=1e-3)
    assert found.reached
    assert len(found.flips) == 2
    assert found.accuracy == 0
    assert found.total_bits == 32


def test_no_bit_is_flipped_twice_and_the_search_ends_with_the_bits() -> None:
    # Black images: no flip changes any answer, so the target is out of reach.
    model = linear([[1.0], [0.0]])
    images, labels = torch.zeros(6, 1, 1, 1), torch.zeros(6, dtype=torch.int64)
    found = progressive_bit_search(model, images, labels, attack_size=2, target=0, max_flips=50)
    assert not found.reached
    assert found.accuracy == 1
    assert len(found.flips) == found.total_bits == 16
    assert len({(flip.index, flip.bit) for flip in found.flips}) == 16


def test_both_losses_bring_the_model_down(model: nn.Module, digits: ImageData) -> None:
    for loss in ("margin", "cross-entropy"):
        found = progressive_bit_search(model, digits.test, loss=loss, target=0.9, max_flips=40)
        assert found.reached
        assert found.accuracy <= 0.9 < found.stored_accuracy


def test_a_target_already_met_needs_no_flip() -> None:
    model = linear([[0.0, 1.0], [1.0, 0.0]])
    images = torch.tensor([1.0, 0.1]).view(1, 1, 1, 2).expand(8, 1, 1, 2).contiguous()
    found = progressive_bit_search(model, images, torch.zeros(8, dtype=torch.int64), attack_size=4)
    assert found.flips == ()
    assert found.reached
    assert found.target == pytest.approx(0.55)


def test_random_flips_are_distinct_and_as_many_as_asked() -> None:
    # All 16 bits of two weights: each code is inverted wholly, whatever the seed.
    model = linear([[1.0], [0.0]])
    images, labels = torch.ones(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64)
    assert random_flips(model, images, labels, count=16, seeds=3) == (0, 0, 0)
    assert random_flips(model, images, labels, count=1, seeds=[5]) == (1,)
    with pytest.raises(UsageError, match="from 1 to the 16 bits there are, got 17"):
        random_flips(model, images, labels, count=17)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": 1.0}, UsageError, "target"),
        ({"max_flips": 0}, UsageError, "max_flips"),
        ({"attack_size": 40}, UsageError, "from 1 to 39"),
        ({"attack_size": 0}, UsageError, "attack_size"),
        ({"loss": "marign"}, UsageError, "did you mean 'margin'"),
        ({"bits": 32}, UsageError, "bits"),
        ({"labels": torch.full((40,), 5)}, DataError, "labels from 0 to 1"),
    ],
    ids=str,
)
def test_wrong_arguments_of_the_search(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    settings: dict[str, Any] = {
        "images": torch.rand(40, 1, 2, 2), "labels": torch.arange(40) % 2, "attack_size": 8,
        **arguments,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        progressive_bit_search(linear([[1.0] * 4, [0.5] * 4]), **settings)


def test_a_split_needs_no_labels() -> None:
    split = TensorSplit(torch.rand(10, 1, 2, 2), torch.arange(10) % 2)
    model = linear([[1.0] * 4, [0.5] * 4])
    assert random_bit_errors(model, split, rates=(0.1,), seeds=1).samples == 10
    with pytest.raises(DataError, match="at least one image"):
        Samples(split.subset([]))
