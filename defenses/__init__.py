"""Defenses: what hardens a model, one file each.

A defense says by itself in which threat models it helps (``helps``) and in which it is known not
to (``limits``). A training objective is a step for :func:`robustann.training.train`.
"""

from __future__ import annotations

from robustann.defenses.adversarial import AdversarialTraining
from robustann.defenses.sanitizers import SANITIZERS, Sanitized, parse_sanitizer

__all__ = ["SANITIZERS", "AdversarialTraining", "Sanitized", "parse_sanitizer"]
