"""frozen/products.py's rules: what multiplies by a frozen weight, at which sizes, dtypes and strides; what a machine does that lacks some of it."""

import os
from typing import Any

import pytest
import torch
from measurements import needs_native
from torch import Tensor

from fastlora import reference
from fastlora.choice import table
from fastlora.frozen import packed, products

HALF, WIDE = torch.float16, torch.float64


@pytest.fixture(autouse=True)
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has all of it, whatever this one has."""
    monkeypatch.setattr(products, "_few_rows", object())
    monkeypatch.setattr(products, "_product", object())
    monkeypatch.setattr(products, "_has_avx", True)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    monkeypatch.setattr(packed, "packs", lambda dtype: True)
    monkeypatch.setattr(packed, "suits_onednn", lambda dtype: True)


def weight_of(N: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(N, K, dtype=dtype, device="meta")


@pytest.mark.parametrize(("rows", "expected"), [(0, False), (1, True), (8, True), (9, False)])
def test_a_few_rows(rows: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert products.takes_few_rows(rows, weight_of(6, 5)) is expected
    monkeypatch.setattr(products, "_few_rows", None)
    assert not products.takes_few_rows(rows, weight_of(6, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF, WIDE])
def test_a_few_rows_by_a_weight_that_lies_in_some_way(dtype: torch.dtype) -> None:
    weight = weight_of(6, 5, dtype)
    assert products.takes_few_rows(1, weight) is (dtype is not WIDE)
    assert products.takes_few_rows(1, weight_of(5, 6, dtype).t()) is (dtype is HALF)
    assert not products.takes_few_rows(1, weight_of(6, 10, dtype)[:, ::2])


def test_the_product_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    work, columns = products.LEAST_PRODUCT, products.LEAST_PRODUCT_COLUMNS
    assert products._takes_product(work, weight_of(columns, 8))
    assert not products._takes_product(work - 1, weight_of(columns, 8))
    assert not products._takes_product(work, weight_of(columns - 1, 8))
    assert not products._takes_product(work, weight_of(columns, 8, torch.bfloat16))
    for name, value in (("_has_avx", False), ("_product", None)):
        with monkeypatch.context() as patch:
            patch.setattr(products, name, value)
            assert not products._takes_product(work, weight_of(columns, 8))


def test_float16_by_way_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, work = products.LEAST_FLOAT16_ROWS, products.LEAST_FLOAT16
    assert products._takes_plain(HALF, rows, work)
    assert not products._takes_plain(HALF, rows - 1, work)
    assert not products._takes_plain(HALF, rows, work - 1)
    assert not products._takes_plain(torch.bfloat16, rows, work)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert not products._takes_plain(HALF, rows, work)
    monkeypatch.setattr(packed, "suits_onednn", lambda dtype: False)
    assert not products._takes_plain(HALF, rows, work)


@pytest.mark.parametrize("backward", [False, True])
def test_a_copy_where_it_was_measured_to_pay(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(table, "way", lambda *case: asked.append(case) or "packed")
    assert products._takes_packed(HALF, 64, 4096, backward)
    op = "frozen_linear_backward" if backward else "frozen_linear"
    assert asked == [("cpu", op, "cpu", HALF, 64, 4096, False)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert not products._takes_packed(HALF, 64, 4096, backward)
    with monkeypatch.context() as patch:
        patch.setattr(table, "way", lambda *case: "plain")
        assert not products._takes_packed(HALF, 64, 4096, backward)
    monkeypatch.setattr(packed, "packs", lambda dtype: False)
    assert not products._takes_packed(HALF, 64, 4096, backward)


def test_each_product_asks_for_its_own_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(table, "way", lambda implementation, op, *case: asked.append(op) or "plain")
    weight = torch.ones(6, 4, dtype=torch.bfloat16)
    products.frozen_linear(weight.new_ones(9, 4), weight, None)
    products.frozen_linear_backward(weight.new_ones(9, 6), weight)
    assert asked == ["frozen_linear", "frozen_linear_backward"]


@pytest.mark.parametrize(
    ("dtype", "of_x", "rows", "expected"),
    [
        (torch.float32, torch.float32, 8, "native C++, a few rows"),
        (torch.float32, torch.float32, 9, "torch"),
        (torch.float32, torch.float32, 512, "native C++"),
        (torch.float32, torch.bfloat16, 512, "torch"),
        (HALF, HALF, 127, "torch"),
        (HALF, HALF, 128, "oneDNN"),
        (torch.bfloat16, torch.bfloat16, 512, "torch"),
    ],
)
def test_it_is_told(dtype: torch.dtype, of_x: torch.dtype, rows: int, expected: str) -> None:
    assert products.describe(torch.zeros(64, 64, dtype=dtype), of_x, rows) == expected


class Copies:
    """What packed.find returns of a weight."""

    def __init__(self, held: int, room: bool) -> None:
        self.bytes = held
        self.has_room = lambda weight: room


@pytest.mark.parametrize(
    ("copies", "expected"),
    [
        (Copies(3 * 2**19, True), "oneDNN, packed, 1.5 MiB"),
        (Copies(0, True), "oneDNN, packed when first called"),
        (Copies(0, False), "torch, 1.0 MiB does not fit the pack_budget"),
        (None, "torch"),
    ],
)
def test_copies_are_told(copies: Copies | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "find", lambda weight: copies)
    monkeypatch.setattr(table, "way", lambda _, op, *case: "packed" if op == "frozen_linear" else "plain")
    weight = torch.zeros(512, 1024, dtype=torch.bfloat16)
    assert products.describe(weight, torch.bfloat16, 512) == expected
    assert products.describe(weight, torch.float32, 512) == "torch"
    monkeypatch.setattr(table, "way", lambda *case: "plain")
    assert products.describe(weight, torch.bfloat16, 512) == "torch"


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
    monkeypatch.setattr(products, "_few_rows", None)
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
    """Those with gaps are multiplied by product and update, and so are more rows; the others in one call a layer."""
    called: list[str] = []
    for name in ("_few_rows_lora", "_few_rows_mixed", "_update"):
        own = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *args, own=own, name=name: called.append(name) or own(*args))
    monkeypatch.setattr(products, "_few_rows", None)
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
    assert called == (["_update"] if lies == "with gaps" or rows == 9 else one_by_one) and xa.shape == (layers, rows, 2)


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
def test_each_layer_has_a_bias_or_none(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bias for two layers is a mistake, and no shorter result."""
    monkeypatch.setattr(products, "_few_rows", None)
    x, w, a, b = torch.randn(rows, 12), torch.randn(6, 12), torch.randn(2, 12), torch.randn(6, 2)
    with pytest.raises(ValueError, match="shorter"):
        products.lora_linear(x, [w, w], [None], [a, a], [b, b], [1.0] * 2, [0.0] * 2, None, None, None)


@needs_native
def test_the_gradient_of_x_is_the_sum_over_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_few_rows", None)
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
    ("available", "bf16", "fp16", "suited"),
    [
        (False, True, False, set()),
        (True, True, False, {torch.bfloat16, HALF}),
        (True, True, True, {torch.bfloat16}),
        (True, False, False, {HALF}),
    ],
)
def test_what_suits_onednn(
    available: bool, bf16: bool, fp16: bool, suited: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: fp16, raising=False)
    dtypes = (torch.float32, torch.bfloat16, HALF, WIDE)
    uncached = packed.suits_onednn.__wrapped__
    assert {dtype for dtype in dtypes if uncached(dtype)} == suited
    monkeypatch.setattr(packed, "suits_onednn", uncached)
    monkeypatch.setattr(packed, "_fingerprint", object())
    assert {dtype for dtype in dtypes if packed.packs(dtype)} == suited
    monkeypatch.setattr(packed, "_fingerprint", None)
    assert not any(map(packed.packs, dtypes))
