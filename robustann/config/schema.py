"""The sections and keys of an audit configuration, and what their values may be.

Values are checked by the same functions as those of the command line, so that both say the same
about a mistake.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
)

from robustann.attacks import parse_attack
from robustann.auditing import get_preset
from robustann.auditing.gates import METRICS, check_metric, check_points, check_share
from robustann.data import check_name
from robustann.defenses.sanitizers import parse_sanitizer
from robustann.errors import UsageError
from robustann.reports.explain.methods import More
from robustann.threat import NORMS, Norm, ThreatModel

# The field's usual radii for 32x32 colour images.
USUAL_EPS: dict[str, str] = {"linf": "8/255", "l2": "0.5", "l1": "12", "l0": "10"}

_LONGEST = 4096
_RADIUS = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]}
_NUMBERS = {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]}


def _radii(value: object, info: ValidationInfo) -> list[str] | None:
    """One radius, or a list of them, as text."""
    if value is None:
        return None
    given = value if isinstance(value, list) else [value]
    if not given:
        raise UsageError("expected a radius such as 0.1 or \"8/255\", got an empty list; "
                         "leave the norm out")  # fmt: skip
    found = []
    for one in given:
        if isinstance(one, bool) or not isinstance(one, (int, float, str)):
            raise UsageError(f"expected a radius such as 0.1 or \"8/255\", got {shown(one)}; "
                             "write a number or a fraction as text")  # fmt: skip
        text = one.strip() if isinstance(one, str) else repr(one)
        ThreatModel(info.field_name, text)  # type: ignore[arg-type]
        found.append(text)
    return found


def _listed(value: object) -> object:
    """Numbers or names as the text that the command line takes."""
    if not isinstance(value, list):
        return value
    parts = []
    for one in value:
        if isinstance(one, bool) or not isinstance(one, (int, float, str)):
            raise UsageError(f"expected numbers or text in the list, got {shown(one)}; correct it")
        text = one if isinstance(one, str) else repr(one)
        if "," in text:
            raise UsageError(f"expected no comma in '{text}'; write a file with one a line, and "
                             "name the file")  # fmt: skip
        parts.append(text)
    return ",".join(parts)


def _as_text(value: object) -> object:
    """A whole number as text; the rest as it is."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _preset(value: object) -> object:
    if isinstance(value, str):
        get_preset(value)
    return value


def _attacks(value: object) -> object:
    if isinstance(value, list):
        for one in value:
            if isinstance(one, str):
                parse_attack(one)
    return value


def _sanitizers(value: object) -> object:
    if isinstance(value, list):
        for one in value:
            if isinstance(one, str):
                parse_sanitizer(one)
    return value


def _batch_size(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    try:
        number = int(value) if isinstance(value, str) else 0
    except ValueError:
        number = 0
    if number < 1:
        raise UsageError(
            f"expected a number or 'auto', and batch_size >= 1, got {shown(value)}; correct it"
        )
    return number


def parse_budget(value: object) -> tuple[int | None, float | None]:
    """A budget as propagations an image, or as minutes.

    Raises:
        UsageError: it is neither.

    >>> parse_budget("300"), parse_budget("90s"), parse_budget("2h")
    ((300, None), (None, 1.5), (None, 120.0))
    """
    text = str(value).strip()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(number) :].strip()
    per_minute = {"s": 1 / 60, "min": 1.0, "h": 60.0}
    try:
        if not isinstance(value, bool):
            if not unit and int(number) >= 1:
                return int(number), None
            if unit in per_minute and 0 < float(number) < math.inf:
                return None, float(number) * per_minute[unit]
    except ValueError:
        pass
    raise UsageError(
        "expected propagations an image such as 300, or a time such as 90s, 10min or 2h, got "
        f"{shown(value)}; correct the budget"
    )


def _budget(value: object) -> object:
    if value is None:
        return None
    parse_budget(value)
    return value if isinstance(value, int) else str(value).strip()


def _demands(check: Callable[[str, float | str], float], drop: bool) -> Callable[[object], object]:
    def checked(value: object) -> object:
        if not isinstance(value, dict):
            return value
        found = {}
        for metric, threshold in value.items():
            check_metric(metric, drop=drop)
            if metric.startswith("believable") and threshold is True:
                threshold = 1
            if isinstance(threshold, bool) or not isinstance(threshold, (int, float, str)):
                raise UsageError(f"expected a number for {metric}, got {shown(threshold)}; "
                                 "for example 0.40")  # fmt: skip
            found[metric] = check(metric, threshold)
        return found

    return checked


