"""Validation while training: it measures what `eval` measures, changes nothing of training, finds the best step and ends what gets no better."""

import json
import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from training import (  # noqa: F401  (fixtures)
    a_base,
    a_config,
    adapter,
    assert_same_bits,
    numbers,
    on_cpu,
    one_thread,
    records,
    some_data,
    train_on_two_processes,
)
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from fastlora import accelerate, checkpoint, validation
from fastlora.config import TrainConfig
from fastlora.data.examples import read_examples
from fastlora.data.rows import encode
from fastlora.evaluation import evaluate, total_loss
from fastlora.models import load_model
from fastlora.train import TrainingError, train
from fastlora.validation import judge


@pytest.fixture(name="held_out", scope="module")
def some_held_out_data(tmp_path_factory) -> Path:
    return tiny.save_data(tmp_path_factory.mktemp("held_out") / "eval.jsonl", 20, seed=1)


@pytest.fixture(name="other", scope="module")
def some_other_data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("other") / "retain.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + {i}", "completion": f" {2 * i}"}) + "\n" for i in range(9)))
    return path


@pytest.fixture(name="measured")
def a_measured_config(config, held_out, other) -> TrainConfig:
    return replace(config, eval_data=held_out, retain_data=other, eval_steps=5, eval_generate=True, eval_samples=3)


def unmeasured(config: TrainConfig, output: Path) -> TrainConfig:
    none = dict.fromkeys(("eval_data", "retain_data", "eval_steps", "eval_samples"))
    return replace(config, output=output, eval_generate=False, **none)


def lines(output: Path, name: str = "validation.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def test_it_measures_what_eval_measures_and_nothing_of_training_depends_on_it(measured, base, tmp_path):
    result = train(measured, progress=False)
    found = lines(measured.output)
    assert [one["step"] for one in found] == [0, 5, 10, 12]
    model = load_model(str(base), {"tuned": measured.output}, accelerate=False)
    accelerate(
        model[0], frozen=True, fuse=True
    )  # as training does; `fastlora eval` fuses no norms, which rounds otherwise
    theirs = evaluate(*model, measured.eval_data, max_new_tokens=measured.eval_max_new_tokens)
    names = ("loss", "tokens", "exact_match", "rouge1", "rouge2", "rougeL", "f1", "accuracy")
    assert {name: found[-1][f"eval_{name}"] for name in names} == {name: getattr(theirs, name) for name in names}
    theirs = evaluate(*model, measured.retain_data, generations=False)
    assert (found[-1]["retain_loss"], found[-1]["retain_tokens"]) == (theirs.loss, theirs.tokens)
    begun = evaluate(*load_model(str(base)), measured.eval_data, generations=False)  # without a layer's B A, which is 0
    assert found[0]["eval_loss"] == pytest.approx(begun.loss, rel=1e-6)
    assert found[0]["forgetting"] == 0 and all(
        one["forgetting"] == one["retain_loss"] - found[0]["retain_loss"] for one in found
    )
    assert found[-1]["eval_loss"] < found[0]["eval_loss"] and found[-1]["eval_f1"] > found[0]["eval_f1"]

    assert result.validation == found[-1] and not result.stopped_early and result.stop_reason is None
    assert result.best_step == min(found[1:], key=lambda one: one["eval_loss"])["step"]
    assert result.best_eval_loss == min(one["eval_loss"] for one in found[1:])
    summary = json.loads((measured.output / "summary.json").read_text())
    assert {name: summary[name] for name in ("best_step", "best_eval_loss", "validation")} == {
        "best_step": result.best_step,
        "best_eval_loss": result.best_eval_loss,
        "validation": found[-1],
    }

    alone = unmeasured(measured, tmp_path / "alone")
    without = train(alone, progress=False)
    assert_same_bits(adapter(alone.output), adapter(measured.output))
    assert numbers(alone.output) == numbers(measured.output)
    assert without.implementations == result.implementations and without.validation is None
    assert not (alone.output / "validation.jsonl").exists() and not (alone.output / "samples.jsonl").exists()


def test_samples_are_the_same_rows_each_time_and_before_training(measured):
    train(replace(measured, eval_generate=False), progress=False)
    found = lines(measured.output, "samples.jsonl")
    examples = read_examples(measured.eval_data)
    assert [one["step"] for one in found] == [step for step in (0, 5, 10, 12) for _ in range(3)]
    for number, one in enumerate(found):
        example = examples[number % 3 * 20 // 3]
        asked = {"source": example.source, "prompt": example.prompt, "reference": example.completion}
        assert one == {"step": one["step"], **asked, "answer": one["answer"]}
    assert {one["answer"] for one in found[:3]} != {one["answer"] for one in found[-3:]}
    assert not any("eval_f1" in one for one in lines(measured.output))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [4]),
        ({"eval_steps": 2}, [2, 4]),
        ({"eval_steps": 3, "eval_on_start": True}, [0, 3, 4]),
        ({"retain_data": True}, [0, 4]),
        ({"retain_data": True, "eval_data": None}, [0, 4]),
        ({"eval_generate": True, "eval_samples": 0, "eval_max_new_tokens": 2}, [4]),
    ],
)
def test_when_and_what_is_measured(config, held_out, other, options, steps):
    options = {"eval_data": held_out, **options}
    if "retain_data" in options:
        options["retain_data"] = other
    train(replace(config, max_steps=4, **options), progress=False)
    found = lines(config.output)
    assert [one["step"] for one in found] == steps
    wanted = {"step"} | ({"eval_loss", "eval_tokens"} if options["eval_data"] else set())
    wanted |= {"retain_loss", "retain_tokens", "forgetting"} if "retain_data" in options else set()
    if "eval_generate" in options:
        wanted |= {f"eval_{name}" for name in ("exact_match", "rouge1", "rouge2", "rougeL", "f1", "accuracy")}
    assert all(one.keys() == wanted for one in found)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prefix", "bitfit", "full"])
