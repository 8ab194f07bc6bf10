"""Where an H100's time would go by the instructions of the Hopper kernel, beside the goals: reckoned, not measured.

A tile of 128 x 256 keeps a multiprocessor's tensor cores busy for 1,024 cycles every 64 of the depth. What stands between the last product of a tile
and the first of the next does not overlap with them, since both warpgroups are in it together: the rank step and the epilogue. Two warps a scheduler
issue it, an instruction a cycle. The thin products run beside that, three warps of a multiprocessor, one a scheduler: they cost what they take
longer, and the time of tensor cores that they take from the others. Each launch that is not hidden costs its latency. `Counts` are budgets that
tests/test_machine_code.py holds the compiled kernels to; the rest are assumptions, named below, which a first run on a card is to replace. Where a
card has not the power to keep its tensor cores busy, what takes turns with them costs less than is said here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

from .session import Line, Session
from .table import render

PROCESSORS, SCHEDULERS = 132, 4
CLOCK = 1.755e9  # cycles a second, boost under load
PRODUCT = 1024  # cycles of tensor cores: 128 x 256 x 64, 4,096 multiplications and additions a cycle
MEMORY, CACHE = 3.0e12, 5.5e12  # bytes a second: HBM3 as copies reach it, the second-level cache
WARPS = 8  # of a tile's two warpgroups
ANSWER = 150  # cycles from a small product's issue to its sums
LATE = 150  # cycles that a part of `a` comes late from the cache which was asked for 32 of the depth ahead
LAUNCH = 1.0e-6  # seconds of a launch that another one overlaps with
SIDES = 3  # warps of thin products
TURN = 2  # cycles from one of their instructions to the next
# Seconds an element of x takes the drawing of its mask, over all multiprocessors: some 100 instructions for a thread's eight elements.
DRAW = TURN * 100 / 8 / (SIDES * 32 * PROCESSORS * CLOCK)
MULTIPLIED = 512  # multiplications and additions a cycle of one scheduler's tensor core


@dataclass(frozen=True)
class Counts:
    """Instructions a thread, at most."""

    epilogue: int = 500  # of a whole tile without a bias
    with_bias: int = 900
    masked: int = 120  # of 64 of a masked rank step's 256 columns
    loop: int = 72  # of the main loop, every 64 of the depth
    loop_64: int = 78  # of kernels for more than 16 ranks
    # Of the thin products', a step: x aᵀ and pᵀ x, with up to 16 ranks and with up to 64.
    shrink_16: int = 400
    shrink_64: int = 460
    gradient_16: int = 340
    gradient_64: int = 280


COUNTS = Counts()


@dataclass(frozen=True)
class Thin:
    """Tiles of the thin products, as csrc/cuda/skinny.cuh has them."""

    ranks: int  # at most
    rows: int  # of a tile of x aᵀ
    depth: int  # of its step, all three warps'
    columns: int  # of a tile of pᵀ x
    step: int  # its rows
    shrink: int  # instructions of a step
    gradient: int

    @property
    def late(self) -> int:
        """Cycles that a step of x aᵀ waits for `a`: with more ranks it asks for no more than the next 32 of the depth."""
        return 0 if self.ranks == 16 else 3 * LATE


def thin(R: int) -> Thin:
    """The tiles that are for rank R."""
    if R <= 16:
        return Thin(16, 16, 384, 64, 48, COUNTS.shrink_16, COUNTS.gradient_16)
    return Thin(64, 32, 96, 48, 16, COUNTS.shrink_64, COUNTS.gradient_64)


@dataclass(frozen=True)
class Share:
    """One layer: percent over the time of its frozen products, and of what."""

    what: str
    goal: float
    forward: float
    backward: float
    launches: float
    both: float


def _issued(instructions: float) -> float:
    """Cycles in which a scheduler has issued them for its warps."""
    return instructions * WARPS / SCHEDULERS


def _steps(R: int) -> int:
    return ceil(R / 16)


def forward_cycles(R: int) -> float:
    """What a tile of the forward costs beside its products with the frozen weight."""
    return PRODUCT / 4 * _steps(R) + ANSWER + _issued(COUNTS.epilogue)


def backward_cycles(R: int, dropout: bool) -> float:
    """The same of dx; with dropout the rank step is masked, a quarter of the columns at a time."""
    if not dropout:
        return forward_cycles(R)
    return 4 * (PRODUCT / 16 * _steps(R) + ANSWER) + _issued(4 * COUNTS.masked + COUNTS.epilogue)


def _shrink(M: int, depth: int, R: int, backward: bool, dropout: bool) -> tuple[float, float]:
    """Seconds of x aᵀ: of its instructions, and of what it reads: x from memory once, else x and `a` from the cache."""
    tile, passes = thin(R), ceil(R / thin(R).ranks)
    # In the forward, whose products leave the thin ones more registers, all of a step's `a` is asked for a step ahead.
    step = tile.shrink * TURN + (tile.late if backward else 0)
    issued = passes * M / tile.rows * ceil(depth / tile.depth) * step / (PROCESSORS * CLOCK)
    drawn = passes * M * depth * DRAW if dropout and not backward else 0.0
    x, a = 2 * M * depth, 2 * depth * (M / tile.rows) * 16 * _steps(R)
    return issued + drawn, x / MEMORY + ((passes - 1) * x + a) / CACHE


def _gradient(M: int, columns: int, R: int) -> tuple[float, float]:
    """The same of pᵀ x, x from the cache: another product has read it."""
    tile, passes = thin(R), ceil(R / thin(R).ranks)
    cycles = passes * M / tile.step * ceil(columns / tile.columns) * tile.gradient * TURN
    return cycles / (PROCESSORS * CLOCK), 2 * M * (passes * columns + 16 * _steps(R) * columns / tile.columns) / CACHE


def side_seconds(M: int, K: int, N: int, R: int, backward: bool, dropout: bool) -> float:
    """The thin products': x aᵀ of the forward; of the backward dy b, and both gradients, of which dA reads x from memory."""
    if not backward:
        return max(_shrink(M, K, R, False, dropout))
    parts = _shrink(M, N, R, True, dropout), _gradient(M, N, R), _gradient(M, K, R)
    issued, read = (sum(part[i] for part in parts) for i in range(2))
    return max(issued, read + 2 * M * K * (1 / MEMORY - 1 / CACHE))


