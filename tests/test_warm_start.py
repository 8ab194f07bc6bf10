"""`init_adapter`: a training that begins with an adapter's values, of every method whose files can be trained on, and goes on exactly."""

import json
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
    interrupt_at,
    numbers,
    on_cpu,
    one_thread,
    some_data,
)

from fastlora.config import TrainConfig
from fastlora.train import TrainingInterrupted, train

METHODS = {
    "lora": {
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "target_modules": ["down_proj", "q_proj"],
    },
    "dora": {"r": 2, "target_modules": ["v_proj"]},
    "ia3": {},
    "adapter": {"reduction_factor": 8, "is_parallel": True},
    "norm": {},
    "tokens": {"token_indices": [1, 7, 300]},
    "prompt": {"num_virtual_tokens": 3},
    "prefix": {"num_virtual_tokens": 3},
    "cartridge": {"num_virtual_tokens": 3},
}


@pytest.fixture(name="first", scope="module")
def first_runs(base, data, tmp_path_factory) -> dict[str, Path]:
    """An adapter of each method, after two steps."""
    folder = tmp_path_factory.mktemp("first")
    for method, given in METHODS.items():
        config = TrainConfig(
            model=base, data=data, output=folder / method, method=method, lr=1e-2, max_steps=2, **given
        )
        train(config, progress=False)
    return {method: folder / method for method in METHODS}


def second(config: TrainConfig, first: Path, method: str, **options) -> TrainConfig:
    same = {"r": 16, "lora_alpha": 32, "lora_dropout": None, "max_steps": 4}  # as nobody has said
    return replace(config, method=method, init_adapter=first, lr=1e-2, **same | options)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_begins_with_the_adapter_and_goes_on_exactly(config, first, tmp_path, method):
    copy = Path(shutil.copytree(first[method], tmp_path / "first"))
    begun = second(config, copy, method, save_steps=2)
    train(begun, progress=False)
    assert numbers(begun.output)[0][1] < numbers(first[method])[0][1], (
        "it does not begin as an adapter without values does"
    )
    own, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (begun.output, copy))
    differ = {
        name
        for name in own
        if own[name] != theirs[name] and sorted(map(str, own[name] or ())) != sorted(map(str, theirs[name] or ()))
    }
    assert differ <= {"prompt_tuning_init", "inference_mode"}
    found = json.loads((begun.output / "summary.json").read_text())["config"]
    assert {name: found[name] for name in METHODS[method]} == METHODS[method]

    # From step 2, without the folder that it began with.
    again = replace(begun, output=Path(shutil.copytree(begun.output, tmp_path / "again")), resume_from=2)
    shutil.rmtree(copy)
    train(again, progress=False)
    assert numbers(again.output) == numbers(begun.output)
    assert_same_bits(adapter(again.output), adapter(begun.output))


def test_a_step_at_no_rate_gives_the_adapter_back(config, first):
    kept = second(config, first["lora"], "lora", max_steps=1)
    train(replace(kept, lr=0.0), progress=False)
    assert_same_bits(adapter(kept.output), adapter(first["lora"]))


def test_method_peft_takes_any_of_them(config, first):
    train(second(config, first["ia3"], "peft", max_steps=1), progress=False)
    assert adapter(config.output).keys() == adapter(first["ia3"]).keys()


def test_an_interrupted_run_resumes_to_the_same_bits(config, first, tmp_path):
    begun = second(config, first["lora"], "lora", max_steps=20)
    stopped = replace(begun, output=tmp_path / "stopped")
    thread = interrupt_at(stopped.output / "metrics.jsonl", 5)
    with pytest.raises(TrainingInterrupted):
        train(stopped, progress=False)
    thread.join()
    train(replace(stopped, resume=True), progress=False)
    train(begun, progress=False)
    assert numbers(stopped.output) == numbers(begun.output)
    assert_same_bits(adapter(stopped.output), adapter(begun.output))


@pytest.mark.parametrize(
    ("of", "options", "message"),
    [
        ("lora", {"r": 8}, r"^r=8: init_adapter=.*lora has 3, expected that or none$"),
        ("lora", {"lora_alpha": 7}, r"^lora_alpha=7: init_adapter=.*lora has 5, expected"),
        ("lora", {"target_modules": ["q_proj"]}, r"^target_modules=\['q_proj'\]: .* has \['down_proj', 'q_proj'\]"),
        ("lora", {"method": "dora"}, r"^method=dora: init_adapter=.*lora needs method=lora$"),
        ("dora", {}, r"^method=lora: init_adapter=.*dora needs method=dora$"),
        (
            "prompt",
            {"method": "prompt", "prompt_tuning_init": "RANDOM"},
            "^prompt_tuning_init='RANDOM': .*its own values",
        ),
        ("tokens", {"method": "tokens", "token_indices": [4]}, r"^token_indices=\[4\]: .* has \[1, 7, 300\]"),
    ],
)
def test_an_option_that_says_otherwise_is_named(config, first, of, options, message):
    with pytest.raises(ValueError, match=message):
        train(second(config, first[of], **{"method": "lora", **options}), progress=False)
    assert not config.output.exists()


def test_what_the_adapter_says_in_the_place_of_what_nobody_said_is_told(config, first, capsys):
    train(second(config, first["lora"], "lora", max_steps=1))
    told = f"with {first['lora']}, whose r=3, lora_alpha=5, "
    assert told in capsys.readouterr().err


def test_the_adapters_own_values_may_be_said_too(config, first):
    train(
        second(config, first["lora"], "lora", r=3, target_modules=["down_proj", "q_proj"], max_steps=1), progress=False
    )


def test_a_folder_that_holds_none_is_told(config, first, base, tmp_path):
    for folder, error, message in (
        (tmp_path / "none", FileNotFoundError, "^init_adapter=.*none: there is no such folder"),
        (base, FileNotFoundError, "^init_adapter=.*: expected an adapter in PEFT's format"),
    ):
        with pytest.raises(error, match=message):
            train(second(config, folder, "lora"), progress=False)
    broken = Path(shutil.copytree(first["lora"], tmp_path / "broken"))
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="^init_adapter=.*broken: adapter_model.safetensors: no safetensors file"):
        train(second(config, broken, "lora"), progress=False)
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="^init_adapter=.*broken: adapter_config.json: peft_type: expected 'LORA'"):
        train(second(config, broken, "lora"), progress=False)


def test_a_prompts_encoder_is_in_no_file(config, base, data, tmp_path):
    made = TrainConfig(
        model=base, data=data, output=tmp_path / "made", method="ptuning", max_steps=1, num_virtual_tokens=3
    )
    train(made, progress=False)
    with pytest.raises(ValueError, match="^init_adapter=.*its encoder is not in the file"):
        train(second(config, tmp_path / "made", "ptuning"), progress=False)


@pytest.mark.parametrize(
    "options", [{"method": "full"}, {"method": "bitfit"}, {"method": "peft", "peft_config": "c.json"}]
)
def test_what_has_no_adapter_of_that_kind_takes_none(options):
    with pytest.raises(ValueError, match="^init_adapter=.*: expected none beside"):
        TrainConfig(model="m", data="d", output="o", init_adapter="a", **options)


def test_an_adapter_of_a_moved_base_names_the_new_one(config, first, base, tmp_path):
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    train(replace(second(config, first["lora"], "lora", max_steps=1), model=str(moved)), progress=False)
    assert json.loads((config.output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)
    assert all(torch.isfinite(value).all() for value in load_file(config.output / "adapter_model.safetensors").values())