def test_the_best_is_kept_and_written_at_the_end_and_training_stops_when_it_gets_no_better(
    config, held_out, tmp_path, method
):
    """Here a greater loss is better: the first validation is the best, and each after it is worse."""
    if method == "bitfit":
        config = replace(config, model=tiny.save_model(tmp_path / "biased", attention_bias=True))
    options = {"greater_is_better": True, "load_best_model_at_end": True, "early_stopping_patience": 3}
    lr = {"full": 1e-3, "bitfit": 1e-2}.get(method, 3e-2)
    plain = {"r": 16, "lora_alpha": 32} if method not in ("lora", "dora", "full") else {}
    config = replace(config, method=method, lr=lr, lora_dropout=None, save_steps=50, max_steps=20, **plain)
    config = replace(config, eval_data=held_out, eval_steps=2, **options)
    result = train(config, progress=False)
    losses = {one["step"]: one["eval_loss"] for one in lines(config.output)}
    assert list(losses) == [2, 4, 6, 8] and max(losses, key=losses.__getitem__) == 2
    assert (result.steps, result.best_step, result.best_eval_loss) == (8, 2, losses[2])
    first, *_, last = lines(config.output)
    assert (result.validation, result.last_validation) == (first, last), "of the weights that are left"
    assert f"| eval_loss | {losses[2]:.4f} |" in (config.output / "README.md").read_text()
    assert result.stopped_early
    reason = f"eval_loss has not become higher in 3 validations: the best is {losses[2]:.6g}, of step 2"
    assert json.loads((config.output / "summary.json").read_text())["stop_reason"] == result.stop_reason == reason
    assert checkpoint.steps(config.output) == [2, 8]
    name = "model.safetensors" if method in ("bitfit", "full") else "adapter_model.safetensors"
    best, last = (load_file(checkpoint.folder(config.output, step) / name) for step in (2, 8))
    final = load_file(config.output / name)
    assert_same_bits(final, best)
    assert any(not torch.equal(value, last[key]) for key, value in final.items())


