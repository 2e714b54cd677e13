"""The training loop: what it reaches, and that a stopped run ends like one that was not."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.data import (
    Augmentation,
    ImageData,
    Split,
    StreamSplit,
    TensorSplit,
    load_data,
)
from robustann.errors import ModelError, RobustannError, UsageError
from robustann.rng import SampleRandom
from robustann.training import StandardStep, TrainConfig, train


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


@pytest.fixture(scope="module")
def small(digits: ImageData) -> ImageData:
    """Enough to learn something from, in a moment."""
    return ImageData(
        name="small",
        train=digits.train.subset(slice(0, 330)),
        validation=digits.validation.subset(slice(0, 60)),
        test=digits.test.subset(slice(0, 60)),
        class_names=digits.class_names,
        augmentation=Augmentation(pad=1, flip=True),
    )


def network() -> nn.Module:
    """Whatever a resume could forget: batch statistics, dropout, an integer buffer."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def without_seconds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


class CrashError(Exception):
    """Stands for a crash."""


@dataclass(frozen=True, kw_only=True)
class Stopping(StandardStep):
    """The standard step, until it is called at this epoch and batch."""

    epoch: int = 0
    batch: int = 0

    def parameters(self) -> dict[str, Any]:
        return {"label_smoothing": self.label_smoothing}

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        object.__setattr__(self, "calls", 0 if epoch == self.epoch else -(10**9))

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        calls: int = self.calls  # type: ignore[attr-defined]
        if calls == self.batch:
            raise CrashError
        object.__setattr__(self, "calls", calls + 1)
        return super().__call__(model, images, labels, random=random)


@dataclass(frozen=True, kw_only=True)
class Scaled(StandardStep):
    """The cross-entropy times a factor that depends on the epoch."""

    name: ClassVar[str] = "scaled"
    factors: tuple[float, ...]

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        object.__setattr__(self, "factor", self.factors[min(epoch, len(self.factors)) - 1])

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        loss, logits = super().__call__(model, images, labels, random=random)
        factor: float = self.factor  # type: ignore[attr-defined]
        return loss * factor, logits


# --- what it reaches ---


def test_digits_reach_97_percent_with_the_defaults(digits: ImageData) -> None:
    result = train("small-cnn", digits)
    assert result.metrics["accuracy"] >= 0.97
    assert result.epochs_run == 30
    assert result.metrics["test_size"] == len(digits.test)
    low, high = result.metrics["accuracy_interval"]
    assert low < result.metrics["accuracy"] < high
    assert all(0.9 < result.metrics[name] <= 1 for name in ("precision", "recall", "f1"))
    with torch.no_grad():
        found = result.model(digits.test.images(slice(None))).argmax(1)
    assert result.metrics["accuracy"] == pytest.approx(
        (found == digits.test.labels).double().mean().item()
    )


def test_normalisation_is_that_of_the_training_images(digits: ImageData) -> None:
    grey = digits.train.images(slice(0, 200))
    colours = torch.cat([grey, grey * 0.5, torch.full_like(grey, 0.25)], 1)
    part = TensorSplit(colours, digits.train.labels[:200])
    data = ImageData("colours", part, part, part, digits.class_names)
    spec = train("small-cnn", data, epochs=1).model.spec
    array = colours.double().numpy()
    assert spec.mean == pytest.approx(array.mean((0, 2, 3)), abs=1e-9)
    # The constant channel is not divided by zero.
    assert spec.std == pytest.approx([*array.std((0, 2, 3))[:2], 1.0], abs=1e-9)


def test_a_module_is_trained_in_place(small: ImageData) -> None:
    model, before = linear(), linear()
    result = train(model, small, epochs=2)
    assert result.model is model
    assert not any(module.training for module in model.modules())
    assert not same_tensors(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"channels_last": True},
        {"clip": 0.5},
        {"ema": 0.0},
        {"batch_size": 10_000, "epochs": 60},
    ],
    ids=str,
)
def test_every_setting_still_learns(small: ImageData, settings: dict[str, Any]) -> None:
    data = replace(small, augmentation=Augmentation())
    result = train(network(), data, **{"epochs": 20, **settings})
    assert result.metrics["accuracy"] > 0.7
    assert all(tensor.is_contiguous() for tensor in result.model.state_dict().values())
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())


