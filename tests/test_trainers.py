"""transformers' Trainer and TRL's SFTTrainer train an accelerated PEFT model as they train an unaccelerated one."""

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


def peft_model(base: Path, accelerated: bool) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    return fastlora.accelerate(model) if accelerated else model


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


def assert_same_training(plain: Any, accelerated: Any) -> None:
    expected, got = losses(plain), losses(accelerated)
    layers = fastlora.report(accelerated.model)
    assert layers and all(layer.implementation != "peft" for layer in layers)
    assert len(got) == STEPS and expected[-1] < expected[0]
    # The same numbers but for the order of the sums, which eight steps of Adam amplify.
    assert all(abs(a - b) <= 1e-3 * b for a, b in zip(got, expected, strict=True)), (got, expected)


def test_transformers_trainer(base, data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = encode(read_examples(data), tokenizer, 64).rows

    def trainer(accelerated: bool) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(accelerated)), remove_unused_columns=False, **OPTIONS
        )
        model = peft_model(base, accelerated)
        return Trainer(
            model, arguments, data_collator=lambda batch: collate(batch, tokenizer.pad_token_id), train_dataset=rows
        )

    assert_same_training(trainer(False), trainer(True))


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_trl_sft_trainer(base, data, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in data.read_text().splitlines()]

    def trainer(accelerated: bool) -> SFTTrainer:
        arguments = SFTConfig(output_dir=str(tmp_path / str(accelerated)), max_length=64, bf16=False, **OPTIONS)
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = peft_model(base, accelerated)
        return SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    assert_same_training(trainer(False), trainer(True))
