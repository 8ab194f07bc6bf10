"""What stands in the way of experts with adapters, by name, and what report says of them."""

import copy

import pytest
import torch
from moe_models import call, config, moe_model, routed, run, set_implementation, wrapper_of
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize
from transformers import MixtralForCausalLM, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import fastlora
from fastlora import ops
from fastlora.peft import experts

NAME = "layers.0.mlp.experts"


def reason_of(model, part=NAME):
    (entry,) = [entry for entry in fastlora.report(model) if entry.name.endswith(part)]
    return entry.implementation, entry.reason


@pytest.fixture(name="model")
def a_model():
    return fastlora.accelerate(moe_model())


def test_report_tells_what_runs(model):
    kind, reason = reason_of(model)
    assert kind in ops.IMPLEMENTATIONS
    assert reason.startswith("not called yet, unless compiled; 512 rows for each of 5 experts: ")
    run(model)
    kind, reason = reason_of(model)
    assert reason.startswith("13 rows for each of 5 experts: ")  # 33 tokens, 2 experts each
    assert reason_of(model, f"{NAME}.base_layer") == (kind, f"with base_model.model.model.{NAME}")


def test_report_tells_of_a_few_rows_and_of_a_wrapper_alone(model):
    given = routed(T=1)
    wrapper = wrapper_of(model)
    wrapper(given.x, given.index, given.weights)
    outer, inner = fastlora.report(wrapper)
    assert outer.reason.startswith("1 row for each of 5 experts: ") and inner.name == "base_layer"


def test_what_the_trial_is_told_of(model):
    assert experts.weights(moe_model()) == []
    expected = [((48, 32), [3, 3]), ((32, 24), [3, 3])] * 2
    assert [(tuple(one.shape), ranks) for one, ranks in experts.weights(model)] == expected
    card = fastlora.accelerate(moe_model("gpt_oss"))
    assert [(tuple(one.shape), ranks) for one, ranks in experts.weights(card)] == expected
    for one in (model, card):
        assert experts.weight_of(wrapper_of(one).get_base_layer()).shape == (48, 32)


def test_a_second_call_changes_nothing(model):
    kind = type(wrapper_of(model))
    assert type(wrapper_of(fastlora.accelerate(model))) is kind


def test_report_tells_of_a_card(model, monkeypatch):
    monkeypatch.setattr(experts, "GROUPED", ("cpu",))
    assert "all experts at once, by torch's grouped products" in reason_of(model)[1]


def set_requires_grad(model):
    wrapper_of(model).get_base_layer().down_proj.requires_grad_(True)


def set_hook(model):
    wrapper_of(model).get_base_layer().register_forward_hook(lambda *_: None)


def set_inner_hook(model):
    wrapper_of(model).base_layer.register_forward_hook(lambda *_: None)


def set_adapter_hook(model):
    wrapper_of(model).lora_A["default"].register_forward_hook(lambda *_: None)


def set_scaling(model):
    wrapper_of(model).scaling["default"] = torch.tensor(2.0)


def set_up_requires_grad(model):
    wrapper_of(model).get_base_layer().gate_up_proj.requires_grad_(True)


def parametrize_a(model):
    parametrize.register_parametrization(wrapper_of(model).lora_A["default"], "weight", nn.Identity())


