"""Noise on the embeddings of what is trained on: NEFTune (Jain et al. 2023).

    e + u alpha / sqrt(L D)    u uniform in (-1, 1), for a row of L tokens of width D

L is a row's own length: padding does not count, nor do the other rows of a batch that runs without it. The noise is drawn from torch's generator on
the device, whose state is in a checkpoint. In eval mode there is none.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def attach(model: Any, alpha: float) -> None:
    """Have a transformers or PEFT model, as it is called in training, add noise to what its input embedding gives."""
    tokens: list[Tensor] = []  # L of each token of the call that is under way, [B, T] or [B, 1]

    def note(module: Any, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        tokens[:] = [lengths(given)] if module.training else []

    def disturb(module: Any, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        if not (module.training and tokens):
            return embedded
        noise = torch.empty_like(embedded).uniform_(-alpha, alpha)
        scale = (tokens[0] * embedded.shape[-1]).rsqrt()[..., None]
        return embedded + noise * scale.to(embedded.dtype)

    model.register_forward_pre_hook(note, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(disturb)


def lengths(given: Mapping[str, Any]) -> Tensor:
    """How many tokens the row of each token has, float32 [B, T] or [B, 1], by the arguments of a model's forward.

    A batch in one row (packing.py) tells where its rows begin by cu_seq_lens_q, one of lines in which rows lie end to end by positions of 0.
    """
    starts, ids, mask = given.get("cu_seq_lens_q"), given["input_ids"], given.get("attention_mask")
    if starts is not None:
        rows = starts.diff().long()
        return rows.repeat_interleave(rows)[None].float()
    if mask is not None and mask.dim() == 2:
        return mask.sum(1, keepdim=True).float()
    positions = given.get("position_ids")
    if positions is not None:
        row = (positions == 0).cumsum(1)  # of each token its row's number in the line, from 1 on
        counts = row.new_zeros(row.shape[0], row.shape[1] + 1).scatter_add_(1, row, torch.ones_like(row))
        return counts.gather(1, row).float()
    return torch.full((ids.shape[0], 1), float(ids.shape[1]), device=ids.device)
