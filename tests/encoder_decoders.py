"""Tiny random encoder-decoders with tokenizers of their kind, saved to a folder: what tests load for a real T5 or BART."""

from pathlib import Path
from typing import Any

import tokenizer_kinds
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
BART = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.2},
}


def tokenizer(kind: str) -> Any:
    """t5: pieces, and </s> behind every text. bart: bytes, between <s> and </s>."""
    if kind == "t5":
        return tokenizer_kinds.metaspace("always", "unigram", "$A </s>")
    return tokenizer_kinds.byte_level(False, "<s> $A </s>")


def model(kind: str, words: Any, dropout: float = 0.0, **sizes: Any) -> Any:
    torch.manual_seed(0)
    tokens = {name: getattr(words, name) for name in ("eos_token_id", "pad_token_id")} | {"vocab_size": len(words)}
    if kind == "t5":
        start = {"decoder_start_token_id": words.pad_token_id}
        return T5ForConditionalGeneration(T5Config(**{**T5, **sizes}, **tokens, **start, dropout_rate=dropout)).eval()
    start = {"bos_token_id": words.bos_token_id, "decoder_start_token_id": words.eos_token_id}
    return BartForConditionalGeneration(
        BartConfig(**{**BART, **sizes}, **tokens, **start, dropout=dropout, forced_eos_token_id=None)
    ).eval()


def save_model(folder: Path, kind: str, dropout: float = 0.0, **sizes: Any) -> Path:
    words = tokenizer(kind)
    model(kind, words, dropout, **sizes).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
