"""robustann: train, attack, harden and explain PyTorch image classifiers.

>>> import robustann as ra
>>> data = ra.load_data("digits")
>>> model = ra.train("small-cnn", data, epochs=2).model
>>> result = ra.audit(model, data, ra.ThreatModel("linf", eps=0.1), preset="quick")
>>> result.robust_accuracy <= result.clean_accuracy
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustann.api import attack, audit, harden
    from robustann.attacks import (
        APGD,
        FAB,
        FGSM,
        MM,
        PGD,
        Attack,
        AttackResult,
        Square,
        UniformNoise,
    )
    from robustann.data import ImageData, from_arrays, load_data, tensor_split
    from robustann.errors import DataError, ModelError, RefusedError, RobustannError, UsageError
    from robustann.hardening import HardenResult
    from robustann.models import create_model, load_model, save_model
    from robustann.results import AuditResult
    from robustann.threat import ThreatModel
    from robustann.training import TrainConfig, TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "MM",
    "PGD",
    "Attack",
    "AttackResult",
    "AuditResult",
    "DataError",
    "HardenResult",
    "ImageData",
    "ModelError",
    "RefusedError",
    "RobustannError",
    "Square",
    "ThreatModel",
    "TrainConfig",
    "TrainResult",
    "UniformNoise",
    "UsageError",
    "__version__",
    "attack",
    "audit",
    "create_model",
    "from_arrays",
    "harden",
    "load_data",
    "load_model",
    "save_model",
    "tensor_split",
    "train",
]

# Where each name lives. Looked up on first use: importing torch takes seconds, and
# ``robustann --help`` needs none of it.
_HOMES = {
    "robustann.api": ("attack", "audit", "harden"),
    "robustann.attacks": (
        "APGD",
        "FAB",
        "FGSM",
        "MM",
        "PGD",
        "Attack",
        "AttackResult",
        "Square",
        "UniformNoise",
    ),
    "robustann.data": ("ImageData", "from_arrays", "load_data", "tensor_split"),
    "robustann.errors": (
        "DataError",
        "ModelError",
        "RefusedError",
        "RobustannError",
        "UsageError",
    ),
    "robustann.hardening": ("HardenResult",),
    "robustann.models": ("create_model", "load_model", "save_model"),
    "robustann.results": ("AuditResult",),
    "robustann.threat": ("ThreatModel",),
    "robustann.training": ("TrainConfig", "TrainResult", "train"),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'robustann' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
