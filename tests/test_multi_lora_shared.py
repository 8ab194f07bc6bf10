"""multi_lora of layers that share x: each has S adapters of its own, and a row has the same number in all. Against the float64 reference."""

from typing import Any

import pytest
import torch
from bounds import Compared, assert_within_bound, assert_within_bound_over_inputs, double, flip_unread, next_seed
from lora_arguments import Arguments, detached
from test_multi_lora import SHUFFLED, Mixed, eagerly, exactly, inputs_of, make_mixed
from torch import Tensor

from fastlora import reference
from fastlora.functional import RowGroups, group_rows, multi_lora_shared

OPERATOR = "multi_lora_shared"


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
    def compute() -> dict[str, Compared]:
        compared = compare_shared(make_shared(**case, device=device), device)
        return {f"result {i}": of_one for i, of_one in enumerate(compared)}

    assert_within_bound_over_inputs(compute, inputs_of(implementation))


def compare_shared(layers: list[Mixed], device: str) -> list[Compared]:
    """Each result of `fused_shared`, with eager's and the exact one."""
    S, drops = len(layers[0].scale), any(p for layer in layers for p in layer.dropout_p)
    seeds = list(next_seed(device, 1, len(layers)).split(1)) if drops else [None] * len(layers)
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


def arguments_of_two(device: str) -> tuple[Arguments, list[Tensor]]:
    """Two layers, of which the second drops nothing; and their dy."""
    layers = make_shared(SHUFFLED, [[1, 8, 3, 17], [2, 4, 6, 1]], [24, 9], device=device)
    c = columns_of(layers)
    every = ([one for own in c[name] for one in own] for name in ("lora_a", "lora_b", "scale", "dropout_p"))
    sorting = group_rows(layers[0].index, 4).for_rows(len(SHUFFLED))
    seed = torch.tensor([3, 2**40], device=device)
    arguments = Arguments(layers[0].x, c["weight"], c["bias"], *every, seed, *sorting)
    return arguments.mapped(detached), c["dy"]


def test_xa_of_layers_that_share_x(device: str, implementation: str) -> None:
    """One tensor for all, zeros beyond the rank of a row's own adapter in that layer, and where it has none."""
    arguments, _ = arguments_of_two(device)
    _, xa, _ = arguments.forward(implementation)
    assert xa.shape == (2, len(SHUFFLED), 17)
    for g, ranks in enumerate(((1, 8, 3, 17), (2, 4, 6, 1))):
        for row, i in enumerate(SHUFFLED):
            assert not xa[g, row, ranks[i] if i >= 0 else 0 :].any()
    _, exact, _ = arguments.mapped(double).forward("reference")
    assert_within_bound("xa", xa, arguments.forward("reference")[1], exact)


def test_keep_of_layers_that_share_x(device: str, implementation: str) -> None:
    """A layer's bits are those of its own seed; backward reads neither those of rows that drop nothing nor those beyond the last column."""
    arguments, dy = arguments_of_two(device)
    forward, backward = torch.ops.fastlora.lora_linear, torch.ops.fastlora.lora_linear_backward
    _, xa, keep = forward(*arguments.raw())
    M, K = arguments.x.shape
    assert xa.shape == (2, M, 17) and keep.dtype == torch.uint8 and keep.shape == (2, M, reference.keep_bytes(K))
    read = torch.zeros(2, M, K, dtype=torch.bool, device=device)
    index = torch.tensor(SHUFFLED, device=device)
    for i in (1, 3):
        (rows,) = torch.nonzero(index == i, as_tuple=True)
        expected = reference.keep_mask(arguments.seed[0], rows, K, arguments.dropout_p[i])
        assert torch.equal(reference.read_keep(keep[0, rows], K), expected)
        read[0, rows] = True
    grads, others = (backward(*arguments.backward_arguments(dy, xa, bits)) for bits in (keep, flip_unread(keep, read)))
    assert all(torch.equal(grad, other) for grad, other in zip(grads, others, strict=True))
    _, _, keep = forward(*arguments._replace(seed=None).raw())
    assert keep.dtype == torch.uint8 and keep.shape == (0,)


def test_opcheck_of_layers_that_share_x(device: str) -> None:
    arguments, dy = arguments_of_two(device)
    forward, backward = torch.ops.fastlora.lora_linear, torch.ops.fastlora.lora_linear_backward
    torch.library.opcheck(forward.default, arguments.raw())
    _, xa, keep = forward(*arguments.raw())
    for need in ((True, True, True), (False, False, True)):
        torch.library.opcheck(backward.default, arguments.backward_arguments(dy, xa, keep, *need))


def test_gradcheck_of_layers_that_share_x(device: str) -> None:
    layers = make_shared([1, -1, 0, 1], [[2, 1], [1, 3]], [5, 4], K=9, dtype=torch.float64, device=device)
    c = columns_of(layers)

    def function(x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # the same masks at each evaluation
        a, b = ([ones[:2], ones[2:]] for ones in (adapters[:4], adapters[4:]))
        options = {"dropout_p": c["dropout_p"]}
        return tuple(multi_lora_shared(x, c["weight"], c["bias"], a, b, c["scale"], layers[0].index, **options))

    leaves = [one for own in (*c["lora_a"], *c["lora_b"]) for one in own]
    assert torch.autograd.gradcheck(function, (layers[0].x, *leaves))


def test_compiles_whole_with_layers_that_share_x(device: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(multi_lora_shared, fullgraph=True, backend="aot_eager", dynamic=True)
    for index in (SHUFFLED, SHUFFLED + [1, 1, 0]):
        layers = make_shared(index, [[1, 8, 3, 17], [2, 4, 6, 1]], [24, 9], dropout=False, device=device)
        c = columns_of(layers)
        given = c["x"][0], c["weight"], c["bias"], c["lora_a"], c["lora_b"], c["scale"], layers[0].index
        leaves = [c["x"][0], *(one for own in (*c["lora_a"], *c["lora_b"]) for one in own)]
        ys, expected = (function(*given) for function in (compiled, multi_lora_shared))
        grads, wanted = (torch.autograd.grad(of, leaves, c["dy"]) for of in (ys, expected))
        for one, other in zip((*ys, *grads), (*expected, *wanted), strict=True):
            assert torch.equal(one, other)
