"""frozen/products.py: products with frozen weights, within the bound by every way that there is on a CPU, and wrong arguments by name."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_within_bound, dense, double, gapped, gradients, transposed
from packed_weights import (  # noqa: F401  (a fixture)
    FLOATS,
    NEEDS_COPIES,
    check,
    eagerly_packed,
    few_rows,
    frozen,
    held_bytes,
)
from torch import Tensor, nn

from fastlora import ops
from fastlora.choice import table
from fastlora.frozen import packed, products
from fastlora.frozen.packed import Budget
from fastlora.functional import frozen_linear

pytestmark = NEEDS_COPIES
OPERATOR = "frozen_linear"


def go(way: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(table, "forced_way", way)
    patch.setattr(products, "_few_rows", few_rows)


def draw_x(M: int, K: int, dtype: torch.dtype, layout: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    x = torch.randn(M, K).to(dtype)
    return x if layout is None else layout(x)


EACH_WAY = pytest.mark.parametrize("way", table.WAYS["cpu", "frozen_linear"])


@EACH_WAY
@FLOATS
def test_bound(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    shapes = [(37, 65, 48), (8, 33, 65), (1, 64, 48), (1, 1, 1), (0, 12, 7), (5, 0, 7), (5, 12, 0), (130, 300, 201)]
    for number, (M, K, N) in enumerate(shapes):
        weight = nn.Parameter((torch.randn(N, K) / max(K, 1) ** 0.5).to(dtype), requires_grad=False)
        packed.register(weight, Budget())
        draw = partial(draw_x, M, K, dtype)
        check(draw, weight, None if number % 2 else torch.randn(N).to(dtype))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaps": gapped,
    "transposed": transposed,
    "every other": lambda tensor: tensor.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "expanded": lambda tensor: tensor[:1, :1].expand_as(tensor),
    "one row, expanded": lambda tensor: tensor[:1].expand_as(tensor),
}


@EACH_WAY
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(way: str, layout: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    for dtype in ops.KERNEL_DTYPES:
        weight = (torch.randn(24, 33) / 6).to(dtype)
        for of_x, right in ((layout, weight), (None, layout(weight)), (layout, layout(weight))):
            packed.register(right, Budget())
            check(partial(draw_x, 7, 33, dtype, of_x), right, torch.randn(48).to(dtype)[::2])


def test_dy_of_any_layout() -> None:
    weight = frozen(24, 33)
    packed.register(weight, Budget())
    for dy in (torch.ones(()).expand(7, 24), transposed(torch.randn(7, 24)), gapped(torch.randn(7, 24))):
        x = torch.randn(7, 33, requires_grad=True)
        (dx,) = gradients(frozen_linear(x, weight, None), [x], dy)
        assert_within_bound("dx", dx, dense(dy) @ weight, double(dy) @ double(weight))


def test_the_ways_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests take for granted: each way is taken."""
    calls: list[str] = []

    def watch(name: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def multiply(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
            calls.append("packed" if weight.is_mkldnn else name)
            return call(x, weight, *rest)

        return multiply

    monkeypatch.setattr(products, "_few_rows", few_rows)
    for name, attribute in (("plain", "_linear_pointwise"), ("product", "_product"), ("few_rows", "_few_rows")):
        monkeypatch.setattr(products, attribute, watch(name, getattr(products, attribute)))
    monkeypatch.setattr(F, "linear", watch("torch", F.linear))
    weight, x = frozen(24, 33), torch.randn(7, 33)
    packed.register(weight, Budget())
    for way in table.WAYS["cpu", "frozen_linear"]:
        monkeypatch.setattr(table, "forced_way", way)
        calls.clear()
        frozen_linear(x, weight, None)
        assert calls == [way]
    with torch.backends.mkldnn.flags(enabled=False):
        for way in ("plain", "packed"):
            monkeypatch.setattr(table, "forced_way", way)
            calls.clear()
            frozen_linear(x, weight, None)
            assert calls == ["torch"]
            assert products.describe(weight, torch.float32, 7) == "torch, not measured on this kind of CPU"


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0), (2, 1, 3)], ids=str)
def test_leading_dimensions(device: str, implementation: str, shape: tuple[int, ...]) -> None:
    weight, bias = frozen(12, 20).to(device), torch.randn(12, device=device)
    x = torch.randn(*shape, 20, device=device, requires_grad=True)
    y = frozen_linear(x, weight, bias)
    assert y.shape == (*shape, 12) and torch.allclose(y, F.linear(x, weight, bias), atol=1e-5)
    assert gradients(y, [x], torch.ones_like(y))[0].shape == x.shape


