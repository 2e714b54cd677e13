"""Audits that certify: proofs from below, attacks from above, and what is said if they cross."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from attacking import lasting
from pydantic import ValidationError
from torch import nn

import robustann as ra
from robustann.auditing import AuditConfig, certifying
from robustann.auditing.passes import Passes
from robustann.auditing.runner import Audit
from robustann.certificates import LinfCertificate, Smoothed, SmoothingCertificate, certify_linf
from robustann.certificates.smoothing import ABSTAINED
from robustann.cli import main
from robustann.cli.verdict import verdict
from robustann.defenses import IBPTraining
from robustann.findings import unresolved
from robustann.reports import render

THREAT = ra.ThreatModel("linf", 0.05)
ASKED = {"preset": "quick", "max_samples": 60, "explain": False, "certify": True}


@pytest.fixture(scope="module")
def trained(digits) -> nn.Module:
    return ra.train("small-cnn", digits, step=IBPTraining(THREAT), epochs=8, batch_size=64).model


@pytest.fixture(scope="module")
def result(trained, digits) -> ra.AuditResult:
    return ra.audit(trained, digits, THREAT, **ASKED)


def certify_everything(model, x, labels, threat, **options) -> LinfCertificate:
    """A faulty certifier."""
    everything = torch.ones(len(x), dtype=torch.bool)
    return LinfCertificate(everything, everything.double(), labels, threat, "crown")


def crossing(result: ra.AuditResult):
    (found,) = (one for one in result.findings if one.check == "certificate-crossed")
    return found


def stopping_at_the_third(genuine):
    """A method that goes on as it did twice, and is then interrupted."""
    begun = []

    def call(self, *args):
        begun.append(1)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return genuine(self, *args)

    return call


def test_certified_from_below_and_attacked_from_above(result, trained, digits):
    certificate = result.certificate
    rows = torch.tensor(result.clean_samples.index)
    x, labels = digits.test.images(rows), digits.test.labels[rows]
    direct = certify_linf(trained, x, labels, THREAT)
    assert list(certificate.certified) == direct.certified.tolist()
    assert certificate.certified_accuracy == pytest.approx(direct.certified_accuracy, abs=1e-6)
    assert (certificate.interval.low, certificate.interval.high) == pytest.approx(
        direct.interval, rel=1e-5
    )
    assert 0.5 < certificate.certified_accuracy <= result.robust_accuracy < result.clean_accuracy
    for held, by, label, prediction in zip(
        certificate.certified, result.worst_case.broken_by, result.clean_samples.label,
        result.clean_samples.prediction, strict=True,
    ):  # fmt: skip
        assert not held or (by is None and label == prediction)
    assert certificate.method == "crown"
    assert certificate.crossed == ()
    assert crossing(result).verdict == "pass"
    assert result.believable


def test_its_curve_falls_below_that_of_the_attacks(result, trained, digits):
    points = result.certificate.curve
    eps = [point.eps for point in points]
    shares = [point.certified_accuracy for point in points]
    assert eps == [0, 0.0125, 0.025, 0.0375, 0.05, 0.0625, 0.075, 0.1, 0.15]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == result.clean_accuracy
    assert shares[eps.index(0.05)] == result.certificate.certified_accuracy
    for point in points:
        before = [one.robust_accuracy for one in result.curve if one.eps <= point.eps]
        assert point.certified_accuracy <= before[-1]
    rows = torch.tensor(result.clean_samples.index)
    x, labels = digits.test.images(rows), digits.test.labels[rows]
    for place in (2, 6):
        direct = certify_linf(trained, x, labels, THREAT.with_eps(eps[place]))
        assert shares[place] == pytest.approx(direct.certified_accuracy, abs=1e-6)
    short = ra.audit(trained, digits, THREAT, **{**ASKED, "curve": False, "attacks": ["fgsm"]})
    assert [point.eps for point in short.certificate.curve] == [0, 0.05]


def test_of_a_linear_model_all_that_stands_is_certified():
    """Bounds of a linear model are exact, and so is one signed step: nothing is left between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    x = torch.rand(80, 1, 4, 4)
    model[1].bias.data -= model(x).mean(0).detach()
    y = model(x).argmax(1)
    y[:5] = 1 - y[:5]
    found = ra.audit(
        model, (x, y), ra.ThreatModel("linf", 0.1), attacks=["fgsm", "mm"], certify=True
    )
    standing = [
        label == worst for label, worst in zip(y.tolist(), found.worst_case.prediction, strict=True)
    ]
    assert list(found.certificate.certified) == standing
    assert 5 < sum(standing) < 75


