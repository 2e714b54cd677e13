"""Options that several commands share, and what they mean."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from torch import nn

    from robustann.data import ImageData
    from robustann.models.request import ModelRequest
    from robustann.threat import ThreatModel

F = TypeVar("F", bound=Callable[..., Any])
# The field's usual radii for 32x32 colour images.
_USUAL_EPS = {"linf": "8/255", "l2": "0.5", "l1": "12", "l0": "10"}


def combine(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator from several, shown in the given order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


data_options = combine(
    click.option("--data", "data_spec", default="digits", show_default=True, metavar="NAME",
                 help="digits, mnist, fashion-mnist, cifar10, cifar100, imagefolder:PATH, "
                 "npz:FILE, csv:FILE, datasets:FOLDER, or pkg.module:factory (your own code)."),
    click.option("--data-root", type=click.Path(path_type=Path), metavar="FOLDER",
                 help="Where datasets are kept.  [default: $ROBUSTANN_DATA, else data]"),
    click.option("--download", is_flag=True, help="Fetch the dataset if it is not there."),
    click.option("--image-size", type=click.IntRange(min=1), metavar="PIXELS",
                 help="Resize and crop image files to this size."),
)  # fmt: skip


def _files(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """What a shell completes where a file is meant, though other text may be given too."""
    return [CompletionItem(incomplete, type="file")]


def _requested(function: F) -> F:
    """Hand the model options over as one ``request``."""

    @functools.wraps(function)
    def with_request(**options: Any) -> Any:
        from robustann.models.request import FIELDS, ModelRequest

        given = {name: options.pop(name) for name in FIELDS}
        return function(request=ModelRequest.from_text(**given), **options)

    return with_request  # type: ignore[return-value]


def _model_options(model_help: str, arch_help: str) -> Callable[[F], F]:
    return combine(
        click.option("--model", metavar="FILE", help=model_help, shell_complete=_files),
        click.option("--arch", metavar="NAME", help=arch_help),
        click.option("--factory", metavar="PKG.MODULE:FN",
                     help="Instead of --arch: your own code, which returns the network; without "
                     "--model, the trained one."),
        click.option("--class-names", metavar="FILE|NAME,NAME,...",
                     help="Of the model's outputs, in their order: a list, or a file with one a "
                     "line.  [default: what the model carries, else those of the data]"),
        click.option("--mean", metavar="NUMBER,...",
                     help="Subtracted from each channel.  [default: what the model carries, "
                     "else 0]"),
        click.option("--std", metavar="NUMBER,...",
                     help="Then divides each channel.  [default: what the model carries, else 1]"),
        click.option("--bounds", metavar="LOW,HIGH",
                     help="What black and white are to the network, before --mean and --std; for "
                     "example 0,255.  [default: what the model carries, else 0,1]"),
        click.option("--input-size", metavar="PIXELS|HEIGHTxWIDTH",
                     help="What the network takes; images of another size are resized in front of "
                     "it.  [default: what the model carries, else that of the images]"),
        click.option("--model-sha256", metavar="HEX", help="Refuse a file with another SHA-256."),
        click.option("--allow-code-execution", is_flag=True,
                     help="Open TorchScript and .pt2 files, which can run code on this machine; "
                     "in an audit, run the code that a --config names too."),
        _requested,
    )  # fmt: skip


model_options = _model_options(
    "Weights (.safetensors, .pt, .pth), ONNX, TorchScript or .pt2; or hf:FOLDER of a "
    "transformers image classifier, timm:FOLDER of a timm model.",
    "The network that weights belong to, where no .json beside them says so: see 'robustann list "
    "models'. A pkg.module:factory is your code, which runs.",
)
start_options = _model_options(
    "A model to harden, as 'robustann audit' takes it; training goes on from there.",
    "Without --model: train this architecture, once plainly and once hardened.  "
    "[default: small-cnn]",
)

threat_options = combine(
    click.option("--norm", default="linf", show_default=True, metavar="NORM",
                 help="linf, l2, l1 or l0."),
    click.option("--eps", metavar="NUMBER",
                 help="Radius, for example 0.1 or 8/255.  "
                 "[default: linf 8/255, l2 0.5, l1 12, l0 10]"),
)  # fmt: skip

device_option = click.option(
    "--device", metavar="NAME", help="cuda, mps or cpu.  [default: the fastest there is]"
)
quiet_option = click.option(
    "--quiet", is_flag=True, help="Print nothing but errors; show no progress."
)
seed_option = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), metavar="NUMBER",
    help="Of everything random.",
)  # fmt: skip


def tell_code(code: str) -> None:
    """Say which code is about to run, and where it lies, before it does."""
    from robustann.factory import origin

    place = origin(code)
    found = "" if place is None else f" from {place}"
    click.echo(f"importing {code}{found}: it runs as you", err=True)


def read_data(data_spec: str, data_root: Path | None, download: bool, image_size: int | None,
              quiet: bool, usual_size: int | None = None) -> ImageData:  # fmt: skip
    """Load the dataset that the options name.

    ``usual_size`` is what the images of a folder become where nothing else decides it.
    """
    from robustann.data import load_data, runs_code
    from robustann.errors import UsageError, printable
    from robustann.launch import world

    if download and world().size > 1:
        raise UsageError(
            "expected --download from one process, for several would write the same files; fetch "
            "the data before torchrun"
        )
    if runs_code(data_spec) and not quiet:
        tell_code(data_spec)
    data = load_data(data_spec, root=data_root, download=download, image_size=image_size,
                     usual_size=usual_size)  # fmt: skip
    # Of the bundled images nobody expects anything else.
    if data.test_part == "cut" and data_spec != "digits" and not quiet:
        images = len(data.train) + len(data.validation) + len(data.test)
        click.echo(
            printable(
                f"data: {data_spec} has no test part, so {len(data.test)} of its {images} images "
                "were set aside as one; only these are audited. Name all of them as its test part "
                "to audit them all (docs/data.md)"
            ),
            err=True,
        )
    return data


def read_model_and_data(request: ModelRequest, data_spec: str, data_root: Path | None,
                        download: bool, image_size: int | None, device: str | None,
                        quiet: bool) -> tuple[nn.Module, ImageData]:  # fmt: skip
    """The model on its device, and the data with its classes numbered as the model's are.

    A model file is refused before the data is read. What was taken from where is told on stderr.
    """
    from robustann.data.matching import in_order_of
    from robustann.errors import printable
    from robustann.models import resolve_device
    from robustann.models.resolve import resolve_model

    code = request.code
    if code is not None and not quiet:
        tell_code(code)
    read: list[ImageData] = []

    def data(size: int | None) -> ImageData:
        if not read:
            read.append(read_data(data_spec, data_root, download, image_size, quiet, size))
        return read[0]

    resolved = resolve_model(request, data)
    model = resolved.model.to(resolve_device(device))
    matched, told = in_order_of(data(None), resolved.class_names)
    if not quiet:
        for note in (*resolved.notes, *told):
            click.echo(printable(note), err=True)
    return model, matched


def check_model_file(path: Path) -> None:
    """Refuse a missing model before a folder is made for what it would have given."""
    from robustann.errors import UsageError

    if not path.is_file():
        raise UsageError(f"no model file '{path}'; correct the path")


def check_targets(*paths: Path) -> None:
    """Refuse files that cannot be written, before the work whose results they shall hold."""
    from robustann.errors import UsageError
    from robustann.files import check_writable_folder

    for path in paths:
        if path.is_dir():
            raise UsageError(
                f"expected to write the file '{path}', got a folder of that name; "
                "remove it or choose another path"
            )
    for folder in {path.parent for path in paths}:
        check_writable_folder(folder)


def read_threat(norm: str, eps: str | None, targeted: bool = False) -> ThreatModel:
    """The threat model that the options name."""
    from robustann.errors import unknown_name
    from robustann.threat import NORMS, ThreatModel

    if norm not in _USUAL_EPS:
        raise unknown_name("norm", norm, NORMS)
    # ThreatModel itself reads text such as 8/255.
    text: Any = eps if eps is not None else _USUAL_EPS[norm]
    return ThreatModel(norm, text, targeted=targeted)  # type: ignore[arg-type]


def share(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f} %"
