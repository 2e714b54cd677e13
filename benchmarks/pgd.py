"""Wall time of PGD against the bare loop and against other libraries, side by side.

    python benchmarks/pgd.py [--rounds 7] [--output pgd.json]

All contenders take the same steps from a random start on the same images and the same model, one
after the other in one process; every round runs them in the reverse order of the last one. A
ratio compares a contender with the bare loop of the same round, so that what else the machine
does hits both. Processor time is shown beside wall time: with one thread it tells more on a busy
machine. Three situations:

* standing: no image ever falls (the model's bias holds the true class), so nobody can save work;
* falling: an undefended model, where robustann drops each image as soon as it has fallen;
* falling, usual step: the same with a step of 2.5 eps / steps, the default
  of robustann's PGD (after Madry et al., ICLR 2018), which gets there in fewer steps than 0.01.

Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.attacks import PGD
from robustann.attacks.engine import craft, predict_logits, run
from robustann.models import create_model
from robustann.rng import SampleRandom
from robustann.threat import ThreatModel

Contender = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
"""Maps (model, images, labels, seed) to adversarial images."""


def bare_loop(eps: float, size: float, steps: int) -> Contender:
    """What anyone would write by hand; parameters are frozen, gradients go to the image alone."""

    def attack(model: nn.Module, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
        torch.manual_seed(seed)
        x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(steps):
            x_adv.requires_grad_()
            loss = F.cross_entropy(model(x_adv), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach().add_(gradient.sign(), alpha=size)
            x_adv = torch.clamp(x_adv, lower, upper)
        return x_adv

    return attack


def ours(eps: float, size: float, steps: int, *, judged: bool) -> Contender:
    threat, pgd = ThreatModel("linf", eps), PGD(steps=steps, step_size=size)

    def attack(model: nn.Module, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        random = SampleRandom.create(seed, torch.arange(len(x)))
        if not judged:
            return craft(pgd, model, x, labels, threat, random=random.to(x.device))
        result = run(pgd, model, x, labels, threat, random=random, known_correct=True)
        return result.adversarial.to(x.device)

    return attack


def with_torchattacks(eps: float, size: float, steps: int) -> Contender:
    import torchattacks

    def attack(model: nn.Module, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        pgd = torchattacks.PGD(model, eps=eps, alpha=size, steps=steps, random_start=True)
        x_adv: Tensor = pgd(x, labels)
        return x_adv

    return attack


def with_foolbox(eps: float, size: float, steps: int) -> Contender:
    import foolbox

    def attack(model: nn.Module, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        pgd = foolbox.attacks.LinfPGD(abs_stepsize=size, steps=steps, random_start=True)
        _, x_adv, _ = pgd(wrapped, x, labels, epsilons=eps)
        clipped: Tensor = x_adv
        return clipped

    return attack


def with_art(eps: float, size: float, steps: int) -> Contender:
    import numpy as np
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def attack(model: nn.Module, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        np.random.seed(seed)
        wrapped = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=10,
            clip_values=(0.0, 1.0), device_type="gpu" if x.device.type == "cuda" else "cpu",
        )  # fmt: skip
        pgd = ProjectedGradientDescentPyTorch(
            wrapped, eps=eps, eps_step=size, max_iter=steps, num_random_init=1,
            batch_size=len(x), verbose=False,
        )  # fmt: skip
        return torch.from_numpy(pgd.generate(x.cpu().numpy(), labels.cpu().numpy())).to(x.device)

    return attack


def contenders(
    eps: float, size: float, steps: int, only: str | None = None
) -> tuple[dict[str, Contender], list[str]]:
    """Those that can run here, the bare loop first, and the names of those that cannot; or one of
    them alone, without importing the others."""
    found = {
        "bare loop": bare_loop(eps, size, steps),
        "robustann run": ours(eps, size, steps, judged=True),
        "robustann craft": ours(eps, size, steps, judged=False),
    }
    missing = []
    for name, build in (
        ("torchattacks", with_torchattacks), ("foolbox", with_foolbox), ("ART", with_art),
    ):  # fmt: skip
        if only not in (None, name):
            continue
        try:
            found[name] = build(eps, size, steps)
        except ImportError:
            missing.append(name)
    return found, missing


class Held(nn.Module):
    """A model whose bias never lets the first class lose."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("bias", torch.tensor([50.0] + [0.0] * 9))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits + self.bias


def undefended(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """The small CNN at the size of MNIST, trained on enlarged digits for a few seconds, and the
    digits that it gets right."""
    from sklearn.datasets import load_digits

    data, classes = load_digits(return_X_y=True)
    x = torch.from_numpy(data / 16).float().view(-1, 1, 8, 8)
    x = F.interpolate(x, size=(28, 28), mode="bilinear").clamp_(0, 1).to(device)
    labels = torch.from_numpy(classes).long().to(device)
    names = [str(digit) for digit in range(10)]
    model = create_model("small-cnn", class_names=names, shape=(1, 28, 28), seed=0).to(device)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(80):
        batch = torch.randint(len(x), (64,), device=device)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), labels[batch]).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    right = (predict_logits(model, x).argmax(1).to(device) == labels).nonzero().flatten()
    return model, x[right], labels[right]


