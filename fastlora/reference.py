"""The equations of fastlora, once, in plain PyTorch, forward and backward. Every implementation is tested against them.

    M rows of x   K in-features   N out-features   R rank   S adapters
    B batch rows   T tokens a row   P prompt length   W = T + longest prompt   D embedding width   V vocabulary

Where they round. In float64 and float32 everything is computed in x's dtype. With a 16-bit x, the products accumulate in float32, and A, B,
xa and dxa are rounded once to x's dtype, as autocast does. `xa` leaves in float32 (float64 for a float64 x) whatever x is, and
gradients leave in the dtype of the tensor that they belong to.

What dropout keeps is drawn once: forward returns the mask as bits, `keep`, and backward reads them. Bit j (lowest first) of byte i of a row
says whether column 8 i + j is kept; the bits beyond K are unspecified, and so are those of a row or a layer that drops nothing. Where nothing
at all is dropped, keep has no elements.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 0xFFFFFFFF

_has_amx = torch.cpu._is_amx_tile_supported()


def readable_rows(x: Tensor) -> Tensor:  # [M, K]
    """x, or a copy of the same values, as torch can multiply it from the left, transposed or not.

    oneDNN's product on AMX tiles (3.12, torch 2.13) takes columns in pairs: of a 16-bit x whose rows do not lie together it reads past their
    ends where K or the distance between them is odd, and multiplies that by 0, so that a NaN or an infinity beside the view gets into y. The copy
    has zeros there, and an even distance.
    """
    M, K = x.shape
    if not _has_amx or x.device.type != "cpu" or x.element_size() != 2 or x.stride() == (K, 1):
        return x
    if not any(size % 2 for size in (M, K)) and not any(distance % 2 for distance in x.stride() if distance != 1):
        return x
    return x.new_zeros(M + M % 2, K + K % 2)[:M, :K].copy_(x)


def drop_threshold(dropout_p: float) -> int:
    """The 16-bit number below which a half-word drops its element: p rounded to a multiple of 1/65536."""
    return int(65536 * dropout_p + 0.5)


def keep_scale(dropout_p: float) -> float:
    """What a kept element is multiplied by, so that the expectation of dropout is exactly its input; 0 if none is kept."""
    kept = 65536 - drop_threshold(dropout_p)
    return 65536 / kept if kept else 0.0


def keep_mask(seed: Tensor, rows: Tensor, K: int, dropout_p: float) -> Tensor:
    """Which elements of the given rows dropout keeps: bool [len(rows), K], identical bits in every implementation.

    Philox4x32-10 (Salmon et al., SC 2011, section 3.3): key = the 64 bits of `seed` (int64, one element), counter = row * ceil(K / 8) +
    column // 8 in the low 64 bits. Half-word j (low half first) of the 128 bits decides column 8 * (column // 8) + j: kept where it is
    >= drop_threshold(p). `rows` [M] int64 holds row numbers of the whole x.
    """
    eights = (K + 7) // 8
    counter = rows[:, None] * eights + torch.arange(eights, device=rows.device)  # [M, eights]
    c0, c1 = counter & WORD, (counter >> 32) & WORD
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    key = seed.reshape(())
    k0, k1 = key & WORD, (key >> 32) & WORD
    for _ in range(10):
        # int64 products wrap as unsigned ones do: both halves come out right.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    words = torch.stack((c0, c1, c2, c3), -1)  # [M, eights, 4]
    halves = torch.stack((words & 0xFFFF, words >> 16), -1)  # [M, eights, 4, 2]
    return (halves.reshape(len(rows), eights * 8) >= drop_threshold(dropout_p))[:, :K]


def drops(dropout_p: Sequence[float], seed: Tensor | None) -> bool:
    """Whether anything is dropped at one of these probabilities: there is a seed, and p does not round to 0."""
    return seed is not None and any(drop_threshold(p) for p in dropout_p)


def keep_bytes(K: int) -> int:
    """The bytes of a row of keep: whole words of 64 bits."""
    return (K + 63) // 64 * 8


def draw_keep(x: Tensor, dropout_p: float, seed: Tensor | None, rows: Tensor | slice = slice(None)) -> Tensor:
    """The bits of `keep_mask` for rows of x [M, K]: uint8 [len(rows), keep_bytes(K)], without elements where nothing is dropped."""
    if seed is None or drop_threshold(dropout_p) == 0:
        return x.new_empty(0, dtype=torch.uint8)
    if isinstance(rows, slice):
        rows = torch.arange(x.shape[0], device=x.device)[rows]
    K = x.shape[1]
    mask = F.pad(keep_mask(seed, rows, K, dropout_p), (0, 8 * keep_bytes(K) - K))
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=x.device)
    return (mask.reshape(len(rows), keep_bytes(K), 8) * bits).sum(-1, dtype=torch.uint8)


def read_keep(keep: Tensor, K: int) -> Tensor:
    """The mask that the bits [..., keep_bytes(K)] hold: bool [..., K]."""
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=keep.device)
    return ((keep[..., None] & bits) != 0).flatten(-2)[..., :K]


def dropout(x: Tensor, dropout_p: float, keep: Tensor) -> Tensor:
    """d(x): inverted dropout of x [M, K] as PEFT applies it, by the bits of `draw_keep`; x itself where p rounds to 0 or keep has no elements."""
    if drop_threshold(dropout_p) == 0 or keep.numel() == 0:
        return x
    return torch.where(read_keep(keep, x.shape[1]), x * keep_scale(dropout_p), 0)


def lora_linear(
    x: Tensor,  # [M, K]
    weight: Sequence[Tensor],  # G of [N_g, K], frozen: the layers that share x
    bias: Sequence[Tensor | None],  # G of [N_g], frozen
    lora_a: Sequence[Tensor],  # G S of [R_gi, K], x's dtype or float32: all of the first layer, then of the second, ...
    lora_b: Sequence[Tensor],  # G S of [N_g, R_gi], lora_a's dtype
    scale: Sequence[float],  # G S
    dropout_p: Sequence[float],  # G S
    seed: Tensor | None,  # [G] int64, each layer's own; None: no dropout
    order: Tensor | None,  # [M] int64: the rows sorted by adapter, ascending within one; None: S is 1
    offsets: Tensor | None,  # [S + 3] int64: adapter i has the rows order[offsets[i + 1] : offsets[i + 2]]
) -> tuple[list[Tensor], Tensor, Tensor]:  # G of y [M, N_g], xa [G, M, max R_gi], keep [G, M, 8 ceil(K / 64)] uint8
    """y = x Wᵀ + b + s xa Bᵀ with xa = d(x) Aᵀ (Hu et al. 2021, LoRA, section 4.1, equation 3), of each layer that shares x.

    With an order, each row has the A, B, s and d of its own adapter, or none (the problem of Chen et al. 2023, Punica, section 3). Rows without an
    adapter come first in it, and last those whose adapter does not exist (possible on CUDA only, where its number is not read back): they become
    NaN. Beyond a row's own rank xa is 0.
    """
    G, K = len(weight), x.shape[1]
    xa = x.new_zeros(G, x.shape[0], max(a.shape[0] for a in lora_a), dtype=torch.promote_types(x.dtype, torch.float32))
    keep = x.new_zeros((G, x.shape[0], keep_bytes(K)) if drops(dropout_p, seed) else 0, dtype=torch.uint8)
    *owned, invalid = _rows_of(order, offsets)
    readable, ys = readable_rows(x), []
    for g, (w, c) in enumerate(zip(weight, bias, strict=True)):
        y = F.linear(readable, w, c)
        for rows, i in zip(owned, _adapters_of(g, G, lora_a), strict=True):
            a, b = lora_a[i], lora_b[i].to(x.dtype)
            kept = draw_keep(x, dropout_p[i], None if seed is None else seed[g], rows)
            if kept.numel():
                keep[g, rows] = kept
            xa_i = dropout(readable[rows], dropout_p[i], kept) @ a.to(x.dtype).T
            mine = y[rows].addmm_(xa_i, b.T, alpha=scale[i])
            if order is not None:  # else it is a view of y
                y[rows] = mine
            xa[g, rows, : a.shape[0]] = xa_i.to(xa.dtype)
        y[invalid] = torch.nan
        ys.append(y)
    return ys, xa, keep


def lora_linear_backward(
    dy: Sequence[Tensor],  # G of [M, N_g]
    x: Tensor,
    weight: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    xa: Tensor,  # [G, M, max R_gi], the forward's
    keep: Tensor,  # [G, M, 8 ceil(K / 64)] uint8, the forward's; without elements: no dropout
    scale: Sequence[float],
    dropout_p: Sequence[float],
    order: Tensor | None,
    offsets: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # dx [M, K]; da, db 1-D: every dA_gi, every dB_gi, one after the other
    """dxa = s dy B;  dx = dy W + d'(dxa A), summed over the layers;  dA = dxaᵀ d(x);  dB = s dyᵀ xa, where d' applies the forward's mask and factor.

    With an order, of the rows of each adapter; one without rows gets gradients of zeros. What is not needed has no elements.
    """
    G, x, dx, das, dbs = len(weight), readable_rows(x), x.new_empty(0), [], []
    *owned, invalid = _rows_of(order, offsets)
    for g, (d, w) in enumerate(zip(dy, weight, strict=True)):
        d = readable_rows(d)
        if need_dx:
            own_dx = d @ w
        for rows, i in zip(owned, _adapters_of(g, G, lora_a), strict=True):
            a, b, kept = lora_a[i], lora_b[i], keep[g, rows] if keep.numel() else keep
            dxa = (d[rows] @ b.to(x.dtype)) * scale[i]
            if need_dx:
                mine = own_dx[rows].add_(dropout(dxa @ a.to(x.dtype), dropout_p[i], kept))
                if order is not None:
                    own_dx[rows] = mine
            if need_da:
                das.append((dxa.T @ dropout(x[rows], dropout_p[i], kept)).to(a.dtype).reshape(-1))
            if need_db:
                dbs.append((d[rows].T @ (xa[g, rows, : a.shape[0]] * scale[i]).to(x.dtype)).to(b.dtype).reshape(-1))
        if need_dx:
            dx = dx + own_dx if g else own_dx
    if need_dx:
        dx[invalid] = torch.nan
    return dx, torch.cat(das) if das else lora_a[0].new_empty(0), torch.cat(dbs) if dbs else lora_b[0].new_empty(0)


def _rows_of(order: Tensor | None, offsets: Tensor | None) -> list[Any]:
    """The rows of each adapter, ascending; the last entry holds the invalid rows. Without an order one adapter has all rows."""
    if order is None or offsets is None:
        return [slice(None), slice(0)]
    bounds = offsets.tolist()
    return [order[begin:end] for begin, end in zip(bounds[1:-1], bounds[2:], strict=True)]


def _adapters_of(layer: int, layers: int, adapters: Sequence[Tensor]) -> range:
    """Where the adapters of a layer stand among those of all layers."""
    S = len(adapters) // layers
    return range(layer * S, (layer + 1) * S)


def frozen_linear(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K], frozen
    bias: Tensor | None,  # [N], frozen
) -> Tensor:  # y [M, N]
    """y = x Wᵀ + b."""
    return F.linear(readable_rows(x), weight, bias)


def frozen_linear_backward(dy: Tensor, weight: Tensor) -> Tensor:  # dx [M, K]
    """dx = dy W; a frozen weight and bias have no gradient."""
    return readable_rows(dy) @ weight


def scale_columns(
    u: Tensor,  # [M, N]
    factor: Tensor,  # [N], in float32 or wider
    bias: Tensor | None,  # [N], u's dtype, frozen
) -> Tensor:  # y [M, N]
    """y = c ∘ u + b, one factor a column, in float32 or wider, rounded once.

    DoRA's epilogue, with u = (W + s B A) x (Liu et al. 2024, equation 5), and what IA³ does to keys, values and an MLP's activations (Liu et al.
    2022, Few-Shot Parameter-Efficient Fine-Tuning, section 3.3).
    """
    scaled = _wide(u) * factor
    return (scaled if bias is None else scaled + _wide(bias)).to(u.dtype)


def scale_columns_backward(dy: Tensor, u: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:  # du [M, N], dfactor [N]
    """du = c ∘ dy, rounded once;  dc = the sum over the rows of dy ∘ u, in c's dtype."""
    d = _wide(dy)
    return (d * factor).to(u.dtype), (d * _wide(u)).sum(0).to(factor.dtype)


