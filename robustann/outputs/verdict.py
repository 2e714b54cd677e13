"""The one verdict over all audits of a run. It is computed once; everything else only shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from robustann.findings import Finding, unresolved
from robustann.results import AuditResult, Gate, Interval

PASSED, GATE_FAILED, NOT_FINISHED, NOT_BELIEVED = 0, 1, 3, 5
# From harmless to grave: what stands last decides.
_GRAVITY = (PASSED, NOT_BELIEVED, GATE_FAILED, 2, NOT_FINISHED, 4)
_WORDS = {PASSED: "pass", GATE_FAILED: "gate failed", NOT_BELIEVED: "not to be believed"}


@dataclass(frozen=True)
class Audited:
    """One threat model: its result, or why there is none.

    Attributes:
        slug: its name in file names.
        threat: its name for people, such as ``linf 8/255``.
        folder: where its results are.
        result: with its gates decided; None if the audit did not finish.
        error: why it did not finish.
        exit_code: of that error.

    >>> one = Audited("linf-0.2", "linf 0.2", "runs/audit", result)
    >>> one.failed, one.unresolved, one.findings == result.findings
    ((), (), True)
    """

    slug: str
    threat: str
    folder: str
    result: AuditResult | None
    error: str | None = None
    exit_code: int = NOT_FINISHED

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that it failed."""
        return tuple(gate for gate in self.gates if not gate.passed)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """All its gates."""
        return () if self.result is None else self.result.gates

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All its trust findings."""
        return () if self.result is None else self.result.findings

    @property
    def unresolved(self) -> tuple[Finding, ...]:
        """Failed trust checks that nothing was done about."""
        return unresolved(self.findings)


@dataclass(frozen=True)
class Verdict:
    """What the run comes to.

    Attributes:
        audits: one a threat model, in order.
        strict: whether trust checks count.
        source: the file that the run is about, for tools that want a place: the configuration,
            else the results.
        model: what was audited, and ``data`` on what, in words.
        exit_code: 0, or the gravest of what happened.

    >>> found = conclude([Audited("linf-0.2", "linf 0.2", "runs/audit", result)], strict=True)
    >>> found.word, found.exit_code
    ('pass', 0)
    """

    audits: tuple[Audited, ...]
    strict: bool
    source: str
    model: str
    data: str
    exit_code: int

    @property
    def word(self) -> str:
        """``pass``, ``gate failed``, ``not to be believed`` or ``not finished``."""
        return _WORDS.get(self.exit_code, "not finished")


def conclude(
    audits: Sequence[Audited],
    *,
    strict: bool = False,
    source: str = "results.json",
    model: str = "a model",
    data: str = "images",
) -> Verdict:
    """The verdict over all audits of a run.

    >>> conclude([Audited("linf-8-255", "linf 8/255", "runs", None, "no memory")]).exit_code
    3
    """
    codes = [PASSED if audits else NOT_FINISHED]
    for one in audits:
        if one.result is None:
            # Whatever it was, what did not finish has not passed.
            codes.append(one.exit_code if one.exit_code in _GRAVITY[3:] else NOT_FINISHED)
        elif one.failed:
            codes.append(GATE_FAILED)
        elif strict and not one.result.believable:
            codes.append(NOT_BELIEVED)
    return Verdict(tuple(audits), strict, source, model, data, max(codes, key=_GRAVITY.index))


def summary_json(verdict: Verdict) -> str:
    """The verdict and the figures of each threat model as JSON text.

    >>> json.loads(summary_json(conclude([])))["verdict"]
    'not finished'
    """
    content = {
        "schema_version": 1,
        "verdict": verdict.word,
        "exit_code": verdict.exit_code,
        "model": verdict.model,
        "data": verdict.data,
        "audits": [_audit(one) for one in verdict.audits],
    }
    return json.dumps(content, indent=1) + "\n"


def _audit(one: Audited) -> dict[str, object]:
    about: dict[str, object] = {"name": one.slug, "threat": one.threat, "folder": one.folder}
    result = one.result
    if result is None:
        return {**about, "finished": False, "error": one.error}
    found = result.certificate
    return {
        **about,
        "finished": True,
        "n": result.n,
        "clean_accuracy": _share(result.clean_accuracy, result.clean.interval),
        "robust_accuracy": _share(result.robust_accuracy, result.worst_case.scores.interval),
        "protocol": None
        if result.protocol is None
        else {
            "name": result.protocol.name,
            **_share(result.protocol.accuracy, result.protocol.interval),
            "departures": list(result.protocol.departures),
        },
        "certified_accuracy": None
        if found is None
        else _share(found.certified_accuracy, found.interval),
        "believable": result.believable,
        "gates": [gate.model_dump(mode="json") for gate in result.gates],
    }


def _share(value: float, interval: Interval) -> dict[str, float]:
    return {"value": value, "low": interval.low, "high": interval.high}
