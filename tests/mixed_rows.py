"""Rows with adapters of their own: each alone, by PEFT, and all in one batch, with what they give and the gradients of every adapter."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig
from peft_models import IDS, assert_as_near_as, peft_model
from torch import Tensor

BASE = "__base__"
WEIGHTS = torch.linspace(-1, 1, 11 * 96).view(11, 96)  # of a row's logits in what is minimised


def lora_and_dora(family: str = "llama", **options: Any) -> Any:
    """A model with two DoRA adapters, whose magnitudes are not the norms, and a plain one beside them, of several ranks."""
    model, _ = peft_model(family, **options)
    targets = model.peft_config["default"].target_modules
    dropout = {"lora_dropout": options.get("lora_dropout", 0.0)}
    for name, rank, where in (("dora", 7, targets), ("small", 2, ["q_proj", "v_proj", "down_proj", "q", "v", "wo"])):
        model.add_adapter(
            name, LoraConfig(r=rank, target_modules=where, init_lora_weights=False, use_dora=True, **dropout)
        )
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 0.5 + torch.rand_like(parameter)
    return model


def _gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _minimised(model: Any, autocast: torch.dtype | None, **given: Any) -> Tensor:
    """The logits, after a backward from a sum of them."""
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        logits: Tensor = model(**given).logits
    weighted = logits * WEIGHTS[-logits.shape[1] :].to(logits.dtype)
    if weighted.requires_grad:
        weighted.sum().backward()
    return logits.detach()


def row_by_row(
    model: Any, names: Sequence[str], ids: Tensor = IDS, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    found = []
    for row, name in enumerate(names):
        if name != BASE:
            model.set_adapter(name)
        with model.disable_adapter() if name == BASE else nullcontext():
            found.append(_minimised(model, autocast, input_ids=ids[row : row + 1]))
    return {"logits": torch.cat(found), **_gradients(model)}


def all_at_once(
    model: Any, names: Sequence[str], ids: Tensor = IDS, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    model.set_requires_grad([name for name in model.peft_config if name in names])
    logits = _minimised(model, autocast, input_ids=ids, adapter_names=names)
    return {"logits": logits, **_gradients(model)}


def answers_row_by_row(model: Any, names: Sequence[str], **options: Any) -> Tensor:
    found = []
    for row, name in enumerate(names):
        if name != BASE:
            model.set_adapter(name)
        with model.disable_adapter() if name == BASE else nullcontext():
            found.append(model.generate(input_ids=IDS[row : row + 1], **options))
    return torch.cat(found)


def assert_equal_rows(
    ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], trained: Sequence[str]
) -> None:
    """Within the bound, and each of these adapters has gradients."""
    for name in trained:
        assert any(f".{name}" in parameter for parameter in ours), name
    assert_as_near_as(ours, eager, exact)
