"""`fastlora train` with an encoder-decoder: a plain loop's losses, the same bits again, every method; what makes no sense is refused by name."""

import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import tiny
import torch
from accelerate import Accelerator
from bounds import assert_within_bound_over_inputs
from killed import Moment, killed_at
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from training import adapter, assert_same_bits, numbers, on_cpu, one_thread, records  # noqa: F401  (fixtures)
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

from fastlora import train as training
from fastlora.config import TrainConfig
from fastlora.course import Course
from fastlora.evaluation import evaluate
from fastlora.models import load_base, load_model
from fastlora.planning import plan
from fastlora.sweep import Sweep, sweep
from fastlora.train import train

KINDS = ["t5", "bart"]


@pytest.fixture(name="bases", scope="module")
def some_bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: encoder_decoders.save_model(folder / kind, kind, dropout=0.1) for kind in KINDS}


@pytest.fixture(name="data", scope="module")
def some_data(tmp_path_factory) -> Path:
    """Rows of many lengths."""
    rows = [{**row, "prompt": row["prompt"] * (1 + i % 3)} for i, row in enumerate(tiny.rows(40))]
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(name="held_out", scope="module")
def some_held_out(tmp_path_factory) -> Path:
    return tiny.save_data(tmp_path_factory.mktemp("held_out") / "eval.jsonl", 7, seed=1)


@pytest.fixture(name="config")
def a_config(bases, data, tmp_path) -> TrainConfig:
    return TrainConfig(model=bases["t5"], data=data, output=tmp_path / "out", r=4, lora_alpha=8, lr=1e-2, max_steps=4)


