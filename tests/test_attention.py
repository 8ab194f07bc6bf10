"""attention: softmax(scale q kᵀ) v within segments of tokens, every implementation by its name."""

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


CASES = {
    "no tokens": Case((0,)),
    "one token": Case((1,), 1, 1, 1),
    "segments": Case((5, 0, 1, 13)),
    "everyone sees all": Case((5, 0, 1, 13), causal=False),
    "beyond a block": Case((200, 3), 3, 1, 24),
    "beyond a block, everyone sees all": Case((3, 131), 2, 2, 24, causal=False),
    "wide heads": Case((61,), 2, 1, 128),
    "odd heads": Case((50, 49), 3, 3, 33),
}


def starts_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def ours(case: Case) -> Callable[..., Tensor]:
    return lambda q, k, v: attention(q, k, v, starts_of(case.lengths), causal=case.causal)


def eager(case: Case) -> Callable[..., Tensor]:
    """torch's own, a segment at a time."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(one.split(list(case.lengths)) for one in (q, k, v)), strict=True)
        group = case.heads // case.key_heads
        outs = []
        for rows, keys, values in parts:
            heads = (rows, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1))
            scores = torch.einsum("ihd,jhd->hij", heads[0], heads[1]) * case.D**-0.5
            if case.causal:
                scores = scores.masked_fill(torch.ones(scores.shape[1:], device=q.device).triu(1).bool(), -torch.inf)
            outs.append(torch.einsum("hij,jhd->ihd", F.softmax(scores, -1), heads[2]))
        return torch.cat(outs)

    return run


def draw(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", scale: float = 2.0) -> list[Tensor]:
    T = sum(case.lengths)
    heads = (case.heads, case.key_heads, case.key_heads)
    return [(torch.randn(T, count, case.D) * scale).to(device, dtype) for count in heads]


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


def test_later_tokens_are_not_seen(device: str, implementation: str) -> None:
    """To the last bit, though they are larger by far."""
    q, k, v = draw(Case((150,)), device=device)
    expected = attention(q, k, v, starts_of((150,)))[:100]
    k[100:], v[100:] = k[100:] * 100, 1e6
    assert torch.equal(attention(q, k, v, starts_of((150,)))[:100], expected)


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


def test_nothing_depends_on_who_watches(device: str, implementation: str) -> None:
    case = Case((5, 9))
    starts = starts_of(case.lengths)
    values = partial(draw, case, torch.bfloat16, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, starts)

    check_repeats(run, values, [0, 1, 2])
    check_compiles(run, values, [0, 1, 2])
    check_on_meta(run, values, [0, 1, 2])


def test_each_alone(device: str, implementation: str) -> None:
    case = Case((5, 9))
    check_each_alone(ours(case), partial(draw, case, device=device), [0, 1, 2])


def test_without_gradients(device: str, implementation: str) -> None:
    case = Case((5, 9))
    check_without_gradients(ours(case), partial(draw, case, device=device))


def test_tokens_and_elements_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the queries."""
    case = Case((5, 9), heads=4, D=16)
    check_choice("attention", ours(case), draw(case), 14, 896, monkeypatch)


def test_threads_share_the_work_and_change_nothing(implementation: str, device: str) -> None:
    case, threads = Case((40, 3, 170, 66)), torch.get_num_threads()
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


@pytest.mark.parametrize("causal", [True, False])
def test_where_torchs_own_is_faster_it_runs(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "choose", lambda *_: Choice("reference", "measured"))
    monkeypatch.setattr(operator, "compute", None)
    case = Case((5, 9), causal=causal)
    check_bound(ours(case), eager(case), partial(draw, case), [0, 1, 2])


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
