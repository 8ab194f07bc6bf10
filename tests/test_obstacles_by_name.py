"""What stands in a layer's way, asked of the layer itself: each obstacle by name, and beside it what is none."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from fastlora.peft import obstacles
from fastlora.peft.obstacles import Plan, lasting_plan, plan_call, swap_obstacle, used_adapters

K, N, R = 8, 6, 2
ROWS = torch.ones(3, K)
Change = Callable[[Any], Any]


def make_layer(*others: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32, conv1d: bool = False) -> Any:
    """A LoRA layer with the adapter `default` and these, all active."""
    config = peft.LoraConfig(r=R, lora_dropout=dropout, target_modules=["0"], fan_in_fan_out=conv1d)
    base = nn.Sequential(Conv1D(N, K) if conv1d else nn.Linear(K, N)).to(dtype)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for name in others:
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", *others])
    return model.base_model.model[0]


def plan_of(layer: Any, x: Any = ROWS, mixed: bool = False) -> Plan | str:
    return plan_call(layer, x, used_adapters(layer, None), mixed)


def give(layer: Any, a: Tensor | None = None, b: Tensor | None = None, adapter: str = "default") -> None:
    """Other weights for an adapter."""
    if a is not None:
        layer.lora_A[adapter].weight = nn.Parameter(a)
    if b is not None:
        layer.lora_B[adapter].weight = nn.Parameter(b)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


class Odd(nn.Linear):
    """Not nn.Linear itself."""


FITS = "float32 [6, 8] on cpu"


@pytest.mark.parametrize(
    ("x", "obstacle"),
    [
        (ROWS.double(), f"x is float64 [3, 8] on cpu and the weight {FITS}"),
        (torch.ones(3, 7), f"x is float32 [3, 7] on cpu and the weight {FITS}"),
        (torch.ones(3, K, device="meta"), f"x is float32 [3, 8] on meta and the weight {FITS}"),
        (ROWS.to_sparse(), "x is not a tensor of rows"),
        (torch.ones(()), "x is not a tensor of rows"),
        ([1.0] * K, "x is not a tensor of rows"),
        (torch.nested.nested_tensor([ROWS], layout=torch.jagged), "x is not a tensor of rows"),
        (ROWS.as_subclass(type("Odd", (Tensor,), {})), "x is a Odd"),
    ],
)
def test_x(x: Any, obstacle: str) -> None:
    assert plan_of(make_layer(), x) == obstacle


@pytest.mark.parametrize("x", [ROWS, torch.ones(K), torch.ones(2, 0, K), nn.Parameter(ROWS)])
def test_x_that_fits(x: Tensor) -> None:
    assert isinstance(plan_of(make_layer(), x), Plan)


def test_transforms_of_torch() -> None:
    layer, found = make_layer(), []
    torch.func.vmap(lambda x: found.append(plan_of(layer, x)) or x)(ROWS)
    with forward_ad.dual_level():
        found.append(plan_of(layer))
    assert all(isinstance(one, str) for one in found) and isinstance(plan_of(layer), Plan)


def test_what_a_compiler_shows_is_taken_for_what_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export traces with tensors of a class of its own; and nothing that is traced can drop a copy."""
    layer, x = make_layer(), ROWS.as_subclass(type("Traced", (Tensor,), {}))
    dropped: list[Tensor] = []
    monkeypatch.setattr(obstacles.packed, "drop", dropped.append)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert isinstance(plan_of(layer, x), Plan)
    layer.base_layer.weight.requires_grad_()
    assert isinstance(plan_of(layer), str) and dropped == []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert isinstance(plan_of(layer), str) and dropped == [layer.base_layer.weight]


def test_autocast_lets_other_dtypes_in() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    give(layer, torch.ones(R, K), torch.ones(N, R))
    assert plan_of(layer) == "x is float32 [3, 8] on cpu and the weight bfloat16 [6, 8] on cpu"
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(plan_of(layer), Plan)
        assert isinstance(plan_of(make_layer(dtype=torch.bfloat16)), Plan)  # its adapter is bfloat16, as x will be
    assert isinstance(plan_of(layer, ROWS.bfloat16()), Plan)  # the adapter's float32 suits any x


@pytest.mark.parametrize("conv1d", [False, True])
def test_both_ways_that_a_weight_lies(conv1d: bool) -> None:
    layer = make_layer(conv1d=conv1d)
    plan = plan_of(layer)
    assert isinstance(plan, Plan) and plan.transposed is conv1d
    assert plan.weight is layer.base_layer.weight and plan.linear_weight.shape == (N, K)
    assert "and the weight" in str(plan_of(layer, torch.ones(3, N)))


