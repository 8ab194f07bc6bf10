"""Products with frozen weights on a CPU: `frozen_linear` and its backward as "cpu"; and lora_linear, which is those and what csrc adds to them.

    y = x Wᵀ + b   dx = dy W

There are up to five ways (`WAYS` in choice/table.py). Which is the fastest is measured on each machine, by dtype, rows and size, and apart for
weights that lie by row, as `nn.Linear`'s do in the forward, and by column, as they do in the backward:

    torch      what F.linear does
    plain      oneDNN on the weight as it lies
    packed     oneDNN on a packed copy (packed.py)
    product    csrc's product_cpu, in float32; of 16 bits by way of float32, which rounds once
    few_rows   csrc's few_rows_cpu: 1 to 8 rows, bound by reading W once

Two are never gone in float32, since they sum a dot product in one chain of roundings, with errors beyond our bound: oneDNN's, 2 to 5 times MKL's
from K 256 on, and few_rows by column, 4 to 10 times from K 1024 on (AMD Zen 5, torch 2.13, 2026-11-29). Where nothing was measured, torch
multiplies; but where it has no library for a dtype, as for bfloat16 on a CPU without AVX-512, product does. A weight in 4 bits or 8 is one more:
panels of it are dequantised, and multiplied by in one of these (quantised.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import ops, reference
from fastlora.choice import table
from fastlora.frozen import composed, packed, quantised
from fastlora.frozen.quantised import QuantisedWeight

FEW_ROWS = 8  # what few_rows_cpu takes
LEAST_OF_MANY = 32  # the least rows of the class after theirs

_linear_pointwise: Any = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
_few_rows, _product = ops.native("few_rows_cpu"), ops.native("product_cpu")
_few_rows_lora, _few_rows_mixed = ops.native("few_rows_lora_cpu"), ops.native("few_rows_mixed_cpu")
_update, _update_backward = ops.native("lora_update_cpu"), ops.native("lora_update_backward_cpu")
NOTHING_DROPPED = torch.empty(0, dtype=torch.uint8)  # keep
TITLES = {"torch": "torch", "plain": "oneDNN", "product": "native C++", "few_rows": "native C++, a few rows"}


def offers(op: str, way: str, dtype: torch.dtype, rows: int) -> bool:
    """Whether that many rows of this dtype can be multiplied in this way here: in the forward, or as in the backward, by column."""
    if way == "few_rows":
        exact = op == "frozen_linear" or dtype is not torch.float32
        return exact and _few_rows is not None and 1 <= rows <= FEW_ROWS and dtype in ops.KERNEL_DTYPES
    if way == "product":
        return _product is not None and dtype in ops.KERNEL_DTYPES
    if way == "plain":
        return packed.suits_onednn(dtype) and bool(torch.backends.mkldnn.enabled)
    if way == "packed":
        return packed.packs(dtype) and bool(torch.backends.mkldnn.enabled)
    return way == "torch"


def _measured_as(weight: Tensor) -> str:
    """The operator whose measurements hold for a weight [N, K]: one that lies by column is multiplied by as in a layer's backward."""
    return "frozen_linear_backward" if weight.stride(0) < weight.stride(1) else "frozen_linear"


def _class_of(rows: int) -> int:
    """Rows that are measured alike: the class of 8 was measured by few."""
    return rows if rows <= FEW_ROWS else max(rows, LEAST_OF_MANY)


def _takes(way: str, dtype: torch.dtype, rows: int, weight: Tensor) -> bool:
    """Whether this very weight [N, K], which may lie by row, by column or with gaps, can be multiplied by in this way."""
    if type(weight) is QuantisedWeight:
        return False
    if way in ("few_rows", "product") and weight.stride(1) != 1 and weight.stride(0) != 1:
        return False
    return offers(_measured_as(weight), way, dtype, rows)


def _way(dtype: torch.dtype, rows: int, weight: Tensor, without_copy: bool = False) -> str:
    """The fastest way that was measured, where this weight can be multiplied by so; else torch's, where that is a library's."""
    like = _class_of(rows)
    way = table.way("cpu", _measured_as(weight), "cpu", dtype, like, weight.numel(), False, without_copy)
    if _takes(way, dtype, rows, weight):
        return way
    return "product" if not packed.has_library(dtype) and _takes("product", dtype, rows, weight) else "torch"


