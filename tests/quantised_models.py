"""PEFT models over quantised bases, and the float64 models that they stand for. Who uses the fixture has `NATIVE` as a mark."""

import copy
import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import ATTENDED, IDS
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from fastlora import ops
from fastlora.peft import quantised

KINDS = ("nf4", "nf4, not double", "fp4", "int8", "torchao")
NATIVE = pytest.mark.skipif(
    not ops.availability()[1].present,
    reason="the native extension is not built (make demo, or pip install -e . with g++)",
)


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


EACH_KIND = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs("torchao" if kind == "torchao" else "bitsandbytes")) for kind in KINDS]
)
NEEDS_BITSANDBYTES = needs("bitsandbytes")


@pytest.fixture(name="folder", scope="module")
def a_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model. Its sizes are multiples of bitsandbytes' blocks: elsewhere its CPU kernels are wrong."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        attention_bias=True,
    )
    path = tmp_path_factory.mktemp("model")
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(path)
    return str(path)


def load(
    folder: str, kind: str, dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None, method=None, **lora
):
    """The same quantised PEFT model every time. method: a configuration of PEFT's; None: LoRA on all that is quantised."""
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        how = TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    elif kind == "int8":
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind[:3],
            bnb_4bit_use_double_quant="not" not in kind,
            bnb_4bit_compute_dtype=compute or dtype,
        )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=how)
    torch.manual_seed(1)
    config = method or LoraConfig(r=5, lora_alpha=10, target_modules="all-linear", init_lora_weights=False, **lora)
    return get_peft_model(base, config).train()


def never_packed(model):
    """The model itself, whose 4-bit layers would round their factors to bfloat16 in eval mode on a CPU with AVX512-BF16, and now do not."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def unquantised(model):
    """A copy in float64 whose base weights are what the quantised ones stand for."""
    exact = LlamaForCausalLM(LlamaConfig(**model.config.to_dict())).double()
    exact = get_peft_model(exact, copy.deepcopy(model.peft_config["default"])).train()
    own = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            layer, _, last = name.rpartition(".")
            base = quantised.base_of(own[layer])
            if last == "weight" and isinstance(base, quantised.Base):
                parameter.copy_(base.weight(parameter.dtype) + 0)
            else:
                parameter.copy_(dict(own[layer].named_parameters())[last])
    return exact


def run(model):
    model.zero_grad()
    torch.manual_seed(7)
    out = model(input_ids=IDS, attention_mask=ATTENDED, labels=IDS)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), **grads}
