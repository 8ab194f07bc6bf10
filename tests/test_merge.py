"""Merging: the model that is written is the adapter's, whatever shares its weights; and no folder is lost or left half."""

import copy
import errno
import json
import logging
import os
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import fastlora.merge
from fastlora import writing
from fastlora.merge import MergeError, fold, merge
from fastlora.models import load_model


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    with tiny.on_cpu():
        yield


def gemma():
    """A model of text and images, whose text part has a config of its own."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**tiny.SIZES, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=39,
        boi_token_index=38,
        eoi_token_index=37,
    )
    return Gemma3ForConditionalGeneration(config).eval()


def with_adapter(make, **options):
    """A PeftModel with random values in all that it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make(), LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": None, **options}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model):
    ids = torch.randint(36, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    return model(**inputs).logits.float()


def relative(got, expected):
    return (got - expected).norm() / expected.norm()


def ends(embedding: str, head: str, inner: str) -> dict[str, dict]:
    """Every way of PEFT to change one end of a tied pair, or both."""
    return {
        "the head": {"target_modules": [head]},
        "the embedding": {"target_modules": [embedding]},
        "both": {"target_modules": [embedding, head]},
        "a saved head": {"target_modules": [inner], "modules_to_save": [head]},
        "a saved embedding": {"target_modules": [inner], "modules_to_save": [embedding]},
        "both saved": {"target_modules": [inner], "modules_to_save": [embedding, head]},
        "the head, a saved embedding": {"target_modules": [head], "modules_to_save": [embedding]},
        "the embedding, a saved head": {"target_modules": [embedding], "modules_to_save": [head]},
        "tokens": {"target_modules": [inner], "trainable_token_indices": [1, 5]},
        "the head, and tokens": {"target_modules": [inner, head], "trainable_token_indices": [1, 5]},
        "neither": {"target_modules": [inner]},
    }


MODELS = {
    "llama": (tiny.llama, AutoModelForCausalLM, ends("embed_tokens", "lm_head", "q_proj")),
    "gpt2": (tiny.gpt2, AutoModelForCausalLM, ends("wte", "lm_head", "c_attn")),
    "gemma3": (gemma, AutoModelForImageTextToText, ends("embed_tokens", "lm_head", "q_proj")),
    "t5": (
        tiny.t5,
        AutoModelForSeq2SeqLM,
        {
            **ends("shared", "lm_head", "q"),
            "the encoder's": {"target_modules": ["encoder.embed_tokens"]},
            "all four": {"target_modules": ["shared", "embed_tokens", "lm_head"]},
        },
    ),
}
# What PEFT itself cannot make, or cannot run, when it is to tie the adapters.
NOT_PEFTS = {"the head, a saved embedding", "the embedding, a saved head", "the head, and tokens"}
CASES = [
    (model, name, ties)
    for model, (_, _, cases) in MODELS.items()
    for name in cases
    for ties in (False, True)
    if not (ties and (name in NOT_PEFTS or (model == "t5" and "saved" in name)))
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model", "name", "ties"), CASES, ids=lambda value: str(value))
def test_the_merged_model_is_the_adapters_whatever_is_tied(model, name, ties, tmp_path):
    make, auto, cases = MODELS[model]
    peft_model = with_adapter(make, **cases[name], ensure_weight_tying=ties)
    before, expected = logits(make()), logits(peft_model)
    merged, errors = fold(peft_model)
    merged.save_pretrained(tmp_path)
    read_back = auto.from_pretrained(tmp_path).eval()
    assert relative(logits(merged), expected) <= 1e-6 and relative(logits(read_back), expected) <= 1e-6
    moved_nothing = model == "t5" and name == "the embedding"  # `shared` itself is never called
    assert (relative(before, expected) > 0.1) != moved_nothing
    same = read_back.get_input_embeddings().weight is read_back.get_output_embeddings().weight
    if name in ("neither", "tokens"):
        assert same and not errors.untied
    if model != "t5":
        config = json.loads((tmp_path / "config.json").read_text())
        said = [
            part["tie_word_embeddings"]
            for part in (config, config.get("text_config", {}))
            if "tie_word_embeddings" in part
        ]
        assert said and all(flag == same for flag in said) and same == (not errors.untied)
    assert not any("lora" in key or "base_layer" in key for key in merged.state_dict())


@pytest.mark.parametrize("more", [{"modules_to_save": ["norm"]}, {"trainable_token_indices": [1, 5]}], ids=str)
def test_no_weight_of_the_base_is_written_to(more):
    peft_model = with_adapter(tiny.llama, target_modules=["lm_head", "q_proj"], **more)
    held = dict(peft_model.named_parameters())
    values = {name: (parameter.detach().clone(), parameter._version) for name, parameter in held.items()}
    fold(peft_model)
    assert all(
        torch.equal(held[name], value) and held[name]._version == version for name, (value, version) in values.items()
    )


def test_a_bias_of_the_update_is_merged():
    peft_model = with_adapter(tiny.gpt2, target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True)
    expected = logits(peft_model)
    assert relative(logits(fold(peft_model)[0]), expected) <= 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tie", [False, True])
def test_layers_that_share_their_weights_are_told_apart(tie, tmp_path):
    """PEFT's layer_replication takes one layer's weights twice, which transformers knows nothing of."""
    peft_model = with_adapter(
        lambda: tiny.llama(tie_word_embeddings=tie), target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]
    )
    expected = logits(peft_model)
    fold(peft_model)[0].save_pretrained(tmp_path)
    read_back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert read_back.config.num_hidden_layers == 3 and relative(logits(read_back), expected) <= 1e-6
    assert (read_back.lm_head.weight is read_back.model.embed_tokens.weight) == tie


DORA = {
    "by row": (tiny.llama, {"target_modules": ["q_proj", "down_proj"]}),
    "by column": (tiny.gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", DORA)
def test_a_dora_is_merged_by_its_equation(kind, monkeypatch):
    monkeypatch.setattr(fastlora.merge, "BLOCK", 48)  # blocks of a row or two, and a smaller last one
    make, options = DORA[kind]
    peft_model = with_adapter(make, use_dora=True, **options)
    layers = [module for module in peft_model.modules() if getattr(module, "lora_variant", {})]
    expected, lengths = logits(peft_model), [one.lora_magnitude_vector.default.weight.abs() for one in layers]
    bases = [one.get_base_layer() for one in layers]
    update = sum((merged_by_peft(one) - one.get_base_layer().weight).double().square().sum() for one in layers).sqrt()
    merged, errors = fold(peft_model)
    assert relative(logits(merged), expected) <= 1e-6 and errors.layers == len(layers) == len(bases)
    for base, length in zip(bases, lengths, strict=True):
        norm = base.weight.norm(dim=0 if kind == "by column" else 1)
        torch.testing.assert_close(norm, length.flatten(), rtol=1e-5, atol=0)
        assert base.weight.is_contiguous()
    assert errors.update**0.5 == pytest.approx(update.item(), rel=1e-4) and 0 < errors.largest < 1e-5
    assert errors.weight**0.5 == pytest.approx(
        torch.cat([one.weight.flatten() for one in bases]).norm().item(), rel=1e-5
    )


@torch.no_grad()
def merged_by_peft(layer):
    layer = copy.deepcopy(layer)
    layer.merge()
    return layer.get_base_layer().weight


def test_a_bfloat16_dora_is_rounded_once():
    peft_model = with_adapter(lambda: tiny.llama().bfloat16(), target_modules=["q_proj"], use_dora=True)
    layer = peft_model.get_base_model().model.layers[0].self_attn.q_proj
    total = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    exact = total * (layer.lora_magnitude_vector.default.weight.double() / total.norm(dim=1))[:, None]
    merged = fold(peft_model)[0].model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.float().bfloat16())


def test_a_dora_beside_another_adapter_is_refused():
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    peft_model = get_peft_model(tiny.llama(), config)
    peft_model.add_adapter("other", config)
    peft_model.base_model.set_adapter(["default", "other"])
    with pytest.raises(TypeError, match="expected plain LoRA layers, or linear ones with one DoRA, 2 of 2 are others"):
        fold(peft_model)


def test_bfloat16_weights_are_rounded_once():
    peft_model = with_adapter(lambda: tiny.llama().bfloat16(), target_modules=["q_proj"])
    layer = peft_model.get_base_model().model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    merged = fold(peft_model)[0].model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.float().bfloat16())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target_modules": ["q_proj"], "alora_invocation_tokens": [1]},
            TypeError,
            "2 of 2 are others .the first: .*layers.0.self_attn.q_proj",
        ),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, TypeError, "1 of 1 are others"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, TypeError, "none in its base"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_merged(options, error, message):
    with pytest.raises(error, match=message):
        fold(with_adapter(tiny.llama, **options))


