"""One part of a dataset: images by position, from memory or decoded on demand."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from robustann.copies import sent
from robustann.errors import DataError, UsageError

Indices = Tensor | Sequence[int] | slice

# Float32 values hashed at a time, 8 MiB: larger blocks of memory are fetched anew from the system.
_DIGEST_VALUES = 2**21


class Split(ABC):
    """One part of a dataset.

    Attributes:
        labels: int64 (N,), always on the CPU.
        shape: (C, H, W) of every image.
        device: where :meth:`images` puts its result.
        scale: stored uint8 values are divided by it; stored floats are in [0, 1] already.

    >>> split = TensorSplit(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 0]))
    >>> len(split), split.shape, split.images([0, 2]).shape
    (3, (1, 2, 2), torch.Size([2, 1, 2, 2]))
    """

    labels: Tensor
    shape: tuple[int, int, int]
    device: torch.device
    scale: int

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Indices) -> Tensor:
        """Images at ``indices``: float32 (n, C, H, W) in [0, 1], on ``self.device``.

        ``indices`` is a slice, or a list or tensor of positions, or a boolean mask (N,).

        Raises:
            UsageError: a position is not in 0..N-1, or the mask has another length.
            DataError: an image file cannot be decoded; the message names it.
        """
        stored = self._stored(self._positions(indices))
        return _unit(sent(stored, self.device), self.scale)

    @abstractmethod
    def prepare(self, indices: Indices) -> None:
        """Begin to read these images, where that takes time: :meth:`images` will soon be asked for
        just them."""

    def digest(self, indices: Indices | None = None) -> str:
        """SHA-256, in hex, over shape, labels and float32 images (all, or those at ``indices``).

        It depends on neither the device nor on how the images are stored.
        """
        positions = self._positions(slice(None) if indices is None else indices)
        sha = hashlib.sha256(repr((len(positions), *self.shape)).encode())
        sha.update(self.labels[positions].numpy().astype("<i8").tobytes())
        step = max(1, _DIGEST_VALUES // (self.shape[0] * self.shape[1] * self.shape[2]))
        for chunk in torch.split(positions, step):
            # On the CPU, because another device may round the division differently.
            images = _unit(self._stored(chunk).cpu(), self.scale)
            sha.update(images.contiguous().numpy().astype("<f4", copy=False).data)
        return sha.hexdigest()

    @property
    @abstractmethod
    def resident(self) -> bool:
        """Whether all images lie where they are returned: there is nothing to fetch ahead."""

    @abstractmethod
    def to(self, device: str | torch.device) -> Split:
        """The same images, returned on ``device``."""

    @abstractmethod
    def subset(self, indices: Indices) -> Split:
        """The images and labels at ``indices``, in that order, as a part of their own."""

    @abstractmethod
    def relabelled(self, labels: Tensor) -> Split:
        """The same images with other labels, int64 (N,)."""

    @abstractmethod
    def _stored(self, positions: Tensor) -> Tensor:
        """Images as they are stored: uint8, or float32 in [0, 1]."""

    def _positions(self, indices: Indices) -> Tensor:
        n = len(self)
        if isinstance(indices, slice):
            chosen = range(n)[indices]
            if not chosen:
                return torch.empty(0, dtype=torch.int64)
            return torch.arange(chosen.start, chosen.stop, chosen.step)
        positions = torch.as_tensor(indices).cpu()
        if positions.dtype == torch.bool:
            if positions.shape != (n,):
                raise UsageError(
                    f"expected a mask of shape ({n},) for {n} images, "
                    f"got {tuple(positions.shape)}; give one value per image"
                )
            return positions.nonzero().flatten()
        if not positions.numel():
            return torch.empty(0, dtype=torch.int64)
        if positions.ndim != 1 or positions.is_floating_point() or positions.is_complex():
            raise UsageError(
                "expected a flat list of integer positions, got "
                f"{positions.dtype} of shape {tuple(positions.shape)}"
            )
        positions = positions.to(torch.int64)
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= n:
            raise UsageError(
                f"expected positions from 0 to {n - 1}, got {low} to {high}; "
                f"this part holds {n} images"
            )
        return positions


class TensorSplit(Split):
    """Images held in memory, on the CPU or on the device.

    Args:
        images: uint8 (N, C, H, W) with values 0..``scale``, or float32 in [0, 1].
        labels: int64 (N,).
        scale: what uint8 values are divided by (255; scikit-learn's digits: 16).

    Only form is checked here, and the range of uint8 values; :func:`tensor_split` checks what
    comes from outside.

    Raises:
        DataError: wrong dimensions, types or lengths.

    >>> TensorSplit(torch.full((1, 1, 1, 1), 51, dtype=torch.uint8), torch.tensor([0])).images([0])
    tensor([[[[0.2000]]]])
    """

    def __init__(self, images: Tensor, labels: Tensor, scale: int = 255) -> None:
        if images.ndim != 4 or images.dtype not in (torch.uint8, torch.float32):
            raise DataError(
                "expected uint8 or float32 images of shape (N, C, H, W), "
                f"got {images.dtype} of shape {tuple(images.shape)}; use tensor_split to convert"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"expected int64 labels of shape ({len(images)},), one an image, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if (
            images.dtype == torch.uint8
            and scale < 255
            and images.numel()
            and int(images.max()) > scale
        ):
            raise DataError(
                f"expected uint8 values from 0 to the scale {scale}, "
                f"got up to {int(images.max())}; give the scale that belongs to the images"
            )
        self._images = images
        self.labels = labels.cpu()
        self.shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        self.device = images.device
        self.scale = scale

    def prepare(self, indices: Indices) -> None:
        """Nothing: they are there."""

    @property
    def resident(self) -> bool:
        """Whether they were moved to the device as a whole."""
        return self._images.device == self.device

    def to(self, device: str | torch.device) -> TensorSplit:
        """The same images, returned on ``device``.

        They move there as a whole where they take under a quarter of its free memory;
        otherwise they stay where they are and each batch moves.
        """
        target = torch.device(device)
        if target == torch.device("cuda"):
            target = torch.device("cuda", torch.cuda.current_device())
        moves = self._images.nbytes < _free_memory(target) // 4
        moved = TensorSplit(
            self._images.to(target) if moves else self._images, self.labels, self.scale
        )
        moved.device = target
        return moved

    def subset(self, indices: Indices) -> TensorSplit:
        """The images and labels at ``indices``, in that order, copied."""
        positions = self._positions(indices)
        part = TensorSplit(self._stored(positions), self.labels[positions], self.scale)
        part.device = self.device
        return part

    def relabelled(self, labels: Tensor) -> TensorSplit:
        """The same images with other labels, int64 (N,)."""
        part = TensorSplit(self._images, labels, self.scale)
        part.device = self.device
        return part

    def _stored(self, positions: Tensor) -> Tensor:
        return self._images.index_select(0, sent(positions, self._images.device))


class StreamSplit(Split):
    """Images decoded on demand, for what does not fit in memory.

    Args:
        read: gives image ``i`` as uint8 (0..255) or float32 ([0, 1]), shape (C, H, W).
        labels: int64 (N,); image ``i`` has ``labels[i]``.
        shape: (C, H, W) of every image.
        threads: how many threads call ``read`` at once; ``None`` for one a processor core, up
            to 16. Use 1 where ``read`` is not safe to call from several.

    >>> split = StreamSplit(lambda i: torch.full((1, 2, 2), i, dtype=torch.uint8),
    ...                     torch.tensor([0, 1, 1]), (1, 2, 2))
    >>> split.subset([2, 1]).images([0]).max() * 255
    tensor(2.)
    """

    def __init__(
        self,
        read: Callable[[int], Tensor],
        labels: Tensor,
        shape: tuple[int, int, int],
        *,
        threads: int | None = None,
    ) -> None:
        self._read = read
        self._sources = torch.arange(len(labels))
        self.labels = labels
        self.shape = shape
        self.device = torch.device("cpu")
        self.scale = 255
        self._threads = threads
        self._prepared: dict[tuple[int, ...], Future[Tensor]] = {}

    @property
    def resident(self) -> bool:
        """They never do."""
        return False

    def to(self, device: str | torch.device) -> StreamSplit:
        """The same images; each batch moves to ``device``."""
        return self._copy(self._sources, self.labels, torch.device(device))

    def subset(self, indices: Indices) -> StreamSplit:
        """The images and labels at ``indices``, in that order."""
        positions = self._positions(indices)
        return self._copy(self._sources[positions], self.labels[positions], self.device)

    def relabelled(self, labels: Tensor) -> StreamSplit:
        """The same images with other labels, int64 (N,)."""
        if labels.dtype != torch.int64 or labels.shape != self.labels.shape:
            raise DataError(
                f"expected int64 labels of shape ({len(self)},), one an image, got {labels.dtype} "
                f"of shape {tuple(labels.shape)}"
            )
        return self._copy(self._sources, labels.cpu(), self.device)

    def _copy(self, sources: Tensor, labels: Tensor, device: torch.device) -> StreamSplit:
        copy = StreamSplit(self._read, labels, self.shape, threads=self._threads)
        copy._sources, copy.device = sources, device
        return copy

    def _stored(self, positions: Tensor) -> Tensor:
        sources = self._sources[positions].tolist()
        if not sources:
            return torch.empty((0, *self.shape))
        coming = self._prepared.pop(tuple(sources), None)
        return self._read_all(sources) if coming is None else coming.result()

    def prepare(self, indices: Indices) -> None:
        """Begin to decode these images; those of the last two calls are kept until asked for.

        Does nothing where ``read`` must not be called from several threads.
        """
        if self._threads == 1:
            return
        sources = self._sources[self._positions(indices)].tolist()
        if sources and tuple(sources) not in self._prepared:
            for old in list(self._prepared)[:-1]:
                self._prepared.pop(old).cancel()
            self._prepared[tuple(sources)] = _ahead().submit(self._read_all, sources)

    def _read_all(self, sources: list[int]) -> Tensor:
        if self._threads == 1:
            images = [self._checked(i) for i in sources]
        else:
            images = list(_pool(self._threads or default_threads()).map(self._checked, sources))
        return torch.stack(images)

    def _checked(self, source: int) -> Tensor:
        image = self._read(source)
        if tuple(image.shape) != self.shape:
            raise DataError(
                f"expected every image to have the shape {self.shape}, got "
                f"{tuple(image.shape)} for image {source}; resize the images to one size"
            )
        return image


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="robustann-images")


@cache
def _ahead() -> ThreadPoolExecutor:
    # Not among those that decode: it waits for them.
    return ThreadPoolExecutor(1, thread_name_prefix="robustann-prepared")


def default_threads() -> int:
    """Threads that decode images: one a processor core, up to 16.

    >>> 1 <= default_threads() <= 16
    True
    """
    return min(16, os.cpu_count() or 1)


def fits_in_memory(values: int, share: float = 0.25) -> bool:
    """Whether ``values`` bytes are under a share of the memory that is free now.

    >>> fits_in_memory(1), fits_in_memory(2**60)
    (True, False)
    """
    return values < share * _free_memory(torch.device("cpu"))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = 8 * 2**30  # where the system does not tell
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    # A container may allow less than the machine has.
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def _unit(stored: Tensor, scale: int) -> Tensor:
    if stored.dtype == torch.float32:
        return stored
    # A tensor on the device, because CUDA turns division by a Python number into a product
    # with its reciprocal, which rounds differently from the CPU.
    return stored.to(torch.float32) / torch.full((), float(scale), device=stored.device)
