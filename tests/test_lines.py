"""data/lines.py: a step's rows as batches of no more than so many tokens, as lines of rows that lie end to end, and as an order by length."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import pytest
import torch

from fastlora.config import TrainConfig
from fastlora.course import Course
from fastlora.data.lines import collate_lines, fill, group_by_length, lay, packed_batches, padded_batches
from fastlora.data.rows import Row, count_tokens
from fastlora.language_model_loss import IGNORE


def rows_of(*lengths: int) -> list[Row]:
    """Rows whose tokens name them."""
    return [Row([name] * length, [name] * length) for name, length in enumerate(lengths)]


def drawn(count: int, most: int, seed: int = 0) -> list[Row]:
    draw = random.Random(seed)
    return rows_of(*(draw.randint(1, most) for _ in range(count)))


def names(rows: Sequence[Row]) -> list[int]:
    return [row.input_ids[0] for row in rows]


def lengths(parts: Sequence[Sequence[Row]]) -> list[list[int]]:
    return [[len(row.input_ids) for row in part] for part in parts]


def test_each_row_goes_where_it_leaves_the_least_room() -> None:
    lines = fill(rows_of(4, 8, 1, 4, 2, 1), 10)
    assert lengths(lines) == [[8, 2], [4, 4, 1, 1]] and [names(line) for line in lines] == [[1, 4], [0, 3, 2, 5]]
    assert lengths(fill(rows_of(6, 7, 3, 4), 10)) == [
        [7, 3],
        [6, 4],
    ]  # not 4 beside 6 only, and 3 wherever there is room
    assert lengths(fill(rows_of(12, 3, 12, 7), 10)) == [[12], [12], [7, 3]]


@pytest.mark.parametrize("seed", range(5))
def test_lines_hold_every_row_once_and_waste_little(seed: int) -> None:
    rows = drawn(200, 60, seed)
    lines = fill(rows, 100)
    assert sorted(names(list(chain.from_iterable(lines)))) == list(range(200))
    assert max(map(count_tokens, lines)) <= 100
    fewest = -(-count_tokens(rows) // 100)
    assert len(lines) <= 11 * fewest / 9 + 4
    assert lay(list(chain.from_iterable(lines)), 100) == lines


def test_rows_are_laid_in_order() -> None:
    assert lengths(lay(rows_of(4, 6, 1, 12, 3, 7, 7), 10)) == [[4, 6], [1], [12], [3, 7], [7]]
    assert lay([], 10) == []


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [None, 30, 64, 250])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_processes_share_a_step_and_have_as_many_batches(
    packed: bool, most: int | None, seed: int, processes: int
) -> None:
    rows = drawn(41, 60, seed)
    length = 64
    if packed:
        shares = packed_batches(rows, length, most, processes)
    else:
        shares = padded_batches(rows, most or length, processes)
    assert len(shares) == processes and len({len(share) for share in shares}) == 1
    batches = list(chain.from_iterable(shares))
    taken = [row.input_ids[0] for batch in batches for row in batch if row.labels[0] != IGNORE]
    assert sorted(taken) == list(range(41))
    for batch in batches:
        lines = lay(batch, min(length, most or length)) if packed else [[row] for row in batch]
        run = len(lines) * max(map(count_tokens, lines))
        assert run <= (most or length) or len(batch) == 1


def test_batches_of_many_lines() -> None:
    (batches,) = packed_batches(rows_of(*[5] * 9), 10, 34, 1)
    assert lengths(batches) == [[5] * 6, [5] * 3]
    (batches,) = packed_batches(rows_of(*[5] * 9), 10, None, 1)
    assert lengths(batches) == [[5, 5]] * 4 + [[5]]
    (batches,) = packed_batches(
        rows_of(9, 2, 2, 2), 10, 4, 1
    )  # no line of more than four, but of the row that has more
    assert lengths(batches) == [[9], [2, 2], [2]]


def test_the_longest_rows_come_first_and_with_their_like() -> None:
    (batches,) = padded_batches(rows_of(2, 9, 3, 8, 2, 2), 18, 1)
    assert lengths(batches) == [[9, 8], [3, 2, 2, 2]]
    (batches,) = padded_batches(rows_of(20, 3), 18, 1)
    assert lengths(batches) == [[20], [3]]


def test_a_process_without_rows_has_one_that_does_not_count() -> None:
    for shares in (padded_batches(rows_of(7, 3), 7, 3), packed_batches(rows_of(7, 3), 7, None, 3)):
        assert [lengths(share) for share in shares] == [[[7]], [[3]], [[3]]]
        assert [share[0][0].labelled for share in shares] == [6, 2, 0]
    first, second = packed_batches(rows_of(4, 2, 2), 10, None, 2)  # what lay in one line is shared out before that
    assert (lengths(first), lengths(second)) == ([[4]], [[2, 2]])


def test_a_batch_of_lines() -> None:
    lines = [[Row([5, 6, 7], [IGNORE, 6, 7]), Row([8, 9], [8, 9])], [Row([4], [4])]]
    batch = collate_lines(lines, pad=0)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9], [4, 0, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 0, 1, 2, 0]],  # none that no row has
        "labels": [[IGNORE, 6, 7, IGNORE, 9], [IGNORE] * 5],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_mega_batches_keep_their_rows_and_have_like_lengths_together() -> None:
    draw = random.Random(3)
    counts = [draw.randint(1, 500) for _ in range(103)]
    order = random.Random(4).sample(range(103), 103)
    grouped = group_by_length(order, counts, 4)
    assert sorted(grouped) == list(range(103)) and counts[grouped[0]] == max(counts)

    def spread(rows: Sequence[int]) -> int:
        steps = [[counts[row] for row in rows[i : i + 4]] for i in range(0, len(rows), 4)]
        return sum(max(step) * len(step) - sum(step) for step in steps)

    assert spread(grouped) < spread(order) / 3
    mega = 4 * (103 // 16)
    swapped = {grouped[0], *(grouped[start] for start in range(0, 103, mega))}
    for start in range(0, 103, mega):
        assert {*grouped[start : start + mega]} - swapped == {*order[start : start + mega]} - swapped
    assert group_by_length([2, 0, 1], [5, 9, 7], 8) == [1, 2, 0]


def test_transformers_groups_alike() -> None:
    """With its own random order."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    draw = random.Random(5)
    for count, size in ((3, 2), (40, 2), (211, 3), (900, 4)):
        counts = [draw.randint(1, 50) for _ in range(count)]
        theirs = get_length_grouped_indices(counts, size, generator=torch.Generator().manual_seed(count))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
        assert group_by_length(order, counts, size) == theirs


def test_an_epoch_by_length_takes_every_row_once_and_follows_from_the_seed(tmp_path) -> None:
    config = TrainConfig(model="m", data="d", output=tmp_path, batch_size=3, group_by_length=True)
    rows = drawn(50, 80)
    plan = Course(config, rows, processes=1)
    epochs = [[names(plan.step_rows(step)) for step in range(17 * epoch, 17 * (epoch + 1))] for epoch in (0, 1)]
    for epoch in epochs:
        assert sorted(chain.from_iterable(epoch)) == list(range(50))
    assert epochs[0] != epochs[1]
    again = Course(config, rows, processes=1)  # as a resumed run asks, from the middle on
    assert [names(again.step_rows(step)) for step in range(20, 30)] == [*epochs[1]][3:13]
    other = Course(replace(config, seed=1), rows, processes=1)
    assert names(other.step_rows(3)) != epochs[0][3]
