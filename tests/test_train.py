"""The training loop: it learns, it survives, and what it leaves is what PEFT reads."""

import json
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
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fastlora
from fastlora.data.examples import DataError, Row
from fastlora.train import TrainConfig, TrainingError, TrainingInterrupted, _Plan, evaluate, load_model, train

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


def test_bad_lines_are_reported_before_the_output_is_touched(config, tmp_path):
    train(config, progress=False)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: no field 'completion'"):
        train(replace(config, data=bad, overwrite=True), progress=False)
    assert (config.output / "checkpoints").is_dir()


def test_rows_without_completion_are_counted_with_a_warning(config, tmp_path, caplog):
    rows = [*tiny.rows(16), {"prompt": "The cat runs. " * 40, "completion": " It runs."}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(replace(config, data=data, max_length=64), progress=False)
    assert (result.rows, result.dropped_rows) == (16, 1)
    assert "dropped 1 rows, kept 16" in caplog.text and "data.jsonl:17" in caplog.text


def test_a_loss_that_is_not_finite_ends_the_run_by_name(config):
    with pytest.raises(TrainingError, match=r"step \d+: the loss is (nan|inf)"):
        train(replace(config, lr=1e30, max_grad_norm=0.0), progress=False)


def test_training_that_reaches_no_weight_is_an_error(config):
    with pytest.raises(TrainingError, match="step 1: no gradient reached any of the 28 trained weights"):
        train(replace(config, lora_alpha=0), progress=False)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("method", "dora"),
        ("r", 0),
        ("epochs", 0),
        ("max_length", 1),
        ("lora_dropout", 1.0),
        ("lr", float("nan")),
        ("dtype", "float64"),
        ("save_steps", 0),
        ("pack_budget", -1),
    ],
)
def test_an_option_out_of_range_is_named(config, option, value):
    with pytest.raises(ValueError, match=option):
        replace(config, **{option: value})


def test_packed_copies_change_no_loss(config, tmp_path):
    config = replace(config, lora_dropout=0.0, max_steps=4, pack_budget=0)
    train(config, progress=False)
    train(replace(config, output=tmp_path / "packed", pack_budget=2**30), progress=False)
    for plain, packed in zip(numbers(config.output), numbers(tmp_path / "packed"), strict=True):
        assert abs(plain[1] - packed[1]) <= 1e-4 * plain[1]


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_is_like_an_eager_one_and_resumes_to_the_same_bits(config, tmp_path):
    config = replace(config, lora_dropout=0.0, max_steps=4, save_steps=2, batch_size=4)
    train(config, progress=False)
    compiled, resumed = (replace(config, output=tmp_path / name, compile=True) for name in ("compiled", "resumed"))
    result = train(compiled, progress=False)
    assert result.loss_path == "fused"
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
