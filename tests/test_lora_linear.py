"""lora_linear: y = x Wᵀ + b + s d(x) Aᵀ Bᵀ, every implementation against the float64 reference, forward and backward."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bounds import (
    INPUTS,
    Layer,
    assert_within_bound,
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

from fastlora import functional, ops, reference
from fastlora.functional import lora_linear, lora_linear_shared

OPERATOR = "lora_linear"
SCALE = 1.7


def exactly(layer: Layer, scale: float, dropout_p: float, seed: Tensor | None) -> list[Tensor]:
    """y, dx, da, db in float64 by the reference."""
    dy = double(layer.dy)
    x, weight, bias, lora_a, lora_b = (double(tensor) for tensor in layer[:5])
    y, *state = reference.lora_linear(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed)
    return [
        y,
        *reference.lora_linear_backward(dy, x, weight, lora_a, lora_b, *state, scale, dropout_p, True, True, True),
    ]


def eagerly(layer: Layer, scale: float, dropout_p: float, seed: Tensor | None) -> list[Tensor]:
    """y, dx, da, db the way PEFT computes them, A and B cast to x's dtype, with the mask that the seed gives."""
    x, weight, bias, lora_a, lora_b, dy = map(dense, layer)
    dropped = x
    if seed is not None:
        kept = reference.keep_mask(seed, torch.arange(len(x), device=x.device), x.shape[1], dropout_p)
        dropped = x * kept * reference.keep_scale(dropout_p)
    y = F.linear(x, weight, bias) + F.linear(F.linear(dropped, lora_a.to(x.dtype)), lora_b.to(x.dtype)) * scale
    return [y, *gradients(y, (x, lora_a, lora_b), dy)]


def fused(layer: Layer, scale: float, dropout_p: float) -> list[Tensor]:
    x, weight, bias, lora_a, lora_b, dy = layer
    y = lora_linear(x, weight, bias, lora_a, lora_b, scale, dropout_p=dropout_p)
    return [y, *gradients(y, (x, lora_a, lora_b), dy)]


def inputs_of(implementation: str) -> range:
    """One for each input over which errors are taken: Triton's interpreter would take minutes for as many as the others."""
    return range(1 if implementation == "triton" else INPUTS)


def check(layers: Sequence[Layer], dropout_p: float) -> None:
    """Of each result, the errors over all these layers."""
    runs = [compared(layer, dropout_p, SCALE) for layer in layers]
    for name, *results in zip(("y", "dx", "da", "db"), *runs, strict=True):
        assert_within_bound_over_inputs(name, results)


