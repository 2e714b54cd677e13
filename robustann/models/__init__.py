"""Image classifiers that take images in [0, 1], and files that hold them safely."""

from __future__ import annotations

from robustann.models.classifier import ImageClassifier, ModelSpec
from robustann.models.device import resolve_device
from robustann.models.digest import tensor_digest
from robustann.models.io import Sidecar, load_model, save_model
from robustann.models.registry import ARCHITECTURES, create_model
from robustann.models.request import ModelRequest
from robustann.models.resolve import Resolved, resolve_model

__all__ = [
    "ARCHITECTURES",
    "ImageClassifier",
    "ModelRequest",
    "ModelSpec",
    "Resolved",
    "Sidecar",
    "create_model",
    "load_model",
    "resolve_device",
    "resolve_model",
    "save_model",
    "tensor_digest",
]
