"""Row by row, y = x Wᵀ + b + s_i xa B_iᵀ with xa = d_i(x) A_iᵀ, in Triton; the equation is `fastlora.reference.lora_linear`.

Groups are numbered 0 (rows of the base alone), 1 to S (adapter i is group i + 1) and S + 1 (rows whose adapter does not exist). Group g has the
sorted places offsets[g] : offsets[g + 1]; order[place] is the row. Everything is found on the card: nothing waits for it.

    forward     xa      tiles of one group each, at most ceil(M / rows of a tile) + S + 2 of them, whatever the groups; the mask is stored as bits
                y       tiles of sorted places that may span groups: W is read once a tile, with one rank step a group in the tile
    backward    dxa, dB one read of dy while every R_i is small, group by group; partial sums added in order
                dA      one read of x, group by group
                dx      tiles as for y; rank steps last, a chunk of columns at a time, and the mask once for all groups in the tile

Layers that share x, and the adapter of each row, are computed together: one launch reads x for every layer's xa, one for every dA, and dx is summed
before it is written. A layer alone is a group of one.

Every group computes its own ranks only. The adapters are read where they lie, by a table of their addresses: side by side they would be a copy a
call, which at decode, where W is read once, weighs a quarter of W (8 adapters of rank 16, float32, beside 4096 by 4096 in bfloat16).

Decode is two launches, the sums of a split xa added where they are read. In one launch, either every column of tiles computes xa anew, reading sum
R_i / columns of a tile (2 for those adapters) times what W has, or tiles wait for others, which nobody has seen run on a card.

Rounding, and the second way, with the base product left to torch's library, are those of lora_linear.py.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastlora import ops
from fastlora.kernels import tuning
from fastlora.kernels.philox import draw_keep_mask, drop_threshold, keep_scale, load_keep_mask, row_bytes
from fastlora.kernels.tiles import column_chunks, partials_for, product, rank_step, store_sum, sum_partials, tile_of

# Rows of the two tables that hold, for each layer and each of the S + 2 groups, whole numbers (int64) and fractions (float32).
FIRST, RANK, THRESHOLD, ADDRESS_A, ADDRESS_B = (tl.constexpr(row) for row in range(5))
SCALE, FACTOR = (tl.constexpr(row) for row in range(2))
WHOLE, FRACTION = tl.constexpr(5), tl.constexpr(2)  # rows of each


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


@triton.jit
def _adapter_at(whole_ptr, row, groups, group, like_ptr):
    """The pointer in that row of the table; adapters are kept where 16 bytes begin (`_tables`)."""
    address = tl.load(whole_ptr + row * groups + group)
    return tl.multiple_of(address.to(like_ptr.dtype), 16)


@triton.jit(do_not_specialize=["M", "groups"])
def _shrink_kernel(
    x_ptr, like_ptr, xa_ptr, seed_ptr, keep_ptr, order_ptr, offsets_ptr, whole_ptr, factor_ptr,  # xa: partial sums [parts, LAYERS, M, R]
    M, K, R, span, groups,  # R: the largest rank; span: columns of x a part; like: the dtype of the adapters
    x_m, x_k,
    ADDRESS: tl.constexpr, TRANSPOSED: tl.constexpr,  # the adapters: [R_i, K], or [K, R_i]
    LAYERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0) % LAYERS  # neighbours in the grid read the same x
    whole_ptr += layer * WHOLE * groups
    factor_ptr += layer * FRACTION * groups
    group, first, last = _places_of_tile(offsets_ptr, tl.program_id(0) // LAYERS, groups, BLOCK_M, BLOCK_S)
    place = first + tl.arange(0, BLOCK_M)
    rows = place < last
    m = tl.load(order_ptr + place, mask=rows, other=0)
    part, tile_r = tl.program_id(1), tl.program_id(2)
    r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    rank = tl.load(whole_ptr + RANK * groups + group)
    begin = part * span
    end = tl.minimum(begin + span, K)
    # No sums for ranks that this group does not have, nor for tiles without rows: zeros are stored.
    end = tl.where((tile_r * BLOCK_R < rank) & (first < last), end, begin)
    k = (begin + tl.arange(0, BLOCK_K)).to(tl.int64)
    if TRANSPOSED:
        a_r, a_k = 1, rank
    else:
        a_r, a_k = K, 1
    x_ptrs = x_ptr + m[:, None] * x_m + k[None, :] * x_k
    a_ptrs = _adapter_at(whole_ptr, ADDRESS, groups, group, like_ptr) + r.to(tl.int64)[None, :] * a_r + k[:, None] * a_k
    xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(begin, end, BLOCK_K):
        inside = k0 + tl.arange(0, BLOCK_K) < end
        x = tl.load(x_ptrs, mask=rows[:, None] & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if seed_ptr is not None:
            threshold = tl.load(whole_ptr + THRESHOLD * groups + group).to(tl.int32)
            here = keep_ptr + tl.cast(M, tl.int64) * layer * row_bytes(K)
            keep = draw_keep_mask(seed_ptr + layer, here, m, rows & (tile_r == 0), k0, K, threshold, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        a = tl.load(a_ptrs, mask=inside[:, None] & (r < rank)[None, :], other=0.0).to(x.dtype)  # [BLOCK_K, BLOCK_R]
        xa = tl.dot(x, a, xa, input_precision="ieee")
        x_ptrs += tl.cast(BLOCK_K, tl.int64) * x_k
        a_ptrs += tl.cast(BLOCK_K, tl.int64) * a_k
    xa *= tl.load(factor_ptr + group)
    xa_ptrs = xa_ptr + ((part.to(tl.int64) * LAYERS + layer) * M + m)[:, None] * R + r[None, :]
    tl.store(xa_ptrs, xa, mask=rows[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["M", "groups"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, like_ptr, partials_ptr, xa_ptr, y_ptr,  # no weight: y holds the product; no xa: there is one part
    order_ptr, offsets_ptr, whole_ptr, fraction_ptr,
    M, N, K, R, parts, layers, groups,  # of partial sums [parts, layers, M, R] those of one layer
    x_m, x_k, w_n, w_k, bias_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    place = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = place < M
    m = tl.load(order_ptr + place, mask=rows, other=0)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = n < N
    xa_ptrs, apart = partials_ptr + m[:, None] * R, tl.cast(M, tl.int64) * R * layers
    if xa_ptr is not None:
        if tile_n == 0:
            store_sum(xa_ptr + m[:, None] * R, xa_ptrs, rows, R, parts, apart, BLOCK_R)
    if weight_ptr is None:
        y = tl.load(y_ptr + m[:, None] * N + n[None, :], mask=rows[:, None] & columns[None, :], other=0.0)
        y = y.to(tl.float32)
    else:
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        x_ptrs = x_ptr + m[:, None] * x_m + k[None, :] * x_k
        w_ptrs = weight_ptr + n[None, :] * w_n + k[:, None] * w_k
        y = product(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x_ptrs, w_ptrs, rows, columns, K, x_k, w_k, BLOCK_K)
    at = tile_m.to(tl.int64) * BLOCK_M
    stop = tl.minimum(at + BLOCK_M, M)
    while at < stop:
        group = _group_of_place(offsets_ptr, at, groups, BLOCK_S)
        end = tl.minimum(tl.load(offsets_ptr + group + 1), stop)
        rank = tl.load(whole_ptr + RANK * groups + group)
        b_ptrs = _adapter_at(whole_ptr, ADDRESS_B, groups, group, like_ptr) + n[None, :] * rank
        scale = tl.load(fraction_ptr + SCALE * groups + group)
        mine = (place >= at) & (place < end)
        y = rank_step(y, xa_ptrs, b_ptrs, mine, columns, rank, 1, scale, parts, apart, y_ptr.dtype.element_ty, BLOCK_R)
        at = tl.maximum(end, at + 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n * bias_n, mask=columns, other=0.0).to(tl.float32)[None, :]
    y = tl.where((place >= tl.load(offsets_ptr + groups - 1))[:, None], float("nan"), y)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y, mask=rows[:, None] & columns[None, :])


@triton.jit(do_not_specialize=["M", "groups", "ranks", "parts"])
def _shrink_back_kernel(
    dy_ptr, like_ptr, xa_ptr, dxa_ptr, db_ptr, order_ptr, offsets_ptr, whole_ptr, fraction_ptr,
    M, N, R, groups, ranks, parts,  # partial sums: dxa [columns of tiles, M, R] or None, dB [parts, N * ranks] or None
    dy_m, dy_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    group, part = tl.program_id(1) // parts + 1, tl.program_id(1) % parts
    rank = tl.load(whole_ptr + RANK * groups + group)
    if tl.program_id(2) * BLOCK_R >= rank:
        return
    scale = tl.load(fraction_ptr + SCALE * groups + group)
    tile_n = tl.program_id(0)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (n < N)[:, None] & (r < rank)[None, :]
    if dxa_ptr is not None:
        b_ptrs = _adapter_at(whole_ptr, ADDRESS_B, groups, group, like_ptr) + n[:, None] * rank + r[None, :]
        b = tl.load(b_ptrs, mask=mask, other=0.0).to(dy_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_R]
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
        before = tl.load(whole_ptr + FIRST * groups + group) - tl.load(whole_ptr + FIRST * groups + 1)  # of this layer
        first = part.to(tl.int64) * ranks + before
        tl.store(db_ptr + first * N + n[:, None] * rank + r[None, :], db * scale, mask=mask)


@triton.jit(do_not_specialize=["M", "groups", "ranks", "parts"])
def _adapter_grad_kernel(
    x_ptr, dxa_ptr, da_ptr, keep_ptr, order_ptr, offsets_ptr, whole_ptr, fraction_ptr,  # dxa [LAYERS, M, R]; dA: partial sums [parts, ranks * K]
    M, K, R, groups, ranks, parts,  # ranks: of all layers
    x_m, x_k,
    LAYERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0) % LAYERS  # neighbours in the grid read the same x
    dxa_ptr += tl.cast(M, tl.int64) * layer * R
    whole_ptr += layer * WHOLE * groups
    fraction_ptr += layer * FRACTION * groups
    group, part = tl.program_id(1) // parts + 1, tl.program_id(1) % parts
    rank = tl.load(whole_ptr + RANK * groups + group)
    if tl.program_id(2) * BLOCK_R >= rank:
        return
    threshold = tl.load(whole_ptr + THRESHOLD * groups + group)
    first_k = tl.program_id(0) // LAYERS * BLOCK_K
    k = first_k.to(tl.int64) + tl.arange(0, BLOCK_K)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin, end = _places_of_part(offsets_ptr, group, part, parts, BLOCK_M)
    da = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        m = tl.load(order_ptr + place, mask=place < end, other=0)
        x_ptrs = x_ptr + m[:, None] * x_m + k[None, :] * x_k
        x = tl.load(x_ptrs, mask=(place < end)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if keep_ptr is not None:
            # Nobody wrote the bits of an adapter that drops nothing.
            here = keep_ptr + tl.cast(M, tl.int64) * layer * row_bytes(K)
            keep = load_keep_mask(here, m, place < end, first_k, K, BLOCK_K) | (threshold == 0)
            x = tl.where(keep, x, 0.0)
        rows = (place < end)[:, None] & (r < rank)[None, :]
        dxa = tl.load(dxa_ptr + m[:, None] * R + r[None, :], mask=rows, other=0.0).to(x.dtype)  # [BLOCK_M, BLOCK_R]
        da = tl.dot(tl.trans(x), dxa, da, input_precision="ieee")
    da *= tl.load(fraction_ptr + FACTOR * groups + group)
    first = part.to(tl.int64) * ranks + tl.load(whole_ptr + FIRST * groups + group)
    tl.store(da_ptr + (first + r)[None, :] * K + k[:, None], da, mask=(k < K)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["M", "groups"])
def _linear_back_kernel(
    dy_ptrs, weight_ptrs, like_ptr, dxa_ptr, dx_ptr, keep_ptr, order_ptr, offsets_ptr, whole_ptr, fraction_ptr,
    M, Ns, K, R, groups,  # plurals: a tuple of LAYERS; no weights: dx holds the products; dxa [LAYERS, M, R]
    dy_strides, w_strides,
    LAYERS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    place = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = place < M
    m = tl.load(order_ptr + place, mask=rows, other=0)
    k = tile_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    if weight_ptrs is None:
        dx = tl.load(dx_ptr + m[:, None] * K + k[None, :], mask=rows[:, None] & (k < K)[None, :], other=0.0)
        dx = dx.to(tl.float32)
    else:
        dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        n = tl.arange(0, BLOCK_N).to(tl.int64)
        for i in tl.static_range(LAYERS):
            dy = dy_ptrs[i] + m[:, None] * dy_strides[i][0] + n[None, :] * dy_strides[i][1]
            w = weight_ptrs[i] + n[:, None] * w_strides[i][0] + k[None, :] * w_strides[i][1]
            dx = product(dx, dy, w, rows, k < K, Ns[i], dy_strides[i][1], w_strides[i][0], BLOCK_N)
    exists = place < tl.load(offsets_ptr + groups - 1)
    chunks = column_chunks(dx, CHUNK)
    WIDTH: tl.constexpr = chunks[0].shape[1]
    for c in tl.static_range(len(chunks)):
        chunk = chunks[c]
        first_k = tile_k * BLOCK_K + c * WIDTH
        k = first_k.to(tl.int64) + tl.arange(0, WIDTH)
        for i in tl.static_range(LAYERS):
            whole, fraction = whole_ptr + i * WHOLE * groups, fraction_ptr + i * FRACTION * groups
            dxa_ptrs = dxa_ptr + (tl.cast(M, tl.int64) * i + m)[:, None] * R
            step = tl.zeros((BLOCK_M, WIDTH), tl.float32)
            factor = tl.full((BLOCK_M,), 1.0, tl.float32)
            at = tile_m.to(tl.int64) * BLOCK_M
            stop = tl.minimum(at + BLOCK_M, M)
            while at < stop:
                group = _group_of_place(offsets_ptr, at, groups, BLOCK_S)
                end = tl.minimum(tl.load(offsets_ptr + group + 1), stop)
                mine = (place >= at) & (place < end)
                factor = tl.where(mine, tl.load(fraction + FACTOR * groups + group), factor)
                rank = tl.load(whole + RANK * groups + group)
                a_ptrs = _adapter_at(whole, ADDRESS_A, groups, group, like_ptr) + k[None, :]
                step = rank_step(
                    step, dxa_ptrs, a_ptrs, mine, k < K, rank, K, 1.0, 1, 0, dx_ptr.dtype.element_ty, BLOCK_R
                )
                at = tl.maximum(end, at + 1)
            if keep_ptr is not None:
                # Nobody wrote the bits of rows that drop nothing; their factor is 1.
                here = keep_ptr + tl.cast(M, tl.int64) * i * row_bytes(K)
                keep = load_keep_mask(here, m, rows, first_k, K, WIDTH) | (factor == 1.0)[:, None]
                step = tl.where(keep, step * factor[:, None], 0.0)
            chunk += step
        value = tl.where(exists[:, None], chunk, float("nan"))
        tl.store(dx_ptr + m[:, None] * K + k[None, :], value, mask=rows[:, None] & (k < K)[None, :])


class _Groups(NamedTuple):
    """What the kernels need to know of the groups, and the adapters of all layers in the form that they read."""

    order: Tensor  # [M]
    offsets: Tensor  # [S + 3]
    whole: Tensor  # int64 [layers, WHOLE, S + 2]: FIRST, RANK, THRESHOLD, ADDRESS_A, ADDRESS_B
    fraction: Tensor  # float32 [layers, FRACTION, S + 2]: SCALE, FACTOR
    adapters: list[Tensor]  # held while kernels read them by address

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self[:4]

    def of_layer(self, layer: int) -> Self:
        return self._replace(whole=self.whole[layer : layer + 1], fraction=self.fraction[layer : layer + 1])


def _by_layer(values: Sequence[Any], layers: int) -> list[Sequence[Any]]:
    """What every adapter has, one layer after the other, as a list for each layer."""
    S = len(values) // layers
    return [values[layer * S : (layer + 1) * S] for layer in range(layers)]


@functools.lru_cache(maxsize=2**16)
def _tables(
    layers: int, ranks: tuple[int, ...], scale: tuple[float, ...], dropout_p: tuple[float, ...], addresses: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`whole` and `fraction`. Kept: later steps copy nothing to the card, as adapters seldom move, and captured graphs go on reading them."""
    first, every = [sum(ranks[:i]) for i in range(len(ranks))], len(ranks)

    def table(rows: Sequence[Sequence[Any]], outside: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """outside: a row's entry for the rows of x without an adapter, and for those whose adapter does not exist."""
        entries = [
            [[alone, *own, alone] for own, alone in zip(of_layer, outside, strict=True)]
            for of_layer in zip(*(_by_layer(row, layers) for row in rows), strict=True)
        ]
        return torch.tensor(entries, dtype=dtype, device=device)

    whole = first, ranks, [*map(drop_threshold, dropout_p)], addresses[:every], addresses[every:]
    return table(whole, [0] * 5, torch.int64), table([scale, [*map(keep_scale, dropout_p)]], [0.0, 1.0], torch.float32)


def _groups_of(
    layers: int, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Sequence[float], dropout_p: Sequence[float], order: Tensor,
    offsets: Tensor,
) -> _Groups:  # fmt: skip
    """dropout_p: those that apply, zeros where nothing is dropped."""
    # Kernels read rows without gaps that begin where 16 bytes do, as everything does that torch itself allocates.
    adapters = [one if one.is_contiguous() and one.data_ptr() % 16 == 0 else one.clone(memory_format=torch.contiguous_format)
                for one in (*lora_a, *lora_b)]  # fmt: skip
    ranks = tuple(one.shape[0] for one in lora_a)
    addresses = tuple(one.data_ptr() for one in adapters)
    tables = _tables(layers, ranks, tuple(scale), tuple(dropout_p), addresses, order.device)
    return _Groups(order, offsets, *tables, adapters)


def _shrink(x: Tensor, groups: _Groups, xa: Tensor, back: bool, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Partial sums [parts, layers, M, R] of xa [layers, M, R], and keep: factor_i d_i(x) A_iᵀ of each row's adapter, or scale_i x B_i where `back`.

    It is 0 beyond a row's own rank. xa is filled where it is the only part. d_i has no factor of its own here; without a seed it is the identity,
    and keep has no elements.
    """
    (M, K), (layers, _, R), count = x.shape, xa.shape, groups.whole.shape[2]
    keep = x.new_empty(0 if seed is None else (layers, M, 8 * triton.cdiv(K, 64)), dtype=torch.uint8)
    tile = tuning.shrink(x, groups.adapters[0], M, R)
    programs, tiles_r = layers * ((M + count * (tile.rows - 1)) // tile.rows), triton.cdiv(R, tile.rank)
    parts = tuning.parts(x, programs * tiles_r, triton.cdiv(K, tile.inner))
    span = triton.cdiv(triton.cdiv(K, parts), tile.inner) * tile.inner
    partials = partials_for(xa, parts)
    order, offsets, whole, fraction = groups.tables
    _shrink_kernel[programs, parts, tiles_r](
        x, groups.adapters[0], partials, seed, keep, order, offsets, whole, fraction[:, (SCALE if back else FACTOR).value],
        M, K, R, span, count, *x.stride(), ADDRESS=(ADDRESS_B if back else ADDRESS_A).value, TRANSPOSED=back,
        LAYERS=layers, BLOCK_M=tile.rows, BLOCK_K=tile.inner, BLOCK_R=tile.rank, BLOCK_S=triton.next_power_of_2(count), **tile.launch,
    )  # fmt: skip
    return partials, keep


def _shrink_back(dy: Tensor, groups: _Groups, xa: Tensor, dxa: Tensor | None, db: Tensor | None) -> None:
    """One layer's scale_i dy B_i into `dxa` [1, M, R], and every scale_i dyᵀ xa into `db`, where there are such."""
    (M, N), R, count = dy.shape, xa.shape[1], groups.whole.shape[2]
    S = count - 2
    tile = tuning.shrink_back(dy, M, N, R)
    tiles_n, tiles_r = triton.cdiv(N, tile.columns), triton.cdiv(R, tile.rank)
    partials = None
    if dxa is not None and (db is None or not tuning.reads_once(dy, tile, R)):
        sums, _ = _shrink(dy, groups, dxa, back=True)
        sum_partials(sums, dxa)
    elif dxa is not None:
        partials = partials_for(dxa, tiles_n)
    if db is not None:
        ranks = db.numel() // max(N, 1)
        parts = tuning.parts(dy, tiles_n * tiles_r * S, triton.cdiv(M, tile.rows))
        db_partials = partials_for(db, parts)
        _shrink_back_kernel[tiles_n, S * parts, tiles_r](
            dy, groups.adapters[0], xa, partials, db_partials, *groups.tables, M, N, R, count, ranks, parts, *dy.stride(),
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_R=tile.rank, **tile.launch,
        )  # fmt: skip
        sum_partials(db_partials, db)
    if partials is not None and dxa is not None:
        sum_partials(partials, dxa)


def multi_lora(
    x: Tensor, weight: list[Tensor], bias: list[Tensor | None], lora_a: list[Tensor], lora_b: list[Tensor], scale: list[float],
    dropout_p: list[float], seed: Tensor | None, order: Tensor, offsets: Tensor,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Every y [M, N_g] in x's dtype, xa [G, M, max R_gi] in float32 and keep, as `fastlora.reference.lora_linear` with an order, on any strides.

    Raises:
        ImplementationError: x is float64.
    """
    op = "multi_lora" if len(weight) == 1 else "multi_lora_shared"
    tuning.require_float(op, x)
    if seed is None or not any(map(drop_threshold, dropout_p)):
        seed, dropout_p = None, [0.0] * len(lora_a)
    (M, K), R, ys = x.shape, max(one.shape[0] for one in lora_a), []
    by_library = tuning.by_library(op, x, weight[0], seed is not None)
    with torch.cuda.device_of(x):
        groups = _groups_of(len(weight), lora_a, lora_b, scale, dropout_p, order, offsets)
        count = groups.whole.shape[2]
        xa = x.new_empty(len(weight), M, R, dtype=torch.float32)
        partials, keep = _shrink(x, groups, xa, back=False, seed=seed)
        in_parts = len(partials) > 1 and M <= tuning.PARTIAL_SUM_ROWS and all(w.shape[0] for w in weight)
        if not in_parts:
            sum_partials(partials, xa)
            partials = xa[None]
        for layer, (w, b) in enumerate(zip(weight, bias, strict=True)):
            N, own = w.shape[0], partials[:, layer]
            y = F.linear(x, w, b) if by_library else x.new_empty(M, N)
            # Sixteen ranks at a time: with 32 of float32 adapters sm_80 runs out of registers.
            tile = tuning.adding(x, M, N, R) if by_library else tuning.linear(x, M, N, min(R, 16))
            base, b = (None, None) if by_library else (w, b)
            _linear_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
                x, base, b, lora_b[0], own, xa[layer] if in_parts else None, y, *groups.of_layer(layer).tables,
                M, N, K, R, len(own), len(weight), count, *x.stride(), *w.stride(), 0 if b is None else b.stride(0),
                BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner, BLOCK_R=tile.rank, BLOCK_S=triton.next_power_of_2(count),
                GROUP_M=tuning.GROUP_M, **tile.launch, **tuning.all_registers(tile),
            )  # fmt: skip
            ys.append(y)
    return ys, xa, keep


def multi_lora_backward(
    dy: list[Tensor], x: Tensor, weight: list[Tensor], lora_a: list[Tensor], lora_b: list[Tensor], xa: Tensor, keep: Tensor,
    scale: list[float], dropout_p: list[float], order: Tensor, offsets: Tensor, need_dx: bool, need_da: bool, need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx [M, K], and every dA_gi and every dB_gi one after the other, as `fastlora.reference.lora_linear_backward` with an order.

    Raises:
        ImplementationError: x is float64.
    """
    op = "multi_lora_backward" if len(weight) == 1 else "multi_lora_shared_backward"
    tuning.require_float(op, x)
    dropped = keep.numel() != 0
    bits = keep if dropped else None
    (M, K), layers, R, ranks = x.shape, len(weight), xa.shape[2], sum(one.shape[0] for one in lora_a)
    S = len(lora_a) // layers
    dx = x.new_empty((M, K) if need_dx else 0)
    da = lora_a[0].new_empty(ranks * K if need_da else 0)
    db = lora_b[0].new_empty(sum(one.numel() for one in lora_b) if need_db else 0)
    with torch.cuda.device_of(x):
        groups = _groups_of(
            layers, lora_a, lora_b, scale, dropout_p if dropped else [0.0] * len(lora_a), order, offsets
        )
        count = groups.whole.shape[2]
        dxa = x.new_empty((layers, M, R) if need_dx or need_da else (layers, 0), dtype=torch.float32)
        sizes = [sum(one.numel() for one in own) for own in _by_layer(lora_b, layers)]
        dbs = db.split(sizes) if need_db else [None] * layers
        for layer, (d, own_db) in enumerate(zip(dy, dbs, strict=True)):
            _shrink_back(d, groups.of_layer(layer), xa[layer], dxa[layer : layer + 1] if dxa.numel() else None, own_db)
        if need_da:
            tile = tuning.adapter_grad(x, M, K, R)
            programs, tiles_r = layers * triton.cdiv(K, tile.columns), triton.cdiv(R, tile.rank)
            parts = tuning.parts(x, programs * tiles_r * S, triton.cdiv(M, tile.rows))
            partials = partials_for(da, parts)
            _adapter_grad_kernel[programs, S * parts, tiles_r](
                x, dxa, partials, bits, *groups.tables, M, K, R, count, ranks, parts, *x.stride(),
                LAYERS=layers, BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_R=tile.rank, **tile.launch,
            )  # fmt: skip
            sum_partials(partials, da)
        if need_dx:
            by_library = tuning.by_library(op, x, weight[0], dropped)
            if by_library:
                torch.mm(dy[0], weight[0], out=dx)
                for d, w in zip(dy[1:], weight[1:], strict=True):
                    dx.addmm_(d, w)
            tile = tuning.adding(x, M, K, R) if by_library else tuning.linear(x, M, K, R, layers)
            products = (None, None) if by_library else (tuple(dy), tuple(weight))
            _linear_back_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(K, tile.columns),)](
                *products, lora_a[0], dxa, dx, bits, *groups.tables, M, tuple(w.shape[0] for w in weight), K, R, count,
                tuple(d.stride() for d in dy), tuple(w.stride() for w in weight), LAYERS=layers, CHUNK=tuning.chunk(layers),
                BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_N=tile.inner, BLOCK_R=tile.rank, BLOCK_S=triton.next_power_of_2(count),
                GROUP_M=tuning.GROUP_M, **tile.launch,
            )  # fmt: skip
    return dx, da, db


for case in ("multi_lora", "multi_lora_shared"):
    ops.implement(case, "triton", multi_lora)
    ops.implement(f"{case}_backward", "triton", multi_lora_backward)
