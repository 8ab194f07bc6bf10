"""frozen/products.py's rules: what multiplies by a frozen weight, at which sizes, dtypes and strides; what a machine does that lacks some of it."""

import os
from typing import Any

import pytest
import torch
from bounds import Compared, assert_within_bound_over_inputs, dense, double
from measurements import entry, hold, needs_native
from torch import Tensor

from fastlora import ops, reference
from fastlora.choice import table
from fastlora.frozen import packed, products

HALF, WIDE = torch.float16, torch.float64


@pytest.fixture(autouse=True)
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has all of it, whatever this one has."""
    monkeypatch.setattr(products, "_few_rows", object())
    monkeypatch.setattr(products, "_product", object())
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    monkeypatch.setattr(packed, "packs", lambda dtype: True)
    monkeypatch.setattr(packed, "suits_onednn", lambda dtype: True)
    monkeypatch.setattr(packed, "has_library", lambda dtype: True)


def weight_of(N: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(N, K, dtype=dtype, device="meta")


FORWARD, BACKWARD = "frozen_linear", "frozen_linear_backward"


def measured(way: str, op: str = FORWARD, without_copy: str = "", **case: Any) -> table.Measurement:
    """That this way was the fastest, in 0.5 of torch's time."""
    return entry(0.5, op, **case)._replace(way=way, without_copy=without_copy)