def test_a_step_that_is_not_the_best_keeps_no_checkpoint_and_the_last_is_written_unless_asked(config, held_out):
    options = {"eval_data": held_out, "eval_steps": 2, "greater_is_better": True, "save_steps": 4, "max_steps": 10}
    result = train(replace(config, save_total_limit=1, **options), progress=False)
    assert result.best_step == 2 and not result.stopped_early
    assert (result.validation, result.last_validation) == (lines(config.output)[-1], None)
    assert checkpoint.steps(config.output) == [10]
    assert_same_bits(adapter(config.output), adapter(checkpoint.folder(config.output, 10)))
    again = replace(config, overwrite=True, save_total_limit=3, **{**options, "save_steps": 2})
    train(again, progress=False)
    assert checkpoint.steps(config.output) == [2, 6, 8, 10]  # the best stays as long as it is there


def test_the_best_may_be_what_forgets_least_or_answers_best(measured, tmp_path):
    for name, metric in (("forgets", "forgetting"), ("answers", "f1")):
        config = replace(measured, output=tmp_path / name, metric_for_best_model=metric, load_best_model_at_end=True)
        result = train(config, progress=False)
        found, key = lines(config.output)[1:], "forgetting" if metric == "forgetting" else "eval_f1"
        value = (min if metric == "forgetting" else max)(one[key] for one in found)
        assert result.best_step == next(one["step"] for one in found if one[key] == value)
        assert_same_bits(adapter(config.output), adapter(checkpoint.folder(config.output, result.best_step)))


@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_the_best_and_the_end_are_those_of_transformers(tmp_path, greater, threshold):
    draw = random.Random(f"{greater} {threshold}")
    for _ in range(200):
        values = [round(draw.uniform(0, 1), 1) for _ in range(draw.randrange(1, 12))]
        patience = draw.randrange(1, 4)
        callback, state, control = EarlyStoppingCallback(patience, threshold), TrainerState(), TrainerControl()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), metric_for_best_model="x", greater_is_better=greater, eval_strategy="steps"
        )
        for step, value in enumerate(values, 1):
            callback.on_evaluate(arguments, state, control, {"eval_x": value})
            if state.best_metric is None or (value > state.best_metric if greater else value < state.best_metric):
                state.best_metric, state.best_global_step = value, step
            ours = judge(list(enumerate(values[:step], 1)), greater, threshold)
            assert (ours.best_step, ours.best) == (state.best_global_step, state.best_metric)
            assert (ours.stale >= patience) == control.should_training_stop
            if control.should_training_stop:
                break


def test_validation_takes_none_of_the_budget_for_packed_copies(measured, tmp_path, copies):
    """With room for a few copies, those that training makes first have them, whatever was measured before."""
    measured = replace(measured, lora_dropout=0.0, max_steps=4, pack_budget=40_000, eval_generate=False)
    train(measured, progress=False)
    assert any(copies)
    alone = unmeasured(measured, tmp_path / "alone")
    train(alone, progress=False)
    assert_same_bits(adapter(alone.output), adapter(measured.output))


