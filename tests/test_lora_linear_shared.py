"""lora_linear of layers that share x: every implementation against the float64 reference, layer by layer, forward and backward."""

import functools
from typing import NamedTuple

import pytest
import torch
from bounds import (
    Compared,
    assert_within_bound,
    assert_within_bound_over_inputs,
    double,
    flip_unread,
    make_layer,
    next_seed,
)
from lora_arguments import Arguments, as_wide_as, detached
from test_lora_linear import SCALE, eagerly, exactly, inputs_of
from torch import Tensor

from fastlora import ops, reference
from fastlora.functional import lora_linear_shared
from fastlora.operators import lora_linear

OPERATOR = "lora_linear_shared"


class Shared(NamedTuple):
    M: int
    K: int
    layers: tuple[tuple[int, int], ...]  # N_i, R_i
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    dropout_p: float | list[float] = 0.1
    bias: bool = True


SHARED = (
    Shared(37, 65, ((33, 3), (51, 8), (90, 1))),
    Shared(130, 200, ((96, 16), (40, 16)), dropout_p=0.0, bias=False),
    Shared(70, 129, ((64, 5), (31, 12), (64, 9)), torch.bfloat16, torch.float32, [0.0, 0.5, 0.1]),
    Shared(3, 64, ((48, 8), (48, 4)), torch.bfloat16, dropout_p=0.0),
    Shared(19, 96, ((40, 7),), torch.float16, dropout_p=0.2),
    Shared(0, 16, ((8, 2), (8, 2))),
)


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_layers_that_share_x(case: Shared, device: str, implementation: str) -> None:
    assert_within_bound_over_inputs(lambda: compare_shared(case, device), inputs_of(implementation))


def compare_shared(case: Shared, device: str) -> dict[str, Compared]:
    """Every y, dx, every da and db, of layers that are drawn."""
    sizes = case.dtype, case.adapter_dtype, case.bias, device
    layers = [make_layer(case.M, case.K, N, R, *sizes) for N, R in case.layers]
    x = layers[0].x
    layers = [layer._replace(x=x) for layer in layers]
    p = case.dropout_p if isinstance(case.dropout_p, list) else [case.dropout_p] * len(layers)
    scales = [SCALE / (1 + i) for i in range(len(layers))]
    seeds = list(next_seed(device, 1, len(layers)).split(1)) if max(p) > 0 else [None] * len(layers)
    columns = list(zip(*layers, strict=True))
    ys = lora_linear_shared(x, columns[1], columns[2], columns[3], columns[4], scales, dropout_p=case.dropout_p)
    leaves = [x, *columns[3], *columns[4]]
    grads = torch.autograd.grad(ys, leaves, columns[5])
    eager = [eagerly(*one) for one in zip(layers, scales, p, seeds, strict=True)]
    exact = [exactly(*one) for one in zip(layers, scales, p, seeds, strict=True)]

    def arranged(results: list[list[Tensor]]) -> list[Tensor]:
        y, dx, da, db = zip(*results, strict=True)
        return [*y, functools.reduce(torch.add, dx), *da, *db]

    values = [*(y.detach() for y in ys), *grads]
    near = [one.detach() for one in arranged(eager)]
    return {f"result {i}": of_one for i, of_one in enumerate(zip(values, near, arranged(exact), strict=True))}


def arguments_of_three(device: str) -> tuple[Arguments, list[Tensor]]:
    """Three layers on 13 rows of 65, of which the first drops nothing and the last has no bias; and their dy."""
    layers = [make_layer(13, 65, N, R, bias=N != 33, device=device) for N, R in ((24, 3), (16, 5), (33, 8))]
    columns = ([getattr(one, name) for one in layers] for name in ("weight", "bias", "lora_a", "lora_b"))
    numbers = [1.0, -2.0, 0.5], [0.0, 0.5, 0.1], torch.tensor([3, 4, 2**40], device=device)
    arguments = Arguments(layers[0].x, *columns, *numbers)
    return arguments.mapped(detached), [one.dy for one in layers]


def test_xa_of_layers_that_share_x(device: str, implementation: str) -> None:
    """One tensor for all, zeros beyond a layer's own rank."""
    arguments, _ = arguments_of_three(device)
    _, xa, _ = arguments.forward(implementation)
    _, exact, _ = arguments.mapped(double).forward("reference")
    _, eager, _ = arguments.forward("reference")
    assert xa.shape == (3, 13, 8) and not xa[0, :, 3:].any() and not xa[1, :, 5:].any()
    for one, near, right in zip(xa, eager, exact, strict=True):
        assert_within_bound("xa", one, near, right)


