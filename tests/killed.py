"""A training in a process of its own that kills itself, by SIGKILL, at a moment of one's choice: nothing is tidied up behind it."""

import multiprocessing
import os
import signal
from dataclasses import dataclass
from typing import Any

from fastlora.config import TrainConfig

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["fastlora.train"])  # torch and transformers are imported once for all


@dataclass(frozen=True)
class Moment:
    """Before or after the call of that number, from 1 on, of a function: `MODULE.NAME`, or `MODULE.CLASS.NAME`."""

    function: str
    call: int
    after: bool = False


def killed_at(config: TrainConfig, moment: Moment) -> None:
    """Train in another process, until the moment at which it dies."""
    process = SERVER.Process(target=_train, args=(config, moment, dict(os.environ)))
    process.start()
    process.join(120)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"{moment} did not come: exit code {process.exitcode}"


def _train(config: TrainConfig, moment: Moment, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import torch

    import fastlora.train

    torch.set_num_threads(1)
    *path, name = moment.function.split(".")
    owner: Any = fastlora
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == moment.call and not moment.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == moment.call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)
    fastlora.train.train(config, progress=False)
