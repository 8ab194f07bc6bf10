"""trees.py: a batch's rows as segments, what they share once, and who sees whom."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import trees
from fastlora.trees import Root

REAL = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
WORDS = torch.randint(5, 99, (40,), generator=torch.Generator().manual_seed(0))


def seen_by(tree: trees.Tree) -> list[list[int]]:
    """Of each token the keys that it sees, by the mask."""
    mask = tree.mask(torch.float32)[0, 0]
    assert bool(((mask == 0) | (mask == torch.finfo(torch.float32).min)).all())
    return [row.nonzero().flatten().tolist() for row in mask == 0]


def test_a_prompt_before_each_row() -> None:
    rows = trees.find_rows(REAL, None)
    tree = trees.grow(rows, REAL.shape, [Root(2, 0)], [0, 0, 0])
    assert tree.source.tolist() == [-1, -2, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 2, 3]
    assert tree.places.tolist() == [[0, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]
    assert tree.starts.tolist() == tree.key_starts.tolist() == [0, 2, 5, 9, 11]
    assert tree.parents.tolist() == [-1, 0, 0, 0]
    seen = seen_by(tree)
    assert seen[:3] == [[0], [0, 1], [0, 1, 2]] and seen[8] == [0, 1, 5, 6, 7, 8] and seen[9] == [0, 1, 9]
    assert tree.gather(torch.arange(12).view(3, 4), 77).tolist() == [[77, 77, 1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert tree.labels(torch.arange(12).view(3, 4)).tolist() == [[-100, -100, -100, 2, 3, -100, 5, 6, 7, -100, 9]]


def test_prompts_as_keys_and_of_other_lengths() -> None:
    rows = trees.find_rows(REAL, None)
    tree = trees.grow(rows, REAL.shape, [Root(3, 0), Root(1, 3)], [1, -1, 0], keys_only=True)
    assert tree.source.tolist() == [4, 5, 6, 7, 8, 9, 1, 2, 3]  # rows of one prompt together, those without first
    assert tree.starts.tolist() == [0, 0, 0, 4, 6, 9] and tree.key_starts.tolist() == [0, 3, 4, 8, 10, 13]
    assert tree.parents.tolist() == [-1, -1, -1, 0, 1] and tree.keys_before == 4
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 1, 2, 3]
    assert seen_by(tree)[4] == [0, 1, 2, 8] and seen_by(tree)[6] == [3, 10] and seen_by(tree)[0] == [4]


@pytest.mark.parametrize("keys_only", [False, True])
def test_a_prompts_last_row_in_each_row(keys_only: bool) -> None:
    rows = trees.find_rows(REAL, None)
    tree = trees.grow(rows, REAL.shape, [Root(2, 0), Root(1, 2)], [0, 1, -1], keys_only=keys_only, last_apart=True)
    source = [8, 9, -2, 1, 2, 3, -3, 4, 5, 6, 7]
    assert tree.source.tolist() == ([] if keys_only else [-1]) + source
    assert tree.position_ids.tolist()[-9:] == [1, 2, 3, 4, 0, 1, 2, 3, 4]
    there = 1 - keys_only  # the other row of the first prompt
    assert tree.places[REAL].tolist() == [there + place for place in (3, 4, 5, 7, 8, 9, 10, 0, 1)]
    assert tree.labels(torch.arange(12).view(3, 4)).tolist()[0][-9:] == [-100, 1, 2, 3, -100, 4, 5, 6, 7]


def test_packed_texts() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    rows = trees.find_rows(torch.ones(1, 7, dtype=torch.bool), positions)
    assert rows.bounds == [0, 3, 7] and rows.texts == 2 and rows.batch_rows(7) == [0, 0]
    tree = trees.grow(rows, (1, 7), [Root(2, 0)], [0, 0])
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5] and tree.starts.tolist() == [0, 2, 5, 9]
    again = trees.find_rows(torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0, 0, 1, 1]]))
    assert again.bounds == [0, 1, 3, 4]
    gaps = trees.find_rows(REAL, torch.tensor([[0, 3, 5, 6]]))
    assert gaps.positions.tolist() == [3, 5, 6, 0, 3, 5, 6, 0, 3] and gaps.bounds == [0, 3, 7, 9]


def batch(*texts: Tensor) -> dict[str, Any]:
    width = max(map(len, texts))
    ids, real = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)], real[row, : len(text)] = text, True
    return {"ids": ids, "real": real, "rows": trees.find_rows(real, None)}


def follow(tree: trees.Tree, ids: Tensor, row: int, real: Tensor) -> list[int]:
    """A row's tokens, as what its last sees."""
    last = int(tree.places[row][real[row]][-1])
    return ids.flatten()[tree.source[seen_by(tree)[last]]].tolist()


