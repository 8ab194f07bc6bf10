"""Peak memory of training with one method, in a process that does nothing else: ``python -m fastlora.demo.memory``.

The process reads TrainConfig's arguments as one JSON object on stdin, and prints bytes.
"""

import json
import subprocess
import sys
from typing import Any

import torch

from fastlora.memory import resident


def peak_memory(**config: Any) -> int:
    """Bytes that ``fastlora.train.train`` with these arguments of TrainConfig takes at its peak, its imports left out.

    Raises RuntimeError with the process's error output if the training fails.
    """
    command = [sys.executable, "-m", __name__, str(torch.get_num_threads())]
    run = subprocess.run(command, input=json.dumps(config), capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"training with method={config.get('method')} failed:\n{run.stderr}")
    return int(run.stdout.split()[-1])


def main(threads: int) -> None:
    """Train as told on stdin; print the peak of resident memory, less what the imports took."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import fastlora.peft  # noqa: F401
    from fastlora.config import TrainConfig
    from fastlora.train import train

    torch.set_num_threads(threads)
    config = TrainConfig(**json.load(sys.stdin))
    before = resident("VmRSS")
    train(config, progress=False)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(int(sys.argv[1]))
