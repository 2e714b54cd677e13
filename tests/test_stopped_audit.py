"""Audits that are stopped, killed or short of time: nothing is lost, and nothing changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from attacking import lasting

import robustann as ra
from robustann.auditing import Audit, AuditConfig, passes
from robustann.auditing.passes import Passes
from robustann.auditing.presets import PRESETS
from robustann.config.schema import parse_budget

THREAT = ra.ThreatModel("linf", eps=0.1)
ASKED = {"preset": "quick", "max_samples": 80, "batch_size": 16}


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def undisturbed(model_file, digits) -> dict:
    return lasting(ra.audit(ra.load_model(model_file), digits, THREAT, **ASKED))


def stop_after(monkeypatch, pass_name: str, calls: int) -> list[int]:
    """Make the pass fail after so many batches; the list grows with each that was begun."""
    genuine, begun = getattr(Passes, pass_name), []

    def stopping(self, *args):
        begun.append(1)
        if len(begun) > calls:
            raise StoppedError
        return genuine(self, *args)

    monkeypatch.setattr(Passes, pass_name, stopping)
    return begun


@pytest.mark.parametrize("where", ["first", "second"])
def test_a_stopped_audit_goes_on_and_ends_the_same(
    where, model, digits, tmp_path, monkeypatch, undisturbed
):
    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        stop_after(patch, where, 3)
        with pytest.raises(StoppedError):
            ra.audit(model, digits, THREAT, **ASKED, state=state)
    assert len(list(state.glob("audit-*/batch-*.pt"))) == (3 if where == "first" else 5)
    with monkeypatch.context() as patch:
        begun = stop_after(patch, where, 99)
        # Another batch size makes no difference either.
        again = ra.audit(model, digits, THREAT, **{**ASKED, "batch_size": 7}, state=state)
    # What is kept stays as it was cut; what is left of it goes in the new batches.
    left = 2 * -(-16 // 7) if where == "first" else 2
    assert len(begun) == left
    assert lasting(again) == undisturbed
    assert not state.exists()


def test_an_error_within_an_attack_loses_that_batch_alone(
    model, digits, tmp_path, monkeypatch, undisturbed
):
    genuine, calls = passes.run, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return genuine(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(passes, "run", failing)
        with pytest.raises(KeyboardInterrupt):
            ra.audit(model, digits, THREAT, **ASKED, state=tmp_path / "state")
    assert list((tmp_path / "state").glob("audit-*/batch-*.pt"))
    assert (
        lasting(ra.audit(model, digits, THREAT, **ASKED, state=tmp_path / "state")) == undisturbed
    )


def test_what_another_audit_left_is_not_taken_up(model, digits, tmp_path, monkeypatch, undisturbed):
    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        stop_after(patch, "first", 2)
        with pytest.raises(StoppedError):
            ra.audit(model, digits, THREAT, **ASKED, seed=1, state=state)
    own = state / "batch-20240101.pt"
    own.write_text("mine")
    told = []
    config = AuditConfig(threat=THREAT, **ASKED, explain=False)
    Audit(config).run(
        model, digits.test, class_names=digits.class_names, state=state, notify=told.append
    )
    assert len(told) == 1
    assert "another, unfinished audit" in told[0]
    # Nothing but what audits wrote is removed.
    assert lasting(ra.audit(model, digits, THREAT, **ASKED, state=state)) == undisturbed
    assert [path.name for path in state.iterdir()] == [own.name]


class Dimmed(torch.nn.Module):
    """The same tensors, another function: no tensor tells."""

    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.inner(self.factor * x)


def test_a_stopped_audit_of_another_function_is_not_taken_up(model, digits, tmp_path, monkeypatch):
    state = tmp_path / "state"
    asked = {**ASKED, "trust": False, "explain": False, "curve": False}
    with monkeypatch.context() as patch:
        stop_after(patch, "first", 3)
        with pytest.raises(StoppedError):
            ra.audit(Dimmed(model, 1.0), digits, THREAT, **asked, state=state)
    resumed = ra.audit(Dimmed(model, 0.3), digits, THREAT, **asked, state=state)
    assert lasting(resumed) == lasting(ra.audit(Dimmed(model, 0.3), digits, THREAT, **asked))


def test_the_same_audit_does_not_run_twice_at_once(model, digits, tmp_path, monkeypatch):
    asked = {**ASKED, "trust": False, "explain": False, "curve": False}
    genuine = Passes.first

    def meanwhile(self, *args):
        with pytest.raises(ra.UsageError, match="running already"):
            monkeypatch.setattr(Passes, "first", genuine)
            ra.audit(model, digits, THREAT, **asked, state=tmp_path / "state")
        return genuine(self, *args)

    monkeypatch.setattr(Passes, "first", meanwhile)
    assert ra.audit(model, digits, THREAT, **asked, state=tmp_path / "state").n == 80


def test_a_damaged_state_is_told(model, digits, tmp_path, monkeypatch):
    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        stop_after(patch, "first", 1)
        with pytest.raises(StoppedError):
            ra.audit(model, digits, THREAT, **ASKED, state=state)
    (path,) = state.glob("audit-*/batch-00000000.1.pt")
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 4, 3 * len(content) // 4):
        content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ra.RobustannError, match="remove the folder"):
        ra.audit(model, digits, THREAT, **ASKED, state=state)


def test_killed_on_the_command_line_it_goes_on_when_run_again(model_file, tmp_path):
    command = [
        sys.executable, "-m", "robustann", "audit", "--model", str(model_file), "--eps", "0.1",
        "--preset", "standard", "--batch-size", "8", "--max-samples", "64", "--no-explain",
        "--output-dir", str(tmp_path / "audit"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    state = tmp_path / "audit" / "unfinished"
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120

    def shards() -> int:
        # A later pass writes its file before it removes the earlier one's.
        return len({path.name.partition(".")[0] for path in state.glob("audit-*/*.pt")})

    while shards() < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = shards()
    assert kept >= 2
    assert not (tmp_path / "audit" / "results.json").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0
    assert f"going on with a stopped audit: {8 * kept} of 64 images are done" in again.stderr
    assert not state.exists()
    fresh = subprocess.run([*command, "--fresh"], env=environment, capture_output=True, text=True)
    assert fresh.returncode == 0
    assert "going on" not in fresh.stderr


def test_minutes_become_a_budget_that_is_told_and_kept(model, digits):
    short = ra.audit(
        model, digits, THREAT, minutes=0.02, curve=False, explain=False, trust=False, **ASKED
    )
    budget = short.provenance.config["budget"]
    assert isinstance(budget, int)
    assert budget >= 1
    assert max(short.worst_case.propagations) <= budget + 2
    long = ra.audit(
        model, digits, THREAT, minutes=600, curve=False, explain=False, trust=False, **ASKED
    )
    assert long.provenance.config["budget"] > 10_000
    with pytest.raises(ra.UsageError, match="got both"):
        ra.audit(model, digits, THREAT, minutes=1, budget=10)
    with pytest.raises(ra.UsageError, match="minutes > 0"):
        ra.audit(model, digits, THREAT, minutes=float("nan"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("300", (300, None)), ("90s", (None, 1.5)), ("10 min", (None, 10.0)), ("2h", (None, 120.0))],
)
def test_budget_in_words(text, expected):
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["0", "ten", "5days", "-3min", "1e400h", "nan min", "2.5"])
def test_budget_that_means_nothing(text):
    with pytest.raises(ra.UsageError, match="such as 300"):
        parse_budget(text)


class Deceptive(torch.nn.Module):
    """Gradients that lead away from the boundary, logits that tell the truth."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        logits = self.inner(x)
        return 2 * logits.detach() - logits


