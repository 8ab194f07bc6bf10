"""Where rivals are timed, so that one that fails takes no other with it; launched by Python (eager), or replayed as a CUDA graph.

What a verb measures is a table's lines, one at a time, so that one that fails, or breaks the process, takes no other with it.
"""

import gc
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from fastlora import ops
from fastlora.choice import clock
from fastlora.choice.clock import Clock, Run, Timing

from .cases import OPERATORS, Case
from .device import captured, clock_of, graph_pool, require_no_wait
from .gate import CaseError
from .rivals import FASTLORA

EAGER, GRAPH = "eager", "CUDA graph"
HUNG_CODE = 3  # of a process that is at its end: another one can go on from the record
OUT_OF_TIME = "not timed: out of time"

Result = TypeVar("Result")


class BrokenProcessError(RuntimeError):
    """After an error the device computes nothing more in this process. `culprit`: what is to be left out from now on."""

    def __init__(self, culprit: str, error: Exception) -> None:
        super().__init__(f"{culprit}: {first_line(error)}: the process was of no more use")
        self.culprit = culprit


def answers(device: torch.device) -> bool:
    """Whether the device still computes and draws: after a bad access, or a capture that failed, it may not."""
    try:
        return bool(torch.rand(1, device=device).item() >= 0)
    except RuntimeError:
        return False


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def seconds_of(times: Mapping[str, Timing]) -> dict[str, float]:
    """Medians."""
    return {name: one.seconds for name, one in times.items()}


@dataclass
class Session:
    """A device, and what there is to say beside figures."""

    device: torch.device
    notes: list[str] = field(default_factory=list)
    refused: frozenset[str] = frozenset()  # rivals and implementations, or those in a mode, that broke a process before
    bare: bool = False  # the frozen layer and fastlora's implementations alone, as CUDA graphs

    def may_run(self, name: str, mode: str = EAGER) -> bool:
        return not self.refused & {name, f"{name}, {mode}"}

    def may_be_tried(self, case: Case) -> list[str]:
        """Plain PyTorch and the kernels of this device that broke no process yet; in a bare session kernels alone, CUDA C++ first."""
        kernels = ops.candidates(case.operator, self.device, case.dtype)
        names = kernels[::-1] if self.bare else ["reference", *kernels]
        return [name for name in names if self.may_run(name)]

    def attempt(
        self, what: str, name: str, function: Callable[..., Result], *arguments: Any, mode: str = EAGER
    ) -> Result | None:
        """function(*arguments); where it fails, a note and None.

        Raises:
            BrokenProcessError: the device does not answer any more.
        """
        try:
            result = function(*arguments)
            clock.wait_for(self.device)
            return result
        except CaseError as error:
            self.notes.append(str(error))
        except Exception as error:  # whatever it is, the other rivals can do without this one
            if not answers(self.device):
                raise BrokenProcessError(name if mode == EAGER else f"{name}, {mode}", error) from error
            self.notes.append(f"{what}: {name} fails: {first_line(error)}")
        return None

    def times(self, what: str, case: Case, runs: Mapping[str, Run], seconds: float) -> dict[str, Timing]:
        """Of what can run, launched by Python; raises as `times_by_mode`, and CaseError also where PEFT cannot run."""
        found = dict(self.times_by_mode(what, case, runs, 1, {EAGER: clock_of(self.device)}, seconds))[EAGER]
        if "peft" not in found:
            raise CaseError(f"{what}: peft does not run: not timed")
        return found

    def times_by_mode(
        self, what: str, case: Case, runs: Mapping[str, Run], copies: int, clocks: Mapping[str, Clock], seconds: float
    ) -> Iterator[tuple[str, dict[str, Timing]]]:
        """(mode, times of what can run in it) of every mode that has a clock, the first run the baseline; a timed call meets every copy.

        Raises:
            CaseError: the baseline or fastlora cannot run.
            BrokenProcessError: something ended the process's use of the device.
        """
        for mode, of_mode in clocks.items():
            ready: dict[str, Run] = {}
            pool = graph_pool(self.device)
            what_now = f"{what}, {mode}"
            for name, run in runs.items():
                if not self.may_run(name, mode) or (mode == GRAPH and name in OPERATORS[case.operator].uncapturable):
                    continue
                prepared = self.attempt(what_now, name, _ready, run, copies, mode, self.device, pool, mode=mode)
                if prepared is not None:
                    ready[name] = prepared
                else:
                    pool = graph_pool(self.device)  # the one of a failed capture takes no other
            for name in (next(iter(runs)), FASTLORA):
                if name not in ready:
                    raise CaseError(f"{what_now}: {name} does not run: not timed")
            times = clock.time_in_turn(ready, of_mode, seconds)
            yield mode, {name: one._replace(seconds=one.seconds / copies) for name, one in times.items()}


def _ready(run: Run, copies: int, mode: str, device: torch.device, pool: Any) -> Run:
    """A timed call is a run of every copy of the weights once, as the layers of a model follow one another."""

    def every_copy(turn: int) -> None:
        for number in range(turn * copies, (turn + 1) * copies):
            run(number)

    whole = run if copies == 1 else every_copy
    if mode == GRAPH:
        require_no_wait(whole, device)
        return captured(whole, device, pool)
    for turn in range(clock.WARM_UP_CALLS):
        whole(turn)
    return whole


Line = Callable[[Session], Iterator[Any]]  # its rows


@dataclass
class Record:
    """What was found so far: the result file holds it after every figure, and another process can go on from there."""

    rows: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)  # lines that were measured, or failed
    failed: list[str] = field(default_factory=list)  # those of them that have no figure
    refused: list[str] = field(default_factory=list)  # as Session's


def measure_lines(
    lines: Mapping[str, Line], device: torch.device, record: Record, save: Callable[[], object], say: Callable[[str], None],
    deadline: float, bare: bool = False, line_seconds: float = math.inf,
) -> bool:  # fmt: skip
    """Measure what the record lacks, and save after every figure; False where this process can do no more and another one should go on.

    deadline: in seconds of time.perf_counter; no line is begun after it.
    line_seconds: a line that takes longer, as one whose kernel never ends, ends this process with HUNG_CODE, in which nothing else could.
    """
    for name in [name for name in lines if name not in record.begun]:
        if time.perf_counter() > deadline:
            record.notes.append(f"{name}: {OUT_OF_TIME}")
            continue
        record.begun.append(name)
        say(f"{len(record.begun)}/{len(lines)}: {name}")
        before = len(record.rows)
        patience = _patience(name, record, save, line_seconds)
        try:
            for row in lines[name](Session(device, record.notes, frozenset(record.refused), bare)):
                record.rows.append(row)
                save()
        except BrokenProcessError as error:
            record.notes.append(f"{name}: {error}")
            record.refused.append(error.culprit)
            record.begun.remove(name)  # without the culprit it can be measured
            del record.rows[before:]
        except Exception as error:  # whatever it is, the other lines can do without this one
            say(f"{name}: {error}")
            record.notes.append(f"{name}: {first_line(error)}")
            record.failed.append(name)
        finally:
            patience.cancel()
        save()
        if not answers(device):
            return False
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    save()
    return True


def _patience(name: str, record: Record, save: Callable[[], object], seconds: float) -> threading.Timer:
    """Ends the process after so many seconds, unless cancelled."""

    def end() -> None:
        record.notes.append(f"{name}: ended after {seconds:.0f} s, with its process")
        record.failed.append(name)
        save()
        os._exit(HUNG_CODE)

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    return timer
