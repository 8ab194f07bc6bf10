"""peft/layers.py, one call of a swapped layer: which forward runs, with what, and what is noted of it for `report`."""

import copy
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners import ia3, lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.frozen import packed
from fastlora.operators import lora_linear
from fastlora.peft import FrozenLinear, FusedLinear, mixed, obstacles, probing, quantised, siblings
from fastlora.peft.layers import (
    OWN_FORWARD,
    SEEN,
    FrozenQuantised,
    OwnForward,
    Seen,
    compute,
    frozen_base,
    restore_layer,
)
from fastlora.swap import is_derived

K, N = 8, 6
X = torch.linspace(-1, 1, 3 * K).view(3, K)
MORE = "the call has arguments besides x"


def layer_of(*others: str, dropout: float = 0.0) -> Any:
    """A swapped layer with the adapter `default` and these, all active."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_dropout=dropout, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)
    for name in others:
        model.add_adapter(name, config)
    model.base_model.set_adapter(["default", *others])
    layer = fastlora.accelerate(model).base_model.model[0]
    assert type(layer) is FusedLinear
    return layer


def frozen_layer() -> Any:
    layer = fastlora.accelerate(nn.Sequential(nn.Linear(K, N)).requires_grad_(False), frozen=True)[0]
    assert type(layer) is FrozenLinear
    return layer


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What PEFT's own forward is called with, in the place of which nothing is computed."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        lora.Linear, "forward", lambda self, x, *args, **kwargs: calls.append((x, args, kwargs)) or "own"
    )
    return calls


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1,), {}),
        ((None,), {}),
        ((), {"more": 1}),
        ((), {"more": None, "other": False}),
        ((), {"more": 1, "adapter_names": None}),
        ((1,), {"adapter_names": ["default"] * 3}),
        ((), {"more": 1, "adapter_names": ["default"] * 3}),
    ],
)
def test_what_a_call_has_besides_x_is_for_pefts_forward(args: Any, kwargs: Any, own: list[tuple[Any, ...]]) -> None:
    layer = layer_of()
    assert layer(X, *args, **kwargs) == "own" and own == [(X, args, kwargs)]
    assert layer.__dict__[OWN_FORWARD] == OwnForward(MORE, True, None) and SEEN not in layer.__dict__


@pytest.mark.parametrize(
    "kwargs", [{}, {"adapter_names": None}, {"more": None}, {"more": None, "adapter_names": None}], ids=str
)
def test_what_is_none_is_not_there(kwargs: dict[str, Any], own: list[tuple[Any, ...]]) -> None:
    layer = layer_of()
    y = layer(X, **kwargs)
    assert own == [] and OWN_FORWARD not in layer.__dict__
    assert layer.__dict__[SEEN] == Seen(X.shape, torch.float32, False, False, False)
    a, b = (of["default"].weight for of in (layer.lora_A, layer.lora_B))
    expected = nn.functional.linear(X, layer.base_layer.weight, layer.base_layer.bias) + X @ a.T @ b.T * 4
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_a_lasting_obstacle_is_the_layers_own(own: list[tuple[Any, ...]]) -> None:
    layer = layer_of()
    layer(X)
    before = layer.__dict__[SEEN]
    layer.merge()
    layer(X)
    assert layer.__dict__[OWN_FORWARD] == OwnForward("the adapter is merged", False, before)


@pytest.mark.parametrize("more", [{}, {"more": 1}], ids=["fused", "own"])
def test_a_traced_call_leaves_no_note(more: Any, own: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, frozen = layer_of(), frozen_layer()
    expected, frozen_expected = layer(X), frozen(X)
    for one in (layer, frozen):
        one.__dict__.pop(SEEN)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    y = layer(X, **more)
    assert y == "own" if more else torch.equal(y, expected)
    assert torch.equal(frozen(X), frozen_expected)
    frozen.weight.requires_grad_()
    frozen(X)
    assert not {SEEN, OWN_FORWARD} & (layer.__dict__.keys() | frozen.__dict__.keys())


def test_several_adapters_are_their_sum() -> None:
    layer = layer_of("other")
    found = layer(X)
    base = layer.base_layer(X)
    layer.set_adapter("default")
    one = layer(X) - base
    layer.set_adapter("other")
    torch.testing.assert_close(found, base + one + layer(X) - base, rtol=1e-4, atol=1e-5)


def test_rows_with_adapters_of_their_own() -> None:
    layer = layer_of("other").eval()
    layer.set_adapter("other")
    names = ["default", "__base__", "other"]
    found = layer(X, adapter_names=names)
    assert layer.__dict__[SEEN] == Seen(X.shape, torch.float32, False, True, False)
    expected = [layer.base_layer(X)[1]]
    for row, name in ((0, "default"), (2, "other")):
        layer.set_adapter(name)
        expected.insert(row, layer(X)[row])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(X, more=None, adapter_names=names), found) and layer.__dict__[SEEN].mixed
    with pytest.raises(ValueError, match="adapter_names"):
        layer(X, adapter_names=names[:2])  # as PEFT says it
    with torch.inference_mode():
        assert torch.equal(layer(X, adapter_names=names), found)
    layer(X.clone().requires_grad_(), adapter_names=names).sum().backward()


def test_dropout_is_noted() -> None:
    layer = layer_of(dropout=0.5)
    trained = layer(X)
    assert layer.__dict__[SEEN].dropout
    evaluated = layer.eval()(X)
    assert not layer.__dict__[SEEN].dropout and not torch.allclose(trained, evaluated)


def test_autocast_casts() -> None:
    layer = layer_of()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(X)
    assert y.dtype == layer.__dict__[SEEN].dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(X), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("more", ["", "gradients", "dropout", "a sum", "names", "autocast", "by column", "siblings"])
def test_one_call_of_csrcs_is_asked_where_it_is_enough(more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One plain adapter, without gradients; and what it gives is not computed again."""
    layer = layer_of(*["other"] * (more == "a sum"), dropout=0.5 * (more == "dropout"))
    layer.train(more == "dropout")
    result, asked, computed = torch.ones(3, N), [], []
    monkeypatch.setattr(lora_linear, "compute_few", lambda *args: asked.append(args) or result)
    monkeypatch.setattr(lora_linear, "compute", lambda x, weights, *_: computed.append(x) or [result] * len(weights))
    used = layer.active_adapters
    plan = obstacles.plan_call(layer, X, used, is_mixed=False)
    plan = plan._replace(transposed=more == "by column", weight=plan.weight.T if more == "by column" else plan.weight)
    names = ("default",) * 3 if more == "names" else None
    with torch.set_grad_enabled(more == "gradients"), torch.autocast("cpu", enabled=more == "autocast"):
        ys = compute([plan] * (1 + (more == "siblings")), X, used, names)
    assert ys == [result] * len(ys) and (len(asked), len(computed)) == ((0, 1) if more else (1, 0))


