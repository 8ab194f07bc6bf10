"""The three operators as differentiable functions: what a caller may call. This file alone knows gradients.

    lora_linear     y = x Wᵀ + b + s d(x) Aᵀ Bᵀ
    multi_lora      the same, where each row of x has its own adapter
    prefix_concat   rows [P ; x] with mask, positions and labels

Arguments are checked here, before any memory is touched; every error names the argument, what it is, and what was expected.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return repr(value)


def _expect(condition: bool, name: str, value: Any, expected: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(f"{name}: got {_describe(value)}, expected {expected}")


def _expect_tensor(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")


def _expect_base(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for value, name in ((x, "x"), (weight, "weight"), *(((bias, "bias"),) if bias is not None else ())):
        _expect_tensor(value, name)
    _expect(x.dtype in FLOATS, "x", x, "float32, bfloat16, float16 or float64")
    _expect(x.dim() >= 1, "x", x, "at least one dimension, the last of size K")
    K = x.shape[-1]
    _expect(weight.dim() == 2 and weight.shape[1] == K, "weight", weight, f"shape [N, {K}] to match the last dimension of x {list(x.shape)}")
    _expect(weight.dtype == x.dtype, "weight", weight, f"x's dtype {x.dtype}")
    _expect(weight.device == x.device, "weight", weight, f"x's device {x.device}")
    if bias is not None:
        _expect(bias.dim() == 1 and bias.shape[0] == weight.shape[0], "bias", bias, f"shape [{weight.shape[0]}]")
        _expect(bias.dtype == x.dtype, "bias", bias, f"x's dtype {x.dtype}")
        _expect(bias.device == x.device, "bias", bias, f"x's device {x.device}")
    if torch.is_grad_enabled():
        for value, name in ((weight, "weight"), (bias, "bias")):
            if value is not None and value.requires_grad:
                raise ValueError(f"{name}: requires a gradient, expected a frozen tensor (call {name}.requires_grad_(False))")


def _expect_adapter(x: Tensor, N: int, lora_a: Tensor, lora_b: Tensor, scale: float, which: str = "") -> None:
    _expect_tensor(lora_a, f"lora_a{which}")
    _expect_tensor(lora_b, f"lora_b{which}")
    K = x.shape[-1]
    _expect(lora_a.dim() == 2 and lora_a.shape[1] == K, f"lora_a{which}", lora_a, f"shape [R, {K}]")
    _expect(lora_a.shape[0] >= 1, f"lora_a{which}", lora_a, "a rank of at least 1")
    R = lora_a.shape[0]
    _expect(lora_b.dim() == 2 and lora_b.shape[0] == N and lora_b.shape[1] == R, f"lora_b{which}", lora_b, f"shape [{N}, {R}]")
    _expect(lora_a.dtype in (x.dtype, torch.float32), f"lora_a{which}", lora_a, f"x's dtype {x.dtype} or float32")
    _expect(lora_b.dtype == lora_a.dtype, f"lora_b{which}", lora_b, f"lora_a's dtype {lora_a.dtype}")
    _expect(lora_a.device == x.device, f"lora_a{which}", lora_a, f"x's device {x.device}")
    _expect(lora_b.device == x.device, f"lora_b{which}", lora_b, f"x's device {x.device}")
    _expect_number(scale, f"scale{which}")


def _expect_number(value: Any, name: str) -> None:
    if isinstance(value, Tensor) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a float")
    _expect(math.isfinite(value), name, value, "a finite number")


def _expect_probability(value: Any, name: str) -> None:
    _expect_number(value, name)
    _expect(0 <= value <= 1, name, value, "a probability between 0 and 1")


def _expect_integers(value: Any, name: str, shape: tuple[int, ...], device: torch.device) -> None:
    _expect_tensor(value, name)
    _expect(not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool, name, value, "an integer tensor")
    _expect(value.shape == shape, name, value, f"shape {list(shape)}")
    _expect(value.device == device, name, value, f"device {device}")


class _Pending(NamedTuple):
    flag: Tensor  # one bool in pinned memory, written by the device
    event: "torch.cuda.Event"
    message: str


_pending: list[_Pending] = []
"""Values that a GPU found out of range and that no one has read back yet."""


def _expect_in_range(bad: Tensor, message: str) -> None:
    """Raise IndexError where any of `bad` is true: at once on a CPU; on a GPU at the first check after the device has got there."""
    if torch.compiler.is_compiling():
        return
    if bad.device.type == "cpu":
        if bool(bad.any()):
            raise IndexError(message)
    elif bad.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        raise_pending()
        flag = torch.empty(1, dtype=torch.bool, pin_memory=True)
        flag.copy_(bad.any().reshape(1), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        _pending.append(_Pending(flag, event, message))


def raise_pending() -> None:
    """Raise the IndexError of an earlier call whose index was out of range on a GPU, if the device has found one. Never waits."""
    while _pending and _pending[0].event.query():
        found = _pending.pop(0)
        if bool(found.flag):
            raise IndexError(f"{found.message} (found on the GPU by an earlier call, whose rows are NaN)")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would give x Wᵀ here, or None where autocast is off or leaves x alone."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off, where it is on: the operators are told their dtypes."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _draw_seed(dropout_p: float, training: bool, x: Tensor) -> Tensor | None:
    """A new dropout seed from torch's generator of x's device (so that checkpointing replays it), or None where nothing is dropped."""
    if not training or dropout_p == 0.0:
        return None
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=x.device)


class LoRALinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale, dropout_p, seed):  # x [M, K] -> y [M, N]
        y, xa = torch.ops.fastlora.lora_linear(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed)
        ctx.save_for_backward(x, weight, lora_a, lora_b, xa, seed)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, lora_a, lora_b, xa, seed = ctx.saved_tensors
        need = ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        with _without_autocast(dy.device):
            grads = torch.ops.fastlora.lora_linear_backward(
                dy, x, weight, lora_a, lora_b, xa, ctx.scale, ctx.dropout_p, seed, *need
            )
        dx, da, db = (grad if needed else None for grad, needed in zip(grads, need, strict=True))
        return dx, None, None, da, db, None, None, None


def lora_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], frozen
    bias: Tensor | None,  # [N], frozen
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scale: float,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:  # [..., N]
    """y = x Wᵀ + b + scale · d(x) Aᵀ Bᵀ: a frozen linear layer and its LoRA update (Hu et al. 2021, LoRA, section 4.1).

    x, weight and bias have one dtype (float32, bfloat16, float16 or float64); lora_a and lora_b have that dtype or float32. Any strides.
    d is inverted dropout with probability `dropout_p` on the adapter's input only; its seed comes from torch's generator. Under autocast x,
    weight and bias are cast as `nn.Linear` would cast them. Gradients go to x, lora_a and lora_b.

    Raises:
        TypeError: an argument is no tensor or no number.
        ValueError: a shape, dtype, device, rank, scale or probability does not fit, or weight or bias requires a gradient.
        fastlora.ops.ImplementationError: FASTLORA_IMPL names an implementation that cannot run.
    """
    cast = _autocast_dtype(x) if isinstance(x, Tensor) else None
    if cast is not None:
        with _without_autocast(x.device):
            return lora_linear(
                x.to(cast), weight.to(cast), None if bias is None else bias.to(cast), lora_a, lora_b, scale, dropout_p=dropout_p, training=training
            )
    _expect_base(x, weight, bias)
    _expect_adapter(x, weight.shape[0], lora_a, lora_b, scale)
    _expect_probability(dropout_p, "dropout_p")
    seed = _draw_seed(dropout_p, training, x)
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    if torch.is_grad_enabled():
        y = LoRALinearFunction.apply(rows, weight, bias, lora_a, lora_b, float(scale), float(dropout_p), seed)
    else:
        y, _ = torch.ops.fastlora.lora_linear(rows, weight, bias, lora_a, lora_b, float(scale), float(dropout_p), seed)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


class RowGroups:
    """The rows of a mixed batch sorted by adapter; made once per forward by `group_rows` and passed to every layer.

    index: int64 [B] or any shape, the adapter of each example or row, -1 for none. adapters: S.
    """

    def __init__(self, index: Tensor, adapters: int) -> None:
        self.index = index
        self.adapters = adapters
        self._by_rows: dict[int, tuple[Tensor, Tensor]] = {}

    def for_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        """(order [rows] int64, offsets [S + 3] int64) for an x of that many rows, a multiple of the index's elements."""
        if rows not in self._by_rows:
            if len(self._by_rows) >= 4:  # groups that outlive a forward see many row counts
                self._by_rows.clear()
            # Codes 0 (no adapter), 1 to S, and S + 1 for numbers that do not exist.
            code = torch.where((self.index >= -1) & (self.index < self.adapters), self.index + 1, self.adapters + 1).flatten()
            if code.numel() and rows != code.numel():
                code = code.repeat_interleave(rows // code.numel(), output_size=rows)
            ordered, order = torch.sort(code, stable=True)
            offsets = torch.searchsorted(ordered, torch.arange(self.adapters + 3, device=code.device))
            self._by_rows[rows] = order, offsets
        return self._by_rows[rows]


def group_rows(index: Tensor, adapters: int) -> RowGroups:
    """Sort the rows of a mixed batch by adapter, on the index's device and without a sync.

    index: integer tensor, the adapter of each example ([B]) or of each row (x.shape[:-1]), from -1 (base only) to adapters - 1.

    Raises:
        TypeError, ValueError: index is no integer tensor, or there are no adapters.
        IndexError: an index is out of range. On a CUDA device it is raised by a later call instead, and those rows become NaN.
    """
    _expect_tensor(index, "index")
    _expect_integers(index, "index", tuple(index.shape), index.device)
    _expect(adapters >= 1, "adapters", adapters, "at least 1")
    _expect_in_range((index < -1) | (index >= adapters), f"index: expected numbers from -1 to {adapters - 1} (one for each adapter, -1: base only)")
    return RowGroups(index.long(), adapters)


class MultiLoRAFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, dropout_p, seed, order, offsets, *adapters):  # adapters: every A, then every B
        S = len(adapters) // 2
        lora_a, lora_b = list(adapters[:S]), list(adapters[S:])
        y, xa = torch.ops.fastlora.multi_lora(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed, order, offsets)
        ctx.save_for_backward(x, weight, xa, seed, order, offsets, *adapters)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, xa, seed, order, offsets, *adapters = ctx.saved_tensors
        S = len(adapters) // 2
        lora_a, lora_b = adapters[:S], adapters[S:]
        wanted = ctx.needs_input_grad[8:]
        need = ctx.needs_input_grad[0], any(wanted[:S]), any(wanted[S:])
        with _without_autocast(dy.device):
            dx, da, db = torch.ops.fastlora.multi_lora_backward(
                dy, x, weight, lora_a, lora_b, xa, ctx.scale, ctx.dropout_p, seed, order, offsets, *need
            )
        das = [g.view_as(a) for g, a in zip(da.split([a.numel() for a in lora_a]), lora_a, strict=True)] if need[1] else [None] * S
        dbs = [g.view_as(b) for g, b in zip(db.split([b.numel() for b in lora_b]), lora_b, strict=True)] if need[2] else [None] * S
        grads = [grad if wants else None for grad, wants in zip(das + dbs, wanted, strict=True)]
        return dx if need[0] else None, None, None, None, None, None, None, None, *grads


