"""PEFT over quantised models: what `accelerate` makes of them computes what they computed, within the bound, and gives everything back."""

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft_models import ATTENDED, IDS, assert_as_near_as
from quantised_models import (  # noqa: F401  (a fixture)
    EACH_KIND,
    NATIVE,
    NEEDS_BITSANDBYTES,
    a_folder,
    load,
    needs,
    run,
    unquantised,
)
from torch import nn

import fastlora
from fastlora.peft import quantised

pytestmark = NATIVE


EACH_ADAPTER = pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])


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
@pytest.mark.parametrize("method", ["LoRA", "IA3"])
def test_a_step_under_autocast(folder: str, kind: str, method: str) -> None:
    """As Trainer's bf16=True has it, over a model in bfloat16: autocast has nothing to cast but the adapters."""
    targets = {"target_modules": r".*proj", "feedforward_modules": r".*down_proj"}
    config = None if method == "LoRA" else IA3Config(**targets, init_ia3_weights=False)
    model = load(folder, kind, torch.bfloat16, method=config)
    exact = run(unquantised(model))
    with torch.autocast("cpu", torch.bfloat16):
        eager = run(model)
        fastlora.accelerate(model, frozen=True)
        assert_as_near_as(run(model), eager, exact)
        assert_all_fused(model)
        assert fastlora.report(model)[-1].implementation == "cpu", "the head"


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
@EACH_ADAPTER
def test_gradient_checkpointing(folder: str, kind: str, use_dora: bool) -> None:
    model = fastlora.accelerate(load(folder, kind, lora_dropout=0.25, use_dora=use_dora))
    expected = run(model)
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = run(model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@EACH_KIND
@EACH_ADAPTER
def test_a_mixed_batch(folder: str, kind: str, use_dora: bool) -> None:
    model = load(folder, kind, use_dora=use_dora).eval()
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


def assert_merges_alike(model, peer) -> None:
    """After a step, merged and unmerged again: what an accelerated model computes is what plain PEFT does, and its layers are fused in the end."""
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
def test_merging_is_peft_s_and_is_seen(folder: str, kind: str) -> None:
    """PEFT quantises the merged weight anew: what the layer multiplies by afterwards is that."""
    model = fastlora.accelerate(load(folder, kind))
    assert_merges_alike(model, load(folder, kind))


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
@EACH_ADAPTER
def test_adapter_files_go_through_plain_peft(folder: str, kind: str, use_dora: bool, tmp_path) -> None:
    model = fastlora.accelerate(load(folder, kind, use_dora=use_dora))
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
        assert "autocast is on, the weight quantised, and x float32" in words_of(layer)
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


@needs("torchao")
def test_torchao_int4_is_left_to_torchao_which_has_no_gradient() -> None:
    """On a CPU torchao has int4 weights as a prototype only."""
    torchao: Any = pytest.importorskip("torchao.quantization")
    int4: Any = pytest.importorskip("torchao.prototype.quantization.int4", reason="this torchao has no int4 on a CPU")
    base = nn.Sequential(nn.Linear(256, 128))
    torchao.quantize_(base, int4.PrototypeInt4WeightOnlyConfig(group_size=32))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 256, requires_grad=True)
    expected = model(x)
    words = "torchao has packed its int4 weight for a kernel of torch's, which has no gradient"
    with pytest.warns(UserWarning, match=f"fused none of 1 LoRA layers: {words}"):
        fastlora.accelerate(model)
    assert torch.equal(model(x), expected)
    [row] = fastlora.report(model)
    assert (row.implementation, row.reason) == ("peft", words)
    with pytest.raises(RuntimeError, match="_weight_int4pack_mm_for_cpu is not implemented"):
        expected.sum().backward()
