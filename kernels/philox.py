"""The dropout mask on the device, the bits of `fastlora.reference.keep_mask`: Philox4x32-10, eight 16-bit decisions a call.

Where x is read in its own order the mask is drawn on the spot. In a product's result, threads hold columns in twos and
would make each call four times over: a backward pass draws the mask once, as bits (a sixteenth of a 16-bit x), and its
kernels read those.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_GROUPS = 16, 64


def drop_threshold(dropout_p: float) -> int:
    """The 16-bit number below which a half-word drops its element: p rounded to a multiple of 1/65536."""
    return int(65536 * dropout_p + 0.5)


def keep_scale(dropout_p: float) -> float:
    """What a kept element is multiplied by: one over the probability of keeping it; 0 if none is kept."""
    kept = 65536 - drop_threshold(dropout_p)
    return 65536 / kept if kept else 0.0


@triton.jit
def draw_bits(seed_ptr, rows, groups, columns, threshold):
    """Eight decisions a group of eight columns: int32 [len(rows), len(groups)], bit j set where column 8 * group + j is kept.

    key = seed, counter = row * ceil(columns / 8) + group; half-word j of the 128 bits decides bit j. `rows` is int64.
    """
    counter = rows[:, None] * tl.cdiv(columns, 8) + groups[None, :]
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    words = tl.philox(tl.load(seed_ptr), low, high, zero, zero)
    bits = tl.zeros_like(low).to(tl.int32)
    for i in tl.static_range(4):
        bits |= ((words[i] & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32) << (2 * i)
        bits |= ((words[i] >> 16).to(tl.int32) >= threshold).to(tl.int32) << (2 * i + 1)
    return bits


@triton.jit
def _spread(bits, BLOCK: tl.constexpr):
    """bool [rows, BLOCK] from eight bits a number [rows, BLOCK / 8]."""
    each = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(each, (bits.shape[0], BLOCK)) != 0


@triton.jit
def keep_mask(seed_ptr, rows, first_column, columns, threshold, BLOCK: tl.constexpr):
    """Whether dropout keeps x[rows, first_column : first_column + BLOCK]: bool [len(rows), BLOCK]; `first_column` is a multiple of 8."""
    groups = first_column // 8 + tl.arange(0, BLOCK // 8)
    return _spread(draw_bits(seed_ptr, rows, groups, columns, threshold), BLOCK)


@triton.jit
def load_keep_mask(bits_ptr, rows, inside, first_column, columns, BLOCK: tl.constexpr):
    """`keep_mask` from bits that were drawn before, uint8 [rows of x, ceil(columns / 8)]; False for rows that are not `inside`."""
    groups = first_column // 8 + tl.arange(0, BLOCK // 8)
    a_row = tl.cdiv(columns, 8)
    mask = inside[:, None] & (groups < a_row)[None, :]
    bits = tl.load(bits_ptr + rows[:, None] * a_row + groups[None, :], mask=mask, other=0)
    return _spread(bits.to(tl.int32), BLOCK)


@triton.jit(do_not_specialize=["M", "threshold"])
def _keep_bits_kernel(bits_ptr, seed_ptr, M, columns, threshold, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    bits = draw_bits(seed_ptr, m, groups, columns, threshold)
    a_row = tl.cdiv(columns, 8)
    mask = (m < M)[:, None] & (groups < a_row)[None, :]
    tl.store(bits_ptr + m[:, None] * a_row + groups[None, :], bits.to(tl.uint8), mask=mask)


def keep_bits(seed: Tensor, rows: int, columns: int, threshold: int) -> Tensor:
    """The mask of x [rows, columns] as bits: uint8 [rows, ceil(columns / 8)] on the seed's device, bit j of a byte for its column j."""
    bits = torch.empty(rows, triton.cdiv(columns, 8), dtype=torch.uint8, device=seed.device)
    grid = triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(bits.shape[1], BLOCK_GROUPS)
    _keep_bits_kernel[grid](bits, seed, rows, columns, threshold, ROWS=BLOCK_ROWS, GROUPS=BLOCK_GROUPS)
    return bits
