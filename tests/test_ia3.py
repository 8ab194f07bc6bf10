"""IA³ layers of PEFT's, accelerated: PEFT's results, gradients and files; and what stands in the way."""

import copy
import pickle
import re

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from peft_models import FAMILIES, IDS, assert_equal_to_peft, in_each_precision, llama, logits, run
from torch import nn

import fastlora
from fastlora import ops
from fastlora.peft import FrozenLinear, scaled

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
TARGETS = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
}


def ia3_model(family="llama", dtype=FLOAT32, autocast_adapter_dtype=True, seed=0):
    torch.manual_seed(seed)
    base, labels, _ = FAMILIES[family]()
    targets, feedforward = TARGETS[family]
    config = IA3Config(
        target_modules=targets,
        feedforward_modules=feedforward,
        fan_in_fan_out=family == "gpt2",
        modules_to_save=["classifier"] if family == "bert" else None,
    )
    model = get_peft_model(base.to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model, labels


def layers_of(model):
    return [module for module in model.modules() if scaled.is_swapped(module)]


def reasons_of(model):
    return [entry.reason for entry in fastlora.report(model) if "ia3" not in entry.name]


@in_each_precision
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_peft(family, dtype, adapters_float32, autocast):
    model, ours = assert_equal_to_peft(lambda seed: ia3_model(family, dtype, adapters_float32, seed), dtype, autocast)
    assert any("ia3_l" in name for name in ours)
    assert len(layers_of(model)) == len(fastlora.report(model)) > 0
    assert all(
        entry.implementation in ops.IMPLEMENTATIONS and "PEFT" not in entry.reason for entry in fastlora.report(model)
    )
    assert {re.search("before it|after it", reason).group() for reason in reasons_of(model)} == {
        "before it",
        "after it",
    }


def test_frozen_layers_beside_them():
    model, labels = ia3_model()
    eager = run(copy.deepcopy(model), labels)
    fastlora.accelerate(model, frozen=True)
    assert sum(type(module) is FrozenLinear for module in model.modules()) == 9
    for name, value in run(model, labels).items():
        assert torch.allclose(value, eager[name], atol=1e-5), name
    fastlora.restore(model)
    assert not layers_of(model) and not any(type(module) is FrozenLinear for module in model.modules())


def test_merging_switching_and_unloading_are_pefts():
    model, _ = ia3_model()
    targets, feedforward = TARGETS["llama"]
    model.add_adapter("other", IA3Config(target_modules=targets, feedforward_modules=feedforward))
    for name, parameter in model.named_parameters():
        if "ia3_l.other" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.eval()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    for active in ("default", "other", ["default", "other"]):
        for each in (model, peer):
            each.base_model.set_adapter(active)
        assert torch.allclose(logits(model), logits(peer), atol=1e-5)
        assert not any("PEFT" in reason for reason in reasons_of(model))
    with model.disable_adapter(), peer.disable_adapter():
        assert torch.equal(logits(model), logits(peer))
        assert "PEFT's own forward: adapters are disabled" in reasons_of(model)
    for each in (model, peer):
        each.base_model.set_adapter("other")
    before = logits(model)
    model.merge_adapter()
    assert torch.allclose(
        logits(model), before, atol=1e-5
    ) and "PEFT's own forward: the adapter is merged" in reasons_of(model)
    with pytest.warns(UserWarning, match="inaccurate"):
        model.unmerge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-5)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(input_ids=IDS).logits, before, atol=1e-5) and not layers_of(merged)


def test_saved_adapter_is_pefts(tmp_path):
    model, _ = ia3_model()
    model.eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "pefts")
    fastlora.accelerate(model).save_pretrained(tmp_path / "ours")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("pefts", "ours")]
    assert files[0].read_bytes() == files[1].read_bytes()
    torch.manual_seed(0)
    loaded = fastlora.accelerate(PeftModel.from_pretrained(llama()[0], tmp_path / "ours").eval())
    assert layers_of(loaded) and torch.allclose(logits(loaded), expected, atol=1e-5)


def test_copy_and_pickle():
    model = fastlora.accelerate(ia3_model()[0].eval())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model)) and len(layers_of(other)) == 6


def test_compiles_whole():
    model, labels = ia3_model()
    eager = run(fastlora.accelerate(model), labels)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = run(compiled, labels)
    assert torch.allclose(found["logits"], eager["logits"], atol=1e-5)


def test_what_stands_in_the_way():
    """PEFT's forward, and its results, and words for it."""
    x = torch.randn(3, 8)

    def make(kind=nn.Linear):
        torch.manual_seed(0)
        return get_peft_model(nn.Sequential(kind(8, 6)), IA3Config(target_modules=["0"], feedforward_modules=[]))

    def factor(model):
        return model.base_model.model[0].ia3_l

    changes = {
        "the base layer carries a hook": lambda m: m.base_model.model[0].base_layer.register_forward_hook(
            lambda *_: None
        ),
        "the base weight or bias is trained": lambda m: m.base_model.model[0].base_layer.bias.requires_grad_(),
        "a factor is float64": lambda m: setattr(factor(m)["default"], "data", factor(m)["default"].data.double()),
        "a factor is float32 [1, 6] on meta": lambda m: factor(m).update(
            {"default": nn.Parameter(torch.ones(1, 6, device="meta"))}
        ),
        "no adapter is active": lambda m: m.base_model.model[0].delete_adapter("default"),
    }
    for words, change in changes.items():
        model = fastlora.accelerate(make())
        change(model)
        peer = fastlora.restore(copy.deepcopy(model))
        if "meta" not in words:
            assert torch.allclose(model(x), peer(x))
        [reason] = reasons_of(model)
        assert words in reason, reason
    model = fastlora.accelerate(make())
    for wrong in (x.double(), x[:, :4]):
        with pytest.raises(RuntimeError):
            model(wrong)
        assert "and the weight float32 [6, 8] on cpu" in reasons_of(model)[0]
    assert torch.func.vmap(model)(x).shape == (3, 6) and "torch.func" in reasons_of(model)[0]
    model(x)
    assert "PEFT" not in reasons_of(model)[0]


def test_a_layer_that_cannot_be_swapped_says_why():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = get_peft_model(nn.Sequential(Own(8, 6)), IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.warns(UserWarning, match="left 1 layers to PEFT: the base layer is a Own; frozen=True"):
        fastlora.accelerate(model)
    assert fastlora.report(model)[0][1:] == ("peft", "the base layer is a Own")


@pytest.mark.parametrize("name", ["triton", "cuda", "reference"])
def test_what_is_forced_is_told(monkeypatch, name):
    model, _ = ia3_model()
    fastlora.accelerate(model)
    monkeypatch.setattr(ops, "forced", name)
    logits(model)
    assert {(entry.implementation, "FASTLORA_IMPL" in entry.reason) for entry in fastlora.report(model)} == {
        ("reference", True)
    }