def test_where_csrc_has_no_such_call_the_operator_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of().eval()
    expected = layer(X)
    monkeypatch.setattr(lora_linear, "compute_few", lambda *args: None)
    with torch.no_grad():
        torch.testing.assert_close(layer(X), expected)


def test_a_weight_that_lies_the_other_way() -> None:
    """As GPT-2's layers have it."""
    config = peft.LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True)  # of which B is zero
    model = fastlora.accelerate(peft.get_peft_model(nn.Sequential(Conv1D(N, K)), config))
    layer = model.base_model.model[0]
    assert type(layer) is FusedLinear
    torch.testing.assert_close(layer(X), layer.base_layer(X), rtol=1e-4, atol=1e-5)
    assert OWN_FORWARD not in layer.__dict__


def test_copies_go_where_peft_merges_and_where_a_layer_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[Any] = []
    layer, frozen = layer_of(), frozen_layer()
    monkeypatch.setattr(packed, "drop", gone.append)
    monkeypatch.setattr(packed, "detach", gone.append)
    with pytest.raises(AttributeError):
        _ = frozen.base_layer
    restore_layer(layer)
    restore_layer(frozen)
    assert [id(one) for one in gone] == [id(one) for one in (frozen.weight, layer.base_layer, frozen)]


def test_dropout_stands_in_the_way_of_a_sum_and_not_of_a_mixed_batch() -> None:
    layer = layer_of("other", dropout=0.5)
    layer(X)
    assert "dropout" in layer.__dict__[OWN_FORWARD].obstacle and SEEN not in layer.__dict__
    layer(X, adapter_names=["default", "other", "other"])
    assert layer.__dict__[SEEN] == Seen(X.shape, torch.float32, True, True, False)


def test_what_siblings_have_computed_is_taken_as_it_is() -> None:
    """They are asked where one adapter is active, or each row has its own; a sum of adapters is not theirs."""
    layer = layer_of("other")
    shared, asked = torch.ones(3, N), []
    layer.__dict__[siblings.KEY] = SimpleNamespace(result_of=lambda *args: asked.append(args) or shared)
    layer(X)
    assert not asked and not layer.__dict__[SEEN].shared
    assert layer(X, adapter_names=["default"] * 3) is shared and layer.__dict__[SEEN].shared
    layer.set_adapter("default")
    assert layer(X) is shared and layer.__dict__[SEEN] == Seen(X.shape, torch.float32, False, False, True)
    assert [(args[0], args[1], args[3]) for args in asked] == [(layer, X, ("default",) * 3), (layer, X, None)]


def test_an_unloaded_layer_leaves_its_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    left: list[nn.Module] = []
    monkeypatch.setattr(siblings, "leave", left.append)
    layer.unload_and_optionally_merge_module(False, False, None)
    assert left == [layer]


def test_a_copy_has_no_siblings() -> None:
    layer = layer_of()
    layer.__dict__[siblings.KEY] = "a family"
    state = copy.copy(layer).__dict__
    assert siblings.KEY not in state and state.keys() == layer.__dict__.keys() - {siblings.KEY}


