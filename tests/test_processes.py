"""Several gloo processes train as one does, whatever wraps their model, and end together."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import as_processes
import pytest
import tiny
import torch
from as_processes import ACCELERATED, OF_MANY, RUNS, SHARDED, STEPS, adapted, config, losses, plain_loop, results
from safetensors.torch import load_file
from training import assert_same_bits, on_cpu, one_thread  # noqa: F401  (fixtures)

import fastlora
from fastlora import processes
from fastlora.frozen import packed
from fastlora.peft.obstacles import IN_PIECES
from fastlora.train import train

WITHIN = 1e-5  # of a loss, relative: the order of sums


@pytest.fixture(name="folder", scope="module")
def a_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    tiny.save_model(folder / "base")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_processes.rows()))
    return folder


@pytest.fixture(name="two", scope="module")
def of_two_processes(folder: Path) -> list[dict[str, Any]]:
    """What each has found, after everything that two processes do."""
    done = as_processes.launch("all", folder, 2)
    assert done.returncode == 0, done.stderr
    return [results(folder, rank) for rank in range(2)]


@pytest.fixture(name="alone", scope="module")
def on_one_process(folder: Path) -> dict[str, list[float]]:
    """The losses of each run."""
    found = {}
    for name, more in {**RUNS, **SHARDED}.items():
        train(config(folder, name, **more), progress=False)
        found[name] = losses(folder / f"{name}-1")
    return found


def assert_close(found: list[float], expected: list[float], within: float = WITHIN) -> None:
    assert len(found) == len(expected) > 0
    assert all(abs(a - b) <= within * abs(b) for a, b in zip(found, expected, strict=True)), (found, expected)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(folder: Path, two: Any, alone: Any, name: str) -> None:
    assert len(alone[name]) == STEPS and alone[name][-1] < alone[name][0]
    assert_close(losses(folder / f"{name}-2"), alone[name])


def test_a_trainer_of_two_processes_trains_as_one(folder: Path, two: Any) -> None:
    assert_close(two[0]["trainer"]["losses"], as_processes.trainer_losses(folder, 1))


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_base_trains_as_a_whole_one(folder: Path, two: Any, alone: Any, name: str) -> None:
    assert_close(losses(folder / f"{name}-2"), alone[name])
    left = {kind for kind in two[0]["sharded"][name] if kind == "peft"}
    assert not left
    whole, ours = (load_file(folder / f"{name}-{count}" / "adapter_model.safetensors") for count in (1, 2))
    assert whole.keys() == ours.keys()
    assert all(value.shape == whole[key].shape for key, value in ours.items())


def test_four_processes_train_as_one(folder: Path, two: Any, alone: Any) -> None:
    done = as_processes.launch("trainings", folder, 4)
    assert done.returncode == 0, done.stderr
    for name in OF_MANY:
        assert_close(losses(folder / f"{name}-4"), alone[name])


def test_a_stop_of_one_stops_all_and_resumes_to_the_same_bits(folder: Path, two: Any) -> None:
    for one in two:
        assert one["interrupted"]["said"].startswith("TrainingInterrupted: stopped after step")
        assert 5 <= one["interrupted"]["steps"] < STEPS
    assert losses(folder / "stopped-2") == losses(folder / "lora-2")
    stopped, whole = (load_file(folder / name / "adapter_model.safetensors") for name in ("stopped-2", "lora-2"))
    assert_same_bits(stopped, whole)


def test_another_number_of_processes_is_no_resume(folder: Path, two: Any) -> None:
    again = config(folder, "stopped", 2, **RUNS["lora"])
    with pytest.raises(ValueError, match=r"was written with processes 2, expected the same, got 1"):
        train(replace(again, resume=True), progress=False)


def test_what_fails_on_one_ends_both_with_its_words(two: Any) -> None:
    first, second = (one["failures"] for one in two)
    assert first["exists"].startswith("FileExistsError: output=")
    assert second["exists"] == f"TrainingError: process 0 has ended this training: {first['exists'].partition(': ')[2]}"
    assert "none.jsonl" in second["data"] and "process 1 has ended this training" in first["data"]
    assert "step 2: the checkpoint cannot be written: File too large" in first["disk"]
    assert first["disk"].partition(": ")[2] in second["disk"] and "process 0" in second["disk"]
    assert first["nan"] == second["nan"] and "step 3: the loss is nan" in first["nan"]
    assert second["dies"] == "IndexError: a token that the model has not"
    assert first["dies"] == "TrainingError: another process of this training has ended, and has said why"


# ---- layers


@pytest.mark.parametrize("name", ["plain", "all"])
def test_accelerated_layers_under_fsdp2(two: Any, name: str) -> None:
    model = fastlora.accelerate(adapted(), **(ACCELERATED if name == "all" else {}))
    expected = plain_loop(model)
    assert_close(plain_loop(adapted()), expected)
    found = two[0]["layers"]
    assert_close(found[f"losses {name}"], expected)
    adapter = {key: value.flatten().tolist() for key, value in get_state(model).items()}
    assert adapter.keys() == found[f"adapter {name}"].keys()
    for key, value in adapter.items():
        torch.testing.assert_close(torch.tensor(found[f"adapter {name}"][key]), torch.tensor(value), atol=1e-4, rtol=0)
    for when in ("before", "told"):
        lines = found[f"{when} {name}"]
        linear = {key: line for key, line in lines.items() if "_proj" in key}
        assert len(linear) == 14
        assert all(how == "cpu" and "sharded between calls" in reason for how, reason in linear.values()), linear
    if name == "all":
        path, reason = next(line for key, line in found["told all"].items() if key.endswith("loss"))
        assert path == "fused", reason
    again = plain_loop(fastlora.restore(model), number=1)
    assert_close(found[f"restored {name}"], again)


def get_state(model: Any) -> Any:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def test_packed_copies_of_what_was_sharded_are_gone(two: Any) -> None:
    before, after = two[0]["layers"]["packed"]
    assert after == 0 and (before > 0) == packed.packs(torch.bfloat16)
    model = fastlora.accelerate(adapted(dtype=torch.bfloat16), **ACCELERATED)
    assert_close(two[0]["layers"]["whole bfloat16"], plain_loop(model, number=1), within=2e-2)
    assert_close(two[0]["layers"]["bfloat16"], plain_loop(model), within=2e-2)


@pytest.mark.parametrize("name", ["late", "tp", "fsdp"])
def test_weights_in_pieces_are_left_to_peft(two: Any, name: str) -> None:
    """Sharded before `accelerate` by fully_shard or by transformers, or tensor parallel as PEFT's DTensor LoRA has it."""
    found = two[0]["layers"]
    linear = [line for key, line in found[f"told {name}"].items() if key.endswith("_proj")]
    assert len(linear) == (14 if name == "late" else 6) and all(line == ["peft", IN_PIECES] for line in linear)
    if name == "late":
        assert_close(found["losses late"], plain_loop(adapted()))
    else:
        assert any(IN_PIECES in text for text in found[f"warned {name}"])
        assert_close(found[f"losses {name} True"], found[f"losses {name} False"])


