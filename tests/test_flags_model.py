"""The flags by which the warps of csrc/cuda/product_sm90.cuh wait for one another, in every order that they can run in.

A block's sides take tiles by one counter (take_sides), shrink rows, and then count them and the tile; its producer has every so many-th tile of the
product, and waits before each until that tile's rows are counted, or all tiles are (wait_for_rows). Blocks begin as others end: that all run at the
same time is not assumed. Proved: nothing waits forever, and no tile of the product begins its rank steps before its rows are written. What each
thread does beside this is what the emulated card runs; the memory's order between threads is the PTX model's, and no business of this file.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import pytest


class Launch(NamedTuple):
    blocks: int
    resident: int  # at the same time, at most
    first: tuple[tuple[int, ...] | None, ...]  # tiles of sides: whose row-blocks each shrinks a row; None: a gradient's
    last: int  # tiles that read what all have shrunk
    tiles: tuple[int, ...]  # of the product: their row-blocks
    rows: tuple[int, ...]  # of each row-block, with those that have no place
    falls_back: bool = True  # to the end of all shrinking
    too_few: int = 0  # rows that are not waited for


DONE, TAKES, WAITS = -1, -2, -3


class State(NamedTuple):
    taken: int
    counted: int  # shrinking tiles
    rows: tuple[int, ...]  # counted, of each row-block
    written: tuple[bool, ...]  # tiles of `first`
    sides: tuple[int, ...]  # of each block that has begun: DONE, TAKES, WAITS, or the tile whose rows it counts
    owed: tuple[tuple[int, ...], ...]  # what each has yet to count, in any order: row-blocks; -1: the tile itself
    produced: tuple[int, ...]  # the next tile of each block's producer, or DONE


def steps(launch: Launch, state: State) -> Iterator[State]:
    """Every state that one thread's next step can lead to."""
    shrinking = sum(one is not None for one in launch.first)
    begun = len(state.sides)
    running = sum((side, tile) != (DONE, DONE) for side, tile in zip(state.sides, state.produced, strict=True))
    if begun < launch.blocks and running < launch.resident:
        tile = begun if begun < len(launch.tiles) else DONE
        yield state._replace(sides=(*state.sides, TAKES), owed=(*state.owed, ()), produced=(*state.produced, tile))

    def changed(values: tuple, block: int, value: object) -> tuple:
        return (*values[:block], value, *values[block + 1 :])

    for block, side in enumerate(state.sides):
        if side == TAKES:
            number, taken = state.taken, state._replace(taken=state.taken + 1)
            if number >= len(launch.first) + launch.last:
                yield state._replace(sides=changed(state.sides, block, DONE))
            elif number >= len(launch.first):
                yield taken._replace(sides=changed(state.sides, block, WAITS))
            elif (rows := launch.first[number]) is None:
                yield taken
            else:
                yield taken._replace(
                    sides=changed(state.sides, block, number), owed=changed(state.owed, block, (*rows, -1))
                )
        elif side == WAITS and state.counted >= shrinking:
            assert all(written or one is None for written, one in zip(state.written, launch.first, strict=True)), (
                "unsafe"
            )
            yield state._replace(sides=changed(state.sides, block, TAKES))
        elif side >= 0 and not state.written[side]:
            yield state._replace(written=changed(state.written, side, True))
        elif side >= 0 and not state.owed[block]:
            yield state._replace(sides=changed(state.sides, block, TAKES))
        elif side >= 0:
            for what in set(state.owed[block]):
                left = list(state.owed[block])
                left.remove(what)
                after = state._replace(owed=changed(state.owed, block, tuple(left)))
                if what < 0:
                    yield after._replace(counted=state.counted + 1)
                else:
                    yield after._replace(rows=changed(state.rows, what, state.rows[what] + 1))
        if (tile := state.produced[block]) != DONE:
            rows = launch.tiles[tile]
            counted = state.rows[rows] >= launch.rows[rows] - launch.too_few
            if counted or (launch.falls_back and state.counted >= shrinking):
                its_tiles = [i for i, one in enumerate(launch.first) if one is not None and rows in one]
                assert all(state.written[i] for i in its_tiles), "unsafe"
                after = tile + launch.blocks
                yield state._replace(
                    produced=changed(state.produced, block, after if after < len(launch.tiles) else DONE)
                )


def explore(launch: Launch) -> int:
    """Every order; how many states there are.

    Raises:
        AssertionError: "deadlock", or "unsafe".
    """
    start = State(0, 0, (0,) * len(launch.rows), (False,) * len(launch.first), (), (), ())
    seen, ahead = {start}, [start]
    while ahead:
        state = ahead.pop()
        found = list(steps(launch, state))
        if not found:
            whole = len(state.sides) == launch.blocks and {*state.sides, *state.produced} == {DONE}
            assert whole, "deadlock"
        fresh = [one for one in found if one not in seen]
        seen.update(fresh)
        ahead.extend(fresh)
    return len(seen)


SIDES = {
    "a tile a row-block": ((0,), (1,)),
    "a tile of both": ((0, 1), (0,), (1,)),
    "gradients between": ((0,), None, (1,), None),
    "two passes": ((0,), (0,), (1,), (1,)),
    "nothing shrunk": (None,),
}
MISPLACED = {  # a row of block 0 that no tile shrinks
    "without a place": Launch(2, 1, ((1,), None), 1, (0, 1, 0), (1, 1)),
    "one of two": Launch(3, 2, ((0,), (1,)), 2, (0, 1, 0, 1), (2, 1)),
}


@pytest.mark.parametrize("first", SIDES.values(), ids=SIDES)
def test_no_order_hangs_or_reads_too_early(first: tuple[tuple[int, ...] | None, ...]) -> None:
    rows = tuple(sum(one.count(block) for one in first if one) for block in (0, 1))
    for blocks, last, tiles in product((1, 2, 3), (0, 2), ((0,), (0, 1), (1, 0, 1, 0))):
        for resident in range(1, blocks + 1):
            assert explore(Launch(blocks, resident, first, last, tiles, rows)) > blocks


@pytest.mark.parametrize("launch", MISPLACED.values(), ids=MISPLACED)
def test_rows_without_a_place_do_not_hang(launch: Launch) -> None:
    explore(launch)
    with pytest.raises(AssertionError, match="deadlock"):
        explore(launch._replace(falls_back=False))


def test_a_row_too_few_is_found() -> None:
    launch = Launch(2, 2, ((0,), (0,), (1,)), 0, (0, 1), (2, 1))
    explore(launch)
    with pytest.raises(AssertionError, match="unsafe"):
        explore(launch._replace(too_few=1))
