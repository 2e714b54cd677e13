"""Robust accuracy and cost of PGD-40 and APGD-100 beside other libraries', on the same images.

Everybody takes the same steps in linf on the same correctly classified images. Ours are judged by
the engine, which keeps the best image of the way; what the others return is judged by a forward of
its own. Forwards and backwards an image are counted as they pass through the model.

    python benchmarks/parity.py [--model model.safetensors --data mnist --samples 300]

Without ``--model`` a small CNN is trained on the bundled digits. Libraries that are not installed
are left out.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import click
import torch
from peers import Peer, counted, of_art, of_foolbox, on_a_model
from torch import Tensor, nn

import robustann as ra
from robustann.attacks.engine import predict_logits
from robustann.files import write_text

STEP_SHARE = 0.1
"""Length of a step of PGD, as a share of eps."""


def theirs(eps: float) -> dict[str, dict[str, Peer]]:
    """For each attack the other libraries' versions of it."""
    found: dict[str, dict[str, Peer]] = {"pgd-40": {}, "apgd-ce-100": {}, "apgd-dlr-100": {}}
    step = STEP_SHARE * eps
    if importlib.util.find_spec("torchattacks"):
        import torchattacks

        found["pgd-40"]["torchattacks"] = lambda model, x, y: torchattacks.PGD(
            model, eps=eps, alpha=step, steps=40
        )(x, y)
        for loss in ("ce", "dlr"):
            # It seeds itself.
            found[f"apgd-{loss}-100"]["torchattacks"] = lambda model, x, y, loss=loss: (
                torchattacks.APGD(
                    model, norm="Linf", eps=eps, steps=100, loss=loss, seed=torch.initial_seed()
                )(x, y)
            )
    if importlib.util.find_spec("foolbox"):
        found["pgd-40"]["foolbox"] = of_foolbox("LinfPGD", eps=eps, abs_stepsize=step, steps=40)
    if importlib.util.find_spec("adv_lib"):
        from adv_lib.attacks import apgd

        for loss in ("ce", "dlr"):
            found[f"apgd-{loss}-100"]["adv-lib"] = lambda model, x, y, loss=loss: apgd(
                model, x, y, eps=eps, norm=float("inf"), n_iter=100, loss_function=loss
            )
    if importlib.util.find_spec("art"):
        found["pgd-40"]["ART"] = of_art(
            "ProjectedGradientDescentPyTorch",
            eps=eps,
            eps_step=step,
            max_iter=40,
            num_random_init=1,
        )
        for loss, name in (("ce", "cross_entropy"), ("dlr", "difference_logits_ratio")):
            found[f"apgd-{loss}-100"]["ART"] = of_art(
                "AutoProjectedGradientDescent",
                eps=eps,
                eps_step=2 * eps,
                max_iter=100,
                nb_random_init=1,
                loss_type=name,
            )
    return found


def ours(eps: float) -> dict[str, ra.Attack]:
    """For each attack ours."""
    return {
        "pgd-40": ra.PGD(steps=40, step_size=STEP_SHARE * eps),
        "apgd-ce-100": ra.APGD(steps=100),
        "apgd-dlr-100": ra.APGD(steps=100, loss="dlr"),
    }


def _judged(
    peer: Peer, model: nn.Module, x: Tensor, y: Tensor, threat: ra.ThreatModel, seed: int
) -> tuple[float, float]:
    """Robust accuracy that a peer leaves, and its propagations an image."""
    adversarial, spent = counted(peer, model, x, y, seed)
    adversarial = threat.project(adversarial, x)
    stands = predict_logits(model, adversarial).argmax(1) == y
    return float(stands.double().mean()), spent


def compare(model: nn.Module, x: Tensor, y: Tensor, eps: float, seeds: int) -> list[dict[str, Any]]:
    """A row for each attack of each library, the mean over seeds."""
    threat = ra.ThreatModel("linf", eps)
    rows = []
    others = theirs(eps)
    for name, attack in ours(eps).items():
        figures: dict[str, list[tuple[float, float]]] = {"robustann": []}
        for seed in range(seeds):
            result = ra.attack(attack, model, x, y, threat, seed=seed)
            spent = float((result.forwards + result.backwards).double().mean())
            figures["robustann"].append((1 - result.success_rate, spent))
        for library, peer in others[name].items():
            try:
                figures[library] = [_judged(peer, model, x, y, threat, s) for s in range(seeds)]
            except Exception as error:
                # A library that fails on its own account ends its row, not the table.
                print(f"{name:14} {library:14} failed: {error}", flush=True)
        for library, runs in figures.items():
            robust, spent = (sum(column) / seeds for column in zip(*runs, strict=True))
            row = {"attack": name, "library": library, "robust": robust, "propagations": spent}
            rows.append({**row, "robust_by_seed": [one for one, _ in runs]})
            print(f"{name:14} {library:14} {robust:8.2%} {spent:8.1f}", flush=True)
    return rows


@click.command()
@on_a_model(samples=300)
@click.option("--eps", default="0.1", show_default=True)
@click.option("--seeds", default=3, show_default=True)
def main(model: nn.Module, x: Tensor, y: Tensor, eps: str, seeds: int, output: Path | None) -> None:
    """Print robust accuracy and propagations an image, library by library."""
    rows = compare(model, x, y, ra.ThreatModel("linf", eps).eps, seeds)
    if output is not None:
        write_text(output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
