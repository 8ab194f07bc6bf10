"""What a process has held of the machine's memory, as Linux and torch tell it."""

from pathlib import Path

import torch


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
