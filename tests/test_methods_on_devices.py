"""Every method on every device that there is: a step with `accelerate` is as near to PEFT's in float64 as PEFT's own in the same numbers."""

import copy
from typing import Any

import peft
import pytest
import torch
from step_gradients import assert_steps_within_bound, draw
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora

LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
VOCABULARY = 160
METHODS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear"),
    "lora of rank 40, B biased": peft.LoraConfig(r=40, target_modules=LINEAR, lora_bias=True, use_rslora=True),
    "lora on head and embeddings": peft.LoraConfig(r=4, target_modules=[*LINEAR, "lm_head", "embed_tokens"]),
    "dora": peft.LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
}  # fmt: skip
OPTIONS: dict[str, dict[str, bool]] = {
    "as it is": {},
    "loss": {"loss": True},
    "fused": {"fuse": True, "loss": True},
    "shared": {"share_prefix": True},
}


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY, pad_token_id=0)
    )


def in_float64(model: Any) -> Any:
    """Its loss as well, for which transformers goes by way of float32."""

    def loss(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model = model.double()
    model.get_base_model().loss_function = loss
    return model


def steps(model: Any, device: str) -> list[dict[str, Tensor]]:
    return [step(model, device, seed) for seed in range(16)]


def step(model: Any, device: str, seed: int) -> dict[str, Tensor]:
    """The loss and the gradients by name, of rows of several lengths of which a beginning is not counted."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (4, 24), generator=drawn)
    attended = torch.arange(24) < torch.tensor([24, 17, 9, 21])[:, None]
    ids[:, :6] = ids[0, :6]  # a beginning that the rows share
    labels = ids.masked_fill(~attended, -100)
    labels[:, :3] = -100
    inputs = {"input_ids": ids, "attention_mask": attended.long(), "labels": labels}
    loss = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).loss
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_pefts(device: str, method: str, dtype: torch.dtype) -> None:
    adapted = peft.get_peft_model(base(), copy.deepcopy(METHODS[method]))
    draw({name: p for name, p in adapted.named_parameters() if p.requires_grad})
    eager = adapted.to(device, dtype)
    exact = steps(in_float64(copy.deepcopy(eager)), device)
    plain = steps(copy.deepcopy(eager), device)
    for name, options in OPTIONS.items():
        found = steps(fastlora.accelerate(copy.deepcopy(eager), **options), device)
        try:
            assert_steps_within_bound(found, plain, exact)
        except AssertionError as error:
            raise AssertionError(name) from error
