"""Optimisers by transformers' names, LoRA+'s groups, a float16 loss's scale: each learns, resumes to the same bits, takes no state of another."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from training import (  # noqa: F401  (fixtures)
    a_base,
    a_config,
    adapter,
    assert_same_bits,
    on_cpu,
    one_thread,
    records,
    some_data,
)
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor
from transformers.training_args import OptimizerNames

from fastlora import checkpoint, optimisers
from fastlora.checkpoint import CheckpointError
from fastlora.config import TrainConfig
from fastlora.course import TrainingError
from fastlora.train import train

WAYS = {
    "adamw_torch": {"optim": "adamw_torch", "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
    "adamw_torch_fused": {"optim": "adamw_torch_fused", "weight_decay": 0.1},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd", "lr": 1.0},
    "loraplus": {"loraplus_lr_ratio": 16.0, "weight_decay": 0.1},
    "loraplus, adafactor": {"loraplus_lr_ratio": 4.0, "optim": "adafactor"},
    "schedule": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 2},
    "neftune": {"neftune_noise_alpha": 5.0},
    "float16": {"dtype": "float16"},
    "full, float16": {"method": "full", "r": 16, "lora_alpha": 32, "dtype": "float16", "lr": 1e-3},
    "full, adafactor": {"method": "full", "r": 16, "lora_alpha": 32, "optim": "adafactor", "lr": 1e-3},
}  # fmt: skip
TIMED = {"seconds", "tokens_per_second"}


def untimed(output: Path) -> list[dict]:
    return [{name: value for name, value in one.items() if name not in TIMED} for one in records(output)]


def weights(output: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = output.glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_learns_and_one_that_was_stopped_goes_on_to_the_same_bits(config, tmp_path, way):
    config = replace(config, max_steps=12, save_steps=5, **WAYS[way])
    result = train(config, progress=False)
    assert result.loss < result.first_loss
    again = replace(config, output=tmp_path / "again", resume=True)
    ignored = shutil.ignore_patterns("step-12", "*.safetensors")
    shutil.copytree(config.output, again.output, ignore=ignored)
    shutil.copytree(config.output / "checkpoints/step-10", again.output / "checkpoints/step-10", dirs_exist_ok=True)
    train(again, progress=False)
    assert_same_bits(weights(again.output), weights(config.output))
    assert untimed(again.output) == untimed(config.output)


def test_names_are_transformers_own_and_make_its_optimisers(config):
    assert set(optimisers.KINDS) <= {one.value for one in OptimizerNames}
    model = torch.nn.Linear(3, 2, bias=False)
    made = {
        name: optimisers.build(replace(config, optim=name, weight_decay=0.5), model, model.parameters())
        for name in optimisers.KINDS
    }
    kinds = {name: type(one) for name, one in made.items()}
    assert kinds == {
        "adamw_torch_fused": torch.optim.AdamW,
        "adamw_torch": torch.optim.AdamW,
        "adafactor": Adafactor,
        "sgd": torch.optim.SGD,
    }
    groups = {name: one.param_groups[0] for name, one in made.items()}
    assert all(group["lr"] == config.lr and group["weight_decay"] == 0.5 for group in groups.values())
    assert groups["adamw_torch_fused"]["fused"] and not groups["adamw_torch"]["fused"]
    assert not groups["adafactor"]["relative_step"] and not groups["adafactor"]["scale_parameter"]


def test_what_decays_is_what_decays_in_transformers_trainer(tmp_path):
    """Neither norms nor biases, in a model that is trained as a whole."""
    for sizes in ({}, {"attention_bias": True}):
        model = tiny.llama(**sizes)
        model.append = torch.nn.LayerNorm(4)
        trainer = Trainer(model, TrainingArguments(str(tmp_path), weight_decay=0.1, report_to="none", use_cpu=True))
        theirs = trainer.create_optimizer()
        config = TrainConfig(model="m", data="d", output="o", method="full", weight_decay=0.1)
        ours = optimisers.build(config, model, model.parameters())

        def decays(optimizer):
            return {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}

        assert decays(ours) == decays(theirs) and {*decays(ours).values()} == {0.0, 0.1}


def test_every_optimiser_keeps_what_its_line_says(config):
    trained = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,))]
    for name, kind in optimisers.KINDS.items():
        optimizer = optimisers.build(replace(config, optim=name), None, trained)
        sum(one.square().sum() for one in trained).backward()
        optimizer.step()
        kept = optimizer.state_dict()["state"]
        for index, weight in enumerate(trained):
            expected = {key: one.shape for key, one in kind.keeps(weight).items()}
            found = {
                key: tuple(value.shape) if isinstance(value, torch.Tensor) else None
                for key, value in kept.get(index, {}).items()
            }
            assert found == expected, name


def test_loraplus_gives_b_a_multiple_of_the_rate_of_a(config):
    config = replace(config, max_steps=4, loraplus_lr_ratio=16.0, lr_scheduler_type="linear", warmup_steps=2)
    train(config, progress=False)
    found = records(config.output)
    assert [one["learning_rate"] for one in found] == [config.lr * part for part in (0.5, 1, 1, 0.5)]
    assert all(one["learning_rates"] == [one["learning_rate"], 16 * one["learning_rate"]] for one in found)
    state = torch.load(config.output / "checkpoints/step-4/state.pt", weights_only=True)
    groups = [group for group in state["optimizer"]["param_groups"] if group["params"]]
    assert [len(group["params"]) for group in groups] == [14, 14]
    train(replace(config, output=config.output.parent / "plain", loraplus_lr_ratio=None), progress=False)
    assert "learning_rates" not in records(config.output.parent / "plain")[0]


def test_a_gradient_that_overflows_float16_is_computed_again_by_a_smaller_scale(config, monkeypatch):
    """Every step trains: the rows of one that overflows are not lost."""
    made = []

    def scaler(*given):
        made.append(torch.amp.GradScaler("cpu", init_scale=2.0**60))
        return made[0]

    monkeypatch.setattr(optimisers, "scaler", scaler)
    config = replace(config, max_steps=3, dtype="float16")
    train(config, progress=False)
    assert made[0].get_scale() < 2.0**40
    assert len(records(config.output)) == 3 and all(math.isfinite(one["grad_norm"]) for one in records(config.output))
    state = torch.load(config.output / "checkpoints/step-3/state.pt", weights_only=True)
    assert {one["step"].item() for one in state["optimizer"]["state"].values()} == {3.0}
    assert state["scaler"]["scale"] == made[0].get_scale()


def test_float16_is_close_to_float32_and_saves_what_was_asked_for(config, tmp_path):
    for method in ("lora", "full"):
        options = (
            {"method": method, "lora_dropout": 0.0}
            if method == "lora"
            else {"method": method, "r": 16, "lora_alpha": 32}
        )
        narrow = replace(config, **options, output=tmp_path / f"{method}16", dtype="float16", max_steps=4, lr=1e-3)
        wide = replace(narrow, output=tmp_path / f"{method}32", dtype="float32")
        results = [train(one, progress=False) for one in (narrow, wide)]
        for half, single in zip(records(narrow.output), records(wide.output), strict=True):
            assert abs(half["loss"] - single["loss"]) <= 1e-2 * single["loss"]
            assert abs(half["grad_norm"] - single["grad_norm"]) <= 5e-2 * single["grad_norm"]
        assert [one.dtype for one in results] == [{"lora": "float32", "full": "float16"}[method], "float32"]


def test_no_scale_mends_what_overflows_by_itself(config, monkeypatch):
    def infinite(self, rows):
        self.scaler.scale(torch.ones(()))
        for weight in self.trained.values():
            weight.grad = torch.full_like(weight, math.inf)
        return torch.tensor(1.0)

    monkeypatch.setattr("fastlora.train._Run._backward", infinite)
    with pytest.raises(TrainingError, match="step 1: the loss is 1.0 and the gradient's norm (inf|nan)"):
        train(replace(config, max_steps=3, dtype="float16"), progress=False)


def test_weights_that_are_trained_in_float16_are_refused():
    weight = {"w": torch.nn.Parameter(torch.ones(2, dtype=torch.float16))}
    with pytest.raises(ValueError, match="^dtype=float16: expected trained weights in float32, w is in float16"):
        optimisers.scaler(torch.device("cpu"), torch.float16, weight)
    assert not optimisers.scaler(torch.device("cpu"), torch.float32, weight).is_enabled()


@pytest.fixture(name="adafactor", scope="module")
def a_run_of_adafactor(base, data, tmp_path_factory) -> TrainConfig:
    """Three steps, in float16. Not to be changed: take a copy."""
    output = tmp_path_factory.mktemp("adafactor") / "out"
    config = TrainConfig(
        model=base, data=data, output=output, r=2, lr=1e-2, max_steps=3, optim="adafactor", dtype="float16"
    )
    train(config, progress=False)
    return config


def change(state: dict, path: str, value) -> None:
    *names, last = (int(name) if name.isdigit() else name for name in path.split("."))
    for name in names:
        state = state[name]
    if value is KeyError:
        del state[last]
    else:
        state[last] = value


HOSTILE = {
    "AdamW's": ("optimizer.state.0", {"step": torch.tensor(3.0)}, "lora_.*: expected step, RMS, exp_avg_sq_row, exp_avg_sq_col of a"),
    "no step": ("optimizer.state.0.step", torch.tensor(3.0), r"step of .*: expected a number from 1 to \d+, got tensor"),
    "a step of 0": ("optimizer.state.0.step", 0, "step of .*: expected a number from 1 to"),
    "a huge step": ("optimizer.state.0.step", 10**400, "step of .*: expected a number from 1 to"),
    "a number for a tensor": ("optimizer.state.0.RMS", 1, r"RMS of .*: expected numbers of shape \[\] from 0 on, got 1"),
    "another shape": ("optimizer.state.0.exp_avg_sq_row", torch.ones(7), "exp_avg_sq_row of .*lora_A"),
    "NaN": ("optimizer.state.0.exp_avg_sq_col", torch.full((32,), math.nan), "exp_avg_sq_col of .*from 0 on"),
    "below 0": ("optimizer.state.0.exp_avg_sq_col", torch.full((32,), -1.0), "exp_avg_sq_col of .*from 0 on"),
    "another eps": ("optimizer.param_groups.0.eps", (1.0, 1.0), "param_groups: expected Adafactor's of step 3"),
    "no scale": ("scaler.scale", KeyError, "scaler: expected the keys scale, growth_factor"),
    "a scale of 0": ("scaler.scale", 0.0, "scaler: scale=0.0: expected a number above 0"),
    "an infinite scale": ("scaler.scale", math.inf, "scaler: scale=inf: expected a number above 0"),
    "a scale beyond float32": ("scaler.scale", 1e39, "scaler: scale=1e\\+39: expected a number above 0 that float32 holds"),
    "a scale that is none": ("scaler.scale", "1", "scaler: scale='1': expected a number above 0"),
    "growth long ago": ("scaler._growth_tracker", 2000, "scaler: _growth_tracker=2000: expected steps since it grew"),
    "another factor": ("scaler.growth_factor", 1e30, "scaler: expected the factors of this run's"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_state_that_is_not_this_runs_names_file_and_key(adafactor, tmp_path, case):
    """Whoever wrote it: the manifest vouches for these files."""
    where, value, message = HOSTILE[case]
    again = replace(adafactor, output=tmp_path / "again", resume=True)
    shutil.copytree(adafactor.output, again.output)
    folder = again.output / "checkpoints" / "step-3"

    def forge(scratch: Path) -> None:
        shutil.copytree(folder, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        state = torch.load(scratch / "state.pt", weights_only=True)
        change(state, where, value)
        torch.save(state, scratch / "state.pt")

    checkpoint.save(again.output, 3, forge)
    with pytest.raises(CheckpointError, match=f"step-3/state.pt: .*{message}"):
        train(again, progress=False)


def test_another_optimiser_is_told_before_its_state_is_read(adafactor, tmp_path):
    shutil.copytree(adafactor.output, tmp_path / "again")
    again = replace(adafactor, output=tmp_path / "again", resume=True, optim="adamw_torch")
    with pytest.raises(ValueError, match="^optim='adamw_torch': expected 'adafactor' as in"):
        train(again, progress=False)
    content = json.loads((tmp_path / "again/checkpoints/step-3/training.json").read_text())
    assert content["config"]["optim"] == "adafactor"
