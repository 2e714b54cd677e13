"""Model files that run code, lie or are damaged, made on the spot; none is ever kept.

Each payload that runs makes one file, the canary, so that a test can prove that it did not.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn


@dataclass(frozen=True)
class Case:
    """A file, what would make it run, and words of the refusal."""

    content: bytes
    run: Callable[[bytes], object] | None = None
    words: str = ""


class Call:
    """Pickles into a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Built:
    """Runs when its state is set."""

    def __setstate__(self, path: str) -> None:
        Path(path).touch()


class Made:
    """Runs when it is made."""

    def __new__(cls, path: str) -> Made:
        Path(path).touch()
        return super().__new__(cls)


def net() -> nn.Module:
    """A network that takes 1x2x2 images."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()


def torch_file(value: object, *, legacy: bool = False) -> bytes:
    """What ``torch.save`` writes."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def good() -> dict[str, bytes]:
    """Files that may be read, and hold the same weights."""
    state = net().state_dict()
    return {
        "weights.safetensors": save(dict(state)),
        "weights.pt": torch_file(state),
        "legacy.pt": torch_file(state, legacy=True),
        "wrapped.pt": torch_file(
            {"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3, "best": 0.5}
        ),
        "parameters.pt": torch_file(dict(net().named_parameters())),
        "half.pt": torch_file({k: v.half() for k, v in state.items()}),
    }


def script() -> bytes:
    """A TorchScript archive."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still everywhere
        torch.jit.save(torch.jit.trace(net(), torch.zeros(1, 1, 2, 2)), stream)
    return stream.getvalue()


def exported() -> bytes:
    """An archive of torch.export."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(net(), (torch.zeros(2, 1, 2, 2),)), stream)
    return stream.getvalue()


def onnx(*, location: str | None = None, domain: str = "") -> bytes:
    """A graph of one node, with one tensor, by hand."""
    node = _field(1, b"x") + _field(2, b"y") + _field(4, b"Relu") + _field(7, domain.encode())
    tensor = _field(1, 3) + _field(2, 1) + _field(8, b"w") + _field(9, bytes(12))
    if location is not None:
        entry = _field(1, b"location") + _field(2, location.encode())
        tensor = _field(1, 3) + _field(2, 1) + _field(8, b"w") + _field(13, entry) + _field(14, 1)
    graph = _field(1, node) + _field(2, b"g") + _field(5, tensor)
    return _field(1, 8) + _field(2, b"by hand") + _field(7, graph) + _field(8, _field(2, 17))


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return bytes([number << 3, value])
    head, size = bytes([number << 3 | 2]), len(value)
    return head + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + value


def rezip(
    content: bytes,
    replace: dict[str, bytes] | None = None,
    more: list[tuple[str | zipfile.ZipInfo, bytes]] | None = None,
    first: list[tuple[str, bytes]] | None = None,
    packing: int = zipfile.ZIP_STORED,
) -> bytes:
    """The archive with entries exchanged (by the end of their names) or added."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(stream, "w", packing) as target,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # names twice are what is wanted
        for before, data in first or []:
            target.writestr(before, data)
        for entry in source.infolist():
            data = source.read(entry)
            for end, other in (replace or {}).items():
                data = other if entry.filename.endswith(end) else data
            target.writestr(entry.filename, data)
        for name, data in more or []:
            target.writestr(name, data)
    return stream.getvalue()


def header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _unpickle_all(content: bytes) -> object:
    return torch.load(io.BytesIO(content), weights_only=False)


def _export_load(content: bytes) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(io.BytesIO(content))


def running(folder: Path) -> dict[str, Case]:
    """Files that make ``folder/canary`` where they are loaded without care."""
    canary = str(folder / "canary")
    touch = f"touch '{canary}'"
    quoted = f"S{touch!r}\n".encode()
    (folder / "hub").mkdir(exist_ok=True)
    (folder / "hub" / "hubconf.py").write_text(f"open({canary!r}, 'w').close()\nnet = dict\n")
    from torch.utils.collect_env import run

    calls: dict[str, tuple[Call, str]] = {
        "eval": (Call(eval, f"open({canary!r}, 'w').close()"), "eval"),
        "exec": (Call(exec, f"open({canary!r}, 'w').close()"), "exec"),
        "system": (Call(os.system, touch), "system"),
        "collect_env": (Call(run, touch), "torch.utils.collect_env.run"),
        "hub": (
            Call(torch.hub._load_local, str(folder / "hub"), "net"),
            "torch.hub._load_local",
        ),
        "nested": (Call(pickle.loads, pickle.dumps(Call(os.system, touch))), "loads"),
        "load": (
            Call(_load_inner, torch_file(Call(os.system, touch))),
            "corpus._load_inner",
        ),
        "popen": (Call(subprocess.check_call, ["touch", canary]), "check_call"),
    }
    cases = {}
    for name, (call, words) in calls.items():
        state: dict[str, object] = dict(net().state_dict())
        cases[f"{name}.pt"] = Case(torch_file({**state, "x": call}), run=_unpickle_all, words=words)
        cases[f"{name}-legacy.pt"] = Case(
            torch_file(call, legacy=True), run=_unpickle_all, words=words
        )
        for protocol in (0, 2, 4):
            cases[f"{name}-{protocol}.pkl"] = Case(
                pickle.dumps(call, protocol), run=pickle.loads, words=words
            )
    path = pickle.dumps(canary, 0).partition(b"\n")[0] + b"\n"
    opcodes = {
        "REDUCE": (b"cos\nsystem\n(" + quoted + b"tR.", "os.system"),
        "INST": (b"(" + quoted + b"ios\nsystem\n.", "os.system"),
        "OBJ": (b"(cos\nsystem\n" + quoted + b"o.", "os.system"),
        "STACK_GLOBAL": (
            b"\x80\x04\x8c\x02os\x8c\x06system\x93(" + quoted + b"tR.",
            "os.system",
        ),
        "MEMO": (
            b"\x80\x04\x8c\x06system\x940\x8c\x02os\x94h\x00\x93(" + quoted + b"tR.",
            "os.system",
        ),
        "NEWOBJ": (b"\x80\x02ccorpus\nMade\n" + path + b"\x85\x81.", "corpus.Made"),
        "BUILD": (b"\x80\x02ccorpus\nBuilt\n)\x81" + path + b"b.", "corpus.Built"),
        # Runs although the pickle never ends.
        "cut": (b"\x80\x02cos\nsystem\n(" + quoted + b"tR", "os.system"),
    }
    for name, (content, words) in opcodes.items():
        cases[f"{name}.pkl"] = Case(content, run=_loads_first, words=words)
        inside = rezip(torch_file(net().state_dict()), {"data.pkl": content})
        cases[f"{name}.pt"] = Case(inside, run=_unpickle_all, words=words)
    evil = torch_file(Call(os.system, touch))
    cases["sample-input.pt2"] = Case(
        rezip(exported(), {"sample_inputs/model.pt": evil}), run=_export_load, words="torch.export"
    )
    cases["old-layout.pt2"] = Case(_old_export(evil), words="torch.export")
    call_first = pickle.dumps(Call(os.system, touch), 2)
    twice = rezip(torch_file(net().state_dict()), first=[("archive/data.pkl", call_first)])
    cases["double.pt"] = Case(twice, words="twice")
    # PyTorch's reader does not mind the case, so that a scanner may look at the wrong entry.
    entries = _entries(torch_file(net().state_dict()))
    rest = {name: data for name, data in entries.items() if name != "archive/data.pkl"}
    cases["case.pt"] = Case(
        _zip({"archive/data.pkl": entries["archive/data.pkl"], "archive/DATA.PKL": call_first,
              **rest}),
        run=_unpickle_all,
        words="twice",
    )  # fmt: skip
    array = io.BytesIO()
    np.save(array, np.array([Call(os.system, touch)], dtype=object), allow_pickle=True)
    cases["object.npy"] = Case(array.getvalue(), run=_numpy_load, words="NumPy")
    arrays = io.BytesIO()
    np.savez(arrays, a=np.array([Call(os.system, touch)], dtype=object))
    cases["object.npz"] = Case(arrays.getvalue(), run=_numpy_load, words=".npz")
    cases["packed.pt.gz"] = Case(gzip.compress(evil), words="compressed")
    cases["packed.tar"] = Case(_tar({"m.pt": evil}), words="tar")
    return cases


def _load_inner(content: bytes) -> object:
    return _unpickle_all(content)


def _loads_first(content: bytes) -> object:
    try:
        return pickle.loads(content)
    except EOFError:
        return None


def _numpy_load(content: bytes) -> object:
    loaded = np.load(io.BytesIO(content), allow_pickle=True)
    return loaded["a"] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded


def _old_export(evil: bytes) -> bytes:
    """As PyTorch before 2.8 laid it out."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("version", "8.5")
        file.writestr("serialized_exported_program.json", "{}")
        for part in ("state_dict", "constants", "example_inputs"):
            file.writestr(f"serialized_{part}.pt", evil)
    return stream.getvalue()


def _tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def hostile() -> dict[str, Case]:
    """Files that lie, overflow or mean two things, and kinds that are not read."""
    plain = torch_file(net().state_dict())
    link = zipfile.ZipInfo("archive/link")
    link.external_attr = 0o120777 << 16
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    middle = plain.index(b"archive/byteorder") + len(b"archive/")
    bzip = io.BytesIO()
    with zipfile.ZipFile(bzip, "w", zipfile.ZIP_BZIP2) as file:
        file.writestr("archive/data.pkl", b"text")
    return {
        "slip.pt": Case(rezip(plain, more=[("../../canary", b"")]), words="outside"),
        "absolute.pt": Case(rezip(plain, more=[("/canary", b"")]), words="outside"),
        "drive.pt": Case(rezip(plain, more=[("C:/canary", b"")]), words="outside"),
        "backslash.pt": Case(rezip(plain, more=[("archive\\..\\canary", b"")]), words="outside"),
        "link.pt": Case(rezip(plain, more=[(link, b"/etc/passwd")]), words="symbolic link"),
        "twice.pt": Case(rezip(plain, more=[("archive/data/0", bytes(32))]), words="twice"),
        "control.pt": Case(rezip(plain, more=[("archive/\x1b[2J", b"")]), words="control"),
        "bomb.pt": Case(
            rezip(plain, {"data/0": bytes(2**25)}, packing=zipfile.ZIP_DEFLATED), words="bomb"
        ),
        "overlap.pt": Case(_overlapping(plain), words="overlap"),
        "renamed.pt": Case(
            plain[:middle] + b"X" + plain[middle + 1 :], words="another name where its bytes lie"
        ),
        "after.pt": Case(plain + b"more", words="bytes follow"),
        "bzip.pt": Case(bzip.getvalue(), words="unusual"),
        "stride.pt": Case(torch_file({"w": torch.zeros(1).expand(2**40)}), words="bomb"),
        "itself.pt": Case(
            rezip(plain, {"data.pkl": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."}),
            words="nested deeper",
        ),
        "memory.pt": Case(
            rezip(
                plain,
                {
                    "data.pkl": b"\x80\x02ctorch.storage\nUntypedStorage\n"
                    b"\x8a\x07\x00\x00\x00\x00\x00\x00\x01\x85R."
                },
            ),
            words="UntypedStorage",
        ),
        "pickles.pt": Case(
            rezip(plain, more=[("archive/more.pkl", pickle.dumps(1))]), words="one pickle"
        ),
        "module.pt": Case(torch_file(net()), words="torch.nn.modules.linear.Linear"),
        "module-legacy.pt": Case(torch_file(net(), legacy=True), words="linear.Linear"),
        "array.pt": Case(torch_file({"w": np.zeros(2)}), words="numpy"),
        "function.pt": Case(torch_file({"w": print}), words="print"),
        "plain.pkl": Case(pickle.dumps({"w": [1.0]}), words="Python pickle"),
        "script.pt": Case(script(), words="TorchScript"),
        "export.pt2": Case(exported(), words="torch.export"),
        "net.onnx": Case(onnx(), words="ONNX"),
        "net.h5": Case(b"\x89HDF\r\n\x1a\n" + bytes(100), words="HDF5"),
        "net.gguf": Case(b"GGUF" + bytes(100), words="GGUF"),
        "numbers.npy": Case(_array(), words="NumPy"),
        "long-names.pt": Case(torch_file({"n" * 2000: {"w": torch.zeros(1)}}), words="2000 charac"),
        "program": Case(b"\x7fELF" + bytes(100), words="a program"),
        "some.zip": Case(_zip({"a.txt": b"a"}), words="a zip archive"),
        "huge.safetensors": Case(header(b'{"w":', length=2**60), words="header of 1152921504606"),
        "large.safetensors": Case(header(b"{", length=100 * 2**20 + 1), words="header of 10485"),
        "names.safetensors": Case(
            header(b'{"w":' + entry + b',"w":' + entry + b"}", bytes(4)), words="'w' twice"
        ),
        "inner.safetensors": Case(
            header(b'{"w":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
            words="'shape' twice",
        ),
        "long-name.safetensors": Case(
            header(b'{"' + b"n" * 2000 + b'":' + entry + b"}", bytes(4)), words="2000 characters"
        ),
    }


def laborious() -> dict[str, Case]:
    """Small files that would take hours, or all memory, where nothing is counted."""
    nothing = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return {
        # One dict in many dicts in many dicts: billions of entries in three kilobytes.
        "laughs.pt": Case(torch_file(_laughs({})), words="it holds more"),
        "laughs-full.pt": Case(torch_file(_laughs({"w": torch.zeros(1)})), words="it holds more"),
        "opcodes.zip": Case(
            _zip({f"a/{i}.pkl": b"\x80\x02" + b"N0" * 300_000 for i in range(300)}, packed=True),
            words="a zip archive",
        ),
        "entries.zip": Case(b"PK\x03\x04" + b"PK\x01\x02" * 300_000 + bytes(100), words="entries"),
        "pickles-in-pickles.pkl": Case(_pickles_in_a_pickle(), words="Python pickle"),
        # Comparing each name with all others would take hours.
        "many-names.safetensors": Case(
            header(
                b"{" + b",".join(b'"%d":%s' % (i % 99_999, nothing) for i in range(100_000)) + b"}"
            ),
            words="'0' twice",
        ),
    }


def damaged() -> dict[str, Case]:
    """Files with something wrong, from which nothing could run."""
    plain = torch_file(net().state_dict())
    flipped = bytearray(plain)
    flipped[plain.index(net().state_dict()["1.weight"].numpy().tobytes())] ^= 1
    nothing = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return {
        "empty.pt": Case(b"", words="an empty file"),
        "text.pt": Case(b"These are the weights.\n", words="a text"),
        "python.pt": Case(b"import os\nimport sys\n", words="a text"),
        "pointer.safetensors": Case(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            words="git lfs pull",
        ),
        "picture.pt": Case(b"\x89PNG\r\n\x1a\n" + bytes(50), words="something else"),
        "zip-magic.pt": Case(b"PK\x03\x04" + bytes(50), words="whole zip archive"),
        "before.pt": Case(b"\xff\xfe" + plain, words="something else"),
        "flipped.pt": Case(bytes(flipped), words="CRC"),
        "no-pickle-end.pt": Case(
            rezip(plain, {"data.pkl": b"\x80\x02}q\x00("}), words="to the end"
        ),
        # Hashing the key would overflow the stack and end the process.
        "nested-key.pt": Case(
            rezip(plain, {"data.pkl": b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."}),
            words="nested deeper",
        ),
        "number-key.pt": Case(torch_file({3: torch.ones(1)}), words="got a int"),
        "dot.pt": Case(
            torch_file({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}), words="twice"
        ),
        "list.pt": Case(torch_file([torch.ones(1)]), words="got a list"),
        "tensor.pt": Case(torch_file(torch.ones(1)), words="got a Tensor"),
        "mixed.pt": Case(torch_file({"w": torch.ones(1), "n": 3}), words="int under 'n'"),
        "no-tensors.pt": Case(torch_file({}), words="got none"),
        "no-storage.pt": Case(_without(plain, "data/0"), words="reading it failed"),
        "short-storage.pt": Case(rezip(plain, {"data/0": b""}), words="reading it failed"),
        "short.safetensors": Case(header(nothing), words="header is damaged"),
        "long.safetensors": Case(header(nothing, bytes(8)), words="header is damaged"),
        "beyond.safetensors": Case(header(nothing, length=5000), words="cut off"),
        "list.safetensors": Case(header(b'{"w":[]}'), words="header is damaged"),
        "deep.safetensors": Case(header(b'{"w":' + b"[" * 100_000), words="safetensors"),
        # Their product would take hours.
        "numbers.safetensors": Case(
            header(b'{"w":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 4000)
                   + b'],"data_offsets":[0,4]}}', bytes(4)), words="64 dimensions"),
        "number.safetensors": Case(
            header(b'{"w":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,4]}}',
                   bytes(4)), words="no number from 0"),
        "metadata.safetensors": Case(header(b'{"__metadata__":[[],[]]}'), words="header"),
        "texts.safetensors": Case(header(b'{"__metadata__":{"a":1}}'), words="no text"),
        "fields.onnx": Case(b"\x12\x00" * 1_000_000, words="something else"),
        "negative.safetensors": Case(
            header(json.dumps({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}})
                   .encode(), bytes(4)), words="header is damaged"),
    }  # fmt: skip


def _array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(2))
    return stream.getvalue()


def _laughs(value: dict[str, Any]) -> dict[str, Any]:
    for _ in range(18):
        value = {f"k{j}": value for j in range(10)}
    return value


def _pickles_in_a_pickle() -> bytes:
    inner = b"\x80\x02" + b"N0" * 400_000 + b"N."
    held = b"B" + struct.pack("<I", len(inner)) + inner + b"0"
    return b"\x80\x02" + held * 30 + b"N."


def _zip(files: dict[str, bytes], *, packed: bool = False) -> bytes:
    stream = io.BytesIO()
    packing = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", packing) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return stream.getvalue()


def _entries(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name: file.read(name) for name in file.namelist()}


def _without(content: bytes, end: str) -> bytes:
    return _zip({name: data for name, data in _entries(content).items() if not name.endswith(end)})


def _overlapping(content: bytes) -> bytes:
    """Two entries of the directory lead to the same bytes, as in bombs without recursion."""
    plain = bytearray(rezip(content))
    first = plain.index(b"PK\x01\x02")
    second = plain.index(b"PK\x01\x02", first + 4)
    plain[second + 42 : second + 46] = struct.pack("<I", 4)
    # Something that looks like a header must lie there.
    plain[4:8] = b"PK\x03\x04"
    return bytes(plain)
