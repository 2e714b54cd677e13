"""``create_model``: an architecture named by text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from robustann.errors import ModelError, RobustannError, UsageError, unknown_name
from robustann.factory import call_factory, is_factory
from robustann.models.bounded import NumbersOnCpu
from robustann.models.classifier import ImageClassifier, ModelSpec
from robustann.models.preact_resnet import preact_resnet18
from robustann.models.small_cnn import small_cnn
from robustann.models.wide_resnet import wide_resnet
from robustann.rng import stable_hash

ARCHITECTURES: dict[str, str] = {
    "small-cnn": "two strided convolutions, two linear layers; for digits and MNIST, quick on CPU",
    "preactresnet-18": "pre-activation ResNet-18 for small images; 11 million parameters",
    "wideresnet-DEPTH-WIDTH": "wide ResNet, for example wideresnet-28-10 or wideresnet-16-4",
    "torchvision:NAME": "any classifier of torchvision, for example resnet50; untrained",
    "timm:NAME": "any classifier of timm, for example timm:vit_tiny_patch16_224; extra timm",
    "pkg.module:factory": "your function, which returns a network that gives logits",
}

_WIDE = re.compile(r"wideresnet-(\d{1,4})-(\d{1,4})")
_TORCHVISION_PREFIX = "torchvision:"
TIMM_PREFIX = "timm:"
# What a name follows, which would look like a factory.
_LIBRARIES = (_TORCHVISION_PREFIX, TIMM_PREFIX)


def create_model(
    arch: str,
    *,
    class_names: Sequence[str],
    shape: tuple[int, int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int | None = None,
) -> ImageClassifier:
    """A new, untrained model on the CPU, in training mode.

    Args:
        arch: a name in :data:`ARCHITECTURES`; torchvision's names need no prefix.
            ``pkg.module:factory`` is called with those of ``num_classes``, ``shape`` and
            ``in_channels`` that it takes, and returns a module that gives logits.
        class_names: one a logit.
        shape: (C, H, W) of the images. Torchvision's networks take three channels; grey images
            are repeated for them.
        mean: per channel, subtracted from images in [0, 1]; default 0.
        std: per channel, then divides; default 1.
        seed: of the first weights; the global random state stays as it is. Default: drawn from
            the global random state.

    Raises:
        UsageError: an unknown architecture, or values that do not fit together.
        ModelError: the architecture cannot take such images, or the factory failed.

    >>> model = create_model("small-cnn", class_names=["cat", "dog"], shape=(1, 8, 8), seed=0)
    >>> model(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 2])
    """
    channels = shape[0] if len(shape) == 3 else 0
    try:
        spec = ModelSpec(
            arch=arch,
            class_names=tuple(class_names),
            shape=shape,
            mean=tuple(mean) if mean is not None else (0.0,) * channels,
            std=tuple(std) if std is not None else (1.0,) * channels,
        )
    except ValidationError as error:
        raise UsageError(f"cannot make a model: {first_problem(error)}") from error
    generator = torch.default_generator
    state = generator.get_state()
    try:
        if seed is not None:
            # PyTorch takes no larger seed.
            generator.manual_seed(seed if seed < 2**63 else stable_hash("weights", seed))
        model = build(spec)
    finally:
        if seed is not None:
            generator.set_state(state)
    check_logits(model)
    return model


def build(spec: ModelSpec) -> ImageClassifier:
    """The model that ``spec`` describes, on the CPU, whatever PyTorch's default device is.

    Raises:
        UsageError: an unknown architecture.
        ModelError: it cannot be made for images of the shape.

    >>> build(ModelSpec(arch="small-cnn", class_names=("a", "b"), shape=(1, 4, 4),
    ...                 mean=(0.0,), std=(1.0,))).training
    True
    """
    with torch.device("cpu"):
        return ImageClassifier(_network(spec), spec)


def check_logits(model: ImageClassifier) -> None:
    """Prove with one black image that a model on the CPU gives one logit a class.

    Raises:
        ModelError: it cannot take images of its shape, or gives something else.

    >>> check_logits(create_model("small-cnn", class_names=["a", "b"], shape=(1, 8, 8)))
    """
    spec = model.spec
    was_training = {module: module.training for module in model.modules()}
    image = torch.zeros(1, *spec.shape, device="cpu")
    model.eval()
    try:
        with torch.no_grad():
            logits: object = model(image)
    except RobustannError:
        raise
    except Exception as error:
        raise ModelError(
            f"'{spec.arch}' cannot take images of shape {spec.shape} ({type(error).__name__}: "
            f"{error}); choose another architecture or another image size"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (1, spec.num_classes):
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"expected '{spec.arch}' to give logits of shape (N, {spec.num_classes}), "
            f"got {came} for one image; its last layer must have one output per class"
        )
    for module, training in was_training.items():
        module.training = training


def expected_tensors(spec: ModelSpec) -> dict[str, Tensor]:
    """Names, types and shapes in the model's state, without memory for the values.

    Not for a ``pkg.module:factory``, whose code this would run.

    >>> spec = ModelSpec(arch="wideresnet-202-64", class_names=("a", "b"), shape=(3, 32, 32),
    ...                  mean=(0.0,) * 3, std=(1.0,) * 3)
    >>> expected_tensors(spec)["normalize.mean"].shape
    torch.Size([3, 1, 1])
    """
    with torch.device("meta"), NumbersOnCpu():
        return ImageClassifier(_network(spec), spec).state_dict()


def is_code(arch: str) -> bool:
    """Whether the architecture is a user's ``pkg.module:factory``.

    >>> is_code("mine.nets:make"), is_code("torchvision:resnet50")
    (True, False)
    """
    return is_factory(arch) and not arch.startswith(_LIBRARIES)


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints, in one line.

    >>> try:
    ...     ModelSpec(arch="a", class_names=("a", "b"), shape=(0, 1, 1), mean=(), std=())
    ... except ValidationError as error:
    ...     print(first_problem(error))
    shape.0: Input should be greater than or equal to 1, got 0
    """
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    came = repr(problem["input"])
    shown = came if len(came) <= 60 else f"{came[:60]}..."
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {message}, got {shown}{more}" if where else f"{message}{more}"


