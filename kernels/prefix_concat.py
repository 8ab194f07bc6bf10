"""Rows [P_i ; x] with mask, positions and labels, in Triton; the equation is `fastlora.reference.prefix_concat`.

    forward     count           tokens of each row, and whether it is padded on the left
                lay out         source, mask, positions and labels of each row; a row without padding asks the others for their side
                gather          every row of the result, read once and written once
    backward    spans           where each batch row has its prompt
                dprompts        each prompt row sums its batch rows in their order, in float32 or wider
                dembeds         each token takes its column back

Everything is a copy but dprompts; prompts are rounded once to the dtype of the result. Nothing is read back from the card.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora import ops

BLOCK_D = 512
BLOCK_T = 1024


@triton.jit(do_not_specialize=["T"])
def _count_kernel(mask_ptr, tokens_ptr, padded_left_ptr, T, mask_b, mask_t, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    tokens = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int32)  # whether column 0 is real
    for t0 in range(0, T, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        real = (tl.load(mask_ptr + b * mask_b + t.to(tl.int64) * mask_t, mask=t < T, other=0) != 0).to(tl.int32)
        tokens += tl.sum(real, 0)
        first += tl.sum(tl.where(t == 0, real, 0), 0)
    tl.store(tokens_ptr + b, tokens)
    tl.store(padded_left_ptr + b, ((tokens > 0) & (first == 0)).to(tl.int32))


@triton.jit(do_not_specialize=["B", "S", "T", "W"])
def _layout_kernel(
    starts_ptr, index_ptr, tokens_ptr, padded_left_ptr, mask_ptr, positions_ptr, labels_ptr,  # positions and labels may be None
    source_ptr, new_mask_ptr, new_positions_ptr, new_labels_ptr,
    B, S, T, W,
    index_b, mask_b, mask_t, positions_b, positions_t, labels_b, labels_t,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    prompt = tl.minimum(tl.maximum(tl.load(index_ptr + b * index_b), 0), S - 1)
    start = tl.load(starts_ptr + prompt)
    length = (tl.load(starts_ptr + prompt + 1) - start).to(tl.int32)
    total = tl.load(starts_ptr + S)
    tokens = tl.load(tokens_ptr + b)
    left = tl.load(padded_left_ptr + b)
    if (tokens == T) | (tokens == 0):
        for other in range(0, B, BLOCK):
            row = other + tl.arange(0, BLOCK)
            left = tl.maximum(left, tl.max(tl.load(padded_left_ptr + row, mask=row < B, other=0), 0))
    begin = tl.where(left != 0, W - length - tokens, 0)

    # The prompt and the padding on both sides.
    for w0 in range(0, W, BLOCK):
        w = w0 + tl.arange(0, BLOCK)
        is_prompt = (w >= begin) & (w < begin + length)
        here = (w < W) & ((w < begin + length) | (w >= begin + length + tokens))
        tl.store(source_ptr + b * W + w, tl.where(is_prompt, start + w - begin, -1), mask=here)
        tl.store(new_mask_ptr + b * W + w, is_prompt.to(new_mask_ptr.dtype.element_ty), mask=here)
        tl.store(new_positions_ptr + b * W + w, tl.where(is_prompt, w - begin, 0).to(tl.int64), mask=here)
        if new_labels_ptr is not None:
            tl.store(new_labels_ptr + b * W + w, tl.full((BLOCK,), -100, tl.int64), mask=here)

    # The real tokens, closed up in their order.
    before = tl.zeros((), tl.int32)
    for t0 in range(0, T, BLOCK):
        t = (t0 + tl.arange(0, BLOCK)).to(tl.int64)
        value = tl.load(mask_ptr + b * mask_b + t * mask_t, mask=t < T, other=0)
        real = value != 0
        place = length + before + tl.cumsum(real.to(tl.int32), 0) - 1
        w = begin + place
        tl.store(source_ptr + b * W + w, total + b * T + t, mask=real)
        tl.store(new_mask_ptr + b * W + w, value, mask=real)
        position = place.to(tl.int64)
        if positions_ptr is not None:
            position = tl.load(positions_ptr + b * positions_b + t * positions_t, mask=real, other=0) + length
        tl.store(new_positions_ptr + b * W + w, position, mask=real)
        if new_labels_ptr is not None:
            label = tl.load(labels_ptr + b * labels_b + t * labels_t, mask=real, other=0)
            tl.store(new_labels_ptr + b * W + w, label, mask=real)
        before += tl.sum(real.to(tl.int32), 0)


@triton.jit(do_not_specialize=["S", "T", "W"])
def _gather_kernel(
    prompts_ptr, starts_ptr, index_ptr, embeds_ptr, ids_ptr, embedding_ptr, source_ptr, out_ptr,  # embeds, or ids and embedding
    S, T, W, V, D,
    index_b, prompts_p, prompts_d, embeds_b, embeds_t, embeds_d, ids_b, ids_t, embedding_v, embedding_d,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = d < D
    source = tl.load(source_ptr + row)
    total = tl.load(starts_ptr + S)
    dtype = out_ptr.dtype.element_ty
    value = tl.zeros((BLOCK,), dtype)
    if source >= total:
        b, t = (source - total) // T, (source - total) % T
        if embeds_ptr is not None:
            value = tl.load(embeds_ptr + b * embeds_b + t * embeds_t + d * embeds_d, mask=inside, other=0.0)
        else:
            token = tl.load(ids_ptr + b * ids_b + t * ids_t)
            exists = (token >= 0) & (token < V)
            value = tl.load(embedding_ptr + token * embedding_v + d * embedding_d, mask=inside & exists, other=0.0)
            value = tl.where(exists, value, float("nan")).to(dtype)
    elif source >= 0:
        prompt = tl.load(index_ptr + row // W * index_b)
        exists = (prompt >= 0) & (prompt < S)
        value = tl.load(prompts_ptr + source * prompts_p + d * prompts_d, mask=inside & exists, other=0.0).to(dtype)
        value = tl.where(exists, value, float("nan")).to(dtype)
    tl.store(out_ptr + row * D + d, value, mask=inside)


@triton.jit(do_not_specialize=["W", "total"])
def _span_kernel(source_ptr, spans_ptr, W, total, BLOCK: tl.constexpr):
    """Of each batch row: its prompt's first column, first prompt row, and length."""
    b = tl.program_id(0).to(tl.int64)
    begin = tl.full((), 0, tl.int64) + W
    length = tl.zeros((), tl.int64)
    for w0 in range(0, W, BLOCK):
        w = (w0 + tl.arange(0, BLOCK)).to(tl.int64)
        source = tl.load(source_ptr + b * W + w, mask=w < W, other=-1)
        is_prompt = (source >= 0) & (source < total)
        begin = tl.minimum(begin, tl.min(tl.where(is_prompt, w, W), 0))
        length += tl.sum(is_prompt.to(tl.int64), 0)
    tl.store(spans_ptr + b * 3, begin)
    tl.store(spans_ptr + b * 3 + 1, tl.load(source_ptr + b * W + begin, mask=length > 0, other=0))
    tl.store(spans_ptr + b * 3 + 2, length)