@pytest.mark.parametrize("rows", [0, 1, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF, WIDE])
def test_a_few_rows(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 by row alone: by column its sums are one chain of roundings."""
    few = 1 <= rows <= 8 and dtype is not WIDE
    assert products.offers(FORWARD, "few_rows", dtype, rows) is few
    assert products.offers(BACKWARD, "few_rows", dtype, rows) is (few and dtype is not torch.float32)
    monkeypatch.setattr(products, "_few_rows", None)
    assert not products.offers(FORWARD, "few_rows", dtype, rows)


@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_the_native_product(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16, HALF):
        assert all(products.offers(op, "product", dtype, rows) is True for rows in (1, 512))
    assert products.offers(op, "product", WIDE, 64) is False
    monkeypatch.setattr(products, "_product", None)
    assert products.offers(op, "product", torch.float32, 64) is False


def test_what_torch_has_no_library_for_is_the_native_products_until_it_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed, "has_library", lambda dtype: dtype is torch.float32)
    for dtype, way in ((torch.float32, "torch"), (torch.bfloat16, "product"), (HALF, "product"), (WIDE, "torch")):
        for weight in (weight_of(64, 64, dtype), weight_of(64, 64, dtype).t()):
            assert way_of(64, weight) == way
            assert products._way(dtype, 64, weight, without_copy=True) == way
        assert way_of(64, weight_of(64, 128, dtype)[:, ::2]) == "torch"  # it has gaps
    told = products.describe(torch.zeros(64, 64), torch.bfloat16, 64)
    assert told == "native C++, since torch has no library's product of bfloat16 here"
    with monkeypatch.context() as forced:
        forced.setattr(table, "forced_way", "few_rows")
        assert products.describe(torch.zeros(64, 64), torch.bfloat16, 8) == "native C++, a few rows"
    hold(measured("torch", dtype="bfloat16"))
    assert way_of(64, weight_of(64, 64, torch.bfloat16)) == "torch"
    monkeypatch.setattr(products, "_product", None)
    assert way_of(64, weight_of(64, 64, HALF)) == "torch"


@pytest.mark.parametrize("available", [False, True])
@pytest.mark.parametrize("supported", [False, True])
def test_what_torch_has_a_library_for(available: bool, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: not supported, raising=False)
    found = {dtype for dtype in (torch.float32, torch.bfloat16, HALF, WIDE) if packed.has_library.__wrapped__(dtype)}
    assert found == {torch.float32, WIDE} | ({torch.bfloat16 if supported else HALF} if available else set())


@pytest.mark.parametrize(("way", "rule"), [("plain", "suits_onednn"), ("packed", "packs")])
def test_onednn_where_it_is_there_and_switched_on(way: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, rule, lambda dtype: dtype is HALF)
    for op in (FORWARD, BACKWARD):
        assert products.offers(op, way, HALF, 1) is True and products.offers(op, way, torch.bfloat16, 1) is False
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert products.offers(FORWARD, way, HALF, 1) is False


def test_torch_multiplies_anything_and_no_other_way_is_known() -> None:
    assert all(products.offers(FORWARD, "torch", dtype, rows) for dtype in (torch.float32, WIDE) for rows in (0, 9))
    assert not products.offers(FORWARD, "fused", torch.float32, 1)


def way_of(rows: int, weight: Tensor) -> str:
    return products._way(weight.dtype, rows, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF])
@pytest.mark.parametrize("rows", [1, 8, 9, 512])
def test_what_was_not_measured_is_torchs(rows: int, dtype: torch.dtype) -> None:
    hold(measured("product", dtype="float64"))
    assert way_of(rows, weight_of(64, 64, dtype)) == "torch"
    hold(entry(0.5, FORWARD, dtype=table.name_of(dtype)))  # as a table has it that knows of no ways
    assert way_of(rows, weight_of(64, 64, dtype)) == "torch"


def test_the_fastest_that_was_measured_by_dtype_rows_and_size() -> None:
    hold(
        measured("few_rows", rows=1),
        measured("product", rows=64),
        measured("torch", rows=512),
        measured("torch", rows=64, size="large"),
        measured("plain", rows=64, dtype="bfloat16"),
    )
    small, large = weight_of(64, 64), weight_of(2048, 2048)
    assert [way_of(rows, small) for rows in (1, 64, 512)] == ["few_rows", "product", "torch"]
    assert way_of(64, large) == "torch" and way_of(64, weight_of(64, 64, torch.bfloat16)) == "plain"


def test_nine_rows_are_not_of_the_class_that_few_were_measured_in() -> None:
    hold(measured("few_rows", rows=8), measured("product", rows=64), measured("torch", rows=512))
    assert [way_of(rows, weight_of(64, 64)) for rows in (4, 8)] == ["few_rows"] * 2
    assert [way_of(rows, weight_of(64, 64)) for rows in (9, 31, 32, 255)] == ["product"] * 4
    assert way_of(256, weight_of(64, 64)) == "torch"


def test_a_weight_by_column_is_multiplied_as_in_the_backward() -> None:
    """Whichever it is: a layer's that lies by row, in the backward, or GPT-2's, in the forward."""
    hold(measured("product"), measured("torch", BACKWARD))
    by_row, by_column = weight_of(64, 32), weight_of(32, 64).t()
    assert (way_of(64, by_row), way_of(64, by_column)) == ("product", "torch")
    assert (way_of(64, by_column.t()), way_of(64, by_row.t())) == ("product", "torch")
    assert way_of(64, weight_of(64, 1)) == way_of(64, weight_of(64, 1).t()) == "product"  # of one element a row


@pytest.mark.parametrize("way", ["few_rows", "product", "plain", "packed"])
def test_what_cannot_take_a_weight_with_gaps(way: str) -> None:
    hold(measured(way, rows=1), measured(way, BACKWARD, rows=1))
    wide = weight_of(6, 10)
    for weight in (wide[:, ::2], wide.t()[::2]):
        assert way_of(1, weight) == ("torch" if way in ("few_rows", "product") else way)
    assert way_of(1, wide[:, :5]) == way and way_of(1, wide[:, :5].t()) == ("torch" if way == "few_rows" else way)


def test_what_was_measured_and_is_not_here_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    hold(measured("product"))
    monkeypatch.setattr(products, "_product", None)
    assert way_of(64, weight_of(64, 64)) == "torch"


def test_without_a_copy_the_fastest_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that has none, and no room for one: it was measured as well."""
    hold(measured("packed", dtype="bfloat16", without_copy="plain"))
    x, weight = torch.ones(64, 4).bfloat16(), torch.ones(6, 4).bfloat16()
    for copy, expected in ((None, ("plain", None)), (weight, ("packed", weight))):
        monkeypatch.setattr(packed, "find_copy", lambda weight, copy=copy: copy)
        assert products._find_way(x, weight) == expected
    monkeypatch.setattr(packed, "find_copy", None)  # nobody asks
    assert products._find_way(x[:0], weight) == products._find_way(x, weight[:0]) == ("torch", None)
    hold(measured("plain", dtype="bfloat16"))
    assert products._find_way(x, weight) == ("plain", None)


def test_a_panel_goes_the_fastest_way_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is gone after the product."""
    ways, asked = iter(("packed", "plain", "product")), []
    monkeypatch.setattr(products, "_way", lambda *case, **more: asked.append((case, more)) or next(ways))
    x, panel = torch.ones(3, 4), torch.ones(6, 4)
    assert products._way_by_panel(x, panel) == "plain"
    case = (torch.float32, 3, panel)
    assert asked == [(case, {}), (case, {"without_copy": True})]
    assert products._way_by_panel(x, panel) == "product" and len(asked) == 3
    assert products._way_by_panel(x[:0], panel) == products._way_by_panel(x, panel[:0]) == "torch" and len(asked) == 3


def test_each_product_asks_for_its_own_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(table, "way", lambda *case: asked.append(case) or "torch")
    weight = torch.ones(6, 4, dtype=torch.bfloat16)
    products.frozen_linear(weight.new_ones(5, 4), weight, None)
    products.frozen_linear_backward(weight.new_ones(70, 6), weight)
    rest = ("cpu", torch.bfloat16)
    assert asked == [
        ("cpu", FORWARD, *rest, 5, 24, False, False),
        ("cpu", BACKWARD, *rest, 70, 24, False, False),
    ]


@pytest.mark.parametrize(
    ("way", "rows", "expected"),
    [
        ("torch", 64, "torch, nothing was measured to be faster"),
        ("plain", 64, "oneDNN, 0.50x of torch's time"),
        ("product", 64, "native C++, 0.50x of torch's time"),
        ("few_rows", 8, "native C++, a few rows, 0.50x of torch's time"),
        ("packed", 64, "oneDNN, packed when first called, 0.50x of torch's time"),
    ],
)
def test_it_is_told_with_its_reason(way: str, rows: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "find", lambda weight: Copies(0, True))
    weight = torch.zeros(64, 64)
    assert products.describe(weight, torch.float32, rows) == "torch, not measured on this kind of CPU"
    hold(measured(way, rows=rows))
    assert products.describe(weight, torch.float32, rows) == expected
    assert products.describe(weight, torch.bfloat16, rows) == "torch, not measured on this kind of CPU"
    if way in ("few_rows", "product"):
        assert products.describe(torch.zeros(64, 128)[:, ::2], torch.float32, rows) == "torch"


def test_a_way_that_nobody_measured_is_told_without_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(64, 64)
    hold(entry(0.5, FORWARD))
    assert products.describe(weight, torch.float32, 64) == "torch, not measured on this kind of CPU"
    monkeypatch.setattr(table, "forced_way", "product")
    assert products.describe(weight, torch.float32, 64) == "native C++"


def test_it_is_told_that_a_few_rows_are_multiplied_with_their_adapter() -> None:
    """Whatever was measured of the product alone."""
    weight, few = torch.zeros(64, 64), "native C++, a few rows, with the adapter"
    other = "torch, nothing was measured to be faster"
    hold(measured("torch", rows=8), measured("torch", BACKWARD, rows=8))
    assert [products.describe(weight, torch.float32, rows, fused=True) for rows in (8, 9)] == [few, other]
    assert products.describe(torch.zeros(32, 64).t(), torch.float32, 8, fused=True) == other


class Copies:
    """What packed.find returns of a weight."""

    def __init__(self, held: int, room: bool) -> None:
        self.bytes = held
        self.has_room = lambda weight: room


@pytest.mark.parametrize(
    ("copies", "expected"),
    [
        (Copies(3 * 2**19, True), "oneDNN, packed, 1.5 MiB, 0.50x of torch's time"),
        (Copies(0, True), "oneDNN, packed when first called, 0.50x of torch's time"),
        (Copies(0, False), "oneDNN, 1.0 MiB does not fit the pack_budget"),
        (None, "oneDNN, the fastest without a packed copy"),
    ],
)
def test_copies_are_told(copies: Copies | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "find", lambda weight: copies)
    hold(
        *(measured("packed", dtype=dtype, without_copy="plain") for dtype in ("bfloat16", "float32")),
        measured("torch", BACKWARD, dtype="bfloat16"),
    )
    weight = torch.zeros(512, 1024, dtype=torch.bfloat16)
    assert products.describe(weight, torch.bfloat16, 512) == expected
    # Autocast makes another tensor of it in every call.
    assert products.describe(weight, torch.float32, 512) == "oneDNN, the fastest without a packed copy"


def matrix(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, **options)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (matrix(2, 5), matrix(6, 4), None, r"^x: got shape \[2, 5\] for a weight \[6, 4\]"),
        (matrix(4), matrix(6, 4), None, r"^x: got shape \[4\]"),
        (matrix(2, 4), matrix(1, 6, 4), None, r"^x: got shape \[2, 4\] for a weight \[1, 6, 4\]"),
        (matrix(2, 4), matrix(6, 4, 1), None, r"^x: got shape \[2, 4\] for a weight \[6, 4, 1\]"),
        (matrix(2, 4, dtype=WIDE), matrix(6, 4), None, "^weight: got torch.float32 on cpu, expected torch.float64"),
        (matrix(2, 4), matrix(6, 4, device="meta"), None, "^weight: got torch.float32 on meta"),
        (matrix(2, 4), matrix(6, 4), matrix(5), r"^bias: got torch.float32 \[5\], expected torch.float32 \[6\]"),
        (matrix(2, 4), matrix(6, 4), matrix(6, dtype=WIDE), r"^bias: got torch.float64 \[6\]"),
    ],
)
def test_what_does_not_fit_is_named(x: Tensor, weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        products.frozen_linear(x, weight, bias)
    if bias is None:
        with pytest.raises(ValueError, match=message.partition(" for a")[0].replace("^x", "^dy")):
            products.frozen_linear_backward(x, weight.transpose(-1, -2))


def test_under_autocast_the_product_stays_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert products.frozen_linear(matrix(2, 4), matrix(6, 4), None).dtype is torch.float32
        assert torch.is_autocast_enabled("cpu")


@needs_native
@pytest.mark.parametrize("lies", ["by row", "by column", "with gaps"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_a_few_rows_of_layers_by_weights_that_lie_in_some_way(
    lies: str, layers: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 those by column and with gaps are multiplied by product and update, and so are more rows; the others in one call a layer."""
    called: list[str] = []
    for name in ("_few_rows_lora", "_few_rows_mixed", "_update"):
        own = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *args, own=own, name=name: called.append(name) or own(*args))
    shaped = {
        "by row": torch.randn(6, 12),
        "by column": torch.randn(12, 6).t(),
        "with gaps": torch.randn(6, 24)[:, ::2],
    }
    x, a, b, weight = torch.randn(rows, 12), torch.randn(2, 12), torch.randn(6, 2), shaped[lies]
    arguments = [weight] * layers, [None] * layers, [a] * layers, [b] * layers, [2.0] * layers, [0.0] * layers
    ys, xa, _ = products.lora_linear(x, *arguments, None, None, None)
    for y in ys:
        torch.testing.assert_close(y, x @ weight.t() + 2 * x @ a.t() @ b.t())
    one_by_one = ["_few_rows_lora"] if layers == 1 else ["_few_rows_mixed"] * layers
    assert called == (["_update"] if lies != "by row" or rows == 9 else one_by_one) and xa.shape == (layers, rows, 2)