def multi_lora(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], frozen
    bias: Tensor | None,  # [N], frozen
    lora_a: Sequence[Tensor],  # S of [R_i, K]
    lora_b: Sequence[Tensor],  # S of [N, R_i]
    scale: Sequence[float],  # S
    index: Tensor | RowGroups,
    *,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
) -> Tensor:  # [..., N]
    """Each row its own adapter: y = x Wᵀ + b + s_i · d_i(x) A_iᵀ B_iᵀ, and the base alone where i is -1.

    index: integer tensor, one an example (x.shape[0]) or one a row (x.shape[:-1]), or the `RowGroups` that `group_rows(index, S)` returns,
    made once per forward and passed to every layer. Ranks may differ; all adapters have one dtype, x's or float32. `dropout_p` is one
    probability for all or one an adapter. Gradients go to x and every lora_a and lora_b; an adapter without rows gets zeros.

    Raises:
        TypeError, ValueError: as `lora_linear`; the message names the adapter, as in lora_a[2].
        IndexError: an index is out of range (on a CUDA device raised by a later call; those rows become NaN).
    """
    cast = _autocast_dtype(x) if isinstance(x, Tensor) else None
    if cast is not None:
        with _without_autocast(x.device):
            return multi_lora(
                x.to(cast), weight.to(cast), None if bias is None else bias.to(cast), lora_a, lora_b, scale, index, dropout_p=dropout_p, training=training
            )
    _expect_base(x, weight, bias)
    for name, values in (("lora_a", lora_a), ("lora_b", lora_b), ("scale", scale)):
        if isinstance(values, Tensor) or not isinstance(values, Sequence):
            raise TypeError(f"{name}: got {type(values).__name__}, expected a list with one entry an adapter")
    S = len(lora_a)
    _expect(S >= 1, "lora_a", list(lora_a), "at least one adapter")
    _expect(len(lora_b) == S, "lora_b", f"{len(lora_b)} entries", f"{S}, one for each lora_a")
    _expect(len(scale) == S, "scale", list(scale), f"{S} numbers, one for each lora_a")
    for i in range(S):
        _expect_adapter(x, weight.shape[0], lora_a[i], lora_b[i], scale[i], f"[{i}]")
        _expect(lora_a[i].dtype == lora_a[0].dtype, f"lora_a[{i}]", lora_a[i], f"the dtype of lora_a[0], {lora_a[0].dtype}")
    probabilities = [dropout_p] * S if isinstance(dropout_p, (int, float)) else list(dropout_p)
    _expect(len(probabilities) == S, "dropout_p", probabilities, f"one probability, or {S}, one for each adapter")
    for i, p in enumerate(probabilities):
        _expect_probability(p, f"dropout_p[{i}]")

    if isinstance(index, Tensor):
        if tuple(index.shape) not in (tuple(x.shape[:1]), tuple(x.shape[:-1])):
            raise ValueError(f"index: got shape {list(index.shape)}, expected {list(x.shape[:1])} (an example) or {list(x.shape[:-1])} (a row)")
        groups = group_rows(index, S)
    elif isinstance(index, RowGroups):
        groups = index
    else:
        raise TypeError(f"index: got {type(index).__name__}, expected an integer tensor or the RowGroups of group_rows")
    rows = x.reshape(-1, x.shape[-1])
    _expect(groups.adapters == S, "index", f"groups for {groups.adapters} adapters", f"groups for {S}")
    _expect(groups.index.device == x.device, "index", groups.index, f"x's device {x.device}")
    fits = rows.shape[0] == 0 if groups.index.numel() == 0 else rows.shape[0] % groups.index.numel() == 0
    _expect(fits, "index", groups.index, f"one number an example or a row of x {list(x.shape)}")
    order, offsets = groups.for_rows(rows.shape[0])
    seed = _draw_seed(max(probabilities), training, x)
    scales, probabilities = [float(s) for s in scale], [float(p) for p in probabilities]
    if torch.is_grad_enabled():
        y = MultiLoRAFunction.apply(rows, weight, bias, scales, probabilities, seed, order, offsets, *lora_a, *lora_b)
    else:
        y, _ = torch.ops.fastlora.multi_lora(rows, weight, bias, list(lora_a), list(lora_b), scales, probabilities, seed, order, offsets)
    return y.view(*x.shape[:-1], y.shape[1])