def parametrize_b(model):
    parametrize.register_parametrization(wrapper_of(model).lora_B["default"], "weight", nn.Identity())


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        (set_up_requires_grad, "the base weight or bias is trained"),
        (parametrize_a, "the weights of adapter 'default' are no parameters"),
        (parametrize_b, "the weights of adapter 'default' are no parameters"),
        (lambda m: m.merge_adapter(), "the adapter is merged"),
        (lambda m: m.base_model.disable_adapter_layers(), "adapters are disabled"),
        (lambda m: m.base_model.set_adapter([]), "no adapter is active"),
        (set_requires_grad, "the base weight or bias is trained"),
        (set_hook, "OlmoeExperts, or a wrapper around it, carries a hook"),
        (set_inner_hook, "OlmoeExperts, or a wrapper around it, carries a hook"),
        (set_adapter_hook, "adapter 'default' carries a hook"),
        (set_scaling, "the scaling of adapter 'default' is a Tensor"),
    ],
)
def test_obstacles_of_a_module(model, change, obstacle):
    """PEFT's own forward runs, with its results, and report says why."""
    change(model)
    peer = fastlora.restore(copy.deepcopy(model))
    given = routed()
    with torch.no_grad():
        found, expected = (wrapper_of(one)(given.x, given.index, given.weights) for one in (model, peer))
    assert torch.equal(found, expected)
    assert reason_of(model) == ("reference", f"PEFT's own forward: {obstacle}")
    assert reason_of(model, f"{NAME}.base_layer")[0] == "reference"


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        (lambda x, index, weights: (x.double(), index, weights.double()), "x is float64 [17, 32] on cpu"),
        (lambda x, index, weights: (x[0], index, weights), "x is float32 [32] on cpu and the index"),
        (lambda x, index, weights: (x[:, None], index, weights), "x is float32 [17, 1, 32] on cpu and the index"),
        (
            lambda x, index, weights: (x, index[:, 0], weights[:, 0]),
            "x is float32 [17, 32] on cpu and the index int64 [17]",
        ),
        (
            lambda x, index, weights: (x, index.repeat(2, 1), weights.repeat(2, 1)),
            "x is float32 [17, 32] on cpu and the index int64 [34",
        ),
        (
            lambda x, index, weights: (x, index[:, :0], weights[:, :0]),
            "x is float32 [17, 32] on cpu and the index int64 [17, 0",
        ),
        (lambda x, index, weights: (x, index[0], weights), "x is float32 [17, 32] on cpu and the index int64 [2]"),
        (lambda x, index, weights: (x, index.int(), weights), "x is float32 [17, 32] on cpu and the index int32"),
        (lambda x, index, weights: (x, index[:0], weights[:0]), "x is float32 [17, 32] on cpu and the index int64 [0"),
        (lambda x, index, weights: (x, index, weights[:, :1]), "the index is int64 [17, 2] on cpu and its weights"),
        (lambda x, index, weights: (x, index, weights.long()), "the index is int64 [17, 2] on cpu and its weights"),
        (lambda x, index, weights: (x, index), "the call has other arguments than x, index and weights"),
        (lambda x, index, weights: (x, index, 1.0), "the call has other arguments than x, index and weights"),
        (lambda x, index, weights: (x[..., :8], index, weights), "x is float32 [17, 8] on cpu and the weights"),
    ],
)
def test_obstacles_of_a_call(model, change, obstacle):
    x, *args = change(*routed()[:3])
    assert str(experts.plan_call(wrapper_of(model), x, args, {})).startswith(obstacle)


def give(module, name, **other):
    """Another dtype, device or shape for a parameter."""
    parameter = getattr(module, name)
    shape = other.pop("shape", parameter.shape)
    setattr(module, name, nn.Parameter(torch.zeros(shape, **other), requires_grad=False))


X = "x is float32 [17, 32] on cpu and the weights"
BIAS, ADAPTER = "the bias is ", "an adapter is "


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        (lambda base, outer: give(base, "down_proj", dtype=torch.float64), X),
        (lambda base, outer: give(base, "gate_up_proj", device="meta"), X),
        (lambda base, outer: give(base, "down_proj", device="meta"), X),
        (lambda base, outer: give(base, "down_proj_bias", dtype=torch.float64), BIAS),
        (lambda base, outer: give(base, "down_proj_bias", shape=(5, 33)), BIAS),
        (lambda base, outer: give(base, "gate_up_proj_bias", device="meta"), BIAS),
        (lambda base, outer: outer.lora_A["default"].half() and outer.lora_B["default"].half(), f"{ADAPTER}float16"),
        (lambda base, outer: give(outer.lora_A["default"], "weight", shape=(15, 23)), ADAPTER),
        (lambda base, outer: give(outer.lora_A["default"], "weight", device="meta"), ADAPTER),
        (
            lambda base, outer: (
                give(outer.lora_A["default"], "weight", shape=(14, 24)),
                give(outer.lora_B["default"], "weight", shape=(32, 14)),
            ),
            ADAPTER,
        ),
    ],
)
def test_what_does_not_go_together(change, obstacle):
    wrapper = wrapper_of(fastlora.accelerate(moe_model("gpt_oss")))
    x, *args = routed()[:3]
    assert isinstance(experts.plan_call(wrapper, x, args, {}), experts.Plan)
    change(wrapper.get_base_layer(), wrapper)
    assert str(experts.plan_call(wrapper, x, args, {})).startswith(obstacle)


