"""Checkpoints that a kill cannot spoil, and that no damage passes.

A checkpoint is a folder OUTPUT/checkpoints/step-N. It is written under another name, forced to disk and then renamed,
so that a folder called step-N is always whole. The newest few are kept. `manifest.json`, written last, has the SHA-256
of every file and of itself: `read` takes nothing that it does not vouch for.
"""

import json
import os
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from hashlib import file_digest, sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlora import reading, writing
from fastlora.choice import table
from fastlora.typed import check_fields, fits, shown

KEPT = 2  # unless told
MANIFEST = "manifest.json"
TRAINED = "trained.safetensors"
MOST = 2**31 - 1  # steps, processes or threads
STATE = {"optimizer", "scheduler", "scaler", "rng", "tuned"}


class CheckpointError(ValueError):
    """A checkpoint is damaged, or is none: the message names the file and, where it has keys, the key."""


@dataclass(frozen=True)
class Training:
    """training.json: what a resumed run must have in common with the run before.

    Raises:
        TypeError, ValueError: a value of another type, or out of range; the message names it.
    """

    step: int
    config: dict[str, Any]  # TrainConfig's
    data: str  # SHA-256 of the token rows
    held_out: str  # SHA-256 of those that are measured on
    peft_config: str  # SHA-256 of the file of that name; of nothing where there is none
    validations: int  # how many were done
    processes: int
    threads: int
    device: str

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("step", "processes", "threads"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name}={shown(getattr(self, name))}: expected 1 to {MOST}")
        if not 0 <= self.validations <= self.step + 1:  # one a step, and one before the first
            raise ValueError(f"validations={shown(self.validations)}: expected 0 to {self.step + 1}")
        for name in ("data", "held_out", "peft_config"):
            if not re.fullmatch("[0-9a-f]{64}", getattr(self, name)):
                raise ValueError(f"{name}={shown(getattr(self, name))}: expected 64 hexadecimal digits")


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    training: Training
    state: dict[
        str, Any
    ]  # of STATE: the optimizer's, the schedule's, the float16 loss's scale, each process's generators', tuned's


def folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step}"


def steps(output: Path) -> list[int]:
    """The steps of the checkpoints in OUTPUT, oldest first."""
    names = [re.fullmatch(r"step-([1-9][0-9]{0,9})", path.name) for path in (output / "checkpoints").glob("step-*")]
    return sorted(int(name[1]) for name in names if name)


def save(
    output: Path,
    step: int,
    fill: Callable[[Path], None],
    limit: int = KEPT,
    beside: Callable[[int], Iterable[int]] = lambda step: (),
) -> None:
    """Write the checkpoint of `step`, whose files `fill` writes into the folder it is given; remove old ones.

    limit: how many of the newest are kept.
    beside: the steps whose checkpoints stay as long as that of the given one, which needs them to go on.
    """

    def fill_and_vouch(scratch: Path) -> None:
        fill(scratch)
        for path in scratch.rglob("*"):
            writing.force(path)  # before the manifest vouches for it
        digests = {name: _digest(scratch / name) for name in _names(scratch)}
        (scratch / MANIFEST).write_bytes(_manifest(step, digests))

    target = folder(output, step)
    scratch = writing.filled(output / "checkpoints", fill_and_vouch)
    writing.remove(target)
    os.replace(scratch, target)
    writing.force(target.parent)
    newest = steps(output)[-limit:]
    kept = {*newest, *chain.from_iterable(map(beside, newest))}
    for old in steps(output):
        if old not in kept:
            writing.remove(folder(output, old))


def clear(output: Path, after: int = 0) -> None:
    """Remove the checkpoints of later steps than `after`, and what a killed process left half-written."""
    unfinished = [*output.glob(f"{writing.UNFINISHED}*"), *output.glob(f"checkpoints/{writing.UNFINISHED}*")]
    for path in [*unfinished, *(folder(output, step) for step in steps(output) if step > after)]:
        writing.remove(path)


def read(path: Path) -> Checkpoint:
    """A checkpoint's content, once every file is what its manifest says and every value can be used. Changes nothing.

    The model's own files are only held against the manifest: whoever loads them reads them.

    Raises:
        CheckpointError: a file is damaged, missing or too much, or holds something that no checkpoint does.
    """
    verify(path)
    training = _read_training(path / "training.json")
    if path.name != f"step-{training.step}":
        raise CheckpointError(f"{path / 'training.json'}: step={training.step}: expected the folder's, {path.name}")
    return Checkpoint(path, training, _read_state(path / "state.pt", training.processes))


