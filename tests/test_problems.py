"""choice/problems.py and what operators enter there: which classes are measured, and arguments that are what a class says."""

import math
from typing import Any

import pytest
import torch
from measurements import ON_A_CPU
from torch import Tensor

from fastlora import operators, ops, reference
from fastlora.bounds import nearly_equal
from fastlora.choice import problems, table
from fastlora.choice.problems import ADAPTERS, SIBLINGS
from fastlora.choice.problems import operators as measured
from fastlora.frozen import packed, products
from fastlora.operators.lora_linear import CASES, DROPOUT_P, RANK

M, K, N, CPU = 70, 48, 40, torch.device("cpu")
DROPOUT = pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])


def test_the_classes_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout in training only, which has many rows; and what takes torch seconds on a CPU has another class stand for it."""
    monkeypatch.setattr(packed, "has_library", lambda dtype: True)
    few, many = [(1, "small", False), (8, "small", False)], [(64, "small", False), (64, "small", True)]
    most = [(512, "small", False), (512, "small", True)]
    assert problems.linear_classes("cpu", torch.float32, ["small"]) == [*few, *many, *most]
    assert problems.linear_classes("cpu", torch.float16, ["small"]) == [*few, *many]
    for device, dtype, sizes in (("cuda", torch.float16, ["small"]), ("cpu", torch.bfloat16, ["small", "large"])):
        classes = problems.linear_classes(device, dtype, sizes)
        assert sorted({one[0] for one in classes}) == list(problems.LINEAR_ROWS[device])
        assert {one[1] for one in classes} == set(sizes)
    monkeypatch.setattr(packed, "has_library", lambda dtype: dtype is not torch.bfloat16)
    assert problems.linear_classes("cpu", torch.bfloat16, ["small"]) == [*few, *many]
    assert problems.linear_classes("cuda", torch.bfloat16, ["small"])[-1][0] == problems.LINEAR_ROWS["cuda"][-1]


def test_the_classes_of_what_is_computed_row_by_row() -> None:
    """Those that a table can hold, and never with dropout."""
    classes = list(problems.row_classes("cpu", torch.float32, ["small"]))
    assert {rows for rows, *_ in classes} <= set(table.ROWS) and {size for _, size, _ in classes} == {"small", "large"}
    assert len(classes) == 3 and not any(dropout for *_, dropout in classes)


def test_the_classes_of_a_frozen_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those where something else than torch can multiply."""

    def offers(op: str, way: str, dtype: torch.dtype, rows: int) -> bool:
        return way == "torch" or (way == "few_rows" and dtype is torch.bfloat16 and rows <= 8)

    monkeypatch.setattr(products, "offers", offers)
    monkeypatch.setattr(packed, "has_library", lambda dtype: True)
    classes = operators.frozen_linear.classes
    assert classes("cpu", torch.bfloat16, ["small"]) == [(rows, "small", False) for rows in (1, 8)]
    assert classes("cpu", torch.float32, ["small"]) == classes("cuda", torch.bfloat16, ["small"]) == []
    monkeypatch.setattr(products, "offers", lambda *case: True)
    assert classes("cpu", torch.bfloat16, ["large"]) == [(rows, "large", False) for rows in (1, 8, 64, 512)]


def test_what_is_listed_is_every_class_of_each_operator_and_dtype() -> None:
    names, dtypes = ["prefix_concat", "lora_linear"], [torch.float32, torch.float16]
    listed = problems.listed("cpu", names, dtypes, ["large"])
    assert set(listed) == {
        problems.Problem(name, dtype, *one)
        for name in names
        for dtype in dtypes
        for one in measured[name].classes("cpu", dtype, ["large"])
    }
    assert len(listed) == len(set(listed))


def spread(tensor: Tensor) -> float:
    return float(tensor.float().std())


