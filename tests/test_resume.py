"""A run that was stopped goes on to the same bits, and from nothing that is damaged."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from full_disk import disk_of
from safetensors.torch import load_file
from training import (  # noqa: F401  (fixtures)
    a_base,
    a_config,
    a_finished_run,
    a_run_to_go_on,
    adapter,
    assert_same_bits,
    contents,
    interrupt_at,
    numbers,
    on_cpu,
    one_thread,
    records,
    some_data,
)

from fastlora import checkpoint, options
from fastlora.checkpoint import CheckpointError
from fastlora.train import TrainingError, TrainingInterrupted, train


def kill_after(process: subprocess.Popen, metrics: Path, steps: int) -> None:
    """SIGKILL a process once its metrics have so many lines."""
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run wrote no metrics"
        time.sleep(0.002)
    process.kill()
    process.wait()


def test_a_killed_run_resumes_to_the_same_bits(config, tmp_path):
    config = replace(config, epochs=14, save_steps=7)
    killed = tmp_path / "killed"
    options = {
        "model": config.model,
        "data": config.data,
        "output": killed,
        "r": 4,
        "lora-alpha": 8,
        "lr": 1e-2,
        "epochs": 14,
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "fastlora", "train", *arguments, "--save-steps", "7"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        kill_after(process, killed / "metrics.jsonl", 17)
    finally:
        process.kill()
    assert not (killed / "adapter_model.safetensors").exists()
    (newest,) = sorted((killed / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))[-1:]
    assert records(killed)[-1]["step"] - int(newest.name[5:]) <= 7 + 1  # a checkpoint may have been under way
    train(replace(config, output=killed, resume=True), progress=False)
    train(config, progress=False)
    assert_same_bits(adapter(killed), adapter(config.output))
    assert numbers(killed) == numbers(config.output)
    assert len(list((killed / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_run_resumes_to_the_same_bits(config, tmp_path, method):
    config = replace(config, method=method, lr=1e-3, epochs=6)
    stopped = replace(config, output=tmp_path / "stopped")
    thread = interrupt_at(stopped.output / "metrics.jsonl", 9)
    with pytest.raises(TrainingInterrupted, match=r"resume=True goes on from .*step-\d+"):
        train(stopped, progress=False)
    thread.join()
    done = len(records(stopped.output))
    assert 9 <= done < 36 and (stopped.output / "checkpoints" / f"step-{done}").is_dir()
    train(replace(stopped, resume=True), progress=False)
    train(config, progress=False)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert_same_bits(load_file(stopped.output / name), load_file(config.output / name))
    assert numbers(stopped.output) == numbers(config.output)


def test_resume_without_a_checkpoint_starts_afresh(config):
    config.output.mkdir()
    (config.output / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"st')
    (config.output / "checkpoints" / ".unfinished-x").mkdir(parents=True)
    assert train(replace(config, resume=True), progress=False).steps == 12
    assert [record["step"] for record in records(config.output)] == list(range(1, 13))
    assert not (config.output / "checkpoints" / ".unfinished-x").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "state.pt", "README.md"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used_when_asked_for(again, finished, name):
    path = again.output / "checkpoints" / "step-6" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = contents(again.output)
    with pytest.raises(
        CheckpointError, match=rf"step-6/{name} is damaged.*: .*; the one before it is whole: resume_from=4 goes on"
    ):
        train(again, progress=False)
    with pytest.raises(CheckpointError, match=f"step-6/{name} is damaged"):
        train(replace(again, resume_from=6), progress=False)
    assert contents(again.output) == before
    train(replace(again, resume=False, resume_from=4), progress=False)
    assert_same_bits(adapter(again.output), adapter(finished))
    assert numbers(again.output) == numbers(finished)
    checkpoint.read(again.output / "checkpoints" / "step-6")


def test_where_no_checkpoint_is_whole_the_error_says_so(again):
    for step in (4, 6):
        (again.output / "checkpoints" / f"step-{step}" / "manifest.json").unlink()  # as earlier versions wrote them
    with pytest.raises(CheckpointError, match=r"of an earlier version of fastlora.*no other .* whole: overwrite=True"):
        train(again, progress=False)
    with pytest.raises(ValueError, match=r"^resume_from=5: expected the step of a checkpoint in .*: 4, 6$"):
        train(replace(again, resume_from=5), progress=False)


ABSURD = {
    "step past the end": ({"step": 8}, "step=8: expected at most 6"),
    "config of another type": ({"config": {"r": "16"}}, "training.json: config: r='16': expected int, got str"),
    "config out of range": ({"config": {"max_steps": 10**12}}, "config: max_steps=1000000000000: expected at most"),
    "option that is none": ({"config": {"rank": 3}}, "config has the unknown option rank"),
    "option that is not there": ({"config": {"r": KeyError}}, "config lacks r"),
    "other processes": ({"processes": 2}, "rng: expected a list of 2"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_a_training_json_with_absurd_values_ends_at_once(again, case):
    change, message = ABSURD[case]
    folder = again.output / "checkpoints" / "step-6"
    content = json.loads((folder / "training.json").read_text())
    for name, value in change.get("config", {}).items():
        content["config"][name] = value
        if value is KeyError:
            del content["config"][name]
    content |= {name: value for name, value in change.items() if name != "config"}

    def forge(scratch: Path) -> None:
        shutil.copytree(folder, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        (scratch / "training.json").write_text(json.dumps(content))

    checkpoint.save(again.output, content["step"], forge)
    with pytest.raises(CheckpointError, match=message):
        train(again, progress=False)


STATES = {
    "no betas": (lambda s: s["optimizer"]["param_groups"][0].pop("betas"), "optimizer.param_groups: expected AdamW's"),
    "a tensor as rate": (
        lambda s: s["optimizer"]["param_groups"][0].update(lr=torch.ones(3)),
        "optimizer.param_groups: expected AdamW's of step 6",
    ),
    "another rate": (lambda s: s["scheduler"].update(_last_lr=[1.0]), "scheduler: expected the state of step 6"),
    "no rate": (lambda s: s["scheduler"].update(_last_lr=[]), "scheduler: expected the state of step 6"),
    "no moments": (
        lambda s: s["optimizer"]["state"][0].pop("exp_avg"),
        "expected step, exp_avg, exp_avg_sq of a trained",
    ),
    "NaN": (lambda s: s["optimizer"]["state"][0]["exp_avg"].fill_(math.nan), "exp_avg of .*lora_A.* from -inf on"),
    "below 0": (lambda s: s["optimizer"]["state"][1]["exp_avg_sq"].fill_(-1), "exp_avg_sq of .*lora_B.* from 0 on"),
    "step -5": (lambda s: s["optimizer"]["state"][0]["step"].fill_(-5), "step of .* from 1 on"),
    "another shape": (
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.ones(3)),
        r"got torch.float32 of shape \[3\]",
    ),
    "a weight too many": (lambda s: s["optimizer"]["state"].update({99: {}}), "parameter 99: expected"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_is_not_this_runs_names_file_and_key(again, case):
    """Whoever wrote it: the manifest vouches for these files."""
    change, message = STATES[case]
    folder = again.output / "checkpoints" / "step-6"

    def forge(scratch: Path) -> None:
        shutil.copytree(folder, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        state = torch.load(scratch / "state.pt", weights_only=True)
        change(state)
        torch.save(state, scratch / "state.pt")

    checkpoint.save(again.output, 6, forge)
    with pytest.raises(CheckpointError, match=f"step-6/state.pt: .*{message}"):
        train(again, progress=False)


GARBAGE = {
    "not JSON": (b"\x00\x00\n", "not JSON"),
    "not UTF-8": (b"\xff\n", "not UTF-8"),
    "another step": (b'{"step": 9}\n', "expected the object of step 3"),
    "a list": (b"[1]\n", "expected a JSON object, got list"),
    "no loss": (b'{"step": 3}\n', "loss=None: expected a finite number"),
    "a loss that is none": (b'{"step": 3, "loss": NaN}\n', "loss=nan: expected a finite number"),
    "a number of 5,000 digits": (b'{"step": ' + b"9" * 5000 + b"}\n", "not JSON"),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_in_the_metrics_names_file_and_line(again, case):
    garbage, message = GARBAGE[case]
    path = again.output / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], garbage, *lines[3:]]))
    with pytest.raises(ValueError, match=rf"metrics.jsonl:3: {message}"):
        train(again, progress=False)


def test_metrics_that_end_before_the_checkpoint_are_an_error_and_what_is_behind_it_is_cut(again, finished):
    path = again.output / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    with pytest.raises(ValueError, match=r"metrics.jsonl: ends at step 3, expected the 6 steps that were done"):
        train(again, progress=False)
    path.write_bytes(b"".join([*lines, b"garbage\n", b'{"st']))
    train(again, progress=False)
    assert numbers(again.output) == numbers(finished)


def test_a_full_disk_says_what_is_not_written_and_what_there_is_to_go_on_from(config, finished, again, monkeypatch):
    """A limit on the size of a file does to a writer what a full disk does; an adapter is 12,000 bytes or so here."""
    fresh = replace(again, output=config.output, resume=False)
    with (
        disk_of(10_000),
        pytest.raises(TrainingError, match=r"step 2: the checkpoint cannot be written: File too large: ") as caught,
    ):
        train(fresh, progress=False)
    assert str(config.output) in str(caught.value) and "then start again" in str(caught.value)
    assert not list(config.output.rglob("*.safetensors")) and not list(config.output.rglob(".unfinished-*"))

    shutil.rmtree(again.output / "checkpoints" / "step-6")
    with (
        disk_of(1000),
        pytest.raises(TrainingError, match=r"config.yaml cannot be written: File too large: .*config.yaml"),
    ):
        train(again, progress=False)
    with (
        monkeypatch.context() as aside,
        disk_of(1000),
        pytest.raises(TrainingError, match=r"metrics.jsonl cannot be written: File too large: .*metrics.jsonl"),
    ):
        aside.setattr(options, "write", lambda *_: None)  # which is longer than so few steps' metrics
        train(again, progress=False)
    for path in again.output.glob("adapter_*"):
        path.unlink()
    with (
        disk_of(10_000),
        pytest.raises(TrainingError, match=r"step 6: the checkpoint .* resume=True goes on from .*step-4$"),
    ):
        train(again, progress=False)
    train(again, progress=False)
    assert_same_bits(adapter(again.output), adapter(finished))
    assert numbers(again.output) == numbers(finished)
    for name, limit in (("adapter", 10_000), ("summary", 14_000)):
        before = contents(again.output)
        with disk_of(limit), pytest.raises(TrainingError, match=rf"the {name} cannot be written: .*from .*step-6$"):
            train(again, progress=False)
        after = contents(again.output)
        assert after.keys() == before.keys()
        assert all(after[name] == before[name] for name in ("adapter_model.safetensors", "loss.png"))
