"""Builds fastlora._C from csrc/ and installs kernels/ as fastlora.kernels and benchmarks/ as fastlora.benchmarks.

torch is never imported here, only its headers are used, so that pip's isolated build needs no torch of its own. Without torch's headers or a
C++20 compiler the extension is skipped with a message, and the package runs as plain PyTorch.

    FASTLORA_BUILD=none          compile nothing
    FASTLORA_REQUIRE_NATIVE=1    fail where the extension cannot be built
    FASTLORA_SANITIZE=1          compile it for AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`
    CXX=clang++                  the compiler, g++ unless told
"""

import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("FASTLORA_REQUIRE_NATIVE") == "1"
SANITIZED = os.environ.get("FASTLORA_SANITIZE") == "1"
OLDEST_TORCH = (2, 11)
FLAGS = (
    "-O3 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=fast -DTORCH_TARGET_VERSION=0x020b000000000000ULL".split()
)
# The last flags win. Not optimised: the passes would take four times as long to compile. Without vptr, which needs the type information of
# torch's hidden classes.
SANITIZER_FLAGS = (
    "-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all".split()
)
# The passes are compiled once for each; the machine picks one at run time.
INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c".split()
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c".split()
    INSTRUCTION_SETS["avx512bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]


def site_folders() -> Iterator[Path]:
    """Where installed packages may lie; pip's isolated build hides them from sys.path, but not from sysconfig."""
    for prefix in (sys.prefix, sys.base_prefix):
        for scheme in (sysconfig.get_default_scheme(), *sysconfig.get_scheme_names()):
            for key in ("purelib", "platlib"):
                yield Path(sysconfig.get_path(key, scheme, vars={"base": prefix, "platbase": prefix}))
    yield Path(site.getusersitepackages())
    yield from (Path(folder) for folder in sys.path if folder)


def find_torch() -> Path:
    """The installed torch package: its include/ and lib/."""
    for folder in site_folders():
        torch = folder / "torch"
        if (torch / "include/torch/csrc/stable/library.h").is_file():
            version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
            if version and tuple(map(int, version.groups())) < OLDEST_TORCH:
                raise CompileError(f"torch in {folder} is {'.'.join(version.groups())}, expected 2.11 or newer")
            return torch
    raise CompileError("torch's headers were not found (install torch 2.11 or newer first)")


def find_pybind11(torch: Path) -> Path:
    """The folder that holds pybind11/pybind11.h: the pybind11 package's, or torch's copy."""
    try:
        import pybind11
    except ImportError:
        return torch / "include"
    return Path(pybind11.get_include())


def find_compiler() -> list[str]:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        raise CompileError(f"no C++ compiler: {compiler[0]} was not found")
    return compiler


def find_ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


def find_python() -> Path:
    """The folder that holds Python.h."""
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        raise CompileError(f"Python's headers were not found in {folder}")
    return folder


def objects(folder: Path, torch: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """(object file, source, flags of its own), one a compilation."""
    # Only the module sees pybind11, whose folder is another one in each of pip's isolated builds: the rest is not compiled again for that.
    yield folder / "module.o", "csrc/module.cpp", [f"-isystem{path}" for path in (find_pybind11(torch), find_python())]
    for source in sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp")):
        name = Path(source).stem
        if name == "adapter_passes":
            for isa, flags in INSTRUCTION_SETS.items():
                yield folder / f"{name}_{isa}.o", source, [f"-DFASTLORA_ISA={isa}", *flags]
        else:
            yield folder / f"{name}.o", source, []


class BuildNative(build_ext):
    """Compiles with ninja, in build/native, so that only what changed is compiled again."""

    def run(self) -> None:
        if SANITIZED and self.inplace:
            raise OptionError("FASTLORA_SANITIZE=1 with --inplace: every import would need the sanitizers' library")
        self.into_source = self.inplace  # setuptools clears it while it builds, and copies afterwards
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            self.compile_and_link(Path(self.get_ext_fullpath(ext.name)).resolve())
        except CompileError as error:
            # An older build left behind would be installed, or imported, as if it were this one.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            if self.into_source:
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            if not REQUIRED:
                print(
                    f"fastlora: no native extension ({error}); everything runs as plain PyTorch",
                    file=sys.stderr,
                    flush=True,
                )
            raise

    def compile_and_link(self, target: Path) -> None:
        compiler, torch = find_compiler(), find_torch()
        sanitizers = SANITIZER_FLAGS if SANITIZED else []
        compile_line = [*compiler, *FLAGS, *sanitizers, f"-isystem{torch / 'include'}"]
        link_line = [*compiler, *sanitizers, "-shared", f"-L{torch / 'lib'}"]
        libraries = ["-ltorch_cpu"]
        kind = "sanitized" if SANITIZED else "native"
        folder = ROOT / "build" / f"{kind}-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        units = list(objects(folder, torch))
        ninja = find_ninja()
        if ninja is None:
            print("fastlora: ninja was not found, compiling file by file", file=sys.stderr, flush=True)
            for output, source, flags in units:
                self.run_command_line([*compile_line, *flags, "-c", source, "-o", str(output)])
            self.run_command_line([*link_line, *(str(output) for output, _, _ in units), *libraries, "-o", str(target)])
            return
        plan = folder / "build.ninja"
        plan.write_text(self.plan(compile_line, link_line, libraries, units, target))
        self.run_command_line([ninja, "-f", str(plan)])

    @staticmethod
    def plan(
        compile_line: list[str],
        link_line: list[str],
        libraries: list[str],
        units: list[tuple[Path, str, list[str]]],
        target: Path,
    ) -> str:
        def path(value: object) -> str:
            return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        def command(words: list[str]) -> str:
            return shlex.join(words).replace("$", "$$")

        lines = [
            f"builddir = {path(units[0][0].parent)}",
            "rule compile",
            f"  command = {command(compile_line)} $flags -MMD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "rule link",
            f"  command = {command(link_line)} $in {command(libraries)} -o $out",
        ]
        for output, source, flags in units:
            lines += [f"build {path(output)}: compile {path(source)}", f"  flags = {command(flags)}"]
        lines += [
            f"build {path(target)}: link {' '.join(path(output) for output, _, _ in units)}",
            f"default {path(target)}",
            "",
        ]
        return "\n".join(lines)

    @staticmethod
    def run_command_line(words: list[str]) -> None:
        result = subprocess.run(words, cwd=ROOT, check=False)
        if result.returncode:
            raise CompileError(f"{Path(words[0]).name} failed with exit status {result.returncode}, see above")


def packages() -> list[str]:
    """fastlora's own packages, and the two folders beside it that are mapped into it."""
    own = find_packages(str(ROOT), include=["fastlora", "fastlora.*"])
    mapped = [f"fastlora.{top}" for top in ("kernels", "benchmarks")]
    return sorted({*own, *mapped})


setup(
    packages=packages(),
    package_dir={"fastlora.kernels": "kernels", "fastlora.benchmarks": "benchmarks"},
    ext_modules=[]
    if os.environ.get("FASTLORA_BUILD") == "none"
    else [Extension("fastlora._C", [], optional=not REQUIRED)],
    cmdclass={"build_ext": BuildNative},
)
