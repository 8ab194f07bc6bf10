"""accelerate and restore on real PEFT models: PEFT's results and PEFT's state, whatever is done to the model."""

import copy
import pickle
from collections import deque

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from peft_models import (
    ATTENDED,
    FAMILIES,
    IDS,
    a_pair,  # noqa: F401  (a fixture)
    assert_equal_to_peft,
    in_each_precision,
    llama,
    logits,
    peft_model,
    q_proj,
    run,
)
from torch import nn

import fastlora
from fastlora import operators, ops, reference
from fastlora.peft import FrozenLinear, FusedLinear


@in_each_precision
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_peft(family, dtype, adapters_float32, autocast):
    model, _ = assert_equal_to_peft(lambda seed: peft_model(family, dtype, adapters_float32, seed), dtype, autocast)
    assert all(entry.implementation in ops.IMPLEMENTATIONS for entry in fastlora.report(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_pefts_given_the_same_masks(family, monkeypatch):
    """PEFT's own forward and backward, with our masks in the place of its nn.Dropout, gives the same outputs and gradients."""
    model, labels = peft_model(family, lora_dropout=0.25)
    peers = copy.deepcopy(model)
    fastlora.accelerate(model)
    seeds = deque()
    run_operator = operators.lora_linear.run

    def remember(*args):
        seeds.extend(args[7])  # layers that share x draw together
        return run_operator(*args)

    monkeypatch.setattr(operators.lora_linear, "run", remember)
    ours = run(model, labels)
    assert len(seeds) == len(fastlora.report(model)) and len({int(seed) for seed in seeds}) == len(seeds)

    def with_our_mask(self, x):
        if self not in adapters_dropouts:
            return x
        flat = x.reshape(-1, x.shape[-1])
        return reference.dropout(flat, self.p, reference.draw_keep(flat, self.p, seeds.popleft())).view_as(x)

    adapters_dropouts = {
        m for layer in peers.modules() if isinstance(layer, lora.Linear) for m in layer.lora_dropout.values()
    }
    monkeypatch.setattr(nn.Dropout, "forward", with_our_mask)
    eager = run(peers, labels)
    assert not seeds
    for name in eager:
        assert torch.allclose(ours[name], eager[name], atol=1e-5, rtol=1e-4), name


def test_dropout_keeps_the_expectation():
    model, _ = peft_model(lora_dropout=0.3)
    layer = fastlora.accelerate(model).base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 32).expand(4000, 32)
    with torch.no_grad():
        layer.train()
        noisy = layer(x)
        layer.eval()
        quiet = layer(x[:1])
    standard_error = noisy.std(0) / 4000**0.5
    assert standard_error.min() > 0
    assert ((noisy.mean(0) - quiet).abs() <= 5 * standard_error).all()


def test_checkpointing_replays_the_dropout():
    model, labels = peft_model(lora_dropout=0.3)
    fastlora.accelerate(model).train()
    torch.manual_seed(5)
    plain = run(model, labels)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(5)
    checkpointed = run(model, labels)
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name]), name


def test_compiles_whole():
    model, labels = peft_model()
    eager = run(fastlora.accelerate(model, frozen=True), labels)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(input_ids=IDS, attention_mask=ATTENDED, **labels)
    assert torch.allclose(out.logits, eager["logits"], atol=1e-5)
    model.zero_grad()
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, eager[name], atol=1e-5), name


