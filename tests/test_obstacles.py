"""peft/obstacles.py: where a fused forward would not be PEFT's, PEFT's own runs, and `report` names what is in the way."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import IDS, llama, logits, peft_model, q_proj, reason_of, run
from torch import nn

import fastlora
from fastlora import ops
from fastlora.frozen import packed
from fastlora.peft import FrozenLinear, FusedLinear


def test_hook_on_the_layer_is_called():
    model, _ = peft_model()
    layer = fastlora.accelerate(model).base_model.model.model.layers[0].self_attn.q_proj
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    logits(model)
    assert seen == [(3, 11, 32)]


def test_hook_on_a_child_is_called_by_pefts_forward():
    model, _ = peft_model()
    layer = fastlora.accelerate(model).base_model.model.model.layers[0].self_attn.q_proj
    expected, seen = logits(model), []
    layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(logits(model), expected, atol=1e-5) and seen == [1]
    implementation, reason = reason_of(model)
    assert implementation == "reference"
    assert reason.startswith("PEFT's own forward: adapter 'default' carries a hook; before, ")


def test_a_forward_that_was_replaced_on_the_object_is_told():
    """As accelerate's hooks do it (`_old_forward`): the swapped class would never be asked, and its report never true."""
    model, _ = peft_model()
    layer = q_proj(model)
    layer.forward = layer.forward
    fastlora.accelerate(model)
    logits(model)
    assert reason_of(model) == ("peft", "its forward was replaced on the object")
    assert reason_of(model, "layers.0.self_attn.k_proj")[0] != "peft"


@pytest.mark.parametrize("when", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_global_hooks_see_the_modules_inside(when):
    """A fused forward does not call them."""
    model, labels = peft_model(target_modules=["q_proj", "k_proj"])
    fastlora.accelerate(model)
    run(model, labels)
    seen = []
    register = getattr(nn.modules.module, f"register_module_{when}_hook")
    handle = register(lambda module, *_: seen.append(module))
    try:
        run(model, labels)
    finally:
        handle.remove()
    layer = model.base_model.model.model.layers[1].self_attn.q_proj  # the first one's x needs no gradient
    assert seen.count(layer.base_layer) == seen.count(layer.lora_A["default"]) == 1
    assert reason_of(model)[1].startswith("PEFT's own forward: a global hook is set, now no longer; before, ")


@pytest.mark.parametrize("scaling", [torch.tensor(2.0), np.float32(2.0)], ids=["tensor", "numpy"])
def test_a_scaling_that_is_no_number_of_pythons(scaling):
    """As PEFT makes it for compiled hotswapping, where it may change without a trace."""
    model, _ = peft_model()
    expected = logits(model)
    q_proj(fastlora.accelerate(model)).scaling["default"] = scaling
    assert torch.allclose(logits(model), expected, atol=1e-5)
    name = type(scaling).__name__
    assert reason_of(model)[1] == f"PEFT's own forward: the scaling of adapter 'default' is a {name}"


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.randn(3, 32).as_subclass(Marked), "Marked"),
        (torch.nested.nested_tensor([torch.randn(2, 32), torch.randn(3, 32)]), "not a tensor of rows"),
        (torch.randn(3, 32).to_sparse(), "not a tensor of rows"),
    ],
    ids=["subclass", "nested", "sparse"],
)
def test_inputs_that_are_more_than_rows(x, what):
    model, _ = peft_model(target_modules=["q_proj"])
    layers = [q_proj(model), model.base_model.model.lm_head]
    with torch.no_grad():
        expected = [layer(x) for layer in layers]
        fastlora.accelerate(model, frozen=True)
        for layer, wanted in zip(layers, expected, strict=True):
            found = layer(x)
            assert type(found) is type(wanted)
            parts = (found.unbind(), wanted.unbind()) if x.is_nested else ([found], [wanted])
            assert all(torch.equal(one, other) for one, other in zip(*parts, strict=True))
    for part in ("layers.0.self_attn.q_proj", "lm_head"):
        assert what in reason_of(model, part)[1]


def test_a_base_layer_with_a_forward_of_its_own_is_named():
    """Where it computes something else than nn.Linear (test_probing.py)."""

    class SoftLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x).tanh()

    config = LoraConfig(target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(SoftLinear(8, 8), nn.Linear(8, 8)), config)
    with pytest.warns(UserWarning, match="fused none of 1 LoRA layers: the base layer is a SoftLinear"):
        fastlora.accelerate(model)
    assert reason_of(model, "0") == ("peft", "the base layer is a SoftLinear")


def test_a_weight_that_is_trained_loses_its_copies(monkeypatch):
    """A fused optimizer's step leaves no trace: the forward that begins the training is the last chance."""
    model, labels = peft_model(target_modules=["q_proj"])
    fastlora.accelerate(model, frozen=True)
    dropped = []
    monkeypatch.setattr(packed, "drop", dropped.append)
    weights = [q_proj(model).base_layer.weight, model.base_model.model.lm_head.weight]
    run(model, labels)
    assert not any(weight is one for weight in weights for one in dropped)
    for weight in weights:
        weight.requires_grad_()
    run(model, labels)
    assert all(any(weight is one for one in dropped) for weight in weights)


def test_a_variable_that_cannot_be_followed_is_told_before_anything_changes(monkeypatch):
    model, _ = peft_model()
    monkeypatch.setattr(ops, "forced", "nonsense")
    with pytest.raises(ops.ImplementationError, match="FASTLORA_IMPL='nonsense': expected one of reference, cpu"):
        fastlora.accelerate(model, frozen=True)
    assert not any(isinstance(module, (FusedLinear, FrozenLinear)) for module in model.modules())


def test_unsupported_layers_keep_pefts_forward_and_say_so():
    model, _ = peft_model(task_type="CAUSAL_LM", alora_invocation_tokens=[int(IDS[0, 3])])
    expected = logits(model)
    with pytest.warns(UserWarning, match="none of 14 LoRA layers: adapter 'default' is a ALora variant"):
        fastlora.accelerate(model)
    assert torch.equal(logits(model), expected)
    assert reason_of(model) == ("peft", "adapter 'default' is a ALora variant")


def test_layers_added_later_say_how_to_be_accelerated():
    model, _ = peft_model(target_modules=["q_proj"])
    fastlora.accelerate(model)
    model.add_adapter("wide", LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert reason_of(model, "0.self_attn.v_proj") == ("peft", "not accelerated: call fastlora.accelerate(model)")
    fastlora.accelerate(model)
    assert reason_of(model, "0.self_attn.v_proj")[0] != "peft"


def test_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="model"):
        fastlora.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model"):
        fastlora.accelerate(llama()[0])
