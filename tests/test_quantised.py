"""frozen/quantised.py and csrc/cpu/quantised.h: weights in 4 bits and 8, bit for bit the reference's, and products with them within the bound."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bounds import Compared, assert_within_bound, assert_within_bound_over_inputs, gapped, print_accepted
from quantised_weights import KINDS, dense, stored, weight

from fastlora import functional, ops
from fastlora.choice import table
from fastlora.frozen import products, quantised

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# N, K: nothing, one pair, less than a vector, blocks that end within rows and within vectors, more than a block.
SHAPES = ((0, 64), (5, 0), (1, 2), (7, 10), (9, 130), (6, 100), (33, 64), (40, 192))

pytestmark = pytest.mark.skipif(
    not ops.availability()[1].present,
    reason="the native extension is not built (make demo, or pip install -e . with g++)",
)


def check_elements() -> None:
    """In a process of its own, too, for every instruction set (test_native.py)."""
    for kind in KINDS:
        for N, K in SHAPES:
            for dtype in FLOATS:
                torch.manual_seed(N + K)
                one = weight(kind, N, K, dtype)
                whole = dense(one)
                assert torch.equal(one.panel(0, N, 0, K), whole), (kind, N, K, dtype)
                if N > 3 and K > 8:
                    assert torch.equal(one.panel(1, N - 2, 2, K - 6), whole[1 : N - 1, 2 : K - 4]), (kind, N, K, dtype)


def check_products() -> None:
    for kind in KINDS:
        for dtype in FLOATS:
            for N, K in SHAPES:
                for M in (0, 1, 2, 3, 5, 8, 9, 33):
                    torch.manual_seed(M + N + K)
                    one = weight(kind, N, K, dtype)
                    assert_within_bound_over_inputs(partial(products_of, one, M))


def products_of(one: quantised.QuantisedWeight, M: int) -> dict[str, Compared]:
    """Of M random rows, each way."""
    w = dense(one)
    x, bias, dy = (torch.randn(*size).to(w.dtype) for size in ((M, w.shape[1]), (len(w),), (M, len(w))))
    y, dx = products.frozen_linear(gapped(x), one, gapped(bias)), products.frozen_linear_backward(gapped(dy), one)
    return {
        "y": (y, F.linear(x, w, bias), F.linear(x.double(), w.double(), bias.double())),
        "dx": (dx, dy @ w, dy.double() @ w.double()),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_rows_with_an_adapter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the kernel that adds an adapter to a few rows in one pass: for it the weight would be dequantised as a whole."""
    monkeypatch.setattr(quantised, "_dense", None)

    def compute() -> dict[str, Compared]:
        one = weight(kind, 20, 64, torch.float32)
        x, a, b = torch.randn(2, 64), torch.randn(3, 64), torch.randn(20, 3)
        (y,), xa, keep = products.lora_linear(x, [one], [None], [a], [b], [2.0], [0.0], None, None, None)
        (eager, eager_xa), (exact, exact_xa) = (
            (x @ w.T + 2 * (x @ a.T) @ b.T, x @ a.T)
            for x, w, a, b in ((x, dense(one), a, b), (x.double(), dense(one).double(), a.double(), b.double()))
        )
        assert keep.numel() == 0
        return {"xa": (xa[0], eager_xa, exact_xa), "y": (y, eager, exact)}

    assert_within_bound_over_inputs(compute)


def test_elements_are_the_references_bit_for_bit() -> None:
    check_elements()


def test_products_are_within_the_bound() -> None:
    check_products()


