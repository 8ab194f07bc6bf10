"""Row by row, y = x Wᵀ + b + s_i xa B_iᵀ with xa = d_i(x) A_iᵀ, in Triton; the equation is `fastlora.reference.multi_lora`.

Groups are numbered 0 (rows of the base alone), 1 to S (adapter i is group i + 1) and S + 1 (rows whose adapter does not exist). Group g has the
sorted places offsets[g] : offsets[g + 1]; order[place] is the row. Everything is found on the card: nothing waits for it.

    forward     xa      tiles of one group each, at most ceil(M / rows of a tile) + S + 2 of them, whatever the groups
                y       tiles of sorted places that may span groups: W is read once a tile, with one rank step a group in the tile
    backward    dxa, dB one read of dy while every R_i fits a tile, group by group; partial sums added in order
                dA      one read of x, group by group; the mask redrawn once, as bits, for this and the next
                dx      tiles as for y; rank steps first, then the mask, once for all groups in the tile

The adapters are laid side by side first (A [sum R_i, K], B [N, sum R_i]): one copy of them, small beside W. Rounding is that of lora_linear.py.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora import ops
from fastlora.kernels import tuning
from fastlora.kernels.philox import (
    BLOCK_GROUPS,
    BLOCK_ROWS,
    draw_bits,
    drop_threshold,
    keep_mask,
    keep_scale,
    load_keep_mask,
)
from fastlora.kernels.tiles import partials_for, sum_partials, tile_of

# Rows of the two tables that hold, for each of the S + 2 groups, whole numbers (int64) and fractions (float32).
FIRST, RANK, THRESHOLD = (tl.constexpr(row) for row in range(3))
SCALE, FACTOR = (tl.constexpr(row) for row in range(2))


@triton.jit
def _places_of_tile(offsets_ptr, tile, groups, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """(group, first place, end of the group's places) of the tile among all groups' tiles; past the last tile no places."""
    group = tl.arange(0, BLOCK_S)
    begin = tl.load(offsets_ptr + group, mask=group < groups, other=0)
    end = tl.load(offsets_ptr + group + 1, mask=group < groups, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(tiles, 0)
    found = tl.sum((last <= tile).to(tl.int32), 0)
    here = group == found
    first = tl.sum(tl.where(here, begin + (tile - last + tiles) * BLOCK_M, 0), 0)
    return tl.minimum(found, groups - 1), first, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def _group_of_place(offsets_ptr, place, groups, BLOCK_S: tl.constexpr):
    group = tl.arange(0, BLOCK_S)
    begin = tl.load(offsets_ptr + group, mask=group < groups, other=0)
    return tl.sum(((begin <= place) & (group < groups)).to(tl.int32), 0) - 1


@triton.jit
def _places_of_part(offsets_ptr, group, part, parts, BLOCK_M: tl.constexpr):
    """The places (begin, end) of one of `parts` pieces of a group."""
    begin, end = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    span = tl.cdiv(tl.cdiv(end - begin, parts), BLOCK_M) * BLOCK_M
    return begin + part * span, tl.minimum(begin + (part + 1) * span, end)


@triton.jit(do_not_specialize=["M", "groups"])
def _shrink_kernel(
    x_ptr, a_ptr, xa_ptr, seed_ptr, order_ptr, offsets_ptr, whole_ptr, factor_ptr,  # xa: partial sums [parts, M, R]
    M, K, R, span, groups,  # R: the largest rank; span: columns of x a part
    x_m, x_k, a_r, a_k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    group, first, last = _places_of_tile(offsets_ptr, tl.program_id(0), groups, BLOCK_M, BLOCK_S)
    place = first + tl.arange(0, BLOCK_M)
    m = tl.load(order_ptr + place, mask=place < last, other=0)
    part = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank = tl.load(whole_ptr + RANK * groups + group)
    begin = part * span
    end = tl.minimum(begin + span, K)
    # No sums for ranks that this group does not have, nor for tiles without rows: zeros are stored.
    end = tl.where((tl.program_id(2) * BLOCK_R < rank) & (first < last), end, begin)
    k = (begin + tl.arange(0, BLOCK_K)).to(tl.int64)
    x_ptrs = x_ptr + m[:, None] * x_m + k[None, :] * x_k
    a_ptrs = a_ptr + (tl.load(whole_ptr + FIRST * groups + group) + r)[None, :] * a_r + k[:, None] * a_k
    xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(begin, end, BLOCK_K):
        inside = k0 + tl.arange(0, BLOCK_K) < end
        x = tl.load(x_ptrs, mask=(place < last)[:, None] & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if seed_ptr is not None:
            threshold = tl.load(whole_ptr + THRESHOLD * groups + group).to(tl.int32)
            x = tl.where(keep_mask(seed_ptr, m, k0, K, threshold, BLOCK_K), x, 0.0)
        a = tl.load(a_ptrs, mask=inside[:, None] & (r < rank)[None, :], other=0.0).to(x.dtype)  # [BLOCK_K, BLOCK_R]
        xa = tl.dot(x, a, xa, input_precision="ieee")
        x_ptrs += tl.cast(BLOCK_K, tl.int64) * x_k
        a_ptrs += tl.cast(BLOCK_K, tl.int64) * a_k
    xa *= tl.load(factor_ptr + group)
    xa_ptrs = xa_ptr + (part.to(tl.int64) * M + m)[:, None] * R + r[None, :]
    tl.store(xa_ptrs, xa, mask=(place < last)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["M", "groups"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, b_ptr, xa_ptr, y_ptr, order_ptr, offsets_ptr, whole_ptr, fraction_ptr,
    M, N, K, R, groups,
    x_m, x_k, w_n, w_k, b_n, bias_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    place = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.load(order_ptr + place, mask=place < M, other=0)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + m[:, None] * x_m + k[None, :] * x_k
    w_ptrs = weight_ptr + n[None, :] * w_n + k[:, None] * w_k
    dtype = x_ptr.dtype.element_ty
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        inside = k0 + tl.arange(0, BLOCK_K) < K
        x = tl.load(x_ptrs, mask=(place < M)[:, None] & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs, mask=inside[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        y = tl.dot(x, w, y, input_precision="ieee")
        x_ptrs += tl.cast(BLOCK_K, tl.int64) * x_k
        w_ptrs += tl.cast(BLOCK_K, tl.int64) * w_k
    at = tile_m.to(tl.int64) * BLOCK_M
    stop = tl.minimum(at + BLOCK_M, M)
    while at < stop:
        group = _group_of_place(offsets_ptr, at, groups, BLOCK_S)
        end = tl.minimum(tl.load(offsets_ptr + group + 1), stop)
        mine = (place >= at) & (place < end)
        first, rank = tl.load(whole_ptr + FIRST * groups + group), tl.load(whole_ptr + RANK * groups + group)
        scale = tl.load(fraction_ptr + SCALE * groups + group)
        for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
            r = r0 + tl.arange(0, BLOCK_R)
            xa = tl.load(xa_ptr + m[:, None] * R + r[None, :], mask=mine[:, None] & (r < rank)[None, :], other=0.0)
            b_ptrs = b_ptr + n[None, :] * b_n + (first + r)[:, None]
            b = tl.load(b_ptrs, mask=(r < rank)[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
            y = tl.dot((xa * scale).to(dtype), b.to(dtype), y, input_precision="ieee")
        at = tl.maximum(end, at + 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n * bias_n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y = tl.where((place >= tl.load(offsets_ptr + groups - 1))[:, None], float("nan"), y)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y, mask=(place < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M", "groups", "ranks", "parts"])
def _shrink_back_kernel(
    dy_ptr, b_ptr, xa_ptr, dxa_ptr, db_ptr, order_ptr, offsets_ptr, whole_ptr, fraction_ptr,
    M, N, R, groups, ranks, parts,  # partial sums: dxa [columns of tiles, M, R] or None, dB [parts, N * ranks] or None
    dy_m, dy_n, b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    group, part = tl.program_id(1) // parts + 1, tl.program_id(1) % parts
    rank = tl.load(whole_ptr + RANK * groups + group)
    if tl.program_id(2) * BLOCK_R >= rank:
        return
    first = tl.load(whole_ptr + FIRST * groups + group)
    scale = tl.load(fraction_ptr + SCALE * groups + group)
    tile_n = tl.program_id(0)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (n < N)[:, None] & (r < rank)[None, :]
    b = tl.load(b_ptr + n[:, None] * b_n + (first + r)[None, :], mask=mask, other=0.0)  # [BLOCK_N, BLOCK_R]
    b = b.to(dy_ptr.dtype.element_ty)
    begin, end = _places_of_part(offsets_ptr, group, part, parts, BLOCK_M)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        m = tl.load(order_ptr + place, mask=place < end, other=0)
        dy_ptrs = dy_ptr + m[:, None] * dy_m + n[None, :] * dy_n
        dy = tl.load(dy_ptrs, mask=(place < end)[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        rows = (place < end)[:, None] & (r < rank)[None, :]
        if dxa_ptr is not None:
            dxa = tl.dot(dy, b, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_R]
            tl.store(dxa_ptr + (tile_n.to(tl.int64) * M + m)[:, None] * R + r[None, :], dxa, mask=rows)
        if db_ptr is not None:
            xa = tl.load(xa_ptr + m[:, None] * R + r[None, :], mask=rows, other=0.0).to(dy.dtype)  # [BLOCK_M, BLOCK_R]
            db = tl.dot(tl.trans(dy), xa, db, input_precision="ieee")
    if db_ptr is not None:
        db_ptrs = db_ptr + (part.to(tl.int64) * ranks + first) * N + n[:, None] * rank + r[None, :]
        tl.store(db_ptrs, db * scale, mask=mask)


@triton.jit(do_not_specialize=["groups"])
def _keep_bits_kernel(
    bits_ptr, seed_ptr, order_ptr, offsets_ptr, whole_ptr, columns, groups,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    group, first, last = _places_of_tile(offsets_ptr, tl.program_id(0), groups, ROWS, BLOCK_S)
    place = first + tl.arange(0, ROWS)
    m = tl.load(order_ptr + place, mask=place < last, other=0)
    threshold = tl.load(whole_ptr + THRESHOLD * groups + group).to(tl.int32)
    column_groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    bits = draw_bits(seed_ptr, m, column_groups, columns, threshold)
    a_row = tl.cdiv(columns, 8)
    mask = (place < last)[:, None] & (column_groups < a_row)[None, :]
    tl.store(bits_ptr + m[:, None] * a_row + column_groups[None, :], bits.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["M", "groups", "ranks", "parts"])
def _adapter_grad_kernel(
    x_ptr, dxa_ptr, da_ptr, bits_ptr, order_ptr, offsets_ptr, whole_ptr, fraction_ptr,  # dA: partial sums [parts, ranks * K]
    M, K, R, groups, ranks, parts,
    x_m, x_k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    group, part = tl.program_id(1) // parts + 1, tl.program_id(1) % parts
    rank = tl.load(whole_ptr + RANK * groups + group)
    if tl.program_id(2) * BLOCK_R >= rank:
        return
    first_k = tl.program_id(0) * BLOCK_K
    k = first_k.to(tl.int64) + tl.arange(0, BLOCK_K)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin, end = _places_of_part(offsets_ptr, group, part, parts, BLOCK_M)
    da = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        m = tl.load(order_ptr + place, mask=place < end, other=0)
        x_ptrs = x_ptr + m[:, None] * x_m + k[None, :] * x_k
        x = tl.load(x_ptrs, mask=(place < end)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if bits_ptr is not None:
            x = tl.where(load_keep_mask(bits_ptr, m, place < end, first_k, K, BLOCK_K), x, 0.0)
        rows = (place < end)[:, None] & (r < rank)[None, :]
        dxa = tl.load(dxa_ptr + m[:, None] * R + r[None, :], mask=rows, other=0.0).to(x.dtype)  # [BLOCK_M, BLOCK_R]
        da = tl.dot(tl.trans(x), dxa, da, input_precision="ieee")
    da *= tl.load(fraction_ptr + FACTOR * groups + group)
    first = part.to(tl.int64) * ranks + tl.load(whole_ptr + FIRST * groups + group)
    tl.store(da_ptr + (first + r)[None, :] * K + k[:, None], da, mask=(k < K)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["M", "groups"])
def _linear_back_kernel(
    dy_ptr, weight_ptr, a_ptr, dxa_ptr, dx_ptr, bits_ptr, order_ptr, offsets_ptr, whole_ptr, fraction_ptr,
    M, N, K, R, groups,
    dy_m, dy_n, w_n, w_k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    place = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.load(order_ptr + place, mask=place < M, other=0)
    k = tile_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    dtype = dy_ptr.dtype.element_ty
    factor = tl.full((BLOCK_M,), 1.0, tl.float32)
    dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    at = tile_m.to(tl.int64) * BLOCK_M
    stop = tl.minimum(at + BLOCK_M, M)
    while at < stop:
        group = _group_of_place(offsets_ptr, at, groups, BLOCK_S)
        end = tl.minimum(tl.load(offsets_ptr + group + 1), stop)
        mine = (place >= at) & (place < end)
        first, rank = tl.load(whole_ptr + FIRST * groups + group), tl.load(whole_ptr + RANK * groups + group)
        factor = tl.where(mine, tl.load(fraction_ptr + FACTOR * groups + group), factor)
        for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
            r = r0 + tl.arange(0, BLOCK_R)
            dxa = tl.load(dxa_ptr + m[:, None] * R + r[None, :], mask=mine[:, None] & (r < rank)[None, :], other=0.0)
            a_ptrs = a_ptr + (first + r)[:, None] * K + k[None, :]
            a = tl.load(a_ptrs, mask=(r < rank)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
            dx = tl.dot(dxa.to(dtype), a.to(dtype), dx, input_precision="ieee")
        at = tl.maximum(end, at + 1)
    if bits_ptr is not None:
        dx = tl.where(load_keep_mask(bits_ptr, m, place < M, tile_k * BLOCK_K, K, BLOCK_K), dx * factor[:, None], 0.0)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    dy_ptrs = dy_ptr + m[:, None] * dy_m + n[None, :] * dy_n
    w_ptrs = weight_ptr + n[:, None] * w_n + k[None, :] * w_k
    for n0 in range(0, N, BLOCK_N):
        inside = n0 + tl.arange(0, BLOCK_N) < N
        dy = tl.load(dy_ptrs, mask=(place < M)[:, None] & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        w = tl.load(w_ptrs, mask=inside[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        dx = tl.dot(dy, w, dx, input_precision="ieee")
        dy_ptrs += tl.cast(BLOCK_N, tl.int64) * dy_n
        w_ptrs += tl.cast(BLOCK_N, tl.int64) * w_n
    dx = tl.where((place >= tl.load(offsets_ptr + groups - 1))[:, None], float("nan"), dx)
    tl.store(dx_ptr + m[:, None] * K + k[None, :], dx, mask=(place < M)[:, None] & (k < K)[None, :])


@functools.lru_cache(maxsize=1024)
def _tables(
    ranks: tuple[int, ...], scale: tuple[float, ...], dropout_p: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:  # int64 [3, S + 2]: FIRST, RANK, THRESHOLD; float32 [2, S + 2]: SCALE, FACTOR
    """What the kernels need to know of each group. Kept, so that later steps copy nothing to the card."""
    first = [sum(ranks[:i]) for i in range(len(ranks))]
    whole = [[0, *first, 0], [0, *ranks, 0], [0, *map(drop_threshold, dropout_p), 0]]
    fraction = [[0.0, *scale, 0.0], [1.0, *map(keep_scale, dropout_p), 1.0]]
    return torch.tensor(whole, device=device), torch.tensor(fraction, dtype=torch.float32, device=device)


def _dropout(dropout_p: list[float], seed: Tensor | None) -> tuple[list[float], Tensor | None]:
    """The probabilities that apply, and the seed, None where nothing is dropped: kernels are compiled without a mask then."""
    if seed is None or not any(map(drop_threshold, dropout_p)):
        return [0.0] * len(dropout_p), None
    return dropout_p, seed


def _shrink(
    x: Tensor, a: Tensor, R: int, seed: Tensor | None, order: Tensor, offsets: Tensor, whole: Tensor, factor: Tensor
) -> Tensor:
    """factor_i d_i(x) a_iᵀ [M, R] in float32 for each row's own adapter, 0 beyond its rank, without the factor of d_i; a [sum R_i, K]."""
    (M, K), groups = x.shape, whole.shape[1]
    xa = x.new_empty(M, R, dtype=torch.float32)
    tile = tuning.shrink(x, M, R)
    tiles_m, tiles_r = (M + groups * (tile.rows - 1)) // tile.rows, triton.cdiv(R, tile.rank)
    parts = tuning.parts(x, tiles_m * tiles_r, triton.cdiv(K, tile.inner))
    span = triton.cdiv(triton.cdiv(K, parts), tile.inner) * tile.inner
    partials = partials_for(xa, parts)
    _shrink_kernel[tiles_m, parts, tiles_r](
        x, a, partials, seed, order, offsets, whole, factor, M, K, R, span, groups, *x.stride(), *a.stride(),
        BLOCK_M=tile.rows, BLOCK_K=tile.inner, BLOCK_R=tile.rank, BLOCK_S=triton.next_power_of_2(groups), **tile.launch,
    )  # fmt: skip
    sum_partials(partials, xa)
    return xa


def multi_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: list[Tensor], lora_b: list[Tensor], scale: list[float], dropout_p: list[float],
    seed: Tensor | None, order: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [M, N] in x's dtype and xa [M, max R_i] in float32, as `fastlora.reference.multi_lora`, on x's device and any strides.

    Raises:
        ImplementationError: x is float64.
    """
    tuning.require_float("multi_lora", x)
    ranks = tuple(a.shape[0] for a in lora_a)
    (M, K), N, R, groups = x.shape, weight.shape[0], max(ranks), len(ranks) + 2
    y = x.new_empty(M, N)
    dropout_p, seed = _dropout(dropout_p, seed)
    with torch.cuda.device_of(x):
        rows = (order, offsets, *_tables(ranks, tuple(scale), tuple(dropout_p), x.device))
        a, b = torch.cat(lora_a), torch.cat(lora_b, 1)  # [sum R_i, K], [N, sum R_i]
        block_s = triton.next_power_of_2(groups)
        xa = _shrink(x, a, R, seed, *rows[:3], rows[3][FACTOR.value])
        if M == 0:
            return y, xa
        tile = tuning.linear(x, M, N, R)
        _linear_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
            x, weight, bias, b, xa, y, *rows, M, N, K, R, groups,
            *x.stride(), *weight.stride(), b.stride(0), 0 if bias is None else bias.stride(0),
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner, BLOCK_R=tile.rank, BLOCK_S=block_s, GROUP_M=tuning.GROUP_M,
            **tile.launch,
        )  # fmt: skip
    return y, xa


def multi_lora_backward(
    dy: Tensor, x: Tensor, weight: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], xa: Tensor, scale: list[float], dropout_p: list[float],
    seed: Tensor | None, order: Tensor, offsets: Tensor, need_dx: bool, need_da: bool, need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx [M, K], and every dA_i and every dB_i one after the other, as `fastlora.reference.multi_lora_backward`; without elements where not needed.

    Raises:
        ImplementationError: x is float64.
    """
    tuning.require_float("multi_lora_backward", x)
    ranks = tuple(a.shape[0] for a in lora_a)
    (M, K), N, R, S = x.shape, weight.shape[0], max(ranks), len(ranks)
    groups, all_ranks = S + 2, sum(ranks)
    block_s = triton.next_power_of_2(groups)
    dropout_p, seed = _dropout(dropout_p, seed)
    dx = x.new_empty((M, K) if need_dx else 0)
    da = lora_a[0].new_empty(all_ranks * K if need_da else 0)
    db = lora_b[0].new_empty(all_ranks * N if need_db else 0)
    with torch.cuda.device_of(x):
        rows = (order, offsets, *_tables(ranks, tuple(scale), tuple(dropout_p), x.device))
        a, b = torch.cat(lora_a), torch.cat(lora_b, 1)  # [sum R_i, K], [N, sum R_i]

        tile = tuning.shrink_back(dy, M, N, R)
        tiles_n, tiles_r = triton.cdiv(N, tile.columns), triton.cdiv(R, tile.rank)
        parts = tuning.parts(x, tiles_n * tiles_r * S, triton.cdiv(M, tile.rows))
        db_partials = partials_for(db, parts) if need_db else None
        dxa_partials = None
        if tiles_r == 1:
            dxa = x.new_empty(M, R, dtype=torch.float32)
            dxa_partials = partials_for(dxa, tiles_n) if need_dx or need_da else None
        else:  # the partial sums would be larger than dy
            dxa = _shrink(dy, b.T, R, None, *rows[:3], rows[3][SCALE.value])
        _shrink_back_kernel[tiles_n, S * parts, tiles_r](
            dy, b, xa, dxa_partials, db_partials, *rows, M, N, R, groups, all_ranks, parts, *dy.stride(), b.stride(0),
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_R=tile.rank, **tile.launch,
        )  # fmt: skip
        if db_partials is not None:
            sum_partials(db_partials, db)
        if dxa_partials is not None:
            sum_partials(dxa_partials, dxa)

        bits = None
        if seed is not None and (need_dx or need_da):
            bits = x.new_empty(M, triton.cdiv(K, 8), dtype=torch.uint8)
            grid = (M + groups * (BLOCK_ROWS - 1)) // BLOCK_ROWS, triton.cdiv(bits.shape[1], BLOCK_GROUPS)
            _keep_bits_kernel[grid](
                bits, seed, *rows[:3], K, groups, ROWS=BLOCK_ROWS, GROUPS=BLOCK_GROUPS, BLOCK_S=block_s
            )

        if need_da:
            tile = tuning.adapter_grad(x, M, K, R)
            tiles_k, tiles_r = triton.cdiv(K, tile.columns), triton.cdiv(R, tile.rank)
            parts = tuning.parts(x, tiles_k * tiles_r * S, triton.cdiv(M, tile.rows))
            da_partials = partials_for(da, parts)
            _adapter_grad_kernel[tiles_k, S * parts, tiles_r](
                x, dxa, da_partials, bits, *rows, M, K, R, groups, all_ranks, parts, *x.stride(),
                BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_R=tile.rank, **tile.launch,
            )  # fmt: skip
            sum_partials(da_partials, da)

        if need_dx and M > 0:
            tile = tuning.linear(x, M, K, R)
            _linear_back_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(K, tile.columns),)](
                dy, weight, a, dxa, dx, bits, *rows, M, N, K, R, groups, *dy.stride(), *weight.stride(),
                BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_N=tile.inner, BLOCK_R=tile.rank, BLOCK_S=block_s,
                GROUP_M=tuning.GROUP_M, **tile.launch,
            )  # fmt: skip
    return dx, da, db


ops.implement("multi_lora", "triton", multi_lora)
ops.implement("multi_lora_backward", "triton", multi_lora_backward)
