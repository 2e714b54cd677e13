"""README and docs: every command and snippet runs as printed, every link leads somewhere."""

from __future__ import annotations

import dataclasses
import datetime
import pkgutil
import re
import shutil
import threading
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import click
import documents
import links
import numpy as np
import pytest
import torch
import yaml
from documents import ROOT, Reader
from PIL import Image

import robustann as ra
from robustann.cli.main import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [
    *sorted(ROOT.glob("*.md")),
    *(ROOT / part / "README.md" for part in ("examples", "benchmarks")),
]
LINKED = [*PAGES, *(page for page in OTHERS if page not in PAGES)]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ------------------------------------------------------------------- what a reader has at hand


def pictures(folder: Path, data: ra.ImageData) -> None:
    """Sixty digits of three classes as PNG files, a folder a class."""
    x, labels = data.test.images(slice(None)), data.test.labels
    for name, label in {"zero": 0, "one": 1, "two": 2}.items():
        for part, rows in {"train": slice(0, 14), "test": slice(14, 20)}.items():
            (folder / part / name).mkdir(parents=True)
            for number, image in enumerate(x[labels == label][rows]):
                array = (image[0].numpy() * 255).astype(np.uint8)
                Image.fromarray(array).save(folder / part / name / f"{number:04}.png")


def weights(path: Path) -> None:
    """Bare weights, as somebody else's checkpoint has them."""
    from torchvision.models import resnet18

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save({"state_dict": resnet18(num_classes=3).state_dict()}, path)