def timed(
    attack: Contender, model: nn.Module, x: Tensor, labels: Tensor, seed: int
) -> tuple[float, float, Tensor]:
    """Wall seconds, processor seconds and the adversarial images."""
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    x_adv = attack(model, x, labels, seed)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - begin_cpu, x_adv


def compare(
    found: dict[str, Contender], model: nn.Module, x: Tensor, labels: Tensor, eps: float,
    rounds: int, until: float,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Seconds and ratios of every contender; ends early where time is up."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    processor: dict[str, list[float]] = {name: [] for name in found}
    standing = {}
    for number in range(rounds + 1):
        names = list(found) if number % 2 else list(reversed(found))
        for name in names:
            taken, taken_cpu, x_adv = timed(found[name], model, x, labels, number)
            if number == 0:
                # The first round warms up; it also shows that all do the same work.
                excess = float((x_adv - x).abs().max()) - eps
                if excess > 1e-6:
                    raise SystemExit(f"{name} leaves the ball by {excess:.3g}")
                predicted = predict_logits(model, x_adv).argmax(1)
                standing[name] = float((predicted == labels.cpu()).double().mean())
            else:
                seconds[name].append(taken)
                processor[name].append(taken_cpu)
        if number >= 3 and time.perf_counter() > until:
            break
    table: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        ratios = [own / bare for own, bare in zip(times, seconds["bare loop"], strict=True)]
        cpu = [
            own / bare for own, bare in zip(processor[name], processor["bare loop"], strict=True)
        ]
        table[name] = {
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "processor_ratio": statistics.median(cpu),
            "processor_ratio_range": [min(cpu), max(cpu)],
            "seconds": statistics.median(times),
            "robust_accuracy": standing[name],
            "all_seconds": times,
            "all_processor_seconds": processor[name],
        }
    return table


def show(title: str, table: dict[str, dict[str, Any]]) -> None:
    rounds = len(table["bare loop"]["all_seconds"])
    print(f"\n{title}: {rounds} rounds")
    print(f"{'':16}{'wall ratio':>11}{'least-most':>12}{'cpu ratio':>11}{'least-most':>12}"
          f"{'seconds':>9}{'standing':>10}")  # fmt: skip
    for name, row in table.items():
        wall, cpu = ("{:.2f}-{:.2f}".format(*row[key]) for key in (
            "ratio_range", "processor_ratio_range"
        ))  # fmt: skip
        print(
            f"{name:16}{row['ratio']:11.2f}{wall:>12}{row['processor_ratio']:11.2f}{cpu:>12}"
            f"{row['seconds']:9.3f}{row['robust_accuracy']:10.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Wall time of PGD: robustann and other libraries against the bare loop."
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument(
        "--seconds", type=float, default=100, help="begin no round after so long (default 100)"
    )
    parser.add_argument("--images", type=int, default=128, help="images in the batch (128)")
    parser.add_argument("--steps", type=int, default=40, help="gradient steps (40)")
    parser.add_argument("--eps", type=float, default=0.3, help="linf radius (0.3)")
    parser.add_argument("--step-size", type=float, default=0.01, help="length of a step (0.01)")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch on the CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--output", type=Path, default=None, help="also write the figures as JSON")
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error("expected --rounds of at least 3, or there is no spread to speak of")
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    begin = time.perf_counter()
    with warnings.catch_warnings():
        # The imports of other libraries warn of names that they will lose.
        warnings.simplefilter("ignore")
        found, missing = contenders(options.eps, options.step_size, options.steps)
        model, x, labels = undefended(torch.device(options.device))
        x, labels = x[: options.images], labels[: options.images]
        held, first = Held(model).to(x.device).eval(), torch.zeros_like(labels)
        usual, _ = contenders(options.eps, 2.5 * options.eps / options.steps, options.steps)
        ready = time.perf_counter()
        third = (options.seconds - (ready - begin)) / 3
        tables = {
            title: compare(
                by, subject, x, answers, options.eps, options.rounds, ready + number * third
            )
            for number, (title, by, subject, answers) in enumerate(
                [
                    ("standing", found, held, first),
                    ("falling", found, model, labels),
                    ("falling, usual step", usual, model, labels),
                ],
                start=1,
            )
        }

    versions = {}
    for package in (
        "torch",
        "robustann",
        "torchattacks",
        "foolbox",
        "adversarial-robustness-toolbox",
    ):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts = {
        "attack": f"PGD-{options.steps}, linf, eps {options.eps}, step {options.step_size}",
        "batch": list(x.shape),
        "model": "small-cnn",
        "device": options.device,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": versions,
        "missing": missing,
        "total_seconds": time.perf_counter() - begin,
    }
    print(f"{facts['attack']}; {facts['model']} on {facts['batch']}; {options.device}")
    print(f"{facts['threads']} threads; " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    if missing:
        print("not installed: " + ", ".join(missing))
    print("ratio: seconds over those of the bare loop in the same round, median")
    show("standing (no image ever falls)", tables["standing"])
    show("falling (undefended model)", tables["falling"])
    show("falling, step 2.5 eps / steps", tables["falling, usual step"])
    if options.output is not None:
        options.output.write_text(json.dumps({**facts, "results": tables}, indent=2) + "\n")


if __name__ == "__main__":
    main()