def test_a_search_that_breaks_something_escalates(model, digits):
    asked = {"max_samples": 60, "explain": False, "curve": False, "trust": False, "preset": "quick"}
    plain = ra.audit(model, digits, THREAT, **asked)
    assert plain.attacks[-1].label == "square:queries=200"
    deceived = ra.audit(Deceptive(model), digits, THREAT, **asked)
    labels = [attack.label for attack in deceived.attacks]
    check = labels.index("square:queries=200")
    assert deceived.attacks[check].succeeded > 0
    assert labels[check + 1] == "square:queries=500"
    assert deceived.attacks[check].attempted < deceived.attacks[check + 1].attempted
    assert deceived.attacks[check + 1].succeeded > 0
    assert deceived.robust_accuracy <= plain.robust_accuracy + 0.05


def test_memory_that_runs_out_in_the_second_pass_changes_nothing(
    model, digits, monkeypatch, undisturbed
):
    genuine = passes.run

    def small_memory(attack, model, x, *args, **kwargs):
        if len(x) > 5:
            raise torch.OutOfMemoryError("too much")
        return genuine(attack, model, x, *args, **kwargs)

    monkeypatch.setattr(passes, "run", small_memory)
    assert lasting(ra.audit(model, digits, THREAT, **ASKED)) == undisturbed


def test_a_budget_that_ends_the_attacks_too_early_is_not_believed(model, digits):
    asked = {"preset": "quick", "max_samples": 60, "explain": False, "curve": False}
    for budget in (1, 50):
        cut = ra.audit(model, digits, THREAT, budget=budget, **asked)
        (finding,) = (one for one in cut.findings if one.check == "budget-cut")
        assert finding.verdict == "fail"
        assert not cut.believable
    enough = ra.audit(model, digits, THREAT, budget=5000, **asked)
    (finding,) = (one for one in enough.findings if one.check == "budget-cut")
    assert finding.verdict == "pass"
    assert enough.believable


def test_a_remedy_that_the_budget_left_no_room_for_is_none(model, digits):
    from zoo import Detached

    asked = {"preset": "quick", "max_samples": 40, "explain": False, "curve": False}
    cut = ra.audit(Detached(model), digits, THREAT, budget=60, **asked)
    (finding,) = (one for one in cut.findings if one.check == "gradient-missing")
    assert finding.remedy is None
    assert "no budget" in finding.explanation
    assert not cut.believable
    # A few queries of a thousand are no search either.
    short = ra.audit(Detached(model), digits, THREAT, budget=600, **asked)
    (search,) = (one for one in short.attacks if one.label == "square:queries=1000")
    assert 0 < search.forwards < 500 * search.attempted
    (finding,) = (one for one in short.findings if one.check == "gradient-missing")
    assert finding.remedy is None
    assert not short.believable
    assert max(short.worst_case.propagations) <= 600 + 4


def test_a_randomised_model_is_averaged_in_the_cascade(model, digits, monkeypatch):
    class Noisy(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x + 0.1 * torch.randn_like(x))

    genuine, draws = passes.run, []

    def noting(*args, **kwargs):
        draws.append(kwargs["draws"])
        return genuine(*args, **kwargs)

    monkeypatch.setattr(passes, "run", noting)
    ra.audit(Noisy(model), digits, THREAT, preset="quick", max_samples=16, explain=False)
    assert set(draws) == {20}


def test_no_text_of_a_stage_hangs_on_the_process():
    # The order of a set changes from one process to the next, and with it an audit's identity.
    for preset in PRESETS.values():
        for stage in (*preset.stages, *preset.check, *preset.escalation):
            assert "set(" not in repr(stage)
