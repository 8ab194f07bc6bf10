"""multi_lora: each row its own adapter, every implementation against the float64 reference, forward and backward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bounds import (
    INPUTS,
    Compared,
    assert_within_bound,
    assert_within_bound_over_inputs,
    dense,
    double,
    flip_unread,
    gapped,
    gradients,
    make_layer,
    next_seed,
    transposed,
)
from lora_arguments import Arguments, detached
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlora import reference
from fastlora.functional import RowGroups, group_rows, lora_linear, multi_lora, raise_pending

OPERATOR = "multi_lora"


class Mixed(NamedTuple):
    """A frozen layer, S adapters and a batch whose rows use them; x, lora_a and lora_b require gradients."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    lora_a: list[Tensor]  # S of [R_i, K]
    lora_b: list[Tensor]  # S of [N, R_i]
    scale: list[float]
    index: Tensor  # [M]
    dropout_p: list[float]
    dy: Tensor  # [M, N]


def make_mixed(
    index: list[int],
    ranks: list[int],
    K: int = 33,
    N: int = 24,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    dropout: bool = True,
    device: str = "cpu",
) -> Mixed:
    """Every adapter has its own rank and scale and, with dropout, its own probability: 0, 0.3, 0, 0.5, 0, ..."""
    layers = [make_layer(len(index), K, N, rank, dtype, adapter_dtype, bias, device) for rank in ranks]
    x, weight, frozen, _, _, dy = layers[0]
    return Mixed(
        x,
        weight,
        frozen,
        [layer.lora_a for layer in layers],
        [layer.lora_b for layer in layers],
        [(-1) ** i * (0.5 + i) for i in range(len(ranks))],
        torch.tensor(index, dtype=torch.int64, device=device),
        [(0.0, 0.3, 0.0, 0.5)[i % 4] if dropout else 0.0 for i in range(len(ranks))],
        dy,
    )


def arguments_of(mixed: Mixed, seed: Tensor | None = None, index: Tensor | RowGroups | None = None) -> Arguments:
    """What the operator gets. index: another one."""
    index = mixed.index if index is None else index
    groups = index if isinstance(index, RowGroups) else group_rows(index, len(mixed.lora_a))
    frozen = mixed.x, [mixed.weight], [mixed.bias]
    adapters = mixed.lora_a, mixed.lora_b, mixed.scale, mixed.dropout_p
    return Arguments(*frozen, *adapters, seed, *groups.for_rows(len(mixed.x))).mapped(detached)


def fused(mixed: Mixed) -> list[Tensor]:
    """y, dx, every dA, every dB."""
    x, weight, bias, lora_a, lora_b, scale, index, dropout_p, dy = mixed
    y = multi_lora(x, weight, bias, lora_a, lora_b, scale, index, dropout_p=dropout_p)
    return [y, *gradients(y, (x, *lora_a, *lora_b), dy)]


def eagerly(mixed: Mixed, seed: Tensor | None) -> list[Tensor]:
    """The same the way PEFT does it: the base for all rows, then adapter by adapter on its rows."""
    x, weight, bias, dy = map(dense, (mixed.x, mixed.weight, mixed.bias, mixed.dy))
    lora_a, lora_b = (list(map(dense, tensors)) for tensors in (mixed.lora_a, mixed.lora_b))
    scale, index, dropout_p = mixed.scale, mixed.index, mixed.dropout_p
    y = F.linear(x, weight, bias)
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        (rows,) = torch.nonzero(index == i, as_tuple=True)
        dropped = x[rows]
        if seed is not None and dropout_p[i]:
            dropped = (
                dropped * reference.keep_mask(seed, rows, x.shape[1], dropout_p[i]) * reference.keep_scale(dropout_p[i])
            )
        y = y.index_add(0, rows, F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype)) * scale[i])
    return [y, *gradients(y, (x, *lora_a, *lora_b), dy)]


def exactly(mixed: Mixed, seed: Tensor | None) -> list[Tensor]:
    """The same in float64 by the reference."""
    y, _, *grads = arguments_of(mixed, seed).mapped(double).both("reference", [mixed.dy.double()])
    return [y, *grads]


def inputs_of(implementation: str) -> int:
    """Over how many errors are taken at first: Triton's interpreter would take minutes for as many as the others."""
    return 1 if implementation == "triton" else INPUTS