@pytest.mark.parametrize(
    ("a", "b", "obstacle"),
    [
        (torch.ones(R, K).bfloat16(), torch.ones(N, R).bfloat16(), "the adapter is bfloat16 and x is float32"),
        (None, torch.ones(N, R).double(), "the adapter is float32 and x is float32"),
        (torch.ones(R, K - 1), None, "an adapter is float32 [2, 7] on cpu and "),
        (None, torch.ones(N - 1, R), "an adapter is float32 [2, 8] on cpu and float32 [5, 2] on cpu"),
        (None, torch.ones(N, R + 1), "an adapter is float32 [2, 8] on cpu and float32 [6, 3] on cpu"),
        (torch.ones(R, K, device="meta"), None, "an adapter is float32 [2, 8] on meta"),
        (None, torch.ones(N, R, device="meta"), "an adapter is float32 [2, 8] on cpu and float32 [6, 2] on meta"),
    ],
)
def test_an_adapter_that_does_not_fit(a: Tensor | None, b: Tensor | None, obstacle: str) -> None:
    layer = make_layer()
    give(layer, a, b)
    found = plan_of(layer)
    assert isinstance(found, str) and found.startswith(obstacle)


def test_several_adapters() -> None:
    assert len(plan_of(make_layer("second")).lora_a) == 2
    assert isinstance(plan_of(make_layer(dropout=0.5)), Plan)
    layer = make_layer("second", dropout=0.5)
    assert plan_of(layer) == "several adapters are active with dropout"
    assert plan_of(layer, mixed=True).dropout_p == [0.5, 0.5]
    assert plan_of(layer.eval()).dropout_p == [0.0, 0.0]


@pytest.mark.parametrize("of_second", [torch.float32, torch.bfloat16])
def test_adapters_of_different_dtypes(of_second: torch.dtype) -> None:
    layer = make_layer("second", dtype=torch.bfloat16)
    of_first = torch.float32 if of_second is torch.bfloat16 else torch.bfloat16
    for name, dtype in (("default", of_first), ("second", of_second)):
        give(layer, torch.ones(R, K, dtype=dtype), torch.ones(N, R, dtype=dtype), name)
    for mixed in (False, True):
        assert plan_of(layer, ROWS.bfloat16(), mixed) == "the adapters have different dtypes"


def test_a_plan_has_the_layers_own_numbers() -> None:
    layer = make_layer("second", dropout=0.25)
    layer.scaling = {"default": 3, "second": 0.5}
    plan = lasting_plan(layer, ["default", "second"])
    assert plan.scale == [3.0, 0.5] and all(type(scale) is float for scale in plan.scale)
    assert plan.bias is layer.base_layer.bias and plan.dropout_p == [0.25, 0.25]
    assert [*map(id, plan.lora_a)] == [id(layer.lora_A[name].weight) for name in ("default", "second")]
    assert [*map(id, plan.lora_b)] == [id(layer.lora_B[name].weight) for name in ("default", "second")]


BASE: dict[str, tuple[Change, str]] = {
    "int8": (
        lambda base: setattr(base, "weight", nn.Parameter(torch.ones(N, K, dtype=torch.int8), requires_grad=False)),
        "the weight is int8",
    ),
    "trained weight": (lambda base: base.weight.requires_grad_(), "the base weight or bias is trained"),
    "hook": (hook, "the base layer carries a hook"),
    "forward": (
        lambda base: setattr(base, "__class__", type("Own", (nn.Linear,), {"forward": lambda self, x: x})),
        "the base layer is a Own",
    ),
    "subclass": (
        lambda base: setattr(base, "weight", type("Sharded", (nn.Parameter,), {})(base.weight, requires_grad=False)),
        "the weight is a Sharded",
    ),
}


@pytest.mark.parametrize("case", BASE)
def test_the_base_layer(case: str) -> None:
    change, obstacle = BASE[case]
    layer = make_layer()
    change(layer.base_layer)
    assert plan_of(layer) == swap_obstacle(layer) == obstacle


def test_a_base_weight_that_is_no_parameter_or_a_hook_beside_another_obstacle() -> None:
    layer = make_layer()
    weight = layer.base_layer.weight.detach()
    del layer.base_layer.weight
    layer.base_layer.weight = weight  # as in DataParallel's replicas
    assert isinstance(plan_of(layer), Plan) and swap_obstacle(layer) is None
    weight.requires_grad_()
    hook(layer.base_layer)
    assert plan_of(layer) == "the base weight or bias is trained"