def test_clipping_limits_the_step(small: ImageData) -> None:
    model, before = linear(), linear()
    # One batch an epoch: the first step of plain descent is lr * gradient, with Nesterov
    # (1 + momentum) times that.
    train(model, small, epochs=1, batch_size=1000, clip=1e-3, ema=0.0, weight_decay=0.0, lr=1.0)
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    )
    assert 0 < float(moved.detach().norm()) <= 1.9e-3


def test_files_decoded_on_demand_give_the_same_weights(small: ImageData) -> None:
    images = small.train.images(slice(None))
    stream = StreamSplit(lambda i: images[i], small.train.labels, small.shape, threads=1)
    plain = train(network(), small, epochs=2).model
    assert same_tensors(plain, train(network(), replace(small, train=stream), epochs=2).model)


# --- how it optimises ---


def test_average_of_the_weights(small: ImageData) -> None:
    seen: list[list[Tensor]] = []

    class Recording(StandardStep):
        def __call__(
            self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
        ) -> tuple[Tensor, Tensor]:
            if self is recording:
                seen.append([p.detach().clone() for p in model.parameters()])
            return super().__call__(model, images, labels, random=random)

    recording = Recording()
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 50, "seed": 3}
    model = linear()
    # Without averaging the model ends with the last weights, which the step never sees.
    last = train(linear(), small, ema=0.0, step=StandardStep(), **settings)
    train(model, small, ema=0.5, step=recording, **settings)
    weights = [*seen[1:], list(last.model.parameters())]
    if last.best_epoch != 2:
        pytest.fail("choose data on which the last epoch is the best")
    average = weights[0]
    for count, current in enumerate(weights[1:], start=1):
        decay = min(0.5, (1 + count) / (10 + count))
        average = [decay * a + (1 - decay) * c for a, c in zip(average, current, strict=True)]
    for found, expected in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(found.detach(), expected)


def test_biases_and_norms_do_not_decay(small: ImageData) -> None:
    model, before = network(), network()
    still = Scaled(factors=(0.0,))
    train(model, small, step=still, epochs=3, weight_decay=0.5, ema=0.0)
    moved = {
        name: not torch.equal(parameter, dict(before.named_parameters())[name])
        for name, parameter in model.named_parameters()
    }
    assert {name for name, it_moved in moved.items() if it_moved} == {"0.weight", "6.weight"}


def test_frozen_parameters_stay(small: ImageData) -> None:
    model, before = network(), network()
    model.get_submodule("0").requires_grad_(False)
    train(model, small, epochs=1)
    assert torch.equal(model.state_dict()["0.weight"], before.state_dict()["0.weight"])
    assert not next(model.parameters()).requires_grad


class Modes(StandardStep):
    """Notes which modules are in eval mode while training."""

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        self.seen.append({name for name, one in model.named_modules() if not one.training})
        return super().__call__(model, images, labels, random=random)

    seen: ClassVar[list[set[str]]] = []


@pytest.mark.parametrize(
    ("evaluated", "frozen", "expected"),
    [
        # As loaded: trained whole.
        ([""], [], []),
        ([], ["1"], []),
        (["1"], ["1"], ["1"]),
        # An oversight, such as a part that was loaded: its parameters are to train.
        (["0", "1"], ["0.bias"], []),
        # By itself, and not: dropout.
        (["3"], [], ["3"]),
        ([""], ["0", "1"], ["0", "1"]),
    ],
    ids=str,
)
def test_frozen_parts_in_eval_mode_stay_there(
    small: ImageData, evaluated: list[str], frozen: list[str], expected: list[str]
) -> None:
    model, before = network(), network()
    for name in evaluated:
        model.get_submodule(name).eval()
    for name, parameter in model.named_parameters():
        if any(name.startswith(part) for part in frozen):
            parameter.requires_grad_(False)
    Modes.seen.clear()
    train(model, small, step=Modes(), epochs=2)
    assert all(seen == set(expected) for seen in Modes.seen)
    own, theirs = model.state_dict(), before.state_dict()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(own[name], theirs[name]) == ("1" in expected)


