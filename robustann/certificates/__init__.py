"""Proofs that no attack succeeds: lower bounds on robust accuracy, where attacks give upper ones.

Deterministic for linf, by following intervals and linear bounds through the network
(:func:`certify_linf`); statistical for l2, by randomised smoothing (:func:`certify`), which needs
nothing but the model's answers but certifies its smoothed version. :func:`crossed` holds
certificates against attacks.
"""

from __future__ import annotations

from robustann.certificates.intervals import interval_bounds, margin_bounds
from robustann.certificates.linf import LinfCertificate, certify_linf, crossed

__all__ = [
    "LinfCertificate",
    "certify_linf",
    "crossed",
    "interval_bounds",
    "margin_bounds",
]
