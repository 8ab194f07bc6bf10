"""What a run goes on from, for how long, and what of its output folder it may replace.

A resumed run may be longer than it was to be: more epochs or steps. Up to the checkpoint nothing changes, from there on its schedule is the longer
run's. Under a constant learning rate that is the run which was as long from the start, bit for bit: rows, dropout and optimiser know nothing of a
run's end.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from fastlora import checkpoint, metrics, options, training_data, writing
from fastlora.checkpoint import Checkpoint, CheckpointError
from fastlora.config import TrainConfig
from fastlora.course import Course
from fastlora.data.sources import local_files
from fastlora.typed import listed

logger = logging.getLogger("fastlora")

LENGTH = ("epochs", "max_steps")
"""The options that say how long a run is."""

# Data and how it is cut are compared by the rows' tokens.
MAY_DIFFER_ON_RESUME = {
    *("data", "columns", "max_samples", "streaming", "mixture", "rehearse_data", "eval_data", "retain_data"),
    *("truncation", "train_on_turns", "completion_only_loss", "report_to", "run_name", *LENGTH),
    *("output", "save_steps", "save_total_limit", "resume", "resume_from", "overwrite"),
    *("early_stopping_patience", "early_stopping_threshold", "eval_batch_size"),
}


def require_free(config: TrainConfig) -> None:
    """Nothing in the output folder is replaced that this run does not go on from, unless that was asked for."""
    output = Path(config.output)
    writing.require_files(output)
    if (output / "checkpoints").is_file():
        raise NotADirectoryError(f"output={output}: checkpoints is a file there, expected a folder or nothing")
    held, steps = writing.results(output), checkpoint.steps(output)
    measured = [
        (name, data) for name in ("eval_data", "retain_data") for data in local_files(getattr(config, name) or [])
    ]
    for name, data in (*training_data.named(config), *measured):
        if any(path.parent.resolve() == output.resolve() and path.name in held for path in (data, data.resolve())):
            raise ValueError(
                f"{name}={data}: expected another place or name, training replaces this file in its output folder"
            )
    if config.overwrite or (config.resume and steps):
        return
    # All that is left by a run that ended before its first checkpoint; an empty one by a run that ended in its first step.
    if metrics.NAME in held and (config.resume or not (output / metrics.NAME).stat().st_size):
        own = (metrics.NAME, metrics.VALIDATION, metrics.SAMPLES, options.NAME)
        held = [name for name in held if name not in own]
    problem = ""
    if steps:
        problem = (
            f"has checkpoints up to step {steps[-1]}:"
            " resume=True goes on from there, overwrite=True removes them and starts again"
        )
    elif held and config.resume:
        problem = f"has no checkpoint to resume from, and holds {listed(held)}: overwrite=True replaces them"
    elif held:
        problem = f"holds {listed(held)}: expected a folder of its own, or overwrite=True to replace them"
    if problem:
        raise FileExistsError(f"output={output} {problem}")


def newest(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint to go on from; None where there is none yet."""
    output = Path(config.output)
    steps = checkpoint.steps(output)
    if config.resume_from is not None:
        if config.resume_from not in steps:
            there = listed([str(step) for step in steps]) or "none"
            raise ValueError(
                f"resume_from={config.resume_from}: expected the step of a checkpoint in {output}: {there}"
            )
        return checkpoint.read(checkpoint.folder(output, config.resume_from))
    if not steps:
        return None
    *older, newest = steps
    try:
        return checkpoint.read(checkpoint.folder(output, newest))
    except CheckpointError as error:
        way_out = "no other checkpoint is whole: overwrite=True starts again"
        for step in older:
            with suppress(CheckpointError):
                checkpoint.verify(checkpoint.folder(output, step))
                way_out = f"the one before it is whole: resume_from={step} goes on from there"
        raise CheckpointError(f"{error}; {way_out}") from error


def require_same(saved: Checkpoint, now: dict[str, Any], course: Course) -> int:
    """The steps that the run was to have that a checkpoint is of.

    Raises:
        ValueError: it belongs to no run like this one, or to a longer one.
    """
    then, path = saved.training, saved.folder / "training.json"
    names = {field.name for field in fields(TrainConfig)}
    for name in sorted(then.config.keys() ^ names):
        what = "lacks" if name in names else "has the unknown option"
        raise CheckpointError(f"{path}: config {what} {name}: it is of another version of fastlora")
    try:
        TrainConfig(**then.config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: config: {error}") from None
    for name in sorted(names - MAY_DIFFER_ON_RESUME):
        before, value = then.config[name], now["config"][name]
        if before != value:
            raise ValueError(
                f"{name}={value!r}: expected {before!r} as in {saved.folder}, or overwrite=True to start again"
            )
    if then.data != now["data"]:
        name = "mixture" if now["config"]["mixture"] else "data"
        what = f"{name}={now['config'][name]}: its token rows are not those that {saved.folder} was trained on"
        raise ValueError(f"{what}, or are mixed otherwise")
    if then.peft_config != now["peft_config"]:
        what = f"peft_config={now['config']['peft_config']}: expected the file as {saved.folder} began with it"
        raise ValueError(f"{what}, or overwrite=True")
    for name in ("processes", "device"):
        if getattr(then, name) != now[name]:
            what = f"{saved.folder} was written with {name} {getattr(then, name)}"
            raise ValueError(f"{what}, expected the same, got {now[name]}")
    steps = steps_before(then.config, saved.folder, course)
    if then.step > steps:
        raise CheckpointError(f"{path}: step={then.step}: expected at most {steps}, the steps of the whole run")
    if then.threads != now["threads"]:
        text = "%s was written with %d threads, this run has %d: the last bits may differ from an uninterrupted run's"
        logger.warning(text, saved.folder, then.threads, now["threads"])
    return steps


def steps_before(then: Mapping[str, Any], folder: Path, course: Course) -> int:
    """How many steps the run was to have that a checkpoint is of.

    Args:
        then: its options.
        folder: the checkpoint's, for messages.
        course: of the run that goes on.

    Raises:
        ValueError: this one is shorter.
    """
    config: TrainConfig = course.config
    same = all(then[name] == getattr(config, name) for name in LENGTH)
    before = Course(
        replace(config, **{name: then[name] for name in LENGTH}), course.rows, course.processes, course.mixed
    ).steps
    if same or course.steps >= before:
        return before
    name = "epochs" if config.max_steps is None else "max_steps"
    raise ValueError(
        f"{name}={getattr(config, name)!r}: makes {course.steps} steps, expected the {before} of {folder} or more"
    )


def require_unstopped(config: TrainConfig, before: int, steps: int, reason: str | None) -> None:
    """Raise ValueError where a run is to be longer that would train nothing more. reason: why it has stopped early, if it has."""
    if steps > before and reason is not None:
        raise ValueError(
            f"early_stopping_patience={config.early_stopping_patience}: a run of {steps} steps would end where the one of {before} did:"
            f" {reason}; expected more patience, or none, to go on"
        )


def extended(config: TrainConfig, before: int, steps: int, done: int) -> str:
    """What a run of so many steps says that was to have other ones before, for people."""
    schedule = f"whose {config.lr_scheduler_type} schedule is followed from step {done + 1:,} on"
    return f"from {before:,} steps to {steps:,}, {schedule}"


def go_on(optimizer: torch.optim.Optimizer, scheduler: Any, step: int) -> None:
    """Take a schedule, and the optimiser's rates, to where they are after a step."""
    rates = [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    done = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    scheduler.load_state_dict({**scheduler.state_dict(), **done})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