def _find_way(x: Tensor, weight: Tensor) -> tuple[str, Tensor | None]:
    """How to multiply x [M, K] by the weight [N, K], and its copy for that; where it cannot have one, the fastest way without."""
    if not (x.numel() and weight.numel()):
        return "torch", None
    way = _way(x.dtype, x.shape[0], weight)
    if way != "packed":
        return way, None
    copy = packed.find_copy(weight)
    return (_way(x.dtype, x.shape[0], weight, without_copy=True) if copy is None else way), copy


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [M, K], [N, K], [N] -> [M, N]
    """y = x Wᵀ + b (reference.py::frozen_linear), in the way that is fastest here."""
    _check("x", x, weight, 1)
    if type(weight) is QuantisedWeight:
        return _multiply_quantised(x, weight, bias)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias: got {bias.dtype} {list(bias.shape)}, expected {x.dtype} [{weight.shape[0]}]")
    return _multiply(*_find_way(x, weight), x, weight, bias)


def frozen_linear_backward(dy: Tensor, weight: Tensor) -> Tensor:  # [M, N], [N, K] -> [M, K]
    """dx = dy W (reference.py::frozen_linear_backward), in the way that is fastest here."""
    _check("dy", dy, weight, 0)
    if type(weight) is QuantisedWeight:
        return _multiply_quantised_backward(dy, weight)
    weight = weight.t()
    return _multiply(*_find_way(dy, weight), dy, weight, None)


def _check(name: str, x: Tensor, weight: Tensor, dimension: int) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[dimension]:
        raise ValueError(
            f"{name}: got shape {list(x.shape)} for a weight {list(weight.shape)}, expected two dimensions that fit"
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"weight: got {weight.dtype} on {weight.device}, expected {x.dtype} on {x.device}")


