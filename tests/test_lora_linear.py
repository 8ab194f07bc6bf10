"""lora_linear: y = x Wᵀ + b + s d(x) Aᵀ Bᵀ, every implementation against the float64 reference, forward and backward."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bounds import (
    INPUTS,
    Compared,
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
    transposed,
)
from lora_arguments import one_layer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlora import functional, reference
from fastlora.functional import lora_linear

OPERATOR = "lora_linear"
SCALE = 1.7


def exactly(layer: Layer, scale: float, dropout_p: float, seed: Tensor | None) -> list[Tensor]:
    """y, dx, da, db in float64 by the reference."""
    arguments = one_layer(Layer(*map(double, layer)), scale, dropout_p, seed)
    y, _, *grads = arguments.both("reference", [double(layer.dy)])
    return [y, *grads]


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


def inputs_of(implementation: str) -> int:
    """Over how many errors are taken at first: Triton's interpreter would take minutes for as many as the others."""
    return 1 if implementation == "triton" else INPUTS


def check(draw: Callable[[], Layer], dropout_p: float, implementation: str) -> None:
    """Of each result, the errors over the layers that are drawn."""
    assert_within_bound_over_inputs(lambda: compared(draw(), dropout_p, SCALE), inputs_of(implementation))


def compared(layer: Layer, dropout_p: float, scale: float) -> dict[str, Compared]:
    before = [None if tensor is None else tensor.detach().clone() for tensor in layer]
    seed = next_seed(layer.x.device.type, 1) if dropout_p else None
    values, eager = fused(layer, scale, dropout_p), eagerly(layer, scale, dropout_p, seed)
    exact = exactly(layer, scale, dropout_p, seed)
    for name, tensor, copy in zip(Layer._fields, layer, before, strict=True):
        assert tensor is None or torch.equal(tensor, copy), f"{name} was written to"
    triples = ((value.detach(), near.detach(), right) for value, near, right in zip(values, eager, exact, strict=True))
    return dict(zip(("y", "dx", "da", "db"), triples, strict=True))


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
    check(lambda: make_layer(*sizes, device=device), dropout_p, implementation)


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
    check(lambda: layout(make_layer(19, 33, 24, 5, dtype, device=device)), 0.1, implementation)


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
    arguments = one_layer(layer, SCALE, 0.1, next_seed(device, 1))
    _, *state = arguments.forward(implementation)
    everything = arguments.backward(implementation, [layer.dy], *state)
    some = arguments.backward(implementation, [layer.dy], *state, *wanted)
    for need, part, full in zip(wanted, some, everything, strict=True):
        assert torch.equal(part, full) if need else part.numel() == 0


def test_gradients_of_a_and_b_are_flat(device: str, implementation: str) -> None:
    """In their adapter's dtype, which may be wider than x's."""
    layer = make_layer(5, 24, 16, 4, torch.bfloat16, torch.float32, device=device)
    arguments = one_layer(layer, SCALE)
    dx, da, db = arguments.backward(implementation, [layer.dy], *arguments.forward(implementation)[1:])
    assert dx.shape == (5, 24) and dx.dtype == torch.bfloat16
    assert da.shape == (4 * 24,) and db.shape == (16 * 4,) and da.dtype == db.dtype == torch.float32


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


@pytest.mark.parametrize(("dropout_p", "drawn"), [(0.3, True), (0.3, False), (0.0, False)])
def test_shapes_on_meta_are_the_real_ones(dropout_p: float, drawn: bool) -> None:
    """Of all that the operator and its backward return, whatever is dropped and needed."""
    seed = torch.tensor([7]) if drawn else None
    real = one_layer(make_layer(5, 24, 16, 4), SCALE, dropout_p, seed)
    meta = real.mapped(lambda one: one.to("meta"))._replace(seed=None if seed is None else seed.to("meta"))
    forward, backward = torch.ops.fastlora.lora_linear, torch.ops.fastlora.lora_linear_backward
    ([y], *state), ([shape], *shapes) = (forward(*one.raw()) for one in (real, meta))
    assert [one.shape for one in (shape, *shapes)] == [one.shape for one in (y, *state)]
    assert [one.dtype for one in (shape, *shapes)] == [one.dtype for one in (y, *state)]
    for need in itertools.product((True, False), repeat=3):
        given = ((real, y, state), (meta, shape, shapes))
        grads, expected = (backward(*one.backward_arguments([dy], *own, *need)) for one, dy, own in given)
        assert [one.shape for one in grads] == [one.shape for one in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_xa(device: str, implementation: str, dtype: torch.dtype) -> None:
    """xa leaves in float32, within the bound: the backward of any other implementation may read it."""
    arguments = one_layer(make_layer(13, 65, 16, 4, dtype, device=device), SCALE, 0.1, next_seed(device, 1))
    _, xa, _ = arguments.forward(implementation)
    _, exact, _ = arguments.mapped(double).forward("reference")
    _, eager, _ = arguments.forward("reference")
    assert xa.shape == (1, 13, 4) and xa.dtype == torch.float32
    assert_within_bound("xa", xa, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("K", [1, 17, 64, 203])
def test_keep(device: str, implementation: str, K: int, dtype: torch.dtype) -> None:
    """keep holds the reference's mask, bit by bit; backward reads no bit beyond the last column."""
    layer = make_layer(13, K, 16, 4, dtype, device=device)
    seed = next_seed(device, 1)
    arguments = one_layer(layer, SCALE, 0.3, seed)
    _, xa, keep = arguments.forward(implementation)
    mask = reference.keep_mask(seed, torch.arange(13, device=device), K, 0.3)
    assert keep.dtype == torch.uint8 and keep.shape == (1, 13, reference.keep_bytes(K))
    assert torch.equal(reference.read_keep(keep[0], K), mask)
    grads, others = (
        arguments.backward(implementation, [layer.dy], xa, bits)
        for bits in (keep, flip_unread(keep, torch.ones_like(mask)[None]))
    )
    assert all(torch.equal(grad, other) for grad, other in zip(grads, others, strict=True))


@pytest.mark.parametrize("rows", [2, 13])
def test_keep_has_no_elements_where_nothing_is_dropped(device: str, implementation: str, rows: int) -> None:
    """Without a seed or with a p that rounds to 0; a backward that is given such a keep drops nothing, whatever p is."""
    layer, results = make_layer(rows, 24, 16, 4, device=device), []
    for p, seed in ((0.3, None), (1e-7, next_seed(device, 1)), (0.0, None)):
        arguments = one_layer(layer, SCALE, p, seed)
        [y], xa, keep = arguments.forward(implementation)
        assert keep.dtype == torch.uint8 and keep.shape == (0,)
        results.append([y, xa, *arguments.backward(implementation, [layer.dy], xa, keep)])
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


def test_what_drops_nothing_draws_nothing(device: str, implementation: str) -> None:
    """A run's random numbers do not depend on whether its layers are fastlora's."""
    before = torch.get_rng_state()
    dropped_ones(device, 5, 17, 0.0)
    dropped_ones(device, 5, 17, 0.5, training=False)
    assert torch.equal(torch.get_rng_state(), before)


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
    for seed in (next_seed(device, 0), None):
        arguments = one_layer(layer, SCALE, 0.1, seed)
        torch.library.opcheck(torch.ops.fastlora.lora_linear.default, arguments.raw())
    xa, keep = torch.randn(1, 5, 4, device=device), torch.full((1, 5, 8), 77, dtype=torch.uint8, device=device)
    for need in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            torch.ops.fastlora.lora_linear_backward.default,
            arguments.backward_arguments([layer.dy], xa, keep, *need),
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
