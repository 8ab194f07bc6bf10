"""peft/known.py: a layer's plan is kept as long as nothing that it was read from has changed, and made anew at once when something has."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners import lora
from peft_models import peft_model
from quantised_weights import weight as quantised_weight
from torch import nn
from torch.nn.modules import module as nn_module

import fastlora
from fastlora.peft import FusedLinear, known, mixed, obstacles
from fastlora.peft.known import ACTIVE, MIXED, find, plan_call
from fastlora.peft.layers import restore_layer

K, N = 8, 6
X = torch.linspace(-1, 1, 3 * K).view(3, K)
NAMES = ("default", "__base__", "other")

pytestmark = pytest.mark.skipif(known.unchanged is None, reason="needs the native extension")


def layer_of(dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        **{"r": 2, "lora_dropout": dropout, "target_modules": ["0"], "init_lora_weights": False, **options}
    )
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)
    model.add_adapter("other", config)
    layer = fastlora.accelerate(model).base_model.model[0]
    assert type(layer) is FusedLinear
    return layer.eval()


def hook(*_: Any) -> None:
    return None


CHANGES: dict[str, Callable[[Any], Any]] = {
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "merged by hand": lambda layer: layer.merged_adapters.append("default"),
    "other active": lambda layer: layer.set_adapter("other"),
    "active in place": lambda layer: layer._active_adapter.append("other"),
    "none active": lambda layer: layer.set_adapter([]),
    "scaling": lambda layer: layer.set_scale("default", 3.0),
    "a variant": lambda layer: layer.lora_variant.__setitem__("default", object()),
    "deleted": lambda layer: layer.delete_adapter("default"),
    "another base": lambda layer: setattr(layer, "base_layer", nn.Linear(K, N).requires_grad_(False)),
    "another kind of base": lambda layer: setattr(layer.base_layer, "__class__", nn.Bilinear),
    "another weight": lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.ones(N, K), False)),
    "another bias": lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.ones(N), False)),
    "without bias": lambda layer: setattr(layer.base_layer, "bias", None),
    "trained": lambda layer: layer.base_layer.weight.requires_grad_(),
    "trained bias": lambda layer: layer.base_layer.bias.requires_grad_(),
    "another dtype": lambda layer: setattr(layer.base_layer.weight, "data", torch.ones(N, K).bfloat16()),
    "another shape": lambda layer: setattr(layer.lora_A["default"].weight, "data", torch.ones(2, K + 1)),
    "another rank": lambda layer: setattr(layer.lora_B["default"].weight, "data", torch.ones(N, 3)),
    "another device": lambda layer: layer.lora_B["default"].to_empty(device="meta"),
    "another A": lambda layer: setattr(layer.lora_A["default"], "weight", nn.Parameter(torch.ones(2, K))),
    "another module B": lambda layer: layer.lora_B.__setitem__("default", nn.Linear(2, N, bias=False)),
    "a bias of B": lambda layer: setattr(layer.lora_B["default"], "bias", nn.Parameter(torch.ones(N))),
    "another dropout": lambda layer: layer.lora_dropout.__setitem__("default", nn.Dropout(0.25)),
    "training": lambda layer: layer.train(),
    "another p": lambda layer: setattr(layer.train().lora_dropout["default"], "p", 0.25),
    "a hook of the base": lambda layer: layer.base_layer.register_forward_hook(hook),
    "a hook of A": lambda layer: layer.lora_A["default"].register_forward_pre_hook(hook),
    "a hook of B": lambda layer: layer.lora_B["default"].register_full_backward_hook(hook),
    "a hook of dropout": lambda layer: layer.lora_dropout["default"].register_full_backward_pre_hook(hook),
    "a forward of the base": lambda layer: setattr(layer.base_layer, "forward", hook),
    "a hook of another library": lambda layer: setattr(layer.lora_A["default"], "_hf_hook", hook),
}


def fresh(layer: Any, names: Any) -> Any:
    used = obstacles.used_adapters(layer, names)
    return used, obstacles.plan_call(layer, X, used, names is not None)


@pytest.mark.parametrize("names", [None, NAMES], ids=["active", "mixed"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str, names: Any) -> None:
    layer = layer_of(dropout=0.5)
    layer.set_adapter("default")
    before = plan_call(layer, X, names)
    assert before[1] is plan_call(layer, X, names)[1] and find(layer, X, names) is not None
    CHANGES[change](layer)
    used, plan = plan_call(layer, X, names)
    expected_used, expected = fresh(layer, names)
    assert list(used) == list(expected_used) and type(plan) is type(expected)
    assert plan == expected if isinstance(plan, str) else plan.is_as(expected)
    if names is None or "active" not in change:
        assert plan is not before[1]


def test_who_vouches_for_a_layer_is_believed_until_he_says_something_else() -> None:
    def names(since: object) -> mixed.RowNames:
        handed_out = mixed.RowNames(NAMES, [1] * len(NAMES))
        handed_out.since = since
        return handed_out

    layer, first, second = layer_of(), object(), object()
    plan = plan_call(layer, X, names(first))[1]
    layer.lora_A["default"].register_forward_hook(hook)
    assert plan_call(layer, X, names(first))[1] is plan
    for since in (None, second):
        assert find(layer, X, names(since)) is None
        assert isinstance(plan_call(layer, X, names(since))[1], str)
    layer = layer_of()
    plan = plan_call(layer, X, names(None))[1]
    assert plan_call(layer, X, names(first))[1] is plan, "looked at, and as it was"
    layer.lora_A["default"].register_forward_hook(hook)
    assert plan_call(layer, X, names(first))[1] is plan and find(layer, X, NAMES) is None
    assert find(layer, X.double(), names(first)) is None, "of x nobody has vouched for anything"


def magnitudes(layer: Any) -> Any:
    return layer.lora_magnitude_vector["default"]


DORA_CHANGES: dict[str, Callable[[Any], Any]] = {
    "another magnitude": lambda layer: setattr(magnitudes(layer), "weight", nn.Parameter(torch.ones(N))),
    "another dtype": lambda layer: setattr(magnitudes(layer).weight, "data", torch.ones(N).half()),
    "another shape": lambda layer: setattr(magnitudes(layer).weight, "data", torch.ones(N + 1)),
    "another module": lambda layer: layer.lora_magnitude_vector.__setitem__("default", nn.Linear(1, N)),
    "a hook": lambda layer: magnitudes(layer).register_forward_hook(hook),
    "training, but not the layer": lambda layer: layer.lora_dropout.train(),
    "training": lambda layer: layer.train(),
    "the layer alone": lambda layer: layer.__dict__.__setitem__("training", False),
    "no variant": lambda layer: layer.lora_variant.clear(),
}


@pytest.mark.parametrize("change", DORA_CHANGES)
def test_every_change_of_a_dora_is_seen(change: str) -> None:
    layer = layer_of(dropout=0.5, use_dora=True)
    layer.set_adapter("default")
    if change == "the layer alone":
        layer.train()
    before = plan_call(layer, X, None)[1]
    assert before.magnitude and before is plan_call(layer, X, None)[1]
    DORA_CHANGES[change](layer)
    plan, expected = plan_call(layer, X, None)[1], fresh(layer, None)[1]
    assert plan is not before and type(plan) is type(expected)
    assert plan == expected if isinstance(plan, str) else plan.is_as(expected)


BIASES: dict[str, Callable[[Any], Any]] = {
    "frozen": lambda layer: layer.base_layer.bias.requires_grad_(False),
    "another": lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.ones(N))),
    "another shape": lambda layer: setattr(layer.base_layer.bias, "data", torch.ones(1)),
    "another of B": lambda layer: setattr(layer.lora_B["default"], "bias", nn.Parameter(torch.ones(N))),
    "another dtype of B": lambda layer: setattr(layer.lora_B["default"].bias, "data", torch.ones(N).half()),
}


@pytest.mark.parametrize("change", BIASES)
def test_every_change_of_a_trained_bias_is_seen(change: str) -> None:
    layer = layer_of(lora_bias=True, init_lora_weights=True)
    layer.base_layer.bias.requires_grad_()
    layer.set_adapter("default")
    before = plan_call(layer, X, None)[1]
    assert len(before.added) == 2 and before is plan_call(layer, X, None)[1]
    BIASES[change](layer)
    plan, expected = plan_call(layer, X, None)[1], fresh(layer, None)[1]
    assert plan is not before and type(plan) is type(expected)
    assert plan == expected if isinstance(plan, str) else plan.is_as(expected)


def test_every_change_of_a_mixed_batchs_adapters_is_seen() -> None:
    """Of those that it names, whichever is active and whatever names come before; and of no other."""
    layer = layer_of(dropout=0.5)
    layer.set_adapter("default")
    names = ("absent", "__base__", "other")
    changes = (
        lambda: layer.set_scale("other", 3.0),
        lambda: setattr(layer.lora_A["other"], "weight", nn.Parameter(torch.ones(2, K))),
        lambda: layer.lora_dropout["other"].train(),
    )
    for change in changes:
        before = plan_call(layer, X, names)[1]
        assert before is plan_call(layer, X, names)[1]
        change()
        plan = plan_call(layer, X, names)[1]
        assert plan is not before and plan.is_as(fresh(layer, names)[1])
    layer.set_scale("default", 5.0)
    assert plan_call(layer, X, names)[1] is plan


def test_an_active_adapter_may_be_a_word() -> None:
    """As PEFT's layers begin."""
    layer = layer_of()
    layer._active_adapter = "default"
    before = plan_call(layer, X, None)
    assert before[0] == ["default"] and plan_call(layer, X, None)[1] is before[1]
    layer.set_scale("default", 3.0)
    assert plan_call(layer, X, None)[1].is_as(fresh(layer, None)[1]) and not before[1].is_as(fresh(layer, None)[1])
    layer._active_adapter = "other"
    assert plan_call(layer, X, None)[0] == ["other"]


