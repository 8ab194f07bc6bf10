"""metrics.jsonl, one object an optimiser step, and its plot."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora import reading, writing
from fastlora.typed import fits, is_finite, shown

NAME = "metrics.jsonl"
NUMBERS = ("loss", "grad_norm", "learning_rate", "epoch", "tokens", "tokens_per_second", "seconds")  # and the step


def add(output: Path, record: Mapping[str, float]) -> None:
    """One more line, which is in the file as soon as this returns, and on the disk by `writing.force`."""
    line, path = (json.dumps(record) + "\n").encode(), output / NAME
    # Unbuffered: what a full disk did not take is not tried again, at the end, in place of the error that is on its way.
    with writing.plain_errors(path), path.open("ab", buffering=0) as file:
        while line:
            line = line[file.write(line) or 0 :]


def read(output: Path, step: int | None = None) -> list[dict[str, float]]:
    """The objects of OUTPUT/metrics.jsonl, of steps 1, 2, ...

    step: read that many and leave the rest, which a checkpoint does not know. None: all of them, but for a last line
    that a kill cut short.

    Raises:
        ValueError: a line is no such object, or there are too few; the message has FILE:LINE.
    """
    path = output / NAME
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines = lines[:-1][:step]  # what is behind the last line break is nothing, or cut short
    if step is not None and len(lines) < step:
        raise ValueError(f"{path}: ends at step {len(lines)}, expected the {step} steps that were done")
    return [_record(line, f"{path}:{number}", number) for number, line in enumerate(lines, 1)]


def _record(line: bytes, where: str, step: int) -> dict[str, float]:
    try:
        record = reading.json_object(line, strict=False)  # a NaN is told by its name
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not fits(record.get("step"), int) or record["step"] != step:
        raise ValueError(f"{where}: expected the object of step {step}, got {shown(record)}")
    for name in NUMBERS:
        value: Any = record.get(name)
        if not fits(value, float) or not is_finite(value):
            raise ValueError(f"{where}: {name}={shown(value)}: expected a finite number")
    return record


def write(output: Path, records: Sequence[Mapping[str, float]]) -> None:
    """Leave these objects only."""
    writing.whole(output / NAME, "".join(json.dumps(record) + "\n" for record in records).encode())


def plot(records: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss over steps, each step's own and a running mean, as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    steps, losses = [record["step"] for record in records], [record["loss"] for record in records]
    mean, means = losses[0], []
    for loss in losses:
        mean += 0.1 * (loss - mean)
        means.append(mean)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="step")
    axes.plot(steps, means, color="tab:blue", label="running mean")
    axes.set(xlabel="optimiser step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    writing.whole(path, image.getvalue())
