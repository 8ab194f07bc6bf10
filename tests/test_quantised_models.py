"""PEFT over quantised models: what `accelerate` makes of them computes what they computed, within the bound, and gives everything back."""

import copy
import importlib.util
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import ATTENDED, IDS, assert_as_near_as
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import fastlora
from fastlora import ops
from fastlora.peft import quantised

KINDS = ("nf4", "nf4, not double", "fp4", "int8", "torchao")
pytestmark = pytest.mark.skipif(
    not ops.availability()[1].present,
    reason="the native extension is not built (make demo, or pip install -e . with g++)",
)


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


EACH_KIND = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs("torchao" if kind == "torchao" else "bitsandbytes")) for kind in KINDS]
)
NEEDS_BITSANDBYTES = needs("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model. Its sizes are multiples of bitsandbytes' blocks: elsewhere its CPU kernels are wrong."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        attention_bias=True,
    )
    path = tmp_path_factory.mktemp("model")
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(path)
    return str(path)


def load(folder: str, kind: str, dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None, **lora):
    """The same quantised PEFT model every time."""
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        how = TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    elif kind == "int8":
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind[:3],
            bnb_4bit_use_double_quant="not" not in kind,
            bnb_4bit_compute_dtype=compute or dtype,
        )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=how)
    torch.manual_seed(1)
    config = LoraConfig(r=5, lora_alpha=10, target_modules="all-linear", init_lora_weights=False, **lora)
    return get_peft_model(base, config).train()


def unquantised(model):
    """A copy in float64 whose base weights are what the quantised ones stand for."""
    exact = LlamaForCausalLM(LlamaConfig(**model.config.to_dict())).double()
    exact = get_peft_model(exact, copy.deepcopy(model.peft_config["default"])).train()
    own = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            layer, _, last = name.rpartition(".")
            base = quantised.base_of(own[layer])
            if last == "weight" and isinstance(base, quantised.Base):
                parameter.copy_(base.weight(parameter.dtype) + 0)
            else:
                parameter.copy_(dict(own[layer].named_parameters())[last])
    return exact


def run(model):
    model.zero_grad()
    torch.manual_seed(7)
    out = model(input_ids=IDS, attention_mask=ATTENDED, labels=IDS)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), **grads}


def assert_all_fused(model) -> None:
    layers = [row for row in fastlora.report(model) if "proj" in row.name]
    assert len(layers) == 14 and {row.implementation for row in layers} == {"cpu"}, fastlora.report(model)


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_within_the_bound(folder: str, kind: str, dtype: torch.dtype) -> None:
    model = load(folder, kind, dtype)
    exact, eager = run(unquantised(model)), run(model)
    fastlora.accelerate(model)
    assert_as_near_as(run(model), eager, exact)
    assert_all_fused(model)


@NEEDS_BITSANDBYTES
def test_a_compute_dtype_of_its_own(folder: str) -> None:
    """float32 between the layers, and products in bfloat16, as after PEFT's prepare_model_for_kbit_training."""
    model = load(folder, "nf4", torch.float32, torch.bfloat16)
    exact, eager = run(unquantised(model)), run(model)
    fastlora.accelerate(model)
    assert_as_near_as(run(model), eager, exact)


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_mode(folder: str, kind: str, dtype: torch.dtype) -> None:
    """bitsandbytes' int8 layers quantise x there. Its 4-bit layers pack their weight for bfloat16, which PEFT's train mode spares them."""
    model = load(folder, kind, dtype)
    if kind == "int8":
        model.eval()
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        fastlora.accelerate(model.eval())
        ours, one = model(input_ids=IDS).logits, model(input_ids=IDS[:1, :1]).logits
    assert one.isfinite().all()
    close = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    assert (ours - plain).abs().max() <= close * plain.abs().max()
    assert_all_fused(model)


@NEEDS_BITSANDBYTES
def test_int8_with_outliers_is_bitsandbytes_own_product(folder: str) -> None:
    layer = load(folder, "int8").base_model.model.model.layers[0].mlp.up_proj.eval()
    layer.scaling["default"] = 0.0
    x = torch.randn(2, 5, 64)
    x[..., 3] = 20.0
    with torch.no_grad():
        expected = layer.base_layer(x)
        wrapped = nn.Module()
        wrapped.layer = layer
        fastlora.accelerate(wrapped)
        assert torch.equal(layer(x), expected)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any()


