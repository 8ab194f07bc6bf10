"""accelerate, restore and report on real PEFT models: PEFT's results, PEFT's state, and the truth about what runs."""

import copy
import pickle
import subprocess
import sys
from collections import deque

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fastlora
from fastlora import operators, ops, reference
from fastlora.bounds import Errors
from fastlora.choice import table
from fastlora.frozen import packed
from fastlora.peft import FrozenLinear, FusedLinear

IDS = torch.randint(5, 90, (3, 11), generator=torch.Generator().manual_seed(3))
ATTENDED = torch.tensor([[1] * 11, [1] * 7 + [0] * 4, [1] * 9 + [0] * 2])


def llama():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    return LlamaForCausalLM(config), {"labels": IDS}, "all-linear"


def gpt2():
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=16, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
    )
    return GPT2LMHeadModel(config), {"labels": IDS}, ["c_attn", "c_proj", "c_fc"]


def t5():
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96, dropout_rate=0, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config), {"labels": IDS[:, :6].contiguous()}, ["q", "k", "v", "o", "wi", "wo"]


def bert():
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        max_position_embeddings=16,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    return (
        BertForSequenceClassification(config),
        {"labels": torch.tensor([0, 1, 1])},
        ["query", "key", "value", "dense"],
    )


FAMILIES = {"llama": llama, "gpt2": gpt2, "t5": t5, "bert": bert}


