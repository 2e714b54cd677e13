"""Hardening: what makes a model harder to attack, measured before and after."""

from __future__ import annotations

from robustann.hardening.comparing import paired
from robustann.hardening.harden import HardenResult
from robustann.hardening.sanitized import SanitizedResult, measure_sanitizer

__all__ = ["HardenResult", "SanitizedResult", "measure_sanitizer", "paired"]
