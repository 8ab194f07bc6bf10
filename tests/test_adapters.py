"""Adapter folders: what PEFT writes is taken, bit for bit; anything else is an error that names file and key, before a model changes."""

import json
import struct
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fastlora import adapters
from fastlora.adapters import AdapterError

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2_SIZES = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def llama(**options):
    config = LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, **options})
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def untied_llama():
    return llama(tie_word_embeddings=False)


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, bos_token_id=0, eos_token_id=0)).eval()


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
    ).eval()


def save(folder: Path, make=llama, **options) -> Path:
    """An adapter with random values, saved by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make(), LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data, std=0.3)
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "adapter", target_modules=["q_proj", "v_proj"])


Q = {"target_modules": ["q_proj"]}
HEAD = ["lm_head", "embed_tokens"]
KINDS = {
    "LoRA on all linears": (llama, {"target_modules": "all-linear"}),
    "a pattern of modules": (llama, {"target_modules": r".*\.(q|v)_proj", "lora_alpha": 3.5}),
    "rsLoRA": (llama, {**Q, "use_rslora": True}),
    "rank and alpha by module": (
        llama,
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.1.mlp.up_proj": 7},
            "alpha_pattern": {"q_proj": 3.5},
        },
    ),
    "no task": (llama, {**Q, "task_type": None}),
    "a head beside": (llama, {**Q, "modules_to_save": ["lm_head"]}),
    "a norm beside": (llama, {**Q, "modules_to_save": ["norm"]}),
    "both ends beside, tied": (llama, {**Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "the embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "the head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "both ends": (llama, {"target_modules": HEAD}),
    "both ends, tied": (llama, {"target_modules": HEAD, "ensure_weight_tying": True}),
    "DoRA": (llama, {"target_modules": "all-linear", "use_dora": True}),
    "DoRA of the embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "a bias of the update": (gpt2, {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}),
    "biases of the layers": (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "all biases": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "tokens": (llama, {**Q, "trainable_token_indices": [1, 5]}),
    "tokens of both ends": (untied_llama, {**Q, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}}),
    "parameters of experts": (
        mixtral,
        {**Q, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "PiSSA": (llama, {**Q, "init_lora_weights": "pissa_niter_4"}),
    "layers taken twice": (untied_llama, {**Q, "layer_replication": [[0, 2], [1, 2]]}),
    "a classifier": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "an encoder-decoder": (t5, {"target_modules": ["q", "shared", "lm_head"], "task_type": "SEQ_2_SEQ_LM"}),
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
    model = adapters.load(llama(), {"lora": adapters.read(one), "two": adapters.read(two)})
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
    model = _add_adapter(llama(), config, folder)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 8 and all("lora_" in name for name in trained)
    assert not model.peft_config["default"].inference_mode
    add_tensor(folder, "base_model.model.model.norm.weight", torch.zeros(32))
    with pytest.raises(AdapterError, match=r"model\.norm\.weight"):
        _add_adapter(llama(), config, folder)


def change(folder: Path, **values) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def write(text: str):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def config(**values):
    return lambda folder: change(folder, **values)


def tensors(edit):
    """An edit of the tensors by key."""

    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        found = load_file(file)
        edit(found)
        save_file(found, file)

    return apply


def add_tensor(folder: Path, key: str, tensor: torch.Tensor) -> None:
    tensors(lambda found: found.update({key: tensor}))(folder)


def header(edit, data: bytes | None = None):
    """An edit of the header's text; and other bytes of tensors."""

    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        text = edit(content[8 : 8 + length].decode()).encode()
        rest = content[8 + length :] if data is None else data
        file.write_bytes(struct.pack("<Q", len(text)) + text + rest)

    return apply


def entries(edit):
    """An edit of the header's entries by key."""

    def apply(text: str) -> str:
        found = json.loads(text)
        edit(found)
        return json.dumps(found)

    return header(apply)


