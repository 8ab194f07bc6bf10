"""IA³ models whose rows have adapters of their own, which PEFT ignores: each row as it were alone, forward and backward."""

import copy
import pickle
from typing import Any

import pytest
import torch
from mixed_rows import BASE, all_at_once, answers_row_by_row, assert_equal_rows, row_by_row
from peft import IA3Config, get_peft_model
from peft_models import FAMILIES, IDS, logits
from torch import nn

import fastlora
from fastlora.peft import mixed, scaled
from fastlora.peft.layers import SEEN

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
NAMES = ["other", BASE, "default"]
TARGETS = {
    "llama": ["k_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["k", "v", "wo"],
}


def ia3_model(family: str = "llama", dtype: torch.dtype = FLOAT32, autocast_adapter_dtype: bool = True) -> Any:
    """With a second adapter, which lacks a layer of each block's."""
    torch.manual_seed(0)
    targets = TARGETS[family]

    def config(names: list[str]) -> IA3Config:
        return IA3Config(target_modules=names, feedforward_modules=targets[-1:], fan_in_fan_out=family == "gpt2")

    base = FAMILIES[family]()[0].to(dtype)
    model = get_peft_model(base, config(targets), autocast_adapter_dtype=autocast_adapter_dtype)
    model.add_adapter("other", config(targets[1:]), autocast_adapter_dtype=autocast_adapter_dtype)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(name="models")
def a_pair() -> tuple[Any, Any]:
    """An accelerated model, and one left to PEFT."""
    model = ia3_model().eval()
    return fastlora.accelerate(model), fastlora.restore(copy.deepcopy(model))


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if scaled.is_swapped(module)]


@pytest.mark.parametrize(
    ("family", "dtype", "adapters_float32", "autocast"),
    [
        ("llama", FLOAT32, True, None),
        ("llama", BFLOAT16, False, None),
        ("llama", BFLOAT16, True, None),
        ("llama", FLOAT32, True, BFLOAT16),
        ("gpt2", FLOAT32, True, None),
    ],
    ids=["float32", "bfloat16", "float32-on-bfloat16", "autocast", "gpt2"],
)
def test_results_and_gradients_are_those_of_each_row_alone(
    family: str, dtype: torch.dtype, adapters_float32: bool, autocast: torch.dtype | None
) -> None:
    model = ia3_model(family, dtype, adapters_float32).train()
    exact = row_by_row(copy.deepcopy(model).double(), NAMES)
    eager = row_by_row(copy.deepcopy(model), NAMES, autocast=autocast)
    fastlora.accelerate(model)
    ours = all_at_once(model, NAMES, autocast=autocast)
    assert len(layers_of(model)) > 0 and all(layer.__dict__[SEEN].mixed for layer in layers_of(model))
    assert_equal_rows(ours, eager, exact, ["default", "other"])


@pytest.mark.parametrize("names", [NAMES, tuple(NAMES), ["other"] * 3, [BASE] * 3], ids=str)
def test_in_eval_mode(models: Any, names: Any) -> None:
    model, peer = models
    expected = row_by_row(peer, names)["logits"]
    torch.testing.assert_close(logits(model, adapter_names=names), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        found = model(input_ids=IDS, adapter_names=names).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    peer.set_adapter("default")
    torch.testing.assert_close(logits(model), logits(peer), rtol=1e-4, atol=1e-5)
    assert mixed.under_way == 0 and not any(layer.__dict__[SEEN].mixed for layer in layers_of(model))


@pytest.mark.parametrize("active", ["other", ["default", "other"]], ids=str)
def test_whatever_is_active_else(models: Any, active: Any) -> None:
    model, peer = models
    model.base_model.set_adapter(active)
    expected = row_by_row(peer, NAMES)["logits"]
    torch.testing.assert_close(logits(model, adapter_names=NAMES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(models: Any, beams: int) -> None:
    model, peer = models
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    expected = answers_row_by_row(peer, NAMES, **options)
    assert torch.equal(model.generate(input_ids=IDS, adapter_names=NAMES, **options), expected)


def test_beams_of_an_encoder_and_a_decoder() -> None:
    model = ia3_model("t5").eval()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams}
        expected = answers_row_by_row(peer, NAMES, **options)
        assert torch.equal(model.generate(input_ids=IDS, adapter_names=NAMES, **options), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointed", "reentrant"])
def test_checkpointed(reentrant: bool) -> None:
    model = fastlora.accelerate(ia3_model().train())
    expected = all_at_once(model, NAMES)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = all_at_once(model, NAMES)
    assert len(found) == len(expected) == 1 + 2 * (3 + 2)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_what_somebody_else_checkpoints_is_not_computed_without_its_names() -> None:
    model = fastlora.accelerate(ia3_model().train())
    layer = layers_of(model)[0]
    with model._enable_peft_forward_hooks(adapter_names=NAMES):
        x = model.get_input_embeddings()(IDS).requires_grad_()
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="adapter_names: a layer is computed again in the backward"):
        y.sum().backward()


def test_wrong_names_are_refused(models: Any) -> None:
    model, peer = models
    with pytest.raises(ValueError, match="typo; loaded are default, other, and __base__ is none"):
        logits(model, adapter_names=["typo", BASE, "other"])
    with pytest.raises(ValueError, match="adapter_names: got 2, expected one for each of 3 rows"):
        logits(model, adapter_names=NAMES[:2])
    with pytest.raises(TypeError, match="adapter_names: expected a list with an adapter for each row, got str"):
        logits(model, adapter_names="default")
    assert torch.equal(logits(peer, adapter_names=["typo"]), logits(peer))  # PEFT's own does not look
    assert mixed.under_way == 0
    fastlora.restore(model)
    assert mixed.METHOD not in model.base_model.__dict__
    assert torch.equal(logits(model, adapter_names=["typo"]), logits(peer))


def test_what_stands_in_the_way_is_said(models: Any) -> None:
    model, peer = models
    with model.disable_adapter(), peer.disable_adapter():
        torch.testing.assert_close(logits(model, adapter_names=NAMES), logits(peer), rtol=1e-4, atol=1e-5)
    layer = layers_of(model)[0]
    handle = layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="adapter_names: an IA³ layer cannot give each row its own: the base layer"):
        logits(model, adapter_names=NAMES)
    handle.remove()
    model.merge_adapter()
    with pytest.raises(ValueError, match="cannot give each row its own: the adapter is merged"):
        logits(model, adapter_names=[BASE] * 3)


def test_modules_of_another_kind_are_named() -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    base: Any = nn.Sequential(Own(8, 6), nn.Linear(6, 5))
    plain = get_peft_model(base, IA3Config(target_modules=["0", "1"], feedforward_modules=[]))
    fastlora.accelerate(plain)
    with pytest.raises(ValueError, match="^adapter_names: PEFT ignores them with IA3, and 0 is a Linear; rows with"):
        plain(torch.randn(3, 8), adapter_names=["default"] * 3)
    saved = IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["lm_head"])
    model = fastlora.accelerate(get_peft_model(FAMILIES["llama"]()[0], saved))
    with pytest.raises(ValueError, match="and lm_head is a ModulesToSaveWrapper; rows with adapters of their own"):
        model(input_ids=IDS, adapter_names=["default"] * 3)


def test_copies_have_layers_of_their_own(models: Any) -> None:
    model, _ = models
    expected = logits(model, adapter_names=NAMES)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, adapter_names=NAMES), expected)
        with other._enable_peft_forward_hooks(adapter_names=NAMES):
            assert mixed.names_of(layers_of(model)[0]) is None