def peft_model(family="llama", dtype=torch.float32, autocast_adapter_dtype=True, **options):
    """A random small PEFT model whose adapters change something, and the labels that it takes."""
    torch.manual_seed(0)
    base, labels, targets = FAMILIES[family]()
    if family == "bert":
        options["modules_to_save"] = ["classifier"]
    config = LoraConfig(
        **{
            "r": 5,
            "lora_alpha": 10,
            "lora_dropout": 0.0,
            "target_modules": targets,
            "init_lora_weights": False,
            **options,
        },
        fan_in_fan_out=family == "gpt2",
    )
    model = get_peft_model(base.to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    return model, labels


def run(model, labels, autocast=None):
    """Logits and the gradient of every trained parameter."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = model(input_ids=IDS, attention_mask=ATTENDED, **labels)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), **grads}


def assert_as_near_as(ours, eager, exact):
    """The logits, and all gradients as one vector, are as near to the float64 model's as twice the eager model's (Euclidean norm).

    One vector, because a 16-bit network turns rounding into noise that favours now one tensor, now another.
    """
    assert ours.keys() == eager.keys() == exact.keys()
    for name in exact:
        assert ours[name].dtype == eager[name].dtype and ours[name].isfinite().all(), name

    def distance(results, names):
        return sum((results[name].double() - exact[name]).square().sum().item() for name in names) ** 0.5

    for names in (["logits"], [name for name in exact if name != "logits"]):
        tiny = torch.finfo(eager[names[0]].dtype).eps * sum(exact[name].square().sum().item() for name in names) ** 0.5
        errors = Errors(distance(ours, names), distance(eager, names), tiny)
        assert errors.within, f"{names[0]}: error {errors.error:.3g}, bound {errors.bound:.3g}"


@pytest.mark.parametrize(
    ("dtype", "adapters_float32", "autocast"),
    [
        (torch.float32, True, None),
        (torch.bfloat16, False, None),
        (torch.bfloat16, True, None),
        (torch.float32, True, torch.bfloat16),
        (torch.bfloat16, True, torch.bfloat16),
    ],
    ids=["float32", "bfloat16", "float32-on-bfloat16", "autocast", "autocast-bfloat16-base"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_peft(family, dtype, adapters_float32, autocast):
    model, labels = peft_model(family, dtype, autocast_adapter_dtype=adapters_float32)
    exact = run(copy.deepcopy(model).double(), labels)
    eager = run(model, labels, autocast)
    names = set(model.state_dict())
    assert fastlora.accelerate(model) is model
    assert all(entry.implementation in ops.IMPLEMENTATIONS for entry in fastlora.report(model))
    ours = run(model, labels, autocast)
    assert_as_near_as(ours, eager, exact)
    assert set(model.state_dict()) == names


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


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


@pytest.fixture
def pair():
    """An accelerated model and the same model left to PEFT, each with adapters `default` and `other`, in eval mode."""
    model, _ = peft_model()
    fastlora.accelerate(model)
    model.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    peer = fastlora.restore(copy.deepcopy(model))
    assert not any(isinstance(module, FusedLinear) for module in peer.modules())
    return model.eval(), peer.eval()


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


def test_merge_and_unload(pair):
    model, peer = pair
    expected = logits(peer)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, lora.Linear) for module in merged.modules())
    assert torch.allclose(logits(merged), expected, atol=1e-5)


def add_modules_to_save(model, active):
    """After `accelerate`: PEFT wraps a swapped layer, and copies it."""
    model.add_adapter("head", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    if active:
        model.set_adapter("head")
    return model


LOAD_PLAIN = """
import sys, torch
sys.modules["fastlora"] = None
model = torch.load(sys.argv[1], weights_only=False)
torch.save(model(input_ids=torch.arange(5, 16)[None]).logits.detach(), sys.argv[2])
"""


UNLOADING = {
    "unload": lambda model: model.unload(),
    "merge": lambda model: model.merge_and_unload(),
    "tuner": lambda model: model.base_model.merge_and_unload(safe_merge=True),
    "copy": lambda model: copy.copy(model).unload(),
    "no adapter": lambda model: model.delete_adapter("default") or model.unload(),
    "modules_to_save": lambda model: add_modules_to_save(model, active=True).unload(),
    "modules_to_save, inactive": lambda model: add_modules_to_save(model, active=False).merge_and_unload(),
}
IN_PART = ["unload", "merge", "tuner", "no adapter"]


@pytest.mark.parametrize(("how", "whole"), [*((how, True) for how in UNLOADING), *((how, False) for how in IN_PART)])
def test_an_unloaded_model_has_nothing_of_ours(how, whole):
    """Nor of the packed copies; be it the PEFT model that was accelerated, or the one within, from which no tuner is seen."""
    plain, model = (peft_model(target_modules=["q_proj", "k_proj"])[0] for _ in range(2))
    fastlora.accelerate(model if whole else model.base_model.model, frozen=True)
    logits(model)
    unloaded = []
    for each in (plain, model):
        torch.manual_seed(1)
        unloaded.append(UNLOADING[how](each))
    expected, found = unloaded
    assert torch.allclose(logits(found), logits(expected), atol=1e-5)
    assert [type(module) for module in found.modules()] == [type(module) for module in expected.modules()]
    assert b"fastlora" not in pickle.dumps(found) and b"fastlora" not in pickle.dumps(copy.deepcopy(found))
    assert packed.held_bytes() == 0


def test_an_unloaded_model_lives_without_fastlora(tmp_path):
    model, _ = peft_model()
    fastlora.accelerate(model, frozen=True)
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "saved")), logits(merged))
    torch.save(merged, tmp_path / "model.pt")
    script = tmp_path / "load.py"
    script.write_text(LOAD_PLAIN)
    command = [sys.executable, script, tmp_path / "model.pt", tmp_path / "logits.pt"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = merged(input_ids=torch.arange(5, 16)[None]).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5)


def test_another_tuners_model_is_unloaded_without_anything_of_ours():
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = fastlora.accelerate(get_peft_model(llama()[0], config), frozen=True)
    assert any(type(module) is FrozenLinear for module in model.modules())
    assert b"fastlora" not in pickle.dumps(model.merge_and_unload())


def test_copy_and_pickle(pair):
    model, _ = pair
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        assert fastlora.report(other) == fastlora.report(model)


def q_proj(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


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


def test_hook_on_the_layer_is_called():
    model, _ = peft_model()
    layer = fastlora.accelerate(model).base_model.model.model.layers[0].self_attn.q_proj
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    logits(model)
    assert seen == [(3, 11, 32)]


def reason_of(model, part="layers.0.self_attn.q_proj"):
    (entry,) = [entry for entry in fastlora.report(model) if entry.name.endswith(part)]
    return entry.implementation, entry.reason


def test_hook_on_a_child_is_called_by_pefts_forward():
    model, _ = peft_model()
    layer = fastlora.accelerate(model).base_model.model.model.layers[0].self_attn.q_proj
    expected, seen = logits(model), []
    layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(logits(model), expected, atol=1e-5) and seen == [1]
    implementation, reason = reason_of(model)
    assert implementation == "reference"
    assert reason.startswith("PEFT's own forward: adapter 'default' carries a hook; before, ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.merge_adapter(), "PEFT's own forward: the adapter is merged"),
        (lambda m: m.base_model.disable_adapter_layers(), "PEFT's own forward: adapters are disabled"),
    ],
    ids=["merged", "disabled"],
)
def test_report_tells_a_call_that_was_not_fused(change, reason):
    model, _ = peft_model()
    change(fastlora.accelerate(model))
    logits(model)
    assert reason_of(model) == ("reference", reason)


def test_report_says_what_is_a_guess():
    model, _ = peft_model()
    fastlora.accelerate(model, frozen=True)
    for part in ("layers.0.self_attn.q_proj", "lm_head"):
        assert reason_of(model, part)[1].startswith("not called yet, unless compiled; 512 rows: ")
    logits(model)
    for part in ("layers.0.self_attn.q_proj", "lm_head"):
        assert reason_of(model, part)[1].startswith("33 rows: ")
    model, _ = peft_model()
    fastlora.accelerate(model).merge_adapter()
    reason = "PEFT's own forward: the adapter is merged"
    assert reason_of(model) == ("reference", f"not called yet, unless compiled; {reason}")
    model.compile(backend="eager")
    assert reason_of(model) == ("reference", f"compiled: not observed; {reason}")


@pytest.mark.parametrize("how", ["wrapped", "a block"])
def test_report_does_not_claim_to_have_seen_compiled_calls(how):
    model, _ = peft_model()
    fastlora.accelerate(model, frozen=True)
    whole = torch.compile(model, backend="eager") if how == "wrapped" else model
    if how == "a block":
        model.base_model.model.model.layers[0].compile(backend="eager")
    alone = "not grouped with k_proj, v_proj where compiled"

    def reason(part="layers.0.self_attn.q_proj"):
        return reason_of(whole, part)[1]

    for _ in range(2):
        assert reason().startswith("compiled: not observed; a guess, 512 rows: ") and alone in reason()
        logits(whole)
    if how == "wrapped":  # from within nobody sees that
        assert reason_of(model)[1].startswith("not called yet, unless compiled; 512 rows: ")
    with torch.compiler.set_stance("force_eager"):
        logits(whole)
    assert reason().startswith("compiled: not observed; its last eager call, 33 rows: ")
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.enable_adapters(False)
    with torch.compiler.set_stance("force_eager"):
        logits(whole)
    assert reason().startswith(
        "compiled: not observed; in its last eager call PEFT's own forward: adapters are disabled"
    )
    assert reason_of(model, "layers.1.self_attn.q_proj")[1].startswith("PEFT's own forward: adapters are disabled")


def test_report_tells_what_changed_since_and_what_was_before():
    """A step of DPO ends with the reference's logits, adapters disabled; what trained was fused all the same."""
    model, _ = peft_model()
    fastlora.accelerate(model)
    with model.disable_adapter():
        logits(model)
        assert reason_of(model) == ("reference", "PEFT's own forward: adapters are disabled")
    assert reason_of(model) == ("reference", "PEFT's own forward: adapters are disabled, now no longer")
    logits(model)
    implementation, reason = reason_of(model)
    assert implementation in ops.IMPLEMENTATIONS and reason.startswith("33 rows: ")
    assert reason.endswith("; earlier also PEFT's own forward: adapters are disabled")
    with model.disable_adapter():
        logits(model)
    implementation, reason = reason_of(model)
    assert implementation == "reference"
    assert (
        reason.startswith("PEFT's own forward: adapters are disabled, now no longer; before, ")
        and "33 rows: " in reason
    )
    logits(model)
    model.merge_adapter()
    assert reason_of(model)[1].endswith("; from now on PEFT's own forward: the adapter is merged")
    q_proj(model).unmerge()
    q_proj(model)(torch.randn(3, 32), alora_offsets=[None] * 3)
    assert reason_of(model)[1].startswith("PEFT's own forward: the call has arguments besides x; before, ")


def test_report_leaves_a_call_that_failed_out():
    model, _ = peft_model()
    layer = q_proj(fastlora.accelerate(model, frozen=True))
    logits(model)
    before = fastlora.report(model)
    for wrong in (torch.randn(3, 31), torch.randn(3, 32, dtype=torch.float64)):
        for module in (layer, model.base_model.model.lm_head):
            with pytest.raises((ValueError, RuntimeError)):
                module(wrong)
    with model.disable_adapter(), pytest.raises(RuntimeError):
        layer(torch.randn(3, 31))
    assert fastlora.report(model) == before


@pytest.mark.skipif(("lora_linear", "cpu") not in ops.implementations, reason="the native extension is not built")
def test_report_tells_whether_dropout_was_on_and_what_did_not_run(monkeypatch):
    """An implementation that is slower is told as not run, and looked up as with dropout where the call had some."""
    monkeypatch.setattr(ops, "forced", None)
    known = [
        table.Measurement(
            op, "float32", 64, "small", dropout, "cpu", True, 2.0 if dropout else 0.5, "measured by a test"
        )
        for op in ("lora_linear", "lora_linear_backward")
        for dropout in (False, True)
    ]
    table.load_state({"cpu": known})
    model, _ = peft_model(target_modules=["o_proj"], lora_dropout=0.25)
    fastlora.accelerate(model).train()
    o_proj, slower = (
        "layers.0.self_attn.o_proj",
        "plain PyTorch, since native C++ would take 2.00x of its time (measured by",
    )
    assert reason_of(model, o_proj)[0] == "reference"  # a guess
    logits(model)
    assert reason_of(model, o_proj) == ("reference", f"33 rows: {slower} a test)")
    logits(model.eval())
    assert reason_of(model, o_proj)[0] == "cpu"
    assert reason_of(model, o_proj)[1].startswith(
        "33 rows: native C++, 0.50x of plain PyTorch's time (measured by a test)"
    )


@pytest.mark.skipif(("lora_linear", "cpu") not in ops.implementations, reason="the native extension is not built")
def test_report_tells_a_forced_implementation_that_cannot_run(monkeypatch):
    model, _ = peft_model(dtype=torch.float64)
    fastlora.accelerate(model)
    monkeypatch.setattr(ops, "forced", "cpu")
    with pytest.raises(ops.ImplementationError, match="float64"):
        logits(model)
    reason = "not called yet, unless compiled; cannot run: FASTLORA_IMPL=cpu: lora_linear cannot run: cpu does not compute in float64"
    assert reason_of(model, "layers.0.self_attn.o_proj") == ("cpu", reason)


def test_a_forward_that_was_replaced_on_the_object_is_told():
    """As accelerate's hooks do it (`_old_forward`): the swapped class would never be asked, and its report never true."""
    model, _ = peft_model()
    layer = q_proj(model)
    layer.forward = layer.forward
    fastlora.accelerate(model)
    logits(model)
    assert reason_of(model) == ("peft", "its forward was replaced on the object")
    assert reason_of(model, "layers.0.self_attn.k_proj")[0] != "peft"


def test_report_tells_a_forced_implementation_without_a_backward(pair, monkeypatch):
    model, _ = pair
    native = {(case, "cpu"): reference.lora_linear for case in ("multi_lora", "lora_linear")}
    others = {key: value for key, value in ops.implementations.items() if key[1] != "cpu"}
    monkeypatch.setattr(ops, "implementations", others | native)
    monkeypatch.setattr(ops, "_missing", {})
    monkeypatch.setattr(ops, "forced", "cpu")
    logits(model, adapter_names=["other", "__base__", "default"])
    implementation, reason = reason_of(model)
    assert implementation == "cpu"
    assert "no backward: FASTLORA_IMPL=cpu: multi_lora_backward cannot run: cpu has no multi_lora_backward" in reason


@pytest.mark.parametrize("when", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_global_hooks_see_the_modules_inside(when):
    """A fused forward does not call them."""
    model, labels = peft_model(target_modules=["q_proj", "k_proj"])
    fastlora.accelerate(model)
    run(model, labels)
    seen = []
    register = getattr(nn.modules.module, f"register_module_{when}_hook")
    handle = register(lambda module, *_: seen.append(module))
    try:
        run(model, labels)
    finally:
        handle.remove()
    layer = model.base_model.model.model.layers[1].self_attn.q_proj  # the first one's x needs no gradient
    assert seen.count(layer.base_layer) == seen.count(layer.lora_A["default"]) == 1
    assert reason_of(model)[1].startswith("PEFT's own forward: a global hook is set, now no longer; before, ")


@pytest.mark.parametrize("scaling", [torch.tensor(2.0), np.float32(2.0)], ids=["tensor", "numpy"])
def test_a_scaling_that_is_no_number_of_pythons(scaling):
    """As PEFT makes it for compiled hotswapping, where it may change without a trace."""
    model, _ = peft_model()
    expected = logits(model)
    q_proj(fastlora.accelerate(model)).scaling["default"] = scaling
    assert torch.allclose(logits(model), expected, atol=1e-5)
    name = type(scaling).__name__
    assert reason_of(model)[1] == f"PEFT's own forward: the scaling of adapter 'default' is a {name}"


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.randn(3, 32).as_subclass(Marked), "Marked"),
        (torch.nested.nested_tensor([torch.randn(2, 32), torch.randn(3, 32)]), "not a tensor of rows"),
        (torch.randn(3, 32).to_sparse(), "not a tensor of rows"),
    ],
    ids=["subclass", "nested", "sparse"],
)
def test_inputs_that_are_more_than_rows(x, what):
    model, _ = peft_model(target_modules=["q_proj"])
    layers = [q_proj(model), model.base_model.model.lm_head]
    with torch.no_grad():
        expected = [layer(x) for layer in layers]
        fastlora.accelerate(model, frozen=True)
        for layer, wanted in zip(layers, expected, strict=True):
            found = layer(x)
            assert type(found) is type(wanted)
            parts = (found.unbind(), wanted.unbind()) if x.is_nested else ([found], [wanted])
            assert all(torch.equal(one, other) for one, other in zip(*parts, strict=True))
    for part in ("layers.0.self_attn.q_proj", "lm_head"):
        assert what in reason_of(model, part)[1]


