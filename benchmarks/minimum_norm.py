"""Median distance of minimum-norm attacks beside foolbox's and adversarial-library's.

All attack the same correctly classified images of the same model. Ours are judged by the engine;
what the others return is clipped to the box and judged by a forward of its own, so a distance
counts only where the image is misclassified. The propagations are those that each attack asks for:
one forward and one backward a step, unless noted.

    python benchmarks/minimum_norm.py [--model model.safetensors --data mnist --samples 200]

Without ``--model`` a small CNN is trained on the bundled digits. Libraries that are not installed
are left out.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from torch import Tensor, nn

import robustann as ra
from robustann.attacks import parse_attack
from robustann.attacks.engine import frozen, predict_logits
from robustann.files import write_text
from robustann.threat import Norm

Peer = Callable[[nn.Module, Tensor, Tensor], Tensor]


def ours(norm: Norm, steps: int) -> Iterator[str]:
    """Our attacks in this norm, as text."""
    yield from {
        "linf": (f"fmn:steps={steps}", f"fab:steps={steps}"),
        "l2": (f"ddn:steps={steps}", f"fmn:steps={steps}"),
        "l1": (f"fmn:steps={steps}",),
        "l0": (f"sigma-zero:steps={steps}", f"fmn:steps={steps}"),
    }[norm]


def peers(norm: Norm, steps: int) -> dict[str, Peer]:
    """The other libraries' attacks in this norm."""
    found: dict[str, Peer] = {}
    if importlib.util.find_spec("foolbox"):
        import foolbox

        name = {"linf": "LInf", "l2": "L2", "l1": "L1", "l0": "L0"}[norm]
        named = {f"foolbox {name}FMN": getattr(foolbox.attacks, f"{name}FMNAttack")(steps=steps)}
        if norm == "l2":
            named["foolbox DDN"] = foolbox.attacks.DDNAttack(steps=steps)
        for label, attack in named.items():

            def run(model: nn.Module, x: Tensor, y: Tensor, attack: object = attack) -> Tensor:
                wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
                _, clipped, _ = attack(wrapped, x, y, epsilons=None)  # type: ignore[operator]
                return clipped  # type: ignore[no-any-return]

            found[label] = run
    if importlib.util.find_spec("adv_lib"):
        from adv_lib.attacks import ddn, fmn

        power = {"linf": float("inf"), "l2": 2, "l1": 1, "l0": 0}[norm]
        found["adv-lib FMN"] = lambda model, x, y: fmn(model, x, y, norm=power, steps=steps)
        if norm == "l2":
            found["adv-lib DDN"] = lambda model, x, y: ddn(model, x, y, steps=steps)
    return found


def median(model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor, norm: Norm) -> float:
    """The median distance, infinity where the image is not misclassified."""
    adversarial = adversarial.detach().clamp(0, 1)
    fooled = predict_logits(model, adversarial).argmax(1) != y
    distance = ra.ThreatModel(norm, 1.0).distance(adversarial, x)
    return float(torch.where(fooled, distance, torch.inf).median())


@click.command()
@click.option("--model", "path", type=click.Path(path_type=Path))
@click.option("--data", default="digits", show_default=True)
@click.option("--data-root", type=click.Path(path_type=Path))
@click.option("--samples", default=200, show_default=True)
@click.option("--steps", default=100, show_default=True)
@click.option("--norm", "norms", multiple=True, default=["linf", "l2", "l1"], show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(
    path: Path | None,
    data: str,
    data_root: Path | None,
    samples: int,
    steps: int,
    norms: tuple[Norm, ...],
    output: Path | None,
) -> None:
    """Print median distances side by side, and each as a multiple of the best peer's."""
    images = ra.load_data(data, root=data_root)
    model = ra.load_model(path) if path else ra.train("small-cnn", images).model
    model.eval()
    order = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(0))
    x, y = images.test.images(order[:samples]), images.test.labels[order[:samples]]
    correct = predict_logits(model, x).argmax(1) == y
    x, y = x[correct], y[correct]
    rows = []
    for norm in norms:
        found: dict[str, float] = {}
        for label, peer in peers(norm, steps).items():
            torch.manual_seed(0)
            with frozen(model, 0), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adversarial = peer(model, x, y)
            found[label] = median(model, x, adversarial, y, norm)
        best = min(found.values(), default=float("nan"))
        for text in ours(norm, steps):
            # So far that everything within the box is allowed.
            wide = ra.ThreatModel(norm, ra.ThreatModel(norm, 1.0).widest(x[0].numel()))
            result = ra.attack(parse_attack(text), model, x, y, wide)
            found[f"robustann {text}"] = median(model, x, result.adversarial, y, norm)
        for label, value in found.items():
            rows.append({"norm": norm, "attack": label, "median": value, "ratio": value / best})
            print(f"{norm:5} {label:32} {value:10.4f} {value / best:7.3f}", flush=True)
    if output is not None:
        write_text(output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
