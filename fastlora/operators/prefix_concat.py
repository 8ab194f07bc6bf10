"""Rows [P ; E[ids]]: soft prompts in front of a batch, with mask, positions and labels, right in any padding, each row with its own prompt.

The equation and its gradients are fastlora/reference.py::prefix_concat and prefix_concat_backward.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlora import checks, ops, reference
from fastlora.checks import wrong, wrong_type
from fastlora.choice import problems
from fastlora.choice.problems import ADAPTERS, TOKENS, Call, Draw, Measured, tensors_of
from fastlora.gradients import differentiable_once, is_eager, rows_of
from fastlora.ops import Choice

# B batch rows   T tokens   P prompt length   W = T + longest prompt   D embedding width
SCHEMA = (
    "(Tensor prompts, Tensor starts, SymInt max_prompt, Tensor prompt_index, Tensor? embeds, Tensor? input_ids,"
    " Tensor? embedding, Tensor attention_mask, Tensor? position_ids, Tensor? labels)"
    " -> (Tensor embeds, Tensor attention_mask, Tensor position_ids, Tensor labels, Tensor source)"
)
BACKWARD_SCHEMA = (
    "(Tensor dout, Tensor source, SymInt prompt_rows, SymInt tokens, bool need_prompts, bool need_embeds)"
    " -> (Tensor dprompts, Tensor dembeds)"
)
BATCHES = ((512, "small", False), (4096, "large", False))  # what is measured: tokens, and the size of what they move
PROMPT, VOCABULARY = 20, 1000

_now, _now_backward = ops.native("prefix_concat_now_cpu"), ops.native("prefix_concat_backward_now_cpu")
NO_TOKEN = 1  # what it says where a token's number does not exist; 2 where a prompt's does not


def choose(embeds: Tensor, rows: int, backward: bool = False) -> Choice:
    """Which implementation runs `prefix_concat`, or its backward, for that many tokens B T with embeddings [..., D] like `embeds`."""
    op = "prefix_concat_backward" if backward else "prefix_concat"
    return ops.choose(op, embeds, rows, rows * embeds.shape[-1], dropout=False)


def run(*args: Any) -> Any:
    """reference.py::prefix_concat, by the implementation that was chosen."""
    _, _, _, _, embeds, _, embedding, mask, *_ = args
    choice = choose(embedding if embeds is None else embeds, mask.numel())
    return ops.implementations["prefix_concat", choice.implementation](*args)


def run_backward(dout: Tensor, *args: Any) -> Any:
    """reference.py::prefix_concat_backward, by the implementation that was chosen."""
    choice = choose(dout, dout.shape[0] * dout.shape[1], backward=True)
    return ops.implementations["prefix_concat_backward", choice.implementation](dout, *args)


def _fake(prompts, starts, max_prompt, prompt_index, embeds, input_ids, embedding, mask, position_ids, labels):
    batch, width = mask.shape[0], mask.shape[1] + max_prompt
    out = (embedding if embeds is None else embeds).new_empty(batch, width, prompts.shape[1])
    positions, source = (starts.new_empty(batch, width) for _ in range(2))
    new_labels = starts.new_empty(0) if labels is None else labels.new_empty(batch, width)
    return out, mask.new_empty(batch, width), positions, new_labels, source


def _fake_backward(dout, source, prompt_rows, tokens, need_prompts, need_embeds):
    D, wide = dout.shape[2], torch.promote_types(dout.dtype, torch.float32)
    dprompts = dout.new_empty((prompt_rows, D) if need_prompts else 0, dtype=wide)
    return dprompts, dout.new_empty((dout.shape[0], tokens, D) if need_embeds else 0)


ops.define("prefix_concat", SCHEMA, run, _fake)
ops.define("prefix_concat_backward", BACKWARD_SCHEMA, run_backward, _fake_backward)


class Prefixed(NamedTuple):
    """A batch with its prompts in front, W = T + longest prompt columns wide; ready for `model(inputs_embeds=...)`."""

    embeds: Tensor  # [B, W, D], zeros at padding
    attention_mask: Tensor  # [B, W], the given mask's dtype
    position_ids: Tensor  # [B, W] int64, 0 at padding
    labels: Tensor | None  # [B, W] int64, -100 at prompts and padding


class PrefixConcatFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prompts, starts, max_prompt, *rest):  # as SCHEMA has them; prompts may be [S, P, D]
        flat = rows_of(prompts)  # [sum P_i, D]
        out, mask, positions, new_labels, source = torch.ops.fastlora.prefix_concat(flat, starts, max_prompt, *rest)
        ctx.save_for_backward(source)
        ctx.prompts, ctx.dtype, ctx.tokens = prompts.shape, prompts.dtype, mask.shape[1] - max_prompt
        ctx.mark_non_differentiable(mask, positions, new_labels)
        ctx.set_materialize_grads(False)  # or zeros would be made for these three
        return out, mask, positions, new_labels

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout, *_):
        if dout is None:
            return (None,) * 10
        dprompts, dembeds = _gradients(ctx, saved, dout, ctx.needs_input_grad[0], ctx.needs_input_grad[4])
        return dprompts, None, None, None, dembeds, *(None,) * 5


class NowFunction(torch.autograd.Function):
    """The same by csrc's entry for a call that nobody traces. Autograd sees no more than it must: a result costs it half a microsecond."""

    @staticmethod
    def forward(ctx, prompts, embeds, before, after, others):
        """others: an empty list, which gets all that `_now` gives but the embeddings."""
        out, *rest = _now(prompts, *before, embeds, *after)
        others += rest
        ctx.save_for_backward(rest[3])  # source
        ctx.prompts, ctx.dtype, ctx.tokens = prompts.shape, prompts.dtype, after[2].shape[1]
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout):
        if dout is None:
            return (None,) * 5
        source, (need_prompts, need_embeds, *_) = saved[0], ctx.needs_input_grad
        if not is_eager(dout) or choose(dout, source.numel(), backward=True).implementation != "cpu":
            return *_gradients(ctx, saved, dout, need_prompts, need_embeds), None, None, None
        # Autograd drops what nobody needs, and casts what has another dtype; but embeds may be None, which has no gradient.
        dprompts, dembeds = _now_backward(dout, source, ctx.prompts, ctx.tokens, need_prompts, need_embeds)
        return dprompts, dembeds if need_embeds else None, None, None, None


