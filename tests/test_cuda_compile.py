"""The CUDA C++ kernels, compiled alone and without torch for the cards that setup.py names: they spill nothing and keep to their registers.

What an nvcc has made of the same files before is kept in build/machine_code. PTX for cards to come, which only their drivers compile, is left out.
What ptxas reports is compared with cuda_resources.json: [registers a thread, bytes of static shared memory a block] by file, kernel and target,
as the nvcc that it names compiles them. A kernel that is not in the table fails, and so does one with more than its entry;
`python tests/test_cuda_compile.py` writes the table anew.
"""

import functools
import hashlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_name("cuda_resources.json")
FILES = sorted(path.name for path in (ROOT / "csrc/cuda").glob("*.cu"))

Usage = dict[str, dict[str, list[int]]]  # kernel -> target -> [registers, shared]


@functools.cache  # it changes setuptools for a moment, which threads must not do at the same time
def read_setup() -> dict[str, Any]:
    """setup.py's names."""
    run, setuptools.setup = setuptools.setup, lambda **_: None
    try:
        return runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = run


def nvcc() -> str:
    return str(read_setup()["find_cuda"]().home / "bin/nvcc")


def release() -> str:
    """Of nvcc: 13.0."""
    said = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release ([\d.]+)", said)[1]  # type: ignore[index]


def compiling() -> list[str]:
    """The command that compiles a file for every target that has machine code."""
    setup = read_setup()
    machines = {code: arch for code, arch in setup["CUDA_TARGETS"].items() if code.startswith("sm_")}
    targets = [f"-gencode=arch={arch},code={code}" for code, arch in machines.items()]
    return [nvcc(), *setup["CUDA_FLAGS"], "-Icsrc", *targets, "-fatbin", "-Xptxas=-v", f"--threads={len(targets)}"]


def compile_alone(name: str, output: str | Path = os.devnull) -> str:
    """What ptxas says of every kernel of csrc/cuda/<name>, demangled; its machine code is left in `output`."""
    command = compiling()
    done = subprocess.run(
        [*command, f"csrc/cuda/{name}", "-o", str(output)], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return subprocess.run(["c++filt"], input=done.stderr, check=True, capture_output=True, text=True).stdout


def place_of_code() -> Path:
    """The folder of what this nvcc makes of these files."""
    files = sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".cu", ".cuh", ".h"))
    contents = b"".join(path.read_bytes() for path in files)
    key = hashlib.sha256(" ".join([*compiling(), release(), *map(str, files)]).encode() + contents).hexdigest()[:16]
    place = ROOT / "build/machine_code" / key
    place.mkdir(parents=True, exist_ok=True)
    return place


def compile_once(name: str, place: Path) -> str:
    """`compile_alone`, or what it said before; the machine code is place/<name>."""
    report = place / f"{name}.txt"
    if not report.exists():
        new = place / f"{name}.{os.getpid()}"
        new.write_text(compile_alone(name, place / name))
        new.rename(report)
    return report.read_text()


def with_headers(name: str) -> str:
    """The text of csrc/cuda/<name> and of what it includes from there."""
    text = (ROOT / "csrc/cuda" / name).read_text()
    return text + "".join(with_headers(included) for included in re.findall(r'#include "(\w+\.cuh)"', text))


def read_usage(report: str) -> tuple[Usage, list[str]]:
    """The resources of each kernel, and what no kernel may have: a stack, which is where registers are spilled to, and warnings.

    Tensor cores that wait for one another and a setmaxnreg that is ignored are told of as information.
    """
    usage: Usage = {}
    for kernel, target, body in re.findall(
        r"Compiling entry function '(.+?)' for '(\w+)'\n(.*?Used \d+ registers[^\n]*)", report, re.DOTALL
    ):
        name = re.sub(r"^void |fastlora::|\(anonymous namespace\)::", "", kernel).split("(")[0]
        registers, shared = re.search(r"Used (\d+) registers", body), re.search(r"(\d+) bytes smem", body)
        assert registers, body
        usage.setdefault(name, {})[target] = [int(registers[1]), int(shared[1]) if shared else 0]
    fault = re.compile(r"warning|Potential Performance Loss|\b[1-9]\d* bytes (stack|spill)")
    faults = [line for line in report.splitlines() if fault.search(line)]
    return usage, faults


@pytest.fixture(scope="module")
def folder() -> Path:
    if isinstance(why := read_setup()["find_cuda"](), str):
        pytest.skip(f"nvcc is not installed, or not wanted: {why}")
    return place_of_code()


@pytest.fixture(scope="module")
def reports(folder: Path) -> dict[str, str]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FILES, pool.map(lambda name: compile_once(name, folder), FILES), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_nothing_spills(reports: dict[str, str], name: str) -> None:
    assert read_usage(reports[name])[1] == []


@pytest.mark.parametrize("name", FILES)
def test_kernels_keep_to_their_table(reports: dict[str, str], name: str) -> None:
    table = json.loads(TABLE.read_text())
    usage, allowed = read_usage(reports[name])[0], table[name]
    defined = set(re.findall(r"\b(\w+_kernel)\(", with_headers(name)))
    assert {re.sub(r"<.*", "", kernel) for kernel in usage} == defined, "kernels defined and compiled"
    assert usage.keys() == allowed.keys(), "kernels compiled and in the table"
    if release() != table["nvcc"]:
        pytest.skip(f"nvcc {release()} gives kernels other registers than nvcc {table['nvcc']}, which the table is of")
    for kernel, targets in usage.items():
        assert targets.keys() == allowed[kernel].keys(), kernel
        for target, (registers, shared) in targets.items():
            most_registers, its_shared = allowed[kernel][target]
            assert registers <= most_registers and shared == its_shared, (kernel, target, registers, shared)