@triton.jit(do_not_specialize=["B"])
def _prompt_grad_kernel(dout_ptr, spans_ptr, dprompts_ptr, B, D, dout_b, dout_w, dout_d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    dtype = dprompts_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), dtype)
    for b in range(B):
        begin, start = tl.load(spans_ptr + b * 3), tl.load(spans_ptr + b * 3 + 1)
        length = tl.load(spans_ptr + b * 3 + 2)
        has_row = (row >= start) & (row < start + length)
        offset = tl.cast(b, tl.int64) * dout_b + (begin + row - start) * dout_w
        total += tl.load(dout_ptr + offset + d * dout_d, mask=(d < D) & has_row, other=0.0).to(dtype)
    tl.store(dprompts_ptr + row * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["W", "total"])
def _embeds_grad_kernel(dout_ptr, source_ptr, dembeds_ptr, W, D, total, dout_b, dout_w, dout_d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    token = tl.load(source_ptr + row) - total
    is_token = (d < D) & (token >= 0)
    value = tl.load(dout_ptr + row // W * dout_b + row % W * dout_w + d * dout_d, mask=is_token, other=0.0)
    tl.store(dembeds_ptr + token * D + d, value, mask=is_token)


def _plain(value: Tensor) -> Tensor:
    """A bool tensor as the bytes it is, so that kernels load and store numbers."""
    return value.view(torch.uint8) if value.dtype == torch.bool else value


def _strides(value: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if value is None else value.stride()


def prefix_concat(
    prompts: Tensor, starts: Tensor, max_prompt: int, prompt_index: Tensor, embeds: Tensor | None, input_ids: Tensor | None,
    embedding: Tensor | None, attention_mask: Tensor, position_ids: Tensor | None, labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(embeds [B, W, D], attention_mask, position_ids, labels (or no elements), source: [B, W]), as `fastlora.reference.prefix_concat`."""
    (B, T), D, S = attention_mask.shape, prompts.shape[1], starts.shape[0] - 1
    W = T + max_prompt
    base = embedding if embeds is None else embeds
    assert base is not None
    out, mask = base.new_empty(B, W, D), attention_mask.new_empty(B, W)
    positions, source = (starts.new_empty(B, W) for _ in range(2))
    new_labels = starts.new_empty(0) if labels is None else labels.new_empty(B, W)
    if B == 0:
        return out, mask, positions, new_labels, source
    with torch.cuda.device_of(prompts):
        block = min(triton.next_power_of_2(max(W, 1)), BLOCK_T)
        plain_mask = _plain(attention_mask)
        tokens, padded_left = (starts.new_empty(B, dtype=torch.int32) for _ in range(2))
        _count_kernel[(B,)](plain_mask, tokens, padded_left, T, *plain_mask.stride(), BLOCK=block)
        _layout_kernel[(B,)](
            starts, prompt_index, tokens, padded_left, plain_mask, position_ids, labels,
            source, _plain(mask), positions, None if labels is None else new_labels,
            B, S, T, W, prompt_index.stride(0), *plain_mask.stride(), *_strides(position_ids, 2), *_strides(labels, 2), BLOCK=block,
        )  # fmt: skip
        block = min(triton.next_power_of_2(max(D, 1)), BLOCK_D)
        _gather_kernel[B * W, triton.cdiv(D, block)](
            prompts, starts, prompt_index, embeds, input_ids, embedding, source, out, S, T, W, 0 if embedding is None else embedding.shape[0], D,
            prompt_index.stride(0), *prompts.stride(), *_strides(embeds, 3), *_strides(input_ids, 2), *_strides(embedding, 2), BLOCK=block,
        )  # fmt: skip
    return out, mask, positions, new_labels, source


def prefix_concat_backward(
    dout: Tensor, source: Tensor, prompt_rows: int, tokens: int, need_prompts: bool, need_embeds: bool
) -> tuple[Tensor, Tensor]:
    """(dprompts [sum P_i, D] in float32 or wider, dembeds [B, T, D]), as `fastlora.reference.prefix_concat_backward`.

    One that is not needed has no elements.
    """
    B, W, D = dout.shape
    wide = torch.promote_types(dout.dtype, torch.float32)
    dprompts = dout.new_empty((prompt_rows, D) if need_prompts else 0, dtype=wide)
    dembeds = dout.new_zeros((B, tokens, D) if need_embeds else 0)
    block = min(triton.next_power_of_2(max(D, 1)), BLOCK_D)
    with torch.cuda.device_of(dout):
        if need_prompts:
            spans = source.new_empty(B, 3)
            _span_kernel[(B,)](source, spans, W, prompt_rows, BLOCK=min(triton.next_power_of_2(max(W, 1)), BLOCK_T))
            _prompt_grad_kernel[prompt_rows, triton.cdiv(D, block)](
                dout, spans, dprompts, B, D, *dout.stride(), BLOCK=block
            )
        if need_embeds:
            _embeds_grad_kernel[B * W, triton.cdiv(D, block)](
                dout, source, dembeds, W, D, prompt_rows, *dout.stride(), BLOCK=block
            )
    return dprompts, dembeds


ops.implement("prefix_concat", "triton", prefix_concat)
ops.implement("prefix_concat_backward", "triton", prefix_concat_backward)