def _gradients(
    ctx: Any, saved: Sequence[Tensor], dout: Tensor, need_prompts: bool, need_embeds: bool
) -> tuple[Tensor | None, Tensor | None]:
    (source,) = saved
    call = run_backward if is_eager(dout, source) else torch.ops.fastlora.prefix_concat_backward
    dprompts, dembeds = call(dout, source, math.prod(ctx.prompts[:-1]), ctx.tokens, need_prompts, need_embeds)
    return dprompts.to(ctx.dtype).view(ctx.prompts) if need_prompts else None, dembeds if need_embeds else None


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
    rest = input_ids, embedding, attention_mask, position_ids, labels
    if isinstance(prompts, Tensor) and _may_run_now(prompts, prompt_index, embeds, rest):
        try:
            return _run_now(prompts, [prompts.shape[1]] * prompts.shape[0], prompt_index, embeds, rest)
        except RuntimeError:
            pass  # csrc looks at the same as what follows, which says what is wrong in the words of this function
    prompts, lengths = _line_up(prompts)
    checks.check_transforms(prompts, embeds, embedding)
    S, D, device = len(lengths), prompts.shape[-1], prompts.device
    if not isinstance(attention_mask, Tensor):
        raise wrong_type("attention_mask", attention_mask, "a torch.Tensor")
    if attention_mask.dim() != 2 or attention_mask.is_complex():
        raise wrong("attention_mask", attention_mask, "booleans or numbers of shape [B, T]")
    if attention_mask.device != device:
        raise wrong("attention_mask", attention_mask, f"the prompts' device {device}")
    B, T = attention_mask.shape
    if embeds is None:
        if input_ids is None or embedding is None:
            raise wrong("embeds", embeds, "a tensor [B, T, D], or None together with input_ids and embedding")
        checks.check_integers(input_ids, "input_ids", (B, T), device)
        checks.check_floats(embedding, "embedding")
        if embedding.dim() != 2 or embedding.shape[0] < 1 or embedding.shape[1] != D:
            raise wrong("embedding", embedding, f"shape [V, {D}]")
        if embedding.device != device:
            raise wrong("embedding", embedding, f"the prompts' device {device}")
        if torch.is_grad_enabled() and embedding.requires_grad:
            raise ValueError(
                "embedding: requires a gradient, expected a frozen tensor; look the tokens up yourself and pass embeds"
            )
        input_ids = input_ids.long()
    else:
        if input_ids is not None or embedding is not None:
            raise ValueError("embeds: got a tensor, expected None where input_ids or embedding is given")
        checks.check_floats(embeds, "embeds")
        if tuple(embeds.shape) != (B, T, D):
            raise wrong("embeds", embeds, f"shape {[B, T, D]}")
        if embeds.device != device:
            raise wrong("embeds", embeds, f"the prompts' device {device}")
    if prompt_index is not None:
        checks.check_integers(prompt_index, "prompt_index", (B,), device)
    elif S != 1:
        raise wrong("prompt_index", None, f"a tensor [{B}] that says which of the {S} prompts each row has")
    for value, name in ((labels, "labels"), (position_ids, "position_ids")):
        if value is not None:
            checks.check_integers(value, name, (B, T), device)
    prompt_index, input_ids, position_ids, labels = (
        None if one is None else one.long() for one in (prompt_index, input_ids, position_ids, labels)
    )
    rest = input_ids, embedding, attention_mask, position_ids, labels
    run = _run_now if _is_now(prompts, prompt_index, embeds, rest) else _run_operator
    return run(prompts, lengths, prompt_index, embeds, rest)


