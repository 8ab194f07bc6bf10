"""Check each implementation of an operator against the reference, and time it beside plain PyTorch, in one class of sizes.

An implementation is checked first, by the bound of bounds.py, plain PyTorch being the reference in the working dtype: on one input, and where that
is outside, on seven more beside it, since the largest errors of one can be luck. Then it is timed in
turn with plain PyTorch (fastlora.reference, which with dropout draws the same Philox mask). One that fails is refused and never timed. A way that
is plain PyTorch's own is neither checked nor timed: its ratio is 1.
"""

import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, cycle
from typing import Any

import torch
from torch import Tensor

from fastlora import bounds, ops
from fastlora.bounds import Errors
from fastlora.choice import problems, table
from fastlora.choice.clock import HostClock, Run, time_in_turn, wait_for
from fastlora.choice.problems import Call, Problem, operators
from fastlora.choice.table import Measurement

WORTH_A_COPY = 0.95  # of the time without a packed copy: what saves less is not worth the memory
PLAIN_PYTORCH, WITH_A_COPY = "torch", "packed"  # ways
ODD_SHAPE = 37, 100, 75  # M, K, N of a check with dropout and a bias
INPUTS = 8  # over which errors are taken where the first one's are outside the bound

LONGEST_CALL = 0.5  # seconds: a call this long is timed once
FEWEST_ROUNDS = 3


Refusal = tuple[str, str, str]
"""An operator, a dtype and an implementation with its way: it failed a check there."""


def one_class(
    problem: Problem,
    device: torch.device,
    seconds: float,
    refused: set[Refusal] | None = None,
    trying: Callable[[str, Sequence[str]], None] = lambda op, runs: None,
) -> list[Measurement]:
    """Check and time every implementation of the operator and of its backward, for about `seconds` each.

    refused: what is not to be run; what fails its check here is added.
    trying: told the operator and the implementations, each with its way, that are about to run, and when they are through.
    """
    op, dtype, rows, size, dropout = problem
    if not ops.candidates(op, device, dtype):
        return []
    refused = set() if refused is None else refused
    make = operators[op].calls
    sizes, odd_sizes = (rows, *problems.SHAPES[size], dtype, device, dropout), (*ODD_SHAPE, dtype, device, True)
    found = []
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        odd = make(*odd_sizes)
        for name, calls in make(*sizes).items():
            names = ops.candidates(name, device, dtype)  # an implementation may have the forward alone
            offered = {
                one: [way for way in ways(name, one) if operators[op].offers(name, way, dtype, rows)] for one in names
            }
            runs = {f"{one} {way}".strip(): (one, way) for one in names for way in offered[one] if way != PLAIN_PYTORCH}
            sound = []
            for run in runs:
                refusal = name, table.name_of(dtype), run
                if refusal not in refused:
                    trying(name, [run])
                    if _passes(name, *runs[run], make, ((odd[name][0], odd_sizes), (calls[0], sizes))):
                        sound.append(run)
                    else:
                        refused.add(refusal)
            trying(name, sound)
            plain = operators[op].plain.get(name) or ops.implementation(name, "reference")
            functions = {"reference": plain, **{run: _in_way(name, *runs[run]) for run in sound}}
            times = ratios(functions, calls, device, seconds)
            trying(name, [])
            for one in names:
                its_times = {runs[run][1]: times[run] for run in sound if runs[run][0] == one}
                if PLAIN_PYTORCH in offered[one]:
                    its_times[PLAIN_PYTORCH] = 1.0
                way, without_copy = _fastest(its_times)
                found.append(table.record(name, *problem[1:], one, its_times.get(way), way, without_copy))
    return found


def _fastest(times: dict[str, float]) -> tuple[str, str]:
    """The way to run, and where that takes a copy the one without: plain PyTorch's unless another gains, and a copy where it pays.

    times: of each way over plain PyTorch's.
    """
    without = [way for way in times if way != WITH_A_COPY]
    fastest = min(without, key=lambda way: ops.WORTH_IT if way == PLAIN_PYTORCH else times[way], default="")
    if WITH_A_COPY in times and times[WITH_A_COPY] <= WORTH_A_COPY * times.get(fastest, math.inf):
        return WITH_A_COPY, fastest
    return fastest, ""


def is_refused(one: Measurement, refused: Collection[Refusal]) -> bool:
    """Whether what was timed has failed its check, here in another class."""
    runs = {f"{one.implementation} {way}".strip() for way in (one.way, one.without_copy or one.way)}
    return one.checked and any((one.op, one.dtype, run) in refused for run in runs)


def refused_before(known: Iterable[Measurement]) -> set[Refusal]:
    """What failed a check when these were made, in all its ways: it is not run again."""
    failed = [one for one in known if not one.checked]
    return {
        (one.op, one.dtype, f"{one.implementation} {way}".strip())
        for one in failed
        for way in ways(one.op, one.implementation)
    }


def is_out_of_memory(fault: Exception) -> bool:
    """Whether memory was full: torch has a type for it on a card, CUDA, Triton, torch on a CPU and C++ have words."""
    full = isinstance(fault, (torch.OutOfMemoryError, MemoryError))
    return full or any(words in str(fault) for words in ("out of memory", "can't allocate memory", "bad_alloc"))


