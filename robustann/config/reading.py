"""From a file and the command line to settings that are checked and complete."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from robustann.attacks import parse_attack
from robustann.auditing import AuditConfig
from robustann.config.schema import USUAL_EPS, AuditFile, parse_budget, shown
from robustann.data import runs_code
from robustann.errors import RefusedError, RobustannError, UsageError, printable, unknown_name
from robustann.models.registry import is_code
from robustann.models.request import ModelRequest
from robustann.threat import NORMS, ThreatModel

# A configuration is a page long; more is a mistake, or an attack on the parser.
_LARGEST = 2**20
_MOST_SHOWN = 8
_MOST_BITS = 1024

Overrides = Mapping[str, Mapping[str, Any]]
"""Values from the command line, by section and key."""


@dataclass(frozen=True)
class Job:
    """One threat model of an audit: what to run, and the name of its folder.

    >>> threats = {"linf": ["4/255", "8/255"], "l2": ["0.5"]}
    >>> asked = {"model": {"path": "m.safetensors"}, "threats": threats}
    >>> [(job.slug, job.config.threat.eps) for job in resolve(None, asked).jobs][-1]
    ('l2-0.5', 0.5)
    """

    slug: str
    config: AuditConfig
    demands: Mapping[str, float]
    drops: Mapping[str, float]


@dataclass(frozen=True)
class Settings:
    """A resolved configuration.

    Attributes:
        values: everything, defaults included.
        source: the file that it was read from, None without one.
        sha256: of that file, in hex.
        code_of_file: what of the user's code the file, and not the command line, names.

    >>> [job.slug for job in resolve(None, {"model": {"path": "m.safetensors"}}).jobs]
    ['linf-8-255']
    """

    values: AuditFile
    source: Path | None = None
    sha256: str | None = None
    code_of_file: tuple[str, ...] = ()

    @property
    def jobs(self) -> tuple[Job, ...]:
        """An audit a threat model.

        Raises:
            UsageError: values do not go together.
        """
        return _jobs(self.values)

    def request(self, *, allow_code_execution: bool = False) -> ModelRequest:
        """The model to audit.

        Raises:
            UsageError: text that is not what its key takes.
        """
        asked = self.values.model
        return ModelRequest.from_text(
            model=asked.path,
            arch=asked.arch,
            factory=asked.factory,
            class_names=asked.class_names,
            mean=asked.mean,
            std=asked.std,
            bounds=asked.bounds,
            input_size=asked.input_size,
            model_sha256=asked.sha256,
            allow_code_execution=allow_code_execution,
        )

    def check_code(self, *, allowed: bool) -> None:
        """Refuse code that only the file names, unless it is allowed.

        Raises:
            RefusedError: the file names code.

        >>> Settings(AuditFile(), Path("a.toml"), None, ("mine:net",)).check_code(allowed=False)
        Traceback (most recent call last):
        robustann.errors.RefusedError: 'a.toml' names code that would run on this machine: ...
        """
        if self.code_of_file and not allowed:
            raise RefusedError(
                f"'{self.source}' names code that would run on this machine: "
                f"{', '.join(self.code_of_file)}; a configuration may come from somebody else. If "
                "you trust it, add --allow-code-execution, or name the code on the command line"
            )

    @property
    def provenance(self) -> dict[str, str | list[str]]:
        """Where the configuration came from, and who named the code that was run."""
        found: dict[str, str | list[str]] = {}
        if self.source is not None and self.sha256 is not None:
            found |= {"config_file": str(self.source), "config_sha256": self.sha256}
        code = [
            f"{one} (named by {'the file' if one in self.code_of_file else 'the command line'})"
            for one in _code(self.values)
        ]
        return found | ({"code": code} if code else {})


def resolve(path: Path | None, overrides: Overrides | None = None) -> Settings:
    """Read a configuration, let the command line override it, and check the whole.

    Raises:
        UsageError: the file cannot be read, is no TOML, or holds unknown keys or unfit values.

    >>> settings = resolve(None, {"model": {"path": "m.onnx"}, "threats": {"l2": "0.5"}})
    >>> settings.values.model.path, [job.slug for job in settings.jobs]
    ('m.onnx', ['l2-0.5'])
    >>> resolve(None, {"model": {"paths": "m.onnx"}})
    Traceback (most recent call last):
    robustann.errors.UsageError: unknown key in [model] 'paths'; did you mean 'path'? ...
    """
    given: Overrides = overrides or {}
    raw: dict[str, Any] = {}
    digest = None
    if path is not None:
        content = _read(path)
        digest = hashlib.sha256(content).hexdigest()
        raw = _parse(content, path)
    values = _validated(_merged(raw, given), given, path)
    named = _code(values)
    of_file = [
        one
        for one, (section, key) in named.items()
        if path is not None and given.get(section, {}).get(key) is None
    ]
    settings = Settings(values, path, digest, tuple(of_file))
    where = "" if path is None else f"{path}: "
    try:
        settings.request()
        _ = settings.jobs
    except UsageError as error:
        raise UsageError(f"{where}{error}") from error
    return settings


def radii_overrides(
    path: Path | None, norm: str | None, eps: str | None
) -> dict[str, list[str] | None]:
    """What ``--norm`` and ``--eps`` make of the threat models that a file names.

    A norm alone chooses that one of the file's; a radius alone replaces that of the file's only
    norm; both together replace all.

    Raises:
        UsageError: an unknown norm, or a radius for one of several norms.

    >>> radii_overrides(None, "l2", None)
    {'linf': None, 'l2': ['0.5'], 'l1': None, 'l0': None}
    """
    if norm is None and eps is None:
        return {}
    if norm is not None and norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    threats = _parse(_read(path), path).get("threats") if path is not None else None
    named = {name: threats[name] for name in NORMS if name in threats} if isinstance(
        threats, dict
    ) else {}  # fmt: skip
    if norm is None:
        if len(named) > 1:
            raise UsageError(
                f"expected --norm together with --eps, because '{path}' names the norms "
                f"{', '.join(named)}; say which one is meant"
            )
        norm = next(iter(named), "linf")
    # What the file says is checked with the rest of it.
    wanted = [eps] if eps is not None else named.get(norm, [USUAL_EPS[norm]])
    return {name: wanted if name == norm else None for name in NORMS}


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise UsageError(f"expected a configuration in TOML, got the folder '{path}'; name a "
                             "file")  # fmt: skip
        with path.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, RobustannError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"expected a configuration, could not read '{path}' ({reason}); correct the path, or "
            "write one with 'robustann config init'"
        ) from error
    if len(content) > _LARGEST:
        raise UsageError(f"expected a configuration of at most {_LARGEST} bytes in '{path}', got "
                         "more; name another file")  # fmt: skip
    return content


def _parse(content: bytes, path: Path | None) -> dict[str, Any]:
    try:
        found = tomllib.loads(content.decode("utf-8"))
    # Beside its own error, tomllib lets those of huge integers and of deep nesting through.
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(
            f"expected TOML in '{path}', got what is none: {reason}; correct it, or write a new "
            "one with 'robustann config init'"
        ) from error
    # Hexadecimal integers may have any length in TOML; Python refuses to write them out again.
    left: list[Any] = [found]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise UsageError(f"expected integers of at most {_MOST_BITS} bits in '{path}', got one "
                             f"of {value.bit_length()}; correct it")  # fmt: skip
    return found


def _merged(raw: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """The file's values with those of the command line in their place, tables key by key."""
    merged: dict[str, Any] = dict(raw)
    for section, values in overrides.items():
        below = merged.get(section, {})
        # What is no table is left for the validation to complain about.
        if not isinstance(below, dict):
            continue
        changed = dict(below)
        for key, value in values.items():
            old = changed.get(key)
            both = isinstance(old, dict) and isinstance(value, Mapping)
            changed[key] = {**old, **value} if both and old is not None else value
        merged[section] = changed
    return merged