def test_the_same_for_every_batch_size_and_after_a_stop(trained, digits, tmp_path, monkeypatch):
    asked = {**ASKED, "max_samples": 10, "attacks": ["noise", "mm:steps=5"]}
    results = [
        lasting(ra.audit(trained, digits, THREAT, **asked, batch_size=size)) for size in (1, 7, 10)
    ]
    assert results[0] == results[1] == results[2]
    monkeypatch.setattr(Passes, "second", stopping_at_the_third(Passes.second))
    with pytest.raises(KeyboardInterrupt):
        ra.audit(trained, digits, THREAT, **asked, batch_size=3, state=tmp_path)
    again = ra.audit(trained, digits, THREAT, **asked, batch_size=3, state=tmp_path)
    assert lasting(again) == results[0]


def test_certifying_changes_nothing_else(result, trained, digits):
    alone = ra.audit(trained, digits, THREAT, **{**ASKED, "certify": False})
    assert alone.certificate is None
    without, others = lasting(alone), lasting(result)
    others["certificate"] = None
    others["findings"].pop()
    others["provenance"]["config"]["certify"] = False
    assert without == others


def test_a_faulty_certificate_is_said_aloud(trained, digits, monkeypatch):
    monkeypatch.setattr(certifying, "certify_linf", certify_everything)
    found = ra.audit(trained, digits, THREAT, **ASKED)
    broken = {row for row, by in enumerate(found.worst_case.broken_by) if by is not None}
    assert broken
    assert found.certificate.certified_accuracy == 1
    assert broken <= set(found.certificate.crossed)
    assert crossing(found) in unresolved(found.findings)
    assert crossing(found).value == pytest.approx(len(found.certificate.crossed) / 60, rel=1e-5)
    assert not found.believable
    assert "do not believe this yet: certificate-crossed" in verdict(found)
    assert "one of both is wrong" in verdict(found)
    html = render(found)
    assert "A proof and an attack contradict each other" in html
    assert "Do not believe these figures yet" in html
    # Unasked, too; while a pass alone would say nothing of the rest of the evaluation.
    bare = ra.audit(trained, digits, THREAT, **ASKED, trust=False)
    assert [one.check for one in bare.findings] == ["certificate-crossed"]
    assert not bare.believable
    monkeypatch.undo()
    assert ra.audit(trained, digits, THREAT, **ASKED, trust=False).findings == ()


def test_a_certificate_that_is_wrong_at_a_larger_eps_alone(trained, digits, monkeypatch):
    def wrong_beyond(model, x, labels, threat, **options):
        certifier = certify_everything if threat.eps > THREAT.eps else certify_linf
        return certifier(model, x, labels, threat, **options)

    monkeypatch.setattr(certifying, "certify_linf", wrong_beyond)
    found = ra.audit(trained, digits, THREAT, **ASKED)
    assert found.certificate.crossed
    for row in found.certificate.crossed:
        assert found.certificate.certified[row]
        assert found.worst_case.broken_by[row] is None
    assert crossing(found).verdict == "fail"


def test_strict_exits_with_5_and_the_terminal_shows_both_sides(
    model_file, tmp_path, monkeypatch, capsys
):
    def run(*more: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        command = ["audit", "--model", str(model_file), "--eps", "0.1", "--preset", "quick"]
        command += ["--max-samples", "24", "--no-explain", "--certify", *more]
        monkeypatch.setattr("sys.argv", ["robustann", *command])
        code = main._run()
        said = capsys.readouterr()
        return code, said.out, said.err

    code, out, _ = run("--eps", "0.01", "--strict")
    assert code == 0
    assert "certified accuracy " in out
    assert ra.AuditResult.load(Path("runs/audit-model/results.json")).certificate is not None
    monkeypatch.setattr(certifying, "certify_linf", certify_everything)
    code, out, _ = run("--strict")
    assert code == 5
    assert "certificate-crossed" in out
    assert run()[0] == 0
    code, _, err = run("--norm", "l2")
    assert code == 2
    assert "--smoothing" in err
    assert run("--smoothing", "0")[0] == 2


def test_refused_before_any_attack_and_with_the_layer(digits, monkeypatch):
    def never(self, *args):
        raise AssertionError("an attack began")

    monkeypatch.setattr(Passes, "first", never)
    odd = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Sigmoid())
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    wrong = {
        r"model\.2 \(Sigmoid\) .* leave out certify": (odd, THREAT),
        "expected to certify in l2 a smoothed": (plain, ra.ThreatModel("l2", 0.5)),
        "in linf one that is not, got linf and Smoothed": (Smoothed(plain, 0.1), THREAT),
        "norm linf or l2 to certify, got l1": (plain, ra.ThreatModel("l1", 1.0)),
    }
    for message, (model, threat) in wrong.items():
        with pytest.raises(ra.UsageError, match=message):
            ra.audit(model, digits, threat, **ASKED)
    audit = Audit(AuditConfig(threat=THREAT, certify=True))
    with pytest.raises(ra.UsageError, match="Sigmoid"):
        audit.estimate(odd, digits.test, class_names=digits.class_names)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(certifying, "propagate", full)
    with pytest.raises(ra.UsageError, match="more memory than there is"):
        ra.audit(plain, digits, THREAT, **ASKED)