Rest = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]
"""input_ids, embedding, attention_mask, position_ids and labels."""


def _is_now(prompts: Tensor, prompt_index: Tensor | None, embeds: Tensor | None, rest: Rest) -> bool:
    """Whether csrc's entry for a call that nobody traces runs these arguments."""
    return prompts.is_cpu and is_eager(prompts, prompt_index, embeds, *rest) and _is_native(embeds, rest)


def _is_native(embeds: Tensor | None, rest: Rest) -> bool:
    table: Any = rest[1] if embeds is None else embeds
    return choose(table, rest[2].numel()).implementation == "cpu"


def _may_run_now(prompts: Tensor, prompt_index: Any, embeds: Any, rest: tuple[Any, Any, Any, Any, Any]) -> bool:
    """The same for arguments that nobody has checked: csrc does, but for what is asked here."""
    input_ids, embedding, attention_mask, _, labels = rest
    if attention_mask is None or not is_eager(prompts, prompt_index, embeds, *rest):
        return False
    looked_up = embeds is None
    if (input_ids is None) is looked_up or (embedding is None) is looked_up:
        return False
    if (looked_up and input_ids.dtype is not torch.int64) or (labels is not None and labels.dtype is not torch.int64):
        return False  # csrc would take no other, either; but an exception in each call would cost more than all else
    if looked_up and (embedding.dim() != 2 or (embedding.requires_grad and torch.is_grad_enabled())):
        return False
    if prompts.dim() != 3 or prompts.shape[0] < 1 or (prompt_index is None and prompts.shape[0] > 1):
        return False
    if not prompts.is_cpu or attention_mask.is_complex() or forward_ad._current_level >= 0:
        return False
    return _is_native(embeds, rest)


def _run_now(
    prompts: Tensor, lengths: list[int], prompt_index: Tensor | None, embeds: Tensor | None, rest: Rest
) -> Prefixed:
    """By csrc's entry for a call that nobody traces, which also looks whether all numbers exist."""
    before = [0, *itertools.accumulate(lengths)], max(lengths), prompt_index
    if torch.is_grad_enabled() and (prompts.requires_grad or (embeds is not None and embeds.requires_grad)):
        others: list[Any] = []
        out = NowFunction.apply(prompts, embeds, before, rest, others)
    else:
        out, *others = _now(prompts, *before, embeds, *rest)
    mask, positions, labels, _, missing = others
    if missing:
        raise IndexError(_no_token(rest[1]) if missing == NO_TOKEN else _no_prompt(len(lengths)))
    return Prefixed(out, mask, positions, None if rest[4] is None else labels)


