"""Is an evaluation to be believed? Checks before, after and beside the attacks."""

from robustann.trust.checks import CHECKS, Check, combine
from robustann.trust.diagnosis import Diagnosis, diagnose

__all__ = ["CHECKS", "Check", "Diagnosis", "combine", "diagnose"]