def test_float64_is_the_references() -> None:
    weight, bias = frozen(5, 9, torch.float64), torch.randn(5, dtype=torch.float64)
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, weight, bias), (x,))


@FLOATS
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(5, 16).to(dtype), torch.randn(12, 16).to(dtype), torch.randn(12).to(dtype)
    torch.library.opcheck(torch.ops.fastlora.frozen_linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.fastlora.frozen_linear_backward.default, (torch.randn(5, 12).to(dtype), weight))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base: torch.dtype) -> None:
    weight, bias, x = frozen(12, 16, base), torch.randn(12).to(base), torch.randn(2, 5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, eager = frozen_linear(x, weight, bias), F.linear(x, weight, bias)
    assert y.dtype == eager.dtype == torch.bfloat16 and torch.allclose(y, eager, atol=0.02)
    (dx,), (eager_dx,) = (gradients(out, [x], torch.ones_like(out)) for out in (y, eager))
    assert dx.dtype == eager_dx.dtype and torch.allclose(dx, eager_dx, atol=0.05)


@EACH_WAY
def test_the_operator_itself_ignores_autocast(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called past the dispatcher, whatever is on around it."""
    go(way, monkeypatch)
    x, weight = torch.randn(5, 16), torch.randn(12, 16)
    with torch.no_grad():
        expected = products.frozen_linear(x, weight, None)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert torch.equal(products.frozen_linear(x, weight, None), expected)
            assert products.frozen_linear_backward(expected, weight).dtype == torch.float32


def test_nothing_of_x_is_kept() -> None:
    kept: list[Tensor] = []
    weight = frozen(12, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        frozen_linear(torch.randn(5, 16, requires_grad=True), weight, None)
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]


def test_compiles_whole() -> None:
    torch.compiler.reset()
    weight, bias = frozen(12, 24), torch.randn(12)
    packed.register(weight, Budget())
    compiled = torch.compile(frozen_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for M in (6, 11):
        x, dy = torch.randn(M, 24, requires_grad=True), torch.randn(M, 12)
        y, expected = (function(x, weight, bias) for function in (compiled, frozen_linear))
        assert torch.equal(y, expected)
        assert torch.equal(*(gradients(out, [x], dy)[0] for out in (y, expected)))
    assert held_bytes() == 2 * weight.nbytes
    torch.compiler.reset()


X, WEIGHT, BIAS = torch.ones(6, 16), torch.ones(12, 16), torch.ones(12)


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("x", TypeError, (None, WEIGHT, BIAS)),
        ("x", ValueError, (torch.ones(()), WEIGHT, BIAS)),
        ("x", ValueError, (X.int(), WEIGHT, BIAS)),
        ("weight", TypeError, (X, None, BIAS)),
        ("weight", ValueError, (X, WEIGHT.T, BIAS)),
        ("weight", ValueError, (X, WEIGHT.bfloat16(), BIAS)),
        ("weight", ValueError, (X, WEIGHT.to("meta"), BIAS)),
        ("weight", ValueError, (X, nn.Parameter(WEIGHT), BIAS)),
        ("bias", ValueError, (X, WEIGHT, torch.ones(11))),
        ("bias", ValueError, (X, WEIGHT, BIAS.bfloat16())),
        ("bias", ValueError, (X, WEIGHT, nn.Parameter(BIAS))),
    ],
)
def test_wrong_arguments(name: str, error: type[Exception], arguments: tuple) -> None:
    with pytest.raises(error, match=rf"^{name}: .*expected"):
        frozen_linear(*arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x", (torch.ones(16), WEIGHT, BIAS)),
        ("x", (torch.ones(6, 15), WEIGHT, BIAS)),
        ("weight", (X.bfloat16(), WEIGHT, BIAS.bfloat16())),
        ("bias", (X, WEIGHT, torch.ones(13))),
        ("bias", (X, WEIGHT, BIAS.half())),
        ("dy", (torch.ones(6, 16), WEIGHT)),
        ("weight", (torch.ones(6, 12).half(), WEIGHT)),
    ],
)
def test_wrong_arguments_to_the_operators_themselves(name: str, arguments: tuple) -> None:
    op = products.frozen_linear if len(arguments) == 3 else products.frozen_linear_backward
    with pytest.raises(ValueError, match=rf"^{name}: .*expected"):
        op(*arguments)


def test_what_cannot_have_a_copy_goes_the_way_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []

    def way(dtype: torch.dtype, rows: int, weight: Tensor, without_copy: bool = False) -> str:
        asked.append((rows, without_copy))
        return "plain" if without_copy else "packed"

    monkeypatch.setattr(products, "_way", way)
    assert products._find_way(X, WEIGHT) == ("plain", None)
    assert asked == [(6, False), (6, True)]
