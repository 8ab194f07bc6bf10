"""The training loop: it learns, it survives, and what it leaves is what PEFT reads."""

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from full_disk import disk_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fastlora
from fastlora import checkpoint, trainable, writing
from fastlora.checkpoint import CheckpointError
from fastlora.config import TrainConfig
from fastlora.data.examples import DataError
from fastlora.data.rows import Row
from fastlora.evaluation import evaluate
from fastlora.frozen import packed
from fastlora.models import load_model
from fastlora.train import TrainingError, TrainingInterrupted, _Plan, train

METRICS = {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens_per_second", "seconds"}


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    with tiny.on_cpu():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.save_data(tmp_path_factory.mktemp("data") / "train.jsonl", 48)


@pytest.fixture(autouse=True)
def one_thread():
    """Bits are compared between this process and others, which is fair at an equal thread count only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(base, data, tmp_path) -> TrainConfig:
    return TrainConfig(model=str(base), data=data, output=tmp_path / "out", r=4, lora_alpha=8, lr=1e-2, epochs=2)


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def numbers(output: Path) -> list[tuple]:
    """The metrics that must not depend on the clock."""
    return [(record["step"], record["loss"], record["learning_rate"]) for record in records(output)]


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_training_lowers_the_held_out_loss_and_leaves_its_files(config, base, tmp_path):
    result = train(replace(config, epochs=8), progress=False)
    held_out = tiny.save_data(tmp_path / "held_out.jsonl", 16, seed=1)
    before = evaluate(*load_model(str(base)), held_out, generations=False)
    after = evaluate(*load_model(str(base), {"tuned": config.output}), held_out, max_new_tokens=8)
    assert after.loss < before.loss / 2
    assert after.exact_match is not None and after.rougeL is not None and 0 < after.exact_match <= after.rougeL <= 1
    assert result.steps == 48 and result.loss < result.first_loss
    short = train(replace(config, output=tmp_path / "short", max_steps=3), progress=False)
    losses = [record["loss"] for record in records(tmp_path / "short")]
    assert (short.first_loss, short.loss) == (losses[0], losses[-1])  # over no step twice
    assert [record["step"] for record in records(config.output)] == list(range(1, 49))
    assert all(record.keys() == METRICS and record["seconds"] > 0 for record in records(config.output))
    assert (config.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((config.output / "summary.json").read_text())["loss"] == result.loss
    assert result.adapter_bytes == (config.output / "adapter_model.safetensors").stat().st_size
    assert (
        sum(result.implementations.values()) == 15 and "peft" not in result.implementations
    )  # 14 adapted, and the head
    assert result.loss_path == "fused"
    assert not list(config.output.glob(".unfinished-*"))


def test_the_defaults_take_fifty_steps_or_more_on_400_rows(base, data, tmp_path):
    config = TrainConfig(model=str(base), data=data, output=tmp_path)
    assert _Plan(config, [Row([1, 2], [1, 2])] * 400, processes=1).steps >= 50


def test_every_epoch_takes_every_row_once_and_processes_share_a_step(config):
    rows = [Row([n, n], [n, n]) for n in range(21)]
    config = replace(config, batch_size=2, gradient_accumulation_steps=2)
    plan = _Plan(config, rows, processes=3)
    assert plan.steps_per_epoch == 2
    epochs = [[row.input_ids[0] for step in (e, e + 1) for row in plan.step_rows(step)] for e in (0, 2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(21)) and epochs[0] != epochs[1]
    for step in (0, 1):
        shares = [plan.batches(plan.step_rows(step), process) for process in range(3)]
        assert len({len(share) for share in shares}) == 1
        taken = [row.input_ids[0] for share in shares for batch in share for row in batch if row.labelled]
        assert sorted(taken) == sorted(row.input_ids[0] for row in plan.step_rows(step))


def test_accumulated_batches_make_the_step_of_one_batch(config, tmp_path):
    config = replace(config, lora_dropout=0.0, epochs=1)
    train(config, progress=False)
    train(replace(config, output=tmp_path / "cut", batch_size=2, gradient_accumulation_steps=4), progress=False)
    for whole, cut in zip(numbers(config.output), numbers(tmp_path / "cut"), strict=True):
        assert abs(whole[1] - cut[1]) <= 1e-4 * whole[1]


def test_gradient_checkpointing_changes_no_number(config, tmp_path):
    config = replace(config, lora_dropout=0.3, epochs=1)
    train(config, progress=False)
    train(replace(config, output=tmp_path / "checkpointed", gradient_checkpointing=True), progress=False)
    assert numbers(config.output) == numbers(tmp_path / "checkpointed")


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


def interrupt_at(metrics: Path, steps: int) -> threading.Thread:
    def wait() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= steps):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


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


def test_full_training_changes_the_weights_and_leaves_a_model(config, base):
    train(replace(config, method="full", lr=1e-3, dtype="bfloat16"), progress=False)
    tuned, tokenizer = load_model(str(config.output), dtype="float32")
    assert not torch.equal(tuned.lm_head.weight, load_file(base / "model.safetensors")["lm_head.weight"])
    assert tokenizer.eos_token == "</s>"


def test_a_bfloat16_base_keeps_a_float32_adapter(config):
    result = train(replace(config, dtype="bfloat16", epochs=4), progress=False)
    assert result.loss < result.first_loss
    assert {value.dtype for value in adapter(config.output).values()} == {torch.float32}


def test_an_output_with_checkpoints_is_not_overwritten_unasked(config):
    train(config, progress=False)
    first = adapter(config.output)
    with pytest.raises(FileExistsError, match=r"resume=True .*overwrite=True"):
        train(config, progress=False)
    with pytest.raises(ValueError, match=r"lr=0.02: expected 0.01"):
        train(replace(config, resume=True, lr=0.02), progress=False)
    with pytest.raises(ValueError, match="its token rows are not those"):
        train(
            replace(config, resume=True, data=tiny.save_data(config.output / "other.jsonl", 48, seed=5)), progress=False
        )
    assert train(replace(config, resume=True), progress=False).steps == 12
    assert_same_bits(first, adapter(config.output))
    train(replace(config, overwrite=True, seed=1, epochs=1), progress=False)
    assert len(records(config.output)) == 6
    assert [path.name for path in (config.output / "checkpoints").iterdir()] == ["step-6"]


def test_resume_without_a_checkpoint_starts_afresh(config):
    config.output.mkdir()
    (config.output / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"st')
    (config.output / "checkpoints" / ".unfinished-x").mkdir(parents=True)
    assert train(replace(config, resume=True), progress=False).steps == 12
    assert [record["step"] for record in records(config.output)] == list(range(1, 13))
    assert not (config.output / "checkpoints" / ".unfinished-x").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", [".", "..", "inside"])
def test_the_base_is_never_overwritten(config, tmp_path, place, overwrite):
    base = tiny.save_model(tmp_path / "base" / "model")
    before = contents(tmp_path / "base")
    (tmp_path / "link").symlink_to(base)
    for folder in (base, tmp_path / "link"):
        with pytest.raises(ValueError, match=r"^output=.*: expected a folder apart from model="):
            train(
                replace(config, model=base, method="full", output=folder / place, overwrite=overwrite), progress=False
            )
    assert contents(tmp_path / "base") == before


@pytest.mark.parametrize(
    "held", ["README.md", "adapter_config.json", "config.json", "model.safetensors", "metrics.jsonl", "tokenizer.json"]
)
def test_what_others_have_made_is_not_replaced_unasked(config, held):
    """With no checkpoint beside it nothing of it is this run's to go on from."""
    config.output.mkdir()
    (config.output / held).write_text("not yours")
    (config.output / "notes.txt").write_text("not yours")
    before = contents(config.output)
    with pytest.raises(FileExistsError, match=rf"^output=.* holds {held}: .*overwrite=True"):
        train(config, progress=False)
    if held != "metrics.jsonl":  # all that a run leaves that is killed before its first checkpoint
        with pytest.raises(FileExistsError, match=rf"no checkpoint to resume from, and holds {held}: overwrite=True"):
            train(replace(config, resume=True), progress=False)
    assert contents(config.output) == before
    train(replace(config, overwrite=True, max_steps=1), progress=False)
    assert (config.output / "notes.txt").read_text() == "not yours"
    assert "config.json" not in contents(config.output) and "model.safetensors" not in contents(config.output)


def test_an_adapter_without_its_checkpoints_is_not_replaced_unasked(config):
    train(replace(config, max_steps=1), progress=False)
    shutil.rmtree(config.output / "checkpoints")
    before = contents(config.output)
    for again in (config, replace(config, resume=True)):
        with pytest.raises(FileExistsError, match=r"holds .*adapter_config.json.* and \d more|holds .*README.md"):
            train(again, progress=False)
    assert contents(config.output) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "adapter_config.json", "checkpoints"])
