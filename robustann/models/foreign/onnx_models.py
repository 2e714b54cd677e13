"""ONNX: as a PyTorch network where that gives the same answers, else as a black box."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustann.errors import DamagedError, ModelError, RefusedError, UsageError
from robustann.extras import need
from robustann.models.foreign.adapters import Carried, FixedBatch, Network
from robustann.models.onnx_facts import onnx_facts
from robustann.models.sniffing import read_once
from robustann.models.weights import check_pin

# Of the spread of the logits: kernels of two libraries round differently.
_TOLERANCE = 1e-3
_CHECKED = 16
# Versions of the operators that converters know best.
_CONVERTIBLE = (17, 13)
_MAX_PROTOBUF = 2**31 - 1


class BlackBox(nn.Module):
    """An ONNX graph run by onnxruntime on the CPU: scores, no gradients.

    Args:
        content: the serialised model, with all its data inside.
        dtype: of its input.
        output: name of the output to take.

    Raises:
        ModelError: onnxruntime cannot run it.
    """

    def __init__(self, content: bytes, output: str, dtype: Any) -> None:
        super().__init__()
        runtime = need("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        # One thread, so that sums are always added in the same order.
        options.intra_op_num_threads = 1
        try:
            self._session = runtime.InferenceSession(
                content,
                options,
                providers=["CPUExecutionProvider"],
                # It would try the same once more, and print about it.
                enable_fallback=0,
                # A file has no say in how it is run.
                read_config_from_model=0,
            )
        except Exception as error:
            raise ModelError(
                f"onnxruntime cannot run the model ({type(error).__name__}: {str(error)[:300]}); "
                "export it again, for a version of ONNX that onnxruntime knows"
            ) from error
        self._content, self._output, self._dtype = content, output, dtype
        self._input = self._session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, classes)."""
        array = np.ascontiguousarray(images.detach().cpu().numpy().astype(self._dtype))
        try:
            (scores,) = self._session.run([self._output], {self._input: array})
        except Exception as error:
            raise ModelError(
                f"onnxruntime failed on images of shape {tuple(images.shape)} "
                f"({str(error)[:300]}); give the size that the model takes with --input-size"
            ) from error
        found = torch.from_numpy(np.array(scores, dtype=np.float32))
        return found.flatten(1).to(images.device)

    def __deepcopy__(self, memo: object) -> BlackBox:
        # A session cannot be copied; it holds nothing that changes.
        return BlackBox(self._content, self._output, self._dtype)


def open_onnx(path: Path, content: bytes, sha256: str | None = None) -> Network:
    """The network in an ONNX file.

    Args:
        path: where it lies; data outside the file must lie in the same folder.
        content: its bytes.
        sha256: what the SHA-256 must be of these and the data outside, one after the other.

    Raises:
        UsageError: onnx or onnxruntime is not installed.
        RefusedError: it refers to data outside its folder, or is not what was pinned.
        DamagedError: it is damaged.
        ModelError: it is no image classifier.
    """
    onnx = need("onnx", "onnx")
    need("onnx.version_converter", "onnx")
    need("onnxruntime", "onnx")
    sha = hashlib.sha256(content)
    if not onnx_facts(content).external:
        check_pin(sha.hexdigest(), sha256, f"'{path}'")
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:
        raise DamagedError(
            f"expected an ONNX file in '{path}', reading it failed with {type(error).__name__}: "
            f"{str(error)[:200]}; copy it again"
        ) from error
    outside = _bring_inside(onnx, model, path, sha)
    files = " ".join([path.name, *outside])
    hint = f". The pin of a model in several files is what 'cat {files} | sha256sum' prints"
    check_pin(sha.hexdigest(), sha256, f"'{path}'", hint if outside else "")
    if outside:
        if model.ByteSize() > _MAX_PROTOBUF:
            raise ModelError(
                f"expected at most 2 GiB in '{path}' and its data, got {model.ByteSize()} bytes"
            )
        content = model.SerializeToString()
    shape, dtype = _input(onnx, model, path)
    batch, channels, height, width = shape
    output = _output(onnx, model, path)
    box: nn.Module = BlackBox(content, output, dtype)
    if batch is not None:
        box = FixedBatch(box, batch)
    carried = Carried(
        path.name,
        channels=channels,
        size=(height, width) if height is not None and width is not None else None,
    )

    def choose(images: Tensor) -> tuple[nn.Module, tuple[str, ...]]:
        return _choose(onnx, model, box, batch, images)

    return Network(box, "ONNX", carried, sha256=sha.hexdigest(), replace=choose)


