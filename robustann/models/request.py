"""What a user asked for: which model, and what they know about it that no file says."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from robustann.errors import UsageError
from robustann.models.registry import is_code

FIELDS = (
    "model",
    "arch",
    "factory",
    "class_names",
    "mean",
    "std",
    "bounds",
    "input_size",
    "model_sha256",
    "allow_code_execution",
)

# Folders rather than files.
PREFIXES = ("hf:", "timm:")
_MAX_NAMES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """Which model, and what replaces or completes what its files say.

    Attributes:
        model: a file, ``hf:FOLDER`` or ``timm:FOLDER``; None where a factory makes it all.
        arch: the network that plain weights belong to, as
            :func:`~robustann.models.create_model` takes it.
        factory: ``pkg.module:fn``, the user's code that returns the network; with ``model`` the
            weights are loaded into it, else it brings its own.
        class_names: of the outputs, in their order.
        mean: subtracted from each channel (one value stands for all).
        std: then divides each channel.
        bounds: what 0 and 1 become before mean and std.
        input_size: (height, width) that the network takes.
        model_sha256: that the model file must have, in hex.
        allow_code_execution: open formats that can run code.

    Raises:
        UsageError: values that cannot be meant.

    >>> ModelRequest(model="a/net.pt", arch="torchvision:resnet18").name
    'net'
    """

    model: str | None = None
    arch: str | None = None
    factory: str | None = None
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bounds: tuple[float, float] | None = None
    input_size: tuple[int, int] | None = None
    model_sha256: str | None = None
    allow_code_execution: bool = False

    def __post_init__(self) -> None:
        if self.factory is not None and self.arch is not None:
            raise UsageError(
                f"expected an architecture or a factory, got both '{self.arch}' and "
                f"'{self.factory}'; leave out one"
            )
        if self.factory is not None and not is_code(self.factory):
            raise UsageError(
                f"expected a factory as pkg.module:function, got '{self.factory}'; correct it"
            )
        if self.class_names is not None:
            twice = sorted({n for n in self.class_names if self.class_names.count(n) > 1})
            if len(self.class_names) < 2 or twice:
                came = f"{twice[0]!r} twice" if twice else f"{len(self.class_names)}"
                raise UsageError(f"expected at least two unique class names, got {came}")
        if self.std is not None and min(self.std) <= 0:
            raise UsageError(f"expected std above 0, got {min(self.std):g}")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            low, high = self.bounds
            raise UsageError(f"expected bounds LOW,HIGH with LOW < HIGH, got {low:g},{high:g}")

    @classmethod
    def from_text(
        cls,
        *,
        model: str | None = None,
        arch: str | None = None,
        factory: str | None = None,
        class_names: str | None = None,
        mean: str | None = None,
        std: str | None = None,
        bounds: str | None = None,
        input_size: str | None = None,
        model_sha256: str | None = None,
        allow_code_execution: bool = False,
    ) -> ModelRequest:
        """The request that options on a command line make.

        Raises:
            UsageError: text that is not what its option takes; the message names the option.

        >>> ModelRequest.from_text(model="m.onnx", mean="0.5", bounds="0,255", input_size="32x48",
        ...                        class_names="cat,dog").input_size
        (32, 48)
        """
        pair = None if bounds is None else _numbers(bounds, "--bounds")
        if pair is not None and len(pair) != 2:
            raise UsageError(f"expected --bounds LOW,HIGH, such as 0,255, got '{bounds}'")
        return cls(
            model=model,
            arch=arch,
            factory=factory,
            class_names=None if class_names is None else _names(class_names),
            mean=None if mean is None else _numbers(mean, "--mean"),
            std=None if std is None else _numbers(std, "--std"),
            bounds=None if pair is None else (pair[0], pair[1]),
            input_size=None if input_size is None else _size(input_size),
            model_sha256=model_sha256,
            allow_code_execution=allow_code_execution,
        )

    @property
    def given(self) -> bool:
        """Whether there is a model to open, and not an architecture to train alone."""
        return self.model is not None or self.factory is not None

    @property
    def code(self) -> str | None:
        """The user's code that is run for this, if any."""
        if self.factory is not None:
            return self.factory
        return self.arch if self.arch is not None and is_code(self.arch) else None

    @property
    def name(self) -> str:
        """A short name, fit for a folder.

        >>> ModelRequest(model="hf:models/vit-tiny/").name, ModelRequest(factory="a.b:net").name
        ('vit-tiny', 'a.b-net')
        """
        if self.model is None:
            return (self.factory or self.arch or "model").replace(":", "-")
        path = Path(self.model.partition(":")[2] if self.is_folder else self.model)
        # A folder may be named "resnet18.a1_in1k".
        return (path.name if self.is_folder else path.stem) or "model"

    @property
    def is_folder(self) -> bool:
        """Whether the model is a folder in another project's form.

        >>> ModelRequest(model="hf:vit").is_folder, ModelRequest(model="m.pt").is_folder
        (True, False)
        """
        return self.model is not None and self.model.startswith(PREFIXES)

    @property
    def path(self) -> Path:
        """The file or folder.

        >>> ModelRequest(model="hf:vit").path.name
        'vit'
        """
        text = self.model or ""
        return Path(text.partition(":")[2] if self.is_folder else text).expanduser()

    def label(self, model: object) -> str:
        """How a report calls the model.

        >>> ModelRequest(model="m.onnx").label(object())
        'm.onnx'
        """
        spec = getattr(model, "spec", None)
        arch = getattr(spec, "arch", None)
        if self.model is None:
            return self.factory or str(arch)
        return self.path.name if arch is None else f"{arch} ({self.path.name})"

    def check(self) -> None:
        """Refuse what is not there, before a folder is made for what it would have given.

        Raises:
            UsageError: no model is asked for, or there is no such file or folder.

        >>> ModelRequest(model="nowhere.pt").check()
        Traceback (most recent call last):
        robustann.errors.UsageError: no model file 'nowhere.pt'; correct the path
        """
        if self.model is None:
            if self.factory is None:
                raise UsageError("no model; pass --model FILE, or --factory pkg.module:function")
            return
        if self.is_folder and not self.path.is_dir():
            if self.model.startswith("timm:"):
                raise UsageError(
                    f"expected timm:FOLDER, a folder with config.json and model.safetensors, got "
                    f"'{self.model}'; nothing is downloaded. For weights in a file: --model "
                    f"weights.safetensors --arch {self.model}"
                )
            raise UsageError(f"no folder '{self.path}' of a model; correct the path")
        if not self.is_folder and not self.path.is_file():
            raise UsageError(f"no model file '{self.path}'; correct the path")


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise UsageError(f"expected {option} NUMBER,NUMBER,..., such as 0.5,0.5,0.5, got '{text}'")
    return values


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})(?:[x,](\d{1,4}))?", text.strip())
    height = int(match[1]) if match else 0
    width = int(match[2] or match[1]) if match else 0
    if not height or not width:
        raise UsageError(f"expected --input-size PIXELS or HEIGHTxWIDTH, such as 224, got '{text}'")
    return height, width


def _names(text: str) -> tuple[str, ...]:
    path = Path(text).expanduser()
    try:
        is_file = path.is_file()
    except (OSError, ValueError):
        is_file = False  # a long list is no path
    if not is_file:
        if "," not in text:
            raise UsageError(
                f"expected --class-names as a list such as cat,dog or a file with one a line, "
                f"got '{text}', which is no file"
            )
        return tuple(name.strip() for name in text.split(","))
    try:
        if path.stat().st_size > _MAX_NAMES:
            raise UsageError(f"expected one class name a line in '{path}', got a huge file")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"expected text that can be read in '{path}', got {error}") from error
    return tuple(line.strip() for line in lines if line.strip())