@pytest.mark.parametrize("options", [{"share_prefix": True}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_training_is_left_as_it_was_with_other_options_too(measured, tmp_path, options):
    measured = replace(measured, max_steps=6, **options)
    result = train(measured, progress=False)
    alone = unmeasured(measured, tmp_path / "alone")
    without = train(alone, progress=False)
    assert_same_bits(adapter(alone.output), adapter(measured.output))
    assert without.implementations == result.implementations


def test_shares_of_processes_add_up_to_the_loss_of_one(base, held_out):
    model, tokenizer = load_model(str(base))
    rows = encode(read_examples(held_out), tokenizer, 64).rows
    whole = total_loss(model, tokenizer, rows, 3).item()
    for processes in (2, 3, 9):  # there are seven batches
        shares = [total_loss(model, tokenizer, rows, 3, process, processes).item() for process in range(processes)]
        assert sum(shares) == pytest.approx(whole, rel=1e-13)


@pytest.mark.parametrize("sharding", [[], ["--fsdp"]], ids=["whole", "sharded"])
def test_two_processes_measure_as_one(measured, tmp_path, sharding):
    """torchrun's. Before the first step nothing but the loss's last bits may differ. The greater loss is the best here: the first one."""
    measured = replace(measured, lora_dropout=0.0, max_steps=4, eval_steps=2, retain_data=None, eval_max_new_tokens=8)
    two, options = tmp_path / "two", ["--eval-generate", "--load-best-model-at-end", "--greater-is-better", *sharding]
    for name in ("model", "data", "r", "lora_alpha", "lr", "max_steps", "lora_dropout", "eval_data", "eval_steps"):
        options += [f"--{name.replace('_', '-')}", str(getattr(measured, name))]
    options += ["--eval-samples", "3", "--eval-max-new-tokens", "8", "--eval-batch-size", "3", "--batch-size", "4"]
    done = train_on_two_processes(*options, "--output", str(two))
    assert done.returncode == 0, done.stderr
    assert "20 rows of eval_data, every 2 steps" in done.stderr
    train(replace(measured, eval_batch_size=3), progress=False)
    ours, theirs = lines(measured.output), lines(two)
    # A sharded layer runs PEFT's own forward, which rounds otherwise.
    exact = 1e-6 if sharding else 1e-13
    assert ours[0].pop("eval_loss") == pytest.approx(theirs[0].pop("eval_loss"), rel=exact)
    assert ours[0] == theirs[0]
    assert lines(measured.output, "samples.jsonl")[:3] == lines(two, "samples.jsonl")[:3]
    assert len(lines(two, "samples.jsonl")) == 9
    assert_same_bits(adapter(two), adapter(checkpoint.folder(two, 2)))
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert (one["step"], one["eval_tokens"]) == (other["step"], other["eval_tokens"])
        assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-3)


def test_rows_that_are_trained_on_and_rows_that_are_cut_are_told(config, data, tmp_path, caplog):
    path = tmp_path / "eval.jsonl"
    long = {"prompt": "The cat runs. " * 40, "completion": " It runs."}
    fresh = {"prompt": "The cat runs. What?", "completion": " It runs."}
    path.write_text(data.read_text() + json.dumps(fresh) + "\n" + json.dumps(long) + "\n")
    config = replace(config, eval_data=path, max_length=64, truncation="drop", max_steps=1)
    with caplog.at_level(logging.WARNING, "fastlora"):
        train(config, progress=False)
    assert "eval_data: 48 of its 49 rows are also trained on" in caplog.text
    assert f"max_length=64: dropped 1 of 50 rows (the first: {path}:50)" in caplog.text


def test_rows_that_are_rehearsed_tell_of_no_forgetting(config, other, caplog):
    with caplog.at_level(logging.WARNING, "fastlora"):
        train(replace(config, rehearse=0.5, rehearse_data=other, retain_data=other, max_steps=1), progress=False)
    assert "retain_data: 9 of its 9 rows are also trained on: what is measured on those is memory" in caplog.text
    told = json.loads((config.output / "summary.json").read_text())["data"]
    assert {one["option"]: (one["file"], one["rows"]) for one in told} == {
        "data": (str(config.data), 48),
        "rehearse_data": (str(other), 9),
        "retain_data": (str(other), None),
    }


def test_the_banner_and_the_bar_tell_of_it(measured, capsys):
    train(replace(measured, max_steps=5))
    told = capsys.readouterr().err
    assert "20 rows of eval_data and 9 rows of retain_data, every 5 steps" in told
    assert f"eval_loss {lines(measured.output)[-1]['eval_loss']:.4f}" in told
    for steps, said in ((1, "rows of retain_data, every step\n"), (None, "rows of retain_data, at the end\n")):
        train(replace(measured, max_steps=1, eval_steps=steps, overwrite=True))
        assert said in capsys.readouterr().err


def test_what_is_not_finite_ends_the_run_by_name(config, held_out, monkeypatch):
    monkeypatch.setattr(validation, "total_loss", lambda *_: torch.tensor(float("nan"), dtype=torch.float64))
    with pytest.raises(TrainingError, match="step 2: eval_loss is nan; a lower lr may help"):
        train(replace(config, eval_data=held_out, eval_steps=2), progress=False)
    assert not (config.output / "validation.jsonl").exists()


WRONG = {
    "eval_steps without data": ({"eval_steps": 5}, "eval_steps=5: expected eval_data or retain_data as well"),
    "the best of nothing": ({"load_best_model_at_end": True}, "load_best_model_at_end=True: expected eval_data or"),
    "answers without prompts": (
        {"retain_data": "r", "eval_generate": True},
        "eval_generate=True: expected eval_data as well",
    ),
    "patience with one validation": (
        {"eval_data": "e", "early_stopping_patience": 2},
        "early_stopping_patience=2: expected eval_steps as well",
    ),
    "no patience": (
        {"eval_data": "e", "early_stopping_threshold": 0.1},
        "early_stopping_threshold=0.1: expected early_stopping_patience as well",
    ),
    "a score without answers": (
        {"eval_data": "e", "metric_for_best_model": "rouge1"},
        "metric_for_best_model='rouge1': expected one of eval_loss, and with eval_generate eval_exact_match",
    ),
    "a metric that is none": (
        {"eval_data": "e", "eval_generate": True, "metric_for_best_model": "bleu"},
        "metric_for_best_model='bleu': expected one of eval_loss, eval_exact_match, .*eval_accuracy$",
    ),
    "what is not measured": (
        {"eval_data": "e", "metric_for_best_model": "forgetting"},
        "metric_for_best_model='forgetting': expected one of eval_loss",
    ),
    "no name": ({"eval_data": ""}, "eval_data='' is empty"),
    "no source": ({"retain_data": []}, r"retain_data=\[\] is empty"),
    "samples below 0": ({"eval_data": "e", "eval_samples": -1}, "eval_samples=-1: expected 0 to"),
    "no step": ({"eval_data": "e", "eval_steps": 0}, "eval_steps=0: expected at least 1"),
    "no checkpoint": ({"save_total_limit": 0}, "save_total_limit=0: expected at least 1"),
    "a threshold that is none": (
        {"eval_data": "e", "eval_steps": 1, "early_stopping_patience": 1, "early_stopping_threshold": -1.0},
        "early_stopping_threshold=-1.0: expected a finite number, 0 or more",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_named_before_anything_is_read(case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainConfig(model="m", data="d", output="o", **options)


def test_rows_that_cannot_be_measured_are_named_before_anything_is_trained(config, held_out, other, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "The cat runs. It runs."}\n')
    with pytest.raises(ValueError, match="^eval_data: rows of plain text have no prompt to answer"):
        train(replace(config, eval_data=text, eval_samples=1), progress=False)
    with pytest.raises(ValueError, match="metric_for_best_model=eval_accuracy: eval_data's completions are no labels"):
        best = {"eval_generate": True, "metric_for_best_model": "eval_accuracy"}
        train(replace(config, eval_data=other, **best), progress=False)
    with pytest.raises(ValueError, match="max_new_tokens=256 leaves nothing to the prompt"):
        train(replace(config, eval_data=held_out, eval_samples=1, eval_max_new_tokens=256), progress=False)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "The cat runs. " * 400, "completion": " It runs."}) + "\n")
    with pytest.raises(ValueError, match="the longest row has 512 tokens and the model positions for 256"):
        train(replace(config, retain_data=long), progress=False)
    config.output.mkdir(exist_ok=True)
    inside = tiny.save_data(config.output / "validation.jsonl", 8)
    with pytest.raises(ValueError, match="^eval_data=.*: expected another place or name, training replaces this file"):
        train(replace(config, eval_data=inside, overwrite=True), progress=False)
    assert [path.name for path in config.output.iterdir()] == ["validation.jsonl"]