def test_an_update_that_is_too_large_is_refused():
    peft_model = with_adapter(tiny.llama, target_modules=["q_proj"])
    peft_model.get_base_model().model.layers[1].self_attn.q_proj.lora_B.default.weight.data.fill_(3e38)
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight would become infinite or NaN in torch\.float32"
    ):
        fold(peft_model)


@pytest.fixture
def folders(tmp_path) -> Path:
    """A tied base, in base/, and an adapter on its head and its layers, in adapter/."""
    words = tiny.tokenizer()
    tiny.llama(vocab_size=len(words)).bfloat16().save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    options = {"target_modules": ["lm_head", "q_proj"], "task_type": "CAUSAL_LM"}
    model = with_adapter(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **options)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_merged_model_keeps_the_bases_dtype_unless_told(folders):
    for told, kept in (("auto", "bfloat16"), ("float32", "float32")):
        report = merge(None, folders / "adapter", folders / "merged" / told, dtype=told)
        written = load_file(folders / "merged" / told / "model.safetensors")
        assert {str(tensor.dtype) for tensor in written.values()} == {f"torch.{kept}"} and report.dtype == kept
        assert report.untied == "lm_head.weight" and "lm_head.weight" in written
        assert report.logits_relative_error < {"float32": 1e-6, "bfloat16": 0.03}[kept]
    peft_model, _ = load_model(None, {"default": folders / "adapter"}, dtype="float32", accelerate=False)
    read_back = AutoModelForCausalLM.from_pretrained(folders / "merged" / "float32")
    assert relative(logits(read_back), logits(peft_model)) <= 1e-6
    assert len(list(folders.iterdir())) == 3, "something was left beside the folders"