def _choose(
    onnx: Any, model: Any, box: nn.Module, batch: int | None, images: Tensor
) -> tuple[nn.Module, tuple[str, ...]]:
    """The PyTorch network if there is one that agrees on these images, else the black box."""
    alone = (
        "it is run by onnxruntime as a black box: attacks by scores and by the predicted class "
        "apply, those by gradients do not"
    )
    try:
        onnx2torch = need("onnx2torch", "onnx")
    except UsageError as error:
        return box, (f"ONNX: {error}; until then {alone}",)
    reasons = []
    for version in (None, *_CONVERTIBLE):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                net = onnx2torch.convert(_prepared(onnx, model, version)).float().eval()
            if batch is not None:
                net = FixedBatch(net, batch)
            with torch.no_grad():
                ours, theirs = net(images[:_CHECKED]), box(images[:_CHECKED])
            break
        # Whatever a converter raises for an operator that it does not know.
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reasons.append(lines[0][:200])
    else:
        return box, (f"ONNX: onnx2torch cannot convert it ({reasons[0]}); {alone}",)
    if not isinstance(ours, Tensor) or ours.shape != theirs.shape:
        return box, (f"ONNX: what onnx2torch made of it has another output; {alone}",)
    spread = float((theirs.amax(1) - theirs.amin(1)).median())
    change = float((ours - theirs).abs().max()) / max(spread, 1e-12)
    if not change <= _TOLERANCE or not ours.argmax(1).equal(theirs.argmax(1)):
        return box, (
            f"ONNX: what onnx2torch made of it differs from onnxruntime by {change:.2g} of the "
            f"spread of the outputs; {alone}",
        )
    return net, (
        f"ONNX: converted by onnx2torch, which agrees with onnxruntime on {len(ours)} images of "
        f"the data (largest difference {change:.1g} of the outputs' spread)",
    )