def test_rows_that_begin_alike() -> None:
    other = WORDS + 100
    texts = [
        torch.cat((WORDS[:20], other[:5])),
        torch.cat((WORDS[:20], other[5:8])),
        torch.cat((WORDS[:10], other[10:20])),
        other[20:30],
        WORDS[:20],
    ]
    given = batch(*texts)
    tree = trees.grow(given["rows"], given["ids"].shape, ids=given["ids"])
    assert len(tree.source) == 10 + 10 + 5 + 3 + 10 + 10  # shared by four, by three, and each row's own
    for row, text in enumerate(texts):
        assert follow(tree, given["ids"], row, given["real"]) == text.tolist()
        assert tree.position_ids[tree.places[row][given["real"][row]]].tolist() == list(range(len(text)))
    assert trees.shares(tree, given["rows"])
    apart = trees.grow(given["rows"], given["ids"].shape)
    assert not trees.shares(apart, given["rows"]) and apart.parents.tolist() == [-1] * 5
    values = torch.randn(*given["ids"].shape, 3)
    for each in (tree, apart):
        assert torch.equal(each.gather(values, torch.nan)[0], values.flatten(0, 1)[each.source])
    assert apart.source[0] == 0
    expected = given["ids"].flatten()[tree.source]
    expected[[int(start) for start, end in zip(tree.starts, tree.starts[1:], strict=False) if start < end]] = -100
    assert tree.starts[-2] == tree.starts[-1]  # of the row that the others begin with nothing is left
    assert torch.equal(tree.labels(given["ids"])[0], expected)


def test_the_least_that_is_worth_a_segment_is_shared_beside_rows_that_share_less() -> None:
    least = trees.LEAST_SHARED
    texts = [torch.cat((WORDS[:least], WORDS[20 + i : 25 + i])) for i in range(2)]
    for own in (3, 0):
        given = batch(*texts, torch.cat((WORDS[:own], WORDS[30:35])))
        tree = trees.grow(given["rows"], given["ids"].shape, ids=given["ids"])
        assert len(tree.source) == least + 5 + 5 + own + 5


def test_embeddings_of_a_batch_have_the_prompts_as_zeros() -> None:
    tree = trees.grow(trees.find_rows(REAL, None), REAL.shape, [Root(2, 0)], [0, 0, 0])
    values = torch.randn(3, 4, 5, 2)
    found = tree.gather(values, 0)
    assert found.shape == (1, 11, 5, 2) and not found[0, :2].any()
    assert torch.equal(found[0, 2:], values[REAL])


def test_what_predicts_is_not_shared() -> None:
    """Nor what comes after it; a few tokens are not worth it; nor are those of other prompts or positions."""
    texts = [torch.cat((WORDS[:20], word[None])) for word in WORDS[20:23]]
    given = batch(*texts)

    def tokens(targets: Tensor | None = None, **more: Any) -> int:
        tree = trees.grow(given["rows"], given["ids"].shape, ids=given["ids"], targets=targets, **more)
        return len(tree.source)

    none = torch.full_like(given["ids"], -100)
    assert tokens() == tokens(none) == 20 + 3
    whole = trees.grow(given["rows"], given["ids"].shape, ids=given["ids"]).labels(given["ids"])
    assert whole[0].tolist() == [-100, *WORDS[1:20].tolist(), -100, -100, -100]  # nothing before them predicts the last
    for first, shared in ((19, 19), (12, 12), (8, 8), (7, 0), (0, 0)):
        targets = none.clone()
        targets[:, first:] = 1
        assert tokens(targets) == shared + 3 * (21 - shared)
    one = none.clone()
    one[1, 3] = 1  # the others share all the same
    assert tokens(one) == 20 + 2 + 21
    roots = [Root(2, 0), Root(2, 2)]
    assert tokens(roots=roots, root_of=[0, 1, 0]) == 4 + 20 + 2 + 21
    assert tokens(roots=roots[:1], root_of=[0, 0, 0], last_apart=True) == 1 + 3 * 22
    positions = torch.arange(21).expand(3, 21).clone()
    positions[0] += 1
    given["rows"] = trees.find_rows(given["real"], positions)
    assert tokens() == 20 + 2 + 21


@pytest.mark.parametrize("seed", range(20))
def test_any_batch(seed: int) -> None:
    """Each row sees itself, whatever it shares; and what has no use is not done."""
    drawn = torch.Generator().manual_seed(seed)
    pool = torch.randint(1, 3, (3, 40), generator=drawn)
    texts = []
    for _ in range(6):
        kept, which, length = (int(torch.randint(n, (), generator=drawn)) for n in (40, 3, 12))
        texts.append(torch.cat((pool[which][:kept], torch.randint(1, 3, (length + 1,), generator=drawn))))
    given = batch(*texts)
    tree = trees.grow(given["rows"], given["ids"].shape, ids=given["ids"])
    assert len(tree.source) <= sum(map(len, texts))
    for row, text in enumerate(texts):
        assert follow(tree, given["ids"], row, given["real"]) == text.tolist()


def test_where_a_batchs_tokens_stand_is_looked_up() -> None:
    """Of the batch that runs just now, the innermost; and it is noted that somebody has."""
    places = torch.arange(20, 32).view(3, 4)
    assert trees.look_up(REAL) is None
    with trees.laying_out(places) as laid:
        assert trees.look_up(REAL[:2]) is None and not laid.taken
        assert trees.look_up(REAL).tolist() == [21, 22, 23, 24, 25, 26, 27, 28, 29] and laid.taken
        with trees.laying_out(places[:2]) as inner:
            assert trees.look_up(REAL) is None and not inner.taken
            assert len(trees.look_up(REAL[:2])) == 7 and inner.taken
        assert trees.look_up(REAL[:2]) is None
    with pytest.raises(RuntimeError, match="on purpose"), trees.laying_out(places):
        raise RuntimeError("on purpose")
    assert trees.look_up(REAL) is None
