"""LoRA on embeddings, accelerated: the equation, PEFT's results, gradients and files, tied heads; and what stands in the way."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import ATTENDED, FAMILIES, IDS, assert_equal_to_peft, in_each_precision, logits, reason_of, run
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import fastlora
from fastlora import reference
from fastlora.bounds import Errors
from fastlora.peft import FusedLinear, embeddings
from fastlora.swap import is_derived

FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64
TARGETS = {
    "llama": ["embed_tokens"],
    "gpt2": ["wte", "c_attn"],
    "t5": ["embed_tokens"],
    "bert": ["word_embeddings", "token_type_embeddings"],
}
LABELS = torch.where(torch.arange(11) < 4, -100, IDS)


def adapted(family="llama", dtype=FLOAT32, autocast_adapter_dtype=True, seed=0, make=None, **options):
    torch.manual_seed(seed)
    base, labels, _ = (make or FAMILIES[family])()
    options = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[family], "init_lora_weights": False, **options}
    if family == "bert":
        options["modules_to_save"] = ["classifier"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**options, fan_in_fan_out=family == "gpt2")
        model = get_peft_model(base.to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    return model, labels


def tied(**options):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=96, tie_word_embeddings=True, pad_token_id=0, **options)
    return LlamaForCausalLM(config), {"labels": LABELS}, None


def layer_of(model):
    return next(module for module in model.modules() if isinstance(module, embeddings.lora.Embedding))


def lone(V=9, D=6, dtype=FLOAT32, **options):
    """A model of one embedding, and its layer."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(V, D, dtype=dtype, **options))
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(base, config)
    return model, layer_of(model)


@pytest.mark.parametrize("padding_idx", [None, 4])
def test_the_equation(padding_idx):
    torch.manual_seed(0)
    rows, ids = torch.randn(5, 4, dtype=FLOAT64), torch.tensor([4, 0, 4, 2, 2])
    a, b = torch.randn(3, 6, dtype=FLOAT64, requires_grad=True), torch.randn(4, 3, dtype=FLOAT64, requires_grad=True)
    y, picked = reference.lora_embedding(rows, ids, a.detach(), b.detach(), 0.7)
    for m in range(5):
        torch.testing.assert_close(y[m], rows[m] + 0.7 * b.detach() @ a.detach()[:, ids[m]])
    dy = torch.randn_like(y)
    da, db = reference.lora_embedding_backward(dy, ids, picked, a, b, 0.7, padding_idx)
    expected_a, expected_b = torch.zeros_like(a), torch.zeros_like(b)
    for m in range(5):
        expected_b += 0.7 * dy[m][:, None] * a.detach()[:, ids[m]]
        if ids[m] != padding_idx:
            expected_a[:, ids[m]] += 0.7 * b.detach().T @ dy[m]
    torch.testing.assert_close((da, db), (expected_a, expected_b))
    if padding_idx is None:
        function = embeddings.LoRAEmbeddingFunction.apply
        assert torch.autograd.gradcheck(lambda *given: function(given[0], ids, *given[1:], 0.7, None), (rows.requires_grad_(), a, b))  # fmt: skip
        with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
            (grad,) = torch.autograd.grad(function(rows, ids, a, b, 0.7, None).square().sum(), a, create_graph=True)
            grad.sum().backward()


@in_each_precision
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_peft(family, dtype, adapters_float32, autocast):
    model, ours = assert_equal_to_peft(lambda seed: adapted(family, dtype, adapters_float32, seed), dtype, autocast)
    assert any("lora_embedding_A" in name for name in ours)
    told = [entry for entry in fastlora.report(model) if entry.name.endswith(("embed_tokens", "wte", "embeddings"))]
    words = "PEFT's own forward: autocast is on" if autocast else "of an embedding: the adapter is added by one product"
    assert told and all(entry.implementation == "reference" and words in entry.reason for entry in told)


def test_gradients_of_an_embedding_are_near_and_the_same_bits_twice():
    model, layer = lone(V=50, D=32, dtype=BFLOAT16, padding_idx=7)
    ids, dy = torch.randint(50, (64, 9)), torch.randn(64, 9, 32).to(BFLOAT16)
    ids[0] = 7

    def grads(one):
        one.zero_grad()
        out = one(ids)
        out.backward(dy.to(out.dtype))
        return out.detach(), *(p.grad.clone() for p in one.parameters() if p.requires_grad)

    exact, eager = grads(copy.deepcopy(model).double()), grads(model)
    fastlora.accelerate(model)
    ours, again = grads(model), grads(model)
    assert ours[1][:, 7].count_nonzero() == 0 == eager[1][:, 7].count_nonzero()
    assert ours[1].is_contiguous() and layer.lora_embedding_A["default"].dtype is FLOAT32
    for mine, theirs, wanted, twice in zip(ours, eager, exact, again, strict=True):
        assert torch.equal(mine, twice) and mine.dtype is theirs.dtype
        far = [(one.double() - wanted).abs().max().item() for one in (mine, theirs)]
        assert Errors(*far, torch.finfo(mine.dtype).eps * wanted.abs().max().item()).within


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (3,), (2, 3, 4)])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_any_shape_of_ids(shape, index):
    model, layer = lone()
    ids = torch.randint(9, shape).to(index)
    expected = layer(ids)
    fastlora.accelerate(model)
    found = layer(ids)
    assert is_derived(layer) and found.shape == (*shape, 6)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    with pytest.raises(IndexError):
        layer(torch.tensor([9]))