@pytest.mark.parametrize(
    ("computed_by", "told"), [(None, "eager"), ("eager", "eager"), ("batched_mm", "batched_mm"), ("grouped_mm", None)]
)
def test_whose_experts_autocast_casts(model, computed_by, told):
    wrapper_of(model).get_base_layer().config._experts_implementation = computed_by
    x, *args = routed()[:3]
    with torch.autocast("cpu", torch.bfloat16):
        plan = experts.plan_call(wrapper_of(model), x, args, {})
    assert isinstance(plan, experts.Plan) if told is None else plan == f"autocast is on, and the experts are {told}'s"
    assert isinstance(experts.plan_call(wrapper_of(model), x, args, {}), experts.Plan)


def test_a_call_with_more_than_three_arguments(model):
    x, *args = routed()[:3]
    found = experts.plan_call(wrapper_of(model), x, args, {"adapter_names": None})
    assert found == "the call has other arguments than x, index and weights"


class Labelled(torch.Tensor):
    """A tensor that means more than its numbers."""


def test_what_is_not_a_plain_tensor(model):
    x, *args = routed()[:3]
    assert experts.plan_call(wrapper_of(model), x.as_subclass(Labelled), args, {}) == "x is a Labelled"


def test_global_hooks_see_the_modules_inside(model):
    x, *args = routed()[:3]
    with nn_module.register_module_forward_hook(lambda *_: None):
        assert experts.plan_call(wrapper_of(model), x, args, {}) == "a global hook is set"
    assert isinstance(experts.plan_call(wrapper_of(model), x, args, {}), experts.Plan)


def test_arguments_by_name_are_pefts_business(model):
    given = routed()
    named = {"top_k_index": given.index, "top_k_weights": given.weights}
    y = wrapper_of(model)(given.x, **named)
    assert torch.allclose(y, wrapper_of(model)(given.x, *named.values()), atol=1e-5)
    assert "earlier also PEFT's own forward: the call has other arguments" in reason_of(model)[1]


def test_adapters_of_another_dtype(model):
    wrapper_of(model).lora_B["default"].half()
    x, *args = routed()[:3]
    assert experts.plan_call(wrapper_of(model), x, args, {}) == (
        "an adapter is float32 and float16, and the weight float32"
    )


def test_an_adapter_of_another_shape(model):
    wrapper_of(model).lora_B["default"].weight = nn.Parameter(torch.zeros(3, 15))
    x, *args = routed()[:3]
    assert "an adapter is float32 [15, 24] on cpu and float32 [3, 15] on cpu" in experts.plan_call(
        wrapper_of(model), x, args, {}
    )


def test_a_token_without_an_expert_is_pefts_business(model):
    """As in expert parallelism: what is sent beyond the last expert has no part in the sum."""
    set_implementation(model, "eager")
    given = routed()
    index = torch.where(given.index == 4, 5, given.index)
    peer = fastlora.restore(copy.deepcopy(model))
    found, expected = (wrapper_of(one)(given.x, index, given.weights) for one in (model, peer))
    assert torch.equal(found, expected)
    assert reason_of(model)[1] == "PEFT's own forward: a token is sent to an expert that there is not"


@pytest.mark.parametrize(
    ("computed_by", "obstacle"), [("eager", "autocast is on, and the experts are eager's"), ("grouped_mm", None)]
)
def test_autocast_is_pefts_where_it_rounds(computed_by, obstacle):
    """Transformers' grouped_mm computes in the weights' dtype whatever autocast says."""
    model = set_implementation(moe_model(), computed_by)
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    given = routed()
    with torch.autocast("cpu", torch.bfloat16):
        for x in (given.x, given.x.bfloat16()):
            found, expected = (wrapper_of(one)(x, given.index, given.weights) for one in (model, peer))
            assert found.dtype == expected.dtype == x.dtype
            assert torch.allclose(found, expected, atol=1e-4 if x.dtype == torch.float32 else 0.05)
    assert (obstacle is None) == (experts.OWN_FORWARD not in wrapper_of(model).__dict__)
    assert obstacle is None or reason_of(model)[1] == f"PEFT's own forward: {obstacle}"


def test_a_cards_own_experts_stay(model):
    wrapper_of(model).get_base_layer().config._experts_implementation = "sonicmoe"
    x, *args = routed()[:3]
    assert experts.plan_call(wrapper_of(model), x, args, {}) == "the experts are sonicmoe's"


