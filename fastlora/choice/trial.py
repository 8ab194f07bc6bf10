"""Measure this machine: all that there is (`tune_machine`), or what a model is about to use and nobody has measured (`try_out`).

On a GPU this happens in a process of its own. A kernel that has never run on such a card may end the process, or never end: it is refused
then, as one is whose results are wrong, and another process goes on with the rest.

    FASTLORA_TRIAL=0   no trial: what nobody has measured runs native C++ on a CPU (frozen products only where torch has no library for their dtype),
                       and plain PyTorch on a GPU
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastlora import ops
from fastlora.choice import problems, table
from fastlora.choice.measure import Refusal, blames_nobody, is_out_of_memory, is_refused, one_class, refused_before
from fastlora.choice.problems import Problem
from fastlora.choice.table import Measurement

TUNE_SECONDS, TRIAL_SECONDS = 0.25, 0.05  # for each operator and class
FIRST_ON_CARDS = (4096, 64, 512, 1, 8)  # rows: training, decoding, and what lies between
APART = ("cuda",)  # devices on which a fault ends the process
FROM_OUTSIDE = ("SIGHUP", "SIGINT", "SIGKILL", "SIGTERM")  # no kernel's fault; full memory (the host's) is SIGKILL
PATIENCE = 300.0  # seconds without a word from the process apart: a kernel is compiled at its first use


def tune_machine(
    device: str, output: Path | None = None, progress: bool = True, seconds: float = math.inf
) -> tuple[Path | None, list[Measurement]]:
    """Measure every operator on this machine, a minute or two; returns the file written and what it holds.

    Args:
        device: cpu or cuda.
        output: the file to write, after every class; None: this machine's cache, which is used from now on.
        progress: show a bar.
        seconds: after so many no further class is begun, and what was measured is all; on a card bfloat16 and large weights come first.

    Raises:
        ValueError: there is no such device here, or nothing but plain PyTorch runs on it.
        OSError: the output cannot be written.
    """
    if device not in problems.LINEAR_ROWS:
        raise ValueError(f"device={device!r}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch sees no CUDA card here")
    todo = problems.listed(device, list(problems.operators), ops.KERNEL_DTYPES, list(problems.SHAPES))
    todo = [one for one in todo if ops.candidates(one.op, torch.device(device), one.dtype)]
    if device == "cuda":
        # Compiling takes longer than measuring: a class of every operator first, then the next.
        todo.sort(key=lambda one: (one.dtype != torch.bfloat16, one.size != "large", FIRST_ON_CARDS.index(one.rows)))
    found: list[Measurement] = []
    began = time.perf_counter()
    for found in tqdm(
        _measured(todo, torch.device(device), TUNE_SECONDS, set()),
        desc=f"fastlora tune, {device}",
        total=len(todo),
        unit="class",
        disable=not progress,
    ):
        if output is not None and found:
            table.write(output, device, found, f"fastlora tune --device {device} --output {output.name}")
        if found and time.perf_counter() - began > seconds:
            break
    if not found:
        missing = "; ".join(f"{one.implementation}: {one.reason}" for one in ops.availability() if not one.present)
        raise ValueError(f"nothing but plain PyTorch runs on {device}, nothing to measure ({missing})")
    if output is None:
        return table.keep(device, found, f"fastlora tune --device {device}"), found
    return output, found


def try_out(weights: Mapping[str, Sequence[Tensor]]) -> None:
    """Measure what layers need and nobody has measured on this kind of machine, a few seconds, once: the result is cached.

    Under torch.distributed every process calls it, rank 0 measures, and all choose as rank 0 does. It does nothing while compiling or capturing.

    weights: for each operator, the frozen weights that it will be called with.

    Warns:
        UserWarning: an implementation failed its check; plain PyTorch runs in its place.
    """
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if (not distributed or torch.distributed.get_rank() == 0) and trials_are_on():
        _measure_what_is_missing(weights)
    if distributed:
        decided = [table.state()]
        torch.distributed.broadcast_object_list(decided, src=0)
        if torch.distributed.get_rank() != 0:
            table.load_state(decided[0])


def trials_are_on() -> bool:
    """Whether `accelerate` may measure.

    Raises:
        ValueError: FASTLORA_TRIAL is neither 0 nor 1.
    """
    setting = os.environ.get("FASTLORA_TRIAL") or "1"
    if setting not in ("0", "1"):
        raise ValueError(f"FASTLORA_TRIAL={setting!r}: expected 0 or 1")
    return setting == "1" and ops.forced is None and not table.is_fixed()


def _measure_what_is_missing(weights: Mapping[str, Sequence[Tensor]]) -> None:
    wanted: dict[str, dict[Problem, None]] = {}  # the values: dicts keep the order
    devices: dict[str, torch.device] = {}  # cards of one machine are taken to be alike
    for op, its_weights in weights.items():
        for now, dtype, size in {(w.device, w.dtype, table.class_of(1, w.numel())[1]) for w in its_weights}:
            for device in _places(now):
                measured = device.type in problems.LINEAR_ROWS
                todo = problems.listed(device.type, [op], _dtypes(device, dtype), [size]) if measured else []
                todo = [one for one in todo if ops.candidates(op, device, one.dtype)]
                wanted.setdefault(device.type, {}).update(dict.fromkeys(todo))
                devices.setdefault(device.type, device)
    for device_type, its_problems in wanted.items():
        if _missing(device_type, its_problems):
            with table.alone(device_type):
                _try_out(devices[device_type], _missing(device_type, its_problems))


def _places(device: torch.device) -> list[torch.device]:
    """Where a weight is; on a CPU also the card that it may yet be moved to, as transformers' Trainer does after `accelerate`."""
    if device.type != "cpu" or not torch.cuda.is_available():
        return [device]
    return [device, torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())]


