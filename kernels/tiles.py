"""What the kernels share about tiles: their order on the card, and sums of partial results in a fixed order."""

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
def _sum_kernel(partials_ptr, out_ptr, parts, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(partials_ptr + tl.cast(part, tl.int64) * size + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, total, mask=i < size)


def partials_for(out: Tensor, parts: int) -> Tensor:
    """Where a kernel that splits a sum puts its `parts` partial results [parts, *out.shape]; `out` itself where there is one."""
    return out[None] if parts == 1 else out.new_empty(parts, *out.shape, dtype=torch.float32)


def sum_partials(partials: Tensor, out: Tensor) -> None:
    """out = the sum over the first dimension of `partials`, in float32 and in that dimension's order; they are `out` where there is one."""
    if partials.shape[0] != 1:
        _sum_kernel[(triton.cdiv(out.numel(), SUM_BLOCK),)](
            partials, out, partials.shape[0], out.numel(), BLOCK=SUM_BLOCK
        )
