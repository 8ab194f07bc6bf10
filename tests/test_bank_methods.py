"""A bank of IA³ adapters, or of soft prompts: what it puts into a model is what PEFT loads, in as many bytes as it says."""

import copy
import gc
import shutil
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bank_folders import IDS, answer
from peft import (
    CartridgeConfig,
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn

import fastlora
from fastlora import AdapterBank, adapters
from fastlora.adapters import AdapterError
from fastlora.peft import prompts

K_V_DOWN = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
METHODS: dict[str, Any] = {
    "ia3": lambda size: IA3Config(task_type="CAUSAL_LM", **K_V_DOWN),
    "prompt": lambda size: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=size),
    "ptuning": lambda size: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=size, encoder_hidden_size=8),
    "prefix": lambda size: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=size),
    "prefix with an encoder": lambda size: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=size, prefix_projection=True, encoder_hidden_size=8
    ),
    "cartridge": lambda size: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=size, num_frozen_tokens=1),
}
VALUES = {"ia3": lambda size: 2 * (16 + 16 + 64), "prompt": lambda size: size * 32, "ptuning": lambda size: size * 32}
KEYS = 2 * 2 * 2 * 8  # values that a token of a prompt has in all layers: keys and values, two layers of two heads
EACH = pytest.mark.parametrize("method", METHODS)


def save(folder: Path, method: str, number: int) -> Path:
    """An adapter with values of its own; a prompt of 2 + number tokens."""
    torch.manual_seed(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny.llama(), METHODS[method](2 + number))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(name="folders")
def some_folders(tmp_path: Path, method: str) -> dict[str, Path]:
    return {name: save(tmp_path / name, method, number) for number, name in enumerate(("own", "a0", "a1", "a2"))}


def own_model(folders: dict[str, Path]) -> Any:
    return adapters.load(tiny.llama(), {"own": adapters.read(folders["own"])}).eval().requires_grad_(False)


@pytest.fixture(name="bank")
def a_bank(folders: dict[str, Path]) -> Any:
    with AdapterBank(fastlora.accelerate(own_model(folders))) as bank:
        for name in ("a0", "a1", "a2"):
            bank.register(name, folders[name])
        yield bank


