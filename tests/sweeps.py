"""A tiny sweep: what it is given, in fixtures, and what it leaves. Whoever uses the fixtures imports `on_cpu` and `one_thread`, too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from training import on_cpu, one_thread  # noqa: F401  (fixtures)

from fastlora.sweep import Job, Sweep
from fastlora.train import train


@pytest.fixture(name="files", scope="module")
def some_files(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("files")
    return {
        "model": tiny.save_model(folder / "base"),
        "data": tiny.save_data(folder / "train.jsonl", 24),
        "eval_data": tiny.save_data(folder / "held_out.jsonl", 8, seed=5),
    }


@pytest.fixture(name="given")
def a_sweep(files, tmp_path) -> Sweep:
    """Of two ranks and two rates, six steps each."""
    return Sweep(**files, output=tmp_path / "out", r=[2, 5], lr=[1e-2, 1e-3], max_steps=6, batch_size=4)


def alone(job: Job, folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    """The adapter that `fastlora train` gives a job."""
    train(replace(job.config, output=folder / job.name, **more), progress=False)
    return adapter(folder / job.name)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all weights."""
    assert found.keys() == expected.keys()
    squares = sum(((found[name].double() - value.double()) ** 2).sum() for name, value in expected.items())
    return float(squares) ** 0.5