def dora_factor(
    magnitude: Tensor,  # m [N], W's dtype or float32
    weight: Tensor,  # W [N, K], frozen
    lora_a: Tensor,  # A [R, K], W's dtype or float32
    lora_b: Tensor,  # B [N, R], A's dtype
    scale: float,
) -> tuple[Tensor, Tensor]:  # factor [N], norm [N] in float32 or wider
    """c = m / ‖W + s B A‖, the norm of each row (Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, equation 5).

    In float32 or wider, whatever the dtypes.
    """
    norm = torch.addmm(_wide(weight), _wide(lora_b), _wide(lora_a), alpha=scale).norm(dim=1)
    return _wide(magnitude) / norm, norm


def dora_factor_backward(dfactor: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:  # dmagnitude [N]
    """dm = dc / ‖W + s B A‖: the norm counts as a constant (section 4.3)."""
    return (dfactor / norm).to(magnitude.dtype)


def lora_embedding(
    rows: Tensor,  # W[ids] [M, D]
    ids: Tensor,  # [M] int64 or int32
    lora_a: Tensor,  # A [R, V], rows' dtype or float32
    lora_b: Tensor,  # B [D, R], A's dtype
    scale: float,
) -> tuple[Tensor, Tensor]:  # y [M, D], a [R, M] in float32 or wider
    """y = W[ids] + s (B A[:, ids])ᵀ, in float32 or wider, rounded once.

    Of an embedding, whose x is one-hot, A has columns where it had a product (Hu et al. 2021, LoRA, with a table for W).
    """
    a = _wide(lora_a.index_select(1, ids))
    return torch.addmm(_wide(rows), a.t(), _wide(lora_b).t(), alpha=scale).to(rows.dtype), a


def lora_embedding_backward(
    dy: Tensor,  # [M, D]
    ids: Tensor,  # [M]
    a: Tensor,  # [R, M], as forward left it
    lora_a: Tensor,  # for its shape and dtype
    lora_b: Tensor,
    scale: float,
    padding_idx: int | None,  # the token whose column of A has no gradient, as in nn.Embedding
) -> tuple[Tensor, Tensor]:  # dA [R, V], dB [D, R]
    """dA[:, i] = s Bᵀ Σ dy over the tokens that are i;  dB = s dyᵀ aᵀ. In float32 or wider, rounded once."""
    d = _wide(dy)
    da = (_wide(lora_b).t() @ d.t()).mul_(scale)
    if d.device.type == "cpu":
        total = d.new_zeros(lora_a.shape).index_add_(1, ids, da)  # one after the other
    else:  # where index_add_ would add in any order
        total = torch.ops.aten.embedding_dense_backward(da.t(), ids, lora_a.shape[1], -1, False).t()
    if padding_idx is not None:
        total[:, padding_idx] = 0
    return total.to(lora_a.dtype), (d.t() @ a.t()).mul_(scale).to(lora_b.dtype)


def dequantise(
    packed: Tensor,  # any shape: uint8, two elements of W a byte, the first in the higher bits; or, without a code, int8
    code: Tensor | None,  # [16] float32, what four bits stand for
    factor: Tensor,  # [blocks] float32; or, where there are factor_codes, [ceil(blocks / factor_block)]
    factor_codes: Tensor | None,  # [blocks] uint8
    factor_code: Tensor | None,  # [256] float32, with them
    factor_offset: float,
    block: int,
    factor_block: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:  # W [N, K] of dtype
    """W = code[q] f, or q f: `block` elements of W, which lies by row, share the factor f (Dettmers et al. 2023, QLoRA, section 3).

    With factor_codes f = factor_code[c] g + factor_offset, where `factor_block` of the factors share g: double quantisation. Every operation is
    one of float32, rounded by itself, and the result is rounded once to dtype: bit for bit what bitsandbytes' dequantize_4bit gives.
    """
    if code is None:
        elements = packed.flatten().float()
    else:
        elements = code[torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).flatten().long()]
    if factor_codes is not None and factor_code is not None:
        shared = factor.repeat_interleave(factor_block)[: factor_codes.numel()]
        factor = factor_code[factor_codes.long()] * shared + factor_offset
    return (elements * factor.repeat_interleave(block)[: rows * columns]).reshape(rows, columns).to(dtype)


def prefix_layout(
    starts: Tensor,  # [S + 1] int64: prompt s is the rows starts[s] : starts[s + 1] of the prompts
    max_prompt: int,
    prompt_index: Tensor,  # [B] int64
    attention_mask: Tensor,  # [B, T]
) -> Tensor:  # source [B, T + max_prompt] int64
    """Where each column of the result comes from: row j of the prompts as j, token (b, t) as starts[-1] + b T + t, padding as -1.

    A row is its prompt, then its real tokens in order, then padding; or padding first where the row is padded on the left. A row without
    padding goes where the rest of the batch is: to the right edge if any row is padded on the left.
    """
    B, T = attention_mask.shape
    real = attention_mask != 0
    tokens = real.sum(1)  # [B]
    padded_left = (tokens > 0) & (real[:, :1].sum(1) == 0)
    whole = (tokens == T) | (tokens == 0)
    left = padded_left | (whole & padded_left.any())
    length = starts[prompt_index + 1] - starts[prompt_index]  # [B]
    begin = torch.where(left, T + max_prompt - length - tokens, 0)
    k = torch.arange(T + max_prompt, device=starts.device) - begin[:, None]  # [B, W] place within the row's own content
    source = torch.where((k >= 0) & (k < length[:, None]), starts[prompt_index][:, None] + k, -1)
    if T == 0:
        return source
    place = torch.argsort(~real, dim=1, stable=True)  # [B, T] the real tokens first, in order
    rank = k - length[:, None]
    token = place.gather(1, rank.clamp(0, T - 1))
    row = torch.arange(B, device=starts.device)[:, None]
    return torch.where((rank >= 0) & (rank < tokens[:, None]), starts[-1] + row * T + token, source)


def prefix_concat(
    prompts: Tensor,  # [sum P_i, D], all prompts one after the other
    starts: Tensor,  # [S + 1] int64
    max_prompt: int,
    prompt_index: Tensor,  # [B] int64
    embeds: Tensor | None,  # [B, T, D], or None with the next two
    input_ids: Tensor | None,  # [B, T] int64
    embedding: Tensor | None,  # [V, D], frozen
    attention_mask: Tensor,  # [B, T]
    position_ids: Tensor | None,  # [B, T] int64
    labels: Tensor | None,  # [B, T] int64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # embeds [B, W, D]; mask, position_ids, labels, source [B, W]
    """Rows [P_i ; x] with their mask, positions and labels (Lester et al. 2021, The Power of Scale, section 2; padding kept on its side).

    Padding is zeros (labels: -100). Positions count from 0 within the row, or move by P_i where they are given. A prompt or token whose
    number does not exist (possible on CUDA only) becomes NaN. Labels that are not given have no elements.
    """
    B, T = attention_mask.shape
    S = starts.shape[0] - 1
    exists = (prompt_index >= 0) & (prompt_index < S)
    index = prompt_index.clamp(0, S - 1)
    source = prefix_layout(starts, max_prompt, index, attention_mask)
    total = prompts.shape[0]
    is_prompt = (source >= 0) & (source < total)
    is_token = source >= total
    # Every lookup reads row 0 where it does not apply, from a table with one row of padding in front.
    prompt_row = torch.where(is_prompt, source + 1, 0)
    token_row = torch.where(is_token, source - total + 1, 0)

    def tokens_of(values: Tensor, padding: int) -> Tensor:  # [B, T] -> [B, W]
        return torch.cat((values.new_full((1,), padding), values.reshape(-1)))[token_row]

    if embeds is None:
        assert input_ids is not None and embedding is not None
        ids = tokens_of(input_ids, 0)
        found = (ids >= 0) & (ids < embedding.shape[0])
        rows = embedding[ids.clamp(0, embedding.shape[0] - 1)]
        rows = torch.where(is_token[..., None], torch.where(found[..., None], rows, torch.nan), 0)
    else:
        flat = embeds.reshape(B * T, embeds.shape[2])
        rows = torch.cat((flat.new_zeros(1, flat.shape[1]), flat))[token_row]
    prompt_rows = torch.cat((prompts.new_zeros(1, prompts.shape[1]), prompts)).to(rows.dtype)[prompt_row]
    prompt_rows = torch.where(exists[:, None, None] | ~is_prompt[..., None], prompt_rows, torch.nan)
    out = torch.where(is_prompt[..., None], prompt_rows, rows)

    mask = torch.where(is_prompt, attention_mask.new_ones(()), tokens_of(attention_mask, 0))
    positions = torch.where(source >= 0, (source >= 0).cumsum(1) - 1, 0)  # a row's content is one run of columns
    if position_ids is not None:
        length = starts[index + 1] - starts[index]
        positions = torch.where(is_token, tokens_of(position_ids, 0) + length[:, None], positions)
    new_labels = source.new_empty(0) if labels is None else torch.where(is_token, tokens_of(labels, -100), -100)
    return out, mask, positions, new_labels, source


def prefix_concat_backward(
    dout: Tensor,  # [B, W, D]
    source: Tensor,  # [B, W], the forward's
    prompt_rows: int,  # sum P_i
    tokens: int,  # T
    need_prompts: bool,
    need_embeds: bool,
) -> tuple[Tensor, Tensor]:  # dprompts [sum P_i, D] in float32 or wider, dembeds [B, T, D]
    """A prompt row's gradient is the sum over its batch rows, in their order; a token's is its column; padding has none.

    One that is not needed has no elements.
    """
    B, W, D = dout.shape
    wide = torch.promote_types(dout.dtype, torch.float32)
    dprompts = dout.new_zeros(prompt_rows + 1, D, dtype=wide) if need_prompts else dout.new_empty(0, dtype=wide)
    dembeds = dout.new_zeros(B * tokens + 1, D) if need_embeds else dout.new_empty(0)
    for b in range(B):
        if need_prompts:  # each row of prompts occurs at most once in a batch row, so the sum has a fixed order; the last row is a bin
            target = torch.where((source[b] >= 0) & (source[b] < prompt_rows), source[b], prompt_rows)
            dprompts.index_put_((target,), dprompts[target] + dout[b].to(wide))
    if need_embeds:
        target = torch.where(source >= prompt_rows, source - prompt_rows, B * tokens).flatten()
        dembeds[target] = dout.reshape(B * W, D)
        dembeds = dembeds[:-1].view(B, tokens, D)
    return dprompts[:-1] if need_prompts else dprompts, dembeds


def linear_cross_entropy(
    hidden: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [n] int64
    need_dhidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss, highest [n, 1], total [n, 1], dhidden [n, D] or no elements
    """loss = sum over rows of logsumexp(z) - z[label], z = h Wᵀ + b rounded to h's dtype;  dh = softmax(z) W - W[label].

    All in float32 or wider: highest is a row's largest z, total its sum of exp(z - highest); softmax is rounded to h's dtype before it meets W.
    """
    hidden = readable_rows(hidden)
    logits = _logits(hidden, weight, bias)
    highest = logits.amax(1, keepdim=True)
    total = (logits - highest).exp().sum(1, keepdim=True)
    loss = (highest - logits.gather(1, labels[:, None]) + total.log()).sum()
    dhidden = logits.new_empty(0)
    if need_dhidden:
        softmax = (logits - highest).exp() / total
        w = weight.to(hidden.dtype)
        dhidden = (softmax.to(hidden.dtype) @ w).to(logits.dtype) - w[labels]
    return loss, highest, total, dhidden


def linear_cross_entropy_backward(
    dloss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, highest: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:  # dweight [V, D], dbias [V] or no elements
    """dz = (softmax(z) - one-hot) dloss, rounded to h's dtype before it meets h;  dW = dzᵀ h;  db = the sum of dz over the rows."""
    hidden = readable_rows(hidden)
    dlogits = (_logits(hidden, weight, bias) - highest).exp() * (dloss / total)
    dlogits = dlogits.scatter_add(1, labels[:, None], -dloss.to(dlogits.dtype).expand(len(labels), 1))
    dweight = (dlogits.to(hidden.dtype).T @ hidden).to(weight.dtype)
    return dweight, weight.new_empty(0) if bias is None else dlogits.sum(0).to(bias.dtype)


def lora_cross_entropy(
    hidden: Tensor,  # [n, D]
    xa: Tensor,  # [n, R], hidden's dtype: s d(h) Aᵀ
    weight: Tensor,  # [V, D], frozen
    bias: Tensor | None,  # [V], frozen
    lora_b: Tensor,  # [V, R]
    labels: Tensor,  # [n] int64
    need_dhidden: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor
]:  # loss, highest, total, dhidden as linear_cross_entropy; dxa [n, R], or no elements
    """`linear_cross_entropy` of z = h Wᵀ + b + xa Bᵀ;  dxa = softmax(z) B - B[label]."""
    hidden, xa, b = readable_rows(hidden), readable_rows(xa), lora_b.to(hidden.dtype)
    logits = _updated_logits(hidden, xa, weight, bias, b)
    highest = logits.amax(1, keepdim=True)
    total = (logits - highest).exp().sum(1, keepdim=True)
    loss = (highest - logits.gather(1, labels[:, None]) + total.log()).sum()
    dhidden, dxa = logits.new_empty(0), logits.new_empty(0)
    if need_dhidden:
        softmax = ((logits - highest).exp() / total).to(hidden.dtype)
        w = weight.to(hidden.dtype)
        dhidden = (softmax @ w).to(logits.dtype) - w[labels]
        dxa = (softmax @ b).to(logits.dtype) - b[labels]
    return loss, highest, total, dhidden, dxa


def lora_cross_entropy_backward(
    dloss: Tensor, hidden: Tensor, xa: Tensor, weight: Tensor, bias: Tensor | None, lora_b: Tensor, labels: Tensor, highest: Tensor, total: Tensor
) -> Tensor:  # dB [V, R]  # fmt: skip
    """dB = dzᵀ xa with dz = (softmax(z) - one-hot) dloss, rounded to h's dtype before it meets xa."""
    hidden, xa = readable_rows(hidden), readable_rows(xa)
    dlogits = (_updated_logits(hidden, xa, weight, bias, lora_b.to(hidden.dtype)) - highest).exp() * (dloss / total)
    dlogits = dlogits.scatter_add(1, labels[:, None], -dloss.to(dlogits.dtype).expand(len(labels), 1))
    return (dlogits.to(hidden.dtype).T @ xa).to(lora_b.dtype)


def _updated_logits(hidden: Tensor, xa: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return _wide(logits.addmm_(xa, b.T))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [n, V], in float32 or wider
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return _wide(logits)


def rms_norm(
    x: Tensor,  # [M, D]
    weight: Tensor,  # [D], frozen
    eps: float,
) -> tuple[Tensor, Tensor]:  # y [M, D], rstd [M] in float32 or wider
    """y = x rstd w with rstd = 1 / sqrt(mean(x²) + eps) (Zhang and Sennrich 2019, Root Mean Square Layer Normalization, equation 4).

    Computed in float32 or wider, and rounded once to x's dtype.
    """
    wide = _wide(x)
    rstd = (wide.square().mean(1) + eps).rsqrt()
    return (wide * rstd[:, None] * _wide(weight)).to(x.dtype), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:  # dx [M, D]
    """dx = rstd (g - n mean(g n)) with n = x rstd and g = dy w; rounded once to x's dtype."""
    g, normal = _wide(dy) * _wide(weight), _wide(x) * rstd[:, None]
    return (rstd[:, None] * (g - normal * (g * normal).mean(1, keepdim=True))).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # y [M, F]
    """y = gate σ(gate) up (Shazeer 2020, GLU Variants Improve Transformer, equation 5): in float32 or wider, rounded once."""
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:  # dgate, dup [M, F]
    """dup = dy gate σ;  dgate = dy up σ (1 + gate (1 - σ)), with σ = σ(gate): in float32 or wider, rounded once."""
    d, g = _wide(dy), _wide(gate)
    sigmoid = g.sigmoid()
    dgate = d * _wide(up) * (sigmoid + g * sigmoid * (1 - sigmoid))
    return dgate.to(gate.dtype), (d * g * sigmoid).to(up.dtype)


def rotary(
    q: Tensor,  # [B, H, T, D], D even
    k: Tensor,  # [B, its own H, T, D]
    cos: Tensor,  # [B or 1, T, D]
    sin: Tensor,
) -> tuple[Tensor, Tensor]:  # as q and k, a token's heads together in memory
    """y = x cos + (-x2, x1) sin of each head's x = (x1, x2) (Su et al. 2021, RoFormer, section 3.4.2, with the halves for its pairs).

    In float32 or wider, rounded once.
    """
    return _turn(q, cos, sin, 1), _turn(k, cos, sin, 1)


def rotary_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose: dx = dy cos + (dy2 sin2, -dy1 sin1). In float32 or wider, rounded once."""
    swapped = sin.roll(sin.shape[-1] // 2, -1)
    return _turn(dq, cos, swapped, -1), _turn(dk, cos, swapped, -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    wide = _wide(x).transpose(1, 2)  # [B, T, H, D]
    first, second = wide.chunk(2, -1)
    turned = wide * _wide(cos)[:, :, None] + torch.cat((-second, first), -1) * _wide(sign * sin)[:, :, None]
    return turned.to(x.dtype).contiguous().transpose(1, 2)


def attention(
    q: Tensor,  # [T, H, D]
    k: Tensor,  # [N, a divisor of H, D]: as many heads of q in a row share one of k and v
    v: Tensor,
    starts: Tensor,  # [segments + 1] int64 on the CPU: tokens starts[i] : starts[i + 1] see one another
    scale: float,
    causal: bool,
    segment_parents: Tensor | None = None,  # [segments] int64 on the CPU: an earlier segment, or -1; None: -1 for all
    key_starts: Tensor | None = None,  # as starts, of the keys; None: N = T, and the keys lie as the queries
) -> tuple[Tensor, Tensor]:  # out [T, H, D], lse [T, H] in float32 or wider
    """out = softmax(scale q kᵀ) v (Vaswani et al. 2017, Attention Is All You Need, equation 1) over the keys that a segment's queries see.

    These are its own, and before them all of its parent's, of the parent's parent and so on; no others. causal: none sees later tokens of its own
    segment. Computed in float32 or wider, and rounded once. lse is log sum exp of a token's scores.
    """
    out, lse = _wide(torch.empty_like(q)), _wide(q.new_empty(q.shape[:2]))
    for queries, seen in visible(starts, segment_parents, key_starts):
        rows, keys, values = _heads(q, q, [queries]), _heads(k, q, seen), _heads(v, q, seen)
        scores = _scores(rows, keys, scale, causal)
        lse[queries] = scores.logsumexp(-1).T
        out[queries] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out.to(q.dtype), lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    scale: float,
    causal: bool,
    segment_parents: Tensor | None = None,
    key_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # dq, dk, dv
    """dV = Pᵀ dout;  dS = P (dP - rowsum(P dP)), dP = dout Vᵀ;  dq = scale dS K;  dk = scale dSᵀ q: of P = softmax(scale q kᵀ).

    P is exp(scale q kᵀ - lse), and rowsum(P dP) is rowsum(dout out): implementations may save a pass so. Here both are summed anew, since lse and
    out have been rounded: by them gradients have 1.3 times eager's error, and up to 2.8 times in one of 30 draws.

    Heads of q that share a head of k and v add up there, and so do all segments that see a key. In float32 or wider, rounded once.
    """
    dq, dk, dv = (_wide(torch.zeros_like(one)) for one in (q, k, v))
    for queries, seen in visible(starts, segment_parents, key_starts):
        rows, d = (_heads(one, q, [queries]) for one in (q, dout))
        keys, values = _heads(k, q, seen), _heads(v, q, seen)
        p = _scores(rows, keys, scale, causal).softmax(-1)
        dp = d @ values.transpose(1, 2)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[queries] = (ds @ keys).transpose(0, 1)
        for total, part in ((dk, ds.transpose(1, 2) @ rows), (dv, p.transpose(1, 2) @ d)):
            summed = part.transpose(0, 1).unflatten(1, (k.shape[1], -1)).sum(2)
            for where, own in zip(seen, summed.split([one.stop - one.start for one in seen]), strict=True):
                total[where] += own
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def visible(
    starts: Tensor, segment_parents: Tensor | None, key_starts: Tensor | None
) -> list[tuple[slice, list[slice]]]:
    """Of each segment its queries, and where the keys lie that they see: its ancestors' in full, the eldest first, and its own last."""
    queries, own = (
        [slice(*ends) for ends in itertools.pairwise(one.tolist())]
        for one in (starts, starts if key_starts is None else key_starts)
    )
    seen: list[list[slice]] = []
    for keys, parent in zip(own, [-1] * len(own) if segment_parents is None else segment_parents.tolist(), strict=True):
        seen.append([*(seen[parent] if parent >= 0 else ()), keys])
    return list(zip(queries, seen, strict=True))


def _heads(x: Tensor, q: Tensor, places: list[slice]) -> Tensor:  # [tokens, its own heads, D] -> [H, of those, D]
    wide = torch.cat([_wide(x[place]) for place in places])
    return wide.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:  # [H, queries, keys]: the last keys are theirs
    scores = scale * (q @ k.transpose(1, 2))
    later = scores.new_ones(scores.shape[1:], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
    return scores.masked_fill(later, -torch.inf) if causal else scores


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
