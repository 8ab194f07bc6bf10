"""DoRA layers of PEFT's, accelerated: PEFT's results, gradients and files, and its own forward where the operators have no rule."""

import copy

import pytest
import torch
from bounds import assert_within_bound
from peft import LoraConfig, PeftModel
from peft_models import (
    FAMILIES,
    IDS,
    assert_as_near_as,
    assert_equal_to_peft,
    in_each_precision,
    llama,
    logits,
    peft_model,
    q_proj,
    reason_of,
    run,
)

import fastlora
from fastlora import operators
from fastlora.peft import FusedLinear

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def dora_model(family="llama", **options):
    """With magnitudes that are not the norms: as after some training."""
    model, labels = peft_model(family, use_dora=True, **options)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 0.5 + torch.rand_like(parameter)
    return model, labels


@in_each_precision
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_peft(family, dtype, adapters_float32, autocast):
    model, ours = assert_equal_to_peft(
        lambda seed: dora_model(family, dtype=dtype, autocast_adapter_dtype=adapters_float32, seed=seed),
        dtype,
        autocast,
    )
    assert any("magnitude" in name for name in ours)
    assert all(not entry.reason.startswith("PEFT") for entry in fastlora.report(model))
    assert {entry.implementation for entry in fastlora.report(model)} <= {"cpu", "reference"}
    assert not any("forward" in entry.reason for entry in fastlora.report(model))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_dropout_is_pefts_own(dtype):
    """From the same seed the same masks, since torch draws both, of whatever dtype."""
    model, labels = dora_model(lora_dropout=0.3, dtype=dtype)
    models = copy.deepcopy(model).double(), copy.deepcopy(model), fastlora.accelerate(model)
    results = []
    for each in models:
        torch.manual_seed(7)
        results.append(run(each, labels))
    exact, eager, ours = results
    assert_as_near_as(ours, eager, exact)
    quiet = [logits(each.eval()) for each in models]
    assert not torch.allclose(quiet[0], exact["logits"], atol=1e-3)
    assert_within_bound("logits", *reversed(quiet))


def test_checkpointing_replays_the_dropout():
    model, labels = dora_model(lora_dropout=0.3)
    fastlora.accelerate(model).train()
    torch.manual_seed(5)
    plain = run(model, labels)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(5)
    for name, value in run(model, labels).items():
        assert torch.equal(plain[name], value), name


def test_layers_that_share_x_are_computed_together(monkeypatch):
    model, labels = dora_model()
    fastlora.accelerate(model)
    calls = []
    compute = operators.lora_linear.run
    monkeypatch.setattr(
        operators.lora_linear, "run", lambda x, weight, *rest: calls.append(len(weight)) or compute(x, weight, *rest)
    )
    run(model, labels)
    assert sorted(calls) == [1, 1, 1, 1, 2, 2, 3, 3]
    assert "x read once with k_proj, v_proj" in reason_of(model)[1]


def test_bits_repeat():
    model, labels = dora_model()
    fastlora.accelerate(model)
    first, second = run(model, labels), run(model, labels)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_compiles_whole():
    model, labels = dora_model()
    eager = run(fastlora.accelerate(model), labels)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(input_ids=IDS, **labels)
    expected = model(input_ids=IDS, **labels)
    assert torch.allclose(out.logits, expected.logits, atol=1e-5) and eager["logits"].shape == out.logits.shape
    model.zero_grad()
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    expected.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(found[name], parameter.grad, atol=1e-5), name


def test_a_trained_magnitude_changes_the_result_and_the_norm_follows_the_adapter():
    """Nothing is kept from one step to the next."""
    model, labels = dora_model()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    for each in (model, peer):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            run(each, labels)
            optimizer.step()
        with torch.no_grad():
            q_proj(each).base_layer.weight.mul_(2)
    assert torch.allclose(logits(model), logits(peer), atol=1e-4)


