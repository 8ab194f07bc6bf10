"""A tiny training: what it is given, in fixtures, and what it leaves. Whoever uses the fixtures imports `on_cpu` and `one_thread`, too."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fastlora.config import TrainConfig
from fastlora.train import train


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    with tiny.on_cpu():
        yield


@pytest.fixture(name="base", scope="module")
def a_base(tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(name="data", scope="module")
def some_data(tmp_path_factory) -> Path:
    return tiny.save_data(tmp_path_factory.mktemp("data") / "train.jsonl", 48)


@pytest.fixture(autouse=True)
def one_thread():
    """Bits are compared between this process and others, which is fair at an equal thread count only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(name="config")
def a_config(base, data, tmp_path) -> TrainConfig:
    return TrainConfig(model=str(base), data=data, output=tmp_path / "out", r=4, lora_alpha=8, lr=1e-2, epochs=2)


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def numbers(output: Path) -> list[tuple]:
    """The metrics that must not depend on the clock."""
    return [(record["step"], record["loss"], record["learning_rate"]) for record in records(output)]


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def train_on_two_processes(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`fastlora train` as torchrun starts it on a machine without cards: no variable tells accelerate of that."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("ACCELERATE_USE_CPU", None)  # `on_cpu` has set it
    return subprocess.run([*command, "fastlora", "train", *arguments], env=environment, capture_output=True, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(name="finished", scope="module")
def a_finished_run(base, data, tmp_path_factory) -> Path:
    """A run of 6 steps with the checkpoints of steps 4 and 6. Not to be changed: take a copy."""
    output = tmp_path_factory.mktemp("finished") / "out"
    train(of_six_steps(base, data, output), progress=False)
    return output


def of_six_steps(base: Path, data: Path, output: Path) -> TrainConfig:
    return TrainConfig(model=base, data=data, output=output, r=2, lr=1e-2, max_steps=6, save_steps=2)


@pytest.fixture(name="again")
def a_run_to_go_on(finished, base, data, tmp_path) -> TrainConfig:
    """The same run, as a copy in another folder, to go on from."""
    shutil.copytree(finished, tmp_path / "again")
    return replace(of_six_steps(base, data, tmp_path / "again"), resume=True)


def interrupt_at(metrics: Path, steps: int) -> threading.Thread:
    """Ctrl-C for this process once the metrics have so many lines."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= steps):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread
