"""Quantised layers without an adapter, beside PEFT's other methods: `accelerate(frozen=True)` runs them by `frozen_linear`; and IA³'s."""

import copy
import pickle

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PromptTuningConfig, get_peft_model
from peft_models import ATTENDED, IDS, assert_as_near_as
from quantised_models import (  # noqa: F401  (a fixture)
    EACH_KIND,
    NATIVE,
    NEEDS_BITSANDBYTES,
    a_folder,
    load,
    run,
    unquantised,
)

import fastlora
from fastlora.bottleneck import BottleneckConfig
from fastlora.peft import obstacles, scaled
from fastlora.peft.layers import FrozenQuantised
from fastlora.swap import is_derived

pytestmark = NATIVE
METHODS = {
    "bottleneck": lambda: BottleneckConfig(reduction_factor=4),
    "norms": lambda: LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
UNLIKE = "IA3", BFLOAT16
"""There PEFT's own layers over bitsandbytes' give float32, which attention does not take beside a bfloat16 query."""


def model_of(folder, kind, method, dtype=torch.float32):
    model = load(folder, kind, dtype, method=METHODS[method]())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def rows_of(model, words=""):
    return [row for row in fastlora.report(model) if "proj" in row.name and words in row.reason]


@EACH_KIND
@pytest.mark.parametrize(
    ("method", "dtype"), [(one, dtype) for one in METHODS for dtype in (FLOAT32, BFLOAT16) if (one, dtype) != UNLIKE]
)
def test_a_step_is_within_the_bound(folder, kind, method, dtype):
    model = model_of(folder, kind, method, dtype)
    exact, eager = run(unquantised(model)), run(model)
    names = list(model.state_dict())
    fastlora.accelerate(model, frozen=True, fuse=True)
    assert_as_near_as(run(model), eager, exact)
    assert list(model.state_dict()) == names
    assert len(rows_of(model, "dequantised")) == (8 if method == "IA3" else 14) and {
        row.implementation for row in rows_of(model)
    } == {"cpu"}


@NEEDS_BITSANDBYTES
def test_ia3_in_bfloat16_is_the_float32_models(folder):
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = fastlora.accelerate(model_of(folder, "nf4", "IA3", dtype))
        assert sum(map(scaled.is_swapped, model.modules())) == 6
        results[dtype] = run(model)["logits"].float()
    assert (results[torch.bfloat16] - results[torch.float32]).abs().max() < 0.1 * results[torch.float32].abs().max()


@EACH_KIND
def test_a_prompt_has_the_gradient_of_the_model_that_it_stands_for(folder, kind):
    method = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = load(folder, kind, method=method)
    exact = unquantised(model)
    fastlora.accelerate(model, frozen=True, loss=True)
    for one in (model, exact):
        one(input_ids=IDS, labels=IDS).loss.backward()  # without padding, which PEFT gives the prompt's own places to
    (mine,), (theirs,) = ([p.grad for p in one.parameters() if p.requires_grad] for one in (model, exact))
    assert (mine.double() - theirs).norm() < 1e-4 * theirs.norm()


@EACH_KIND
def test_eval_mode_spoils_nothing_and_restore_gives_all_back(folder, kind):
    model = model_of(folder, kind, "bottleneck")
    classes, before = [type(module) for module in model.modules()], run(model)
    fastlora.accelerate(model, frozen=True)
    swapped = [module for module in model.modules() if isinstance(module, FrozenQuantised)]
    assert len(swapped) == 14 and fastlora.accelerate(model, frozen=True) is model
    with torch.no_grad():
        assert model.eval()(input_ids=IDS).logits.isfinite().all()
    ours = run(model.train())
    assert all((ours[name] - value).abs().max() <= 2e-3 * value.abs().max() for name, value in before.items())
    twins = [copy.deepcopy(swapped[0])] if kind == "torchao" else [copy.deepcopy(swapped[0]), pickle.loads(pickle.dumps(swapped[0]))]  # fmt: skip
    x = torch.randn(3, swapped[0].in_features)
    assert all(isinstance(one, FrozenQuantised) and torch.equal(one(x), swapped[0](x)) for one in twins)
    fastlora.restore(model)
    assert [type(module) for module in model.modules()] == classes
    after = run(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@NEEDS_BITSANDBYTES
def test_an_adapter_that_comes_later_and_goes_again(folder):
    base = load(folder, "nf4", method=METHODS["bottleneck"]()).unload()
    fastlora.accelerate(base, frozen=True)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    expected = model(input_ids=IDS).logits
    fastlora.accelerate(model, frozen=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert not isinstance(layer.base_layer, FrozenQuantised) and is_derived(layer)
    assert torch.allclose(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    plain = model.unload()
    assert not any(isinstance(module, FrozenQuantised) for module in plain.modules())


@NEEDS_BITSANDBYTES
def test_what_runs_the_layers_own_forward_is_told(folder):
    model = fastlora.accelerate(model_of(folder, "nf4", "norms"), frozen=True)
    name, layer = next((name, one) for name, one in model.named_modules() if isinstance(one, FrozenQuantised))

    def reason():
        [found] = [row.reason for row in fastlora.report(model) if row.name == name]
        return found

    assert reason().startswith("not called yet, unless compiled")
    x = torch.randn(3, layer.in_features)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert reason().startswith("its own forward: autocast is on, the weight quantised, and x float32")
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.randn(3, layer.in_features + 64))
    assert torch.allclose(torch.func.vmap(layer)(x), expected, rtol=1e-4, atol=1e-5)
    assert "transform" in reason() or "functorch" in reason() or "its own forward" in reason()
    layer.bias.requires_grad_(True)
    layer(x)
    assert reason().startswith("its own forward: the base weight or bias is trained")
    handle = layer.register_forward_hook(lambda *_: None)
    fastlora.restore(model)
    fastlora.accelerate(model, frozen=True)
    assert not isinstance(layer, FrozenQuantised)
    handle.remove()


@NEEDS_BITSANDBYTES
def test_ia3s_layers_say_what_stands_in_the_way(folder):
    model = model_of(folder, "nf4", "IA3")
    layer = next(
        module for module in model.modules() if scaled.swap_obstacle(module) is None and hasattr(module, "ia3_l")
    )
    assert scaled.describe(layer) == ("peft", "not accelerated: call fastlora.accelerate(model)")
    fastlora.accelerate(model)
    x = torch.randn(3, layer.base_layer.in_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert scaled.describe(layer)[1] == "PEFT's own forward: autocast is on, the weight quantised, and x float32"
    assert obstacles.plan_of_base(layer).weight.title == "NF4"
    assert ATTENDED.shape == IDS.shape
