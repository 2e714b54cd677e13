"""Image classifiers of transformers, from a local folder of safetensors; none of its code runs."""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustann.errors import ModelError, RefusedError, RobustannError, UsageError
from robustann.extras import need
from robustann.models.bounded import check_size
from robustann.models.foreign.adapters import Carried, Network
from robustann.models.foreign.timm_models import check_options, numbers_of, read_json

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Keys that make transformers import, fetch or open something else than the folder's weights.
_LEADS_OUT = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "_experts_implementation",
    "_experts_implementation_internal", "attn_implementation", "auto_map", "backbone",
    "compression_config", "custom_pipelines", "experts_implementation", "gguf_file",
    "quantization_config", "sparsity_config", "transformers_weights", "use_kernels",
    "use_pretrained_backbone",
})  # fmt: skip
_OWN_ATTENTION = ("eager", "sdpa")
_COUNT = re.compile("num_|n_|layer|depth|block|label|class|repeat|stage")
_MAX_COUNT = 100_000


class Logits(nn.Module):
    """A network of transformers, whose output holds the logits.

    >>> from types import SimpleNamespace
    >>> class Net(nn.Module):
    ...     def forward(self, pixel_values):
    ...         return SimpleNamespace(logits=pixel_values.flatten(1))
    >>> import torch
    >>> Logits(Net())(torch.zeros(1, 1, 1, 2)).shape
    torch.Size([1, 2])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes)."""
        logits: Tensor = self.net(pixel_values=images).logits
        return logits


def open_transformers(folder: Path, sha256: str | None = None) -> Network:
    """The image classifier in a folder that ``save_pretrained`` wrote.

    Weights come from ``model.safetensors`` (or its shards) alone, every one of them must fit, and
    nothing is fetched from elsewhere.

    Args:
        folder: holds ``config.json``, the weights, and for the normalisation
            ``preprocessor_config.json``.
        sha256: of the weights, in hex, where they must be these.

    Raises:
        UsageError: transformers is not installed, or files are absent.
        RefusedError: the folder brings code of its own, or other weights than ``sha256``.
        ModelError: no image classifier, or weights that do not fit.
    """
    transformers = need("transformers", "hf")
    values = read_json(folder / "config.json")
    _check_config(values, folder)
    tensors, found = _weights(folder, sha256)
    net = _made(transformers, folder, values, tensors)
    return Network(Logits(net), f"transformers {type(net).__name__}", _carried(folder, values, net),
                   sha256=found)  # fmt: skip


def _check_config(values: object, folder: Path) -> None:
    """Refuse what leads out of the folder: code of its own, kernels and weights from elsewhere."""
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        if not isinstance(value, dict):
            continue
        left += value.values()
        for key, one in value.items():
            if key in _LEADS_OUT and one not in (None, False, *_OWN_ATTENTION):
                raise RefusedError(
                    f"'{folder / 'config.json'}' asks to run or fetch what is not in its folder "
                    f"({key}: {one!r:.80}); robustann never does. If you trust it, load the model "
                    "in your own code and pass --factory"
                )
            # Configurations make lists of such lengths, long before there is a network.
            if _COUNT.search(str(key)) and isinstance(one, (int, float)) and not one <= _MAX_COUNT:
                raise ModelError(
                    f"expected at most {_MAX_COUNT} for {key!r:.80} in '{folder / 'config.json'}', "
                    f"got {one!r:.80}; correct it"
                )


def _weights(folder: Path, sha256: str | None) -> tuple[dict[str, Tensor], str]:
    from robustann.models.weights import check_pin, read_weights

    whole, index = folder / _WEIGHTS, folder / _INDEX
    if whole.is_file():
        weights = read_weights(whole, sha256=sha256)
        return dict(weights.tensors), weights.sha256
    if not index.is_file():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".h5"))
        raise UsageError(
            f"expected '{_WEIGHTS}' in '{folder}', got {', '.join(others) or 'no weights'}; "
            "save the model again with model.save_pretrained(folder, safe_serialization=True)"
        )
    listed = read_json(index).get("weight_map")
    names = {str(name) for name in listed.values()} if isinstance(listed, dict) else set()
    tensors: dict[str, Tensor] = {}
    sha = hashlib.sha256()
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise RefusedError(
                f"expected '{index}' to name .safetensors files beside it, got {name!r:.80}"
            )
        weights = read_weights(folder / name)
        tensors.update(weights.tensors)
        sha.update(bytes.fromhex(weights.sha256))
    found = sha.hexdigest()
    check_pin(found, sha256, f"'{folder}' (its shards together)")
    return tensors, found


