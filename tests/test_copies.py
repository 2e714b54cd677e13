"""Copies to an accelerator: which way, in which order, and the same bytes.

There need be no accelerator here: what PyTorch would do on one is written down instead.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch

import robustann as ra
from robustann import copies
from robustann.copies import ahead, pins, sent
from robustann.data import StreamSplit, TensorSplit
from robustann.errors import DataError
from robustann.training.batches import fetched

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_what_goes_from_the_processor_to_a_gpu_is_pinned():
    here = torch.zeros(2)
    assert pins(here, CUDA)
    assert not pins(here, CPU)
    assert not pins(here, torch.device("mps"))
    assert not pins(torch.zeros(2, device="meta"), CUDA)


def test_a_pinned_copy_does_not_wait_and_any_other_does(monkeypatch):
    asked: list[str] = []
    original = torch.Tensor.to

    def to(self: torch.Tensor, device: Any, non_blocking: bool = False) -> torch.Tensor:
        asked.append(f"to {device}{' without waiting' if non_blocking else ''}")
        return original(self, "cpu")

    def pin(self: torch.Tensor) -> torch.Tensor:
        asked.append("pin")
        return self

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    values = torch.arange(3)
    assert torch.equal(sent(values, CUDA), values)
    assert torch.equal(sent(values, CPU), values)
    assert asked == ["pin", "to cuda without waiting", "to cpu"]


def test_one_item_ahead_in_order_and_no_more():
    begun: list[int] = []
    third = threading.Event()

    def work(number: int) -> torch.Tensor:
        begun.append(number)
        if number == 2:
            third.set()
        return torch.tensor(number)

    coming = ahead(work, list(range(5)), CPU)
    assert begun == []
    assert int(next(coming)) == 0
    assert int(next(coming)) == 1
    assert third.wait(10)
    assert begun == [0, 1, 2]
    assert [int(one) for one in coming] == [2, 3, 4]
    assert list(ahead(work, [], CPU)) == []


def test_an_error_comes_where_its_item_would():
    def work(number: int) -> torch.Tensor:
        if number == 1:
            raise ValueError("item 1")
        return torch.tensor(number)

    coming = ahead(work, [0, 1, 2], CPU)
    assert int(next(coming)) == 0
    with pytest.raises(ValueError, match="item 1"):
        next(coming)


class Stream:
    """A stream that writes down what is done in it."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> str:
        self.log.append(f"{self.name}: event")
        return f"event {sum(line.endswith(': event') for line in self.log)}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name}: waits for {event}")


class Made:
    """A tensor, as far as streams know it."""

    def __init__(self, log: list[str], number: int) -> None:
        self.log, self.number = log, number

    def record_stream(self, stream: Stream) -> None:
        self.log.append(f"{self.number} belongs to {stream.name}")


def test_on_a_gpu_copies_take_a_stream_of_their_own(monkeypatch):
    log: list[str] = []
    main, here = Stream(log, "main"), threading.local()

    @contextlib.contextmanager
    def inside(stream):
        here.stream = stream
        yield
        here.stream = main

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log, "side"))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)

    def work(number: int) -> Any:
        log.append(f"{here.stream.name}: makes {number}")
        return Made(log, number)

    seen = []
    for made in ahead(work, [7, 8], CUDA):
        log.append(f"used {made.number}")
        seen.append(made.number)
    assert seen == [7, 8]
    for number, place in ((7, 1), (8, 2)):
        # In this order, whatever lies in between.
        steps = [f"side: makes {number}", f"main: waits for event {place}",
                 f"{number} belongs to main", f"used {number}"]  # fmt: skip
        assert [line for line in log if line in steps] == steps
    assert log[0] == "side: makes 7"
    assert log[1] == "side: event"


@pytest.fixture
def parts():
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(20) % 3
    return (
        TensorSplit(images, labels),
        StreamSplit(lambda index: images[index], labels, (1, 4, 4)),
    )


