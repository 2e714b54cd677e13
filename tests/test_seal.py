"""Seal and verify: what was altered is named, and nothing passes that should not."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import robustann as ra
from robustann.attacks.weights import tampering
from robustann.cli import main as command_line
from robustann.defenses import Manifest, WeightGuard, changed_tensors, seal_model, verify_model
from robustann.defenses.seal import SealedTensor, _sign, read_key
from robustann.errors import ModelError, RefusedError, UsageError
from robustann.models.layout import Layout

KEY = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
def copied(model_file: Path, tmp_path: Path) -> Path:
    """A model file of one's own, to be altered."""
    path = tmp_path / "model.safetensors"
    shutil.copy(model_file, path)
    shutil.copy(model_file.with_suffix(".json"), path.with_suffix(".json"))
    return path


def flip(path: Path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def test_an_untouched_model_is_intact_and_the_manifest_states_what_it_holds(copied: Path) -> None:
    manifest = seal_model(copied, key=KEY)
    assert verify_model(copied, manifest, key=KEY).intact
    assert verify_model(copied, manifest, key=KEY).signed
    assert not verify_model(copied, manifest).signed
    content = copied.read_bytes()
    assert manifest.sha256 == hashlib.sha256(content).hexdigest()
    assert manifest.size == len(content)
    sidecar = copied.with_suffix(".json").read_bytes()
    assert manifest.sidecar_sha256 == hashlib.sha256(sidecar).hexdigest()
    tensors = load_file(copied)
    assert manifest.tensors.keys() == tensors.keys()
    for name, values in tensors.items():
        sealed = manifest.tensors[name]
        assert sealed.sha256 == hashlib.sha256(values.numpy().tobytes()).hexdigest()
        assert (sealed.low, sealed.high) == (float(values.min()), float(values.max()))
        assert (sealed.dtype, sealed.shape) == ("F32", tuple(values.shape))


@pytest.mark.parametrize("bit", [0, 7])
def test_each_flipped_bit_is_noticed_wherever_it_lies(copied: Path, bit: int) -> None:
    manifest = seal_model(copied)
    size = len(copied.read_bytes())
    start = Layout.of(copied.read_bytes()).start
    # Length, header, padding before the tensors, first, middle and last byte of them.
    for byte in (0, 7, 8, 40, start - 1, start, (start + size) // 2, size - 1):
        flip(copied, byte, bit)
        found = verify_model(copied, manifest)
        assert not found.intact
        if byte >= start:
            assert len(found.tensors) == 1
        flip(copied, byte, bit)
    assert verify_model(copied, manifest).intact


def test_the_altered_tensor_is_named(copied: Path) -> None:
    manifest = seal_model(copied)
    for name, sealed in manifest.tensors.items():
        last = torch.Size(sealed.shape).numel() - 1
        tampering.flip_bit(copied, name, element=last, bit=31)
        found = verify_model(copied, manifest)
        assert found.tensors == (name,)
        assert found.changes == (f"tensor {name}: other values",)
        tampering.flip_bit(copied, name, element=last, bit=31)
    assert verify_model(copied, manifest).intact


def test_a_forged_sidecar_deceives_the_loader_and_not_the_seal(copied: Path) -> None:
    manifest = seal_model(copied)
    tampering.flip_bit(copied, "net.0.weight", bit=20)
    with pytest.raises(ModelError, match="SHA-256"):
        ra.load_model(copied)
    tampering.forge_sidecar(copied)
    ra.load_model(copied)
    found = verify_model(copied, manifest)
    assert found.changes == ("tensor net.0.weight: other values", "sidecar: altered")


def test_swapped_and_reshaped_tensors_are_named(copied: Path) -> None:
    manifest = seal_model(copied)
    original = copied.read_bytes()
    before = load_file(copied)
    tampering.swap_tensors(copied, "net.0.bias", "net.5.bias")
    after = load_file(copied)
    assert torch.equal(after["net.0.bias"], before["net.5.bias"])
    assert verify_model(copied, manifest).tensors == ("net.0.bias", "net.5.bias")
    copied.write_bytes(original)
    tampering.change_shape(copied, "net.7.weight", (128, 10))
    assert load_file(copied)["net.7.weight"].shape == (128, 10)
    assert verify_model(copied, manifest).changes == (
        "tensor net.7.weight: F32[128, 10] instead of F32[10, 128]",
    )


def test_added_and_removed_tensors_and_other_headers(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, path)
    manifest = seal_model(path)
    save_file({"a": torch.ones(2), "c\x1b[2J": torch.zeros(2)}, path)
    found = verify_model(path, manifest)
    assert found.changes == ("tensor b: removed", "tensor 'c\\x1b[2J': added")
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, path, metadata={"by": "somebody"})
    found = verify_model(path, manifest)
    assert found.changes == ("weight file: its header was altered, but all tensors are the same",)
    path.write_bytes(b"\x80\x04")
    assert "header is damaged" in verify_model(path, manifest).changes[0]
    path.write_bytes(b"")
    assert not verify_model(path, manifest).intact


def test_the_sidecar_is_covered(copied: Path) -> None:
    sidecar = copied.with_suffix(".json")
    manifest = seal_model(copied)
    text = sidecar.read_text()
    sidecar.write_text(text.replace('"3"', '"8"'))
    assert ra.load_model(copied).spec.class_names[3] == "8"
    assert verify_model(copied, manifest).changes == ("sidecar: altered",)
    sidecar.unlink()
    assert verify_model(copied, manifest).changes == ("sidecar: removed",)
    alone = seal_model_without_sidecar(copied)
    assert verify_model(copied, alone).intact
    sidecar.write_text(text)
    assert verify_model(copied, alone).changes == (
        "sidecar: added, there was none when the model was sealed",
    )


def seal_model_without_sidecar(path: Path) -> Manifest:
    manifest = seal_model(path)
    assert manifest.sidecar_sha256 is None
    return manifest


def test_what_is_bad_already_is_not_sealed(copied: Path, tmp_path: Path) -> None:
    tampering.flip_bit(copied, "net.0.weight")
    with pytest.raises(ModelError, match="their SHA-256 differ"):
        seal_model(copied)
    bad = tmp_path / "bad.safetensors"
    save_file({"w": torch.tensor([1.0, float("nan")])}, bad)
    with pytest.raises(ModelError, match="NaN or infinity in w"):
        seal_model(bad)
    bad.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelError, match="header is damaged"):
        seal_model(bad)
    with pytest.raises(UsageError, match="no model file"):
        seal_model(tmp_path / "nowhere.safetensors")


