"""Several audits on one page, and many in an overview."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_up import ANIMALS, FINDINGS, HOSTILE, make_result, with_changes
from pages import Page, part_of

from robustann.cli.main import cli
from robustann.errors import DataError, UsageError
from robustann.hardening.comparing import paired, robust_outcomes
from robustann.reports import render_comparison, render_overview
from robustann.reports.filters import percent, points
from robustann.reports.views.comparing import compare
from robustann.reports.views.overview import Found, overview
from robustann.results import AuditResult


def two() -> list[tuple[str, AuditResult]]:
    """A model, and one that withstands more; the same samples."""
    weak = make_result(findings=())
    strong = make_result(findings=(), strengths=(0.0, 0.1, 0.2))
    strong = with_changes(strong, "provenance", model="hardened", model_sha256="ef" * 32)
    return [("weak/results.json", weak), ("strong/results.json", strong)]


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(cli, [str(one) for one in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.output


def saved(folder: Path, result: AuditResult) -> Path:
    result.save(folder)
    return folder / "results.json"


def test_pairs_are_of_the_same_samples_and_equal_mcnemars() -> None:
    (_, weak), (_, strong) = results = two()
    (pair,) = compare(results).pairs
    wanted = paired(robust_outcomes(weak), robust_outcomes(strong))
    assert pair.robust == wanted
    assert wanted.gained > wanted.lost
    assert "is more robust than A by" in pair.words
    changed = {one.index for one in pair.changes}
    outcomes = zip(robust_outcomes(weak), robust_outcomes(strong), strict=True)
    assert changed == {row for row, (was, now) in enumerate(outcomes) if was != now}
    assert {one.by for one in pair.changes if one.how == "gained"} <= {
        *weak.worst_case.broken_by, "wrong before any attack",
    }  # fmt: skip
    # The other way round: lost becomes gained.
    (back,) = compare(results[::-1]).pairs
    assert (back.robust.gained, back.robust.lost) == (wanted.lost, wanted.gained)
    assert "is less robust than A by" in back.words
    same = compare([results[0], results[0]]).pairs[0]
    assert same.changes == ()
    assert "is not shown to differ" in same.words


def test_only_common_samples_are_paired_and_that_is_said() -> None:
    (_, weak), (name, strong) = two()
    moved = with_changes(strong, "clean_samples", index=tuple(range(50, 250)))
    labels = tuple((i + 50) % 5 for i in range(200))
    moved = with_changes(moved, "clean_samples", label=labels)
    moved = with_changes(moved, "provenance", data_sha256="00" * 32)
    found = compare([("weak", weak), (name, moved)])
    assert found.pairs[0].samples == 150
    assert any("did not take all the same samples" in note for note in found.notes)
    apart = with_changes(strong, "clean_samples", index=tuple(range(1000, 1200)))
    with pytest.raises(DataError, match="found none"):
        compare([("weak", weak), (name, apart)])
    other = with_changes(strong, "clean_samples", label=tuple((i + 1) % 5 for i in range(200)))
    with pytest.raises(DataError, match="the same labels"):
        compare([("weak", weak), (name, other)])
    with pytest.raises(DataError, match="same classes"):
        compare([("weak", weak), (name, make_result(("no", "yes")))])
    with pytest.raises(UsageError, match="two to 6 audits"):
        compare([("weak", weak)])


def test_what_else_differs_is_said() -> None:
    (_, weak), (name, strong) = two()
    assert compare(two()).notes == ()
    strong = with_changes(strong, "threat", eps=4 / 255)
    strong = with_changes(strong, "provenance", preset="quick", seed=1, model_sha256="ab" * 32)
    strong = strong.model_copy(update={"findings": FINDINGS})
    notes = " ".join(compare([("weak", weak), (name, strong)]).notes)
    for words in ("different threat models", "not attacked in the same way", "different seeds",
                  "a model with the same weights", "B is not to be believed yet"):  # fmt: skip
        assert words in notes


def test_page_shows_the_figures_of_both() -> None:
    results = two()
    html = render_comparison(results)
    page = Page(html)
    (pair,) = compare(results).pairs
    for words in (
        percent(results[0][1].robust_accuracy),
        percent(results[1][1].robust_accuracy),
        f"B is more robust than A by {points(pair.robust.difference).lstrip('+')}.",
        f"{pair.robust.lost} samples stand in A and fall in B; {pair.robust.gained} the other",
    ):
        assert words in page.text
    lines = part_of(html, "curves")
    assert [tag["class"] for tag in lines.all("polyline")] == ["line series0", "line series1"]
    # Never by colour alone.
    assert {"circle", "polygon"} <= set(lines.tags)
    table = part_of(html, "attacks").tables[0]
    assert table[1][1:] == [percent(result.attacks[0].scores.accuracy) for _, result in results]
    recalls = part_of(html, "classes").tables[0]
    assert [row[0] for row in recalls[1:]] == list(ANIMALS)


def test_curves_of_different_norms_are_not_drawn_over_each_other() -> None:
    (name, weak), (other, strong) = two()
    strong = with_changes(strong, "threat", norm="l2")
    assert (
        "no axis would hold them both"
        in Page(render_comparison([(name, weak), (other, strong)])).text
    )


def test_hostile_names_change_nothing() -> None:
    plain = Page(render_comparison(two()))
    evil = [
        (HOSTILE[0] + name, with_changes(result, "provenance", model=HOSTILE[k] + HOSTILE[2]))
        for k, (name, result) in enumerate(two())
    ]
    html = render_comparison(evil)
    assert [tag for tag in Page(html).tags if tag not in ("bdi", "span")] == [
        tag for tag in plain.tags if tag not in ("bdi", "span")
    ]
    assert "<img src=x" not in html
    found = [Found(HOSTILE[0], "./report.html", evil[0][1]), Found(HOSTILE[1], None, None, "bad")]
    html = render_overview(HOSTILE[2], found)
    assert "<img src=x" not in html
    assert not re.search("[\u202a-\u202e]", html)


def test_compare_on_the_command_line(tmp_path: Path) -> None:
    paths = [saved(tmp_path / str(k), result) for k, (_, result) in enumerate(two())]
    out = tmp_path / "compare.html"
    code, said = run("compare", *paths, "--out", out)
    assert code == 0
    assert "B is more robust than A by" in said
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(UsageError, match="two to 6"):
        run("compare", paths[0], "--out", out)


def test_overview_lists_the_newest_first_and_draws_what_belongs_together() -> None:
    def at(day: int, **changes: str) -> AuditResult:
        result = with_changes(make_result(), "execution", started=f"2025-01-{day:02}T00:00:00Z")
        return with_changes(result, "provenance", **changes)

    found = [
        Found("a/results.json", "./a/report.html", at(3, model="third")),
        Found("b/results.json", None, at(1, model="first")),
        Found("c/results.json", None, at(2, data="other")),
        Found("d/results.json", None, with_changes(make_result(), "execution", started="once")),
        Found("e/results.json", None, None, "expected a results.json"),
    ]
    shown = overview("runs", found)
    assert [one.path[0] for one in shown.audits] == ["a", "c", "b", "d"]
    (trend,) = shown.trends
    assert [one.path[0] for _, one in trend.audits] == ["b", "a"]
    html = render_overview("runs", found)
    page = Page(html)
    assert {link["href"] for link in page.all("a")} >= {"./a/report.html"}
    assert "1 that could not be read" in page.text
    assert "expected a results.json" in page.text
    assert part_of(html, "trends").tags.count("svg") == 1
    assert "No audit was found here" in Page(render_overview("runs", [])).text


def test_index_on_the_command_line(tmp_path: Path) -> None:
    saved(tmp_path / "first", make_result())
    saved(tmp_path / "deep" / "odd: #1 %", make_result())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text(json.dumps({"schema_version": 9}))
    code, said = run("index", tmp_path)
    assert code == 0
    assert "2 audits, 1 not read" in said
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    links = [link["href"] for link in page.all("a") if not (link["href"] or "").startswith("#")]
    assert sorted(links) == ["./deep/odd%3A%20%231%20%25/report.html", "./first/report.html"]
    code, _ = run("index", tmp_path, "--out", tmp_path / "elsewhere" / "all.html", "--quiet")
    page = Page((tmp_path / "elsewhere" / "all.html").read_text(encoding="utf-8"))
    assert "./../first/report.html" in [link["href"] for link in page.all("a")]
    with pytest.raises(UsageError, match="a folder of audits"):
        run("index", tmp_path / "nowhere")
