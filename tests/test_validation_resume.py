"""A run that is killed before, in or after a validation goes on to the same bits, the same validations, the same best step and the same end."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from killed import Moment, killed_at
from training import (  # noqa: F401  (fixtures)
    a_base,
    adapter,
    assert_same_bits,
    contents,
    numbers,
    on_cpu,
    one_thread,
    records,
    some_data,
)

from fastlora import checkpoint
from fastlora import train as training
from fastlora.checkpoint import CheckpointError
from fastlora.config import TrainConfig
from fastlora.train import TrainingInterrupted, train


@pytest.fixture(name="given", scope="module")
def a_config(base, data, tmp_path_factory) -> TrainConfig:
    """A greater loss is better here: the best step is the second, the end after the fifth of 12; checkpoints at 1, 2 (the best so far), 3, 5."""
    folder = tmp_path_factory.mktemp("held_out")
    return TrainConfig(
        **{"model": base, "data": data, "output": folder / "out", "r": 2, "lr": 0.1, "max_steps": 12, "save_steps": 3},
        **{"eval_data": tiny.save_data(folder / "eval.jsonl", 6, seed=1), "eval_steps": 1, "eval_samples": 2},
        **{"retain_data": tiny.save_data(folder / "retain.jsonl", 5, seed=2), "eval_max_new_tokens": 6},
        **{"load_best_model_at_end": True, "greater_is_better": True, "early_stopping_patience": 3},
    )


@pytest.fixture(name="finished", scope="module")
def a_finished_run(given) -> Path:
    train(given, progress=False)
    return given.output


def lines(output: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def assert_same_run(output: Path, other: Path) -> None:
    assert_same_bits(adapter(output), adapter(other))
    assert numbers(output) == numbers(other)
    for name in ("validation.jsonl", "samples.jsonl"):
        assert (output / name).read_bytes() == (other / name).read_bytes(), name
    ours, theirs = (json.loads((one / "summary.json").read_text()) for one in (output, other))
    for name in ("steps", "best_step", "best_eval_loss", "validation", "stopped_early", "stop_reason"):
        assert ours[name] == theirs[name], name


MOMENTS = {
    "before the first step's": Moment("validation.Validation._measure", 1),
    "before any checkpoint": Moment("validation.Validation._measure", 2),
    "in one": Moment("validation.total_loss", 5),
    "between its loss and that on other rows": Moment("validation.total_loss", 6),
    "behind its answers": Moment("validation.answer", 3, after=True),
    "before it is written down": Moment("validation.Validation._measure", 3, after=True),
    "between its lines": Moment("metrics.add", 9, after=True),
    "before the best one's checkpoint": Moment("checkpoint.save", 2),
    "after the best one's checkpoint": Moment("checkpoint.save", 2, after=True),
    "before old checkpoints go": Moment("validation.Validation.best_of", 7),
    "after the last": Moment("validation.Validation.after", 6, after=True),
    "before the best one's values": Moment("validation.Validation.take_best", 1),
    "before the adapter": Moment("writing.publish", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_around_a_validation_resumes_to_the_same_run(given, finished, tmp_path, moment):
    again = replace(given, output=tmp_path / "killed")
    killed_at(again, MOMENTS[moment])
    train(replace(again, resume=True), progress=False)
    assert_same_run(again.output, finished)
    assert checkpoint.steps(again.output) == checkpoint.steps(finished)


def test_what_such_a_run_is(finished):
    """The moments above are of this one: it has a best step that is neither its first nor its last, and ends early."""
    summary = json.loads((finished / "summary.json").read_text())
    assert [one["step"] for one in lines(finished, "validation.jsonl")] == [0, 1, 2, 3, 4, 5]
    assert summary["stopped_early"] and summary["steps"] == 5 and summary["best_step"] == 2
    assert checkpoint.steps(finished) == [2, 3, 5]
    assert "eval_loss has not become higher in 3 validations: the best is 6." in summary["stop_reason"]


@contextmanager
def asked_at(step: int, output: Path):
    """As Ctrl-C does while that step is under way."""
    yield SimpleNamespace(is_set=lambda: len(records(output)) == step - 1)


def test_a_stop_does_not_wait_for_a_validation_which_is_done_when_it_goes_on(given, finished, tmp_path, monkeypatch):
    again = replace(given, output=tmp_path / "stopped")
    monkeypatch.setattr(training, "stop_signals", lambda: asked_at(4, again.output))
    with pytest.raises(TrainingInterrupted, match="stopped after step 4 of 12"):
        train(again, progress=False)
    assert [one["step"] for one in lines(again.output, "validation.jsonl")] == [0, 1, 2, 3]
    monkeypatch.undo()
    train(replace(again, resume=True), progress=False)
    assert_same_run(again.output, finished)


def test_a_run_that_has_ended_early_stays_ended_and_one_may_go_back(given, finished, tmp_path):
    again = replace(given, output=tmp_path / "again", resume=True)
    shutil.copytree(finished, again.output)
    train(again, progress=False)
    assert_same_run(again.output, finished)
    for step in (3, 2):
        train(replace(again, resume_from=step), progress=False)
        assert_same_bits(adapter(again.output), adapter(finished))
        assert (again.output / "validation.jsonl").read_bytes() == (finished / "validation.jsonl").read_bytes()


def test_a_run_that_has_ended_early_goes_on_with_more_patience_and_otherwise_says_why_not(given, finished, tmp_path):
    again = replace(given, output=tmp_path / "again", max_steps=14, resume=True)
    shutil.copytree(finished, again.output)
    before = contents(again.output)
    for stopped in (again, replace(again, early_stopping_patience=2)):
        patience = stopped.early_stopping_patience
        text = f"a run of 14 steps would end where the one of 12 did: eval_loss has not become higher in {patience} val"
        with pytest.raises(ValueError, match=f"early_stopping_patience={patience}: {text}"):
            train(stopped, progress=False)
        assert contents(again.output) == before
    options = {"early_stopping_patience": 5, "early_stopping_threshold": 1e-9, "eval_batch_size": 3}
    assert train(replace(again, **options), progress=False).steps == 7
    free = {"early_stopping_patience": None, "early_stopping_threshold": 0.0}
    assert train(replace(again, **free), progress=False).steps == 14


@pytest.fixture(name="again")
def a_run_to_go_on(given, finished, tmp_path) -> TrainConfig:
    shutil.copytree(finished, tmp_path / "again")
    return replace(given, output=tmp_path / "again", resume=True)


GARBAGE = {
    "not JSON": ("validation.jsonl", b"\x00\n", "not JSON"),
    "not UTF-8": ("samples.jsonl", b"\xff\n", "not UTF-8"),
    "a list": ("validation.jsonl", b"[1]\n", "expected a JSON object, got list"),
    "an earlier step": ("validation.jsonl", b'{"step": 1}\n', "expected the object of step 2 or a later one"),
    "no loss": ("validation.jsonl", b'{"step": 2, "retain_loss": 1.0}\n', "no eval_loss"),
    "a loss that is none": ("validation.jsonl", b'{"step": 4, "eval_loss": NaN}\n', "eval_loss=nan: expected a finite"),
    "a score beyond 1": ("validation.jsonl", b'{"step": 4, "eval_f1": 1.5}\n', "eval_f1=1.5: expected a number from 0"),
    "no count": ("validation.jsonl", b'{"step": 4, "eval_tokens": 2.5}\n', "eval_tokens=2.5: expected a count"),
    "a sample without its answer": ("samples.jsonl", b'{"step": 2, "source": "a", "prompt": "b"}\n', "reference=None"),
    "a sample of no step": ("samples.jsonl", b'{"step": -1}\n', "step=-1: expected 0 or a step"),
    "a prompt that is a number": (
        "samples.jsonl",
        b'{"step": 2, "source": "a", "prompt": 3, "reference": "b", "answer": "c"}\n',
        "prompt=3: expected str or a list of",
    ),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_in_what_was_measured_names_file_and_line(again, case):
    name, garbage, message = GARBAGE[case]
    path = again.output / name
    old = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*old[:2], garbage, *old[3:]]))
    before = contents(again.output)
    with pytest.raises(ValueError, match=rf"{name}:3: {message}"):
        train(again, progress=False)
    assert contents(again.output) == before


@pytest.mark.parametrize(("name", "count"), [("validation.jsonl", 6), ("samples.jsonl", 12)])
def test_what_ends_before_the_checkpoint_is_an_error_and_what_is_behind_it_is_cut(again, finished, name, count):
    path = again.output / name
    old = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(old[:3]))
    with pytest.raises(ValueError, match=rf"{name}: has 3 lines, expected the {count} that were written"):
        train(again, progress=False)
    if name == "validation.jsonl":
        path.write_bytes(b"".join([*old[:-1], old[-1].replace(b'"step": 5', b'"step": 6')]))
        with pytest.raises(ValueError, match=r"validation.jsonl:6: step=6: expected one of .*step-5 or before it"):
            train(again, progress=False)
    path.write_bytes(b"".join([*old, b"garbage\n", b'{"st']))
    train(again, progress=False)
    assert_same_run(again.output, finished)


def test_a_best_checkpoint_that_is_gone_or_damaged_is_named(again):
    best = checkpoint.folder(again.output, json.loads((again.output / "summary.json").read_text())["best_step"])
    weights = best / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{best.name}/adapter_model.safetensors is damaged"):
        train(again, progress=False)
    shutil.rmtree(best)
    with pytest.raises(CheckpointError, match=r"validation.jsonl: step \d was the best, and there is no checkpoint"):
        train(again, progress=False)


@pytest.mark.parametrize("name", ["eval_data", "retain_data"])
def test_other_rows_to_measure_on_are_refused_and_the_same_ones_elsewhere_are_not(again, tmp_path, name):
    moved = shutil.copy(getattr(again, name), tmp_path / "moved.jsonl")
    train(replace(again, **{name: moved}), progress=False)
    other = tiny.save_data(tmp_path / "other.jsonl", 7, seed=4)
    with pytest.raises(ValueError, match=r"^eval_data=.*: the token rows to measure on are not those of .*step-5"):
        train(replace(again, **{name: other}), progress=False)
    with pytest.raises(ValueError, match="eval_steps=3: expected 1 as in"):
        train(replace(again, eval_steps=3), progress=False)