def test_where_linear_bounds_take_too_much_memory_intervals_do(trained, digits, monkeypatch):
    asked = {**ASKED, "attacks": ["fgsm"], "trust": False, "curve": False}
    tight = ra.audit(trained, digits, THREAT, **asked).certificate
    monkeypatch.setattr(certifying, "_MEMORY", 1)
    loose = ra.audit(trained, digits, THREAT, **asked).certificate
    assert (tight.method, loose.method) == ("crown", "ibp")
    assert "too much memory" in loose.words
    assert all(
        not held or also for held, also in zip(loose.certified, tight.certified, strict=True)
    )
    assert 0 < loose.certified_accuracy < tight.certified_accuracy


def test_out_of_memory_halves_the_images_and_changes_nothing(trained, digits, monkeypatch):
    asked = {**ASKED, "attacks": ["fgsm"], "trust": False, "curve": False}
    expected = ra.audit(trained, digits, THREAT, **asked).certificate
    sizes = []

    def small_memory(model, x, *args, **kwargs):
        sizes.append(len(x))
        if len(x) > 16:
            raise torch.OutOfMemoryError("too much")
        return certify_linf(model, x, *args, **kwargs)

    monkeypatch.setattr(certifying, "certify_linf", small_memory)
    assert ra.audit(trained, digits, THREAT, **asked).certificate == expected
    assert max(sizes) == 60


def test_json_and_csv(result, tmp_path):
    result.save(tmp_path)
    assert ra.AuditResult.load(tmp_path / "results.json") == result
    rows = list(csv.DictReader(io.StringIO(result.samples_csv())))
    assert [row["certified"] == "1" for row in rows] == list(result.certificate.certified)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("certified", [True], "expected 60 entries in certified"),
        ("certified_accuracy", 1.0, "the share of the certified samples"),
        ("certified_accuracy", 1.5, "shares from 0 to 1"),
        ("eps", -0.1, "eps of the certificate"),
        ("crossed", [60], "rising places from 0 to 59"),
        ("crossed", [3, 2], "rising places"),
        ("method", "hope", "crown"),
    ],
)
def test_what_no_audit_certifies_is_refused(result, part, value, message):
    values = json.loads(result.to_json())
    values["certificate"][part] = value
    with pytest.raises(ValidationError, match=message):
        ra.AuditResult.model_validate(values)


def test_a_broken_sample_that_is_certified_must_be_among_the_crossed(result):
    values = json.loads(result.to_json())
    row = next(i for i, by in enumerate(result.worst_case.broken_by) if by is not None)
    certified = values["certificate"]["certified"]
    certified[row] = True
    values["certificate"]["certified_accuracy"] = sum(certified) / 60
    with pytest.raises(ValidationError, match="among crossed"):
        ra.AuditResult.model_validate(values)
    values["certificate"]["crossed"] = [row]
    assert ra.AuditResult.model_validate(values).certificate.crossed == (row,)


DISTANCES = [0.5, 0.4, 0.3, 0.12, 0.05, -0.2]
L2 = ra.ThreatModel("l2", 0.2)
SMOOTHED = {
    "attacks": ["pgd:steps=8"], "certify": True, "trust": False, "explain": False, "curve": False
}  # fmt: skip


