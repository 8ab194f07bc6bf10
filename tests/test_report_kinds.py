"""peft/reporting.py: which of a model's modules have a line, by whom each is described, and what a look at a model leaves as it was."""

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from moe_models import moe_model
from peft_models import llama
from test_bottleneck import adapted as with_bottlenecks
from torch import nn

import fastlora
from fastlora import checks, fusion, model_loss, sharing
from fastlora.bottleneck import BottleneckLayer
from fastlora.peft import embeddings, experts, prompts, reporting, scaled
from fastlora.peft.layers import OWN_FORWARD, SEEN
from fastlora.peft.reporting import BOTTLENECK, layers, linear_weight, obstacle_of, unobserved

K, N = 8, 6


def names(found: Any) -> list[str]:
    return [one.name for one in found]


def test_a_wrapper_within_another_is_told_with_the_one_around_it() -> None:
    model = moe_model()
    plain = [one for one in layers(model) if "experts" in one.name]
    fastlora.accelerate(model)
    swapped = [one for one in layers(model) if "experts" in one.name]
    assert names(plain) == names(swapped) and len(plain) == 4
    for found, is_pefts in ((plain, True), (swapped, False)):
        for around, inner in (found[:2], found[2:]):
            assert inner.name == f"{around.name}.base_layer"
            assert inner.implementation == around.implementation and (around.implementation == "peft") is is_pefts
            assert inner.reason == (around.reason if is_pefts else f"with {around.name}")
    assert obstacle_of(model.get_submodule(plain[0].name)) == experts.obstacle_of(model.get_submodule(plain[0].name))


def test_each_kind_of_layer_is_described_by_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    base = nn.Sequential(nn.Embedding(9, K), nn.Linear(K, N))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    monkeypatch.setattr(embeddings, "describe", lambda layer: ("embedding", type(layer).__name__))
    found = layers(model)
    assert [one[1:] for one in found][0] == ("embedding", "Embedding") and len(found) == 2
    embedding = model.base_model.model[0]
    monkeypatch.setattr(embeddings, "swap_obstacle", lambda layer: "an embedding's")
    assert obstacle_of(embedding) == "an embedding's" and obstacle_of(model.base_model.model[1]) is None
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(K, N)), peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    )
    monkeypatch.setattr(scaled, "describe", lambda layer: ("scaled", type(layer).__name__))
    assert layers(model) == [("base_model.model.0", "scaled", "Linear")]


def test_a_bottleneck_adapter_is_told_and_its_parts_are_not() -> None:
    model, _ = with_bottlenecks()
    found = [one for one in layers(model) if one.reason == BOTTLENECK]
    assert names(found) == [name for name, one in model.named_modules() if isinstance(one, BottleneckLayer)]
    assert found and all(one.implementation == "reference" for one in found)
    assert len(layers(model)) == len(found)


def test_trainable_tokens_have_a_line_where_they_are_a_method_and_none_beside_lora() -> None:
    base, _, _ = llama()
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    )
    assert any(name.endswith(".token_adapter") for name, _ in model.named_modules())
    assert all(name.endswith("q_proj") for name in names(layers(model)))
    base, _, _ = llama()
    model = peft.get_peft_model(base, peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]))
    assert [name.rpartition(".")[2] for name in names(layers(model))] == ["embed_tokens"]


def state(last: tuple[str, str] | None) -> sharing.State:
    found = sharing.State()
    found.last = last
    return found


def test_what_stands_before_a_models_forward_has_a_line_at_its_place() -> None:
    inner = nn.Identity()
    model = nn.Sequential(inner)
    inner.__dict__.update({prompts.KEY: state(("tree", "prompts")), sharing.KEY: state(("mask", "shared"))})
    for module, where in ((model, "0."), (inner, "")):
        assert layers(module) == [(f"{where}prompt", "tree", "prompts"), (f"{where}share_prefix", "mask", "shared")]
    inner.__dict__.pop(prompts.KEY)
    inner.__dict__[sharing.KEY] = state(None)
    inner.forward = inner.forward
    assert layers(inner) == [
        ("share_prefix", "apart", "not called yet, unless compiled, or by the forward that was put before it")
    ]


@pytest.mark.parametrize(
    ("last", "told"), [(None, False), (("apart", "nothing"), False), (("tree", "12 tokens"), True)]
)
def test_what_stands_below_the_loss_has_a_line_where_it_had_something_to_do(last: Any, told: bool) -> None:
    model = nn.Sequential(nn.Identity())
    for module, name in ((model, "share_prefix"), (model[0], "0.share_prefix")):
        module.__dict__[sharing.BELOW] = state(last)
        assert ((name, *(last or ())) in layers(model)) is told
        assert len(layers(model)) == told
        module.__dict__.pop(sharing.BELOW)


def test_a_sharded_weight_is_looked_at_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(K, N)
    assert linear_weight(layer) is layer.weight
    monkeypatch.setattr(checks, "is_sharded", lambda one: one is layer.weight)
    found = linear_weight(layer)
    assert found is not layer.weight and type(found) is torch.Tensor
    assert (found.shape, found.dtype, found.device) == (layer.weight.shape, torch.float32, layer.weight.device)


def test_a_look_leaves_what_was_seen_as_it_was() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    states = {key: state(("tree", key)) for key in (prompts.KEY, sharing.KEY, sharing.BELOW)}
    model[0].__dict__.update({SEEN: 1, OWN_FORWARD: 2, fusion.SEEN: 3, **states})
    with pytest.raises(RuntimeError), unobserved(model):
        for module in model:
            module.__dict__.update({SEEN: 7, OWN_FORWARD: 8, fusion.SEEN: 9})
        for one in states.values():
            one.last = None
        raise RuntimeError
    assert [model[0].__dict__[key] for key in (SEEN, OWN_FORWARD, fusion.SEEN)] == [1, 2, 3]
    assert not {SEEN, OWN_FORWARD, fusion.SEEN} & model[1].__dict__.keys()
    assert [one.last for one in states.values()] == [("tree", key) for key in states]


def test_a_report_has_the_parts_that_are_told_together_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Identity())
    model[0].__dict__[model_loss.KEY] = SimpleNamespace(describe=lambda replaced: ("fused", "a loss"))
    monkeypatch.setattr(fusion, "describe", lambda one: [("norms", "cpu", "all alike")])
    assert reporting.report(model) == [("0.loss", "fused", "a loss"), ("norms", "cpu", "all alike")]
