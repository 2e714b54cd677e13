"""Models: what they compute, and that their files are whole, safe and readable or refused."""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from robustann.errors import ModelError, RefusedError, RobustannError, UsageError
from robustann.models import (
    ARCHITECTURES,
    ImageClassifier,
    create_model,
    load_model,
    resolve_device,
    save_model,
    tensor_digest,
)
from robustann.models.io import Sidecar, read_sidecar
from robustann.models.registry import expected_tensors


def _make(
    arch: str = "small-cnn", shape: tuple[int, int, int] = (1, 8, 8), **options: Any
) -> ImageClassifier:
    return create_model(
        arch, **{"class_names": ("a", "b", "c"), "shape": shape, "seed": 0, **options}
    )


def _images(model: ImageClassifier, n: int = 2) -> Tensor:
    return torch.rand(n, *model.spec.shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(_make(), path)
    return path


# --- what models compute


def test_normalisation_comes_first() -> None:
    model = _make(shape=(2, 8, 8), mean=(0.1, 0.5), std=(0.5, 2.0))
    x = _images(model)
    by_hand = torch.stack([(x[:, 0] - 0.1) / 0.5, (x[:, 1] - 0.5) / 2], 1)
    assert next(iter(model.children())) is model.normalize
    torch.testing.assert_close(model(x), model.net(by_hand))
    assert torch.equal(_make()(_images(_make())), _make().net(_images(_make())))


@pytest.mark.parametrize(
    ("shape", "features"),
    [
        ((1, 8, 8), 64 * 2 * 2),
        ((1, 28, 28), 64 * 7 * 7),
        ((3, 28, 28), 64 * 7 * 7),
        ((3, 9, 14), 64 * 2 * 3),
        ((2, 4, 5), 64),
        ((1, 7, 31), 64 * 1 * 7),
    ],
)
def test_small_cnn_takes_any_size(shape: tuple[int, int, int], features: int) -> None:
    model = _make(shape=shape)
    assert model(_images(model, 5)).shape == (5, 3)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (features, 128),
        (128, 3),
    ]


def test_small_cnn_refuses_tiny_images() -> None:
    with pytest.raises(UsageError, match="at least 4x4 pixels for small-cnn, got 3x8"):
        _make(shape=(1, 3, 8))


