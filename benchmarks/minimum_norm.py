"""Median distance of minimum-norm attacks beside foolbox's, adversarial-library's and ART's.

All attack the same correctly classified images of the same model. Ours are judged by the engine;
what the others return is clipped to the box and judged by a forward of its own, so a distance
counts only where the image is misclassified. Propagations are forwards plus backwards an image,
counted as they pass through the model. The multiple is of the best peer's median, at whatever cost.

    python benchmarks/minimum_norm.py [--model model.safetensors --data mnist --samples 200]

Without ``--model`` a small CNN is trained on the bundled digits. Libraries that are not installed
are left out.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from peers import Peer, counted, of_art, of_foolbox, on_a_model
from torch import Tensor, nn

import robustann as ra
from robustann.attacks import parse_attack
from robustann.attacks.engine import predict_logits
from robustann.files import write_text
from robustann.threat import Norm


def ours(norm: Norm, steps: int) -> Iterator[str]:
    """Our attacks in this norm, as text: of so many propagations as peers of ``steps`` steps.

    Three forwards are counted besides the steps: of the original, the last image, and the one
    that confirms the nearest.
    """
    steps -= 2
    yield from {
        "linf": (f"fmn:steps={steps}", f"fab:steps={steps}"),
        "l2": (f"ddn:steps={steps}", f"fmn:steps={steps}"),
        "l1": (f"fmn:steps={steps}",),
        "l0": (f"sigma-zero:steps={steps}", f"fmn:steps={steps}"),
    }[norm]


def theirs(norm: Norm, steps: int) -> dict[str, Peer]:
    """The other libraries' attacks in this norm, each with as many steps where steps are counted,
    else as its authors set it."""
    found: dict[str, Peer] = {}
    if importlib.util.find_spec("foolbox"):
        found |= _foolbox(norm, steps)
    if importlib.util.find_spec("adv_lib"):
        found |= _adversarial_library(norm, steps)
    if importlib.util.find_spec("art"):
        found |= _art(norm, steps)
    return found


def _foolbox(norm: Norm, steps: int) -> dict[str, Peer]:
    made: dict[Norm, dict[str, dict[str, int]]] = {
        "linf": {
            "LInfFMNAttack": {"steps": steps},
            "LinfinityBrendelBethgeAttack": {"steps": steps},
            "LinfDeepFoolAttack": {},
        },
        "l2": {
            "L2FMNAttack": {"steps": steps},
            "DDNAttack": {"steps": steps},
            "L2BrendelBethgeAttack": {"steps": steps},
            "L2CarliniWagnerAttack": {"steps": steps},
            "L2DeepFoolAttack": {},
        },
        "l1": {
            "L1FMNAttack": {"steps": steps},
            "L1BrendelBethgeAttack": {"steps": steps},
            "EADAttack": {"steps": steps},
        },
        "l0": {"L0FMNAttack": {"steps": steps}, "L0BrendelBethgeAttack": {"steps": steps}},
    }

    return {
        f"foolbox {name.removesuffix('Attack')}": of_foolbox(name, **options)
        for name, options in made[norm].items()
    }


def _adversarial_library(norm: Norm, steps: int) -> dict[str, Peer]:
    from adv_lib.attacks import alma, ddn, fab, fmn, pdpgd, sigma_zero

    power = {"linf": float("inf"), "l2": 2, "l1": 1, "l0": 0}[norm]
    made: dict[str, Peer] = {
        "FMN": lambda model, x, y: fmn(model, x, y, norm=power, steps=steps),
        "PDPGD": lambda model, x, y: pdpgd(model, x, y, norm=power, num_steps=steps),
    }
    if norm != "l0":
        made["FAB"] = lambda model, x, y: fab(model, x, y, norm=power, n_iter=steps, restarts=1)
    if norm in ("l2", "l1"):
        made["ALMA"] = lambda model, x, y: alma(
            model,
            x,
            y,
            num_steps=steps,
            distance=norm,
            init_lr_distance=0.5 if norm == "l1" else 0.3,
        )
    if norm == "l2":
        made["DDN"] = lambda model, x, y: ddn(model, x, y, steps=steps, levels=None)
    if norm == "l0":
        made["sigma-zero"] = lambda model, x, y: sigma_zero(model, x, y, num_steps=steps)
    return {f"adv-lib {name}": peer for name, peer in made.items()}


def _art(norm: Norm, steps: int) -> dict[str, Peer]:
    made: dict[Norm, dict[str, dict[str, int]]] = {
        "linf": {"CarliniLInfMethod": {}},
        "l2": {"DeepFool": {}, "CarliniL2Method": {}},
        "l1": {"ElasticNet": {"binary_search_steps": 1, "max_iter": steps}},
        "l0": {},
    }

    return {f"ART {name}": of_art(name, **options) for name, options in made[norm].items()}


def median(model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor, norm: Norm) -> float:
    """The median distance, infinity where the image is not misclassified."""
    adversarial = adversarial.detach().clamp(0, 1)
    fooled = predict_logits(model, adversarial).argmax(1) != y
    distance = ra.ThreatModel(norm, 1.0).distance(adversarial, x)
    return float(torch.where(fooled, distance, torch.inf).median())


@click.command()
@on_a_model(samples=200)
@click.option("--steps", type=click.IntRange(3), default=100, show_default=True)
@click.option("--norm", "norms", multiple=True, default=["linf", "l2", "l1"], show_default=True)
def main(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    steps: int,
    norms: tuple[Norm, ...],
    output: Path | None,
) -> None:
    """Print median distances side by side, and each as a multiple of the best peer's."""
    rows = []
    for norm in norms:
        found: dict[str, tuple[float, float]] = {}
        for label, peer in theirs(norm, steps).items():
            try:
                adversarial, spent = counted(peer, model, x, y, seed=0)
            except Exception as error:
                # A library that fails on its own account ends its row, not the table.
                print(f"{norm:5} {label:36} failed: {error}", flush=True)
                continue
            found[label] = median(model, x, adversarial, y, norm), spent
        best = min((value for value, _ in found.values()), default=float("nan"))
        for text in ours(norm, steps):
            # So far that everything within the box is allowed.
            wide = ra.ThreatModel(norm, ra.ThreatModel(norm, 1.0).widest(x[0].numel()))
            result = ra.attack(parse_attack(text), model, x, y, wide)
            spent = float((result.forwards + result.backwards).double().mean())
            found[f"robustann {text}"] = median(model, x, result.adversarial, y, norm), spent
        for label, (value, spent) in found.items():
            row = {"norm": norm, "attack": label, "median": value, "ratio": value / best}
            rows.append({**row, "propagations": spent})
            print(f"{norm:5} {label:36} {value:10.4f} {value / best:7.3f} {spent:7.0f}", flush=True)
    if output is not None:
        write_text(output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
