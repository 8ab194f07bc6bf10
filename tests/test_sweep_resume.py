"""A sweep that is killed goes on from its last checkpoint, to the same bits; a damaged or foreign one is refused by name."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import a_sweep, adapter, some_files  # noqa: F401  (fixtures)
from training import assert_same_bits, on_cpu, one_thread  # noqa: F401  (fixtures)

from fastlora import checkpoint, metrics, writing
from fastlora.checkpoint import CheckpointError
from fastlora.course import TrainingInterrupted
from fastlora.sweep import Sweep, sweep
from fastlora.sweep.saved import NAME, STATE


@pytest.fixture(scope="module", name="finished")
def a_finished_sweep(files, tmp_path_factory) -> Sweep:
    """Of six jobs: one diverges, three are halved, two run to the end. Checkpoints of steps 4 and 6. Not to be changed: take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    jobs = [f"- {{r: {r}, lr: 1e-2, lora_dropout: 0.1}}" for r in (2, 1, 3, 4, 5)] + ["- {r: 3, lr: 1e30}"]
    (folder / "jobs.yaml").write_text("\n".join(jobs))
    options = {"max_steps": 6, "save_steps": 2, "batch_size": 4, "halving": True}
    given = Sweep(**files, output=folder / "out", jobs=folder / "jobs.yaml", **options)
    sweep(given, progress=False)
    return given


def copy_to(given: Sweep, folder: Path, step: int | None = None) -> Sweep:
    """The same sweep in another folder, to go on from; as it was killed behind a step's checkpoint."""
    shutil.copytree(given.output, folder)
    if step is not None:
        checkpoint.clear(folder, after=step)
        (folder / NAME).unlink()
    return replace(given, output=folder, resume=True)


def assert_same_results(given: Sweep, expected: Sweep) -> None:
    for content, other in [[json.loads((one.output / NAME).read_text()) for one in (given, expected)]]:
        for one, its in zip(content["jobs"], other["jobs"], strict=True):
            assert {**one, "output": "", "config": ""} == {**its, "output": "", "config": ""}
            if one["status"] != "diverged":
                assert_same_bits(adapter(Path(one["output"])), adapter(Path(its["output"])))
            for left, right in zip(metrics.read(Path(one["output"])), metrics.read(Path(its["output"])), strict=True):
                for name in ("step", "loss", "grad_norm", "learning_rate"):
                    assert left[name] == right[name]


def test_the_rest_of_a_killed_sweep_has_the_same_bits(finished, tmp_path):
    statuses = [one["status"] for one in json.loads((finished.output / NAME).read_text())["jobs"]]
    assert sorted(statuses) == ["diverged", "done", "done", "halved", "halved", "halved"]
    assert checkpoint.steps(finished.output) == [4, 6]
    again = copy_to(finished, tmp_path / "again", step=4)
    (again.output / "jobs" / "r2-lr0.01" / metrics.NAME).open("a").write('{"step": 7, "lo')  # what the kill cut short
    (again.output / "jobs" / "r2-lr0.01" / f"{writing.UNFINISHED}adapter").mkdir()
    sweep(again, progress=False)
    assert_same_results(again, finished)
    assert not list(again.output.rglob(f"{writing.UNFINISHED}*"))


def test_a_finished_sweep_is_told_again_without_training(finished, tmp_path, monkeypatch):
    again = copy_to(finished, tmp_path / "again")
    monkeypatch.setattr("fastlora.sweep.run.SweepRun.train_step", lambda *_: pytest.fail("trained again"))
    assert [one.status for one in sweep(again, progress=False)] == [
        one["status"] for one in json.loads((finished.output / NAME).read_text())["jobs"]
    ]
    assert_same_results(again, finished)