def test_what_does_not_lie_on_the_device_is_fetched_ahead(parts, monkeypatch):
    held, streamed = parts
    away = TensorSplit(held._images, held.labels)
    # As if it had been too large to be moved.
    away.device = torch.device("meta")
    assert (held.resident, streamed.resident, away.resident) == (True, False, False)
    batches = torch.randperm(20).split(6)
    used = []
    original = copies.ahead

    def noted(work, items, device):
        used.append(len(items))
        return original(work, items, device)

    monkeypatch.setattr("robustann.training.batches.ahead", noted)
    first, second = (list(fetched(part, batches)) for part in (held, streamed))
    assert used == [4]
    for (here, images), (there, others) in zip(first, second, strict=True):
        assert torch.equal(here, there)
        assert torch.equal(images, others)
    assert [images.device.type for _, images in fetched(away, batches)] == ["meta"] * 4
    assert used == [4, 4]


def test_images_go_to_a_gpu_through_pinned_memory(parts, monkeypatch):
    held, streamed = parts
    asked: list[torch.Tensor] = []

    def noted(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        asked.append(tensor)
        return tensor

    monkeypatch.setattr("robustann.data.splits.sent", noted)
    for part in (held, streamed):
        asked.clear()
        images = part.images([3, 1])
        # As they are stored: a quarter of what they take as floats.
        assert asked[-1].dtype == torch.uint8
        assert torch.equal(asked[-1].float() / 255, images)


def test_what_was_prepared_is_read_once_and_while_something_else_is_done():
    read: list[int] = []
    go = threading.Event()

    def reader(index: int) -> torch.Tensor:
        assert go.wait(10)
        read.append(index)
        return torch.full((1, 2, 2), index, dtype=torch.uint8)

    split = StreamSplit(reader, torch.zeros(9, dtype=torch.int64), (1, 2, 2), threads=2)
    split.prepare([4, 2])
    split.prepare([4, 2])
    go.set()
    assert (split.images([4, 2])[:, 0, 0, 0] * 255).tolist() == [4.0, 2.0]
    assert sorted(read) == [2, 4]
    # It was handed out; and only the last two are kept.
    assert (split.images([4, 2])[:, 0, 0, 0] * 255).tolist() == [4.0, 2.0]
    for start in range(0, 9, 3):
        split.prepare(slice(start, start + 3))
    assert list(split._prepared) == [(3, 4, 5), (6, 7, 8)]
    # What must be called from one thread alone is not called from another.
    alone = StreamSplit(reader, split.labels, (1, 2, 2), threads=1)
    alone.prepare([1])
    assert not alone._prepared
    assert split.subset([3, 4]).images([1]).max() * 255 == 4


def test_an_image_that_cannot_be_read_is_told_when_it_is_asked_for():
    def reader(index: int) -> torch.Tensor:
        raise DataError(f"image {index}")

    split = StreamSplit(reader, torch.zeros(2, dtype=torch.int64), (1, 2, 2))
    split.prepare([1])
    with pytest.raises(DataError, match="image 1"):
        split.images([1])


def test_an_audit_reads_a_batch_ahead_and_finds_the_same(model, digits, monkeypatch):
    images = (digits.test.images(slice(0, 40)) * 255).round().to(torch.uint8)
    labels = digits.test.labels[:40]
    held = TensorSplit(images, labels)
    streamed = StreamSplit(lambda index: images[index], labels, held.shape)
    ready: list[list[int]] = []
    original = StreamSplit.prepare

    def noted(self: StreamSplit, indices: Any) -> None:
        ready.append(list(indices))
        original(self, indices)

    monkeypatch.setattr(StreamSplit, "prepare", noted)
    threat = ra.ThreatModel("linf", 0.1)
    asked: dict[str, Any] = {"attacks": ["fgsm"], "batch_size": 16, "trust": False, "curve": False,
                             "explain": False}  # fmt: skip
    first, second = (
        ra.audit(model, split, threat, class_names=digits.class_names, **asked)
        for split in (held, streamed)
    )
    assert ready == [list(range(16, 32)), list(range(32, 40))]
    assert first.attacks == second.attacks
    assert first.provenance.data_sha256 == second.provenance.data_sha256
