"""multi_lora: each row its own adapter, every implementation against the float64 reference, forward and backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bounds import (
    INPUTS,
    assert_within_bound_over_inputs,
    dense,
    double,
    flip_unread,
    gapped,
    gradients,
    make_layer,
    next_seed,
    print_accepted,
    run_apart,
    transposed,
)
from conftest import implementations
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlora import ops, reference
from fastlora.functional import RowGroups, group_rows, lora_linear, multi_lora, multi_lora_shared, raise_pending

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
    x, weight, bias, dy = (double(tensor) for tensor in (mixed.x, mixed.weight, mixed.bias, mixed.dy))
    lora_a, lora_b = ([tensor.detach().double() for tensor in tensors] for tensors in (mixed.lora_a, mixed.lora_b))
    numbers, sorting = (mixed.scale, mixed.dropout_p), group_rows(mixed.index, len(lora_a)).for_rows(len(x))
    y, *state = reference.multi_lora(x, weight, bias, lora_a, lora_b, *numbers, seed, *sorting)
    dx, da, db = reference.multi_lora_backward(
        dy, x, weight, lora_a, lora_b, *state, *numbers, *sorting, True, True, True
    )
    das = [grad.view_as(a) for grad, a in zip(da.split([a.numel() for a in lora_a]), lora_a, strict=True)]
    dbs = [grad.view_as(b) for grad, b in zip(db.split([b.numel() for b in lora_b]), lora_b, strict=True)]
    return [y, dx, *das, *dbs]


def inputs_of(implementation: str) -> range:
    """One for each input over which errors are taken: Triton's interpreter would take minutes for as many as the others."""
    return range(1 if implementation == "triton" else INPUTS)


def check(batches: Sequence[Mixed]) -> None:
    """Of each result, the errors over all these batches, which differ in their numbers alone."""
    S = len(batches[0].lora_a)
    names = ["y", "dx", *(f"da[{i}]" for i in range(S)), *(f"db[{i}]" for i in range(S))]
    runs = []
    for mixed in batches:
        seed = next_seed(mixed.x.device.type, 1) if any(mixed.dropout_p) else None
        values, eager = ([one.detach() for one in results] for results in (fused(mixed), eagerly(mixed, seed)))
        runs.append(zip(values, eager, exactly(mixed, seed), strict=True))
    for name, *results in zip(names, *runs, strict=True):
        assert_within_bound_over_inputs(name, results)


SHUFFLED = [2, -1, 0, 3, 3, 0, 2, -1, 2, 0, 0, 3, -1, 2, 2, 0, 3]  # adapter 1 has no row
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
    check([make_mixed(**case, device=device) for _ in inputs_of(implementation)])


@pytest.mark.parametrize("layout", [gapped, transposed], ids=["gaps", "transposed"])
def test_layouts(device: str, implementation: str, layout: Any) -> None:
    mixed = make_mixed(SHUFFLED, [1, 8, 3, 17], device=device)
    tensors = {name: layout(getattr(mixed, name)) for name in ("x", "weight", "dy")}
    lists = {name: [layout(tensor) for tensor in getattr(mixed, name)] for name in ("lora_a", "lora_b")}
    check([mixed._replace(**tensors, **lists)])


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
    # The same groups serve an x with one row an example.
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
    x, weight, bias, dy = (tensor.detach() for tensor in (mixed.x, mixed.weight, mixed.bias, mixed.dy))
    lora_a, lora_b = ([tensor.detach() for tensor in tensors] for tensors in (mixed.lora_a, mixed.lora_b))
    numbers = mixed.scale, [0.0, 0.0]
    sorting = RowGroups(torch.tensor([0, 7, -2, 1], device=device), 2).for_rows(4)
    forward = ops.implementation("multi_lora", implementation)
    y, *state = forward(x, weight, bias, lora_a, lora_b, *numbers, None, *sorting)
    expected = multi_lora(x, weight, bias, lora_a, lora_b, mixed.scale, mixed.index)
    assert y[1:3].isnan().all()
    torch.testing.assert_close(y[[0, 3]], expected[[0, 3]])
    backward = ops.implementation("multi_lora_backward", implementation)
    dx, da, db = backward(dy, x, weight, lora_a, lora_b, *state, *numbers, *sorting, True, True, True)
    assert dx[1:3].isnan().all() and dx[[0, 3]].isfinite().all() and da.isfinite().all() and db.isfinite().all()


