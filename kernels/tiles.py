"""What the kernels share about tiles: their order on the card, the products in them, and sums of partial results in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SUM_BLOCK = 1024


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row of tiles, column of tiles) of a program: GROUP_M rows at a time, so that programs that run together share operands in the L2 cache."""
    in_group = GROUP_M * tiles_n
    first = (program // in_group) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = program % in_group
    return first + within % rows, within // rows


@triton.jit
def product(total, left_ptrs, right_ptrs, rows, columns, steps, left_step, right_step, BLOCK: tl.constexpr):
    """total + left right in float32: left [M, steps] where `rows`, right [steps, N] where `columns`, BLOCK steps at a time.

    The pointers are those of the first BLOCK steps; `left_step` and `right_step` are the strides of one.
    """
    for first in range(0, steps, BLOCK):
        inside = first + tl.arange(0, BLOCK) < steps
        left = tl.load(left_ptrs, mask=rows[:, None] & inside[None, :], other=0.0)  # [M, BLOCK]
        right = tl.load(right_ptrs, mask=inside[:, None] & columns[None, :], other=0.0)  # [BLOCK, N]
        total = tl.dot(left, right, total, input_precision="ieee")
        left_ptrs += tl.cast(BLOCK, tl.int64) * left_step
        right_ptrs += tl.cast(BLOCK, tl.int64) * right_step
    return total


@triton.jit
def load_sum(ptrs, mask, parts, stride):
    """The sum of `parts` partial results, `stride` elements apart, in their order."""
    total = tl.load(ptrs, mask=mask, other=0.0)
    for part in range(1, parts):
        total += tl.load(ptrs + tl.cast(part, tl.int64) * stride, mask=mask, other=0.0)
    return total


@triton.jit
def rank_step(
    total, xa_ptrs, b_ptrs, rows, columns, R, b_r, scale, parts, stride, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr
):
    """total + (scale xa) b, both rounded to DTYPE: xa [M, R] where `rows`, as partial sums (`load_sum`), b [R, N] where `columns`.

    `xa_ptrs` [M, 1] and `b_ptrs` [1, N] are those of rank 0; xa's ranks lie side by side, b's are `b_r` apart.
    """
    for first in tl.range(0, R, BLOCK_R, num_stages=1):
        r = first + tl.arange(0, BLOCK_R)
        xa = load_sum(xa_ptrs + r[None, :], rows[:, None] & (r < R)[None, :], parts, stride)  # [M, BLOCK_R]
        b_here = b_ptrs + r.to(tl.int64)[:, None] * b_r
        b = tl.load(b_here, mask=(r < R)[:, None] & columns[None, :], other=0.0)  # [BLOCK_R, N]
        total = tl.dot((xa * scale).to(DTYPE), b.to(DTYPE), total, input_precision="ieee")
    return total


@triton.jit
def store_sum(out_ptrs, ptrs, rows, R, parts, stride, BLOCK_R: tl.constexpr):
    """Leave the sum of partial results [M, R] (`load_sum`) at `out_ptrs` [M, 1], those of rank 0, as `ptrs` are."""
    for first in tl.range(0, R, BLOCK_R, num_stages=1):
        r = first + tl.arange(0, BLOCK_R)
        mask = rows[:, None] & (r < R)[None, :]
        tl.store(out_ptrs + r[None, :], load_sum(ptrs + r[None, :], mask, parts, stride), mask=mask)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns of tile [M, N]."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def column_chunks(tile, CHUNK: tl.constexpr):
    """tile [M, N] as a tuple of tiles [M, CHUNK] from left to right; N is at most 4 CHUNK, and below CHUNK the tile is the only one."""
    if tile.shape[1] == 4 * CHUNK:
        left, right = _halves(tile)
        first, second = _halves(left)
        third, fourth = _halves(right)
        return first, second, third, fourth
    elif tile.shape[1] == 2 * CHUNK:
        left, right = _halves(tile)
        return left, right
    else:
        return (tile,)


@triton.jit
def _sum_kernel(partials_ptr, out_ptr, parts, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, load_sum(partials_ptr + i, i < size, parts, size), mask=i < size)


def partials_for(out: Tensor, parts: int) -> Tensor:
    """Where a kernel that splits a sum puts its `parts` partial results [parts, *out.shape]; `out` itself where there is one."""
    return out[None] if parts == 1 else out.new_empty(parts, *out.shape, dtype=torch.float32)


def sum_partials(partials: Tensor, out: Tensor) -> None:
    """out = the sum over the first dimension of `partials`, in float32 and in that dimension's order; they are `out` where there is one."""
    if partials.shape[0] != 1:
        _sum_kernel[(triton.cdiv(out.numel(), SUM_BLOCK),)](
            partials, out, partials.shape[0], out.numel(), BLOCK=SUM_BLOCK
        )
