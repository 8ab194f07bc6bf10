"""A base in a GGUF file: transformers dequantises it as it is read, so that it is a base like any other."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import assert_as_near_as, run
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastlora
from fastlora.fusion import is_derived
from fastlora.peft import FrozenLinear, FusedLinear

gguf: Any = pytest.importorskip("gguf", reason="not installed: gguf")
FILE = "model.gguf"
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}
"""llama.cpp's names of a block's weights, by transformers'."""


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order of llama.cpp's rotary embedding."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(name="folder", scope="module")
def a_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in 4 bits (Q4_0), as llama.cpp writes one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
    weights, folder = LlamaForCausalLM(config).state_dict(), tmp_path_factory.mktemp("gguf")
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{name}": f"blk.{i}.{theirs}" for name, theirs in PARTS.items()}
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    writer.add_block_count(2), writer.add_context_length(64), writer.add_vocab_size(96)
    writer.add_embedding_length(64), writer.add_feed_forward_length(128)
    writer.add_head_count(4), writer.add_head_count_kv(2), writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps), writer.add_rope_freq_base(10000.0)
    four_bits = gguf.GGMLQuantizationType.Q4_0
    for name, theirs in names.items():
        weight = weights[f"{name}.weight"]
        heads = {"attn_q": 4, "attn_k": 2}.get(theirs.rpartition(".")[2])
        weight = turned(weight, heads) if heads else weight
        if weight.dim() == 1:
            writer.add_tensor(f"{theirs}.weight", weight.numpy())
        else:
            packed = gguf.quants.quantize(weight.contiguous().numpy(), four_bits)
            writer.add_tensor(f"{theirs}.weight", packed, raw_dtype=four_bits)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_accelerated_as_any_other(folder: Path, dtype: torch.dtype) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=dtype)
    up = base.model.layers[0].mlp.up_proj
    assert type(up) is nn.Linear and type(up.weight) is nn.Parameter and up.weight.dtype is dtype
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    labels = {"labels": torch.randint(5, 90, (3, 11), generator=torch.Generator().manual_seed(3))}
    exact, eager = run(copy.deepcopy(model).double(), labels), run(model, labels)
    fastlora.accelerate(model, frozen=True, fuse=True)
    assert_as_near_as(run(model, labels), eager, exact)
    assert sum(type(module) is FusedLinear for module in model.modules()) == 14
    assert type(model.base_model.model.lm_head) is FrozenLinear and is_derived(model.base_model.model.model.norm)
