"""Markdown: a summary for a pull request, and a model card."""

from __future__ import annotations

from collections.abc import Sequence

from robustann.outputs.text import answer, demand, markdown, with_interval
from robustann.outputs.verdict import Audited, Verdict
from robustann.results import AuditResult, ClassScores
from robustann.rounding import percent

_SYMBOLS = {"pass": "✅", "gate failed": "❌", "not to be believed": "⚠️", "not finished": "❌"}
_MOST_CLASSES = 20


def summary_page(verdict: Verdict) -> str:
    """A summary for a pull request: verdict, figures, gates, doubts.

    >>> from robustann.outputs.verdict import conclude
    >>> page = summary_page(conclude([Audited("linf-0.2", "linf 0.2", "runs/audit", result)]))
    >>> page.splitlines()[0]
    '## ✅ Robustness: pass'
    """
    parts = [
        f"## {_SYMBOLS[verdict.word]} Robustness: {verdict.word}",
        f"{markdown(verdict.model)} on {markdown(verdict.data)}",
        _figures(verdict.audits),
    ]
    gates = [
        (one.threat, demand(gate), answer(gate), "passed" if gate.passed else "**failed**")
        for one in verdict.audits
        for gate in one.gates
    ]
    if gates:
        rows = [(*map(markdown, row[:3]), row[3]) for row in gates]
        parts.append(_table(("threat model", "gate", "found", ""), rows))
    parts += _doubts(verdict.audits)
    parts += [
        f"**{markdown(one.threat)} did not finish:** {markdown(one.error)}"
        for one in verdict.audits
        if one.result is None
    ]
    return "\n\n".join(parts) + "\n"


def model_card(verdict: Verdict) -> str:
    """A model card (Mitchell et al., FAT* 2019): what was measured, how, and what it does not say.

    What an audit cannot know (intended use, training data) is left to be filled in.

    >>> from robustann.outputs.verdict import conclude
    >>> card = model_card(conclude([Audited("linf-0.2", "linf 0.2", "runs/audit", result)]))
    >>> [line for line in card.splitlines() if line.startswith("## ")][:4]
    ['## Model', '## Intended use', '## Training data', '## Evaluation']
    """
    finished = [(one, one.result) for one in verdict.audits if one.result is not None]
    parts = [f"# Model card: {markdown(verdict.model)}"]
    if finished:
        parts += ["## Model", _about(finished[0][1])]
    parts += [
        "## Intended use",
        "*Not known to the audit; fill in: for what, by whom, and what it is not meant for.*",
        "## Training data",
        "*Not known to the audit; fill in.*",
        "## Evaluation",
        f"On {markdown(verdict.data)}. Intervals are of 95 %. Robust accuracy counts an image only "
        "if no attack of the audit changed its class; it is an upper bound, and a better attack "
        "may find less. Certified accuracy is proven, a lower bound.",
        _figures(verdict.audits),
    ]
    if finished:
        parts += ["### Classes", *_classes(finished)]
        parts += _corruptions([result for _, result in finished])
        parts += _weights([result for _, result in finished])
    parts += ["## Can the evaluation be believed?", *_doubts(verdict.audits)]
    for one, result in finished:
        if result.believable:
            made = sum(finding.verdict != "not run" for finding in result.findings)
            parts.append(
                f"{markdown(one.threat)}: {made} checks of the evaluation found nothing that is "
                "left open."
            )
        elif not result.findings:
            parts.append(f"{markdown(one.threat)}: not checked.")
    parts += ["## Limits", _limits(verdict.audits)]
    if finished:
        parts += ["## How to repeat it", _repeat(finished[0][1])]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(audits: Sequence[Audited]) -> str:
    rows = []
    for one in audits:
        result = one.result
        if result is None:
            rows.append((markdown(one.threat), "-", "-", "-", "-", "not finished"))
            continue
        found = result.certificate
        rows.append(
            (
                markdown(one.threat),
                str(result.n),
                with_interval(result.clean_accuracy, result.clean.interval),
                with_interval(result.robust_accuracy, result.worst_case.scores.interval),
                "-" if found is None else with_interval(found.certified_accuracy, found.interval),
                "yes" if result.believable else "**no**" if result.findings else "not checked",
            )
        )
    head = ("threat model", "images", "clean accuracy", "robust accuracy", "certified accuracy",
            "believable")  # fmt: skip
    alone = [
        f"{markdown(one.threat)}, by {markdown(by.words)}: "
        f"{with_interval(by.accuracy, by.interval)}."
        for one in audits
        if one.result is not None and (by := one.result.protocol) is not None
    ]
    return "\n\n".join([_table(head, rows), *alone])