# Signatures


def test_the_signature_is_the_hmac_of_the_manifest(copied: Path) -> None:
    manifest = seal_model(copied, key=KEY)
    facts = json.loads(manifest.model_dump_json())
    del facts["signature"]
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    expected = hmac.digest(KEY, b"robustann seal 1\n" + text.encode(), "sha256").hex()
    assert manifest.signature == expected


def test_an_altered_manifest_is_refused(copied: Path) -> None:
    manifest = seal_model(copied, key=KEY)
    tampering.flip_bit(copied, "net.0.weight", bit=20)
    tampering.forge_sidecar(copied)
    forged = seal_model(copied)
    assert verify_model(copied, forged).intact
    # Without the key there is no signature that fits: neither none, nor the old one, nor one's own.
    for signature in (None, manifest.signature, seal_model(copied, key=b"x" * 32).signature):
        with pytest.raises(RefusedError, match="signature"):
            verify_model(copied, forged.model_copy(update={"signature": signature}), key=KEY)
    with pytest.raises(RefusedError, match="the key is another one"):
        verify_model(copied, manifest, key=b"y" * 32)


def fields_of(facts: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    places = [(facts, name) for name in facts if name not in ("schema_version", "signature")]
    for tensor in facts["tensors"].values():
        places += [(tensor, name) for name in tensor]
    return places + [(facts["versions"], name) for name in facts["versions"]]


def test_every_field_of_the_manifest_is_signed(copied: Path, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    seal_model(copied, key=KEY).save(path)
    whole = path.read_text()
    for place in range(len(fields_of(json.loads(whole)))):
        facts = json.loads(whole)
        holder, name = fields_of(facts)[place]
        value = holder[name]
        if isinstance(value, dict):
            value.pop(next(iter(value)))
        else:
            holder[name] = {
                str: lambda v: "f" + v[:-1], int: lambda v: v + 1, float: lambda v: v + 0.5,
                list: lambda v: [*v, 1],
            }[type(value)](value)  # fmt: skip
        path.write_text(json.dumps(facts))
        with pytest.raises(RefusedError, match="does not fit"):
            verify_model(copied, Manifest.load(path), key=KEY)
    path.write_text(json.dumps(json.loads(whole), indent=7, sort_keys=True))
    assert verify_model(copied, Manifest.load(path), key=KEY).intact


@hypothesis.given(st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5))
@hypothesis.settings(max_examples=100, deadline=None)
def test_the_signature_survives_the_file(number: float, text: str) -> None:
    tensor = SealedTensor(dtype="F32", shape=(1,), sha256="0" * 64, low=number, high=number)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = ""
    manifest = Manifest(file=text, size=1, sha256="0" * 64, sidecar_sha256=None,
                        tensors={text: tensor}, versions={})  # fmt: skip
    again = Manifest.model_validate_json(manifest.model_dump_json())
    assert _sign(again, KEY) == _sign(manifest, KEY)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"short", "16 to 65536 bytes in .*, got 5"), (b"", "got 0"), (b"x" * 70_000, "got more")],
)
def test_unfit_keys(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_key(tmp_path / "key")
    with pytest.raises(UsageError, match="could not read"):
        read_key(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "alter",
    [
        lambda text: "",
        lambda text: text[:-30],
        lambda text: "[]",
        lambda text: "\x00" + text,
        lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
        lambda text: text.replace('"sha256": "', '"sha256": "z', 1),
        lambda text: text.replace("{", '{"\x1b[2J": 1,', 1).replace("\x1b", "\\u001b"),
        lambda text: text.replace('"low": ', '"low": NaN, "x": ', 1),
        lambda text: "[" * 100_000,
    ],
    ids=["empty", "cut", "list", "nul", "version", "hash", "more", "nan", "deep"],
)
def test_a_damaged_manifest_vouches_for_nothing(
    alter: Callable[[str], str], copied: Path, tmp_path: Path
) -> None:
    path = tmp_path / "manifest.json"
    seal_model(copied).save(path)
    path.write_text(alter(path.read_text()))
    with pytest.raises(RefusedError, match="vouches for nothing") as caught:
        Manifest.load(path)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


# In memory


def test_bits_that_flip_after_loading_are_noticed(copied: Path) -> None:
    manifest = seal_model(copied)
    model = ra.load_model(copied)
    assert changed_tensors(model, manifest) == ()
    weight = dict(model.named_parameters())["net.2.weight"]
    weight.data.view(torch.int32).view(-1)[77] ^= 1
    assert changed_tensors(model, manifest) == ("net.2.weight",)
    assert changed_tensors(nn.Linear(2, 1), manifest)[:2] == ("bias", "net.0.bias")


def test_the_guard_of_a_manifest_is_that_of_the_model(copied: Path, model: nn.Module) -> None:
    assert seal_model(copied).guard(margin=0.02) == WeightGuard.record(model, margin=0.02)


def test_it_says_where_it_helps_and_where_not() -> None:
    assert any("with a key" in help_ for help_ in Manifest.helps)
    for word in ("adversarial inputs", "in memory", "bad when it was sealed", "knows the key"):
        assert any(word in limit for limit in Manifest.limits)


# Alterations


def test_alterations_change_what_they_say_and_nothing_else(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "altered.safetensors"
    original = copied.read_bytes()
    tampering.flip_bit(copied, "net.2.weight", element=5, bit=31, out=out)
    assert copied.read_bytes() == original
    before, after = load_file(copied), load_file(out)
    assert after["net.2.weight"].view(-1)[5] == -before["net.2.weight"].view(-1)[5]
    after["net.2.weight"].view(-1)[5] *= -1
    assert all(torch.equal(after[name], before[name]) for name in before)
    differing = [one ^ two for one, two in zip(original, out.read_bytes(), strict=True)]
    assert sorted(differing)[-1] == 128
    assert sum(map(bool, differing)) == 1
    tampering.flip_bit(out, "net.2.weight", element=5, bit=31)
    assert out.read_bytes() == original


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: tampering.flip_bit(path, "net.0.wieght"), "did you mean 'net.0.weight'"),
        (lambda path: tampering.flip_bit(path, "net.0.bias", 32), "from 0 to 31 in net.0.bias"),
        (lambda path: tampering.flip_bit(path, "net.0.bias", 0, 32), "bit: expected from 0 to 31"),
        (lambda path: tampering.swap_tensors(path, "net.0.bias", "net.0.bias"), "twice"),
        (lambda path: tampering.change_shape(path, "net.0.bias", (31,)), "expected 32 numbers"),
        (lambda path: tampering.flip_bit(path / "x", "w"), "no model file"),
        (lambda path: tampering.forge_sidecar(path), "nothing to forge"),
    ],
)
def test_wrong_alterations(call: Callable[[Path], None], message: str, copied: Path) -> None:
    copied.with_suffix(".json").unlink()
    original = copied.read_bytes()
    with pytest.raises(UsageError, match=message):
        call(copied)
    assert copied.read_bytes() == original


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b'{"w": 1}', b'{"w": {}}', b'{"w": {"dtype": "F32", "shape": [1]}}',
        b'{"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
        b'{"w": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b"[" * 100_000, b"\xff\xfe",
    ],
    ids=lambda header: header[:40],
)  # fmt: skip
def test_damaged_headers(header: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header + b"\0\0\0\0"
    with pytest.raises(ModelError, match="header is damaged"):
        Layout.of(content)


def test_a_header_is_written_as_it_is_read(copied: Path) -> None:
    content = copied.read_bytes()
    layout = Layout.of(content)
    again = layout.assemble(content[layout.start :])
    assert Layout.of(again) == layout
    assert layout.start % 8 == 0


# Command line


def test_seal_and_verify_on_the_command_line(
    copied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "other").write_bytes(b"z" * 32)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["robustann", *arguments])
        with pytest.raises(SystemExit) as caught:
            command_line.main()
        captured = capsys.readouterr()
        return int(str(caught.value.code)), captured.out, captured.err

    model, key = str(copied), str(tmp_path / "key")
    code, out, _ = run("seal", model)
    assert code == 0
    assert "sealed 10 tensors" in out
    assert "detects accidents" in out
    manifest = copied.with_suffix(".seal.json")
    assert f"manifest: {manifest}" in out
    code, out, _ = run("verify", model)
    assert code == 0
    assert "accidents are ruled out" in out
    assert run("verify", model, "--key-file", key)[0] == 4

    code, out, _ = run("seal", model, "--key-file", key, "--out", str(tmp_path / "m.json"))
    assert code == 0
    assert "not signed" not in out
    signed = [model, str(tmp_path / "m.json")]
    code, out, _ = run("verify", *signed, "--key-file", key)
    assert code == 0
    assert "fits the key" in out
    assert "not checked" in run("verify", *signed)[1]
    assert run("verify", *signed, "--key-file", key, "--quiet") == (0, "", "")
    code, out, err = run("verify", *signed, "--key-file", str(tmp_path / "other"))
    assert (code, out) == (4, "")
    assert "the key is another one" in err

    tampering.flip_bit(copied, "net.5.weight", element=9, bit=3)
    code, out, err = run("verify", *signed, "--key-file", key)
    assert (code, out) == (4, "")
    assert "refused" in err
    assert "tensor net.5.weight: other values" in err
    # What is not intact is not sealed, and the manifest stays.
    text = manifest.read_text()
    code, _, err = run("seal", model)
    assert code == 3
    assert manifest.read_text() == text

    manifest.write_text("{")
    assert run("verify", model)[0] == 4
    for arguments in (
        ["verify", model, str(tmp_path / "nowhere.json")],
        ["verify", str(tmp_path / "nowhere.safetensors")],
        ["verify", *signed, "--key-file", str(tmp_path / "nowhere")],
        ["seal", str(tmp_path / "nowhere.safetensors")],
        ["seal", model, "--out", model],
        ["seal", model, "--out", str(copied.with_suffix(".json"))],
        ["seal", model, "--key-file", key, "--out", key],
        ["seal"],
        ["verify"],
    ):
        code, out, err = run(*arguments)
        assert code == 2, (arguments, out, err)
        assert out == ""
    assert (tmp_path / "key").read_bytes() == KEY
