"""Configurations as text: resolved ones, and a template to start from."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import BaseModel

from robustann.config.schema import USUAL_EPS, AuditFile


def to_toml(values: AuditFile) -> str:
    """A resolved configuration as TOML: every key with its value, or commented out if it has none.

    Reading the text gives the same configuration.

    >>> "[data]\\nname = \\"digits\\"\\n" in to_toml(AuditFile())
    True
    """
    parts = []
    for section in AuditFile.model_fields:
        table: BaseModel = getattr(values, section)
        lines = [f"[{section}]"]
        lines += [_line(key, value) for key, value in table]
        parts.append("\n".join(lines) + "\n")
    text = "\n".join(parts)
    if not any(getattr(values.threats, norm) for norm in USUAL_EPS):
        return text.replace("# linf is not set", f'linf = ["{USUAL_EPS["linf"]}"]', 1)
    return text


def _line(key: str, value: object) -> str:
    return f"# {key} is not set" if value is None else f"{key} = {_value(value)}"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_value(str(k))} = {_value(v)}" for k, v in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    # JSON's escapes are TOML's; but TOML wants DEL escaped too, and has no lone surrogates.
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


TEMPLATE = """\
# Configuration of 'robustann audit --config audit.toml'. Lines behind # are defaults, or examples
# where there is no default. Options on the command line override this file. Relative paths start
# at the current folder. 'robustann config show audit.toml' prints what a run would use.

[model]
# A file as --model takes it: .safetensors, .pt, .onnx, ...
path = "model.safetensors"
# The network that the weights belong to, where no .json beside them says so. A
# pkg.module:function is code: it runs only with --allow-code-execution.
# arch = "torchvision:resnet18"
# Or, instead of arch, code that returns the network.
# factory = "mine.nets:make"
# class_names = ["cat", "dog"]
# mean = [0.485, 0.456, 0.406]
# std = [0.229, 0.224, 0.225]
# bounds = [0, 1]
# input_size = 224
# sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
# Audit the smoothed classifier, under Gaussian noise of this standard deviation.
# smoothing = 0.25
# Audit the model behind sanitizers, which the attacker knows.
# sanitize = ["jpeg:quality=75"]
# device = "cpu"

[data]
# digits, mnist, fashion-mnist, cifar10, cifar100, imagefolder:PATH, ...
name = "digits"
# root = "data"
# download = false
# image_size = 224

[threats]
# Each radius of each norm is audited by itself: a number, "8/255", or a list of these.
linf = "8/255"
l2 = 0.5
# l1 = 12
# l0 = 10
# What if bits of the stored weights are wrong?
# weights = false
# What do noise, blur, brightness, contrast and JPEG do, where nobody attacks?
# corruptions = false
# Prove too what no attack can break.
# certify = false

[attacks]
# quick, standard or thorough: see 'robustann list presets'.
preset = "standard"
# Instead of the preset's attacks:
# run = ["pgd:steps=100,restarts=5"]
# What fools another model is tried on this one too.
# surrogate = "surrogate.safetensors"
# Propagations an image, or a time for each threat model.
# budget = "10min"
# max_samples = 1000
# batch_size = "auto"
# seed = 0
# trust = true
# curve = true
# What attacks search in: "bf16" or "fp16" on GPUs. What they find is judged in float32.
# precision = "float32"
# channels_last = false
# compile = false
# Time a batch with each precision and memory format first; use what is faster.
# tune = false

[explanation]
# enabled = true
# methods = ["input-x-gradient", "smoothgrad", "gradient-shap", "occlusion"]

[gates]
# Shares from 0 to 1. A name such as "robust_accuracy@l2" means one threat model.
# fail_under = { clean_accuracy = 0.9, robust_accuracy = 0.4, "robust_accuracy@l2" = 0.5 }
# How many percentage points each may be lower than in an earlier audit.
# max_drop = { robust_accuracy = 2 }
# baseline = "baseline/results.json"
# "lower" compares the lower end of the 95 % interval, "point" the figure.
# gate_on = "lower"
# Exit with 5 where the evaluation cannot be believed.
# strict = false

[output]
# folder = "runs/audit"
# junit = "runs/audit/junit.xml"
# sarif = "runs/audit/robustann.sarif"
# markdown = "runs/audit/summary.md"
# model_card = "runs/audit/MODEL_CARD.md"
"""
