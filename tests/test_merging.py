"""`merged`: adapters in the weights for a while, and afterwards the weights bit for bit, in 16 bits as well, where PEFT's unmerge leaves others."""

import copy
import warnings

import pytest
import tiny
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

import fastlora
from fastlora.peft import FusedLinear

IDS = torch.randint(36, (2, 9), generator=torch.Generator().manual_seed(1))

KINDS = {
    "linear": (LoraConfig(target_modules="all-linear", r=4), tiny.llama),
    "by column": (LoraConfig(target_modules=["c_attn"], r=4, fan_in_fan_out=True, lora_bias=True), tiny.gpt2),
    "tied ends": (LoraConfig(target_modules=["lm_head", "embed_tokens"], r=4), tiny.llama),
    "dora": (LoraConfig(target_modules=["q_proj"], r=4, use_dora=True), tiny.llama),
    "ia3": (IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True), tiny.gpt2),
    "norms": (LNTuningConfig(target_modules=["input_layernorm"]), tiny.llama),
    "tokens": (LoraConfig(target_modules=["q_proj"], r=4, trainable_token_indices=[1, 5]), tiny.llama),
}


def wrapped(kind, dtype):
    config, make = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make().to(dtype), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter.data, std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


def bits(model):
    return {
        name: (id(parameter), parameter.detach().clone())
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def assert_as_before(model, before):
    after = bits(model)
    assert after.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert after[name][0] == identity and torch.equal(after[name][1], value), name
    assert not any(getattr(module, "merged", False) for module in model.modules())


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_weight_comes_back_bit_for_bit(kind, dtype, accelerated):
    model = wrapped(kind, dtype)
    if accelerated:
        fastlora.accelerate(model, frozen=True)
    before, beside = bits(model), logits(model)
    theirs = copy.deepcopy(model)
    theirs.merge_adapter()
    with fastlora.merged(model) as held:
        assert held is model and any(getattr(module, "merged", False) for module in model.modules())
        inside = logits(model)
    assert_as_before(model, before)
    assert torch.equal(logits(model), beside)
    if dtype is torch.float32:
        torch.testing.assert_close(inside, beside, rtol=1e-3, atol=1e-3)
    # PEFT writes both updates into a weight that two layers share, and each has both.
    assert torch.equal(inside, logits(theirs)) == (kind != "tied ends")
    with model.disable_adapter():
        assert not torch.equal(logits(model), inside)


def test_pefts_own_unmerge_does_not():
    """What this is for."""
    model = wrapped("linear", torch.bfloat16)
    before = bits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert any(not torch.equal(value, before[name][1]) for name, (_, value) in bits(model).items())


def test_an_error_inside_or_underway_leaves_all_as_it_was(monkeypatch):
    model = fastlora.accelerate(wrapped("linear", torch.bfloat16))
    before = bits(model)
    with pytest.raises(KeyError), fastlora.merged(model):
        raise KeyError
    assert_as_before(model, before)
    layers, merge = [], FusedLinear.merge

    def fail(self, *args, **kwargs):
        layers.append(self)
        if len(layers) == 5:
            raise MemoryError
        merge(self, *args, **kwargs)

    monkeypatch.setattr(FusedLinear, "merge", fail)
    with pytest.raises(MemoryError), fastlora.merged(model):
        pass
    assert_as_before(model, before)


def test_what_is_disabled_or_unmerged_inside_changes_nothing_for_good():
    model = wrapped("linear", torch.bfloat16)
    before, beside = bits(model), logits(model)
    with fastlora.merged(model):
        with model.disable_adapter():
            logits(model)  # PEFT subtracts
        model.unmerge_adapter()
    assert_as_before(model, before)
    assert torch.equal(logits(model), beside)


def test_one_of_several_adapters():
    model = wrapped("linear", torch.float32)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], r=3, init_lora_weights=False))
    model.set_adapter("other")
    other = logits(model)
    model.set_adapter("default")
    before = logits(model)
    with fastlora.merged(model, ["other"]):
        torch.testing.assert_close(logits(model), other)
    assert torch.equal(logits(model), before)  # layers that the other has none of run the active adapter again


def test_what_is_merged_is_no_more_trained_than_before(monkeypatch):
    """Nor is an update subtracted from a weight that goes anyway."""
    model = fastlora.accelerate(wrapped("linear", torch.float32))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    monkeypatch.setattr(FusedLinear, "unmerge", None)
    with fastlora.merged(model):
        assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.filterwarnings("error:Already unmerged")
def test_norms_that_were_unmerged_inside_are_not_unmerged_again():
    model = wrapped("norms", torch.float32)
    before = bits(model)
    with fastlora.merged(model):
        model.unmerge_adapter()
    assert_as_before(model, before)


def test_what_peft_refuses_to_merge_is_refused():
    model = wrapped("linear", torch.float32)
    model.base_model.model.quantization_method = "gptq"
    with pytest.raises(ValueError, match="Cannot merge LORA layers when the model is gptq quantized"):
        fastlora.merged(model).__enter__()


def test_what_cannot_be_merged_is_refused_and_named():
    model = wrapped("linear", torch.float32)
    with pytest.raises(ValueError, match="adapter_names: got 'x', expected the model's adapters default"):
        fastlora.merged(model, ["x"]).__enter__()
    for bare in (
        tiny.llama(),
        get_peft_model(tiny.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
    ):
        with pytest.raises(ValueError, match="model: has no adapters that could be merged"):
            fastlora.merged(bare).__enter__()
    model.merge_adapter()
    with pytest.raises(ValueError, match="model: is merged already"):
        fastlora.merged(model).__enter__()


class OwnParameter(nn.Parameter):
    pass


@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.float8_e4m3fn, OwnParameter], ids=str)
def test_a_weight_of_another_kind_is_refused(kind):
    model = wrapped("linear", torch.float32)
    layer = model.base_model.model.model.layers[1].mlp.up_proj.base_layer
    weight = layer.weight.detach()
    layer.weight = OwnParameter(weight) if kind is OwnParameter else nn.Parameter(weight.to(kind), requires_grad=False)
    before = bits(model)
    with pytest.raises(TypeError, match="over a Linear, expected one weight of 16 bits or more"):
        fastlora.merged(model).__enter__()
    after = bits(model)
    assert {name: identity for name, (identity, _) in after.items()} == {
        name: identity for name, (identity, _) in before.items()
    }