def test_a_frozen_part_stays_in_eval_mode_with_all_that_is_in_it(small: ImageData) -> None:
    def made() -> nn.Module:
        return nn.Sequential(network(), nn.Dropout(0.5), nn.Linear(10, 10))

    model = made()
    model[0].requires_grad_(False).eval()  # type: ignore[index, operator]
    # In training mode on purpose: statistics that adapt, in a part that is frozen otherwise.
    model[0][1].train()  # type: ignore[index]
    Modes.seen.clear()
    train(model, small, step=Modes(), epochs=1)
    assert Modes.seen[0] == {"0", *(f"0.{index}" for index in (0, 2, 3, 4, 5, 6))}


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 7])
def test_learning_rate_rises_and_falls(small: ImageData, epochs: int) -> None:
    rates = [row["lr"] for row in train(linear(), small, epochs=epochs, lr=0.2).history]
    assert max(rates) <= 0.2
    assert min(rates) > 0
    peak = rates.index(max(rates))
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert epochs == 1 or rates[-1] < 0.06


def test_learning_rate_may_come_from_the_step(small: ImageData) -> None:
    class Careful(StandardStep):
        default_lr = 0.01

    def peak(**settings: Any) -> Any:
        result = train(linear(), small, epochs=1, **settings)
        return result.training["config"]["lr"], max(row["lr"] for row in result.history)

    standard, careful = peak(), peak(step=Careful())
    assert (standard[0], careful[0]) == (0.1, 0.01)
    assert standard[1] == pytest.approx(10 * careful[1])
    assert peak(step=Careful(), lr=0.1) == standard


# --- which epoch ---


def test_the_best_epoch_is_returned_and_chosen_on_validation(digits: ImageData) -> None:
    # From epoch 4 on it unlearns.
    step = Scaled(factors=(1.0, 1.0, 1.0, -1.0))
    result = train(linear(), digits, step=step, epochs=6, ema=0.0, lr=0.1, clip=5.0)
    scores = [row["validation_accuracy"] for row in result.history]
    assert result.best_epoch == 6 - scores[::-1].index(max(scores)) <= 3
    assert scores[-1] < max(scores) - 0.2
    with torch.no_grad():
        found = result.model(digits.validation.images(slice(None))).argmax(1)
    measured = (found == digits.validation.labels).double().mean().item()
    assert measured == pytest.approx(max(scores))
    assert result.metrics["validation_accuracy"] == max(scores)


def test_early_stopping(small: ImageData) -> None:
    result = train(linear(), small, step=Scaled(factors=(0.0,)), epochs=9, patience=2)
    # Nothing changes, so no epoch is better than the first; of equals the last is taken.
    assert result.epochs_run == 3
    assert result.best_epoch == 3


def test_a_step_may_say_what_it_is_judged_by(small: ImageData) -> None:
    class Judged(StandardStep):
        def validation_logits(
            self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
        ) -> Tensor:
            assert not model.training
            numbers.append(random.uniform(1))
            good = len(numbers) <= 1
            return F.one_hot(labels if good else (labels + 1) % 10, 10).float()

    numbers: list[Tensor] = []
    result = train(linear(), small, step=Judged(), epochs=3)
    assert [row["validation_robust_accuracy"] for row in result.history] == [1.0, 0.0, 0.0]
    assert result.best_epoch == 1
    assert result.metrics["validation_robust_accuracy"] == 1.0
    # The same numbers in each epoch, so that epochs can be compared.
    assert torch.equal(numbers[0], numbers[1])


