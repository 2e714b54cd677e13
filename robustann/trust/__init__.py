"""Is an evaluation to be believed? Checks before, after and beside the attacks."""

from robustann.trust.checks import CHECKS, Check, combine
from robustann.trust.diagnosis import Diagnosis, diagnose
from robustann.trust.probing import Probed, probe
from robustann.trust.reviewing import budget_cut, losses_used, review, surrogate_agrees

__all__ = [
    "CHECKS",
    "Check",
    "Diagnosis",
    "Probed",
    "budget_cut",
    "combine",
    "diagnose",
    "losses_used",
    "probe",
    "review",
    "surrogate_agrees",
]
