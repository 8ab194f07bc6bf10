"""y = x Wᵀ + b + s xa Bᵀ with xa = d(x) Aᵀ, and its gradients, in Triton; the equation is `fastlora.reference.lora_linear`.

Layers that share x are computed together; a layer alone is one of one.

    forward     xa = d(x) Aᵀ      one launch: the layers that read a tile of x are neighbours in the grid, so that the card's memory gives it once;
                                  the mask is drawn here and stored as bits; a long sum is split and added in order
                y  = x Wᵀ + b + (s xa) Bᵀ    a launch a layer: one product, the rank step last, the bias on the way out
    backward    dxa = s dy B, dB = s dyᵀ xa  one read of dy while R is small; beyond, the partial sums of dxa would cost more than a second read
                dA = dxaᵀ d(x)               one launch, x read once for all layers, as for xa
                dx = sum of dy W + d'(dxa A) one launch: products of all layers, then their rank steps, into one accumulator; dx is written once

The rank steps of dx come last, a chunk of columns at a time: only a chunk has a second accumulator, which its mask needs. Compiled for 128 by 128
tiles of bfloat16, R 16, that takes 128 registers a thread on sm_90 where the rank step before the product took 150, a whole second accumulator 205.

The second way leaves the products x Wᵀ and dy W to torch's library (cuBLAS), and the same kernels then add the rank step to what it wrote: two more
passes over y, and 2 G over a dx of G layers, for a product that may be faster. `tuning.by_library` chooses.

Products accumulate in float32. With a 16-bit x, tensor cores read A, B, s xa and dxa rounded once to x's dtype; float32 A and B are rounded as they
are loaded. With a float32 x products are IEEE float32: tf32 would lose 13 bits (the library's follow torch's setting, as plain PyTorch's do). The
factor 1 / (1 - p) is applied to sums, not to x. Pointers advance in 64 bits. Nothing here reads the seed or anything else back from the card.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastlora import ops
from fastlora.kernels import tuning
from fastlora.kernels.philox import draw_keep_mask, drop_threshold, keep_scale, load_keep_mask, row_bytes
from fastlora.kernels.tiles import column_chunks, partials_for, product, rank_step, store_sum, sum_partials, tile_of


@triton.jit(do_not_specialize=["M"])
def _shrink_kernel(
    x_ptr, a_ptrs, xa_ptr, seed_ptr, keep_ptr,  # xa: partial sums [parts, LAYERS, M, R]; plurals: a tuple of LAYERS
    M, K, R, Rs, span, thresholds, factors,  # R: the largest rank; span: columns of x a part
    x_m, x_k, a_strides,
    LAYERS: tl.constexpr, TILES_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    layer, tile_r = tl.program_id(0) % LAYERS, tl.program_id(0) // LAYERS % TILES_R
    m = (tl.program_id(0) // (LAYERS * TILES_R)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    for i in tl.static_range(LAYERS):
        if layer == i:
            _shrink_tile(
                x_ptr, a_ptrs[i], xa_ptr, seed_ptr, keep_ptr, i, M, K, R, Rs[i], m, tile_r, span,
                thresholds[i], factors[i], x_m, x_k, a_strides[i][0], a_strides[i][1], LAYERS, BLOCK_M, BLOCK_K, BLOCK_R,
            )  # fmt: skip


@triton.jit
def _shrink_tile(
    x_ptr, a_ptr, xa_ptr, seed_ptr, keep_ptr, layer, M, K, R, rank, m, tile_r, span, threshold, factor, x_m, x_k, a_r, a_k,
    LAYERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    end = tl.minimum((part + 1) * span, K)
    k = (part * span + tl.arange(0, BLOCK_K)).to(tl.int64)
    rows = m < M
    x_ptrs = x_ptr + m[:, None] * x_m + k[None, :] * x_k
    a_ptrs = a_ptr + r.to(tl.int64)[None, :] * a_r + k[:, None] * a_k
    xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(part * span, end, BLOCK_K):
        inside = k0 + tl.arange(0, BLOCK_K) < end
        x = tl.load(x_ptrs, mask=rows[:, None] & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if seed_ptr is not None:
            here = keep_ptr + tl.cast(M, tl.int64) * layer * row_bytes(K)
            keep = draw_keep_mask(seed_ptr + layer, here, m, rows & (tile_r == 0), k0, K, threshold, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        a = tl.load(a_ptrs, mask=inside[:, None] & (r < rank)[None, :], other=0.0).to(x.dtype)  # [BLOCK_K, BLOCK_R]
        xa = tl.dot(x, a, xa, input_precision="ieee")
        x_ptrs += tl.cast(BLOCK_K, tl.int64) * x_k
        a_ptrs += tl.cast(BLOCK_K, tl.int64) * a_k
    xa_ptrs = xa_ptr + ((part.to(tl.int64) * LAYERS + layer) * M + m)[:, None] * R + r[None, :]
    tl.store(xa_ptrs, xa * factor, mask=rows[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, b_ptr, partials_ptr, xa_ptr, y_ptr,  # no weight: y holds the product; no xa: there is one part
    M, N, K, R, xa_m, apart, parts, scale,  # of partial sums [parts, layers, M, xa_m], `apart` from one to the next, those of one layer
    x_m, x_k, w_n, w_k, b_n, b_r, bias_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = m < M, n < N
    stride = tl.cast(apart, tl.int64)
    xa_ptrs, b_ptrs = partials_ptr + m[:, None] * xa_m, b_ptr + n[None, :] * b_n
    if xa_ptr is not None:
        if tile_n == 0:
            store_sum(xa_ptr + m[:, None] * xa_m, xa_ptrs, rows, xa_m, parts, stride, BLOCK_R)
    if weight_ptr is None:
        y = tl.load(y_ptr + m[:, None] * N + n[None, :], mask=rows[:, None] & columns[None, :], other=0.0)
        y = y.to(tl.float32)
    else:
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        x_ptrs = x_ptr + m[:, None] * x_m + k[None, :] * x_k
        w_ptrs = weight_ptr + n[None, :] * w_n + k[:, None] * w_k
        y = product(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x_ptrs, w_ptrs, rows, columns, K, x_k, w_k, BLOCK_K)
    y = rank_step(y, xa_ptrs, b_ptrs, rows, columns, R, b_r, scale, parts, stride, y_ptr.dtype.element_ty, BLOCK_R)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n * bias_n, mask=columns, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], y, mask=rows[:, None] & columns[None, :])


@triton.jit(do_not_specialize=["M", "span"])
def _shrink_back_kernel(
    dy_ptr, b_ptr, xa_ptr, dxa_ptr, db_ptr,  # partial sums: dxa [columns of tiles, M, R] or None, dB [parts, N, R] or None
    M, N, R, span, scale,  # span: rows of dy a part
    dy_m, dy_n, b_n, b_r, xa_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tile_n, part = tl.program_id(0), tl.program_id(1)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = part.to(tl.int64) * span
    end = tl.minimum(begin + span, M)
    ranks = (n < N)[:, None] & (r < R)[None, :]
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    if dxa_ptr is not None:
        b = tl.load(b_ptr + n[:, None] * b_n + r.to(tl.int64)[None, :] * b_r, mask=ranks, other=0.0)
        b = b.to(dy_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_R]
    for m0 in range(begin, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        dy_ptrs = dy_ptr + m[:, None] * dy_m + n[None, :] * dy_n
        dy = tl.load(dy_ptrs, mask=(m < end)[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        rows = (m < end)[:, None] & (r < R)[None, :]
        if dxa_ptr is not None:
            dxa = tl.dot(dy, b, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_R]
            tl.store(dxa_ptr + (tile_n.to(tl.int64) * M + m)[:, None] * R + r[None, :], dxa, mask=rows)
        if db_ptr is not None:
            xa = tl.load(xa_ptr + m[:, None] * xa_m + r[None, :], mask=rows, other=0.0).to(dy.dtype)
            db = tl.dot(tl.trans(dy), xa, db, input_precision="ieee")
    if db_ptr is not None:
        tl.store(db_ptr + (part.to(tl.int64) * N + n)[:, None] * R + r[None, :], db * scale, mask=ranks)


@triton.jit(do_not_specialize=["M", "span"])
def _adapter_grad_kernel(
    x_ptr, dxa_ptrs, da_ptr, keep_ptr,  # dA: partial sums [parts, ranks, K]; plurals: a tuple of LAYERS
    M, K, ranks, Rs, span, thresholds, factors,  # span: rows of x a part
    x_m, x_k,
    LAYERS: tl.constexpr, TILES_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    layer, tile_r = tl.program_id(0) % LAYERS, tl.program_id(0) // LAYERS % TILES_R
    first_k = tl.program_id(0) // (LAYERS * TILES_R) * BLOCK_K
    first = tl.program_id(1).to(tl.int64) * ranks
    for i in tl.static_range(LAYERS):
        if layer == i:
            _adapter_grad_tile(
                x_ptr, dxa_ptrs[i], da_ptr + first * K, keep_ptr, i, M, K, Rs[i], first_k, tile_r, span, thresholds[i], factors[i],
                x_m, x_k, BLOCK_M, BLOCK_K, BLOCK_R,
            )  # fmt: skip
        first += Rs[i]


@triton.jit
def _adapter_grad_tile(
    x_ptr, dxa_ptr, da_ptr, keep_ptr, layer, M, K, R, first_k, tile_r, span, threshold, factor, x_m, x_k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    k = first_k.to(tl.int64) + tl.arange(0, BLOCK_K)
    r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.program_id(1).to(tl.int64) * span
    end = tl.minimum(begin + span, M)
    da = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for m0 in range(begin, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        x_ptrs = x_ptr + m[:, None] * x_m + k[None, :] * x_k
        x = tl.load(x_ptrs, mask=(m < end)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if keep_ptr is not None:
            keep = _load_keep(keep_ptr, layer, m, M, m < end, first_k, K, threshold, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        rows = (m < end)[:, None] & (r < R)[None, :]
        dxa = tl.load(dxa_ptr + m[:, None] * R + r[None, :], mask=rows, other=0.0).to(x.dtype)  # [BLOCK_M, BLOCK_R]
        da = tl.dot(tl.trans(x), dxa, da, input_precision="ieee")
    tl.store(da_ptr + r.to(tl.int64)[None, :] * K + k[:, None], da * factor, mask=(k < K)[:, None] & (r < R)[None, :])


@triton.jit
def _load_keep(keep_ptr, layer, m, M, rows, first_column, K, threshold, BLOCK: tl.constexpr):
    """The layer's mask, from the bits of all layers; nobody wrote those of a layer that drops nothing."""
    here = keep_ptr + tl.cast(M, tl.int64) * layer * row_bytes(K)
    return load_keep_mask(here, m, rows, first_column, K, BLOCK) | (threshold == 0)


