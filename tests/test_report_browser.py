"""The report in a real browser: nothing asked for, nothing complained of, readable everywhere."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up import HOSTILE, VARIANTS, make_result, no_attack_fell, with_changes

from robustann.reports import render, render_comparison, render_overview
from robustann.reports.views.overview import Found
from robustann.results import AuditResult

BROWSER = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: the page is not looked at"
    )
    if BROWSER is None:
        pytest.skip("no chromium on the path: the page is not looked at")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module", params=["usual", "hostile names", "hundred classes"])
def page_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(VARIANTS[request.param]()), encoding="utf-8")
    return path


def test_browser_loads_the_page_alone_and_complains_of_nothing(
    browser: Any, page_file: Path
) -> None:
    page = browser.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_load_state("networkidle")
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:image/png")] == [page_file.as_uri()]


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_browser_never_scrolls_the_page_sideways(browser: Any, page_file: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    page.close()
    assert widths[0] <= widths[1]


def test_browser_prints_the_usual_page_within_the_paper(browser: Any) -> None:
    # A4 with margins of 15 mm, at 96 dots an inch.
    page = browser.new_page(viewport={"width": 680, "height": 1000}, color_scheme="dark")
    page.set_content(render(make_result(n=1000)))
    page.emulate_media(media="print")
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()
    assert widths[0] <= widths[1]
    assert paper == "rgb(255, 255, 255)"


# For every piece of shown text: its contrast to the nearest opaque background.
CONTRASTS = """() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => {
    const [r, g, b] = channels(colour).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor, alpha = channels(colour)[3];
      if (alpha === undefined || alpha === 1) return colour;
    }
  };
  document.querySelectorAll('details').forEach(part => part.open = true);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || !element.getClientRects().length || element.closest('title, desc')) continue;
    const style = getComputedStyle(element);
    const ink = luminance(element.closest('svg') ? style.fill : style.color);
    const paper = luminance(behind(element));
    found.push([text.slice(0, 30), (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_shows_all_text_with_enough_contrast(browser: Any, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.set_content(render(make_result()))
    contrasts = page.evaluate(CONTRASTS)
    page.close()
    assert len(contrasts) > 200
    assert [entry for entry in contrasts if entry[1] < 4.5] == []


def test_browser_follows_the_dark_mode(browser: Any, page_file: Path) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(page_file.as_uri())
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert colours == {"rgb(250, 249, 246)", "rgb(20, 23, 26)"}


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The usual page from a file, as people open it, with the right to the clipboard."""
    path = tmp_path / "report.html"
    path.write_text(render(make_result()), encoding="utf-8")
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(path.as_uri())
    yield page
    context.close()


def column(page: Any, table: str, place: int) -> list[str]:
    cells = page.locator(f"{table} tbody tr > :nth-child({place})")
    return [re.sub(r"\s+", " ", text).strip() for text in cells.all_text_contents()]


def test_browser_sorts_a_table_both_ways_and_back(opened: Any) -> None:
    before = column(opened, "#attacks table", 1)
    head = opened.locator("#attacks thead th", has_text="Forwards")
    button = head.get_by_role("button", name="Sort by Forwards")
    orders = []
    for state in ("descending", "ascending", None):
        button.click()
        assert head.get_attribute("aria-sort") == state
        orders.append([int(one.replace(",", "")) for one in column(opened, "#attacks table", 10)])
    assert orders[0] == sorted(orders[0], reverse=True)
    assert orders[1] == sorted(orders[0])
    assert column(opened, "#attacks table", 1) == before
    # Durations go by what they mean, and what has none stays below.
    opened.get_by_role("button", name="Sort by Time").click()
    assert column(opened, "#attacks table", 12) == ["1 min 01 s", "1.25 s", "–", "–"]  # noqa: RUF001
    # A head above two others, and one that spans two rows.
    opened.locator("#classes").get_by_role("button", name="Sort by Samples").click()
    supports = column(opened, "#classes table", 2)
    assert supports == sorted(supports, reverse=True)


def test_browser_copies_a_table_as_csv(opened: Any) -> None:
    opened.get_by_role("button", name="Copy as CSV: Scores and cost of each attack").click()
    opened.get_by_text("Copied").first.wait_for()
    text = opened.evaluate("navigator.clipboard.readText()")
    lines = list(csv.reader(io.StringIO(text)))
    assert lines[0][:3] == ["Attack", "Accuracy", "Precision"]
    assert {len(line) for line in lines} == {12}
    assert [line[9] for line in lines[1:]] == ["200", "1,234", "2,468", "3,702", "7,404"]
    opened.locator("#classes").get_by_role("button", name="Copy as CSV").click()
    opened.locator("#classes").get_by_text("Copied").wait_for()
    lines = list(csv.reader(io.StringIO(opened.evaluate("navigator.clipboard.readText()"))))
    assert lines[0][3:] == [f"{one} {score}" for one in ("Clean", "Worst case")
                            for score in ("Precision", "Recall", "F1")]  # fmt: skip


def test_browser_copies_no_formula(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    names = ("=1+1", "@SUM(A1)", '"a","b"', "-2+3+cmd|' /C calc'!A0", "-1.5")
    path.write_text(render(make_result(names)), encoding="utf-8")
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(path.as_uri())
    page.locator("#classes").get_by_role("button", name="Copy as CSV").click()
    page.locator("#classes").get_by_text("Copied").wait_for()
    lines = list(csv.reader(io.StringIO(page.evaluate("navigator.clipboard.readText()"))))
    context.close()
    assert [line[0] for line in lines[1:]] == [
        "'=1+1", "'@SUM(A1)", '"a","b"', "'-2+3+cmd|' /C calc'!A0", "-1.5"
    ]  # fmt: skip


def test_browser_shows_a_definition_at_a_tap_without_a_script(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(make_result()), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False, has_touch=True)
    page = context.new_page()
    page.goto(path.as_uri())
    told = page.locator("#term-interval")
    assert not told.is_visible()
    page.get_by_role("button", name="95 % interval").first.tap()
    told.wait_for(state="visible")
    # Beside its term, not anywhere.
    term = page.get_by_role("button", name="95 % interval").first.bounding_box()
    place = told.bounding_box()
    assert 0 <= place["y"] - (term["y"] + term["height"]) < 20 or place["y"] < term["y"]
    assert abs(place["x"] - term["x"]) < 20
    # Nothing else is lost: every section is there, and no button that would do nothing.
    assert page.locator("main > section").count() == page.locator("nav li").count()
    assert page.locator(".copy, .sort").count() == 0
    context.close()


def test_browser_prints_no_definition_over_the_page(opened: Any) -> None:
    opened.get_by_role("button", name="95 % interval").first.click()
    told = opened.locator("#term-interval")
    assert told.is_visible()
    opened.emulate_media(media="print")
    assert not told.is_visible()


def test_browser_prints_what_is_folded(opened: Any) -> None:
    pages = opened.pdf()
    assert pages.startswith(b"%PDF")
    assert len(pages) > 50_000
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.locator("details:not([open])").count() == 0
    opened.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.locator("details[open]").count() == 0


def compared() -> str:
    weak, strong = make_result(), make_result(strengths=(0.0, 0.1, 0.2))
    return render_comparison([("a.json", weak), ("b.json", strong)])


def listed() -> str:
    return render_overview("runs", [Found(name, None, make_result()) for name in "ab"])


def hostile() -> list[tuple[str, AuditResult]]:
    """Audits of which every word is hostile, and names that were given to them."""
    found = []
    for word in (HOSTILE[0], HOSTILE[3], "a" + "\u0301" * 3000):
        made = make_result((*HOSTILE, "a" + "\u0301" * 3000))
        made = with_changes(made, "provenance", model=word, data=word, preset=word)
        made = with_changes(made, "execution", command=word, started=word)
        found.append((word, with_changes(made, "threat", eps_text=word)))
    return found


PAGES: dict[str, Callable[[], str]] = {
    "hostile, compared": lambda: render_comparison(hostile()),
    "hostile, listed": lambda: render_overview(
        HOSTILE[3], [Found(name, HOSTILE[0], result) for name, result in hostile()]
    ),
    "usual": lambda: render(make_result()),
    "nothing fell": lambda: render(no_attack_fell()),
    "compared": compared,
    "listed": listed,
}


@pytest.mark.parametrize("width", [320, 390, 1440])
@pytest.mark.parametrize("kind", ["compared", "listed", "hostile, compared", "hostile, listed"])
def test_browser_shows_other_pages_without_complaint(
    browser: Any, tmp_path: Path, kind: str, width: int
) -> None:
    path = tmp_path / "page.html"
    path.write_text(PAGES[kind](), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    # Names stay in their cells: none lies over the next one.
    over = page.evaluate("""[...document.querySelectorAll('tbody .name')].filter(name =>
        name.closest('th, td').getBoundingClientRect().right + 1
        < name.getBoundingClientRect().right).map(name => name.textContent.slice(0, 30))""")
    page.close()
    assert said == []
    assert over == []
    assert widths[0] <= widths[1]


def test_browser_slides_along_a_path_and_shows_all_of_it_without_a_script(
    opened: Any, browser: Any
) -> None:
    card = opened.locator(".card").first
    card.locator("summary").click()
    frames, slider = card.locator(".path figure"), card.get_by_role("slider")
    assert frames.count() == 4
    # It begins where the prediction first turns.
    assert [frames.nth(k).is_visible() for k in range(4)] == [False, False, True, False]
    slider.press("ArrowLeft")
    assert [frames.nth(k).is_visible() for k in range(4)] == [False, True, False, False]
    assert "distance 1.57/255" in (slider.get_attribute("aria-valuetext") or "")
    slider.press("End")
    assert frames.nth(3).is_visible()
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(opened.url)
    page.locator(".card summary").first.click()
    assert all(page.locator(".path figure").nth(k).is_visible() for k in range(4))
    context.close()


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("usual", "light"),
        ("usual", "dark"),
        ("nothing fell", "light"),
        ("compared", "light"),
        ("compared", "dark"),
        ("listed", "dark"),
    ],
)
def test_axe_finds_no_violation(browser: Any, scheme: str, kind: str) -> None:
    package = pytest.importorskip(
        "axe_playwright_python", reason="axe-core is not installed: accessibility is not checked"
    )
    script = Path(package.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    # What is added for the test alone, the page's own policy would forbid.
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.set_content(PAGES[kind]())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    page.evaluate(script)
    found = page.evaluate("axe.run().then(found => found.violations)")
    context.close()
    assert [(one["id"], [node["html"][:120] for node in one["nodes"][:3]]) for one in found] == []
