"""What programs and people read of a verdict: valid, complete, and no name can break it."""

from __future__ import annotations

import html
import json
import re
from xml.etree import ElementTree

import pytest

import robustann as ra
from robustann.auditing import with_gates
from robustann.explained import explained
from robustann.findings import Finding
from robustann.outputs import (
    Audited,
    Verdict,
    conclude,
    junit,
    model_card,
    sarif,
    summary_json,
    summary_page,
)
from robustann.outputs.text import markdown, plain
from robustann.results import AuditResult, Gate
from robustann.threat import ThreatModel

# Markup, links, mentions, ends of tables and sections, colours of a terminal, what XML forbids.
HOSTILE = (
    "<script>alert(1)</script>]]>&lt;b&gt; | [here](https://evil.example) ![x](//evil) @everyone "
    "`code` **bold** #1 www.evil.example {0} \x00\x08\x1b[31m\r\n\n# Heading\ufffe\u202e\ud800 end"
)

GATES = {"clean_accuracy": 0.5, "robust_accuracy": 0.99, "worst_class_recall": 0.0}


@pytest.fixture(scope="module")
def result(digits, model_file) -> AuditResult:
    found = ra.audit(
        ra.load_model(model_file), digits, ThreatModel("linf", "8/255"), attacks=["fgsm"],
        trust=False, curve=False, explain=False, max_samples=30,
    )  # fmt: skip
    findings = (
        Finding(check="randomised", verdict="pass", explanation="The same each time."),
        Finding(check="saturated-loss", verdict="fail", explanation="It is flat."),
        Finding(check="softmax-output", verdict="fail", explanation="It was.", remedy="undone"),
        Finding(check="zero-eps", verdict="not run", explanation="No time."),
    )
    return with_gates(found.model_copy(update={"findings": findings}), GATES)


@pytest.fixture(scope="module")
def hostile(result) -> AuditResult:
    content = json.loads(result.to_json())
    text = HOSTILE.replace("\ud800", "")
    for place, _ in enumerate(content["class_names"]):
        content["class_names"][place] = f"{place}{text}"
    for scores in (content["clean"], content["worst_case"]["scores"]):
        for place, one in enumerate(scores["classes"]):
            one["name"] = f"{place}{text}"
    content["provenance"].update(model=text, data=text, config={"code": [text]})
    content["execution"]["command"] = text
    for finding in content["findings"]:
        finding.update(explanation=text, check=text)
    found = AuditResult.model_validate(content)
    return with_gates(found, {**GATES, "worst_class_recall": 1.0})


def verdict(result: AuditResult | None, strict: bool = False, text: str = "a model") -> Verdict:
    one = Audited("linf-8-255", "linf 8/255", "out/linf-8-255", result, text, 3)
    return conclude([one], strict=strict, source="ci/audit.toml", model=text, data=text)


# The verdict.


def gate(passed: bool) -> Gate:
    return Gate(metric="clean_accuracy", on="point", threshold=0.5, value=0.6, passed=passed)