def checkout(folder: Path) -> None:
    """A copy of the package and its tests, in the folder itself."""
    for name in ("attacks", "defenses", "reports", "robustann", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    # A link in the package leads to this page.
    for name in ("pyproject.toml", "docs/trust.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


GIVEN: dict[str, Callable[[Path, ra.ImageData], None]] = {
    "images": pictures,
    "weights.pt": lambda path, _: weights(path),
}


@pytest.fixture
def fewer_digits(digits: ra.ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same digits with 100 images to audit: the pages run in a fraction of the time."""
    few = dataclasses.replace(digits, test=digits.test.subset(range(100)))
    monkeypatch.setattr("robustann.data.loading._digits", lambda: few)


@pytest.mark.usefixtures("fewer_digits")
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_snippet_runs_as_printed(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_file: Path,
    digits: ra.ImageData,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text = page.read_text(encoding="utf-8")
    # Pages other than the first begin where a model has been trained.
    if page.name != "README.md":
        for path in (model_file, model_file.with_suffix(".json")):
            shutil.copy(path, tmp_path / f"model{path.suffix}")
    for name, make in GIVEN.items():
        if name in text:
            make(tmp_path / name, digits)
    guide = page.name.startswith("adding-")
    if guide:
        if not (ROOT / "attacks").exists():
            pytest.skip("not a checkout: the guides are for one")
        checkout(tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.py")}
    reader = Reader(page, tmp_path if guide else None)
    done = reader.follow()
    if guide:
        # A guide adds files, and changes none.
        assert all(path.read_bytes() == content for path, content in before.items())
    assert done == sum(fence.reason is None for fence in documents.fences(page))
    if page.name == "README.md":
        assert done >= 6
        assert (tmp_path / "report.html").stat().st_size > 10_000
        assert 0 < reader.namespace["broken"].success_rate < 1  # type: ignore[attr-defined]


def test_the_guide_adds_an_attack_in_under_sixty_lines() -> None:
    written = [
        fence
        for fence in documents.fences(ROOT / "docs" / "adding-an-attack.md")
        if fence.title is not None
    ]
    assert [fence.title for fence in written] == ["attacks/ni_fgsm.py", "tests/test_ni_fgsm.py"]
    assert sum(len(fence.text.splitlines()) for fence in written) < 60


def test_the_picture_of_the_floors_is_that_of_the_linter() -> None:
    pages = documents.fences(ROOT / "docs" / "architecture.md")
    picture = [line.split("  ")[0] for line in list(pages)[-1].text.splitlines()]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    assert picture == contract["layers"]


def test_every_page_has_its_place_in_the_site() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    placed = [page for part in site["nav"] for pages in part.values() for page in pages]
    names = [name for page in placed for name in page.values()]
    written = {path.name for path in (ROOT / "docs").rglob("*.md")}
    assert len(names) == len(set(names))
    assert set(names) == written


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in documents.links(page):
        if link.startswith(("https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{named(page)} links to {link}"
        if anchor:
            assert anchor in documents.anchors(target), f"{named(page)} links to {link}"


def options(command: click.Command) -> set[str]:
    """All options of a command and of those below it."""
    below = command.commands.values() if isinstance(command, click.Group) else ()
    own = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    return own.union(*map(options, below))


def every_command(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        yield from every_command(below, f"{name} {below.name}")


def test_the_commands_are_told_as_they_are() -> None:
    """Up to the layout, which depends on click's version."""
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    told = {
        name: "".join(part.split()) for name, part in zip(parts[1::2], parts[2::2], strict=True)
    }
    found = dict(every_command(cli, "robustann"))
    assert list(told) == list(found), "write it again: python docs/commands.py"
    for name, command in found.items():
        said = [*command.help.replace("\b", "").split("\n\n")] if command.help else []
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                said += [option.opts[0], option.help or ""]
        for one in said:
            squeezed = "".join(one.split())
            assert squeezed in told[name], f"{one}; write it again: python docs/commands.py"


def test_no_summary_of_a_command_is_cut_off() -> None:
    for name, command in every_command(cli, "robustann"):
        if isinstance(command, click.Group):
            said = command.get_help(click.Context(command, info_name=name, max_content_width=80))
            listed = said.partition("\nCommands:\n")[2].splitlines()
            assert len(listed) == len(command.commands)
            assert [line for line in listed if line.endswith("...")] == []


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_what_a_page_names_exists(page: Path) -> None:
    """Python's names, files and options in its running text."""
    text = documents.FENCE.sub("", page.read_text(encoding="utf-8"))
    for name in re.findall(r"`(robustann(?:\.[A-Za-z_]\w*)+)", text):
        assert pkgutil.resolve_name(name) is not None
    folders = r"`((?:attacks|defenses|reports|robustann|tests|benchmarks|docs|examples)/[\w./-]*)`"
    for path in re.findall(folders, text):
        # An sdist has the files where the links of a checkout lead from.
        assert (ROOT / path).exists() or (ROOT / "robustann" / path).exists(), path
    known = options(cli) | {"--help"}
    scripts = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")
    )
    for option in re.findall(r"`(--[a-z][a-z0-9-]*)", text):
        assert option in known or f'"{option}"' in scripts, option


def test_links_that_lead_out_look_right() -> None:
    """Whether they hold is asked online: make links."""
    found = list(links.external())
    places = {place for _, place in found}
    assert places >= {"README.md", "docs/published.md", "robustann/attacks/fab.py"}
    assert [(place, one, links.fault(one)) for one, place in found if links.fault(one)] == []


def test_a_link_that_does_not_hold_is_found() -> None:
    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response({"/here": 200, "/people": 403}.get(self.path, 404))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        asked = [links.ask(f"{root}/{name}") for name in ("here", "people", "gone")]
        server.shutdown()
    assert asked == [None, None, "status 404"]
    assert links.ask(f"{root}/here", timeout=1) is not None
    for wrong in ("http://arxiv.org/abs/1706.06083", "https://arxiv.org/abs/1799.06083",
                  "https://localhost/x", "https://arxiv.org/pdf/1706.06083",
                  "https://semver.org."):  # fmt: skip
        assert links.fault(wrong) is not None
    assert links.fault("https://arxiv.org/abs/1706.06083") is None


@pytest.mark.parametrize("page", [ROOT / "README.md"], ids=named)
def test_no_cell_of_a_comparison_is_left_open(page: Path) -> None:
    """A blank could mean no, or that nobody looked; a dash is explained."""
    part = page.read_text(encoding="utf-8").split("## Beside other tools\n")[1].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows[1:] for cell in row.strip("|").split("|")]
    assert len(rows) > 10
    assert all(cells)
    assert "a dash says" in part


def test_the_release_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(\S+)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert releases[0] == ("Unreleased", "")
    assert len(releases) == text.count("\n## ")
    version, date = releases[1]
    assert project["version"] == ra.__version__ == version == citation["version"]
    assert datetime.date.fromisoformat(date) == citation["date-released"]
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


# --------------------------------------------------------------------- the checker can fail


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\nraise KeyError\n```\n", KeyError),
        ("```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n", AssertionError),
        ("```sh\nrobustann list attack\n```\n", AssertionError),
        ("```sh\nrobustann list attacks  # exits with 1\n```\n", AssertionError),
        ("```sh\nfalse\n```\n", AssertionError),
        ("```sh\nmake nothing-of-the-kind\n```\n", AssertionError),
        ("```sh\npip install 'robustann[moon]'\n```\n", AssertionError),
        ("```yaml\na: [\n```\n", Exception),
        ("```toml\na = \n```\n", ValueError),
        ("```ruby\nputs 1\n```\n", AssertionError),
        ("```\nno language\n```\n", AssertionError),
        ("<!-- not run: no -->\n```python\n1 / 0\n```\n", AssertionError),
        (
            "<!-- not run: takes two days -->\n```sh\nrobustann audit --moon\n```\n",
            click.NoSuchOption,
        ),
        (
            "<!-- not run: takes a GPU -->\n```sh\n"
            "torchrun -m robustann harden --arch resnet-5 --data digits\n```\n",
            ra.UsageError,
        ),
        (
            "<!-- not run: takes two days -->\n```sh\npython benchmarks/verdict.py --moon\n```\n",
            AssertionError,
        ),
    ],
)
def test_a_page_that_is_wrong_is_found(
    text: str, expected: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(expected):
        Reader(page).follow()


def test_a_page_that_is_right_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        '```python title="mine/made.py"\nVALUE = 3\n```\n'
        "1. In a list:\n\n   ```python\n   x = 3\n   ```\n\n"
        "```sh\nrobustann list attack  # exits with 2\ncat mine/made.py \\\n    | grep VALUE\n```\n"
        "<!-- not run: takes another machine -->\n```python\n1 / 0\n```\n",
        encoding="utf-8",
    )
    reader = Reader(page)
    assert reader.follow() == 3
    assert reader.namespace["x"] == 3


def test_links_and_anchors(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# What `--data` takes, and how?\n[a](b.md#c) ![i](i.png) `[no](no.md)`\n"
        '```text\n[no](no.md)\n```\n<img src="x.svg">\n',
        encoding="utf-8",
    )
    assert documents.links(page) == ["b.md#c", "i.png", "x.svg"]
    assert documents.anchors(page) == {"what---data-takes-and-how"}