@EACH_KIND
def test_the_classes_are_peft_s_own_and_are_restored(folder: str, kind: str) -> None:
    model = load(folder, kind)
    before = run(model)
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    fastlora.accelerate(model)
    own = type(model.base_model.model.model.layers[0].mlp.up_proj)
    assert own not in classes and any(own.__mro__[-len(kind_.__mro__) :] == kind_.__mro__ for kind_ in classes)
    assert list(model.state_dict()) == keys
    fastlora.restore(model)
    assert [type(module) for module in model.modules()] == classes
    after = run(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


@EACH_KIND
def test_dropout_draws_the_mask_of_every_lora_layer(folder: str, kind: str) -> None:
    """The same as of the unquantised model's layer with the same seed."""
    model = fastlora.accelerate(load(folder, kind, lora_dropout=0.5))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(6, 64)
    torch.manual_seed(3)
    y = layer(x)
    weight = quantised.base_of(layer.base_layer).weight(torch.float32)
    torch.manual_seed(3)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = fastlora.functional.lora_linear(x, weight + 0, None, a, b, layer.scaling["default"], dropout_p=0.5)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@EACH_KIND
def test_siblings_share_x(folder: str, kind: str) -> None:
    model = fastlora.accelerate(load(folder, kind))
    run(model)
    reasons = {row.name.rpartition(".")[2]: row.reason for row in fastlora.report(model)}
    assert "x read once with k_proj, v_proj" in reasons["q_proj"] and "x read once with gate_proj" in reasons["up_proj"]


@EACH_KIND
def test_gradient_checkpointing(folder: str, kind: str) -> None:
    model = fastlora.accelerate(load(folder, kind, lora_dropout=0.25))
    expected = run(model)
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = run(model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@EACH_KIND
def test_a_mixed_batch(folder: str, kind: str) -> None:
    model = load(folder, kind).eval()
    model.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    fastlora.accelerate(model)
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=names).logits
        for row, name in enumerate(names):
            model.set_adapter("default" if name == "__base__" else name)
            own = IDS[row : row + 1] if kind != "int8" else IDS  # what int8 does to x depends on its other rows
            alone = model(input_ids=own, adapter_names=[name] * len(own)).logits[row if kind == "int8" else 0]
            torch.testing.assert_close(mixed[row], alone, rtol=1e-3, atol=1e-3)
    assert_all_fused(model)


@EACH_KIND
def test_merging_is_peft_s_and_is_seen(folder: str, kind: str) -> None:
    """PEFT quantises the merged weight anew: what the layer multiplies by afterwards is that."""
    model, peer = load(folder, kind), load(folder, kind)
    fastlora.accelerate(model)
    results = []
    for one in (model, peer):
        run(one)
        one.merge_adapter()
        merged = run_forward(one)
        one.unmerge_adapter()
        results.append((merged, run_forward(one)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert_all_fused(model)


@EACH_KIND
def test_copies_and_pickles_find_their_class(folder: str, kind: str) -> None:
    layer = fastlora.accelerate(load(folder, kind)).base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(20, 64)
    expected = layer(x)
    twins = [copy.deepcopy(layer)] if kind == "torchao" else [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for twin in twins:
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), expected)


@EACH_KIND
def test_adapter_files_go_through_plain_peft(folder: str, kind: str, tmp_path) -> None:
    model = fastlora.accelerate(load(folder, kind))
    expected = run(model)["logits"]
    model.save_pretrained(tmp_path)
    base = load(folder, kind).unload()
    plain = PeftModel.from_pretrained(base, tmp_path).train()
    torch.testing.assert_close(run_forward(plain), expected, rtol=1e-4, atol=1e-4)


def run_forward(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=ATTENDED).logits


def words_of(layer) -> str:
    """What the report says of a call."""
    layer(torch.randn(3, 64))
    return fastlora.report(layer)[0].reason


@NEEDS_BITSANDBYTES
def test_the_weight_stays_as_it_is_when_bitsandbytes_infers(folder: str) -> None:
    """It would pack it for bfloat16, if it has kernels for that here, and give no gradient from then on."""
    model = load(folder, "nf4")
    base = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    base.support_avx512bf16_for_cpu = True
    fastlora.accelerate(model)
    before = base.weight.data.clone()
    with torch.no_grad(), model.eval().disable_adapter():
        model(input_ids=IDS)
    assert torch.equal(base.weight.data, before)
    run(model.train())
    assert_all_fused(model)
    fastlora.restore(model)
    assert base.support_avx512bf16_for_cpu is True
    assert not [name for name in vars(base) if "fastlora" in name]


@NEEDS_BITSANDBYTES
def test_what_stands_in_the_way_is_told(folder: str) -> None:
    layer = fastlora.accelerate(load(folder, "nf4")).base_model.model.model.layers[0].mlp.up_proj
    base = layer.base_layer
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast is on, and the weight quantised" in words_of(layer)
    handle = base.register_forward_hook(lambda *_: None)
    assert "the base layer carries a hook" in words_of(layer)
    handle.remove()
    base.weight.quant_state.packing_format_for_cpu = True
    assert "bitsandbytes has packed the weight for its own inference" in fastlora.report(layer)[0].reason
    base.weight.quant_state.packing_format_for_cpu = False
    assert "native C++" in words_of(layer)


@needs("torchao")
def test_torchao_weights_that_are_not_int8_by_row_are_left_to_torchao(folder: str) -> None:
    layer = load(folder, "torchao").base_model.model.model.layers[0].mlp.up_proj
    weight = layer.base_layer.weight
    weight.act_pre_scale = torch.ones(64)
    assert quantised.base_of(layer.base_layer) == "torchao quantises or scales x"
    weight.act_pre_scale = None
    zero = weight.zero_point
    weight.zero_point = torch.ones(128, 1, dtype=torch.int8)
    assert quantised.base_of(layer.base_layer) == "the weight has zero points"
    weight.zero_point = zero
    assert isinstance(quantised.base_of(layer.base_layer), quantised.Base)