def test_adapters_that_come_without_a_word_are_seen() -> None:
    layer = layer_of()
    layer.set_adapter(["default"])
    layer._active_adapter.append("late")
    config = peft.LoraConfig(r=2, init_lora_weights=False)
    lora.Linear.update_layer(layer, "late", 2, lora_alpha=4, config=config)
    module = layer.lora_A.pop("late")
    names = ("default", "late")
    assert plan_call(layer, X, None)[0] == plan_call(layer, X, names)[0] == ["default"]
    assert find(layer, X, None) is not None and find(layer, X, names) is not None
    layer.lora_A["late"] = module
    assert plan_call(layer, X, None)[0] == plan_call(layer, X, names)[0] == ["default", "late"]


def test_adapters_that_come_are_seen() -> None:
    layer = layer_of()
    layer.set_adapter(["default"])
    layer._active_adapter.append("late")
    names = ("default", "late", "late")
    assert plan_call(layer, X, None)[0] == plan_call(layer, X, names)[0] == ["default"]
    layer.update_layer("late", 2, lora_alpha=4, config=peft.LoraConfig(r=2, init_lora_weights=False))
    assert plan_call(layer, X, None)[0] == plan_call(layer, X, names)[0] == ["default", "late"]


def test_global_hooks_and_other_forwards_of_a_class_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    plan = plan_call(layer, X, None)[1]
    handle = nn_module.register_module_forward_hook(hook)
    assert plan_call(layer, X, None)[1] == "a global hook is set"
    handle.remove()
    assert plan_call(layer, X, None)[1].is_as(plan)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", hook)
        assert plan_call(layer, X, None)[1] == "the base layer is a Linear"