def test_a_merge_that_loses_the_update_says_what_to_do(folders, caplog):
    with caplog.at_level(logging.WARNING, "fastlora"):
        merge(None, folders / "adapter", folders / "small")
    assert not caplog.records
    file = folders / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 0.01}))
    with caplog.at_level(logging.WARNING, "fastlora"):
        report = merge(None, folders / "adapter", folders / "large")
        assert report.update_relative_error > 0.05
        merge(None, folders / "adapter", folders / "float", dtype="float32")
    (record,) = caplog.records
    assert "lost" in record.message and "dtype=float32" in record.message and "keep the adapter" in record.message


def refuse_to_load(*_, **__):
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["adapter", "base"])
@pytest.mark.parametrize("spelling", ["itself", "relative", "link", "dots"])
def test_the_folders_that_are_read_are_never_written_to(folders, monkeypatch, name, spelling, overwrite):
    monkeypatch.chdir(folders)
    monkeypatch.setattr(fastlora.merge, "load_model", refuse_to_load)
    (folders / "link").symlink_to(name)
    spelt = {"itself": folders / name, "relative": name, "link": "link", "dots": f"adapter/../{name}/."}[spelling]
    before = files(folders)
    with pytest.raises(ValueError, match=f"apart from {'adapter' if name == 'adapter' else 'model'}="):
        merge(None, folders / "adapter", spelt, overwrite=overwrite)
    assert files(folders) == before


