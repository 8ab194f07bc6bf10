"""Every method of `fastlora train`: it learns, goes on to the same bits, and leaves what plain PEFT or transformers loads."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from training import assert_same_bits
from transformers import AutoModelForCausalLM

from fastlora import adapters, checkpoint, trainable
from fastlora.adapters import AdapterError
from fastlora.checkpoint import CheckpointError
from fastlora.config import InitLoraWeights, Method, TrainConfig
from fastlora.evaluation import evaluate
from fastlora.generation import generate
from fastlora.models import load_model, positions
from fastlora.train import train

METHODS: dict[str, dict[str, Any]] = {
    "dora": {"r": 4},
    "prompt": {"num_virtual_tokens": 5},
    "prefix": {"num_virtual_tokens": 3},
    "prefix, projected": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 12},
    "ptuning": {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "cartridge": {"num_virtual_tokens": 4},
    "ia3": {},
    "adapter": {"reduction_factor": 4},
    "adapter, parallel": {"is_parallel": True, "reduction_factor": 2, "non_linearity": "relu", "scaling": 2.0},
    "norm": {},
    "tokens": {"token_indices": list(range(3, 300))},
}
LR = {"ptuning": 5e-2, "prefix, projected": 2e-2, "tokens": 1e-2}


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> Iterator[None]:
    with tiny.on_cpu():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("base"))


def make(base: Path, output: Path, method: str, **options: Any) -> TrainConfig:
    data = output.parent / "rows.jsonl"
    rows = [{"prompt": f"The {animal}", "completion": f" {act}"} for animal in tiny.ANIMALS for act in tiny.ACTS[:2]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "batch_size": 4, "lr_scheduler_type": "constant"}
    given |= {"lr": LR.get(method, 1e-2)} | METHODS.get(method, {}) | options
    return TrainConfig(model=base, data=data, output=output, method=method.partition(",")[0], **given)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_resumes_and_is_loaded_by_peft(method: str, base: Path, tmp_path: Path) -> None:
    config = make(base, tmp_path / "out", method)
    result = train(config, progress=False)
    assert result.loss < result.first_loss and 0 < result.trainable_parameters < result.parameters
    first = load_file(tmp_path / "out" / adapters.WEIGHTS)
    train(replace(config, resume_from=3), progress=False)
    assert_same_bits(load_file(tmp_path / "out" / adapters.WEIGHTS), first)

    ours, tokenizer = load_model(None, {"default": tmp_path / "out"})
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out")).eval()
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(ours, ids), logits(plain, ids))
    measured = evaluate(ours, tokenizer, config.data, max_length=32, max_new_tokens=3)
    assert measured.loss < result.first_loss
    before = generate(ours, tokenizer, ["The cat"], max_new_tokens=3, adapter_name="__base__")
    assert before == generate(load_model(str(base))[0], tokenizer, ["The cat"], max_new_tokens=3)
    assert generate(ours, tokenizer, ["The cat"], max_new_tokens=3) == generate(
        ours, tokenizer, ["The cat"], max_new_tokens=3, adapter_name="default"
    )


def test_biases_alone_are_trained_and_saved_as_a_model(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base", attention_bias=True)
    config = make(base, tmp_path / "out", "bitfit", max_steps=24, batch_size=16)
    result = train(config, progress=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(".bias") for name in changed) and result.loss < result.first_loss
    train(replace(config, resume_from=21), progress=False)
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), after)


def test_a_model_without_biases_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method=bitfit: LlamaForCausalLM has no biases"):
        train(make(base, tmp_path / "out", "bitfit"), progress=False)


def test_any_configuration_of_peft_is_trained(base: Path, tmp_path: Path) -> None:
    written = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="olora", inference_mode=True)
    written.save_pretrained(tmp_path / "written")
    config = make(base, tmp_path / "out", "peft", peft_config=tmp_path / "written" / adapters.CONFIG)
    assert train(config, progress=False).loss_path == "fused"
    first = load_file(tmp_path / "out" / adapters.WEIGHTS)
    assert len(first) == 4 and all("q_proj" in name for name in first)
    train(replace(config, resume_from=3), progress=False)
    assert_same_bits(load_file(tmp_path / "out" / adapters.WEIGHTS), first)
    file = tmp_path / "written" / adapters.CONFIG
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))
    with pytest.raises(ValueError, match=f"^peft_config={file}: expected the file as .*step-3 began with it"):
        train(replace(config, resume_from=3), progress=False)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(replace(config, output=tmp_path / "other", peft_config=tmp_path / "nowhere.json"), progress=False)


@pytest.mark.parametrize("begun", get_args(InitLoraWeights))
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_however_an_adapter_begins_it_is_loaded_by_peft(method: str, begun: str, base: Path, tmp_path: Path) -> None:
    """Of olora and pissa the file holds what is trained, and the base's weights are changed anew as it is loaded."""
    config = make(base, tmp_path / "out", method, init_lora_weights=begun, r=4)
    result = train(config, progress=False)
    assert result.loss < result.first_loss
    assert json.loads((tmp_path / "out" / adapters.CONFIG).read_text())["init_lora_weights"] == begun
    ids = torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    ours = load_model(str(base), {"default": tmp_path / "out"}, dtype="float32")[0]
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain, ids)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(ours, ids), before, atol=1e-3)
    first = load_file(tmp_path / "out" / adapters.WEIGHTS)
    train(replace(config, resume_from=3), progress=False)
    assert_same_bits(load_file(tmp_path / "out" / adapters.WEIGHTS), first)


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_chosen_blocks_alone_are_trained(method: str, base: Path, tmp_path: Path) -> None:
    config = make(base, tmp_path / "out", method, layers_to_transform=[1], lr=1e-3 if method == "full" else 1e-2)
    result = train(config, progress=False)
    assert result.loss < result.first_loss
    whole = method == "full"
    file = tmp_path / "out" / ("model.safetensors" if whole else adapters.WEIGHTS)
    found = load_file(file)
    if whole:
        before = load_file(base / "model.safetensors")
        changed = {name for name, value in found.items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if ".layers.1." in name}
        assert result.trainable_parameters == sum(before[name].numel() for name in changed)
    else:
        assert found and all(".layers.1." in name for name in found)
    train(replace(config, resume_from=3), progress=False)
    assert_same_bits(load_file(file), found)


