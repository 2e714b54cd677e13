"""Audits: attack a model in every way asked for, and keep what each sample went through."""

from __future__ import annotations

from robustann.auditing.costs import Estimate
from robustann.auditing.gates import METRICS, parse_gate, with_gates
from robustann.auditing.partial import forget
from robustann.auditing.presets import PRESETS, AuditConfig, Preset, get_preset
from robustann.auditing.rows import Cases
from robustann.auditing.runner import Audit
from robustann.auditing.selection import chosen_samples

__all__ = [
    "METRICS",
    "PRESETS",
    "Audit",
    "AuditConfig",
    "Cases",
    "Estimate",
    "Preset",
    "chosen_samples",
    "forget",
    "get_preset",
    "parse_gate",
    "with_gates",
]