@pytest.mark.parametrize(
    "held", ["config.json", "adapter_config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
)
def test_a_folder_that_holds_something_is_replaced_only_on_demand(folders, monkeypatch, held):
    output = folders / "out"
    output.mkdir()
    (output / held).write_text("old")
    (output / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(fastlora.merge, "load_model", refuse_to_load)
        with pytest.raises(FileExistsError, match=f"holds a model or an adapter already .{held}.: overwrite=True"):
            merge(None, folders / "adapter", output)
    assert files(output) == {held: b"old", "notes.txt": b"mine"}
    merge(None, folders / "adapter", output, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / held).exists() or (output / held).read_bytes() != b"old"
    assert not (output / "adapter_config.json").exists()
    assert load_model(str(output))[0].config.tie_word_embeddings is False


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(folders, monkeypatch):
    (folders / "file").write_text("mine")
    monkeypatch.setattr(fastlora.merge, "load_model", refuse_to_load)
    for output in (folders / "file", folders / "file" / "out"):
        with pytest.raises(NotADirectoryError, match="file is a file"):
            merge(None, folders / "adapter", output, overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folders)  # root may write anywhere
    with pytest.raises(PermissionError, match="may not be written to"):
        merge(None, folders / "adapter", folders / "new" / "out")


def test_a_folder_that_a_training_writes_into_is_refused_before_anything_is_loaded(folders, monkeypatch):
    monkeypatch.setattr(fastlora.merge, "load_model", refuse_to_load)
    with writing.locked(folders / "out"), pytest.raises(BlockingIOError, match="another process writes into this"):
        merge(None, folders / "adapter", folders / "out", overwrite=True)


def test_an_empty_output_folder_is_filled(folders):
    (folders / "out").mkdir()
    merge(None, folders / "adapter", folders / "out")
    assert load_model(str(folders / "out"))[0].config.vocab_size == len(tiny.tokenizer())
    assert not list((folders / "out").glob(".*"))


FULL = {
    "as the system says it": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "as safetensors says it": SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
}


@pytest.mark.parametrize("said", FULL)
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_is_told_and_leaves_nothing(folders, monkeypatch, said, there):
    def fill(*_, **__):
        raise FULL[said]

    if there:
        merge(None, folders / "adapter", folders / "out")
    before = files(folders)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fill)  # the weights are written before
    with pytest.raises(OSError, match="output=.*out: No space left on device .* GB free.*removed again"):
        merge(None, folders / "adapter", folders / "out", overwrite=there)
    assert files(folders) == before and (folders / "out").exists() == there


def test_an_interrupt_leaves_nothing(folders, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    before = sorted(folders.iterdir())
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(None, folders / "adapter", folders / "out")
    assert sorted(folders.iterdir()) == before


def test_what_does_not_read_back_is_not_published(folders, monkeypatch):
    """The check that would catch a model class, or a later transformers, that ties or drops what we wrote."""
    monkeypatch.setattr(fastlora.merge, "load_base", lambda path, dtype, device: load_model(str(folders / "base"))[0])
    with pytest.raises(MergeError, match="reads back as another model"):
        merge(None, folders / "adapter", folders / "out")
    assert not (folders / "out").exists()


def test_what_is_no_sum_with_a_weight_has_no_error_of_one(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "ia3" in name:
            torch.nn.init.uniform_(parameter.data, 0.5, 2.0)
    model.peft_config["default"].base_model_name_or_path = str(folders / "base")
    model.save_pretrained(folders / "factors")
    report = merge(None, folders / "factors", folders / "scaled", dtype="float32")
    assert report.layers == 2 * model.config.num_hidden_layers and 0 <= report.logits_relative_error <= 1e-5
    assert report.weight_max_error is report.weight_relative_error is report.update_relative_error is None
    merged = AutoModelForCausalLM.from_pretrained(folders / "scaled", dtype="auto").eval()
    assert relative(logits(merged), logits(model)) <= 1e-5