def taken_seconds(M: int, K: int, N: int, R: int, backward: bool) -> float:
    """For which the thin products have the tensor cores of three schedulers out of four, and the others wait for these."""
    multiplied = M * 16 * _steps(R) * (2 * N + K if backward else K)
    return multiplied / (SIDES * MULTIPLIED * PROCESSORS * CLOCK)


def layer(M: int, K: int, N: int, R: int, dropout: bool = True) -> tuple[float, float, float]:
    """(forward, dx, launches), each in percent of the frozen products' time. K: in-features, N: out-features."""

    def percent(depth: int, columns: int, cycles: float, backward: bool) -> tuple[float, float]:
        # Tiles a multiprocessor, whole ones or not: the frozen layer's are no better.
        waves = M * columns / (128 * 256 * PROCESSORS)
        frozen = waves * depth / 64 * PRODUCT / CLOCK
        busy = frozen + waves * cycles / CLOCK + taken_seconds(M, K, N, R, backward)
        ours = max(busy, side_seconds(M, K, N, R, backward, dropout))
        return 100 * (ours / frozen - 1), frozen

    forward, first = percent(K, N, forward_cycles(R), False)
    backward, second = percent(N, K, backward_cycles(R, dropout), True)
    return forward, backward, 100 * 3 * LAUNCH / (first + second)  # before the forward, before dx and behind it


LLAMA = {"q, o": (2, 4096, 4096), "k, v": (2, 4096, 1024), "gate, up": (2, 4096, 14336), "down": (1, 14336, 4096)}
CASES = {
    "8192 rows, 4096 to 4096, r 16": (4.0, [(1, 4096, 4096)], 16),
    "8192 rows, 8192 to 8192, r 16": (2.5, [(1, 8192, 8192)], 16),
    "8192 rows, 4096 to 4096, r 64": (7.0, [(1, 4096, 4096)], 64),
    "Llama-3-8B's seven linears, r 16": (3.5, list(LLAMA.values()), 16),
}


def _share(_: Session, what: str) -> Iterator[Share]:
    goal, layers, R = CASES[what]
    sizes = [K * N * count for count, K, N in layers]
    found = [layer(8192, K, N, R) for _, K, N in layers]
    forward, backward, launches = (
        sum(part[i] * size for part, size in zip(found, sizes, strict=True)) / sum(sizes) for i in range(3)
    )
    yield Share(what, goal, forward, backward, launches, (forward + backward) / 2 + launches)


def model_lines() -> dict[str, Line]:
    """A line a goal, by its title."""
    return {what: partial(_share, what=what) for what in CASES}


def model_table(found: Sequence[Share], notes: Sequence[str]) -> str:
    """For people."""
    legend = (
        "reckoned from the kernel's instructions, not measured: percent over the frozen products' time, bfloat16, dropout 0.1, on an H100;"
        " launches: what of three is not hidden"
    )
    heads = ("layer", "forward", "dx", "launches", "both", "goal")
    rows = [
        (
            one.what,
            *(f"{value:.1f} %" for value in (one.forward, one.backward, one.launches, one.both)),
            f"<= {one.goal:g} %",
        )
        for one in found
    ]
    return "\n".join([legend, "", render(heads, rows), "", *notes])