@needs_native
def test_long_sums_by_column_are_as_near_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few rows in float32, with an adapter, which csrc would sum in one chain of roundings."""
    monkeypatch.setattr(products, "_few_rows", ops.native("few_rows_cpu"))
    weight, a, b = (torch.randn(2048, 64) / 2048**0.5).t(), torch.zeros(2, 2048), torch.zeros(64, 2)

    def compute() -> dict[str, Compared]:
        x = torch.randn(8, 2048)
        [y], _, _ = products.lora_linear(x, [weight], [None], [a], [b], [1.0], [0.0], None, None, None)
        return {"y": (y, dense(x) @ dense(weight).t(), double(x) @ double(weight).t())}

    assert_within_bound_over_inputs(compute)


@needs_native
def test_the_rank_of_a_layer_is_padded_to_the_familys() -> None:
    """xa of three layers with other ranks, in rows so few that csrc computes them one by one."""
    x, ranks = torch.randn(3, 8), (2, 5, 3)
    a = [torch.randn(r, 8) for r in ranks]
    b = [torch.randn(6, r) for r in ranks]
    weights, one = [torch.randn(6, 8) for _ in ranks], [1.0] * 3
    ys, xa, keep = products.lora_linear(x, weights, [None] * 3, a, b, one, [0.0] * 3, None, None, None)
    assert xa.shape == (3, 3, 5) and keep.numel() == 0
    for g, r in enumerate(ranks):
        torch.testing.assert_close(xa[g, :, :r], x @ a[g].t())
        torch.testing.assert_close(ys[g], x @ weights[g].t() + x @ a[g].t() @ b[g].t())


@needs_native
def test_a_few_mixed_rows_of_layers() -> None:
    """Each layer has its own adapters: two layers, two adapters, and a row without one."""
    x, weights = torch.randn(5, 12), [torch.randn(6, 12), torch.randn(7, 12)]
    a, b = [torch.randn(2, 12) for _ in range(4)], [torch.randn(n, 2) for n in (6, 6, 7, 7)]
    mixed = [2.0, 1.0, 3.0, 0.5], [0.0] * 4, None, torch.tensor([2, 0, 4, 1, 3]), torch.tensor([0, 1, 3, 5, 5])
    found, expected = (
        each(x, weights, [None] * 2, a, b, *mixed) for each in (products.lora_linear, reference.lora_linear)
    )
    torch.testing.assert_close(found[:2], expected[:2])


@needs_native
@pytest.mark.parametrize("rows", [3, 9])
def test_each_layer_has_a_bias_or_none(rows: int) -> None:
    """One bias for two layers is a mistake, and no shorter result."""
    x, w, a, b = torch.randn(rows, 12), torch.randn(6, 12), torch.randn(2, 12), torch.randn(6, 2)
    with pytest.raises(ValueError, match="shorter"):
        products.lora_linear(x, [w, w], [None], [a, a], [b, b], [1.0] * 2, [0.0] * 2, None, None, None)


@needs_native
def test_the_gradient_of_x_is_the_sum_over_layers() -> None:
    x, xa, keep = torch.randn(9, 12), torch.randn(2, 9, 2), torch.empty(0, dtype=torch.uint8)
    dy, weights = [torch.randn(9, n) for n in (6, 7)], [torch.randn(n, 12) for n in (6, 7)]
    a, b = [torch.randn(2, 12) for _ in range(2)], [torch.randn(n, 2) for n in (6, 7)]
    rest = a, b, xa, keep, [2.0, 1.0], [0.0] * 2, None, None, True, True, True
    found, expected = (
        each(dy, x, weights, *rest) for each in (products.lora_linear_backward, reference.lora_linear_backward)
    )
    torch.testing.assert_close(found[0], expected[0])


def test_the_budget_where_the_system_does_not_tell_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed.Budget(0).limit == 0 and packed.Budget(7).limit == 7
    pages = {"SC_PHYS_PAGES": 3000, "SC_PAGE_SIZE": 16}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert packed.Budget().limit == 3000
    monkeypatch.delattr(os, "sysconf")
    assert packed.Budget().limit == packed.WITHOUT_SYSCONF == 2**30


@pytest.mark.parametrize(
    ("available", "bf16", "suited"),
    [(False, True, set()), (True, True, {torch.bfloat16, HALF}), (True, False, {HALF})],
)
def test_what_suits_onednn(
    available: bool, bf16: bool, suited: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16, raising=False)
    dtypes = (torch.float32, torch.bfloat16, HALF, WIDE)
    uncached = packed.suits_onednn.__wrapped__
    assert {dtype for dtype in dtypes if uncached(dtype)} == suited
    monkeypatch.setattr(packed, "suits_onednn", uncached)
    monkeypatch.setattr(packed, "_fingerprint", object())
    assert {dtype for dtype in dtypes if packed.packs(dtype)} == suited
    monkeypatch.setattr(packed, "_fingerprint", None)
    assert not any(map(packed.packs, dtypes))
