"""What else a LoraConfig may ask for: plain LoRA once it has begun, so that every layer is fused, with PEFT's results, or says why not."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft_models import IDS, logits, peft_model, q_proj, reason_of, run
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora
from fastlora.peft import FusedLinear

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {
    "rsLoRA": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA by iteration": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 3.0}, "rank_pattern": {"v_proj": 4}},
    "layers_to_transform": {"target_modules": LINEARS, "layers_to_transform": [1]},
    "exclude_modules": {"exclude_modules": ["k_proj"]},
    "modules_to_save": {"modules_to_save": ["norm", "lm_head"], "target_modules": LINEARS},
    "trainable_token_indices": {"trainable_token_indices": [5, 7], "target_modules": LINEARS},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
}


BEGINNINGS = {option for option, options in OPTIONS.items() if "init_lora_weights" in options}
"""How A and B begin, which is the same with DoRA."""


@pytest.mark.parametrize(
    ("option", "dora"),
    [*((option, False) for option in OPTIONS), *((option, True) for option in sorted(OPTIONS.keys() - BEGINNINGS))],
)
def test_results_and_gradients_are_pefts(option, dora):
    model, labels = peft_model(use_dora=dora, **OPTIONS[option])
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not parameter.any():
            parameter.data.normal_(std=0.1)
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    expected, found = run(peer, labels), run(model, labels)
    layers = [module for module in model.modules() if isinstance(module, FusedLinear)]
    assert layers and not any(
        "PEFT" in entry.reason or entry.implementation == "peft" for entry in fastlora.report(model)
    )
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name


def test_ranks_and_scales_of_the_patterns_are_the_layers_own():
    model, _ = peft_model(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 20.0})
    fastlora.accelerate(model)
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.lora_A["default"].weight.shape[0] == 2
    assert attention.v_proj.scaling["default"] == 4.0 and attention.k_proj.scaling["default"] == 2.0


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_loraplus_rates_train_as_without_us(options):
    """B's rate is sixteen times A's; the steps of both go the same way."""
    model, labels = peft_model(**options)
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    for each in (model, peer):
        optimizer = create_loraplus_optimizer(each, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
        for _ in range(3):
            run(each, labels)
            optimizer.step()
    assert torch.allclose(logits(model), logits(peer), atol=1e-4)
    assert "PEFT" not in reason_of(model)[1]


def tied(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=96, tie_word_embeddings=True
    )  # fmt: skip
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=3, init_lora_weights=False, **options))


def losses(model):
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return {"logits": out.logits, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_a_tied_head_is_fused_and_its_weight_has_no_copies():
    model = tied(target_modules=["q_proj", "lm_head"])
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    expected, found = losses(peer), losses(model)
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in expected.items())
    entry = next(entry for entry in fastlora.report(model) if entry.name.endswith("lm_head"))
    assert entry.implementation != "peft" and "packed, " not in entry.reason


@pytest.mark.parametrize("options", [{}, {"bias": "lora_only"}, {"use_dora": True}], ids=str)
def test_conv1d(options):
    model, labels = peft_model("gpt2", **options)
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    expected, found = run(peer, labels), run(model, labels)
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in expected.items())
    assert not any("PEFT" in entry.reason for entry in fastlora.report(model))


def test_a_weight_that_is_trained_as_a_whole_is_left_to_peft():
    """modules_to_save holds plain layers: nothing of ours runs there, even with frozen=True."""
    model, labels = peft_model(modules_to_save=["lm_head"], target_modules=LINEARS)
    expected = run(copy.deepcopy(model), labels)
    fastlora.accelerate(model, frozen=True)
    found = run(model, labels)
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in expected.items())
    head = model.base_model.model.lm_head.modules_to_save["default"]
    assert type(head) is nn.Linear and head.weight.grad is not None
    assert type(q_proj(model)) is FusedLinear