@pytest.mark.parametrize("factor", [1e-41, 3e38, float("inf"), float("nan")])
def test_elements_at_the_ends_of_the_range(factor: float) -> None:
    """Subnormal numbers are kept, also in bfloat16, whose instructions would make them zero."""
    made = stored("four bits", 4, 64)
    made = made._replace(factor=torch.full_like(made.factor, factor))
    for dtype in FLOATS:
        one = quantised.QuantisedWeight(made, "four bits", dtype, dtype)
        torch.testing.assert_close(one.panel(0, 4, 0, 64), dense(one), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("way", table.WAYS["cpu", "frozen_linear"])
def test_panels_go_every_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight in several panels, the last of them smaller; a panel has no packed copy, and torch's way stands for that."""
    monkeypatch.setattr(table, "forced_way", way)
    monkeypatch.setattr(quantised, "PANEL", 64 * 130)
    one = weight("four bits, double", 200, 130, torch.float32)
    w = dense(one)
    assert quantised.panels(one, 0) == [(0, 64), (64, 64), (128, 64), (192, 8)]
    assert quantised.panels(one, 1) == [(0, 64), (64, 64), (128, 2)]
    x, bias, dy = torch.randn(20, 130), torch.randn(200), torch.randn(20, 200)
    y = products.frozen_linear(x, one, bias), F.linear(x, w, bias), F.linear(x.double(), w.double(), bias.double())
    assert_within_bound("y", *y)
    assert_within_bound("dx", products.frozen_linear_backward(dy, one), dy @ w, dy.double() @ w.double())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The places of the panels that are dequantised: row, rows, column, columns."""
    places: list[tuple[int, ...]] = []
    panel = quantised.QuantisedWeight.panel
    noted = lambda self, *place: places.append(place) or panel(self, *place)  # noqa: E731
    monkeypatch.setattr(quantised.QuantisedWeight, "panel", noted)
    return places


@pytest.mark.parametrize("panel", [64 * 100, 100 * 100], ids=["two", "one"])
def test_no_more_than_a_panel_is_dequantised_at_a_time(
    panel: int, asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "PANEL", panel)
    monkeypatch.setattr(quantised, "PANEL_UNIT", 4)
    one, x = weight("four bits", 100, 100, torch.float32), torch.randn(20, 100)
    w = dense(one)
    two = panel < 100 * 100
    for bias in (None, torch.randn(100)):
        y = products.frozen_linear(x, one, bias)
        torch.testing.assert_close(y, F.linear(x, w, bias), rtol=1e-4, atol=1e-4)
        assert asked == ([(0, 64, 0, 100), (64, 36, 0, 100)] if two else [(0, 100, 0, 100)])
        asked.clear()
    torch.testing.assert_close(products.frozen_linear_backward(x, one), x @ w, rtol=1e-4, atol=1e-4)
    assert asked == ([(0, 100, 0, 64), (0, 100, 64, 36)] if two else [(0, 100, 0, 100)])


def test_a_few_rows_are_multiplied_by_what_is_dequantised_in_registers(asked: list[tuple[int, ...]]) -> None:
    one = weight("four bits", 48, 64, torch.float32)
    for rows in (1, 8, 9):
        products.frozen_linear(torch.randn(rows, 64), one, None)
        assert len(asked) == (rows == 9)


def test_a_product_of_the_librarys_own_goes_before() -> None:
    given: list[object] = []

    def own(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        given.extend((x, bias))
        return torch.full((len(x), 48), 3.0)

    one = quantised.QuantisedWeight(stored("int8", 48, 64), "int8", torch.float32, torch.float32, own)
    x, bias = torch.randn(2, 64), torch.randn(48)
    assert (products.frozen_linear(x, one, bias) == 3.0).all() and given[0] is x and given[1] is bias
    assert products.describe(one, torch.float32, 2).startswith("the library's own product from int8")


def test_another_dtype_computes_and_rounds_to_that_of_x() -> None:
    """As a layer of bitsandbytes does with its compute dtype."""
    one = weight("four bits", 48, 64, torch.float32, compute=torch.bfloat16)
    assert one.dtype is torch.float32
    for M in (2, 30):
        x, bias, dy = torch.randn(M, 64), torch.randn(48), torch.randn(M, 48)
        own = weight("four bits", 48, 64, torch.bfloat16)
        own.stored = one.stored
        y = products.frozen_linear(x.bfloat16(), own, bias.bfloat16()).float()
        assert torch.equal(products.frozen_linear(x, one, bias), y)
        dx = products.frozen_linear_backward(dy.bfloat16(), own).float()
        assert torch.equal(products.frozen_linear_backward(dy, one), dx)


def test_threads_change_nothing() -> None:
    one, x = weight("four bits, double", 300, 320, torch.bfloat16), torch.randn(2, 320).bfloat16()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append((one.panel(0, 300, 0, 320), products.frozen_linear(x, one, None)))
    finally:
        torch.set_num_threads(threads)
    for panel, y in results[1:]:
        assert torch.equal(panel, results[0][0]) and torch.equal(y, results[0][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forced", ["cpu", "reference"])
def test_the_operator_takes_it_as_any_weight(kind: str, forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its gradients and dropout, and whoever implements it: the reference sees W as a whole."""
    monkeypatch.setattr(ops, "forced", forced)
    one = weight(kind, 48, 64, torch.float32)
    x, a, b = torch.randn(20, 64), torch.randn(4, 64), torch.randn(48, 4)
    results = []
    for w in (one, dense(one)):
        given = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
        torch.manual_seed(5)
        y = functional.lora_linear(given[0], w, torch.ones(48), *given[1:], 0.5, dropout_p=0.25)
        y.square().sum().backward()
        results.append([y.detach(), *(tensor.grad for tensor in given)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_gradients_by_gradcheck() -> None:
    one = weight("four bits", 6, 8, torch.float64)
    given = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((5, 8), (3, 8), (6, 3))]
    torch.autograd.gradcheck(lambda x, a, b: functional.lora_linear(x, one, None, a, b, 0.5), given)


def test_an_operation_that_knows_nothing_of_it_gets_all_of_it() -> None:
    one = weight("int8", 5, 8, torch.float32)
    assert torch.equal(one + 0, dense(one)) and torch.equal(one.t().contiguous(), dense(one).t())
    assert torch.zeros_like(one, dtype=torch.float64).dtype is torch.float64
    assert torch.equal(one.__torch_dispatch__(torch.ops.aten.neg.default, (), (one,)), -dense(one))
    assert "int8" in repr(one)


def test_without_the_native_extension_the_reference_dequantises(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does for what csrc does not compute in, and for other devices."""
    one, wide = weight("int8", 5, 8, torch.float32), weight("int8", 5, 8, torch.float64)
    assert quantised.is_native() and quantised.takes_few_rows(one) and not quantised.takes_few_rows(wide)
    assert not quantised.takes_few_rows(weight("int8", 5, 0, torch.float32))
    assert quantised.takes_few_rows(weight("int8", 5, 1, torch.float32))
    assert wide.panel(1, 3, 2, 4).dtype is torch.float64
    expected, dequantise = one.panel(1, 3, 2, 4), quantised._dequantise
    made: list[torch.Tensor] = []
    monkeypatch.setattr(quantised, "_dequantise", lambda to, *rest: made.append(to) or dequantise(to, *rest))
    assert one.panel(1, 3, 2, 4) is made[0] and torch.equal(made[0], expected)
    parts = [part.to("meta") if isinstance(part, torch.Tensor) else part for part in one.stored]
    elsewhere = quantised.QuantisedWeight(quantised.Stored(*parts), "int8", torch.float32, torch.float32)
    assert elsewhere.is_meta and elsewhere.panel(1, 3, 2, 4).is_meta
    monkeypatch.setattr(quantised, "_few_rows", None)
    monkeypatch.setattr(quantised, "_dequantise", None)
    assert not quantised.is_native() and not quantised.takes_few_rows(one)
    found = one.panel(1, 3, 2, 4)
    assert torch.equal(found, expected) and found.is_contiguous()


def test_panels_of_what_is_smaller_than_one() -> None:
    assert quantised.panels(weight("int8", 5, 0, torch.float32), 0) == [(0, 5)]
    assert quantised.panels(weight("int8", 5, 0, torch.float32), 1) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised, "PANEL", 1)
        assert quantised.panels(weight("int8", 70, 4, torch.float32), 0) == [(0, 64), (64, 6)]
        patch.setattr(quantised, "PANEL", 128)
        assert quantised.panels(weight("int8", 130, 1, torch.float32), 0) == [(0, 128), (128, 2)]


def test_wrong_arguments_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    made = stored("four bits, double", 6, 128)
    right = {"to": torch.empty(6, 128), **made._asdict(), "row": 0, "column": 0}
    few = {"x": torch.randn(3, 128), **made._asdict(), "bias": torch.randn(6)}
    of_weight = {
        "packed: int8": ("packed", {"packed": made.packed.char()}),
        "packed: too few": ("packed", {"packed": made.packed[:-1]}),
        "packed: gaps": ("packed", {"packed": made.packed.repeat(1, 2)[:, :1]}),
        "code: fifteen": ("code", {"code": made.code[:15]}),
        "code: float64": ("code", {"code": made.code.double()}),
        "code: none, and four bits": ("packed", {"code": None}),
        "factor: too many": ("factor", {"factor": torch.rand(2)}),
        "factor: bfloat16": ("factor", {"factor": made.factor.bfloat16()}),
        "factor_codes: too few": ("factor_codes", {"factor_codes": made.factor_codes[:-1]}),
        "factor_codes: int8": ("factor_codes", {"factor_codes": made.factor_codes.char()}),
        "factor_codes: none": ("factor_code", {"factor_codes": None}),
        "factor_code: none": ("factor_code", {"factor_code": None}),
        "factor_code: too few": ("factor_code", {"factor_code": made.factor_code[:255]}),
        "block: 0": ("block", {"block": 0}),
        "block: odd": ("block", {"block": 63}),
        "factor_block: 0": ("factor_block", {"factor_block": 0}),
        "rows: too many": ("packed", {"rows": 7}),
        "rows: below 0": ("rows", {"rows": -1}),
        "columns: odd": ("columns", {"columns": 3, "rows": 256}),
    }
    of_panel = {
        "to: one dimension": ("to", {"to": torch.empty(128)}),
        "to: float64": ("to", {"to": torch.empty(6, 128).double()}),
        "to: gaps": ("to", {"to": torch.empty(6, 256)[:, ::2]}),
        "to: too high": ("row", {"to": torch.empty(7, 128)}),
        "row: below 0": ("row", {"row": -1}),
        "row: beyond": ("row", {"row": 1}),
        "column: beyond": ("column", {"column": 2}),
        "column: odd": ("column", {"to": torch.empty(6, 4), "column": 1}),
        "column: an odd width": ("column", {"to": torch.empty(6, 3)}),
    }
    of_rows = {
        "x: nine rows": ("x", {"x": torch.randn(9, 128)}),
        "x: no rows": ("x", {"x": torch.randn(0, 128)}),
        "x: another K": ("x", {"x": torch.randn(3, 126)}),
        "x: float64": ("x", {"x": torch.randn(3, 128).double()}),
        "bias: another N": ("bias", {"bias": torch.randn(7)}),
        "bias: dtype": ("bias", {"bias": torch.randn(6).bfloat16()}),
    }
    print_accepted("dequantise_cpu", right, {**of_weight, **of_panel})
    print_accepted("few_rows_quantised_cpu", few, {**of_weight, **of_rows})
    assert capsys.readouterr().out == ""


def test_products_refuse_what_does_not_fit() -> None:
    one = weight("int8", 5, 8, torch.float32)
    for x in (torch.randn(3, 7), torch.randn(8), torch.randn(3, 8).bfloat16()):
        with pytest.raises(ValueError, match="^(x|weight): got"):
            products.frozen_linear(x, one, None)
    with pytest.raises(ValueError, match="^dy: got"):
        products.frozen_linear_backward(torch.randn(3, 6), one)
    with pytest.raises(ValueError, match="^bias: got"):
        products.frozen_linear(torch.randn(3, 8), one, torch.randn(6))


def test_what_multiplies_is_told() -> None:
    words = [products.describe(weight("four bits", 96, 64, torch.float32), torch.float32, rows) for rows in (1, 100)]
    assert words[0] == "native C++, a few rows, from four bits as it is read"
    assert words[1] == "torch, not measured on this kind of CPU; four bits dequantised"
    words = [products.describe(weight("four bits", 96, 64, torch.float32), torch.float32, rows) for rows in (8, 9)]
    assert "as it is read" in words[0] and "dequantised" in words[1]
    nothing = products.describe(weight("int8", 5, 0, torch.float32), torch.float32, 1)
    assert nothing == "torch, not measured on this kind of CPU; int8 dequantised"
    big = weight("int8", 5000, 2**9, torch.float32)
    assert products.describe(big, torch.float32, 100).endswith("int8 dequantised, 4096 of 5000 rows at a time")
