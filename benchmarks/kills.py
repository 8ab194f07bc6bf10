"""python -m benchmarks.kills [--kills 50] [--method lora full]: a training is killed at a random moment, resumed, and must end with the same bits.

Each is a run of STEPS steps of a small Llama of random weights, on one thread, with a checkpoint after every second step. SIGKILL comes at a moment
drawn from all that such a run takes, so that it meets loading, steps, half-written checkpoints and the last files alike. What `--resume` ends with
is held against a run that nobody has killed: every byte of the weights, every loss, gradient norm and rate.
The runs are forks of this process, which has imported everything and computed nothing. Exit codes: 0 all the same, 1 not.
"""

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastlora import writing
from fastlora.config import TrainConfig
from fastlora.train import train

from .model_steps import NARROW, save_random

STEPS, SAVE_STEPS, ROWS = 16, 2, 24
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 8192}  # fmt: skip
WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}
COMPARED = ("step", "epoch", "loss", "grad_norm", "learning_rate")  # of metrics.jsonl: what no clock decides
SLEEP = 0.001  # seconds between two looks at a process


def _data(folder: Path) -> Path:
    from fastlora.demo.tasks import generate

    rows = [{"prompt": one.prompt, "completion": one.completion} for one in generate("summarization", ROWS, 0)]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _start(config: TrainConfig) -> int:
    """A fork of this process that trains; its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        train(config, progress=False)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _finish(config: TrainConfig) -> None:
    """
    Raises:
        RuntimeError: it ended with an error, which it has printed.
    """
    _, status = os.waitpid(_start(config), 0)
    if status != 0:
        raise RuntimeError(f"the training in {config.output} ended with {status}")


def _kill(config: TrainConfig, seconds: float) -> bool:
    """Start it, and kill it after so many seconds; False where it was done before."""
    process = _start(config)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if status:
            raise RuntimeError(f"the training in {config.output} ended with {status} before it was killed")
        if ended:
            return False
        time.sleep(SLEEP)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def _content(config: TrainConfig) -> tuple[bytes, list[list[Any]]]:
    """What must be the same."""
    output = Path(config.output)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return (output / WEIGHTS[config.method]).read_bytes(), [[record[name] for name in COMPARED] for record in records]


def _met(config: TrainConfig) -> str:
    """What a kill has met."""
    output = Path(config.output)
    if any(output.glob(f"**/{writing.UNFINISHED}*")):
        return "a file half-written"
    if (output / WEIGHTS[config.method]).exists():
        return "the last files"
    path = output / "metrics.jsonl"
    return "a step" if path.exists() and path.stat().st_size else "no step yet"


def kills(config: TrainConfig, count: int, seed: int) -> tuple[int, Counter[str]]:
    """(how many runs that were killed and resumed ended as one that was not, what the kills met)."""
    folder, draw = Path(config.output), random.Random(seed)
    whole = replace(config, output=folder / "whole")
    began = time.perf_counter()
    _finish(whole)
    seconds, expected = time.perf_counter() - began, _content(whole)
    same, met = 0, Counter[str]()
    while met.total() < count:
        one = replace(config, output=folder / f"killed-{met.total()}")
        if not _kill(one, draw.uniform(0, seconds)):
            writing.remove(Path(one.output))
            continue
        met[_met(one)] += 1
        _finish(replace(one, resume=True))
        if _content(one) == expected:
            same += 1
            writing.remove(Path(one.output))
        else:
            print(f"{one.output} differs from {whole.output}", file=sys.stderr)
    return same, met


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.kills", description="Kill trainings, and resume them.")
    parser.add_argument("--kills", type=int, default=50, help="of each method (default: 50)")
    parser.add_argument("--method", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS), help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args(argv)
    for name in ("peft.tuners", "matplotlib.pyplot"):  # once, not in every fork
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true", "FASTLORA_TRIAL": "0"}
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    base, data = folder / "base", _data(folder)
    save_random(NARROW, base, **SIZES)
    failed = False
    for method in arguments.method:
        config = TrainConfig(
            model=base, data=data, output=folder / method, method=method, lr=1e-3, batch_size=2, max_length=128,
            max_steps=STEPS, save_steps=SAVE_STEPS, seed=1,
        )  # fmt: skip
        began = time.perf_counter()
        same, met = kills(config, arguments.kills, arguments.seed)
        failed |= same < arguments.kills
        told = ", ".join(f"{what} {count}" for what, count in met.most_common())
        seconds = time.perf_counter() - began
        print(f"{method}: {same} of {arguments.kills} bit-identical ({told}; {seconds:.0f} s)", flush=True)
    if not failed:
        writing.remove(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