def test_parameter_counts_of_the_papers() -> None:
    def count(arch: str) -> int:
        model = create_model(arch, class_names=[str(i) for i in range(10)], shape=(3, 8, 8), seed=0)
        return sum(p.numel() for p in model.parameters())

    # Zagoruyko & Komodakis (2016), table 4: WRN-16-4 2.8 M (its table rounds up 2.75).
    assert count("wideresnet-16-4") == 2_748_890
    assert count("preactresnet-18") == 11_172_170
    # Table 4: WRN-28-10 36.5 M.
    spec = _make("wideresnet-10-1", (3, 8, 8)).spec.model_copy(
        update={"arch": "wideresnet-28-10", "class_names": tuple("0123456789")}
    )
    shapes = expected_tensors(spec)
    trained = sum(
        t.numel()
        for name, t in shapes.items()
        if not name.startswith("normalize")
        and not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
    assert trained == 36_479_194


@pytest.mark.parametrize("arch", ["small-cnn", "preactresnet-18", "wideresnet-10-1"])
def test_every_module_runs_once(arch: str) -> None:
    """Attribution methods hook modules, so none may be used twice or work in place."""
    model = _make(arch, (3, 8, 8)).eval()
    calls: dict[nn.Module, int] = {}

    def count(module: nn.Module, *_: object) -> None:
        calls[module] = calls.get(module, 0) + 1

    leaves = [module for module in model.modules() if not list(module.children())]
    for leaf in leaves:
        leaf.register_forward_hook(count)
    model(_images(model))
    assert [calls.get(leaf, 0) for leaf in leaves] == [1] * len(leaves)
    assert not any(getattr(leaf, "inplace", False) for leaf in leaves)


@pytest.mark.parametrize("arch", ["preactresnet-18", "wideresnet-10-1"])
def test_residual_networks_take_other_sizes(arch: str) -> None:
    model = _make(arch, (3, 16, 16)).eval()
    assert model(torch.rand(2, 3, 20, 12)).shape == (2, 3)


def test_residual_block_adds_its_shortcut() -> None:
    from robustann.models.blocks import PreActBlock

    block = PreActBlock(4, 4, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_forward_says_what_came() -> None:
    model = _make(shape=(3, 8, 8))
    for x in (torch.rand(2, 1, 8, 8), torch.rand(3, 8, 8), torch.rand(2, 8, 8, 3)):
        message = rf"\(N, 3, 8, 8\) in \[0, 1\], got \({', '.join(map(str, x.shape))}\)"
        with pytest.raises(ModelError, match=message):
            model(x)


def _compiled(model: ImageClassifier, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="eager", fullgraph=True)


def _exported(model: ImageClassifier, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.export.export(model, (x,)).module()


def _jit_traced(model: ImageClassifier, x: Tensor) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        # PyTorch deprecates it; a warning about our own code must still be an error.
        warnings.filterwarnings("ignore", "`torch.jit.trace", FutureWarning)
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        return torch.jit.trace(model, x)  # type: ignore[no-any-return]


def _fx_traced(model: ImageClassifier, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.fx.symbolic_trace(model)


def _mapped(model: ImageClassifier, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.func.vmap(lambda one: model(one[None])[0])


@pytest.mark.parametrize("wrap", [_compiled, _exported, _jit_traced, _fx_traced, _mapped])
def test_forward_can_be_traced(
    wrap: Callable[[ImageClassifier, Tensor], Callable[[Tensor], Tensor]],
) -> None:
    model = _make().eval()
    x = _images(model)
    torch.testing.assert_close(wrap(model, x)(x), model(x))


# --- creating


def test_seed_decides_the_weights_and_spares_the_global_state() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, other = _make(), _make(), _make(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert tensor_digest(first) == tensor_digest(second) != tensor_digest(other)
    drawn = _make(seed=None)
    assert tensor_digest(drawn) != tensor_digest(_make(seed=None))
    torch.manual_seed(5)
    assert tensor_digest(_make(seed=None)) == tensor_digest(drawn)


def test_models_come_ready_to_train() -> None:
    model = _make("wideresnet-10-1", (3, 8, 8))
    assert all(module.training for module in model.modules())
    # The proof with one image must not move the running statistics.
    assert all(int(b) == 0 for n, b in model.named_buffers() if n.endswith("batches_tracked"))


@pytest.mark.parametrize("arch", ["resnet18", "torchvision:resnet18"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_networks(arch: str, channels: int) -> None:
    model = _make(arch, (channels, 32, 32)).eval()
    assert model(_images(model)).shape == (2, 3)


def test_torchvision_networks_with_options_of_their_own() -> None:
    assert _make("vit_b_32", (3, 32, 32)).spec.arch == "vit_b_32"
    # In training mode these two give more than logits unless told otherwise.
    for arch in ("googlenet", "inception_v3"):
        spec = _make("small-cnn", (3, 96, 96)).spec.model_copy(update={"arch": arch})
        assert not any("aux" in name.lower() for name in expected_tensors(spec))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"arch": "smal-cnn"}, UsageError, "did you mean 'small-cnn'"),
        ({"arch": "resnet81"}, UsageError, "did you mean 'resnet18'"),
        ({"arch": "wideresnet-11-2"}, UsageError, "6 n . 4 .* got depth 11"),
        ({"arch": "wideresnet-10-0"}, UsageError, "width 0"),
        ({"arch": "alexnet", "shape": (3, 8, 8)}, ModelError, r"cannot take images .*\(3, 8, 8\)"),
        ({"arch": "vit_b_16", "shape": (3, 30, 30)}, ModelError, "cannot be made for images"),
        ({"arch": "resnet18", "shape": (2, 32, 32)}, UsageError, "1 or 3 channels .* got 2"),
        ({"class_names": ("a",)}, UsageError, "class_names"),
        ({"shape": (1, 8)}, UsageError, "shape"),
        ({"shape": (0, 8, 8)}, UsageError, "shape.0: .* greater than or equal to 1, got 0"),
        ({"mean": (0.5, 0.5)}, UsageError, "one mean and one std for each of 1 channels"),
        ({"std": (0.0,)}, UsageError, "std.0: Input should be greater than 0"),
        ({"mean": (float("nan"),)}, UsageError, "mean.0: Input should be a finite number"),
    ],
)
def test_create_model_refuses(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _make(**options)


def test_architectures_are_described() -> None:
    assert {"small-cnn", "preactresnet-18"} <= ARCHITECTURES.keys()
    assert all(ARCHITECTURES.values())


_FACTORIES = """
import torch
from torch import nn

calls = []

def full(num_classes, shape, in_channels):
    calls.append((num_classes, shape, in_channels))
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * shape[1] * shape[2], num_classes))

def some(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, num_classes))

def any_of_them(**options):
    return full(**options)

class Tied(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.one = nn.Linear(64, 64, bias=False)
        self.two = nn.Linear(64, 64, bias=False)
        self.two.weight = self.one.weight
        self.head = nn.Linear(64, num_classes)
    def forward(self, x):
        return self.head(self.two(self.one(x.flatten(1)).relu()).relu())

def no_module():
    return 3

def wrong_width():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))

def fails():
    raise OSError("no such weights")

def two_outputs():
    class Two(nn.Module):
        def forward(self, x):
            return x, x
    return Two()
"""


def test_factory_gets_what_it_takes(here: Path) -> None:
    (here / "nets.py").write_text(_FACTORIES)
    for name in ("full", "some", "any_of_them", "Tied"):
        model = _make(f"nets:{name}")
        assert model(_images(model)).shape == (2, 3)
        assert model.spec.arch == f"nets:{name}"
    assert sys.modules["nets"].calls == [(3, (1, 8, 8), 1)] * 2


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nets:no_module", ModelError, "torch.nn.Module .* got int"),
        ("nets:wrong_width", ModelError, r"logits of shape \(N, 3\), got \(1, 7\)"),
        ("nets:fails", ModelError, "raised OSError: no such weights"),
        ("nets:two_outputs", ModelError, r"got tuple"),
        ("nets:nothing", UsageError, "has no 'nothing'"),
        ("nowhere:net", UsageError, "no module 'nowhere'"),
    ],
)
def test_factory_refusals(here: Path, name: str, error: type[Exception], message: str) -> None:
    (here / "nets.py").write_text(_FACTORIES)
    with pytest.raises(error, match=message):
        _make(name)


# --- files


@pytest.mark.parametrize(
    ("arch", "shape"),
    [
        ("small-cnn", (1, 8, 8)),
        ("preactresnet-18", (3, 8, 8)),
        ("wideresnet-10-1", (3, 8, 8)),
        ("torchvision:resnet18", (1, 32, 32)),
        ("regnet_y_400mf", (3, 32, 32)),
    ],
)
def test_round_trip(tmp_path: Path, arch: str, shape: tuple[int, int, int]) -> None:
    model = _make(arch, shape, mean=(0.1307,) * shape[0], std=(0.3081,) * shape[0])
    model(_images(model, 4))  # moves the running statistics
    path = tmp_path / "deep" / "er" / "model.safetensors"
    state = torch.get_rng_state()
    save_model(model, path, training={"epochs": 3}, metrics={"accuracy": 0.5})
    assert torch.equal(torch.get_rng_state(), state)
    again = load_model(path)
    assert not any(module.training for module in again.modules())
    assert again.spec == model.spec
    assert tensor_digest(again) == tensor_digest(model)
    x = _images(model)
    assert torch.equal(again(x), model.eval()(x))


def test_sidecar_says_what_the_weights_are(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = _make(class_names=("Zürich", "b", "c"), mean=(0.25,))
    training = {"lr": 0.1, "milestones": (1, 2), "loss": float("nan")}
    save_model(model, path, training=training, metrics={"acc": {"clean": 1}})
    content = json.loads(path.with_suffix(".json").read_text("utf-8"), parse_constant=pytest.fail)
    assert content["schema_version"] == 1
    assert content["model"] == {
        "arch": "small-cnn",
        "class_names": ["Zürich", "b", "c"],
        "shape": [1, 8, 8],
        "mean": [0.25],
        "std": [1.0],
    }
    assert content["training"] == {"lr": 0.1, "milestones": [1, 2], "loss": None}
    assert content["metrics"] == {"acc": {"clean": 1}}
    assert content["versions"].keys() == {"robustann", "torch", "python"}
    assert content["num_parameters"] == sum(p.numel() for p in model.parameters())
    sidecar = read_sidecar(path)
    assert isinstance(sidecar, Sidecar)
    assert sidecar.model == model.spec
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_saving_keeps_the_model_as_it_was(tmp_path: Path) -> None:
    model = _make("wideresnet-10-1", (3, 8, 8)).requires_grad_(False)
    before = tensor_digest(model)
    save_model(torch.compile(model, backend="eager"), tmp_path / "m.safetensors")  # type: ignore[arg-type]
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert tensor_digest(model) == before == tensor_digest(load_model(tmp_path / "m.safetensors"))


def test_tied_weights_survive(here: Path) -> None:
    (here / "nets.py").write_text(_FACTORIES)
    model = _make("nets:Tied")
    save_model(model, "tied.safetensors")
    again = load_model("tied.safetensors", arch="nets:Tied")
    assert again.net.two.weight is again.net.one.weight  # type: ignore[union-attr]
    x = _images(model)
    assert torch.equal(again(x), model(x))


def test_half_precision_and_channels_last_are_stored(tmp_path: Path) -> None:
    model = _make("wideresnet-10-1", (3, 8, 8)).to(memory_format=torch.channels_last)
    assert tensor_digest(model) == tensor_digest(_make("wideresnet-10-1", (3, 8, 8)))
    save_model(model, tmp_path / "a.safetensors")
    assert tensor_digest(load_model(tmp_path / "a.safetensors")) == tensor_digest(model)
    save_model(_make().half(), tmp_path / "b.safetensors")
    half = load_model(tmp_path / "b.safetensors")
    assert next(half.parameters()).dtype == torch.float32
    x = _images(half)
    torch.testing.assert_close(half(x), _make()(x), atol=1e-2, rtol=1e-2)


def test_code_is_run_only_where_the_caller_names_it(here: Path) -> None:
    (here / "nets.py").write_text(_FACTORIES)
    save_model(_make("nets:full"), "model.safetensors")
    (here / "nets.py").write_text("open('ran', 'w').close()\n" + _FACTORIES)
    del sys.modules["nets"]
    with pytest.raises(ModelError, match=r"never run on the word of a file.*arch='nets:full'"):
        load_model("model.safetensors")
    with pytest.raises(UsageError, match="to be a 'nets:some', got 'nets:full'"):
        load_model("model.safetensors", arch="nets:some")
    assert not Path("ran").exists()
    assert load_model("model.safetensors", arch="nets:full").spec.arch == "nets:full"
    assert Path("ran").exists()


def test_save_refuses(tmp_path: Path) -> None:
    model = _make()
    for name in ("model.pt", "model", "model.safetensors.bak"):
        with pytest.raises(UsageError, match=r"ends in \.safetensors"):
            save_model(model, tmp_path / name)
    path = tmp_path / "model.safetensors"
    with pytest.raises(ModelError, match="got Linear; make the model with create_model"):
        save_model(nn.Linear(1, 1), path)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="training to hold JSON values"):
        save_model(model, path, training={"device": torch.device("cpu")})
    model.net[-1] = nn.Linear(128, 4)  # type: ignore[index, operator]
    with pytest.raises(ModelError, match=r"2 of another form: net\.7\.weight float\[4, 128\]"):
        save_model(model, path)
    model = _make()
    with torch.no_grad():
        model.net[0].weight[0, 0, 0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(ModelError, match=r"NaN or infinity in 1 of 10 tensors.* net\.0\.weight"):
        save_model(model, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 15, 16, 100, 0.5, -1])
def test_truncated_weights_are_refused(saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
    with pytest.raises(ModelError, match=r"safetensors|SHA-256") as caught:
        load_model(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("place", [0, 3, 8, 40, 5000, -1])
def test_every_changed_byte_is_noticed(saved: Path, place: int) -> None:
    content = bytearray(saved.read_bytes())
    content[place] ^= 1
    saved.write_bytes(bytes(content))
    with pytest.raises(ModelError, match=r"SHA-256|safetensors"):
        load_model(saved)


def _sign(path: Path, content: bytes) -> None:
    """Write other weights and make the sidecar vouch for them, as an attacker would."""
    import hashlib

    path.write_bytes(content)
    side = path.with_suffix(".json")
    fields = json.loads(side.read_text())
    fields["sha256"] = hashlib.sha256(content).hexdigest()
    side.write_text(json.dumps(fields))


@pytest.mark.parametrize("damage", ["cut", "header", "offsets", "dtype", "duplicate"])
def test_malformed_safetensors_with_a_right_hash(saved: Path, damage: str) -> None:
    content = saved.read_bytes()
    header = {
        "header": b'{"a": [',
        "offsets": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999999]}}',
        "dtype": b'{"a":{"dtype":"F33","shape":[0],"data_offsets":[0,0]}}',
        "duplicate": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    }.get(damage)
    _sign(saved, content[:-4] if header is None else len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match="whole safetensors file"):
        load_model(saved)


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors["net.0.weight"]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(5)}


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors["net.7.bias"] = torch.zeros(4)


def _integer(tensors: dict[str, Tensor]) -> None:
    tensors["net.7.bias"] = torch.zeros(3, dtype=torch.int32)


def _infinite(tensors: dict[str, Tensor]) -> None:
    tensors["net.7.bias"][1] = float("inf")


def _overflowing(tensors: dict[str, Tensor]) -> None:
    tensors["net.7.bias"] = torch.full((3,), 1e300, dtype=torch.float64)


def _other_mean(tensors: dict[str, Tensor]) -> None:
    tensors["normalize.mean"].fill_(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"1 missing: net\.0\.weight"),
        (_add, r"5 unexpected: extra\.0, extra\.1, extra\.2, \.\.\."),
        (_reshape, r"1 of another form: net\.7\.bias float\[4\] instead of float\[3\]"),
        (_integer, r"int32\[3\] instead of float\[3\]"),
        (_infinite, r"NaN or infinity in 1 of 10 tensors, for example net\.7\.bias"),
        (_overflowing, r"NaN or infinity"),
        (_other_mean, "different values for the normalisation's mean"),
    ],
)
def test_weights_that_do_not_fit(
    saved: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = load(saved.read_bytes())
    change(tensors)
    _sign(saved, save(tensors))
    with pytest.raises(ModelError, match=message):
        load_model(saved)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("exploded").touch, ())


