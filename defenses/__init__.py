"""Defenses: what hardens a model, one file each.

A defense says by itself in which threat models it helps (``helps``) and in which it is known not
to (``limits``). A training objective is a step for :func:`robustann.training.train`.
"""

from __future__ import annotations

from robustann.defenses.adversarial import AdversarialTraining
from robustann.defenses.awp import AdversarialWeightPerturbation
from robustann.defenses.clipping import BitErrorTraining, WeightClipping
from robustann.defenses.detection import Detector, FeatureSqueezing, evaluate_detector
from robustann.defenses.fast import FastAdversarialTraining, NoisyFastAdversarialTraining
from robustann.defenses.free import FreeAdversarialTraining
from robustann.defenses.guard import WeightGuard
from robustann.defenses.ibp import IBPTraining
from robustann.defenses.noise_training import NoiseTraining
from robustann.defenses.sanitizers import SANITIZERS, Sanitized, parse_sanitizer
from robustann.defenses.seal import Manifest, changed_tensors, seal_model, verify_model
from robustann.defenses.steps import AdversarialStep, StepWrapper
from robustann.defenses.trades import MART, TRADES

__all__ = [
    "MART",
    "SANITIZERS",
    "TRADES",
    "AdversarialStep",
    "AdversarialTraining",
    "AdversarialWeightPerturbation",
    "BitErrorTraining",
    "Detector",
    "FastAdversarialTraining",
    "FeatureSqueezing",
    "FreeAdversarialTraining",
    "IBPTraining",
    "Manifest",
    "NoiseTraining",
    "NoisyFastAdversarialTraining",
    "Sanitized",
    "StepWrapper",
    "WeightClipping",
    "WeightGuard",
    "changed_tensors",
    "evaluate_detector",
    "parse_sanitizer",
    "seal_model",
    "verify_model",
]
