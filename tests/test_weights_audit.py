"""The audit of faulty and tampered weights: figures, report, command line, and what docs say."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import robustann as ra
from robustann.attacks.engine import predict_logits
from robustann.attacks.weights import quantized_model, random_bit_errors, tampering
from robustann.attacks.weights.quantization import quantized_parameters
from robustann.auditing import AuditConfig
from robustann.auditing import weights as measuring
from robustann.auditing.weights import Effort, effort_of, measure_weights, weight_propagations
from robustann.data import ImageData, TensorSplit
from robustann.models import tensor_digest
from robustann.results import AuditResult, Weights
from robustann.rng import stable_hash

SMALL = Effort(
    rates=(1e-4, 0.01, 0.2), patterns=3, samples=150, flips=12, attackers=50, searches=1
)  # fmt: skip
DOCS = (Path(__file__).parent.parent / "docs" / "weights.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def measured(model_file: Path, digits: ImageData) -> Weights:
    return measure_weights(ra.load_model(model_file), digits.test, effort=SMALL, seed=5)


def part(digits: ImageData, count: int) -> TensorSplit:
    """The images that were measured on: drawn as :func:`measure_weights` says, for every seed."""
    drawn = torch.Generator().manual_seed(measuring._SELECTION_SEED)
    rows = torch.randperm(len(digits.test), generator=drawn)[:count].sort().values
    return TensorSplit(digits.test.images(rows), digits.test.labels[rows])


def error(model: nn.Module, split: TensorSplit) -> float:
    logits = predict_logits(model, split.images(slice(None)))
    return float((logits.argmax(1) != split.labels).double().mean())


def test_error_without_bit_errors_is_that_of_the_stored_model(
    measured: Weights, model: nn.Module, digits: ImageData
) -> None:
    images = part(digits, 150)
    assert measured.samples == 150
    assert measured.clean_error == pytest.approx(error(model, images), abs=1e-5)
    coarse = quantized_model(model, 8)
    assert measured.fixed is not None
    assert measured.float32 is not None
    assert measured.guarded is not None
    assert measured.fixed.stored_error == pytest.approx(error(coarse, images), abs=1e-5)
    assert measured.float32.stored_error == measured.clean_error
    assert measured.guarded.stored_error == measured.clean_error


def test_error_grows_with_the_rate_and_can_be_repeated_by_hand(
    measured: Weights, model: nn.Module, digits: ImageData
) -> None:
    assert measured.seeds == (5000, 5001, 5002)
    for found, bits in ((measured.fixed, 8), (measured.float32, 32)):
        assert found is not None
        assert (found.bits, [level.rate for level in found.levels]) == (bits, [1e-4, 0.01, 0.2])
        means = [level.mean for level in found.levels]
        assert means == sorted(means)
        assert means[-1] > found.stored_error + 0.5
        assert all(level.worst >= level.mean for level in found.levels)
        again = random_bit_errors(
            model, part(digits, 150), rates=SMALL.rates, seeds=measured.seeds, bits=bits
        )
        for level, point in zip(found.levels, again.points, strict=True):
            assert (level.mean, level.std, level.worst) == (
                pytest.approx(point.mean, abs=1e-5),
                pytest.approx(point.std, abs=1e-5),
                pytest.approx(point.worst, abs=1e-5),
            )


def test_the_guard_lowers_the_error_in_float32(measured: Weights) -> None:
    assert measured.float32 is not None
    assert measured.guarded is not None
    for bare, guarded in zip(measured.float32.levels, measured.guarded.levels, strict=True):
        assert guarded.mean < bare.mean
    assert measured.float32.levels[1].mean > 0.8
    assert measured.guarded.levels[1].worst < 0.2


def test_the_flips_applied_give_the_stated_accuracy(
    measured: Weights, model: nn.Module, digits: ImageData
) -> None:
    search = measured.search
    assert search is not None
    assert (search.samples, search.attack_samples, len(search.flips)) == (100, 50, 12)
    assert not search.reached
    assert search.total_bits == 8 * sum(p.numel() for p in model.parameters())
    stored = quantized_parameters(model)
    weights = dict(quantized_model(model).named_parameters())
    copy = quantized_model(model)
    images = part(digits, 150)
    # The search drew the attacker's images out of these; the rest was evaluated.
    drawn = torch.Generator().manual_seed(stable_hash("bit-search", 5000))
    rest = torch.randperm(150, generator=drawn)[50:]
    evaluated = TensorSplit(images.images(rest), images.labels[rest])
    assert 1 - error(copy, evaluated) == pytest.approx(search.stored_accuracy, abs=1e-5)
    for flip in search.flips:
        tensor = stored[flip.tensor]
        step = (tensor.high - tensor.low) / 255
        assert flip.before ^ flip.after == 1 << flip.bit
        weights[flip.tensor].data[flip.index] += (flip.after - flip.before) * step
        parameters = dict(copy.named_parameters())
        parameters[flip.tensor].data.copy_(weights[flip.tensor].data)
        assert 1 - error(copy, evaluated) == pytest.approx(flip.accuracy, abs=0.011)
    # As many random flips do nothing of the kind.
    assert len(search.control) == 3
    assert min(search.control) > search.accuracy + 0.1


def test_the_same_seed_gives_the_same_and_leaves_the_model_alone(
    measured: Weights, model: nn.Module, digits: ImageData
) -> None:
    model.train()
    before = tensor_digest(model), torch.get_rng_state().tolist()
    again = measure_weights(model, digits.test, effort=SMALL, seed=5, batch_size=64)
    assert again == measured
    assert (tensor_digest(model), torch.get_rng_state().tolist()) == before
    assert model.training
    other = measure_weights(model, digits.test, effort=SMALL, seed=6)
    assert other.clean_error == measured.clean_error
    assert not set(other.seeds) & set(measured.seeds)
    assert other.fixed != measured.fixed


def test_the_best_of_several_searches_is_kept(digits: ImageData, model: nn.Module) -> None:
    many = Effort(rates=(0.01,), patterns=1, samples=150, flips=8, attackers=30, searches=3)
    alone = [
        measure_weights(model, digits.test, effort=Effort(**{**vars(many), "searches": n}))
        for n in (1, 3)
    ]
    one, best = (found.search for found in alone)
    assert one is not None
    assert best is not None
    assert (one.searches, best.searches) == (1, 3)
    assert best.accuracy <= one.accuracy


def test_classes_in_order_do_not_make_a_sample_of_one_class(model: nn.Module) -> None:
    # All of class 0 first: who takes the first images never sees the others.
    labels = torch.tensor([0] * 300 + [1] * 300)
    constant = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    constant[1].weight.data.zero_()
    constant[1].bias.data = torch.tensor([1.0, 0.0])
    split = TensorSplit(torch.rand(600, 1, 2, 2), labels)
    effort = Effort(rates=(0.01,), patterns=1, samples=200, flips=1, attackers=9, searches=1)
    assert 0.4 < measure_weights(constant, split, effort=effort).clean_error < 0.6


def test_a_model_that_guesses_already_needs_no_flip() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model[1].weight.data.zero_()
    model[1].bias.data = torch.tensor([1.0, 0.0])
    split = TensorSplit(torch.rand(40, 1, 2, 2), torch.ones(40, dtype=torch.int64))
    found = measure_weights(model, split, effort=SMALL).search
    assert found is not None
    assert (found.flips, found.control, found.reached, found.accuracy) == ((), (), True, 0)


def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    split = TensorSplit(torch.rand(6, 1, 2, 2), torch.arange(6) % 3)

    class Bare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :3] * 2

    found = measure_weights(Bare(), split, effort=SMALL)
    assert "floating-point parameters" in found.not_measured[0]
    assert (found.fixed, found.float32, found.guarded, found.search) == (None,) * 4
    assert 0 <= found.clean_error <= 1

    half = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()

    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = half

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.inner(x.double())
            return answer

    found = measure_weights(Double(), split, effort=SMALL)
    assert found.fixed is not None
    assert found.search is not None
    assert found.float32 is None
    assert found.guarded is None
    assert [reason.partition(":")[0] for reason in found.not_measured] == [
        "bit errors in float32",
        "bit errors behind a guard",
    ]

    single = TensorSplit(torch.rand(1, 1, 2, 2), torch.tensor([0]))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    found = measure_weights(plain, single, effort=SMALL)
    assert found.search is None
    assert "another to evaluate" in found.not_measured[0]

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("full")

    # What the attacks found must not be lost because memory runs out afterwards.
    monkeypatch.setattr(measuring, "progressive_bit_search", full)
    found = measure_weights(plain, split, effort=SMALL)
    assert found.search is None
    assert found.fixed is not None
    assert "memory ran out" in found.not_measured[0]
    monkeypatch.setattr(measuring, "progressive_bit_search", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_weights(plain, split, effort=SMALL)


def test_torchscript_is_refused_in_words() -> None:
    split = TensorSplit(torch.rand(6, 1, 2, 2), torch.arange(6) % 3)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.jit, "ScriptModule", nn.Flatten)
        found = measure_weights(plain, split, effort=SMALL)
    assert "TorchScript" in found.not_measured[0]
    assert found.fixed is None


def test_progress_adds_up_to_what_was_announced(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, digits: ImageData
) -> None:
    told: list[int] = []
    totals: list[int] = []

    @contextmanager
    def bar(total: int, **_: object) -> Iterator[Callable[[int, str], None]]:
        totals.append(total)
        yield lambda count, what: told.append(count)

    monkeypatch.setattr(measuring, "progress_bar", bar)
    measure_weights(model, digits.test, effort=SMALL)
    assert sum(told) == totals[0] == weight_propagations(model, len(digits.test), SMALL)
    assert len(told) > 30


def test_presets_are_ever_more_effort_and_agree_with_the_docs(model: nn.Module) -> None:
    costs = [
        weight_propagations(model, 10_000, effort_of(name))
        for name in ("quick", "standard", "thorough")
    ]
    assert costs == sorted(set(costs))
    assert effort_of("autoattack") == effort_of("standard")
    for name in ("quick", "standard", "thorough"):
        effort = effort_of(name)
        assert 0.01 in effort.rates
        row = (
            f"| {name} | {effort.patterns} | {len(effort.rates)} | {effort.samples} | "
            f"{effort.flips} | {effort.searches} |"
        )
        assert row in DOCS


def test_an_audit_carries_the_weights_and_its_json_brings_them_back(
    model: nn.Module, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(measuring.EFFORTS, "quick", SMALL)  # type: ignore[arg-type]
    threat = ra.ThreatModel("linf", 0.05)
    assert not AuditConfig(threat=threat).weights

    def audit(*, weights: bool) -> AuditResult:
        return ra.audit(
            model, digits, threat, "quick", max_samples=30, weights=weights, explain=False,
            curve=False, trust=False, seed=2,
        )  # fmt: skip

    without, result = audit(weights=False), audit(weights=True)
    assert without.weights is None
    assert result.weights is not None
    assert result.weights.samples == 30
    assert result.weights.seeds[0] == 2000
    assert result.provenance.config["weights"] is True
    # Nothing else of the result hangs on it.
    assert result.worst_case == without.worst_case
    result.save(tmp_path)
    again = AuditResult.load(tmp_path / "results.json")
    assert again == result
    assert again.to_json() == result.to_json()
    assert "costs" in (tmp_path / "report.html").read_text(encoding="utf-8")


# Command line


@pytest.fixture
def run(
    run: Callable[..., tuple[int, str, str]], model_file: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in a folder with a model: (exit code, stdout, stderr)."""
    shutil.copy(model_file, "model.safetensors")
    shutil.copy(model_file.with_suffix(".json"), "model.json")
    Path("seal.key").write_bytes(b"0123456789abcdef" * 2)
    return run


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS, re.DOTALL | re.MULTILINE)