def check(draw: Callable[[], Mixed], inputs: int = INPUTS) -> None:
    """Of each result, the errors over the batches that are drawn, which differ in their numbers alone."""

    def compute() -> dict[str, Compared]:
        mixed = draw()
        S = len(mixed.lora_a)
        names = ["y", "dx", *(f"da[{i}]" for i in range(S)), *(f"db[{i}]" for i in range(S))]
        seed = next_seed(mixed.x.device.type, 1) if any(mixed.dropout_p) else None
        values, eager = ([one.detach() for one in results] for results in (fused(mixed), eagerly(mixed, seed)))
        return dict(zip(names, zip(values, eager, exactly(mixed, seed), strict=True), strict=True))

    assert_within_bound_over_inputs(compute, inputs)


SHUFFLED = [2, -1, 0, 3, 3, 0, 2, -1, 2, 0, 0, 3, -1, 2, 2, 0, 3]  # adapter 1 has no row
MANY = [1, 4, 7, 8, 9, 16, 31, 64, 100]  # below, at and beyond a vector's lanes and their multiples
CASES: dict[str, dict[str, Any]] = {
    "one adapter, all rows": {"index": [0] * 19, "ranks": [8]},
    "no row with an adapter": {"index": [-1] * 5, "ranks": [4, 2]},
    "no rows": {"index": [], "ranks": [4, 2]},
    "one row": {"index": [1], "ranks": [3, 8, 1]},
    "one row, base only": {"index": [-1], "ranks": [3]},
    "shuffled": {"index": SHUFFLED, "ranks": [1, 8, 3, 17]},
    "shuffled, no bias, no dropout": {"index": SHUFFLED, "ranks": [4, 4, 4, 4], "bias": False, "dropout": False},
    "an adapter a row": {"index": list(range(9)), "ranks": list(range(1, 10))},
    "large ranks": {"index": [0, 1, 1, 0, 1], "ranks": [64, 129], "K": 65, "N": 48},
    "many rows": {"index": [i % 4 - 1 for i in range(90)], "ranks": [16, 8, 5], "K": 130, "N": 70},
    "a few rows of each of many": {
        "index": [i % 9 for i in range(25)],
        "ranks": MANY,
        "K": 70,
        "N": 133,
        "dropout": False,
    },
    "a few rows of many, bfloat16": {
        **{"index": [i % 9 for i in range(25)], "ranks": MANY, "K": 70, "N": 133, "dropout": False},
        "dtype": torch.bfloat16,
    },
    "bfloat16": {"index": SHUFFLED, "ranks": [1, 8, 3, 17], "dtype": torch.bfloat16},
    "bfloat16, float32 adapters": {
        "index": SHUFFLED,
        "ranks": [1, 8, 3, 17],
        "dtype": torch.bfloat16,
        "adapter_dtype": torch.float32,
    },
    "float16": {"index": SHUFFLED, "ranks": [1, 8, 3, 17], "dtype": torch.float16, "bias": False},
    "float16, float32 adapters": {
        "index": [1, 0, 1],
        "ranks": [2, 64],
        "dtype": torch.float16,
        "adapter_dtype": torch.float32,
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bound(device: str, implementation: str, case: dict[str, Any]) -> None:
    check(lambda: make_mixed(**case, device=device), inputs_of(implementation))


@pytest.mark.parametrize("layout", [gapped, transposed], ids=["gaps", "transposed"])
def test_layouts(device: str, implementation: str, layout: Any) -> None:
    def draw() -> Mixed:
        mixed = make_mixed(SHUFFLED, [1, 8, 3, 17], device=device)
        tensors = {name: layout(getattr(mixed, name)) for name in ("x", "weight", "dy")}
        lists = {name: [layout(tensor) for tensor in getattr(mixed, name)] for name in ("lora_a", "lora_b")}
        return mixed._replace(**tensors, **lists)

    check(draw, inputs_of(implementation))


def test_equals_lora_linear_where_all_rows_share_an_adapter(device: str, implementation: str) -> None:
    """Row numbers, and so masks, are those of the whole x: the two operators drop the same elements."""
    mixed = make_mixed([0] * 14, [4], dropout=False, device=device)
    torch.manual_seed(8)
    y = multi_lora(*mixed[:3], mixed.lora_a, mixed.lora_b, [2.0], mixed.index, dropout_p=0.4)
    torch.manual_seed(8)
    expected = lora_linear(*mixed[:3], mixed.lora_a[0], mixed.lora_b[0], 2.0, dropout_p=0.4)
    torch.testing.assert_close(y, expected)


def test_index_a_row_an_example_and_groups(device: str, implementation: str) -> None:
    """One number an example says the same as that number on each of the example's rows; groups made once say the same again."""
    mixed = make_mixed([0] * 12, [3, 8], dropout=False, device=device)
    x = mixed.x.view(3, 4, -1)
    an_example = torch.tensor([1, -1, 0], device=device)
    a_row = an_example[:, None].expand(3, 4)
    adapters = mixed.lora_a, mixed.lora_b, mixed.scale
    expected = multi_lora(x, *mixed[1:3], *adapters, a_row)
    assert expected.shape == (3, 4, 24)
    groups = group_rows(an_example, 2)
    for index in (an_example, an_example.int(), an_example.to(torch.int8), groups, groups, group_rows(a_row, 2)):
        assert torch.equal(multi_lora(x, *mixed[1:3], *adapters, index), expected)
    # The same groups serve a flattened x, and one with one row an example.
    assert torch.equal(multi_lora(mixed.x, *mixed[1:3], *adapters, groups), expected.view(12, 24))
    torch.testing.assert_close(multi_lora(x[:, 0], *mixed[1:3], *adapters, groups), expected[:, 0])
    torch.testing.assert_close(multi_lora(x[0, 0], *mixed[1:3], *adapters, an_example[0]), expected[0, 0])


def test_groups_keep_what_the_index_said(device: str, implementation: str) -> None:
    """The index was checked in group_rows: a buffer that is filled anew afterwards changes nothing."""
    mixed = make_mixed([0, -1, 1, 0], [3, 8], dropout=False, device=device)
    expected = multi_lora(*mixed[:7])
    index = mixed.index.clone()
    groups = group_rows(index, 2)
    index.fill_(7)
    assert torch.equal(multi_lora(*mixed[:6], groups), expected)


@pytest.mark.parametrize("shape", [(3,), (3, 2)], ids=str)
def test_no_features(device: str, implementation: str, shape: tuple[int, ...]) -> None:
    """K = 0: the bias alone, as nn.Linear gives it."""
    x, weight, bias = (
        torch.ones(*shape, 0, device=device),
        torch.ones(4, 0, device=device),
        torch.arange(4.0, device=device),
    )
    index = torch.tensor([0, -1, 0], device=device)
    y = multi_lora(x, weight, bias, [torch.ones(1, 0, device=device)], [torch.ones(4, 1, device=device)], [2.0], index)
    assert torch.equal(y, bias.expand(*shape, 4))


def test_on_meta() -> None:
    """Shapes and dtypes without memory: a model can be laid out on meta, gradients too."""
    mixed = make_mixed([0, 1, -1, 0, 0, 0], [3, 8], dtype=torch.bfloat16, adapter_dtype=torch.float32, device="meta")
    y = multi_lora(*mixed[:7], dropout_p=mixed.dropout_p)
    assert y.is_meta and y.shape == mixed.dy.shape and y.dtype == torch.bfloat16
    leaves = (mixed.x, *mixed.lora_a, *mixed.lora_b)
    for leaf, grad in zip(leaves, gradients(y, leaves, mixed.dy), strict=True):
        assert grad.is_meta and grad.shape == leaf.shape and grad.dtype == leaf.dtype


def test_invalid_rows_become_nan(device: str, implementation: str) -> None:
    """Where an index cannot be read back, its rows are NaN and no other row is touched; nothing is read out of bounds."""
    mixed = make_mixed([0, 1, 0, 1], [3, 8], dropout=False, device=device)
    arguments = arguments_of(mixed, index=RowGroups(torch.tensor([0, 7, -2, 1], device=device), 2))
    [y], *state = arguments.forward(implementation)
    expected = multi_lora(*mixed[:7])
    assert y[1:3].isnan().all()
    torch.testing.assert_close(y[[0, 3]], expected[[0, 3]])
    dx, da, db = arguments.backward(implementation, [mixed.dy], *state)
    assert dx[1:3].isnan().all() and dx[[0, 3]].isfinite().all() and da.isfinite().all() and db.isfinite().all()


def test_keep(device: str, implementation: str) -> None:
    """keep holds the reference's mask of the rows that drop something, whose bits alone backward reads, and none beyond the last column."""
    mixed = make_mixed(SHUFFLED, [1, 8, 3, 17], device=device)
    mixed = mixed._replace(dropout_p=[0.5, 0.3, 0.0, 0.1])
    seed, M = next_seed(device, 1), len(SHUFFLED)
    arguments = arguments_of(mixed, seed)
    _, xa, keep = arguments.forward(implementation)
    assert keep.dtype == torch.uint8 and keep.shape == (1, M, 8) and xa.shape == (1, M, 17)
    read = torch.zeros(1, M, 33, dtype=torch.bool, device=device)
    for i in (0, 1, 3):
        (rows,) = torch.nonzero(mixed.index == i, as_tuple=True)
        expected = reference.keep_mask(seed, rows, 33, mixed.dropout_p[i])
        assert torch.equal(reference.read_keep(keep[0, rows], 33), expected)
        read[0, rows] = True
    grads, others = (
        arguments.backward(implementation, [mixed.dy], xa, bits) for bits in (keep, flip_unread(keep, read))
    )
    assert all(torch.equal(grad, other) for grad, other in zip(grads, others, strict=True))
    base_only = arguments_of(mixed, seed, torch.full_like(mixed.index, -1))
    for given, shape in (
        (base_only, (1, M, 8)),
        (arguments._replace(seed=None), (0,)),
        (arguments._replace(dropout_p=[1e-7] * 4), (0,)),
    ):
        _, _, keep = given.forward(implementation)
        assert keep.dtype == torch.uint8 and keep.shape == shape


def test_xa(device: str, implementation: str) -> None:
    """float32, of each row's own adapter, and zeros beyond its rank and where it has none: the backward of any other implementation may read it."""
    mixed = make_mixed(SHUFFLED, [1, 8, 3, 17], device=device)
    arguments = arguments_of(mixed, next_seed(device, 1))
    _, xa, _ = arguments.forward(implementation)
    assert xa.dtype == torch.float32
    for row, i in enumerate(SHUFFLED):
        assert not xa[0, row, (1, 8, 3, 17)[i] if i >= 0 else 0 :].any()
    _, exact, _ = arguments.mapped(double).forward("reference")
    assert_within_bound("xa", xa, arguments.forward("reference")[1], exact)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: only there an index is not read back")
def test_index_out_of_range_on_a_gpu() -> None:
    """No sync: the rows become NaN, and a later check raises."""
    mixed = make_mixed([0, 1, -1, 1], [3, 8], dropout=False, device="cuda")
    y = multi_lora(*mixed[:6], torch.tensor([0, 7, -1, 1], device="cuda"))
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="^index: expected numbers from -1 to 1"):
        raise_pending()


def test_only_some_adapters_train(device: str, implementation: str) -> None:
    """Adapters that require no gradient get none, the others the same as when all train; x may need none."""
    mixed = make_mixed(SHUFFLED, [1, 8, 3, 17], dropout=False, device=device)
    _, _, *full = fused(mixed)
    some = mixed._replace(
        x=mixed.x.detach(),
        lora_a=[a.detach().requires_grad_(i in (1, 2)) for i, a in enumerate(mixed.lora_a)],
        lora_b=[b.detach() for b in mixed.lora_b],
    )
    y = multi_lora(*some[:7])
    y.backward(some.dy)
    for i, a in enumerate(some.lora_a):
        assert torch.equal(a.grad, full[i]) if i in (1, 2) else a.grad is None
    assert not some.lora_a[1].grad.any()  # no rows: zeros


def test_dropout_at_its_ends(device: str, implementation: str) -> None:
    mixed = make_mixed(SHUFFLED, [1, 8, 3, 17], dropout=False, device=device)
    kept = multi_lora(*mixed[:7])
    for options in ({"dropout_p": 0.0}, {"dropout_p": 1e-7}, {"dropout_p": [0.5] * 4, "training": False}):
        assert torch.equal(multi_lora(*mixed[:7], **options), kept)
    base = F.linear(mixed.x, mixed.weight, mixed.bias)
    torch.testing.assert_close(multi_lora(*mixed[:7], dropout_p=1), base)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_replays_dropout(device: str, implementation: str, use_reentrant: bool) -> None:
    mixed = make_mixed(SHUFFLED, [1, 8, 3, 17], K=24, N=24, device=device)
    leaves = (mixed.x, *mixed.lora_a, *mixed.lora_b)

    def twice(x: Tensor) -> Tensor:
        for _ in range(2):
            x = multi_lora(x, *mixed[1:7], dropout_p=mixed.dropout_p)
        return x

    torch.manual_seed(5)
    plain = gradients(twice(mixed.x), leaves, mixed.dy)
    torch.manual_seed(5)
    checkpoint(twice, mixed.x, use_reentrant=use_reentrant).backward(mixed.dy)
    for leaf, expected in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, expected)