def test_blocks_that_are_not_there_and_bases_that_cannot_change_are_errors(base: Path, tmp_path: Path) -> None:
    for method in ("lora", "full"):
        config = make(base, tmp_path / "out", method, layers_to_transform=[0, 7])
        with pytest.raises(ValueError, match=r"layers_to_transform: got \[7\], but LlamaForCausalLM has blocks 0 to 1"):
            train(config, progress=False)
    config = make(base, tmp_path / "out", "lora", layers_to_transform=[0], target_modules=".*q_proj")
    with pytest.raises(ValueError, match="layers_to_transform=.*expected names in target_modules beside it"):
        train(config, progress=False)
    for wrong in ([], [-1]):
        with pytest.raises(ValueError, match="layers_to_transform=.*: expected blocks, 0 or more"):
            make(base, tmp_path / "out", "lora", layers_to_transform=wrong)
    with pytest.raises(ValueError, match="init_lora_weights=pissa: it changes the base's weights, which are in 4 bits"):
        make(base, tmp_path / "out", "lora", init_lora_weights="pissa", load_in_4bit=True)
    for options in ({"init_lora_weights": "pissa"}, {"layers_to_transform": [0]}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.*method=ia3 has no"):
            make(base, tmp_path / "out", "ia3", **options)


OTHERS: dict[str, dict[str, Any]] = {
    "VERA": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "BOFT": {"boft_block_size": 4},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "HRA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "ROAD": {"group_size": 8},
    "RANDLORA": {"r": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "CARTRIDGE": {"num_virtual_tokens": 3},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_method_of_pefts_is_trained_and_loaded(kind: str, base: Path, tmp_path: Path) -> None:
    """By a configuration as PEFT writes it before it knows a model: with nulls, and defaults that would be out of range for LoRA."""
    own = {} if "num_virtual_tokens" in OTHERS[kind] else {"target_modules": ["q_proj", "v_proj"]}
    written = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **own, **OTHERS[kind])
    written.save_pretrained(tmp_path / "written")
    config = make(base, tmp_path / "out", "peft", peft_config=tmp_path / "written" / adapters.CONFIG)
    result = train(config, progress=False)
    assert result.loss < result.first_loss
    first = load_file(tmp_path / "out" / adapters.WEIGHTS)
    train(replace(config, resume_from=3), progress=False)
    assert_same_bits(load_file(tmp_path / "out" / adapters.WEIGHTS), first)
    ids = torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain, ids)
    ours = load_model(str(base), {"default": tmp_path / "out"}, dtype="float32")[0]
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(ours, ids), before, atol=1e-3)


@pytest.mark.parametrize("kind", trainable.UNTRAINED)
def test_what_needs_more_than_rows_is_refused_with_the_reason(kind: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"peft_type": kind, **({"total_step": 9} if kind == "ADALORA" else {})})
    )
    config = make(base, tmp_path / "out", "peft", peft_config=tmp_path / "config.json")
    with pytest.raises(ValueError, match=rf"peft_type: {kind} is not trained here: |PEFT does not take it"):
        train(config, progress=False)


