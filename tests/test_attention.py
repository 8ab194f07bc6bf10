"""attention: softmax(scale q kᵀ) v within segments of tokens and over their ancestors, every implementation by its name."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bounds import gapped
from row_operators import (
    check_bound,
    check_choice,
    check_compiles,
    check_each_alone,
    check_on_meta,
    check_repeats,
    check_without_gradients,
    results,
)
from torch import Tensor

from fastlora import reference
from fastlora.bounds import nearly_equal
from fastlora.functional import attention
from fastlora.operators import attention as operator
from fastlora.ops import Choice

OPERATOR = "attention"


class Case(NamedTuple):
    lengths: tuple[int, ...]
    heads: int = 4
    key_heads: int = 2
    D: int = 16
    causal: bool = True
    parents: tuple[int, ...] | None = None
    keys: tuple[int, ...] | None = None  # where they are others than queries


CASES = {
    "no tokens": Case((0,)),
    "one token": Case((1,), 1, 1, 1),
    "segments": Case((5, 0, 1, 13)),
    "everyone sees all": Case((5, 0, 1, 13), causal=False),
    "beyond a block": Case((200, 3), 3, 1, 24),
    "beyond a block, everyone sees all": Case((3, 131), 2, 2, 24, causal=False),
    "wide heads": Case((61,), 2, 1, 128),
    "odd heads": Case((50, 49), 3, 3, 33),
    "behind a shared segment": Case((20, 6, 0, 7), parents=(-1, 0, 0, 0)),
    "behind keys alone": Case((0, 6, 7), parents=(-1, 0, 0), keys=(9, 6, 7)),
    "chains and roots": Case((5, 3, 4, 8, 0, 2, 0), 3, 1, parents=(-1, 0, 1, -1, 1, 4, 3)),
    "a tree, everyone sees all": Case((5, 0, 4, 8), causal=False, parents=(-1, 0, 1, 0), keys=(5, 2, 4, 8)),
    "by turns behind two": Case((4, 5, 6, 7, 8, 3), parents=(-1, -1, 1, 0, 1, 0)),
    "keys that nobody sees": Case((0, 3, 0), parents=(-1, -1, 1), keys=(5, 3, 2)),
    "no queries": Case((0, 0), parents=(-1, 0), keys=(5, 3)),
    "beyond a block, behind more": Case((150, 60, 70, 130), 3, 1, 24, parents=(-1, 0, 0, 1)),
    "several a part": Case((200, *[30] * 9), parents=(-1, *[0] * 9)),
    "cut": Case((530,), 2, 1),
    "cut, everyone sees all": Case((530,), 2, 1, causal=False),
    "cut, behind keys": Case((0, 530, 3), 2, 1, parents=(-1, 0, 0), keys=(70, 530, 3)),
}


def starts_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def tree_of(case: Case) -> dict[str, Tensor]:
    found = {} if case.parents is None else {"segment_parents": torch.tensor(case.parents)}
    return found if case.keys is None else {**found, "key_starts": starts_of(case.keys)}


def ours(case: Case) -> Callable[..., Tensor]:
    starts, tree = starts_of(case.lengths), tree_of(case)
    return lambda q, k, v: attention(q, k, v, starts, causal=case.causal, **tree)


def seen_by(segment: int, case: Case, of_each: tuple[Tensor, ...]) -> list[Tensor]:
    """What the segment and its ancestors have, the eldest first."""
    parent = -1 if case.parents is None else case.parents[segment]
    return [*(seen_by(parent, case, of_each) if parent >= 0 else []), of_each[segment]]


def eager(case: Case) -> Callable[..., Tensor]:
    """torch's own, a segment at a time."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (one.split(list(case.keys or case.lengths)) for one in (k, v))
        group = case.heads // case.key_heads
        outs = []
        for segment, rows in enumerate(q.split(list(case.lengths))):
            seen = (torch.cat(seen_by(segment, case, one)).repeat_interleave(group, 1) for one in (keys, values))
            heads = (rows, *seen)
            scores = torch.einsum("ihd,jhd->hij", heads[0], heads[1]) * case.D**-0.5
            if case.causal:
                before = scores.shape[2] - scores.shape[1]
                later = torch.ones(scores.shape[1:], device=q.device).triu(1 + before).bool()
                scores = scores.masked_fill(later, -torch.inf)
            outs.append(torch.einsum("hij,jhd->ihd", F.softmax(scores, -1), heads[2]))
        return torch.cat(outs)

    return run