def _prepared(onnx: Any, model: Any, version: int | None) -> Any:
    """A copy without Identity nodes, its operators of the given version.

    Exporters put an Identity where two layers share a weight, which converters do not expect.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    if version is not None:
        made = onnx.version_converter.convert_version(made, version)
    graph = made.graph
    kept = {value.name for value in graph.output}
    same: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = same.get(name, name)
        if node.op_type == "Identity" and not node.domain and node.output[0] not in kept:
            same[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    inner = any(attribute.g.node or attribute.graphs for node in nodes
                for attribute in node.attribute)  # fmt: skip
    # Graphs inside nodes may use the names that would be gone.
    if same and not inner:
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
        return made
    made.CopyFrom(model)
    return made if version is None else onnx.version_converter.convert_version(made, version)


def _tensors(onnx: Any, message: Any) -> Iterator[Any]:
    """All tensors in a message, wherever ONNX allows them, now or in a later version."""
    left = [message]
    while left:
        one = left.pop()
        if isinstance(one, onnx.TensorProto):
            yield one
            continue
        for kind, value in one.ListFields():
            if kind.type == kind.TYPE_MESSAGE:
                left += [value] if hasattr(value, "ListFields") else value


def _bring_inside(onnx: Any, model: Any, path: Path, sha: Any) -> list[str]:
    """Put data that lie in other files into the model; their names, as they were hashed."""
    external = onnx.TensorProto.EXTERNAL
    held: dict[str, bytes] = {}
    for tensor in list(_tensors(onnx, model)):
        if tensor.data_location != external and not tensor.external_data:
            continue
        facts = {entry.key: entry.value for entry in tensor.external_data}
        location = facts.get("location", "")
        if location not in held:
            held[location] = read_once(_inside(path, location))
            sha.update(held[location])
        data = held[location]
        try:
            offset = int(facts.get("offset") or 0)
            length = int(facts["length"]) if facts.get("length") else len(data) - offset
        except ValueError:
            offset, length = -1, -1
        if not 0 <= offset <= offset + length <= len(data):
            raise DamagedError(
                f"'{path}' asks for bytes of '{location}' that are not there; copy both again"
            )
        tensor.raw_data = data[offset : offset + length]
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT
    return list(held)


def _inside(path: Path, location: str) -> Path:
    """Where the data lie, if that is in the folder of the model."""
    folder = path.parent.resolve()
    parts = PurePosixPath(location.replace("\\", "/"))
    wrong = (
        not location
        or "\0" in location
        or parts.is_absolute()
        or ".." in parts.parts
        or ":" in location
    )
    target = folder if wrong else folder / Path(*parts.parts)
    # A link inside the folder may lead out of it.
    if wrong or os.path.commonpath([folder, target.resolve()]) != str(folder):
        raise RefusedError(
            f"'{path}' asks for data outside its own folder ({location!r:.100}); if you trust it, "
            "save it again with all data inside the file"
        )
    if not target.is_file():
        raise ModelError(
            f"'{path}' keeps data in '{location}', which is not there; copy that file beside it"
        )
    return target


def _input(
    onnx: Any, model: Any, path: Path
) -> tuple[tuple[int | None, int | None, int | None, int | None], Any]:
    """Shape (None where it is free) and type of the images."""
    held = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in held]
    if len(inputs) != 1:
        raise ModelError(
            f"expected '{path}' to take one batch of images, got {len(inputs)} inputs "
            f"({', '.join(value.name for value in inputs[:5])}); export the classifier alone"
        )
    kind = inputs[0].type.tensor_type
    shape = [
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None
        for dim in kind.shape.dim
    ]
    if len(shape) != 4:
        raise ModelError(
            f"expected '{path}' to take images (N, C, H, W), got an input of {len(shape)} "
            "dimensions; export a network that takes images"
        )
    if shape[1] is not None and shape[1] > 4 and shape[3] is not None and shape[3] <= 4:
        raise ModelError(
            f"expected '{path}' to take images (N, C, H, W), got {tuple(shape)}, which looks like "
            "channels last; export it channels first, or wrap it in Python with "
            "robustann.interop.from_callable"
        )
    types = onnx.TensorProto
    numpy_types = {types.FLOAT: np.float32, types.FLOAT16: np.float16, types.DOUBLE: np.float64}
    if kind.elem_type not in numpy_types:
        known = kind.elem_type in types.DataType.values()
        name = types.DataType.Name(kind.elem_type) if known else f"number {kind.elem_type}"
        raise ModelError(
            f"expected '{path}' to take floating-point images, got the type {name}; export it "
            "without the integer input"
        )
    return (shape[0], shape[1], shape[2], shape[3]), numpy_types[kind.elem_type]


def _output(onnx: Any, model: Any, path: Path) -> str:
    """Name of the scores: the first output of floating-point numbers."""
    types = onnx.TensorProto
    floats = (types.FLOAT, types.FLOAT16, types.DOUBLE)
    for value in model.graph.output:
        if value.type.tensor_type.elem_type in floats:
            return str(value.name)
    raise ModelError(
        f"expected '{path}' to give scores, got no output of floating-point numbers; export the "
        "classifier with its logits"
    )
