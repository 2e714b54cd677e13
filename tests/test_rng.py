"""Random streams: bound to their sample alone, and random enough."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from robustann import rng
from robustann.rng import SampleRandom, stable_hash

FEW = settings(max_examples=40, derandomize=True, deadline=None, database=None)
# The chance of a false alarm in a test that is right: seeds are fixed, so it passes for ever.
UNLIKELY = 0.001
DRAWS = ("uniform", "normal", "sign")
SEEDS = (0, 1, -1, 12345, 2**31, 2**63 - 1, -(2**63), 2**64, 2**200, -(2**200))


def draw(kind: str, random: SampleRandom, *shape: int) -> Tensor:
    numbers: Tensor = getattr(random, kind)(*shape)
    return numbers


def of(indices: Any, seed: int = 0) -> SampleRandom:
    return SampleRandom.create(seed, torch.as_tensor(indices, dtype=torch.int64))


# -------------------------------------------------------------------- whose numbers they are


@pytest.mark.parametrize("kind", DRAWS)
@FEW
@given(
    indices=st.lists(st.integers(0, 2**62), min_size=1, max_size=20),
    seed=st.integers(),
    shape=st.lists(st.integers(1, 5), max_size=3),
)
def test_a_sample_has_its_own_stream(
    kind: str, indices: list[int], seed: int, shape: list[int]
) -> None:
    batch = of(indices, seed)
    first, second = draw(kind, batch, *shape), draw(kind, batch, *shape)
    assert first.shape == (len(indices), *shape)
    assert first.dtype == torch.float32
    for row, index in enumerate(indices):
        alone = of([index], seed)
        assert torch.equal(draw(kind, alone, *shape)[0], first[row])
        assert torch.equal(draw(kind, alone, *shape)[0], second[row])


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("size", [1, 3, 7, 33, 784])
def test_any_batch_gives_the_same_bits(kind: str, size: int) -> None:
    """Vector instructions treat the end of a tensor apart; the numbers must not show it."""
    everything = draw(kind, of(range(200)), size)
    for length in (1, 3, 7, 8, 64):
        parts = [draw(kind, of(part), size) for part in torch.arange(200).split(length)]  # type: ignore[no-untyped-call]
        assert torch.equal(torch.cat(parts), everything)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads: int) -> None:
    torch.set_num_threads(threads)
    many = of(range(50)).normal(3, 37, 41)
    torch.set_num_threads(1)
    assert torch.equal(many, of(range(50)).normal(3, 37, 41))


def test_order_does_not_matter() -> None:
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(of(order).normal(5), of(range(50)).normal(5)[order])


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("chunk", [1, 5, 64, 2**24])
def test_chunks_are_invisible(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = of(range(13)), of(range(13))
    whole = [draw(kind, expected[0], 3, 4), draw(kind, expected[0], 7)]
    monkeypatch.setattr(rng, "_CHUNK", chunk)
    assert torch.equal(draw(kind, expected[1], 3, 4), whole[0])
    assert torch.equal(draw(kind, expected[1], 7), whole[1])


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([2, 0, 4]),
        torch.tensor([True, False, True, False, True]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([3, 3]),
    ],
)
def test_select_goes_on_where_the_stream_was(rows: Tensor) -> None:
    random = of(range(5))
    random.uniform(3)
    part = random.select(rows)
    rest = random.normal(4)
    assert torch.equal(part.normal(4), rest[rows])
    assert len(part) == len(rest[rows])


def test_draws_in_turn_are_one_stream() -> None:
    """Nine numbers at once are the nine numbers drawn one by one."""
    random = of(range(4))
    one_by_one = torch.cat([random.uniform(1) for _ in range(9)], 1)
    assert torch.equal(of(range(4)).uniform(9), one_by_one)
    assert torch.equal(of(range(4)).uniform(3, 3).flatten(1), one_by_one)
    assert of(range(4)).uniform().shape == (4,)
    assert of([]).uniform(2).shape == (0, 2)
    assert of([]).normal(2).shape == (0, 2)
    assert of(range(4)).uniform(0).shape == (4, 0)


def test_fork_leaves_its_parent_alone() -> None:
    random = of(range(3))
    before = random.fork("a").uniform(4)
    random.uniform(2)
    assert torch.equal(random.fork("a").uniform(4), before)
    assert torch.equal(random.uniform(2), of(range(3)).uniform(4)[:, 2:])
    assert torch.equal(random.to("cpu").uniform(2), random.select(torch.arange(3)).uniform(2))


def test_nothing_global_is_touched() -> None:
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    of(range(3)).normal(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_keys_given_are_left_alone() -> None:
    indices = torch.arange(4)
    random = SampleRandom.create(3, indices)
    random.fork("a")
    random.uniform(5)
    assert indices.tolist() == [0, 1, 2, 3]


def test_names_are_told_apart() -> None:
    names: list[tuple[str | int, ...]] = [
        (), ("",), ("a",), ("a", 0), ("a", "0"), ("a0",), ("a", 0, ""), ("0", "a"), (0,), (-1,),
        ("0",), ("a", "b"), ("ab",), ("a,b",), (1, 2), (12,), (2**64,), ("pgd", 0, 1),
    ]  # fmt: skip
    assert len({stable_hash(*name) for name in names}) == len(names)
    assert all(-(2**63) <= stable_hash(*name) < 2**63 for name in names)


def _splitmix(x: int) -> int:
    x &= 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return x ^ x >> 31


@FEW
@given(seed=st.integers(), index=st.integers(0, 2**62), name=st.text(max_size=3))
def test_against_splitmix_in_whole_numbers(seed: int, index: int, name: str) -> None:
    """The same construction without wrapping int64 arithmetic."""
    golden = 0x9E3779B97F4A7C15
    key = _splitmix(_splitmix(stable_hash("seed", seed)) + index * golden)
    expected = [_splitmix(key + k * golden) >> 40 for k in range(1, 6)]
    assert (of([index], seed).uniform(5)[0] * 2**24).long().tolist() == expected
    key = _splitmix(key ^ stable_hash(name, 1) % 2**64)
    expected = [_splitmix(key + k * golden) >> 40 for k in range(1, 6)]
    assert (of([index], seed).fork(name, 1).uniform(5)[0] * 2**24).long().tolist() == expected


def test_the_numbers_never_change() -> None:
    """A changed stream would change every result that was ever reported with its seed."""
    bits = (of([0, 1, 10**9]).uniform(2) * 2**24).long()
    assert bits.tolist() == [[6699995, 15942108], [11230925, 5948511], [5164429, 5193678]]
    bits = (of([5], seed=7).fork("pgd", 1).uniform(3) * 2**24).long()
    assert bits.tolist() == [[511263, 1630307, 9984810]]


# ----------------------------------------------------------------------- how random they are


@pytest.mark.parametrize("seed", SEEDS)
def test_any_whole_number_is_a_seed(seed: int) -> None:
    numbers = of(range(2000), seed).uniform(1).flatten().double().numpy()
    assert stats.kstest(numbers, "uniform").pvalue > UNLIKELY


def test_seeds_are_told_apart() -> None:
    drawn = [tuple(of([0], seed).uniform(4).flatten().tolist()) for seed in SEEDS]
    assert len(set(drawn)) == len(SEEDS)


def test_uniform_numbers() -> None:
    numbers = of(range(1000)).uniform(200)
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    assert torch.equal(numbers * 2**24, (numbers * 2**24).round())
    flat = numbers.flatten().double().numpy()
    n = len(flat)
    assert abs(flat.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / n)
    assert abs(flat.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    assert stats.kstest(flat, "uniform").pvalue > UNLIKELY
    # Every bit by itself is a fair coin.
    bits = (numbers.double() * 2**24).long().flatten()
    for position in range(24):
        assert abs(float((bits >> position & 1).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(n)


def test_uniform_numbers_hardly_repeat() -> None:
    """Birthdays: n numbers out of 2**24 give about n**2 / 2**25 pairs."""
    n = 20000
    numbers = of(range(n)).uniform(1).flatten()
    pairs = n - len(numbers.unique())
    assert stats.poisson(n**2 / 2**25).cdf(pairs) < 1 - UNLIKELY
    assert stats.poisson(n**2 / 2**25).sf(pairs) < 1 - UNLIKELY


def test_normal_numbers() -> None:
    numbers = of(range(1000)).normal(200)
    assert numbers.isfinite().all()
    flat = numbers.flatten().double().numpy()
    n = len(flat)
    assert abs(flat.mean()) < 4 / math.sqrt(n)
    assert abs(flat.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((flat**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((flat**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(flat, "norm").pvalue > UNLIKELY


def test_normal_is_finite_at_the_ends_of_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    for end in (0.0, 1 - 2**-24):
        monkeypatch.setattr(
            SampleRandom, "uniform", lambda _, *shape, end=end: torch.full((3, *shape), end)
        )
        assert of(range(3)).normal(4).isfinite().all()


def test_signs() -> None:
    signs = of(range(1000)).sign(100)
    assert signs.unique().tolist() == [-1.0, 1.0]
    assert abs(float(signs.double().mean())) < 4 / math.sqrt(signs.numel())


def _correlations(rows: Tensor, lag: int) -> float:
    """Correlation of neighbouring rows, in standard deviations of independent ones."""
    centred = rows.double() - 0.5
    product = (centred[:-lag] * centred[lag:]).flatten() * 12
    return float(product.mean()) * math.sqrt(len(product))


@pytest.mark.parametrize("lag", [1, 2, 8])
def test_neighbours_are_independent(lag: int) -> None:
    samples = of(range(500)).uniform(100)
    assert abs(_correlations(samples, lag)) < 4
    assert abs(_correlations(samples.T, lag)) < 4
    seeds = torch.cat([of([0], seed).uniform(100) for seed in range(500)])
    assert abs(_correlations(seeds, lag)) < 4
    forks = torch.cat([of([0]).fork("start", k).uniform(100) for k in range(500)])
    assert abs(_correlations(forks, lag)) < 4
    # Sample i + 1 under one seed must not be sample i under the next.
    assert abs(_correlations(torch.stack([samples[lag], seeds[lag]]), 1)) < 4


def test_streams_never_overlap() -> None:
    """No window of one stream turns up in another, shifted by any number of draws."""
    streams = [of(range(30)), of(range(30), seed=1), of(range(30)).fork("a"),
               of(range(30)).fork("a").fork("a"), of(range(30)).fork("a", "a"),
               of(range(30)).fork("start", 0), of(range(30)).fork("start", 1)]  # fmt: skip
    rows = torch.cat([stream.uniform(300) for stream in streams])
    seen: set[tuple[float, ...]] = set()
    for row in rows.tolist():
        windows = set(itertools.pairwise(row))
        assert not windows & seen
        seen |= windows


def test_serial_pairs_fill_the_square() -> None:
    numbers = of(range(400)).uniform(500).double()
    pairs = [(numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])]
    for first, second in pairs:
        cells = (first * 16).long() * 16 + (second * 16).long()
        counts = torch.bincount(cells.flatten(), minlength=256).numpy()
        assert stats.chisquare(counts).pvalue > UNLIKELY
