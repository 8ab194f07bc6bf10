"""Measurements made up, and a machine that nobody has measured: what the tests of fastlora/choice share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import operators, ops
from fastlora.choice import measure, problems, table
from fastlora.choice.table import Measurement

needs_native = pytest.mark.skipif(
    ("lora_linear", "cpu") not in ops.implementations, reason="the native extension is not built"
)
ON_A_CPU = list(problems.operators)


def entry(
    ratio: float | None,
    op: str = "lora_linear",
    rows: int = 64,
    size: str = "small",
    dropout: bool = False,
    dtype: str = "float32",
    implementation: str = "cpu",
) -> Measurement:
    return Measurement(op, dtype, rows, size, dropout, implementation, ratio is not None, ratio, "measured by a test")


def hold(*entries: Measurement, device_type: str = "cpu") -> None:
    """Let these be all that is known."""
    table.load_state({device_type: entries})


def choose(
    rows: int = 64,
    elements: int = 2**20,
    dropout: bool = False,
    backward: bool = False,
    dtype: torch.dtype = torch.float32,
) -> str:
    like = torch.empty(1, 1, dtype=dtype)
    x, weight = like.expand(rows, 1024), like.expand(elements // 1024, 1024)
    return operators.lora_linear.choose(x, weight, dropout, backward).implementation


@pytest.fixture(name="machine")
def a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that nobody has measured, with a cache of its own and small shapes to measure; returns the path of the cache."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTLORA_TABLE")
    monkeypatch.setattr(ops, "forced", None)
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(problems, "SHAPES", {"small": (48, 40), "large": (56, 64)})
    monkeypatch.setattr(operators.prefix_concat, "BATCHES", ((64, "small", False), (512, "large", False)))
    monkeypatch.setitem(problems.LINEAR_ROWS, "cpu", (1, 8, 64))
    restart()
    return table.cache_path("cpu")


@pytest.fixture(name="timed")
def half_times(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every implementation takes half of plain PyTorch's time; returns what has been timed so far."""
    seen: list[list[str]] = []

    def half(functions: dict[str, Callable[..., Any]], *_: Any) -> dict[str, float]:
        seen.append(list(functions))
        return {name: 0.5 for name in functions if name != "reference"}

    monkeypatch.setattr(measure, "ratios", half)
    return seen


def restart() -> None:
    """Forget what the process knows: files are read anew."""
    table.load_state(None)


def small_weights() -> dict[str, list[Tensor]]:
    return {"lora_linear": [torch.ones(8, 8), torch.ones(8, 6)], "multi_lora": []}


def spoil(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
