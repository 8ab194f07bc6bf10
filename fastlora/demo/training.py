"""Train with one method in a process of its own, so that its peak memory is its own.

``python -m fastlora.demo.training`` reads TrainConfig's arguments as one JSON object on stdin, and writes TrainResult
and the peak memory to --result.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (imported here, so that its size is not counted)
import torch
import transformers  # noqa: F401

import fastlora.peft  # noqa: F401
from fastlora.train import TrainConfig, train


def train_apart(result: Path, **config: Any) -> dict[str, Any]:
    """Run ``fastlora.train.train`` in a new process: TrainResult's fields and ``peak_memory``, bytes over the imports'.

    Raises RuntimeError with the process's error output if it fails.
    """
    command = [sys.executable, "-m", __name__, "--result", str(result), "--threads", str(torch.get_num_threads())]
    run = subprocess.run(command, input=json.dumps(config, default=str), capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"training with method={config.get('method')} failed:\n{run.stderr}")
    return json.loads(result.read_text(encoding="utf-8"))


def resident(kind: str) -> int:
    """Bytes of this process's resident memory, from Linux's /proc: "VmRSS" now, "VmHWM" the highest so far.

    (getrusage's ru_maxrss would not do: a process starts with its parent's peak there.)
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"kind must name a line of /proc/self/status, got {kind!r}")


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.training")
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = TrainConfig(**json.load(sys.stdin))
    before = resident("VmRSS")
    result = train(config, progress=False)
    record = {**asdict(result), "peak_memory": resident("VmHWM") - before}
    options.result.write_text(json.dumps(record, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