@pytest.mark.parametrize(
    ("outcomes", "strict", "code", "word"),
    [
        (["good"], True, 0, "pass"),
        (["doubt"], False, 0, "pass"),
        (["good", "doubt"], True, 5, "not to be believed"),
        (["failed", "good"], True, 1, "gate failed"),
        (["failed", "doubt"], True, 1, "gate failed"),
        (["good", 3], False, 3, "not finished"),
        ([3, "failed"], False, 3, "not finished"),
        ([4, 3, "good"], False, 4, "not finished"),
        ([2, "good"], False, 2, "not finished"),
        # No code of an error makes it a pass.
        ([0, "good"], False, 3, "not finished"),
        ([1], False, 3, "not finished"),
    ],
)
def test_the_gravest_decides(result, outcomes, strict, code, word):
    fine = Finding(check="randomised", verdict="pass", explanation="Fine.")
    bad = Finding(check="randomised", verdict="fail", explanation="Bad.")
    made = {
        "good": {"gates": (gate(True),), "findings": (fine,)},
        "doubt": {"gates": (gate(True),), "findings": (bad,)},
        "failed": {"gates": (gate(True), gate(False)), "findings": (fine,)},
    }
    audits = [
        Audited("a", "a", "a", None, "broke", one)
        if isinstance(one, int)
        else Audited("a", "a", "a", result.model_copy(update=made[one]))
        for one in outcomes
    ]
    found = conclude(audits, strict=strict)
    assert (found.exit_code, found.word) == (code, word)
    assert json.loads(summary_json(found))["exit_code"] == code
    failures = sum(int(suite.get("failures")) for suite in ElementTree.fromstring(junit(found)))
    errors = sum(int(suite.get("errors")) for suite in ElementTree.fromstring(junit(found)))
    # Who reads the JUnit file comes to the same verdict.
    assert (failures + errors > 0) == (code != 0)


# JUnit.


def test_junit_has_a_case_a_gate_and_one_a_finding(result):
    root = ElementTree.fromstring(junit(verdict(result)))
    (suite,) = root
    cases = {(case.get("classname").rsplit(".", 1)[1], case.get("name")): case for case in suite
             if case.tag == "testcase"}  # fmt: skip
    assert len(cases) == 1 + len(result.gates) + len(result.findings) == int(suite.get("tests"))
    assert root.get("tests") == suite.get("tests")
    failed = cases["gates", "robust_accuracy >= 99.0 %"].find("failure")
    assert "is under 99.0 %" in failed.get("message")
    assert cases["gates", "clean_accuracy >= 50.0 %"].find("failure") is None
    doubtful = cases["trust", "saturated-loss"]
    assert "do not believe this yet" in doubtful.find("skipped").get("message")
    assert cases["trust", "zero-eps"].find("skipped").get("message") == "No time."
    assert "undone" in cases["trust", "softmax-output"].find("system-out").text
    assert [int(suite.get(kind)) for kind in ("failures", "errors", "skipped")] == [1, 0, 2]
    strict = ElementTree.fromstring(junit(verdict(result, strict=True)))
    assert strict.get("failures") == "2"


def test_junit_of_what_did_not_finish():
    root = ElementTree.fromstring(junit(verdict(None, text="no memory")))
    assert root.find("testsuite/testcase/error").get("message") == "no memory"
    assert (root.get("errors"), root.get("tests")) == ("1", "1")


def test_junit_bears_hostile_names(hostile):
    for found in (verdict(hostile, True, HOSTILE), verdict(None, True, HOSTILE)):
        text = junit(found)
        root = ElementTree.fromstring(text.encode())
        assert not re.search("[\x00-\x08\x0b-\x1f\ufffe\uffff\u202e]", text)
        known = {"testsuites", "testsuite", "testcase", "properties", "property", "failure",
                 "error", "skipped", "system-out"}  # fmt: skip
        assert {element.tag for element in root.iter()} <= known
        assert any("<script>" in value for e in root.iter() for value in e.attrib.values())


# SARIF. The parts of the 2.1.0 schema that are used, written from the standard's text: properties
# in each object (sections 3.13, 3.14, 3.18, 3.19, 3.20, 3.27, 3.28, 3.29, 3.30, 3.4, 3.49, 3.58),
# nothing else allowed, as the official schema demands. The official schema was tried by hand.

MESSAGE = {
    "type": "object", "additionalProperties": False, "required": ["text"],
    "properties": {"text": {"type": "string", "minLength": 1}},
}  # fmt: skip
LEVEL = {"enum": ["none", "note", "warning", "error"]}
BAG = {"type": "object"}


def strictly(required: list[str], **properties: object) -> dict:
    return {
        "type": "object", "additionalProperties": False, "required": required,
        "properties": properties,
    }  # fmt: skip