class RepeatChannel(nn.Module):
    """One grey channel to three equal ones.

    >>> RepeatChannel()(torch.zeros(2, 1, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W)."""
        return images.expand(-1, 3, -1, -1)


def _network(spec: ModelSpec) -> nn.Module:
    arch, channels = spec.arch, spec.shape[0]
    if arch == "small-cnn":
        return small_cnn(spec.num_classes, spec.shape)
    if arch == "preactresnet-18":
        return preact_resnet18(spec.num_classes, channels)
    if match := _WIDE.fullmatch(arch):
        return wide_resnet(int(match[1]), int(match[2]), spec.num_classes, channels)
    if arch.startswith(TIMM_PREFIX):
        from robustann.models.foreign.timm_models import timm_network

        return timm_network(arch.removeprefix(TIMM_PREFIX), spec.num_classes, spec.shape)
    if is_code(arch):
        return _from_factory(spec)
    return _from_torchvision(spec)


def _from_factory(spec: ModelSpec) -> nn.Module:
    net = call_factory(
        spec.arch,
        "model",
        ModelError,
        num_classes=spec.num_classes,
        shape=spec.shape,
        in_channels=spec.shape[0],
    )
    if not isinstance(net, nn.Module):
        raise ModelError(
            f"expected '{spec.arch}' to return a torch.nn.Module that gives logits, "
            f"got {type(net).__name__}; return the network"
        )
    return net


def _from_torchvision(spec: ModelSpec) -> nn.Module:
    import torchvision

    name = spec.arch.removeprefix(_TORCHVISION_PREFIX)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        module, dot, function = name.rpartition(".")
        if dot and is_factory(f"{module}:{function}"):
            raise UsageError(
                f"unknown architecture '{spec.arch}'; if it is code of your own, write "
                f"'{module}:{function}'. 'robustann list models' shows the others"
            )
        own = ["small-cnn", "preactresnet-18", "wideresnet-28-10"]
        near = difflib.get_close_matches(name.lower(), known, n=5)
        raise unknown_name(
            "architecture", spec.arch, [*own, *near, *list(ARCHITECTURES)[len(own) :]]
        )
    channels, height, width = spec.shape
    if channels not in (1, 3):
        raise UsageError(
            f"expected images of 1 or 3 channels for torchvision's {name}, got {channels}; "
            "choose another architecture or write a factory"
        )
    options: dict[str, object] = {}
    if name.startswith("vit_") and height == width:
        options["image_size"] = height
    elif name == "maxvit_t":
        options["input_size"] = (height, width)
    elif name in ("googlenet", "inception_v3"):
        # Their auxiliary outputs are not logits (N, C).
        options = {"aux_logits": False, "init_weights": True}
    try:
        net: nn.Module = torchvision.models.get_model(
            name, weights=None, num_classes=spec.num_classes, **options
        )
    except Exception as error:
        raise ModelError(
            f"torchvision's {name} cannot be made for images of shape {spec.shape} "
            f"({type(error).__name__}: {error}); choose another image size"
        ) from error
    return nn.Sequential(RepeatChannel(), net) if channels == 1 else net