def _multiply_quantised(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + b in the weight's own dtype, rounded to x's: rows of W at a time, and in registers where there are a few rows of x."""
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {list(bias.shape)}, expected [{weight.shape[0]}]")
    if weight.own_product is not None:
        return weight.own_product(x, bias)
    rows, bias = x.to(weight.compute), None if bias is None else bias.to(weight.compute)
    if 1 <= x.shape[0] <= FEW_ROWS and quantised.takes_few_rows(weight):
        return quantised.few_rows(rows, weight, bias).to(x.dtype)
    parts = quantised.panels(weight, 0)
    if len(parts) == 1:
        return _multiply_by_panel(rows, weight.panel(0, weight.shape[0], 0, weight.shape[1]), bias).to(x.dtype)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for first, count in parts:
        own = slice(first, first + count)
        panel = weight.panel(first, count, 0, weight.shape[1])
        y[:, own] = _multiply_by_panel(rows, panel, None if bias is None else bias[own])
    return y


def _multiply_quantised_backward(dy: Tensor, weight: QuantisedWeight) -> Tensor:
    """dx = dy W in the weight's own dtype, rounded to dy's: columns of W at a time."""
    rows, N = dy.to(weight.compute), weight.shape[0]
    parts = quantised.panels(weight, 1)
    if len(parts) == 1:
        return _multiply_by_panel(rows, weight.panel(0, N, 0, weight.shape[1]).t(), None).to(dy.dtype)
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    for first, count in parts:
        dx[:, first : first + count] = _multiply_by_panel(rows, weight.panel(0, N, first, count).t(), None)
    return dx


def _multiply_by_panel(x: Tensor, panel: Tensor, bias: Tensor | None) -> Tensor:
    """In the fastest way without a copy of the panel, which is gone after this call."""
    return _multiply(_way_by_panel(x, panel), None, x, panel, bias)


def _way_by_panel(x: Tensor, panel: Tensor) -> str:
    if not (x.numel() and panel.numel()):
        return "torch"
    way = _way(x.dtype, x.shape[0], panel)
    return _way(x.dtype, x.shape[0], panel, without_copy=True) if way == "packed" else way


def _multiply(way: str, copy: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] times the transpose of weight [N, K], which in the backward is the transpose of a layer's."""
    if way == "few_rows":
        return _few_rows(x, weight, bias)
    if way == "product":
        return _product(x, weight, bias)
    x = reference.readable_rows(x)
    if way != "torch":
        return _multiply_by_onednn(x, weight if copy is None else copy, bias)
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return F.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _multiply_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        bias = bias.contiguous()  # oneDNN reads the gaps
    if x.dtype is not torch.float16:
        return _linear_pointwise(x, weight, bias, "none", [], "")
    wide = None if bias is None else bias.float()
    return _linear_pointwise(x.float(), weight.float(), wide, "none", [], "").half()


def describe(weight: Tensor, dtype: torch.dtype, rows: int, fused: bool = False) -> str:
    """For people: what multiplies that many rows of that dtype by a frozen weight [N, K], and why.

    fused: whether `lora_linear` does, without dropout.
    """
    if type(weight) is QuantisedWeight:
        return _describe_quantised(weight, rows)
    if fused and _takes("few_rows", dtype, rows, weight):
        return f"{TITLES['few_rows']}, with the adapter"
    found = table.lookup("cpu", _measured_as(weight), dtype, _class_of(rows), weight.numel(), False).get("cpu")
    way = _way(dtype, rows, weight)
    why = ""
    if found is None or not found.way:
        if way == "torch":
            why = ", not measured on this kind of CPU"
        elif way == "product" and not packed.has_library(dtype):
            why = f", since torch has no library's product of {table.name_of(dtype)} here"
    elif found.way == way:
        why = ", nothing was measured to be faster" if way == "torch" else f", {found.ratio:.2f}x of torch's time"
    if way != "packed":
        return TITLES[way] + why
    other = TITLES[_way(dtype, rows, weight, without_copy=True)]
    registered = packed.find(weight) if dtype == weight.dtype else None
    if registered is None:
        return f"{other}, the fastest without a packed copy"
    if registered.bytes:
        return f"oneDNN, packed, {_mebibytes(registered.bytes)}{why}"
    if not registered.has_room(weight):
        return f"{other}, {_mebibytes(packed.copy_bytes(weight))} does not fit the pack_budget"
    return f"oneDNN, packed when first called{why}"


def _describe_quantised(weight: QuantisedWeight, rows: int) -> str:
    if weight.own_product is not None:
        return f"the library's own product from {weight.title}, which quantises x, too"
    if rows <= FEW_ROWS and quantised.takes_few_rows(weight):
        return f"{TITLES['few_rows']}, from {weight.title} as it is read"
    parts = quantised.panels(weight, 0)
    panel = torch.empty(parts[0][1], weight.shape[1], dtype=weight.compute, device="meta")
    pieces = "" if len(parts) == 1 else f", {parts[0][1]} of {weight.shape[0]} rows at a time"
    return f"{describe(panel, weight.compute, rows)}; {weight.title} dequantised{pieces}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def lora_linear(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scale: Sequence[float], dropout_p: Sequence[float], seed: Tensor | None, order: Tensor | None, offsets: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """reference.py::lora_linear on a CPU. A few rows without dropout are one call a layer: what is measured of it is the whole."""
    rows = x.shape[0]
    if x.numel() and not reference.drops(dropout_p, seed) and all(_takes("few_rows", x.dtype, rows, w) for w in weight):
        if order is None and len(weight) == 1:
            y, xa = _few_rows_lora(x, weight[0], bias[0], lora_a[0], lora_b[0], scale[0])
            return [y], xa, NOTHING_DROPPED
        return *_few_rows_of_layers(x, weight, bias, lora_a, lora_b, scale, order, offsets), NOTHING_DROPPED
    ys = [frozen_linear(x, w, b) for w, b in zip(weight, bias, strict=True)]
    if order is None:
        way = composed.choose(x, weight[0], lora_a[0].shape[0], seed is not None, backward=False)
        if way != composed.PASSES:
            return ys, *composed.update(way, ys, x, lora_a, lora_b, scale, dropout_p, seed)
    return ys, *_update(ys, x, lora_a, lora_b, scale, dropout_p, seed, order, offsets)


def _few_rows_of_layers(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scale: Sequence[float], order: Tensor | None, offsets: Tensor | None,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    S = len(lora_a) // len(weight)
    ys, xas = [], []
    for g, (w, b) in enumerate(zip(weight, bias, strict=True)):
        own = slice(g * S, (g + 1) * S)
        y, xa = _few_rows_mixed(x, w, b, lora_a[own], lora_b[own], scale[own], order, offsets)
        ys.append(y)
        xas.append(xa)
    R = max(xa.shape[2] for xa in xas)
    return ys, torch.cat([xa if xa.shape[2] == R else F.pad(xa, (0, R - xa.shape[2])) for xa in xas])


def lora_linear_backward(
    dy: Sequence[Tensor], x: Tensor, weight: Sequence[Tensor], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], xa: Tensor, keep: Tensor,
    scale: Sequence[float], dropout_p: Sequence[float], order: Tensor | None, offsets: Tensor | None, need_dx: bool, need_da: bool, need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """reference.py::lora_linear_backward on a CPU."""
    dx = None
    for d, w in zip(dy if need_dx else (), weight, strict=False):
        part = frozen_linear_backward(d, w)
        dx = part if dx is None else dx.add_(part)
    way = composed.PASSES
    if order is None:
        way = composed.choose(x, weight[0], lora_a[0].shape[0], keep.numel() != 0, backward=True)
    if way != composed.PASSES:
        da, db = composed.update_backward(way, dx, dy, x, lora_a, lora_b, xa, keep, scale, dropout_p, need_da, need_db)
    else:
        da, db = _update_backward(
            dx, dy, x, lora_a, lora_b, xa, keep, scale, dropout_p, order, offsets, need_da, need_db
        )
    return x.new_empty(0) if dx is None else dx, da, db


ops.implement("frozen_linear", "cpu", frozen_linear)
ops.implement("frozen_linear_backward", "cpu", frozen_linear_backward)