def test_keep_of_layers_that_share_x(device: str, implementation: str) -> None:
    """Each layer has the mask of its own seed; backward reads neither bits beyond the last column nor those of the layer that drops nothing."""
    arguments, dy = arguments_of_three(device)
    forward, backward = torch.ops.fastlora.lora_linear, torch.ops.fastlora.lora_linear_backward
    _, xa, keep = forward(*arguments.raw())
    assert keep.dtype == torch.uint8 and keep.shape == (3, 13, 16)
    rows, read = torch.arange(13, device=device), torch.ones(3, 13, 65, dtype=torch.bool)
    read[0] = False
    for i in (1, 2):
        expected = reference.keep_mask(arguments.seed[i], rows, 65, arguments.dropout_p[i])
        assert torch.equal(reference.read_keep(keep[i], 65), expected)
    grads, others = (backward(*arguments.backward_arguments(dy, xa, bits)) for bits in (keep, flip_unread(keep, read)))
    assert all(torch.equal(grad, other) for grad, other in zip(grads, others, strict=True))
    for dropless in ({"dropout_p": [0.3] * 3, "seed": None}, {"dropout_p": [1e-7] * 3}):
        _, _, keep = forward(*arguments._replace(**dropless).raw())
        assert keep.dtype == torch.uint8 and keep.shape == (0,)


def test_one_after_the_other_is_the_same(device: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers whose implementation does not take them together get the same state and gradients, put together by layer."""
    arguments, dy = arguments_of_three(device)
    together = arguments.both(implementation, dy)
    alone = (
        ops.implementation("lora_linear", implementation),
        ops.implementation("lora_linear_backward", implementation),
    )
    chosen = []
    monkeypatch.setattr(lora_linear, "_chosen", lambda *args: chosen.append(args) or (alone[args[-1]], False))
    ys, xa, keep = lora_linear.run(*arguments)
    for given in (keep, arguments.forward(implementation)[2]):
        dx, *grads = lora_linear.run_backward(*arguments.backward_arguments(dy, xa, given))
        apart = [*ys, xa, dx, *as_wide_as(arguments.lora_a, grads[0]), *as_wide_as(arguments.lora_b, grads[1])]
        for one, other in zip(apart, together, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert xa.shape == (3, 13, 8) and keep.shape == (3, 13, 16) and len(chosen) == 3
    nothing = lora_linear.run_backward(*arguments.backward_arguments(dy, xa, keep, False, True, False))
    assert nothing[0].numel() == nothing[2].numel() == 0
    torch.testing.assert_close(nothing[1], grads[0], rtol=1e-5, atol=1e-5)


def test_opcheck_of_layers_that_share_x(device: str) -> None:
    arguments, dy = arguments_of_three(device)
    forward, backward = torch.ops.fastlora.lora_linear, torch.ops.fastlora.lora_linear_backward
    torch.library.opcheck(forward.default, arguments.raw())
    _, xa, keep = forward(*arguments.raw())
    for need in ((True, True, True), (True, False, True)):
        torch.library.opcheck(backward.default, arguments.backward_arguments(dy, xa, keep, *need))


@pytest.mark.parametrize("dropout_p", [0.0, [0.3, 0.0]], ids=str)
def test_gradcheck_of_layers_that_share_x(device: str, dropout_p: float | list[float]) -> None:
    one, other = (make_layer(3, 9, N, R, torch.float64, bias=N != 5, device=device) for N, R in ((5, 2), (4, 3)))

    def function(x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # the same masks at each evaluation
        frozen = [one.weight, other.weight], [one.bias, other.bias]
        return tuple(lora_linear_shared(x, *frozen, adapters[:2], adapters[2:], [SCALE, -1.0], dropout_p=dropout_p))

    assert torch.autograd.gradcheck(function, (one.x, one.lora_a, other.lora_a, one.lora_b, other.lora_b))


def test_layers_that_share_x_repeat_bitwise(device: str, implementation: str) -> None:
    layers = [make_layer(100, 129, N, 7, device=device) for N in (64, 33)]
    x = layers[0].x
    arguments = [[getattr(layer, name) for layer in layers] for name in ("weight", "bias", "lora_a", "lora_b")]

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        ys = lora_linear_shared(x, *arguments, [1.0, 2.0], dropout_p=0.3)
        return *ys, *torch.autograd.grad(ys, [x, *arguments[2], *arguments[3]], [layer.dy for layer in layers])

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
