"""How the package is put together: one name, floors without heavy imports, whole files."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import robustann as ra
from robustann import files

ROOT = Path(__file__).parent.parent


def python(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_everything_is_imported_under_one_name(tmp_path):
    code = (
        "import sys, robustann as ra\n"
        "[getattr(ra, name) for name in ra.__all__]\n"
        "import robustann.attacks.engine, robustann.defenses, robustann.reports.explain\n"
        "print([n for n in sys.modules if n.split('.')[0] in ('attacks','defenses','reports')])"
    )
    assert python(code, tmp_path) == "[]"


def test_a_users_own_attacks_folder_does_not_get_in_the_way(tmp_path):
    (tmp_path / "attacks").mkdir()
    (tmp_path / "attacks" / "__init__.py").write_text("raise RuntimeError('not ours')")
    assert python("import robustann; print(robustann.FGSM().name)", tmp_path) == "fgsm"


def test_help_needs_no_heavy_import(tmp_path):
    code = (
        "import sys, robustann.cli.main\n"
        "heavy = {'torch', 'torchvision', 'art', 'captum', 'sklearn', 'matplotlib', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert python(code, tmp_path) == "[]"


def test_auditing_needs_neither_art_nor_matplotlib(tmp_path):
    code = "import sys, robustann.api; print({'art', 'matplotlib'} & set(sys.modules))"
    assert python(code, tmp_path) == "set()"


def test_the_links_are_relative():
    targets = {"attacks": "attacks", "defenses": "defenses", "reports": "reports",
               "explained.md": "docs/trust.md"}  # fmt: skip
    for name, target in targets.items():
        link = ROOT / "robustann" / name
        if not (ROOT / target).exists():
            pytest.skip("not a checkout: an sdist has files instead of links")
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{target}"


def test_the_image_is_built_from_what_there_is():
    """No engine runs in the tests: what the Dockerfile copies exists, and its bounds are ours."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    left_in = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {*copied} >= {"pyproject.toml", project["readme"], *project["license-files"]}
    for name in copied:
        assert f"!{name}" in left_in
        assert (ROOT / name).exists() or not (ROOT / "attacks").exists()
    links = [path for path in (ROOT / "robustann").iterdir() if path.is_symlink()]
    assert {path.resolve().relative_to(ROOT).as_posix() for path in links} <= {*copied}
    bounds = re.findall(r'"(torch\w*>=[\d.]+)"', "\n".join(lines))
    assert len(bounds) == 2
    assert {*bounds} <= {*project["dependencies"]}


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'pgd'"):
        _ = ra.pgd  # type: ignore[attr-defined]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    files.write_text(target, "old")
    with pytest.raises(KeyboardInterrupt), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_reported_and_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    files.write_text(target, "old")
    with (
        pytest.raises(ra.RobustannError, match="No space left"),
        files.atomic_path(target),
    ):
        raise OSError(28, "No space left on device")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