def _dtypes(device: torch.device, dtype: torch.dtype) -> list[torch.dtype]:
    """What the products with a weight compute in; on a card autocast may turn those of a float32 model into bfloat16."""
    return [dtype, torch.bfloat16] if (device.type, dtype) == ("cuda", torch.float32) else [dtype]


def _missing(device_type: str, wanted: Iterable[Problem]) -> list[Problem]:
    return [one for one in wanted if not table.has(device_type, *one)]


def _try_out(device: torch.device, todo: list[Problem]) -> None:
    steps = tqdm(
        _measured(todo, device, TRIAL_SECONDS, refused_before(table.entries(device.type))),
        desc=f"fastlora measures this {device.type}, once",
        total=len(todo),
        unit="class",
        leave=False,
        disable=None,  # shown on terminals alone
    )
    known = list(steps)
    if known and known[-1]:
        table.keep(device.type, known[-1], "fastlora.accelerate")


def _measured(
    todo: list[Problem], device: torch.device, seconds: float, refused: set[Refusal]
) -> Iterator[list[Measurement]]:
    """Measure one class after the other, without what is refused; yields after each what is known by then."""
    found: list[Measurement] = []
    while todo:
        for more in (_apart if device.type in APART else _here)(todo, device, seconds, refused):
            found += more
            yield [one for one in found if not is_refused(one, refused)]
        # What was the fastest in one class and has failed in another since: there the others are measured again, without it.
        again = {(one.op.removesuffix("_backward"), *one[1:5]) for one in found if is_refused(one, refused)}
        found = [one for one in found if (one.op.removesuffix("_backward"), *one[1:5]) not in again]
        todo = [one for one in todo if (one.op, table.name_of(one.dtype), *one[2:]) in again]


def _here(
    todo: list[Problem], device: torch.device, seconds: float, refused: set[Refusal]
) -> Iterator[list[Measurement]]:
    """One class after the other.

    Warns:
        UserWarning: memory is full, and the rest is not measured.
    """
    for problem in todo:
        try:
            found = one_class(problem, device, seconds, refused)
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            warnings.warn(f"fastlora: no more is measured on {device}: {_told(fault)}", stacklevel=2)
            return
        if ("cpu", problem.op) in table.WAYS:
            table.learn(device.type, found)  # the other operators are measured with it
        yield found


