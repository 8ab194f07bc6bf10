"""IA³ layers one at a time: what stands in the way of a call, of a class, what is told of it, and what PEFT writes into the weight."""

from typing import Any

import peft
import pytest
import torch
from packed_weights import check_now, held_bytes
from peft import IA3Config, get_peft_model
from peft.tuners import ia3
from quantised_weights import weight as quantised_weight
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

import fastlora
from fastlora import ops, swap
from fastlora.frozen import packed
from fastlora.frozen.packed import Budget
from fastlora.peft import mixed, quantised, scaled
from fastlora.peft.layers import OWN_FORWARD, SEEN, FrozenLinear

K, N = 8, 6
X = torch.linspace(-1, 1, 3 * K).view(3, K)


def model_of(kind: type[nn.Linear] = nn.Linear, feedforward: bool = False) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(kind(K, N))
    model = get_peft_model(base, IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else []))
    factor = layer_of(model).ia3_l["default"]
    factor.data += 0.3 * torch.randn_like(factor)
    return model


def layer_of(model: Any) -> Any:
    return model.base_model.model[0]


@pytest.fixture(params=[False, True], ids=["after", "before"])
def layer(request: pytest.FixtureRequest) -> Any:
    """An accelerated layer whose factors stand before or after the product."""
    return layer_of(fastlora.accelerate(model_of(feedforward=request.param)))


def expected_of(layer: Any, *args: Any) -> Tensor:
    """PEFT's own result, of X or of other arguments."""
    return type(layer).__bases__[-1].forward(layer, *(args or (X,)))


def why(layer: Any) -> str:
    return scaled.describe(layer)[1]


def test_what_it_computes_and_tells(layer: Any) -> None:
    implementation, reason = scaled.describe(layer)  # a guess
    assert reason.startswith("not called yet, unless compiled; 512 rows: ") and implementation in ops.IMPLEMENTATIONS
    for x, rows in ((X, "3 rows: "), (X[0], "1 row: "), (X.view(1, 3, K), "3 rows: ")):
        assert torch.allclose(layer(x), expected_of(layer, x), atol=1e-6)
        assert layer.__dict__[SEEN].shape == x.shape and layer.__dict__[SEEN].dtype is torch.float32
        implementation, reason = scaled.describe(layer)
        where = "before" if layer.is_feedforward else "after"
        assert reason.startswith(rows) and f"; one factor a column {where} it: " in reason
        assert implementation in ops.IMPLEMENTATIONS
    assert OWN_FORWARD not in layer.__dict__


OBSTACLES: dict[str, Any] = {
    "adapters are disabled": lambda layer: layer.enable_adapters(False),
    "the adapter is merged": lambda layer: layer.merge(),
    "no adapter is active": lambda layer: layer.set_adapter([]),
    "the base layer is a Bilinear": lambda layer: setattr(layer.base_layer, "__class__", nn.Bilinear),
    "the base weight or bias is trained": lambda layer: layer.base_layer.weight.requires_grad_(),
    "a factor is float32 [2, 5] on cpu, and the weight float32 [6, 8] on cpu": lambda layer: put(
        layer, nn.Parameter(torch.ones(2, 5))
    ),
    "a factor is float32 [1] on cpu": lambda layer: put(layer, nn.Parameter(torch.ones(1))),
    "a factor is float32 [48] on cpu": lambda layer: put(layer, Own(torch.ones(48))),
    "a factor is float32 [1, 8] on meta": lambda layer: put(layer, nn.Parameter(torch.ones(1, K, device="meta"))),
    "a factor is bfloat16 and the weight float32": lambda layer: layer.ia3_l.bfloat16(),
}


class Own(nn.Parameter):
    """A class of parameters that nobody here knows."""


def put(layer: Any, factor: Any) -> None:
    columns = K if layer.is_feedforward else N
    if factor.numel() == 48:  # as many as it should have
        factor = type(factor)(torch.ones(1, columns))
    layer.ia3_l["default"] = factor


@pytest.mark.parametrize("words", OBSTACLES)
def test_what_stands_in_the_way_of_every_call(words: str, layer: Any) -> None:
    layer(X)
    OBSTACLES[words](layer)
    if "[48]" in words:
        words = f"a factor is float32 [1, {K if layer.is_feedforward else N}] on cpu"
    found = scaled.lasting_plan(layer)
    if words.endswith("meta") and not layer.is_feedforward:
        words = f"a factor is float32 [1, {K}] on meta"
    assert isinstance(found, str) and words in found
    assert why(layer) == f"PEFT's own forward from now on: {found}"