def blames_nobody(fault: Exception) -> bool:
    """Whether nothing follows from it of an implementation: memory was full, or a variable of this process says what cannot be."""
    return is_out_of_memory(fault) or re.search(r"\bFASTLORA_[A-Z]+=", str(fault)) is not None


def ways(op: str, implementation: str) -> tuple[str, ...]:
    """The implementation's ways to run the operator; one without a name where it has no choice."""
    return table.ways_of(implementation, op) or ("",)


def _in_way(op: str, implementation: str, way: str) -> Callable[..., Any]:
    """The implementation, made to go that way."""
    function = ops.implementation(op, implementation)

    def run(*call: Any) -> Any:
        table.forced_way = way
        try:
            return function(*call)
        finally:
            table.forced_way = ""

    return run if way else function


def _passes(
    op: str,
    implementation: str,
    way: str,
    make: Callable[..., dict[str, list[Call]]],
    checks: Sequence[tuple[Call, tuple[Any, ...]]],
) -> bool:
    for call, sizes in checks:
        flaw = find_flaw(op, implementation, call, way, (drawn[op][0] for drawn in _drawn_anew(make, sizes)))
        if flaw is not None:
            warnings.warn(
                f"fastlora: {' '.join((implementation, way)).strip()} is refused for {op}: {flaw}", stacklevel=2
            )
            return False
    return True


def _drawn_anew(make: Callable[..., dict[str, list[Call]]], sizes: tuple[Any, ...]) -> Iterator[dict[str, list[Call]]]:
    """Arguments of the same sizes in other numbers."""
    for seed in range(1, INPUTS):
        problems.seed = seed
        try:
            drawn = make(*sizes)
        finally:
            problems.seed = 0
        yield drawn


def find_flaw(op: str, implementation: str, call: Call, way: str = "", others: Iterable[Call] = ()) -> str | None:
    """Why the implementation's results for these arguments are wrong, or None: each must be within its bound.

    others: arguments in other numbers, asked for where some error is outside its bound: the largest ones of all inputs count then.
    """
    found: list[list[Errors]] = []
    for one in chain([call], others):
        errors = _errors(op, implementation, one, way)
        if isinstance(errors, str):
            return f"{_shown(one)}: {errors}"
        found.append(errors)
        if len(found) == 1 and all(error.within for error in errors):
            return None
    for number, of_one in enumerate(zip(*found, strict=True)):
        largest = bounds.over_inputs(of_one)
        if not largest.within:
            return f"{_shown(call)}: the error of result {number} is {largest.error:.3g}, its bound {largest.bound:.3g}"
    return None


def _errors(op: str, implementation: str, call: Call, way: str) -> list[Errors] | str:
    """Each result's errors, or why there is no such result."""
    exact = _results(op, ops.implementation(op, "reference"), _widened(call))
    eager = _results(op, ops.implementation(op, "reference"), call)
    device = _tensors(call)[0].device
    try:
        results = _results(op, _in_way(op, implementation, way), call)
        wait_for(device)
    except Exception as defect:  # whatever it is, the model can do without this implementation
        if blames_nobody(defect):
            raise
        wait_for(device)  # raises where nothing can run on the card any more: then the process is at its end
        return f"it raises {type(defect).__name__}: {defect}"
    errors = []
    for number, (result, plain, right) in enumerate(zip(results, eager, exact, strict=True)):
        if (result.shape, result.dtype) != (plain.shape, plain.dtype):
            return f"result {number} is {result.dtype} {list(result.shape)}, not {plain.dtype} {list(plain.shape)}"
        errors.append(bounds.compare(result, plain, right))
    return errors


def _tensors(call: Call) -> list[Tensor]:
    lists = [value if isinstance(value, list) else [value] for value in call]
    return [one for values in lists for one in values if isinstance(one, Tensor)]


def _shown(call: Call) -> str:
    tensors = _tensors(call)
    return f"{tensors[0].dtype} {', '.join(str(list(one.shape)) for one in tensors)}"


def _results(op: str, function: Callable[..., Any], call: Call) -> list[Tensor]:
    """The tensors that a function returns, as far as implementations have them in common."""
    return operators[op.removesuffix("_backward")].comparable(function(*call), call)


def _widened(value: Any) -> Any:
    """The arguments with every floating-point tensor in float64."""
    if isinstance(value, (tuple, list)):
        return type(value)(_widened(one) for one in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def ratios(
    functions: dict[str, Callable[..., Any]], calls: Sequence[Call], device: torch.device, seconds: float
) -> dict[str, float]:
    """Each function's time over the first one's: the median over rounds in which every function is timed once, in turn.

    calls: arguments that differ in their weights alone, and take turns.
    """
    baseline, *others = functions
    if not others:
        return {}
    take_time, turns = HostClock(device), cycle(calls)

    def in_turn(function: Callable[..., Any]) -> Run:
        return lambda _: function(*next(turns))

    runs = {name: in_turn(function) for name, function in functions.items()}
    first = {name: take_time(run, 0, 1) for name, run in runs.items()}
    if max(first.values()) > LONGEST_CALL:
        return {name: first[name] / first[baseline] for name in others}
    for name in others:
        take_time(runs[name], 0, len(calls))  # packs every weight
    times = time_in_turn(runs, take_time, seconds, warm_up=(1,), fewest=FEWEST_ROUNDS)
    return {name: times[name].ratio for name in others}
