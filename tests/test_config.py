"""Configurations: what they may say, who overrides whom, and audits in several threat models."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import robustann as ra
from robustann.auditing import METRICS, Audit
from robustann.auditing.passes import Passes
from robustann.cli import main
from robustann.cli.audit import audit
from robustann.cli.options import threat_options
from robustann.cli.settings import PLACES
from robustann.config import TEMPLATE, USUAL_EPS, AuditFile, json_schema, resolve, to_toml
from robustann.config.reading import slug_of
from robustann.config.schema import parse_budget
from robustann.errors import ModelError, RefusedError, RobustannError, UsageError
from robustann.findings import Finding
from robustann.outputs import conclude
from robustann.results import AuditResult
from robustann.threat import ThreatModel

CHEAP = """
[attacks]
run = ["fgsm"]
max_samples = 16
trust = false
curve = false
[explanation]
enabled = false
"""
TWO = '[threats]\nlinf = "8/255"\nl2 = 0.5\n'


@pytest.fixture
def write(tmp_path, model_file):
    """Write audit.toml: these lines after those of a cheap audit of the model."""

    def written(*parts: str, start: str = CHEAP) -> Path:
        path = tmp_path / "audit.toml"
        model = f'[model]\npath = "{model_file.as_posix()}"\n'
        path.write_text("\n".join([model, start, *parts]), encoding="utf-8")
        return path

    return written


# Two threat models, in CI style.


def test_two_threat_models_one_verdict(run, write, tmp_path):
    write(
        TWO,
        '[gates]\nfail_under = { clean_accuracy = 0.5, "robust_accuracy@linf" = 0.01 }',
        '[output]\nfolder = "out"\njunit = "ci/junit.xml"\nsarif = "ci/r.sarif"',
        'markdown = "ci/s.md"\nmodel_card = "ci/card.md"',
    )
    code, out, _ = run("audit", "--config", "audit.toml")
    assert code == 0
    assert "== linf 8/255 ==" in out
    assert "== l2 0.5 ==" in out
    assert out.rstrip().endswith("verdict: pass")
    summary = json.loads(Path("out/summary.json").read_text())
    assert (summary["verdict"], summary["exit_code"]) == ("pass", 0)
    assert [one["name"] for one in summary["audits"]] == ["linf-8-255", "l2-0.5"]
    for name, norm, gates in [("linf-8-255", "linf", 2), ("l2-0.5", "l2", 1)]:
        folder = Path("out", name)
        assert sorted(path.name for path in folder.iterdir()) == [
            "report.html", "results.json", "samples.csv",
        ]  # fmt: skip
        result = AuditResult.load(folder / "results.json")
        assert result.threat.norm == norm
        assert len(result.gates) == gates
        told = result.provenance.config
        assert told["config_file"] == "audit.toml"
        assert len(str(told["config_sha256"])) == 64
    suites = ElementTree.parse("ci/junit.xml").getroot()
    assert [suite.get("name") for suite in suites] == ["linf 8/255", "l2 0.5"]
    assert suites.get("failures") == "0"
    assert json.loads(Path("ci/r.sarif").read_text())["runs"][0]["results"] == []
    assert Path("ci/s.md").read_text().startswith("## ✅ Robustness: pass")
    assert "| l2 0.5 | 16 |" in Path("ci/card.md").read_text()


def test_one_failed_gate_of_one_threat_model_fails_the_run(run, write):
    write(TWO, '[gates]\nfail_under = { "robust_accuracy@l2-0.5" = 1 }')
    arguments = ["audit", "--config", "audit.toml", "--output-dir", "out", "--quiet"]
    code, out, err = run(*arguments, "--junit", "j.xml", "--sarif", "r.sarif")
    assert (code, out) == (1, "")
    assert err.startswith("gate failed: l2 0.5: robust_accuracy ")
    assert err.count("gate failed") == 1
    suites = ElementTree.parse("j.xml").getroot()
    assert [suite.get("failures") for suite in suites] == ["0", "1"]
    (found,) = json.loads(Path("r.sarif").read_text())["runs"][0]["results"]
    assert (found["ruleId"], found["level"]) == ("gate/robust_accuracy", "error")
    place = found["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert place == "audit.toml"
    assert json.loads(Path("out/summary.json").read_text())["exit_code"] == 1


def test_one_threat_model_keeps_the_plain_layout(run, write):
    write('[threats]\nl2 = "1/2"')
    assert run("audit", "--config", "audit.toml", "--output-dir", "out")[0] == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "report.html", "results.json", "samples.csv", "summary.json",
    ]  # fmt: skip
    assert AuditResult.load("out/results.json").threat.eps_text == "1/2"


def test_weights_and_corruptions_are_measured_once(run, write):
    write(TWO, "weights = true\ncorruptions = true\n")
    assert run("audit", "--config", "audit.toml", "--output-dir", "o", "--preset", "quick")[0] == 0
    first, second = (
        AuditResult.load(f"o/{name}/results.json") for name in ("linf-8-255", "l2-0.5")
    )
    assert first.weights is not None
    assert second.weights is None
    assert first.corruptions is not None
    assert second.corruptions is None


def test_a_stopped_run_has_the_first_threat_model_still(run, write, monkeypatch):
    write(TWO)
    arguments = ["audit", "--config", "audit.toml", "--output-dir", "out", "--batch-size=16"]
    genuine, begun = Passes.first, []

    def stopping(self, *rest):
        begun.append(self.config.threat.norm)
        if begun[-1] == "l2" and begun.count("l2") == 1:
            raise KeyboardInterrupt
        return genuine(self, *rest)

    monkeypatch.setattr(Passes, "first", stopping)
    code, _, err = run(*arguments)
    assert code == 130
    assert "interrupted" in err
    assert AuditResult.load("out/linf-8-255/results.json").n == 16
    assert not Path("out/summary.json").exists()
    code, _, err = run(*arguments)
    assert code == 0
    assert "linf 8/255: going on with a stopped audit: 16 of 16 images are done" in err
    assert begun == ["linf", "l2", "l2"]
    assert not list(Path("out").glob("*/unfinished"))


def test_what_fails_in_one_threat_model_leaves_the_other(run, write, monkeypatch):
    write(TWO)
    genuine = Audit.run

    def failing(self, *rest, **named):
        if self.config.threat.norm == "linf":
            raise ModelError("the logits are no numbers")
        return genuine(self, *rest, **named)

    monkeypatch.setattr(Audit, "run", failing)
    arguments = ["audit", "--config", "audit.toml", "--output-dir", "out", "--junit", "j.xml"]
    code, out, err = run(*arguments, "--sarif", "r.sarif", "--markdown", "s.md")
    assert code == 3
    assert err.count("the logits are no numbers") == 1
    assert "verdict: not finished" in out
    assert AuditResult.load("out/l2-0.5/results.json").n == 16
    assert ElementTree.parse("j.xml").getroot().get("errors") == "1"
    invocation = json.loads(Path("r.sarif").read_text())["runs"][0]["invocations"][0]
    assert invocation["executionSuccessful"] is False
    assert "did not finish" in Path("s.md").read_text()
    # With nothing finished there is nothing to show but that.
    monkeypatch.setattr(Audit, "run", lambda *_, **__: (_ for _ in ()).throw(ModelError("never")))
    code, _, err = run("audit", "--config", "audit.toml", "--output-dir", "none")
    assert (code, err.strip().splitlines()[-1]) == (3, "error: never")
    assert json.loads(Path("none/summary.json").read_text())["verdict"] == "not finished"
    assert not list(Path("none").rglob("report.html"))


def test_dry_run_of_two(run, write, tmp_path):
    write(TWO)
    before = set(tmp_path.iterdir())
    code, out, _ = run("audit", "--config", "audit.toml", "--dry-run")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["linf 8/255", "l2 0.5"]
    assert set(tmp_path.iterdir()) == before


def test_certify_where_it_can_be(run, write):
    path = write(TWO, "certify = true\n", "[gates]\nfail_under = { certified_accuracy = 0.5 }")
    first, second = resolve(path).jobs
    assert (first.config.certify, second.config.certify) == (True, False)
    assert (dict(first.demands), dict(second.demands)) == ({"certified_accuracy": 0.5}, {})
    smoothed = resolve(path, {"model": {"smoothing": 0.25}}).jobs
    assert [job.config.certify for job in smoothed] == [False, True]


# Every exit code, reached once.


def test_exit_code_0_and_1_and_baseline(run, write):
    write('[threats]\nlinf = "8/255"')
    base = ["audit", "--config", "audit.toml"]
    assert run(*base, "--output-dir", "before")[0] == 0
    compared = ["--baseline", "before/results.json", "--max-drop", "robust_accuracy=30"]
    assert run(*base, "--output-dir", "o", *compared)[0] == 0
    (gate,) = AuditResult.load("o/results.json").gates
    assert gate.detail == "against 'before/results.json', paired on 16 samples"
    # Evidence that it fell by no point takes more than 16 images.
    tight = ["--baseline", "before", "--max-drop", "robust_accuracy=1"]
    code, _, err = run(*base, "--output-dir", "o", *tight)
    assert code == 1
    assert "robust_accuracy changed by " in err
    assert run(*base, "--output-dir", "o", *tight, "--gate-on", "point")[0] == 0
    # Refused at once: another threat model, other data.
    code, _, err = run(*base, "--output-dir", "p", *compared, "--norm", "l2")
    assert code == 2
    assert "expected a baseline in the threat model l2 0.5, got linf 8/255" in err
    result = AuditResult.load("before/results.json")
    other = result.provenance.model_copy(update={"data_sha256": "0" * 64})
    Path("other.json").write_text(result.model_copy(update={"provenance": other}).to_json())
    wrong = ["--baseline", "other.json", "--max-drop", "robust_accuracy=30"]
    code, _, err = run(*base, "--output-dir", "p", *wrong)
    assert code == 2
    assert "expected a baseline on the same data, got 'other.json'" in err


def test_exit_code_2_and_3_and_4(run, write, tmp_path, model_file):
    path = write('[threats]\nlinf = "8/0"')
    code, _, err = run("audit", "--config", path)
    assert code == 2
    assert f"{path}: threats.linf: expected eps as a finite number" in err
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(model_file.read_bytes()[:-1])
    damaged.with_suffix(".json").write_text(model_file.with_suffix(".json").read_text())
    path = write(TWO)
    assert run("audit", "--config", path, "--model", damaged)[0] == 4
    (tmp_path / "images.npz").write_text("none")
    assert run("audit", "--config", path, "--data", f"npz:{tmp_path / 'images.npz'}")[0] == 3
    write('[data]\nname = "mine:make"')
    assert run("audit", "--config", path)[0] == 4


@pytest.mark.parametrize(("strict", "wanted"), [("--strict", 5), ("--no-strict", 0)])
def test_exit_code_5(run, write, monkeypatch, strict, wanted):
    doubt = Finding(check="randomised", verdict="fail", explanation="It rolls dice.")

    def believed(self, made, split, doubts, result):
        return result.model_copy(update={"findings": (doubt,)})

    monkeypatch.setattr(Audit, "_believed", believed)
    write('[threats]\nlinf = "8/255"', "[gates]\nstrict = true")
    arguments = ["--trust", "--junit", "j.xml", "--sarif", "r.sarif", "--output-dir", "o"]
    assert run("audit", "--config", "audit.toml", *arguments, strict)[0] == wanted
    failures = ElementTree.parse("j.xml").getroot().get("failures")
    assert failures == ("1" if wanted else "0")
    (found,) = json.loads(Path("r.sarif").read_text())["runs"][0]["results"]
    assert found["level"] == ("error" if wanted else "warning")


def test_exit_code_130(run, write, monkeypatch):
    write(TWO)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Audit, "run", interrupted)
    assert run("audit", "--config", "audit.toml", "--output-dir", "o")[0] == 130


def test_what_did_not_finish_has_not_passed():
    assert conclude([]).exit_code == 3


# Who overrides whom.


def shown(run, *arguments) -> dict:
    code, out, err = run("config", "show", *arguments)
    assert (code, err) == (0, "")
    return tomllib.loads(out)


def test_the_command_line_overrides_the_file_and_the_file_the_preset(run, write):
    path = write(TWO, "[gates]\nfail_under = { clean_accuracy = 0.5, robust_accuracy = 0.2 }")
    found = shown(run, path)
    assert found["attacks"]["run"] == ["fgsm"]
    assert found["attacks"]["seed"] == 0
    assert resolve(path).jobs[0].config.chosen == (ra.FGSM(),)
    found = shown(
        run, path, "--attack", "pgd:steps=3", "--attack", "fgsm", "--seed", "7", "--explain",
        "--curve", "--max-samples", "9", "--fail-under", "robust_accuracy=0.3", "--fail-under",
        "robust_accuracy=0.1", "--preset", "quick", "--output-dir", "there", "--budget", "2h",
        "--batch-size", "8", "--data", "mnist", "--device", "cpu",
    )  # fmt: skip
    assert found["attacks"] == {
        "preset": "quick", "run": ["pgd:steps=3", "fgsm"], "seed": 7, "max_samples": 9,
        "curve": True, "trust": False, "budget": "2h", "batch_size": 8,
        "precision": "float32", "channels_last": False, "compile": False, "tune": False,
    }  # fmt: skip
    assert found["explanation"]["enabled"] is True
    # The strictest on the command line counts; what it does not name stays.
    assert found["gates"]["fail_under"] == {"clean_accuracy": 0.5, "robust_accuracy": 0.3}
    assert found["output"]["folder"] == "there"
    assert (found["data"]["name"], found["model"]["device"]) == ("mnist", "cpu")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], {"linf": ["8/255", "0.1"], "l2": ["0.5"]}),
        (["--norm", "linf"], {"linf": ["8/255", "0.1"]}),
        (["--norm", "l2"], {"l2": ["0.5"]}),
        (["--norm", "l1"], {"l1": ["12"]}),
        (["--norm", "l2", "--eps", "1/4"], {"l2": ["1/4"]}),
    ],
)
def test_norm_and_eps_choose_among_the_threat_models(run, write, arguments, wanted):
    path = write('[threats]\nlinf = ["8/255", 0.1]\nl2 = 0.5\nweights = true')
    found = shown(run, path, *arguments)["threats"]
    assert found == {**wanted, "weights": True, "corruptions": False, "certify": False}


def test_eps_alone(run, write):
    path = write("[threats]\nl2 = 0.5")
    assert shown(run, path, "--eps", "0.25")["threats"]["l2"] == ["0.25"]
    path = write(TWO)
    code, _, err = run("config", "show", path, "--eps", "0.25")
    assert code == 2
    assert "expected --norm together with --eps" in err


def test_arch_on_the_command_line_replaces_a_factory(run, write):
    path = write('[data]\nname = "digits"')
    path.write_text(path.read_text().replace("[model]", '[model]\nfactory = "mine:net"'))
    found = shown(run, path, "--arch", "small-cnn")["model"]
    assert found["arch"] == "small-cnn"
    assert "factory" not in found


def test_every_option_has_its_place_and_its_default(model_file):
    apart = {"config_path", "fresh", "dry_run", "quiet", "allow_code_execution", "norm", "eps",
             "shared"}  # fmt: skip
    options = audit.make_context("audit", []).params
    assert set(options) == set(PLACES) | apart
    known = {(section, key) for section in AuditFile.model_fields
             for key in type(getattr(AuditFile(), section)).model_fields}  # fmt: skip
    norms = {("threats", norm) for norm in USUAL_EPS}
    assert set(PLACES.values()) == known - norms
    for name, (section, key) in PLACES.items():
        ours = getattr(getattr(AuditFile(), section), key)
        assert (options[name] or None) == (ours or None), name


def test_the_usual_radii_are_those_of_the_options():
    helped = next(
        o for o in click.command()(threat_options(lambda: None)).params if o.name == "eps"
    )
    assert all(f"{norm} {eps}" in helped.help for norm, eps in USUAL_EPS.items())


# init, validate, show, schema.


def test_init_validate_show_round_trip(run):
    assert run("config", "init")[0] == 0
    text = Path("audit.toml").read_text()
    assert text == TEMPLATE
    code, out, _ = run("config", "validate", "audit.toml")
    assert (code, out) == (0, "fine: audit.toml (linf-8-255, l2-0.5)\n")
    code, out, _ = run("config", "show", "audit.toml")
    assert code == 0
    Path("shown.toml").write_text(out)
    assert resolve(Path("shown.toml")).values == resolve(Path("audit.toml")).values
    code, again, _ = run("config", "show", "shown.toml")
    assert again == out


def test_init_never_overwrites_unless_told(run):
    Path("mine.toml").write_text("# mine")
    code, _, err = run("config", "init", "mine.toml")
    assert code == 2
    assert "--force" in err
    assert Path("mine.toml").read_text() == "# mine"
    assert run("config", "init", "mine.toml", "--force")[0] == 0
    assert Path("mine.toml").read_text() == TEMPLATE
    Path("folder").mkdir()
    assert run("config", "init", "folder", "--force")[0] == 2


def test_the_template_names_every_key_and_its_examples_are_valid(tmp_path):
    lines = re.sub(r"^# (?=\w+ = )", "", TEMPLATE, flags=re.MULTILINE)
    found = tomllib.loads(lines)
    for section in AuditFile.model_fields:
        assert set(found[section]) == set(type(getattr(AuditFile(), section)).model_fields)
    # One can name an architecture or a factory; and the attack of the example knows no l0.
    del found["model"]["factory"], found["threats"]["l0"]
    values = AuditFile.model_validate(found)
    path = tmp_path / "all.toml"
    path.write_text(to_toml(values))
    assert resolve(path).values == values


def test_commented_defaults_are_the_defaults():
    found = tomllib.loads(re.sub(r"^# (?=\w+ = )", "", TEMPLATE, flags=re.MULTILINE))
    ours = AuditFile()
    for section in ("data", "threats", "attacks", "explanation", "gates"):
        for key, value in getattr(ours, section):
            if isinstance(value, (bool, str)) or key == "seed":
                assert found[section][key] == value, key


def test_show_writes_any_text(tmp_path):
    nasty = 'a"b\\c\td\ne\x7f\u2028é😀'
    values = AuditFile.model_validate({
        "model": {"path": nasty}, "gates": {"baseline": nasty, "fail_under": {"believable": True}},
    })  # fmt: skip
    assert tomllib.loads(to_toml(values))["model"]["path"] == nasty
    assert tomllib.loads(to_toml(values))["gates"]["fail_under"] == {"believable": 1.0}


def test_the_published_schema_is_in_step(run):
    published = Path(__file__).parent.parent / "docs" / "audit.schema.json"
    assert json.loads(published.read_text(encoding="utf-8")) == json.loads(json_schema()), (
        "write it again: robustann config schema > docs/audit.schema.json"
    )
    assert json.loads(run("config", "schema")[1]) == json.loads(json_schema())


def test_the_schema_takes_what_is_valid_and_refuses_what_is_not():
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    schema = json.loads(json_schema())
    validator.check_schema(schema)
    checked = validator(schema)
    checked.validate(tomllib.loads(TEMPLATE))
    whole = tomllib.loads(re.sub(r"^# (?=\w+ = )", "", TEMPLATE, flags=re.MULTILINE))
    checked.validate(whole)
    for wrong in (
        {"modell": {}},
        {"model": {"pat": "x"}},
        {"threats": {"linf": True}},
        {"attacks": {"seed": -1}},
        {"gates": {"fail_under": {"accuracy": 0.4}}},
    ):
        assert not checked.is_valid(wrong), wrong


# Mistakes: one clear line each.

MISTAKES = [
    ("[modle]\n", "unknown section 'modle'; did you mean 'model'?"),
    ("[model]\npth = 'a'", "unknown key in [model] 'pth'; did you mean 'path'?"),
    ("[attacks]\nlinf = 1", "There is such a key in [threats]"),
    ("[model]\nallow_code_execution = true", "no file can allow this"),
    ("[model]\npath = 3", "expected model.path as text, got 3"),
    ("[model]\npath = ''", "expected model.path as text that is not empty"),
    ("[model]\nsha256 = 'abc'", "expected model.sha256 as text in its proper form, got 'abc'"),
    ("[model]\nsmoothing = 0", "expected model.smoothing as a number > 0"),
    ("[model]\nsmoothing = nan", "expected model.smoothing as a finite number"),
    ("[model]\nmean = [0.1, true]", "model.mean: expected numbers or text in the list, got true"),
    ("[model]\nbounds = [0, 1, 2]", "expected --bounds LOW,HIGH"),
    ("[model]\nstd = [0]", "expected std above 0"),
    ("[model]\ninput_size = 'big'", "expected --input-size"),
    ("[model]\nclass_names = ['a,b']", "expected no comma in 'a,b'"),
    ("[model]\narch = 'x'\nfactory = 'a:b'", "an architecture or a factory, got both"),
    ("model = 3", "expected model as a table, got 3"),
    ("[data]\ndownload = 1", "expected data.download as true or false, got 1"),
    ("[data]\nimage_size = 0", "expected data.image_size as a number >= 1, got 0"),
    ("[threats]\nlinf = '8/0'", "write it as a decimal or as a fraction"),
    ("[threats]\nlinf = 8", "did you mean 8/255?"),
    ("[threats]\nl2 = -1", "expected eps >= 0"),
    ("[threats]\nl2 = []", "got an empty list"),
    ("[threats]\nl2 = [true]", "expected a radius such as 0.1"),
    ("[threats]\nl3 = 1", "unknown key in [threats] 'l3'; did you mean 'l"),
    ("[threats]\nl2 = [0.5, '1/2']", "expected each threat model once, got l2 1/2 twice"),
    ("[threats]\nl1 = 5\ncertify = true", "expected the norm linf or l2 to certify, got l1"),
    ("[threats]\nl1 = [5, 6]\ncertify = true", "expected a threat model in linf to certify"),
    ("[attacks]\npreset = 'quik'", "attacks.preset: unknown preset 'quik'; did you mean 'quick'?"),
    ("[data]\nname = 'cifar01'", "unknown dataset 'cifar01'; did you mean 'cifar10'?"),
    ("[data]\nname = ' mine:make'", "unknown dataset ' mine:make'"),
    ("[attacks]\nrun = ['pdg']", "unknown attack 'pdg'; did you mean 'pgd'?"),
    ("[attacks]\nrun = ['pgd:step=3']", "did you mean 'steps'"),
    ("[attacks]\nrun = 'pgd'", "expected attacks.run as a list, got 'pgd'"),
    ("[attacks]\nrun = []", "expected attacks.run as a list that is not empty"),
    ("[attacks]\nrun = ['fgsm', 'fgsm']", "expected each attack once"),
    ("[attacks]\nbatch_size = 'few'", "number or 'auto'"),
    ("[attacks]\nbatch_size = 0", "batch_size >= 1"),
    ("[attacks]\nbudget = 'soon'", "or a time such as 90s, 10min or 2h, got 'soon'"),
    ("[attacks]\nmax_samples = 0", "expected attacks.max_samples as a number >= 1, got 0"),
    ("[attacks]\nmax_samples = 1.5", "expected attacks.max_samples as a whole number, got 1.5"),
    ("[attacks]\nseed = -1", "expected attacks.seed as a number >= 0, got -1"),
    ("[explanation]\nenabled = 'yes'", "expected explanation.enabled as true or false, got 'yes'"),
    ("[gates]\nfail_under = { accuracy = 0.4 }", "unknown gate metric 'accuracy'"),
    ("[gates]\nfail_under = { robust_accuracy = 40 }", "write 40 % as 0.40"),
    ("[gates]\nfail_under = { robust_accuracy = true }", "expected a number for robust_accuracy"),
    ("[gates]\nfail_under = 3", "expected gates.fail_under as a table, got 3"),
    ("[gates]\nfail_under = { 'robust_accuracy@l1' = 0.4 }", "unknown threat model of the gate"),
    ("[gates]\nfail_under = { certified_accuracy = 0.4 }", "add --certify, or drop the gate"),
    ("[gates]\nmax_drop = { robust_accuracy = 2 }", "expected --baseline RESULTS.JSON"),
    ("[gates]\nbaseline = 'r.json'", "expected --max-drop METRIC=POINTS"),
    ("[gates]\ngate_on = 'upper'", "expected gates.gate_on as 'lower' or 'point', got 'upper'"),
    ("[gates]\nstrict = true\n[attacks]\ntrust = false", "--no-trust leaves them out"),
    ("[gates]\nfail_under = { believable = 1 }\n[attacks]\ntrust = false", "a gate on believable"),
    ("[output]\njunit = '.bashrc'", "expected a file name that ends in .xml, got '.bashrc'"),
    ("[output]\nsarif = 'r.txt'", "ends in .sarif or .json"),
    ("[model\n", "expected TOML in"),
    ("a = 1\na = 2", "expected TOML in"),
    (f"a = {'9' * 5000}", "expected TOML in"),
    (f"a = {'[' * 5000}", "nested too deeply"),
    (f"{'a.' * 3000}b = 1", "unknown section 'a'"),
    (f"model.path.{'a.' * 3000}b = 1", "expected model.path as text, got a dict too long to show"),
    (f"[attacks]\nseed = 0x{'f' * 9000}", "expected integers of at most 1024 bits"),
    (f"[threats]\nl2 = [[0x{'f' * 9000}]]", "expected integers of at most 1024 bits"),
]


@pytest.mark.parametrize(("text", "says"), MISTAKES)
def test_mistakes_in_a_file(text, says, tmp_path):
    path = tmp_path / "audit.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        resolve(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_all_mistakes_are_told_at_once(run):
    Path("a.toml").write_text("[modle]\n[data]\nnme = 1\n[attacks]\nseed = 'x'\npreset = 'q'")
    code, out, err = run("config", "validate", "a.toml")
    assert (code, out) == (2, "")
    assert err.count("a.toml: ") == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--strict", "--no-trust"], "--no-trust leaves them out"),
        (["--max-drop", "robust_accuracy=2"], "expected --baseline"),
        (["--baseline", "absent.json", "--max-drop", "robust_accuracy=2"], "absent.json"),
        (["--fail-under", "certified_accuracy=0.4"], "add --certify"),
        (["--fail-under", "robust_accuracy@l2=0.4"], "'l2'; Known: linf, linf-8-255"),
        (["--junit", "a.xml", "--sarif", "r.json", "--markdown", "b.md", "--model-card", "b.md"],
         "expected each output in a file of its own, got 'b.md' twice"),
        (["--output-dir", "o", "--sarif", "o/summary.json"], "got 'o/summary.json' twice"),
        (["--config", "absent.toml"], "could not read 'absent.toml'"),
        (["--config", "."], "got the folder '.'"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(run, model_file, arguments, says, tmp_path):
    code, out, err = run("audit", "--model", model_file, "--data", "digits", *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert not list(tmp_path.iterdir())


def test_no_model_at_all(run):
    code, _, err = run("audit", "--data", "digits")
    assert code == 2
    assert "--model FILE" in err


def test_a_file_cannot_steer_the_terminal(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('"\\u001b[31mred\\nrow" = 1')
    with pytest.raises(UsageError) as caught:
        resolve(path)
    assert not re.search("[\x00-\x1f]", str(caught.value))


def test_a_huge_file_is_refused(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(UsageError, match="at most 1048576 bytes"):
        resolve(path)


# Code that a file names.

CANARY = "from pathlib import Path\nPath('ran').write_text('')\n"


@pytest.mark.parametrize(
    "text", ['[data]\nname = "canary_a:make"', '[model]\narch = "canary_a:make"',
             '[model]\nfactory = "canary_a:make"'],
)  # fmt: skip
def test_code_named_by_a_file_is_refused_unasked(run, text, model_file):
    Path("canary_a.py").write_text(CANARY)
    Path("a.toml").write_text(text)
    code, _, err = run("audit", "--config", "a.toml", "--output-dir", "out")
    assert code == 4
    assert "'a.toml' names code that would run on this machine: canary_a:make" in err
    assert "--allow-code-execution" in err
    assert not Path("ran").exists()
    assert not Path("out").exists()
    # Looking is harmless, and says so.
    code, out, _ = run("config", "validate", "a.toml")
    assert code == 0
    assert "it names code: canary_a:make" in out
    assert not Path("ran").exists()


def test_code_runs_where_it_is_allowed_and_the_result_says_who_named_it(
    run, write, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_digits.py").write_text(
        "import robustann\ndef make():\n    return robustann.load_data('digits')\n"
    )
    write('[threats]\nlinf = 0.1\n[data]\nname = "own_digits:make"')
    base = ["audit", "--config", "audit.toml", "--output-dir"]
    assert run(*base, "x")[0] == 4
    assert run(*base, "a", "--allow-code-execution")[0] == 0
    told = AuditResult.load("a/results.json").provenance.config
    assert told["code"] == ["own_digits:make (named by the file)"]
    # What the command line names is the user's own word.
    assert run(*base, "b", "--data", "own_digits:make")[0] == 0
    told = AuditResult.load("b/results.json").provenance.config
    assert told["code"] == ["own_digits:make (named by the command line)"]
    assert run(*base, "c", "--data", "digits")[0] == 0
    assert "code" not in AuditResult.load("c/results.json").provenance.config


def test_refused_error_is_exit_4():
    assert RefusedError.exit_code == 4


# Whatever a file holds, only our errors come of it.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["8/255", "auto", "10min", "digits", "pgd:steps=3", "a:b", "quick", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = {
    section: list(type(getattr(AuditFile(), section)).model_fields)
    for section in AuditFile.model_fields
}
SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        section: VALUES | st.dictionaries(st.sampled_from(keys) | st.text(max_size=6), VALUES,
                                          max_size=4)
        for section, keys in KEYS.items()
    },
)  # fmt: skip


@settings(
    max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(raw=SECTIONS)
def test_fuzz_values(raw):
    try:
        found = resolve(None, {k: v for k, v in raw.items() if isinstance(v, dict)})
    except RobustannError:
        return
    assert found.jobs
    assert AuditFile.model_validate(tomllib.loads(to_toml(found.values))).attacks == (
        found.values.attacks
    )


@settings(
    max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode()),
       place=st.integers(0, len(TEMPLATE)), whole=st.booleans())  # fmt: skip
def test_fuzz_bytes(content, place, whole, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    text = TEMPLATE.encode()
    path.write_bytes(content if whole else text[:place] + content + text[place:])
    try:
        resolve(path)
    except RobustannError:
        return


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(max_size=12))
def test_fuzz_budgets(text):
    try:
        propagations, minutes = parse_budget(text)
    except UsageError:
        return
    assert (propagations is None) != (minutes is None)


@given(eps=st.floats(0.001, 1))
@settings(max_examples=50, derandomize=True)
def test_slugs_are_names_of_folders(eps):
    assert re.fullmatch("linf-[0-9.e+-]+", slug_of(ThreatModel("linf", eps)))


# The documents.

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("name", ["config.md", "ci.md"])
def test_snippets_of_the_documents_are_valid(name, run, model_file):
    text = (DOCS / name).read_text(encoding="utf-8")
    for number, block in enumerate(re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.M)):
        path = Path(f"{number}.toml")
        path.write_text(block)
        assert run("config", "validate", path)[0] == 0
    commands = re.findall(r"^(?:\s+(?:run: >\n\s+)?)?robustann ((?:audit|config).*(?:\n\s+--.*)*)$",
                          text, re.M)  # fmt: skip
    assert len(commands) >= 2
    for command in commands:
        line = command.replace("\\\n", " ")
        arguments = shlex.split(line.partition(" #")[0].partition(" >")[0])
        here, rest = main.cli, arguments
        while isinstance(here, click.Group):
            here, rest = here.commands[rest[0]], rest[1:]
        # Every option is known, and no argument is missing.
        here.make_context("robustann", list(rest))


def test_the_documents_name_every_key_and_every_metric():
    text = (DOCS / "config.md").read_text(encoding="utf-8")
    for section in AuditFile.model_fields:
        (row,) = re.findall(rf"^\| `\[{section}\]` \| (.*) \|$", text, re.M)
        for key in type(getattr(AuditFile(), section)).model_fields:
            assert f"`{key}`" in row
    text = (DOCS / "ci.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| ", text, re.M) == list(METRICS)


def test_a_report_tells_whether_the_model_is_what_was_sealed(run, write, tmp_path, model_file):
    from safetensors.torch import load_file, save_file

    assert run("audit", "--config", write(), "--quiet", "--output-dir", "unsealed")[0] == 0
    assert AuditResult.load(tmp_path / "unsealed" / "results.json").seal is None
    copy = tmp_path / "sealed.safetensors"
    for suffix in (".safetensors", ".json"):
        source = model_file.with_suffix(suffix)
        copy.with_suffix(suffix).write_bytes(source.read_bytes())
    assert run("seal", copy)[0] == 0
    path = write()
    path.write_text(path.read_text().replace(model_file.as_posix(), copy.as_posix()))
    assert run("audit", "--config", path, "--quiet", "--output-dir", "whole")[0] == 0
    found = AuditResult.load(tmp_path / "whole" / "results.json").seal
    assert (found.intact, found.changes, found.signed) == (True, (), False)
    tensors = load_file(copy)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    from safetensors import safe_open

    with safe_open(copy, "pt") as stream:
        facts = stream.metadata()
    save_file(tensors, copy, metadata=facts)
    # Whoever altered the file made the sidecar fit too; the manifest he could not write.
    sidecar = json.loads(copy.with_suffix(".json").read_text())
    was = next(key for key, value in sidecar.items() if "sha256" in key)
    sidecar[was] = hashlib.sha256(copy.read_bytes()).hexdigest()
    copy.with_suffix(".json").write_text(json.dumps(sidecar))
    _, _, err = run("audit", "--config", path, "--output-dir", "broken")
    assert "is not what was sealed" in err
    found = AuditResult.load(tmp_path / "broken" / "results.json").seal
    assert not found.intact
    assert found.changes[0].startswith(f"tensor {name}")
