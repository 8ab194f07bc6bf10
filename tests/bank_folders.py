"""Adapter folders for a bank, and what the tiny model computes with each alone, by PEFT's own loading."""

import functools
from pathlib import Path
from typing import Any

import tiny
import torch
from adapter_folders import save
from peft import PeftModel
from torch import Tensor

import fastlora
from fastlora import adapters

IDS = torch.randint(36, (1, 7), generator=torch.Generator().manual_seed(2))
Q_V = ["q_proj", "v_proj"]


def save_several(folder: Path, count: int, **options: Any) -> dict[str, Path]:
    """Adapters a0, a1, ... of ranks 2, 3, 4, 2, ..."""
    found = {}
    for number in range(count):
        torch.manual_seed(100 + number)
        name = f"a{number}"
        found[name] = save(folder / name, **{"target_modules": Q_V, "r": 2 + number % 3, **options})
    return found


def own_model(folder: Path, accelerated: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model with one adapter of its own, called own."""
    torch.manual_seed(7)
    own = save(folder / "own", target_modules=Q_V)
    model = adapters.load(tiny.llama().to(dtype), {"own": adapters.read(own)}).eval().requires_grad_(False)
    return fastlora.accelerate(model) if accelerated else model


@functools.cache
def alone(folder: Path | None) -> Tensor:  # [T, V]
    """The logits of IDS with the adapter in a folder; None: of the base."""
    model = tiny.llama() if folder is None else PeftModel.from_pretrained(tiny.llama(), folder).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


@torch.no_grad()
def answer(model: Any, names: list[str]) -> Tensor:  # [rows, T, V]
    return model(input_ids=IDS.expand(len(names), -1), adapter_names=names).logits
