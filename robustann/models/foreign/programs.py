"""TorchScript and torch.export: archives that hold programs, opened only where the user says so."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustann.errors import ModelError, RefusedError
from robustann.models.foreign.adapters import Carried, FixedBatch, Network
from robustann.models.sniffing import Kind

TORCHSCRIPT, EXPORTED = "TorchScript", "torch.export"
PROGRAMS = (TORCHSCRIPT, EXPORTED)
"""Architectures of models that run what their file holds."""


class Script(nn.Module):
    """A TorchScript module, run without its profiling optimiser.

    The optimiser runs the first passes as written and later ones fused, which round differently:
    the same image would not give the same logits twice.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes)."""
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            logits: Tensor = self.net(images)
        return logits


def check_allowed(kind: Kind, path: Path, allowed: bool) -> None:
    """Refuse a format that can run code, unless the user allowed it.

    Raises:
        RefusedError: it is not allowed.

    >>> check_allowed(Kind.TORCHSCRIPT, Path("net.ts"), False)
    Traceback (most recent call last):
    robustann.errors.RefusedError: 'net.ts' is a TorchScript archive, which can run code on this
    machine when it is opened or used; if you trust ... --allow-code-execution ...
    """
    if not allowed:
        raise RefusedError(
            f"'{path}' is {kind.words}, which can run code on this machine when it is opened or "
            "used; if you trust whoever made it, pass --allow-code-execution "
            "(allow_code_execution=True). Safer: ask for the weights as .safetensors, or for ONNX"
        )


def open_torchscript(content: bytes, path: Path, sha256: str) -> Network:
    """The module in a TorchScript archive; this may run what the archive holds.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = torch.jit.load(  # type: ignore[no-untyped-call]
                io.BytesIO(content), map_location="cpu"
            )
    except Exception as error:
        raise _unloadable(path, Kind.TORCHSCRIPT, error) from error
    return Network(
        Script(net.eval()),
        TORCHSCRIPT,
        Carried(path.name),
        sha256=sha256,
        notes=(_ran(path),),
    )


def open_exported(content: bytes, path: Path, sha256: str) -> Network:
    """The module in an archive of torch.export; this may run what the archive holds.

    Raises:
        ModelError: it cannot be loaded, or takes no images.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(io.BytesIO(content))
            made = program.module()
            # The exported module refuses train() and eval(); its graph alone does not mind.
            net: nn.Module = torch.fx.GraphModule(made, made.graph)
    except Exception as error:
        raise _unloadable(path, Kind.EXPORT, error) from error
    shape = _input_shape(program)
    if len(shape) != 4:
        raise ModelError(
            f"expected '{path}' to take one batch of images (N, C, H, W), got an input of shape "
            f"{tuple(shape)}; export the network that takes images alone"
        )
    batch, channels, height, width = (int(n) if isinstance(n, int) else None for n in shape)
    size = (height, width) if height is not None and width is not None else None
    carried = Carried(path.name, channels=channels, size=size)
    net = net if batch is None else FixedBatch(net, batch)
    return Network(net, EXPORTED, carried, sha256=sha256, notes=(_ran(path),))


def _input_shape(program: Any) -> tuple[Any, ...]:
    names = program.graph_signature.user_inputs
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            return tuple(getattr(node.meta.get("val"), "shape", ()))
    return ()


def _ran(path: Path) -> str:
    return f"{path.name} was opened with --allow-code-execution: what it holds runs as you"


def _unloadable(path: Path, kind: Kind, error: Exception) -> ModelError:
    lines = str(error).strip().splitlines() or [""]
    return ModelError(
        f"'{path}' looks like {kind.words}, but PyTorch {torch.__version__} cannot load it "
        f"({type(error).__name__}: {lines[0][:300]}); make it again with this version"
    )