# ---- what is refused


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"ACCELERATE_USE_DEEPSPEED=true: DeepSpeed keeps .*: expected DDP .*fsdp=True"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, r"ACCELERATE_USE_MEGATRON_LM=true: .*expected DDP"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"FSDP_VERSION: .* expected fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, r"fsdp=True: expected several processes .*, got one"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "false"}, r"WORLD_SIZE=2: .* each would train alone: .*ACCELERATE_USE_CPU=true for CPUs"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, r"FSDP_OFFLOAD_PARAMS=true: .* stays on its device: .*gradient_checkpointing=True"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, r"FSDP_ACTIVATION_CHECKPOINTING=true: expected gradient_checkpointing=True"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, r"ACCELERATE_MIXED_PRECISION=fp16: .* dtype=auto says: expected dtype=float16, or mixed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, r"ACCELERATE_MIXED_PRECISION=bf16: .* dtype=auto says: expected dtype=bfloat16, or mixed"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, r"ACCELERATE_MIXED_PRECISION=fp8: .* dtype=auto says: expected mixed precision no"),
    ],
)  # fmt: skip
def test_what_a_launcher_asks_for_and_cannot_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    output = folder / "refused"
    with pytest.raises(ValueError, match=message):
        train(replace(config(folder, "refused"), output=output), progress=False)
    assert not output.exists()


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "FSDP_OFFLOAD_PARAMS": "false"}, {}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"dtype": "bfloat16"}),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"dtype": "float16"}),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"gradient_checkpointing": True}),
    ],
)
def test_what_a_launcher_asks_for_and_the_options_say_as_well(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], options: dict[str, Any]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    given = config(folder, "asked", **options)
    assert processes.begin(given)[1] == given


def test_fsdp_takes_a_frozen_plain_base(folder: Path) -> None:
    with pytest.raises(ValueError, match="fsdp=True shards a frozen base: method=full trains it"):
        config(folder, "x", fsdp=True, method="full")
    with pytest.raises(ValueError, match="fsdp=True shards a frozen base: this one is quantised"):
        config(folder, "x", fsdp=True, load_in_4bit=True)


def test_a_weight_of_zero_3_is_left_to_peft() -> None:
    """DeepSpeed's parameters have no elements but while a hook of their own layer has gathered them."""
    model = adapted()
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    layer.base_layer.weight.data = torch.empty(0)
    layer.base_layer.weight.ds_id = 7
    fastlora.accelerate(model)
    line = next(one for one in fastlora.report(model) if one.name.endswith("layers.0.mlp.down_proj"))
    assert line.implementation == "peft" and line.reason == "the weight is [0]: DeepSpeed ZeRO-3 keeps it in pieces"


def test_one_process_alone_raises_what_it_met() -> None:
    class One:
        num_processes = 1

    alone: Any = One()
    with pytest.raises(KeyError, match="x"), processes.as_one(alone):
        raise KeyError("x")
    with processes.as_one(alone):
        pass