def test_a_base_layer_may_lack_a_bias_or_be_a_class_with_linears_forward() -> None:
    layer = make_layer()
    layer.base_layer.bias = None
    layer.base_layer.__class__ = Odd
    plan = plan_of(layer)
    assert isinstance(plan, Plan) and plan.bias is None


MADE = "adapter 'default' is made of "
ADAPTER: dict[str, tuple[Change, str]] = {
    "A": (lambda layer: layer.lora_A.update({"default": Odd(K, R, bias=False)}), f"{MADE}Odd, Linear, Identity"),
    "B": (lambda layer: layer.lora_B.update({"default": Odd(R, N, bias=False)}), f"{MADE}Linear, Odd, Identity"),
    "dropout": (
        lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.5)}),
        f"{MADE}Linear, Linear, AlphaDropout",
    ),
    "A computed": (
        lambda layer: nn.utils.parametrize.register_parametrization(layer.lora_A["default"], "weight", nn.Identity()),
        f"{MADE}ParametrizedLinear, Linear, Identity",
    ),
    "A replaced": (
        lambda layer: setattr(layer.lora_A["default"], "weight", type("Own", (nn.Parameter,), {})(torch.ones(R, K))),
        "the weights of adapter 'default' are Own and Parameter",
    ),
    "B replaced": (
        lambda layer: setattr(layer.lora_B["default"], "weight", type("Own", (nn.Parameter,), {})(torch.ones(N, R))),
        "the weights of adapter 'default' are Own and Parameter",
    ),
    "scaling": (
        lambda layer: layer.scaling.update(default=torch.tensor(2.0)),
        "the scaling of adapter 'default' is a Tensor",
    ),
    "hook on A": (lambda layer: hook(layer.lora_A["default"]), "adapter 'default' carries a hook"),
    "hook on B": (lambda layer: hook(layer.lora_B["default"]), "adapter 'default' carries a hook"),
    "hook on dropout": (lambda layer: hook(layer.lora_dropout["default"]), "adapter 'default' carries a hook"),
}


@pytest.mark.parametrize("case", ADAPTER)
def test_the_adapter(case: str) -> None:
    change, obstacle = ADAPTER[case]
    layer = make_layer()
    change(layer)
    assert plan_of(layer) == swap_obstacle(layer) == obstacle


def make_dora(**options: Any) -> Any:
    config = peft.LoraConfig(r=R, target_modules=["0"], use_dora=True, **options)
    return peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config).base_model.model[0]


def test_a_variant_is_named() -> None:
    layer = make_dora()
    layer.lora_variant["default"] = type("OwnLinearVariant", (type(layer.lora_variant["default"]),), {})()
    assert plan_of(layer) == swap_obstacle(layer) == "adapter 'default' is a Own variant"


MAGNITUDES: dict[str, tuple[Change, str]] = {
    "hook": (hook, "adapter 'default' has a DoraLinearLayer for its magnitudes, or a hook there"),
    "class": (
        lambda holder: setattr(holder, "__class__", type("Own", (type(holder),), {})),
        "adapter 'default' has a Own for its magnitudes, or a hook there",
    ),
    "shape": (
        lambda holder: setattr(holder, "weight", nn.Parameter(torch.ones(1, N))),
        f"a magnitude or bias is float32 [1, 6] on cpu, and the weight {FITS}",
    ),
    "dtype": (
        lambda holder: setattr(holder, "weight", nn.Parameter(torch.ones(N).half())),
        f"a magnitude or bias is float16 [6] on cpu, and the weight {FITS}",
    ),
    "device": (
        lambda holder: setattr(holder, "weight", nn.Parameter(torch.ones(N, device="meta"))),
        f"a magnitude or bias is float32 [6] on meta, and the weight {FITS}",
    ),
}


@pytest.mark.parametrize("case", MAGNITUDES)
def test_the_magnitudes(case: str) -> None:
    change, obstacle = MAGNITUDES[case]
    layer = make_dora()
    plan = plan_of(layer)
    assert isinstance(plan, Plan) and plan.magnitude[0] is layer.lora_magnitude_vector["default"].weight
    change(layer.lora_magnitude_vector["default"])
    assert plan_of(layer) == obstacle


