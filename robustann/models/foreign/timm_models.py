"""timm: architectures by name, and folders as its ``push_to_hf_hub`` lays them out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from robustann.errors import DamagedError, ModelError, RefusedError, UsageError, unknown_name
from robustann.extras import need
from robustann.models.foreign.adapters import Carried
from robustann.models.sniffing import read_once

_MAX_CONFIG = 16 * 2**20
# Arguments that a configuration may hand to a network: numbers, words and lists of them, but
# nothing that reads another file.
_READS_FILES = frozenset({"checkpoint_path", "pretrained", "cache_dir", "pretrained_cfg",
                          "pretrained_cfg_overlay", "pretrained_strict"})  # fmt: skip


def timm_network(
    name: str, classes: int, shape: tuple[int, int, int], options: Mapping[str, Any] | None = None
) -> nn.Module:
    """An untrained network of timm for images of ``shape``.

    Raises:
        UsageError: timm is not installed, or has no such network.
        ModelError: it cannot be made for such images.
    """
    timm = need("timm", "timm")
    if not timm.is_model(name):
        raise unknown_name("timm architecture", name, _near(name, timm.list_models()))
    channels, height, width = shape
    made: dict[str, Any] = {"num_classes": classes, "in_chans": channels, **(options or {})}
    size = _config(name).size
    if size is not None and size != (height, width):
        # Only networks with positions need to know; the others do not know the word.
        try:
            return _create(timm, name, {**made, "img_size": (height, width)})
        except TypeError as error:
            if "img_size" not in str(error):
                raise _unmade(name, shape, error) from error
    try:
        return _create(timm, name, made)
    except Exception as error:
        raise _unmade(name, shape, error) from error


def timm_carried(name: str) -> Carried:
    """What timm's default configuration of a network says about its images.

    Raises:
        UsageError: timm is not installed, or has no such network.
    """
    timm = need("timm", "timm")
    if not timm.is_model(name):
        raise unknown_name("timm architecture", name, _near(name, timm.list_models()))
    return _config(name)


def read_timm_folder(folder: Path) -> tuple[str, dict[str, Any], int, Carried]:
    """Architecture, its options, number of classes, and what ``config.json`` says of the images.

    Raises:
        UsageError: no ``config.json``.
        ModelError: it is none of timm's.
        RefusedError: it asks for other files to be read.

    >>> read_timm_folder(Path("nowhere"))
    Traceback (most recent call last):
    robustann.errors.UsageError: no 'config.json' in 'nowhere'; name the folder that holds it
    """
    config = read_json(folder / "config.json")
    name, given = config.get("architecture"), config.get("model_args") or {}
    cfg = config.get("pretrained_cfg")
    cfg = cfg if isinstance(cfg, dict) else config
    classes = config.get("num_classes", cfg.get("num_classes"))
    if not isinstance(name, str) or type(classes) is not int or not isinstance(given, dict):
        raise ModelError(
            f"expected timm's config.json with architecture and num_classes in '{folder}', got "
            f"the keys {sorted(map(str, config))[:8]}; a transformers folder is named hf:FOLDER"
        )
    check_options(given, folder)
    labels = config.get("label_names", cfg.get("label_names"))
    names = tuple(map(str, labels)) if isinstance(labels, list) and labels else None
    carried = _from_cfg(cfg, f"config.json in {folder.name}", names)
    return name, given, classes, carried


def check_options(given: Mapping[str, Any], folder: Path) -> None:
    """Refuse options of timm that lead out of the folder.

    Raises:
        RefusedError: there are such.

    >>> check_options({"checkpoint_path": "/x.pth"}, Path("m"))
    Traceback (most recent call last):
    robustann.errors.RefusedError: 'm/config.json' asks timm to read other files (checkpoint_path
    in model_args); remove that, if you trust the rest
    """
    asked = sorted(_READS_FILES & given.keys())
    if asked:
        raise RefusedError(
            f"'{folder / 'config.json'}' asks timm to read other files ({', '.join(asked)} in "
            "model_args); remove that, if you trust the rest"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model's folder.

    Raises:
        UsageError: there is none.
        ModelError: it is damaged.

    >>> read_json(Path("nowhere/config.json"))
    Traceback (most recent call last):
    robustann.errors.UsageError: no 'config.json' in 'nowhere'; name the folder that holds it
    """
    if not path.is_file():
        raise UsageError(f"no '{path.name}' in '{path.parent}'; name the folder that holds it")
    try:
        values = json.loads(read_once(path, max_bytes=_MAX_CONFIG))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise DamagedError(
            f"expected JSON in '{path}', reading it failed with {type(error).__name__}: {error}; "
            "copy it again"
        ) from error
    if not isinstance(values, dict):
        raise DamagedError(f"expected a JSON object in '{path}', got a {type(values).__name__}")
    return values


def _create(timm: Any, name: str, options: dict[str, Any]) -> nn.Module:
    net: nn.Module = timm.create_model(name, pretrained=False, **options)
    return net


def _unmade(name: str, shape: tuple[int, int, int], error: Exception) -> ModelError:
    return ModelError(
        f"timm's {name} cannot be made for images of shape {shape} ({type(error).__name__}: "
        f"{error}); choose another architecture or --input-size"
    )


def _config(name: str) -> Carried:
    cfg = need("timm.models", "timm").get_pretrained_cfg(name)
    values = {} if cfg is None else cfg.to_dict()
    return _from_cfg(values, f"timm's configuration of {name}", None)


def _from_cfg(cfg: Mapping[str, Any], source: str, names: tuple[str, ...] | None) -> Carried:
    size = cfg.get("input_size")
    fits = isinstance(size, (list, tuple)) and list(map(type, size)) == [int] * 3
    return Carried(
        source,
        mean=numbers_of(cfg.get("mean")),
        std=numbers_of(cfg.get("std")),
        channels=int(size[0]) if fits and size else None,
        size=(int(size[1]), int(size[2])) if fits and size else None,
        class_names=names,
    )


def numbers_of(values: object) -> tuple[float, ...] | None:
    """The numbers in a list of a configuration, or None if it is no such list.

    >>> numbers_of([0.5, 1]), numbers_of("0.5"), numbers_of(0.5)
    ((0.5, 1.0), None, (0.5,))
    """
    if isinstance(values, (int, float)) and not isinstance(values, bool):
        return numbers_of([values])
    if isinstance(values, (list, tuple)) and values and all(
        isinstance(value, (int, float)) for value in values
    ):  # fmt: skip
        try:
            return tuple(float(value) for value in values)
        except OverflowError:
            return None
    return None


def _near(name: str, known: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.3) or known[:5]
