"""The version is told once, and another project's `fastlora` is never mixed with this one."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fastlora
from fastlora.distribution import another

ROOT = Path(__file__).parent.parent
OTHERS = {
    "the other project": "fastlora.py,sha256=BwHF7TOvW7IY,137374\n",
    "a package": "fastlora/__init__.py,sha256=abc,1\nfastlora/ops.py,sha256=abc,1\n",
}
HARMLESS = {
    "an editable installation": "__editable__.fastlora-0.1.0.pth,sha256=abc,87\n__editable___fastlora_0_1_0_finder.py,sha256=abc,1\n",
    "this one": "fastlora-0.1.0.dist-info/METADATA,,\n",
}


def install(folder: Path, record: str | None, kind: str = "dist-info") -> Path:
    """A distribution named fastlora, as far as Python's own metadata tell; record None: without a list of files, as in a checkout."""
    info = folder / f"fastlora-4.2.1.{kind}"
    info.mkdir(parents=True)
    (info / ("METADATA" if kind == "dist-info" else "PKG-INFO")).write_text("Name: fastlora\nVersion: 4.2.1\n")
    if record is not None:
        (info / "RECORD").write_text(f"{record}fastlora-4.2.1.dist-info/RECORD,,\n")
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_another_fastlora_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is, and though a checkout's egg-info is found before it."""
    monkeypatch.syspath_prepend(install(tmp_path / "site", OTHERS[name]))
    monkeypatch.syspath_prepend(install(tmp_path / "checkout", None, "egg-info"))
    said = another() or ""
    assert (
        f"version 4.2.1, is installed in {tmp_path / 'site'}" in said
        and "`pip uninstall fastlora fastlora-kernels`" in said
    )


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_points_to_a_checkout_is_let_be(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site", HARMLESS[name]))
    monkeypatch.syspath_prepend(install(tmp_path / "checkout", None, "egg-info"))
    assert another() is None


def test_the_import_refuses_before_anything_else(tmp_path: Path) -> None:
    """Not even torch was imported; the last line says what to type."""
    install(tmp_path, OTHERS["the other project"])
    (tmp_path / "fastlora.py").write_text("print('the other project')")
    (tmp_path / "torch.py").write_text("print('torch')")
    done = subprocess.run(
        [sys.executable, "-c", "import fastlora"],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert re.search(r"^ImportError: .*`pip install fastlora-kernels`", done.stderr.splitlines()[-1])


def test_the_version_has_one_place() -> None:
    """pyproject.toml reads it; nothing else in the tree says it, but for what was written of a version; the changelog tells of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "fastlora.distribution.__version__"
    assert fastlora.__version__ == fastlora.distribution.__version__
    said = f'"{re.escape(fastlora.__version__)}"'
    files = [path for folder in ("fastlora", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "setup.py", ROOT / "pyproject.toml"]
    assert [path.name for path in files if re.search(said, path.read_text())] == ["distribution.py"]
    assert f"\n## [{fastlora.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
