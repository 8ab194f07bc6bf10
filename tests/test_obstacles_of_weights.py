"""What stands in a layer's way, asked of its weight: pieces, quantised bases, layers that nobody knows; and where a DoRA's norms are kept."""

import gc
from typing import Any

import peft
import pytest
import torch
from peft.tuners import lora
from quantised_weights import weight as quantised_weight
from test_obstacles_by_name import ROWS, K, N, R, hook, make_dora, make_layer, plan_of
from torch import nn

import fastlora
from fastlora import checks
from fastlora.operators.dora_factor import KeptNorm
from fastlora.peft import obstacles, probing, quantised
from fastlora.peft.obstacles import IN_PIECES, NORMS, Plan, multiplied, plan_of_base, weight_obstacle


class OwnParameter(nn.Parameter):
    pass


def frozen(*shape: int) -> Any:
    return nn.Parameter(torch.ones(*shape), requires_grad=False)


def test_a_weight_in_pieces_is_told_from_one_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = OwnParameter(torch.ones(N, K), requires_grad=False)
    assert weight_obstacle(weight, None) == "the weight is a OwnParameter"
    monkeypatch.setattr(checks, "is_sharded", lambda one: one is weight)
    assert weight_obstacle(weight, None) == IN_PIECES
    assert weight_obstacle(frozen(N, K), None) is None and weight_obstacle(frozen(2, N, K), None) is None
    flat = frozen(K)
    assert weight_obstacle(flat, None) == "the weight is [8]: expected two dimensions or more"
    flat.ds_id = 7
    assert weight_obstacle(flat, None) == "the weight is [8]: DeepSpeed ZeRO-3 keeps it in pieces"


def test_a_trained_bias_is_in_the_way_of_a_frozen_layer() -> None:
    bias = nn.Parameter(torch.ones(N))
    assert weight_obstacle(frozen(N, K), bias) == "the base weight or bias is trained"
    assert weight_obstacle(frozen(N, K), bias.requires_grad_(False)) is None