def _validated(raw: Mapping[str, Any], overrides: Overrides, path: Path | None) -> AuditFile:
    try:
        return AuditFile.model_validate(raw)
    except ValidationError as error:
        found = _problems(error, overrides, path)
        # A file from somebody else must not steer the terminal.
        problems = list(
            dict.fromkeys(printable(problem).replace("\n", "\ufffd") for problem in found)
        )
        shown_ones = problems[:_MOST_SHOWN]
        more = len(problems) - len(shown_ones)
        if more:
            shown_ones.append(f"and {more} more")
        raise UsageError("\n".join(shown_ones)) from error


def _problems(error: ValidationError, overrides: Overrides, path: Path | None) -> Iterator[str]:
    for one in error.errors(include_url=False):
        place = [str(part) for part in one["loc"] if not _of_pydantic(part)]
        section, key = (*place, "", "")[:2]
        from_file = path is not None and overrides.get(section, {}).get(key) is None
        where = f"{path}: " if from_file else ""
        if one["type"] == "extra_forbidden":
            yield f"{where}{_unknown_key(place)}"
            continue
        cause = one.get("ctx", {}).get("error")
        if isinstance(cause, RobustannError):
            told = f"{'.'.join(place)}: " if from_file else ""
            yield f"{where}{told}{cause}"
            continue
        wanted = _wanted(one["type"], one.get("ctx", {}), one["msg"])
        yield (
            f"{where}expected {'.'.join(place)} as {wanted}, got {shown(one['input'])}; correct it"
        )