def test_several_adapters_are_summed_and_switched():
    model, layer = lone(dtype=BFLOAT16)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    ids = torch.randint(9, (4, 5))
    for names in (["default"], ["other"], ["default", "other"]):
        for one in (model, peer):
            one.base_model.set_adapter(names)
        torch.testing.assert_close(model(ids), peer(ids))
        assert "by one product" in embeddings.describe(layer)[1]
    with model.disable_adapter(), peer.disable_adapter():
        assert torch.equal(model(ids), peer(ids))
        assert embeddings.describe(layer) == ("reference", "PEFT's own forward: adapters are disabled")
    model.merge_adapter(), peer.merge_adapter()
    assert torch.equal(model(ids), peer(ids)) and "the adapter is merged" in embeddings.describe(layer)[1]
    model.unmerge_adapter()
    assert embeddings.describe(layer)[1] == "PEFT's own forward: the adapter is merged"
    model(ids)
    layer.set_adapter([])
    assert "PEFT's own forward from now on: no adapter is active" == embeddings.describe(layer)[1]


def test_a_mixed_batch_is_pefts():
    model, _ = adapted(target_modules=["embed_tokens", "q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False))
    peer = copy.deepcopy(model).eval()
    fastlora.accelerate(model.eval())
    names = ["default", "__base__", "other"]
    assert torch.allclose(logits(model, adapter_names=names), logits(peer, adapter_names=names), atol=1e-5)
    assert "the call has arguments besides x" in reason_of(model, "embed_tokens")[1]


def gemma():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_key_value_heads=1, vocab_size=96)), {"labels": IDS}, None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "adapter 'default' is a Dora variant"),
        ({"make": gemma}, "the base layer is a Gemma3TextScaledWordEmbedding"),
    ],
)
def test_what_is_left_to_peft_is_told_and_right(options, words):
    model, labels = adapted(**options)
    eager = run(model, labels)
    with pytest.warns(UserWarning, match=f"fused none of 1 LoRA layers: {words}"):
        fastlora.accelerate(model)
    assert reason_of(model, "embed_tokens") == ("peft", words)
    for name, value in run(model, labels).items():
        assert torch.equal(value, eager[name]), name


@pytest.mark.parametrize("option", ["max_norm", "sparse", "scale_grad_by_freq"])
def test_an_embedding_with_options_is_left_to_peft(option):
    model, layer = lone(**{option: 1.0 if option == "max_norm" else True})
    with pytest.warns(UserWarning, match="has max_norm, sparse or scale_grad_by_freq"):
        fastlora.accelerate(model)
    assert not is_derived(layer)
    model, layer = lone()
    assert embeddings.describe(layer) == ("peft", "not accelerated: call fastlora.accelerate(model)")
    layer.__dict__["forward"] = layer.forward
    assert embeddings.swap_obstacle(layer) == "its forward was replaced on the object"


def test_compiled_and_transformed_calls_are_pefts():
    model, layer = lone()
    ids = torch.randint(9, (4, 5))
    expected = layer(ids).detach()
    fastlora.accelerate(model)
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(ids), expected)
    assert embeddings.describe(layer)[1] == "not called yet, unless compiled"
    assert torch.allclose(torch.func.functional_call(layer, dict(layer.named_parameters()), ids), expected)
    assert torch.allclose(torch.func.vmap(layer)(ids), expected)
    assert "PEFT's own forward" in embeddings.describe(layer)[1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tying", [False, True])
def test_a_tied_head_with_lora_has_its_loss_without_logits(checkpointing, tying, tmp_path):
    targets = ["embed_tokens", "lm_head", "q_proj"]
    (model, labels), (peer, _) = (
        adapted(make=tied, target_modules=targets, ensure_weight_tying=tying) for _ in range(2)
    )
    peer.train()
    fastlora.accelerate(model.train(), loss=True, frozen=True, fuse=True)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base = model.base_model.model
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.base_layer.weight
    assert is_derived(base.model.embed_tokens) and type(base.lm_head) is FusedLinear
    for one in (model, peer):
        out = one(input_ids=IDS, attention_mask=ATTENDED, **labels)
        assert (out.logits is None) == (one is model)
        out.loss.backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6, msg=name)
    [told] = [entry for entry in fastlora.report(model) if entry.name.endswith("loss")]
    assert told.implementation == "fused"
    torch.testing.assert_close(logits(model.eval()), logits(peer.eval()), rtol=1e-5, atol=1e-4)


def test_files_copies_and_restoring_are_pefts(tmp_path):
    model, labels = adapted(target_modules=["embed_tokens", "q_proj"])
    base = copy.deepcopy(model).unload()
    fastlora.accelerate(model.eval())
    expected = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    fresh = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(logits(fresh), expected, atol=1e-5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_derived(layer_of(other)) and torch.equal(logits(other), expected)
    fastlora.restore(model)
    assert type(layer_of(model)) is embeddings.lora.Embedding
    assert torch.allclose(logits(model), expected, atol=1e-5)
    plain = fastlora.accelerate(model).merge_and_unload()
    assert type(plain.model.embed_tokens) is nn.Embedding