def test_what_cannot_be_replaced_is_named_before_anything_is_trained(config, name):
    config.output.mkdir()
    if name == "checkpoints":
        (config.output / name).write_text("not yours")
    else:
        (config.output / name).mkdir()
    with pytest.raises(OSError, match=rf"^output=.*: {name} is a (file|folder) there, expected a .* or nothing"):
        train(replace(config, overwrite=True), progress=False)
    assert [path.name for path in config.output.iterdir()] == [name]


def test_data_that_training_would_replace_is_refused(config):
    config.output.mkdir()
    data = tiny.save_data(config.output / "metrics.jsonl", 8)
    before = data.read_bytes()
    with pytest.raises(ValueError, match="^data=.*: expected another place or name"):
        train(replace(config, data=data, overwrite=True), progress=False)
    assert data.read_bytes() == before


def test_what_a_run_leaves_that_went_wrong_at_once_is_in_nobodys_way(config):
    with pytest.raises(TrainingError):
        train(replace(config, lora_alpha=0), progress=False)
    assert contents(config.output) == {"metrics.jsonl": b""}
    assert train(replace(config, max_steps=1), progress=False).steps == 1


def test_a_second_training_into_one_folder_is_refused_at_the_start(config):
    train(replace(config, max_steps=1), progress=False)
    before = contents(config.output)
    for options in ({"overwrite": True}, {"resume": True}, {}):
        with writing.locked(config.output):  # as another process holds it while it trains
            with pytest.raises(BlockingIOError, match=r"^output=.*: another process writes into this folder"):
                train(replace(config, max_steps=1, **options), progress=False)
    assert contents(config.output) == before


