"""Check each implementation of an operator against the reference, and time it beside plain PyTorch, in one class of sizes.

An implementation is checked first, by the bound of bounds.py, plain PyTorch being the reference in the working dtype. Then it is timed in
turn with plain PyTorch (fastlora.reference, which with dropout draws the same Philox mask). One that fails is refused and never timed.
Frozen weights have packed copies here, as `accelerate` lets them have.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import cycle, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import bounds, ops, reference
from fastlora.choice import table
from fastlora.choice.table import Measurement
from fastlora.frozen import packed

Call = tuple[Any, ...]  # the arguments of an operator

SHAPES = {"small": (1024, 1024), "large": (2048, 2048)}  # K, N
LINEAR_ROWS = {"cpu": (1, 8, 64, 512), "cuda": table.ROWS}
WORTH_A_COPY = 0.95  # of the time without a packed copy: what saves less is not worth the memory
DROPOUT_P, FEWEST_ROWS_DROPPED = 0.1, 64  # who drops anything trains, on more than a few rows
DROPPING = ("lora_linear", "lora_linear_shared", "multi_lora", "multi_lora_shared")  # the last that they return is keep
BATCHES = ((512, "small", False), (4096, "large", False))  # prefix_concat: tokens, and the size of what they move
ODD_SHAPE = 37, 100, 75  # M, K, N of a check with dropout and a bias
RANK, SCALE, ADAPTERS, GROUP = 16, 2.0, 4, 2
PROMPT, TOKENS, VOCABULARY = 20, 64, 1000

SHORTEST_SAMPLE = 2e-4  # seconds: far above the clock's own cost
LONGEST_CALL = 0.5  # seconds: a call this long is timed once
FEWEST_ROUNDS, MOST_ROUNDS = 3, 301
# Bytes of weights that take turns where rows are few, as a model's layers do: a cached one would flatter.
FROM_MEMORY = 2**27
FEW_ROWS = 64


Refusal = tuple[str, str, str]
"""An operator, a dtype and an implementation with its way: it failed a check there."""


class Problem(NamedTuple):
    """An operator with its backward, in one class of sizes."""

    op: str
    dtype: torch.dtype
    rows: int
    size: str
    dropout: bool


def problems(
    device_type: str, operators: Sequence[str], dtypes: Sequence[torch.dtype], sizes: Sequence[str]
) -> list[Problem]:
    """Everything that can be measured for these operators, dtypes and sizes of weights."""
    found = []
    for op, dtype in product(operators, dtypes):
        # torch's float16 product with a transposed weight takes seconds on a CPU: the nearest class stands for the largest.
        rows_here = LINEAR_ROWS[device_type][: -1 if (device_type, dtype) == ("cpu", torch.float16) else None]
        linear = product(rows_here, sizes, (False, True))
        if op == "frozen_linear" and not (device_type == "cpu" and packed.packs(dtype)):
            continue  # what is measured of it is whether a packed copy pays
        frozen = product([rows for rows in rows_here if rows >= packed.FEW_ROWS], sizes, (False,))
        classes = {"prefix_concat": BATCHES, "frozen_linear": frozen}.get(op, linear)
        found += [
            Problem(op, dtype, rows, size, dropout)
            for rows, size, dropout in classes
            if not dropout or rows >= FEWEST_ROWS_DROPPED
        ]
    return found


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
    make = PROBLEMS[op]
    found = []
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        odd = make(*ODD_SHAPE, dtype, device, True)
        for name, calls in make(rows, *SHAPES[size], dtype, device, dropout).items():
            names = ops.candidates(name, device, dtype)  # an implementation may have the forward alone
            runs = {f"{one} {way}".strip(): (one, way) for one in names for way in ways(name, one)}
            sound = []
            for run in runs:
                refusal = name, table.name_of(dtype), run
                if refusal not in refused:
                    trying(name, [run])
                    if _passes(name, *runs[run], (odd[name][0], calls[0])):
                        sound.append(run)
                    else:
                        refused.add(refusal)
            trying(name, sound)
            functions = {run: _in_way(name, *runs.get(run, (run, ""))) for run in ("reference", *sound)}
            times = ratios(functions, calls, device, seconds)
            trying(name, [])
            for one in names:
                best = min((run for run in sound if runs[run][0] == one), key=lambda run: _cost(run, times), default="")
                found.append(table.record(name, *problem[1:], one, times.get(best), runs[best][1] if best else ""))
    return found


def _cost(run: str, times: dict[str, float]) -> float:
    """The time of an implementation in one of its ways, and what else it costs, in the same unit."""
    return times[run] / WORTH_A_COPY if run.endswith(" packed") else times[run]


def is_refused(one: Measurement, refused: Collection[Refusal]) -> bool:
    """Whether what was timed has failed its check, here in another class."""
    return one.checked and (one.op, one.dtype, f"{one.implementation} {one.way}".strip()) in refused


def refused_before(known: Iterable[Measurement]) -> set[Refusal]:
    """What failed a check when these were made, in all its ways: it is not run again."""
    failed = [one for one in known if not one.checked]
    return {
        (one.op, one.dtype, f"{one.implementation} {way}".strip())
        for one in failed
        for way in ways(one.op, one.implementation)
    }


def is_out_of_memory(fault: Exception) -> bool:
    """Whether the card was full, of which nothing follows: torch has a type for it, CUDA and Triton have words."""
    return isinstance(fault, torch.OutOfMemoryError) or "out of memory" in str(fault)


def ways(op: str, implementation: str) -> tuple[str, ...]:
    """The implementation's ways to run the operator; one without a name where it has no choice."""
    stem = op.removesuffix("_backward").removesuffix("_shared")
    return table.WAYS.get((implementation, stem), ("",))


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


