"""The modules for models without PEFT: shared parameters, exact merging, and state that survives saving, copying and moving."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import functional
from fastlora.layers import BASE


def trained(layer):
    """The layer with random adapters, so that they change something."""
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return layer


def linear_layer(dtype=torch.float32):
    return trained(fastlora.LoRALinear.from_linear(nn.Linear(12, 7, dtype=dtype), r=3, lora_alpha=6, lora_dropout=0.0))


def conv_layer(dtype=torch.float32):
    return trained(fastlora.LoRAConv1D.from_conv1d(Conv1D(7, 12).to(dtype), r=3, lora_alpha=6, lora_dropout=0.0))


LAYERS = pytest.mark.parametrize("make", [linear_layer, conv_layer])


def test_linear_shares_the_base_parameters_and_trains_only_the_adapter():
    base = nn.Linear(12, 7)
    layer = fastlora.LoRALinear.from_linear(base, r=3)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    x = torch.randn(9, 12)  # dropout or not, no few rows: the product is the same
    assert torch.equal(
        layer(x), functional.lora_linear(x, base.weight, base.bias, layer.lora_A, layer.lora_B, 0.0, training=False)
    )
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 8 / 4), (True, 8 / 2)])
def test_scaling(use_rslora, scaling):
    layer = fastlora.LoRALinear.from_linear(nn.Linear(12, 7), r=4, lora_alpha=8, use_rslora=use_rslora)
    assert layer.scaling == scaling


def test_adapter_is_float32_beside_a_bfloat16_base():
    layer = linear_layer(torch.bfloat16)
    assert layer.lora_A.dtype == torch.float32
    y = layer(torch.randn(4, 12, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@LAYERS
def test_equals_the_equation(make):
    layer, x = make(), torch.randn(2, 5, 12)
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    y = x @ weight.T + layer.bias + 2.0 * (x @ layer.lora_A.T) @ layer.lora_B.T
    assert torch.allclose(layer(x), y, atol=1e-5)


def test_dropout_only_while_training():
    layer = trained(fastlora.LoRALinear.from_linear(nn.Linear(12, 7), r=3, lora_dropout=0.5))
    x = torch.randn(50, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@LAYERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_exact_unmerge(make, dtype):
    layer = make(dtype).eval()
    x = torch.randn(9, 12, dtype=dtype)
    original, pointer, y = layer.weight.detach().clone(), layer.weight.data_ptr(), layer(x)
    for _ in range(5):
        layer.merge()
        layer.merge()
        assert layer.merged and not torch.equal(layer.weight, original)
        assert torch.allclose(layer(x), y, atol=1e-5 if dtype == torch.float32 else 0.2)
        layer.unmerge()
        layer.unmerge()
    assert torch.equal(layer.weight, original) and layer.weight.data_ptr() == pointer
    assert torch.equal(layer(x), y)


def tied_linear():
    """Something else that holds the layer's weight, as a tied embedding does; and the layer."""
    embedding = nn.Embedding(7, 12)
    head = nn.Linear(12, 7, bias=False)
    head.weight = embedding.weight
    return embedding, trained(fastlora.LoRALinear.from_linear(head, r=3))


def tied_conv():
    embedding, conv = nn.Embedding(12, 7), Conv1D(7, 12)
    conv.weight = embedding.weight
    return embedding, trained(fastlora.LoRAConv1D.from_conv1d(conv, r=3))


@pytest.mark.parametrize("make", [tied_linear, tied_conv])
def test_merging_leaves_whoever_shares_the_weight_alone(make):
    embedding, layer = make()
    original, values = embedding.weight, embedding.weight.detach().clone()
    model, x = nn.ModuleList([embedding, layer]).eval(), torch.randn(5, 12)
    y, version = layer(x), original._version
    layer.merge()
    assert torch.equal(embedding.weight, values) and embedding.weight is original and original._version == version
    assert layer.weight.data_ptr() != original.data_ptr()
    assert torch.allclose(layer(x), y, atol=1e-5)
    model.double()
    other = copy.deepcopy(model)
    assert torch.equal(embedding.weight, values.double())
    for one, its in ((embedding, layer), tuple(other)):
        its.unmerge()
        assert its.weight is one.weight and torch.equal(one.weight, values.double())
    assert layer.weight is original


@LAYERS
def test_state_while_merged_is_the_unmerged_state(make):
    layer = make()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.merge()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]) and not value.requires_grad, name
    assert layer.state_dict(keep_vars=True)["weight"] is not layer.weight
    assert "weight" in dict(layer.named_parameters()) and len(list(layer.parameters())) == 4
    layer.load_state_dict(before)
    assert not layer.merged and torch.equal(layer.weight, before["weight"])


@LAYERS
def test_merged_layer_survives_copy_pickle_and_cast(make):
    layer, original = make(), None
    original = layer.weight.detach().clone()
    layer.merge()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.double()):
        other.unmerge()
        assert torch.equal(other.weight.float(), original) and other.weight.dtype == other.lora_A.dtype


def multi_layer():
    layer = fastlora.MultiLoRALinear.from_linear(nn.Linear(12, 7))
    layer.add_adapter("fr", r=3, lora_alpha=6, lora_dropout=0.0)
    layer.add_adapter("de", r=5, lora_alpha=5, lora_dropout=0.0)
    return trained(layer)