def alone(folder: Path | None) -> Tensor:
    model = tiny.llama() if folder is None else PeftModel.from_pretrained(tiny.llama(), folder).eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits[0, -IDS.shape[1] :]
        return logits


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@EACH
def test_what_it_inserts_is_what_peft_loads(method: str, folders: dict[str, Path]) -> None:
    model = own_model(folders)
    theirs = copy.deepcopy(model)
    theirs.load_adapter(folders["a1"], "a1")
    with AdapterBank(model) as bank:
        bank.register("a1", folders["a1"])
        bank.load("a1").result()
    ours, expected = model.state_dict(), theirs.state_dict()
    assert ours.keys() == expected.keys() and any(".a1" in key for key in ours)
    for key, value in expected.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key
    for one in (model, theirs):
        one.set_adapter("a1")
    assert torch.equal(model(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


@EACH
def test_a_mixed_batch_is_each_row_alone_and_a_swap_is_seen(
    method: str, bank: AdapterBank, folders: dict[str, Path]
) -> None:
    rows = ["a1", "__base__", "own", "a0", "a1"]
    for _ in range(2):
        with bank.use(rows) as names:
            got = answer(bank.model, names)
        for row, name in zip(got, rows, strict=True):
            close(row[-IDS.shape[1] :], alone(None if name == "__base__" else folders[name]))
    bank.swap("a1", folders["a2"]).result()
    with bank.use(["a1", "a0"]) as names:
        got = answer(bank.model, names)
    close(got[0, -IDS.shape[1] :], alone(folders["a2"]))
    close(got[1, -IDS.shape[1] :], alone(folders["a0"]))
    source = {one.name: one.source for one in fastlora.receipt(bank.model).adapters}["a1"]
    assert source is not None and source.folder == str(folders["a2"])


@EACH
def test_bytes_are_those_it_holds_and_go_with_it(method: str, bank: AdapterBank, folders: dict[str, Path]) -> None:
    sizes = {}
    for number, name in enumerate(("a0", "a1", "a2"), 3):
        before = bank.stats.bytes
        with bank.use([name, "__base__"]) as names:
            answer(bank.model, names)
        sizes[name] = bank.stats.bytes - before
        values = VALUES.get(method, lambda size: size * KEYS)(number) * 4
        kept = bank.model.__dict__.get(prompts.KEY)
        of_layers = 0
        if kept is not None and (name, 0) in kept.kept:
            one = kept.kept[name, 0]
            of_layers = one.prompt.nbytes + sum(side.nbytes for layer in one.keys for side in layer)
        assert sizes[name] == values + of_layers
        assert bool(of_layers) is (method in ("prompt", "ptuning"))
    parts = [one for name, one in bank.model.named_parameters() if ".a0" in name]
    refs = [weakref.ref(one) for one in parts]
    assert parts
    del parts
    bank.budget_bytes = sizes["a1"] + sizes["a2"]
    bank.load("a0").result()  # is there
    with bank.use(["a2", "a1"]):
        pass
    bank.swap("a1", folders["a1"]).result()
    gc.collect()
    assert bank.stats.bytes <= bank.budget_bytes and {*bank.resident} == {"a1", "a2"}
    assert all(ref() is None for ref in refs) and "a0" not in bank.model.peft_config
    assert not any(".a0" in name for name, _ in bank.model.named_parameters())
    if kept is not None:
        assert ("a0", 0) not in kept.kept and ("a2", 0) in kept.kept or method not in ("prompt", "ptuning")
    with bank.use(["a0"]) as names:
        close(answer(bank.model, names)[0, -IDS.shape[1] :], alone(folders["a0"]))


@EACH
def test_a_file_that_is_not_right_changes_nothing(method: str, bank: AdapterBank, folders: dict[str, Path]) -> None:
    file = folders["a0"] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    keys = list(bank.model.state_dict())
    with pytest.raises(AdapterError):
        bank.load("a0").result()
    shutil.copy(folders["own"] / "adapter_model.safetensors", file)  # of another length
    if method != "ia3":
        with pytest.raises(AdapterError, match="shape"):
            bank.load("a0").result()
    assert list(bank.model.state_dict()) == keys and bank.resident == ()


def test_other_methods_are_refused_by_name(tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora")
    ia3 = save(tmp_path / "ia3", "ia3", 1)
    with AdapterBank(own_model({"own": ia3})) as bank:
        with pytest.raises(
            AdapterError,
            match="peft_type: expected IA3, as the model has, got LORA; banks are for LORA, IA3, PROMPT_TUNING, P_TUNING,",
        ):
            bank.register("lora", lora)
    with AdapterBank(own_model({"own": lora})) as bank:
        with pytest.raises(AdapterError, match="peft_type: expected LORA, as the model has, got IA3"):
            bank.register("ia3", ia3)


def save_lora(folder: Path) -> Path:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(tiny.llama(), config).save_pretrained(folder)
    return folder


def test_an_ia3_that_scales_the_other_side_of_a_layer_is_refused(tmp_path: Path) -> None:
    own = save(tmp_path / "own", "ia3", 0)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=[])
    get_peft_model(tiny.llama(), config).save_pretrained(tmp_path / "other")
    with AdapterBank(own_model({"own": own})) as bank:
        with pytest.raises(AdapterError, match=r"feedforward_modules: .*layers\.0\.mlp\.down_proj is one on one side"):
            bank.register("other", tmp_path / "other")


@pytest.mark.filterwarnings("ignore")
def test_a_prompt_of_several_tasks(tmp_path: Path) -> None:
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2)
    for number, name in enumerate(("own", "one")):
        torch.manual_seed(number)
        model = get_peft_model(tiny.llama(), config)
        for parameter in model.prompt_encoder.parameters():
            nn.init.normal_(parameter.data)
        model.save_pretrained(tmp_path / name)
    ours = fastlora.accelerate(own_model({"own": tmp_path / "own"}))
    peer = PeftModel.from_pretrained(tiny.llama(), tmp_path / "one").eval()
    tasks = torch.tensor([1, 0])
    with AdapterBank(ours) as bank:
        bank.register("one", tmp_path / "one")
        with bank.use(["one", "__base__"]) as names, torch.no_grad():
            given = {"input_ids": IDS.expand(2, -1), "task_ids": tasks}
            found = ours(**given, adapter_names=names).logits[0, -IDS.shape[1] :]
            close(found, peer(input_ids=IDS, task_ids=tasks[:1]).logits[0, -IDS.shape[1] :])
