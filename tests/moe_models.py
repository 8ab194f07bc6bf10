"""Small PEFT models of mixtures of experts, whose experts' parameters have adapters; and one such module alone, with what it is called with."""

from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

IDS = torch.randint(0, 64, (3, 11), generator=torch.Generator().manual_seed(3))
E, D, INNER = 5, 32, 24
SIZES = {
    "hidden_size": D,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=E)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=E)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=E, moe_intermediate_size=INNER, head_dim=8)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, num_local_experts=E, head_dim=8, layer_types=["full_attention"] * 2)
    ),
}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def config(r: int = 3, parameters: Any = PARAMETERS, **options: Any) -> LoraConfig:
    given = {"target_modules": [], "init_lora_weights": False, **options}
    return LoraConfig(r=r, lora_alpha=2 * r, target_parameters=list(parameters), **given)


def moe_model(
    family: str = "olmoe",
    dtype: torch.dtype = torch.float32,
    autocast_adapter_dtype: bool = True,
    **options: Any,
) -> Any:
    """A random small PEFT model whose experts' adapters change something."""
    torch.manual_seed(0)
    base = FAMILIES[family]()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.2)
    model = get_peft_model(base.to(dtype), config(**options), autocast_adapter_dtype=autocast_adapter_dtype)
    model.base_model.model.set_experts_implementation("grouped_mm")
    return model


def set_implementation(model: Any, name: str) -> Any:
    model.base_model.model.set_experts_implementation(name)
    return model


def wrapper_of(model: Any, layer: int = 0) -> Any:
    return model.base_model.model.model.layers[layer].mlp.experts


def run(model: Any) -> dict[str, Tensor]:
    """Logits and the gradient of every trained parameter."""
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), **grads}


class Routed(NamedTuple):
    """What a module of experts is called with, and the gradient of its result."""

    x: Tensor  # [T, D]
    index: Tensor  # [T, 2]
    weights: Tensor  # [T, 2]
    dy: Tensor  # [T, D]

    def to(self, dtype: torch.dtype) -> "Routed":
        return Routed(self.x.to(dtype), self.index, self.weights.to(dtype), self.dy.to(dtype))


def routed(T: int = 17, seed: int = 0, dtype: torch.dtype = torch.float32) -> Routed:
    """Random; the last expert but one gets no row."""
    draw = torch.Generator().manual_seed(seed)
    index = torch.rand(T, E - 1, generator=draw).argsort(1)[:, :2]
    index = torch.where(index == E - 2, E - 1, index)
    x, weights, dy = (
        torch.randn(T, D, generator=draw),
        torch.rand(T, 2, generator=draw),
        torch.randn(T, D, generator=draw),
    )
    return Routed(x, index, weights, dy).to(dtype)


def call(wrapper: Any, given: Routed) -> dict[str, Tensor]:
    """The result, and the gradients of x, of the routing's weights and of every trained parameter."""
    wrapper.zero_grad()
    x, weights = given.x.clone().requires_grad_(), given.weights.clone().requires_grad_()
    y = wrapper(x, given.index, weights)
    y.backward(given.dy)
    grads = {name: p.grad.clone() for name, p in wrapper.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **grads}
