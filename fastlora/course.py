"""A training's course: which rows each step takes, and what ends it.

`fastlora train` has one; `fastlora sweep` has one for each of its jobs, which is why they train alike.
"""

import json
import math
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastlora import checkpoint, writing
from fastlora.config import TrainConfig
from fastlora.data import lines
from fastlora.data.mixture import Order
from fastlora.data.rows import Row, batches


class TrainingError(RuntimeError):
    """Training went wrong and would only go on in vain."""


class Diverged(TrainingError):
    """A loss, a gradient or a trained weight is infinite or NaN; step: the one that made it so."""

    def __init__(self, step: int, said: str) -> None:
        super().__init__(step, said)  # as pickle makes it anew
        self.step = step

    def __str__(self) -> str:
        return str(self.args[1])


class UnsuitableError(ValueError):
    """The model has nothing that the method trains."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; a checkpoint was written first."""


class Course:
    """Which rows each optimiser step takes.

    Args:
        order: of a mixture; without one every epoch takes all rows in an order of its own.

    Raises:
        ValueError: group_by_length with a mixture.
    """

    def __init__(self, config: TrainConfig, rows: Sequence[Row], processes: int, order: Order | None = None) -> None:
        if order and config.group_by_length:
            raise ValueError("group_by_length=True: a mixture's rows come in an order of its own, expected one of them")
        self.config, self.rows, self.processes = config, rows, processes
        self.rows_per_step = config.batch_size * config.gradient_accumulation_steps * processes
        self.mixed = order
        self.steps_per_epoch = math.ceil((order.epoch if order else len(rows)) / self.rows_per_step)
        # Rounded, since 0.7 * 10 is a little more than 7.
        self.steps = config.max_steps or max(1, math.ceil(round(config.epochs * self.steps_per_epoch, 6)))
        self._order: tuple[int, list[int]] = (-1, [])

    def describe(self, done: int) -> str:
        """The steps, and the rows of one; done: how many of them a run goes on from."""
        count = self.rows_per_step
        most = "" if self.mixed or len(self.rows) % count == 0 else "at most "  # an epoch's last step has what is left
        return f"{self.steps:,}, of {most}{count} row{'s' * (count != 1)} each{going_on(done, self.steps)}"

    def step_rows(self, step: int) -> list[Row]:
        """The rows of a step, counted from 0, over all processes."""
        if self.mixed:
            start = step * self.rows_per_step
            return [self.rows[i] for i in self.mixed.draws(start, start + self.rows_per_step)]
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = list(range(len(self.rows)))
            random.Random(f"fastlora {self.config.seed} {epoch}").shuffle(order)
            if self.config.group_by_length:
                order = lines.group_by_length(order, [row.tokens for row in self.rows], self.rows_per_step)
            self._order = epoch, order
        chosen = self._order[1][position * self.rows_per_step : (position + 1) * self.rows_per_step]
        return [self.rows[i] for i in chosen]

    def batches(self, rows: Sequence[Row], process: int) -> Sequence[Sequence[Row]]:
        """The rows of a step as the batches of one process; every process gets as many batches as the others."""
        config = self.config
        if config.packing:
            return lines.packed_batches(rows, config.max_length, config.max_tokens, self.processes)[process]
        if config.max_tokens is not None:
            return lines.padded_batches(rows, config.max_tokens, self.processes)[process]
        # Where there are too few, one process has a row of which nothing counts.
        return [
            part[process :: self.processes] or [lines.without_labels(part[0])]
            for part in batches(rows, config.batch_size * self.processes)
        ]


def going_on(done: int, steps: int) -> str:
    """Where a run of so many steps goes on, behind their number."""
    if not done:
        return ""
    return f", from step {done + 1:,} on" if done < steps else ", all of them done"


def digest(rows: Sequence[Row], more: bytes = b"") -> str:
    """SHA-256 of rows' tokens and labels, and of what else decides about them: by what a resumed run knows them."""
    content = sha256()
    for row in rows:
        content.update(json.dumps([row.input_ids, row.labels]).encode())
    content.update(more)
    return content.hexdigest()


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