class Own(torch.Tensor):
    pass


def test_what_a_call_brings_is_looked_at() -> None:
    layer = layer_of()
    plan = plan_call(layer, X, None)[1]
    nested = torch.nested.nested_tensor([X, X[:2]])
    for x in (X.double(), X[:, :-1], X.to("meta"), X.to_sparse(), X.as_subclass(Own), X.sum(), nested, None):
        assert find(layer, x, None) is None and isinstance(plan_call(layer, x, None)[1], str)
    assert find(layer, X[0], None) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert find(layer, X, None) is None and plan_call(layer, X, None)[1].is_as(plan)
        assert find(layer, X, None) is not None
    assert find(layer, X, None) is None
    plan_call(layer, X, None)
    seen: list[Any] = []
    torch.func.vmap(lambda row: seen.append(find(layer, row, None)) or row)(X)
    with torch.autograd.forward_ad.dual_level():
        seen.append(find(layer, X, None))
    assert seen == [None, None] and find(layer, X, None) is not None
    assert find(layer, X, NAMES) is None and plan_call(layer, X, NAMES)[0] == ["default", "other"]
    assert find(layer, X, (*NAMES[:2], "other")) is not None and find(layer, X, NAMES[::-1]) is None


def test_what_a_layer_knows_is_its_own_and_goes_with_what_it_had() -> None:
    layer = layer_of()
    plan_call(layer, X, None)
    plan_call(layer, X, NAMES)
    assert {ACTIVE, MIXED} <= layer.__dict__.keys()
    for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not {ACTIVE, MIXED} & other.__dict__.keys()
    replica = layer._replicate_for_data_parallel()
    assert find(replica, X, None) is None and find(layer, X, None) is not None
    del replica
    weight = weakref.ref(layer.lora_A["other"].weight)
    layer.delete_adapter("other")
    gc.collect()
    assert weight() is None and not {ACTIVE, MIXED} & layer.__dict__.keys()
    plan_call(layer, X, None)
    layer.double()
    assert ACTIVE not in layer.__dict__