SARIF = strictly(
    ["version", "runs"],
    **{"$schema": {"type": "string", "format": "uri"}},
    version={"const": "2.1.0"},
    runs={"type": "array", "minItems": 1, "items": strictly(
        ["tool"],
        tool=strictly(["driver"], driver=strictly(
            ["name"], name={"type": "string"}, version={"type": "string"},
            rules={"type": "array", "uniqueItems": True, "items": strictly(
                ["id"], id={"type": "string"}, shortDescription=MESSAGE, fullDescription=MESSAGE,
                # multiformatMessageString (3.12)
                help=strictly(["text"], text={"type": "string"}, markdown={"type": "string"}),
                defaultConfiguration=strictly([], level=LEVEL),
            )},
        )),
        invocations={"type": "array", "items": strictly(
            ["executionSuccessful"], executionSuccessful={"type": "boolean"},
            exitCode={"type": "integer"}, exitCodeDescription={"type": "string"},
            toolExecutionNotifications={"type": "array", "items": strictly(
                ["message"], message=MESSAGE, level=LEVEL)},
        )},
        results={"type": "array", "items": strictly(
            ["message"], ruleId={"type": "string"}, ruleIndex={"type": "integer", "minimum": -1},
            level=LEVEL, message=MESSAGE,
            locations={"type": "array", "items": strictly([], physicalLocation=strictly(
                [], artifactLocation=strictly([], uri={"type": "string", "pattern":
                                                       r"^[A-Za-z0-9._~%!$&'()*+,;=:@/-]+$"}),
                region=strictly([], startLine={"type": "integer", "minimum": 1}),
            ))},
            partialFingerprints={"type": "object", "additionalProperties": {"type": "string"}},
            properties=BAG,
        )},
        columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
        properties=BAG,
    )},
)  # fmt: skip


def checked(text: str) -> dict:
    log = json.loads(text)
    pytest.importorskip("jsonschema").Draft202012Validator(SARIF).validate(log)
    return log["runs"][0]


def test_sarif_tells_failed_gates_and_open_doubts(result):
    run = checked(sarif(verdict(result)))
    assert [(one["ruleId"], one["level"]) for one in run["results"]] == [
        ("gate/robust_accuracy", "error"),
        ("trust/saturated-loss", "warning"),
    ]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(rules[one["ruleIndex"]] == one["ruleId"] for one in run["results"])
    assert run["invocations"] == [
        {"executionSuccessful": True, "exitCode": 1, "exitCodeDescription": "gate failed"}
    ]
    assert "linf 8/255" in run["results"][0]["message"]["text"]
    gate, trust = run["tool"]["driver"]["rules"]
    assert "help" not in gate
    assert "docs/trust.md#saturated-loss" in trust["help"]["text"]
    assert explained()["saturated-loss"].advice in trust["help"]["markdown"]
    marks = {json.dumps(one["partialFingerprints"]) for one in run["results"]}
    assert len(marks) == 2
    again = checked(sarif(verdict(result)))
    assert again == run
    strict = checked(sarif(verdict(result, strict=True)))
    assert {one["level"] for one in strict["results"]} == {"error"}


def test_sarif_of_what_did_not_finish():
    run = checked(sarif(verdict(None, text="no memory")))
    assert run["results"] == []
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is False
    (told,) = invocation["toolExecutionNotifications"]
    assert told["message"]["text"] == "linf 8/255: no memory"


def test_sarif_tells_a_refused_model_once():
    refused = [Audited(slug, slug, "runs", None, "it could run os.system", 4) for slug in "ab"]
    run = checked(sarif(conclude(refused, source="models/m.pt")))
    (found,) = run["results"]
    assert (found["ruleId"], found["level"]) == ("loading/refused", "error")
    assert found["message"]["text"] == "it could run os.system"
    place = found["locations"][0]["physicalLocation"]["artifactLocation"]
    assert place == {"uri": "models/m.pt"}
    assert run["invocations"][0]["exitCode"] == 4
    assert len(run["invocations"][0]["toolExecutionNotifications"]) == 2