class Lookup(nn.Module):
    """A layer that no method of PEFT's is known to stand on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def with_base(base: nn.Module) -> nn.Module:
    layer = nn.Module()
    layer.base_layer = base
    return layer


def test_a_layer_of_another_class_is_asked_for_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_of_base(with_base(Lookup())) == "the base layer is a Lookup"  # though it has no weight
    base = Lookup()
    base.weight, base.bias = frozen(N, K), frozen(N)
    assert plan_of_base(with_base(base)) == "the base layer is a Lookup"
    monkeypatch.setattr(probing, "is_linear", lambda one: one is base)
    plan = plan_of_base(with_base(base))
    assert isinstance(plan, Plan) and plan.weight is base.weight and plan.bias is base.bias and plan.added == []


def a_base() -> quantised.Base:
    stored = quantised_weight("int8", N, K, torch.float32).stored
    return quantised.Base(None, stored, "int8", None)  # type: ignore[arg-type]


def test_a_quantised_layer_is_multiplied_by_what_is_read_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, found = make_layer(), a_base()
    base = layer.base_layer
    answers: list[Any] = []
    asked: list[Any] = []
    monkeypatch.setattr(quantised, "base_of", lambda one: asked.append(one) or answers[-1])
    answers.append(found)
    assert multiplied(base) is found.weight() and multiplied(base, torch.bfloat16) is found.weight(torch.bfloat16)
    answers.append("the library is too old")
    assert multiplied(base) is base.weight
    asked.clear()
    assert isinstance(plan_of_base(layer), Plan) and asked == []  # a plain weight is nobody else's
    base.weight = OwnParameter(base.weight.detach(), requires_grad=False)
    assert plan_of_base(layer) == "the library is too old"
    answers.append(None)
    assert plan_of_base(layer) == "the weight is a OwnParameter"
    answers.append(found)
    plan = plan_of_base(layer)
    assert isinstance(plan, Plan) and plan[:3] == (found.weight(), base.bias, False) and asked == [base] * 3
    assert plan[3:] == ([], [], [], [], {}, {}, [])
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert plan_of_base(layer) == "the weight is a OwnParameter" and len(asked) == 3
    hook(base)
    assert plan_of_base(layer) == "the base layer carries a hook"


def test_a_quantised_weight_follows_x_and_not_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, found = make_layer(), a_base()
    layer.base_layer.weight = OwnParameter(layer.base_layer.weight.detach(), requires_grad=False)
    layer.base_layer.bias = None
    monkeypatch.setattr(quantised, "base_of", lambda one: found)
    for dtype in (torch.float32, torch.bfloat16):
        plan = plan_of(layer, ROWS.to(dtype))
        assert isinstance(plan, Plan) and plan.weight is found.weight(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert plan_of(layer) == "autocast is on, the weight quantised, and x float32"
        plan = plan_of(layer, ROWS.to(torch.bfloat16))
        assert isinstance(plan, Plan) and plan.weight is found.weight(torch.bfloat16)


def test_pefts_layers_over_quantised_bases_are_known_by_name() -> None:
    for name, obstacle in (("Linear4bit", None), ("Linear2bit", "peft.tuners.lora.bnb.Linear2bit is not fused")):
        layer = make_layer()
        layer.__class__ = type(name, (lora.Linear,), {"__module__": "peft.tuners.lora.bnb"})
        assert obstacles.swap_obstacle(layer) == obstacle


def test_a_layer_of_another_class_is_probed_before_it_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    layer, probed = make_layer(), []
    monkeypatch.setattr(probing, "probe", probed.append)
    assert obstacles.swap_obstacle(layer) is None and probed == []
    layer.base_layer.__class__ = Own
    assert obstacles.swap_obstacle(layer) == "the base layer is a Own" and probed == [layer.base_layer]


def test_a_dora_over_a_quantised_weight_is_taken_as_a_plain_one_is() -> None:
    plan = plan_of_base(make_layer())
    assert isinstance(plan, Plan)
    plan = plan._replace(weight=a_base().weight())
    assert obstacles.add_adapter(plan, make_dora(), "default") is None
    assert obstacles.add_adapter(plan, make_layer(), "default") is None
    assert len(plan.lora_a) == 2 and list(plan.magnitude) == list(plan.norm) == [0]


def test_plans_with_fewer_tensors_at_the_end_are_others() -> None:
    plan = plan_of(make_layer("second"))
    assert isinstance(plan, Plan) and not plan.is_as(plan._replace(lora_b=plan.lora_b[:1]))
    assert not plan._replace(lora_b=plan.lora_b[:1]).is_as(plan)


def swapped_dora() -> Any:
    config = peft.LoraConfig(r=R, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)
    model.add_adapter("second", config)
    return fastlora.accelerate(model).base_model.model[0].eval()


def test_norms_are_kept_by_adapter_as_long_as_their_tensors_are_the_same() -> None:
    layer = swapped_dora()
    plan = plan_of(layer)
    assert isinstance(plan, Plan) and type(plan.norm[0]) is KeptNorm and plan.norm.keys() == {0}
    assert plan_of(layer, ROWS[:1]).norm[0] is plan.norm[0] is layer.__dict__[NORMS]["default"][1]
    layer.set_adapter("second")
    other = plan_of(layer).norm[0]
    assert (
        type(other) is KeptNorm and other is not plan.norm[0] and layer.__dict__[NORMS].keys() == {"default", "second"}
    )
    layer.set_adapter("default")
    for change in ("A", "B", "W"):
        before = plan_of(layer).norm[0]
        assert before is plan_of(layer).norm[0]
        if change == "W":
            layer.base_layer.weight = frozen(N, K)
        else:
            holder = getattr(layer, f"lora_{change}")["default"]
            holder.weight = nn.Parameter(holder.weight.detach().clone())
        gc.collect()
        after = plan_of(layer).norm[0]
        assert type(after) is KeptNorm and after is not before, change


def test_norms_are_not_kept_on_pefts_own_layers_nor_while_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_dora()
    first, second = (plan_of(layer).norm[0] for _ in range(2))
    assert type(first) is type(second) is KeptNorm and first is not second and NORMS not in layer.__dict__
    layer = swapped_dora()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    first, second = (plan_of(layer).norm[0] for _ in range(2))
    assert type(first) is type(second) is KeptNorm and first is not second and NORMS not in layer.__dict__
