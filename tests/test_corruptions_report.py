"""What the report, the terminal and a comparison say of common corruptions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_up import corruptions, make_result, with_changes
from pages import part_of

from robustann.cli.main import cli
from robustann.cli.verdict import verdict
from robustann.outputs import Audited, conclude, model_card
from robustann.reports import render, render_comparison, views
from robustann.reports.filters import NOTHING, interval, percent
from robustann.results import AuditResult


def test_the_table_holds_the_figures_and_says_that_nobody_attacks() -> None:
    result = make_result()
    assert result.corruptions is not None
    page = part_of(render(result), "corruptions")
    table, spans = page.tables
    clean = percent(result.clean_accuracy)
    for line, kept, one in zip(table[2:], spans[1:], result.corruptions.kinds, strict=True):
        name = one.kind.replace("_", " ")
        figures = [percent(level.accuracy) for level in one.levels]
        assert line == [name, clean, *figures, percent(one.mean_accuracy)]
        assert kept == [name, *(interval(level.interval) for level in one.levels)]
    for words in ("there is no attacker", "no part of the worst-case robust accuracy"):
        assert words in page.text
    assert f"contrast at severity 5; clean it is {clean}" in page.text
    assert "Not measured: jpeg: images of 4 channels" in page.text


def test_shades_grow_with_what_is_lost_of_the_clean_accuracy() -> None:
    result = make_result()
    rows = views.corruption_rows(result)
    assert [row.words for row in rows] == ["gaussian noise", "contrast"]
    for row in rows:
        shades = [cell.shade for cell in row.cells if cell]
        assert shades == sorted(shades)
        for cell in row.cells:
            assert cell is not None
            lost = 1 - cell.level.accuracy / result.clean_accuracy
            assert (lost <= 0) == (cell.shade == 0)
            assert (lost >= 0.2) == (cell.shade >= 4)
    # A severity that is missing leaves its place empty.
    found = result.corruptions
    assert found is not None
    some = found.kinds[0].model_copy(update={"levels": found.kinds[0].levels[1:]})
    partly = with_changes(result, "corruptions", kinds=(some,))
    (row,) = views.corruption_rows(partly)
    assert [cell is None for cell in row.cells] == [True, False, False, False, False]
    assert part_of(render(partly), "corruptions").tables[0][2][2] == NOTHING


def test_where_nobody_asked_or_nothing_was_measured_there_are_no_figures() -> None:
    assert 'id="corruptions"' not in render(make_result(corruptions=None))
    nothing = make_result(corruptions=corruptions(200))
    page = part_of(render(nothing), "corruptions")
    assert page.tables == []
    assert "Not measured" in page.text
    assert views.corruption_rows(make_result(corruptions=None)) == []
    assert "in the mean" not in verdict(nothing.model_copy(update={"weights": None}))


def test_the_terminal_says_it_in_a_line() -> None:
    (line,) = [line for line in verdict(make_result()).splitlines() if "no attacker" in line]
    found = make_result().corruptions
    assert found is not None
    assert found.worst is not None
    kind, level = found.worst
    assert (kind, level.severity) == ("contrast", 5)
    assert f"{100 * level.accuracy:.1f}" in line
    assert f"{100 * (found.mean_accuracy or 0):.1f}" in line
    assert "contrast at severity 5" in line
    assert "no attacker" not in verdict(make_result(corruptions=None))


@pytest.mark.parametrize("both", [True, False])
def test_a_comparison_shows_the_means_where_both_have_one(tmp_path: Path, both: bool) -> None:
    first = make_result()
    second = make_result(
        strengths=(0.0, 0.1, 0.2),
        corruptions=corruptions(200, "gaussian_noise", "jpeg") if both else None,
    )
    results: list[tuple[str, AuditResult]] = [("a.json", first), ("b.json", second)]
    html = render_comparison(results)
    paths = []
    for name, result in results:
        paths.append(tmp_path / name)
        paths[-1].write_text(result.to_json(), encoding="utf-8")
    told = CliRunner().invoke(cli, ["compare", *map(str, paths), "--out", str(tmp_path / "c.html")])
    assert told.exit_code == 0
    assert told.output.count("under corruptions") == 2 * both
    if not both:
        assert 'id="corruptions"' not in html
        return
    (table,) = part_of(html, "corruptions").tables
    for line, letter, (_, result) in zip(table[1:], "AB", results, strict=True):
        assert result.corruptions is not None
        mean = percent(result.corruptions.mean_accuracy)
        assert line[:3] == [letter, "200", percent(result.clean_accuracy)]
        assert line[3].startswith(mean)
        assert f"{100 * (result.corruptions.mean_accuracy or 0):.1f}" in told.output


def test_the_model_card_tells_each_corruption_and_bears_a_hostile_name() -> None:
    def card(result: AuditResult) -> str:
        one = Audited("linf-8-255", "linf 8/255", "out", result, "", 0)
        return model_card(conclude([one], source="audit.toml", model="model", data="data"))

    bad = "<b>[x](//evil) `code`\n\n# Heading"
    found = corruptions(200, "gaussian_blur", bad, missing=bad)
    text = card(make_result(corruptions=found))
    one = found.kinds[0]
    worst = min(level.accuracy for level in one.levels)
    said = f"{100 * one.mean_accuracy:.1f} % in the mean over severities, {100 * worst:.1f} % at"
    assert f"- gaussian blur: {said} worst" in text.replace("\\", "")
    assert "\n# Heading" not in text
    assert not re.search(r"(?<!\\)[<`]|(?<!\\)\]\(", text)
    assert "corruptions" not in card(make_result(corruptions=None))