def test_keep(device: str, implementation: str) -> None:
    """keep holds the reference's mask of the rows that drop something, whose bits alone backward reads, and none beyond the last column."""
    mixed = make_mixed(SHUFFLED, [1, 8, 3, 17], device=device)
    x, weight, bias, dy = (tensor.detach() for tensor in (mixed.x, mixed.weight, mixed.bias, mixed.dy))
    lora_a, lora_b = ([tensor.detach() for tensor in tensors] for tensors in (mixed.lora_a, mixed.lora_b))
    forward, backward = (ops.implementation(op, implementation) for op in ("multi_lora", "multi_lora_backward"))
    p, seed, sorting = [0.5, 0.3, 0.0, 0.1], next_seed(device, 1), group_rows(mixed.index, 4).for_rows(len(x))
    _, xa, keep = forward(x, weight, bias, lora_a, lora_b, mixed.scale, p, seed, *sorting)
    assert keep.dtype == torch.uint8 and keep.shape == (len(x), 8)
    read = torch.zeros_like(x, dtype=torch.bool)
    for i in (0, 1, 3):
        (rows,) = torch.nonzero(mixed.index == i, as_tuple=True)
        assert torch.equal(reference.read_keep(keep[rows], 33), reference.keep_mask(seed, rows, 33, p[i]))
        read[rows] = True
    grads, others = (
        backward(dy, x, weight, lora_a, lora_b, xa, bits, mixed.scale, p, *sorting, True, True, True)
        for bits in (keep, flip_unread(keep, read))
    )
    assert all(torch.equal(grad, other) for grad, other in zip(grads, others, strict=True))
    base_only = group_rows(torch.full_like(mixed.index, -1), 4).for_rows(len(x))
    for chances, numbers, rows, shape in (
        (p, seed, base_only, (len(x), 8)),
        (p, None, sorting, (0,)),
        ([1e-7] * 4, seed, sorting, (0,)),
    ):
        _, _, keep = forward(x, weight, bias, lora_a, lora_b, mixed.scale, chances, numbers, *rows)
        assert keep.dtype == torch.uint8 and keep.shape == shape


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
    x, weight, bias, dy = (tensor.detach() for tensor in (mixed.x, mixed.weight, mixed.bias, mixed.dy))
    lora_a, lora_b = ([tensor.detach() for tensor in tensors] for tensors in (mixed.lora_a, mixed.lora_b))
    numbers, sorting = (mixed.scale, mixed.dropout_p), group_rows(mixed.index, 3).for_rows(4)
    torch.library.opcheck(
        torch.ops.fastlora.multi_lora.default,
        (x, weight, bias, lora_a, lora_b, *numbers, next_seed(device, 0), *sorting),
    )
    xa, keep = torch.randn(4, 3, device=device), torch.full((4, 8), 77, dtype=torch.uint8, device=device)
    for need in ((True, True, True), (False, True, False)):
        arguments = (dy, x, weight, lora_a, lora_b, xa, keep, *numbers, *sorting, *need)
        torch.library.opcheck(torch.ops.fastlora.multi_lora_backward.default, arguments)


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


# Layers that share x: each has S adapters of its own, a row has the same number in all.


def make_shared(
    index: list[int], ranks: list[list[int]], widths: list[int], dropout: bool = True, **options: Any
) -> list[Mixed]:
    """One Mixed a layer, with one x; without `dropout` in the second layer anywhere, and a bias in all but the first."""
    layers = [
        make_mixed(index, own, N=N, dropout=dropout and g != 1, bias=g > 0, **options)
        for g, (own, N) in enumerate(zip(ranks, widths, strict=True))
    ]
    return [layer._replace(x=layers[0].x) for layer in layers]