def _doubts(audits: Sequence[Audited]) -> list[str]:
    return [
        f"**Do not believe {markdown(one.threat)} yet:** {markdown(finding.check)}: "
        f"{markdown(finding.explanation)}"
        for one in audits
        for finding in one.unresolved
    ]


def _about(result: AuditResult) -> str:
    found = result.provenance
    rows = [
        ("architecture and file", markdown(found.model)),
        ("parameters", f"{found.parameters:,}"),
        ("SHA-256 of all parameters and buffers", markdown(found.model_sha256)),
        ("classes", str(len(result.class_names))),
    ]
    code = found.config.get("code")
    if isinstance(code, list):
        rows.append(("code of the user that was run", markdown(", ".join(code))))
    return _table(("", ""), rows)


def _classes(finished: Sequence[tuple[Audited, AuditResult]]) -> list[str]:
    first = finished[0][1]
    scores: list[tuple[ClassScores, ...]] = [
        result.worst_case.scores.classes for _, result in finished
    ]
    # The worst come first: an average hides them.
    order = sorted(
        (place for place, one in enumerate(first.clean.classes) if one.support),
        key=lambda place: (min(found[place].recall for found in scores), place),
    )
    head = ["class", "images", "clean recall", *(f"recall, {one.threat}" for one, _ in finished)]
    rows = [
        [
            markdown(first.clean.classes[place].name, 80),
            str(first.clean.classes[place].support),
            percent(first.clean.classes[place].recall),
            *(percent(found[place].recall) for found in scores),
        ]
        for place in order[:_MOST_CLASSES]
    ]
    more = len(order) - len(rows)
    tables = [_table([markdown(cell) for cell in head], rows)]
    return tables + (
        [f"The worst {_MOST_CLASSES}; {more} more are in results.json."] if more else []
    )


def _corruptions(results: Sequence[AuditResult]) -> list[str]:
    found = next((one.corruptions for one in results if one.corruptions is not None), None)
    if found is None:
        return []
    lines = [f"- Not measured: {markdown(reason)}" for reason in found.not_measured]
    lines += [
        f"- {markdown(one.kind.replace('_', ' '))}: {percent(one.mean_accuracy)} in the mean over "
        f"severities, {percent(min(level.accuracy for level in one.levels))} at worst"
        for one in found.kinds
    ]
    return ["### Accuracy under common corruptions, without an attacker", "\n".join(lines)]


def _weights(results: Sequence[AuditResult]) -> list[str]:
    found = next((result.weights for result in results if result.weights is not None), None)
    if found is None:
        return []
    lines = [f"- Not measured: {markdown(reason)}" for reason in found.not_measured]
    if found.fixed is not None:
        lines += [
            f"- {100 * level.rate:.3g} % of the bits of {found.fixed.bits}-bit weights wrong: "
            f"error {percent(level.mean)} in the mean, {percent(level.worst)} at worst"
            for level in found.fixed.levels
        ]
    if found.search is not None:
        lines.append(
            f"- {len(found.search.flips)} chosen bits of {found.search.total_bits:,} bring the "
            f"accuracy from {percent(found.search.stored_accuracy)} to "
            f"{percent(found.search.accuracy)}"
        )
    return ["### Faults in the weights", "\n".join(lines)] if lines else []


def _limits(audits: Sequence[Audited]) -> str:
    threats = ", ".join(markdown(one.threat) for one in audits)
    return (
        f"Measured for these attackers alone: {threats}, on images of the test part. Nothing "
        "is said about other changes (rotation, weather, physical objects), other data, poisoned "
        "training data or stolen models."
    )


def _repeat(result: AuditResult) -> str:
    found = result.provenance
    rows = [
        ("command", markdown(result.execution.command)),
        ("seed", str(found.seed)),
        ("preset", markdown(found.preset or "attacks named one by one")),
        ("attacks", markdown(", ".join(attack.label for attack in result.attacks))),
        ("SHA-256 of images and labels", markdown(found.data_sha256)),
        ("versions", markdown(", ".join(f"{k} {v}" for k, v in found.versions.items()))),
        ("date", markdown(result.execution.started)),
    ]
    rows += [
        (words, markdown(value))
        for key, words in (
            ("config_file", "configuration"),
            ("config_sha256", "SHA-256 of the configuration"),
        )
        if isinstance(value := found.config.get(key), str)
    ]
    return _table(("", ""), rows)
