"""y = x Wᵀ + b + s xa Bᵀ with xa = d(x) Aᵀ, and its gradients, in Triton; the equation is `fastlora.reference.lora_linear`.

    forward     xa = d(x) Aᵀ                          one read of x, the mask drawn in the kernel; a long sum is split and added in order
                y  = x Wᵀ + (s xa) Bᵀ + b             one product, the rank step last, the bias on the way out
    backward    dxa = s dy B, dB = s dyᵀ xa           one read of dy while R fits a tile; partial sums added in order
                dA = dxaᵀ d(x)                        one read of x; the mask redrawn once, as bits, for this and the next
                dx = d'(dxa A) + dy W                 one product; the rank step first, so that the mask needs no second accumulator

Products accumulate in float32. With a 16-bit x, tensor cores read A, B, s xa and dxa rounded once to x's dtype; float32 A and B are rounded as they
are loaded. With a float32 x products are IEEE float32: tf32 would lose 13 bits. The factor 1 / (1 - p) is applied to sums, not to x.
Pointers advance in 64 bits. Nothing here reads the seed or anything else back from the card.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora import ops
from fastlora.kernels import tuning
from fastlora.kernels.philox import drop_threshold, keep_bits, keep_mask, keep_scale, load_keep_mask
from fastlora.kernels.tiles import partials_for, sum_partials, tile_of


@triton.jit(do_not_specialize=["M", "threshold"])
def _shrink_kernel(
    x_ptr, a_ptr, xa_ptr, seed_ptr,  # xa: partial sums [parts, M, R]
    M, K, R, span,  # span: columns of x a part
    threshold, factor,
    x_m, x_k, a_r, a_k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    end = tl.minimum((part + 1) * span, K)
    k = (part * span + tl.arange(0, BLOCK_K)).to(tl.int64)
    x_ptrs = x_ptr + m[:, None] * x_m + k[None, :] * x_k
    a_ptrs = a_ptr + r.to(tl.int64)[None, :] * a_r + k[:, None] * a_k
    xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(part * span, end, BLOCK_K):
        inside = k0 + tl.arange(0, BLOCK_K) < end
        x = tl.load(x_ptrs, mask=(m < M)[:, None] & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if seed_ptr is not None:
            x = tl.where(keep_mask(seed_ptr, m, k0, K, threshold, BLOCK_K), x, 0.0)
        a = tl.load(a_ptrs, mask=inside[:, None] & (r < R)[None, :], other=0.0).to(x.dtype)  # [BLOCK_K, BLOCK_R]
        xa = tl.dot(x, a, xa, input_precision="ieee")
        x_ptrs += tl.cast(BLOCK_K, tl.int64) * x_k
        a_ptrs += tl.cast(BLOCK_K, tl.int64) * a_k
    xa_ptrs = xa_ptr + (part.to(tl.int64) * M + m)[:, None] * R + r[None, :]
    tl.store(xa_ptrs, xa * factor, mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, b_ptr, xa_ptr, y_ptr,
    M, N, K, R, scale,
    x_m, x_k, w_n, w_k, b_n, b_r, bias_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + m[:, None] * x_m + k[None, :] * x_k
    w_ptrs = weight_ptr + n[None, :] * w_n + k[:, None] * w_k
    dtype = x_ptr.dtype.element_ty
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        inside = k0 + tl.arange(0, BLOCK_K) < K
        x = tl.load(x_ptrs, mask=(m < M)[:, None] & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs, mask=inside[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        y = tl.dot(x, w, y, input_precision="ieee")
        x_ptrs += tl.cast(BLOCK_K, tl.int64) * x_k
        w_ptrs += tl.cast(BLOCK_K, tl.int64) * w_k
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        xa = tl.load(xa_ptr + m[:, None] * R + r[None, :], mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)
        b_ptrs = b_ptr + n[None, :] * b_n + r.to(tl.int64)[:, None] * b_r
        b = tl.load(b_ptrs, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
        y = tl.dot((xa * scale).to(dtype), b.to(dtype), y, input_precision="ieee")
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n * bias_n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], y, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M", "span"])
def _shrink_back_kernel(
    dy_ptr, b_ptr, xa_ptr, dxa_ptr, db_ptr,  # partial sums: dxa [columns of tiles, M, R] or None, dB [parts, N, R] or None
    M, N, R, span, scale,  # span: rows of dy a part
    dy_m, dy_n, b_n, b_r,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tile_n, part = tl.program_id(0), tl.program_id(1)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = part.to(tl.int64) * span
    end = tl.minimum(begin + span, M)
    ranks = (n < N)[:, None] & (r < R)[None, :]
    b = tl.load(b_ptr + n[:, None] * b_n + r.to(tl.int64)[None, :] * b_r, mask=ranks, other=0.0)  # [BLOCK_N, BLOCK_R]
    b = b.to(dy_ptr.dtype.element_ty)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m0 in range(begin, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        dy_ptrs = dy_ptr + m[:, None] * dy_m + n[None, :] * dy_n
        dy = tl.load(dy_ptrs, mask=(m < end)[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        rows = (m < end)[:, None] & (r < R)[None, :]
        if dxa_ptr is not None:
            dxa = tl.dot(dy, b, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_R]
            tl.store(dxa_ptr + (tile_n.to(tl.int64) * M + m)[:, None] * R + r[None, :], dxa, mask=rows)
        if db_ptr is not None:
            xa = tl.load(xa_ptr + m[:, None] * R + r[None, :], mask=rows, other=0.0).to(dy.dtype)  # [BLOCK_M, BLOCK_R]
            db = tl.dot(tl.trans(dy), xa, db, input_precision="ieee")
    if db_ptr is not None:
        tl.store(db_ptr + (part.to(tl.int64) * N + n)[:, None] * R + r[None, :], db * scale, mask=ranks)


@triton.jit(do_not_specialize=["M", "span"])
def _adapter_grad_kernel(
    x_ptr, dxa_ptr, da_ptr, bits_ptr,  # dA: partial sums [parts, R, K]
    M, K, R, span, factor,  # span: rows of x a part
    x_m, x_k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    first_k, part = tl.program_id(0) * BLOCK_K, tl.program_id(1)
    k = first_k.to(tl.int64) + tl.arange(0, BLOCK_K)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = part.to(tl.int64) * span
    end = tl.minimum(begin + span, M)
    da = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for m0 in range(begin, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        x_ptrs = x_ptr + m[:, None] * x_m + k[None, :] * x_k
        x = tl.load(x_ptrs, mask=(m < end)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if bits_ptr is not None:
            x = tl.where(load_keep_mask(bits_ptr, m, m < end, first_k, K, BLOCK_K), x, 0.0)
        rows = (m < end)[:, None] & (r < R)[None, :]
        dxa = tl.load(dxa_ptr + m[:, None] * R + r[None, :], mask=rows, other=0.0).to(x.dtype)  # [BLOCK_M, BLOCK_R]
        da = tl.dot(tl.trans(x), dxa, da, input_precision="ieee")
    da_ptrs = da_ptr + (part * R + r).to(tl.int64)[None, :] * K + k[:, None]
    tl.store(da_ptrs, da * factor, mask=(k < K)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["M"])
def _linear_back_kernel(
    dy_ptr, weight_ptr, a_ptr, dxa_ptr, dx_ptr, bits_ptr,
    M, N, K, R, factor,
    dy_m, dy_n, w_n, w_k, a_r, a_k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    dtype = dy_ptr.dtype.element_ty
    dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        dxa = tl.load(dxa_ptr + m[:, None] * R + r[None, :], mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)
        a_ptrs = a_ptr + r.to(tl.int64)[:, None] * a_r + k[None, :] * a_k
        a = tl.load(a_ptrs, mask=(r < R)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
        dx = tl.dot(dxa.to(dtype), a.to(dtype), dx, input_precision="ieee")
    if bits_ptr is not None:
        dx = tl.where(load_keep_mask(bits_ptr, m, m < M, tile_k * BLOCK_K, K, BLOCK_K), dx * factor, 0.0)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    dy_ptrs = dy_ptr + m[:, None] * dy_m + n[None, :] * dy_n
    w_ptrs = weight_ptr + n[:, None] * w_n + k[None, :] * w_k
    for n0 in range(0, N, BLOCK_N):
        inside = n0 + tl.arange(0, BLOCK_N) < N
        dy = tl.load(dy_ptrs, mask=(m < M)[:, None] & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        w = tl.load(w_ptrs, mask=inside[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        dx = tl.dot(dy, w, dx, input_precision="ieee")
        dy_ptrs += tl.cast(BLOCK_N, tl.int64) * dy_n
        w_ptrs += tl.cast(BLOCK_N, tl.int64) * w_n
    tl.store(dx_ptr + m[:, None] * K + k[None, :], dx, mask=(m < M)[:, None] & (k < K)[None, :])


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """(seed, threshold, factor), the seed None where nothing is dropped: kernels are compiled without a mask then."""
    threshold = drop_threshold(dropout_p)
    return (None, 0, 1.0) if seed is None or threshold == 0 else (seed, threshold, keep_scale(dropout_p))


def _shrink(x: Tensor, a: Tensor, seed: Tensor | None, threshold: int, factor: float) -> Tensor:
    """factor d(x) aᵀ [M, R] in float32, without the factor of d."""
    (M, K), R = x.shape, a.shape[0]
    xa = x.new_empty(M, R, dtype=torch.float32)
    tile = tuning.shrink(x, M, R)
    tiles_m, tiles_r = triton.cdiv(M, tile.rows), triton.cdiv(R, tile.rank)
    parts = tuning.parts(x, tiles_m * tiles_r, triton.cdiv(K, tile.inner))
    span = triton.cdiv(triton.cdiv(K, parts), tile.inner) * tile.inner
    partials = partials_for(xa, parts)
    _shrink_kernel[tiles_m, parts, tiles_r](
        x, a, partials, seed, M, K, R, span, threshold, factor, *x.stride(), *a.stride(),
        BLOCK_M=tile.rows, BLOCK_K=tile.inner, BLOCK_R=tile.rank, **tile.launch,
    )  # fmt: skip
    sum_partials(partials, xa)
    return xa


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [M, N] in x's dtype and xa [M, R] in float32, as `fastlora.reference.lora_linear`, on x's device and any strides.

    Raises:
        ImplementationError: x is float64.
    """
    tuning.require_float("lora_linear", x)
    (M, K), N, R = x.shape, weight.shape[0], lora_a.shape[0]
    seed, threshold, factor = _dropout(dropout_p, seed)
    y = x.new_empty(M, N)
    with torch.cuda.device_of(x):
        xa = _shrink(x, lora_a, seed, threshold, factor)
        if M == 0:
            return y, xa
        tile = tuning.linear(x, M, N, R)
        _linear_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
            x, weight, bias, lora_b, xa, y, M, N, K, R, scale,
            *x.stride(), *weight.stride(), *lora_b.stride(), 0 if bias is None else bias.stride(0),
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner, BLOCK_R=tile.rank, GROUP_M=tuning.GROUP_M, **tile.launch,
        )  # fmt: skip
    return y, xa


