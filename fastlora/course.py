"""A training's course: which rows each step takes, at which rate, what its optimiser must hold after a step, and what ends it.

`fastlora train` has one; `fastlora sweep` has one for each of its jobs, which is why they train alike.
"""

import math
import random
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora import checkpoint, writing
from fastlora.checkpoint import CheckpointError
from fastlora.config import TrainConfig
from fastlora.data.examples import read_examples
from fastlora.data.rows import Encoded, Row, batches, encode
from fastlora.language_model_loss import IGNORE

LEAST = {"step": 1.0, "exp_avg": -math.inf, "exp_avg_sq": 0.0}
"""What AdamW keeps of each weight, and the smallest value of it."""


class TrainingError(RuntimeError):
    """Training went wrong and would only go on in vain."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; a checkpoint was written first."""


def read_rows(config: TrainConfig, tokenizer: Any) -> Encoded:
    """What a training trains on, as its options say.

    Raises:
        As `read_examples` and `encode`: what they raise.
    """
    examples = read_examples(
        config.data, columns=config.columns, max_samples=config.max_samples, streaming=config.streaming
    )
    return encode(
        examples,
        tokenizer,
        config.max_length,
        config.truncation,
        train_on_turns=config.train_on_turns,
        completion_only_loss=config.completion_only_loss,
    )


class Course:
    """Which rows each optimiser step takes."""

    def __init__(self, config: TrainConfig, rows: Sequence[Row], processes: int) -> None:
        self.config, self.rows, self.processes = config, rows, processes
        self.rows_per_step = config.batch_size * config.gradient_accumulation_steps * processes
        self.steps_per_epoch = math.ceil(len(rows) / self.rows_per_step)
        # Rounded, since 0.7 * 10 is a little more than 7.
        self.steps = config.max_steps or max(1, math.ceil(round(config.epochs * self.steps_per_epoch, 6)))
        self._order: tuple[int, list[int]] = (-1, [])

    def step_rows(self, step: int) -> list[Row]:
        """The rows of a step, counted from 0, over all processes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = list(range(len(self.rows)))
            random.Random(f"fastlora {self.config.seed} {epoch}").shuffle(order)
            self._order = epoch, order
        chosen = self._order[1][position * self.rows_per_step : (position + 1) * self.rows_per_step]
        return [self.rows[i] for i in chosen]

    def batches(self, rows: Sequence[Row], process: int) -> list[Sequence[Row]]:
        """The rows of a step as the batches of one process; every process gets as many batches as the others."""
        # Where there are too few, one process has a row of which nothing counts.
        return [
            part[process :: self.processes] or [Row(part[0].input_ids, [IGNORE] * len(part[0].labels))]
            for part in batches(rows, self.config.batch_size * self.processes)
        ]


def scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """transformers' schedule of that name, but for the warm-up: its first step, of w, has 1/w of the learning rate, not 0."""
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_scheduler

    # The last step is behind the warm-up: some schedules divide by the number of those that are.
    warmup = min(math.ceil(config.warmup_ratio * steps), steps - 1)
    name = config.lr_scheduler_type
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas[0]
    rising = 0 if name == "constant" else warmup
    return LambdaLR(optimizer, lambda step: (step + 1) / rising if step < rising else theirs(step))


def _is_equal(value: Any, expected: Any) -> bool:
    try:
        return bool(value == expected)
    except Exception:  # a tensor in the place of a number
        return False


def load_state(
    path: Path,
    state: Mapping[str, Any],
    step: int,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> None:
    """Give AdamW and its schedule the state that they had after a step.

    Args:
        path: the file that it is from, for messages.
        state: optimizer and scheduler, as their `state_dict` gives them.
        trained: the optimiser's parameters, by name, in its order.

    Raises:
        CheckpointError: it is no state of these parameters after that step; nothing is changed then.
    """
    own, own_schedule = state["optimizer"], state["scheduler"]
    # All but the moments follows from the options and the step.
    rate = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step)
    done = {"last_epoch": step, "_step_count": step + 1, "_last_lr": [rate]}
    if not _is_equal(own_schedule, {**scheduler.state_dict(), **done}):
        raise CheckpointError(f"{path}: scheduler: expected the state of step {step}")
    groups = [{**group, "lr": rate} for group in optimizer.state_dict()["param_groups"]]
    if not _is_equal(own["param_groups"], groups):
        raise CheckpointError(f"{path}: optimizer.param_groups: expected AdamW's of step {step} of this run")
    parameters = list(trained.items())
    for index, moments in own["state"].items():
        name, parameter = parameters[index] if 0 <= index < len(parameters) else (f"parameter {index}", None)
        if parameter is None or set(moments) != set(LEAST):
            raise CheckpointError(f"{path}: optimizer: {name}: expected {', '.join(LEAST)} of a trained weight")
        for key, value in moments.items():
            shape = [] if key == "step" else list(parameter.shape)
            whole = list(value.shape) == shape and value.is_floating_point() and value.isfinite().all()
            if not whole or (value < LEAST[key]).any():
                raise CheckpointError(
                    f"{path}: optimizer: {key} of {name}: expected numbers of shape {shape} from {LEAST[key]:g} on,"
                    f" got {value.dtype} of shape {list(value.shape)}"
                )
    optimizer.load_state_dict(own)
    scheduler.load_state_dict(own_schedule)


def count_tokens(rows: Sequence[Row]) -> int:
    """Padding aside."""
    return sum(len(row.input_ids) for row in rows)


@contextmanager
def named_writing(what: str, output: Path, step: int) -> Iterator[None]:
    """An error of the disk's says what is not written, after which step, and what there is in the output to go on from.

    Raises:
        TrainingError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        steps = checkpoint.steps(output)
        last = f"resume=True goes on from {checkpoint.folder(output, steps[-1])}" if steps else "start again"
        raise TrainingError(
            f"step {step}: {what} cannot be written: {error.strerror or error}: {error.filename or output}"
            f" ({writing.free(output)}); mend that, then {last}"
        ) from error


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python lets only the main thread handle signals
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