def _made(
    transformers: Any, folder: Path, values: dict[str, Any], tensors: dict[str, Tensor]
) -> nn.Module:
    kind = values.get("model_type")
    known = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if not isinstance(kind, str) or kind not in known:
        raise ModelError(
            f"expected an image classifier of transformers in '{folder}', got the model type "
            f"{kind!r}; a timm model is named timm:FOLDER"
        )
    if kind == "timm_wrapper":
        _check_timm(values, folder)
    told_by = transformers.logging
    level, bar = told_by.get_verbosity(), told_by.is_progress_bar_enabled()
    told_by.set_verbosity_error()
    told_by.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # From what was checked, and not from the file, which may have changed.
            config = transformers.CONFIG_MAPPING[kind].from_dict(copy.deepcopy(values))
            auto = transformers.AutoModelForImageClassification
            maker = auto._model_mapping[type(config)]
            maker = maker[0] if isinstance(maker, (list, tuple)) else maker
            check_size(lambda: maker(copy.deepcopy(config)), tensors, f"'{folder}'")
            net, told = maker.from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True
            )
    except RobustannError:
        raise
    except Exception as error:
        raise ModelError(
            f"transformers cannot make the model in '{folder}' ({type(error).__name__}: "
            f"{str(error)[:300]}); save it again with save_pretrained"
        ) from error
    finally:
        told_by.set_verbosity(level)
        if bar:
            told_by.enable_progress_bar()
    problems = [
        f"{len(keys)} {what}: {', '.join(map(str, sorted(map(str, keys))[:3]))}"
        for what, keys in (
            ("missing", told.get("missing_keys")),
            ("unexpected", told.get("unexpected_keys")),
            ("of another shape", told.get("mismatched_keys")),
        )
        if keys
    ]
    if problems:
        raise ModelError(
            f"the weights in '{folder}' do not fit its config.json: {'; '.join(problems)}; use "
            "the files of one save_pretrained"
        )
    made: nn.Module = net.float().eval()
    return made


def _check_timm(values: dict[str, Any], folder: Path) -> None:
    """A network of timm in a folder of transformers: one of timm's own, nothing from elsewhere."""
    name, given = values.get("architecture"), values.get("model_args") or {}
    if not isinstance(name, str) or not need("timm", "timm").is_model(name) or ":" in name:
        raise ModelError(f"expected an architecture of timm in '{folder}', got {name!r:.80}")
    if not isinstance(given, dict):
        raise ModelError(f"expected a table model_args in '{folder}', got {given!r:.80}")
    check_options(given, folder)


def _carried(folder: Path, values: dict[str, Any], net: Any) -> Carried:
    labels = net.config.id2label
    names = tuple(str(labels[number]) for number in sorted(labels)) if labels else None
    channels = values.get("num_channels")
    side = net.config.to_dict().get("image_size")
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return Carried(
            f"config.json in {folder.name}",
            channels=channels if isinstance(channels, int) else None,
            size=_size(side),
            class_names=names,
        )
    told = read_json(path)
    factor = told.get("rescale_factor", 1 / 255) if told.get("do_rescale", True) else 1.0
    factor = factor if isinstance(factor, (int, float)) and 0 < factor < 2**20 else 1 / 255
    offset = -1.0 if told.get("rescale_offset") else 0.0
    high = 255 * factor + offset
    # 255 * (1 / 255) is 1 but for rounding.
    bounds = (offset, 1.0 if abs(high - 1) < 1e-6 else high)
    normalises = bool(told.get("do_normalize", True))
    size = _size(side) or _size(told.get("crop_size")) or _size(told.get("size"))
    return Carried(
        f"preprocessor_config.json in {folder.name}",
        mean=numbers_of(told.get("image_mean")) if normalises else (0.0,),
        std=numbers_of(told.get("image_std")) if normalises else (1.0,),
        bounds=None if bounds == (0.0, 1.0) else bounds,
        channels=channels if isinstance(channels, int) else None,
        size=size,
        class_names=names,
    )


def _size(value: object) -> tuple[int, int] | None:
    if isinstance(value, dict):
        if type(value.get("height")) is int and type(value.get("width")) is int:
            return value["height"], value["width"]
        value = value.get("shortest_edge")
    if type(value) is int:
        return value, value
    if isinstance(value, (list, tuple)) and list(map(type, value)) == [int, int]:
        return value[0], value[1]
    return None
