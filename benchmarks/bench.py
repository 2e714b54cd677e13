"""Every benchmark that takes minutes, behind one command: ``make bench``.

    python benchmarks/bench.py [SUITE ...] [--rounds 5] [--output-dir runs/bench]

Contenders of a suite run one after the other in one process, in the reverse order every other
round, so that what else the machine does hits all of them. A ratio compares a contender with the
first one (the bare loop, where there is one) in the same round; shown are its median and its
spread, of wall time and of processor time: on a busy machine the latter tells more. What is
measured in a process of its own (start-up, memory) is run again in each round, memory twice; the
verdict is found once.

Writes ``bench.json`` and a picture, ``bench.svg``, into the folder.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pgd
import torch
import torch.nn.functional as F
import verdict
from torch import Tensor, nn

import robustann as ra
from robustann.attacks import APGD, FGSM, PGD
from robustann.attacks.engine import run
from robustann.defenses import AdversarialTraining
from robustann.files import atomic_path, write_text
from robustann.models import create_model
from robustann.rng import SampleRandom

Work = Callable[[], Any]
Rows = dict[str, dict[str, Any]]
_PACKAGES = ("torch", "robustann", "torchattacks", "foolbox", "adversarial-robustness-toolbox")


def interleaved(contenders: dict[str, Work], rounds: int) -> Rows:
    """Seconds of each contender, and their ratios to the first one's, round by round."""
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders) if number % 2 else list(reversed(contenders))
        for name in names:
            # What others have left behind is theirs to clear away, and the many objects that
            # they have imported are not to be gone through on somebody else's time.
            gc.collect()
            gc.freeze()
            begin, begin_cpu = time.perf_counter(), _processor_seconds()
            contenders[name]()
            taken = time.perf_counter() - begin, _processor_seconds() - begin_cpu
            # The first round warms up.
            if number:
                wall[name].append(taken[0])
                processor[name].append(taken[1])
    first = next(iter(contenders))
    return {
        name: {
            "seconds": statistics.median(wall[name]),
            "processor_seconds": statistics.median(processor[name]),
            **_ratio("ratio", wall[name], wall[first]),
            **_ratio("processor_ratio", processor[name], processor[first]),
        }
        for name in contenders
    }


def _processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def _ratio(name: str, own: list[float], first: list[float]) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(own, first, strict=True)]
    return {name: statistics.median(ratios), f"{name}_range": [min(ratios), max(ratios)]}


def pgd_suite(rounds: int) -> dict[str, Rows]:
    """PGD-40 against the bare loop and other libraries, on 128 images of MNIST's size."""
    eps = 0.3
    found, _ = pgd.contenders(eps, 0.01, 40)
    model, x, labels = pgd.undefended(torch.device("cpu"))
    x, labels = x[:128], labels[:128]
    held, first = pgd.Held(model).eval(), torch.zeros_like(labels)

    def situation(model: nn.Module, y: Tensor) -> Rows:
        return interleaved(
            {name: lambda one=one: one(model, x, y, 0) for name, one in found.items()}, rounds
        )

    return {"PGD-40, no image falls": situation(held, first),
            "PGD-40, all images fall": situation(model, labels)}  # fmt: skip


def _bare_apgd(model: nn.Module, x: Tensor, labels: Tensor, eps: float, steps: int) -> Tensor:
    """APGD on cross-entropy with nothing but what the algorithm needs (Croce and Hein, 2020)."""
    lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)

    def ascend(at: Tensor) -> tuple[Tensor, Tensor]:
        at = at.detach().requires_grad_()
        loss = F.cross_entropy(model(at), labels, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), at)
        return loss.detach(), gradient

    def within(at: Tensor) -> Tensor:
        return torch.clamp(at, lower, upper)

    torch.manual_seed(0)
    current = within(x + torch.empty_like(x).uniform_(-eps, eps))
    best_loss, gradient = ascend(current)
    best, best_gradient, before = current.clone(), gradient.clone(), current.clone()
    size = torch.full((len(x), 1, 1, 1), 2 * eps, device=x.device)
    window, shortest, shrink = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), 0.03 * steps
    since, improved = 0, torch.zeros(len(x), device=x.device)
    checked_best, halved = best_loss.clone(), torch.ones(len(x), dtype=torch.bool, device=x.device)
    for step in range(steps):
        moved = within(current + size * gradient.sign())
        if step:
            moved = within(current + 0.75 * (moved - current) + 0.25 * (current - before))
        before, current = current, moved
        last = best_loss.clone()
        loss, gradient = ascend(current)
        better = loss > best_loss
        improved += loss > last
        mask = better.view(-1, 1, 1, 1)
        best, best_gradient = (torch.where(mask, current, best),
                               torch.where(mask, gradient, best_gradient))  # fmt: skip
        best_loss = torch.maximum(loss, best_loss)
        since += 1
        if since == window:
            stuck = (improved < 0.75 * window) | (~halved & (checked_best >= best_loss))
            mask = stuck.view(-1, 1, 1, 1)
            size = torch.where(mask, size / 2, size)
            current = torch.where(mask, best, current)
            gradient = torch.where(mask, best_gradient, gradient)
            halved, checked_best = stuck, best_loss.clone()
            since, improved = 0, torch.zeros(len(x), device=x.device)
            window = max(window - max(int(shrink), 1), shortest)
    return best


