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

from collections.abc import Callable, Sequence
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
    groups = (K + 7) // 8
    counter = rows[:, None] * groups + torch.arange(groups, device=rows.device)  # [M, groups]
    c0, c1 = counter & WORD, (counter >> 32) & WORD
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    key = seed.reshape(())
    k0, k1 = key & WORD, (key >> 32) & WORD
    for _ in range(10):
        # int64 products wrap as unsigned ones do: both halves come out right.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    words = torch.stack((c0, c1, c2, c3), -1)  # [M, groups, 4]
    halves = torch.stack((words & 0xFFFF, words >> 16), -1)  # [M, groups, 4, 2]
    return (halves.reshape(len(rows), groups * 8) >= drop_threshold(dropout_p))[:, :K]


def drops(dropout_p: Sequence[float], seed: Tensor | None) -> bool:
    """Whether anything is dropped at one of these probabilities: there is a seed, and p does not round to 0."""
    return seed is not None and any(drop_threshold(p) for p in dropout_p)


def keep_bytes(K: int) -> int:
    """The bytes of a row of keep: whole words of 64 bits."""
    return (K + 63) // 64 * 8


def draw_keep(x: Tensor, dropout_p: float, seed: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """The bits of `keep_mask` for rows of x [M, K] (None: all): uint8 [len(rows), keep_bytes(K)], without elements where nothing is dropped."""
    if seed is None or drop_threshold(dropout_p) == 0:
        return x.new_empty(0, dtype=torch.uint8)
    if rows is None:
        rows = torch.arange(x.shape[0], device=x.device)
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
    weight: Tensor,  # [N, K], frozen
    bias: Tensor | None,  # [N], frozen
    lora_a: Tensor,  # [R, K], x's dtype or float32
    lora_b: Tensor,  # [N, R], lora_a's dtype
    scale: float,
    dropout_p: float,
    seed: Tensor | None,  # int64, one element; None: no dropout
) -> tuple[Tensor, Tensor, Tensor]:  # y [M, N], xa [M, R], keep [M, 8 ceil(K / 64)] uint8
    """y = x Wᵀ + b + s xa Bᵀ with xa = d(x) Aᵀ (Hu et al. 2021, LoRA, section 4.1, equation 3)."""
    keep = draw_keep(x, dropout_p, seed)
    x = readable_rows(x)
    xa = dropout(x, dropout_p, keep) @ lora_a.to(x.dtype).T
    y = F.linear(x, weight, bias).addmm_(xa, lora_b.to(x.dtype).T, alpha=scale)
    return y, xa.to(torch.promote_types(x.dtype, torch.float32)), keep


