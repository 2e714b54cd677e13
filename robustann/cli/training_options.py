"""The options of every command that trains, said once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from robustann.cli.options import combine

if TYPE_CHECKING:
    from robustann.training import TrainConfig

F = TypeVar("F", bound=Callable[..., Any])

# As TrainConfig calls them.
SETTINGS = (
    "epochs",
    "batch_size",
    "lr",
    "momentum",
    "clip",
    "weight_decay",
    "label_smoothing",
    "ema",
    "patience",
    "precision",
    "channels_last",
    "compile",
    "fsdp",
)

training_options = combine(
    click.option("--epochs", type=int,
                 help="Passes over the training part.  [default: by the data]"),
    click.option("--batch-size", type=int, help="Images a step of training.  [default: 128]"),
    click.option("--lr", type=float,
                 help="Peak learning rate of the one-cycle schedule; a defense has its own.  "
                 "[default: 0.1]"),
    click.option("--momentum", type=float, help="Nesterov momentum of SGD.  [default: 0.9]"),
    click.option("--clip", type=float,
                 help="Largest norm of the gradient.  [default: no limit]"),
    click.option("--weight-decay", type=float,
                 help="L2 penalty on the weights.  [default: 0.0005]"),
    click.option("--label-smoothing", type=float,
                 help="Share of the target spread over all classes; a defense has its own.  "
                 "[default: 0.05]"),
    click.option("--ema", type=float,
                 help="Decay of the moving average of the weights; 0 is off.  [default: 0.99]"),
    click.option("--patience", type=int,
                 help="Stop after so many epochs without improvement.  [default: never]"),
    click.option("--precision", type=click.Choice(["float32", "bf16"]),
                 help="bf16: autocast.  [default: float32]"),
    click.option("--channels-last", is_flag=True, default=None,
                 help="Memory format of convolutions."),
    click.option("--compile", is_flag=True, default=None, help="Train through torch.compile."),
    click.option("--fsdp", is_flag=True, default=None,
                 help="Under torchrun: spread the parameters over the processes, for models that "
                 "do not fit on one device. With --ema 0."),
)  # fmt: skip


def training_config(options: dict[str, Any], seed: int) -> TrainConfig | None:
    """The settings among the options; None where none was given."""
    from robustann.training import TrainConfig

    given = {name: options[name] for name in SETTINGS if options.get(name) is not None}
    return TrainConfig(**given, seed=seed) if given else None
