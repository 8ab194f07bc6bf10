"""A plain optimiser step, as a user's own loop takes it: what the demo and the benchmarks time fastlora and PEFT with.

`fastlora train` has a step of its own (train.py): it cuts a step into batches and processes, exchanges the loss, clips and checks gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.language_model_loss import IGNORE, LanguageModelLoss

Batch = dict[str, Tensor]  # input_ids, attention_mask, labels, each [B, T]


def mean_loss(model: Any) -> Callable[[Batch], Tensor]:
    """What gives a batch's mean loss a labelled token, a scalar, by fastlora's fused loss: what `model(**batch).loss` is."""
    loss_sum = LanguageModelLoss(model)
    return lambda batch: loss_sum(batch) / (batch["labels"][:, 1:] != IGNORE).sum()


def take_step(optimizer: torch.optim.Optimizer, loss_of: Callable[[Batch], Tensor], batch: Batch) -> float:
    """Gradients of a batch's loss, one update by them, and none left; returns the loss."""
    loss = loss_of(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