def test_a_base_layer_with_a_forward_of_its_own_is_named():
    """Falcon's linear layer is nn.Linear's arithmetic in other words, which nobody can know."""

    class FalconLinear(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    config = LoraConfig(target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(FalconLinear(8, 8), nn.Linear(8, 8)), config)
    with pytest.warns(UserWarning, match="fused none of 1 LoRA layers: the base layer is a FalconLinear"):
        fastlora.accelerate(model)
    assert reason_of(model, "0") == ("peft", "the base layer is a FalconLinear")


def test_a_weight_that_is_trained_loses_its_copies(monkeypatch):
    """A fused optimizer's step leaves no trace: the forward that begins the training is the last chance."""
    model, labels = peft_model(target_modules=["q_proj"])
    fastlora.accelerate(model, frozen=True)
    dropped = []
    monkeypatch.setattr(packed, "drop", dropped.append)
    weights = [q_proj(model).base_layer.weight, model.base_model.model.lm_head.weight]
    run(model, labels)
    assert not any(weight is one for weight in weights for one in dropped)
    for weight in weights:
        weight.requires_grad_()
    run(model, labels)
    assert all(any(weight is one for one in dropped) for weight in weights)


def test_a_variable_that_cannot_be_followed_is_told_before_anything_changes(monkeypatch):
    model, _ = peft_model()
    monkeypatch.setattr(ops, "forced", "nonsense")
    with pytest.raises(ops.ImplementationError, match="FASTLORA_IMPL='nonsense': expected one of reference, cpu"):
        fastlora.accelerate(model, frozen=True)
    assert not any(isinstance(module, (FusedLinear, FrozenLinear)) for module in model.modules())


def test_unsupported_layers_keep_pefts_forward_and_say_so():
    model, _ = peft_model(use_dora=True)
    expected = logits(model)
    with pytest.warns(UserWarning, match="none of 14 LoRA layers: adapter 'default' is a Dora variant"):
        fastlora.accelerate(model)
    assert torch.equal(logits(model), expected)
    assert reason_of(model) == ("peft", "adapter 'default' is a Dora variant")


def test_trained_bias_is_left_to_peft():
    model, _ = peft_model("gpt2", bias="all")
    with pytest.warns(UserWarning, match="trained"):
        fastlora.accelerate(model)
    assert {entry.implementation for entry in fastlora.report(model)} == {"peft"}


def test_embedding_adapter_is_left_to_peft():
    model, labels = peft_model(target_modules=["embed_tokens", "q_proj"])
    eager = run(model, labels)
    fastlora.accelerate(model)
    assert reason_of(model, "embed_tokens") == ("peft", "peft.tuners.lora.layer.Embedding is not fused")
    for name, value in run(model, labels).items():
        assert torch.allclose(value, eager[name], atol=1e-5), name


def test_layers_added_later_say_how_to_be_accelerated():
    model, _ = peft_model(target_modules=["q_proj"])
    fastlora.accelerate(model)
    model.add_adapter("wide", LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert reason_of(model, "0.self_attn.v_proj") == ("peft", "not accelerated: call fastlora.accelerate(model)")
    fastlora.accelerate(model)
    assert reason_of(model, "0.self_attn.v_proj")[0] != "peft"


def test_report_prints_a_table():
    model, _ = peft_model()
    lines = str(fastlora.report(fastlora.accelerate(model))).splitlines()
    assert lines[0].split() == ["name", "implementation", "reason"] and len(lines) == 15
    entry = fastlora.report(model)[0]
    assert entry._fields == ("name", "implementation", "reason") and entry.name in lines[1] and entry.reason in lines[1]


def test_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="model"):
        fastlora.accelerate(nn.Linear(2, 2))
    prompted = peft.get_peft_model(llama()[0], peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="model"):
        fastlora.accelerate(prompted)