@triton.jit(do_not_specialize=["M"])
def _linear_back_kernel(
    dy_ptrs, weight_ptrs, a_ptrs, dxa_ptrs, dx_ptr, keep_ptr,  # plurals: a tuple of LAYERS; no weights: dx holds the products
    M, K, Ns, Rs, thresholds, factors,
    dy_strides, w_strides, a_strides,
    LAYERS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = m < M
    if weight_ptrs is None:
        dx_ptrs = dx_ptr + m[:, None] * K + k[None, :]
        dx = tl.load(dx_ptrs, mask=rows[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    else:
        dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        n = tl.arange(0, BLOCK_N).to(tl.int64)
        for i in tl.static_range(LAYERS):
            dy = dy_ptrs[i] + m[:, None] * dy_strides[i][0] + n[None, :] * dy_strides[i][1]
            w = weight_ptrs[i] + n[:, None] * w_strides[i][0] + k[None, :] * w_strides[i][1]
            dx = product(dx, dy, w, rows, k < K, Ns[i], dy_strides[i][1], w_strides[i][0], BLOCK_N)
    chunks = column_chunks(dx, CHUNK)
    WIDTH: tl.constexpr = chunks[0].shape[1]
    for c in tl.static_range(len(chunks)):
        chunk = chunks[c]
        first = tile_k * BLOCK_K + c * WIDTH
        k = first.to(tl.int64) + tl.arange(0, WIDTH)
        for i in tl.static_range(LAYERS):
            a = a_ptrs[i] + k[None, :] * a_strides[i][1]
            step = rank_step(
                tl.zeros_like(chunk), dxa_ptrs[i] + m[:, None] * Rs[i], a, rows, k < K, Rs[i], a_strides[i][0], 1.0, 1, 0,
                dx_ptr.dtype.element_ty, BLOCK_R,
            )  # fmt: skip
            if keep_ptr is not None:
                keep = _load_keep(keep_ptr, i, m, M, rows, first, K, thresholds[i], WIDTH)
                step = tl.where(keep, step * factors[i], 0.0)
            chunk += step
        tl.store(dx_ptr + m[:, None] * K + k[None, :], chunk, mask=rows[:, None] & (k < K)[None, :])


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(one.stride() for one in tensors)


def _shrink(
    x: Tensor, a: Sequence[Tensor], factors: Sequence[float], thresholds: Sequence[int] = (), seed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(xa [layers, M, max R_i], its partial sums [parts, layers, M, max R_i], keep [layers, M, bytes]) with every xa_i = factor_i d_i(x) a_iᵀ.

    xa is filled where it is the only part, zeros beyond a layer's rank. d has no factor of its own here; without a seed it is the identity, and
    keep has no elements.
    """
    (M, K), ranks, layers = x.shape, tuple(one.shape[0] for one in a), len(a)
    xa = x.new_empty(layers, M, max(ranks), dtype=torch.float32)
    keep = x.new_empty(0 if seed is None else (layers, M, 8 * triton.cdiv(K, 64)), dtype=torch.uint8)
    tile = tuning.shrink(x, a[0], M, max(ranks))
    tiles_r = triton.cdiv(max(ranks), tile.rank)
    programs = triton.cdiv(M, tile.rows) * tiles_r * layers
    parts = tuning.parts(x, programs, triton.cdiv(K, tile.inner))
    span = triton.cdiv(triton.cdiv(K, parts), tile.inner) * tile.inner
    partials = partials_for(xa, parts)
    _shrink_kernel[programs, parts](
        x, tuple(a), partials, seed, keep, M, K, max(ranks), ranks, span, tuple(thresholds) or (0,) * layers, tuple(factors),
        *x.stride(), _strides(a),
        LAYERS=layers, TILES_R=tiles_r, BLOCK_M=tile.rows, BLOCK_K=tile.inner, BLOCK_R=tile.rank, **tile.launch,
    )  # fmt: skip
    return xa, partials, keep


def _shrink_back(dy: Tensor, b: Tensor, xa: Tensor, scale: float, need_dxa: bool, db: Tensor | None) -> Tensor | None:
    """dxa [M, R] = scale dy b in float32 where it is needed, and scale dyᵀ xa into `db` where there is one."""
    (M, N), R = dy.shape, b.shape[1]
    tile = tuning.shrink_back(dy, M, N, R)
    tiles_n, tiles_r = triton.cdiv(N, tile.columns), triton.cdiv(R, tile.rank)
    dxa = partials = None
    if need_dxa and (db is None or not tuning.reads_once(dy, tile, R)):
        [dxa], sums, _ = _shrink(dy, [b.T], [scale])
        sum_partials(sums, dxa)
    elif need_dxa:
        dxa = dy.new_empty(M, R, dtype=torch.float32)
        partials = partials_for(dxa, tiles_n)
    if db is not None:
        parts = tuning.parts(dy, tiles_n * tiles_r, triton.cdiv(M, tile.rows))
        db_partials = partials_for(db, parts)
        _shrink_back_kernel[tiles_n, parts, tiles_r](
            dy, b, xa, partials, db_partials, M, N, R, triton.cdiv(triton.cdiv(M, parts), tile.rows) * tile.rows, scale,
            *dy.stride(), *b.stride(), xa.stride(0),
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_R=tile.rank, **tile.launch,
        )  # fmt: skip
        sum_partials(db_partials, db)
    if partials is not None and dxa is not None:
        sum_partials(partials, dxa)
    return dxa


def lora_linear(
    x: Tensor, weight: list[Tensor], bias: list[Tensor | None], lora_a: list[Tensor], lora_b: list[Tensor], scale: list[float],
    dropout_p: list[float], seed: Tensor | None, order: None, offsets: None,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Every y [M, N_i] in x's dtype, xa [G, M, max R_i] in float32 and keep [G, M, bytes], as `fastlora.reference.lora_linear` without an order.

    Raises:
        ImplementationError: x is float64.
    """
    op = "lora_linear" if len(weight) == 1 else "lora_linear_shared"
    tuning.require_float(op, x)
    thresholds = [drop_threshold(p) for p in dropout_p]
    if seed is None or not any(thresholds):
        seed, dropout_p, thresholds = None, [0.0] * len(weight), []
    (M, K), ys = x.shape, []
    by_library = tuning.by_library(op, x, weight[0], seed is not None)
    with torch.cuda.device_of(x):
        xa, partials, keep = _shrink(x, lora_a, [keep_scale(p) for p in dropout_p], thresholds, seed)
        in_parts = len(partials) > 1 and M <= tuning.PARTIAL_SUM_ROWS and all(w.shape[0] for w in weight)
        if not in_parts:  # else whoever uses the partial sums adds them: a launch saved
            sum_partials(partials, xa)
            partials = xa[None]
        for layer, (w, c, b, s) in enumerate(zip(weight, bias, lora_b, scale, strict=True)):
            (N, R), own = b.shape, partials[:, layer]
            y = F.linear(x, w, c) if by_library else x.new_empty(M, N)
            tile = tuning.adding(x, M, N, R) if by_library else tuning.linear(x, M, N, R)
            base, c = (None, None) if by_library else (w, c)
            _linear_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
                x, base, c, b, own, xa[layer] if in_parts else None, y, M, N, K, R, own.shape[2], own.stride(0), len(own), s,
                *x.stride(), *w.stride(), *b.stride(), 0 if c is None else c.stride(0),
                BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner, BLOCK_R=tile.rank, GROUP_M=tuning.GROUP_M, **tile.launch,
            )  # fmt: skip
            ys.append(y)
    return ys, xa, keep


def lora_linear_backward(
    dy: list[Tensor], x: Tensor, weight: list[Tensor], lora_a: list[Tensor], lora_b: list[Tensor], xa: Tensor, keep: Tensor,
    scale: list[float], dropout_p: list[float], order: None, offsets: None, need_dx: bool, need_da: bool, need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx [M, K], and every dA_i and every dB_i one after the other, as `fastlora.reference.lora_linear_backward` without an order.

    Raises:
        ImplementationError: x is float64.
    """
    op = "lora_linear_backward" if len(weight) == 1 else "lora_linear_shared_backward"
    tuning.require_float(op, x)
    xa = xa.contiguous()
    (M, K), layers, ranks = x.shape, len(weight), tuple(one.shape[0] for one in lora_a)
    dropped = keep.numel() != 0
    thresholds = tuple(drop_threshold(p) if dropped else 0 for p in dropout_p)
    factors = tuple(keep_scale(p) if dropped else 1.0 for p in dropout_p)
    bits = keep if dropped else None
    dx = x.new_empty((M, K) if need_dx else 0)
    da = lora_a[0].new_empty(sum(ranks) * K if need_da else 0)
    db = lora_b[0].new_empty(sum(one.numel() for one in lora_b) if need_db else 0)
    with torch.cuda.device_of(x):
        dbs = db.split([one.numel() for one in lora_b]) if need_db else [None] * layers
        each = zip(dy, lora_b, xa, scale, dbs, strict=True)
        dxa = tuple(_shrink_back(d, b_i, xa_i, s, need_dx or need_da, db_i) for d, b_i, xa_i, s, db_i in each)
        if need_da:
            tile = tuning.adapter_grad(x, M, K, max(ranks))
            tiles_r = triton.cdiv(max(ranks), tile.rank)
            programs = triton.cdiv(K, tile.columns) * tiles_r * layers
            parts = tuning.parts(x, programs, triton.cdiv(M, tile.rows))
            partials = partials_for(da, parts)
            _adapter_grad_kernel[programs, parts](
                x, dxa, partials, bits, M, K, sum(ranks), ranks, triton.cdiv(triton.cdiv(M, parts), tile.rows) * tile.rows, thresholds, factors,
                *x.stride(), LAYERS=layers, TILES_R=tiles_r, BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_R=tile.rank, **tile.launch,
            )  # fmt: skip
            sum_partials(partials, da)
        if need_dx:
            by_library = tuning.by_library(op, x, weight[0], dropped)
            if by_library:
                torch.mm(dy[0], weight[0], out=dx)
                for d, w in zip(dy[1:], weight[1:], strict=True):
                    dx.addmm_(d, w)
            tile = tuning.adding(x, M, K, max(ranks)) if by_library else tuning.linear(x, M, K, max(ranks), layers)
            products = (None, None) if by_library else (tuple(dy), tuple(weight))
            _linear_back_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(K, tile.columns),)](
                *products, tuple(lora_a), dxa, dx, bits, M, K, tuple(w.shape[0] for w in weight), ranks, thresholds, factors,
                _strides(dy), _strides(weight), _strides(lora_a),
                LAYERS=layers, CHUNK=tuning.chunk(layers), BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_N=tile.inner, BLOCK_R=tile.rank,
                GROUP_M=tuning.GROUP_M, **tile.launch,
            )  # fmt: skip
    return dx, da, db


for case in ("lora_linear", "lora_linear_shared"):
    ops.implement(case, "triton", lora_linear)
    ops.implement(f"{case}_backward", "triton", lora_linear_backward)
