"""PEFT's methods that no operator of ours computes: `accelerate` leaves their layers alone and says so, and speeds up what it can around them."""

import copy

import peft
import pytest
import torch
from peft_models import llama, run

import fastlora
from fastlora.peft import FrozenLinear, scaled

TARGETS = ["q_proj", "v_proj"]
METHODS = {
    "VeRA": lambda: peft.VeraConfig(target_modules=TARGETS, r=4),
    "BOFT": lambda: peft.BOFTConfig(target_modules=TARGETS, boft_block_size=4),
    "OFT": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=4, use_cayley_neumann=False),
    "LoHa": lambda: peft.LoHaConfig(target_modules=TARGETS, r=4),
    "LoKr": lambda: peft.LoKrConfig(target_modules=TARGETS, r=4),
    "LN tuning": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "norm"]),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[5, 7], target_modules=["embed_tokens"]),
}


def model_of(method):
    torch.manual_seed(0)
    base, labels, _ = llama()
    return peft.get_peft_model(base, METHODS[method]()), labels


@pytest.mark.parametrize("method", METHODS)
def test_left_to_peft_and_said_so(method):
    model, labels = model_of(method)
    peer = copy.deepcopy(model)
    with pytest.warns(
        UserWarning,
        match=r"left \d+ layers to PEFT: peft\.tuners\..* is not fused; frozen=True, fuse=True and loss=True",
    ):
        assert fastlora.accelerate(model) is model
    report = fastlora.report(model)
    assert report and {entry.implementation for entry in report} == {"peft"}
    assert all(entry.reason.startswith("peft.tuners.") and entry.reason.endswith("is not fused") for entry in report)
    expected, found = run(peer, labels), run(model, labels)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("method", METHODS)
def test_the_rest_of_the_model_is_faster_where_that_is_asked_for(method):
    model, labels = model_of(method)
    peer = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="is not fused$"):
        fastlora.accelerate(model, frozen=True, fuse=True)
    assert sum(type(module) is FrozenLinear for module in model.modules()) >= 11
    expected, found = run(peer, labels), run(model, labels)
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in expected.items())
    fastlora.restore(model)
    assert not any(type(module) is FrozenLinear or scaled.is_swapped(module) for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_loss(method):
    model, labels = model_of(method)
    model.train()
    peer = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="is not fused$"):
        fastlora.accelerate(model, loss=True)
    out = model(input_ids=labels["labels"], **labels)
    assert out.logits is None
    assert torch.allclose(out.loss, peer(input_ids=labels["labels"], **labels).loss, atol=1e-5)
    assert [entry.implementation for entry in fastlora.report(model) if entry.name.endswith("loss")] == ["fused"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:fastlora.accelerate left")
def test_names_of_rows_are_refused_where_peft_ignores_them(method):
    model, labels = model_of(method)
    plain, kind = copy.deepcopy(model), str(model.peft_config["default"].peft_type.value)
    fastlora.accelerate(model)
    words = (
        rf"^adapter_names: PEFT ignores them with {kind}, and model\.\S+ is a \w+; rows with adapters of their own are"
    )
    names = ["default"] * 3
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=words):
            call(input_ids=labels["labels"], adapter_names=names)
    with pytest.raises(ValueError, match="typo; loaded are default, and __base__ is none"):
        model(input_ids=labels["labels"], adapter_names=["typo"] * 3)
    with torch.no_grad():
        expected = plain(input_ids=labels["labels"], adapter_names=names).logits
        assert torch.equal(fastlora.restore(model)(input_ids=labels["labels"], adapter_names=names).logits, expected)
