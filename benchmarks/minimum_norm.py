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
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from counting import Counting
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
    import foolbox

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

    def peer(name: str, options: dict[str, int]) -> Peer:
        attack = getattr(foolbox.attacks, name)(**options)

        def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
            clipped: Tensor = attack(wrapped, x, y, epsilons=None)[1]
            return clipped

        return run

    return {
        f"foolbox {name.removesuffix('Attack')}": peer(name, options)
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
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    made: dict[Norm, dict[str, dict[str, int]]] = {
        "linf": {"CarliniLInfMethod": {}},
        "l2": {"DeepFool": {}, "CarliniL2Method": {}},
        "l1": {"ElasticNet": {"binary_search_steps": 1, "max_iter": steps}},
        "l0": {},
    }

    def peer(name: str, options: dict[str, int]) -> Peer:
        def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                classes = model(x[:1]).shape[1]
            wrapped = PyTorchClassifier(
                model, nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=classes,
                clip_values=(0.0, 1.0), device_type="cpu",
            )  # fmt: skip
            attack = getattr(evasion, name)(wrapped, batch_size=len(x), verbose=False, **options)
            return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))

        return run

    return {f"ART {name}": peer(name, options) for name, options in made[norm].items()}


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
        found: dict[str, tuple[float, float]] = {}
        for label, peer in peers(norm, steps).items():
            torch.manual_seed(0)
            counting = Counting(model).eval()
            try:
                with frozen(counting, 0), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    adversarial = peer(counting, x, y)
            except Exception as error:
                # A library that fails on its own account ends its row, not the table.
                print(f"{norm:5} {label:36} failed: {error}", flush=True)
                continue
            spent = counting.propagations / len(x)
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