def test_ctrl_c_ends_it_after_a_step_with_a_checkpoint(finished, tmp_path):
    given = replace(finished, output=tmp_path / "out", save_steps=100)
    path = given.output / "jobs" / "r2-lr0.01" / metrics.NAME

    def interrupt() -> None:
        while not (path.exists() and path.read_text().count("\n") >= 2):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(
        TrainingInterrupted, match=r"stopped after step \d of 6; the same with resume=True goes on from .*step-\d"
    ):
        sweep(given, progress=False)
    thread.join()
    sweep(replace(given, resume=True), progress=False)
    assert_same_results(given, finished)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 7}, "max_steps: of r2-lr0.01, expected what it was in .*step-6"),
        ({"max_tokens": 9}, "max_tokens=9: expected 4096 as in .*step-6"),
        ({"halving": False}, "halving=False: expected True"),
        ({"limit": 3}, "eval_data: of r2-lr0.01"),
    ],
)
def test_another_sweep_is_refused(finished, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(replace(copy_to(finished, tmp_path / "again"), **options), progress=False)


def test_other_jobs_are_refused(finished, tmp_path):
    (tmp_path / "jobs.yaml").write_text("- {r: 2, lr: 1e-2, lora_dropout: 0.1}")
    again = replace(copy_to(finished, tmp_path / "again"), jobs=tmp_path / "jobs.yaml")
    with pytest.raises(ValueError, match="jobs: expected those of .*step-6, r2-lr0.01, .* or overwrite=True"):
        sweep(again, progress=False)


def test_other_rows_are_refused(finished, tmp_path):
    rows = Path(finished.data).read_text().splitlines(keepends=True)
    for name, what in (("data", "data"), ("eval_data", "eval_data")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(rows[:7]))
        again = replace(copy_to(finished, tmp_path / name), **{name: path})
        with pytest.raises(ValueError, match=f"{what}: of r2-lr0.01, expected what it was in"):
            sweep(again, progress=False)


def test_nothing_is_replaced_unless_asked_for(finished, tmp_path):
    again = replace(copy_to(finished, tmp_path / "again"), resume=False)
    with pytest.raises(
        FileExistsError,
        match=r"holds sweep.json, sweep.html, jobs, checkpoints: resume=True goes on from there, overwrite=True",
    ):
        sweep(again, progress=False)
    writing.remove(again.output / "checkpoints")
    with pytest.raises(FileExistsError, match="has no checkpoint to resume from: overwrite=True starts again"):
        sweep(replace(again, resume=True), progress=False)
    inside = again.output / "jobs" / "rows.jsonl"
    inside.write_bytes(Path(finished.data).read_bytes())
    with pytest.raises(ValueError, match="expected another place, a sweep replaces this file"):
        sweep(replace(again, data=inside, overwrite=True), progress=False)
    fresh = sweep(replace(again, overwrite=True, max_steps=1, halving=False), progress=False)
    assert [one.steps for one in fresh][:5] == [1] * 5 and checkpoint.steps(again.output) == [1]


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A checkpoint's own files changed, under a manifest that vouches for them."""
    content, state = json.loads((path / NAME).read_text()), torch.load(path / STATE, weights_only=True)
    both = {"content": content, "state": state}
    change(both)

    def fill(folder: Path) -> None:
        shutil.copy(path / checkpoint.TRAINED, folder)
        (folder / NAME).write_text(json.dumps(both["content"]))
        torch.save(both["state"], folder / STATE)

    checkpoint.save(path.parent.parent, int(path.name.removeprefix("step-")), fill)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda both: both["content"].update(step=5), "sweep.json: step=5: expected the folder's, step-4"),
        (lambda both: both["content"].pop("setup"), "sweep.json: expected the keys step, seconds, setup, jobs"),
        (lambda both: both["content"].update(setup=[]), "sweep.json: expected a setup, and progress by job"),
        (
            lambda both: both["content"]["jobs"]["r2-lr0.01"].update(status="lost"),
            "r2-lr0.01: expected a job's progress",
        ),
        (lambda both: both["content"]["jobs"]["r2-lr0.01"].update(step=9), "r2-lr0.01: expected a job's progress"),
        (lambda both: both["content"]["jobs"]["r2-lr0.01"].pop("reason"), "r2-lr0.01: expected the keys"),
        (lambda both: both["state"].pop("rng"), "state.pt: expected the keys jobs, rng, tuned"),
        (lambda both: both["state"].update(rng=[]), "rng: expected a list of 1"),
        (lambda both: both["state"].update(tuned=[]), "tuned: expected measurements by device"),
        (lambda both: both["state"]["jobs"].clear(), "state.pt: jobs: expected the keys r"),
        (
            lambda both: next(iter(both["state"]["jobs"].values())).pop("optimizer"),
            "expected the keys optimizer, scheduler",
        ),
        (
            lambda both: next(iter(both["state"]["jobs"].values())).update(scheduler=3),
            "scheduler: expected a state, got 3",
        ),
        (
            lambda both: next(iter(both["state"]["jobs"].values()))["scheduler"].update(last_epoch=1),
            "scheduler: expected the state of step 4",
        ),
    ],
)
def test_a_strange_checkpoint_is_refused_by_name(finished, tmp_path, change, message):
    again = copy_to(finished, tmp_path / "again", step=4)
    edited(checkpoint.folder(again.output, 4), change)
    with pytest.raises(CheckpointError, match=message):
        sweep(again, progress=False)


def test_a_damaged_checkpoint_names_the_one_before_it(finished, tmp_path):
    again = copy_to(finished, tmp_path / "again")
    newest = checkpoint.folder(again.output, 6)
    (newest / STATE).write_bytes(b"cut")
    with pytest.raises(
        CheckpointError, match=r"state.pt is damaged.*; remove .*step-6, and resume=True goes on from step 4"
    ):
        sweep(again, progress=False)
    writing.remove(newest)
    sweep(again, progress=False)
    assert_same_results(again, finished)
    for path in (again.output / "checkpoints").glob("step-*"):
        (path / STATE).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"state.pt is damaged.*; overwrite=True starts again"):
        sweep(again, progress=False)