def compared(layer: Layer, dropout_p: float, scale: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """y, dx, da, db: the value, eager's and the exact one."""
    before = [None if tensor is None else tensor.detach().clone() for tensor in layer]
    seed = next_seed(layer.x.device.type, 1) if dropout_p else None
    values, eager = fused(layer, scale, dropout_p), eagerly(layer, scale, dropout_p, seed)
    exact = exactly(layer, scale, dropout_p, seed)
    for name, tensor, copy in zip(Layer._fields, layer, before, strict=True):
        assert tensor is None or torch.equal(tensor, copy), f"{name} was written to"
    return [(value.detach(), near.detach(), right) for value, near, right in zip(values, eager, exact, strict=True)]


class Case(NamedTuple):
    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    dropout_p: float = 0.0


CASES = {
    "plain": Case(32, 64, 48, 8),
    "no rows": Case(0, 65, 48, 8, dropout_p=0.1),
    "one row": Case(1, 64, 48, 8),
    "one row, dropout, bfloat16": Case(1, 65, 48, 8, torch.bfloat16, torch.float32, dropout_p=0.1),
    "one column": Case(5, 1, 1, 1, dropout_p=0.1),
    "odd": Case(37, 65, 48, 3, dropout_p=0.1),
    "rank 1": Case(37, 65, 48, 1, bias=False),
    "rank 64": Case(37, 65, 48, 64, bias=False, dropout_p=0.1),
    "rank 129": Case(37, 65, 48, 129, dropout_p=0.1),
    "rank 512": Case(7, 65, 48, 512),
    "many tiles": Case(130, 300, 201, 16, dropout_p=0.1),
    "bfloat16": Case(37, 65, 48, 8, torch.bfloat16, dropout_p=0.1),
    "bfloat16, rank 1": Case(37, 65, 48, 1, torch.bfloat16, bias=False),
    "bfloat16, many tiles": Case(130, 300, 201, 16, torch.bfloat16),
    "bfloat16, float32 adapter": Case(37, 65, 48, 8, torch.bfloat16, torch.float32, dropout_p=0.1),
    "bfloat16, float32 adapter, rank 129": Case(37, 65, 48, 129, torch.bfloat16, torch.float32, bias=False),
    "float16": Case(37, 65, 48, 3, torch.float16, dropout_p=0.1),
    "float16, float32 adapter": Case(37, 65, 48, 64, torch.float16, torch.float32, bias=False, dropout_p=0.1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bound(device: str, implementation: str, case: Case) -> None:
    *sizes, dropout_p = case
    check([make_layer(*sizes, device=device) for _ in inputs_of(implementation)], dropout_p)


LAYOUTS: dict[str, Callable[[Layer], Layer]] = {
    "x with gaps": lambda layer: layer._replace(x=gapped(layer.x)),
    "x transposed": lambda layer: layer._replace(x=transposed(layer.x)),
    "weight transposed": lambda layer: layer._replace(weight=transposed(layer.weight)),
    "everything with gaps": lambda layer: Layer(*(gapped(tensor) for tensor in layer)),
    "adapter transposed": lambda layer: layer._replace(
        lora_a=transposed(layer.lora_a), lora_b=transposed(layer.lora_b)
    ),
    "dy transposed": lambda layer: layer._replace(dy=transposed(layer.dy)),
    "dy expanded": lambda layer: layer._replace(dy=layer.dy[:1, :1].expand_as(layer.dy)),
    "x expanded": lambda layer: layer._replace(x=layer.x[:1].detach().expand_as(layer.x).requires_grad_()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(device: str, implementation: str, layout: Callable[[Layer], Layer], dtype: torch.dtype) -> None:
    check([layout(make_layer(19, 33, 24, 5, dtype, device=device)) for _ in inputs_of(implementation)], dropout_p=0.1)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0), (2, 1, 3)], ids=str)
def test_leading_dimensions(device: str, implementation: str, shape: tuple[int, ...]) -> None:
    layer = make_layer(max(1, torch.Size(shape).numel()) if 0 not in shape else 0, 20, 12, 4, device=device)
    x = layer.x.detach().reshape(*shape, 20).requires_grad_()
    y = lora_linear(x, *layer[1:5], SCALE)
    flat = lora_linear(*layer[:5], SCALE)
    assert y.shape == (*shape, 12)
    assert torch.equal(y.flatten(), flat.flatten())
    dx, flat_dx = (torch.autograd.grad(out, inp, layer.dy.view_as(out))[0] for out, inp in ((y, x), (flat, layer.x)))
    assert torch.equal(dx, flat_dx.view_as(x))


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)], ids=str
)
def test_only_what_is_needed(device: str, implementation: str, wanted: tuple[bool, bool, bool]) -> None:
    """Each gradient alone is the one of the full backward, and what is not wanted has no elements."""
    layer = make_layer(13, 24, 16, 4, device=device)
    seed = next_seed(device, 1)
    x, weight, bias, lora_a, lora_b, dy = (tensor.detach() for tensor in layer)
    _, *state = ops.implementation("lora_linear", implementation)(x, weight, bias, lora_a, lora_b, SCALE, 0.1, seed)
    backward = ops.implementation("lora_linear_backward", implementation)
    everything = backward(dy, x, weight, lora_a, lora_b, *state, SCALE, 0.1, True, True, True)
    for need, some, full in zip(
        wanted, backward(dy, x, weight, lora_a, lora_b, *state, SCALE, 0.1, *wanted), everything, strict=True
    ):
        assert torch.equal(some, full) if need else some.numel() == 0


