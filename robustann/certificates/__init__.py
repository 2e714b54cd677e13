"""Proofs that no attack succeeds: lower bounds on robust accuracy, where attacks give upper ones.

Deterministic for linf, by following intervals and linear bounds through the network
(:func:`certify_linf`); statistical for l2, by randomised smoothing (:func:`certify`), which needs
nothing but the model's answers but certifies its smoothed version. :func:`crossed` holds
certificates against attacks.
"""

from __future__ import annotations

from robustann.certificates.intervals import interval_bounds, margin_bounds
from robustann.certificates.linf import LinfCertificate, certify_linf, crossed
from robustann.certificates.smoothing import (
    CurvePoint,
    Smoothed,
    SmoothingCertificate,
    certified_radius,
    certify,
    lower_confidence,
    predict,
)

__all__ = [
    "CurvePoint",
    "LinfCertificate",
    "Smoothed",
    "SmoothingCertificate",
    "certified_radius",
    "certify",
    "certify_linf",
    "crossed",
    "interval_bounds",
    "lower_confidence",
    "margin_bounds",
    "predict",
]
