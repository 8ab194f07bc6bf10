"""transformers' Trainer and TRL's SFTTrainer train an accelerated model as they train an unaccelerated one."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import fastlora
from fastlora.data.examples import read_examples
from fastlora.data.rows import collate, encode

STEPS = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.save_data(tmp_path_factory.mktemp("data") / "train.jsonl", 32)


def a_model(base: Path, full: bool, how: dict[str, bool] | None) -> Any:
    """how: the options of `accelerate`; None: as transformers and PEFT made it."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if full else get_peft_model(model, config)
    return model if how is None else fastlora.accelerate(model, **how)


def alike() -> list[dict[str, str]]:
    """Rows that begin with the same eight tokens and more."""
    begin = "The horse runs. The dog sleeps. The cat sings."
    return [{**row, "prompt": f"{begin} {row['prompt']}"} for row in tiny.rows(32)]


OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "seed": 0,
    "disable_tqdm": True,
    "use_cpu": True,
}


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_training(plain: Any, accelerated: Any, tolerance: float = 1e-3) -> None:
    expected, got = losses(plain), losses(accelerated)
    layers = fastlora.report(accelerated.model)
    assert layers and all(layer.implementation != "peft" for layer in layers)
    assert len(got) == STEPS and expected[-1] < expected[0]
    # The same numbers but for the order of the sums, which eight steps of Adam amplify.
    assert all(abs(a - b) <= tolerance * b for a, b in zip(got, expected, strict=True)), (got, expected)


def accuracy(predictions: Any) -> dict[str, float]:
    counted = predictions.label_ids[:, 1:] != -100
    right = predictions.predictions.argmax(-1)[:, :-1] == predictions.label_ids[:, 1:]
    return {"accuracy": float(right[counted].mean())}


LOSS = {"loss": True}
BLOCKS = {"frozen": True, "loss": True, "fuse": True}
SHARED = {"share_prefix": True, **BLOCKS}
BATCHES = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}


@pytest.mark.parametrize(
    ("how", "full", "path", "options"),
    [
        pytest.param({}, False, None, {}, id="layers"),
        pytest.param(LOSS, False, "fused", {}, id="loss"),
        pytest.param(LOSS, True, "fused", BATCHES, id="full-in-small-batches"),
        pytest.param(LOSS, False, "fused", {"bf16": True, **BATCHES}, id="autocast"),
        pytest.param(LOSS, False, "fused", {"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param(BLOCKS, False, "fused", {}, id="blocks"),
        pytest.param(BLOCKS, True, "fused", BATCHES, id="blocks-full-in-small-batches"),
        pytest.param(
            BLOCKS, False, "fused", {"gradient_checkpointing": True, "bf16": True}, id="blocks-checkpointing-autocast"
        ),
        pytest.param(LOSS, False, "all", {"label_smoothing_factor": 0.1}, id="smoothing"),
        pytest.param(SHARED, False, "fused", {}, id="shared"),
    ],
)
def test_transformers_trainer(base, data, tmp_path, how, full, path, options):
    """An evaluation's metrics read logits; without metrics, it has its loss alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    if how is SHARED:
        data = tmp_path / "alike.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in alike()))
    rows = encode(read_examples(data), tokenizer, 64).rows
    tolerance = 0.02 if options.get("bf16") else 1e-3

    def trainer(how: dict[str, bool] | None) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(how)), remove_unused_columns=False, **{**OPTIONS, **options}
        )
        return Trainer(
            a_model(base, full, how),
            arguments,
            data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
            train_dataset=rows,
            eval_dataset=rows[:8],
            compute_metrics=accuracy,
        )

    plain, ours = trainer(None), trainer(how)
    assert_same_training(plain, ours, tolerance)
    shared = [line.implementation for line in fastlora.report(ours.model) if line.name.endswith("share_prefix")]
    assert shared == ["tree"] * (how is SHARED)
    if path is not None:
        assert [line.implementation for line in fastlora.report(ours.model) if line.name.endswith("loss")] == [path]
    for _ in range(2):
        expected, got = plain.evaluate(), ours.evaluate()
        assert abs(got["eval_loss"] - expected["eval_loss"]) <= 10 * tolerance * expected["eval_loss"]
        assert abs(got.get("eval_accuracy", 0) - expected.get("eval_accuracy", 0)) <= 0.1
        plain.compute_metrics = ours.compute_metrics = None


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("how", [{}, LOSS, BLOCKS, SHARED], ids=["layers", "loss", "blocks", "shared"])
def test_trl_sft_trainer(base, data, tmp_path, how):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["prompt"] = (
            f"The horse runs. The dog sleeps. The cat sings. {row['prompt']}"  # 8 tokens or more that all begin with
        )

    def trainer(how: dict[str, bool] | None) -> SFTTrainer:
        arguments = SFTConfig(output_dir=str(tmp_path / str(how)), max_length=64, bf16=False, **OPTIONS)
        dataset, tokenizer = Dataset.from_list(rows), AutoTokenizer.from_pretrained(base)
        return SFTTrainer(a_model(base, False, how), arguments, train_dataset=dataset, processing_class=tokenizer)

    ours = trainer(how)
    assert_same_training(trainer(None), ours)
    shared = [line for line in fastlora.report(ours.model) if "share_prefix" in line.name]
    # TRL puts a forward of its own before the model's, with its own loss, and asks the model below the head for hidden states.
    assert [line.implementation for line in shared] == (["apart", "tree"] if how is SHARED else [])