@pytest.mark.parametrize("wanted", ["x", "lora_a", "lora_b"])
def test_only_one_input_trains(device: str, implementation: str, wanted: str) -> None:
    """The gradient of the one input that requires it is the one of the full backward; the others get none."""
    layer = make_layer(13, 24, 16, 4, device=device)
    names = ("x", "lora_a", "lora_b")
    full = dict(zip(names, fused(layer, SCALE, 0.0)[1:], strict=True))
    frozen = layer._replace(**{name: getattr(layer, name).detach() for name in names if name != wanted})
    lora_linear(*frozen[:5], SCALE).backward(layer.dy)
    assert torch.equal(getattr(frozen, wanted).grad, full[wanted])
    assert all(getattr(frozen, name).grad is None for name in names if name != wanted)


@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=str)
def test_no_features(device: str, implementation: str, shape: tuple[int, ...]) -> None:
    """K = 0: the bias alone, as nn.Linear gives it."""
    x, weight, bias = (
        torch.ones(*shape, 0, device=device),
        torch.ones(4, 0, device=device),
        torch.arange(4.0, device=device),
    )
    y = lora_linear(
        x, weight, bias, torch.ones(1, 0, device=device), torch.ones(4, 1, device=device), 2.0, dropout_p=0.5
    )
    assert torch.equal(y, bias.expand(*shape, 4))


def test_on_meta() -> None:
    """Shapes and dtypes without memory: a model can be laid out on meta, gradients too."""
    x, weight, bias, lora_a, lora_b, dy = make_layer(6, 16, 12, 4, torch.bfloat16, torch.float32, device="meta")
    y = lora_linear(x.view(2, 3, 16), weight, bias, lora_a, lora_b, SCALE, dropout_p=0.1)
    assert y.is_meta and y.shape == (2, 3, 12) and y.dtype == torch.bfloat16
    for leaf, grad in zip((x, lora_a, lora_b), gradients(y, (x, lora_a, lora_b), dy.view_as(y)), strict=True):
        assert grad.is_meta and grad.shape == leaf.shape and grad.dtype == leaf.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_xa(device: str, implementation: str, dtype: torch.dtype) -> None:
    """xa leaves in float32, within the bound: the backward of any other implementation may read it."""
    layer = make_layer(13, 65, 16, 4, dtype, device=device)
    seed = next_seed(device, 1)
    inputs = [tensor.detach() for tensor in layer[:5]]
    _, xa, _ = ops.implementation("lora_linear", implementation)(*inputs, SCALE, 0.1, seed)
    _, exact, _ = reference.lora_linear(*(tensor.double() for tensor in inputs), SCALE, 0.1, seed)
    _, eager, _ = reference.lora_linear(*inputs, SCALE, 0.1, seed)
    assert_within_bound("xa", xa, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("K", [1, 17, 64, 203])
def test_keep(device: str, implementation: str, K: int, dtype: torch.dtype) -> None:
    """keep holds the reference's mask, bit by bit; backward reads no bit beyond the last column."""
    layer = make_layer(13, K, 16, 4, dtype, device=device)
    seed = next_seed(device, 1)
    x, weight, bias, lora_a, lora_b, dy = (tensor.detach() for tensor in layer)
    forward, backward = (ops.implementation(op, implementation) for op in ("lora_linear", "lora_linear_backward"))
    _, xa, keep = forward(x, weight, bias, lora_a, lora_b, SCALE, 0.3, seed)
    mask = reference.keep_mask(seed, torch.arange(13, device=device), K, 0.3)
    assert keep.dtype == torch.uint8 and keep.shape == (13, reference.keep_bytes(K))
    assert torch.equal(reference.read_keep(keep, K), mask)
    grads, others = (
        backward(dy, x, weight, lora_a, lora_b, xa, bits, SCALE, 0.3, True, True, True)
        for bits in (keep, flip_unread(keep, torch.ones_like(mask)))
    )
    assert all(torch.equal(grad, other) for grad, other in zip(grads, others, strict=True))


@pytest.mark.parametrize("rows", [2, 13])
def test_keep_has_no_elements_where_nothing_is_dropped(device: str, implementation: str, rows: int) -> None:
    """Without a seed or with a p that rounds to 0; a backward that is given such a keep drops nothing, whatever p is."""
    x, weight, bias, lora_a, lora_b, dy = (tensor.detach() for tensor in make_layer(rows, 24, 16, 4, device=device))
    forward, backward = (ops.implementation(op, implementation) for op in ("lora_linear", "lora_linear_backward"))
    results = []
    for p, seed in ((0.3, None), (1e-7, next_seed(device, 1)), (0.0, None)):
        y, xa, keep = forward(x, weight, bias, lora_a, lora_b, SCALE, p, seed)
        assert keep.dtype == torch.uint8 and keep.shape == (0,)
        results.append([y, xa, *backward(dy, x, weight, lora_a, lora_b, xa, keep, SCALE, p, True, True, True)])
    for one, other, plain in zip(*results, strict=True):
        assert torch.equal(one, plain) and torch.equal(other, plain)


def dropped_ones(device: str, rows: int, K: int, dropout_p: float, **options: Any) -> tuple[Tensor, Tensor]:
    """d(1) [rows, K] and the gradient of its sum: with W = 0 and A = B = 1 nothing but dropout is left of the layer."""
    x = torch.ones(rows, K, device=device, requires_grad=True)
    one = torch.eye(K, device=device)
    y = lora_linear(x, torch.zeros(K, K, device=device), None, one, one, 1.0, dropout_p=dropout_p, **options)
    (dx,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), dx


@pytest.mark.parametrize("K", [1, 7, 8, 65])
def test_mask_bits(device: str, implementation: str, K: int) -> None:
    seed = next_seed(device, 3)
    expected = reference.keep_mask(seed, torch.arange(21, device=device), K, 0.3).float() * reference.keep_scale(0.3)
    y, dx = dropped_ones(device, 21, K, 0.3)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(dx, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dropout_p", "value"), [(0.0, 1.0), (1e-7, 1.0), (1.0, 0.0), (1 - 1e-7, 0.0)], ids=["0", "tiny", "1", "nearly 1"]
)
def test_dropout_at_its_ends(device: str, implementation: str, dropout_p: float, value: float) -> None:
    y, dx = dropped_ones(device, 5, 17, dropout_p)
    assert (y == value).all() and (dx == value).all()


def test_dropout_only_in_training(device: str, implementation: str) -> None:
    y, dx = dropped_ones(device, 5, 17, 0.5, training=False)
    assert (y == 1).all() and (dx == 1).all()


def test_every_call_draws_its_own_mask(device: str, implementation: str) -> None:
    torch.manual_seed(0)
    first, second = (dropped_ones(device, 8, 32, 0.5)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, dropped_ones(device, 8, 32, 0.5)[0])


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_replays_dropout(device: str, implementation: str, use_reentrant: bool) -> None:
    layer = make_layer(9, 24, 24, 4, device=device)

    def twice(x: Tensor) -> Tensor:
        for _ in range(2):
            x = lora_linear(x, *layer[1:5], SCALE, dropout_p=0.5)
        return x

    torch.manual_seed(5)
    plain = gradients(twice(layer.x), (layer.x, layer.lora_a, layer.lora_b), layer.dy)
    torch.manual_seed(5)
    y = checkpoint(twice, layer.x, use_reentrant=use_reentrant)
    leaves = (layer.x, layer.lora_a, layer.lora_b)
    y.backward(layer.dy)  # the reentrant kind supports no autograd.grad
    for leaf, expected in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, expected)