def _ending(*suffixes: str) -> Callable[[object], object]:
    """A file that is written on the word of a configuration must be recognisable as a report."""

    def checked(value: object) -> object:
        if isinstance(value, str) and PurePath(value).suffix.lower() not in suffixes:
            raise UsageError(
                f"expected a file name that ends in {' or '.join(suffixes)}, got {shown(value)}; "
                "rename it"
            )
        return value

    return checked


def shown(value: object) -> str:
    """A value from outside, for an error message: short, on one line.

    >>> shown("a\\nb"), len(shown("x" * 999))
    ("'a\\\\nb'", 60)
    """
    # Python refuses to write out integers of thousands of digits, and tables in tables in tables.
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too long to show"
    text = "true" if value is True else "false" if value is False else text
    return text if len(text) <= 60 else text[:59] + "…"


_Text = Annotated[str, Field(min_length=1, max_length=_LONGEST, pattern=r"^[^\x00]*$")]
_Radii = Annotated[
    list[str] | None,
    BeforeValidator(_radii),
    WithJsonSchema({"anyOf": [*_RADIUS["anyOf"], {"type": "array", "items": _RADIUS}]}),
]
_Listed = Annotated[_Text | None, BeforeValidator(_listed), WithJsonSchema(_NUMBERS)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSection(_Section):
    """The model to audit."""

    path: _Text | None = None
    """The model's file, as --model takes it."""
    arch: _Text | None = None
    """The network that the weights belong to. A pkg.module:factory is code: see
    --allow-code-execution."""
    factory: _Text | None = None
    """pkg.module:fn, code that returns the network: see --allow-code-execution."""
    class_names: Annotated[
        _Text | None,
        BeforeValidator(_listed),
        WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "string"}},
                                  {"type": "string"}]}),
    ] = None  # fmt: skip
    """Of the model's outputs, in their order: a list, or a file with one a line."""
    mean: _Listed = None
    """Subtracted from each channel."""
    std: _Listed = None
    """Then divides each channel."""
    bounds: _Listed = None
    """What black and white are to the network, before mean and std."""
    input_size: Annotated[
        _Text | None,
        BeforeValidator(_as_text),
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}),
    ] = None
    """What the network takes, in pixels: a number or "HEIGHTxWIDTH"."""
    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] | None = None
    """Refuse a file with another SHA-256."""
    smoothing: Annotated[float, Field(gt=0)] | None = None
    """Audit the smoothed classifier, under Gaussian noise of this standard deviation."""
    sanitize: Annotated[list[_Text], Field(min_length=1), BeforeValidator(_sanitizers)] | None = (
        None
    )
    """Audit the model behind these sanitizers, in the order in which images pass them."""
    device: _Text | None = None
    """cuda, mps or cpu; the fastest there is by default."""


class DataSection(_Section):
    """The images; their test part is audited."""

    name: Annotated[_Text, AfterValidator(check_name)] = "digits"
    """A dataset, imagefolder:PATH, or pkg.module:factory (code: see --allow-code-execution)."""
    root: _Text | None = None
    """Where datasets are kept."""
    download: bool = False
    """Fetch the dataset if it is not there."""
    image_size: Annotated[int, Field(ge=1)] | None = None
    """Resize and crop the images of an image folder to this size."""


class ThreatsSection(_Section):
    """What attackers may do. Each radius of each norm is audited by itself, with results of its
    own; linf 8/255 if none is named."""

    linf: _Radii = None
    """Largest change of an entry: a number, text such as "8/255", or a list of these."""
    l2: _Radii = None
    """Euclidean length of the change."""
    l1: _Radii = None
    """Sum of the absolute changes."""
    l0: _Radii = None
    """Number of changed entries."""
    weights: bool = False
    """Ask too what happens if bits of the stored weights are wrong."""
    corruptions: bool = False
    """Measure accuracy under common corruptions too: a control, nobody attacks."""
    certify: bool = False
    """Prove too what no attack can break, in linf, or with smoothing in l2."""