def lora_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, xa: Tensor, scale: float, dropout_p: float, seed: Tensor | None,
    need_dx: bool, need_da: bool, need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx [M, K] in x's dtype, dA [R, K] and dB [N, R] in theirs, as `fastlora.reference.lora_linear_backward`; without elements where not needed.

    Raises:
        ImplementationError: x is float64.
    """
    tuning.require_float("lora_linear_backward", x)
    xa = xa.contiguous()
    (M, K), N, R = x.shape, weight.shape[0], lora_a.shape[0]
    seed, threshold, factor = _dropout(dropout_p, seed)
    dx = x.new_empty((M, K) if need_dx else 0)
    da = lora_a.new_empty((R, K) if need_da else 0)
    db = lora_b.new_empty((N, R) if need_db else 0)
    with torch.cuda.device_of(x):
        tile = tuning.shrink_back(dy, M, N, R)
        tiles_n, tiles_r = triton.cdiv(N, tile.columns), triton.cdiv(R, tile.rank)
        parts = tuning.parts(x, tiles_n * tiles_r, triton.cdiv(M, tile.rows))
        db_partials = partials_for(db, parts) if need_db else None
        dxa_partials = None
        if tiles_r == 1:
            dxa = x.new_empty(M, R, dtype=torch.float32)
            dxa_partials = partials_for(dxa, tiles_n) if need_dx or need_da else None
        else:  # the partial sums would be larger than dy
            dxa = _shrink(dy, lora_b.T, None, 0, scale)
        _shrink_back_kernel[tiles_n, parts, tiles_r](
            dy, lora_b, xa, dxa_partials, db_partials, M, N, R, triton.cdiv(triton.cdiv(M, parts), tile.rows) * tile.rows, scale,
            *dy.stride(), *lora_b.stride(),
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_R=tile.rank, **tile.launch,
        )  # fmt: skip
        if db_partials is not None:
            sum_partials(db_partials, db)
        if dxa_partials is not None:
            sum_partials(dxa_partials, dxa)

        bits = keep_bits(seed, M, K, threshold) if seed is not None and (need_dx or need_da) else None
        if need_da:
            tile = tuning.adapter_grad(x, M, K, R)
            tiles_k, tiles_r = triton.cdiv(K, tile.columns), triton.cdiv(R, tile.rank)
            parts = tuning.parts(x, tiles_k * tiles_r, triton.cdiv(M, tile.rows))
            da_partials = partials_for(da, parts)
            _adapter_grad_kernel[tiles_k, parts, tiles_r](
                x, dxa, da_partials, bits, M, K, R, triton.cdiv(triton.cdiv(M, parts), tile.rows) * tile.rows, factor, *x.stride(),
                BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_R=tile.rank, **tile.launch,
            )  # fmt: skip
            sum_partials(da_partials, da)

        if need_dx and M > 0:
            tile = tuning.linear(x, M, K, R)
            _linear_back_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(K, tile.columns),)](
                dy, weight, lora_a, dxa, dx, bits, M, N, K, R, factor, *dy.stride(), *weight.stride(), *lora_a.stride(),
                BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_N=tile.inner, BLOCK_R=tile.rank, GROUP_M=tuning.GROUP_M, **tile.launch,
            )  # fmt: skip
    return dx, da, db


ops.implement("lora_linear", "triton", lora_linear)
ops.implement("lora_linear_backward", "triton", lora_linear_backward)
