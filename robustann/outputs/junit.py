"""JUnit XML: a suite a threat model, a case a gate and one a trust check."""

from __future__ import annotations

from xml.etree import ElementTree as Xml

from robustann.outputs.text import answer, demand, plain
from robustann.outputs.verdict import Audited, Verdict


def junit(verdict: Verdict) -> str:
    """The verdict as JUnit XML.

    A case fails exactly where it decides the exit code: a trust check that failed is skipped, with
    its explanation, unless the run was strict. An audit that did not finish is an error.

    >>> from robustann.outputs.verdict import conclude
    >>> text = junit(conclude([Audited("linf-0.2", "linf 0.2", "runs/audit", result)]))
    >>> Xml.fromstring(text.encode()).attrib["failures"]
    '0'
    """
    suites = Xml.Element("testsuites", name="robustann audit")
    for one in verdict.audits:
        suites.append(_suite(one, verdict))
    for count in ("tests", "failures", "errors", "skipped"):
        suites.set(count, str(sum(int(suite.get(count, "0")) for suite in suites)))
    Xml.indent(suites)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{Xml.tostring(suites, encoding="unicode")}\n'


def _suite(one: Audited, verdict: Verdict) -> Xml.Element:
    suite = Xml.Element("testsuite", name=plain(one.threat))
    about = {"model": verdict.model, "data": verdict.data, "folder": one.folder}
    if one.result is not None:
        # The form knows no time zone; audits are dated in UTC.
        suite.set("timestamp", plain(one.result.execution.started)[:19])
        suite.set("time", f"{one.result.execution.seconds:.3f}")
        about |= {
            "clean_accuracy": f"{one.result.clean_accuracy:.6g}",
            "robust_accuracy": f"{one.result.robust_accuracy:.6g}",
            "samples": str(one.result.n),
            "seed": str(one.result.provenance.seed),
            "model_sha256": one.result.provenance.model_sha256,
        }
    properties = Xml.SubElement(suite, "properties")
    for name, value in about.items():
        Xml.SubElement(properties, "property", name=name, value=plain(value))
    finished = _case(suite, one, "audit", "finished")
    if one.result is None:
        reason = plain(one.error)
        Xml.SubElement(finished, "error", message=reason, type="not finished").text = reason
    for gate in one.gates:
        case = _case(suite, one, "gates", demand(gate))
        said = plain(answer(gate))
        if gate.passed:
            Xml.SubElement(case, "system-out").text = said
        else:
            Xml.SubElement(case, "failure", message=said, type="gate").text = said
    for finding in one.findings:
        case = _case(suite, one, "trust", finding.check)
        said = plain(finding.explanation)
        if finding.verdict == "not run":
            Xml.SubElement(case, "skipped", message=said)
        elif finding.remedy is not None:
            Xml.SubElement(case, "system-out").text = f"{said} {plain(finding.remedy)}"
        elif finding.verdict == "fail" and verdict.strict:
            Xml.SubElement(case, "failure", message=said, type="trust").text = said
        elif finding.verdict == "fail":
            message = f"do not believe this yet (a failure with --strict): {said}"
            Xml.SubElement(case, "skipped", message=message)
    cases = suite.findall("testcase")
    for count, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(count, str(sum(case.find(kind) is not None for case in cases)))
    suite.set("tests", str(len(cases)))
    return suite


def _case(suite: Xml.Element, one: Audited, kind: str, name: str) -> Xml.Element:
    # Dots part packages in what reads JUnit.
    threat = one.slug.replace(".", "_")
    return Xml.SubElement(
        suite, "testcase", classname=f"robustann.{plain(threat)}.{kind}", name=plain(name, 200)
    )