def half_space() -> tuple[Smoothed, tuple[torch.Tensor, torch.Tensor]]:
    """A hyperplane through the middle, whose smoothed classifier is itself, and images on both
    sides, all of class 0: of each the radius is its distance."""
    normal = torch.randn(16, generator=torch.Generator().manual_seed(0))
    normal /= normal.norm()
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    # Steep, so that the mean of the softmax says what the vote does.
    model[1].weight.data = 50 * torch.stack([normal, -normal])
    model[1].bias.data = 50 * torch.tensor([-0.5, 0.5]) * normal.sum()
    x = 0.5 + torch.tensor(DISTANCES)[:, None, None, None] * normal.view(1, 1, 4, 4)
    return Smoothed(model, 0.25, draws=64), (x, torch.zeros(len(x), dtype=torch.int64))


def test_smoothing_certifies_the_smoothed_classifier_that_was_attacked():
    model, pair = half_space()
    found = ra.audit(model, pair, L2, **{**SMOOTHED, "curve": True})
    certificate = found.certificate
    assert certificate.method == "smoothing"
    assert list(certificate.certified) == [True, True, True, False, False, False]
    assert [by is not None for by in found.worst_case.broken_by] == [
        False, False, False, True, True, False
    ]  # fmt: skip
    assert certificate.crossed == ()
    for point in certificate.curve:
        expected = sum(distance > point.eps for distance in DISTANCES) / 6
        if all(abs(distance - point.eps) > 0.03 for distance in DISTANCES):
            assert point.certified_accuracy == pytest.approx(expected, abs=1e-5)
    settings = certificate.settings
    assert settings["sigma"] == 0.25
    assert (settings["n"], settings["alpha"], settings["confidence"]) == (10_000, 0.001, 0.999)
    assert settings["attack_draws"] == 64
    for words in ("smoothed classifier", "99.900%", "10,000 draws", "64 draws"):
        assert words in certificate.words
    assert found.provenance.config["smoothing"] == 0.25
    assert "proven (smoothing)" in verdict(found)


def test_attacks_on_a_smoothed_model_average_over_draws():
    model, pair = half_space()
    model.draws = 4
    found = ra.audit(model, pair, L2, **{**SMOOTHED, "trust": True, "attacks": ["pgd:steps=2"]})
    assert found.certificate.settings["attack_draws"] == 20 * 4
    assert crossing(found).verdict == "pass"


def test_smoothing_is_the_same_for_every_batch_size():
    model, pair = half_space()
    found = [ra.audit(model, pair, L2, **SMOOTHED, batch_size=size) for size in (1, 4, 6)]
    assert found[0].certificate == found[1].certificate == found[2].certificate


def certify_all_smoothed(model, x, labels, *, sigma, n, alpha, random) -> SmoothingCertificate:
    """A faulty one."""
    radius = torch.full((len(x),), 9.0, dtype=torch.float64)
    return SmoothingCertificate(
        labels, radius, labels, labels, torch.full_like(labels, n), sigma, 100, n, alpha
    )


def test_a_vote_decides_whether_a_smoothed_certificate_is_crossed(monkeypatch, tmp_path):
    monkeypatch.setattr(
        certifying, "certify", lambda *args, n0, **kwargs: certify_all_smoothed(*args, **kwargs)
    )
    model, pair = half_space()
    found = ra.audit(model, pair, L2, **SMOOTHED)
    assert found.certificate.crossed == (3, 4)
    assert found.certificate.settings["unconfirmed"] == 0
    assert not found.believable
    # The images that are voted on outlast a stop.
    with monkeypatch.context() as patch:
        patch.setattr(Passes, "second", stopping_at_the_third(Passes.second))
        with pytest.raises(KeyboardInterrupt):
            ra.audit(model, pair, L2, **SMOOTHED, batch_size=2, state=tmp_path)
    again = ra.audit(model, pair, L2, **SMOOTHED, batch_size=2, state=tmp_path)
    assert again.certificate == found.certificate
    # What the vote leaves open contradicts nothing, and is told.
    monkeypatch.setattr(
        certifying, "predict", lambda model, x, **kwargs: torch.full((len(x),), ABSTAINED)
    )
    open_ = ra.audit(model, pair, L2, **SMOOTHED)
    assert open_.certificate.crossed == ()
    assert open_.certificate.settings["unconfirmed"] == 2
    assert "2 certified samples fell" in open_.certificate.words
    values = json.loads(open_.to_json())
    assert ra.AuditResult.model_validate(values) == open_