def _of_pydantic(part: object) -> bool:
    """Whether part of a place names a member of a union, and nothing in the file."""
    return isinstance(part, str) and part.startswith(("function-", "constrained-", "nullable"))


_KINDS = {
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "text in its proper form",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "too_short": "a list that is not empty",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def _wanted(kind: str, context: Mapping[str, Any], message: str) -> str:
    if kind in ("greater_than_equal", "greater_than"):
        return f"a number >= {context['ge']}" if "ge" in context else f"a number > {context['gt']}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "string_too_long":
        return f"text of at most {context['max_length']} characters"
    return _KINDS.get(kind, message)


def _unknown_key(place: Sequence[str]) -> str:
    model: type[BaseModel] = AuditFile
    for part in place[:-1]:
        model = _section(model, part)
    known = list(model.model_fields)
    name = place[-1]
    kind = f"key in [{'.'.join(place[:-1])}]" if len(place) > 1 else "section"
    if name == "allow_code_execution":
        return (
            f"unknown {kind} '{name}'; no file can allow this, only the option "
            "--allow-code-execution on the command line"
        )
    homes = [
        f"[{section}]" for section in AuditFile.model_fields
        if model is not _section(AuditFile, section)
        and name in _section(AuditFile, section).model_fields
    ]  # fmt: skip
    elsewhere = f" There is such a key in {' and '.join(homes)}." if homes else ""
    return f"{unknown_name(kind, name[:60], known)}.{elsewhere}"


def _section(model: type[BaseModel], name: str) -> type[BaseModel]:
    annotation = model.model_fields[name].annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    raise KeyError(name)


def _code(values: AuditFile) -> dict[str, tuple[str, str]]:
    """The user's code that a run would import, and which key names it."""
    found: dict[str, tuple[str, str]] = {}
    if values.model.arch is not None and is_code(values.model.arch):
        found[values.model.arch] = ("model", "arch")
    if values.model.factory is not None:
        found[values.model.factory] = ("model", "factory")
    if runs_code(values.data.name):
        found[values.data.name] = ("data", "name")
    return found


def slug_of(threat: ThreatModel) -> str:
    """The name of a threat model, fit for a folder.

    >>> slug_of(ThreatModel("linf", "8/255"))
    'linf-8-255'
    """
    text = f"{threat.norm}-{threat.eps_text}"
    return "".join(c if c.isascii() and (c.isalnum() or c in "+-.") else "-" for c in text)


def _jobs(values: AuditFile) -> tuple[Job, ...]:
    threats = values.threat_models
    slugs = [slug_of(threat) for threat in threats]
    for place, slug in enumerate(slugs):
        same = [i for i, other in enumerate(threats[:place]) if other == threats[place]]
        if same or slug in slugs[:place]:
            raise UsageError(f"expected each threat model once, got {threats[place].norm} "
                             f"{threats[place].eps_text} twice; drop one")  # fmt: skip
    _check_gates(values, slugs, threats)
    certified = [_certifies(values, threat, alone=len(threats) == 1) for threat in threats]
    if values.threats.certify and not any(certified):
        raise UsageError(
            "expected a threat model in linf to certify, or model.smoothing (--smoothing) and one "
            "in l2, got neither; add one, or leave out certify"
        )
    jobs = []
    for place, threat in enumerate(threats):
        demands = _meant(values.gates.fail_under, threat, slugs[place])
        drops = _meant(values.gates.max_drop, threat, slugs[place])
        for asked in (demands, drops):
            if "certified_accuracy" in asked and not certified[place]:
                # A demand on all threat models is meant for those that can be certified.
                if any(certified) and not _by_name(values, threat, slugs[place]):
                    del asked["certified_accuracy"]
                    continue
                raise UsageError(
                    f"expected {threat.norm} {threat.eps_text} to be certified for a gate on "
                    "certified_accuracy, got an audit without certificate; add --certify, or drop "
                    "the gate"
                )
        jobs.append(
            Job(slugs[place], _audit(values, threat, certified[place], place == 0), demands, drops)
        )
    return tuple(jobs)


def _by_name(values: AuditFile, threat: ThreatModel, slug: str) -> bool:
    keys = {*values.gates.fail_under, *values.gates.max_drop}
    return bool(keys & {f"certified_accuracy@{slug}", f"certified_accuracy@{threat.norm}"})


def _certifies(values: AuditFile, threat: ThreatModel, *, alone: bool) -> bool:
    """Whether to certify here; one threat model alone is asked, and refused with the reason."""
    if not values.threats.certify or alone:
        return values.threats.certify
    return threat.norm == ("linf" if values.model.smoothing is None else "l2")


def _audit(values: AuditFile, threat: ThreatModel, certify: bool, first: bool) -> AuditConfig:
    chosen = values.attacks
    propagations, minutes = (None, None) if chosen.budget is None else parse_budget(chosen.budget)
    batch = chosen.batch_size
    return AuditConfig(
        threat=threat,
        preset=chosen.preset,
        attacks=None if chosen.run is None else tuple(parse_attack(text) for text in chosen.run),
        seed=chosen.seed,
        max_samples=chosen.max_samples,
        batch_size="auto" if isinstance(batch, str) else batch,
        budget=propagations,
        minutes=minutes,
        trust=chosen.trust,
        curve=chosen.curve,
        precision=chosen.precision,
        channels_last=chosen.channels_last,
        compile=chosen.compile,
        tune=chosen.tune,
        explain=values.explanation.enabled,
        attributions=tuple(values.explanation.methods or ()),
        certify=certify,
        # Wrong bits are the same ones whatever is done to images: measured once.
        weights=values.threats.weights and first,
        # So are corrupted images.
        corruptions=values.threats.corruptions and first,
    )


def _check_gates(values: AuditFile, slugs: Sequence[str], threats: Sequence[ThreatModel]) -> None:
    gates, trust = values.gates, values.attacks.trust
    if gates.strict and not trust:
        raise UsageError("--strict asks the trust checks, --no-trust leaves them out; drop one")
    demanded = [metric for metric in gates.fail_under if metric.startswith("believable")]
    if demanded and not trust:
        raise UsageError("a gate on believable asks the trust checks, --no-trust leaves them out; "
                         "drop one")  # fmt: skip
    known = sorted({*slugs, *(threat.norm for threat in threats)})
    for metric in (*gates.fail_under, *gates.max_drop):
        _, at, where = metric.partition("@")
        # A gate that nobody asks would always be passed.
        if at and where not in known:
            raise unknown_name(f"threat model of the gate {metric}:", where, known)
    if gates.max_drop and gates.baseline is None:
        raise UsageError("expected --baseline RESULTS.JSON together with --max-drop, got none; "
                         "name the results of an earlier audit")  # fmt: skip
    if gates.baseline is not None and not gates.max_drop:
        raise UsageError("expected --max-drop METRIC=POINTS together with --baseline, got none; "
                         "say how far which metric may fall")  # fmt: skip


def _meant(asked: Mapping[str, float], threat: ThreatModel, slug: str) -> dict[str, float]:
    """The thresholds for one threat model; the more particular one counts."""
    found: dict[str, float] = {}
    for suffix in ("", f"@{threat.norm}", f"@{slug}"):
        for metric, threshold in asked.items():
            name, at, where = metric.partition("@")
            if f"{at}{where}" == suffix:
                found[name] = threshold
    return found