def cuobjdump() -> str | None:
    """CUDA's, or the one that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    places = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    return next(
        (str(place / "cuobjdump") for place in places if (place / "cuobjdump").is_file()), shutil.which("cuobjdump")
    )


@functools.cache
def functions(program: str, target: str, code: Path) -> list[str]:
    """The instructions of every kernel for one target, each behind its name."""
    command = [program, "-sass", "-arch", target, str(code)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("Function : ")[1:]


# Of kernels that are written for a card's own instructions: asynchronous copies, the copy engine, tensor cores of either kind, and what lets a
# launch begin early (PREEXIT) and wait for the one before (ACQBULK).
HOPPER = {"UTMALDG", "HGMMA", "USETMAXREG", "PREEXIT", "ACQBULK"}
THIN = {"LDGSTS", "HMMA", "PREEXIT", "ACQBULK"}
INSTRUCTIONS = {
    ("lora_linear.cu", "product_sm80_kernel", "sm_80"): {"LDGSTS", "LDSM", "HMMA"},
    ("lora_linear.cu", "round_kernel", "sm_90a"): {"PREEXIT"},
    ("lora_linear.cu", "sum_kernel", "sm_90a"): {"ACQBULK"},
    ("lora_linear.cu", "product_sm90_kernel", "sm_90a"): HOPPER,
    ("lora_linear.cu", "side_kernel", "sm_80"): {"LDGSTS", "HMMA"},
    ("lora_linear.cu", "side_kernel", "sm_90a"): THIN,
    ("multi_lora.cu", "product_sm80_kernel", "sm_80"): {"LDGSTS", "LDSM", "HMMA"},
    ("multi_lora.cu", "multi_round_kernel", "sm_90a"): {"PREEXIT"},
    ("multi_lora.cu", "multi_sum_kernel", "sm_90a"): {"ACQBULK"},
    ("multi_lora.cu", "product_sm90_kernel", "sm_90a"): HOPPER,
    ("multi_lora.cu", "side_kernel", "sm_90a"): THIN,
    ("multi_lora.cu", "multi_shrink_kernel", "sm_90a"): {"PREEXIT", "HMMA"},
    ("multi_lora.cu", "multi_linear_kernel", "sm_80"): {"LDGSTS", "HMMA"},
    ("multi_lora.cu", "multi_linear_kernel", "sm_90a"): {"ACQBULK", "LDGSTS", "HMMA"},
}


@pytest.mark.parametrize(("name", "kernel", "target"), INSTRUCTIONS, ids=map(" ".join, INSTRUCTIONS))
def test_machine_code_has_what_the_kernel_is_for(
    reports: dict[str, str], folder: Path, name: str, kernel: str, target: str
) -> None:
    if (program := cuobjdump()) is None:
        pytest.skip("no cuobjdump: neither Triton nor CUDA's own is installed")
    bodies = [body for body in functions(program, target, folder / name) if kernel in body.partition("\n")[0]]
    usage = read_usage(reports[name])[0]
    assert len(bodies) == sum(one.startswith(f"{kernel}<") and target in usage[one] for one in usage) > 0
    for body in bodies:
        assert set(re.findall(r"\b[A-Z]{3,}\b", body)) >= INSTRUCTIONS[name, kernel, target], body.partition("\n")[0]
        assert "GLOBALTIMER" not in body  # which builds for tests look at while they wait
        # What the launch before writes is read, and what it may still read is written, behind the wait only. Not so where one warp waits for
        # the others of its block, and brings them all that they read of it.
        waits_first = "ACQBULK" in body and kernel != "product_sm90_kernel"
        ahead = body.partition("ACQBULK")[0] if waits_first else ""
        assert re.findall(r"\b(?:LDG\S*STRONG|STG|ATOM|RED)\S*", ahead) == []


def test_the_reading_sees_faults() -> None:
    """ptxas' report, as it words it, of a kernel that spills."""
    usage, faults = read_usage(
        "ptxas info    : Compiling entry function 'void fastlora::(anonymous namespace)::one_kernel<float>(int)' for 'sm_80'\n"
        "ptxas info    : Function properties for void one_kernel\n"
        "    8 bytes stack frame, 4 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 704 bytes smem, 664 bytes cmem[0]\n"
    )
    assert usage == {"one_kernel<float>": {"sm_80": [40, 704]}} and len(faults) == 1


if __name__ == "__main__":
    table = {name: read_usage(compile_alone(name))[0] for name in FILES}
    rows = [
        f'  "{name}": {{\n'
        + ",\n".join(f'    "{kernel}": {json.dumps(usage[kernel])}' for kernel in sorted(usage))
        + "\n  }"
        for name, usage in table.items()
    ]
    TABLE.write_text("{\n" + ",\n".join([f'  "nvcc": "{release()}"', *rows]) + "\n}\n")
