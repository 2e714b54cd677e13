"""What the sections show, worked out of a result; no HTML here. One file a subject."""

from __future__ import annotations

from robustann.reports.views.advice import Advice, advice
from robustann.reports.views.attacks import Row, rows, spent, telling
from robustann.reports.views.certificate import METHODS, crossed, proven, undecided
from robustann.reports.views.classes import (
    SHADES,
    ClassRow,
    Flip,
    classes,
    flips,
    shade,
    turned,
    weakest,
)
from robustann.reports.views.comparing import MARKS, Entry, side_by_side
from robustann.reports.views.confidence import CONFIDENCES, Calibration, Sure, calibration, sure
from robustann.reports.views.corruptions import (
    SEVERITIES,
    CorruptionCell,
    CorruptionRow,
    corrupted,
    corruption_rows,
)
from robustann.reports.views.counts import broken, correct, distance, in_255ths
from robustann.reports.views.explanations import (
    DriftGroup,
    drift_groups,
    reading,
    sanity,
    shown_path,
)
from robustann.reports.views.hardening import bit_errors, hardened
from robustann.reports.views.overview import Trend
from robustann.reports.views.verdict import (
    VERDICT_RULES,
    VERDICTS,
    Glance,
    Verdict,
    glance,
    knowledge,
    measured,
    verdict,
)
from robustann.reports.views.weights import (
    Storage,
    bit_error_rate,
    bit_error_rows,
    faults,
    hit,
    storages,
)
from robustann.reports.views.words import DEFINITIONS
from robustann.results import MATRIX_LIMIT

__all__ = [
    "CONFIDENCES",
    "DEFINITIONS",
    "MARKS",
    "MATRIX_LIMIT",
    "METHODS",
    "SEVERITIES",
    "SHADES",
    "VERDICTS",
    "VERDICT_RULES",
    "Advice",
    "Calibration",
    "ClassRow",
    "CorruptionCell",
    "CorruptionRow",
    "DriftGroup",
    "Entry",
    "Flip",
    "Glance",
    "Row",
    "Storage",
    "Sure",
    "Trend",
    "Verdict",
    "advice",
    "bit_error_rate",
    "bit_error_rows",
    "bit_errors",
    "broken",
    "calibration",
    "classes",
    "correct",
    "corrupted",
    "corruption_rows",
    "crossed",
    "distance",
    "drift_groups",
    "faults",
    "flips",
    "glance",
    "hardened",
    "hit",
    "in_255ths",
    "knowledge",
    "measured",
    "proven",
    "reading",
    "rows",
    "sanity",
    "shade",
    "shown_path",
    "side_by_side",
    "spent",
    "storages",
    "sure",
    "telling",
    "turned",
    "undecided",
    "verdict",
    "weakest",
]
