"""Small PEFT models with soft prompts, and what they compute for one text alone, unpadded, its prompt in front by concatenation."""

from collections.abc import Callable
from typing import Any

import torch
from peft import (
    CartridgeConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

P, VOCABULARY, IGNORE = 5, 96, -100
GIVEN: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
METHODS: dict[str, Callable[..., Any]] = {
    "prompt tuning": lambda **more: PromptTuningConfig(**{**GIVEN, **more}),
    "P-tuning": lambda **more: PromptEncoderConfig(**{**GIVEN, "encoder_hidden_size": 16, **more}),
    "P-tuning, LSTM": lambda **more: PromptEncoderConfig(
        **{
            **GIVEN,
            "encoder_hidden_size": 16,
            "encoder_reparameterization_type": "LSTM",
            "encoder_dropout": 0.0,
            **more,
        }
    ),
    "multitask prompts": lambda **more: MultitaskPromptTuningConfig(**{**GIVEN, "num_tasks": 3, **more}),
    "prefix tuning": lambda **more: PrefixTuningConfig(**{**GIVEN, **more}),
    "prefix tuning, MLP": lambda **more: PrefixTuningConfig(
        **{**GIVEN, "prefix_projection": True, "encoder_hidden_size": 16, **more}
    ),
    "cartridge": lambda **more: CartridgeConfig(**{**GIVEN, "num_frozen_tokens": 1, **more}),
}
KEYED = {"prefix tuning", "prefix tuning, MLP", "cartridge"}
TASKS = torch.tensor([0, 2, 1])


def llama(**more: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{
            **sizes,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            **more,
        }
    )
    return LlamaForCausalLM(config)


def gpt2(**more: Any) -> PreTrainedModel:
    drops = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = GPT2Config(
        **{
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": VOCABULARY,
            "n_positions": 64,
            **drops,
            **tokens,
            **more,
        },
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config)


FAMILIES = {"llama": llama, "gpt2": gpt2}


def prompted(method: str, family: str = "llama", dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """more: options of the model's config."""
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES[family](**more).to(dtype), METHODS[method]())
    return model.to(dtype).train()


def tasks_of(method: str, rows: Any = slice(None)) -> dict[str, Tensor]:
    return {"task_ids": TASKS[rows]} if method == "multitask prompts" else {}


def alone(model: Any, method: str, text: Tensor, task: int = 0) -> Tensor:
    """The logits of a text [T] and of what predicts its first token, [T + 1, V]; NaN for a prefix, which predicts nothing.

    model: a PeftModel that is not accelerated, whose active adapter is the text's.
    """
    found = model.get_prompt(1, **({"task_ids": torch.tensor([task])} if method == "multitask prompts" else {}))
    if method in KEYED:
        logits = model.base_model(input_ids=text[None], past_key_values=found).logits[0]
        return torch.cat((torch.full_like(logits[:1], torch.nan), logits))
    embeds = torch.cat((found.to(model.word_embeddings.weight.dtype), model.word_embeddings(text[None])), 1)
    logits = model.base_model(inputs_embeds=embeds, use_cache=False).logits[0]
    return logits[found.shape[1] - 1 :]


def loss_alone(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The sum over a text's labels, and how many count; of `alone`'s logits."""
    counted = labels != IGNORE
    if logits[0].isnan().any():
        counted[0] = False
    return F.cross_entropy(logits[:-1][counted].float(), labels[counted], reduction="sum"), int(counted.sum())
