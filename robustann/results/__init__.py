"""The values that an audit yields, and their JSON form.

Everything a report, a gate or another program may ask of an audit is here. ``execution`` holds
whatever differs between two runs of the same audit (times, batch size, device, command line);
all other fields are the same for the same seed, model and data, whatever the batch size.
"""

from __future__ import annotations

from robustann.results.audit import SCHEMA_VERSION, AuditResult, Gate
from robustann.results.certificate import Certificate, CertifiedPoint
from robustann.results.corruptions import CorruptionLevel, Corruptions, CorruptionScores
from robustann.results.explanation import (
    Attribution,
    Drift,
    DriftStatistics,
    Explanation,
    GallerySample,
    MapQuality,
    PathPoint,
)
from robustann.results.hardening import (
    AttackerWay,
    DefenseUsed,
    DetectorFound,
    DetectorRates,
    Hardening,
    HardeningStage,
    Paired,
    StoredError,
)
from robustann.results.outcomes import (
    AttackOutcome,
    AttackSamples,
    CleanSamples,
    CurvePoint,
    WorstCase,
)
from robustann.results.protocol import Protocol
from robustann.results.provenance import Execution, Provenance, Seal, Threat, Tuned
from robustann.results.scores import MATRIX_LIMIT, ClassScores, Interval, Scores
from robustann.results.weights import BitErrorLevel, BitErrors, BitFlip, BitSearch, Weights

__all__ = [
    "MATRIX_LIMIT",
    "SCHEMA_VERSION",
    "AttackOutcome",
    "AttackSamples",
    "AttackerWay",
    "Attribution",
    "AuditResult",
    "BitErrorLevel",
    "BitErrors",
    "BitFlip",
    "BitSearch",
    "Certificate",
    "CertifiedPoint",
    "ClassScores",
    "CleanSamples",
    "CorruptionLevel",
    "CorruptionScores",
    "Corruptions",
    "CurvePoint",
    "DefenseUsed",
    "DetectorFound",
    "DetectorRates",
    "Drift",
    "DriftStatistics",
    "Execution",
    "Explanation",
    "GallerySample",
    "Gate",
    "Hardening",
    "HardeningStage",
    "Interval",
    "MapQuality",
    "Paired",
    "PathPoint",
    "Protocol",
    "Provenance",
    "Scores",
    "Seal",
    "StoredError",
    "Threat",
    "Tuned",
    "Weights",
    "WorstCase",
]
