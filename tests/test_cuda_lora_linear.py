"""csrc/cuda/lora_linear.cu on a CPU: its threads as fibers, its tensor-core instructions lane by lane (emulated_cuda.h, emulated_ptx.h).

What a card does with the same instructions is not shown by this, only that every index, wait and barrier is right if the instructions are what
csrc/cuda/ptx.cuh says that they are.
"""

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import emulated
import pytest
import torch
from bounds import Layer, assert_within_bound, dense, double, gapped, make_layer, next_seed, transposed
from torch import Tensor

from fastlora import native, reference

SCALE = 1.7
NUMBERS = ("y", "xa", "dx", "da", "db")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

pytestmark = pytest.mark.skipif(not emulated.available(), reason="needs a C++20 compiler")


class Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 2))


class LoraLinear(ctypes.Structure):
    _fields_ = (
        *((size, ctypes.c_int64) for size in "MKNR"),
        ("dtype", ctypes.c_int),
        ("adapter_dtype", ctypes.c_int),
        *((name, Matrix) for name in ("x", "weight", "lora_a", "lora_b")),
        ("bias", ctypes.c_void_p),
        ("bias_stride", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("dropout_p", ctypes.c_double),
    )


class Forward(ctypes.Structure):
    _fields_ = (
        ("layer", LoraLinear),
        *((name, ctypes.c_void_p) for name in ("seed", "y", "xa")),
        ("xa_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("keep", "workspace")),
    )


class Backward(ctypes.Structure):
    _fields_ = (
        ("layer", LoraLinear),
        ("dy", Matrix),
        ("xa", ctypes.c_void_p),
        ("xa_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("keep", "dx")),
        ("adds", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("da", "db", "workspace")),
    )


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    sources = [emulated.ROOT / "csrc/cuda/lora_linear.cu", emulated.ROOT / "tests/emulated_lora_linear.cpp"]
    loaded = ctypes.CDLL(str(emulated.build(sources)))
    loaded.workspace.restype = loaded.backward_workspace.restype = ctypes.c_int64
    return loaded


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def card(request: pytest.FixtureRequest, library: ctypes.CDLL) -> ctypes.CDLL:
    library.emulated_capability(request.param)
    return library


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def matrix(tensor: Tensor) -> Matrix:
    return Matrix(tensor.data_ptr(), (ctypes.c_int64 * 2)(*tensor.stride()))


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory full of NaN, with a row more than told: a write beyond the end shows."""
    return torch.full((shape[0] + 1, *shape[1:]), torch.nan if dtype.is_floating_point else 0xAA, dtype=dtype)


def whole(tensor: Tensor) -> Tensor:
    """Without the row more, which is as it was."""
    after = tensor[-1]
    assert (after.isnan() if after.is_floating_point() else after == 0xAA).all()
    return tensor[:-1]


def workspace(size: int) -> Tensor:
    """`size` bytes of ones, that is NaN, at a multiple of 256."""
    memory = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
    return memory[-memory.data_ptr() % 256 :]


class Results(NamedTuple):
    y: Tensor
    xa: Tensor
    keep: Tensor | None  # where something is dropped
    dx: Tensor | None  # where they are needed
    da: Tensor | None
    db: Tensor | None


def call(function: Any, given: ctypes.Structure) -> None:
    message = ctypes.create_string_buffer(1024)
    function(ctypes.byref(given), message)
    if message.value:
        raise RuntimeError(message.value.decode())


def run(
    card: ctypes.CDLL,
    layer: Layer,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool] = (True, True, True),  # dx, da, db
) -> Results:
    x, weight, bias, lora_a, lora_b, dy = (None if t is None else t.detach() for t in layer)
    (M, K), (N, R) = x.shape, lora_b.shape
    given = LoraLinear(
        M, K, N, R, DTYPES[x.dtype], DTYPES[lora_a.dtype], *map(matrix, (x, weight, lora_a, lora_b)),
        pointer(bias), 0 if bias is None else bias.stride(0), SCALE, dropout_p,
    )  # fmt: skip
    y, xa = poisoned(M, N, dtype=x.dtype), poisoned(M, R, dtype=torch.float32)
    keep = poisoned(M, 8 * -(-K // 64), dtype=torch.uint8) if seed is not None else None
    space = workspace(card.workspace(ctypes.byref(given)))
    call(card.forward, Forward(given, *map(pointer, (seed, y, xa)), R, *map(pointer, (keep, space))))
    shapes = ((M, K, x.dtype), (R, K, lora_a.dtype), (N, R, lora_a.dtype))
    grads = [
        poisoned(*sizes, dtype=dtype) if need else None for need, (*sizes, dtype) in zip(needs, shapes, strict=True)
    ]
    space = workspace(card.backward_workspace(ctypes.byref(given)))
    dx, *others = map(pointer, (*grads, space))
    call(card.backward, Backward(given, matrix(dy), pointer(xa), R, pointer(keep), dx, False, *others))
    return Results(*(tensor if tensor is None else whole(tensor) for tensor in (y, xa, keep, *grads)))


CUDA = native.lora_linear_cuda, torch.ops.fastlora.lora_linear_backward_cuda
REFERENCE = reference.lora_linear, reference.lora_linear_backward


def run_layer(
    functions: tuple[Callable[..., Any], Callable[..., Any]],
    layer: Layer,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    lay: Callable[[Tensor], Tensor] = lambda keep: keep,
) -> dict[str, Tensor]:
    """By name y, xa [M, R], keep, dx, da, db: what an operator's forward and backward give for one layer with one adapter.

    lay: how keep lies, for the backward.
    """
    x, weight, bias, lora_a, lora_b, dy = layer
    (forward, backward), numbers = functions, ([SCALE], [dropout_p])
    seeds = None if seed is None else seed.view(1)
    [y], xa, keep = forward(x, [weight], [bias], [lora_a], [lora_b], *numbers, seeds, None, None)
    saved = xa, lay(keep)
    dx, da, db = backward([dy], x, [weight], [lora_a], [lora_b], *saved, *numbers, None, None, True, True, True)
    return {"y": y, "xa": xa[0], "keep": keep, "dx": dx, "da": da.view(lora_a.shape), "db": db.view(lora_b.shape)}


def check(card: ctypes.CDLL, layer: Layer, dropout_p: float) -> None:
    layer = Layer(*(None if tensor is None else tensor.detach() for tensor in layer))
    seed = next_seed("cpu", 1) if dropout_p else None
    got = run(card, layer, dropout_p, seed)
    exact = run_layer(REFERENCE, Layer(*map(double, layer)), dropout_p, seed)
    eager = run_layer(REFERENCE, Layer(*map(dense, layer)), dropout_p, seed)
    for name in NUMBERS:
        assert_within_bound(name, getattr(got, name), eager[name], exact[name])
    if seed is not None:
        M, K = layer.x.shape
        bits = (got.keep[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        kept = reference.keep_mask(seed, torch.arange(M), K, dropout_p)
        assert torch.equal(bits.flatten(1)[:, :K].bool(), kept)


class Case(NamedTuple):
    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    dropout_p: float = 0.0


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "plain": Case(70, 96, 80, 8),
    "dropout": Case(70, 96, 80, 8, dropout_p=0.1),
    "float16, float32 adapter": Case(70, 96, 80, 8, F16, F32, dropout_p=0.3),
    "rank 1": Case(33, 80, 96, 1, BF16, F32, bias=False, dropout_p=0.1),
    "rank 16": Case(130, 200, 136, 16, BF16, F32, dropout_p=0.1),
    "rank 40": Case(70, 96, 80, 40, F16, dropout_p=0.5),
    "rank 33": Case(70, 200, 104, 33, BF16, F32, dropout_p=0.1),
    "rank 64": Case(100, 304, 120, 64, F16, F32, dropout_p=0.1),
    "rank 130": Case(20, 136, 264, 130, BF16, F32, dropout_p=0.1),
    "long sums": Case(40, 1104, 600, 3, dropout_p=0.1),
    "one row": Case(1, 64, 48, 5, dropout_p=0.1),
    "no rows": Case(0, 64, 48, 5, dropout_p=0.1),
    "all dropped": Case(19, 72, 40, 4, dropout_p=1.0),
    "two parts": Case(1100, 72, 40, 4, dropout_p=0.1),
    "two parts of rank 20": Case(1100, 72, 40, 20, dropout_p=0.1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bound(card: ctypes.CDLL, case: Case) -> None:
    *sizes, dropout_p = case
    check(card, make_layer(*sizes), dropout_p)


def spaced(tensor: Tensor) -> Tensor:
    """The same values in a larger tensor of NaN, rows at multiples of 16 bytes."""
    rows, columns = tensor.shape
    around = torch.full((rows + 2, -(-columns // 8) * 8 + 16), torch.nan, dtype=tensor.dtype)
    return around[1:-1, 8 : 8 + columns].copy_(tensor.detach())


def odd_layer() -> Layer:
    """Odd sizes, of views into NaN: what is read beyond a matrix shows."""
    layer = make_layer(37, 65, 51, 3, BF16, F32)
    wide = {name: spaced(getattr(layer, name)) for name in ("x", "weight", "dy")}
    return layer._replace(
        bias=layer.bias.repeat_interleave(2)[::2], lora_a=gapped(layer.lora_a), lora_b=transposed(layer.lora_b), **wide
    )


def test_odd_sizes_with_gaps(card: ctypes.CDLL) -> None:
    check(card, odd_layer(), 0.1)


@pytest.fixture
def in_any_order(card: ctypes.CDLL) -> Iterator[Callable[[bool, int], None]]:
    """Sets whether threads and blocks run in descending order, and how many blocks begin together."""

    def set_order(descending: bool, together: int) -> None:
        card.emulated_descending(descending)
        card.emulated_together(together)

    yield set_order
    set_order(False, 1)


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)], ids=str)
def test_gradients_in_any_order(
    card: ctypes.CDLL, in_any_order: Callable[[bool, int], None], needs: tuple[bool, bool, bool]
) -> None:
    """Bitwise: a wait that is missing would show, as would a sum whose order depends on who comes first."""
    # Three tiles are shrunk: of two blocks one is at the last of them while the other begins with what needs it.
    layer = make_layer(72, 136, 704, 20, BF16, F32)
    seed = torch.tensor(5)
    first = run(card, layer, 0.1, seed)
    wanted = first._replace(**{name: None for name, need in zip(("dx", "da", "db"), needs, strict=True) if not need})
    for descending, together in ((False, 2), (True, 1)):
        in_any_order(descending, together)
        for value, other in zip(wanted, run(card, layer, 0.1, seed, needs), strict=True):
            assert (value is None and other is None) or torch.equal(value, other)


WRONG: dict[str, tuple[str, Callable[[Layer], Layer]]] = {
    "x: odd rows": ("x", lambda layer: layer._replace(x=torch.ones(6, 17, dtype=BF16)[:, 1:])),
    "x: unaligned": ("x", lambda layer: layer._replace(x=torch.ones(6, 24, dtype=BF16)[:, 1:17])),
    "x: transposed": ("x", lambda layer: layer._replace(x=transposed(layer.x))),
    "x: expanded": ("x", lambda layer: layer._replace(x=layer.x[:1].expand(6, 16))),
    "x: float32": ("x", lambda layer: Layer(*(tensor.detach().float() for tensor in layer))),
    "weight: neither rows nor columns side by side": (
        "weight",
        lambda layer: layer._replace(weight=gapped(layer.weight)),
    ),
    "weight: no columns": (
        "weight",
        lambda layer: layer._replace(x=layer.x[:, :0], weight=layer.weight[:, :0], lora_a=layer.lora_a[:, :0]),
    ),
    "weight: no rows": (
        "weight",
        lambda layer: layer._replace(
            weight=layer.weight[:0], bias=None, lora_b=layer.lora_b[:0], dy=layer.dy[:, :0].contiguous()
        ),
    ),
    "lora_a: rank 513": ("lora_a", lambda layer: make_layer(6, 16, 24, 513, BF16)),
}


@pytest.mark.parametrize(("name", "change"), WRONG.values(), ids=WRONG)
def test_what_the_kernels_do_not_take(card: ctypes.CDLL, name: str, change: Callable[[Layer], Layer]) -> None:
    with pytest.raises(RuntimeError, match=rf"^{name}: got .*expected"):
        run(card, change(make_layer(6, 16, 24, 4, BF16)), 0.0, None)


def test_dy_is_named(card: ctypes.CDLL) -> None:
    layer = make_layer(6, 16, 24, 4, BF16)
    with pytest.raises(RuntimeError, match="^dy: got .*expected"):
        run(card, layer._replace(dy=transposed(layer.dy)), 0.0, None)


@pytest.mark.parametrize("number", [0, 1])
def test_a_thread_that_no_card_has_seen(card: ctypes.CDLL, number: int) -> None:
    """Autograd's, say: the card's context is not there until the runtime is told of the card, and then it is that card's."""

    def work() -> None:
        card.emulated_device(number)
        check(card, make_layer(20, 96, 80, 8, torch.bfloat16), 0.1)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(work).result()