def test_training_holds_its_folder(config, monkeypatch):
    def hold(*_: object) -> None:
        with writing.locked(config.output):
            raise AssertionError("two hold the folder")

    monkeypatch.setattr(checkpoint, "save", hold)
    with pytest.raises(TrainingError, match="the checkpoint cannot be written: .*another process writes"):
        train(replace(config, max_steps=1), progress=False)


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory) -> Path:
    """A run of 6 steps with the checkpoints of steps 4 and 6. Not to be changed: take a copy."""
    output = tmp_path_factory.mktemp("finished") / "out"
    train(of_six_steps(base, data, output), progress=False)
    return output


def of_six_steps(base: Path, data: Path, output: Path) -> TrainConfig:
    return TrainConfig(model=base, data=data, output=output, r=2, lr=1e-2, max_steps=6, save_steps=2)


@pytest.fixture
def again(finished, base, data, tmp_path) -> TrainConfig:
    """The same run, as a copy in another folder, to go on from."""
    shutil.copytree(finished, tmp_path / "again")
    return replace(of_six_steps(base, data, tmp_path / "again"), resume=True)


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
    "not UTF-8": (b"\xff\n", "not JSON"),
    "another step": (b'{"step": 9}\n', "expected the object of step 3"),
    "a list": (b"[1]\n", "expected the object of step 3"),
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