def test_merging_is_pefts():
    model, _ = dora_model()
    model.eval()
    before = logits(fastlora.accelerate(model))
    model.merge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert "merged" in reason_of(model)[1]
    model.unmerge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, FusedLinear) for module in merged.modules())
    assert torch.allclose(merged(input_ids=IDS).logits, before, atol=1e-5)


def test_saved_adapter_is_pefts(tmp_path):
    model, _ = dora_model()
    model.eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "pefts")
    fastlora.accelerate(model).save_pretrained(tmp_path / "ours")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("pefts", "ours")]
    assert files[0].read_bytes() == files[1].read_bytes()
    torch.manual_seed(0)
    loaded = fastlora.accelerate(PeftModel.from_pretrained(llama()[0], tmp_path / "ours").eval())
    assert torch.allclose(logits(loaded), expected, atol=1e-5)


def test_several_adapters():
    """One at a time is fused, and so is one a row, which PEFT refuses; two at once is PEFT's own."""
    model, _ = dora_model()
    model.add_adapter("plain", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    for active, fused in (
        ("default", True),
        ("plain", True),
        (["default", "plain"], False),
        (["plain", "default"], False),
    ):
        model.base_model.set_adapter(active), peer.base_model.set_adapter(active)
        assert torch.allclose(logits(model), logits(peer), atol=1e-5)
        assert ("several adapters are active, and one is a DoRA" in reason_of(model)[1]) is not fused
    with model.disable_adapter(), peer.disable_adapter():
        assert torch.equal(logits(model), logits(peer))
    for row, name in enumerate(("default", "plain", "plain")):
        model.base_model.set_adapter("plain"), peer.base_model.set_adapter(name)
        mixed = logits(model, adapter_names=["default", "plain", "plain"])
        assert torch.allclose(mixed[row], logits(peer)[row], atol=1e-5)
    with pytest.raises(ValueError, match="DoRA"):
        logits(peer, adapter_names=["default", "plain", "plain"])


def test_a_dora_beside_a_plain_lora_in_one_family():
    """Each is computed alone."""
    model, labels = peft_model(target_modules=["q_proj", "k_proj"])
    model.add_adapter("dora", LoraConfig(r=3, target_modules=["v_proj"], use_dora=True, init_lora_weights=False))
    model.base_model.set_adapter(["default", "dora"])
    model.train()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    expected = run(peer, labels)
    for name, value in run(model, labels).items():
        assert torch.allclose(value, expected[name], atol=1e-5), name
    for name in ("q_proj", "v_proj"):
        assert "PEFT" not in reason_of(model, f"layers.0.self_attn.{name}")[1]


def test_a_layer_in_another_mode_or_with_other_magnitudes_computes_anew():
    """As PEFT does, which asks the layer, not its dropout alone, whether it is trained."""
    model, _ = dora_model(lora_dropout=0.5)
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    x = torch.randn(4, 32)
    for change in (
        lambda layer: layer.train(),
        lambda layer: setattr(layer, "training", False),
        lambda layer: setattr(layer, "training", True),
        lambda layer: layer.lora_magnitude_vector["default"].weight.data.mul_(2),
        lambda layer: setattr(layer.lora_magnitude_vector["default"], "weight", torch.nn.Parameter(torch.ones(32))),
    ):
        found = []
        for each in (model, peer):
            change(q_proj(each))
            torch.manual_seed(3)
            found.append(q_proj(each)(x))
        assert torch.allclose(*found, atol=1e-5)


def test_a_hooked_magnitude_is_called():
    model, _ = dora_model()
    fastlora.accelerate(model)
    logits(model)
    seen = []
    q_proj(model).lora_magnitude_vector["default"].register_forward_hook(lambda *_: seen.append(1))
    logits(model)
    assert len(seen) == 1 and "hook" in reason_of(model)[1]


def test_a_magnitude_elsewhere_is_left_to_peft():
    model, _ = dora_model()
    fastlora.accelerate(model)
    logits(model)
    holder = q_proj(model).lora_magnitude_vector["default"]
    holder.weight = torch.nn.Parameter(holder.weight.detach().double())
    logits(model)
    assert "a magnitude or bias is float64" in reason_of(model)[1]