def test_dropout_of_a_dora_is_asked_of_the_layer_too() -> None:
    """As PEFT asks it."""
    layer = make_dora(lora_dropout=0.5)
    assert plan_of(layer).dropout_p == [0.5]
    layer.training = False
    assert plan_of(layer).dropout_p == [0.0]
    layer.train().lora_dropout.eval()
    assert plan_of(layer).dropout_p == [0.0]


def test_biases_that_may_be_trained() -> None:
    layer = make_layer()
    layer.base_layer.bias.requires_grad_()
    layer.lora_B["default"] = nn.Linear(R, N)
    layer.scaling["default"] = 3
    plan = plan_of(layer)
    assert isinstance(plan, Plan) and plan.bias is None
    assert [(id(one.bias), one.scale, one.place) for one in plan.added] == [
        (id(layer.base_layer.bias), 1.0, None),
        (id(layer.lora_B["default"].bias), 3.0, 0),
    ]
    assert plan_of(layer, mixed=True).added == plan.added
    assert plan_of(make_dora(), mixed=True).magnitude.keys() == {0}
    layer.base_layer.bias.requires_grad_(False)
    assert plan_of(layer).bias is layer.base_layer.bias and len(plan_of(layer).added) == 1
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(N - 1))
    assert plan_of(layer) == f"a magnitude or bias is float32 [5] on cpu, and the weight {FITS}"


def test_one_adapter_that_fits_is_reason_enough_to_swap() -> None:
    for hooked in ("default", "second"):
        layer = make_layer("second")
        hook(layer.lora_A[hooked])
        assert swap_obstacle(layer) is None
        assert plan_of(layer) == f"adapter {hooked!r} carries a hook"
    layer = make_layer()
    layer.delete_adapter("default")
    assert swap_obstacle(layer) is None  # it may get one


def test_what_is_not_swapped() -> None:
    layer = make_layer()
    layer.forward = layer.forward
    assert swap_obstacle(layer) == "its forward was replaced on the object"
    layer = make_layer()
    layer.__class__ = type("Other", (lora.Linear,), {"__module__": "elsewhere"})
    assert swap_obstacle(layer) == "elsewhere.Other is not fused"


def test_the_layers_state() -> None:
    layer = make_layer()
    assert isinstance(plan_of(layer), Plan)
    assert lasting_plan(layer, []) == "no adapter is active"
    layer.merge()
    assert plan_of(layer) == "the adapter is merged"
    layer.unmerge()
    layer.enable_adapters(False)
    assert plan_of(layer) == "adapters are disabled"


@pytest.mark.parametrize(
    "register",
    [
        nn_module.register_module_forward_hook,
        nn_module.register_module_forward_pre_hook,
        nn_module.register_module_full_backward_hook,
        nn_module.register_module_full_backward_pre_hook,
    ],
)
def test_global_hooks(register: Callable[..., Any]) -> None:
    layer = make_layer()
    handle = register(lambda *_: None)
    try:
        assert plan_of(layer) == "a global hook is set"
    finally:
        handle.remove()
    assert isinstance(plan_of(layer), Plan)


def test_the_adapters_that_a_call_uses() -> None:
    layer = make_layer("second")
    assert used_adapters(layer, None) == ["default", "second"]
    assert used_adapters(layer, ["second", "__base__", "default", "second"]) == ["second", "default"]


def test_plans_with_the_same_result() -> None:
    layer = make_layer("second")
    plan = lasting_plan(layer, ["default", "second"])
    assert plan.is_as(lasting_plan(layer, ["default", "second"]))
    assert not plan.is_as(lasting_plan(layer, ["default"]))
    assert not plan.is_as(plan._replace(scale=[1.0, 2.5]))
    assert not plan.is_as(plan._replace(dropout_p=[0.5, 0.0]))
    for name in ("weight", "bias"):
        assert not plan.is_as(plan._replace(**{name: getattr(plan, name).clone()}))
    for name in ("lora_a", "lora_b"):
        first, second = getattr(plan, name)
        assert not plan.is_as(plan._replace(**{name: [first, second.clone()]}))
    # With as many tensors and numbers, one adapter fewer.
    assert not plan.is_as(plan._replace(lora_a=plan.lora_a[:1]))


def test_a_computed_weight_is_read_as_its_module_shows_it() -> None:
    layer = nn.Linear(K, N)
    assert obstacles.parameter(layer, "weight") is layer.weight
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert obstacles.parameter(layer, "weight").shape == (N, K)