# ---- which modules are swapped


class Doubled(MixtralExperts):
    """Not what its description says."""

    def forward(self, *args):
        return 2 * super().forward(*args)


class Several(MixtralExperts):
    def forward(self, *args):
        return (super().forward(*args),)


class Broken(MixtralExperts):
    def forward(self, x, index, weights):
        return x.view(-1, 33)


def wrapped(module, *parameters):
    """A PEFT model of one module of experts, and its outermost wrapper."""
    model = get_peft_model(
        nn.ModuleDict({"experts": module}), config(parameters=[f"experts.{one}" for one in parameters])
    )
    return model, model.base_model.model.experts


def mixtral(kind=MixtralExperts):
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_local_experts": 4}
    module = kind(MixtralForCausalLM.config_class(**sizes))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    module.config._experts_implementation = "eager"
    return module


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        (lambda m: m, None),
        (lambda m: mixtral(Doubled), "Doubled computes something else"),
        (lambda m: mixtral(Several), "Several computes something else"),
        (lambda m: mixtral(Broken), "Broken cannot be tried on a few numbers: "),
        (lambda m: setattr(m, "has_post_expert_norm", True), "the experts' results are normed"),
        (lambda m: setattr(m, "_is_expert_parallel", True), "the experts are spread over devices"),
        (lambda m: setattr(m, "act_fn", nn.Tanh()), None),
        (lambda m: delattr(m, "has_post_expert_norm"), None),
        (lambda m: delattr(m, "_is_expert_parallel"), None),
        (lambda m: m.register_parameter("more", nn.Parameter(torch.ones(2))), "MixtralExperts has the parameters gate"),
        (lambda m: delattr(m, "has_gate"), "MixtralExperts is no module of experts as transformers describes them"),
    ],
)
def test_a_few_numbers_decide(change, obstacle):
    module = mixtral()
    module = change(module) or module
    model, wrapper = wrapped(module, "gate_up_proj", "down_proj")
    found = experts.obstacle_of(wrapper)
    assert (found is None) if obstacle is None else found.startswith(obstacle)
    if obstacle is None:
        fastlora.accelerate(model)
    else:
        with pytest.warns(UserWarning, match="fused none of 2 LoRA layers"):
            fastlora.accelerate(model)
        assert reason_of(model, "experts") == ("peft", found)
        assert reason_of(model, "experts.base_layer") == ("peft", found)
    assert experts.is_derived(wrapper) == (obstacle is None)


def test_a_forward_that_was_replaced_on_the_object_stays():
    model = moe_model()
    wrapper_of(model).forward = wrapper_of(model).forward
    fastlora.accelerate(model)
    assert reason_of(model) == ("peft", "its forward was replaced on the object")
    assert experts.is_derived(wrapper_of(model, 1))


def test_experts_without_a_gate():
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "n_routed_experts": 4}
    module = NemotronHExperts(NemotronHConfig(**sizes))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    module.config._experts_implementation = "eager"
    model, wrapper = wrapped(module, "up_proj", "down_proj")
    given = routed()
    x, index = given.x[:, :16].contiguous(), given.index.clamp(max=3)
    expected = wrapper(x, index, given.weights)
    assert torch.allclose(
        fastlora.accelerate(model).base_model.model.experts(x, index, given.weights), expected, atol=1e-5
    )
    assert experts.is_derived(wrapper) and experts.OWN_FORWARD not in wrapper.__dict__


def test_a_bias_with_an_adapter_is_pefts_business():
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"]
    model = moe_model("gpt_oss", parameters=parameters)
    assert isinstance(wrapper_of(model).get_base_layer(), GptOssExperts)
    fastlora.accelerate(model)
    call(wrapper_of(model), routed())
    assert reason_of(model)[1] == "PEFT's own forward: gate_up_proj_bias has an adapter"
    model.base_model.set_adapter([])
    assert experts.lasting_plan(wrapper_of(model)) == "no adapter is active"


def test_a_weight_that_is_no_experts_is_pefts_business():
    base = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    model = get_peft_model(base, LoraConfig(target_modules=[], target_parameters=["layer.weight"]))
    with pytest.warns(UserWarning, match="Linear is no module of experts as transformers describes them"):
        fastlora.accelerate(model)