def test_sarif_bears_hostile_names(hostile):
    source = HOSTILE.replace("\ud800", "")
    one = Audited(source, source, source, hostile)
    found = conclude([one], source=source, model=source, data=source)
    text = sarif(found)
    run = checked(text)
    assert len(run["results"]) >= 3
    for said in (one["message"]["text"] for one in run["results"]):
        # Neither a link (3.11.6) nor a placeholder (3.11.5) is left.
        assert not re.search(r"(?<!\\)\]\(", said)
        assert "{0}" not in said.replace("{{0}}", "")
        assert not re.search("[\x00-\x1f]", said)


# Markdown.


def unescaped(text: str) -> str:
    """The text without what a backslash makes harmless."""
    return re.sub(r"\\[!-/:-@\[-`{-~]", "", text)


@pytest.mark.parametrize("make", [summary_page, model_card])
def test_markdown_bears_hostile_names(hostile, make):
    text = make(verdict(hostile, True, HOSTILE))
    left = unescaped(text)
    assert "<" not in left
    assert "](" not in left
    assert "`" not in left
    assert not re.search(r"@[a-z]", left)
    assert "://" not in left
    assert not re.search(r"www\.[a-z]", left)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    assert "\n# Heading" not in text
    widths = [line.count("|") for line in left.splitlines() if line.startswith("|")]
    assert all(width in (3, 4, 5, 7) for width in widths)
    blocks = [block for block in left.split("\n\n") if block.startswith("|")]
    assert blocks
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_escaped_markdown_shows_the_text_itself():
    text = r"a_b*c*[d](e)<f>`g`|h|\i & ~j~ $k$ 100 %"
    shown = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown(text))
    assert html.unescape(shown) == text


def test_plain_keeps_what_can_be_shown():
    assert plain("Grüße, 猫 😀") == "Grüße, 猫 😀"
    assert plain("a\r\n\tb") == "a b"
    assert len(plain("x" * 10_000)) == 2000


def test_summary_page(result):
    text = summary_page(verdict(result))
    assert text.startswith("## ❌ Robustness: gate failed\n")
    assert text.count("**failed**") == 1
    assert "**Do not believe linf 8/255 yet:** saturated-loss: It is flat." in text
    share = f"{100 * result.robust_accuracy:.1f} %"
    assert f"| linf 8/255 | 30 | {100 * result.clean_accuracy:.1f} % (" in text
    assert share in text


def test_model_card(result):
    text = model_card(verdict(result))
    parts = re.findall("^## (.*)$", text, re.MULTILINE)
    assert parts == ["Model", "Intended use", "Training data", "Evaluation",
                     "Can the evaluation be believed?", "Limits", "How to repeat it"]  # fmt: skip
    assert result.provenance.model_sha256 in text
    assert f"{result.provenance.parameters:,}" in text
    rows = re.findall(r"^\| (\d) \| \d+ \|.*\| ([\d.]+) % \|$", text, re.MULTILINE)
    recalls = [float(recall) for _, recall in rows]
    assert len(rows) == sum(one.support > 0 for one in result.clean.classes)
    # The worst class is the first.
    assert recalls == sorted(recalls)
    least = min(one.recall for one in result.worst_case.scores.classes if one.support)
    assert recalls[0] == pytest.approx(100 * least, abs=0.05)


def test_model_card_of_what_did_not_finish():
    text = model_card(verdict(None, text="no memory"))
    assert "not finished" in text


def test_summary_json_holds_the_figures(result):
    found = json.loads(summary_json(verdict(result)))
    (one,) = found["audits"]
    assert one["robust_accuracy"]["value"] == result.robust_accuracy
    assert one["certified_accuracy"] is None
    assert one["believable"] is False
    assert [gate["passed"] for gate in one["gates"]] == [True, False, True]
