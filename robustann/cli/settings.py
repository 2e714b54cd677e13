"""The options of an audit, and where a configuration file keeps what they say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from robustann.cli.options import (
    combine,
    data_options,
    device_option,
    model_options,
    seed_option,
    threat_options,
)

if TYPE_CHECKING:
    from robustann.config import Settings

# Section and key of each option.
PLACES = {
    "model": ("model", "path"),
    "arch": ("model", "arch"),
    "factory": ("model", "factory"),
    "class_names": ("model", "class_names"),
    "mean": ("model", "mean"),
    "std": ("model", "std"),
    "bounds": ("model", "bounds"),
    "input_size": ("model", "input_size"),
    "model_sha256": ("model", "sha256"),
    "smoothing": ("model", "smoothing"),
    "sanitize": ("model", "sanitize"),
    "device": ("model", "device"),
    "data_spec": ("data", "name"),
    "data_root": ("data", "root"),
    "download": ("data", "download"),
    "image_size": ("data", "image_size"),
    "weights": ("threats", "weights"),
    "corruptions": ("threats", "corruptions"),
    "certify": ("threats", "certify"),
    "preset": ("attacks", "preset"),
    "attacks": ("attacks", "run"),
    "surrogate": ("attacks", "surrogate"),
    "budget": ("attacks", "budget"),
    "max_samples": ("attacks", "max_samples"),
    "batch_size": ("attacks", "batch_size"),
    "seed": ("attacks", "seed"),
    "trust": ("attacks", "trust"),
    "curve": ("attacks", "curve"),
    "precision": ("attacks", "precision"),
    "channels_last": ("attacks", "channels_last"),
    "compile": ("attacks", "compile"),
    "tune": ("attacks", "tune"),
    "explain": ("explanation", "enabled"),
    "attributions": ("explanation", "methods"),
    "fail_under": ("gates", "fail_under"),
    "max_drop": ("gates", "max_drop"),
    "baseline": ("gates", "baseline"),
    "gate_on": ("gates", "gate_on"),
    "strict": ("gates", "strict"),
    "output_dir": ("output", "folder"),
    "junit": ("output", "junit"),
    "sarif": ("output", "sarif"),
    "markdown": ("output", "markdown"),
    "model_card": ("output", "model_card"),
}


def _file(option: str, name: str, metavar: str, text: str) -> Any:
    return click.option(option, name, type=click.Path(path_type=Path), metavar=metavar, help=text)


audit_options = combine(
    model_options,
    data_options,
    threat_options,
    click.option("--preset", default="standard", show_default=True, metavar="NAME",
                 help="quick, standard or thorough (see 'robustann list presets')."),
    click.option("--attack", "attacks", multiple=True, metavar="NAME[:OPTION=VALUE,...]",
                 help="Run this attack instead of the preset's; can be repeated. "
                 "For example pgd:steps=100,loss=margin."),
    _file("--surrogate", "surrogate", "FILE",
          "Another model for the same classes, as 'robustann train' writes them, which an attacker "
          "may have: what fools it is tried on this one too."),
    click.option("--max-samples", type=click.IntRange(min=1), metavar="NUMBER",
                 help="Audit so many images, drawn at random, the same for every seed."),
    click.option("--batch-size", default="auto", show_default=True, metavar="NUMBER|auto",
                 help="Images a batch; auto tries. It changes speed and memory, not the result."),
    click.option("--budget", metavar="NUMBER|TIME",
                 help="Propagations that an image may cost in all attacks together, or the time "
                 "that the audit may take, such as 90s, 10min or 2h. Propagations of curve "
                 "and checks come on top.  [default: the preset's]"),
    click.option("--trust/--no-trust", default=True, show_default=True,
                 help="Check that the evaluation can be believed; adapt to a model that would "
                 "mislead it."),
    click.option("--strict/--no-strict", default=False,
                 help="Exit with 5 where it cannot be believed."),
    click.option("--curve/--no-curve", default=True, show_default=True,
                 help="Measure robust accuracy at other eps too."),
    click.option("--explain/--no-explain", default=True, show_default=True,
                 help="Compute attributions."),
    click.option("--attribution", "attributions", multiple=True, metavar="NAME",
                 help="One more method of attribution: input-x-gradient, smoothgrad, gradient-shap "
                 "or occlusion. Can be repeated."),
    click.option("--weights/--no-weights", default=False,
                 help="Ask too what happens if bits of the stored weights are wrong, by accident "
                 "or by choice."),
    click.option("--corruptions/--no-corruptions", default=False,
                 help="Measure accuracy under noise, blur, brightness, contrast and JPEG too: a "
                 "control, nobody attacks."),
    click.option("--certify/--no-certify", default=False,
                 help="Prove too what no attack can break: in linf by bounds through the layers, "
                 "in l2 with --smoothing."),
    click.option("--smoothing", type=click.FloatRange(min=0, min_open=True), metavar="SIGMA",
                 help="Audit the smoothed classifier: what the model says most often under "
                 "Gaussian noise of this standard deviation."),
    click.option("--sanitize", multiple=True, metavar="NAME[:OPTION=VALUE,...]",
                 help="Audit the model behind this sanitizer, which the attacker knows; can be "
                 "repeated, in the order in which images pass. For example jpeg:quality=75."),
    _file("--output-dir", "output_dir", "FOLDER",
          "For results.json, samples.csv, report.html and summary.json.  "
          "[default: runs/audit-MODEL]"),
    click.option("--fail-under", multiple=True, metavar="METRIC=SHARE",
                 help="Exit with 1 where clean_accuracy, robust_accuracy, certified_accuracy, "
                 "worst_class_recall, worst_class_robust_recall or believable is lower; can be "
                 "repeated, the largest share of a metric counts. For example "
                 "robust_accuracy=0.40. By default the lower end of the 95 % interval is compared, "
                 "which never reaches 1.0; --gate-on point compares the figure."),
    click.option("--max-drop", multiple=True, metavar="METRIC=POINTS",
                 help="Exit with 1 where the metric may have fallen by more percentage points "
                 "since the --baseline; can be repeated, the smallest counts."),
    _file("--baseline", "baseline", "RESULTS.JSON",
          "Of an earlier audit of the same data in the same threat model, or the folder of one."),
    click.option("--gate-on", type=click.Choice(["lower", "point"]), default="lower",
                 show_default=True,
                 help="Compare the lower end of the 95 % interval, or the figure."),
    _file("--junit", "junit", "FILE.xml", "Write JUnit XML too: a case for each gate and check."),
    _file("--sarif", "sarif", "FILE.sarif",
          "Write failed gates and checks, or a refused model, as SARIF 2.1.0 too."),
    _file("--markdown", "markdown", "FILE.md", "Write a summary for a pull request too."),
    _file("--model-card", "model_card", "FILE.md", "Write a model card too."),
    seed_option,
    device_option,
    click.option("--precision", type=click.Choice(["float32", "bf16", "fp16"]), default="float32",
                 show_default=True,
                 help="What attacks search in. What they find is judged in float32."),
    click.option("--channels-last/--no-channels-last", default=False,
                 help="Run attacks in this memory format."),
    click.option("--compile/--no-compile", default=False,
                 help="Run attacks through torch.compile."),
    click.option("--tune/--no-tune", default=False,
                 help="Time a batch in lower precision and channels last first; use what is more "
                 "than 5 % faster on this machine."),
)  # fmt: skip


def settings_of(context: click.Context, path: Path | None) -> Settings:
    """What the file at ``path`` says, overridden by the options that were given."""
    from robustann.auditing.gates import parse_drop, parse_gate
    from robustann.config import radii_overrides, resolve

    options = context.params
    given = {
        name
        for name in options
        if context.get_parameter_source(name)
        in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    }
    overrides: dict[str, dict[str, Any]] = {}
    for name in given & set(PLACES):
        section, key = PLACES[name]
        value = options[name]
        if name == "fail_under":
            value = _strictest(map(parse_gate, value), max)
        elif name == "max_drop":
            value = _strictest(map(parse_drop, value), min)
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Path):
            value = str(value)
        overrides.setdefault(section, {})[key] = value
    if "arch" in given and "factory" not in given:
        overrides["model"]["factory"] = None
    if "factory" in given and "arch" not in given:
        overrides["model"]["arch"] = None
    norm, eps = (options[name] if name in given else None for name in ("norm", "eps"))
    overrides.setdefault("threats", {}).update(radii_overrides(path, norm, eps))
    return resolve(path, overrides)


def _strictest(pairs: Any, choose: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric, threshold in pairs:
        found[metric] = choose(threshold, found.get(metric, threshold))
    return found
