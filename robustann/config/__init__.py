"""Audit configurations: read from TOML, overridden by the command line, run to one verdict."""

from __future__ import annotations

from robustann.config.reading import Job, Settings, radii_overrides, resolve
from robustann.config.running import Run, prepare
from robustann.config.schema import USUAL_EPS, AuditFile, json_schema
from robustann.config.writing import TEMPLATE, to_toml

__all__ = [
    "TEMPLATE",
    "USUAL_EPS",
    "AuditFile",
    "Job",
    "Run",
    "Settings",
    "json_schema",
    "prepare",
    "radii_overrides",
    "resolve",
    "to_toml",
]
