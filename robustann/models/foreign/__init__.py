"""Models in the forms of other projects, made into modules that take images in [0, 1]."""

from __future__ import annotations

from robustann.models.foreign.adapters import Carried, ForeignClassifier, Network

__all__ = ["Carried", "ForeignClassifier", "Network"]
