"""Adapters on a model: what PEFT saves is taken, bit for bit; anything that is not the adapter's own is an error before the model changes."""

import pytest
import tiny
import torch
from adapter_folders import LAYER, A, B, Q, a_folder, add_tensor, change, save, tensors  # noqa: F401  (a fixture)
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, MixtralConfig, MixtralForCausalLM

from fastlora import adapters
from fastlora.adapters import AdapterError


def untied_llama():
    return tiny.llama(tie_word_embeddings=False)


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**tiny.SIZES, num_key_value_heads=2, num_local_experts=4)).eval()


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**tiny.SIZES)).eval()


HEAD = ["lm_head", "embed_tokens"]
KINDS = {
    "LoRA on all linears": (tiny.llama, {"target_modules": "all-linear"}),
    "a pattern of modules": (tiny.llama, {"target_modules": r".*\.(q|v)_proj", "lora_alpha": 3.5}),
    "rsLoRA": (tiny.llama, {**Q, "use_rslora": True}),
    "rank and alpha by module": (
        tiny.llama,
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.1.mlp.up_proj": 7},
            "alpha_pattern": {"q_proj": 3.5},
        },
    ),
    "no task": (tiny.llama, {**Q, "task_type": None}),
    "a head beside": (tiny.llama, {**Q, "modules_to_save": ["lm_head"]}),
    "a norm beside": (tiny.llama, {**Q, "modules_to_save": ["norm"]}),
    "both ends beside, tied": (tiny.llama, {**Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "the embedding": (tiny.llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "the head": (tiny.llama, {"target_modules": ["lm_head", "q_proj"]}),
    "both ends": (tiny.llama, {"target_modules": HEAD}),
    "both ends, tied": (tiny.llama, {"target_modules": HEAD, "ensure_weight_tying": True}),
    "DoRA": (tiny.llama, {"target_modules": "all-linear", "use_dora": True}),
    "DoRA of the embedding": (tiny.llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "a bias of the update": (tiny.gpt2, {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}),
    "biases of the layers": (tiny.gpt2, {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "all biases": (tiny.gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "tokens": (tiny.llama, {**Q, "trainable_token_indices": [1, 5]}),
    "tokens of both ends": (untied_llama, {**Q, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}}),
    "parameters of experts": (
        mixtral,
        {**Q, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "PiSSA": (tiny.llama, {**Q, "init_lora_weights": "pissa_niter_4"}),
    "layers taken twice": (untied_llama, {**Q, "layer_replication": [[0, 2], [1, 2]]}),
    "a classifier": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "an encoder-decoder": (tiny.t5, {"target_modules": ["q", "shared", "lm_head"], "task_type": "SEQ_2_SEQ_LM"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_loads_as_with_peft(kind, tmp_path):
    make, options = KINDS[kind]
    save(tmp_path, make, **options)
    theirs = PeftModel.from_pretrained(make(), tmp_path)
    ours = adapters.load(make(), {"default": adapters.read(tmp_path)})
    expected, got = theirs.state_dict(), ours.state_dict()
    assert type(ours) is type(theirs) and got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    again = get_peft_model_state_dict(ours, save_embedding_layers=False)
    assert again and all(torch.equal(tensor, saved[key]) for key, tensor in again.items())


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_from_before_transformers_moved_the_experts_loads_as_with_peft(tmp_path):
    """Mixtral's experts were linear layers each, and are one parameter now."""
    save(tmp_path, mixtral, **Q)
    change(tmp_path, target_modules=["q_proj", "w1", "w2", "w3"])
    sizes = {"w1": (32, 64), "w2": (64, 32), "w3": (32, 64)}
    for layer in range(2):
        for name, (in_features, out_features) in sizes.items():
            for expert in range(4):
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                add_tensor(tmp_path, f"{key}.lora_A.weight", torch.randn(4, in_features))
                add_tensor(tmp_path, f"{key}.lora_B.weight", torch.randn(out_features, 4))
    theirs = PeftModel.from_pretrained(mixtral(), tmp_path).state_dict()
    ours = adapters.load(mixtral(), {"default": adapters.read(tmp_path)}).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any("experts.lora_A" in name for name in ours)


def test_several_adapters_each_under_its_name(tmp_path):
    one, two = (
        save(tmp_path / "one", target_modules=["q_proj"]),
        save(tmp_path / "two", **{**Q, "use_rslora": True, "r": 2}),
    )
    model = adapters.load(tiny.llama(), {"lora": adapters.read(one), "two": adapters.read(two)})
    assert model.active_adapters == ["lora"]
    for name, folder in (("lora", one), ("two", two)):
        assert all(
            torch.equal(tensor, load_file(folder / "adapter_model.safetensors")[key])
            for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items()
        )


def test_an_adapter_to_train_goes_on(folder):
    from fastlora.config import TrainConfig
    from fastlora.trainable import _add_adapter

    config = TrainConfig(model="m", data="d", output="o", accelerate=False)
    model = _add_adapter(tiny.llama(), config, folder)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 8 and all("lora_" in name for name in trained)
    assert not model.peft_config["default"].inference_mode
    add_tensor(folder, "base_model.model.model.norm.weight", torch.zeros(32))
    with pytest.raises(AdapterError, match=r"model\.norm\.weight"):
        _add_adapter(tiny.llama(), config, folder)


NORM = "base_model.model.model.norm.weight"
MISFITS = {
    "a weight of the base": (lambda found: found.update({NORM: torch.zeros(32)}), rf"1 keys that are none .*: {NORM}"),
    "a weight under LoRA": (
        lambda found: found.update({f"{LAYER}.base_layer.weight": torch.zeros(32, 32)}),
        r"none of this adapter's .*base_layer\.weight",
    ),
    "a layer that has no adapter": (
        lambda found: found.update({f"{LAYER[:-6]}o_proj.lora_A.weight": torch.zeros(4, 32)}),
        r"none of this adapter's .*o_proj\.lora_A",
    ),
    "another adapter's name": (
        lambda found: found.update({f"{LAYER}.lora_A.default.weight": found[A].clone()}),
        r"none of this adapter's .*lora_A\.default\.weight",
    ),
    "without a prefix": (
        lambda found: found.update({"norm.weight": torch.zeros(32)}),
        "none of this adapter's .*: norm",
    ),
    "a missing tensor": (lambda found: found.pop(B), rf"1 of 8 tensors are missing: {B}"),
    "a renamed tensor": (
        lambda found: found.update({f"{LAYER}.lora_C.weight": found.pop(B)}),
        f"lora_C.weight; missing are {B}",
    ),
    "another width": (lambda found: found.update({A: torch.zeros(4, 48)}), rf"{A}: got shape \[4, 48\], .* \[4, 32\]"),
    "integers beside": (
        lambda found: found.update({NORM: torch.ones(32).long()}),
        f"{NORM}: got torch.int64, the model has room for torch.float32",
        {"modules_to_save": ["model.norm"]},
    ),
    "transposed": (lambda found: found.update({B: torch.zeros(4, 4)}), rf"{B}: got shape \[4, 4\], .* \[32, 4\]"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_only_an_adapters_own_keys_reach_a_model(name, folder):
    edit, message, *values = MISFITS[name]
    tensors(edit)(folder)
    change(folder, **(values[0] if values else {}))
    model = tiny.llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        adapters.load(model, {"default": adapters.read(folder)})
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert not hasattr(model, "peft_config")


def test_the_second_of_two_adapters_is_checked_before_the_first_is_loaded(folder, tmp_path):
    good = save(tmp_path / "good", **Q)
    add_tensor(folder, NORM, torch.zeros(32))
    model = tiny.llama()
    with pytest.raises(AdapterError, match=NORM):
        adapters.load(model, {"good": adapters.read(good), "bad": adapters.read(folder)})
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    ("make", "options", "key"),
    [
        (tiny.gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}, "bias"),
        (tiny.llama, {**Q, "init_lora_weights": "pissa"}, "init_lora_weights"),
        (tiny.llama, {**Q, "init_lora_weights": "olora"}, "init_lora_weights"),
        (untied_llama, {**Q, "layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_changes_the_base_is_alone_on_it(make, options, key, position, tmp_path):
    """PEFT loads it, and every adapter beside it then answers on the changed base."""
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone = adapters.read(save(tmp_path / "alone", make, **options))
    plain = adapters.read(save(tmp_path / "plain", make, target_modules=options["target_modules"]))
    pair = {"one": plain, "two": alone} if position else {"one": alone, "two": plain}
    with pytest.raises(AdapterError, match=f"alone: adapter_config.json: {key}: .* changes the base itself"):
        adapters.load(model, pair)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


UNFIT_CONFIGS = {
    "modules that are not there": ({"target_modules": ["nope"]}, "nope"),
    "no pattern": ({"target_modules": "(q_proj"}, "PEFT cannot put it on LlamaForCausalLM"),
    "a rank that no tensor has": ({"r": 8, "rank_pattern": {"v_proj": 4}}, r"got shape \[4, 32\], .* \[8, 32\]"),
    "more modules": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "4 of 12 tensors are missing"),
    "modules beside": ({"modules_to_save": ["norm"]}, "5 of 13 tensors are missing"),
    "tokens beyond the embedding": ({"trainable_token_indices": [40]}, "expected tokens below 40, .* got 40"),
}


@pytest.mark.parametrize("name", UNFIT_CONFIGS)
def test_a_config_that_does_not_fit_the_model(name, folder):
    values, message = UNFIT_CONFIGS[name]
    change(folder, **values)
    with pytest.raises(AdapterError, match=message):
        adapters.load(tiny.llama(), {"default": adapters.read(folder)})


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_regular_expression_that_never_ends_is_refused(key, folder, monkeypatch):
    hanging = "(([a-z0-9._])+)+!"
    change(folder, **{key: {hanging: 4} if key.endswith("pattern") else hanging})
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "PATIENCE", 0.3)
        with pytest.raises(AdapterError, match=f"adapter_config.json: {key}: expected a regular expression that"):
            adapters.check(adapters.read(folder), tiny.llama())
    quick = r".*\.(q|v)_proj"
    change(
        folder, target_modules=quick, exclude_modules="no(thing)?", rank_pattern={quick: 4}, alpha_pattern={quick: 8}
    )
    assert adapters.check(adapters.read(folder), tiny.llama())


def test_an_adapter_of_another_base_names_the_layer(tmp_path):
    save(tmp_path, lambda: tiny.llama(hidden_size=48), **Q)
    message = rf"adapter_model.safetensors: {A}: got shape \[4, 48\], the model has room for \[4, 32\]"
    with pytest.raises(AdapterError, match=message):
        adapters.load(tiny.llama(), {"default": adapters.read(tmp_path)})


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_beside_the_adapter_must_be_the_models_own(tmp_path):
    """PEFT writes the whole base embedding beside an adapter on it; with another one the adapter would change the base."""
    save(tmp_path, target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(tmp_path / "adapter_model.safetensors")
    half = tiny.llama().bfloat16()
    before = half.model.embed_tokens.weight.clone()
    model = adapters.load(half, {"default": adapters.read(tmp_path)})  # the float32 one, rounded
    assert torch.equal(model.get_base_model().lm_head.weight, before)
    tensors(lambda found: found[key][3, 3].add_(1))(tmp_path)
    with pytest.raises(AdapterError, match="an embedding of another base"):
        adapters.load(tiny.llama(), {"default": adapters.read(tmp_path)})


@pytest.mark.parametrize("key", [B, "base_model.model.model.norm.weight"])
def test_what_is_missing_begins_as_peft_begins_where_that_is_allowed(key, tmp_path, caplog):
    folder = save(tmp_path, **Q, modules_to_save=["norm"])
    tensors(lambda found: found.pop(key))(folder)
    model = adapters.load(tiny.llama(), {"default": adapters.read(folder)}, allow_missing=True)
    own = get_peft_model_state_dict(model)
    assert torch.equal(own[key], torch.zeros(32, 4) if key == B else torch.ones(32))
    assert torch.equal(own[A], load_file(folder / "adapter_model.safetensors")[A])
    assert f"1 of 9 tensors are missing: {key}" in caplog.text
