"""Other libraries' attacks, and what they attack: for `parity.py` and `minimum_norm.py`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from counting import Counting
from torch import Tensor, nn

import robustann as ra
from robustann.attacks.engine import frozen, predict_logits

Peer = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Adversarial images (N, C, H, W) from a model, images and labels."""


def on_a_model(*, samples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options that say which model is attacked on how many images. The command gets the model and,
    of as many test images, those that it classifies correctly, with their labels."""
    options = (
        click.option("--model", "path", type=click.Path(path_type=Path)),
        click.option("--data", default="digits", show_default=True),
        click.option("--data-root", type=click.Path(path_type=Path)),
        click.option("--samples", default=samples, show_default=True),
        click.option("--output", type=click.Path(path_type=Path), help="Write the rows as JSON."),
    )

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(
            path: Path | None, data: str, data_root: Path | None, samples: int, **more: Any
        ) -> None:
            images = ra.load_data(data, root=data_root)
            model = ra.load_model(path) if path else ra.train("small-cnn", images).model
            model.eval()
            order = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(0))
            x, y = images.test.images(order[:samples]), images.test.labels[order[:samples]]
            correct = predict_logits(model, x).argmax(1) == y
            command(model, x[correct], y[correct], **more)

        for option in reversed(options):
            run = option(run)
        return run

    return with_options


def counted(peer: Peer, model: nn.Module, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, float]:
    """What a peer returns, and its propagations an image."""
    counting = Counting(model).eval()
    with frozen(counting, seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        np.random.seed(seed)
        adversarial = peer(counting, x, y).detach()
    return adversarial, counting.propagations / len(x)


def of_foolbox(name: str, *, eps: float | None = None, **options: Any) -> Peer:
    """An attack of foolbox by its class; without ``eps`` it searches the nearest image."""

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        attack = getattr(foolbox.attacks, name)(**options)
        clipped: Tensor = attack(wrapped, x, y, epsilons=eps)[1]
        return clipped

    return run


def of_art(name: str, **options: Any) -> Peer:
    """An evasion attack of ART by its class."""

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        from art.attacks import evasion
        from art.estimators.classification import PyTorchClassifier

        with torch.no_grad():
            # Past the counter: the number of classes costs nobody anything.
            classes = getattr(model, "model", model)(x[:1]).shape[1]
        wrapped = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=classes,
            clip_values=(0.0, 1.0), device_type="cpu",
        )  # fmt: skip
        attack = getattr(evasion, name)(wrapped, batch_size=len(x), verbose=False, **options)
        return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))

    return run
