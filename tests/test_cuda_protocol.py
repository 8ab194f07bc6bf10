"""The flags of product_sm90_kernel (csrc/cuda/product_sm90.cuh), every interleaving of them.

A model of `take_sides`, `produce`, `wait_for_rows` and `wait_for_all_shrunk` on small sizes: a block has a team that takes thin products' tiles and
a producer that asks for the rank step of its tiles. The launch before, which clears the flags, may end at any time. Any block may begin while fewer
than `resident` are at work, and any part of any block that is able to take its next step may be the next that does. In no order may everybody wait,
and neither a rank step nor a tile that waits for all may read a row that is not shrunk.

Left out, since they wait for nobody but their own block: the stages between a producer and its consumers, which the emulated card runs. That
whoever sees a flag sees what was written before it is the release's and the acquire's doing (PTX ISA, Memory Consistency Model).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest

HEIGHT = 4  # rows of a product's tile; a shrinking tile has two
GRADIENT, LAST = (
    "gradient",
    "last",
)  # tiles that shrink nothing: of `first`, and of `last`, which reads what all have shrunk


@dataclass(frozen=True)
class Launch:
    M: int
    shrinks: tuple[tuple[int, ...], ...]  # the rows of each shrinking tile; a row in none has no place
    passes: int = 1
    columns: int = 1  # tiles of a row-block
    blocks: int = 2
    resident: int = 2
    gradients: int = 0  # of dB, each behind a shrinking tile, as far as there are any
    last: int = 0


@dataclass(frozen=True)
class Rules:
    """The protocol; each field is one of its rules, to be broken."""

    falls_back: bool = True  # whoever waits for rows goes on when all tiles have shrunk
    missing_rows: int = 0  # fewer than a tile has
    counts_passes: bool = True
    missing_tiles: int = 0  # fewer than there are
    writes_first: bool = True  # before it is told
    waits_last: bool = True  # tiles that wait are handed out behind all that shrink
    beside: bool = True  # the team and the producer are at work at the same time
    team_waits: bool = True  # for the end of the launch before
    producer_waits: bool = True  # for that, before it looks at flags


@dataclass(frozen=True)
class Block:
    side: Any = (
        None  # None: takes a tile; a shrinking tile's [rows, pass, written, flags to be raised]; LAST: waits; "done"
    )
    turn: int = 0  # of its products' tiles


@dataclass(frozen=True)
class State:
    blocks: tuple[Block | None, ...]  # None: has not begun
    taken: int = 0
    written: frozenset[tuple[int, int]] = frozenset()  # rows and passes
    of_row: tuple[int, ...] = ()
    shrunk: int = 0
    cleared: bool = False  # the launch before has ended


class Unsafe(Exception):
    """A row is read that is not shrunk, or somebody looks at a flag that is not cleared."""


class Deadlock(Exception):
    """Everybody waits."""


class Model:
    def __init__(self, launch: Launch, rules: Rules) -> None:
        self.launch, self.rules = launch, rules
        shrinks: list[Any] = []
        for i, (rows, number) in enumerate(product(launch.shrinks, range(launch.passes))):
            shrinks.append((rows, number))
            shrinks += [GRADIENT] * (i < launch.gradients)
        waiting = [LAST] * launch.last
        self.sides = shrinks + waiting if rules.waits_last else waiting + shrinks
        self.row_blocks = -(-launch.M // HEIGHT)
        self.tiles = self.row_blocks * launch.columns
        self.all = len(launch.shrinks) * launch.passes - rules.missing_tiles
        self.placed = {row for rows in launch.shrinks for row in rows}
        # A block asks for a tile of every row-block in its turn, whichever is next in the raster.
        self.turns = [range(block, self.tiles, launch.blocks) for block in range(launch.blocks)]

    def first(self) -> State:
        return State((None,) * self.launch.blocks, of_row=(0,) * self.row_blocks)

    def is_done(self, index: int, block: Block) -> bool:
        return block.side == "done" and block.turn == len(self.turns[index])

    def next(self, state: State) -> Iterator[State]:
        if not state.cleared:
            yield replace(state, cleared=True)
        at_work = sum(block is not None and not self.is_done(i, block) for i, block in enumerate(state.blocks))
        for i, block in enumerate(state.blocks):
            if block is None:
                if at_work < self.launch.resident:
                    yield self._with(state, i, Block())
                continue
            yield from self._produce(state, i, block)
            if self.rules.beside or block.turn == len(self.turns[i]):
                yield from self._take_sides(state, i, block)

    @staticmethod
    def _with(state: State, index: int, block: Block, **changes: Any) -> State:
        return replace(state, blocks=(*state.blocks[:index], block, *state.blocks[index + 1 :]), **changes)

    def _all_shrunk(self, state: State) -> bool:
        return state.shrunk >= self.all

    def _produce(self, state: State, index: int, block: Block) -> Iterator[State]:
        """wait_for_rows, and then the rank step."""
        if block.turn == len(self.turns[index]):
            return
        if not state.cleared:
            if self.rules.producer_waits:
                return
            raise Unsafe(f"a producer looks at flags: {state}")
        row_block = self.turns[index][block.turn] % self.row_blocks
        rows = range(row_block * HEIGHT, min(self.launch.M, (row_block + 1) * HEIGHT))
        wanted = (len(rows) - self.rules.missing_rows) * (self.launch.passes if self.rules.counts_passes else 1)
        if state.of_row[row_block] < wanted and not (self.rules.falls_back and self._all_shrunk(state)):
            return
        for row, number in product(rows, range(self.launch.passes)):
            if row in self.placed and (row, number) not in state.written:
                raise Unsafe(f"row {row}, pass {number}: {state}")
        yield self._with(state, index, replace(block, turn=block.turn + 1))

    def _take_sides(self, state: State, index: int, block: Block) -> Iterator[State]:
        if not state.cleared:
            if self.rules.team_waits:
                return
            raise Unsafe(f"a team takes a tile: {state}")
        if block.side is None:
            mine = self.sides[state.taken] if state.taken < len(self.sides) else "done"
            side = None if mine == GRADIENT else mine
            if isinstance(mine, tuple):
                side = (*mine, False, frozenset([*mine[0], "tile"]))
            yield self._with(state, index, replace(block, side=side), taken=state.taken + 1)
        elif block.side == LAST:
            if self._all_shrunk(state):
                if len(state.written) < len(self.placed) * self.launch.passes:
                    raise Unsafe(f"a tile reads what is not all shrunk: {state}")
                yield self._with(state, index, replace(block, side=None))
        elif block.side != "done":
            yield from self._shrink(state, index, block)

    def _shrink(self, state: State, index: int, block: Block) -> Iterator[State]:
        """The rows are written, and then each thread raises its row's flag; the first thread its row's, and then the tile's."""
        rows, number, written, flags = block.side
        if not written:
            done = state.written | {(row, number) for row in rows}
            yield self._with(state, index, self._went_on(block, rows, number, True, flags), written=done)
        if not written and self.rules.writes_first:
            return
        for flag in flags:
            if flag == "tile" and rows and rows[0] in flags:
                continue
            shrunk, of_row = state.shrunk, list(state.of_row)
            if flag == "tile":
                shrunk += 1
            else:
                of_row[flag // HEIGHT] += 1
            side = self._went_on(block, rows, number, written, flags - {flag})
            yield self._with(state, index, side, shrunk=shrunk, of_row=tuple(of_row))

    @staticmethod
    def _went_on(block: Block, rows: Any, number: int, written: bool, flags: Any) -> Block:
        return replace(block, side=(rows, number, written, flags) if flags or not written else None)


def explore(launch: Launch, rules: Rules) -> int:
    """Every order; how many states there are in all.

    Raises:
        Deadlock: everybody waits in one of them.
        Unsafe: a rank step reads a row too early in one of them.
    """
    model = Model(launch, rules)
    seen, ahead = {model.first()}, [model.first()]
    while ahead:
        state = ahead.pop()
        reached = list(model.next(state))
        if not reached and not all(block and model.is_done(i, block) for i, block in enumerate(state.blocks)):
            raise Deadlock(str(state))
        new = set(reached) - seen
        seen |= new
        ahead += new
    return len(seen)


IN_ORDER = Launch(6, ((0, 1), (2, 3), (4, 5)))
LAUNCHES = {
    "forward": IN_ORDER,
    "one tile": Launch(2, ((0, 1),), blocks=2),
    "two passes": Launch(3, ((0, 1), (2,)), passes=2),
    "columns": Launch(6, IN_ORDER.shrinks, columns=2),
    "backward": Launch(6, IN_ORDER.shrinks, gradients=2, last=2),
    "backward, two passes": Launch(4, ((0, 1), (2, 3)), passes=2, gradients=1, last=1),
    "rows by adapter": Launch(6, ((0, 5), (1, 4), (2, 3))),
    "rows without a place": Launch(6, ((0, 5), (2,)), last=1),
    "a row-block without a place": Launch(8, ((0, 1), (2, 3)), last=1),
    "no row has a place": Launch(5, ()),
    "no product": Launch(6, IN_ORDER.shrinks, columns=0, last=2),
    "a tile without rows": Launch(4, ((0, 1), ()), last=1),
}


@pytest.mark.parametrize("blocks, resident", [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("name", LAUNCHES)
def test_every_order_ends_and_reads_shrunk_rows(name: str, blocks: int, resident: int) -> None:
    assert explore(replace(LAUNCHES[name], blocks=blocks, resident=resident), Rules()) > 2 * blocks


@pytest.mark.parametrize(
    "broken, name, error",
    [
        (Rules(falls_back=False), "rows without a place", Deadlock),
        (Rules(missing_rows=1), "rows by adapter", Unsafe),
        (Rules(counts_passes=False), "two passes", Unsafe),
        (Rules(missing_tiles=1), "rows without a place", Unsafe),
        (Rules(missing_tiles=1), "no product", Unsafe),
        (Rules(missing_tiles=-1), "rows without a place", Deadlock),
        (Rules(missing_rows=-1, falls_back=False), "forward", Deadlock),
        (Rules(writes_first=False), "forward", Unsafe),
        (Rules(waits_last=False), "backward", Deadlock),
        (Rules(beside=False), "forward", Deadlock),
        (Rules(team_waits=False), "forward", Unsafe),
        (Rules(producer_waits=False), "forward", Unsafe),
    ],
    ids=str,
)
def test_a_broken_rule_is_found(broken: Rules, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        for resident in (1, 2):
            explore(replace(LAUNCHES[name], resident=resident), broken)
