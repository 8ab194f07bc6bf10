"""The training loop: it learns, says what it does, and what it leaves is what PEFT reads."""

import gc
import json
import os
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from training import (  # noqa: F401  (fixtures)
    a_base,
    a_config,
    a_finished_run,
    a_run_to_go_on,
    adapter,
    assert_same_bits,
    numbers,
    on_cpu,
    one_thread,
    records,
    some_data,
    train_on_two_processes,
)
from transformers import AutoModelForCausalLM

import fastlora
from fastlora import checkpoint
from fastlora.config import TrainConfig
from fastlora.course import Course, TrainingError
from fastlora.data.examples import DataError
from fastlora.data.rows import Row
from fastlora.evaluation import evaluate
from fastlora.frozen import packed
from fastlora.models import load_model
from fastlora.train import train

METRICS = {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "seconds"}


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
    assert Course(config, [Row([1, 2], [1, 2])] * 400, processes=1).steps >= 50


def test_every_epoch_takes_every_row_once_and_processes_share_a_step(config):
    rows = [Row([n, n], [n, n]) for n in range(21)]
    config = replace(config, batch_size=2, gradient_accumulation_steps=2)
    plan = Course(config, rows, processes=3)
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


def test_full_training_changes_the_weights_and_leaves_a_model(config, base):
    train(replace(config, method="full", lr=1e-3, dtype="bfloat16"), progress=False)
    tuned, tokenizer = load_model(str(config.output), dtype="float32")
    assert not torch.equal(tuned.lm_head.weight, load_file(base / "model.safetensors")["lm_head.weight"])
    assert tokenizer.eos_token == "</s>"


def test_a_bfloat16_base_keeps_a_float32_adapter(config):
    result = train(replace(config, dtype="bfloat16", epochs=4), progress=False)
    assert (result.compute_dtype, result.dtype) == ("bfloat16", "float32")
    assert result.loss < result.first_loss
    assert {value.dtype for value in adapter(config.output).values()} == {torch.float32}


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
    assert summary["compute_dtype"] == ("float32" if dtype == "auto" else dtype)
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


def test_two_processes_of_one_run_share_a_folder_and_train_as_one(again):
    """torchrun's, of which one holds the folder's lock for both."""
    options = {"model": again.model, "data": again.data, "output": again.output.parent / "two", "r": 2, "lr": 1e-2}
    options |= {"max-steps": 2, "lora-dropout": 0, "batch-size": 4}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = train_on_two_processes(*arguments)
    assert done.returncode == 0, done.stderr
    assert "2, of 8 rows each" in done.stderr and "2 processes" in done.stderr
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
    for part in (
        config.model,
        "48",
        "2, of 8 rows each",
        "4,096 parameters, 9.59 %",
        "cpu, float32, 1 thread",
        "15 layers by ",
    ):
        assert part in shown, part
    assert "2/2" in lines[-1]


def test_the_summary_says_where_its_figures_come_from(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["config"]["r"] == 2 and summary["config"]["max_steps"] == 6 and summary["device"] == "cpu"
    assert summary["versions"]["torch"] == torch.__version__ and summary["base_dtype"] == "float32"
    assert summary["date"].startswith("20") and summary["dtype"] == summary["compute_dtype"] == "float32"
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