def _write_torch(path: Path) -> None:
    torch.save({"a": _Bomb()}, path)


def _write_old_torch(path: Path) -> None:
    torch.save({"a": _Bomb()}, path, _use_new_zipfile_serialization=False)


def _write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Bomb()))


def _write_onnx(path: Path) -> None:
    path.write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x052.0.0:\x10")


def _write_text(path: Path) -> None:
    path.write_text("These are the weights.\n")


def _write_lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def _write_hdf5(path: Path) -> None:
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))


@pytest.mark.parametrize("ending", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (_write_torch, RefusedError, "a zip archive, as torch.save .*getattr, pathlib"),
        (_write_old_torch, RefusedError, "from before PyTorch 1.6.*getattr, pathlib"),
        (_write_pickle, RefusedError, "a Python pickle.*getattr, pathlib"),
        (_write_onnx, RefusedError, "an ONNX file"),
        (_write_text, ModelError, "got a text; "),
        (_write_hdf5, RefusedError, "HDF5"),
        (_write_lfs, ModelError, "git lfs pull"),
    ],
)
def test_other_formats_are_refused_unopened(
    here: Path,
    write: Callable[[Path], None],
    error: type[RobustannError],
    message: str,
    ending: str,
) -> None:
    write(Path(ending))
    with pytest.raises(error, match=message) as caught:
        load_model(ending)
    assert ("torch.save(found.state_dict()" in str(caught.value)) == ("getattr" in message)
    assert not Path("exploded").exists()


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path: Path) -> None:
    """640 bytes of header: the file starts with 80 02, as a pickle of protocol 2 does."""
    path = tmp_path / "m.safetensors"
    save_model(_make(), path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].ljust(0x0280 + 256 * (length // 256))
    header = header[: len(header) - len(header) % 256 + 0x80]
    assert len(header) >= length
    grown = len(header).to_bytes(8, "little") + header + content[8 + length :]
    assert grown[0] == 0x80
    _sign(path, grown)
    assert tensor_digest(load_model(path)) == tensor_digest(_make())


def test_missing_files(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(UsageError, match="no model file"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="no model file"):
        load_model(tmp_path)
    saved.with_suffix(".json").unlink()
    with pytest.raises(UsageError, match=r"no 'model.json' beside .* which architecture"):
        load_model(saved)


def _edited(saved: Path, **changes: Any) -> None:
    side = saved.with_suffix(".json")
    fields = json.loads(side.read_text())
    for name, value in changes.items():
        target = fields["model"] if name in fields["model"] else fields
        target[name] = value
    side.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "expected schema_version 1 .* got 2"),
        ({"sha256": "0" * 64}, "SHA-256 0000000000000000"),
        ({"sha256": 5}, "is damaged: sha256"),
        ({"surprise": 1}, "is damaged: surprise: Extra inputs"),
        ({"arch": "no-such-net"}, "asks for what cannot be made: unknown architecture"),
        ({"arch": "resnet18"}, "weights of .* do not fit 'resnet18': 8 missing|missing"),
        ({"arch": "os:system"}, "never run on the word of a file"),
        ({"arch": "x" * 10_000}, r"is damaged: model\.arch"),
        ({"shape": [1, 10**9, 10**9]}, r"is damaged: model\.shape"),
        ({"shape": [1, 8192, 8192]}, r"of another form: net\.5\.weight"),
        ({"shape": [3, 8, 8]}, "one mean and one std"),
        ({"arch": "wideresnet-202-64"}, "do not fit 'wideresnet-202-64'"),
        ({"arch": "wideresnet-1000-1000"}, "cannot be made"),
        ({"class_names": ["a"] * 100_000}, "of another form"),
        ({"class_names": ["a"] * 100_001}, r"is damaged: model\.class_names"),
        ({"class_names": ["a", "b"]}, "of another form"),
        ({"std": [0]}, r"is damaged: model\.std"),
    ],
)
def test_sidecars_that_lie(saved: Path, changes: dict[str, Any], message: str) -> None:
    _edited(saved, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(saved)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"schema_version": 1}', b"[" * 100_000],
)
def test_damaged_sidecars(saved: Path, content: bytes) -> None:
    saved.with_suffix(".json").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.json"):
        load_model(saved)


