"""Options that several commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from robustann.data import ImageData
    from robustann.models import ImageClassifier
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
                 help="digits, mnist, fashion-mnist, cifar10, cifar100, imagefolder:PATH, or "
                 "pkg.module:factory (your own code)."),
    click.option("--data-root", type=click.Path(path_type=Path), metavar="FOLDER",
                 help="Where datasets are kept.  [default: $ROBUSTANN_DATA, else data]"),
    click.option("--download", is_flag=True, help="Fetch the dataset if it is not there."),
    click.option("--image-size", type=click.IntRange(min=1), metavar="PIXELS",
                 help="Resize and crop the images of an image folder to this size."),
)  # fmt: skip

model_options = combine(
    click.option("--model", "model_path", required=True, type=click.Path(path_type=Path),
                 metavar="FILE", help="A .safetensors file with its .json beside it."),
    click.option("--arch", metavar="NAME",
                 help="The model's architecture; needed only where it is a pkg.module:factory, "
                 "to agree that this code is run."),
)  # fmt: skip

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


def read_data(data_spec: str, data_root: Path | None, download: bool, image_size: int | None,
              quiet: bool) -> ImageData:  # fmt: skip
    """Load the dataset that the options name."""
    from robustann.data import load_data
    from robustann.factory import is_factory

    if is_factory(data_spec) and not quiet:
        click.echo(f"importing {data_spec} from the current folder or the environment", err=True)
    return load_data(data_spec, root=data_root, download=download, image_size=image_size)


def read_model(model_path: Path, arch: str | None, device: str | None,
               quiet: bool) -> ImageClassifier:  # fmt: skip
    """Load the model that the options name onto the device."""
    from robustann.factory import is_factory
    from robustann.models import load_model, resolve_device

    if arch is not None and is_factory(arch) and not quiet:
        click.echo(f"importing {arch} from the current folder or the environment", err=True)
    return load_model(model_path, arch=arch, device=resolve_device(device))


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
