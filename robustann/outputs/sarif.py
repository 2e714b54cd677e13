"""SARIF 2.1.0: failed gates, failed trust checks and refused models, for code scanning.

The format: OASIS, Static Analysis Results Interchange Format Version 2.1.0 (2020).
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib import metadata
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from robustann.errors import RefusedError
from robustann.explained import explained
from robustann.outputs.text import answer, plain
from robustann.outputs.verdict import Audited, Verdict

_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)

_REFUSED = RefusedError.exit_code


def sarif(verdict: Verdict) -> str:
    """The verdict as a SARIF 2.1.0 log with one run.

    A failed gate is an error; a failed trust check a warning, in a strict run an error; a model
    that was refused an error at its file. An audit that did not finish is a notification of an
    invocation that was not successful.

    >>> from robustann.outputs.verdict import conclude
    >>> stopped = Audited("l2-1", "l2 1", "runs/audit", None, "no memory")
    >>> log = json.loads(sarif(conclude([stopped])))
    >>> log["version"], log["runs"][0]["invocations"][0]["exitCodeDescription"]
    ('2.1.0', 'not finished')
    """
    rules: dict[str, dict[str, Any]] = {}
    results = []
    for one in verdict.audits:
        results += _results(one, verdict, rules)
    refused = [one for one in verdict.audits if one.exit_code == _REFUSED and one.result is None]
    for one in refused[:1]:
        # It is refused as a whole, not in one threat model.
        rules["loading/refused"] = _rule("loading/refused", "The model was refused", "error")
        results.append(_result("loading/refused", "error", str(one.error), one, verdict))
    places = {name: place for place, name in enumerate(rules)}
    for result in results:
        result["ruleIndex"] = places[result["ruleId"]]
    unfinished = [one for one in verdict.audits if one.result is None]
    invocation: dict[str, Any] = {
        "executionSuccessful": not unfinished,
        "exitCode": verdict.exit_code,
        "exitCodeDescription": verdict.word,
    }
    if unfinished:
        invocation["toolExecutionNotifications"] = [
            {"level": "error", "message": _message(f"{one.threat}: {one.error}")}
            for one in unfinished
        ]
    driver = {
        "name": "robustann",
        "version": metadata.version("robustann"),
        "rules": list(rules.values()),
    }
    log = {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                "invocations": [invocation],
                "results": results,
                "columnKind": "unicodeCodePoints",
                "properties": {"model": plain(verdict.model), "data": plain(verdict.data)},
            }
        ],
    }
    return json.dumps(log, indent=1) + "\n"


def _results(
    one: Audited, verdict: Verdict, rules: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    found = []
    for gate in one.failed:
        rule = f"gate/{plain(gate.metric, 200)}"
        rules.setdefault(rule, _rule(rule, f"The gate on {gate.metric} failed", "error"))
        found.append(_result(rule, "error", f"{one.threat}: {answer(gate)}", one, verdict))
    for finding in one.unresolved:
        rule = f"trust/{plain(finding.check, 200)}"
        level = "error" if verdict.strict else "warning"
        words = f"The trust check {finding.check} failed"
        rules.setdefault(rule, _rule(rule, words, level) | _help(finding.check))
        said = f"{one.threat}: do not believe this yet: {finding.explanation}"
        found.append(_result(rule, level, said, one, verdict))
    return found


def _rule(name: str, words: str, level: str) -> dict[str, Any]:
    return {
        "id": name,
        "shortDescription": _message(words),
        "defaultConfiguration": {"level": level},
    }


def _help(check: str) -> dict[str, Any]:
    """The section on a trust check, for who reads the rule."""
    known = explained().get(check)
    if known is None:
        # Of a result that another version wrote.
        return {}
    told = {"text": f"{known.text}\nMore: {known.place}", "markdown": known.markdown}
    return {"fullDescription": _message(f"It measures {known.measures}"), "help": told}


def _result(rule: str, level: str, said: str, one: Audited, verdict: Verdict) -> dict[str, Any]:
    mark = hashlib.sha256(f"{rule}\n{one.slug}\n{verdict.source}".encode("utf-8", "replace"))
    return {
        "ruleId": rule,
        "level": level,
        "message": _message(said),
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": _uri(verdict.source)},
                    "region": {"startLine": 1},
                }
            }
        ],
        # The same finding of the next run is recognised by it, whatever its figures.
        "partialFingerprints": {"robustann/v1": mark.hexdigest()},
        "properties": {"threat": plain(one.threat), "results": plain(one.folder)},
    }


def _message(text: str) -> dict[str, str]:
    """Plain text: what SARIF would read as a link or a placeholder is escaped (3.11.5, 3.11.6)."""
    shown = plain(text)
    if re.search(r"\{\d", shown):
        shown = shown.replace("{", "{{").replace("}", "}}")
    if "](" in shown:
        shown = re.sub(r"([\\\[\]])", r"\\\1", shown)
    return {"text": shown or "nothing was said"}


def _uri(path: str) -> str:
    pure = PurePath(plain(path))
    return pure.as_uri() if pure.is_absolute() else quote(pure.as_posix())