def attacks_suite(rounds: int) -> dict[str, Rows]:
    """APGD and FGSM beside other libraries' where no image falls, so that all do the same work."""
    eps = 0.3
    model, x, _ = pgd.undefended(torch.device("cpu"))
    x = x[:128]
    held, labels = pgd.Held(model).eval(), torch.zeros(len(x), dtype=torch.int64)
    threat = ra.ThreatModel("linf", eps)

    def ours(attack: Any) -> Work:
        random = SampleRandom.create(0, torch.arange(len(x)))
        return lambda: run(attack, held, x, labels, threat, random=random, known_correct=True)

    apgd: dict[str, Work] = {"bare loop": lambda: _bare_apgd(held, x, labels, eps, 50),
                             "robustann": ours(APGD(steps=50, restarts=1))}  # fmt: skip

    def bare_fgsm() -> Tensor:
        at = x.clone().requires_grad_()
        loss = F.cross_entropy(held(at), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, at)
        return (x + eps * gradient.sign()).clamp(0, 1)

    fgsm: dict[str, Work] = {"bare loop": bare_fgsm, "robustann": ours(FGSM())}
    try:
        import torchattacks

        apgd["torchattacks"] = lambda: torchattacks.APGD(held, eps=eps, steps=50)(x, labels)
        fgsm["torchattacks"] = lambda: torchattacks.FGSM(held, eps=eps)(x, labels)
    except ImportError:
        pass
    try:
        import foolbox

        wrapped = foolbox.PyTorchModel(held, bounds=(0, 1), device="cpu")
        fgsm["foolbox"] = lambda: foolbox.attacks.FGSM()(wrapped, x, labels, epsilons=eps)
    except ImportError:
        pass
    from art.attacks.evasion import AutoProjectedGradientDescent, FastGradientMethod

    art, pixels, classes = _art(held), x.numpy(), labels.numpy()
    apgd["ART"] = lambda: AutoProjectedGradientDescent(
        art, eps=eps, max_iter=50, nb_random_init=1, batch_size=len(x), verbose=False,
        loss_type="cross_entropy",
    ).generate(pixels, classes)  # fmt: skip
    fgsm["ART"] = lambda: FastGradientMethod(art, eps=eps, batch_size=len(x)).generate(
        pixels, classes
    )
    return {
        "APGD-50, no image falls": interleaved(apgd, rounds),
        "FGSM, no image falls": interleaved(fgsm, rounds),
    }


def _art(model: nn.Module, optimizer: Any = None) -> Any:
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), input_shape=(1, 28, 28), nb_classes=10,
        clip_values=(0.0, 1.0), device_type="cpu", optimizer=optimizer,
    )  # fmt: skip