def test_a_frozen_layer_that_is_trained_or_transformed_runs_torchs() -> None:
    layer = frozen_layer()
    plain = nn.Linear(K, N)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(X), plain(X))
    seen = layer.__dict__[SEEN]
    assert seen == Seen(X.shape, torch.float32) and OWN_FORWARD not in layer.__dict__
    torch.testing.assert_close(torch.func.vmap(layer)(X), plain(X))
    assert layer.__dict__[OWN_FORWARD][1:] == (True, seen)
    layer.weight.requires_grad_()
    assert torch.equal(layer(X), plain(X)) and layer(X).requires_grad
    assert layer.__dict__[OWN_FORWARD] == OwnForward("the base weight or bias is trained", False, seen)


def test_peft_unloads_layers_without_anything_of_ours() -> None:
    for merge in (False, True):
        layer = layer_of().eval()
        expected = layer(X) if merge else layer.base_layer(X)
        base = layer.unload_and_optionally_merge_module(merge, False, None)
        assert type(base) is nn.Linear and type(layer) is lora.Linear and SEEN not in layer.__dict__
        torch.testing.assert_close(base(X), expected, rtol=1e-4, atol=1e-5)
    layer = layer_of()
    layer.base_layer = frozen_layer()
    assert type(layer.unload_and_optionally_merge_module(False, False, None)) is nn.Linear
    frozen = frozen_layer()
    frozen(X)
    assert frozen.unload_and_optionally_merge_module(True, False, None) is frozen
    assert type(frozen) is nn.Linear and SEEN not in frozen.__dict__
    with pytest.raises(AttributeError, match="^'FrozenLinear' object has no attribute 'base_layer'$"):
        _ = frozen_layer().base_layer


def test_which_layers_multiply_by_a_frozen_weight() -> None:
    layer, frozen, plain = layer_of(), frozen_layer(), nn.Linear(K, N)
    assert frozen_base(layer) is layer.base_layer and frozen_base(frozen) is frozen and frozen_base(plain) is None
    configs = peft.IA3Config(target_modules=["0"], feedforward_modules=[]), peft.LoraConfig(target_modules=["0"])
    models = [
        peft.get_peft_model(nn.Sequential(own), config)
        for own, config in zip((nn.Linear(K, N), nn.Embedding(K, N)), configs, strict=True)
    ]
    scaled, embedding = (model.base_model.model[0] for model in models)
    assert frozen_base(scaled) is None
    for model in models:
        fastlora.accelerate(model)
    assert frozen_base(scaled) is scaled.base_layer and is_derived(embedding) and frozen_base(embedding) is None
    for one, kind in ((layer, lora.Linear), (frozen, nn.Linear), (plain, nn.Linear)):
        restore_layer(one)
        assert type(one) is kind


def test_which_layers_may_be_frozen_products() -> None:
    frozen, hooked, plain = frozen_layer(), frozen_layer(), nn.Linear(K, N).requires_grad_(False)
    hooked.register_forward_hook(lambda *_: None)
    held = type("Held", (FrozenQuantised, nn.Linear), {})(K, N)
    derived = frozen_layer()
    derived.__class__ = type("Parametrised", (FrozenLinear,), {})
    for layer, may in (
        (frozen, True),
        (hooked, True),
        (plain, True),
        (held, True),
        (derived, False),
        (nn.Linear(K, N), False),
    ):
        assert fastlora.peft._is_frozen_product(layer) is may
    plain.register_forward_hook(lambda *_: None)
    assert not fastlora.peft._is_frozen_product(plain)


def test_restoring_takes_back_all_that_was_put_on_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, released = layer_of(), []
    base = layer.base_layer
    base.__dict__[probing.KEY] = nn.Linear.forward
    monkeypatch.setattr(quantised, "release", released.append)
    restore_layer(layer)
    assert probing.KEY not in base.__dict__ and released == [base]
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    model = fastlora.accelerate(peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config))
    scaled = model.base_model.model[0]
    assert is_derived(scaled)
    restore_layer(scaled)
    assert type(scaled) is ia3.Linear


def test_a_class_that_another_has_derived_since_is_restored_below_it() -> None:
    """As fully_shard does."""

    class Sharded:
        pass

    layer = frozen_layer()
    layer.__class__ = type("ShardedFrozenLinear", (Sharded, FrozenLinear), {})
    restore_layer(layer)
    assert issubclass(type(layer), Sharded) and issubclass(type(layer), nn.Linear)
    assert FrozenLinear not in type(layer).__mro__


def test_a_frozen_layer_whose_weight_is_computed_is_restored_too() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = frozen_layer()
    layer(X)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    kind = type(layer)
    restore_layer(layer)
    assert type(layer) is kind and kind.__bases__ == (nn.Linear,) and SEEN not in layer.__dict__
    assert torch.equal(layer(X), nn.functional.linear(X, layer.weight, layer.bias))


def test_rows_are_sorted_once() -> None:
    layer = layer_of("other").eval()
    mixed._sorted.cache_clear()
    for names in (["default", "other", "other"], ["default", "other", "other"], ["other", "other", "default"]):
        layer(X, adapter_names=names)
    assert mixed._sorted.cache_info()[:2] == (1, 2)