def test_mixed_batch_equals_each_row_alone():
    layer, x = multi_layer(), torch.randn(4, 6, 12)
    names = ["de", BASE, "fr", "de"]
    y = layer(x, names)
    for i, name in enumerate(names):
        alone = nn.functional.linear(x[i], layer.weight, layer.bias)
        if name != BASE:
            alone = alone + layer.scaling[name] * x[i] @ layer.lora_A[name].T @ layer.lora_B[name].T
        assert torch.allclose(y[i], alone, atol=1e-5)
    assert torch.equal(y, layer(x, layer.group(names))) and torch.equal(y, layer(x, torch.tensor([1, -1, 0, 1])))
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_mixed_batch_trains_only_the_adapters_it_names():
    layer = multi_layer()
    layer(torch.randn(2, 12), ["de", "de"]).sum().backward()
    assert layer.lora_A["de"].grad.abs().sum() > 0
    assert layer.lora_A["fr"].grad.abs().sum() == 0


def test_adapters_are_numbered_as_added():
    layer = multi_layer()
    layer.delete_adapter("fr")
    assert layer.adapters == ["de"] and set(layer.state_dict()) == {"weight", "bias", "lora_A.de", "lora_B.de"}


def test_soft_prompt_in_front_of_a_batch():
    embedding = torch.randn(20, 8)
    prompt = fastlora.SoftPrompt.from_tokens(embedding, torch.tensor([3, 4, 5]))
    ids, mask = torch.tensor([[7, 8], [9, 0]]), torch.tensor([[1, 1], [1, 0]])
    out = prompt(None, mask, input_ids=ids, embedding=embedding, labels=ids)
    assert torch.equal(out.embeds[0], embedding[[3, 4, 5, 7, 8]])
    assert torch.equal(out.embeds[1, :4], embedding[[3, 4, 5, 9]]) and not out.embeds[1, 4].any()
    assert out.labels.tolist() == [[-100] * 3 + [7, 8], [-100] * 3 + [9, -100]]
    out.embeds.sum().backward()
    assert torch.equal(prompt.prompt_embeddings.grad, torch.full((1, 3, 8), 2.0))


def test_soft_prompt_begins_inside_the_vocabulary():
    embedding = torch.randn(20, 8)
    prompt = fastlora.SoftPrompt.from_vocabulary(embedding, 6, num_prompts=2, most_common=4)
    rows = prompt.prompt_embeddings.reshape(-1, 8)
    assert (rows[:, None] == embedding[:4]).all(-1).any(1).all()


def test_soft_prompt_begins_as_the_classes_names():
    embedding = torch.randn(20, 8)
    prompt = fastlora.SoftPrompt.from_class_labels(embedding, [[3], torch.tensor([4, 5])], 4, most_common=2)
    rows = prompt.prompt_embeddings[0]
    assert torch.equal(rows[0], embedding[3]) and torch.equal(rows[1], embedding[4:6].mean(0))
    assert (rows[2:, None] == embedding[:2]).all(-1).any(1).all()
    assert fastlora.SoftPrompt.from_class_labels(embedding, [[3], [4], [5]], 2).prompt_embeddings.shape == (1, 2, 8)


def test_soft_prompt_for_peft():
    def model(config):
        return get_peft_model(LlamaForCausalLM(LlamaConfig(**SMALL)), config)

    prompt = fastlora.SoftPrompt.from_vocabulary(torch.randn(20, 8), 3)
    for more in ({}, {"num_transformer_submodules": 2}):
        peft = model(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **more))
        prompt.copy_to(peft)
        expected = prompt.prompt_embeddings[0].repeat(more.get("num_transformer_submodules", 1), 1)
        assert torch.equal(peft.prompt_encoder["default"].embedding.weight, expected)
        assert torch.equal(get_peft_model_state_dict(peft)["prompt_embeddings"], expected)
    for config in (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=4),
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    ):
        with pytest.raises(ValueError, match=r"adapter_name|model"):
            prompt.copy_to(model(config))
    with pytest.raises(ValueError, match="adapter_name"):
        prompt.copy_to(peft, "other")


SMALL = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
}


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: fastlora.SoftPrompt.from_class_labels(torch.randn(4, 8), [], 2), ValueError, "labels"),
        (lambda: fastlora.SoftPrompt.from_class_labels(torch.randn(4, 8), [[]], 2), ValueError, "input_ids"),
        (lambda: fastlora.LoRALinear.from_linear(nn.Conv1d(1, 1, 1)), TypeError, "linear"),
        (lambda: fastlora.LoRALinear.from_linear(nn.Linear(2, 2), r=0), ValueError, "r:"),
        (lambda: fastlora.LoRALinear.from_linear(nn.Linear(2, 2), lora_dropout=1.0), ValueError, "lora_dropout"),
        (lambda: fastlora.LoRAConv1D.from_conv1d(nn.Linear(3, 2)), TypeError, "conv"),
        (lambda: fastlora.MultiLoRALinear.from_linear(nn.Identity()), TypeError, "linear"),
        (lambda: multi_layer().add_adapter("fr"), ValueError, "name"),
        (lambda: multi_layer().add_adapter(BASE), ValueError, "name"),
        (lambda: multi_layer().add_adapter("a.b"), ValueError, "name"),
        (lambda: multi_layer().delete_adapter("es"), ValueError, "name"),
        (lambda: multi_layer()(torch.randn(1, 12), ["es"]), ValueError, "adapter_names"),
        (lambda: multi_layer()(torch.randn(1, 12), torch.tensor([2])), IndexError, "index"),
        (lambda: fastlora.SoftPrompt(0, 8), ValueError, "num_virtual_tokens"),
        (lambda: fastlora.SoftPrompt.from_tokens(torch.randn(4, 8), torch.tensor([4])), IndexError, "input_ids"),
        (
            lambda: fastlora.SoftPrompt.from_tokens(torch.randn(4, 8), torch.tensor([], dtype=torch.long)),
            ValueError,
            "input_ids",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names):
        call()