def _apart(
    todo: list[Problem], device: torch.device, seconds: float, refused: set[Refusal]
) -> Iterator[list[Measurement]]:
    """As `_here`, in one process after the other.

    Warns:
        UserWarning: an implementation is refused; or the rest cannot be measured, as where the card's memory is full.
    """
    left = list(todo)
    while True:
        op, runs, end = "", [], ""
        for kind, what in _run_apart(left, device, seconds, refused):
            if kind == "trying":
                op, runs = what
            elif kind == "warning":
                warnings.warn(what, stacklevel=2)
            elif kind == "found":
                more, known = what
                refused.update((op, dtype, run) for op, dtype, run in known)
                left.pop(0)
                yield [Measurement(*one) for one in more]
            else:
                end = end or what  # what the process said goes before what is seen of it
        if not left:
            return
        guilty = {(op, table.name_of(left[0].dtype), run) for run in runs} - refused
        if not guilty:  # what is refused already ends the next process as well
            warnings.warn(f"fastlora: no more is measured on {device}: {end}", stacklevel=2)
            return
        refused.update(guilty)
        warnings.warn(f"fastlora: {', '.join(runs)} is refused for {op}: {end}", stacklevel=2)


def _run_apart(
    todo: list[Problem], device: torch.device, seconds: float, refused: set[Refusal]
) -> Iterator[tuple[str, Any]]:
    """What a process that runs `answer` says, and at last ("ended", how), as far as can be seen."""
    names = [(op, table.name_of(dtype), *rest) for op, dtype, *rest in todo]
    question = json.dumps([names, str(device), seconds, list(refused)])
    # The modules of this process, and none that merely lie in the working directory (-P).
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if isinstance(path, str))}
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        try:
            process = subprocess.Popen(
                [sys.executable or "", "-P", "-c", ANSWER, question],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                errors="replace",
            )
        except OSError as fault:
            yield "ended", f"no process can be started: {fault}"
            return
        assert process.stdout is not None
        try:
            while True:
                asked = time.monotonic()
                watchdog = threading.Timer(PATIENCE, process.kill)
                watchdog.daemon = True
                watchdog.start()
                line = process.stdout.readline()
                if not line:
                    break
                watchdog.cancel()
                if line.startswith('["'):  # else it was printed by what Python runs as it starts
                    yield tuple(json.loads(line))
            code = process.wait()  # watched as well: a process may hang while it ends
            silent = time.monotonic() - asked >= PATIENCE
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        complaints.seek(0)
        last = complaints.read().strip().rpartition("\n")[2]
    if silent:
        last = f"it did not end within {PATIENCE:.0f} s"
    elif code < 0:
        name = signal.Signals(-code).name
        last = f"it ended its process ({name})"
        if name in FROM_OUTSIDE:
            yield "trying", ("", [])  # the fault of none
    yield "ended", last or f"its process ended with code {code}"


def _told(fault: Exception) -> str:
    return f"{type(fault).__name__}: {fault}".splitlines()[0]


ANSWER = "from fastlora.choice import trial; trial.answer()"


def answer() -> None:
    """The process apart: measures what its argument asks for, and says what it does and finds, in lines of JSON on standard output."""
    names, device, seconds, known = json.loads(sys.argv[1])
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes where errors go

    def say(kind: str, what: Any) -> None:
        print(json.dumps([kind, what]), file=said, flush=True)

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message).startswith("fastlora: "):
            say("warning", str(message))

    warnings.showwarning = show
    refused = {(op, dtype, run) for op, dtype, run in known}
    try:
        for op, dtype, *rest in names:
            problem = Problem(op, getattr(torch, dtype), *rest)
            found = one_class(problem, torch.device(device), seconds, refused, lambda *what: say("trying", what))
            say("found", [found, list(refused)])
    except Exception as fault:
        if blames_nobody(fault):
            say("trying", ("", []))  # the fault of none
        say("ended", _told(fault))
        sys.exit(1)
