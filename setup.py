"""Builds fastlora._C from csrc/ and installs kernels/ as fastlora.kernels and benchmarks/ as fastlora.benchmarks.

torch is never imported here, only its headers are used, so that pip's isolated build needs no torch of its own. Without torch's headers or a
C++20 compiler the extension is skipped with a message, and the package runs as plain PyTorch. Where there is an nvcc, of CUDA 12.0 or newer,
csrc/cuda is compiled in; where there is none, or it fails, the extension is built without, and says why.

    FASTLORA_BUILD=none          compile nothing
    FASTLORA_CUDA=0              leave csrc/cuda out
    FASTLORA_REQUIRE_NATIVE=1    fail where the extension cannot be built, or csrc/cuda not compiled by the nvcc that is there
    FASTLORA_SANITIZE=1          compile it for AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`
    FASTLORA_EMULATED_AVX512=1   AVX-512's instructions by others, slow, for tests on a CPU that has AVX2 alone: `make emulate-avx512`
    FASTLORA_CUDA_CHECKS=1       kernels that wait in vain stop the card and say for what: for tests, not in place
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
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("FASTLORA_REQUIRE_NATIVE") == "1"
SANITIZED = os.environ.get("FASTLORA_SANITIZE") == "1"
EMULATED = os.environ.get("FASTLORA_EMULATED_AVX512") == "1"
CHECKED = os.environ.get("FASTLORA_CUDA_CHECKS") == "1"
OLDEST_TORCH = (2, 11)
LINKED = ("benchmarks", "kernels")  # folders beside fastlora that are links in it
FLAGS = (
    "-O3 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=fast -DTORCH_TARGET_VERSION=0x020b000000000000ULL".split()
)
# The last flags win. Not optimised: the passes would take four times as long to compile. Without vptr, which needs the type information of
# torch's hidden classes.
SANITIZER_FLAGS = (
    "-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all".split()
)
# csrc/cpu/kernels.cpp is compiled once for each; the machine picks one at run time.
INSTRUCTION_SETS = {"portable": []}
TILES = {}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c".split()
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c".split()
    INSTRUCTION_SETS["avx512bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]
    # csrc/cpu/adapter_tiles.cpp, which replaces some of avx512bf16's kernels where there are tiles: real ones, or emulated ones for tests.
    TILES["amx"] = [*INSTRUCTION_SETS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
    TILES["amx_emulated"] = [*INSTRUCTION_SETS["avx512bf16"], "-DFASTLORA_EMULATED_TILES"]
    if EMULATED:
        INSTRUCTION_SETS["avx512"] = [
            *INSTRUCTION_SETS["avx2"],
            "-O1",
            "-include",
            "tests/emulated_avx512.h",
            "-Wno-psabi",
        ]
        INSTRUCTION_SETS["avx512bf16"] = [*INSTRUCTION_SETS["avx512"], "-D__AVX512BF16__"]
        TILES = dict.fromkeys(TILES, [*INSTRUCTION_SETS["avx512bf16"], "-DFASTLORA_EMULATED_TILES"])

# Machine code for sm_80 (and 86, 89) and for sm_90 with the instructions of Hopper alone; PTX for cards to come, compiled by their driver.
CUDA_TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "compute_90": "compute_90"}
CUDA_FLAGS = "-O3 -std=c++20 -Xcompiler=-fPIC,-fvisibility=hidden".split()


class Cuda(NamedTuple):
    home: Path  # bin/nvcc, include/
    libraries: Path


class Unit(NamedTuple):
    """One compilation."""

    rule: str  # compile | compile_cuda
    output: Path
    source: str
    flags: list[str]  # of its own


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


def find_cuda() -> Cuda | str:
    """The CUDA toolkit, or why csrc/cuda is not compiled. The nvcc on PATH may be a script that calls another: it is asked last."""
    if os.environ.get("FASTLORA_CUDA") == "0":
        return "switched off by FASTLORA_CUDA=0"
    if SANITIZED:
        return "left out of a sanitized build"
    on_path = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in map(Path, filter(None, [*places, on_path and Path(on_path).resolve().parent.parent])):
        if (home / "bin/nvcc").is_file() and (home / "include/cuda_runtime.h").is_file():
            for libraries in (home / "lib64", home / "lib", *home.glob("targets/*/lib")):
                if (libraries / "libcudart_static.a").is_file():
                    return Cuda(home, libraries)
    return "no CUDA toolkit was found by CUDA_HOME or CUDA_PATH, in /usr/local/cuda, or by the nvcc on PATH"


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


def objects(folder: Path, torch: Path, cuda: Cuda | str) -> Iterator[Unit]:
    """What is compiled."""
    # Only the module sees pybind11, whose folder is another one in each of pip's isolated builds: the rest is not compiled again for that.
    # torch's copy of it, which is found first, refuses (torch 2.11) to be read where torch's stable interface is asked for; the module has none.
    headers = ["-UTORCH_TARGET_VERSION", *(f"-isystem{path}" for path in (find_pybind11(torch), find_python()))]
    with_cuda = isinstance(cuda, Cuda)
    compiled_in = f'-DFASTLORA_CUDA="{" ".join(CUDA_TARGETS)}"' if with_cuda else f'-DFASTLORA_WITHOUT_CUDA="{cuda}"'
    yield Unit("compile", folder / "module.o", "csrc/module.cpp", [*headers, compiled_in])
    often = {"kernels": INSTRUCTION_SETS, "adapter_tiles": TILES}
    for source in sources("csrc/cpu/*.cpp"):
        name = Path(source).stem
        if name in often:
            for isa, flags in often[name].items():
                yield Unit("compile", folder / f"{name}_{isa}.o", source, [f"-DFASTLORA_ISA={isa}", *flags])
        else:
            yield Unit("compile", folder / f"{name}.o", source, ["-DFASTLORA_EMULATED_AVX512"] if EMULATED else [])
    if with_cuda:
        for source in sources("csrc/cuda/*.cu"):
            yield Unit("compile_cuda", folder / f"{Path(source).stem}.cuda.o", source, [])
        for source in sources("csrc/cuda/*.cpp"):
            yield Unit("compile", folder / f"{Path(source).stem}.cuda.o", source, [])


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


class BuildNative(build_ext):
    """Compiles with ninja, in build/native, so that only what changed is compiled again."""

    def run(self) -> None:
        if SANITIZED and self.inplace:
            raise OptionError("FASTLORA_SANITIZE=1 with --inplace: every import would need the sanitizers' library")
        if EMULATED and self.inplace:
            raise OptionError(
                "FASTLORA_EMULATED_AVX512=1 with --inplace: a CPU without AVX-512 would run it, slowly, as if it had it"
            )
        if CHECKED and self.inplace:
            raise OptionError("FASTLORA_CUDA_CHECKS=1 with --inplace: what is measured later would be slower")
        self.into_source = self.inplace  # setuptools clears it while it builds, and copies afterwards
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            compiler, torch, cuda = find_compiler(), find_torch(), find_cuda()
            try:
                self.compile_and_link(target, compiler, torch, cuda)
            except CompileError as error:
                if REQUIRED or isinstance(cuda, str):
                    raise
                cuda = f"the build with {cuda.home / 'bin/nvcc'} failed"
                print(f"fastlora: {cuda} ({error}); building without csrc/cuda", file=sys.stderr, flush=True)
                self.compile_and_link(target, compiler, torch, cuda)
        except CompileError as error:
            # An older build left behind would be installed, or imported, as if it were this one.
            target.unlink(missing_ok=True)
            if self.into_source:
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            if not REQUIRED:
                print(
                    f"fastlora: no native extension ({error}); everything runs as plain PyTorch",
                    file=sys.stderr,
                    flush=True,
                )
            raise

    def compile_and_link(self, target: Path, compiler: list[str], torch: Path, cuda: Cuda | str) -> None:
        sanitizers = SANITIZER_FLAGS if SANITIZED else []
        rules = {"compile": [*compiler, *FLAGS, *sanitizers, f"-isystem{torch / 'include'}"]}
        link_line = [*compiler, *sanitizers, "-shared", f"-L{torch / 'lib'}"]
        libraries = ["-ltorch_cpu"]
        if isinstance(cuda, Cuda):
            targets = [f"-gencode=arch={arch},code={code}" for code, arch in CUDA_TARGETS.items()]
            # A file's targets at once, or it takes as long as all of them together.
            nvcc = [str(cuda.home / "bin/nvcc"), f"-ccbin={compiler[0]}", f"--threads={len(targets)}"]
            checks = ["-DFASTLORA_CUDA_CHECKS"] if CHECKED else []
            rules["compile_cuda"] = [*nvcc, *CUDA_FLAGS, *checks, *targets]
            # libtorch loads libtorch_cuda where there is one: register.h finds the current stream there, and names nothing else in it.
            # The static runtime stays ours: torch has another.
            libraries += [
                f"-L{cuda.libraries}",
                "-lcudart_static",
                "-Wl,--exclude-libs,ALL",
                "-ldl",
                "-lrt",
                "-lpthread",
            ]
            libraries += ["-Wl,--no-as-needed", "-ltorch"]
        kind = "sanitized" if SANITIZED else "emulated" if EMULATED else "checked" if CHECKED else "native"
        folder = ROOT / "build" / f"{kind}-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        units = list(objects(folder, torch, cuda))
        ninja = find_ninja()
        if ninja is None:
            print("fastlora: ninja was not found, compiling file by file", file=sys.stderr, flush=True)
            for unit in units:
                self.run_command_line([*rules[unit.rule], *unit.flags, "-c", unit.source, "-o", str(unit.output)])
            self.run_command_line([*link_line, *(str(unit.output) for unit in units), *libraries, "-o", str(target)])
            return
        plan = folder / "build.ninja"
        plan.write_text(self.plan(folder, rules, link_line, libraries, units, target))
        self.run_command_line([ninja, "-f", str(plan)])

    @staticmethod
    def plan(
        folder: Path,
        rules: dict[str, list[str]],
        link_line: list[str],
        libraries: list[str],
        units: list[Unit],
        target: Path,
    ) -> str:
        def path(value: object) -> str:
            return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        def command(words: list[str]) -> str:
            return shlex.join(words).replace("$", "$$")

        lines = [f"builddir = {path(folder)}"]
        for rule, words in rules.items():
            lines += [
                f"rule {rule}",
                f"  command = {command(words)} $flags -MMD -MF $out.d -c $in -o $out",
                "  deps = gcc",
                "  depfile = $out.d",
            ]
        lines += ["rule link", f"  command = {command(link_line)} $in {command(libraries)} -o $out"]
        for unit in units:
            lines += [f"build {path(unit.output)}: {unit.rule} {path(unit.source)}", f"  flags = {command(unit.flags)}"]
        lines += [
            f"build {path(target)}: link {' '.join(path(unit.output) for unit in units)}",
            f"default {path(target)}",
            "",
        ]
        return "\n".join(lines)

    @staticmethod
    def run_command_line(words: list[str]) -> None:
        result = subprocess.run(words, cwd=ROOT, check=False)
        if result.returncode:
            raise CompileError(f"{Path(words[0]).name} failed with exit status {result.returncode}, see above")


class SourceArchive(sdist):
    """Has the links, too, which setuptools leaves out: what is unpacked runs, and is tested and installed, as a checkout is."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        for name in LINKED:
            Path(base_dir, "fastlora", name).symlink_to(Path("..", name))


def packages() -> list[str]:
    """fastlora's own packages, and the two folders beside it that are mapped into it, with what they hold."""
    own = find_packages(str(ROOT), include=["fastlora", "fastlora.*"])
    inside = find_packages(str(ROOT), include=[f"{name}.*" for name in LINKED])
    return sorted({*own, *(f"fastlora.{name}" for name in (*LINKED, *inside))})


setup(
    packages=packages(),
    package_dir={f"fastlora.{name}": name for name in LINKED},
    ext_modules=[]
    if os.environ.get("FASTLORA_BUILD") == "none"
    else [Extension("fastlora._C", [], optional=not REQUIRED)],
    cmdclass={"build_ext": BuildNative, "sdist": SourceArchive},
)
