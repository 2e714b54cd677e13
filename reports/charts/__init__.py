"""Charts as inline SVG. All text and numbers pass through markupsafe; colours are CSS classes."""

from __future__ import annotations

from robustann.reports.charts.bars import dumbbell, meter
from robustann.reports.charts.confidence import histograms, reliability
from robustann.reports.charts.course import effort, trend
from robustann.reports.charts.detector import roc
from robustann.reports.charts.eps import curve, curves
from robustann.reports.charts.weights import bit_errors

__all__ = [
    "bit_errors",
    "curve",
    "curves",
    "dumbbell",
    "effort",
    "histograms",
    "meter",
    "reliability",
    "roc",
    "trend",
]