def plain_losses(config: TrainConfig, dtype: torch.dtype, exact: bool, first: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of transformers and PEFT alone, on the same batches, which the tokenizer makes; exact: in float64, from the same values."""
    base = AutoModelForSeq2SeqLM.from_pretrained(config.model, dtype=dtype)
    words = AutoTokenizer.from_pretrained(config.model)
    given = {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": 0.0, "target_modules": "all-linear"}
    model: Any = get_peft_model(base, LoraConfig(task_type="SEQ_2_SEQ_LM", **given))
    set_peft_model_state_dict(model, first)
    model = (model.double() if exact else model).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=config.lr)
    data = training.training_data.read(config, words)
    examples = {id(row): example for row, example in zip(data.rows, data.examples, strict=True)}
    course, losses = Course(config, data.rows, 1), []
    for step in range(config.max_steps or 0):
        rows = [examples[id(row)] for row in course.step_rows(step)]
        batch = words([row.prompt for row in rows], padding=True, return_tensors="pt")
        targets = words(text_target=[row.completion for row in rows], padding=True, return_tensors="pt")
        labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64 if exact else torch.float32)


@pytest.mark.parametrize(("kind", "dtype"), [("t5", "float32"), ("bart", "float32"), ("t5", "bfloat16")])
def test_the_losses_are_those_of_a_plain_loop(kind, dtype, data, tmp_path):
    """In float32 within the bound; in bfloat16 the plain loop's loss is rounded itself, ours is not."""
    base = encoder_decoders.save_model(tmp_path / "base", kind)
    seeds = itertools.count()

    def compute():
        seed = next(seeds)
        config = TrainConfig(
            **{"model": base, "data": data, "output": tmp_path / f"out{seed}", "r": 4, "lora_alpha": 8, "seed": seed},
            **{"lora_dropout": 0.0, "dtype": dtype, "lr": 0.3, "lr_scheduler_type": "constant", "warmup_steps": 0},
            **{"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 4},
        )
        run = training.begin(config, Accelerator(cpu=True), load_base)
        first = {name: value.clone() for name, value in get_peft_model_state_dict(run.model).items()}
        train(config, progress=False)
        ours = torch.tensor([record["loss"] for record in records(config.output)])
        assert ours[-1] < ours[0] - 0.1
        stored = getattr(torch, dtype)
        eager, exact = (plain_losses(config, stored, wide, first) for wide in (False, True))
        return {f"losses of {kind} in {dtype}": (ours, eager, exact)}

    assert_within_bound_over_inputs(compute, inputs=3)


@pytest.fixture(name="given", scope="module")
def a_run_with_all(bases, data, held_out, tmp_path_factory) -> TrainConfig:
    """A mixture, rehearsal, batches by tokens, dropout, validation with answers, forgetting, the best step: 6 steps, checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    other = tiny.save_data(folder / "other.jsonl", 12, seed=2)
    return TrainConfig(
        **{"model": bases["t5"], "data": [str(data), str(other)], "output": folder / "out", "r": 2, "lr": 0.03},
        **{"rehearse": 0.25, "rehearse_data": tiny.save_data(folder / "kept.jsonl", 6, seed=3), "max_tokens": 90},
        **{"lora_dropout": 0.2, "max_steps": 6, "save_steps": 3, "eval_data": held_out, "eval_steps": 2},
        **{"retain_data": tiny.save_data(folder / "retain.jsonl", 5, seed=4), "eval_generate": True},
        **{"eval_max_new_tokens": 6, "load_best_model_at_end": True},
    )


@pytest.fixture(name="finished", scope="module")
def a_finished_run(given) -> Path:
    train(given, progress=False)
    return given.output


MOMENTS = {
    "in a validation": Moment("validation.answer", 3),
    "between its lines": Moment("metrics.add", 9, after=True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_resumes_to_the_same_bits(given, finished, tmp_path, moment):
    again = replace(given, output=tmp_path / "killed")
    killed_at(again, MOMENTS[moment])
    train(replace(again, resume=True), progress=False)
    assert_same_bits(adapter(again.output), adapter(finished))
    assert numbers(again.output) == numbers(finished)
    for name in ("validation.jsonl", "samples.jsonl"):
        assert (again.output / name).read_bytes() == (finished / name).read_bytes(), name


def test_the_records_tell_tasks_forgetting_and_tokens_of_both_sides(given, finished):
    run = training.begin(given, Accelerator(cpu=True), load_base)
    total = 0
    for step, record in enumerate(records(finished)):
        rows = run.course.step_rows(step)
        total += sum(len(row.input_ids) + len(row.labels) for row in rows)
        assert record["tokens"] == total
        assert set(record["tasks"]) <= {"train", "other", "rehearsal"} and len(record["tasks"]) >= 2
        assert sum(task["rows"] for task in record["tasks"].values()) == len(rows)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["tokens"] == total and summary["loss"] < summary["first_loss"] and summary["loss_path"] == "fused"
    assert {"eval_loss", "eval_exact_match", "eval_rouge1", "retain_loss", "forgetting"} <= summary["validation"].keys()
    card = (finished / "README.md").read_text()
    assert "pipeline_tag: text2text-generation" in card and "AutoPeftModelForSeq2SeqLM.from_pretrained" in card
    assert (finished / "report.html").stat().st_size > 10_000


def test_what_a_validation_has_found_eval_finds_again(finished, held_out):
    best = json.loads((finished / "summary.json").read_text())["best_step"]
    lines = [json.loads(line) for line in (finished / "validation.jsonl").read_text().splitlines()]
    (kept,) = [one for one in lines if one["step"] == best]
    found = evaluate(*load_model(None, {"default": finished}), held_out, max_new_tokens=6)
    for name in ("loss", "exact_match", "f1", "rouge1", "rougeL"):
        assert getattr(found, name) == pytest.approx(kept[f"eval_{name}"], rel=1e-6), name


@pytest.mark.parametrize(
    "method", ["lora", "dora", "prompt", "prefix", "ptuning", "cartridge", "ia3", "adapter", "norm"]
)
def test_a_method_of_pefts_trains_and_its_file_gives_the_same_loss(config, held_out, method):
    assert_trains(config, held_out, method)


@pytest.mark.parametrize(("kind", "method"), [("bart", "lora"), ("bart", "bitfit"), ("t5", "full"), ("t5", "tokens")])
def test_a_part_or_the_whole_of_a_model_trains(bases, config, held_out, kind, method):
    assert_trains(replace(config, model=bases[kind]), held_out, method)


def assert_trains(config: TrainConfig, held_out: Path, method: str) -> None:
    more: dict[str, Any] = {"token_indices": list(range(20, 60))} if method == "tokens" else {}
    more |= {"eval_data": held_out, "eval_on_start": True}
    config = replace(config, method=method, r=16, lora_alpha=32, lr=None, lora_dropout=None, **more)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*of which PEFT uses")  # of a prompt every row is trained
        train(replace(config, lr=10 * (config.lr or 0)), progress=False)
    before, after = (json.loads(line) for line in (config.output / "validation.jsonl").read_text().splitlines())
    assert after["eval_loss"] < before["eval_loss"]
    whole = method in ("full", "bitfit")
    path, adapters = (str(config.output), {}) if whole else (str(config.model), {"default": config.output})
    found = evaluate(*load_model(path, adapters), held_out, generations=False)
    assert found.loss == pytest.approx(after["eval_loss"], rel=1e-5)


def test_float16_checkpointing_and_a_warm_start(bases, config, tmp_path):
    train(replace(config, dtype="bfloat16", gradient_checkpointing=True), progress=False)
    more = {"output": tmp_path / "again", "init_adapter": config.output, "dtype": "float16"}
    train(replace(config, **more), progress=False)
    assert records(tmp_path / "again")[0]["loss"] < records(config.output)[0]["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"packing": True},
            "packing=True: expected False: .*t5 is an encoder-decoder, its two sides cannot lie in one line",
        ),
        ({"share_prefix": True}, "share_prefix=True: expected False: .* is an encoder-decoder"),
        ({"train_on_turns": "all"}, "train_on_turns=all: expected auto: .* has no chat template"),
        ({"completion_only_loss": False}, "completion_only_loss=False: expected True: .* its prompt is the encoder's"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0: expected None: .* get no noise"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name_before_anything_is_read(config, options, message):
    config = replace(config, data="nowhere.jsonl", **options)
    for begin in (lambda: train(config, progress=False), lambda: plan(config)):
        with pytest.raises(ValueError, match=message):
            begin()
    assert not config.output.exists() or not list(config.output.glob("*.json*"))


def test_a_sweep_and_a_server_take_decoders(bases, data, held_out, tmp_path):
    from fastlora.serving.server import load_engine

    given = {"data": data, "eval_data": held_out, "output": tmp_path / "out", "r": [2]}
    with pytest.raises(ValueError, match="t5: expected a decoder, got an encoder-decoder, which a sweep does not take"):
        sweep(Sweep(model=bases["t5"], **given))
    with pytest.raises(ValueError, match="t5: expected a decoder, got an encoder-decoder, which serve does not take"):
        load_engine(str(bases["t5"]))


def test_a_model_that_does_not_say_what_its_decoder_begins_with_is_refused(config, tmp_path):
    words = encoder_decoders.tokenizer("t5")
    model = encoder_decoders.model("t5", words)
    settings = model.config.to_dict()
    del settings["decoder_start_token_id"]
    unsaid = T5ForConditionalGeneration(type(model.config)(**settings))
    for part in (unsaid, words):
        part.save_pretrained(tmp_path / "unsaid")
    with pytest.raises(ValueError, match=r"unsaid: config\.json: decoder_start_token_id: expected the token"):
        train(replace(config, model=tmp_path / "unsaid"), progress=False)


def test_a_side_has_as_many_positions_as_the_model(bases, config, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a", "completion": "cat dog " * 60}) + "\n")
    with pytest.raises(ValueError, match=r"max_length: the longest row has \d+ tokens and the model positions for 64"):
        train(replace(config, model=bases["bart"], data=tmp_path / "long.jsonl"), progress=False)


def test_a_dry_run_shows_what_the_encoder_reads_and_what_the_decoder_is_to_write(config):
    found = plan(config)
    first = json.loads(Path(str(config.data)).read_text().splitlines()[0])
    assert found.samples[0].text == f"encoder: {first['prompt']}</s>\ndecoder: [[{first['completion'].strip()}</s>]]"
    assert found.samples[0].counted < found.samples[0].tokens and found.samples[0].text in str(found)
    assert not config.output.exists()
