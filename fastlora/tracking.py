"""What a run tells others while it trains: TensorBoard, Weights & Biases and whoever else accelerate knows, by accelerate's own trackers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from fastlora.config import TrainConfig

PROJECT = "fastlora"
FOLDER = "logs"
"""In the output folder: what trackers that write files write."""
PACKAGES = {"comet_ml": "comet-ml"}
"""What is to be installed, where that has another name than the tracker."""
NAMED_BY = {
    "wandb": "name",
    "trackio": "name",
    "swanlab": "experiment_name",
    "mlflow": "run_name",
    "clearml": "task_name",
}
"""What each tracker calls a run's name. The others have none beside the project's, which is fastlora."""


def names(config: TrainConfig) -> list[str]:
    """The trackers that are asked for, each once.

    Raises:
        ValueError: there is none of that name.
        ImportError: its package is missing.
    """
    asked = config.report_to if isinstance(config.report_to, list) else config.report_to.split(",")
    found = list(dict.fromkeys(name.strip() for name in asked))
    if found == ["none"]:
        return []
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    for name in found:
        if name not in known:
            raise ValueError(f"report_to={name!r}: expected none, or of {', '.join(known)}")
        if name in LoggerType.list() and name not in map(str, get_available_trackers()):
            package = PACKAGES.get(name, name)
            raise ImportError(f"report_to={name}: the package {package} is missing: pip install {package}")
    return found


def accelerator(config: TrainConfig) -> Accelerator:
    """For a training that reports where it was asked to.

    Raises:
        ValueError, ImportError: as `names`.
    """
    log_with: Any = names(config) or None
    return Accelerator(mixed_precision="no", log_with=log_with, project_dir=str(Path(config.output) / FOLDER))


@contextmanager
def reporting(accelerator: Accelerator, config: TrainConfig) -> Iterator[None]:
    """While a run trains: its trackers are begun with its options, and ended however it ends."""
    name = config.run_name or Path(config.output).resolve().name
    named = {tracker: {key: name} for tracker, key in NAMED_BY.items()}
    if accelerator.log_with:
        accelerator.init_trackers(PROJECT, config=_told(config), init_kwargs=named)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # end_training would end the process group as well
            tracker.finish()
        accelerator.trackers.clear()


def report(accelerator: Accelerator, record: Mapping[str, Any]) -> None:
    """Tell one line of metrics.jsonl, or of another file of such lines; what lies in it by name is told as NAME/KEY."""
    if accelerator.trackers:
        accelerator.log(dict(_flat(record)), step=record["step"])


def _flat(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, int | float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}/")
        elif isinstance(value, int | float) and (before or name != "step"):
            yield f"{before}{name}", value


def _told(config: TrainConfig) -> dict[str, Any]:
    """The options in what trackers take: numbers and texts."""
    values = {name: value for name, value in asdict(config).items() if value is not None}
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}
