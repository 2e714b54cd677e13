"""The verdict over the audits of a run, in the forms that other programs and people read.

Everything here shows results and decides nothing but the one verdict.
"""

from __future__ import annotations

from robustann.outputs.junit import junit
from robustann.outputs.pages import model_card, summary_page
from robustann.outputs.sarif import sarif
from robustann.outputs.verdict import Audited, Verdict, conclude, summary_json

__all__ = [
    "Audited",
    "Verdict",
    "conclude",
    "junit",
    "model_card",
    "sarif",
    "summary_json",
    "summary_page",
]
