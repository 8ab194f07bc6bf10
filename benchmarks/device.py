"""What a device is asked: its clock, its graphs, its longest kernel, the memory of a call."""

import ctypes
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastlora.choice.clock import WARM_UP_CALLS, Clock, HostClock, Run, wait_for
from fastlora.memory import resident


class CudaClock:
    """Seconds a call between two CUDA events, the L2 cache flushed before each call and outside the time."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.int8, device=device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Run, first: int, calls: int) -> float:
        total = 0.0
        for turn in range(first, first + calls):
            self._flush.zero_()
            self._begin.record()
            run(turn)
            self._end.record()
            self._end.synchronize()
            total += self._begin.elapsed_time(self._end) / 1e3
        return total / calls


def graph_pool(device: torch.device) -> Any:
    """Memory that graphs share which are replayed one after the other and whose results nobody keeps."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def captured(run: Run, device: torch.device, pool: Any = None) -> Run:
    """The run's turn 0 as a CUDA graph that is replayed: its kernels without their launches. A CPU launches nothing: there it is `run`.

    Raises:
        RuntimeError: something in the run cannot be captured.
    """
    if device.type != "cuda":
        return run
    ahead = torch.cuda.Stream(device)
    ahead.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(ahead):
        for _ in range(WARM_UP_CALLS):
            run(0)
    torch.cuda.current_stream(device).wait_stream(ahead)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run(0)
    return lambda _: graph.replay()


def require_no_wait(run: Run, device: torch.device) -> None:
    """Run turn 0, which has run before, and raise RuntimeError where it waits for the card.

    No graph can hold such a run; and a capture that fails, unlike this, ends what the process can do on the card.
    """
    if device.type != "cuda":
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(0)
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Kernel(NamedTuple):
    name: str
    seconds: float  # of one call


def main_kernel(run: Run, device: torch.device, calls: int) -> Kernel:
    """The kernel in which the run spends most, by torch's profiler; on a CPU, the operator of torch."""
    on_cuda = device.type == "cuda"
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    seconds: Counter[str] = Counter()
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as found:
        for turn in range(calls):
            run(turn)
        wait_for(device)
    for event in found.events():
        if event.device_type == kind:
            seconds[event.name] += (event.time_range.elapsed_us() if on_cuda else event.self_cpu_time_total) / 1e6
    ((name, total),) = seconds.most_common(1)
    return Kernel(name, total / calls)


def clock_of(device: torch.device) -> Clock:
    """The clock for work on this device."""
    return CudaClock(device) if device.type == "cuda" else HostClock(device)


def reset_peak() -> None:
    """Let this process's peak of resident memory be what it holds now, after free pages went back to the system.

    Raises:
        AttributeError: this is not glibc.
        OSError: there is no /proc, or a container forbids it.
    """
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # proc(5): resets the peak resident set size to its present value


def peak_of_call(run: Run, device: torch.device) -> int | None:
    """Bytes that one warm call holds at its peak, beyond what was there before it and its scratch memory included.

    On a CPU it is the process's resident memory, after free pages went back to the system. None where the system
    does not tell it (Linux does).
    """
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(0)
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        reset_peak()
        before = resident("VmRSS")
        run(0)
        return resident("VmHWM") - before
    except (AttributeError, OSError):
        return None