def both(case: str, dropout: bool, rows: int = M) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of an operator and of its backward."""
    made = measured[case].calls(rows, K, N, torch.bfloat16, CPU, dropout)
    assert list(made) == [case, f"{case}_backward"] and all(len(calls) == 1 for calls in made.values())
    [forward], [backward] = made.values()
    return forward, backward


@DROPOUT
@pytest.mark.parametrize(("shared", "mixed"), CASES, ids=CASES.values())
def test_the_arguments_of_a_layer(shared: bool, mixed: bool, dropout: bool) -> None:
    """As a model trains them: of its dtype with float32 adapters, of order 1, with a bias where dropout is. The backward is the forward's own."""
    forward, backward = both(CASES[shared, mixed], dropout)
    x, weight, bias, lora_a, lora_b, scale, dropout_p, seed, order, offsets = forward
    G, S = SIBLINGS if shared else 1, ADAPTERS if mixed else 1
    assert x.shape == (M, K) and [one.shape for one in weight] == [(N, K)] * G
    assert [None if one is None else one.shape for one in bias] == [(N,) if dropout else None] * G
    assert [one.shape for one in lora_a] == [(RANK, K)] * (G * S) and [one.shape for one in lora_b] == [(N, RANK)] * (
        G * S
    )
    assert {one.dtype for one in (x, *weight)} == {torch.bfloat16}
    assert {one.dtype for one in (*lora_a, *lora_b)} == {torch.float32}
    assert len(scale) == G * S and dropout_p == [DROPOUT_P if dropout else 0.0] * (G * S)
    assert (seed is not None and seed.shape == (G,)) if dropout else seed is None
    assert (order is not None and len(offsets) == ADAPTERS + 3) if mixed else order is None
    ys, xa, keep = reference.lora_linear(*forward)
    dy, rows, *frozen, kept_xa, kept_keep, _, _, _, _ = backward[:11]
    assert [one.shape for one in dy] == [one.shape for one in ys] and rows is x
    assert frozen == [weight, lora_a, lora_b] and backward[7:9] == (scale, dropout_p)
    assert torch.equal(kept_xa, xa) and torch.equal(kept_keep, keep) and bool(keep.numel()) is dropout
    assert backward[9:] == (order, offsets, True, True, True)
    for a, b in zip(lora_a, lora_b, strict=True):
        assert all(
            0.5 < spread(one) < 2 for one in (x @ weight[0].T, x.float() @ a.T, torch.randn(M, RANK) @ b.T, dy[0])
        )


@DROPOUT
@pytest.mark.parametrize("rows", [1, 8, 70])
def test_the_arguments_of_a_frozen_product(rows: int, dropout: bool) -> None:
    (x, weight, bias), (dy, same) = both("frozen_linear", dropout, rows)
    assert x.shape == (rows, K) and dy.shape == (rows, N) and weight.shape == (N, K) and weight is same
    assert bias.shape == (N,) if dropout else bias is None


def test_the_arguments_of_what_is_computed_row_by_row() -> None:
    """Of order 1; the backward's are the forward's own."""
    (x, weight, eps), (dy, *same, rstd) = both("rms_norm", False)
    assert x.shape == dy.shape == (M, K) and weight.shape == (K,) and same[0] is x and same[1] is weight
    assert torch.allclose(rstd, reference.rms_norm(x, weight, eps)[1], rtol=1e-4)
    (gate, up), (dy, *same) = both("swiglu", False)
    assert gate.shape == up.shape == dy.shape == (M, K) and same[0] is gate and same[1] is up
    assert not torch.equal(gate, up)


def test_the_arguments_of_attention() -> None:
    """As many heads as a small model's, in segments of which the last is what is left; and their columns are turned."""
    forward, backward = both("attention", False, 700)
    (q, k, v, starts, scale, causal), (dout, *same, out, lse) = forward, backward[:6]
    assert [one.shape for one in (q, k, v, dout)] == [(700, heads, 64) for heads in (6, 2, 2, 6)]
    assert starts.tolist() == [0, 256, 512, 700] and (scale, causal) == (1 / 8, True)
    assert all(one is other for one, other in zip(same, (q, k, v), strict=True)) and backward[6:] == forward[3:]
    assert all(map(torch.equal, (out, lse), reference.attention(*forward)))
    made = measured["rotary"].calls(7, 576, 0, torch.bfloat16, CPU, False)
    [(q, k, cos, sin)], [backward] = made.values()
    assert list(made) == ["rotary", "rotary_backward"] and backward == (q, k, cos, sin)
    assert q.shape == k.shape == (1, 9, 7, 64) and cos.shape == sin.shape == (1, 7, 64)
    assert all(one.transpose(1, 2).is_contiguous() for one in (q, k))  # by token, as a product leaves them