class AttacksSection(_Section):
    """How hard to try, and on how many images."""

    preset: Annotated[str, BeforeValidator(_preset)] = "standard"
    """quick, standard, thorough, autoattack or autoattack-rand."""
    run: Annotated[list[_Text], Field(min_length=1), BeforeValidator(_attacks)] | None = None
    """Run these instead of the preset's, such as "pgd:steps=100,loss=margin"."""
    surrogate: _Text | None = None
    """The file of another model for the same classes: what fools it is tried on this one too."""
    budget: Annotated[
        int | str | None,
        BeforeValidator(_budget),
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}),
    ] = None
    """Propagations that an image may cost in all attacks together, or the time that an audit may
    take, such as "10min"."""
    max_samples: Annotated[int, Field(ge=1)] | None = None
    """Audit so many images, drawn at random, the same for every seed."""
    batch_size: Annotated[
        int | str,
        BeforeValidator(_batch_size),
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
    ] = "auto"
    """Images a batch; auto tries."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of everything random."""
    trust: bool = True
    """Check that the evaluation can be believed."""
    curve: bool = True
    """Measure robust accuracy at other eps too."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """What attacks search in; what they find is judged in float32."""
    channels_last: bool = False
    """Run attacks in this memory format."""
    compile: bool = False
    """Run attacks through torch.compile."""
    tune: bool = False
    """Time a batch with each precision and memory format first; use what is faster."""


class ExplanationSection(_Section):
    """Why the model was fooled."""

    enabled: bool = True
    """Compute attributions."""
    methods: list[More] | None = None
    """Methods beside saliency, integrated gradients and LayerGradCam."""


_METRIC = {"type": "string", "pattern": f"^({'|'.join(METRICS)})(@.+)?$"}


class GatesSection(_Section):
    """What must hold; otherwise the audit ends with exit code 1. A metric may name the threat
    model that is meant: "robust_accuracy@l2"."""

    fail_under: Annotated[
        dict[str, float],
        BeforeValidator(_demands(check_share, drop=False)),
        WithJsonSchema({"type": "object", "propertyNames": _METRIC}),
    ] = {}
    """The least share of each metric, from 0 to 1."""
    max_drop: Annotated[
        dict[str, float],
        BeforeValidator(_demands(check_points, drop=True)),
        WithJsonSchema({"type": "object", "propertyNames": _METRIC}),
    ] = {}
    """How many percentage points each metric may be lower than in the baseline."""
    baseline: _Text | None = None
    """results.json of an earlier audit, or the folder of one."""
    gate_on: Literal["lower", "point"] = "lower"
    """Compare the lower end of the 95 % interval, or the figure."""
    strict: bool = False
    """Exit with 5 where the evaluation cannot be believed."""


class OutputSection(_Section):
    """Where results go."""

    folder: _Text | None = None
    """For results.json, samples.csv, report.html and summary.json."""
    junit: Annotated[_Text | None, BeforeValidator(_ending(".xml"))] = None
    """JUnit XML: a case for each gate and each trust check."""
    sarif: Annotated[_Text | None, BeforeValidator(_ending(".sarif", ".json"))] = None
    """SARIF 2.1.0: failed gates, failed trust checks, a refused model."""
    markdown: Annotated[_Text | None, BeforeValidator(_ending(".md"))] = None
    """A summary for a pull request."""
    model_card: Annotated[_Text | None, BeforeValidator(_ending(".md"))] = None
    """A model card."""


class AuditFile(_Section):
    """Configuration of robustann audit."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    threats: ThreatsSection = ThreatsSection()
    attacks: AttacksSection = AttacksSection()
    explanation: ExplanationSection = ExplanationSection()
    gates: GatesSection = GatesSection()
    output: OutputSection = OutputSection()

    @property
    def threat_models(self) -> tuple[ThreatModel, ...]:
        """The attackers, in the order of their norms.

        >>> [threat.eps_text for threat in AuditFile().threat_models]
        ['8/255']
        """
        found = [(norm, eps) for norm in NORMS for eps in getattr(self.threats, norm) or ()] or [
            ("linf", USUAL_EPS["linf"])
        ]
        return tuple(_threat(norm, eps) for norm, eps in found)


def _threat(norm: str, eps: str) -> ThreatModel:
    known: Norm = norm  # type: ignore[assignment]
    # ThreatModel itself reads text such as 8/255.
    return ThreatModel(known, eps)  # type: ignore[arg-type]


def json_schema() -> str:
    """The JSON Schema of a configuration, for editors; as in ``docs/audit.schema.json``.

    >>> json.loads(json_schema())["title"]
    'robustann audit'
    """
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **AuditFile.model_json_schema(),
        "title": "robustann audit",
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
