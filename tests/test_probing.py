"""Base layers that are subclasses of nn.Linear: one that computes the same is fused, whatever its forward says; one that does not is PEFT's."""

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM

import fastlora
from fastlora.peft import FusedLinear, probing

IDS = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))


class Same(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T if self.bias is None else input @ self.weight.T + self.bias


class Clipped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-30, 30)


class Noisy(nn.Linear):
    """In training alone."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1.5 if self.training else 1)


class Asleep(nn.Linear):
    """In eval mode alone."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1 if self.training else 1.5)


class Silent(nn.Linear):
    """The same values, another gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input - input.detach())


class Wider(nn.Linear):
    def forward(self, input: Tensor, more: Tensor) -> Tensor:
        return super().forward(input) + more


class Short(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[..., :1]


class Buffered(nn.Linear):
    """What it does may depend on what it holds."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


def wrapped(kind: type[nn.Linear], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(kind(8, 6, **options)).to(dtype), config, autocast_adapter_dtype=False)


def layer_of(model: Any) -> Any:
    return model.base_model.model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_one_that_computes_the_same_is_fused(bias, dtype):
    model = wrapped(Same, dtype, bias=bias)
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    assert type(layer_of(model)) is FusedLinear and layer_of(model).training
    x = torch.randn(3, 8).to(dtype)
    assert torch.allclose(
        model(x),
        peer(x),
        rtol=0.02 if dtype is torch.bfloat16 else 1e-5,
        atol=1e-2 if dtype is torch.bfloat16 else 1e-6,
    )
    [entry] = fastlora.report(model)
    assert "PEFT" not in entry.reason
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and "PEFT" not in fastlora.report(other)[0].reason
    fastlora.restore(model)
    assert probing.KEY not in layer_of(model).base_layer.__dict__


class Holding(Same):
    """What it does may depend on that module."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.inner = nn.Identity()


class Owning(Same):
    """Or on that parameter."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.more = nn.Parameter(torch.ones(()), requires_grad=False)


@pytest.mark.parametrize("kind", [Clipped, Noisy, Asleep, Silent, Wider, Short, Buffered, Holding, Owning])
def test_one_that_computes_something_else_is_pefts(kind):
    model = wrapped(kind)
    with pytest.warns(UserWarning, match=f"the base layer is a {kind.__name__}"):
        fastlora.accelerate(model.eval())
    assert type(layer_of(model)) is not FusedLinear and not layer_of(model).base_layer.training


def test_a_class_whose_forward_changes_is_asked_again(monkeypatch):
    model = fastlora.accelerate(wrapped(Same))
    x = torch.randn(3, 8)
    before = model(x)
    monkeypatch.setattr(Same, "forward", lambda self, rows: nn.Linear.forward(self, rows) + 100)
    assert torch.allclose(model(x), before + 100, atol=1e-4)
    assert "the base layer is a Same" in fastlora.report(model)[0].reason


def test_what_has_no_values_is_not_called(monkeypatch):
    layer, seen = Same(8, 6, device="meta"), []
    monkeypatch.setattr(Same, "forward", lambda self, rows: seen.append(rows) or nn.Linear.forward(self, rows))
    probing.probe(layer)
    assert seen == [] and not probing.is_linear(layer)


class Alike(nn.Module):
    """Of nn.Linear's parameters and product, but none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


def test_what_is_no_linear_layer_or_hooked_is_not_asked():
    hooked = Same(8, 6)
    hooked.register_forward_hook(lambda *_: None)
    for layer in (Alike(), nn.Bilinear(8, 8, 6), hooked):
        probing.probe(layer)
        assert not probing.is_linear(layer)


def test_what_was_found_out_is_found_out_again(monkeypatch):
    layer = Same(8, 6).requires_grad_(False).eval()
    probing.probe(layer)
    assert probing.is_linear(layer) and not layer.training
    layer.register_buffer("scale", torch.ones(()))
    probing.probe(layer)
    assert not probing.is_linear(layer) and probing.KEY not in layer.__dict__
    assert not probing.is_linear(nn.Linear(8, 6))


def test_a_hook_is_not_called_to_find_out():
    model, seen = wrapped(Same), []
    layer_of(model).base_layer.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="none of 1"):
        fastlora.accelerate(model)
    assert seen == []


def test_the_random_numbers_of_others_stay_as_they_are():
    model = wrapped(Same)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fastlora.accelerate(model)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_falcon(dora):
    config = FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False, bias=True
    )
    config.attention_dropout = config.hidden_dropout = 0.0
    torch.manual_seed(0)
    model = get_peft_model(
        FalconForCausalLM(config),
        LoraConfig(
            r=3,
            target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
            init_lora_weights=False,
            use_dora=dora,
        ),
    )
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    assert sum(type(module) is FusedLinear for module in model.modules()) == 8
    found = []
    for each in (model, peer):
        out = each(input_ids=IDS, labels=IDS)
        out.loss.backward()
        found.append([out.logits, *(p.grad for p in each.parameters() if p.requires_grad)])
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*found, strict=True))
    assert not any("PEFT" in entry.reason for entry in fastlora.report(model))