def test_a_global_hook_sees_the_modules_inside(layer: Any) -> None:
    handle = nn_module.register_module_forward_hook(lambda *_: None)
    try:
        assert torch.equal(layer(X), expected_of(layer)) and why(layer) == "PEFT's own forward: a global hook is set"
    finally:
        handle.remove()
    layer(X)
    assert "factor a column" in why(layer)


def test_several_factors_each_fit(layer: Any) -> None:
    layer.update_layer("other", init_ia3_weights=True, config=IA3Config())
    layer.ia3_l["other"].data.fill_(2.0)
    layer.set_adapter(["default", "other", "absent"])
    assert torch.allclose(layer(X), expected_of(layer), atol=1e-6) and "factor a column" in why(layer)
    layer.ia3_l["other"] = nn.Parameter(torch.ones(1))
    assert "a factor is float32 [1]" in str(scaled.lasting_plan(layer))


def test_factors_in_float32_scale_a_narrow_product() -> None:
    for feedforward in (False, True):
        model = model_of(feedforward=feedforward)
        layer = layer_of(model)
        layer.base_layer.bfloat16()
        fastlora.accelerate(model)
        x = X.bfloat16()
        y = layer(x)
        assert y.dtype is torch.bfloat16 and "factor a column" in why(layer)
        assert torch.allclose(y.float(), expected_of(layer, x).float(), rtol=0.02, atol=0.02)