def draw(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", scale: float = 2.0) -> list[Tensor]:
    queries, keys = sum(case.lengths), sum(case.keys or case.lengths)
    shapes = ((queries, case.heads), (keys, case.key_heads), (keys, case.key_heads))
    return [(torch.randn(*shape, case.D) * scale).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("layout", [lambda one: one, gapped], ids=["dense", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bound(
    device: str, implementation: str, case: Case, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    check_bound(ours(case), eager(case), partial(draw, case, dtype, device), [0, 1, 2], layout)


def test_large_scores(device: str, implementation: str) -> None:
    """Whose exponentials are beyond float32: one key has all the weight; and a later block brings a larger one."""
    case = Case((200,), 1, 1, 16)
    check_bound(ours(case), eager(case), partial(draw, case, torch.float32, device, 30.0), [0, 1, 2])


def test_a_segment_knows_nothing_of_the_others(device: str, implementation: str) -> None:
    """Not even where they have no numbers, gradients included."""
    case = Case((7, 20, 9))
    inputs = draw(case, device=device)
    alone = results(ours(Case((20,))), [one[7:27] for one in inputs], [0, 1, 2])
    for one in inputs:
        one[:7], one[27:] = torch.nan, torch.nan
    found = results(lambda *given: ours(case)(*given)[7:27], inputs, [0, 1, 2])
    assert all(
        torch.equal(one[-13 - 16 : -9] if len(one) > 20 else one, other[-20:])
        for one, other in zip(found, alone, strict=True)
    )


def test_a_segment_knows_nothing_of_its_siblings(device: str, implementation: str) -> None:
    """Nor of its nephews: not even where they have no numbers."""
    case = Case((7, 20, 9, 4), parents=(-1, 0, 0, 1))
    q, k, v = draw(case, device=device)
    alone = attention(*(torch.cat((one[:7], one[27:36])) for one in (q, k, v)), starts_of((7, 9)), **tree_of(CHAIN))
    for one in (q, k, v):
        one[7:27], one[36:] = torch.nan, torch.nan
    found = ours(case)(q, k, v)
    assert torch.equal(found[:7], alone[:7]) and torch.equal(found[27:36], alone[7:])


CHAIN = Case((7, 9), parents=(-1, 0))


def test_what_rows_share_may_lie_there_once(device: str, implementation: str) -> None:
    """Or in front of each: the gradients of what is shared are the sums."""
    rows, shared = Case((29, 33)), Case((20, 9, 13), parents=(-1, 0, 0))
    inputs = draw(shared, device=device)
    place = torch.tensor([*range(20), *range(20, 29), *range(20), *range(29, 42)])
    inside = torch.tensor([*range(29), *range(49, 62)])  # where each is, for the first time
    found = results(ours(shared), inputs, [0, 1, 2])

    def unshared(*given: Tensor) -> Tensor:
        return ours(rows)(*(one[place] for one in given))[inside]

    assert all(map(nearly_equal, found, results(unshared, inputs, [0, 1, 2])))


def test_later_tokens_are_not_seen(device: str, implementation: str) -> None:
    """To the last bit, though they are larger by far."""
    q, k, v = draw(Case((150,)), device=device)
    expected = attention(q, k, v, starts_of((150,)))[:100]
    k[100:], v[100:] = k[100:] * 100, 1e6
    assert torch.equal(attention(q, k, v, starts_of((150,)))[:100], expected)


@pytest.mark.parametrize("tokens", [6, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tokens_are_not_seen_beside_the_lowest_scores(
    dtype: torch.dtype, tokens: int, device: str, implementation: str
) -> None:
    """No score is so low that what is masked counts beside it."""
    q = torch.full((tokens, 1, 1), 1e16, dtype=dtype, device=device)
    v = torch.arange(tokens, device=device).view(-1, 1, 1).to(dtype) / tokens
    assert nearly_equal(
        attention(q, -q, v, starts_of((tokens,))),
        v.float().cumsum(0).div(torch.arange(1, tokens + 1, device=device).view(-1, 1, 1)).to(dtype),
    )


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("place", [slice(5, 6), slice(130), slice(None)], ids=["one key", "a block and more", "all"])
def test_what_is_no_number(value: float, place: slice, device: str, implementation: str) -> None:
    """As by torch: -inf alone counts nothing beside other scores, and gives NaN where there are none; inf and NaN do where they are seen."""
    case = Case((200,), 1, 1, 1)
    q, k, v = draw(case, device=device)
    q, k[place] = q.abs() + 0.1, value
    found, expected = ours(case)(q, k, v), eager(case)(q, k, v)
    assert torch.equal(found.isnan(), expected.isnan())
    assert nearly_equal(found.nan_to_num(), expected.nan_to_num())


def test_a_scale_of_ones_own(device: str, implementation: str) -> None:
    """None is 1 / 4 here."""
    case = Case((5, 9), D=16)
    q, k, v = draw(case, device=device)
    starts = starts_of(case.lengths)
    assert torch.equal(attention(q, k, v, starts, scale=0.5), attention(2 * q, k, v, starts))
    assert torch.equal(attention(q, k, v, starts, scale=0), attention(0 * q, k, v, starts))


def test_gradcheck(device: str) -> None:
    case = Case((3, 4), 2, 1, 3)
    inputs = [one.requires_grad_() for one in draw(case, torch.float64, device, 1.0)]
    assert torch.autograd.gradcheck(ours(case), inputs)
    assert torch.autograd.gradcheck(ours(case._replace(causal=False)), inputs)
    tree = Case((3, 0, 2, 4), 2, 1, 3, parents=(-1, 0, 1, 0), keys=(3, 2, 2, 4))
    inputs = [one.requires_grad_() for one in draw(tree, torch.float64, device, 1.0)]
    assert torch.autograd.gradcheck(ours(tree), inputs)


TREES = [Case((5, 9)), Case((5, 0, 9, 3), parents=(-1, -1, 1, 0), keys=(5, 4, 9, 3))]


@pytest.mark.parametrize("case", TREES, ids=["segments", "tree"])
def test_nothing_depends_on_who_watches(device: str, implementation: str, case: Case) -> None:
    values = partial(draw, case, torch.bfloat16, device)
    check_repeats(ours(case), values, [0, 1, 2])
    check_compiles(ours(case), values, [0, 1, 2])
    check_on_meta(ours(case), values, [0, 1, 2])


@pytest.mark.parametrize("case", TREES, ids=["segments", "tree"])
def test_each_alone(device: str, implementation: str, case: Case) -> None:
    check_each_alone(ours(case), partial(draw, case, device=device), [0, 1, 2])


def test_without_gradients(device: str, implementation: str) -> None:
    case = Case((5, 9))
    check_without_gradients(ours(case), partial(draw, case, device=device))


def test_tokens_and_elements_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the queries."""
    case = Case((5, 9), heads=4, D=16)
    check_choice("attention", ours(case), draw(case), 14, 896, monkeypatch)


@pytest.mark.parametrize(
    "case",
    [Case((40, 3, 170, 66)), Case((900, 7), 2, 2), Case((180, *[40] * 8), parents=(-1, *[0] * 8))],
    ids=["segments", "one is cut", "siblings"],
)
def test_threads_share_the_work_and_change_nothing(implementation: str, device: str, case: Case) -> None:
    threads = torch.get_num_threads()
    inputs = draw(case, device=device)
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(ours(case), inputs, [0, 1, 2]))
    finally:
        torch.set_num_threads(threads)
    if implementation == "cpu":
        assert all(torch.equal(one, other) for more in found[1:] for one, other in zip(more, found[0], strict=True))


def test_opcheck() -> None:
    q, k, v = draw(Case((3, 6)))
    rest = starts_of((3, 6)), 0.25, True
    torch.library.opcheck(torch.ops.fastlora.attention.default, (q, k, v, *rest))
    out, lse = torch.ops.fastlora.attention(q, k, v, *rest)
    torch.library.opcheck(torch.ops.fastlora.attention_backward.default, (q, q, k, v, out, lse, *rest))
    q, k, v = draw(TREES[1])
    tree = (*starts_and_rest(TREES[1]), *tree_of(TREES[1]).values())
    torch.library.opcheck(torch.ops.fastlora.attention.default, (q, k, v, *tree))
    out, lse = torch.ops.fastlora.attention(q, k, v, *tree)
    torch.library.opcheck(torch.ops.fastlora.attention_backward.default, (q, q, k, v, out, lse, *tree))


def starts_and_rest(case: Case) -> tuple[Tensor, float, bool]:
    return starts_of(case.lengths), 0.25, case.causal


@pytest.mark.parametrize("causal", [True, False])
def test_where_torchs_own_is_faster_it_runs(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "choose", lambda *_: Choice("reference", "measured"))
    monkeypatch.setattr(operator, "compute", None)
    case = Case((5, 9), causal=causal)
    check_bound(ours(case), eager(case), partial(draw, case), [0, 1, 2])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["behind keys alone", "chains and roots", "no queries"])
def test_over_trees_too(causal: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near as torch's own is: twice as far from the exact result as eager for some numbers, without a tree as well."""
    monkeypatch.setattr(operator, "choose", lambda *_: Choice("reference", "measured"))
    monkeypatch.setattr(operator, "compute", None)
    case = CASES[name]._replace(causal=causal)
    inputs = draw(case)
    pairs = zip(*(results(one(case), inputs, [0, 1, 2]) for one in (ours, eager)), strict=True)
    assert all(nearly_equal(found, expected) for found, expected in pairs if found.numel())


@pytest.mark.parametrize("causal", [True, False])
def test_what_torch_has_is_the_same_over_segments(causal: bool) -> None:
    """Forward and backward: it runs where it is faster, and is what times are compared with."""
    q, k, v = draw(Case((5, 0, 9)))
    rest = starts_of((5, 0, 9)), 0.25, causal
    out, lse = reference.attention(q, k, v, *rest)
    assert nearly_equal(operator.by_torch(q, k, v, *rest), out)
    found = operator.by_torch_backward(q, q, k, v, out, lse, *rest)
    assert all(map(nearly_equal, found, reference.attention_backward(q, q, k, v, out, lse, *rest)))


Q, K, STARTS = torch.ones(6, 4, 8), torch.ones(6, 2, 8), torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("q", TypeError, ([1.0], K, K, STARTS)),
        ("q", ValueError, (Q[0], K, K, STARTS)),
        ("q", ValueError, (Q[..., :0], K[..., :0], K[..., :0], STARTS)),
        ("k", ValueError, (Q, K.half(), K, STARTS)),
        ("k", ValueError, (Q, torch.ones(6, 3, 8), K, STARTS)),
        ("k", ValueError, (Q, K[:, :0], K, STARTS)),
        ("k", ValueError, (Q, K[:5], K, STARTS)),
        ("k", ValueError, (Q, K[0, 0], K, STARTS)),
        ("v", ValueError, (Q, K, Q, STARTS)),
        ("v", ValueError, (Q, K, K.to("meta"), STARTS)),
        ("starts", TypeError, (Q, K, K, [0, 6])),
        ("starts", ValueError, (Q, K, K, torch.tensor([0.0, 6.0]))),
        ("starts", ValueError, (Q, K, K, torch.tensor([], dtype=torch.int64))),
        ("starts", ValueError, (Q, K, K, torch.tensor([0, 7]))),
        ("starts", ValueError, (Q, K, K, torch.tensor([1, 6]))),
        ("starts", ValueError, (Q, K, K, torch.tensor([0, 4, 2, 6]))),
    ],
)
def test_wrong_arguments(name: str, error: type[Exception], arguments: tuple) -> None:
    with pytest.raises(error, match=rf"^{name}: .*expected"):
        attention(*arguments)


PARENTS = torch.tensor([-1, 0])


@pytest.mark.parametrize(
    ("name", "error", "k", "tree"),
    [
        ("segment_parents", TypeError, K, {"segment_parents": [-1, 0]}),
        ("segment_parents", ValueError, K, {"segment_parents": PARENTS[:1]}),
        ("segment_parents", ValueError, K, {"segment_parents": PARENTS.float()}),
        ("segment_parents", ValueError, K, {"segment_parents": PARENTS.to("meta")}),
        ("segment_parents", ValueError, K, {"segment_parents": torch.tensor([-1, 1])}),  # itself
        ("segment_parents", ValueError, K, {"segment_parents": torch.tensor([1, -1])}),  # a later one
        ("segment_parents", ValueError, K, {"segment_parents": torch.tensor([-1, -2])}),
        ("segment_parents", ValueError, K, {"segment_parents": torch.tensor([-1, 2])}),
        ("key_starts", TypeError, K, {"key_starts": [0, 2, 6]}),
        ("key_starts", ValueError, K, {"key_starts": torch.tensor([0, 6])}),
        ("key_starts", ValueError, K, {"key_starts": torch.tensor([0.0, 2.0, 6.0])}),
        ("key_starts", ValueError, K, {"key_starts": torch.tensor([1, 2, 6])}),
        ("key_starts", ValueError, K, {"key_starts": torch.tensor([0, 7, 6])}),
        ("key_starts", ValueError, K, {"key_starts": torch.tensor([0, 3, 6])}),
        ("key_starts", ValueError, torch.ones(7, 2, 8), {"key_starts": torch.tensor([0, 2, 6])}),
        ("v", ValueError, torch.ones(7, 2, 8), {"key_starts": torch.tensor([0, 2, 7])}),
    ],
)
def test_wrong_trees(name: str, error: type[Exception], k: Tensor, tree: dict[str, Any]) -> None:
    with pytest.raises(error, match=rf"^{name}: .*expected"):
        attention(Q, k, k[:6] if name == "v" else k, STARTS, **tree)


@pytest.mark.parametrize(("scale", "error"), [("1", TypeError), (torch.ones(()), TypeError), (torch.inf, ValueError)])
def test_wrong_scales(scale: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="^scale: .*expected"):
        attention(Q, K, K, STARTS, scale=scale)


def test_wrong_arguments_to_the_native_operator() -> None:
    """Nothing is read out of bounds, whoever calls."""
    native = pytest.importorskip("fastlora._C") and torch.ops.fastlora.attention_cpu
    for arguments in (
        (Q, K[:5], K, STARTS),
        (Q, K, K[..., :4], STARTS),
        (Q, torch.ones(6, 3, 8), torch.ones(6, 3, 8), STARTS),
        (Q, K, K, torch.tensor([0, 7])),
        (Q, K, K, torch.tensor([0, 9, 6])),
        (Q, K, K, STARTS.int()),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            native(*arguments, 1.0, True)
    for name, parents, key_starts in (
        ("segment_parents", [-1], [0, 2, 6]),
        ("segment_parents", [-1, 1], [0, 2, 6]),
        ("segment_parents", [-2, 0], [0, 2, 6]),
        ("key_starts", [-1, 0], [0, 6]),
        ("key_starts", [-1, 0], [0, 3, 6]),
        ("key_starts", [-1, 0], [0, 2, 7]),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: .*expected"):
            native(Q, K, K, STARTS, 1.0, True, torch.tensor(parents), torch.tensor(key_starts))
    with pytest.raises(RuntimeError, match="k: .*expected"):
        native(Q, torch.ones(7, 2, 8), torch.ones(7, 2, 8), STARTS, 1.0, True, PARENTS, None)