def content(edit):
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(edit(file.read_bytes()))

    return apply


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
ONE = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
DAMAGED_CONFIGS = {
    "null": (write("null"), None, "expected a JSON object, got None"),
    "a list": (write('[{"peft_type": "LORA"}]'), None, "expected a JSON object"),
    "empty": (write(""), None, "cannot be read as JSON"),
    "no text": (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe{"), None, "cannot be read"),
    "cut off": (write('{"peft_type": "LORA", "r": 4'), None, "cannot be read as JSON"),
    "deep": (write("[" * 100_000), None, "cannot be read as JSON"),
    "a little too deep": (
        write('{"peft_type": "LORA", "auto_mapping": {"a": ' + "[" * 500 + "]" * 500 + "}}"),
        None,
        "nested deeper than",
    ),
    "5,000 digits": (write('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}"), None, "cannot be read as JSON"),
    "a key twice": (write('{"peft_type": "LORA", "r": 4, "r": 8}'), None, "'r' stands there twice"),
    "NaN": (write('{"peft_type": "LORA", "lora_alpha": NaN}'), None, "NaN is no JSON"),
    "no type": (write('{"r": 4}'), "peft_type", "expected 'LORA', got None"),
    "an unknown type": (config(peft_type="NOVEL"), "peft_type", "expected 'LORA', got 'NOVEL'"),
    "another type": (config(peft_type="IA3"), "peft_type", "expected 'LORA'"),
    "a type that is a list": (config(peft_type=["LORA"]), "peft_type", "expected 'LORA'"),
    "r in words": (config(r="16"), "r", "expected int, got '16'"),
    "r with a fraction": (config(r=4.0), "r", "expected int, got 4.0"),
    "r is true": (config(r=True), "r", "expected int, got True"),
    "r 0": (config(r=0), "r", "expected a rank from 1"),
    "r 1e9": (config(r=10**9), "r", "expected a rank from 1 to 65,536"),
    "r by module of 1e9": (config(rank_pattern={"q_proj": 10**9}), "rank_pattern", "expected ranks"),
    "r by module in words": (config(rank_pattern={"q_proj": "4"}), "rank_pattern", "expected ranks"),
    "r by module as a list": (config(rank_pattern=[4]), "rank_pattern", "expected dict or None"),
    "alpha 1e300": (config(lora_alpha=1e300), "lora_alpha", "expected a number that float32 holds, got 1e\\+300"),
    "alpha of 400 digits": (config(lora_alpha=10**400), "lora_alpha", "expected a number that float32 holds"),
    "alpha in words": (config(lora_alpha="8"), "lora_alpha", "expected float"),
    "alpha by module 1e300": (config(alpha_pattern={"q_proj": -1e300}), "alpha_pattern", "expected numbers"),
    "dropout 2": (config(lora_dropout=2), "lora_dropout", "expected a probability"),
    "modules as a number": (config(target_modules=3), "target_modules", "a list of str"),
    "modules as numbers": (config(target_modules=[3]), "target_modules", "a list of str"),
    "an unknown bias": (config(bias="some"), "bias", "expected 'none' or 'all' or 'lora_only'"),
    "a base that is a number": (
        config(base_model_name_or_path=1),
        "base_model_name_or_path",
        "expected str or None",
    ),
    "an unknown task": (config(task_type="CHESS"), None, "CHESS"),
    "tokens below 0": (config(trainable_token_indices=[-1]), "trainable_token_indices", "expected tokens, 0 or more"),
    "a million layers": (config(layer_replication=[[0, 10**6]]), "layer_replication", "at most 4,096 layers"),
    "what PEFT refuses": (config(target_modules="q", layers_to_transform=[0]), None, "PEFT does not take it"),
}
DAMAGED_TENSORS = {
    "of another rank": (config(r=8), A, "of rank 4, adapter_config.json has 8"),
    "empty": (content(lambda data: b""), None, "no length of a header"),
    "no file of this kind": (content(lambda data: b"PK\3\4" + data), None, "with a header of"),
    "cut off in the header": (content(lambda data: data[:100]), None, "a part of one"),
    "cut off in the tensors": (content(lambda data: data[:-1]), None, "cut off, or grown"),
    "grown": (content(lambda data: data + b"\0"), None, "cut off, or grown"),
    "a header of 2**63 bytes": (
        content(lambda data: b"\xff" * 8 + data[8:]),
        None,
        "with a header of 18,446,744,073,709,551,615",
    ),
    "a header that is a list": (header(lambda text: f"[{text}]"), None, "expected a JSON object"),
    "a deep header": (header(lambda text: '{"a": ' * 50_000), None, "cannot be read as JSON"),
    "a key twice": (header(lambda text: f'{{"a": {ONE}, "a": {ONE}}}', bytes(4)), None, "'a' stands there twice"),
    "overlapping": (
        entries(lambda found: found[A].update(data_offsets=found[B]["data_offsets"])),
        A,
        "its bytes begin at",
    ),
    "out of range": (
        entries(lambda found: found[A].update(data_offsets=[10**12, 10**12 + 512])),
        B,
        "its bytes begin at",
    ),
    "backwards": (entries(lambda found: found[A].update(data_offsets=[512, 0])), A, "does not fill data_offsets"),
    "a shape of 2**80": (entries(lambda found: found[A].update(shape=[2**40, 2**40])), A, "does not fill"),
    "a shape of many digits": (
        entries(lambda found: found[A].update(shape=[10**4000, 10**4000])),
        A,
        "does not fill",
    ),
    "a negative shape": (entries(lambda found: found[A].update(shape=[-4, -32])), A, "expected numbers from 0"),
    "a shape in words": (entries(lambda found: found[A].update(shape="4, 32")), A, "expected numbers from 0"),
    "an entry that is a number": (
        entries(lambda found: found.update({A: 3})),
        A,
        "expected dtype, shape and data_offsets",
    ),
    "an unknown dtype": (entries(lambda found: found[A].update(dtype="F99")), A, "expected one of the dtypes"),
    "integers": (
        tensors(lambda found: found.update({A: found[A].long()})),
        A,
        "expected floating point, got torch.int64",
    ),
    "8 bits": (
        tensors(lambda found: found.update({A: found[A].to(torch.float8_e4m3fn)})),
        A,
        "expected one of the dtypes",
    ),
    "no tensors": (tensors(lambda found: found.clear()), None, "holds no tensors"),
    "no elements": (tensors(lambda found: found.update({A: torch.empty(0, 32)})), A, "has no elements"),
    "NaN": (tensors(lambda found: found[A][0, 0].fill_(torch.nan)), A, "holds NaN or infinity"),
    "infinity": (tensors(lambda found: found[B][-1, -1].fill_(-torch.inf)), B, "holds NaN or infinity"),
    "an update beyond float32": (
        tensors(lambda found: (found[A].fill_(1e20), found[B].fill_(1e20))),
        A,
        "its update is more than float32 holds",
    ),
    "a vector": (tensors(lambda found: found.update({A: found[A][0].clone()})), A, "expected a matrix"),
}
DAMAGED = {
    **{f"config: {name}": ("adapter_config.json", *case) for name, case in DAMAGED_CONFIGS.items()},
    **{f"tensors: {name}": ("adapter_model.safetensors", *case) for name, case in DAMAGED_TENSORS.items()},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_the_key(name, folder):
    file, damage, key, message = DAMAGED[name]
    damage(folder)
    with pytest.raises(AdapterError, match=message) as raised:
        adapters.read(folder)
    assert raised.value.file == folder / file and raised.value.key == key
    assert str(raised.value).startswith(f"adapter={folder}: {file}: ") and "--" not in str(raised.value)
    assert len(str(raised.value)) < 2000


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
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        adapters.load(model, {"default": adapters.read(folder)})
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert not hasattr(model, "peft_config")


def test_the_second_of_two_adapters_is_checked_before_the_first_is_loaded(folder, tmp_path):
    good = save(tmp_path / "good", **Q)
    add_tensor(folder, NORM, torch.zeros(32))
    model = llama()
    with pytest.raises(AdapterError, match=NORM):
        adapters.load(model, {"good": adapters.read(good), "bad": adapters.read(folder)})
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    ("make", "options", "key"),
    [
        (gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}, "bias"),
        (llama, {**Q, "init_lora_weights": "pissa"}, "init_lora_weights"),
        (llama, {**Q, "init_lora_weights": "olora"}, "init_lora_weights"),
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
        adapters.load(llama(), {"default": adapters.read(folder)})


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_regular_expression_that_never_ends_is_refused(key, folder, monkeypatch):
    hanging = "(([a-z0-9._])+)+!"
    change(folder, **{key: {hanging: 4} if key.endswith("pattern") else hanging})
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "PATIENCE", 0.3)
        with pytest.raises(AdapterError, match=f"adapter_config.json: {key}: expected a regular expression that"):
            adapters.check(adapters.read(folder), llama())
    quick = r".*\.(q|v)_proj"
    change(
        folder, target_modules=quick, exclude_modules="no(thing)?", rank_pattern={quick: 4}, alpha_pattern={quick: 8}
    )
    assert adapters.check(adapters.read(folder), llama())


def test_an_adapter_of_another_base_names_the_layer(tmp_path):
    save(tmp_path, lambda: llama(hidden_size=48), **Q)
    message = rf"adapter_model.safetensors: {A}: got shape \[4, 48\], the model has room for \[4, 32\]"
    with pytest.raises(AdapterError, match=message):
        adapters.load(llama(), {"default": adapters.read(tmp_path)})


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_beside_the_adapter_must_be_the_models_own(tmp_path):
    """PEFT writes the whole base embedding beside an adapter on it; with another one the adapter would change the base."""
    save(tmp_path, target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(tmp_path / "adapter_model.safetensors")
    half = llama().bfloat16()
    before = half.model.embed_tokens.weight.clone()
    model = adapters.load(half, {"default": adapters.read(tmp_path)})  # the float32 one, rounded
    assert torch.equal(model.get_base_model().lm_head.weight, before)
    tensors(lambda found: found[key][3, 3].add_(1))(tmp_path)
    with pytest.raises(AdapterError, match="an embedding of another base"):
        adapters.load(llama(), {"default": adapters.read(tmp_path)})


@pytest.mark.parametrize("key", [B, "base_model.model.model.norm.weight"])
def test_what_is_missing_begins_as_peft_begins_where_that_is_allowed(key, tmp_path, caplog):
    folder = save(tmp_path, **Q, modules_to_save=["norm"])
    tensors(lambda found: found.pop(key))(folder)
    model = adapters.load(llama(), {"default": adapters.read(folder)}, allow_missing=True)
    own = get_peft_model_state_dict(model)
    assert torch.equal(own[key], torch.zeros(32, 4) if key == B else torch.ones(32))
    assert torch.equal(own[A], load_file(folder / "adapter_model.safetensors")[A])
    assert f"1 of 9 tensors are missing: {key}" in caplog.text


def test_fields_of_another_peft_are_told_and_ignored(folder, caplog):
    change(folder, use_novel=True, runtime_config={"ephemeral_gpu_offload": True})
    assert adapters.read(folder).config.r == 4
    assert "does not know and ignores use_novel" in caplog.text


def test_what_is_no_adapter_folder(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        adapters.read(tmp_path / "none")
    model = tiny.save_model(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json; it holds a model, and is used as model="):
        adapters.read(model)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match=r"there is no adapter_model\.safetensors"):
        adapters.read(folder)
