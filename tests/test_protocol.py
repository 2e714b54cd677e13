"""The figure of a published protocol stands beside a headline that counts more."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_mending import BRIEF, THREAT, doubting
from torch import nn
from zoo import Closed, Noisy, Quantised

import robustann as ra
from robustann.attacks import APGD, Square
from robustann.auditing import presets
from robustann.auditing.presets import PRESETS, Stage, get_preset
from robustann.cli.verdict import verdict
from robustann.outputs.pages import summary_page
from robustann.outputs.verdict import Audited, conclude, summary_json
from robustann.reports import render
from robustann.results import AuditResult

NAME = "AutoAttack 'standard'"
ASKED = {**BRIEF, "preset": "autoattack"}


@pytest.fixture
def short(monkeypatch):
    """The protocol, with a fraction of its steps."""
    stages = (Stage(APGD(steps=2)), Stage(APGD(loss="dlr", steps=2)), Stage(Square(queries=20)))
    given = replace(get_preset("autoattack"), stages=stages, queries=60, curve_steps=5)
    monkeypatch.setitem(presets.PRESETS, "autoattack", given)


def standing(result: AuditResult, labels: tuple[str, ...]) -> int:
    ran = [one for one in result.attacks if one.label in labels]
    clean = result.clean_samples
    return sum(
        guess == label and not any(one.samples.success[row] for one in ran)
        for row, (guess, label) in enumerate(zip(clean.prediction, clean.label, strict=True))
    )


def test_what_remedies_add_is_told_apart_from_the_protocol(short, model, digits, monkeypatch):
    doubting(monkeypatch, "steps-help")
    result = ra.audit(model, digits, THREAT, **ASKED)
    found = result.protocol
    assert found is not None
    assert found.attacks == ("apgd:steps=2", "apgd:steps=2,loss=dlr", "square:queries=20")
    assert found.accuracy == pytest.approx(standing(result, found.attacks) / result.n, abs=1e-6)
    # What it says with nothing added.
    alone = ra.audit(model, digits, THREAT, **ASKED, trust=False)
    assert alone.protocol == found
    assert alone.robust_accuracy == found.accuracy > result.robust_accuracy
    assert found.words == f"{NAME} alone, as published"
    more = round((found.accuracy - result.robust_accuracy) * result.n)
    line = next(line for line in verdict(result).splitlines() if NAME in line)
    assert line.startswith(f"robust accuracy {100 * found.accuracy:.1f} %")
    assert line.endswith(f"{more} more fell to what the audit added")
    assert "more fell" not in verdict(alone)
    read = AuditResult.model_validate_json(result.to_json())
    assert read.protocol == found
    page = render(result)
    assert f"{100 * found.accuracy:.1f}" in page.split("alone, as published")[1][:40]
    assert f"broke {more} more" in page
    told = conclude([Audited("linf-0.1", "linf 0.1", "runs", result)])
    assert json.loads(summary_json(told))["audits"][0]["protocol"]["value"] == found.accuracy
    assert "alone, as published" in summary_page(told)


def test_a_curve_and_a_surrogate_add_to_the_protocol_too(short, model, digits):
    asked = {**ASKED, "curve": True, "trust": False}
    result = ra.audit(model, digits, THREAT, **asked, surrogate=model)
    found = result.protocol
    assert found is not None
    assert len(result.attacks) == 5
    assert len(found.attacks) == 3
    assert found.accuracy == pytest.approx(standing(result, found.attacks) / result.n, abs=1e-6)
    assert result.robust_accuracy < found.accuracy


@pytest.mark.parametrize(
    ("change", "asked", "threat", "told"),
    [
        (None, {"budget": 10}, THREAT, "ended by a budget of 10 propagations an image"),
        (None, {"budget": 10_000}, THREAT, None),
        # It is spent, but all have fallen.
        (None, {"budget": 4}, ra.ThreatModel("linf", eps=1), None),
        (None, {"precision": "bf16"}, THREAT, "searching in bf16"),
        (None, {}, ra.ThreatModel("l1", eps=1), "it was published for linf and l2"),
        (lambda model: nn.Sequential(model, nn.Softmax(1)), {}, THREAT,
         "on the logarithm of the output, which is a softmax"),
        (Noisy, {}, THREAT, "averaged over 20 draws"),
        (Quantised, {}, THREAT, "with gradients through a part of the model"),
    ],
)  # fmt: skip
def test_where_it_is_not_what_was_published_it_says_so(
    change, asked, threat, told, short, model, digits
):
    audited = model if change is None else change(model)
    result = ra.audit(audited, digits, threat, **{**ASKED, "max_samples": 16, **asked})
    found = result.protocol
    assert found is not None
    assert found.departures == (() if told is None else (told,))
    assert ("not as published" in verdict(result)) == (told is not None)


@pytest.mark.parametrize(("classes", "targets", "told"), [
    (2, 0, "with margins in place of DLR, which takes 4 classes"), (4, 0, None),
    (4, 1, "with margins in place of DLR, which takes 5 classes"), (5, 1, None),
])  # fmt: skip
def test_few_classes_have_no_dlr(classes, targets, told, monkeypatch):
    stages = (Stage(APGD(steps=1)), Stage(APGD(loss="dlr", steps=1, targets=targets)))
    given = replace(get_preset("autoattack"), stages=stages)
    monkeypatch.setitem(presets.PRESETS, "autoattack", given)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(100, 1, 2, 2, generator=generator), torch.arange(100) % classes
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, classes))
    result = ra.audit(model, ra.data.from_arrays(x, y), THREAT, **{**ASKED, "max_samples": 4})
    assert result.protocol is not None
    assert result.protocol.departures == (() if told is None else (told,))


def test_without_gradients_the_search_alone_is_left_of_it(short, model, digits):
    result = ra.audit(Closed(model), digits, THREAT, **{**ASKED, "max_samples": 8})
    found = result.protocol
    assert found is not None
    assert found.attacks == ("square:queries=20",)
    assert found.departures[0] == "without its attacks by gradients, for the model has none"


def test_no_other_preset_and_no_named_attack_is_a_protocol(model, digits):
    assert [name for name, preset in PRESETS.items() if preset.protocol] == [
        "autoattack", "autoattack-rand",
    ]  # fmt: skip
    asked = {"max_samples": 8, "explain": False, "curve": False, "trust": False}
    assert ra.audit(model, digits, THREAT, preset="quick", **asked).protocol is None
    result = ra.audit(model, digits, THREAT, preset="autoattack", attacks=("fgsm",), **asked)
    assert result.protocol is None
    assert "published" not in verdict(result)
