"""What this machine has, what it lacks, and what each lack costs: `fastlora env`."""

import json
import os
import platform
import shutil
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from fastlora import __version__, ops
from fastlora.choice import table, trial

REQUIRED = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "typer")
OPTIONAL = {
    "triton": "no Triton kernels on a GPU",
    "matplotlib": "no loss plot",
    "rouge-score": "`fastlora eval` leaves ROUGE out",
    "starlette": "no `fastlora serve`",
    "uvicorn": "no `fastlora serve`",
    "datasets": "no data sets of the hub; files are read without it",
    "pyarrow": "no Parquet",
    "trl": "nothing, but for those who train with TRL",
}
COMPILERS = {
    "g++": "no native extension can be built here: CPUs run plain PyTorch (reference), unless a wheel brought one",
    "nvcc": "an extension built here has no CUDA C++ kernels: GPUs run Triton's, or plain PyTorch",
}
RESULTS = Path(__file__).parent / "benchmarks" / "results"
ON_CARDS = {"reference": "plain PyTorch", "triton": "Triton", "cuda": "CUDA C++"}


class Finding(NamedTuple):
    part: str  # machine | package | compiler | implementation | measurements
    name: str
    present: bool
    detail: str  # version or description; where absent, what that costs


def all_findings() -> list[Finding]:
    """All findings, in the order in which they are printed. Reads no network and changes nothing."""
    return [*_machine(), *_packages(), *_compilers(), *_implementations(), *_measurements()]


def _machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = f"{table.machine_name('cpu')}, {cores} cores usable, {torch.get_num_threads()} torch threads, {capability}"
    findings = [
        Finding("machine", "python", True, f"{platform.python_version()} on {platform.platform()}"),
        Finding("machine", "cpu", True, cpu),
    ]
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return [*findings, Finding("machine", "gpu", False, f"none that torch ({built}) can use: all runs on the CPU")]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        detail = (
            f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
        findings.append(Finding("machine", f"gpu {index}", True, detail))
    return findings


def _packages() -> list[Finding]:
    found = [Finding("package", "fastlora", True, f"{__version__}, in {Path(__file__).parent}")]
    for name, cost in {**dict.fromkeys(REQUIRED, "fastlora train does not run"), **OPTIONAL}.items():
        try:
            found.append(Finding("package", name, True, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append(Finding("package", name, False, cost))
    return found


def _compilers() -> list[Finding]:
    if sys.platform == "win32":
        return []
    found = []
    for name, cost in COMPILERS.items():
        path = shutil.which(os.environ.get("CXX", name) if name == "g++" else name)
        found.append(Finding("compiler", name, path is not None, path or cost))
    return found


def cards_of(implementation: str, results: Path = RESULTS) -> dict[str, str]:
    """The kinds of card on which it was checked and timed, and when: what the result files of `python -m benchmarks goals --device cuda` say."""
    found = {}
    for path in sorted(results.glob("*-goals.json")):
        content = json.loads(path.read_text())
        machine = content["machine"]
        if machine.get("device") == "cuda":
            if any(implementation in (row["implementation"], *row["rivals"]) for row in content["rows"]):
                found[machine["kind"]] = machine["date"]
    return found


def _on_cards(implementation: str, results: Path = RESULTS) -> str:
    cards = cards_of(implementation, results)
    if not torch.cuda.is_available():
        return f"run on {', '.join(cards)}" if cards else "no card has run it yet"
    date = cards.get(table.kind_of("cuda"))
    return f"checked and timed on this kind of card, {date}" if date else "no card of this kind has run it yet"


def _instruction_set() -> str:
    import fastlora._C

    try:
        return fastlora._C.isa()
    except RuntimeError as error:  # of FASTLORA_ISA
        return str(error).splitlines()[0]


def _implementations() -> list[Finding]:
    found = []
    for name, present, reason in ops.availability():
        mark = f"; on cards: {_on_cards(name)}" if name in ON_CARDS else ""
        if name == "cpu" and present:
            mark = f"; instruction set: {_instruction_set()}"
        found.append(Finding("implementation", name, present, reason + mark))
    return found


def _measurements() -> list[Finding]:
    """What the choice of implementation rests on."""
    found = []
    for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            held = Counter(one.origin for one in table.entries(device_type))
        except RuntimeError as error:  # of FASTLORA_ISA
            found.append(Finding("measurements", device_type, False, str(error).splitlines()[0]))
            continue
        without = f"none for {table.kind_of(device_type)}: `fastlora tune --device {device_type}` makes them"
        detail = ", ".join(f"{count} {origin}" for origin, count in held.items()) or without
        found.append(Finding("measurements", device_type, bool(held), detail))
    what = "accelerate measures what a model needs and nobody has measured on such a machine, and keeps it in"
    try:
        where = str(table.cache_folder())
    except FileNotFoundError as error:
        where = f"no folder ({error})"
    on = trial.trials_are_on()
    return [*found, Finding("measurements", "trial", on, f"{what} {where}" if on else f"switched off; cache: {where}")]
