"""Checkpoints that a kill cannot spoil.

A checkpoint is a folder OUTPUT/checkpoints/step-N. It is written under another name, forced to disk and then renamed,
so that a folder called step-N is always whole; so are the final files. The newest two are kept.
"""

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

KEPT = 2
UNFINISHED = ".unfinished-"


def folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step}"


def steps(output: Path) -> list[int]:
    """The steps of the checkpoints in OUTPUT, oldest first."""
    names = (path.name.removeprefix("step-") for path in (output / "checkpoints").glob("step-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def save(output: Path, step: int, fill: Callable[[Path], None]) -> None:
    """Write the checkpoint of `step`, whose files `fill` writes into the folder it is given; keep the newest two."""
    target = folder(output, step)
    scratch = _fill(output / "checkpoints", fill)
    _remove(target)
    os.replace(scratch, target)
    _force(target.parent)
    for old in steps(output)[:-KEPT]:
        _remove(folder(output, old))


def publish(output: Path, fill: Callable[[Path], None]) -> None:
    """Put the files that `fill` writes into OUTPUT, each one whole or not at all."""
    scratch = _fill(output, fill)
    for path in sorted(scratch.iterdir()):
        os.replace(path, output / path.name)
    scratch.rmdir()
    _force(output)


def clear(output: Path) -> None:
    """Remove all checkpoints, and what a killed process left half-written."""
    for path in (*(output / "checkpoints").glob("step-*"), *_leftovers(output)):
        _remove(path)


def clear_leftovers(output: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in _leftovers(output):
        _remove(path)


def _leftovers(output: Path) -> list[Path]:
    return [*output.glob(f"{UNFINISHED}*"), *(output / "checkpoints").glob(f"{UNFINISHED}*")]


def _fill(parent: Path, fill: Callable[[Path], None]) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=parent))
    scratch.chmod(0o755)  # mkdtemp lets only the owner in
    fill(scratch)
    for path in (*scratch.rglob("*"), scratch):
        _force(path)
    return scratch


def _remove(path: Path) -> None:
    """Remove a folder under another name, so that a kill never leaves half of it under its own."""
    if path.is_dir() and not path.name.startswith(UNFINISHED):
        path = path.rename(path.with_name(UNFINISHED + path.name))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _force(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rng_state() -> dict[str, Any]:
    """The state of every generator that a step may draw from, in types that torch.load takes with weights_only=True."""
    numbers = numpy.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numbers, "state": {**numbers["state"], "key": numbers["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
