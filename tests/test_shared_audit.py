"""Audits that several processes share: who dies costs a shard, and the result is that of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import robustann as ra
from robustann.auditing import claims, forget
from robustann.auditing.claims import Claims
from robustann.auditing.passes import Passes
from robustann.auditing.shards import shard_size
from robustann.launch import World, world

THREAT = ra.ThreatModel("linf", eps=0.1)
ASKED = {"preset": "quick", "max_samples": 48, "batch_size": 8, "explain": False}


def lasting(text: str) -> dict:
    values = json.loads(text)
    del values["execution"]
    return values


@pytest.fixture(scope="module")
def undisturbed(model_file, digits) -> dict:
    return lasting(ra.audit(ra.load_model(model_file), digits, THREAT, **ASKED).to_json())


def test_workers_share_the_shards_and_all_get_the_result_of_one(
    model_file, digits, tmp_path, undisturbed, monkeypatch
):
    begun = {"first": [], "second": []}
    for name, starts in begun.items():
        genuine = getattr(Passes, name)

        def noting(self, *args, genuine=genuine, starts=starts):
            starts.append(args[0] if isinstance(args[0], int) else args[0].start)
            return genuine(self, *args)

        monkeypatch.setattr(Passes, name, noting)
    results = []

    def work() -> None:
        model = ra.load_model(model_file)
        found = ra.audit(model, digits, THREAT, **ASKED, state=tmp_path / "state", shared=True)
        results.append(found.to_json())

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 3
    assert len(set(results)) == 1
    assert lasting(results[0]) == undisturbed
    for starts in begun.values():
        assert sorted(starts) == list(range(0, 48, 8))
    # Who comes late finds it done.
    work()
    assert results[3] == results[0]
    assert len(begun["first"]) == 6
    forget(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def command(model_file: Path, folder: Path, *more: str) -> list[str]:
    return [
        "audit", "--model", str(model_file), "--eps", "0.1", "--preset", "standard",
        "--batch-size", "8", "--max-samples", "48", "--no-explain", "--no-curve",
        "--output-dir", str(folder), *more,
    ]  # fmt: skip


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone(model_file, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("alone")
    arguments = [sys.executable, "-m", "robustann", *command(model_file, folder)]
    subprocess.run(arguments, env=ENVIRONMENT, check=True, capture_output=True)
    return lasting((folder / "results.json").read_text())


def test_a_worker_killed_in_mid_audit_loses_one_shard(model_file, tmp_path, alone):
    folder = tmp_path / "audit"
    arguments = [sys.executable, "-m", "robustann", *command(model_file, folder, "--shared")]
    killed = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    state, deadline = folder / "unfinished", time.monotonic() + 120
    # In the middle of a shard: it has one done and holds a claim on another.
    while time.monotonic() < deadline and killed.poll() is None:
        done = list(state.glob("audit-*/batch-*.1.pt"))
        if done and list(state.glob("audit-*/claims/shard-*")):
            break
        time.sleep(0.005)
    others = [
        subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (folder / "results.json").exists()
    told = [one.communicate(timeout=240)[0] for one in others]
    assert [one.returncode for one in others] == [0, 0]
    assert told[0] == told[1]
    assert "robust accuracy" in told[0].lower()
    assert lasting((folder / "results.json").read_text()) == alone
    again = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0
    assert "finished already" in again.stderr
    fresh = subprocess.run(
        [*arguments, "--fresh"], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert fresh.returncode == 2
    assert "remove the folder" in fresh.stderr


def test_two_processes_of_torchrun_end_like_one(model_file, tmp_path, alone):
    arguments = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "-m", "robustann", *command(model_file, tmp_path / "audit"),
    ]  # fmt: skip
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1
    assert lasting((tmp_path / "audit" / "results.json").read_text()) == alone


def test_who_shares_and_who_does_not_keep_apart(model, digits, tmp_path, monkeypatch):
    asked = {**ASKED, "trust": False, "curve": False, "state": tmp_path / "state"}
    genuine = Passes.first

    def meanwhile(self, *args):
        monkeypatch.setattr(Passes, "first", genuine)
        with pytest.raises(ra.UsageError, match="--shared"):
            ra.audit(model, digits, THREAT, **asked, shared=True)
        return genuine(self, *args)

    monkeypatch.setattr(Passes, "first", meanwhile)
    assert ra.audit(model, digits, THREAT, **asked).n == 48
    with pytest.raises(ra.UsageError, match="give state"):
        ra.audit(model, digits, THREAT, **{**ASKED, "trust": False}, shared=True)


def test_a_claim_that_is_no_longer_touched_is_taken_up(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_BEAT", 0.05)
    monkeypatch.setattr(claims, "_STALE", 1.0)
    # Another machine's: nobody here can look its process up.
    monkeypatch.setattr(claims, "_is_dead", lambda text: False)
    mine, theirs = Claims(tmp_path), Claims(tmp_path)
    with mine.claim("a") as got:
        assert got
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            with theirs.claim("a") as other:
                assert not other
            time.sleep(0.1)
    dead = tmp_path / "a.0"
    dead.write_text("{}")
    with theirs.claim("a") as early:
        assert not early
    time.sleep(1.1)
    with theirs.claim("a") as late, mine.claim("a") as third:
        assert late
        assert not third
    assert not list(tmp_path.iterdir())


def test_a_claim_of_a_process_that_ended_is_taken_up_at_once(tmp_path):
    code = (
        "import os, pathlib, sys\n"
        "from robustann.auditing.claims import Claims\n"
        "with Claims(pathlib.Path(sys.argv[1])).claim('a') as got:\n"
        "    assert got\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=ENVIRONMENT)
    assert [path.name for path in tmp_path.iterdir()] == ["a.0"]
    with Claims(tmp_path).claim("a") as got:
        assert got
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.0", "a.1"]
    assert not list(tmp_path.iterdir())


def test_what_fails_gives_its_claim_back(tmp_path):
    with pytest.raises(KeyboardInterrupt), Claims(tmp_path).claim("a"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_torchrun_tells_who_a_process_is(monkeypatch):
    for name, text in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, text)
    assert world() == World(rank=3, size=4, local_rank=1)
    assert shard_size(1000, 8, keeps_batches=False) == 64
    # Whole batches, where results could hang on them.
    assert shard_size(1000, 48, keeps_batches=True) == 48
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert world() == World()