def columns_of(layers: list[Mixed]) -> dict[str, list[Any]]:
    return {name: [getattr(layer, name) for layer in layers] for name in Mixed._fields}


def fused_shared(layers: list[Mixed], index: Tensor | RowGroups | None = None) -> list[Tensor]:
    """Every y, dx, every dA and every dB."""
    c = columns_of(layers)
    ys = multi_lora_shared(
        c["x"][0], c["weight"], c["bias"], c["lora_a"], c["lora_b"], c["scale"], c["index"][0] if index is None else index,
        dropout_p=c["dropout_p"],
    )  # fmt: skip
    leaves = [c["x"][0], *(one for own in (*c["lora_a"], *c["lora_b"]) for one in own)]
    return [*ys, *torch.autograd.grad(ys, leaves, c["dy"])]


def arranged(results: list[list[Tensor]], S: int) -> list[Tensor]:
    """The layers' y, dx, dA and dB (`fused`) in the order of `fused_shared`."""
    das, dbs = ([grad for own in results for grad in own[begin:][:S]] for begin in (2, 2 + S))
    return [*(own[0] for own in results), sum(own[1] for own in results[1:]) + results[0][1], *das, *dbs]


SHARED: dict[str, dict[str, Any]] = {
    "three layers": {"index": SHUFFLED, "ranks": [[1, 8, 3, 17]] * 3, "widths": [24, 8, 8]},
    "other ranks": {"index": SHUFFLED, "ranks": [[1, 8, 3, 17], [20, 2, 5, 1]], "widths": [24, 40]},
    "no dropout": {"index": SHUFFLED, "ranks": [[4, 4, 4, 4]] * 2, "widths": [16, 16], "dropout": False},
    "one layer": {"index": [1, -1, 0], "ranks": [[3, 8]], "widths": [12]},
    "no rows": {"index": [], "ranks": [[4, 2]] * 2, "widths": [8, 8]},
    "many rows, bfloat16": {
        "index": [i // 20 - 1 for i in range(90)],
        "ranks": [[16, 8, 5, 1]] * 2,
        "widths": [70, 33],
        "K": 130,
        "dtype": torch.bfloat16,
        "adapter_dtype": torch.float32,
    },
}


@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED)
def test_layers_that_share_x(device: str, implementation: str, case: dict[str, Any]) -> None:
    inputs = [make_shared(**case, device=device) for _ in inputs_of(implementation)]
    for number, results in enumerate(zip(*(compare_shared(layers, device) for layers in inputs), strict=True)):
        assert_within_bound_over_inputs(f"result {number}", results)


