"""`fastlora train` with packing, max_tokens and group_by_length: the same training, what it says of it, and the same bits after a stop."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from training import (  # noqa: F401  (fixtures)
    a_base,
    a_config,
    adapter,
    assert_same_bits,
    interrupt_at,
    numbers,
    on_cpu,
    one_thread,
    records,
    some_data,
)
from transformers import AutoModelForCausalLM, MambaConfig

from fastlora.config import TrainConfig
from fastlora.train import TrainingInterrupted, train


@pytest.mark.parametrize("accelerate", [True, False], ids=["ours", "transformers"])
def test_packed_training_is_the_training_without(config: TrainConfig, tmp_path: Path, accelerate: bool) -> None:
    config = replace(config, lora_dropout=0.0, epochs=1, accelerate=accelerate)
    plain = train(config, progress=False)
    packed = train(replace(config, output=tmp_path / "packed", packing=True, max_length=64), progress=False)
    by_tokens = train(replace(config, output=tmp_path / "tokens", max_tokens=50), progress=False)
    for one in (tmp_path / "packed", tmp_path / "tokens"):
        for theirs, ours in zip(numbers(config.output), numbers(one), strict=True):
            assert abs(theirs[1] - ours[1]) <= 1e-4 * theirs[1]
    assert packed.tokens == plain.tokens == by_tokens.tokens
    assert packed.packing_efficiency is not None and plain.packing_efficiency is by_tokens.packing_efficiency is None
    assert packed.packing_efficiency == 1  # a line is a batch, and nothing fills it up
    summary = json.loads((tmp_path / "packed" / "summary.json").read_text())
    assert summary["packing_efficiency"] == 1 and summary["config"]["packing"] is True


def test_what_fills_lines_up_is_told(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(config, epochs=1, batch_size=5, accelerate=False, packing=True, max_length=64, max_tokens=128)
    result = train(config)
    assert result.packing_efficiency is not None and 0.5 < result.packing_efficiency < 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("packed ")]
    assert "at most 12" in line and f"{100 * result.packing_efficiency:.3g} % of them rows'" in line


@pytest.mark.parametrize(
    "options", [{"packing": True, "max_length": 64}, {"max_tokens": 40}], ids=["packed", "by tokens"]
)
def test_a_stopped_run_resumes_to_the_same_bits(config: TrainConfig, tmp_path: Path, options: dict[str, Any]) -> None:
    """Dropout and all."""
    config = replace(config, lora_dropout=0.2, epochs=6, group_by_length=True, gradient_accumulation_steps=2, **options)
    stopped = replace(config, output=tmp_path / "stopped")
    thread = interrupt_at(stopped.output / "metrics.jsonl", 5)
    with pytest.raises(TrainingInterrupted):
        train(stopped, progress=False)
    thread.join()
    assert 5 <= len(records(stopped.output)) < 18
    again = train(replace(stopped, resume=True), progress=False)
    whole = train(config, progress=False)
    assert_same_bits(adapter(stopped.output), adapter(config.output))
    assert numbers(stopped.output) == numbers(config.output)
    assert again.packing_efficiency == whole.packing_efficiency
    with pytest.raises(ValueError, match="group_by_length=False: expected True as in"):
        train(replace(stopped, group_by_length=False, resume=True), progress=False)


def test_a_model_that_cannot_is_refused_before_it_trains(config: TrainConfig, base: Path, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    AutoModelForCausalLM.from_config(MambaConfig(**sizes)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    config = replace(config, model=tmp_path / "mamba", target_modules=["in_proj"], packing=True)
    with pytest.raises(ValueError, match="^packing=True: MambaForCausalLM cannot do it"):
        train(config, progress=False)
    assert not records(config.output)