class OwnTensor(Tensor):
    """Of x."""


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (X.double(), "x is float64 [3, 8] on cpu and the weight float32 [6, 8] on cpu"),
        (X[:, :4], "x is float32 [3, 4] on cpu"),
        (X.to("meta"), "x is float32 [3, 8] on meta"),
        (X.as_subclass(OwnTensor), "x is a OwnTensor"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_stands_in_the_way_of_one_call(x: Tensor, words: str, layer: Any) -> None:
    layer(X)
    plan = scaled._plan_call(layer, x)
    assert isinstance(plan, str) and words in plan
    if type(x) is OwnTensor:
        assert torch.equal(layer(x).as_subclass(Tensor), expected_of(layer))
    else:
        with pytest.raises((RuntimeError, NotImplementedError)):
            layer(x)
        return
    own = layer.__dict__[OWN_FORWARD]
    assert own.passing and words in why(layer)
    layer(X)
    assert "factor a column" in why(layer)


def test_under_autocast_x_may_have_another_dtype(layer: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y, own = layer(X.half()), expected_of(layer, X)
    assert y.dtype is torch.bfloat16 and torch.allclose(y.float(), own.float(), atol=0.05)
    assert "factor a column" in why(layer)


def test_arguments_besides_x_are_pefts(layer: Any) -> None:
    for args, kwargs in (((None,), {}), ((), {"more": None})):
        with pytest.raises(TypeError):  # nn.Linear has none
            layer(X, *args, **kwargs)
    layer.base_layer.__class__ = Wider
    assert torch.equal(layer(X, 5.0), expected_of(layer, X, 5.0))
    assert torch.equal(layer(X, more=5.0), layer(X, 5.0)) and not torch.equal(layer(X, 5.0), expected_of(layer))
    assert why(layer) == "PEFT's own forward: the call has arguments besides x"
    assert layer.__dict__[OWN_FORWARD].passing


class Wider(FrozenLinear):
    def forward(self, x: Tensor, more: float = 0.0) -> Tensor:
        return super().forward(x) + more


def test_a_lasting_obstacle_is_no_passing_one(layer: Any) -> None:
    layer.enable_adapters(False)
    layer(X)
    assert not layer.__dict__[OWN_FORWARD].passing and why(layer) == "PEFT's own forward: adapters are disabled"


def test_a_compiler_is_told_nothing(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layer(X)
    assert SEEN not in layer.__dict__


class Derived(ia3.Linear):
    """Another library's."""


def test_which_classes_are_swapped() -> None:
    """Each once; and not what somebody has changed."""
    model = model_of()
    layer = layer_of(model)
    assert scaled.describe(layer) == ("peft", "not accelerated: call fastlora.accelerate(model)")
    assert not scaled.is_swapped(layer) and scaled.swap_obstacle(layer) is None
    assert scaled.attach(layer) is None
    kind = type(layer)
    assert scaled.attach(layer) is None and type(layer) is kind and scaled.is_swapped(layer)
    assert kind.__name__ == "Linear" and kind is not ia3.Linear
    fastlora.restore(model)
    assert type(layer) is ia3.Linear
    layer.forward = layer.forward
    assert scaled.attach(layer) == "its forward was replaced on the object" and type(layer) is ia3.Linear
    del layer.forward
    layer.base_layer.bias.requires_grad_()
    assert scaled.attach(layer) == "the base weight or bias is trained"
    layer.base_layer.bias.requires_grad_(False)
    layer.__class__ = Derived
    assert scaled.attach(layer) == f"{__name__}.Derived is not fused" and scaled.describe(layer)[0] == "peft"
    derived = nn.Linear(K, N)
    derived.__class__ = swap.derive(nn.Linear, scaled.with_scaling)
    assert not scaled.is_swapped(derived)
    base = fastlora.accelerate(nn.Sequential(nn.Linear(K, N)).requires_grad_(False), frozen=True)
    other = peft.get_peft_model(base, peft.LoHaConfig(target_modules=["0"], r=2))
    assert not scaled.is_swapped(layer_of(other)) and "is not fused" in str(scaled.attach(layer_of(other)))
    assert type(layer_of(other).base_layer) is FrozenLinear  # which such a layer may well have


class Same(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


def test_a_base_layer_with_a_forward_of_its_own_is_asked() -> None:
    model = fastlora.accelerate(model_of(Same))
    layer = layer_of(model)
    assert scaled.is_swapped(layer)
    assert torch.allclose(layer(X), expected_of(layer), atol=1e-6) and "factor a column" in why(layer)


def test_a_layer_that_was_frozen_and_gets_an_adapter_is_a_plain_one_again() -> None:
    base = nn.Sequential(nn.Linear(K, N)).requires_grad_(False)
    fastlora.accelerate(base, frozen=True)
    assert type(base[0]) is FrozenLinear
    model = get_peft_model(base, IA3Config(target_modules=["0"], feedforward_modules=[]))
    fastlora.accelerate(model)
    assert scaled.is_swapped(layer_of(model)) and type(layer_of(model).base_layer) is nn.Linear


def test_what_cannot_run_is_told(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer(X)
    monkeypatch.setattr(ops, "forced", "nonsense")
    implementation, reason = scaled.describe(layer)
    assert implementation == "nonsense" and reason.startswith("cannot run: FASTLORA_IMPL='nonsense'")


@pytest.mark.parametrize("how", ["merge", "unmerge", "moved"])
def test_what_peft_writes_into_the_weight_is_seen(how: str, layer: Any, copies: list[int]) -> None:
    """It writes through `.data`, which no copy could notice."""
    if how == "unmerge":
        layer.merge()
    base = layer.base_layer
    packed.attach(base, Budget())
    check_now(base.weight)
    assert held_bytes() == 2 * base.weight.nbytes
    if how == "merge":
        layer.merge()
    elif how == "unmerge":
        with pytest.warns(UserWarning, match="inaccurate"):
            layer.unmerge()
    else:
        assert layer.float() is layer
    assert held_bytes() == 0
    check_now(base.weight)
    packed.detach(base)


def test_a_quantised_weight_follows_x_and_not_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(fastlora.accelerate(model_of()))
    found = quantised.Base(None, quantised_weight("int8", N, K, torch.float32).stored, "int8", None)  # type: ignore[arg-type]
    layer.base_layer.weight = Own(layer.base_layer.weight.detach(), requires_grad=False)
    layer.base_layer.bias = None
    monkeypatch.setattr(quantised, "base_of", lambda one: found)
    for dtype in (torch.float32, torch.bfloat16):
        plan = scaled._plan_call(layer, X.to(dtype))
        assert isinstance(plan, scaled.Scaling) and plan.weight is found.weight(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled._plan_call(layer, X) == "autocast is on, the weight quantised, and x float32"
        of_narrow = scaled._plan_call(layer, X.bfloat16())
        assert isinstance(of_narrow, scaled.Scaling) and of_narrow.weight.dtype is torch.bfloat16


def test_pefts_layers_over_bitsandbytes_are_known_by_name_and_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[nn.Module] = []
    monkeypatch.setattr(quantised, "hold", held.append)
    for name, obstacle in (("Linear4bit", None), ("Linear2bit", "peft.tuners.ia3.bnb.Linear2bit is not fused")):
        layer = layer_of(model_of())
        layer.__class__ = type(name, (ia3.Linear,), {"__module__": "peft.tuners.ia3.bnb"})
        held.clear()
        assert scaled.attach(layer) == obstacle
        assert held == [layer.base_layer] * (obstacle is None)


def test_names_are_asked_for_where_there_are_some_and_disabled_adapters_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = fastlora.accelerate(model_of())
    layer, asked, names_of = layer_of(model), [], mixed.names_of
    monkeypatch.setattr(mixed, "names_of", lambda one: asked.append(one) or names_of(one))
    y = layer(X)
    assert asked == []
    with mixed._handing_out({layer: ("default", "__base__", "default")}):
        rows = layer(X)
        torch.testing.assert_close(rows[::2], y[::2])
        assert asked == [layer] and torch.equal(rows[1], layer.base_layer(X)[1])
        with model.disable_adapter():
            assert torch.equal(layer(X), layer.base_layer(X))