class Prefixed(NamedTuple):
    """A batch with its prompts in front, W = T + longest prompt columns wide; ready for `model(inputs_embeds=...)`."""

    embeds: Tensor  # [B, W, D], zeros at padding
    attention_mask: Tensor  # [B, W], the given mask's dtype
    position_ids: Tensor  # [B, W] int64, 0 at padding
    labels: Tensor | None  # [B, W] int64, -100 at prompts and padding


class PrefixConcatFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prompts, starts, max_prompt, prompt_index, embeds, input_ids, embedding, attention_mask, position_ids, labels):
        out, mask, positions, new_labels, source = torch.ops.fastlora.prefix_concat(
            prompts, starts, max_prompt, prompt_index, embeds, input_ids, embedding, attention_mask, position_ids, labels
        )
        ctx.save_for_backward(source)
        ctx.prompt_rows, ctx.tokens, ctx.dtype = prompts.shape[0], attention_mask.shape[1], prompts.dtype
        ctx.mark_non_differentiable(mask, positions, new_labels)
        return out, mask, positions, new_labels

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *_):
        (source,) = ctx.saved_tensors
        need = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        dprompts, dembeds = torch.ops.fastlora.prefix_concat_backward(dout, source, ctx.prompt_rows, ctx.tokens, *need)
        grads: list[Tensor | None] = [None] * 10
        if need[0]:
            grads[0] = dprompts.to(ctx.dtype)
        if need[1]:
            grads[4] = dembeds
        return tuple(grads)


