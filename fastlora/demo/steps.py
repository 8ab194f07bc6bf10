"""The time of a training step: fastlora against PEFT with plain transformers, on the same batches, timed in turn."""

import time
from collections.abc import Callable
from itertools import islice
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora
from fastlora.choice.clock import median_ratio, rounds_in_turn
from fastlora.config import TrainConfig
from fastlora.data.examples import read_examples
from fastlora.data.rows import collate, encode, pad_token_id
from fastlora.steps import Batch, mean_loss, take_step


def compare_steps(config: TrainConfig, rows: int, steps: int) -> dict[str, Any]:
    """Time ``steps`` optimiser steps of both, each on the same ``rows`` rows in turn; the first of both is not counted.

    Both start from the same adapter, a new one as ``config`` has it (with dropout, each draws its own masks), and
    update it with AdamW at its rate. Returns medians in seconds, the median of the steps' ratios (fastlora / PEFT), and
    the losses of all steps of both.
    """
    batches, lr = _batches(config, rows, steps + 1), config.lr or 0.0
    ours, theirs = fastlora.accelerate(_adapted(config)), _adapted(config)
    variants = {
        "fastlora": _stepper(ours, lr, mean_loss(ours)),
        "peft": _stepper(theirs, lr, lambda batch: theirs(**batch, use_cache=False).loss),
    }
    left = {name: iter(batches) for name in variants}

    def step(name: str) -> tuple[float, float]:
        batch, began = next(left[name]), time.perf_counter()
        loss = variants[name](batch)
        return time.perf_counter() - began, loss

    rounds = list(islice(rounds_in_turn(list(variants), step), len(batches)))
    counted = {name: [one[name][0] for one in rounds[1:]] for name in variants}
    return {
        "rows": rows,
        "steps": steps,
        "tokens_per_step": sum(int(batch["attention_mask"].sum()) for batch in batches[1:]) / steps,
        "seconds": {name: median(times) for name, times in counted.items()},
        "ratio": median_ratio(counted["fastlora"], counted["peft"]),
        "losses": {name: [one[name][1] for one in rounds] for name in variants},
    }


def _batches(config: TrainConfig, rows: int, count: int) -> list[Batch]:
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    encoded = encode(read_examples(config.files), tokenizer, config.max_length).rows
    if len(encoded) < rows:
        raise ValueError(f"data must have at least rows={rows} rows, got {len(encoded)}")
    full = [encoded[start : start + rows] for start in range(0, len(encoded) - rows + 1, rows)]
    return [collate(full[index % len(full)], pad_token_id(tokenizer)) for index in range(count)]


def _adapted(config: TrainConfig) -> Any:
    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    lora = {name: getattr(config, name) for name in ("r", "lora_alpha", "lora_dropout", "target_modules")}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora)).train()


def _stepper(model: Any, lr: float, loss_of: Callable[[Batch], Tensor]) -> Callable[[Batch], float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    return lambda batch: take_step(optimizer, loss_of, batch)