def verify(path: Path) -> None:
    """Hold every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: the first that is damaged, missing or too much.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint's folder")
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path / MANIFEST} is missing: the checkpoint is damaged, or of an earlier version of fastlora, which wrote none"
        )
    manifest = read_json(path / MANIFEST)
    step: Any = manifest.get("step")
    digests: Any = manifest.get("files")
    # Written anew it has the same bytes, or some have changed.
    whole = fits(step, int) and fits(digests, dict[str, str])
    if not whole or _manifest(step, digests) != (path / MANIFEST).read_bytes():
        raise CheckpointError(f"{path / MANIFEST} is damaged: its own SHA-256 is not the one it has")
    found = _names(path)
    for name in sorted(digests.keys() ^ found):
        what = "is missing" if name in digests else "is none of the checkpoint's files"
        raise CheckpointError(f"{path / name} {what}")
    for name, digest in digests.items():
        if _digest(path / name) != digest:
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 is not the one in {MANIFEST}")


def _names(path: Path) -> set[str]:
    """Every file in a checkpoint, its manifest aside."""
    files = [one for one in path.rglob("*") if not one.is_dir()]
    return {one.relative_to(path).as_posix() for one in files} - {MANIFEST}


def _digest(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a plain file")
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _manifest(step: int, digests: dict[str, str]) -> bytes:
    content = {"step": step, "files": dict(sorted(digests.items()))}
    own = sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "sha256": own}, indent=2) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a checkpoint's file.

    Raises:
        CheckpointError: it cannot be read, or is no object.
    """
    try:
        return reading.json_file(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_training(path: Path) -> Training:
    content = read_json(path)
    names = {field.name for field in fields(Training)}
    for name in sorted(content.keys() ^ names):
        raise CheckpointError(f"{path}: {'no key' if name in names else 'unknown key'} {shown(name)}")
    try:
        return Training(**content)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_state(path: Path, processes: int) -> dict[str, Any]:
    state = load_state(path, *sorted(STATE))
    check_course(f"{path}", state)
    check_generators(path, state["rng"], processes)
    check_tuned(path, state["tuned"])
    return state


def load_state(path: Path, *keys: str) -> dict[str, Any]:
    """The state in a file of torch's, which has these keys; what they hold is unchecked.

    Raises:
        CheckpointError: it cannot be read, or has other keys.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise what they like
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    require_keys(f"{path}", state, *keys)
    return state


def check_course(where: str, state: Mapping[str, Any]) -> None:
    """
    state: has optimizer and scheduler.

    Raises:
        CheckpointError: they are no states of an optimiser and of a schedule; the message begins with `where`.
    """
    optimizer = state["optimizer"]
    require_keys(f"{where}: optimizer", optimizer, "state", "param_groups")
    for name, value, hint, expected in (
        ("state", optimizer["state"], dict[int, dict[str, Tensor | int]], "tensors by parameter and name"),
        ("param_groups", optimizer["param_groups"], list[dict[str, Any]], "a list of groups"),
    ):
        if not fits(value, hint):
            raise CheckpointError(f"{where}: optimizer.{name}: expected {expected}")
    if not fits(state["scheduler"], dict[str, Any]):
        raise CheckpointError(f"{where}: scheduler: expected a state, got {shown(state['scheduler'])}")


def check_generators(path: Path, rng: Any, processes: int) -> None:
    """
    Raises:
        CheckpointError: `set_rng_state` cannot take what there is for each process.
    """
    if not isinstance(rng, list) or len(rng) != processes:
        raise CheckpointError(f"{path}: rng: expected a list of {processes}, one a process")
    for number, one in enumerate(rng):
        _check_rng(f"{path}: rng[{number}]", one)


def check_tuned(path: Path, tuned: Any) -> None:
    """
    Raises:
        CheckpointError: `table.load_state` cannot take it.
    """
    if not fits(tuned, dict[str, list[list[Any]]]):
        raise CheckpointError(f"{path}: tuned: expected measurements by device")
    for entry in chain.from_iterable(tuned.values()):
        try:
            table.checked(table.Measurement(*entry))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: tuned: {error}") from None


def require_keys(where: str, value: Any, *keys: str) -> None:
    """
    Raises:
        CheckpointError: value is no dict of just these keys; the message begins with `where`.
    """
    if not isinstance(value, dict) or set(value) != set(keys):
        raise CheckpointError(f"{where}: expected the keys {', '.join(keys)}")


def _check_rng(where: str, state: Any) -> None:
    """Try a process's generators on some that nobody uses."""
    require_keys(where, state, "python", "numpy", "torch", "cuda")
    tries: dict[str, Callable[[Any], Any]] = {
        "python": random.Random().setstate,
        "numpy": numpy.random.RandomState().set_state,
        "torch": torch.Generator().set_state,
    }
    for name, attempt in tries.items():
        try:
            attempt(state[name])
        except Exception as error:
            raise CheckpointError(f"{where}.{name}: no state of a generator: {error}") from None
    if not 0 <= state["numpy"]["state"]["pos"] <= 624:  # numpy takes any, and reads there
        raise CheckpointError(f"{where}.numpy: no state of a generator: pos={shown(state['numpy']['state']['pos'])}")
    cuda = state["cuda"]
    if cuda is not None and not (isinstance(cuda, Tensor) and cuda.dtype is torch.uint8 and cuda.dim() == 1):
        raise CheckpointError(f"{where}.cuda: no state of a generator")


def save_weights(folder: Path, trained: Mapping[str, Tensor]) -> None:
    """Write the trained weights by their names in the model."""
    save_file({name: value.detach().cpu().contiguous() for name, value in trained.items()}, folder / TRAINED)


def load_weights(folder: Path, trained: Mapping[str, Tensor]) -> None:
    """Give the trained weights the values that `save_weights` wrote.

    Raises:
        CheckpointError: the file has others than these, of another shape or dtype, or numbers that are not finite; no weight is changed then.
    """
    path = folder / TRAINED
    try:
        found = load_file(path)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for name in sorted(found.keys() ^ trained.keys()):
        what = "is not there" if name in trained else "is no trained weight"
        raise CheckpointError(f"{path}: {name} {what}")
    for name, value in trained.items():
        if found[name].shape != value.shape or found[name].dtype != value.dtype or not found[name].isfinite().all():
            raise CheckpointError(f"{path}: {name}: expected finite {value.dtype} of shape {list(value.shape)}")
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(found[name])


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