def compare_shared(layers: list[Mixed], device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each result of `fused_shared`, with eager's and the exact one."""
    S, seeds = len(layers[0].scale), [None] * len(layers)
    if any(p for layer in layers for p in layer.dropout_p):
        torch.manual_seed(1)
        seeds = list(torch.randint(0, 2**63 - 1, (len(layers),), dtype=torch.int64, device=device))
        torch.manual_seed(1)
    values = fused_shared(layers)
    eager, exact = (
        arranged([compute(*one) for one in zip(layers, seeds, strict=True)], S) for compute in (eagerly, exactly)
    )
    return [(value.detach(), near.detach(), right) for value, near, right in zip(values, eager, exact, strict=True)]


def test_layers_that_share_x_repeat_bitwise(device: str, implementation: str) -> None:
    layers = make_shared([i % 4 - 1 for i in range(70)], [[16, 8, 5]] * 2, [24, 9], device=device)
    runs = []
    for index in (layers[0].index, group_rows(layers[0].index, 3)):
        torch.manual_seed(0)
        runs.append(fused_shared(layers, index))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_invalid_rows_of_layers_that_share_x(device: str, implementation: str) -> None:
    layers = make_shared([0, 1, 0, 1], [[3, 8]] * 2, [24, 8], dropout=False, device=device)
    groups = RowGroups(torch.tensor([0, 7, -2, 1], device=device), 2)
    y0, y1, dx, *grads = fused_shared(layers, groups)
    for tensor in (y0, y1, dx):
        assert tensor[1:3].isnan().all() and tensor[[0, 3]].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


def shared_arguments(device: str) -> tuple[list[Any], list[Any], list[Tensor], tuple[Tensor, Tensor]]:
    """x, weights, biases, A and B; scales, probabilities and seeds; dy; order and offsets. Two layers, the second drops nothing."""
    layers = make_shared(SHUFFLED, [[1, 8, 3, 17], [2, 4, 6, 1]], [24, 9], device=device)
    c = columns_of(layers)
    every = {name: [one for own in c[name] for one in own] for name in ("lora_a", "lora_b", "scale", "dropout_p")}
    lists = [[one.detach() for one in every[name]] for name in ("lora_a", "lora_b")]
    bias = [layers[0].x.new_empty(0) if one is None else one for one in c["bias"]]
    numbers = [every["scale"], every["dropout_p"], torch.tensor([3, 2**40], device=device)]
    sorting = group_rows(layers[0].index, 4).for_rows(len(SHUFFLED))
    return [layers[0].x.detach(), c["weight"], bias, *lists], numbers, c["dy"], sorting


def test_keep_of_layers_that_share_x(device: str, implementation: str) -> None:
    """A layer's bits are those of its own seed; backward reads neither those of rows that drop nothing nor those beyond the last column."""
    (x, weight, bias, *adapters), (scale, p, seed), dy, sorting = shared_arguments(device)
    _, xa, keep = torch.ops.fastlora.multi_lora_shared(x, weight, bias, *adapters, scale, p, seed, *sorting)
    M, K = x.shape
    assert xa.shape == (2, M, 17) and keep.dtype == torch.uint8 and keep.shape == (2, M, reference.keep_bytes(K))
    read = torch.zeros(2, M, K, dtype=torch.bool, device=device)
    index = torch.tensor(SHUFFLED, device=device)
    for i in (1, 3):
        (rows,) = torch.nonzero(index == i, as_tuple=True)
        assert torch.equal(reference.read_keep(keep[0, rows], K), reference.keep_mask(seed[0], rows, K, p[i]))
        read[0, rows] = True
    backward = torch.ops.fastlora.multi_lora_shared_backward
    grads, others = (
        backward(dy, x, weight, *adapters, xa, bits, scale, p, *sorting, True, True, True)
        for bits in (keep, flip_unread(keep, read))
    )
    assert all(torch.equal(grad, other) for grad, other in zip(grads, others, strict=True))
    _, _, keep = torch.ops.fastlora.multi_lora_shared(x, weight, bias, *adapters, scale, p, None, *sorting)
    assert keep.dtype == torch.uint8 and keep.shape == (0,)


def test_opcheck_of_layers_that_share_x(device: str) -> None:
    (x, weight, bias, *adapters), (scale, p, seed), dy, sorting = shared_arguments(device)
    forward, backward = torch.ops.fastlora.multi_lora_shared, torch.ops.fastlora.multi_lora_shared_backward
    torch.library.opcheck(forward.default, (x, weight, bias, *adapters, scale, p, seed, *sorting))
    _, xa, keep = forward(x, weight, bias, *adapters, scale, p, seed, *sorting)
    for need in ((True, True, True), (False, False, True)):
        arguments = (dy, x, weight, *adapters, xa, keep, scale, p, *sorting, *need)
        torch.library.opcheck(backward.default, arguments)


def test_layers_that_share_x_name_the_wrong_one() -> None:
    layers = make_shared([0, 1, 0], [[4, 2]] * 2, [12, 6], K=16)
    c = columns_of(layers)
    right = {name: c[name] for name in ("weight", "bias", "lora_a", "lora_b", "scale")}
    short = [c["lora_a"][1][0], torch.ones(2, 15)]
    for changes, message in (
        ({"lora_a": [c["lora_a"][0], short]}, r"^lora_a\[1\]\[1\]: got float32 \[2, 15\]"),
        ({"lora_b": [c["lora_b"][0]]}, "^lora_b: got '1 entries', expected one for each of the 2 weights"),
        ({"scale": [[1.0, 1.0], [1.0]]}, r"^scale\[1\]: "),
        ({"dropout_p": [0.1, [0.1, 2.0]]}, r"^dropout_p\[1\]\[1\]: "),
        (
            {name: [c[name][0], c[name][1][:1]] for name in ("lora_a", "lora_b", "scale")},
            r"^lora_a\[1\]: got '1 adapters', expected 2, as lora_a\[0\] has",
        ),
        ({"index": torch.tensor([0, 2, 0])}, "^index: "),
    ):
        arguments = {**right, "index": layers[0].index, **changes}
        with pytest.raises((IndexError, ValueError), match=message):
            multi_lora_shared(layers[0].x, **arguments)


NAN, INF = float("nan"), float("inf")


def right_arguments() -> dict[str, Any]:
    mixed = make_mixed([0, 1, -1, 1, 0, 0], [4, 2], K=16, N=12)
    return {**mixed._asdict(), "dy": None}


def adapters(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [torch.ones(shape, dtype=dtype, device=device) for shape in shapes]


A, B = ((4, 16), (2, 16)), ((12, 4), (12, 2))
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "x: a list": ("x", {"x": [1.0]}),
    "x: integers": ("x", {"x": torch.ones(6, 16, dtype=torch.int64)}),
    "x: no dimension": ("x", {"x": torch.tensor(1.0)}),
    "x: on meta": ("weight", {"x": torch.ones(6, 16, device="meta")}),
    "x: another K": ("weight", {"x": torch.ones(6, 15)}),
    "x: another M": ("index", {"x": torch.ones(7, 16)}),
    "weight: None": ("weight", {"weight": None}),
    "weight: transposed": ("weight", {"weight": torch.ones(16, 12)}),
    "weight: dtype": ("weight", {"weight": torch.ones(12, 16, dtype=torch.float16)}),
    "weight: on meta": ("weight", {"weight": torch.ones(12, 16, device="meta")}),
    "weight: requires grad": ("weight", {"weight": torch.ones(12, 16, requires_grad=True)}),
    "bias: another N": ("bias", {"bias": torch.ones(11)}),
    "bias: requires grad": ("bias", {"bias": torch.ones(12, requires_grad=True)}),
    "lora_a: None": ("lora_a", {"lora_a": None}),
    "lora_a: a tensor": ("lora_a", {"lora_a": torch.ones(2, 4, 16)}),
    "lora_a: empty": ("lora_a", {"lora_a": [], "lora_b": [], "scale": []}),
    "lora_a: None inside": ("lora_a[1]", {"lora_a": [torch.ones(4, 16), None]}),
    "lora_a: another K": ("lora_a[1]", {"lora_a": adapters((4, 16), (2, 15))}),
    "lora_a: 1-D": ("lora_a[0]", {"lora_a": [torch.ones(16), torch.ones(2, 16)]}),
    "lora_a: rank 0": ("lora_a[1]", {"lora_a": adapters((4, 16), (0, 16)), "lora_b": adapters((12, 4), (12, 0))}),
    "lora_a: dtype": (
        "lora_a[0]",
        {"lora_a": adapters(*A, dtype=torch.float16), "lora_b": adapters(*B, dtype=torch.float16)},
    ),
    "lora_a: on meta": ("lora_a[0]", {"lora_a": adapters(*A, device="meta")}),
    "lora_b: a tensor": ("lora_b", {"lora_b": torch.ones(2, 12, 4)}),
    "lora_b: too few": ("lora_b", {"lora_b": adapters((12, 4))}),
    "lora_b: another rank": ("lora_b[1]", {"lora_b": adapters((12, 4), (12, 4))}),
    "lora_b: another N": ("lora_b[0]", {"lora_b": adapters((11, 4), (11, 2))}),
    "lora_b: dtype": ("lora_b[0]", {"lora_b": adapters(*B, dtype=torch.float64)}),
    "scale: a number": ("scale", {"scale": 1.0}),
    "scale: a tensor": ("scale", {"scale": torch.ones(2)}),
    "scale: too many": ("scale", {"scale": [1.0, 1.0, 1.0]}),
    "scale: NaN": ("scale[1]", {"scale": [1.0, NAN]}),
    "scale: infinite": ("scale[0]", {"scale": [INF, 1.0]}),
    "scale: a tensor inside": ("scale[0]", {"scale": [torch.tensor(1.0), 1.0]}),
    "index: None": ("index", {"index": None}),
    "index: a list": ("index", {"index": [0, 1, -1, 1, 0, 0]}),
    "index: floats": ("index", {"index": torch.zeros(6)}),
    "index: bools": ("index", {"index": torch.zeros(6, dtype=torch.bool)}),
    "index: too long": ("index", {"index": torch.zeros(12, dtype=torch.int64)}),
    "index: no dimension": ("index", {"index": torch.tensor(0)}),
    "index: 2-D": ("index", {"index": torch.zeros(6, 1, dtype=torch.int64)}),
    "index: too large": ("index", {"index": torch.tensor([0, 1, 2, 0, 0, 0])}),
    "index: below -1": ("index", {"index": torch.tensor([0, 1, -2, 0, 0, 0])}),
    "index: far out of range": ("index", {"index": torch.tensor([0, 1, 2**62, 0, 0, 0])}),
    "index: on meta": ("index", {"index": torch.zeros(6, dtype=torch.int64, device="meta")}),
    "index: groups of other adapters": ("index", {"index": RowGroups(torch.zeros(6, dtype=torch.int64), 3)}),
    "index: groups of other rows": ("index", {"index": RowGroups(torch.zeros(4, dtype=torch.int64), 2)}),
    "index: groups of no rows": ("index", {"index": RowGroups(torch.zeros(0, dtype=torch.int64), 2)}),
    "index: groups on meta": ("index", {"index": RowGroups(torch.zeros(6, dtype=torch.int64, device="meta"), 2)}),
    "dropout_p: None": ("dropout_p", {"dropout_p": None}),
    "dropout_p: a tensor": ("dropout_p", {"dropout_p": torch.tensor(0.1)}),
    "dropout_p: too few": ("dropout_p", {"dropout_p": [0.1]}),
    "dropout_p: above 1": ("dropout_p[1]", {"dropout_p": [0.1, 1.1]}),
    "dropout_p: NaN": ("dropout_p", {"dropout_p": NAN}),
    "dropout_p: a string inside": ("dropout_p[0]", {"dropout_p": ["0.1", 0.1]}),
}


def expect_named(name: str, arguments: dict[str, Any]) -> None:
    start = name.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises((IndexError, TypeError, ValueError), match=rf"^{start}(\[\d+\])?: .*expected"):
        multi_lora(**{key: value for key, value in arguments.items() if key != "dy"})


@pytest.mark.parametrize(("name", "changes"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(name: str, changes: dict[str, Any]) -> None:
    expect_named(name, {**right_arguments(), **changes})


@pytest.mark.parametrize("case", [case for case in WRONG if case != "weight: dtype"])
def test_wrong_arguments_under_autocast(case: str) -> None:
    name, changes = WRONG[case]
    with torch.autocast("cpu", torch.bfloat16):
        expect_named(name, {**right_arguments(), **changes})


def test_groups_must_fit_the_examples() -> None:
    """Groups of 2 examples are none for an x of 4 examples, though 2 divides its number of rows."""
    mixed = make_mixed([0] * 12, [4, 2], K=16, N=12)
    with pytest.raises(ValueError, match="^index: "):
        multi_lora(mixed.x.view(4, 3, 16), *mixed[1:6], group_rows(torch.tensor([0, 1]), 2))


@pytest.mark.parametrize(("dtype", "adapters"), [(torch.uint8, 2), (torch.int8, 200), (torch.int32, 2)])
def test_an_index_of_any_integers(dtype: torch.dtype, adapters: int) -> None:
    """Also of those that do not reach from -1 to the number of adapters."""
    order, offsets = group_rows(torch.tensor([1, 0, 1], dtype=dtype), adapters).for_rows(3)
    assert order.tolist() == [1, 0, 2] and offsets.tolist()[:4] == [0, 0, 1, 3]


@pytest.mark.parametrize("adapters", [0, -1, 1.5, None], ids=str)
def test_group_rows_wants_a_number_of_adapters(adapters: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="^adapters: "):
        group_rows(torch.zeros(3, dtype=torch.int64), adapters)


def call_the_native_operators_wrongly() -> None:
    mixed = make_mixed([0, 1, -1, 1, 0, 0], [4, 2], K=16, N=12)
    order, offsets = group_rows(mixed.index, 2).for_rows(6)
    numbers = {"scale": [1.0, 2.0], "dropout_p": [0.1, 0.0]}
    sorting = {"order": order, "offsets": offsets}
    tensors = {
        "x": mixed.x.detach(),
        "weight": mixed.weight,
        "bias": mixed.bias,
        "lora_a": adapters(*A),
        "lora_b": adapters(*B),
    }
    wrong = {
        case: (name.partition("[")[0], changes)
        for case, (name, changes) in WRONG.items()
        if name.partition("[")[0] not in ("index", "scale", "dropout_p")
        and not case.endswith(("None", "on meta", "requires grad"))
    }
    wrong |= {
        "scale: too few": ("scale", {"scale": [1.0]}),
        "dropout_p: too few": ("dropout_p", {"dropout_p": [0.1]}),
        "order: too short": ("order", {"order": order[:5]}),
        "order: dtype": ("order", {"order": order.int()}),
        "order: too large": ("order", {"order": order + 1}),
        "order: negative": ("order", {"order": order - 1}),
        "offsets: too short": ("offsets", {"offsets": offsets[:4]}),
        "offsets: dtype": ("offsets", {"offsets": offsets.float()}),
        "offsets: beyond the rows": ("offsets", {"offsets": offsets * 1000}),
        "offsets: falling": ("offsets", {"offsets": offsets.flip(0)}),
    }
    wrong_seed = {"seed: dtype": ("seed", {"seed": torch.tensor(1, dtype=torch.int32)})}
    print_accepted("multi_lora_cpu", {**tensors, **numbers, "seed": torch.tensor(1), **sorting}, wrong | wrong_seed)
    wrong = {case: change for case, change in wrong.items() if change[0] != "bias"}
    wrong |= {
        "dy: another N": ("dy", {"dy": torch.ones(6, 11)}),
        "dy: another M": ("dy", {"dy": torch.ones(5, 12)}),
        "dy: dtype": ("dy", {"dy": torch.ones(6, 12).bfloat16()}),
        "xa: another rank": ("xa", {"xa": torch.ones(6, 3)}),
        "xa: another M": ("xa", {"xa": torch.ones(5, 4)}),
        "xa: dtype": ("xa", {"xa": torch.ones(6, 4).bfloat16()}),
        "keep: dtype": ("keep", {"keep": torch.ones(6, 8, dtype=torch.int8)}),
        "keep: another M": ("keep", {"keep": torch.ones(5, 8, dtype=torch.uint8)}),
        "keep: too few bytes": ("keep", {"keep": torch.ones(6, 2, dtype=torch.uint8)}),
        "keep: 1-D": ("keep", {"keep": torch.ones(48, dtype=torch.uint8)}),
    }
    del tensors["bias"]
    need = {"need_dx": True, "need_da": True, "need_db": True}
    state = {"xa": torch.ones(6, 4), "keep": torch.ones(6, 8, dtype=torch.uint8)}
    right = {"dy": torch.ones(6, 12), **tensors, **state, **numbers, **sorting, **need}
    print_accepted("multi_lora_backward_cpu", right, wrong)


@pytest.mark.skipif("cpu" not in implementations(OPERATOR, "cpu"), reason="the native extension is not built")
def test_wrong_arguments_to_the_native_operators() -> None:
    """They raise, naming the argument, also when no one checks before them; none ends the process."""
    assert run_apart("test_multi_lora", call_the_native_operators_wrongly) == ""