def test_two_runs_are_equal(device: str, implementation: str) -> None:
    torch.use_deterministic_algorithms(False)  # the tests' own setting must not be what makes it so
    mixed = make_mixed([i % 4 - 1 for i in range(70)], [16, 8, 5], device=device)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(fused(mixed))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_without_gradients(device: str, implementation: str) -> None:
    mixed = make_mixed(SHUFFLED, [1, 8, 3, 17], device=device)
    with_grad = multi_lora(*mixed[:7])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = multi_lora(*mixed[:7])
        assert not y.requires_grad and torch.equal(y, with_grad)


def test_autocast(device: str, implementation: str) -> None:
    mixed = make_mixed(SHUFFLED, [1, 8, 3, 17], dropout=False, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = multi_lora(*mixed[:7])
    cast = mixed._replace(**{name: getattr(mixed, name).detach().bfloat16() for name in ("x", "weight", "bias", "dy")})
    cast.x.requires_grad_()
    expected = fused(cast)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected[0])
    for grad, want in zip(gradients(y, (mixed.x, *mixed.lora_a, *mixed.lora_b), cast.dy), expected[1:], strict=True):
        assert grad.dtype == torch.float32 and torch.equal(grad, want.float())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck(device: str, bias: bool) -> None:
    mixed = make_mixed([1, -1, 0, 1], [2, 1, 3], K=9, N=5, dtype=torch.float64, bias=bias, device=device)

    def function(x: Tensor, *adapters: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same mask at each evaluation
        return multi_lora(
            x, *mixed[1:3], adapters[:3], adapters[3:], mixed.scale, mixed.index, dropout_p=mixed.dropout_p
        )

    assert torch.autograd.gradcheck(function, (mixed.x, *mixed.lora_a, *mixed.lora_b))


def test_opcheck(device: str) -> None:
    mixed = make_mixed([1, -1, 0, 1], [2, 1, 3], device=device)
    arguments = arguments_of(mixed, next_seed(device, 0))
    torch.library.opcheck(torch.ops.fastlora.lora_linear.default, arguments.raw())
    xa, keep = torch.randn(1, 4, 3, device=device), torch.full((1, 4, 8), 77, dtype=torch.uint8, device=device)
    for need in ((True, True, True), (False, True, False)):
        given = arguments.backward_arguments([mixed.dy], xa, keep, *need)
        torch.library.opcheck(torch.ops.fastlora.lora_linear_backward.default, given)


@pytest.mark.parametrize("grouped", [False, True], ids=["index", "groups"])
def test_compiles_whole(device: str, grouped: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(multi_lora, fullgraph=True, backend="aot_eager", dynamic=True)
    for index in (SHUFFLED, SHUFFLED + [1, 1, 0]):
        mixed = make_mixed(index, [1, 8, 3, 17], dropout=False, device=device)
        inputs = (mixed.x, *mixed.lora_a, *mixed.lora_b)
        which = group_rows(mixed.index, 4) if grouped else mixed.index
        y, expected = (function(*mixed[:6], which) for function in (compiled, multi_lora))
        assert torch.equal(y, expected)
        for grad, want in zip(gradients(y, inputs, mixed.dy), gradients(expected, inputs, mixed.dy), strict=True):
            assert torch.equal(grad, want)


def test_row_groups_keep_what_a_model_needs_and_not_all_that_ever_was() -> None:
    index = group_rows(torch.tensor([0, -1]), 1)
    first, second = index.for_rows(2), index.for_rows(4)
    assert index.for_rows(2) is first and index.for_rows(4) is second
    for rows in range(2, 40, 2):
        assert len(index.for_rows(rows)[0]) == rows and len(index._by_rows) <= 4


def test_rows_of_an_adapter_keep_their_order(device: str) -> None:
    """So sums over them are taken in one order, each time."""
    index = torch.randint(-1, 5, (10_000,), device=device)
    order, offsets = group_rows(index, 5).for_rows(len(index))
    for i in range(-1, 5):
        assert torch.equal(order[offsets[i + 1] : offsets[i + 2]], torch.nonzero(index == i).flatten())


def test_row_groups_that_another_thread_clears() -> None:
    class Cleared(dict[int, Any]):
        def __setitem__(self, key: int, value: Any) -> None:
            self.clear()

    index = group_rows(torch.tensor([0, -1, 0]), 1)
    expected = index.for_rows(6)
    index._by_rows = Cleared()
    assert all(torch.equal(one, other) for one, other in zip(index.for_rows(6), expected, strict=True))
