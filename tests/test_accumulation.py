"""A step cut into batches, however and on however many processes, has the loss and the gradients of the step as one batch, within the bound."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from step_gradients import assert_a_step_within_bound, draw, first_step
from torch import Tensor, nn
from training import a_base, on_cpu, one_thread  # noqa: F401  (fixtures)
from transformers import AutoModelForCausalLM

from fastlora.config import TrainConfig
from fastlora.course import Course
from fastlora.data.examples import read_examples
from fastlora.data.rows import collate, encode
from fastlora.language_model_loss import IGNORE
from fastlora.models import load_tokenizer

ROOT = Path(__file__).parent.parent
ROWS = 12  # a step's
CUTS: tuple[dict[str, Any], ...] = (
    {},
    {"max_tokens": 90},
    {"packing": True},
    {"packing": True, "max_tokens": 200},
    {"packing": True, "max_tokens": 40},
    {"packing": True, "group_by_length": True},
    {"accelerate": False},
    {"accelerate": False, "packing": True, "max_tokens": 200},
)
"""Beside four batches of three rows."""


@pytest.fixture(name="data", scope="module")
def some_uneven_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 8 to 60 tokens, of which 1 to some 30 have labels."""
    draw = random.Random(7)
    path = tmp_path_factory.mktemp("data") / "uneven.jsonl"
    rows = [
        {
            "prompt": " ".join(draw.choices(tiny.ANIMALS, k=draw.randint(1, 8))),
            "completion": " " + " ".join(draw.choices(tiny.ACTS, k=draw.choice((1, 2, 3, 5, 9)))),
        }
        for _ in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options_of(base: Path, data: Path, output: Path, processes: int, cut: dict[str, Any]) -> dict[str, Any]:
    return {
        **{"model": str(base), "data": str(data), "output": str(output), "max_length": 64, "dtype": "float32"},
        **{"r": 4, "lora_dropout": 0.0, "batch_size": 3, "gradient_accumulation_steps": ROWS // 3 // processes},
        **cut,
    }


def by_one_batch(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the same rows, padded, by PEFT and the model's own logits."""
    config = TrainConfig(**{**options, "gradient_accumulation_steps": ROWS // 3})
    tokenizer = load_tokenizer(str(config.model))
    rows = encode(read_examples(Path(config.data)), tokenizer, config.max_length).rows
    step = Course(config, rows, processes=1).step_rows(0)
    labelled = {row.labelled for row in step}
    assert len(step) == ROWS and len(labelled) > 3 and len({len(row.input_ids) for row in step}) > 6
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    draw(trained)
    model.to(dtype)
    batch = collate(step, 0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in trained.items() if p.grad is not None}}


def check(found: Sequence[dict[str, Tensor]], given: Sequence[dict[str, Any]]) -> None:
    for one, options in zip(found, given, strict=True):
        eager, exact = (by_one_batch(options, dtype) for dtype in (torch.float32, torch.float64))
        assert len(exact) == 1 + 2 * 14
        assert_a_step_within_bound(one, eager, exact)


def test_batches_of_one_process_make_the_step_of_one_batch(base: Path, data: Path, tmp_path: Path) -> None:
    given = [options_of(base, data, tmp_path / "out", 1, cut) for cut in CUTS]
    check([first_step(**options) for options in given], given)


def test_batches_of_two_processes_make_the_step_of_one_batch(base: Path, data: Path, tmp_path: Path) -> None:
    given = [options_of(base, data, tmp_path / "out", 2, cut) for cut in CUTS]
    (tmp_path / "options.json").write_text(json.dumps(given))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    script = Path(__file__).with_name("step_gradients.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    arguments = [str(script), str(tmp_path / "options.json"), str(tmp_path / "found.pt")]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(torch.load(tmp_path / "found.pt"), given)
