"""Which few bits of the stored weights to flip: progressive bit search.

Rakin, He and Fan, "Bit-Flip Attack: Crushing Neural Network with Progressive Bit Search", ICCV
2019, https://arxiv.org/abs/1903.12269. The attacker knows the model, owns a batch of labelled
images, and can flip chosen bits of the weights in memory (Rowhammer). In each round the bits of
every tensor are ranked by the gradient of the loss; the best of each tensor is tried by a forward
pass; the one of the largest loss stays flipped.

The paper's loss is cross-entropy, which goes on growing for images that are lost already. The
margin between the largest wrong logit and the right one, capped once it is won, spends no flip on
them and needs fewer: 43 and 73 instead of more than 100 on the digits (two seeds), 52 instead of
64 on MNIST (small-cnn). It is the default.

The weights are 8-bit fixed point as in :mod:`robustann.attacks.weights.quantization`, whose
unsigned codes are offset binary. In the paper they are two's complement: the same bits but for the
inverted top one, so each flip moves a weight as far there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.attacks.engine import check_classes, frozen, model_device
from robustann.attacks.losses import margin
from robustann.attacks.weights.evaluation import (
    Samples,
    accuracy_with,
    check_batch_size,
    logits_with,
)
from robustann.attacks.weights.quantization import QuantizedTensor, quantized_parameters
from robustann.data import Split
from robustann.errors import UsageError, unknown_name
from robustann.rng import stable_hash

# A model that answers one class is right as often as this class occurs, which is rarely less
# than chance: the target lies a little above it.
_ABOVE_CHANCE = 1.1

# In logits: a lead this large is not lost again by the next flip.
_ENOUGH = 1.0

_Loss = Callable[[Tensor, Tensor], Tensor]


def _capped_margin(logits: Tensor, labels: Tensor) -> Tensor:
    return margin(logits, labels).clamp(max=_ENOUGH).mean()


_LOSSES: dict[str, _Loss] = {"cross-entropy": F.cross_entropy, "margin": _capped_margin}


@dataclass(frozen=True)
class Flip:
    """One flipped bit.

    Attributes:
        tensor: name of the parameter.
        index: of the weight in it.
        bit: 0 is the lowest, worth one step.
        before: code of the weight.
        after: code with the bit inverted.
        loss: on the attacker's images, after this and all flips before it.
        accuracy: on the images evaluated, likewise.

    >>> Flip("fc.weight", (0, 3), 7, before=5, after=133, loss=1.2, accuracy=0.7).after - 5
    128
    """

    tensor: str
    index: tuple[int, ...]
    bit: int
    before: int
    after: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class BitSearchResult:
    """What the search found.

    Attributes:
        flips: in the order found; all of different bits.
        clean_accuracy: of the model with its own weights.
        stored_accuracy: of the weights as stored, before any flip.
        target: accuracy to fall to.
        bits: of each stored weight.
        total_bits: of all weights together.
        samples: images evaluated, none of them the attacker's.
        attack_samples: images that the attacker used.

    >>> BitSearchResult((), 0.98, 0.97, 0.11, 8, 800, 100, 64).accuracy
    0.97
    """

    flips: tuple[Flip, ...]
    clean_accuracy: float
    stored_accuracy: float
    target: float
    bits: int
    total_bits: int
    samples: int
    attack_samples: int

    @property
    def accuracy(self) -> float:
        """After all flips."""
        return self.flips[-1].accuracy if self.flips else self.stored_accuracy

    @property
    def reached(self) -> bool:
        """Whether the accuracy fell to the target."""
        return self.accuracy <= self.target


def progressive_bit_search(
    model: nn.Module,
    images: Tensor | Split,
    labels: Tensor | None = None,
    *,
    attack_size: int = 128,
    target: float | None = None,
    max_flips: int = 100,
    loss: str = "margin",
    bits: int = 8,
    batch_size: int = 256,
    seed: int = 0,
    advance: Callable[[int], None] = lambda flips: None,
) -> BitSearchResult:
    """Flip the most harmful bits of the quantised weights, one by one, until the target.

    The search is greedy: how many flips it needs is an upper bound of how few would do. All
    floating-point parameters may be hit. The model stays as it was.

    Args:
        model: maps images in [0, 1] to logits.
        images: float (N, C, H, W) in [0, 1], or a part of a dataset.
        labels: int64 (N,); None takes those of the part.
        attack_size: images drawn for the attacker; the rest are evaluated.
        target: accuracy to fall to; None takes 1.1 divided by the number of classes.
        max_flips: give up after so many.
        loss: what to raise on the attacker's images: ``margin``, or the paper's ``cross-entropy``.
        bits: of each stored weight, from 2 to 8.
        batch_size: images evaluated at a time.
        seed: of the attacker's images.
        advance: told of each flip when it is made.

    Raises:
        UsageError: a setting out of range.
        DataError: unfit images or labels.
        ModelError: unfit weights or output.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> images, labels = torch.rand(40, 1, 2, 2), torch.arange(40) % 3
    >>> found = progressive_bit_search(model, images, labels, attack_size=8, max_flips=2, target=0)
    >>> len(found.flips) <= 2, found.samples
    (True, 32)
    """
    check_batch_size(batch_size)
    if target is not None and not 0 <= target < 1:
        raise UsageError(f"target: expected an accuracy from 0 to below 1 or None, got {target!r}")
    if max_flips < 1:
        raise UsageError(f"max_flips: expected a positive integer, got {max_flips!r}")
    if loss not in _LOSSES:
        raise unknown_name("loss of the bit search", loss, _LOSSES)
    every = Samples(images, labels)
    if not 1 <= attack_size < len(every):
        raise UsageError(
            f"attack_size: expected from 1 to {len(every) - 1}, for some of the {len(every)} "
            f"images must be left to evaluate, got {attack_size!r}"
        )
    drawn = torch.Generator().manual_seed(stable_hash("bit-search", seed))
    order = torch.randperm(len(every), generator=drawn)
    attackers, evaluated = every.subset(order[:attack_size]), every.subset(order[attack_size:])
    device = model_device(model)
    x, y = next(attackers.batches(attack_size, device))
    stored = quantized_parameters(model, bits)
    with frozen(model, seed):
        clean = accuracy_with(model, {}, evaluated, batch_size)
        weights = {name: tensor.dequantize() for name, tensor in stored.items()}
        start = accuracy_with(model, weights, evaluated, batch_size)
        with torch.no_grad():
            classes = logits_with(model, weights, x).shape[1]
        check_classes(every.labels, classes)
        goal = target if target is not None else _ABOVE_CHANCE / classes
        search = _Search(model, stored, weights, x, y, _LOSSES[loss])
        flips: list[Flip] = []
        reached = start
        while reached > goal and len(flips) < max_flips:
            found = search.best()
            if found is None:
                break
            name, place, bit, value = found
            before, after = search.flip(name, place, bit)
            reached = accuracy_with(model, search.weights, evaluated, batch_size)
            index = _index(place, stored[name].codes.shape)
            flips.append(Flip(name, index, bit, before, after, value, reached))
            advance(1)
    total = bits * sum(tensor.codes.numel() for tensor in stored.values())
    return BitSearchResult(
        tuple(flips), clean, start, goal, bits, total, len(evaluated), len(attackers)
    )


def random_flips(
    model: nn.Module,
    images: Tensor | Split,
    labels: Tensor | None = None,
    *,
    count: int,
    seeds: int | Sequence[int] = 5,
    bits: int = 8,
    batch_size: int = 256,
) -> tuple[float, ...]:
    """Accuracy after flips of ``count`` random bits, one value a seed: a control of the search.

    The bits are different ones, each as likely as any other. The model stays as it was.

    Args:
        model: maps images in [0, 1] to logits.
        images: float (N, C, H, W) in [0, 1], or a part of a dataset.
        labels: int64 (N,); None takes those of the part.
        count: bits to flip.
        seeds: of the choice of bits, or how many.
        bits: of each stored weight, from 2 to 8.
        batch_size: images at a time.

    Raises:
        UsageError: a setting out of range, or more flips than bits.
        DataError: unfit images or labels.
        ModelError: unfit weights or output.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> images, labels = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
    >>> len(random_flips(model, images, labels, count=3, seeds=4))
    4
    """
    check_batch_size(batch_size)
    samples = Samples(images, labels)
    stored = quantized_parameters(model, bits)
    total = bits * sum(tensor.codes.numel() for tensor in stored.values())
    if not 1 <= count <= total:
        raise UsageError(f"count: expected from 1 to the {total} bits there are, got {count!r}")
    chosen = range(seeds) if isinstance(seeds, int) else seeds
    if not len(chosen):
        raise UsageError("seeds: expected at least one, got none; give a number above 0")
    found = []
    with frozen(model, 0):
        for seed in chosen:
            draw = random.Random(stable_hash("random-flips", seed))
            masks = _masks(stored, draw.sample(range(total), count), bits)
            weights = {name: tensor.dequantize(masks[name]) for name, tensor in stored.items()}
            found.append(accuracy_with(model, weights, samples, batch_size))
    return tuple(found)


def _masks(
    stored: Mapping[str, QuantizedTensor], places: Sequence[int], bits: int
) -> dict[str, Tensor]:
    """Masks that invert these bits, numbered through all tensors."""
    numbers = torch.tensor(sorted(places))
    masks, first = {}, 0
    for name, tensor in stored.items():
        size = bits * tensor.codes.numel()
        inside = numbers[(numbers >= first) & (numbers < first + size)] - first
        values = (1 << (inside % bits)).to(torch.uint8)
        mask = torch.zeros(tensor.codes.numel(), dtype=torch.uint8)
        # The bits are different ones, so their sum is what inverts them all.
        mask.index_add_(0, inside // bits, values)
        masks[name] = mask.view(tensor.codes.shape).to(tensor.codes.device)
        first += size
    return masks


class _Search:
    """The state of a search: codes, the weights that they stand for, and what was flipped."""

    def __init__(
        self,
        model: nn.Module,
        stored: Mapping[str, QuantizedTensor],
        weights: Mapping[str, Tensor],
        images: Tensor,
        labels: Tensor,
        loss: _Loss,
    ) -> None:
        self.model, self.stored, self.images, self.labels = model, stored, images, labels
        self.loss = loss
        self.weights = dict(weights)
        self.masks = {name: torch.zeros_like(tensor.codes) for name, tensor in stored.items()}

    def best(self) -> tuple[str, int, int, float] | None:
        """Tensor, flat position, bit and loss of the most harmful flip; None if all are done."""
        leaves = {name: value.detach().requires_grad_() for name, value in self.weights.items()}
        loss = self.loss(logits_with(self.model, leaves, self.images), self.labels)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        best = None
        for (name, place, bit), gain in self._candidates(gradients):
            if best is not None and gain <= best[3]:
                continue
            best = (name, place, bit, gain)
        return best

    def flip(self, name: str, place: int, bit: int) -> tuple[int, int]:
        """Invert a bit for good; the codes before and after."""
        mask = self.masks[name].view(-1)
        codes = self.stored[name].codes.view(-1)
        before = int(codes[place] ^ mask[place])
        mask[place] ^= 1 << bit
        self.weights[name] = self.stored[name].dequantize(self.masks[name])
        return before, before ^ (1 << bit)

    def _candidates(
        self, gradients: Sequence[Tensor | None]
    ) -> Iterator[tuple[tuple[str, int, int], float]]:
        """The bit of each tensor that promises most, and the loss that its flip really gives."""
        for (name, stored), gradient in zip(self.stored.items(), gradients, strict=True):
            # A tensor without range holds only zeros, whatever its bits.
            if gradient is None or stored.step == 0:
                continue
            promise, bit = self._promises(stored, self.masks[name], gradient.detach())
            place = int(promise.argmax())
            if float(promise[place]) == -torch.inf:
                continue
            top = int(bit[place])
            tried = self.masks[name].clone()
            tried.view(-1)[place] ^= 1 << top
            weights = {**self.weights, name: stored.dequantize(tried)}
            with torch.no_grad():
                logits = logits_with(self.model, weights, self.images)
                loss = float(self.loss(logits, self.labels))
            # NaN: nothing is left to destroy.
            yield (name, place, top), loss if loss == loss else torch.inf

    @staticmethod
    def _promises(stored: QuantizedTensor, mask: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """For each weight the largest first-order gain of one flip, and the bit that gives it."""
        codes = (stored.codes ^ mask).view(-1).int()
        flat, done = gradient.reshape(-1).nan_to_num(), mask.view(-1).int()
        best = torch.full_like(flat, -torch.inf)
        which = torch.zeros_like(codes)
        for bit in range(stored.bits):
            # A set bit can only be taken away, a cleared one only added.
            change = (1 - 2 * ((codes >> bit) & 1)) * (stored.step * 2**bit)
            gain = torch.where((done >> bit) & 1 == 1, -torch.inf, flat * change)
            which = torch.where(gain > best, bit, which)
            best = torch.maximum(best, gain)
        return best, which


def _index(place: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(axis) for axis in torch.unravel_index(torch.tensor(place), shape))
