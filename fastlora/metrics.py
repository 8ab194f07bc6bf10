"""What a training tells of itself, line by line: metrics.jsonl, one object an optimiser step; validation.jsonl and samples.jsonl; and their plot."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora import reading, writing
from fastlora.typed import fits, is_finite, shown, spelt

NAME, VALIDATION, SAMPLES = "metrics.jsonl", "validation.jsonl", "samples.jsonl"
NUMBERS = ("loss", "grad_norm", "learning_rate", "epoch", "tokens", "tokens_per_second", "seconds")  # and the step
COUNTS = ("eval_tokens", "retain_tokens")
MEASURED = ("eval_loss", "retain_loss", "forgetting")
SCORES = tuple(f"eval_{name}" for name in ("exact_match", "rouge1", "rouge2", "rougeL", "f1", "accuracy"))
"""What a validation may have measured, beside its step: counts, losses in nats a labelled token, and what is from 0 to 1."""
SAMPLE = {"source": str, "prompt": str | list[dict[str, Any]], "reference": str, "answer": str}  # and the step


def add(output: Path, record: Mapping[str, Any], name: str = NAME) -> None:
    """One more line, which is in the file as soon as this returns, and on the disk by `writing.force`."""
    line, path = (json.dumps(record) + "\n").encode(), output / name
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
    lines = _lines(path, step)
    if step is not None and len(lines) < step:
        raise ValueError(f"{path}: ends at step {len(lines)}, expected the {step} steps that were done")
    return [_record(line, f"{path}:{number}", number) for number, line in enumerate(lines, 1)]


def read_validations(output: Path, count: int | None = None) -> list[dict[str, float]]:
    """The objects of OUTPUT/validation.jsonl: the step after which each was measured (0: before the first), and some of COUNTS, MEASURED and SCORES.

    count: as `read`'s step.

    Raises:
        ValueError: as `read`.
    """
    records: list[dict[str, float]] = []
    for where, record in _objects(output / VALIDATION, count):
        least = records[-1]["step"] + 1 if records else 0
        if not fits(record.get("step"), int) or record["step"] < least:
            raise ValueError(f"{where}: expected the object of step {least} or a later one, got {shown(record)}")
        for name, value in record.items():
            if name in COUNTS and not (fits(value, int) and value >= 1):
                raise ValueError(f"{where}: {name}={shown(value)}: expected a count, 1 or more")
            if name in MEASURED and not (fits(value, float) and is_finite(value)):
                raise ValueError(f"{where}: {name}={shown(value)}: expected a finite number")
            if name in SCORES and not (fits(value, float) and 0 <= value <= 1):
                raise ValueError(f"{where}: {name}={shown(value)}: expected a number from 0 to 1")
        records.append(record)
    return records


def read_samples(output: Path, count: int | None = None) -> list[dict[str, Any]]:
    """The objects of OUTPUT/samples.jsonl: a held-out row's source, prompt and reference, and the answer to it after a step.

    count: as `read`'s step.

    Raises:
        ValueError: as `read`.
    """
    samples = []
    for where, sample in _objects(output / SAMPLES, count):
        if not fits(sample.get("step"), int) or sample["step"] < 0:
            raise ValueError(f"{where}: step={shown(sample.get('step'))}: expected 0 or a step")
        for name, hint in SAMPLE.items():
            if not fits(sample.get(name), hint):
                raise ValueError(f"{where}: {name}={shown(sample.get(name))}: expected {spelt(hint)}")
        samples.append(sample)
    return samples


def _lines(path: Path, count: int | None) -> list[bytes]:
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return lines[:-1][:count]  # what is behind the last line break is nothing, or cut short


def _objects(path: Path, count: int | None) -> list[tuple[str, dict[str, Any]]]:
    """Each line's place, as messages name it, and what it holds."""
    lines = _lines(path, count)
    if count is not None and len(lines) < count:
        raise ValueError(f"{path}: has {len(lines)} lines, expected the {count} that were written")
    return [(f"{path}:{number}", _object(line, f"{path}:{number}")) for number, line in enumerate(lines, 1)]


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        return reading.json_object(line, strict=False)  # a NaN is told by its name
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _record(line: bytes, where: str, step: int) -> dict[str, float]:
    record = _object(line, where)
    if not fits(record.get("step"), int) or record["step"] != step:
        raise ValueError(f"{where}: expected the object of step {step}, got {shown(record)}")
    for name in NUMBERS:
        value: Any = record.get(name)
        if not fits(value, float) or not is_finite(value):
            raise ValueError(f"{where}: {name}={shown(value)}: expected a finite number")
    return record


def write(output: Path, records: Sequence[Mapping[str, Any]], name: str = NAME) -> None:
    """Leave these objects only."""
    writing.whole(output / name, "".join(json.dumps(record) + "\n" for record in records).encode())


def plot(records: Sequence[Mapping[str, float]], path: Path, validations: Sequence[Mapping[str, float]] = ()) -> None:
    """Loss over steps, each step's own, a running mean, and what was measured on other rows, as a PNG.

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
    for name, color, label in (("eval_loss", "tab:orange", "eval_data"), ("retain_loss", "tab:green", "retain_data")):
        points = [(one["step"], one[name]) for one in validations if name in one]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", label=label)
    axes.set(xlabel="optimiser step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    writing.whole(path, image.getvalue())
