"""Where a Hopper card's time goes, reckoned from the product kernel's instructions and what an H200 took for the rest (2026-11-29).

A tile of 128 x 256 keeps a multiprocessor's tensor cores busy for 1,024 cycles every 64 of the depth. What stands between the last product of a tile
and the first of the next does not overlap with them, since both warpgroups are in it together: the rank step and the epilogue. Two warps a scheduler
issue it, an instruction a cycle. By how much the main loop is behind cuBLAS's beside that was measured, BEHIND, and so were the thin products, which
are launches of their own: bytes of x a second, as they read it. `Counts` are budgets that tests/test_machine_code.py holds the compiled kernels to.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

from .session import Line, Session
from .table import render

PROCESSORS, SCHEDULERS = 132, 4
CLOCK = 1.5e9  # cycles a second: those of an H200 while cuBLAS multiplies, which has not the power for more
PRODUCT = 1024  # cycles of tensor cores: 128 x 256 x 64, 2,048 multiplications and additions a cycle
WARPS = 8  # of a tile's two warpgroups
ANSWER = 150  # cycles from a small product's issue to its sums
LAUNCH = 1.0e-6  # seconds of a launch that another one overlaps with
BEHIND = 0.055  # of the product's time
ROUND = 3e-6, 11e-6  # seconds: A and B rounded and padded; the same and xa, and the parts of dA and dB added
DRAW = 18e-6 / (8192 * 4096)  # seconds an element of x takes the drawing of its mask


@dataclass(frozen=True)
class Counts:
    """Instructions a thread, at most."""

    epilogue: int = 500  # of a whole tile without a bias
    with_bias: int = 900
    masked: int = 120  # of 64 of a masked rank step's 256 columns
    loop: int = 72  # of the main loop, every 64 of the depth
    # Of the thin products', a step: x aᵀ and pᵀ x, with up to 16 ranks and with up to 64; a mask is drawn in the first.
    shrink_16: int = 1200
    shrink_64: int = 880
    gradient_16: int = 290
    gradient_64: int = 260


COUNTS = Counts()


@dataclass(frozen=True)
class Thin:
    """Bytes of x a second, of tiles of `ranks` ranks: of x aᵀ, of pᵀ x right after it, and of pᵀ x from memory."""

    ranks: int
    shrink: float
    again: float
    gradient: float


def thin(R: int) -> Thin:
    """The tiles that are for rank R."""
    return Thin(16, 2.6e12, 5.6e12, 2.5e12) if R <= 16 else Thin(64, 1.0e12, 1.4e12, 1.6e12)


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


def side_seconds(M: int, K: int, N: int, R: int, backward: bool, dropout: bool) -> float:
    """The thin products': x aᵀ of the forward; of the backward dy b with dB, and dA. A mask is drawn once, whatever the rank."""
    tile = thin(R)
    passes, x, dy = ceil(R / tile.ranks), 2 * M * K, 2 * M * N
    if not backward:
        return passes * x / tile.shrink + (M * K * DRAW if dropout else 0.0)
    return passes * (dy / tile.shrink + dy / tile.again + x / tile.gradient)


def layer(M: int, K: int, N: int, R: int, dropout: bool = True) -> tuple[float, float, float]:
    """(forward, dx, launches), each in percent of the frozen products' time. K: in-features, N: out-features."""

    def percent(depth: int, columns: int, cycles: float, backward: bool) -> tuple[float, float]:
        # Tiles a multiprocessor, whole ones or not: the frozen layer's are no better.
        waves = M * columns / (128 * 256 * PROCESSORS)
        frozen = waves * depth / 64 * PRODUCT / CLOCK
        sides = side_seconds(M, K, N, R, backward, dropout) + ROUND[backward]
        return 100 * (BEHIND + (waves * cycles / CLOCK + sides) / frozen), frozen

    forward, first = percent(K, N, forward_cycles(R), False)
    backward, second = percent(N, K, backward_cycles(R, dropout), True)
    return forward, backward, 100 * 5 * LAUNCH / (first + second)  # what is not hidden of round, two thin ones and sum


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
        "reckoned, not measured: percent over the frozen products' time, bfloat16, dropout 0.1, from the kernel's instructions and"
        " an H200's thin products; launches: what of five is not hidden"
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
