"""What the figures were measured on, and what that machine can do at most."""

import datetime
import functools
import importlib.metadata
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora import __version__, writing
from fastlora.choice import table
from fastlora.choice.clock import Run, time_in_turn
from fastlora.limits import fastest_product

from .cases import dtype_name
from .device import clock_of

PACKAGES = ("triton", "transformers", "peft")
FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent  # the checkout, or `fastlora` where the package is installed


def _plain(value: Any) -> Any:
    """For json: a dtype by its name, a dataclass as an object."""
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    # pass_ is "pass", which Python keeps for itself.
    return {name.rstrip("_"): field for name, field in vars(value).items()}


@dataclass(frozen=True)
class Machine:
    name: str  # the card or the CPU
    device: str  # cuda or cpu
    kind: str  # the name that tables of measurements go by
    threads: int  # CPU threads that torch uses
    versions: dict[str, str]
    commit: str
    date: str

    def line(self) -> str:
        """One line for the head of a report."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.name}, {self.threads} CPU threads, {versions}, commit {self.commit}, {self.date}"

    def path(self, folder: Path, name: str) -> Path:
        """The file in the folder for what is measured under that name: DATE-MACHINE-NAME.json, in lower case, with hyphens."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return folder / f"{self.date}-{slug}-{name}.json"

    def write(self, folder: Path, name: str, command: Sequence[str], result: Mapping[str, Any]) -> Path:
        """Write what was found into its file, whole; returns it."""
        path = self.path(folder, name)
        # Where somebody's folders lie is nothing for a file that is shown to others.
        told = " ".join(Path(word).name if Path(word).is_absolute() else word for word in command)
        content = {"operator": name, "command": told, "machine": self, **result}
        path.parent.mkdir(parents=True, exist_ok=True)
        writing.whole(path, (json.dumps(content, indent=1, default=_plain) + "\n").encode())
        return path


def in_checkout() -> bool:
    """Whether this is a checkout of the project, with its tests, and not an installed package."""
    return (ROOT / "tests").is_dir() and (ROOT / "fastlora").is_dir()


def results_folder() -> Path:
    """Where result files go: benchmarks/results of the checkout, or of the current folder for an installed package."""
    return (FOLDER if in_checkout() else Path.cwd() / "benchmarks") / "results"


def _commit() -> str:
    """FASTLORA_COMMIT tells it of a copy that was made without its .git, as for a machine without a network."""
    if told := os.environ.get("FASTLORA_COMMIT"):
        return told
    if not in_checkout():
        return "none (installed package)"
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def this_machine(device: torch.device) -> Machine:
    """The machine as it is now."""
    versions = {"torch": str(torch.__version__)}  # whose metadata may lack the build (+cpu, +cu130)
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    versions["fastlora"] = __version__
    on_cpu = f"{table.machine_name('cpu')} ({torch.backends.cpu.get_cpu_capability()})"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    kind, today = table.kind_of(device.type), datetime.date.today().isoformat()
    return Machine(name, device.type, kind, torch.get_num_threads(), versions, _commit(), today)


def last_level_cache() -> int:
    """Bytes of the CPU's largest cache; 32 MiB where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = re.fullmatch(r"(\d+)K", path.read_text().strip())
        sizes.append(int(number[1]) * 1024 if number else 0)
    return max(sizes, default=0) or 32 * 2**20


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second in the fastest large product of that dtype, measured at the first call."""
    return fastest_product(device, dtype, clock_of(device), budget=1.5)


@functools.cache
def bandwidths(device: torch.device, budget: float = 1.5) -> dict[str, float]:
    """Bytes a second of a large "copy", read and written, and of a large "read", a sum: the best of many samples, measured at the first call."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"copy": lambda _: target.copy_(source), "read": lambda _: source.sum()}
    times = time_in_turn(runs, clock_of(device), budget)
    return {"copy": 2 * source.nbytes / times["copy"].fastest, "read": source.nbytes / times["read"].fastest}
