"""peft/experts.py's parts: what gates, whose class is given back, and what other layers are to it."""

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from moe_models import moe_model, wrapper_of
from torch import Tensor, nn

import fastlora
from fastlora import ops
from fastlora.operators import swiglu
from fastlora.peft import experts, obstacles
from fastlora.swap import is_derived

H = torch.linspace(-2, 2, 3 * 8).view(3, 8)


@pytest.mark.parametrize(("is_swiglu", "chosen"), [(True, "cpu"), (True, "reference"), (False, "cpu")])
def test_the_gate_is_the_operator_where_something_is_faster(
    is_swiglu: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def choose(*given: Any, **more: Any) -> Any:
        asked.append((given, more))
        return SimpleNamespace(implementation=chosen)

    monkeypatch.setattr(ops, "choose", choose)
    monkeypatch.setattr(swiglu, "swiglu", lambda gate, up: ("swiglu", gate.shape, up.shape))
    own = SimpleNamespace(has_gate=True, _apply_gate=lambda h: "the module's own")
    found = experts.Plan(own, None, None, is_swiglu).gate(H)  # type: ignore[arg-type]
    assert found == (("swiglu", (3, 4), (3, 4)) if is_swiglu and chosen == "cpu" else "the module's own")
    assert asked == [(("swiglu", H, 3, 12), {"dropout": False})] * is_swiglu
    alone = SimpleNamespace(has_gate=False, act_fn=lambda h: "an activation")
    assert experts.Plan(alone, None, None).gate(H) == "an activation"  # type: ignore[arg-type]


class Gated:
    act_fn: Any = nn.SiLU()
    _apply_gate = experts.DEFAULT_GATE

    def __init__(self, has_gate: bool) -> None:
        self.has_gate = has_gate


def test_what_has_no_gate_is_no_swiglu_whatever_its_class_could_do() -> None:
    assert experts._is_swiglu(Gated(True)) and not experts._is_swiglu(Gated(False))
    other = type("Other", (Gated,), {"_apply_gate": lambda self, h: h})
    assert not experts._is_swiglu(other(True))


def scaled_layer() -> Any:
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    return fastlora.accelerate(peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)).base_model.model[0]


def test_layers_of_other_kinds_are_none_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = scaled_layer()
    experts.detach(layer)
    assert is_derived(layer) and experts.swapped_base(layer) is None
    monkeypatch.setattr(obstacles, "swap_obstacle", lambda one: f"of {type(one).__name__}")
    assert experts.obstacle_of(nn.Linear(3, 3)) == "of Linear"


def test_what_is_multiplied_by_is_told_of_swapped_ones_alone() -> None:
    model = moe_model()
    assert experts.weights(model) == [] and experts.swapped_base(wrapper_of(model)) is None
    fastlora.accelerate(model)
    found = experts.weights(model)
    module = experts.swapped_base(wrapper_of(model))
    assert [tuple(weight.shape) for weight, _ in found[:2]] == [
        tuple(module.gate_up_proj.shape[1:]),
        tuple(module.down_proj.shape[1:]),
    ]
    assert all(ranks == [3, 3] for _, ranks in found) and len(found) == 4
    weight: Tensor = experts.weight_of(module)
    assert weight.shape == found[0][0].shape