def test_two_runs_are_equal(device: str, implementation: str) -> None:
    torch.use_deterministic_algorithms(False)  # the tests' own setting must not be what makes it so
    layer = make_layer(130, 96, 64, 16, device=device)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(fused(layer, SCALE, 0.1))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_without_gradients(device: str, implementation: str) -> None:
    layer = make_layer(13, 24, 16, 4, device=device)
    with_grad = lora_linear(*layer[:5], SCALE)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = lora_linear(*layer[:5], SCALE)
        assert not y.requires_grad and torch.equal(y, with_grad)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["float32 adapter", "bfloat16 adapter"])
def test_autocast(device: str, implementation: str, adapter_dtype: torch.dtype) -> None:
    """Under autocast the layer is what it is on tensors cast by hand, and the gradients come back in their own dtypes."""
    layer = make_layer(13, 24, 16, 4, torch.float32, adapter_dtype, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = lora_linear(*layer[:5], SCALE)
    cast = layer._replace(**{name: getattr(layer, name).detach().bfloat16() for name in ("x", "weight", "bias", "dy")})
    cast.x.requires_grad_()
    expected = lora_linear(*cast[:5], SCALE)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    got = gradients(y, (layer.x, layer.lora_a, layer.lora_b), cast.dy)
    wanted = gradients(expected, (cast.x, cast.lora_a, cast.lora_b), cast.dy)
    assert [grad.dtype for grad in got] == [torch.float32, adapter_dtype, adapter_dtype]
    for grad, want in zip(got, wanted, strict=True):
        assert torch.equal(grad, want.to(grad.dtype))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck(device: str, bias: bool, dropout_p: float) -> None:
    layer = make_layer(3, 9, 5, 2, torch.float64, bias=bias, device=device)

    def function(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same mask at each evaluation
        return lora_linear(x, layer.weight, layer.bias, lora_a, lora_b, SCALE, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(function, (layer.x, layer.lora_a, layer.lora_b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(device: str, dtype: torch.dtype) -> None:
    layer = make_layer(5, 16, 12, 4, dtype, torch.float32, device=device)
    x, weight, bias, lora_a, lora_b, dy = (tensor.detach() for tensor in layer)
    seed = next_seed(device, 0)
    torch.library.opcheck(torch.ops.fastlora.lora_linear.default, (x, weight, bias, lora_a, lora_b, SCALE, 0.1, seed))
    xa, keep = torch.randn(5, 4, device=device), torch.full((5, 8), 77, dtype=torch.uint8, device=device)
    for need in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            torch.ops.fastlora.lora_linear_backward.default,
            (dy, x, weight, lora_a, lora_b, xa, keep, SCALE, 0.1, *need),
        )


def test_compiles_whole(device: str) -> None:
    """torch.compile traces forward and backward as one graph, for any number of rows, and dropout stays drawn by torch's generator."""
    torch.compiler.reset()
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for M in (6, 11):
        layer = make_layer(M, 24, 16, 4, device=device)
        inputs = (layer.x, layer.lora_a, layer.lora_b)
        y, expected = (function(*layer[:5], SCALE) for function in (compiled, lora_linear))
        assert torch.equal(y, expected)
        for grad, want in zip(gradients(y, inputs, layer.dy), gradients(expected, inputs, layer.dy), strict=True):
            assert torch.equal(grad, want)
    y = compiled(*layer[:5], SCALE, dropout_p=0.5)
    assert y.isfinite().all() and not torch.equal(y, compiled(*layer[:5], SCALE, dropout_p=0.5))


def test_a_result_may_be_written_into() -> None:
    """As models do with `+=` and in-place activations; autograd forbids it for views that a function has made."""
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(6, 8)
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    results = (
        lambda: functional.lora_linear(x, weight, None, a, b, 1.0),
        lambda: functional.lora_linear_shared(x, [weight] * 2, [None] * 2, [a] * 2, [b] * 2, [1.0] * 2)[1],
        lambda: functional.frozen_linear(x, weight, None),
        lambda: functional.multi_lora(x, weight, None, [a], [b], [1.0], torch.tensor([0, -1])),
    )
    for result in results:
        (expected,) = torch.autograd.grad(torch.relu(result() + 1).sum(), x)
        y = result()
        y += 1
        (grad,) = torch.autograd.grad(torch.relu_(y).sum(), x)
        assert torch.equal(grad, expected)


def right_arguments() -> dict[str, Any]:
    x, weight, bias, lora_a, lora_b, _ = make_layer(6, 16, 12, 4)
    return {"x": x, "weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b, "scale": 2.0, "dropout_p": 0.1}


NAN, INF = float("nan"), float("inf")
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "x: a list": ("x", {"x": [1.0]}),
    "x: None": ("x", {"x": None}),
    "x: integers": ("x", {"x": torch.ones(6, 16, dtype=torch.int64)}),
    "x: no dimension": ("x", {"x": torch.tensor(1.0)}),
    "x: on meta": ("weight", {"x": torch.ones(6, 16, device="meta")}),
    "x: another K": ("weight", {"x": torch.ones(6, 15)}),
    "weight: None": ("weight", {"weight": None}),
    "weight: 1-D": ("weight", {"weight": torch.ones(16)}),
    "weight: no dimension": ("weight", {"weight": torch.tensor(1.0)}),
    "weight: transposed": ("weight", {"weight": torch.ones(16, 12)}),
    "weight: dtype": ("weight", {"weight": torch.ones(12, 16, dtype=torch.float16)}),
    "weight: quantised": ("weight", {"weight": torch.ones(12, 16, dtype=torch.int8)}),
    "weight: on meta": ("weight", {"weight": torch.ones(12, 16, device="meta")}),
    "weight: requires grad": ("weight", {"weight": torch.ones(12, 16, requires_grad=True)}),
    "bias: a number": ("bias", {"bias": 1.0}),
    "bias: 2-D": ("bias", {"bias": torch.ones(1, 12)}),
    "bias: another N": ("bias", {"bias": torch.ones(11)}),
    "bias: dtype": ("bias", {"bias": torch.ones(12, dtype=torch.float64)}),
    "bias: on meta": ("bias", {"bias": torch.ones(12, device="meta")}),
    "bias: requires grad": ("bias", {"bias": torch.ones(12, requires_grad=True)}),
    "lora_a: None": ("lora_a", {"lora_a": None}),
    "lora_a: 1-D": ("lora_a", {"lora_a": torch.ones(16)}),
    "lora_a: another K": ("lora_a", {"lora_a": torch.ones(4, 15)}),
    "lora_a: rank 0": ("lora_a", {"lora_a": torch.ones(0, 16), "lora_b": torch.ones(12, 0)}),
    "lora_a: dtype": ("lora_a", {"lora_a": torch.ones(4, 16).bfloat16(), "lora_b": torch.ones(12, 4).bfloat16()}),
    "lora_a: integers": ("lora_a", {"lora_a": torch.ones(4, 16).int()}),
    "lora_a: on meta": ("lora_a", {"lora_a": torch.ones(4, 16, device="meta")}),
    "lora_b: None": ("lora_b", {"lora_b": None}),
    "lora_b: another rank": ("lora_b", {"lora_b": torch.ones(12, 5)}),
    "lora_b: another N": ("lora_b", {"lora_b": torch.ones(11, 4)}),
    "lora_b: 3-D": ("lora_b", {"lora_b": torch.ones(12, 4, 1)}),
    "lora_b: dtype": ("lora_b", {"lora_b": torch.ones(12, 4).bfloat16()}),
    "lora_b: on meta": ("lora_b", {"lora_b": torch.ones(12, 4, device="meta")}),
    "scale: None": ("scale", {"scale": None}),
    "scale: a string": ("scale", {"scale": "2"}),
    "scale: a tensor": ("scale", {"scale": torch.tensor(2.0)}),
    "scale: NaN": ("scale", {"scale": NAN}),
    "scale: infinite": ("scale", {"scale": -INF}),
    "dropout_p: negative": ("dropout_p", {"dropout_p": -0.1}),
    "dropout_p: above 1": ("dropout_p", {"dropout_p": 1.1}),
    "dropout_p: NaN": ("dropout_p", {"dropout_p": NAN}),
    "dropout_p: None": ("dropout_p", {"dropout_p": None}),
}


CAST_AWAY = {"weight: dtype", "bias: dtype", "lora_a: dtype", "lora_b: dtype"}


@pytest.mark.parametrize(("name", "changes"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: .*expected"):
        lora_linear(**{**right_arguments(), **changes})


@pytest.mark.parametrize("case", [case for case in WRONG if case not in CAST_AWAY])
def test_wrong_arguments_under_autocast(case: str) -> None:
    """What autocast does not cast is as wrong as without it."""
    name, changes = WRONG[case]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises((TypeError, ValueError), match=rf"^{name}: .*expected"):
        lora_linear(**{**right_arguments(), **changes})


WRONG_RAW = {
    case: (name, changes)
    for case, (name, changes) in WRONG.items()
    if name not in ("scale", "dropout_p") and not case.endswith(("None", "on meta", "requires grad"))
}
WRONG_SEED = {
    "seed: dtype": ("seed", {"seed": torch.tensor(1, dtype=torch.int32)}),
    "seed: empty": ("seed", {"seed": torch.ones(0, dtype=torch.int64)}),
}
WRONG_BACKWARD = {
    "dy: another N": ("dy", {"dy": torch.ones(6, 11)}),
    "dy: another M": ("dy", {"dy": torch.ones(5, 12)}),
    "dy: 1-D": ("dy", {"dy": torch.ones(12)}),
    "dy: dtype": ("dy", {"dy": torch.ones(6, 12).bfloat16()}),
    "xa: another rank": ("xa", {"xa": torch.ones(6, 3)}),
    "xa: another M": ("xa", {"xa": torch.ones(5, 4)}),
    "xa: dtype": ("xa", {"xa": torch.ones(6, 4).bfloat16()}),
    "keep: dtype": ("keep", {"keep": torch.ones(6, 8, dtype=torch.bool)}),
    "keep: another M": ("keep", {"keep": torch.ones(5, 8, dtype=torch.uint8)}),
    "keep: too few bytes": ("keep", {"keep": torch.ones(6, 2, dtype=torch.uint8)}),
    "keep: 3-D": ("keep", {"keep": torch.ones(1, 6, 8, dtype=torch.uint8)}),
    "keep: a seed": ("keep", {"keep": torch.tensor(1)}),
}
WRONG_SHARED_KEEP = {
    "keep: dtype": ("keep", {"keep": torch.ones(1, 6, 8)}),
    "keep: one layer's": ("keep", {"keep": torch.ones(6, 8, dtype=torch.uint8)}),
    "keep: another G": ("keep", {"keep": torch.ones(2, 6, 8, dtype=torch.uint8)}),
    "keep: another M": ("keep", {"keep": torch.ones(1, 5, 8, dtype=torch.uint8)}),
    "keep: too few bytes": ("keep", {"keep": torch.ones(1, 6, 7, dtype=torch.uint8)}),
}


def call_the_native_operators_wrongly() -> None:
    right = {name: value.detach() if isinstance(value, Tensor) else value for name, value in right_arguments().items()}
    seed = {"seed": torch.tensor(1)}
    print_accepted("lora_linear_cpu", {**right, **seed}, WRONG_RAW | WRONG_SEED)
    forward = {name: value for name, value in right.items() if name not in ("bias", "scale", "dropout_p")}
    bits = {"xa": torch.ones(6, 4), "keep": torch.ones(6, 8, dtype=torch.uint8)}
    need = {"need_dx": True, "need_da": True, "need_db": True}
    rest = {**bits, "scale": 2.0, "dropout_p": 0.1, **need}
    wrong = {case: (name, changes) for case, (name, changes) in WRONG_RAW.items() if name != "bias"}
    print_accepted("lora_linear_backward_cpu", {"dy": torch.ones(6, 12), **forward, **rest}, wrong | WRONG_BACKWARD)
    listed = {name: [value] for name, value in forward.items() if name != "x"}
    shared = {"dy": [torch.ones(6, 12)], "x": forward["x"], **listed, "xa": bits["xa"], "keep": bits["keep"][None]}
    right = {**shared, "scale": [2.0], "dropout_p": [0.1], **need}
    print_accepted("lora_linear_shared_backward_cpu", right, WRONG_SHARED_KEEP)


@pytest.mark.skipif("cpu" not in implementations(OPERATOR, "cpu"), reason="the native extension is not built")
def test_wrong_arguments_to_the_native_operators() -> None:
    """They raise, naming the argument, also when no one checks before them; none ends the process."""
    assert run_apart("test_lora_linear", call_the_native_operators_wrongly) == ""


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
    inputs = [
        [make_layer(case.M, case.K, N, R, case.dtype, case.adapter_dtype, case.bias, device) for N, R in case.layers]
        for _ in inputs_of(implementation)
    ]
    for number, results in enumerate(zip(*(compare_shared(case, layers, device) for layers in inputs), strict=True)):
        assert_within_bound_over_inputs(f"result {number}", results)


def compare_shared(case: Shared, layers: list[Layer], device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Every y, dx, every da and db: the value, eager's and the exact one."""
    x = layers[0].x
    layers = [layer._replace(x=x) for layer in layers]
    p = case.dropout_p if isinstance(case.dropout_p, list) else [case.dropout_p] * len(layers)
    scales = [SCALE / (1 + i) for i in range(len(layers))]
    seeds = [None] * len(layers)
    if max(p) > 0:
        torch.manual_seed(1)
        seeds = list(torch.randint(0, 2**63 - 1, (len(layers),), dtype=torch.int64, device=device))
        torch.manual_seed(1)
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
    return list(zip(values, near, arranged(exact), strict=True))


def shared_arguments(device: str) -> tuple[list[Any], list[float], Tensor]:
    """x, weights, biases, A and B of three layers on 13 rows of 65; their dropout, the first one's none, and their seeds."""
    layers = [make_layer(13, 65, N, R, device=device) for N, R in ((24, 3), (16, 5), (33, 8))]
    columns = ([getattr(one, name).detach() for one in layers] for name in ("weight", "bias", "lora_a", "lora_b"))
    return [layers[0].x.detach(), *columns], [0.0, 0.5, 0.1], torch.tensor([3, 4, 2**40], device=device)


def test_keep_of_layers_that_share_x(device: str, implementation: str) -> None:
    """Each layer has the mask of its own seed; backward reads neither bits beyond the last column nor those of the layer that drops nothing."""
    (x, weight, bias, *adapters), p, seed = shared_arguments(device)
    scale = [1.0, -2.0, 0.5]
    _, xa, keep = torch.ops.fastlora.lora_linear_shared(x, weight, bias, *adapters, scale, p, seed)
    assert keep.dtype == torch.uint8 and keep.shape == (3, 13, 16)
    rows, read = torch.arange(13, device=device), torch.ones(3, 13, 65, dtype=torch.bool)
    read[0] = False
    for i in (1, 2):
        assert torch.equal(reference.read_keep(keep[i], 65), reference.keep_mask(seed[i], rows, 65, p[i]))
    dy = [torch.randn(13, len(one), device=device) for one in weight]
    grads, others = (
        torch.ops.fastlora.lora_linear_shared_backward(dy, x, weight, *adapters, xa, bits, scale, p, True, True, True)
        for bits in (keep, flip_unread(keep, read))
    )
    assert all(torch.equal(grad, other) for grad, other in zip(grads, others, strict=True))
    for dropless, none in (([0.3] * 3, None), ([1e-7] * 3, seed)):
        _, _, keep = torch.ops.fastlora.lora_linear_shared(x, weight, bias, *adapters, scale, dropless, none)
        assert keep.dtype == torch.uint8 and keep.shape == (0,)


def test_opcheck_of_layers_that_share_x(device: str) -> None:
    (x, weight, bias, *adapters), p, seed = shared_arguments(device)
    forward, backward = torch.ops.fastlora.lora_linear_shared, torch.ops.fastlora.lora_linear_shared_backward
    torch.library.opcheck(forward.default, (x, weight, bias, *adapters, [2.0] * 3, p, seed))
    _, xa, keep = forward(x, weight, bias, *adapters, [2.0] * 3, p, seed)
    dy = [torch.randn(13, len(one), device=device) for one in weight]
    arguments = (dy, x, weight, *adapters, xa, keep, [2.0] * 3, p)
    torch.library.opcheck(backward.default, (*arguments, True, True, True))


def test_layers_that_share_x_repeat_bitwise(device: str, implementation: str) -> None:
    layers = [make_layer(100, 129, N, 7, device=device)._replace() for N in (64, 33)]
    x = layers[0].x
    arguments = [[getattr(layer, name) for layer in layers] for name in ("weight", "bias", "lora_a", "lora_b")]

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        ys = lora_linear_shared(x, *arguments, [1.0, 2.0], dropout_p=0.3)
        return *ys, *torch.autograd.grad(ys, [x, *arguments[2], *arguments[3]], [layer.dy for layer in layers])

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_layers_that_share_x_name_the_wrong_one() -> None:
    one, other = make_layer(4, 8, 6, 2), make_layer(4, 8, 5, 2)
    with pytest.raises(ValueError, match=r"lora_a\[1\]: got float32 \[2, 9\]"):
        lora_linear_shared(
            one.x,
            [one.weight, other.weight],
            [None, None],
            [one.lora_a, torch.ones(2, 9)],
            [one.lora_b, other.lora_b],
            [1.0, 1.0],
        )
    with pytest.raises(ValueError, match="lora_b: got '1 entries', expected one for each of the 2 weights"):
        lora_linear_shared(one.x, [one.weight] * 2, [None] * 2, [one.lora_a] * 2, [one.lora_b], [1.0, 1.0])