def _passes(op: str, implementation: str, way: str, checks: Sequence[Call]) -> bool:
    for call in checks:
        flaw = find_flaw(op, implementation, call, way)
        if flaw is not None:
            warnings.warn(
                f"fastlora: {' '.join((implementation, way)).strip()} is refused for {op}: {flaw}", stacklevel=2
            )
            return False
    return True


def find_flaw(op: str, implementation: str, call: Call, way: str = "") -> str | None:
    """Why the implementation's results for these arguments are wrong, or None: each must be within its bound."""
    exact = _results(op, getattr(reference, op), _widened(call))
    eager = _results(op, getattr(reference, op), call)
    device = _tensors(call)[0].device
    try:
        results = _results(op, _in_way(op, implementation, way), call)
        _finish(device)
    except Exception as defect:  # whatever it is, the model can do without this implementation
        if is_out_of_memory(defect):
            raise
        _finish(device)  # raises where nothing can run on the card any more: then the process is at its end
        return f"{_shown(call)}: it raises {type(defect).__name__}: {defect}"
    for number, (result, plain, right) in enumerate(zip(results, eager, exact, strict=True)):
        if (result.shape, result.dtype) != (plain.shape, plain.dtype):
            return f"{_shown(call)}: result {number} is {result.dtype} {list(result.shape)}, not {plain.dtype} {list(plain.shape)}"
        found = bounds.compare(result, plain, right)
        if not found.within:
            return f"{_shown(call)}: the error of result {number} is {found.error:.3g}, its bound {found.bound:.3g}"
    return None


def _tensors(call: Call) -> list[Tensor]:
    lists = [value if isinstance(value, list) else [value] for value in call]
    return [one for values in lists for one in values if isinstance(one, Tensor)]


def _shown(call: Call) -> str:
    tensors = _tensors(call)
    return f"{tensors[0].dtype} {', '.join(str(list(one.shape)) for one in tensors)}"


def _results(op: str, function: Callable[..., Any], call: Call) -> tuple[Tensor, ...]:
    """The tensors that a function returns: one, several, or a list of them among others; of keep, the mask that a backward reads."""
    results = function(*call)
    results = [results] if isinstance(results, Tensor) else list(results)
    if op in DROPPING and results[-1].numel():
        mask = reference.read_keep(results[-1], call[0].shape[1])
        if op.startswith("multi_lora"):
            order, offsets = call[-2:]
            mask = mask[..., order[offsets[1] :], :]  # the rows that have an adapter
        results[-1] = mask
    return tuple(tensor for one in results for tensor in ([one] if isinstance(one, Tensor) else one))


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
    baseline, *others = names = list(functions)
    if not others:
        return {}
    turns = cycle(calls)

    def sample(name: str, count: int) -> float:
        return _seconds_a_call(functions[name], [next(turns) for _ in range(count)], device)

    first = {name: sample(name, 1) for name in names}
    if max(first.values()) > LONGEST_CALL:
        return {name: first[name] / first[baseline] for name in others}
    for name in others:
        sample(name, len(calls))  # packs every weight
    counts = {name: math.ceil(SHORTEST_SAMPLE / max(sample(name, 1), 1e-7)) for name in names}
    rounds: list[dict[str, float]] = []
    began = time.perf_counter()
    while len(rounds) < FEWEST_ROUNDS or (time.perf_counter() - began < seconds and len(rounds) < MOST_ROUNDS):
        begin = len(rounds) % len(names)
        rounds.append({name: sample(name, counts[name]) for name in names[begin:] + names[:begin]})
    return {name: statistics.median(one[name] / one[baseline] for one in rounds) for name in others}