def training_suite(rounds: int) -> dict[str, Rows]:
    """An epoch of PGD-7 adversarial training on 1,024 images of MNIST's size; our epoch without
    validation, for the others have none."""
    eps, steps, size, batch = 0.3, 7, 0.07, 128
    _, x, labels = pgd.undefended(torch.device("cpu"))
    x, labels = x[:1024], labels[:1024]
    threat = ra.ThreatModel("linf", eps)
    names = [str(digit) for digit in range(10)]
    step = AdversarialTraining(PGD(steps=steps, step_size=size), threat, eps_warmup_epochs=0)

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = create_model("small-cnn", class_names=names, shape=(1, 28, 28), seed=0)
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    def epoch(loss_of: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]) -> None:
        model, optimizer = made()
        model.train()
        for rows in torch.arange(len(x)).split(batch):
            loss = loss_of(model, x[rows], labels[rows], rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    loop = pgd.bare_loop(eps, size, steps)

    def by_hand(model: nn.Module, images: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        crafted = loop(model, images, y, 0)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return F.cross_entropy(model(crafted.detach()), y)

    def ours(model: nn.Module, images: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return step(model, images, y, random=SampleRandom.create(0, rows))[0]

    found: dict[str, Work] = {
        "bare loop": lambda: epoch(by_hand),
        "robustann's step": lambda: epoch(ours),
    }
    from art.defences.trainer import AdversarialTrainerMadryPGD

    def with_art() -> None:
        model, optimizer = made()
        trainer = AdversarialTrainerMadryPGD(
            _art(model, optimizer), nb_epochs=1, batch_size=batch, eps=eps, eps_step=size,
            max_iter=steps,
        )  # fmt: skip
        trainer.fit(x.numpy(), F.one_hot(labels, 10).float().numpy())

    found["ART AdversarialTrainerMadryPGD"] = with_art
    return {"An epoch of PGD-7 training": interleaved(found, rounds)}


def _child(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    return done.stdout


def startup_suite(rounds: int) -> dict[str, Rows]:
    """From nothing to the end of an import, or of a command."""
    codes = {
        "import torch": "import torch",
        "import robustann": "import robustann",
        "robustann --help": "import sys; sys.argv = ['robustann', '--help']\n"
        "from robustann.cli.main import main; main()",
        "import art.attacks.evasion": "import art.attacks.evasion, art.estimators.classification",
    }
    for name in ("torchattacks", "foolbox"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        codes[f"import {name}"] = f"import {name}"
    return {
        "Start-up": interleaved(
            {name: lambda code=code: _child(code) for name, code in codes.items()}, rounds
        )
    }


_PEAK = """
import contextlib, resource, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
import torch, pgd
torch.set_num_threads(1)
found, _ = pgd.contenders(0.3, 0.01, 5, only={name!r})
from robustann.models import create_model
names = [str(digit) for digit in range(10)]
model = create_model("small-cnn", class_names=names, shape=(1, 28, 28), seed=0)
x = torch.rand({images}, 1, 28, 28); y = torch.zeros(len(x), dtype=torch.int64)
held = pgd.Held(model).eval().requires_grad_(False)
found[{name!r}](held, x[:8], y[:8], 0)
def peak():
    # Linux hands ru_maxrss on from the process that started this one: VmHWM is its own.
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1024 if sys.platform == "darwin" else most
# What imports took at their peak is not to hide what comes.
with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")
before = peak()
found[{name!r}](held, x, y, 0)
print((peak() - before) / 1024)
"""


# 1.5 MiB each time they are held; their activations in the model far more.
_PEAK_IMAGES = 512


def memory_suite(rounds: int) -> dict[str, Rows]:
    """Peak memory that PGD adds, on 512 images of MNIST's size, each time in a new process."""
    found, _ = pgd.contenders(0.3, 0.01, 5)
    folder = str(Path(__file__).parent)
    rows: Rows = {}
    for name in found:
        code = _PEAK.format(folder=folder, name=name, images=_PEAK_IMAGES)
        # It hangs on no other process: two say whether it can be trusted.
        peaks = [float(_child(code)) for _ in range(min(rounds, 2))]
        rows[name] = {"mib": statistics.median(peaks), "mib_range": [min(peaks), max(peaks)]}
    return {"Peak memory of PGD": rows}


def audit_suite(rounds: int) -> dict[str, Rows]:
    """An audit of digits with `quick`, all in, and the rendering of its report."""
    data = ra.load_data("digits")
    model = ra.train("small-cnn", data, epochs=10).model
    threat = ra.ThreatModel("linf", 0.1)
    kept: list[ra.AuditResult] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)

        def audited() -> None:
            kept[:] = [ra.audit(model, data, threat, "quick")]

        def saved() -> None:
            kept[0].save(path)

        audited()
        rows = interleaved({"audit of 360 digits, quick": audited}, max(1, rounds // 2))
        report = interleaved(
            {"report of it, HTML": lambda: kept[0].save_report(path / "report.html"),
             "results.json, samples.csv and report": saved},
            rounds,
        )  # fmt: skip
    return {"Audit": rows, "Report": report}


def verdict_suite(rounds: int) -> dict[str, Rows]:
    """The verdict of `standard` on 50 digits beside that of torchattacks' AutoAttack; a model
    trained with PGD in seconds. Once, whatever the rounds: both say the same each time."""
    try:
        importlib.metadata.version("torchattacks")
    except importlib.metadata.PackageNotFoundError:
        return {}
    data, threat = ra.load_data("digits"), ra.ThreatModel("linf", 0.1)
    step = AdversarialTraining(PGD(steps=3), threat)
    model = ra.train("small-cnn", data, step=step, epochs=10).model
    row = verdict.compare(model, data, threat, 50, "standard")
    return {
        "Verdict on 50 digits, PGD training": {
            name: {key: row[f"{key}{suffix}"] for key in ("robust", "propagations", "seconds")}
            for name, suffix in (("torchattacks AutoAttack", "_autoattack"), ("standard", ""))
        }
    }


SUITES: dict[str, Callable[[int], dict[str, Rows]]] = {
    "pgd": pgd_suite,
    "attacks": attacks_suite,
    "training": training_suite,
    "startup": startup_suite,
    "memory": memory_suite,
    "audit": audit_suite,
    "verdict": verdict_suite,
}


def show(title: str, rows: Rows) -> None:
    print(f"\n{title}")
    width = max(map(len, rows))
    if "mib" in next(iter(rows.values())):
        for name, row in rows.items():
            low, high = row["mib_range"]
            print(f"  {name:{width}}  {row['mib']:7.1f} MiB ({low:.1f}-{high:.1f})")
        return
    if "robust" in next(iter(rows.values())):
        print(f"  {'':{width}}  {'robust':>7}  {'propagations an image':>21}  {'seconds':>8}")
        for name, row in rows.items():
            print(f"  {name:{width}}  {row['robust']:7.1%}  {row['propagations']:21.0f}  "
                  f"{row['seconds']:8.1f}")  # fmt: skip
        return
    print(f"  {'':{width}}  {'wall':>6} {'spread':>11}  {'cpu':>6} {'spread':>11}  {'seconds':>8}")
    for name, row in rows.items():
        wall, cpu = (
            "{:.2f}-{:.2f}".format(*row[key]) for key in ("ratio_range", "processor_ratio_range")
        )
        print(f"  {name:{width}}  {row['ratio']:6.2f} {wall:>11}  {row['processor_ratio']:6.2f} "
              f"{cpu:>11}  {row['seconds']:8.3f}")  # fmt: skip


def draw(tables: dict[str, Rows], path: Path) -> None:
    """Ratios of processor time with their spread, one panel a table."""
    from matplotlib.figure import Figure

    panels = {title: rows for title, rows in tables.items()
              if len(rows) > 1 and "processor_ratio" in next(iter(rows.values()))}  # fmt: skip
    if not panels:
        return
    figure = Figure(figsize=(7, 0.6 + sum(0.45 + 0.28 * len(rows) for rows in panels.values())),
                    layout="constrained")  # fmt: skip
    axes = figure.subplots(len(panels), 1, squeeze=False,
                           height_ratios=[1 + len(rows) for rows in panels.values()])  # fmt: skip
    for axis, (title, rows) in zip(axes[:, 0], panels.items(), strict=True):
        names = list(rows)[::-1]
        middle = [rows[name]["processor_ratio"] for name in names]
        spread = [rows[name]["processor_ratio_range"] for name in names]
        around = [[m - low for m, (low, _) in zip(middle, spread, strict=True)],
                  [high - m for m, (_, high) in zip(middle, spread, strict=True)]]  # fmt: skip
        axis.barh(names, middle, xerr=around, color="#4878a8", ecolor="#202020", capsize=2)
        axis.axvline(1, color="#202020", linewidth=0.8)
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    figure.supxlabel("processor time over that of what stands first", fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg")


def facts(threads: int) -> dict[str, Any]:
    """What it ran on and with; neither names of machines nor paths."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"type": platform.machine(), "cores": os.cpu_count(), "load": load},
        "threads": threads,
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory, side by side.")
    parser.add_argument("suites", nargs="*", metavar="SUITE",
                        help=f"of {', '.join(SUITES)}; all without one")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU (default 1)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"expected suites of {', '.join(SUITES)}, got {', '.join(sorted(unknown))}")
    if options.rounds < 3:
        parser.error("expected --rounds of at least 3, or there is no spread to speak of")
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    told = facts(options.threads)
    print(json.dumps(told))
    tables: dict[str, Rows] = {}
    taken: dict[str, float] = {}
    for name in options.suites or SUITES:
        begin = time.perf_counter()
        for title, rows in SUITES[name](options.rounds).items():
            tables[title] = rows
            show(title, rows)
        taken[name] = round(time.perf_counter() - begin, 1)
        # What took minutes is kept, should a later suite be stopped.
        text = json.dumps(
            {**told, "rounds": options.rounds, "suite_seconds": taken, "results": tables}, indent=1
        )
        write_text(options.output_dir / "bench.json", text + "\n")
    draw(tables, options.output_dir / "bench.svg")
    print("\nseconds: " + ", ".join(f"{name} {spent:.0f}" for name, spent in taken.items()))
    print(f"\n{options.output_dir / 'bench.json'}, {options.output_dir / 'bench.svg'}")


if __name__ == "__main__":
    main()