def test_a_full_disk_says_what_is_not_written_and_what_there_is_to_go_on_from(config, finished, again):
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
        pytest.raises(TrainingError, match=r"metrics.jsonl cannot be written: File too large: .*metrics.jsonl"),
    ):
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


def test_the_first_step_trains(config):
    result = train(replace(config, max_steps=1), progress=False)
    assert result.steps == 1 and records(config.output)[0]["learning_rate"] == config.lr
    assert all(value.count_nonzero() for name, value in adapter(config.output).items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", "float16"),
        ("float32", "auto", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("told", ["by the config", "by the weights"])
def test_full_training_keeps_the_dtype_that_the_base_is_stored_in(
    config, base, tmp_path, stored, dtype, expected, told
):
    model, tokenizer = load_model(str(base), dtype="float32")
    model.to(getattr(torch, stored)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    if told == "by the weights":
        content = json.loads((tmp_path / "base" / "config.json").read_text())
        del content["dtype"]
        (tmp_path / "base" / "config.json").write_text(json.dumps(content))
    result = train(
        replace(config, model=tmp_path / "base", method="full", max_steps=2, save_steps=1, dtype=dtype), progress=False
    )
    saved = load_file(config.output / "model.safetensors")
    assert {str(value.dtype) for value in saved.values()} == {f"torch.{expected}"}
    assert result.dtype == json.loads((config.output / "config.json").read_text())["dtype"] == expected
    summary = json.loads((config.output / "summary.json").read_text())
    assert (summary["dtype"], summary["base_dtype"]) == (expected, stored)
    kept = load_file(config.output / "checkpoints" / "step-2" / "model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.float32}  # a resumed run goes on with all bits
    assert all(torch.equal(value, kept[name].to(value.dtype)) for name, value in saved.items())


def test_weights_too_large_for_the_stored_dtype_are_saved_in_float32(config, base, tmp_path, caplog):
    model, tokenizer = load_model(str(base), dtype="float32")
    model.to(torch.float16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = {"model": tmp_path / "base", "method": "full", "lr": 1e5, "lr_scheduler_type": "constant"}
    try:
        result = train(replace(config, max_steps=1, **options), progress=False)
    finally:
        assert "saved in float32, not in the base's float16" in caplog.text
    assert result.dtype == "float32"
    assert all(value.isfinite().all() for value in load_file(config.output / "model.safetensors").values())


@pytest.fixture(scope="module")
def llama(base):
    return AutoModelForCausalLM.from_pretrained(base)


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("all-linear", LINEAR),
        (["all-linear"], LINEAR),
        (["all-linear", "lm_head"], LINEAR | {"lm_head"}),
        (["lm_head", "All-Linear", "lm_head", "q_proj"], LINEAR | {"lm_head"}),
        (["q_proj", "q_proj"], {"q_proj"}),
        (["self_attn.q_proj", "model.layers.0.mlp.up_proj"], {"q_proj", "up_proj"}),
        (r".*\.(q|v)_proj", {"q_proj", "v_proj"}),
    ],
)
def test_every_named_module_is_trained(base, named, expected):
    model = AutoModelForCausalLM.from_pretrained(base)
    peft_model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=trainable.targets(model, named))
    )
    found = {name.rpartition(".")[2] for name, module in peft_model.named_modules() if hasattr(module, "lora_A")}
    assert found == expected


@pytest.mark.parametrize(
    ("named", "unmatched"),
    [
        (["q_proj", "foo_proj"], "'foo_proj'"),
        (["all-linear", "nope", "bar"], "'bar', 'nope'"),
        (["q_proj", ""], "''"),
        ([" q_proj"], "' q_proj'"),
        (["proj"], "'proj'"),
        (["q_proj "], "'q_proj '"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error_that_lists_some_that_do(llama, named, unmatched):
    with pytest.raises(ValueError, match=rf"^target_modules: no module is called {unmatched}; there are .*q_proj"):
        trainable.targets(llama, named)


def test_a_regular_expression_is_pefts_and_must_match_a_whole_name(llama):
    assert trainable.targets(llama, ".*q_proj") == ".*q_proj"
    with pytest.raises(ValueError, match=r"^target_modules='q_proj': the regular expression matches no module's whole"):
        trainable.targets(llama, "q_proj")


def test_training_says_which_name_matches_nothing_and_which_module_is_no_layer(config):
    with pytest.raises(ValueError, match="^target_modules: no module is called 'foo_proj'; there are "):
        train(replace(config, target_modules=["q_proj", "foo_proj"]), progress=False)
    with pytest.raises(ValueError, match=r"(?s)^target_modules=\['mlp'\]: .*not supported"):
        train(replace(config, target_modules=["mlp"]), progress=False)
    assert not config.output.exists()


def test_all_linear_and_the_head_are_trained_together(config):
    result = train(replace(config, target_modules=["all-linear", "lm_head"], max_steps=1), progress=False)
    assert len(adapter(config.output)) == 2 * 15 and sum(result.implementations.values()) == 15


def test_two_processes_of_one_run_share_a_folder_and_train_as_one(again):
    """torchrun's, of which one holds the folder's lock for both."""
    options = {"model": again.model, "data": again.data, "output": again.output.parent / "two", "r": 2, "lr": 1e-2}
    options |= {"max-steps": 2, "lora-dropout": 0, "batch-size": 4}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "--", "fastlora", "train", *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 8 rows" in done.stderr and "2 processes" in done.stderr
    alone = replace(
        again, output=again.output.parent / "one", resume=False, max_steps=2, lora_dropout=0.0, batch_size=8
    )
    train(alone, progress=False)
    for two, one in zip(numbers(options["output"]), numbers(alone.output), strict=True):
        assert abs(two[1] - one[1]) <= 1e-4 * one[1]
    assert len(checkpoint.read(options["output"] / "checkpoints" / "step-2").state["rng"]) == 2


def test_a_banner_says_what_runs_before_the_bar(config, capsys):
    train(replace(config, max_steps=2))
    lines = capsys.readouterr().err.splitlines()
    lines = lines[next(number for number, line in enumerate(lines) if line.startswith("fastlora ")) :]
    names = [line.split()[0] for line in lines[:6]]
    assert names == ["fastlora", "rows", "steps", "trained", "device", "runs"]
    shown = "\n".join(lines[:6])
    for part in (config.model, "48", "2 of 8 rows", "4,096 parameters, 9.59 %", "cpu, float32, 1 thread", "15 "):
        assert part in shown, part
    assert "2/2" in lines[-1]


def test_the_summary_says_where_its_figures_come_from(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["config"]["r"] == 2 and summary["config"]["max_steps"] == 6 and summary["device"] == "cpu"
    assert summary["versions"]["torch"] == torch.__version__ and summary["base_dtype"] == "float32"
    assert summary["date"].startswith("20") and summary["dtype"] == "float32"
    assert [record["epoch"] for record in records(finished)] == [step / 6 for step in range(1, 7)]
    assert all(record["grad_norm"] > 0 for record in records(finished))


def test_bad_lines_are_reported_before_the_output_is_touched(config, tmp_path):
    train(config, progress=False)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: no field 'completion'"):
        train(replace(config, data=bad, overwrite=True), progress=False)
    assert (config.output / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("truncation", "counts"), [("prompt", (18, 0, 1, 1)), ("completion", (17, 1, 0, 1)), ("drop", (16, 2, 0, 0))]
)
def test_rows_that_are_too_long_are_counted_with_a_warning(config, tmp_path, caplog, truncation, counts):
    long = (
        {"prompt": "The cat runs. " * 40, "completion": " It runs."},
        {"prompt": "What?", "completion": " It runs." * 40},
    )
    rows = [*tiny.rows(16), *long]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(replace(config, data=data, max_length=64, truncation=truncation, max_steps=1), progress=False)
    assert (result.rows, result.dropped_rows, result.prompt_cut_rows, result.completion_cut_rows) == counts
    saved = json.loads((config.output / "summary.json").read_text())
    assert (saved["rows"], saved["dropped_rows"], saved["prompt_cut_rows"], saved["completion_cut_rows"]) == counts
    warned = [record.getMessage() for record in caplog.records if "max_length=64: " in record.getMessage()]
    assert len(warned) == sum(count > 0 for count in counts[1:]) and all(f"{data}:1" in text for text in warned)


def test_rows_that_are_longer_than_the_model_are_an_error(config, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "The cat runs. " * 400, "completion": " It runs."}) + "\n")
    with pytest.raises(ValueError, match="the longest row has 512 tokens and the model positions for 256"):
        train(replace(config, data=data), progress=False)


def test_a_loss_that_is_not_finite_ends_the_run_by_name(config):
    with pytest.raises(TrainingError, match=r"step \d+: the loss is (nan|inf).*a lower lr may help"):
        train(replace(config, lr=1e30, max_grad_norm=0.0), progress=False)
    with pytest.raises(TrainingError, match=r"step 1: the loss is .* nothing was trained yet: look at .*lora_alpha"):
        train(replace(config, lora_alpha=1e38, overwrite=True), progress=False)


def test_training_that_reaches_no_weight_is_an_error(config):
    with pytest.raises(TrainingError, match="step 1: no gradient reached any of the 28 trained weights"):
        train(replace(config, lora_alpha=0), progress=False)


def test_packed_copies_change_no_loss_and_none_is_left(config, tmp_path, copies):
    config = replace(config, lora_dropout=0.0, max_steps=4, pack_budget=0)
    train(config, progress=False)
    assert not any(copies)
    train(replace(config, output=tmp_path / "packed", pack_budget=2**30), progress=False)
    assert sum(map(bool, copies)) > 4 * 15
    for plain, ours in zip(numbers(config.output), numbers(tmp_path / "packed"), strict=True):
        assert abs(plain[1] - ours[1]) <= 1e-4 * plain[1]
    gc.collect()
    assert not packed._by_key


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_is_like_an_eager_one_and_resumes_to_the_same_bits(config, tmp_path):
    config = replace(config, lora_dropout=0.0, max_steps=4, save_steps=2, batch_size=4)
    train(config, progress=False)
    compiled, resumed = (replace(config, output=tmp_path / name, compile=True) for name in ("compiled", "resumed"))
    result = train(compiled, progress=False)
    assert result.loss_path == "fused"
    observed = {name: count for name, count in result.implementations.items() if "compiled: not observed" not in name}
    assert sum(result.implementations.values()) == 15 and sum(observed.values()) == 1  # the head
    for eager, ours in zip(numbers(config.output), numbers(compiled.output), strict=True):
        assert abs(eager[1] - ours[1]) <= 1e-4 * eager[1]
    shutil.copytree(compiled.output, resumed.output, ignore=shutil.ignore_patterns("step-4"))
    torch.compiler.reset()
    train(replace(resumed, resume=True), progress=False)
    assert numbers(resumed.output) == numbers(compiled.output)
    assert_same_bits(adapter(resumed.output), adapter(compiled.output))


def test_compile_without_a_compiler_is_an_error_before_anything_else(config, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="no-such-compiler is not on the PATH"):
        train(replace(config, compile=True), progress=False)


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def test_peft_loads_what_fastlora_trained_and_the_reverse(config, base, tmp_path):
    tokens = torch.randint(5, 300, (3, 17), generator=torch.Generator().manual_seed(1))
    train(config, progress=False)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), config.output)
    by_fastlora, _ = load_model(str(base), {"tuned": config.output})
    expected = logits(by_peft, tokens)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base), tokens)).abs().max() > 0.1
    assert (expected - logits(by_fastlora, tokens)).abs().max() <= 1e-4

    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=3, target_modules=["q_proj", "up_proj"])
    )
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_model(str(base), {"theirs": tmp_path / "theirs"})
    assert (logits(theirs, tokens) - logits(ours, tokens)).abs().max() <= 1e-4
    assert {layer.implementation for layer in fastlora.report(ours)} != {"peft"}