def _seconds_a_call(function: Callable[..., Any], calls: Sequence[Call], device: torch.device) -> float:
    _finish(device)
    began = time.perf_counter()
    for call in calls:
        function(*call)
    _finish(device)
    return (time.perf_counter() - began) / len(calls)


def _finish(device: torch.device) -> None:
    """Wait for all that was launched; its faults are raised here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Draw:
    """Random tensors that leave torch's own generators alone."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(*shape, generator=self.generator, device=self.device) * scale).to(dtype or self.dtype)

    def integers(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=self.generator, device=self.device)

    def linear(self, M: int, K: int, N: int) -> tuple[Tensor, Tensor, Tensor]:  # x [M, K], weight [N, K], dy [M, N]
        return self.normal(M, K), self.normal(N, K, scale=K**-0.5), self.normal(M, N)

    def adapter(self, K: int, N: int, R: int) -> tuple[Tensor, Tensor]:  # [R, K], [N, R], in float32 as PEFT has them
        return (
            self.normal(R, K, scale=K**-0.5, dtype=torch.float32),
            self.normal(N, R, scale=R**-0.5, dtype=torch.float32),
        )


def _in_turn(weight: Tensor, rows: int, least: int = 1) -> list[Tensor]:
    """Copies of a weight, enough that none stays in a cache where rows are few; on a CPU oneDNN may pack them."""
    copies = math.ceil(FROM_MEMORY / weight.nbytes) if rows <= FEW_ROWS and weight.numel() >= 2**20 else 1
    copies = least * math.ceil(copies / least)
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]
    if weight.device.type == "cpu":
        budget = packed.Budget(8 * FROM_MEMORY)
        for one in weights:
            packed.register(one, budget)
    return weights


def _linear_calls(
    op: str, base: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, adapter: Call, rest: Call
) -> dict[str, list[Call]]:
    x, weight, dy = base
    scale, p, _, *sorting = rest
    _, xa, keep = getattr(reference, op)(x, weight, bias, *adapter, *rest)
    weights = _in_turn(weight, x.shape[0])
    state = xa, keep, scale, p, *sorting
    return {
        op: [(x, one, bias, *adapter, *rest) for one in weights],
        f"{op}_backward": [(dy, x, one, *adapter, *state, True, True, True) for one in weights],
    }


def _frozen_linear(
    M: int, K: int, N: int, dtype: torch.dtype, device: torch.device, dropout: bool
) -> dict[str, list[Call]]:
    draw = _Draw(dtype, device)
    rows = max(M, 2 * packed.FEW_ROWS)  # of the class of 8, those that are no few rows any more
    x, weight, dy = draw.linear(rows, K, N)
    bias = draw.normal(N) if dropout else None
    weights = _in_turn(weight, x.shape[0])
    return {
        "frozen_linear": [(x, one, bias) for one in weights],
        "frozen_linear_backward": [(dy, one) for one in weights],
    }


def _lora_linear(
    M: int, K: int, N: int, dtype: torch.dtype, device: torch.device, dropout: bool
) -> dict[str, list[Call]]:
    draw = _Draw(dtype, device)
    seed = draw.integers(2**62) if dropout else None
    bias = draw.normal(N) if dropout else None
    return _linear_calls(
        "lora_linear",
        draw.linear(M, K, N),
        bias,
        draw.adapter(K, N, RANK),
        (SCALE, DROPOUT_P if dropout else 0.0, seed),
    )


def _lora_linear_shared(
    M: int, K: int, N: int, dtype: torch.dtype, device: torch.device, dropout: bool
) -> dict[str, list[Call]]:
    draw = _Draw(dtype, device)
    adapters = map(list, zip(*(draw.adapter(K, N, RANK) for _ in range(GROUP)), strict=True))
    return _shared_calls("lora_linear_shared", draw, (M, K, N), dropout, adapters)


