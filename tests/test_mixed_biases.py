"""Rows of a mixed batch whose adapters have biases of B's own (`lora_bias`), or whose base's are trained: each as it were alone."""

import copy
from typing import Any

import pytest
import torch
from mixed_rows import BASE, all_at_once, assert_equal_rows, row_by_row
from peft import LoraConfig
from peft_models import logits, peft_model, q_proj
from torch import nn

import fastlora
from fastlora.peft import mixed
from fastlora.peft.layers import SEEN, Fused

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
NAMES = ["biased", BASE, "default", "plain", "biased"]


def ids_of(names: list[str], tokens: int = 11) -> torch.Tensor:
    return torch.randint(5, 90, (len(names), tokens), generator=torch.Generator().manual_seed(1))


def biased(family: str = "llama", dtype: torch.dtype = FLOAT32, adapters_float32: bool = True, **options: Any) -> Any:
    """Two adapters with biases, and one without, of several ranks; `biased` lacks layers that the others have."""
    model, _ = peft_model(family, dtype, adapters_float32, lora_bias=True, init_lora_weights=True, **options)
    targets = model.peft_config["default"].target_modules
    few = {"target_modules": ["q_proj", "down_proj", "c_attn"], "r": 3, "lora_alpha": 7, "lora_bias": True}
    for name, own in (("biased", few), ("plain", {"target_modules": targets, "r": 5})):
        model.add_adapter(name, LoraConfig(**own), autocast_adapter_dtype=adapters_float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return model


@pytest.mark.parametrize(
    ("dtype", "adapters_float32", "autocast"),
    [(FLOAT32, True, None), (BFLOAT16, False, None), (BFLOAT16, True, None), (FLOAT32, True, BFLOAT16)],
    ids=["float32", "bfloat16", "float32-on-bfloat16", "autocast"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_results_and_gradients_are_those_of_each_row_alone(
    family: str, dtype: torch.dtype, adapters_float32: bool, autocast: torch.dtype | None
) -> None:
    model = biased(family, dtype, adapters_float32).train()
    ids = ids_of(NAMES)
    exact = row_by_row(copy.deepcopy(model).double(), NAMES, ids)
    eager = row_by_row(copy.deepcopy(model), NAMES, ids, autocast)
    fastlora.accelerate(model)
    ours = all_at_once(model, NAMES, ids, autocast)
    assert any(name.endswith("lora_B.biased.bias") for name in ours)
    assert_equal_rows(ours, eager, exact, ["biased", "default", "plain"])
    layers = [layer for layer in model.modules() if isinstance(layer, Fused)]
    assert layers and all(layer.__dict__[SEEN].mixed for layer in layers)
    assert not any("forward" in entry.reason for entry in fastlora.report(model))


def test_in_eval_mode_as_peft() -> None:
    model = biased().eval()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    for names in (["biased", BASE, "default"], ["plain"] * 3, ["biased"] * 3, ["plain", BASE, "biased"]):
        expected = logits(peer, adapter_names=names)
        for _ in range(2):
            torch.testing.assert_close(logits(model, adapter_names=names), expected, rtol=1e-4, atol=1e-4)


def test_a_row_alone_of_those_that_a_plan_has() -> None:
    """As a server names them: a plan's adapters may be without a row, DoRAs among them."""
    model = biased().eval()
    model.add_adapter("dora", LoraConfig(r=2, target_modules="all-linear", use_dora=True, init_lora_weights=False))
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    x, layer, alone = torch.randn(2, 3, 32), q_proj(model), q_proj(peer)
    rows = mixed.RowNames(["biased", BASE], [3, 3])
    all_of_them = mixed.RowNames.__new__(mixed.RowNames, ["biased", "dora", "default", BASE], [3] * 4)
    for names in (rows, _those_rows(all_of_them, rows)):
        with torch.no_grad(), mixed.training(model.base_model, Fused, names):
            y = layer(x)
            peer.set_adapter("biased")
            torch.testing.assert_close(y[0], alone(x[0]), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(y[1], alone.base_layer(x[1]), rtol=1e-4, atol=1e-5)


def _those_rows(names: mixed.RowNames, rows: mixed.RowNames) -> mixed.RowNames:
    names.examples, names.lengths = rows.examples, rows.lengths
    return names


def test_biases_of_the_base_are_every_rows() -> None:
    model, _ = peft_model("gpt2", bias="lora_only")
    model.add_adapter("other", LoraConfig(r=3, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "base_layer" in name:
            nn.init.normal_(parameter.data)
    model.eval()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    names = ["default", BASE, "other"]
    torch.testing.assert_close(
        logits(model, adapter_names=names), logits(peer, adapter_names=names), rtol=1e-4, atol=1e-4
    )
    assert not any("forward" in entry.reason for entry in fastlora.report(model))


def test_a_row_that_one_bias_spoils_is_its_own() -> None:
    model = biased().eval()
    fastlora.accelerate(model)
    layer, x, names = q_proj(model), torch.randn(3, 2, 32), ["biased", "default", BASE]
    with torch.no_grad():
        before = layer(x, adapter_names=names)
        layer.lora_B["biased"].bias.fill_(torch.nan)
        after = layer(x, adapter_names=names)
    assert after[0].isnan().all() and torch.equal(after[1:], before[1:])
