"""What gets installed, and that it runs without the native extension, without Triton and without a compiler."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import fastlora

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = [
    name
    for name in (".ci", "benchmarks", "csrc", "docs", "examples", "fastlora", "kernels", "tests")
    if (ROOT / name).is_dir()
]
LARGEST = 12_000_000  # bytes of a wheel or a source archive; `make wheel` holds the wheel with its extension to it


def read_setup(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]]:
    """setup.py's names, and what it hands to setuptools."""
    handed: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", handed.update)
    return runpy.run_path(str(ROOT / "setup.py")), handed


def run_setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, check=False, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is made from, without anything built."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    built = shutil.ignore_patterns("*.so", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=built)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> zipfile.ZipFile:
    done = run_setup(checkout, "-q", "bdist_wheel", "--dist-dir", "wheel", FASTLORA_BUILD="none")
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (checkout / "wheel").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_link_to_benchmarks_is_relative() -> None:
    assert (ROOT / "fastlora" / "benchmarks").readlink() == Path("../benchmarks")


def test_every_module_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    modules = [path for path in (ROOT / "fastlora").rglob("*.py") if not any(p.is_symlink() for p in path.parents)]
    expected = {str(path.relative_to(ROOT)) for path in modules}
    for folder in ("kernels", "benchmarks"):
        expected |= {f"fastlora/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
    assert expected <= names, sorted(expected - names)
    top = {name.split("/")[0] for name in names}
    assert top == {"fastlora", f"fastlora_kernels-{fastlora.__version__}.dist-info"}


def test_data_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    data = [
        path
        for folder in (
            "fastlora/assets/base",
            "fastlora/assets/templates",
            "fastlora/assets/tuned",
            "benchmarks/results",
        )
        for path in (ROOT / folder).glob("*")
        if path.is_file()
    ]
    expected = {
        ("" if path.is_relative_to(ROOT / "fastlora") else "fastlora/") + str(path.relative_to(ROOT)) for path in data
    }
    expected.add("fastlora/py.typed")
    assert expected <= names, sorted(expected - names)


def test_the_command_line_is_installed(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "fastlora = fastlora.cli:main" in wheel.read(entry_points).decode()


def test_the_source_archive_has_what_the_checkout_has(checkout: Path, wheel: zipfile.ZipFile) -> None:
    """All of its folders' files, and its links, which tests and editable installations need. The same wheel can be built from it."""
    done = run_setup(checkout, "-q", "sdist", "--dist-dir", "archive", FASTLORA_BUILD="none")
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (checkout / "archive").glob("*.tar.gz")
    assert path.stat().st_size < LARGEST
    with tarfile.open(path) as archive:
        archive.extractall(checkout / "unpacked", filter="data")
    (unpacked,) = (checkout / "unpacked").iterdir()
    names = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if file.is_file()}
    needed = {"setup.py", "pyproject.toml", "constraints.txt", "Makefile"}
    needed |= {f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")} | {"LICENSE"}
    for folder in FOLDERS:
        files = (file for file in (checkout / folder).rglob("*") if file.is_file())
        needed |= {str(file.relative_to(checkout)) for file in files if "__pycache__" not in file.parts}
    assert needed <= names, sorted(needed - names)
    for name in ("benchmarks", "kernels"):
        assert (unpacked / "fastlora" / name).readlink() == Path("..") / name
    done = run_setup(unpacked, "-q", "bdist_wheel", "--dist-dir", "wheel", FASTLORA_BUILD="none")
    assert done.returncode == 0, done.stderr[-2000:]
    (again,) = (unpacked / "wheel").glob("*.whl")
    assert set(zipfile.ZipFile(again).namelist()) == set(wheel.namelist())


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = wheel.read(name).decode()
    assert metadata.startswith("Metadata-Version: ")
    assert {"Name: fastlora-kernels", f"Version: {fastlora.__version__}"} <= set(metadata.splitlines())
    assert wheel.filename and Path(wheel.filename).stat().st_size < LARGEST


def test_without_a_compiler(checkout: Path) -> None:
    """Nothing is built, an older build does not pass for this one, and the reason is told; unless the extension is required."""
    older = checkout / "fastlora" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    older.touch()
    environment = {"CXX": "no-such-compiler", "FASTLORA_REQUIRE_NATIVE": "0"}
    done = run_setup(checkout, "build_ext", "--inplace", **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no native extension (no C++ compiler: no-such-compiler was not found)" in done.stderr
    assert not older.exists()
    done = run_setup(checkout, "build_ext", "--inplace", **{**environment, "FASTLORA_REQUIRE_NATIVE": "1"})
    assert done.returncode != 0
    assert "no-such-compiler was not found" in done.stderr


@pytest.mark.parametrize("variable", ["FASTLORA_SANITIZE", "FASTLORA_CUDA_CHECKS"])
def test_a_build_for_tests_never_takes_the_place_of_the_real_one(checkout: Path, variable: str) -> None:
    done = run_setup(checkout, "build_ext", "--inplace", **{variable: "1"})
    assert done.returncode != 0
    assert f"{variable}=1 with --inplace" in done.stderr


def make_toolkit(home: Path) -> Path:
    for file in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (home / file).parent.mkdir(parents=True)
        (home / file).touch()
    return home


LATER = {
    "STABLE_TORCH_ERROR_CODE_CHECK",
    "nativeHandle",
}  # of torch's stable interface, what 2.11 has not, or has by another name


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.*")), ids=lambda path: path.name)
def test_sources_name_nothing_that_the_oldest_torch_lacks(path: Path) -> None:
    assert not LATER & set(re.findall(r"\w+", path.read_text()))


def test_where_cuda_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CUDA_HOME before CUDA_PATH before PATH; a folder with an nvcc alone, as of a script that calls another, is no toolkit."""
    names, _ = read_setup(monkeypatch)
    find_cuda = names["find_cuda"]
    monkeypatch.delenv("FASTLORA_CUDA", raising=False)
    real, other = make_toolkit(tmp_path / "real"), make_toolkit(tmp_path / "other")
    script = tmp_path / "usr" / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(script.parent.parent))
    monkeypatch.setenv("CUDA_PATH", str(real))
    assert find_cuda() == (real, real / "lib64")
    monkeypatch.setenv("CUDA_HOME", str(other))
    assert find_cuda().home == other
    monkeypatch.setenv("FASTLORA_CUDA", "0")
    assert find_cuda() == "switched off by FASTLORA_CUDA=0"


@pytest.mark.parametrize("required", [False, True])
def test_an_nvcc_that_fails(required: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd) -> None:
    """The extension is built without csrc/cuda, and knows why; unless it is required."""
    names, _ = read_setup(monkeypatch)
    toolkit = names["Cuda"](make_toolkit(tmp_path), tmp_path / "lib64")
    built = []

    def compile_and_link(target: Path, compiler: list[str], torch: Path, cuda: Any) -> None:
        if cuda == toolkit:
            raise names["CompileError"]("ninja failed with exit status 1")
        built.append(cuda)

    command = SimpleNamespace(
        get_ext_fullpath=lambda name: str(tmp_path / "_C.so"), compile_and_link=compile_and_link, into_source=False
    )
    build_extension = names["BuildNative"].build_extension
    for name, value in {"find_cuda": lambda: toolkit, "find_compiler": lambda: ["g++"], "REQUIRED": required}.items():
        monkeypatch.setitem(build_extension.__globals__, name, value)
    if required:
        with pytest.raises(names["CompileError"]):
            build_extension(command, SimpleNamespace(name="fastlora._C"))
        assert built == []
    else:
        build_extension(command, SimpleNamespace(name="fastlora._C"))
        (why,) = built
        assert why.endswith("bin/nvcc failed")
        assert f"{why} (ninja failed with exit status 1); building without csrc/cuda" in capfd.readouterr().err


def test_the_build_plan_has_every_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names, _ = read_setup(monkeypatch)
    with_cuda = list(names["objects"](tmp_path, Path(torch.__file__).parent, names["Cuda"](tmp_path, tmp_path)))
    without = list(names["objects"](tmp_path, Path(torch.__file__).parent, "no nvcc"))
    kernels = {unit.source for unit in with_cuda if unit.rule == "compile_cuda"}
    assert kernels == {str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert len({unit.output for unit in with_cuda}) == len(with_cuda)
    assert {unit.source for unit in with_cuda} - {unit.source for unit in without} == {
        *kernels,
        "csrc/cuda/register_lora_linear.cpp",
        "csrc/cuda/register_prefix_concat.cpp",
    }


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_the_module_compiles_beside_a_torch_that_guards_its_pybind11(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch 2.11's copy, which is found before the package's, is no header where torch's stable interface is asked for."""
    names, _ = read_setup(monkeypatch)
    guarded = tmp_path / "include" / "pybind11"
    guarded.mkdir(parents=True)
    copied = Path(names["find_pybind11"](Path(torch.__file__).parent), "pybind11/pybind11.h")
    text = f'#if defined(TORCH_STABLE_ONLY) || defined(TORCH_TARGET_VERSION)\n#error guarded\n#endif\n#include "{copied}"\n'
    (guarded / "pybind11.h").write_text(text)
    (module,) = (unit for unit in names["objects"](tmp_path, tmp_path, "no nvcc") if unit.source == "csrc/module.cpp")
    found = (f"-isystem{folder}" for folder in (tmp_path / "include", copied.parent.parent))
    command = ["g++", *names["FLAGS"], *found, *module.flags, "-fsyntax-only", module.source]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_torch_or_with_an_old_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names, _ = read_setup(monkeypatch)
    find_torch = names["find_torch"]
    monkeypatch.setitem(find_torch.__globals__, "site_folders", lambda: iter([tmp_path]))
    with pytest.raises(names["CompileError"], match="install torch 2.11 or newer"):
        find_torch()
    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.10.1+cpu'\n")
    with pytest.raises(names["CompileError"], match=r"is 2\.10, expected 2\.11 or newer"):
        find_torch()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.11.0'\n")
    assert find_torch() == tmp_path / "torch"


def test_setup_finds_this_torch_and_never_imports_one(monkeypatch: pytest.MonkeyPatch) -> None:
    names, handed = read_setup(monkeypatch)
    assert names["find_torch"]() == Path(torch.__file__).parent
    assert "torch" not in {name for name, value in names.items() if type(value) is type(os)}
    assert not any(Requirement(text).name == "torch" for text in PYPROJECT["build-system"]["requires"])
    own = ("kernels", "benchmarks", "benchmarks.claims", "data")
    assert {"fastlora", *(f"fastlora.{name}" for name in own)} <= set(handed["packages"])


BARE = """
import sys
sys.modules["fastlora._C"] = None
sys.modules["triton"] = None
import torch
import fastlora
from fastlora import functional, ops

x = torch.randn(4, 6, requires_grad=True)
a, b = torch.randn(2, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)
functional.lora_linear(x, torch.randn(5, 6), None, a, b, 2.0, dropout_p=0.5).sum().backward()
assert a.grad is not None and x.grad is not None
functional.multi_lora(x, torch.randn(5, 6), None, [a], [b], [2.0], torch.zeros(4, dtype=torch.int64)).sum().backward()
functional.prefix_concat(torch.randn(1, 2, 6), torch.randn(3, 4, 6), torch.ones(3, 4))
for found in ops.availability():
    print(found.implementation, found.present, found.reason)
"""


def test_it_runs_as_plain_pytorch() -> None:
    """No extension, no Triton: the package imports, computes, and says what is missing and what that costs."""
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FASTLORA_IMPL")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BARE],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reference, cpu, triton, cuda = done.stdout.splitlines()
    assert reference.startswith("reference True")
    assert cpu.startswith("cpu False not built") and "plain PyTorch" in cpu
    assert triton.startswith("triton False cannot be imported")
    assert cuda.startswith("cuda False not built")


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        name: Version(version) for name, version in (line.split("==") for line in lines if line[:1] not in ("", "#"))
    }


def test_the_pinned_versions_are_within_the_ranges() -> None:
    project = PYPROJECT["project"]
    texts = [
        *project["dependencies"],
        *chain(*project["optional-dependencies"].values()),
        *PYPROJECT["build-system"]["requires"],
    ]
    pinned = pins()
    for requirement in map(Requirement, texts):
        assert requirement.name in pinned, f"{requirement.name} is not pinned in constraints.txt"
        assert pinned[requirement.name] in requirement.specifier, f"{requirement} excludes {pinned[requirement.name]}"
