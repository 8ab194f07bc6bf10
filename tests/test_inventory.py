"""`fastlora adapters`: what a folder holds, and which of it is damaged, is another base's, or changes nothing."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapter_folders import tensors
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from typer.testing import CliRunner

import fastlora
from fastlora import adapters, inventory, models
from fastlora.cli import app

LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
Q: dict[str, Any] = {"target_modules": ["q_proj"], **LM}
CONFIGS: dict[str, Any] = {
    "a-head": LoraConfig(modules_to_save=["lm_head"], **Q),
    "b-pissa": LoraConfig(r=2, init_lora_weights="pissa", **Q),
    "c-plain": LoraConfig(r=4, rank_pattern={"v_proj": 2}, target_modules=["v_proj", "q_proj"], **LM),
    "d-dora": LoraConfig(r=3, use_dora=True, use_rslora=True, **Q),
    "e-biased": LoraConfig(r=3, lora_bias=True, **Q),
    "f-ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], **LM),
    "g-prompt": PromptTuningConfig(num_virtual_tokens=5, **LM),
    "h-prefix": PrefixTuningConfig(num_virtual_tokens=3, **LM),
}


def save(folder: Path, config: Any, **sizes: Any) -> Path:
    torch.manual_seed(0)
    base = tiny.llama(vocab_size=len(tiny.tokenizer()), tie_word_embeddings=False, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(base, copy.deepcopy(config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter.data, std=0.3)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", name="root")
def a_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inventory")
    tiny.save_model(root / "model")
    for name, config in CONFIGS.items():
        save(root / "good" / name, config)
    bad = root / "bad"
    cut = save(bad / "cut", CONFIGS["c-plain"]) / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-50])
    save(bad / "good", CONFIGS["c-plain"])
    tensors(lambda found: [found[key].zero_() for key in found if "lora_B" in key])(
        save(bad / "idle", CONFIGS["c-plain"])
    )
    save(bad / "other", CONFIGS["c-plain"], hidden_size=48, num_attention_heads=4)
    (bad / "nothing").mkdir()
    return root


def run(*words: object, code: int = 0) -> Any:
    with tiny.on_cpu():
        result = CliRunner().invoke(app, ["adapters", *(str(word) for word in words)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_each_is_told_as_a_receipt_tells_it(root: Path) -> None:
    with tiny.on_cpu():
        found = list(inventory.inventory(root / "good", str(root / "model")))
    assert [one.name for one in found] == list(CONFIGS)
    assert all(one.is_sound and one.fits and one.changes for one in found)
    for one in found:
        read = adapters.read(one.folder)
        assert one.hashes == read.hashes and one.bytes == sum(tensor.nbytes for tensor in read.tensors.values())
        with tiny.on_cpu():
            loaded, _ = models.load_model(str(root / "model"), {"one": one.folder}, dtype="stored", accelerate=False)
        [told] = fastlora.receipt(loaded).adapters
        assert one.change == told.change, f"{one.name}: the base is as it was before the first"
        assert (one.change is None) is (one.name in ("g-prompt", "h-prefix"))
    by_name = {one.name[2:]: one for one in found}
    methods = {name: one.method for name, one in by_name.items()}
    assert methods["dora"] == "LORA, DoRA, rsLoRA" and methods["biased"] == "LORA, lora_bias"
    assert methods["prompt"] == "PROMPT_TUNING" and by_name["prompt"].targets == "5 tokens"
    assert by_name["plain"].r == (2, 4) and by_name["plain"].targets == "q_proj v_proj" and by_name["ia3"].r == ()


def test_without_a_model_the_files_are_told(root: Path) -> None:
    found = {one.name: one for one in inventory.inventory(root / "bad")}
    assert list(found) == ["cut", "good", "idle", "other"]
    assert found["good"].is_sound and found["good"].fits is None and found["good"].changes is None
    assert found["other"].is_sound, "nobody has said of which base it is to be"
    assert found["idle"].problem == "changes nothing" and found["idle"].changes is False
    assert "adapter_model.safetensors" in str(found["cut"].problem) and found["cut"].method is None


def test_the_command_names_what_is_wrong_and_exits_1(root: Path) -> None:
    told = run(root / "good", "--model", root / "model").output.splitlines()
    assert len(told) == 1 + len(CONFIGS) and told[0].split()[:3] == ["adapter", "method", "r"]
    row = told[1 + list(CONFIGS).index("c-plain")].split()
    assert row[:5] == ["c-plain", "LORA", "2", "to", "4"] and row[-3:-1] == ["yes", "yes"] and float(row[-1]) > 0
    result = run(root / "bad", "--model", root / "model", code=1)
    assert "\nother: adapter_model.safetensors: base_model.model." in result.output
    assert "was it trained on another base" in result.output
    assert "\nidle: changes nothing" in result.output and "\ncut: adapter_model.safetensors: " in result.output
    table = {line.split()[0]: line.split() for line in result.output.splitlines()[1:5]}
    assert table["idle"][-3:-1] == ["yes", "no"] and table["other"][-1] == "no" and table["cut"] == ["cut"]
    lines = [json.loads(line) for line in run(root / "bad", "--json", code=1).stdout.splitlines()]
    assert [one["name"] for one in lines] == ["cut", "good", "idle", "other"]
    assert [one["problem"] is None for one in lines] == [False, True, False, True]


def test_a_folder_of_adapters_and_nothing_else(root: Path, tmp_path: Path) -> None:
    assert list(adapters.folders_in(root / "bad", "folder")) == ["cut", "good", "idle", "other"]
    with pytest.raises(FileNotFoundError, match="folder=.*nowhere: there is no such folder"):
        adapters.folders_in(tmp_path / "nowhere", "folder")
    with pytest.raises(ValueError, match="this is an adapter's own folder, expected one with such folders in it"):
        adapters.folders_in(root / "bad" / "good", "adapters")
    with pytest.raises(ValueError, match="adapters=.*: no folder in it has an adapter_config.json"):
        adapters.folders_in(root, "adapters")
    assert "fastlora adapters: folder " in run(tmp_path / "nowhere", code=2).output