def test_the_test_part_is_read_once_at_the_end(small: ImageData) -> None:
    events: list[str] = []

    class Watched(TensorSplit):
        def to(self, device: object) -> TensorSplit:
            return self

        def images(self, indices: Any) -> Tensor:
            events.extend(["test"] * len(torch.as_tensor(indices)))
            return super().images(indices)

    class Telling(StandardStep):
        def begin_epoch(self, epoch: int, epochs: int) -> None:
            events.append("epoch")

    watched = Watched(small.test.images(slice(None)), small.test.labels)
    train(linear(), replace(small, test=watched), step=Telling(), epochs=2)
    assert events == ["epoch", "epoch"] + ["test"] * len(small.test)


# --- randomness ---


def test_the_callers_random_state_is_untouched(small: ImageData) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    train(network(), small, epochs=1)
    train("small-cnn", small, epochs=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]
    assert before[2] == random.getstate()


def test_the_seed_decides(small: ImageData) -> None:
    torch.manual_seed(1)
    first = train("small-cnn", small, epochs=1, seed=7).model
    torch.manual_seed(2)
    second = train("small-cnn", small, config=TrainConfig(epochs=1), seed=7).model
    assert same_tensors(first, second)
    assert not same_tensors(first, train("small-cnn", small, epochs=1, seed=8).model)
    # Also where the seed has no part in the initial weights.
    a, b = (train(linear(), small, epochs=1, seed=seed).model for seed in (7, 8))
    assert not same_tensors(a, b)


# --- stopping and resuming ---


@pytest.mark.parametrize("stop", [(1, 2), (2, 0), (3, 1), (4, 0)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"ema": 0.0, "channels_last": True, "clip": 1.0}, {"patience": 1}],
    ids=["ema", "plain", "patience"],
)
def test_resuming_is_exact(
    small: ImageData, tmp_path: Path, stop: tuple[int, int], settings: dict[str, Any]
) -> None:
    settings = {"epochs": 4, "batch_size": 64, **settings}
    whole = train(network(), small, step=StandardStep(), log=tmp_path / "whole.jsonl", **settings)
    checkpoint, log = tmp_path / "checkpoint.pt", tmp_path / "log.jsonl"
    if whole.epochs_run < stop[0]:
        pytest.skip("ended before")
    with pytest.raises(CrashError):
        train(
            network(),
            small,
            step=Stopping(epoch=stop[0], batch=stop[1]),
            checkpoint=checkpoint,
            log=log,
            **settings,
        )
    assert checkpoint.exists() == (stop[0] > 1)
    # A killed process may have left a line that the checkpoint knows nothing of.
    with log.open("a") as stream:
        stream.write('{"epoch": 99}\n{"epo')
    torch.manual_seed(123)
    resumed = train(
        network(),
        small,
        step=StandardStep(),
        checkpoint=checkpoint,
        log=log,
        resume=True,
        **settings,
    )
    assert same_tensors(whole.model, resumed.model)
    assert without_seconds(whole.history) == without_seconds(resumed.history)
    assert whole.metrics == resumed.metrics
    assert (whole.best_epoch, whole.epochs_run) == (resumed.best_epoch, resumed.epochs_run)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == resumed.history
    assert not checkpoint.exists()


