"""peft/reporting.py, of one layer: what is told of experts, quantised and sharded layers, and what a CPU's own product and adapter are asked as."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from measurements import needs_native
from moe_models import moe_model
from test_report_words import WIDTH, X, alone, reason_of
from torch import nn

import fastlora
from fastlora import ops
from fastlora.frozen import composed, products
from fastlora.operators import lora_linear
from fastlora.peft import experts, obstacles, quantised, siblings
from fastlora.peft.layers import SEEN, FrozenQuantised, Seen
from fastlora.peft.reporting import _before_any_call, _describe, _explain, _present_obstacle


def test_what_is_sharded_between_calls_alone_is_told_as_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = alone()
    model(X)
    called = reason_of(model)
    monkeypatch.setattr(obstacles, "lasting_plan", lambda layer, used: obstacles.IN_PIECES)
    assert reason_of(model) == f"{called}; sharded between calls"
    fresh = alone()
    assert reason_of(fresh).startswith("not called yet, unless compiled; 512 rows")
    assert reason_of(fresh).endswith("; sharded between calls")


class Quantised(FrozenQuantised, nn.Linear):
    """As `accelerate` swaps a layer of bitsandbytes', but for its weight."""


def test_a_quantised_layers_own_forward_is_its_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = Quantised(WIDTH, 8)
    answers: list[Any] = ["the library is too old"]
    monkeypatch.setattr(quantised, "base_of", lambda one: answers[0])
    assert _present_obstacle(layer, layer, None) == "the library is too old"
    assert _explain(layer, False) == (
        "reference",
        "not called yet, unless compiled; its own forward: the library is too old",
    )
    layer.requires_grad_(True)
    for answers[0] in (None, object()):  # of which it says itself whether it is trained
        assert _present_obstacle(layer, layer, None) is None


def wrapper() -> Any:
    model = fastlora.accelerate(moe_model())
    return next(one for one in model.modules() if isinstance(one, experts.ParamWrapper))


def test_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = wrapper()
    base = experts.swapped_base(layer)
    assert _present_obstacle(layer, base, None) is None
    seen = _before_any_call(layer, base, False)
    weight = experts.weight_of(base)
    assert seen == Seen((512, weight.shape[1]), weight.dtype)
    reason = _describe(layer, base, seen)[1]
    assert reason.startswith(f"512 rows for each of {base.num_experts} experts: ")
    together = "reference", "all experts at once, by torch's grouped products"
    assert _describe(layer, base, seen._replace(shared=True)) == together
    monkeypatch.setattr(experts, "GROUPED", ("cpu",))
    assert _before_any_call(layer, base, False).shared
    monkeypatch.setattr(experts, "lasting_plan", lambda one: "the experts are elsewhere")
    assert _present_obstacle(layer, base, None) == "the experts are elsewhere"
    model = alone()
    model(X)
    layer = model.base_model.model[0]
    assert not _describe(layer, layer.base_layer, layer.__dict__[SEEN]._replace(shared=True))[1].startswith(
        "all experts"
    )


@needs_native
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("of", ["lora", "frozen"])
def test_a_cpus_product_and_adapter_are_asked_as_the_call_ran(
    of: str, mixed: bool, dropout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = (
        alone().base_model.model[0]
        if of == "lora"
        else fastlora.accelerate(nn.Sequential(nn.Linear(WIDTH, 8)).requires_grad_(False), frozen=True)[0]
    )
    asked: list[Any] = []
    monkeypatch.setattr(ops, "forced", "cpu")
    monkeypatch.setattr(products, "describe", lambda weight, dtype, rows, fused: asked.append((rows, fused)) or "P")
    monkeypatch.setattr(composed, "describe", lambda x, weight, rank, drops: asked.append((rank, drops)) or "C")
    base = layer.base_layer if of == "lora" else layer
    seen = Seen((7, WIDTH), torch.float32, dropout, mixed)
    reason = _describe(layer, base, seen)[1]
    told = of == "lora" and not mixed
    assert asked == [(7, of == "lora" and not dropout), *[(4, dropout)] * told]
    assert "; x Wᵀ by P" in reason and ("; x Wᵀ by P; C" in reason) == told
    monkeypatch.setattr(composed, "describe", lambda *given: "")
    assert "; x Wᵀ by P;" not in _describe(layer, base, seen)[1].partition("; backward")[0]
    if told:
        layer.set_adapter([])  # a guess for the next call
        asked.clear()
        monkeypatch.setattr(composed, "describe", lambda x, weight, rank, drops: asked.append((rank, drops)) or "C")
        _describe(layer, base, seen)
        assert asked[-1] == (1, dropout)


@pytest.mark.parametrize(
    ("shared", "mixed", "told"), [(True, True, True), (True, False, True), (False, False, True), (False, True, False)]
)
def test_siblings_are_told_but_for_a_mixed_batch_that_ran_alone(
    shared: bool, mixed: bool, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = alone().base_model.model[0]
    family = SimpleNamespace(dissolved=None, layers=[layer], describe=lambda *given: "with its siblings")
    layer.__dict__[siblings.KEY] = family
    choice = lora_linear.choose(X, layer.base_layer.weight, False)
    monkeypatch.setattr(lora_linear, "choose_shared", lambda *_, **__: (choice, True))
    reason = _describe(layer, layer.base_layer, Seen((7, WIDTH), torch.float32, False, mixed, shared))[1]
    assert ("; with its siblings" in reason) is told
