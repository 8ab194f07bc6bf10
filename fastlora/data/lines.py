"""How a step's rows are cut into batches: by tokens, or as lines in which rows lie end to end.

A step's loss and gradients are the same however its rows are cut, but for rounding (train.py). So whatever order needs the least padding will do,
and the longest rows come first: where memory ends, it ends at once. A cut follows from the rows' lengths alone, not from what runs them.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from fastlora.data.rows import Row, count_tokens
from fastlora.language_model_loss import IGNORE

MEGA_BATCHES = 4  # at least so many, where there are rows enough
STEPS_AT_ONCE = 50  # at most so many steps' rows in a mega-batch


def group_by_length(order: Sequence[int], lengths: Sequence[int], size: int) -> list[int]:
    """An order of rows in which the `size` rows of a step have like lengths: as transformers' `group_by_length` does with a random one.

    Mega-batches of some steps' rows keep the rows that the order gives them, and have the longest first; the longest of all begins.
    """
    count = size * max(1, min(len(order) // (size * MEGA_BATCHES), STEPS_AT_ONCE))
    megas = [sorted(order[i : i + count], key=lambda row: -lengths[row]) for i in range(0, len(order), count)]
    with_longest = max(megas, key=lambda mega: lengths[mega[0]])
    megas[0][0], with_longest[0] = with_longest[0], megas[0][0]
    return list(chain.from_iterable(megas))


def without_labels(row: Row) -> Row:
    """The row, of which nothing counts: for a process that has too few."""
    return replace(row, labels=[IGNORE] * len(row.labels))


def padded_batches(rows: Sequence[Row], most: int, processes: int) -> list[list[list[Row]]]:
    """For each process as many batches: each of at most `most` tokens when it is padded to its longest row, or of one row that alone has more."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=_longest_first):
        if batches and padded_tokens([*batches[-1], row]) <= most:
            batches[-1].append(row)
        else:
            batches.append([row])
    return _share_out(batches, processes)


def padded_tokens(rows: Sequence[Row]) -> int:
    """Of a batch that is filled up to the longest row, each side by itself."""
    return len(rows) * sum(max(map(len, sides)) for sides in zip(*(row.sides for row in rows), strict=True))


def packed_batches(rows: Sequence[Row], length: int, most: int | None, processes: int) -> list[list[list[Row]]]:
    """For each process as many batches, each of rows that `lay` puts into as many lines of at most `length` tokens as `most` tokens hold.

    most: None for a line a batch. Where it is less than `length`, lines have at most so many; a row that alone has more is a line.
    """
    most = length if most is None else most
    at_once = max(1, most // length)
    of_each = _share_out(fill(rows, min(length, most)), processes)
    return [
        [list(chain.from_iterable(lines[i : i + at_once])) for i in range(0, len(lines), at_once)] for lines in of_each
    ]


def fill(rows: Sequence[Row], capacity: int) -> list[list[Row]]:
    """Rows as lines of at most `capacity` tokens, or of one row that alone has more: by best fit, the longest first.

    (Johnson 1973, Near-optimal bin packing algorithms: at most 11/9 of the fewest lines, and 4; TRL's strategy bfd.)
    """
    lines: list[list[Row]] = []
    room: list[tuple[int, int]] = []  # of each line that has some: tokens, and its number; ascending
    for row in sorted(rows, key=_longest_first):
        length = len(row.input_ids)
        at = bisect_left(room, (length, 0))
        if at < len(room):
            left, number = room.pop(at)
        else:
            left, number = capacity, len(lines)
            lines.append([])
        lines[number].append(row)
        if left > length:
            insort(room, (left - length, number))
    return lines


def lay(rows: Sequence[Row], capacity: int) -> list[list[Row]]:
    """Rows as the fewest lines of at most `capacity` tokens in which they keep their order; one that alone has more is a line."""
    lines: list[list[Row]] = []
    left = 0
    for row in rows:
        length = len(row.input_ids)
        if not lines or length > left:
            lines.append([])
            left = capacity
        lines[-1].append(row)
        left -= length
    return lines


def _longest_first(row: Row) -> int:
    return -row.tokens


def _share_out(parts: list[list[Row]], processes: int) -> list[list[list[Row]]]:
    """Parts of some rows for each process, as many for all of them: the largest are halved until that comes out; where there are too few rows for
    it, a row of which nothing counts is a part.
    """
    parts = list(parts)
    while len(parts) % processes:
        several = [number for number, part in enumerate(parts) if len(part) > 1]
        if not several:
            shortest = min((part[0] for part in parts), key=lambda row: row.tokens)
            parts.append([without_labels(shortest)])
            continue
        largest = max(several, key=lambda number: count_tokens(parts[number]))
        part = parts[largest]
        parts[largest : largest + 1] = [part[: len(part) // 2], part[len(part) // 2 :]]
    # Those that run at a time have like sizes: processes wait for one another.
    parts.sort(key=lambda part: -count_tokens(part))
    return [parts[process::processes] for process in range(processes)]


def collate_lines(lines: Sequence[Sequence[Row]], pad: int) -> dict[str, Tensor]:
    """One batch of lines in which rows lie end to end: input_ids, position_ids, labels, each int64 [lines, width].

    The positions begin again with each row, by which transformers 5 tells rows apart where it is given no mask; what fills a line up is rows like
    others, of which nothing counts. No row's first token counts: the token before is another row's.
    """
    width = max(map(count_tokens, lines))
    longest = max(len(row.input_ids) for line in lines for row in line)
    ids, positions, labels = [], [], []
    for line in lines:
        filling = width - count_tokens(line)
        ids.append([*chain.from_iterable(row.input_ids for row in line), *[pad] * filling])
        # No position that no row has: the model may have none for it.
        filler = (place % longest for place in range(filling))
        positions.append([*chain.from_iterable(range(len(row.input_ids)) for row in line), *filler])
        counted = chain.from_iterable((IGNORE, *row.labels[1:]) for row in line)
        labels.append([*counted, *[IGNORE] * filling])
    return {
        name: torch.tensor(one) for name, one in (("input_ids", ids), ("position_ids", positions), ("labels", labels))
    }
