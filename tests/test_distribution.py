"""Wheel and sdist hold all of the package, and the demonstration runs from them alone.

The wheel is built from the sdist, as ``python -m build`` does, and installed into an environment
that is empty but for a pointer to the libraries of this one: PyTorch takes gigabytes. The target
``wheel`` of make installs the wheel's own dependencies instead, and CI does so for every change.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel, of a copy of the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a checkout")
    for name in filter(None, listed.stdout.split("\0")):
        source = ROOT / name
        if not os.path.lexists(source):
            continue  # removed, and not yet committed
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy / name, follow_symlinks=False)
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, copy, cwd=folder)
    return folder


def test_sdist_has_files_instead_of_links(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        members = opened.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    names = {member.name.partition("/")[2] for member in members}
    expected = {"robustann/attacks/pgd.py", "LICENSE", "CHANGELOG.md", "docs/trust.md",
                "examples/harden_mnist.py", "SECURITY.md", "conftest.py", ".ci/wheel"}  # fmt: skip
    assert expected <= names
    # Who packages it runs the tests.
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*.py")}
    assert tests <= names
    assert archive.stat().st_size < 5_000_000


def test_wheel_has_the_whole_package_and_nothing_else(built: Path) -> None:
    (archive,) = built.glob("*.whl")
    with zipfile.ZipFile(archive) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    expected = set()
    for top in ("robustann", "attacks", "defenses", "reports"):
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                name = path.relative_to(ROOT).as_posix()
                expected.add(name if top == "robustann" else f"robustann/{name}")
    # Python before 3.13 goes through the links with rglob, or not; the set is the same.
    assert names == expected


def test_the_demonstration_runs_from_the_wheel(built: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    ask = "import site; print(site.getsitepackages()[0])"
    site = Path(run(python, "-c", ask, cwd=tmp_path).strip())
    # A plain path: .pth files in there, such as that of an editable robustann, are not read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--quiet", "--python", python, "install", "--no-deps",
        "--no-index", wheel, cwd=tmp_path)  # fmt: skip
    home = run(python, "-c", "import robustann; print(robustann.__file__)", cwd=tmp_path).strip()
    assert Path(home).is_relative_to(site)
    command = environment / "bin" / "robustann"
    run(command, "train", "--data", "digits", "--epochs", "3", "--out", "m.safetensors",
        cwd=tmp_path)  # fmt: skip
    audit = "audit --model m.safetensors --data digits --eps 0.1 --preset quick --max-samples 16"
    told = run(command, *audit.split(), "--output-dir", "out", cwd=tmp_path)
    assert told.startswith("robust accuracy ")
    run(command, "report", "out/results.json", "--out", "again.html", cwd=tmp_path)
    assert (tmp_path / "again.html").read_text() == (tmp_path / "out" / "report.html").read_text()