def lora_linear_backward(
    dy: Tensor,  # [M, N]
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    xa: Tensor,  # [M, R], the forward's
    keep: Tensor,  # [M, 8 ceil(K / 64)] uint8, the forward's; without elements: no dropout
    scale: float,
    dropout_p: float,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # dx [M, K], da [R, K], db [N, R]; one that is not needed has no elements
    """dxa = s dy B;  dx = dy W + d'(dxa A);  dA = dxaᵀ d(x);  dB = s dyᵀ xa, where d' applies the forward's mask and factor."""
    dy, x = readable_rows(dy), readable_rows(x)
    dxa = (dy @ lora_b.to(x.dtype)) * scale
    dx, da, db = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    if need_dx:
        dx = dy @ weight + dropout(dxa @ lora_a.to(x.dtype), dropout_p, keep)
    if need_da:
        da = (dxa.T @ dropout(x, dropout_p, keep)).to(lora_a.dtype)
    if need_db:
        db = (dy.T @ (xa * scale).to(x.dtype)).to(lora_b.dtype)
    return dx, da, db


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


def lora_linear_shared(
    x: Tensor,  # [M, K]
    weight: list[Tensor],  # G of [N_i, K]
    bias: list[Tensor],  # G of [N_i], or without elements: none
    lora_a: list[Tensor],  # G of [R_i, K]
    lora_b: list[Tensor],  # G of [N_i, R_i]
    scale: list[float],  # G
    dropout_p: list[float],  # G
    seed: Tensor | None,  # [G] int64, each layer's own
    layer: Callable[..., tuple[Tensor, Tensor, Tensor]] = lora_linear,
) -> tuple[list[Tensor], Tensor, Tensor]:  # G of y [M, N_i], xa [M, sum R_i], keep [G, M, 8 ceil(K / 64)] uint8
    """G layers of `lora_linear` on the same x, as the query, key and value of attention are."""
    layers = zip(weight, bias, lora_a, lora_b, scale, dropout_p, strict=True)
    results = [
        layer(x, w, b if b.numel() else None, a, up, s, p, None if seed is None else seed[i])
        for i, (w, b, a, up, s, p) in enumerate(layers)
    ]
    ys, xas, keeps = zip(*results, strict=True)
    return list(ys), torch.cat(xas, 1), _stack_keep(x, keeps, [drops([p], seed) for p in dropout_p])


def _stack_keep(x: Tensor, keeps: Sequence[Tensor], dropping: Sequence[bool]) -> Tensor:
    """The bits of the layers that drop anything as one [G, M, keep_bytes(K)], zeros for the others; without elements where none does."""
    if not any(dropping):
        return x.new_empty(0, dtype=torch.uint8)
    unread = x.new_zeros(x.shape[0], keep_bytes(x.shape[1]), dtype=torch.uint8)
    return torch.stack([keep if drops else unread for keep, drops in zip(keeps, dropping, strict=True)])


def lora_linear_shared_backward(
    dy: list[Tensor],  # G of [M, N_i]
    x: Tensor,
    weight: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    xa: Tensor,  # [M, sum R_i], the forward's
    keep: Tensor,  # [G, M, 8 ceil(K / 64)] uint8, the forward's; without elements: no dropout
    scale: list[float],
    dropout_p: list[float],
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    layer: Callable[..., tuple[Tensor, Tensor, Tensor]] = lora_linear_backward,
) -> tuple[
    Tensor, Tensor, Tensor
]:  # dx [M, K], summed over the layers; da, db 1-D: every dA_i, every dB_i, one after the other
    """`lora_linear_backward` of every layer."""
    dx, das, dbs = x.new_empty(0), [], []
    layers = zip(dy, weight, lora_a, lora_b, xa.split([a.shape[0] for a in lora_a], 1), scale, dropout_p, strict=True)
    for i, (d, w, a, b, xa_i, s, p) in enumerate(layers):
        keep_i = keep[i] if keep.numel() else keep
        dx_i, da, db = layer(d, x, w, a, b, xa_i, keep_i, s, p, need_dx, need_da, need_db)
        dx = dx + dx_i if i else dx_i
        das.append(da.flatten())
        dbs.append(db.flatten())
    return dx, torch.cat(das), torch.cat(dbs)


def _rows_of(order: Tensor, offsets: Tensor) -> list[Tensor]:
    """The rows of each adapter, ascending; `order` and `offsets` as in `multi_lora`. The last entry holds the invalid rows."""
    bounds = offsets.tolist()
    return [order[begin:end] for begin, end in zip(bounds[1:-1], bounds[2:], strict=True)]


def multi_lora(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K], frozen
    bias: Tensor | None,  # [N], frozen
    lora_a: list[Tensor],  # S of [R_i, K]
    lora_b: list[Tensor],  # S of [N, R_i]
    scale: list[float],  # S
    dropout_p: list[float],  # S
    seed: Tensor | None,
    order: Tensor,  # [M] int64: the rows sorted by adapter, ascending within one; rows without an adapter first
    offsets: Tensor,  # [S + 3] int64: adapter i has the rows order[offsets[i + 1] : offsets[i + 2]]; the last group is invalid
) -> tuple[
    Tensor, Tensor, Tensor
]:  # y [M, N], xa [M, max R_i], 0 beyond a row's own rank, keep [M, 8 ceil(K / 64)] uint8
    """Row by row, y = x Wᵀ + b + s_i d_i(x) A_iᵀ B_iᵀ, where i is the row's adapter (the problem of Chen et al. 2023, Punica, section 3).

    A row whose adapter does not exist (possible on CUDA only, where its number is not read back) becomes NaN.
    """
    y = F.linear(readable_rows(x), weight, bias)
    xa = x.new_zeros(x.shape[0], max(a.shape[0] for a in lora_a), dtype=torch.promote_types(x.dtype, torch.float32))
    keep = x.new_zeros((x.shape[0], keep_bytes(x.shape[1])) if drops(dropout_p, seed) else 0, dtype=torch.uint8)
    *groups, invalid = _rows_of(order, offsets)
    for rows, a, b, s, p in zip(groups, lora_a, lora_b, scale, dropout_p, strict=True):
        keep_i = draw_keep(x, p, seed, rows)
        if keep_i.numel():
            keep[rows] = keep_i
        xa_i = dropout(x[rows], p, keep_i) @ a.to(x.dtype).T
        y[rows] = y[rows].addmm_(xa_i, b.to(x.dtype).T, alpha=s)
        xa[rows, : a.shape[0]] = xa_i.to(xa.dtype)
    y[invalid] = torch.nan
    return y, xa, keep


