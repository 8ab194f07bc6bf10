"""Tiny random models, and a Llama with a byte-pair tokenizer of its own, saved to a folder: what tests load for a real model."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ANIMALS = ["cat", "dog", "owl", "fox", "hen", "bee", "cow", "ant"]
ACTS = ["runs", "sleeps", "sings", "eats", "hides"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Keep the training loop on the CPU even where there is a card: the tests compare a CPU's bounds and bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def tokenizer() -> Any:
    """Byte-level BPE of about 320 entries, with <s>, </s>, <pad> and a chat template; <s> opens every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        [f"The {animal} {act}. What does the {animal} do? It {act}." for animal in ANIMALS for act in ACTS], trainer
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )


def llama(**options: Any) -> Any:
    """Random, of two layers and tied ends."""
    options = {"num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.2, **options}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options})).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes)).eval()


def save_model(folder: Path, hidden_size: int = 32, **options: Any) -> Path:
    """A llama with untied ends, and its tokenizer."""
    words = tokenizer()
    tokens = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"vocab_size": len(words), "hidden_size": hidden_size, "max_position_embeddings": 256}
    llama(**sizes, **tokens, tie_word_embeddings=False, **options).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    pairs = [(draw.choice(ANIMALS), draw.choice(ACTS)) for _ in range(count)]
    return [
        {"prompt": f"The {animal} {act}. What does the {animal} do?", "completion": f" It {act}."}
        for animal, act in pairs
    ]


def save_data(path: Path, count: int = 64, seed: int = 0) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed)))
    return path