def test_adapters_go_on_working(pair):
    model, peer = pair
    for do in (
        lambda m: m.set_adapter("other"),
        lambda m: m.base_model.set_adapter(["default", "other"]),
        lambda m: m.delete_adapter("other") or m.set_adapter("default"),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.add_adapter("third", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian")),
    ):
        torch.manual_seed(1), do(model)
        torch.manual_seed(1), do(peer)
        assert torch.allclose(logits(model), logits(peer), atol=1e-5)
        with model.disable_adapter(), peer.disable_adapter():
            assert torch.equal(logits(model), logits(peer))


def test_mixed_batch(pair):
    model, peer = pair
    names = ["other", "__base__", "default"]
    assert torch.allclose(logits(model, adapter_names=names), logits(peer, adapter_names=names), atol=1e-5)
    assert all(entry.implementation in ops.IMPLEMENTATIONS for entry in fastlora.report(model))
    with pytest.raises(ValueError, match="adapter_names"):
        logits(model, adapter_names=names[:2])


def test_mixed_batch_under_inference_mode_leaves_autograd_alone(pair):
    model, _ = pair
    names = ["default", "other", "__base__"]
    with torch.inference_mode():
        inferred = model(input_ids=IDS, adapter_names=names).logits.clone()
    out = model(input_ids=IDS, adapter_names=names).logits
    out.sum().backward()
    assert torch.equal(out, inferred)


def test_copy_and_pickle(pair):
    model, _ = pair
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        assert fastlora.report(other) == fastlora.report(model)


def test_shallow_copies(pair):
    model, peer = pair
    x = torch.randn(3, 32)
    expected = logits(peer)
    assert torch.allclose(copy.copy(q_proj(model))(x), q_proj(peer)(x), atol=1e-6)
    assert torch.allclose(logits(copy.copy(model)), expected, atol=1e-5)
    attention = model.base_model.model.model.layers[0].self_attn
    attention.q_proj = copy.copy(attention.q_proj)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    fastlora.accelerate(model, frozen=True)
    head = model.base_model.model
    head.lm_head = copy.copy(head.lm_head)
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_memory_shared_between_processes(pair):
    model, peer = pair
    assert torch.allclose(logits(model.share_memory()), logits(peer), atol=1e-5)
    assert q_proj(model).base_layer.weight.is_shared()


@pytest.mark.parametrize("pack_budget", [0, None], ids=["no copies", "copies"])
@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_that_are_swapped_when_moved(frozen, pack_budget):
    """As torch does it where told, and as torch.utils.swap_tensors does: nobody may hold a weak reference to one."""
    model, labels = peft_model()
    expected = run(model, labels)
    fastlora.accelerate(model, frozen=frozen, pack_budget=pack_budget)
    run(model, labels)
    model.zero_grad()
    weight = q_proj(model).base_layer.weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().clone(), requires_grad=False))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert q_proj(model).base_layer.weight is weight and weight.dtype == torch.float64
    for name, value in run(model, labels).items():
        assert torch.allclose(value, expected[name].double(), atol=1e-5), name


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("part", ["base", "lora_A", "frozen"])
@pytest.mark.parametrize("how", ["parametrize", "weight_norm", "old weight_norm"])
def test_weights_that_are_computed(part, how):
    """PEFT's results, and nothing of ours afterwards."""
    model, labels = peft_model(target_modules=["q_proj"])
    peer = copy.deepcopy(model)
    fastlora.accelerate(model, frozen=True)
    results = []
    for each in (peer, model):
        attention = each.base_model.model.model.layers[0].self_attn
        parts = {"base": q_proj(each).base_layer, "lora_A": q_proj(each).lora_A["default"], "frozen": attention.k_proj}
        if how == "parametrize":
            nn.utils.parametrize.register_parametrization(parts[part], "weight", Doubled())
        else:
            (nn.utils.weight_norm if how == "old weight_norm" else nn.utils.parametrizations.weight_norm)(parts[part])
        results.append(run(each, labels))
        assert type(parts[part]).forward in (nn.Linear.forward, FrozenLinear.forward)
    for name, value in results[0].items():
        assert torch.allclose(results[1][name], value, atol=1e-5), name
    assert len(fastlora.report(model)) >= 14
    fastlora.restore(model)
    assert not any(isinstance(module, (FusedLinear, FrozenLinear)) for module in model.modules())
    if how != "old weight_norm":
        nn.utils.parametrize.remove_parametrizations(parts[part], "weight")
        assert type(parts[part]) is nn.Linear


def test_saved_adapter_is_pefts(pair, tmp_path):
    model, peer = pair
    model.save_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "pefts")
    for file in ("adapter_model.safetensors", "other/adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "pefts" / file).read_bytes(), file
    torch.manual_seed(0)
    loaded = fastlora.accelerate(PeftModel.from_pretrained(llama()[0], tmp_path / "ours").eval())
    assert torch.equal(logits(loaded), logits(model))


def test_restore_undoes_it():
    model, labels = peft_model()
    before = run(model, labels)
    classes = [type(module) for module in model.modules()]
    assert fastlora.restore(fastlora.accelerate(model)) is model
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in run(model, labels).items())
    assert {entry.implementation for entry in fastlora.report(model)} == {"peft"}
