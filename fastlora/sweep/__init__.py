"""Many adapters trained in one run over one frozen base: any ranks, rates, seeds and layers, on the same rows or on each one's own.

A step's batch has rows of every job, each under its job's adapter; each job has its own loss, gradient norm, optimiser and schedule, so that its
adapter is the one that `fastlora train` would give it alone, but for rounding. Where a job drops out (lora_dropout) its masks are others than
alone: a mask follows from its layer's seed and a row's place in the batch.

    from fastlora.sweep import Sweep, best, sweep

jobs     what is trained: a grid, or a file of jobs
saved    what a checkpoint holds
outcome  what has become of the jobs, and the best of them
page     the same as one HTML page
run      the loop
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastlora.sweep.jobs import Job, Sweep, jobs_of
from fastlora.sweep.outcome import Outcome, best

if TYPE_CHECKING:
    from fastlora.sweep.run import sweep

__all__ = ["Job", "Outcome", "Sweep", "best", "jobs_of", "sweep"]


def __getattr__(name: str) -> Any:
    # The loop imports peft, which takes seconds: the command line's --help asks for the options alone.
    if name == "sweep":
        return importlib.import_module("fastlora.sweep.run").sweep
    raise AttributeError(f"module 'fastlora.sweep' has no attribute {name!r}")
