"""Loading a base and its tokenizer: whatever is not what it should be is one clear error that names it."""

import ast
import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import LNTuningConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fastlora import adapters, merge
from fastlora import train as training
from fastlora.cli import _quiet
from fastlora.config import TrainConfig
from fastlora.models import base_of, empty_base, load_base, load_model, load_tokenizer
from fastlora.train import train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    with tiny.on_cpu():
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("loading") / "model")


@pytest.fixture
def base(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def save_adapter(folder: Path, base: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    ).save_pretrained(folder)
    return folder


def change(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def transpose(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T.contiguous()
    save_file(tensors, file, {"format": "pt"})


def drop(file: Path, name: str) -> None:
    save_file({key: value for key, value in load_file(file).items() if key != name}, file, {"format": "pt"})


DAMAGES = {
    "no config": (lambda base: (base / "config.json").unlink(), OSError, "there is no config.json"),
    "a config that is a list": (
        lambda base: (base / "config.json").write_text("[1]"),
        ValueError,
        "config.json cannot be loaded",
    ),
    "a config that is no JSON": (
        lambda base: (base / "config.json").write_text("{"),
        OSError,
        "config.json cannot be loaded",
    ),
    "an unknown model": (
        lambda base: change(base / "config.json", model_type="novel"),
        ValueError,
        "config.json cannot be loaded",
    ),
    "no tokenizer": (
        lambda base: [path.unlink() for path in base.glob("*token*")],
        ValueError,
        "its tokenizer cannot be loaded",
    ),
    "a damaged tokenizer": (lambda base: cut(base / "tokenizer.json"), ValueError, "its tokenizer cannot be loaded"),
    "no weights": (lambda base: (base / "model.safetensors").unlink(), OSError, "the model cannot be loaded"),
    "cut weights": (
        lambda base: cut(base / "model.safetensors"),
        ValueError,
        "the model cannot be loaded: SafetensorError",
    ),
    "weights of another shape": (
        lambda base: transpose(base / "model.safetensors"),
        ValueError,
        r"model.layers.0.mlp.up_proj.weight: its files have shape \[32, 64\], expected \[64, 32\]",
    ),
    "a weight less": (
        lambda base: drop(base / "model.safetensors", "model.norm.weight"),
        ValueError,
        "its files lack 1 of the model's weights: model.norm.weight$",
    ),
    "an end that is no token": (
        lambda base: change(base / "generation_config.json", eos_token_id="</s>"),
        ValueError,
        "generation_config.json: eos_token_id: expected tokens, got '</s>'",
    ),
    "a layer more": (
        lambda base: change(base / "config.json", num_hidden_layers=3),
        ValueError,
        r"its files lack 9 of the model's weights: model.layers.2.input_layernorm.weight, ",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_named(name, base, caplog):
    damage, error, message = DAMAGES[name]
    damage(base)
    with pytest.raises(error, match=re.escape(f"model={base}: ") + f".*{message}"):
        load_model(str(base))
    assert not caplog.records  # transformers' table says no more


@pytest.mark.parametrize("adapters", ["adapter", ["adapter"], {1: "adapter"}, {"default": 1}])
def test_adapters_are_folders_by_name(base, adapters):
    with pytest.raises(TypeError, match=r"^adapters=.*: expected folders by adapter name"):
        load_model(str(base), adapters)


def test_a_weight_that_is_tied_or_of_no_use_is_nothing_to_complain_about(base, caplog):
    change(base / "config.json", tie_word_embeddings=True)
    drop(base / "model.safetensors", "lm_head.weight")
    model, _ = load_model(str(base))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    change(base / "config.json", num_hidden_layers=1)
    load_model(str(base))
    (record,) = caplog.records  # transformers'
    assert "UNEXPECTED" in record.getMessage()


def test_what_is_no_model(base, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", base)
    for load in (lambda path: load_model(path), load_tokenizer):
        with pytest.raises(ValueError, match=re.escape(f"expected a base model; it is used as adapter={adapter}")):
            load(str(adapter))
        with pytest.raises(FileNotFoundError, match="model: there is no folder"):
            load(str(tmp_path / "none"))
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            load("runs/of/mine")  # no hub id either
        with pytest.raises(NotADirectoryError, match="got a file"):
            load(str(base / "config.json"))


def test_the_model_that_an_adapter_names(base, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", base)
    assert load_model(None, {"default": adapter})[0].peft_config["default"].base_model_name_or_path == str(base)
    base.rename(tmp_path / "moved")
    for load in (lambda: load_model(None, {"default": adapter}), lambda: merge.merge(None, adapter, tmp_path / "out")):
        with pytest.raises(
            FileNotFoundError, match=f"{re.escape(str(adapter))}: it was trained on .*no such folder any more"
        ):
            load()
    load_model(str(tmp_path / "moved"), {"default": adapter})
    change(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="no adapter names one"):
        base_of([adapters.read(adapter)])


def add_tokens(base: Path, **options) -> None:
    words = tiny.tokenizer()
    words.add_tokens([AddedToken("<more>", **options)], special_tokens=options.get("special", False))
    words.save_pretrained(base)


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(base, tmp_path):
    rows = len(tiny.tokenizer())
    add_tokens(base)
    message = f"the tokenizer has {rows + 1:,} tokens and the embedding {rows:,} rows: none for '<more>'"
    data = tiny.save_data(tmp_path / "data.jsonl", 4)
    for load in (
        lambda: load_model(str(base)),
        lambda: train(TrainConfig(model=str(base), data=data, output=tmp_path / "out"), progress=False),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load()
    assert not (tmp_path / "out").exists()


def test_a_special_token_that_no_text_holds_may_have_no_row(base):
    """As Gemma 3's of images in its models of text."""
    add_tokens(base, special=True)
    assert len(load_tokenizer(str(base))) == len(tiny.tokenizer()) + 1
    words = load_tokenizer(str(base))
    words.pad_token = "<more>"
    words.save_pretrained(base)
    with pytest.raises(ValueError, match="none for '<more>'"):
        load_tokenizer(str(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_stored_dtype(base, dtype):
    AutoModelForCausalLM.from_pretrained(base).to(dtype).save_pretrained(base)
    assert load_model(str(base), dtype="stored")[0].dtype == dtype
    assert load_model(str(base))[0].dtype == torch.float32
    file = base / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("dtype")
    file.write_text(json.dumps(config))
    assert load_model(str(base), dtype="stored")[0].dtype == dtype, "the weights' own, where the config names none"


# `fastlora tune --device cuda` has no other name in those.
COMMANDS = {"cli.py", "environment.py", "ops.py", "trial.py", "table.py", "options.py", "planning.py"}
ROOMS = (".", "choice", "frozen", "operators", "peft")
LIBRARY = [path for room in ROOMS for path in (ROOT / "fastlora" / room).glob("*.py") if path.name not in COMMANDS]
LIBRARY += [ROOT / "fastlora" / "data" / name for name in ("examples.py", "rows.py")]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_the_library_does_not_speak_of_the_command_lines_options(path):
    texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    # A style sheet's names begin so, too.
    said = [text for text in texts if isinstance(text, str) and not text.lstrip().startswith(":root {")]
    assert not [text for text in said if re.search(r"(^|[\s(:])--[a-z]", text)]


@pytest.mark.parametrize(
    "config", [LoraConfig(target_modules=["q_proj"]), LNTuningConfig(target_modules=["norm"])], ids=["lora", "norm"]
)
def test_a_name_that_peft_takes_for_part_of_a_key_is_loaded_exactly_and_without_its_warning(base, tmp_path, config):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 12)[None]
    expected = model.eval()(input_ids=ids).logits
    names = ("one", "lora", "lora_A", "base_layer", "ln_tuning")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        _quiet()
        loaded, _ = load_model(str(base), dict.fromkeys(names, tmp_path / "adapter"))
    assert not [one for one in heard if "peft" in one.filename]
    for name in names:
        loaded.set_adapter(name)
        assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-5), name


@pytest.mark.parametrize("load", [load_base, empty_base])
def test_the_attention_is_the_one_that_is_asked_for_or_an_error_names_it(base, load):
    def attention(name: str | None) -> str:
        model = load(str(base), torch.float32, torch.device("cpu"), attn_implementation=name)
        return model.model.layers[0].self_attn.config._attn_implementation

    assert [attention(name) for name in (None, "eager", "sdpa")] == ["sdpa", "eager", "sdpa"]
    with pytest.raises(
        ValueError, match=rf"^attn_implementation=nope: transformers does not take it for {base}: .*eager"
    ):
        attention("nope")
    with pytest.raises(ValueError, match="^attn_implementation=flex_attention: torch has no gradient of it on a CPU"):
        attention("flex_attention")
    change(base / "config.json", hidden_act="nope")
    with pytest.raises(ValueError, match=rf"^model={base}: the model cannot be loaded"):
        attention("eager")
    shutil.rmtree(base)
    with pytest.raises(FileNotFoundError, match=rf"^model: there is no folder {base}$"):
        attention("eager")


def test_an_attention_whose_package_is_missing_names_it(base, monkeypatch):
    """As transformers says it of flash attention, wherever that is installed."""

    plain = LlamaForCausalLM.get_correct_attn_implementation

    def refuse(self: Any, requested: str | None, *rest: Any, **more: Any) -> str:
        if requested == "sdpa":
            raise ImportError("the package is missing")
        return plain(self, requested, *rest, **more)

    monkeypatch.setattr(LlamaForCausalLM, "get_correct_attn_implementation", refuse)
    with pytest.raises(
        ImportError, match="^attn_implementation=sdpa: transformers does not take it for .*: the package is"
    ):
        load_base(str(base), None, torch.device("cpu"), attn_implementation="sdpa")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_has_the_attention_that_it_is_told_and_goes_on_with_it(base, tmp_path, method):
    data = tiny.save_data(tmp_path / "data.jsonl", 8)
    given = TrainConfig(model=base, data=data, output=tmp_path / "out", method=method, max_steps=1, save_steps=1)
    given = replace(given, attn_implementation="eager")
    run = training.begin(given, Accelerator(cpu=True), load_base)
    assert run.model.config._attn_implementation == "eager"
    train(given, progress=False)
    saved = json.loads((given.output / "checkpoints" / "step-1" / "training.json").read_text())["config"]
    assert saved["attn_implementation"] == "eager"
    assert "attn_implementation: eager" in (given.output / "config.yaml").read_text()
    longer = replace(given, resume=True, max_steps=2)
    with pytest.raises(ValueError, match="attn_implementation='sdpa': expected 'eager' as in"):
        train(replace(longer, attn_implementation="sdpa"), progress=False)
    run = training.begin(longer, Accelerator(cpu=True), load_base)
    assert run.step == 1 and run.model.config._attn_implementation == "eager"
