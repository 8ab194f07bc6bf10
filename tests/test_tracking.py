"""`report_to`: what accelerate's trackers are told, and when; a tracker of the tests' own stands in for TensorBoard and its like."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as theirs
from accelerate.tracking import GeneralTracker
from training import (  # noqa: F401  (fixtures)
    a_base,
    a_config,
    adapter,
    assert_same_bits,
    interrupt_at,
    numbers,
    on_cpu,
    one_thread,
    records,
    some_data,
)

from fastlora import tracking
from fastlora.config import TrainConfig
from fastlora.planning import plan
from fastlora.train import TrainingError, TrainingInterrupted, train


class JsonTracker(GeneralTracker):
    """Writes what it is told into a file."""

    name = "json"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str, **given: Any) -> None:
        super().__init__()
        self.path = Path(logging_dir) / run_name / "told.jsonl"

    @property
    def tracker(self) -> Path:
        return self.path

    def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def _add(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def store_init_configuration(self, values: dict) -> None:
        self._add(config=values)

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        self._add(step=step, values=values)

    def finish(self) -> None:
        self._add(finished=True)


@pytest.fixture(name="told", autouse=True)
def a_tracker(config, monkeypatch):
    monkeypatch.setitem(theirs.LOGGER_TYPE_TO_CLASS, "json", JsonTracker)

    def told(output: Path = config.output) -> list[dict]:
        path = output / tracking.FOLDER / tracking.PROJECT / "told.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    return told


def test_every_step_is_told_and_the_options_before_it(config, told):
    train(replace(config, report_to="json", max_steps=3), progress=False)
    first, *steps, last = told()
    assert last == {"finished": True}
    assert (
        first["config"]["lr"] == 1e-2
        and first["config"]["model"] == config.model
        and "peft_config" not in first["config"]
    )
    assert [one["step"] for one in steps] == [1, 2, 3]
    for one, record in zip(steps, records(config.output), strict=True):
        assert one["values"] == {name: value for name, value in record.items() if name != "step"}
        assert {"loss", "grad_norm", "learning_rate", "epoch"} <= one["values"].keys()


def test_it_changes_no_bit_and_a_resumed_run_may_tell_others(config, tmp_path, told):
    train(replace(config, max_steps=8), progress=False)
    stopped = replace(config, output=tmp_path / "stopped", max_steps=8, report_to=["json"])
    thread = interrupt_at(stopped.output / "metrics.jsonl", 3)
    with pytest.raises(TrainingInterrupted):
        train(stopped, progress=False)
    thread.join()
    assert told(stopped.output)[-1] == {"finished": True}
    done = len(records(stopped.output))
    train(replace(stopped, resume=True, run_name="again"), progress=False)
    assert [one["step"] for one in told(stopped.output) if "step" in one] == [*range(1, done + 1), *range(done + 1, 9)]
    train(replace(stopped, resume=True, report_to="none"), progress=False)
    assert numbers(stopped.output) == numbers(config.output)
    assert_same_bits(adapter(stopped.output), adapter(config.output))


def test_it_is_ended_when_training_goes_wrong(config, told):
    with pytest.raises(TrainingError):
        train(replace(config, report_to="json", lora_alpha=0), progress=False)
    assert told()[-1] == {"finished": True}


@pytest.mark.parametrize("run", [train, plan])
def test_what_cannot_be_told_is_an_error_before_anything_is_read(config, run):
    for name, error, message in (
        ("nonsense", ValueError, "^report_to='nonsense': expected none, or of aim, clearml, .*wandb$"),
        ("none,json", ValueError, "^report_to='none': expected none, or of"),
        ("", ValueError, "^report_to='': expected"),
        *(
            (f"json,{one}", ImportError, f"^report_to={one}: the package {package} is missing: pip install {package}$")
            for one, package in (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet_ml", "comet-ml"))
            if one not in map(str, theirs.get_available_trackers())
        ),
    ):
        with pytest.raises(error, match=message):
            run(replace(config, model="none/such", report_to=name))
    assert not config.output.exists()


def test_names_are_taken_once_and_with_spaces():
    config = TrainConfig(model="m", data="d", output="o", report_to=" json, json")
    assert tracking.names(config) == ["json"] and tracking.names(replace(config, report_to=["json"])) == ["json"]
    assert tracking.names(replace(config, report_to="none")) == []
    with pytest.raises(ValueError, match="run_name='' is empty"):
        replace(config, run_name="")


def test_accelerates_own_tracker_gets_the_runs_name(config, monkeypatch):
    """Of the package that is asked for there is one of no effect."""
    seen: list[Any] = []
    run = types.SimpleNamespace(
        log=lambda values, step=None, **_: seen.append((step, values["loss"])), finish=lambda: seen.append("finished")
    )
    wandb: Any = types.ModuleType("wandb")
    wandb.init = lambda **given: seen.append(given) or run
    wandb.config = types.SimpleNamespace(update=lambda values, **_: seen.append(values["run_name"]))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(theirs, "_available_trackers", [*theirs.get_available_trackers(), theirs.LoggerType.WANDB])
    train(replace(config, report_to="wandb", run_name="first", max_steps=1), progress=False)
    assert seen[0] == {"project": "fastlora", "name": "first"} and seen[1] == "first" and seen[-1] == "finished"
    assert seen[2] == (1, records(config.output)[0]["loss"])


def test_what_lies_in_a_record_by_name_is_told_by_both_names():
    record = {"step": 3, "loss": 1.5, "tasks": {"sum": {"rows": 2, "loss": 0.5}}, "text": "no number"}
    assert dict(tracking._flat(record)) == {"loss": 1.5, "tasks/sum/rows": 2, "tasks/sum/loss": 0.5}
