"""Small PEFT models of four families, what they compute, and what `report` says of their layers."""

import copy
from statistics import geometric_mean

import pytest
import torch
from peft import LoraConfig, get_peft_model
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
from fastlora.bounds import Errors
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


def peft_model(family="llama", dtype=torch.float32, autocast_adapter_dtype=True, seed=0, **options):
    """A random small PEFT model whose adapters change something, and the labels that it takes."""
    torch.manual_seed(seed)
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
    assert_as_near_over_models([(ours, eager, exact)])


def assert_as_near_over_models(results):
    """The same of several models' results (ours, eager, exact), by the geometric mean of error over bound.

    A network amplifies its first roundings, so that two ways to compute its gradients, equally good, can be three times as far off one
    as the other, on one model; on the next it is the other way round.
    """
    found = {"logits": [], "gradients": []}
    for ours, eager, exact in results:
        assert ours.keys() == eager.keys() == exact.keys()
        for name in exact:
            assert ours[name].dtype == eager[name].dtype and ours[name].isfinite().all(), name

        def distance(results, names):
            return sum((results[name].double() - exact[name]).square().sum().item() for name in names) ** 0.5  # noqa: B023

        for part, names in (("logits", ["logits"]), ("gradients", [name for name in exact if name != "logits"])):
            norm = sum(exact[name].square().sum().item() for name in names) ** 0.5
            tiny = torch.finfo(eager[names[0]].dtype).eps * norm
            found[part].append(Errors(distance(ours, names), distance(eager, names), tiny))
    for part, errors in found.items():
        # No luckier than tiny, or one model that is exact would hide all others.
        ratio = geometric_mean(max(each.error, each.tiny) / each.bound for each in errors)
        assert ratio <= 1, f"{part}: the error is {ratio:.3g} of the bound, over {len(errors)} models"


in_each_precision = pytest.mark.parametrize(
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


def assert_equal_to_peft(make, dtype, autocast):
    """The model, accelerated, of `make(seed)` gives PEFT's logits and gradients; in 16 bits over four models.

    Returns:
        The first of them, accelerated, and its results.
    """
    models, results = [], []
    for seed in range(1 if dtype is torch.float32 and autocast is None else 4):
        model, labels = make(seed)
        exact = run(copy.deepcopy(model).double(), labels)
        eager = run(model, labels, autocast)
        names = set(model.state_dict())
        assert fastlora.accelerate(model) is model
        models.append(model)
        results.append((run(model, labels, autocast), eager, exact))
        assert set(model.state_dict()) == names
    assert_as_near_over_models(results)
    return models[0], results[0][0]


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


@pytest.fixture(name="pair")
def a_pair():
    """An accelerated model and the same model left to PEFT, each with adapters `default` and `other`, in eval mode."""
    model, _ = peft_model()
    fastlora.accelerate(model)
    model.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    peer = fastlora.restore(copy.deepcopy(model))
    assert not any(isinstance(module, FusedLinear) for module in peer.modules())
    return model.eval(), peer.eval()


def q_proj(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def reason_of(model, part="layers.0.self_attn.q_proj"):
    (entry,) = [entry for entry in fastlora.report(model) if entry.name.endswith(part)]
    return entry.implementation, entry.reason
