"""Random numbers that belong to a sample, not to a batch.

Every sample has its own key, derived from (seed, sample index, names such as attack and restart),
and draws number k by hashing (key, k). So a sample gets the same numbers whatever batch, shard,
device or process it is in, and dropping other samples does not move its stream. The hash is the
finaliser of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014), written in wrapping int64 arithmetic so that it runs batch-wise on any device.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from robustann.copies import sent


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)
# Bits of one intermediate tensor, in entries: keeps the int64 work of a large batch near 128 MiB.
_CHUNK = 2**24


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; overwrites and returns ``x``."""
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_MULTIPLY_1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MULTIPLY_2)
    return x.bitwise_xor_(_shift_right(x, 31))


def stable_hash(*names: str | int) -> int:
    """An int64 that depends on the names alone (Python's ``hash`` changes between processes).

    >>> stable_hash("pgd", 0) == stable_hash("pgd", 0), stable_hash("pgd", 0) == stable_hash("pgd")
    (True, False)
    """
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class SampleRandom:
    """A random stream for each of n samples.

    Calls advance all n streams together; ``select`` keeps the streams of some samples.

    >>> import torch
    >>> batch = SampleRandom.create(0, torch.tensor([3, 7])).uniform(2)
    >>> alone = SampleRandom.create(0, torch.tensor([7])).uniform(2)
    >>> bool((batch[1] == alone[0]).all())
    True
    """

    def __init__(self, keys: Tensor, seed: int, drawn: int = 0) -> None:
        self._keys = keys
        self.seed = seed
        self._drawn = drawn

    @classmethod
    def create(cls, seed: int, indices: Tensor) -> SampleRandom:
        """Streams for the samples with these positions in their dataset, int64 of shape (n,)."""
        base = torch.full_like(indices, stable_hash("seed", seed), dtype=torch.int64)
        return cls(_mix(_mix(base).add_(indices * _GOLDEN)), seed)

    def __len__(self) -> int:
        return len(self._keys)

    def fork(self, *names: str | int) -> SampleRandom:
        """Independent streams of the same samples, for another purpose."""
        keys = _mix(self._keys ^ stable_hash(*names))
        return SampleRandom(keys, stable_hash(self.seed, *names))

    def select(self, rows: Tensor) -> SampleRandom:
        """The streams of the given rows (a mask or positions), as far as they have been drawn."""
        return SampleRandom(self._keys[rows], self.seed, self._drawn)

    def to(self, device: torch.device | str) -> SampleRandom:
        """The same streams, drawing on another device."""
        return SampleRandom(sent(self._keys, torch.device(device)), self.seed, self._drawn)

    def _bits(self, count: int, keys: Tensor) -> Tensor:
        counters = torch.arange(
            self._drawn + 1, self._drawn + count + 1, dtype=torch.int64, device=keys.device
        )
        return _mix(keys[:, None] + counters.mul_(_GOLDEN)[None, :])

    def uniform(self, *shape: int) -> Tensor:
        """Uniform float32 numbers in [0, 1), multiples of 2**-24, of shape (n, \\*shape)."""
        count = math.prod(shape)
        rows = max(1, _CHUNK // max(count, 1))
        parts = [
            _shift_right(self._bits(count, keys), 40).to(torch.float32)
            for keys in self._keys.split(rows)  # type: ignore[no-untyped-call]
        ]
        self._drawn += count
        numbers = parts[0] if len(parts) == 1 else torch.cat(parts)
        return numbers.mul_(2.0**-24).view(len(self._keys), *shape)

    def sign(self, *shape: int) -> Tensor:
        """-1 or +1 with equal chance, float32 of shape (n, \\*shape)."""
        return self.uniform(*shape).lt_(0.5).mul_(-2.0).add_(1.0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 numbers of shape (n, \\*shape), by Box and Muller (1958)."""
        # 1 - u lies in (0, 1]: the logarithm is finite.
        radius = self.uniform(*shape).neg_().add_(1.0).log_().mul_(-2.0).sqrt_()
        return radius.mul_(self.uniform(*shape).mul_(2.0 * math.pi).cos_())
