"""Train a classifier: one loop, whose step a defense may replace.

The schedule is one cycle of the learning rate (Smith and Topin, "Super-Convergence", 2019,
https://arxiv.org/abs/1708.07120) over SGD with Nesterov momentum, with label smoothing
(Szegedy et al. 2016, https://arxiv.org/abs/1512.00567) and an exponential moving average of the
weights. Everything random derives from (seed, epoch), so a run that was stopped after any epoch and
resumed ends, on CPU, with the same bits as one that was not.
"""

from __future__ import annotations

from robustann.training.config import TrainConfig
from robustann.training.loop import train
from robustann.training.result import TrainResult
from robustann.training.steps import StandardStep, TrainingStep

__all__ = ["StandardStep", "TrainConfig", "TrainResult", "TrainingStep", "train"]