def test_forgetting_takes_the_norms_of_the_adapter_that_goes_or_all() -> None:
    layer = layer_of(use_dora=True)
    for name in ("default", "other"):
        layer.set_adapter(name)
        plan_call(layer, X, None)
    assert layer.__dict__[obstacles.NORMS].keys() == {"default", "other"}
    known.forget(layer, "default")
    assert layer.__dict__[obstacles.NORMS].keys() == {"other"} and ACTIVE not in layer.__dict__
    known.forget(layer)
    assert obstacles.NORMS not in layer.__dict__
    plan_call(layer, X, None)
    restore_layer(layer)
    assert not {obstacles.NORMS, ACTIVE} & layer.__dict__.keys()


def test_a_restored_layer_knows_nothing() -> None:
    model, _ = peft_model()
    fastlora.accelerate(model)
    model(torch.ones(1, 3, dtype=torch.int64))
    assert any(ACTIVE in module.__dict__ for module in model.modules())
    fastlora.restore(model)
    assert not any(ACTIVE in module.__dict__ for module in model.modules())


def test_a_compiler_is_told_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        plan = plan_call(layer, X, None)[1]
        assert ACTIVE not in layer.__dict__
    plan_call(layer, X, None)
    monkeypatch.setattr(known, "find", lambda *_: pytest.fail("it would trace csrc's look"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert plan_call(layer, X, None)[1].is_as(plan)


def test_what_nobody_can_look_at_again_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the native extension nothing; nor a quantised weight's plan, which hangs on more."""
    layer = layer_of()
    with monkeypatch.context() as patch:
        patch.setattr(known, "unchanged", None)
        plan = plan_call(layer, X, None)[1]
        assert isinstance(plan, obstacles.Plan) and ACTIVE not in layer.__dict__
    plan_call(layer, X, None)
    with monkeypatch.context() as patch:
        patch.setattr(known, "unchanged", None)
        assert find(layer, X, None) is None
    known.forget(layer)
    quantised = plan._replace(weight=quantised_weight("int8", N, K, torch.float32))
    with monkeypatch.context() as patch:
        patch.setattr(obstacles, "plan_call", lambda *_: quantised)
        assert plan_call(layer, X, None)[1] is quantised and ACTIVE not in layer.__dict__
    assert plan_call(layer, X, None)[1].is_as(plan) and ACTIVE in layer.__dict__


def test_a_weight_that_is_computed_makes_a_plan_each_time() -> None:
    layer = layer_of()
    weight = layer.base_layer._parameters.pop("weight").detach()
    layer.base_layer.__dict__["weight"] = weight
    assert not isinstance(plan_call(layer, X, None)[1], str) and ACTIVE not in layer.__dict__
    layer = layer_of()
    layer.base_layer.__dict__["bias"] = layer.base_layer._parameters.pop("bias").detach()
    assert not isinstance(plan_call(layer, X, None)[1], str) and ACTIVE not in layer.__dict__
    layer = layer_of(lora_bias=True, init_lora_weights=True)
    layer.lora_B["default"].__dict__["bias"] = layer.lora_B["default"]._parameters.pop("bias").detach()
    assert not isinstance(plan_call(layer, X, None)[1], str) and ACTIVE not in layer.__dict__


@pytest.mark.parametrize("state", [(), ((), (), (), ()), ([], (), (), (), ())], ids=str)
def test_csrc_asks_for_five_tuples(state: Any) -> None:
    with pytest.raises(TypeError, match="state: expected five tuples"):
        known.unchanged(*state)


def test_csrc_says_what_is_as_it_was() -> None:
    items: list[Any] = [1, 2]
    empty: dict[str, Any] = {}
    one = {"a": items}
    state: tuple[Any, ...] = (
        (one, "a", items, one, "b", type(None)),
        (empty, dict),
        (empty,),
        (items, tuple(items)),
        (torch.ones(2), "shape", torch.Size([2])),
    )
    assert known.unchanged(*state)
    for number, wrong in enumerate(((one, "b", items), (empty, list), (items,), (items, (1, 3)), (items, "shape", 2))):
        assert not known.unchanged(*state[:number], wrong, *state[number + 1 :])
    assert not known.unchanged((one, "a", type(None)), *state[1:])
    assert not known.unchanged(*state[:3], (items, (1,)), state[4])
    assert not known.unchanged(*state[:4], (items, "__len__", 2))
