"""A plan's memory: what runs at once of a packed batch, what each optimiser keeps, what a validation takes, and in which dtype."""

import functools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from training import a_base, a_config, on_cpu, one_thread, some_data  # noqa: F401  (fixtures)

from fastlora import models, optimisers, planning, trainable
from fastlora.config import TrainConfig
from fastlora.course import Course
from fastlora.data.lines import lay
from fastlora.data.rows import Row, count_tokens
from fastlora.planning import plan
from fastlora.train import train

CPU = torch.device("cpu")
LENGTHS = (9, 4, 7, 1, 5)
ROWS = [Row([1] * length, [1] * length) for length in LENGTHS]


def built(config: TrainConfig, dtype: torch.dtype = torch.float32) -> Any:
    return trainable.build(config, dtype, CPU, None, models.empty_base).train()


def test_padding_counts_where_it_runs(config: TrainConfig, tmp_path: Path) -> None:
    """Not by fastlora's attention; by the model's own where there is no other, where it drops, and where fastlora is not asked."""
    config = replace(config, batch_size=len(ROWS), max_length=16)
    other = replace(config, model=str(tmp_path / "gpt2"))
    tiny.gpt2().save_pretrained(other.model)
    dropping = replace(config, model=tiny.save_model(tmp_path / "dropping", attention_dropout=0.1))
    plain = replace(config, accelerate=False)
    for one, tokens in ((config, sum(LENGTHS)), (other, 45), (dropping, 45), (plain, 45)):
        model = built(one)
        assert planning.leaves_padding(one, model) is (one is config)
        assert planning.largest_batch(one, model, Course(one, ROWS, 1)) == [tokens]
        packed = replace(one, packing=True, max_tokens=32)
        (batch,) = Course(packed, ROWS, 1).batches(ROWS, 0)
        lines = [count_tokens(line) for line in lay(batch, 16)]
        laid = sum(LENGTHS) if one is config else max(lines) * len(lines)
        assert planning.largest_batch(packed, model, Course(packed, ROWS, 1)) == [laid]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("optim", list(optimisers.KINDS))
def test_what_an_optimiser_keeps(config: TrainConfig, optim: str, method: str) -> None:
    options: dict[str, Any] = {} if method == "lora" else {"r": 16, "lora_alpha": 32}
    config = replace(config, optim=optim, method=method, lora_dropout=None, **options)
    model = built(config)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimiser = optimisers.build(config, model, trained)
    for one in trained:
        one.grad = torch.ones_like(one)
    optimiser.step()
    values = [value for kept in optimiser.state.values() for value in kept.values() if isinstance(value, torch.Tensor)]
    kept = sum(value.nbytes for value in values if value.dim())
    found = planning.kept_by_optimiser(config, model)
    assert found == kept  # but for numbers alone, as the step's
    assert planning.needed_memory(config, model, 1)["optimiser"] == found
    steps = planning.needed_disk(config, model, 2) - planning.needed_disk(config, model, 1)
    one_more = planning.needed_disk(replace(config, save_total_limit=3), model, 1) - planning.needed_disk(
        config, model, 1
    )
    saved = sum(one.nbytes for one in (model.parameters() if method == "full" else trained))
    assert steps == planning.LINE and one_more == saved + found


def measured_on(rows: list[Row], prompts: list[list[int]]) -> Any:
    held_out = SimpleNamespace(rows=rows) if rows else None
    return SimpleNamespace(held_out=held_out, retained=None, prompts=prompts)


def test_a_validation_takes_a_block_at_a_time_and_the_keys_and_values_of_answers(config: TrainConfig) -> None:
    config = replace(config, eval_batch_size=3, eval_max_new_tokens=100)
    model = built(config)
    needed, of_token = functools.partial(planning.needed_validation, config, model), planning._of_token(config, model)
    assert needed(measured_on([], [])) == 0
    assert needed(measured_on(ROWS, [])) == int(
        16 * of_token + planning._of_logits()
    )  # by length: 1, 4 and 5, then 7 and 9
    of_cached = 2 * (2 * 8) * 4 * 2  # keys and values, two heads of eight numbers, float32, two blocks
    assert needed(measured_on([], [[1] * 5] * 4)) == int(3 * 5 * of_token + 3 * 105 * of_cached)
    plain = replace(config, accelerate=False)
    found = planning.needed_validation(plain, built(plain), measured_on(ROWS, []))
    assert found > needed(measured_on(ROWS, []))  # with padding, and more kept of each token


def test_what_a_validation_takes_beyond_a_step_is_told(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, eval_data=config.data)
    found = plan(config).memory
    assert found["validation"] == 0 and list(found)[-2:] == ["validation", "process"]
    monkeypatch.setattr(planning, "needed_validation", lambda *_: found["gradients"] + found["activations"] + 1000)
    assert plan(config).memory["validation"] == 1000


def test_a_dtypes_numbers(config: TrainConfig) -> None:
    """A float16 weight's packed copy is float32; a whole model computes in what it was asked for."""
    half, brain = (replace(config, dtype=name) for name in ("float16", "bfloat16"))
    models_of = {one.dtype: built(one, models.DTYPES[one.dtype]) for one in (half, brain)}
    needed = {
        name: planning.needed_memory(replace(config, dtype=name), model, 1000) for name, model in models_of.items()
    }
    if planning.packed.packs(torch.bfloat16):
        assert needed["float16"]["packed copies"] == 2 * needed["bfloat16"]["packed copies"] > 0
    assert needed["float16"]["activations"] == needed["bfloat16"]["activations"]
    whole = replace(config, method="full", r=16, lora_alpha=32, lora_dropout=None)
    model = built(whole)
    activations = {
        name: planning.needed_memory(replace(whole, dtype=name), model, 10**5)["activations"]
        for name in ("auto", "float32", "bfloat16", "float16")
    }
    assert activations["auto"] == activations["float32"] > 1.8 * activations["bfloat16"]
    assert activations["bfloat16"] == activations["float16"] and math.isfinite(activations["auto"])


def test_the_plan_of_packed_rows_is_that_of_the_run(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(config, epochs=1, packing=True, max_length=64, max_tokens=128)
    found = plan(config)
    train(config)
    assert found.told["packed"] in capsys.readouterr().err
