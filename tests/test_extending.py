"""A finished run goes on with more steps; under a constant rate to the bits of the run that was as long from the start."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
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
)

from fastlora import checkpoint
from fastlora.checkpoint import CheckpointError
from fastlora.optimisers import scheduler
from fastlora.train import train


def weights(output: Path, method: str) -> dict[str, torch.Tensor]:
    return load_file(output / ("model.safetensors" if method == "full" else "adapter_model.safetensors"))


@pytest.mark.parametrize("method", ["lora", "full", "prompt"])
def test_a_longer_run_under_a_constant_rate_is_the_same_bits(config, tmp_path, method):
    options = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": None,
        "method": method,
        "lr": 1e-3,
        "lr_scheduler_type": "constant",
    }
    long = replace(config, output=tmp_path / "long", epochs=2.5, **options)
    config = replace(config, epochs=1, **options)
    assert train(config, progress=False).steps == 6
    assert train(replace(config, epochs=1.5, resume=True), progress=False).steps == 9
    assert train(replace(config, max_steps=15, save_steps=4, resume=True), progress=False).steps == 15
    train(long, progress=False)
    assert numbers(config.output) == numbers(long.output)
    assert_same_bits(weights(config.output, method), weights(long.output, method))


@pytest.mark.parametrize("name", ["linear", "cosine", "inverse_sqrt", "constant_with_warmup"])
def test_from_the_checkpoint_on_the_schedule_is_the_longer_runs(config, name, capsys):
    config = replace(config, lr_scheduler_type=name, max_steps=6, warmup_ratio=0.4)
    train(config, progress=False)
    before = numbers(config.output)
    config = replace(config, max_steps=10, resume=True)
    train(config)
    told = capsys.readouterr().err
    assert re.search(
        rf"^extended +from 6 steps to 10, whose {name} schedule is followed from step 7 on$", told, re.MULTILINE
    )
    assert numbers(config.output)[:6] == before
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    longer = scheduler(config, optimizer, 10)
    expected = []
    for _ in range(10):
        expected.append(longer.get_last_lr()[0])
        optimizer.step()
        longer.step()
    assert [record["learning_rate"] for record in records(config.output)][6:] == expected[6:]
    train(replace(config, resume=False, resume_from=10), progress=False)
    assert "extended" not in capsys.readouterr().err


def test_an_extended_run_that_is_stopped_goes_on_to_the_same_bits(config, tmp_path):
    config = replace(config, max_steps=4, save_steps=2)
    train(config, progress=False)
    whole = replace(config, max_steps=8, resume=True)
    train(whole, progress=False)
    expected, bits = numbers(config.output), adapter(config.output)
    train(replace(whole, resume_from=6), progress=False)
    assert numbers(config.output) == expected
    assert_same_bits(adapter(config.output), bits)


def test_a_shorter_run_is_refused(config):
    config = replace(config, max_steps=6, save_steps=2)
    train(config, progress=False)
    with pytest.raises(ValueError, match=r"^max_steps=5: makes 5 steps, expected the 6 of .*step-6 or more$"):
        train(replace(config, max_steps=5, resume=True), progress=False)
    with pytest.raises(ValueError, match=r"^epochs=0.5: makes 3 steps, expected the 6 of .*step-4 or more$"):
        train(replace(config, max_steps=None, epochs=0.5, resume_from=4), progress=False)
    with pytest.raises(ValueError, match=r"^r=2: expected 4 as in "):
        train(replace(config, max_steps=9, r=2, resume=True), progress=False)


def test_a_state_of_another_schedule_is_told(config):
    """The checkpoint's own schedule is what its state is held against, not the longer run's."""
    config = replace(config, max_steps=4, save_steps=4)
    train(config, progress=False)
    folder = config.output / "checkpoints" / "step-4"

    def forge(scratch: Path) -> None:
        shutil.copytree(folder, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        state = torch.load(scratch / "state.pt", weights_only=True)
        state["scheduler"]["_last_lr"] = [1.0]
        torch.save(state, scratch / "state.pt")

    checkpoint.save(config.output, 4, forge)
    with pytest.raises(CheckpointError, match="scheduler: expected the state of step 4"):
        train(replace(config, max_steps=8, resume=True), progress=False)
