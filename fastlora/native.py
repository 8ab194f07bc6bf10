"""What csrc registers of the operators, entered as "cpu" and "cuda"."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora import ops
from fastlora.choice import table
from fastlora.frozen import products

CASES = {
    "cpu": ("lora_linear", "lora_linear_shared", "multi_lora", "multi_lora_shared", *map(table.rank_case, table.RANKS)),
    "cuda": ("lora_linear", "lora_linear_shared", "multi_lora"),
}
"""Of lora_linear: layers with mixed rows run one after the other on a card."""


def lora_linear_cuda(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], *rest: object
) -> tuple[list[Tensor], Tensor, Tensor]:
    """reference.py::lora_linear on a card: csrc takes a tensor without elements for no bias."""
    biases = [x.new_empty(0) if one is None else one for one in bias]
    return torch.ops.fastlora.lora_linear_cuda.default(x, weight, biases, *rest)


def functions(implementation: str, key: str) -> dict[tuple[str, str], Callable[..., Any]]:
    """What csrc has registered of the operators for "cpu" or "cuda" under a dispatch key, as `ops.implementations` has it."""
    registered = {name: ops.native(f"{name}_{implementation}", key) for name in ops.SCHEMAS}
    found = {name: function for name, function in registered.items() if function is not None}
    pair: tuple[Any, ...] = ()
    if implementation == "cpu" and ops.native("lora_update_cpu") is not None:
        pair = products.lora_linear, products.lora_linear_backward
    elif "lora_linear" in found:
        pair = lora_linear_cuda, found["lora_linear_backward"]
    for case in CASES[implementation] if pair else ():
        found[case], found[f"{case}_backward"] = pair
    return {(name, implementation): function for name, function in found.items()}


def enter(implementation: str) -> None:
    """Enter what csrc has registered of the operators for "cpu" or "cuda"."""
    for (case, name), function in functions(implementation, implementation.upper()).items():
        ops.implement(case, name, function)
