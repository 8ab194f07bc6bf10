"""The dropout mask on the device, the bits of `fastlora.reference.keep_mask`: Philox4x32-10, eight 16-bit decisions a call."""

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
def keep_mask(seed_ptr, rows, first_column, columns, threshold, BLOCK: tl.constexpr):
    """Whether dropout keeps x[rows, first_column : first_column + BLOCK]: bool [len(rows), BLOCK].

    key = seed, counter = row * ceil(columns / 8) + column // 8; half-word j of the 128 bits decides column 8 * (column // 8) + j.
    `rows` is int64, `first_column` a multiple of 8, `threshold` one number or one a row ([len(rows), 1]).
    """
    group = first_column // 8 + tl.arange(0, BLOCK // 8)
    counter = rows[:, None] * tl.cdiv(columns, 8) + group[None, :]  # [rows, BLOCK / 8]
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    words = tl.philox(tl.load(seed_ptr), low, high, zero, zero)
    # The eight decisions travel as bits of one number, so that only it has to change threads when it is spread over its columns.
    kept = tl.zeros_like(low).to(tl.int32)
    for i in tl.static_range(4):
        kept |= ((words[i] & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32) << (2 * i)
        kept |= ((words[i] >> 16).to(tl.int32) >= threshold).to(tl.int32) << (2 * i + 1)
    bits = (kept[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1  # [rows, BLOCK / 8, 8]
    return tl.reshape(bits, (rows.shape[0], BLOCK)) != 0
