"""`accelerate` itself: which models it takes, what counts as frozen, what it bounds, what it leaves to PEFT and says so."""

import warnings
from typing import Any

import peft
import pytest
import tiny
import torch
from peft_models import llama
from quantised_weights import weight as quantised_weight
from test_bottleneck import adapted as with_bottlenecks
from torch import nn

import fastlora
from fastlora import memory, model_loss
from fastlora.bottleneck import BottleneckLayer
from fastlora.peft import FrozenLinear, FusedLinear, quantised

K, N = 8, 6


def lone(config: Any) -> Any:
    return peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)


def test_what_has_nothing_to_make_faster_is_refused() -> None:
    with pytest.raises(ValueError, match="^model: has no PEFT LoRA layers, expected the result of peft.get_peft_model"):
        fastlora.accelerate(nn.Sequential(nn.Linear(K, N)))
    with pytest.raises(ValueError, match="^model: has no LoRA layers and no frozen nn.Linear, expected one"):
        fastlora.accelerate(nn.Sequential(nn.Linear(K, N)), frozen=True)
    model, _ = with_bottlenecks()
    with pytest.raises(ValueError, match="^model: has no PEFT LoRA layers"):
        fastlora.accelerate(model)  # a bottleneck adapter is nobody's LoRA


@pytest.mark.parametrize("option", ["loss", "fuse", "share_prefix"])
def test_a_model_without_adapters_may_have_any_of_the_rest(option: str) -> None:
    model = tiny.llama()
    assert fastlora.accelerate(model, **{option: True}) is model
    assert (model_loss.KEY in model.__dict__) == (option == "loss")
    assert fastlora.report(model)


def test_products_memory_is_bounded_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded: list[bool] = []
    monkeypatch.setattr(memory, "bound_product_caches", lambda: bounded.append(True))
    fastlora.accelerate(lone(peft.LoraConfig(target_modules=["0"])))
    assert bounded == [True]


def test_a_frozen_layer_is_one_that_no_adapter_has_taken() -> None:
    base, _, _ = llama()
    model = fastlora.accelerate(peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])), frozen=True)
    for name, module in model.named_modules():
        if type(module) is FrozenLinear:
            assert "q_proj" not in name
    assert type(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")) is FrozenLinear
    assert type(model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")) is nn.Linear


def test_a_bottlenecks_own_products_are_its_own_and_its_sublayers_are_frozen() -> None:
    model, _ = with_bottlenecks()
    adapters = [one for one in model.modules() if isinstance(one, BottleneckLayer)]
    own = {part for adapter in adapters for part in fastlora.peft._parts(adapter)}
    inside = {part for adapter in adapters for part in adapter.modules()}
    assert own < inside and any(isinstance(part, nn.Linear) for part in inside - own)
    model.requires_grad_(False)
    fastlora.accelerate(model, frozen=True)
    frozen = {one for one in model.modules() if type(one) is FrozenLinear}
    assert frozen & inside and not frozen & own


class OwnParameter(nn.Parameter):
    pass


def test_a_quantised_layer_without_an_adapter_is_frozen_by_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(K, N)
    layer.weight = OwnParameter(layer.weight.detach(), requires_grad=False)
    assert not fastlora.peft._is_frozen_product(layer)
    found = quantised.Base(None, quantised_weight("int8", N, K, torch.float32).stored, "int8", None)  # type: ignore[arg-type]
    monkeypatch.setattr(quantised, "base_of", lambda one: found if one is layer else None)
    assert fastlora.peft._is_frozen_product(layer)


def said(model: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        exec(
            compile("accelerate(model, **options)", "caller.py", "exec"),
            {"accelerate": fastlora.accelerate, "model": model, "options": options},
        )
    assert all(one.filename == "caller.py" for one in found if "fastlora.accelerate" in str(one.message))
    return [str(one.message) for one in found if "fastlora.accelerate" in str(one.message)]


def test_what_is_left_to_peft_is_said_once_and_what_would_help() -> None:
    boft = peft.LNTuningConfig(target_modules=["1"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N), nn.LayerNorm(N)), boft)
    (words,) = said(model)
    assert words.startswith("fastlora.accelerate left 1 layers to PEFT: ") and words.endswith(fastlora.peft.LEFT)
    (words,) = said(model, frozen=True)
    assert not words.endswith(fastlora.peft.LEFT)
    model = lone(peft.LoraConfig(target_modules=["0"], use_dora=False))
    assert said(model) == [] and type(model.base_model.model[0]) is FusedLinear
    trained = lone(peft.LoraConfig(target_modules=["0"]))
    trained.base_model.model[0].base_layer.weight.requires_grad_()
    assert said(trained) == ["fastlora.accelerate fused none of 1 LoRA layers: the base weight or bias is trained"]


def test_unloading_restores_first() -> None:
    for method in fastlora.peft.UNLOADING:
        model = fastlora.accelerate(lone(peft.LoraConfig(target_modules=["0"])))
        assert method in model.base_model.__dict__
        plain = getattr(model, method)()
        assert type(plain[0]) is nn.Linear and method not in model.base_model.__dict__
    model = fastlora.accelerate(lone(peft.LoraConfig(target_modules=["0"])))
    assert fastlora.restore(model) is model and not {*fastlora.peft.UNLOADING} & model.base_model.__dict__.keys()
