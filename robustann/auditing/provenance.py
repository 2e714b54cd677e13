"""What an audit is of: as the result tells it, and as a stopped one is known again by."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from robustann.attacks.engine import model_device, predict_logits
from robustann.auditing.presets import AuditConfig
from robustann.auditing.remedies import Plan
from robustann.auditing.shown import Shown
from robustann.certificates import Smoothed
from robustann.data import Split
from robustann.models import tensor_digest
from robustann.results import Provenance


def provenance_of(
    config: AuditConfig,
    model: nn.Module,
    split: Split,
    positions: Tensor,
    *,
    model_name: str,
    data_name: str,
) -> Provenance:
    """What makes the audit repeatable."""
    return Provenance(
        versions={
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("robustann", "torch", "captum")},
        },
        seed=config.seed,
        model=model_name,
        model_sha256=tensor_digest(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        data=data_name,
        data_sha256=split.digest(positions),
        preset=None if config.attacks is not None else config.preset,
        config={
            "norm": config.threat.norm,
            "eps": config.threat.eps,
            "attacks": [attack.label for attack in config.chosen],
            "cascade": config.cascade,
            "budget": config.budget,
            "minutes": config.minutes,
            "max_samples": config.max_samples,
            "trust": config.trust,
            "curve": config.curve,
            "explain": config.explain,
            **({"attributions": [*config.attributions]} if config.attributions else {}),
            "certify": config.certify,
            "smoothing": model.sigma if isinstance(model, Smoothed) else None,
            "weights": config.weights,
            **({"corruptions": True} if config.corruptions else {}),
            **({} if config.precision == "float32" else {"precision": config.precision}),
            **({"channels_last": True} if config.channels_last else {}),
            **({"compile": True} if config.compile else {}),
            **({"tune": True} if config.tune else {}),
        },
    )


def identity(
    config: AuditConfig,
    model: nn.Module,
    split: Split,
    sample: Tensor,
    made: Plan,
    provenance: Provenance,
    shown: Sequence[Shown],
) -> dict[str, Any]:
    """Everything that what a stopped audit left depends on, as JSON values."""
    # Tensors do not say what a model does with them: its answers do.
    logits = predict_logits(model, split.images(sample[:8]).cpu(), seed=config.seed)
    facts = {
        **provenance.model_dump(mode="json", exclude={"model", "data"}),
        "bounds": list(config.threat.bounds),
        "minutes": config.minutes,
        "architecture": repr(model),
        "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
        "stages": [repr(one) for one in (*made.stages, *config.check, *config.escalation)],
        "draws": made.draws,
        "shown": [one.digest for one in shown],
        "device": model_device(model).type,
    }
    return json.loads(json.dumps(facts))  # type: ignore[no-any-return]


def device_name(device: torch.device) -> str:
    """With the name of the card, where it is one."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
