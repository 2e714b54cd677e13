"""One run of training: everything that changes in it, and what changes it."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel

from robustann import parallel
from robustann.copies import sent
from robustann.data import ImageData, Split
from robustann.errors import ModelError, RobustannError, UsageError
from robustann.launch import World, world
from robustann.metrics import classification_report
from robustann.models import ImageClassifier, tensor_digest
from robustann.models.registry import is_code
from robustann.progress import Advance
from robustann.rng import SampleRandom
from robustann.training.batches import fetched, predictions
from robustann.training.config import TrainConfig
from robustann.training.distributed import SharedStatistics, joint
from robustann.training.modes import kept_in_eval_mode
from robustann.training.randomness import generator, seed_global
from robustann.training.result import TrainResult
from robustann.training.sharding import optimizer_state, take_up, whole
from robustann.training.steps import TrainingStep
from robustann.training.watch import collapsed, set_aside
from robustann.training.weights import moving_average, parameter_groups

_DEFAULT_EPOCHS = {"mnist": 3}
_READ_EVERY = 16
# Ten steps of an attack on more images would cost more than an epoch of single-step training; of so
# many the accuracy is known to within 2 points.
_JUDGED = 2000
_LOG = logging.getLogger(__name__)
# What a collapse undoes.
_UNDONE = ("model", "average", "optimizer", "step")


class Run:
    """Everything that changes while training, and what changes it."""

    def __init__(
        self,
        model: nn.Module,
        architecture: str,
        data: ImageData,
        config: TrainConfig,
        step: TrainingStep,
        device: torch.device,
        original: nn.Module,
    ) -> None:
        self.model, self.data, self.config, self.step = model, data, config, step
        self.original = original
        self.device = device
        self.epochs = config.epochs or _DEFAULT_EPOCHS.get(data.name, 30)
        default_lr: float = getattr(step, "default_lr", 0.1)
        self.lr = config.lr if config.lr is not None else default_lr
        count = len(data.train)
        self.trained, self.watched = torch.arange(count), torch.arange(0)
        if getattr(step, "watched", False):
            self.trained, self.watched = set_aside(count, config.seed)
        self.batch_size = min(config.batch_size, len(self.trained))
        self.launched = world()
        each, left = divmod(self.batch_size, self.launched.size)
        if left or not each:
            raise UsageError(
                f"batch_size: expected a multiple of the {self.launched.size} processes that share "
                f"each batch, got {self.batch_size} images; choose another one"
            )
        self.share = slice(self.launched.rank * each, (self.launched.rank + 1) * each)
        self.replays: int = getattr(step, "replays", 1)
        self.steps = len(self.trained) // self.batch_size * self.replays
        self.history: list[dict[str, Any]] = []
        self.best_weights: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {
            "architecture": architecture,
            "config": {**asdict(config), "epochs": self.epochs, "lr": self.lr},
            "step": {"name": step.name, **step.parameters()},
            "data": {"name": data.name, "augmentation": asdict(data.augmentation)},
        }
        self.format = torch.channels_last if config.channels_last else torch.contiguous_format
        # Before anything changes the mode.
        self.still = kept_in_eval_mode(model)
        if not config.fsdp:
            model.to(device)
        # Before anything copies or lists the parameters: lazy ones get their shape here.
        self._check_fit()
        self.statistics = SharedStatistics(model, device)
        if not config.fsdp:
            model.to(memory_format=self.format)
        self.average: AveragedModel | None = None
        if config.ema:
            update = moving_average(config.ema)
            self.average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
        self.optimizer = torch.optim.SGD(
            parameter_groups(model, config.weight_decay),
            lr=self.lr,
            momentum=config.momentum,
            nesterov=True,
        )
        # One step more than there are: the cycle's very last rate is next to nothing.
        total = self.epochs * self.steps + 1
        self.schedule = OneCycleLR(
            self.optimizer, max_lr=self.lr, total_steps=total, cycle_momentum=False
        )
        self.forward: Any = torch.compile(model) if config.compile else model
        self.objective = joint(
            step, self.forward, self.data.train.images(slice(0, 2)), averages=not config.fsdp
        )
        # A spread model answers only if all ask alike: then each judges everything.
        self.judges = World() if config.fsdp else self.launched

    @property
    def judged(self) -> nn.Module:
        """The module whose weights are validated and returned."""
        return self.model if self.average is None else self.average.module

    @property
    def best_epoch(self) -> int:
        """The best so far, the later one of equals."""
        return max(self.history, key=lambda row: (_score(row), row["epoch"]))["epoch"]  # type: ignore[no-any-return]

    @property
    def finished(self) -> bool:
        if len(self.history) >= self.epochs:
            return True
        if self.config.patience is None or not self.history:
            return False
        scores = [_score(row) for row in self.history]
        # An equal score is no improvement here, or a perfect one would never stop.
        return len(scores) - 1 - scores.index(max(scores)) >= self.config.patience

    def _check_fit(self) -> None:
        """Two images through the model, before hours of work: does it answer for every class?"""
        images = self.data.train.images(slice(0, 2))
        classes = self.data.num_classes
        self.model.eval()
        try:
            with torch.no_grad(), self._blamed():
                logits = self.model(images)
        except RuntimeError as error:
            raise ModelError(
                f"expected a model that takes images of shape {tuple(images.shape[1:])}, "
                f"got an error from it: {error}; build it for these images"
            ) from error
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if came != (len(images), classes):
            raise ModelError(
                f"expected logits of shape {(len(images), classes)} for {len(images)} images and "
                f"{classes} classes, got {came}; change the model's last layer"
            )

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """Errors of a user's code that a factory built, which create_model's one image in
        evaluation mode did not meet, are the model's."""
        name = self.facts["architecture"]
        try:
            yield
        except (RobustannError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not (isinstance(self.model, ImageClassifier) and is_code(name)):
                raise
            raise ModelError(
                f"the model of '{name}' raised {type(error).__name__}: {error} in training, on "
                f"batches of images of shape {self.data.shape}; correct it there"
            ) from error

    def epoch(self, advance: Advance) -> None:
        """Train one epoch, validate, and append a row to the history."""
        number, started, config = len(self.history) + 1, time.perf_counter(), self.config
        before = self._snapshot() if len(self.watched) else {}
        first: dict[str, float] = {}
        if before and number == 1:
            # Of a model that comes robust and collapses at once, no epoch would be robust.
            with self._blamed():
                first = {"watch_before": self._watched_accuracy()}
        self._tell("begin_epoch", number, self.epochs)
        # Dropout in the parts of a batch is not the same.
        seed_global(self.device, config.seed + 1_000_003 * self.launched.rank, number)
        self.forward.train()
        for name in self.still:
            self.model.get_submodule(name).training = False
        losses = torch.zeros(self.steps, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        rate = 0.0
        for index, (images, labels, random) in enumerate(self._batches(number)):
            self._tell("begin_update", number - 1 + index / self.steps)
            loss, logits = self._gradients(images, labels, random)
            if config.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
            rate = float(self.schedule.get_last_lr()[0])
            self.optimizer.step()
            self._tell("after_update", self.model)
            self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            losses[index] = loss.detach()
            correct += (logits.detach().argmax(1) == labels).sum()
            # Reading a value waits for an accelerator, so not at every step.
            if (done := index + 1) % _READ_EVERY == 0 or done == self.steps:
                self._check_finite(parallel.total(losses[:done]) / self.launched.size, number)
                advance((done - 1) % _READ_EVERY + 1, self._words(number, float(losses[index])))
        losses, correct = parallel.total(losses) / self.launched.size, parallel.total(correct)
        # Statistics of batch normalisation, unlike weights, each process has gathered by itself.
        for module in {self.model, self.judged}:
            parallel.from_first(list(module.buffers()))
        with self._blamed():
            guarded = first | self._guard(before, first) if before else {}
            validated = self._validate()
        self.history.append(
            {
                "epoch": number,
                "train_loss": float(losses.mean()),
                "train_accuracy": int(correct) / (self.steps * self.batch_size),
                **validated,
                **guarded,
                "lr": rate,
                "seconds": time.perf_counter() - started,
            }
        )
        if self.best_epoch == number:
            self.best_weights = self._weights()

    def _weights(self) -> dict[str, Tensor]:
        """A copy of the weights that count, whole."""
        weights = self.judged.state_dict()
        if self.config.fsdp:
            return whole(weights)  # type: ignore[no-any-return]
        return {name: tensor.detach().clone() for name, tensor in weights.items()}

    def _gradients(
        self, images: Tensor, labels: Tensor, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        """The step's loss and logits; the gradients of the loss then lie in the parameters."""
        low = self.config.precision == "bf16"
        try:
            with self._blamed(), torch.autocast(self.device.type, torch.bfloat16, enabled=low):
                loss, logits = self.objective(images, labels, random)
            self.optimizer.zero_grad(set_to_none=True)
            with self._blamed():
                loss.backward()  # type: ignore[no-untyped-call]
            self._tell("after_backward", self.model)
        except BaseException:
            self._tell("abandon", self.model)
            raise
        return loss, logits

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, SampleRandom]]:
        """Images, labels and random streams of one update after the other."""
        shuffle = generator("order", self.config.seed, epoch)
        augment = generator("augmentation", self.config.seed, epoch)
        order = self.trained[torch.randperm(len(self.trained), generator=shuffle)]
        # The images left over after the last whole batch sit this epoch out.
        batches = torch.split(order, self.batch_size)[: self.steps // self.replays]
        own = [batch[self.share] for batch in batches]
        for batch, images in fetched(self.data.train, own):
            images = self.data.augmentation(images, augment, rows=self.share, of=self.batch_size)
            images = images.contiguous(memory_format=self.format)
            labels = sent(self.data.train.labels[batch], self.device)
            for replay in range(self.replays):
                random = SampleRandom.create(self.config.seed, batch).fork("train", epoch)
                random = random.fork("replay", replay) if replay else random
                yield images, labels, random.to(self.device)

    def _tell(self, hook: str, *facts: Any) -> None:
        """Call a hook of the step, if it has that one."""
        call = getattr(self.step, hook, None)
        if call is not None:
            call(*facts)

    def _snapshot(self) -> dict[str, Any]:
        """A copy of what an epoch changes, except the schedule, which goes on."""
        state = self._state()
        return copy.deepcopy({name: state[name] for name in _UNDONE})

    def _watched_accuracy(self) -> float:
        return self._robust_accuracy(self.model.eval(), self.data.train, self.watched, "watch")

    def _guard(self, before: dict[str, Any], first: dict[str, float]) -> dict[str, Any]:
        """Look at the images set aside; after a collapse undo the epoch and make the step safer."""
        seen = self._watched_accuracy()
        if not collapsed(seen, [first, *self.history]):
            return {"watch_accuracy": seen}
        number = len(self.history) + 1
        self._restore_weights(before)
        change = self.step.safer()  # type: ignore[attr-defined]
        event = (
            f"catastrophic overfitting: robust accuracy on {len(self.watched)} training images "
            f"set aside fell to {seen:.1%}; back to the weights before epoch {number}, {change}"
        )
        _LOG.warning("epoch %d: %s", number, event)
        return {"watch_accuracy": seen, "event": event}

    def _words(self, epoch: int, loss: float) -> str:
        row = self.history[-1] if self.history else {}
        seen = f", validation {_score(row):.1%}" if row else ""
        undone = f", epoch {row['epoch']} undone" if "event" in row else ""
        return f"epoch {epoch}/{self.epochs}, loss {loss:.3f}{seen}{undone}"

    def _check_finite(self, losses: Tensor, epoch: int) -> None:
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            at = int(bad[0])
            raise RobustannError(
                f"expected a finite loss, got {float(losses[at])} in epoch {epoch}, step {at + 1} "
                f"of {self.steps}; try a learning rate lower than {self.lr:g}, "
                "or clip the gradient (clip=1, --clip 1)"
            )

    def _validate(self) -> dict[str, float]:
        """Validation accuracy, and the accuracy on what the step wants to be judged by."""
        split, model = self.data.validation, self.judged
        row = {"validation_accuracy": self._accuracy(model, split)}
        if hasattr(self.step, "validation_logits"):
            count = min(len(split), _JUDGED)
            some = torch.arange(count) * len(split) // count
            row["validation_robust_accuracy"] = self._robust_accuracy(
                model, split, some, "validation"
            )
        return row

    def _robust_accuracy(
        self, model: nn.Module, split: Split, positions: Tensor, purpose: str
    ) -> float:
        """Accuracy on what the step wants to be judged by; the model is in eval mode."""
        found = torch.zeros((), dtype=torch.int64)
        # Each process judges its part.
        own = positions[self.judges.rank :: self.judges.size]
        for indices in torch.split(own, 2 * self.batch_size):
            random = SampleRandom.create(self.config.seed, indices).fork(purpose)
            labels = split.labels[indices].to(self.device)
            logits = self.step.validation_logits(  # type: ignore[attr-defined]
                model, split.images(indices), labels, random=random.to(self.device)
            )
            found += (logits.argmax(1).cpu() == split.labels[indices]).sum()
        return self._counted(found) / len(positions)

    def _accuracy(self, model: nn.Module, split: Split) -> float:
        """Accuracy on a whole part; each process judges some of it."""
        own = torch.arange(self.judges.rank, len(split), self.judges.size)
        found = predictions(model, split, 2 * self.batch_size, own)
        right = (found == split.labels[own]).sum()
        return self._counted(right) / len(split)

    def _counted(self, found: Tensor) -> int:
        """What all who judge have counted together."""
        return int(parallel.total(found.to(self.device)) if self.judges.size > 1 else found)

    def identity(self) -> dict[str, Any]:
        """Everything that the final weights depend on, as JSON values; asked for at the start."""
        parts = {"train": self.data.train, "validation": self.data.validation}
        weights = {
            name: [str(tensor.dtype), *tensor.shape]
            for name, tensor in self.model.state_dict().items()
        }
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        data = {**self.facts["data"], **{name: part.digest() for name, part in parts.items()}}
        facts = {
            **self.facts,
            "data": data,
            "weights": weights,
            "trained": trained,
            "still": self.still,
            "initial_weights": tensor_digest(self.original),
        }
        return json.loads(json.dumps(facts))  # type: ignore[no-any-return]

    def state(self) -> dict[str, Any]:
        """Everything that an exact resume needs beside the history, of all processes together."""
        return {**self._state(), "steps": parallel.gathered(self._step_state())}

    def _step_state(self) -> dict[str, Any]:
        return self.step.state() if hasattr(self.step, "state") else {}

    def _state(self) -> dict[str, Any]:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best_weights": self.best_weights,
            "step": self._step_state(),
        }
        return whole(state) if self.config.fsdp else state

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` returned."""
        self.schedule.load_state_dict(state["schedule"])
        if len(state["steps"]) == self.launched.size:
            state = {**state, "step": state["steps"][self.launched.rank]}
        self._restore_weights(state)
        place = torch.device("cpu") if self.config.fsdp else self.device
        self.best_weights = {
            name: tensor.to(place) for name, tensor in state["best_weights"].items()
        }

    def _restore_weights(self, state: dict[str, Any]) -> None:
        """Take up everything that an epoch changes; the learning rate stays the schedule's."""
        if self.config.fsdp:
            take_up(self.model, state["model"])
            momentum = optimizer_state(state["optimizer"], self.optimizer)
        else:
            self.model.load_state_dict(state["model"])
            momentum = state["optimizer"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(momentum)
        for group, rate in zip(
            self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True
        ):
            group["lr"] = rate
        if state["step"]:
            self._tell("restore", state["step"])

    def result(self) -> TrainResult[Any]:
        """The model with its best weights, scored on the test part."""
        test = self.data.test
        last_weights = self._weights()
        if self.config.fsdp:
            take_up(self.model, self.best_weights)
            self.original.load_state_dict(self.best_weights)
        else:
            self.model.load_state_dict(self.best_weights)
        self.model.zero_grad(set_to_none=True)
        self.statistics.put_back()
        if not self.config.fsdp:
            self.model.to(memory_format=torch.contiguous_format)
        with self._blamed():
            found = predictions(self.model, test, 2 * self.batch_size, torch.arange(len(test)))
        report = classification_report(test.labels, found, self.data.class_names)
        best, last = self.history[self.best_epoch - 1], self.history[-1]
        metrics = {
            "accuracy": report.accuracy,
            "accuracy_interval": list(report.interval),
            "precision": report.precision,
            "recall": report.recall,
            "f1": report.f1,
            "test_size": len(test),
            **{name: value for name, value in best.items() if name.startswith("validation_")},
        }
        seconds = math.fsum(row["seconds"] for row in self.history)
        facts = {
            **self.facts,
            "best_epoch": self.best_epoch,
            "last": {name: value for name, value in last.items() if name.startswith("validation_")},
            "events": [
                {"epoch": row["epoch"], "event": row["event"]}
                for row in self.history
                if "event" in row
            ],
            "epochs_run": len(self.history),
            "seconds": seconds,
            "device": self.device.type,
        }
        return TrainResult(
            model=self.original.eval(),
            metrics=metrics,
            history=self.history,
            best_epoch=self.best_epoch,
            epochs_run=len(self.history),
            seconds=seconds,
            training=json.loads(json.dumps(facts)),
            last_weights=last_weights,
        )


def _score(row: Mapping[str, Any]) -> float:
    """What epochs are compared by."""
    return float(row.get("validation_robust_accuracy", row["validation_accuracy"]))