def prefix_concat(
    prompts: Tensor | Sequence[Tensor],  # [S, P, D] or S of [P_i, D]
    embeds: Tensor | None,  # [B, T, D], or None with input_ids and embedding
    attention_mask: Tensor,  # [B, T]: not 0 at real tokens
    *,
    input_ids: Tensor | None = None,  # [B, T]
    embedding: Tensor | None = None,  # [V, D], frozen
    prompt_index: Tensor | None = None,  # [B]; None where there is one prompt
    labels: Tensor | None = None,  # [B, T]
    position_ids: Tensor | None = None,  # [B, T]
) -> Prefixed:
    """Soft prompts in front of a batch, right in any padding: each row equals that row run alone (Lester et al. 2021, section 2).

    A row is its prompt, then its real tokens, with the padding kept on the row's side; a row without padding goes where the batch's
    padded rows put theirs. Real tokens need not be adjacent: a mask with holes closes up. The width is T + the longest prompt.
    Positions count within the row; given ones move by the prompt's length. Gradients go to prompts and embeds, never to embedding.

    Raises:
        TypeError: an argument is no tensor (or no list of tensors, for prompts).
        ValueError: a shape, dtype or device does not fit, prompts is empty, or embedding requires a gradient.
        IndexError: a prompt or token number is out of range (on a CUDA device raised by a later call; those rows become NaN).
    """
    if isinstance(prompts, Tensor):
        _expect(prompts.dim() == 3 and prompts.shape[0] >= 1, "prompts", prompts, "shape [S, P, D] with at least one prompt")
        S, length, D = prompts.shape
        flat, lengths = prompts.reshape(S * length, D), [length] * S
        starts = torch.arange(S + 1, device=prompts.device) * length
    elif isinstance(prompts, Sequence):
        _expect(len(prompts) >= 1, "prompts", list(prompts), "at least one prompt")
        for i, prompt in enumerate(prompts):
            _expect_tensor(prompt, f"prompts[{i}]")
            _expect(prompt.dim() == 2 and prompt.shape[1] == prompts[0].shape[-1], f"prompts[{i}]", prompt, f"shape [P, {prompts[0].shape[-1]}]")
            for what in ("dtype", "device"):
                first = getattr(prompts[0], what)
                _expect(getattr(prompt, what) == first, f"prompts[{i}]", prompt, f"the {what} of prompts[0], {first}")
        flat, lengths = torch.cat(list(prompts)), [len(prompt) for prompt in prompts]
        starts = _starts(tuple(lengths), flat.device)
    else:
        raise TypeError(f"prompts: got {type(prompts).__name__}, expected a tensor [S, P, D] or a list of [P_i, D]")
    S, D, device = len(lengths), flat.shape[1], flat.device
    _expect(flat.dtype in FLOATS, "prompts", flat, "float32, bfloat16, float16 or float64")

    _expect_tensor(attention_mask, "attention_mask")
    _expect(attention_mask.dim() == 2, "attention_mask", attention_mask, "shape [B, T]")
    _expect(attention_mask.device == device, "attention_mask", attention_mask, f"the prompts' device {device}")
    B, T = attention_mask.shape
    if embeds is None:
        if input_ids is None or embedding is None:
            raise ValueError("embeds: got None, expected a tensor [B, T, D], or None together with input_ids and embedding")
        _expect_integers(input_ids, "input_ids", (B, T), device)
        _expect_tensor(embedding, "embedding")
        V = embedding.shape[0]
        _expect(embedding.dim() == 2 and V >= 1 and embedding.shape[1] == D, "embedding", embedding, f"shape [V, {D}]")
        _expect(embedding.dtype in FLOATS, "embedding", embedding, "float32, bfloat16, float16 or float64")
        _expect(embedding.device == device, "embedding", embedding, f"the prompts' device {device}")
        if torch.is_grad_enabled() and embedding.requires_grad:
            raise ValueError("embedding: requires a gradient, expected a frozen tensor; look the tokens up yourself and pass embeds")
        real = attention_mask != 0
        _expect_in_range(real & ((input_ids < 0) | (input_ids >= V)), f"input_ids: expected numbers from 0 to {V - 1} (embedding {list(embedding.shape)})")
        input_ids = input_ids.long()
    else:
        if input_ids is not None or embedding is not None:
            raise ValueError("embeds: got a tensor, expected None where input_ids or embedding is given")
        _expect_tensor(embeds, "embeds")
        _expect(embeds.shape == (B, T, D), "embeds", embeds, f"shape {[B, T, D]}")
        _expect(embeds.dtype in FLOATS, "embeds", embeds, "float32, bfloat16, float16 or float64")
        _expect(embeds.device == device, "embeds", embeds, f"the prompts' device {device}")
    if prompt_index is None:
        _expect(S == 1, "prompt_index", None, f"a tensor [{B}] that says which of the {S} prompts each row has")
        prompt_index = torch.zeros(B, dtype=torch.int64, device=device)
    else:
        _expect_integers(prompt_index, "prompt_index", (B,), device)
        _expect_in_range((prompt_index < 0) | (prompt_index >= S), f"prompt_index: expected numbers from 0 to {S - 1} ({S} prompts)")
        prompt_index = prompt_index.long()
    for value, name in ((labels, "labels"), (position_ids, "position_ids")):
        if value is not None:
            _expect_integers(value, name, (B, T), device)
    out, mask, positions, new_labels = PrefixConcatFunction.apply(
        flat,
        starts,
        max(lengths),
        prompt_index,
        embeds,
        input_ids,
        embedding,
        attention_mask,
        None if position_ids is None else position_ids.long(),
        None if labels is None else labels.long(),
    )
    return Prefixed(out, mask, positions, None if labels is None else new_labels)


def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[S + 1] int64: where each prompt begins among all rows of prompts."""
    ends = torch.tensor((0, *lengths), device=device)
    return ends.cumsum(0)