def test_resuming_after_the_last_epoch_only_scores(
    small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise CrashError

    settings: dict[str, Any] = {"epochs": 2, "checkpoint": tmp_path / "checkpoint.pt"}
    whole = train("small-cnn", small, **settings)
    with monkeypatch.context() as patch:
        patch.setattr("robustann.training.run.classification_report", crash)
        with pytest.raises(CrashError):
            train("small-cnn", small, **settings)
    step = Stopping(epoch=3, label_smoothing=TrainConfig.label_smoothing)
    resumed = train("small-cnn", small, step=step, resume=True, **settings)
    assert same_tensors(whole.model, resumed.model)


def test_resume_without_a_checkpoint_starts_afresh(small: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "new" / "checkpoint.pt"
    result = train(linear(), small, epochs=1, checkpoint=path, resume=True)
    assert result.epochs_run == 1
    with pytest.raises(UsageError, match="resume: expected a checkpoint"):
        train(linear(), small, epochs=1, resume=True)


@pytest.fixture
def stopped(small: ImageData, tmp_path: Path) -> Path:
    """The checkpoint of a run stopped in its second epoch."""
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CrashError):
        train(linear(), small, step=Stopping(epoch=2), checkpoint=path, epochs=3)
    return path


def test_an_interrupt_leaves_the_checkpoint_whole(
    small: ImageData, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stopped.read_bytes()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("robustann.files.Path.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(linear(), small, step=StandardStep(), checkpoint=stopped, epochs=3, resume=True)
    assert stopped.read_bytes() == before
    assert [path.name for path in stopped.parent.iterdir()] == [stopped.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.05}, r"config\.lr: expected 0\.1, got 0\.05"),
        ({"epochs": 4}, r"config\.epochs: expected 3, got 4"),
        ({"step": StandardStep(label_smoothing=0.1)}, r"step\.label_smoothing: expected 0\.0"),
        ({"step": Scaled(factors=(1.0,))}, r"step\.name: expected \"standard\", got \"scaled\""),
    ],
    ids=str,
)
def test_resuming_another_run_is_refused(
    small: ImageData, stopped: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(
            linear(),
            small,
            checkpoint=stopped,
            resume=True,
            **{"epochs": 3, "step": StandardStep(), **change},
        )
    assert stopped.exists()


def test_resuming_with_other_data_or_model_is_refused(small: ImageData, stopped: Path) -> None:
    settings: dict[str, Any] = {
        "epochs": 3,
        "step": StandardStep(),
        "checkpoint": stopped,
        "resume": True,
    }
    pixels = small.train.images(slice(None)).clone()
    pixels[7, 0, 3, 3] += 0.01
    other = TensorSplit(pixels, small.train.labels)
    with pytest.raises(UsageError, match=r"data\.train: expected"):
        train(linear(), replace(small, train=other), **settings)
    with pytest.raises(UsageError, match=r"data\.validation: expected"):
        train(linear(), replace(small, validation=small.test), **settings)
    with pytest.raises(UsageError, match=r"data\.augmentation\.pad: expected 1, got 0"):
        train(linear(), replace(small, augmentation=Augmentation(flip=True)), **settings)
    with pytest.raises(UsageError, match=r"weights\."):
        train(network(), small, **settings)
    with pytest.raises(UsageError, match=r"architecture: expected \"Sequential\""):
        train("small-cnn", small, **settings)


def test_resuming_from_other_initial_weights_is_refused(small: ImageData, stopped: Path) -> None:
    settings: dict[str, Any] = {
        "epochs": 3,
        "step": StandardStep(),
        "checkpoint": stopped,
        "resume": True,
    }
    other = linear()
    with torch.no_grad():
        other.get_submodule("1").get_parameter("bias")[3] += 1e-3
    with pytest.raises(UsageError, match=r"initial_weights: expected"):
        train(other, small, **settings)
    assert stopped.exists()
    # Memory format and device are no difference.
    resumed = train(linear().to(memory_format=torch.channels_last), small, **settings)
    whole = train(linear(), small, epochs=3, step=StandardStep())
    assert same_tensors(resumed.model, whole.model)


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "text", "other"])
def test_a_damaged_checkpoint_is_refused(small: ImageData, stopped: Path, damage: str) -> None:
    content = bytearray(stopped.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "bit":
        content[len(content) // 2] ^= 1
    elif damage in ("empty", "text"):
        content = bytearray(b"" if damage == "empty" else b"not a checkpoint")
    stopped.write_bytes(content)
    if damage == "other":
        torch.save({"weights": torch.zeros(1)}, stopped)
    with pytest.raises(RobustannError, match="damaged file") as caught:
        train(linear(), small, step=StandardStep(), checkpoint=stopped, epochs=3, resume=True)
    assert "remove it to start afresh" in str(caught.value)


def test_a_checkpoint_runs_no_code(
    small: ImageData, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return print, ("code ran",)

    torch.save(Evil(), stopped)
    with pytest.raises(RobustannError, match="damaged file"):
        train(linear(), small, step=StandardStep(), checkpoint=stopped, epochs=3, resume=True)
    assert "code ran" not in capsys.readouterr().out


# --- log and progress ---


def test_log_has_a_line_an_epoch(small: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    seen: list[int] = []

    class Reading(StandardStep):
        def begin_epoch(self, epoch: int, epochs: int) -> None:
            seen.append(len(path.read_text().splitlines()))

    result = train(linear(), small, epochs=3, step=Reading(), log=path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == result.history
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert list(rows[0]) == [
        "epoch",
        "train_loss",
        "train_accuracy",
        "validation_accuracy",
        "lr",
        "seconds",
    ]
    assert seen == [0, 1, 2]
    assert json.loads(json.dumps(result.training)) == result.training
    assert json.loads(json.dumps(result.metrics)) == result.metrics


def test_progress_needs_a_terminal(
    small: ImageData, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    train(linear(), small, epochs=1, progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    train(linear(), small, epochs=1)
    assert capsys.readouterr() == ("", "")
    train(linear(), small, epochs=2, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "epoch 2/2" in shown.err
    assert "validation" in shown.err


# --- errors ---


def test_a_loss_that_is_not_finite_stops(small: ImageData, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    step = Scaled(factors=(1.0, float("nan")))
    with pytest.raises(
        RobustannError, match=r"got nan in epoch 2, step 1 of 2; try a learning rate lower"
    ):
        train(linear(), small, epochs=3, step=step, checkpoint=checkpoint)
    # The last good epoch stays.
    assert checkpoint.exists()
    with pytest.raises(RobustannError, match=r"expected (a finite loss|finite logits)"):
        train(network(), small, epochs=3, lr=1e30)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 2.5),
        ("epochs", True),
        ("batch_size", 0),
        ("lr", 0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("lr", "0.1"),
        ("momentum", 1.0),
        ("momentum", 0),
        ("weight_decay", -1e-4),
        ("label_smoothing", 1.0),
        ("ema", 1.0),
        ("ema", -0.1),
        ("patience", 0),
        ("precision", "fp16"),
        ("channels_last", 1),
        ("compile", "yes"),
        ("seed", -1),
        ("seed", 0.5),
        ("clip", 0.0),
    ],
)
def test_settings_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name}: expected .*, got "):
        TrainConfig(**{name: value})


def test_wrong_calls(small: ImageData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'epochs'"):
        train(linear(), small, epoch=3)
    with pytest.raises(UsageError, match="expected an ImageData, got str"):
        train("small-cnn", "digits")  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="label_smoothing: expected it to be set on the given"):
        train(linear(), small, step=StandardStep(), label_smoothing=0.2)
    with pytest.raises(UsageError, match="unknown"):
        train("small-cm", small)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="folder that can be written"):
        train(linear(), small, log=tmp_path / "file" / "log.jsonl")


def test_a_model_that_does_not_fit(small: ImageData) -> None:
    three = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ModelError, match=r"logits of shape \(2, 10\)"):
        train(three, small)
    colour = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(10))
    with pytest.raises(ModelError, match=r"takes images of shape \(1, 8, 8\)"):
        train(colour, small)
    frozen = linear().requires_grad_(False)
    with pytest.raises(ModelError, match="parameters to train"):
        train(frozen, small)


def test_a_replaced_step_is_used(small: ImageData) -> None:
    streams: list[Tensor] = []

    @dataclass
    class Own:
        name: str = "own"

        def parameters(self) -> dict[str, Any]:
            return {"strength": 3}

        def __call__(
            self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
        ) -> tuple[Tensor, Tensor]:
            assert model.training
            assert images.min() >= 0
            assert images.max() <= 1
            streams.append(random.uniform(1))
            logits = model(images)
            return F.mse_loss(logits, F.one_hot(labels, 10).float()), logits

    split: Split = small.train
    result = train(linear(), small, step=Own(), epochs=2, batch_size=len(split))
    assert result.training["step"] == {"name": "own", "strength": 3}
    assert len(streams) == 2
    # Every sample has numbers of its own, other ones in each epoch.
    assert len(torch.cat(streams).unique()) > 1.9 * len(split)


# --- hooks of a step ---


def test_updates_are_followed_by_the_hooks_in_order(small: ImageData) -> None:
    class Bounded(StandardStep):
        def after_backward(self, model: nn.Module) -> None:
            assert all(p.grad is not None for p in model.parameters())
            events.append("backward")

        def after_update(self, model: nn.Module) -> None:
            events.append("update")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.clamp_(-0.01, 0.01)

    events: list[str] = []
    model = linear()
    result = train(model, small, step=Bounded(), epochs=2, batch_size=100, ema=0.9)
    assert events == ["backward", "update"] * 6
    # The average saw projected weights alone.
    assert all(tensor.abs().max() <= 0.01 for tensor in result.last_weights.values())


def test_gradients_changed_after_the_backward_pass_count(small: ImageData) -> None:
    class Still(StandardStep):
        def after_backward(self, model: nn.Module) -> None:
            for parameter in model.parameters():
                parameter.grad = None

    model, before = linear(), linear()
    train(model, small, step=Still(), epochs=1)
    assert same_tensors(model, before)


def test_a_batch_may_be_replayed(small: ImageData) -> None:
    class Replaying(StandardStep):
        replays = 3

        def __call__(
            self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
        ) -> tuple[Tensor, Tensor]:
            seen.append(images)
            numbers.append(random.uniform(1))
            return super().__call__(model, images, labels, random=random)

    seen: list[Tensor] = []
    numbers: list[Tensor] = []
    result = train(linear(), small, step=Replaying(), epochs=2, batch_size=100)
    assert len(seen) == 2 * 3 * 3
    # The same images, augmentation included, but fresh random numbers.
    assert all(torch.equal(seen[i], seen[i - i % 3]) for i in range(18))
    assert not torch.equal(seen[0], seen[3])
    assert not torch.equal(numbers[0], numbers[1])
    assert 0 <= result.history[0]["train_accuracy"] <= 1


class Counting(StandardStep):
    """The weight of the loss hangs on how many updates there have been, in this run or before."""

    def __init__(self, stop: int = -1) -> None:
        super().__init__()
        object.__setattr__(self, "count", torch.zeros(()))
        object.__setattr__(self, "stop", stop)

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        count: Tensor = self.count  # type: ignore[attr-defined]
        if int(count) == self.stop:  # type: ignore[attr-defined]
            raise CrashError
        object.__setattr__(self, "count", count + 1)
        loss, logits = super().__call__(model, images, labels, random=random)
        return loss / (1 + count), logits

    def state(self) -> dict[str, Any]:
        return {"count": self.count}  # type: ignore[attr-defined]

    def restore(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "count", state["count"])


def test_what_a_step_carries_is_resumed(small: ImageData, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 3, "checkpoint": tmp_path / "checkpoint.pt"}
    whole = train(linear(), small, step=Counting(), **settings)
    with pytest.raises(CrashError):
        train(linear(), small, step=Counting(stop=5), **settings)
    resumed = train(linear(), small, step=Counting(), resume=True, **settings)
    assert same_tensors(whole.model, resumed.model)


def test_the_last_weights_are_kept_beside_the_best(digits: ImageData) -> None:
    step = Scaled(factors=(1.0, 1.0, 1.0, -1.0))
    model = linear()
    result = train(model, digits, step=step, epochs=6, ema=0.0, clip=5.0)
    assert result.best_epoch <= 3
    assert result.training["last"] == {
        "validation_accuracy": result.history[-1]["validation_accuracy"]
    }
    assert result.training["last"]["validation_accuracy"] < result.metrics["validation_accuracy"]
    other = linear()
    other.load_state_dict(result.last_weights)
    with torch.no_grad():
        found = other(digits.validation.images(slice(None))).argmax(1)
    assert result.training["last"]["validation_accuracy"] == pytest.approx(
        (found == digits.validation.labels).double().mean().item()
    )


# --- the watch for catastrophic overfitting ---


class Collapsing(StandardStep):
    """Unlearns in one epoch, as long as nothing makes it safer."""

    watched: ClassVar[bool] = True

    def __init__(self, epoch: int, stop: int = 0) -> None:
        super().__init__()
        for name, value in (("epoch", epoch), ("stop", stop), ("safe", False), ("seen", [])):
            object.__setattr__(self, name, value)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        if epoch == self.stop:  # type: ignore[attr-defined]
            raise CrashError
        bad = epoch >= self.epoch and not self.safe  # type: ignore[attr-defined]
        object.__setattr__(self, "factor", -3.0 if bad else 1.0)

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        self.seen.append(images)  # type: ignore[attr-defined]
        loss, logits = super().__call__(model, images, labels, random=random)
        return loss * self.factor, logits  # type: ignore[attr-defined]

    def validation_logits(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, random: SampleRandom
    ) -> Tensor:
        assert not model.training
        with torch.no_grad():
            logits: Tensor = model(images)
        return logits

    def safer(self) -> str:
        object.__setattr__(self, "safe", True)
        return "without unlearning"

    def state(self) -> dict[str, Any]:
        return {"safe": self.safe}  # type: ignore[attr-defined]

    def restore(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "safe", state["safe"])


def test_a_collapse_is_undone(
    digits: ImageData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log.jsonl"
    settings: dict[str, Any] = {"epochs": 6, "clip": 5.0, "log": log}
    # Epoch 3 unlearns; after it come epochs that learn again.
    result = train(linear(), digits, step=Collapsing(epoch=3), **settings)
    rows = result.history
    assert ["event" in row for row in rows] == [False, False, True, False, False, False]
    assert rows[2]["watch_accuracy"] < rows[1]["watch_accuracy"] - 0.2
    assert "back to the weights before epoch 3, without unlearning" in rows[2]["event"]
    # The row describes the weights after the way back: those of the epoch before.
    assert rows[2]["validation_accuracy"] == rows[1]["validation_accuracy"]
    assert rows[-1]["validation_accuracy"] >= rows[1]["validation_accuracy"]
    assert result.training["events"] == [{"epoch": 3, "event": rows[2]["event"]}]
    assert json.loads(log.read_text().splitlines()[2]) == rows[2]
    assert rows[2]["event"] in caplog.text
    # The learning rate goes on as planned.
    plain = train(linear(), digits, step=Collapsing(epoch=99), epochs=6, clip=5.0)
    assert [row["lr"] for row in rows] == [row["lr"] for row in plain.history]
    assert plain.training["events"] == []


def test_watched_images_are_training_images_that_are_not_trained_on(digits: ImageData) -> None:
    step = Collapsing(epoch=99)
    train(linear(), digits, step=step, epochs=2, batch_size=1)
    seen = {tuple(image.flatten().tolist()) for image in torch.cat(step.seen)}  # type: ignore[attr-defined]
    every = {tuple(i.flatten().tolist()) for i in digits.train.images(slice(None))}
    assert seen < every
    assert len(every) - len(seen) == len(digits.train) // 20


def test_resuming_after_a_collapse_is_exact(digits: ImageData, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "epochs": 5,
        "clip": 5.0,
        "checkpoint": tmp_path / "checkpoint.pt",
    }
    whole = train(linear(), digits, step=Collapsing(epoch=3), **settings)
    with pytest.raises(CrashError):
        train(linear(), digits, step=Collapsing(epoch=3, stop=4), **settings)
    resumed = train(linear(), digits, step=Collapsing(epoch=3), resume=True, **settings)
    assert same_tensors(whole.model, resumed.model)
    assert without_seconds(whole.history) == without_seconds(resumed.history)
