"""accelerate, restore and report on real PEFT models: PEFT's results, PEFT's state, and the truth about what runs."""

import copy
import pickle
from collections import deque

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
from fastlora import functional, ops, reference
from fastlora.peft import FusedLinear

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
        error, bound = distance(ours, names), 2 * distance(eager, names) + tiny
        assert error <= bound, f"{names[0]}: error {error:.3g}, bound {bound:.3g}"


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
    draw = functional._draw_seed

    def remember(*args):
        drawn = draw(*args)
        seeds.extend(drawn.reshape(-1))  # layers that share x draw together
        return drawn

    monkeypatch.setattr(functional, "_draw_seed", remember)
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


def test_copy_and_pickle(pair):
    model, _ = pair
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        assert fastlora.report(other) == fastlora.report(model)


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


def test_report_tells_a_forced_implementation_without_a_backward(pair, monkeypatch):
    model, _ = pair
    native = {("multi_lora", "cpu"): reference.multi_lora, ("lora_linear", "cpu"): reference.lora_linear}
    others = {key: value for key, value in ops._table.items() if key[1] != "cpu"}
    monkeypatch.setattr(ops, "_table", others | native)
    monkeypatch.setattr(ops, "_missing", {})
    monkeypatch.setattr(ops, "forced", "cpu")
    logits(model, adapter_names=["other", "__base__", "default"])
    implementation, reason = reason_of(model)
    assert implementation == "cpu"
    assert "no backward: FASTLORA_IMPL=cpu: multi_lora_backward cannot run: cpu has no multi_lora_backward" in reason


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