def test_truncated_sidecars(saved: Path) -> None:
    side = saved.with_suffix(".json")
    content = side.read_bytes()
    for keep in range(0, len(content) - 2, 61):
        side.write_bytes(content[:keep])
        with pytest.raises(ModelError, match=r"model\.json"):
            load_model(saved)


def test_huge_sidecar_is_not_read(saved: Path) -> None:
    with saved.with_suffix(".json").open("ab") as stream:
        stream.truncate(2**40)  # sparse: takes no room on the disk
    with pytest.raises(ModelError, match="it is no sidecar"):
        load_model(saved)


# --- digests and devices


def test_digest_sees_every_change() -> None:
    model = _make("wideresnet-10-1", (3, 8, 8))
    seen = {tensor_digest(model)}
    with torch.no_grad():
        model.net[0].weight[0, 0, 0, 0] += 1e-6  # type: ignore[index]
    seen.add(tensor_digest(model))
    next(b for n, b in model.named_buffers() if n.endswith("running_mean")).add_(1)
    seen.add(tensor_digest(model))
    next(b for n, b in model.named_buffers() if n.endswith("batches_tracked")).add_(1)
    seen.add(tensor_digest(model))
    seen.add(tensor_digest(model.double()))
    seen.add(tensor_digest(model.bfloat16()))
    assert len(seen) == 6


def test_resolve_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device() == resolve_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "mps", "cpu:1", "xla"):
        with pytest.raises(UsageError, match=f"got '{name}', of which PyTorch sees"):
            resolve_device(name)
    for name in ("gpu", "", "cuda:x"):
        with pytest.raises(UsageError, match=f"got '{name}'; use 'auto'"):
            resolve_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device() == resolve_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device() == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RobustannError, match="PyTorch sees 2"):
        resolve_device("cuda:2")
