"""The loading policy against a corpus of hostile and damaged files, and against noise."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import warnings
from pathlib import Path

import corpus
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

import robustann as ra
from robustann.errors import DamagedError, ModelError, RefusedError, RobustannError, UsageError
from robustann.models.inspecting import inspect_file
from robustann.models.sniffing import Kind, read_once, sniff
from robustann.models.weights import parse_weights, read_checkpoint, read_weights

GOOD = corpus.good()
HOSTILE = corpus.hostile()
DAMAGED = corpus.damaged()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("running")
    return folder / "canary", corpus.running(folder)


def refused(path: Path) -> RobustannError:
    """The error that reading a file ends with, whichever way it is read."""
    with pytest.raises(RobustannError) as caught:
        read_weights(path)
    with pytest.raises(type(caught.value)):
        ra.load_model(path, arch="small-cnn", shape=(1, 8, 8))
    return caught.value


# --- what runs code


def test_nothing_runs(running, tmp_path):
    canary, cases = running
    assert len(cases) > 55
    for name, case in cases.items():
        path = tmp_path / Path(name).with_suffix(".safetensors").name
        path.write_bytes(case.content)
        error = refused(path)
        assert error.exit_code == 4, name
        assert case.words in str(error), (name, str(error))
        inspect_file(path)
        path.unlink()
        assert not canary.exists(), name


def test_the_corpus_is_live(running):
    """Each of the payloads does run where a file is loaded without care."""
    canary, cases = running
    seen = 0
    for name, case in cases.items():
        if case.run is None:
            continue
        canary.unlink(missing_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # What a payload returns is no model.
            with contextlib.suppress(Exception):
                case.run(case.content)
        assert canary.exists(), name
        canary.unlink()
        seen += 1
    assert seen > 50


def test_commands_end_with_4(run, running, tmp_path):
    canary, cases = running
    for name in ("eval.pt", "system-legacy.pt", "REDUCE.pkl", "sample-input.pt2", "cut.pkl"):
        path = tmp_path / name
        path.write_bytes(cases[name].content)
        arch = [] if path.suffix == ".pt2" else ["--arch", "small-cnn"]
        code, _, err = run(
            "audit", "--model", path, *arch, "--data", "digits", "--output-dir", tmp_path / "out"
        )
        assert code == 4, (name, err)
        assert not (tmp_path / "out" / "results.json").exists()
        assert not canary.exists()


# --- what lies, and what is damaged


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_files_are_refused(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(HOSTILE[name].content)
    error = refused(path)
    assert isinstance(error, RefusedError)
    assert HOSTILE[name].words in str(error)
    assert str(error).replace("\n", " ").isprintable()
    assert sorted(tmp_path.iterdir()) == [path]


LABORIOUS = corpus.laborious()


@pytest.mark.parametrize("name", sorted(LABORIOUS))
def test_small_files_that_ask_for_hours_are_refused(name, tmp_path, monkeypatch):
    # Lower, so that the test is short; what is not counted has no limit at all.
    monkeypatch.setattr("robustann.models.pickles._MAX_OPCODES", 20_000)
    monkeypatch.setattr("robustann.models.weights._MAX_TENSORS", 20_000)
    content = LABORIOUS[name].content
    with pytest.raises(RefusedError, match=LABORIOUS[name].words):
        parse_weights(content, "it")
    (tmp_path / name).write_bytes(content)
    assert inspect_file(tmp_path / name).exit_code == 4


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_damaged_files_are_told(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(DAMAGED[name].content)
    error = refused(path)
    assert (type(error), error.exit_code) == (DamagedError, 4)
    assert DAMAGED[name].words in str(error)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_files_cut_off_at_every_hundredth_byte(name):
    content = GOOD[name]
    for keep in range(0, len(content) - 1, 100):
        with pytest.raises(DamagedError):
            parse_weights(content[:keep], "it")
    for keep in range(max(0, len(content) - 30), len(content)):
        with pytest.raises(DamagedError):
            parse_weights(content[:keep], "it")


def test_executable_kinds_cut_off_are_no_weights_either(running):
    _, cases = running
    for name in ("eval.pt", "eval-legacy.pt", "eval-4.pkl", "sample-input.pt2"):
        content = cases[name].content
        for keep in range(0, len(content), 100):
            with pytest.raises((RefusedError, ModelError)):
                parse_weights(content[:keep], "it")
    assert not running[0].exists()


def test_limits(tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(GOOD["weights.pt"])
    with pytest.raises(RefusedError, match="at most 100 bytes"):
        read_weights(path, max_bytes=100)
    sparse = tmp_path / "sparse.safetensors"
    with sparse.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(RefusedError, match="raise max_bytes"):
        read_weights(sparse)
    packed = corpus.rezip(corpus.torch_file({"w": torch.zeros(2000)}), packing=8)
    with pytest.raises(RefusedError, match="zip bomb"):
        parse_weights(packed, "it", max_bytes=len(packed))
    views = corpus.torch_file({str(i): v for i, v in enumerate([torch.zeros(500)] * 50)})
    assert len(parse_weights(views, "it").tensors) == 50
    with pytest.raises(RefusedError, match="tensors take"):
        parse_weights(views, "it", max_bytes=50_000)


@pytest.mark.parametrize("value", ["1", "true", "YES", " y "])
def test_unpickling_switched_on_from_outside_is_refused(value, monkeypatch, tmp_path, run):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", value)
    for name, content in GOOD.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RefusedError, match="unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
            read_weights(tmp_path / name)
    with pytest.raises(RefusedError):
        read_checkpoint(GOOD["weights.pt"])
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    assert read_weights(tmp_path / "weights.pt").tensors


def test_an_allow_list_of_the_process_changes_nothing(running):
    with torch.serialization.safe_globals([os.system, eval, corpus.Built]):
        for name in ("eval.pt", "system.pt", "BUILD.pt"):
            with pytest.raises(RefusedError):
                parse_weights(running[1][name].content, "it")
    assert not running[0].exists()


# --- which file


def test_links_and_things_that_are_no_files(tmp_path, running):
    good = tmp_path / "good.pt"
    good.write_bytes(GOOD["weights.pt"])
    link = tmp_path / "link.safetensors"
    link.symlink_to(good)
    assert read_weights(link).kind == "torch"
    assert inspect_file(link).link == str(good)
    evil = tmp_path / "evil.pt"
    evil.write_bytes(running[1]["eval.pt"].content)
    (tmp_path / "to-evil.safetensors").symlink_to(evil)
    (tmp_path / "to-device.safetensors").symlink_to("/dev/zero")
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "none")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.getcwd()
        os.chdir(tmp_path)  # names of sockets are short
        sock.bind("socket.safetensors")
        os.chdir(here)
        for name, error in (
            ("to-evil", RefusedError),
            ("to-device", RefusedError),
            ("pipe", RefusedError),
            ("socket", RefusedError),
            ("nowhere", UsageError),
            ("loop", UsageError),
            ("absent", UsageError),
        ):
            with pytest.raises(error):
                read_weights(tmp_path / f"{name}.safetensors")
    with pytest.raises(UsageError, match="it is a folder"):
        read_weights(tmp_path)
    with pytest.raises(UsageError):
        read_weights("a\0b")


def test_what_is_hashed_is_what_is_loaded(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    path.write_bytes(GOOD["weights.pt"])
    pin = hashlib.sha256(GOOD["weights.pt"]).hexdigest()
    reads = []
    original = read_once

    def once(*arguments, **options):
        reads.append(arguments)
        content = original(*arguments, **options)
        path.write_bytes(HOSTILE["module.pt"].content)  # exchanged right after it was read
        return content

    monkeypatch.setattr("robustann.models.weights.read_once", once)
    weights = read_weights(path, sha256=f"SHA256:{pin.upper()}")
    assert len(reads) == 1
    assert weights.sha256 == pin
    assert torch.equal(weights.tensors["1.bias"], corpus.net().state_dict()["1.bias"])


def test_pins(tmp_path, model_file):
    path = tmp_path / "m.pt"
    path.write_bytes(GOOD["weights.pt"])
    with pytest.raises(RefusedError, match="another file than the one that was pinned"):
        read_weights(path, sha256="0" * 64)
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        read_weights(path, sha256="abc")
    pin = hashlib.sha256(model_file.read_bytes()).hexdigest()
    assert ra.load_model(model_file, sha256=pin).origin.sha256 == pin
    with pytest.raises(RefusedError, match="pinned"):
        ra.load_model(model_file, sha256="0" * 64)


# --- what may be read


@pytest.mark.parametrize("name", sorted(GOOD))
def test_the_same_weights_from_every_form(name, tmp_path):
    path = tmp_path / f"{name}.whatever"
    path.write_bytes(GOOD[name])
    weights = read_weights(path)
    for key, value in corpus.net().state_dict().items():
        torch.testing.assert_close(weights.tensors[key].float(), value, atol=1e-3, rtol=1e-3)
        assert not weights.tensors[key].requires_grad
    assert len(weights.tensors) == 2
    assert weights.sha256 == hashlib.sha256(GOOD[name]).hexdigest()


def test_what_was_unwrapped_is_told():
    notes = parse_weights(GOOD["wrapped.pt"], "it").notes
    assert notes == (
        "took the tensors under 'model', left epoch, best",
        "took 'module.' off the names",
    )
    nested = corpus.torch_file({"body": {"w": torch.ones(1)}, "head": {"w": torch.zeros(1)}})
    weights = parse_weights(nested, "it")
    assert sorted(weights.tensors) == ["body.w", "head.w"]
    assert weights.notes == ("joined the names of nested dicts by dots",)


def test_a_torchvision_network_from_every_form(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=4).eval()
    state = net.state_dict()
    torch.save(state, tmp_path / "a.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "b.pth")
    torch.save({f"model.{k}": v for k, v in state.items()}, tmp_path / "c.pt")
    save_file(state, tmp_path / "d.safetensors")
    without = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(without, tmp_path / "e.pt", _use_new_zipfile_serialization=False)
    x = torch.rand(2, 3, 32, 32)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    normalised = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for name in ("a.pt", "b.pth", "c.pt", "d.safetensors", "e.pt"):
        model = ra.load_model(
            tmp_path / name, arch="torchvision:resnet18", shape=(3, 32, 32), mean=mean, std=std
        )
        torch.testing.assert_close(model(x), net(normalised))
        assert model.spec.class_names == ("0", "1", "2", "3")
        assert not model.training
        assert any("4 classes" in note for note in model.origin.notes)
    grey = ra.load_model(tmp_path / "a.pt", arch="resnet18", shape=(1, 32, 32), class_names="abcd")
    one = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(grey(one), net(one.expand(-1, 3, -1, -1)))
    assert grey.origin.notes[-1] == "put '1.' before the names"
    with pytest.raises(ModelError, match=r"1 of another form|2 of another form: fc.weight"):
        ra.load_model(tmp_path / "a.pt", arch="resnet18", shape=(3, 32, 32), class_names="abc")
    with pytest.raises(ModelError, match=r"do not fit 'resnet34': 80 missing: layer1\.2\.conv1"):
        ra.load_model(tmp_path / "a.pt", arch="resnet34", shape=(3, 32, 32))
    with pytest.raises(ModelError, match=r"unexpected: model\.bn1"):
        ra.load_model(tmp_path / "c.pt", arch="small-cnn", shape=(3, 32, 32), class_names="abcd")
    with pytest.raises(UsageError, match="pass arch and shape"):
        ra.load_model(tmp_path / "a.pt")
    with pytest.raises(UsageError, match="pass shape"):
        ra.load_model(tmp_path / "a.pt", arch="resnet18")
    with pytest.raises(UsageError, match=r"no 'd\.json' beside"):
        ra.load_model(tmp_path / "d.safetensors")
    state["fc.bias"][0] = torch.nan
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="NaN or infinity in 1 of"):
        ra.load_model(tmp_path / "a.pt", arch="resnet18", shape=(3, 32, 32))


def test_a_saved_model_that_lost_its_sidecar(model_file, tmp_path, digits):
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes(model_file.read_bytes())
    model = ra.load_model(bare, arch="small-cnn", shape=(1, 8, 8))
    whole = ra.load_model(model_file)
    x = digits.test.images(slice(0, 8))
    assert torch.equal(model(x), whole(x))
    assert (model.spec.mean, model.spec.std) == (
        pytest.approx(whole.spec.mean),
        pytest.approx(whole.spec.std),
    )
    assert "took mean and std from the file" in model.origin.notes
    with pytest.raises(UsageError, match="another mean than was asked for"):
        ra.load_model(bare, arch="small-cnn", shape=(1, 8, 8), mean=(0.123,))
    with pytest.raises(UsageError, match="states another mean"):
        ra.load_model(model_file, mean=(0.123,))


# --- inspect


def test_inspect_says_what_a_file_is(run, tmp_path):
    path = tmp_path / "weights.h5"
    path.write_bytes(GOOD["weights.pt"])
    code, out, err = run("inspect", path)
    assert (code, err) == (0, "")
    for words in (
        "a zip archive, as torch.save writes",
        hashlib.sha256(GOOD["weights.pt"]).hexdigest(),
        "reads its tensors, and runs nothing in it",
        "tensors: 2, 10 numbers",
        "1.weight  float32[2, 4]",
    ):
        assert words in out
    code, out, _ = run("inspect", path, "--json")
    found = json.loads(out)
    assert found["tensors"][0] == {"name": "1.weight", "dtype": "float32", "shape": [2, 4]}
    assert (found["kind"], found["exit_code"], found["refusal"]) == ("torch", 0, None)


def test_inspect_never_says_safe_and_escapes_everything(run, running, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = {
        "x.safetensors": save({"a\x1b[2J\u202eb": torch.ones(1)}, {"k\x07": "v\x1b]0;x\x07"}),
        "y.zip": HOSTILE["control.pt"].content,
        "z.onnx": corpus.onnx(location="/etc/\x1bpasswd", domain="evil\x1b[2J"),
        "w\x1b[2J.pt": running[1]["eval.pt"].content,
    }
    everything = {
        **{name: case.content for name, case in {**running[1], **HOSTILE, **DAMAGED}.items()},
        **GOOD,
        **evil,
    }
    for name, content in everything.items():
        Path(name).write_bytes(content)
        code, out, err = run("inspect", name, "--all")
        assert (code, err) == (0, ""), name
        assert "safe" not in out.replace("safetensors", "").lower(), out
        assert all(line.isprintable() for line in out.split("\n")), (name, out)
        code, out, _ = run("inspect", name, "--json")
        assert code == 0
        assert out.isascii()
        assert json.loads(out)["sha256"] == hashlib.sha256(content).hexdigest()
        Path(name).unlink()
    assert not running[0].exists()


def test_inspect_names_what_would_run(tmp_path, running):
    path = tmp_path / "m"
    for name, case in running[1].items():
        path.write_bytes(case.content)
        found = inspect_file(path)
        assert found.exit_code == 4
        named = {g for pickle in found.pickles for g in pickle.beyond_tensors}
        if name.startswith("packed"):
            continue
        assert named, name
    path.write_bytes(running[1]["sample-input.pt2"].content)
    assert ("archive/data/sample_inputs/model.pt!archive/data.pkl" in
            {p.place for p in inspect_file(path).pickles})  # fmt: skip
    path.write_bytes(corpus.script())
    assert any(name.endswith(".py") for name in inspect_file(path).code)


def test_inspect_reads_onnx(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(corpus.onnx(location="../secret", domain="mine"))
    facts = inspect_file(path).onnx
    assert (facts.producer, facts.ir_version) == ("by hand", 8)
    assert facts.operators == {"mine.Relu": 1}
    assert facts.foreign == ("mine.Relu",)
    assert facts.weights == (("w", "float32", (3,)),)
    assert facts.external == facts.outside == ("../secret",)
    path.write_bytes(corpus.onnx(location="weights.bin"))
    facts = inspect_file(path).onnx
    assert (facts.external, facts.outside, facts.foreign) == (("weights.bin",), (), ())
    path.write_bytes(corpus.onnx()[:-10])
    assert "cut off" in inspect_file(path).onnx.fault


def test_inspect_of_what_is_no_file(run, tmp_path):
    assert run("inspect", tmp_path)[0] == 2
    assert run("inspect", tmp_path / "none")[0] == 2
    os.mkfifo(tmp_path / "pipe")
    assert run("inspect", tmp_path / "pipe")[0] == 4


def test_advice_of_picklescan_is_passed_on(tmp_path, running):
    pytest.importorskip("picklescan")
    path = tmp_path / "m"
    path.write_bytes(running[1]["system.pt"].content)
    advice = inspect_file(path).pickles[0].advice
    assert any(line.startswith("dangerous") and line.endswith(".system") for line in advice)


# --- kinds


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("script.pt", Kind.TORCHSCRIPT),
        ("export.pt2", Kind.EXPORT),
        ("net.onnx", Kind.ONNX),
        ("module.pt", Kind.TORCH),
        ("module-legacy.pt", Kind.TORCH_LEGACY),
        ("plain.pkl", Kind.PICKLE),
        ("numbers.npy", Kind.NPY),
        ("some.zip", Kind.ZIP),
        ("huge.safetensors", Kind.SAFETENSORS),
    ],
)
def test_sniffing(name, kind):
    assert sniff(HOSTILE[name].content) is kind


# --- noise

FUZZ = settings(
    max_examples=120,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
BASES = [*GOOD.values(), corpus.script(), corpus.exported(), corpus.onnx(location="w.bin"),
         corpus.torch_file(corpus.net()), HOSTILE["numbers.npy"].content]  # fmt: skip


def _survives(content: bytes, path: Path) -> None:
    told = []
    for attempt in (lambda: parse_weights(content, "it"), lambda: read_checkpoint(content)):
        try:
            attempt()
        except (RefusedError, ModelError) as error:
            told.append(str(error))
    assert all(len(words) < 5000 for words in told)
    path.write_bytes(content)
    inspect_file(path)


@FUZZ
@given(content=st.binary(max_size=300), start=st.sampled_from(
    [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"(", b"c", b"\x93NUMPY\x01\x00", b"\x08\x08",
     bytes([50, 0, 0, 0, 0, 0, 0, 0]) + b"{"]))  # fmt: skip
def test_any_bytes(content, start, tmp_path_factory):
    _survives(start + content, tmp_path_factory.getbasetemp() / "noise.bin")


@FUZZ
@given(data=st.data())
def test_changed_bytes(data, tmp_path_factory):
    content = bytearray(data.draw(st.sampled_from(BASES)))
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["change", "change", "cut", "put", "move"]))
        if how == "change":
            content[place] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del content[place : place + data.draw(st.integers(1, 20))]
        elif how == "put":
            content[place:place] = data.draw(st.binary(max_size=20))
        else:
            content += content[place : place + 50]
        if not content:
            break
    _survives(bytes(content), tmp_path_factory.getbasetemp() / "noise.bin")


@FUZZ
@given(pickled=st.binary(max_size=200))
def test_any_pickle_in_an_archive(pickled, tmp_path_factory):
    """With right checksums, so that the pickle itself is what is met."""
    content = corpus.rezip(GOOD["weights.pt"], {"data.pkl": b"\x80\x02" + pickled + b"."})
    _survives(content, tmp_path_factory.getbasetemp() / "noise.bin")
