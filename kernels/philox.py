"""The dropout mask on the device, the bits of `fastlora.reference.keep_mask`: Philox4x32-10, eight 16-bit decisions a call.

The forward draws the mask where it reads x in its own order, and stores it as it draws, a sixteenth of a 16-bit x. In a product's result threads
hold columns in twos and would make each call four times over: the backward reads the bits. They are uint8 [M, `row_bytes`], bit j of byte i of a
row for column 8 i + j.
"""

import triton
import triton.language as tl


def drop_threshold(dropout_p: float) -> int:
    """The 16-bit number below which a half-word drops its element: p rounded to a multiple of 1/65536."""
    return int(65536 * dropout_p + 0.5)


def keep_scale(dropout_p: float) -> float:
    """What a kept element is multiplied by: one over the probability of keeping it; 0 if none is kept."""
    kept = 65536 - drop_threshold(dropout_p)
    return 65536 / kept if kept else 0.0


@triton.jit
def row_bytes(columns):
    """Bytes of a row of bits: whole words of eight, so that rows stay aligned."""
    return tl.cdiv(columns, 64) * 8


@triton.jit
def draw_bits(seed_ptr, rows, eights, columns, threshold):
    """Eight decisions an eight of columns: int32 [len(rows), len(eights)], bit j set where column 8 * eight + j is kept.

    key = seed, counter = row * ceil(columns / 8) + eight; half-word j of the 128 bits decides bit j. `rows` is int64.
    """
    counter = rows[:, None] * tl.cdiv(columns, 8) + eights[None, :]
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
def draw_keep_mask(seed_ptr, keep_ptr, rows, inside, first_column, columns, threshold, BLOCK: tl.constexpr):
    """Whether dropout keeps x[rows, first_column : first_column + BLOCK]: bool [len(rows), BLOCK]; `first_column` is a multiple of 8.

    The bits of the rows that are `inside` are stored, where there is a `keep_ptr`.
    """
    eights = first_column // 8 + tl.arange(0, BLOCK // 8)
    bits = draw_bits(seed_ptr, rows, eights, columns, threshold)
    if keep_ptr is not None:
        mask = inside[:, None] & (eights < row_bytes(columns))[None, :]
        tl.store(keep_ptr + rows[:, None] * row_bytes(columns) + eights[None, :], bits.to(tl.uint8), mask=mask)
    return _spread(bits, BLOCK)


@triton.jit
def load_keep_mask(keep_ptr, rows, inside, first_column, columns, BLOCK: tl.constexpr):
    """`draw_keep_mask` from the bits that it stored; False for rows that are not `inside`."""
    eights = first_column // 8 + tl.arange(0, BLOCK // 8)
    mask = inside[:, None] & (eights < row_bytes(columns))[None, :]
    bits = tl.load(keep_ptr + rows[:, None] * row_bytes(columns) + eights[None, :], mask=mask, other=0)
    return _spread(bits.to(tl.int32), BLOCK)
