"""Results are kept whole, and what no audit yields is refused."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from made_up import ANIMALS, as_cascade, make_result, tampered
from pages import Page

from robustann.cli import main
from robustann.defenses.seal import Manifest
from robustann.errors import DataError, UsageError
from robustann.reports import render, render_comparison, views
from robustann.results import (
    MATRIX_LIMIT,
    AuditResult,
)


def test_a_saved_result_gives_the_same_page(tmp_path: Path) -> None:
    result = make_result()
    result.save(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page == render(result) == render(AuditResult.load(tmp_path / "results.json"))


TAMPERINGS: dict[str, tuple[str, object]] = {
    "no samples": ("n", 0),
    "too few samples": ("n", 199),
    "negative eps": ("threat.eps", -0.1),
    "negative eps of the curve": ("curve.1.eps", -0.1),
    "no class names": ("class_names", []),
    "a class name too many": ("class_names", [*ANIMALS, "emu"]),
    "label out of range": ("clean_samples.label.3", 5),
    "negative prediction": ("clean_samples.prediction.3", -1),
    "attack's prediction out of range": ("attacks.1.samples.prediction.0", 5),
    "worst prediction out of range": ("worst_case.prediction.0", 5),
    "clean samples of another length": ("clean_samples.margin", [1.0]),
    "attack's samples of another length": ("attacks.1.samples.first_success", []),
    "worst case of another length": ("worst_case.broken_by", [None]),
    "scores of too few classes": ("clean.classes", []),
    "confusion with too few rows": ("worst_case.scores.confusion", [[1, 2, 3, 4, 5]]),
    "confusion with a short row": ("attacks.0.scores.confusion.2", [1]),
    "negative count": ("clean.confusion.0.0", -1),
    "clean accuracy above 1": ("clean.accuracy", 1.1),
    "negative robust accuracy": ("worst_case.scores.accuracy", -0.1),
    "attack's accuracy above 1": ("attacks.2.scores.accuracy", 2),
    "curve above 1": ("curve.0.robust_accuracy", 1.5),
    "chance above 1": ("chance", 2.0),
    "gallery label out of range": ("explanation.gallery.0.label", 5),
    "gallery prediction out of range": ("explanation.gallery.0.attacked_prediction", -1),
    "gallery target out of range": ("explanation.gallery.0.attributions.0.target", 99),
    "weights' error above 1": ("weights.fixed.levels.0.worst", 1.01),
    "weights' accuracy below 0": ("weights.search.flips.0.accuracy", -0.01),
    "bit error rate of 0": ("weights.float32.levels.0.rate", 0.0),
    "bit error rates that fall": ("weights.guarded.levels.1.rate", 1e-6),
    "no bit error rates": ("weights.fixed.levels", []),
    "negative index of a weight": ("weights.search.flips.1.index", [-1]),
    "certificate of another length": ("certificate.certified", [True]),
    "certified accuracy of other samples": ("certificate.certified_accuracy", 1.0),
    "crossed out of range": ("certificate.crossed", [200]),
    "endless run": ("execution.seconds", math.inf),
    "other schema version": ("schema_version", 2),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_tampered_result_is_refused_with_a_reason(what: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(tampered(*TAMPERINGS[what])), encoding="utf-8")
    with pytest.raises(DataError, match="run the audit again"):
        AuditResult.load(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs" / "results.json"
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    # Opening the pipe would wait for ever, and a failure must end.
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waited for the pipe"))
    signal.alarm(60)
    try:
        demand = ("--max-drop", "robust_accuracy=1")
        for line in (
            ("report", path),
            ("compare", path, path),
            ("audit", "--model", tmp_path / "m.pt", "--baseline", path, *demand),
        ):
            monkeypatch.setattr(sys, "argv", ["robustann", *map(str, line)])
            (tmp_path / "m.pt").touch()
            monkeypatch.chdir(tmp_path)
            assert main._run() == 2
            assert "no regular file" in capsys.readouterr().err
        monkeypatch.setattr(sys, "argv", ["robustann", "index", str(tmp_path / "runs")])
        assert main._run() == 0
        assert "no regular file" in (tmp_path / "runs" / "index.html").read_text()
        with pytest.raises(UsageError, match="no regular file"):
            Manifest.load(path)
    finally:
        signal.alarm(0)


def test_a_result_without_schema_version_is_refused(tmp_path: Path) -> None:
    content = json.loads(make_result().to_json())
    del content["schema_version"]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="no schema_version"):
        AuditResult.load(path)


def test_samples_csv_leaves_empty_what_an_attack_of_a_cascade_did_not_touch() -> None:
    alone = make_result()
    for result in (alone, as_cascade(alone)):
        lines = list(csv.DictReader(io.StringIO(result.samples_csv())))
        assert len(lines) == result.n
        empty = 0
        for attack in result.attacks:
            for i, line in enumerate(lines):
                cells = (line[f"{attack.label} prediction"], line[f"{attack.label} success"])
                if result.cascade and not attack.samples.forwards[i]:
                    assert cells == ("", "")
                    empty += 1
                else:
                    taken = attack.samples.prediction[i], int(attack.samples.success[i])
                    assert cells == tuple(map(str, taken))
        assert (empty > 0) == result.cascade


def test_a_result_of_an_older_version_is_read_and_shown(tmp_path: Path) -> None:
    """Before confidences, paths and controls: pictures had other names."""
    content = json.loads(make_result().to_json())
    for name in ("confidence", "margin"):
        del content["worst_case"][name]
    explanation = content["explanation"]
    for name in ("quality", "left_out"):
        del explanation[name]
    for sample in explanation["gallery"]:
        del sample["path"]
        for one in (sample, *sample["attributions"]):
            for name in ("clean", "attacked", "difference"):
                if name in one:
                    one[f"{name}_png"] = one.pop(name)
    for drift in explanation["drift"]:
        for name in ("other", "target", "group", "difference", "difference_interval"):
            del drift[name]
        for part in (drift["attacked"], drift["noise"]):
            for name in [key for key in part if key not in ("n", "spearman", "top5")]:
                del part[name]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    result = AuditResult.load(path)
    assert result.explanation is not None
    assert result.explanation.gallery[0].clean == make_result().explanation.gallery[0].clean  # type: ignore[union-attr]
    page = Page(render(result)).text
    assert "This audit kept no confidence of the attacked images." in page
    assert "further than random noise" in page
    # Written again, it is a result of today.
    result.save(tmp_path)
    assert AuditResult.load(path) == result


@pytest.mark.parametrize("size", [MATRIX_LIMIT, MATRIX_LIMIT + 1])
def test_confusions_are_a_matrix_of_few_classes_and_a_list_of_many(size: int) -> None:
    result = make_result([f"class {i}" for i in range(size)])
    many = size > MATRIX_LIMIT
    for scores, predictions in (
        (result.clean, result.clean_samples.prediction),
        (result.worst_case.scores, result.worst_case.prediction),
        *((attack.scores, attack.samples.prediction) for attack in result.attacks),
    ):
        pairs = Counter(zip(result.clean_samples.label, predictions, strict=True))
        assert scores.counts() == pairs
        if many:
            assert scores.confusion == tuple((*pair, pairs[pair]) for pair in sorted(pairs))
        else:
            assert [len(row) for row in scores.confusion] == [size] * size
        assert views.correct(scores) == round(scores.accuracy * result.n)


def test_an_older_result_with_a_matrix_of_many_classes_is_read(tmp_path: Path) -> None:
    result = make_result([f"class {i}" for i in range(40)])
    content = json.loads(result.to_json())
    for scores in (
        content["clean"],
        content["worst_case"]["scores"],
        *(attack["scores"] for attack in content["attacks"]),
    ):
        matrix = [[0] * 40 for _ in range(40)]
        for label, prediction, samples in scores["confusion"]:
            matrix[label][prediction] = samples
        scores["confusion"] = matrix
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert AuditResult.load(path) == result


BAD_LISTS: dict[str, list[list[int]]] = {
    "a pair twice": [[0, 0, 1], [0, 0, 1]],
    "out of order": [[1, 0, 1], [0, 0, 1]],
    "prediction out of range": [[0, 40, 1]],
    "negative class": [[-1, 0, 1]],
    "negative count": [[0, 0, -1]],
    "no count": [[0, 0]],
    "a matrix with a short row": [[1] * 40] * 39 + [[1] * 39],
}


@pytest.mark.parametrize("what", BAD_LISTS)
def test_a_tampered_list_of_confusions_is_refused(what: str, tmp_path: Path) -> None:
    content = json.loads(make_result([f"class {i}" for i in range(40)]).to_json())
    content["clean"]["confusion"] = BAD_LISTS[what]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="confusion of clean"):
        AuditResult.load(path)


def test_a_thousand_classes_take_little_room(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(1000)]
    result = make_result(names, n=100)
    result.save(tmp_path)
    # Mostly the scores of every class, once for each attack; a matrix alone took 8 MiB.
    assert (tmp_path / "results.json").stat().st_size < 2**20
    assert AuditResult.load(tmp_path / "results.json") == result
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    other = make_result(names, n=100, strengths=(0.0, 0.1, 0.2))
    compared = render_comparison([("a", result), ("b", other)])
    for html in (page, compared):
        assert len(html) < 2**20
        assert html.count("<td") < 20 * len(names)
