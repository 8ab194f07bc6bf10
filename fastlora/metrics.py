"""metrics.jsonl, one object an optimiser step, and its plot."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

NAME = "metrics.jsonl"


def read(output: Path) -> list[dict[str, float]]:
    """The objects of OUTPUT/metrics.jsonl; none where there is no file, and a line that a kill cut short ends them."""
    path = output / NAME
    records: list[dict[str, float]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def cut(output: Path, step: int) -> None:
    """Leave the objects up to `step` only."""
    kept = [record for record in read(output) if record["step"] <= step]
    scratch = output / f".unfinished-{NAME}"
    scratch.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(scratch, output / NAME)


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
    figure.savefig(path, dpi=120)
