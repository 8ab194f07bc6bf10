"""What a process has held of the machine's memory, as Linux and torch tell it, and a bound on what torch keeps of it for products."""

import os
from pathlib import Path

import torch

PRODUCT_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""How many shapes of products oneDNN, and torch again, keep compiled code for: 1024 where these are not set."""

SHAPES_KEPT = 128


def bound_product_caches() -> None:
    """Let a process keep compiled code for 128 shapes of 16-bit products on a CPU, unless the environment says for how many.

    oneDNN compiles half a megabyte of code for each number of rows (570 kB for one nn.Linear; AMD Zen 5, torch 2.13, 2026-11-29), so that batches of
    ever new lengths fill a gigabyte and more before the oldest is dropped. 128 are more than the layers of a model share among one another. Both are
    read at a process's first such product: what was computed earlier has settled it.
    """
    for name in PRODUCT_CACHES:
        os.environ.setdefault(name, str(SHAPES_KEPT))


def resident(kind: str) -> int:
    """Bytes of this process's resident memory: "VmRSS" now, "VmHWM" the most so far, or since the last reset (proc(5), clear_refs).

    (getrusage's ru_maxrss would not do: a process starts with its parent's peak there.)

    Raises:
        OSError: there is no /proc, as elsewhere than on Linux.
        ValueError: there is no such line.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"kind must name a line of /proc/self/status, got {kind!r}")


def peak(device: torch.device) -> int | None:
    """Bytes that this process has held at its peak: in torch's allocator on a GPU, else in main memory; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return resident("VmHWM")
    except OSError:
        return None
