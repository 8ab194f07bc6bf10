"""What a sweep's checkpoint holds, beside the adapters' weights: read as a whole before anything is changed by it."""

import json
import logging
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from fastlora import checkpoint
from fastlora.checkpoint import CheckpointError
from fastlora.typed import fits, listed, shown

logger = logging.getLogger("fastlora")

NAME, STATE = "sweep.json", "state.pt"
Status = Literal["running", "done", "diverged", "halved", "no longer better"]


@dataclass
class Progress:
    """How far a job is: what a checkpoint tells of it."""

    status: Status = "running"
    reason: str = ""
    step: int = 0
    evaluations: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a sweep, whole."""

    folder: Path
    step: int
    seconds: float
    setup: dict[str, Any]
    jobs: dict[str, Progress]
    state: dict[str, Any]


def newest(output: Path) -> Saved | None:
    """The newest checkpoint in OUTPUT; None where there is none.

    Raises:
        CheckpointError: it is damaged; the message says which older one is not.
    """
    steps = checkpoint.steps(output)
    if not steps:
        return None
    *older, last = steps
    path = checkpoint.folder(output, last)
    try:
        return read(path)
    except CheckpointError as error:
        way_out = "overwrite=True starts again"
        for step in older:
            with suppress(CheckpointError):
                read(checkpoint.folder(output, step))
                way_out = f"remove {path}, and resume=True goes on from step {step}"
        raise CheckpointError(f"{error}; {way_out}") from error


def read(path: Path) -> Saved:
    """
    Raises:
        CheckpointError: a file is damaged, missing or too much, or holds something that no sweep's checkpoint does.
    """
    checkpoint.verify(path)
    file = path / NAME
    content = checkpoint.read_json(file)
    checkpoint.require_keys(f"{file}", content, "step", "seconds", "setup", "jobs")
    setup, jobs = content["setup"], content["jobs"]
    if not fits(content["step"], int) or path.name != f"step-{content['step']}" or not fits(content["seconds"], float):
        raise CheckpointError(f"{file}: step={shown(content['step'])}: expected the folder's, {path.name}")
    by_job = dict[str, dict[str, Any]]
    if not fits(setup, dict[str, Any]) or not fits(setup.get("jobs"), by_job) or not fits(jobs, by_job):
        raise CheckpointError(f"{file}: expected a setup, and progress by job")
    if jobs.keys() != setup["jobs"].keys():
        raise CheckpointError(f"{file}: jobs: expected those of setup, {listed(list(setup['jobs']))}")
    found = {}
    for name, one in jobs.items():
        checkpoint.require_keys(f"{file}: {name}", one, *(one.name for one in fields(Progress)))
        evaluations = one["evaluations"]
        right = fits(one["status"], Status) and fits(one["reason"], str) and fits(evaluations, list[tuple[int, float]])
        if not right or not fits(one["step"], int) or not 0 <= one["step"] <= content["step"]:
            raise CheckpointError(f"{file}: {name}: expected a job's progress, got {shown(one)}")
        found[name] = Progress(**{**one, "evaluations": [(step, loss) for step, loss in evaluations]})
    state = checkpoint.load_state(path / STATE, "jobs", "rng", "tuned")
    running = {name for name, one in found.items() if one.status == "running"}
    checkpoint.require_keys(f"{path / STATE}: jobs", state["jobs"], *running)
    for name, one in state["jobs"].items():
        checkpoint.require_keys(f"{path / STATE}: {name}", one, "optimizer", "scheduler")
        checkpoint.check_course(f"{path / STATE}: {name}", one)
    checkpoint.check_generators(path / STATE, state["rng"], 1)
    checkpoint.check_tuned(path / STATE, state["tuned"])
    return Saved(path, content["step"], content["seconds"], setup, found, state)


def require_same(saved: Saved, now: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the checkpoint belongs to another sweep than this one.
    """
    then, now = dict(saved.setup), json.loads(json.dumps(now))
    if then["jobs"].keys() != now["jobs"].keys():
        raise ValueError(
            f"jobs: expected those of {saved.folder}, {listed(list(then['jobs']))}, or overwrite=True to start again"
        )
    threads = then.pop("threads", None), now.pop("threads")
    for name, value in now["jobs"].items():
        for option in value:
            if then["jobs"][name].get(option) != value[option]:
                what = {"rows": "data", "held_out": "eval_data"}.get(option, option)
                raise ValueError(
                    f"{what}: of {name}, expected what it was in {saved.folder}, or overwrite=True to start again"
                )
    for name in now:
        if then.get(name) != now[name]:
            raise ValueError(
                f"{name}={now[name]!r}: expected {then.get(name)!r} as in {saved.folder}, or overwrite=True to start again"
            )
    if threads[0] != threads[1]:
        text = "%s was written with %s threads, this run has %s: the last bits may differ from an uninterrupted run's"
        logger.warning(text, saved.folder, *threads)
