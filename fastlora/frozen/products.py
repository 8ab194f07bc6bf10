"""Products with frozen weights on a CPU: `frozen_linear` and its backward as "cpu"; and lora_linear, which is those and what csrc adds to them.

    y = x Wᵀ + b   dx = dy W

In float32 csrc multiplies, without a copy: oneDNN sums long float32 dot products in one chain of roundings, so its error exceeds our bound. A few
rows, bound by reading W once, are csrc's in any dtype. For the other dtypes there may be a packed copy (packed.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import ops, reference
from fastlora.choice import table
from fastlora.frozen import packed

FEW_ROWS = 8  # what few_rows_cpu takes

_linear_pointwise: Any = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
_few_rows, _product = ops.native("few_rows_cpu"), ops.native("product_cpu")
_few_rows_lora, _few_rows_mixed = ops.native("few_rows_lora_cpu"), ops.native("few_rows_mixed_cpu")
_update, _update_backward = ops.native("lora_update_cpu"), ops.native("lora_update_backward_cpu")
NOTHING_DROPPED = torch.empty(0, dtype=torch.uint8)  # keep
LEAST_PRODUCT = 2**21  # multiplications, M K N, from which on product_cpu is faster than torch
LEAST_PRODUCT_COLUMNS = 32  # of y: it computes 64 at a time
_has_avx = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # elsewhere torch's product is faster

# One core of an AMD Zen 4, torch 2.13: from here on oneDNN multiplies float16 by way of float32 faster than torch does.
LEAST_FLOAT16_ROWS = 2
LEAST_FLOAT16 = 2**19  # multiplications, M K N


def takes_few_rows(rows: int, weight: Tensor) -> bool:
    """The rule: when few_rows_cpu multiplies. On a weight [N, K] that lies by column it beats torch in float16 only."""
    if _few_rows is None or not 1 <= rows <= FEW_ROWS or weight.dtype not in ops.KERNEL_DTYPES:
        return False
    return weight.stride(1) == 1 or (weight.stride(0) == 1 and weight.dtype is torch.float16)


def _takes_product(work: int, weight: Tensor) -> bool:
    """The rule: when product_cpu multiplies. In float32 it needs no copy to be as fast as oneDNN with one, and it rounds less than MKL."""
    if _product is None or not _has_avx or weight.dtype is not torch.float32:
        return False
    return work >= LEAST_PRODUCT and weight.shape[0] >= LEAST_PRODUCT_COLUMNS


def _takes_packed(dtype: torch.dtype, rows: int, elements: int, backward: bool) -> bool:
    """Whether a copy was measured to pay: the whole product, fingerprint included, took at most `measure.WORTH_A_COPY` of the time without."""
    if not packed.packs(dtype) or not torch.backends.mkldnn.enabled:
        return False
    op = "frozen_linear_backward" if backward else "frozen_linear"
    return table.way("cpu", op, "cpu", dtype, rows, elements, False) == "packed"


def _takes_plain(dtype: torch.dtype, rows: int, work: int) -> bool:
    """The rule: when oneDNN multiplies by the weight as it lies. torch's bfloat16 product is that already."""
    if dtype is not torch.float16 or not packed.suits_onednn(dtype) or not torch.backends.mkldnn.enabled:
        return False
    return rows >= LEAST_FLOAT16_ROWS and work >= LEAST_FLOAT16


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [M, K], [N, K], [N] -> [M, N]
    """y = x Wᵀ + b (reference.py::frozen_linear), in the way that is fastest here."""
    _check("x", x, weight, 1)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias: got {bias.dtype} {list(bias.shape)}, expected {x.dtype} [{weight.shape[0]}]")
    return multiply(x, weight, bias, backward=False)


def frozen_linear_backward(dy: Tensor, weight: Tensor) -> Tensor:  # [M, N], [N, K] -> [M, K]
    """dx = dy W (reference.py::frozen_linear_backward), in the way that is fastest here."""
    _check("dy", dy, weight, 0)
    return multiply(dy, weight.t(), None, backward=True)


def _check(name: str, x: Tensor, weight: Tensor, dimension: int) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[dimension]:
        raise ValueError(
            f"{name}: got shape {list(x.shape)} for a weight {list(weight.shape)}, expected two dimensions that fit"
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"weight: got {weight.dtype} on {weight.device}, expected {x.dtype} on {x.device}")


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, backward: bool) -> Tensor:
    """x [M, K] times the transpose of weight [N, K], which in the backward is the transpose of a layer's."""
    M, K = x.shape
    work = M * K * weight.shape[0]
    if work:
        if takes_few_rows(M, weight):
            return _few_rows(x, weight, bias)
        if _takes_product(work, weight) and _is_dense(weight):
            return _product(x, weight, bias)
        x = reference.readable_rows(x)
        copy = packed.find_copy(weight) if _takes_packed(x.dtype, M, weight.numel(), backward) else None
        if copy is not None or _takes_plain(x.dtype, M, work):
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


def describe(weight: Tensor, dtype: torch.dtype, rows: int) -> str:
    """For people: what multiplies that many rows of that dtype by a frozen weight [N, K]."""
    work = rows * weight.numel()
    if takes_few_rows(rows, weight):
        return "native C++, a few rows"
    if dtype == weight.dtype and _takes_product(work, weight):
        return "native C++"
    plain = "oneDNN" if _takes_plain(dtype, rows, work) else "torch"
    registered = packed.find(weight) if dtype == weight.dtype else None
    if registered is None or not _takes_packed(dtype, rows, weight.numel(), backward=False):
        return plain
    if registered.bytes:
        return f"oneDNN, packed, {_mebibytes(registered.bytes)}"
    if not registered.has_room(weight):
        return f"{plain}, {_mebibytes(packed.copy_bytes(weight))} does not fit the pack_budget"
    return "oneDNN, packed when first called"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def lora_linear(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scale: Sequence[float], dropout_p: Sequence[float], seed: Tensor | None, order: Tensor | None, offsets: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """reference.py::lora_linear on a CPU."""
    if x.shape[0] <= FEW_ROWS and x.numel() and not reference.drops(dropout_p, seed):
        if order is None and len(weight) == 1 and _is_dense(weight[0]):
            y, xa = _few_rows_lora(x, weight[0], bias[0], lora_a[0], lora_b[0], scale[0])
            return [y], xa, NOTHING_DROPPED
        if all(map(_is_dense, weight)):
            return *_few_rows_of_layers(x, weight, bias, lora_a, lora_b, scale, order, offsets), NOTHING_DROPPED
    ys = [frozen_linear(x, w, b) for w, b in zip(weight, bias, strict=True)]
    return ys, *_update(ys, x, lora_a, lora_b, scale, dropout_p, seed, order, offsets)


def _is_dense(weight: Tensor) -> bool:
    return weight.stride(1) == 1 or weight.stride(0) == 1


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
    da, db = _update_backward(dx, dy, x, lora_a, lora_b, xa, keep, scale, dropout_p, order, offsets, need_da, need_db)
    return x.new_empty(0) if dx is None else dx, da, db


ops.implement("frozen_linear", "cpu", frozen_linear)
ops.implement("frozen_linear_backward", "cpu", frozen_linear_backward)
