"""Rows [P ; E[ids]]: soft prompts in front of a batch, with mask, positions and labels, right in any padding, each row with its own prompt.

The equation and its gradients are fastlora/reference.py::prefix_concat and prefix_concat_backward.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import checks, ops, reference
from fastlora.checks import wrong, wrong_type
from fastlora.choice import problems
from fastlora.choice.problems import ADAPTERS, TOKENS, Call, Draw, Measured, tensors_of
from fastlora.gradients import differentiable_once, rows_of
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
        ctx.prompts, ctx.dtype = prompts.shape, prompts.dtype
        ctx.prompt_rows, ctx.tokens = flat.shape[0], mask.shape[1] - max_prompt
        ctx.mark_non_differentiable(mask, positions, new_labels)
        ctx.set_materialize_grads(False)  # or zeros would be made for these three
        return out, mask, positions, new_labels

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout, *_):
        if dout is None:
            return (None,) * 10
        (source,) = saved
        need = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        dprompts, dembeds = torch.ops.fastlora.prefix_concat_backward(dout, source, ctx.prompt_rows, ctx.tokens, *need)
        dprompts = dprompts.to(ctx.dtype).view(ctx.prompts) if need[0] else None
        return dprompts, None, None, None, dembeds if need[1] else None, *(None,) * 5


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
    prompts, starts, lengths = _line_up(prompts)
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
        V = embedding.shape[0]
        input_ids = input_ids.long()
        expected = f"input_ids: expected numbers from 0 to {V - 1} (embedding [{V}, {D}])"
        checks.check_in_range(input_ids, 0, V - 1, expected, attention_mask)
    else:
        if input_ids is not None or embedding is not None:
            raise ValueError("embeds: got a tensor, expected None where input_ids or embedding is given")
        checks.check_floats(embeds, "embeds")
        if tuple(embeds.shape) != (B, T, D):
            raise wrong("embeds", embeds, f"shape {[B, T, D]}")
        if embeds.device != device:
            raise wrong("embeds", embeds, f"the prompts' device {device}")
    if prompt_index is None:
        if S != 1:
            raise wrong("prompt_index", None, f"a tensor [{B}] that says which of the {S} prompts each row has")
        prompt_index = torch.zeros(B, dtype=torch.int64, device=device)
    else:
        checks.check_integers(prompt_index, "prompt_index", (B,), device)
        prompt_index = prompt_index.long()
        checks.check_in_range(prompt_index, 0, S - 1, f"prompt_index: expected numbers from 0 to {S - 1} ({S} prompts)")
    for value, name in ((labels, "labels"), (position_ids, "position_ids")):
        if value is not None:
            checks.check_integers(value, name, (B, T), device)
    if labels is input_ids and labels is not None:
        labels = labels.view_as(labels)  # the same tensor twice is more than torch.compile takes
    out, mask, positions, new_labels = PrefixConcatFunction.apply(
        prompts,
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


def _line_up(prompts: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """All prompts one after the other, [sum P_i, D] or as given [S, P, D]; where each begins [S + 1] int64, and their lengths."""
    if isinstance(prompts, Tensor):
        checks.check_floats(prompts, "prompts")
        if prompts.dim() != 3 or prompts.shape[0] < 1:
            raise wrong("prompts", prompts, "shape [S, P, D] with at least one prompt")
        S, length, _ = prompts.shape
        starts = torch.arange(S + 1, device=prompts.device).mul_(length)
        return prompts, starts, [length] * S
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
    lengths = [prompt.shape[0] for prompt in prompts]
    flat = torch.cat(list(prompts))
    return flat, torch.tensor([0, *lengths], device=flat.device).cumsum(0), lengths


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
