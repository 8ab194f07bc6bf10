"""Biases that are trained beside an adapter: the base layers' (`bias="lora_only"` and "all") and B's own (`lora_bias`)."""

import copy

import pytest
import torch
from peft import LoraConfig
from peft_models import IDS, assert_equal_to_peft, in_each_precision, logits, peft_model, q_proj, reason_of, run

import fastlora

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@in_each_precision
@pytest.mark.parametrize(
    "options",
    [{"bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True}, {"bias": "lora_only", "use_dora": True},
     {"bias": "lora_only", "lora_bias": True}],
    ids=lambda options: ", ".join(map(str, (*options, *options.values()))),
)  # fmt: skip
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_outputs_and_gradients_equal_peft(family, options, dtype, adapters_float32, autocast):
    def make(seed):
        init = {"init_lora_weights": True} if "lora_bias" in options else {}
        model, labels = peft_model(family, dtype, adapters_float32, seed, **init, **options)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("bias" in name or "lora_B" in name):
                parameter.data.normal_()
        return model, labels

    model, ours = assert_equal_to_peft(make, dtype, autocast)
    assert any("bias" in name for name in ours)
    assert not any("forward" in entry.reason for entry in fastlora.report(model))


def test_layers_that_share_x_have_their_own():
    model, labels = peft_model("bert", bias="lora_only", target_modules=["query", "key", "value"])
    eager = run(model, labels)
    fastlora.accelerate(model)
    for name, value in run(model, labels).items():
        assert torch.allclose(value, eager[name], atol=1e-5), name
    assert "x read once with" in reason_of(model, "layer.0.attention.self.query")[1]


def test_dropout_and_checkpointing():
    model, labels = peft_model("bert", bias="lora_only", lora_dropout=0.3)
    fastlora.accelerate(model).train()
    torch.manual_seed(5)
    plain = run(model, labels)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(5)
    for name, value in run(model, labels).items():
        assert torch.equal(plain[name], value), name


def test_several_adapters_with_biases_are_summed():
    model, _ = peft_model("llama", lora_bias=True, init_lora_weights=True)
    model.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", lora_bias=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.eval()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active), peer.base_model.set_adapter(active)
        assert torch.allclose(logits(model), logits(peer), atol=1e-4)
        assert "PEFT" not in reason_of(model)[1]


def test_a_bias_that_is_trained_from_now_on_gets_its_gradient():
    model, labels = peft_model("bert")
    fastlora.accelerate(model)
    run(model, labels)
    bias = model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.bias
    run(model, labels)
    assert bias.grad is None
    bias.requires_grad_()
    run(model, labels)
    assert bias.grad.abs().sum() > 0


def test_compiles_whole():
    model, labels = peft_model(lora_bias=True, init_lora_weights=True)
    fastlora.accelerate(model)
    q_proj(model).lora_B["default"].bias.data.normal_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(input_ids=IDS).logits, logits(model), atol=1e-5)
