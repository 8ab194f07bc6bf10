"""The adapter's part of lora_linear as a product for each of its terms, beside csrc's passes: `WAYS` of "lora_linear_rank_<R>" in choice/table.py.

    passes     csrc's lora_update_cpu: x is read once in the forward, dy and x once in the backward
    composed   torch's products
    blocked    csrc's product_cpu, in float32

The passes touch memory less often; products of their own have better blocking, or a CPU's tiles, and win where ranks are high. They round where the
reference's do; with dropout they work on a copy of x that csrc has dropped from. Which way is the fastest was measured for each dtype, number of
rows, size of weight and rank, forward and backward apart. Where nothing was measured, and where rows have adapters of their own, the passes run.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import ops, reference
from fastlora.choice import table
from fastlora.frozen import packed

PASSES = "passes"
TITLES = {"composed": "torch's products", "blocked": "native C++ products"}
FEWEST_ROWS = 9  # fewer are bound by reading A and B
FEWEST_MEASURED = 64

_product, _add_product = ops.native("product_cpu"), ops.native("add_product_cpu")
_draw_dropout, _dropout = ops.native("draw_dropout_cpu"), ops.native("dropout_cpu")
_add_dropout = ops.native("add_dropout_cpu")
_NONE = torch.empty(0, dtype=torch.uint8)


class Products(NamedTuple):
    """Who multiplies."""

    multiply: Callable[[Tensor, Tensor], Tensor]
    """x [M, K], w [N, K] -> x wᵀ."""

    add: Callable[[Tensor, Tensor, Tensor, float], object]
    """y [M, N] += factor x wᵀ."""

    sums: Callable[[Tensor, Tensor], Tensor]
    """c [M, R], v [M, L] -> cᵀ v."""

    sums_by_column: Callable[[Tensor, Tensor], Tensor]
    """c [M, R], v [M, L] -> vᵀ c."""


def _add_blocked(y: Tensor, x: Tensor, w: Tensor, factor: float) -> None:
    _add_product(y, x if factor == 1 else x * factor, _without_gaps(w))


def _sums_blocked(c: Tensor, v: Tensor) -> Tensor:
    return _product(c.T, _without_gaps(v).T, None)


def _without_gaps(matrix: Tensor) -> Tensor:
    """One that product_cpu can read as a weight, by row or by column."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()


PRODUCTS = {
    "composed": Products(
        lambda x, w: x @ w.T,
        lambda y, x, w, factor: y.addmm_(x, w.T, alpha=factor),
        lambda c, v: c.T @ v,
        lambda c, v: v.T @ c,
    ),
    "blocked": Products(
        lambda x, w: _product(x, _without_gaps(w), None),
        _add_blocked,
        _sums_blocked,
        lambda c, v: _sums_blocked(c, v).T,  # fewer elements are transposed than of v
    ),
}


def offers(op: str, way: str, dtype: torch.dtype, rows: int) -> bool:
    """Whether the adapter's part of that many rows can be computed in this way here."""
    if way == PASSES:
        return True
    if _draw_dropout is None or rows < FEWEST_ROWS:
        return False
    return (way == "composed" and packed.has_library(dtype)) or (way == "blocked" and dtype is torch.float32)


def choose(x: Tensor, weight: Tensor, rank: int, dropout: bool, backward: bool) -> str:
    """The way that was measured to be the fastest for x [M, K] and a weight [N, K]; of several layers, the first's and its rank."""
    rows = x.shape[0]
    if rows < FEWEST_ROWS or not weight.numel():
        return PASSES
    case = table.rank_case(rank) + "_backward" * backward
    way = table.way("cpu", case, "cpu", x.dtype, max(rows, FEWEST_MEASURED), weight.numel(), dropout)
    return way if offers(case, way, x.dtype, rows) else PASSES