@pytest.mark.parametrize("tokens", [20, 512, 4096])
def test_the_arguments_of_prompts(tokens: int) -> None:
    """Rows of at most 64 tokens, padded in eight ways, each with one of several prompts; the prompts are what trains."""
    forward, backward = both("prefix_concat", False, tokens)
    prompts, starts, longest, index, embeds, ids, embedding, mask, positions, labels = forward
    B, T = math.ceil(tokens / 64), min(tokens, 64)
    assert embeds is None and positions is None and labels is ids and ids.shape == mask.shape == (B, T)
    assert starts.diff().tolist() == [longest] * ADAPTERS and len(prompts) == starts[-1] and prompts.shape[1] == K
    assert len({int(row.sum()) for row in mask}) == min(B, 8) and mask[0].all()
    assert index.tolist() == [row % ADAPTERS for row in range(B)] and 0 <= ids.min() <= ids.max() < len(embedding)
    out, *_, source = reference.prefix_concat(*forward)
    dout, own_source, prompt_rows, width, *need = backward
    assert dout.shape == out.shape and torch.equal(own_source, source)
    assert (prompt_rows, width, need) == (len(prompts), T, [True, False])


def test_prompts_are_measured_in_two_sizes_of_batch() -> None:
    classes = measured["prefix_concat"].classes("cpu", torch.float32, ["small"])
    assert {table.class_of(tokens, tokens * problems.SHAPES[size][0]) for tokens, size, _ in classes} == {
        (tokens, size) for tokens, size, _ in classes
    }


def test_each_result_is_compared_as_a_whole() -> None:
    one, other = torch.ones(2, 3), torch.ones(4)
    assert [found is one for found in problems.tensors_of(one, ())] == [True]
    assert [found.shape for found in problems.tensors_of((one, other), ())] == [(2, 3), (4,)]


@pytest.mark.parametrize("op", ON_A_CPU)
def test_arguments_are_the_same_each_time_and_leave_torchs_generator_alone(op: str) -> None:
    before = torch.get_rng_state()
    first, second = (measured[op].calls(M, K, N, torch.float32, CPU, True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert set(first) == {name for name in (op, f"{op}_backward") if name in ops.CASES}
    for name in first:
        one, other = (
            measured[op].comparable(getattr(ops.reference, ops.CASES[name])(*made[name][0]), made[name][0])
            for made in (first, second)
        )
        assert one and all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("rows", "width", "least", "copies"),
    [
        (1, 1024, 1, 4),
        (64, 1024, 1, 4),
        (64, 1024, 3, 6),
        (65, 1024, 1, 1),
        (65, 1024, 2, 2),
        (1, 1023, 1, 1),
        (1, 2048, 1, 2),
    ],
)
def test_weights_take_turns_where_rows_are_few(
    rows: int, width: int, least: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as no cache holds, for weights that are worth it; each may have a packed copy, as in a model."""
    budgets: list[packed.Budget] = []
    monkeypatch.setattr(problems, "FROM_MEMORY", 4 * 2**22)
    monkeypatch.setattr(packed, "register", lambda weight, budget: budgets.append(budget))
    weight = torch.randn(width, 1024)
    weights = problems.weights_in_turn(weight, rows, least)
    assert weights[0] is weight and len(weights) == len({one.data_ptr() for one in weights}) == copies
    assert all(torch.equal(one, weight) for one in weights)
    assert len(budgets) == copies and budgets[0].limit >= copies * weight.nbytes
    assert len(problems.weights_in_turn(weight.to("meta"), rows, least)) == copies == len(budgets)  # none on a card


@pytest.mark.parametrize(("rows", "runs"), [(5, 5), (64, 64), (320, 5), (4096, 8)])
def test_mixed_rows_take_turns(rows: int, runs: int) -> None:
    """Row by row where a server decodes; in whole rows of a batch where one trains."""
    order, offsets = problems.mixed_rows(rows, CPU)
    assert sorted(order.tolist()) == list(range(rows)) and len(offsets) == ADAPTERS + 3
    adapter = torch.empty_like(order)
    for code in range(ADAPTERS + 1):  # 0: none
        own = order[offsets[code] : offsets[code + 1]]
        adapter[own] = code
        assert len(own) and torch.equal(own, own.sort().values)
    assert offsets[-2] == offsets[-1] == rows  # no number that does not exist
    assert int((adapter.diff() != 0).sum()) == runs - 1 and adapter[0] != adapter[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(name for one in measured.values() for name in one.plain))
def test_what_times_are_compared_with_computes_the_same(name: str, dtype: torch.dtype) -> None:
    one = measured[name.removesuffix("_backward")]
    for call in one.calls(M, 128, N, dtype, CPU, False)[name]:
        found, expected = one.plain[name](*call), ops.implementation(name, "reference")(*call)
        pairs = zip(one.comparable(found, call), one.comparable(expected, call), strict=False)  # torch has no lse
        assert all(nearly_equal(*pair) for pair in pairs)