def test_what_docs_print_runs(
    run: Callable[..., tuple[int, str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [
        shlex.split(line)
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("robustann ")
    ]
    assert [command[1] for command in commands] == ["audit", "seal", "verify"]
    for command in commands:
        code, out, err = run(*command[1:])
        told = [line for line in err.splitlines() if not line.startswith("normalisation:")]
        assert (code, told) == (0, []), command
        if command[1] == "audit":
            assert re.search(
                r"^weights in 8 bits, 1 % of them wrong: error [\d.]+ % in the mean, [\d.]+ % in "
                r"the worst of 3 patterns, [\d.]+ % with none wrong$", out, re.MULTILINE,
            )  # fmt: skip
            assert re.search(r"^(fewest|not enough) flips found: \d+ of [\d,]+ bits", out, re.M)
    page = Path("runs/audit-model/report.html").read_text(encoding="utf-8")
    section = page[page.index('<section id="weights"') :]
    assert "By accident: one wrong bit in 100" in section[: section.index("</section>")]

    (snippet,) = blocks("python")
    exec(compile(snippet, "weights.md", "exec"), {})
    assert capsys.readouterr().out == ""
    # A bit that flips in memory is noticed and repaired, an altered file is refused.
    flips = "model.net[0].weight.data.view(-1)[0] = 1e30\n"
    exec(compile(snippet.replace("# Now and then", flips + "# Now"), "weights.md", "exec"), {})
    assert capsys.readouterr().out.startswith("1 weights out of range set to zero")
    tampering.flip_bit("model.safetensors", "net.0.weight", bit=20)
    tampering.forge_sidecar("model.safetensors")
    with pytest.raises(SystemExit, match="altered"):
        exec(compile(snippet, "weights.md", "exec"), {})


def test_exit_codes_of_seal_and_verify(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("seal", "model.safetensors", "--key-file", "seal.key")[0] == 0
    assert run("verify", "model.safetensors", "--key-file", "seal.key")[0] == 0
    for wrong in (
        ("verify", "absent.safetensors"),
        ("verify", "model.safetensors", "absent.json"),
        ("seal", "model.safetensors", "--key-file", "absent"),
        ("seal", "model.safetensors", "--out", "model.json"),
        ("seal",),
    ):
        code, out, err = run(*wrong)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
    tampering.flip_bit("model.safetensors", "net.0.weight", bit=20)
    tampering.forge_sidecar("model.safetensors")
    code, out, err = run("verify", "model.safetensors", "--key-file", "seal.key")
    assert (code, out) == (4, "")
    assert "tensor net.0.weight: other values" in err
    assert "4 a model was refused" in run("--help")[1]