def _run_operator(
    prompts: Tensor, lengths: list[int], prompt_index: Tensor | None, embeds: Tensor | None, rest: Rest
) -> Prefixed:
    """By the operator, as torch's dispatcher and compiler see it."""
    input_ids, embedding, attention_mask, position_ids, labels = rest
    B, S, device = attention_mask.shape[0], len(lengths), prompts.device
    if input_ids is not None and embedding is not None:
        checks.check_in_range(input_ids, 0, embedding.shape[0] - 1, _no_token(embedding), attention_mask)
    if prompt_index is None:
        prompt_index = torch.zeros(B, dtype=torch.int64, device=device)
    else:
        checks.check_in_range(prompt_index, 0, S - 1, _no_prompt(S))
    if prompts.dim() == 3:
        starts = torch.arange(S + 1, device=device).mul_(lengths[0])
    else:
        starts = torch.tensor([0, *lengths], device=device).cumsum(0)
    if labels is input_ids and labels is not None:
        labels = labels.view_as(labels)  # the same tensor twice is more than torch.compile takes
    out, mask, positions, new_labels = PrefixConcatFunction.apply(
        prompts, starts, max(lengths), prompt_index, embeds, input_ids, embedding, attention_mask, position_ids, labels
    )
    return Prefixed(out, mask, positions, None if labels is None else new_labels)


def _no_token(embedding: Any) -> str:
    V, D = embedding.shape
    return f"input_ids: expected numbers from 0 to {V - 1} (embedding [{V}, {D}])"


def _no_prompt(S: int) -> str:
    return f"prompt_index: expected numbers from 0 to {S - 1} ({S} prompts)"


def _line_up(prompts: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """All prompts one after the other, [sum P_i, D] or as given [S, P, D], and their lengths."""
    if isinstance(prompts, Tensor):
        checks.check_floats(prompts, "prompts")
        if prompts.dim() != 3 or prompts.shape[0] < 1:
            raise wrong("prompts", prompts, "shape [S, P, D] with at least one prompt")
        S, length, _ = prompts.shape
        return prompts, [length] * S
    if not isinstance(prompts, Sequence):
        raise wrong_type("prompts", prompts, "a tensor [S, P, D] or a list of [P_i, D]")
    if len(prompts) < 1:
        raise wrong("prompts", list(prompts), "at least one prompt")
    for i, prompt in enumerate(prompts):
        checks.check_floats(prompt, f"prompts[{i}]")
        if prompt.dim() != 2:
            raise wrong(f"prompts[{i}]", prompt, "shape [P, D]")
        first = prompts[0]
        if prompt.shape[1] != first.shape[1] or prompt.dtype != first.dtype or prompt.device != first.device:
            raise wrong(f"prompts[{i}]", prompt, f"width, dtype and device of prompts[0], {checks.shown(first)}")
    return torch.cat(list(prompts)) if len(prompts) > 1 else prompts[0], [prompt.shape[0] for prompt in prompts]


def calls(rows: int, D: int, _: int, dtype: torch.dtype, device: torch.device, dropout: bool) -> dict[str, list[Call]]:
    """Arguments of the operator and of its backward (choice/problems.py)."""
    draw = Draw(dtype, device)
    B, T = math.ceil(rows / TOKENS), min(rows, TOKENS)
    prompts = draw.normal(ADAPTERS * PROMPT, D)
    starts = torch.arange(ADAPTERS + 1, device=device) * PROMPT
    ids = draw.integers(VOCABULARY, B, T)
    mask = (torch.arange(T, device=device) < T - torch.arange(B, device=device)[:, None] % 8).long()
    index, embedding = torch.arange(B, device=device) % ADAPTERS, draw.normal(VOCABULARY, D)
    forward: Call = (prompts, starts, PROMPT, index, None, ids, embedding, mask, None, ids)
    source = reference.prefix_concat(*forward)[-1]
    backward: Call = (draw.normal(B, T + PROMPT, D), source, len(prompts), T, True, False)
    return {"prefix_concat": [forward], "prefix_concat_backward": [backward]}


def classes(device_type: str, dtype: torch.dtype, sizes: Sequence[str]) -> Iterable[tuple[int, str, bool]]:
    return BATCHES


problems.operators["prefix_concat"] = Measured(calls, classes, tensors_of)