def multi_lora_backward(
    dy: Tensor,  # [M, N]
    x: Tensor,
    weight: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    xa: Tensor,  # [M, max R_i], the forward's
    keep: Tensor,  # [M, 8 ceil(K / 64)] uint8, the forward's; without elements: no dropout
    scale: list[float],
    dropout_p: list[float],
    order: Tensor,
    offsets: Tensor,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[
    Tensor, Tensor, Tensor
]:  # dx [M, K]; da, db 1-D: every dA_i [R_i, K], every dB_i [N, R_i], one after the other
    """`lora_linear_backward` for the rows of each adapter. An adapter without rows gets a gradient of zeros."""
    dx = readable_rows(dy) @ weight if need_dx else x.new_empty(0)
    das, dbs = [], []
    *groups, invalid = _rows_of(order, offsets)
    for i, (rows, a, b) in enumerate(zip(groups, lora_a, lora_b, strict=True)):
        dxa = (dy[rows] @ b.to(x.dtype)) * scale[i]
        keep_i = keep[rows] if keep.numel() else keep
        if need_dx:
            dx[rows] += dropout(dxa @ a.to(x.dtype), dropout_p[i], keep_i)
        if need_da:
            das.append((dxa.T @ dropout(x[rows], dropout_p[i], keep_i)).to(a.dtype).flatten())
        if need_db:
            dbs.append((dy[rows].T @ (xa[rows, : a.shape[0]] * scale[i]).to(x.dtype)).to(b.dtype).flatten())
    if need_dx:
        dx[invalid] = torch.nan
    return dx, torch.cat(das) if das else lora_a[0].new_empty(0), torch.cat(dbs) if dbs else lora_b[0].new_empty(0)


def _by_layer(values: Sequence[Any], layers: int) -> list[Sequence[Any]]:
    """What the adapters of all layers have, one layer after the other, as a list for each layer."""
    S = len(values) // layers
    return [values[layer * S : (layer + 1) * S] for layer in range(layers)]


def multi_lora_shared(
    x: Tensor,  # [M, K]
    weight: list[Tensor],  # G of [N_g, K]
    bias: list[Tensor],  # G of [N_g], or without elements: none
    lora_a: list[Tensor],  # G S of [R_gi, K]: every adapter of the first layer, then of the second, ...
    lora_b: list[Tensor],  # G S of [N_g, R_gi]
    scale: list[float],  # G S
    dropout_p: list[float],  # G S
    seed: Tensor | None,  # [G] int64, each layer's own
    order: Tensor,
    offsets: Tensor,
    layer: Callable[..., tuple[Tensor, Tensor, Tensor]] = multi_lora,
) -> tuple[
    list[Tensor], Tensor, Tensor
]:  # G of y [M, N_g], xa [G, M, max R_gi], 0 beyond a row's own rank in that layer, keep [G, M, 8 ceil(K / 64)] uint8
    """G layers of `multi_lora` on the same x with the same adapter for a row, as the query, key and value of attention are."""
    adapters = zip(*(_by_layer(values, len(weight)) for values in (lora_a, lora_b, scale, dropout_p)), strict=True)
    results = [
        layer(x, w, b if b.numel() else None, *own, None if seed is None else seed[g], order, offsets)
        for g, (w, b, own) in enumerate(zip(weight, bias, adapters, strict=True))
    ]
    ys, xas, keeps = zip(*results, strict=True)
    R = max(a.shape[0] for a in lora_a)
    xa = torch.stack([F.pad(own, (0, R - own.shape[1])) for own in xas])
    return list(ys), xa, _stack_keep(x, keeps, [drops(p, seed) for p in _by_layer(dropout_p, len(weight))])


def multi_lora_shared_backward(
    dy: list[Tensor],  # G of [M, N_g]
    x: Tensor,
    weight: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    xa: Tensor,  # [G, M, max R_gi], the forward's
    keep: Tensor,  # [G, M, 8 ceil(K / 64)] uint8, the forward's; without elements: no dropout
    scale: list[float],
    dropout_p: list[float],
    order: Tensor,
    offsets: Tensor,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    layer: Callable[..., tuple[Tensor, Tensor, Tensor]] = multi_lora_backward,
) -> tuple[
    Tensor, Tensor, Tensor
]:  # dx [M, K], summed over the layers; da, db 1-D: every dA_gi, every dB_gi, one after the other
    """`multi_lora_backward` of every layer."""
    dx, das, dbs = x.new_empty(0), [], []
    adapters = zip(*(_by_layer(values, len(weight)) for values in (lora_a, lora_b, scale, dropout_p)), strict=True)
    for g, (d, w, (a, b, s, p)) in enumerate(zip(dy, weight, adapters, strict=True)):
        xa_g = xa[g, :, : max(one.shape[0] for one in a)].contiguous()
        keep_g = keep[g] if keep.numel() else keep
        dx_g, da, db = layer(d, x, w, a, b, xa_g, keep_g, s, p, order, offsets, need_dx, need_da, need_db)
        dx = dx + dx_g if g else dx_g
        das.append(da)
        dbs.append(db)
    return dx, torch.cat(das), torch.cat(dbs)


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
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor
]:  # embeds [B, W, D], mask, position_ids, labels (or no elements), source: [B, W]
    """Rows [P_i ; x] with their mask, positions and labels (Lester et al. 2021, The Power of Scale, section 2; padding kept on its side).

    Padding is zeros (labels: -100). Positions count from 0 within the row, or move by P_i where they are given. A prompt or token whose
    number does not exist (possible on CUDA only) becomes NaN.
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
) -> tuple[
    Tensor, Tensor
]:  # dprompts [sum P_i, D] in float32 or wider, dembeds [B, T, D]; one not needed has no elements
    """A prompt row's gradient is the sum over its batch rows, in their order; a token's is its column; padding has none."""
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