def describe(x: Tensor, weight: Tensor, rank: int, dropout: bool) -> str:
    """For people: what adds the adapter to x [M, K] times a weight [N, K], and to its gradient, where it is not csrc's passes; else nothing."""
    forward, backward = (choose(x, weight, rank, dropout, which) for which in (False, True))
    if forward == backward:
        return "" if forward == PASSES else f"the adapter by {TITLES[forward]}"
    parts = [(TITLES[way], when) for way, when in ((forward, "forward"), (backward, "backward")) if way != PASSES]
    return "the adapter by " + ", ".join(f"{title} in the {when}" for title, when in parts)


def update(
    way: str, ys: Sequence[Tensor], x: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Sequence[float],
    dropout_p: Sequence[float], seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y[g] [M, N_g] += s xa Bᵀ with xa = d(x) Aᵀ; returns xa [G, M, max R_g] in float32, and keep [G, M, keep_bytes] or no elements."""
    products, x, dtype = PRODUCTS[way], reference.readable_rows(x), x.dtype
    xas, keeps = [], []
    for g, (y, a, b) in enumerate(zip(ys, lora_a, lora_b, strict=True)):
        kept, keep = x, _NONE
        if seed is not None and reference.drop_threshold(dropout_p[g]):
            kept, keep = _draw_dropout(x, dropout_p[g], seed[g])
        xa = products.multiply(kept, a.to(dtype))
        products.add(y, xa, b.to(dtype), scale[g])
        xas.append(xa)
        keeps.append(keep)
    return _stacked(xas), _stacked_keeps(keeps)


def update_backward(
    way: str, dx: Tensor | None, dy: Sequence[Tensor], x: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], xa: Tensor, keep: Tensor,
    scale: Sequence[float], dropout_p: Sequence[float], need_da: bool, need_db: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx [M, K] += d'(dxa A) with dxa = s dy B, where there is a dx; every dA = dxaᵀ d(x) and dB = s dyᵀ xa, flat; one not needed has no elements."""
    products, x, dtype = PRODUCTS[way], reference.readable_rows(x), x.dtype
    das, dbs = [], []
    for g, (d, a, b) in enumerate(zip(dy, lora_a, lora_b, strict=True)):
        d, s, p = reference.readable_rows(d), scale[g], dropout_p[g]
        drops = keep.numel() != 0 and reference.drop_threshold(p) != 0
        if dx is not None or need_da:
            dxa = products.multiply(d, b.to(dtype).T).mul_(s)
            if dx is not None and drops:
                _add_dropout(dx, products.multiply(dxa, a.to(dtype).T), p, keep[g])
            elif dx is not None:
                products.add(dx, dxa, a.to(dtype).T, 1.0)
            if need_da:
                kept = _dropout(x, p, keep[g]) if drops else x
                das.append(products.sums(dxa, kept).to(a.dtype).reshape(-1))
        if need_db:
            own_xa = (xa[g, :, : a.shape[0]] * s).to(dtype)
            dbs.append(products.sums_by_column(own_xa, d).to(b.dtype).reshape(-1))
    return _flat(das, lora_a[0]), _flat(dbs, lora_b[0])


def _stacked(xas: Sequence[Tensor]) -> Tensor:  # G of [M, R_g] -> [G, M, max R_g]
    """In float32; zeros beyond a layer's own rank."""
    if len(xas) == 1:
        return xas[0].float()[None]
    R = max(xa.shape[1] for xa in xas)
    return torch.stack([F.pad(xa.float(), (0, R - xa.shape[1])) for xa in xas])


def _stacked_keeps(keeps: Sequence[Tensor]) -> Tensor:  # G of [M, keep_bytes], or without elements
    """Of a layer that drops nothing nobody reads the bits."""
    if len(keeps) == 1:
        return keeps[0][None] if keeps[0].numel() else keeps[0]
    drawn = [keep for keep in keeps if keep.numel()]
    return torch.stack([keep if keep.numel() else drawn[0] for keep in keeps]) if drawn else _NONE


def _flat(gradients: list[Tensor], like: Tensor) -> Tensor:
    if len(gradients) == 1:
        return gradients[0]
    return torch.cat(gradients) if gradients else like.new_empty(0)
