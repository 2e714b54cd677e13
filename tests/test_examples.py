"""Every example runs, with small budgets, and says what it promises."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent / "examples"
BUDGETS = {
    "audit_image_folder.py": ["--samples", "6", "--epochs", "1"],
    "harden_mnist.py": ["--samples", "20", "--epochs", "1", "--train-images", "300"],
    "break_sanitizer.py": ["--sanitizer", "bit-depth:bits=3", "--samples", "10", "--epochs", "3",
                           "--queries", "20"],
}  # fmt: skip


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_and_told_of() -> None:
    files = {path.name for path in ROOT.iterdir() if path.suffix in (".py", ".ipynb")}
    notebooks = {path.name for path in ROOT.glob("*.ipynb")}
    assert files == BUDGETS.keys() | notebooks
    told = (ROOT / "README.md").read_text(encoding="utf-8")
    assert files == set(re.findall(r"\]\((\w+\.(?:py|ipynb))\)", told))


@pytest.mark.parametrize("name", BUDGETS)
def test_scripts(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROBUSTANN_DATA", str(tmp_path / "nowhere"))
    script(name).main(BUDGETS[name], standalone_mode=False)
    out = capsys.readouterr().out
    found = re.search(r"report: (\S+)", out)
    if found:
        assert Path(found[1]).stat().st_size > 10_000
    expected = {
        "audit_image_folder.py": r"clean \d+\.\d%, robust \d+\.\d% of 6\n",
        "harden_mnist.py": r"bundled digits stand in[\s\S]*robust accuracy [+-]\d+\.\d%, McNemar",
        "break_sanitizer.py": r"  eot  [\s\S]*  minimum  ",
    }
    assert re.search(expected[name], out), out


def test_a_folder_and_weights_of_your_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from torchvision.models import squeezenet1_1

    monkeypatch.chdir(tmp_path)
    example = script("audit_image_folder.py")
    example.make_pictures(tmp_path / "pictures")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(squeezenet1_1(num_classes=10).state_dict(), tmp_path / "weights.pt")
    example.main(
        ["--images", "pictures", "--weights", "weights.pt", "--arch", "torchvision:squeezenet1_1",
         "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--samples", "3"],
        standalone_mode=False,
    )  # fmt: skip
    assert "of 3\n" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in stored["cells"]), "outputs are not kept"
    monkeypatch.setenv("EXAMPLE_EPOCHS", "4")
    monkeypatch.setenv("EXAMPLE_SAMPLES", "20")
    notebook = nbformat.read(path, as_version=4)
    done = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    text = "".join(
        output.get("text", "") for cell in done.cells for output in cell.get("outputs", [])
    )
    if path.name == "first_audit.ipynb":
        assert (tmp_path / "report.html").stat().st_size > 10_000
        assert re.search(r"robust \d+\.\d%", text)
        assert "randomised" in text
    else:
        found = re.findall(r"PGD breaks (\d+)% without, and (\d+)% with", text)
        assert int(found[0][0]) > 40
        # What rounding alone gets wrong counts as broken.
        assert int(found[0][1]) <= 10
        assert "gradient-missing" in text
        believed = re.findall(r"robust accuracy (\d+\.\d)%, believable: (\w+)", text)
        assert float(believed[1][0]) < 50
