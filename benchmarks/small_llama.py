"""Training steps of a small Llama of random weights, plain and accelerated: their losses must agree, then they are timed in turn.

Hidden size 576 as SmolLM2-135M's, and 6 of its 30 layers. With the whole vocabulary its head is as costly as five layers.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora.choice.clock import Run, Timing, time_in_turn

from .device import clock_of
from .session import Session

ROWS, TOKENS = 8, 128
SIZES: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
SMALL_HEAD: dict[str, Any] = {**SIZES, "vocab_size": 8192}
"""The head's share of the work is that of SmolLM2-135M."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Of the loss, relative, in each dtype that is measured."""
ACCELERATED = {"loss": True, "fuse": True, "frozen": True}
SECONDS = 8.0  # of timing, a line


def base_model(sizes: Mapping[str, Any], dtype: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes)).to(getattr(torch, dtype))


def make_batch(vocabulary: int, tokens: int, unlabelled: int, shared: int = 0) -> dict[str, Tensor]:
    """ROWS of so many tokens, the first `unlabelled` without labels, the first `shared` the same in every row."""
    ids = torch.randint(5, vocabulary, (ROWS, tokens), generator=torch.Generator().manual_seed(4))
    ids[:, :shared] = ids[0, :shared]
    labels = ids.clone()
    labels[:, :unlabelled] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(model: Any, batch: Mapping[str, Tensor]) -> float:
    """Forward and backward; returns the loss."""
    loss = model(**batch).loss
    loss.backward()
    model.zero_grad()
    return float(loss.detach())


def step_times(session: Session, models: Mapping[str, Any], batch: Mapping[str, Tensor]) -> dict[str, Timing]:
    """Of a step of each model, the first the baseline."""

    def run(_: int, model: Any) -> None:
        step(model, batch)

    runs: dict[str, Run] = {name: partial(run, model=model) for name, model in models.items()}
    return time_in_turn(runs, clock_of(session.device), SECONDS)