def _shared_calls(
    op: str,
    draw: _Draw,
    sizes: tuple[int, int, int],
    dropout: bool,
    adapters: Iterable[list[Tensor]],
    sorting: Call = (),
) -> dict[str, list[Call]]:
    """adapters: every A and every B of GROUP layers."""
    M, K, N = sizes
    every_a, every_b = adapters
    x, weight, dy = draw.linear(M, K, N)
    seed = draw.integers(2**62, GROUP) if dropout else None
    bias = [draw.normal(N if dropout else 0)] * GROUP
    weights = _in_turn(weight, M, GROUP)
    groups = [weights[first : first + GROUP] for first in range(0, len(weights), GROUP)]
    rest = [SCALE] * len(every_a), [DROPOUT_P if dropout else 0.0] * len(every_a)
    _, xa, keep = getattr(reference, op)(x, groups[0], bias, every_a, every_b, *rest, seed, *sorting)
    return {
        op: [(x, group, bias, every_a, every_b, *rest, seed, *sorting) for group in groups],
        f"{op}_backward": [
            ([dy] * GROUP, x, group, every_a, every_b, xa, keep, *rest, *sorting, True, True, True) for group in groups
        ],
    }


def _mixed_rows(M: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """order and offsets of a batch of ADAPTERS: an adapter, or none, for every row where rows are few, else for every run of rows."""
    run = 1 if M <= FEW_ROWS else max(TOKENS, M // 8)
    code, order = torch.sort(torch.arange(M, device=device) // run % (ADAPTERS + 1), stable=True)  # 0: no adapter
    return order, torch.searchsorted(code, torch.arange(ADAPTERS + 3, device=device))


def _multi_lora(
    M: int, K: int, N: int, dtype: torch.dtype, device: torch.device, dropout: bool
) -> dict[str, list[Call]]:
    draw = _Draw(dtype, device)
    seed = draw.integers(2**62) if dropout else None
    bias = draw.normal(N) if dropout else None
    every_a, every_b = zip(*(draw.adapter(K, N, RANK) for _ in range(ADAPTERS)), strict=True)
    rest = [SCALE] * ADAPTERS, [DROPOUT_P if dropout else 0.0] * ADAPTERS, seed, *_mixed_rows(M, device)
    return _linear_calls("multi_lora", draw.linear(M, K, N), bias, (list(every_a), list(every_b)), rest)


def _multi_lora_shared(
    M: int, K: int, N: int, dtype: torch.dtype, device: torch.device, dropout: bool
) -> dict[str, list[Call]]:
    draw = _Draw(dtype, device)
    sorting = _mixed_rows(M, device)
    adapters = map(list, zip(*(draw.adapter(K, N, RANK) for _ in range(GROUP * ADAPTERS)), strict=True))
    return _shared_calls("multi_lora_shared", draw, (M, K, N), dropout, adapters, sorting)


def _prefix_concat(
    rows: int, D: int, _: int, dtype: torch.dtype, device: torch.device, dropout: bool
) -> dict[str, list[Call]]:
    draw = _Draw(dtype, device)
    B, T = math.ceil(rows / TOKENS), min(rows, TOKENS)
    prompts = draw.normal(ADAPTERS * PROMPT, D)
    starts = torch.arange(ADAPTERS + 1, device=device) * PROMPT
    ids = draw.integers(VOCABULARY, B, T)
    mask = (torch.arange(T, device=device) < T - torch.arange(B, device=device)[:, None] % 8).long()
    index, embedding = torch.arange(B, device=device) % ADAPTERS, draw.normal(VOCABULARY, D)
    forward: Call = (prompts, starts, PROMPT, index, None, ids, embedding, mask, None, ids)
    source = reference.prefix_concat(*forward)[-1]
    backward: Call = (draw.normal(B, T + PROMPT, D), source, len(prompts), T, True, False)
    return {"prefix_concat": [forward], "prefix_concat_backward": [backward]}


PROBLEMS: dict[str, Callable[..., dict[str, list[Call]]]] = {
    "frozen_linear": _frozen_linear,  # first: the others multiply by frozen weights in the way that was faster
    "lora_linear": _lora_linear,
    "lora_linear_shared": _lora_linear_shared,
    "multi_lora": _multi_lora,
    "prefix_concat": _prefix_concat,
    "multi_lora_shared": _multi_lora_shared,
}