def test_a_prompt_begins_as_it_is_told(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer: Any = tiny.tokenizer()
    text = "The cat sings."
    told = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}
    config = TrainConfig(model=base, data="d", output="o", method="prompt", num_virtual_tokens=3, **told)
    prompted = peft.get_peft_model(model, trainable.peft_config(model, config))
    begun = prompted.prompt_encoder["default"].embedding.weight
    expected = model.get_input_embeddings().weight[tokenizer(text).input_ids[:3]]
    torch.testing.assert_close(begun, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "prompt", "r": 4}, "r=4: method=prompt has no r, expected none"),
        ({"method": "lora", "num_virtual_tokens": 3}, "num_virtual_tokens=3: method=lora has no num_virtual_tokens"),
        ({"method": "full", "num_virtual_tokens": 5}, "num_virtual_tokens=5: method=full trains the whole model"),
        ({"method": "tokens"}, "token_indices: method=tokens needs one"),
        ({"method": "tokens", "token_indices": [-1]}, "token_indices=[-1]: expected tokens"),
        ({"method": "peft"}, "peft_config: method=peft needs one"),
        (
            {"method": "prompt", "prompt_tuning_init": "TEXT"},
            "prompt_tuning_init=TEXT: expected prompt_tuning_init_text",
        ),
        ({"method": "prompt", "prompt_tuning_init_text": "a"}, "prompt_tuning_init=SAMPLE_VOCAB: expected"),
        (
            {"method": "prefix", "encoder_hidden_size": 8},
            "encoder_hidden_size=8: a prefix has one with prefix_projection",
        ),
        ({"method": "adapter", "r": 4}, "r=4: method=adapter has no r, expected none"),
        ({"method": "lora", "is_parallel": True}, "is_parallel=True: method=lora has no is_parallel"),
        ({"method": "adapter", "reduction_factor": 0}, "reduction_factor=0: expected at least 1"),
        ({"method": "adapter", "scaling": 1e39}, "scaling=1e+39: expected a number that float32 holds"),
        ({"method": "prompt", "num_virtual_tokens": 0}, "num_virtual_tokens=0: expected at least 1"),
        ({"method": "prompt", "num_virtual_tokens": 1 << 17}, "num_virtual_tokens=131072: expected at most 65536"),
    ],
)
def test_an_option_of_another_method_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        TrainConfig(model="m", data="d", output="o", **options)


def test_a_token_without_a_row_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^token_indices: 9999 has no row in the model's embedding"):
        train(make(base, tmp_path / "out", "tokens", token_indices=[5, 9999]), progress=False)


def test_damaged_trained_weights_are_refused(base: Path, tmp_path: Path) -> None:
    config = make(base, tmp_path / "out", "prompt")
    train(config, progress=False)
    model = trainable.build(config, torch.float32, torch.device("cpu"), None)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    folder = checkpoint.folder(tmp_path / "out", 3)
    ((name, value),) = load_file(folder / checkpoint.TRAINED).items()
    for damaged, message in (
        ({name: value[:2].clone()}, rf"{re.escape(name)}: expected finite torch.float32 of shape"),
        ({name: value * torch.nan}, "expected finite"),
        ({name: value, "more": value.clone()}, "more is no trained weight"),
        ({"other": value}, "other is no trained weight"),
    ):
        save_file(damaged, folder / checkpoint.TRAINED)
        before = {one: p.clone() for one, p in trained.items()}
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_weights(folder, trained)
        assert_same_bits(dict(trained), before)
    (folder / checkpoint.TRAINED).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_weights(folder, trained)


def test_a_prompt_leaves_fewer_positions(base: Path, tmp_path: Path) -> None:
    train(make(base, tmp_path / "out", "prompt"), progress=False)
    model, _ = load_model(None, {"default": tmp_path / "out"})
    assert positions(model) == positions(load_model(str(base))[0]) - 5


def test_adapters_of_two_methods_do_not_share_a_model(base: Path, tmp_path: Path) -> None:
    train(make(base, tmp_path / "a", "prompt"), progress=False)
    train(make(base, tmp_path / "b", "ia3"), progress=False)
    with pytest.raises(AdapterError, match="peft_type: expected PROMPT_TUNING, as the first adapter's, got IA3"):
        load_model(None, {"a": tmp_path / "a", "b": tmp_path / "b"})


def test_a_projected_prompt_is_used_but_not_trained_on(base: Path, tmp_path: Path) -> None:
    train(make(base, tmp_path / "out", "ptuning"), progress=False)
    read = adapters.read(tmp_path / "out")
    with pytest.raises(AdapterError, match="its encoder is not in the file"):
        adapters.load(AutoModelForCausalLM.from_pretrained(base), {"default": read}, is_trainable=True)


@pytest.mark.parametrize(("key", "value"), [("num_virtual_tokens", 1 << 40), ("num_layers", 1 << 16)])
def test_a_prompt_that_claims_more_than_its_file_holds_is_refused_unallocated(
    key: str, value: int, base: Path, tmp_path: Path
) -> None:
    train(make(base, tmp_path / "out", "prefix"), progress=False)
    path = tmp_path / "out" / adapters.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(AdapterError, match=adapters.WEIGHTS if value == 1 << 16 else key):
        adapters.load(AutoModelForCausalLM.from_pretrained(base), {"default": adapters.read(tmp_path / "out")})


def test_every_method_is_tried_here() -> None:
    elsewhere = {"lora", "full", "peft", "bitfit"}  # the first two in test_train.py
    assert {name.partition(",")[0] for name in METHODS} | elsewhere == set(get_args(Method))
