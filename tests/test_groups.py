"""Layers that share x: found by name, computed together, and left alone as soon as they turn out not to share."""

import copy
import gc
import pickle
import weakref
from typing import Any

import peft
import pytest
import torch
from conftest import implementations
from torch import Tensor, nn

import fastlora
from fastlora import functional, ops

WIDTH = 16


class Attention(nn.Module):
    """Calls its projections in one of several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.way = "shares x"

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        if self.way == "raises":
            raise KeyError("on purpose")
        if self.way == "another object":
            x = x.clone()
        elif self.way == "written to":
            x.mul_(2)
        elif self.way == "asks for one":
            return q
        return torch.cat((q, self.k_proj(x), self.v_proj(x)), -1)


def make_model(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(nn.Sequential(Attention()), config)


def attention_of(model: Any) -> Any:
    return model.base_model.model[0]


def reasons(model: nn.Module) -> list[str]:
    return [layer.reason for layer in fastlora.report(model)]


def count_shared(monkeypatch: pytest.MonkeyPatch, name: str = "lora_linear_shared") -> list[int]:
    """Filled with the number of layers at each call of that function."""
    calls: list[int] = []
    shared = getattr(functional, name)

    def counting(x: Tensor, weight: list[Tensor], *args: Any, **options: Any) -> list[Tensor]:
        calls.append(len(weight))
        return shared(x, weight, *args, **options)

    monkeypatch.setattr(functional, name, counting)
    return calls


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """y, dx and every adapter's gradient."""
    x = x.clone().requires_grad_()
    y = model(x * 1)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True)]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_computed_together_and_equal_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 5, WIDTH)
    model = make_model()
    expected = outcome(model, x)
    fastlora.accelerate(model)
    calls = count_shared(monkeypatch)
    for _ in range(2):
        assert_near(outcome(model, x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected[0])
    assert calls == [3, 3, 3]
    assert all("x read once with" in reason for reason in reasons(model))


def test_masks_are_each_layers_own() -> None:
    model = fastlora.accelerate(make_model(dropout=0.5))
    attention = attention_of(model)
    for layer in (attention.k_proj, attention.v_proj):
        layer.base_layer.load_state_dict(attention.k_proj.base_layer.state_dict())
        for part in ("lora_A", "lora_B"):
            getattr(layer, part).default.load_state_dict(getattr(attention.k_proj, part).default.state_dict())
    _, k, v = model(torch.ones(4, WIDTH)).split([WIDTH, 8, 8], 1)
    assert not torch.equal(k, v)
    model.eval()
    _, k, v = model(torch.ones(4, WIDTH)).split([WIDTH, 8, 8], 1)
    torch.testing.assert_close(k, v)


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("another object", "k_proj was called with another x"),
        ("written to", "k_proj was called with another x"),
        ("asks for one", "nobody asked for k_proj, v_proj"),
    ],
)
def test_a_miss_dissolves_the_group(way: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, WIDTH)
    model = make_model()
    attention_of(model).way = way
    expected = outcome(model, x) if way != "written to" else [model(x.clone()).detach()]
    fastlora.accelerate(model)
    calls = count_shared(monkeypatch)
    for _ in range(2):
        found = outcome(model, x) if way != "written to" else [model(x.clone()).detach()]
        assert_near(found, expected)
    assert calls == [3]
    assert all(f"was dissolved: {why}" in reason for reason in reasons(model))
    assert not attention_of(model)._forward_hooks


def test_what_nobody_takes_is_not_kept() -> None:
    model = fastlora.accelerate(make_model())
    attention_of(model).way = "raises"
    x = torch.randn(7, WIDTH)
    alive = weakref.ref(x)
    with pytest.raises(KeyError):
        model(x)
    del x
    gc.collect()
    assert alive() is None
    attention_of(model).way = "shares x"  # an error is no miss
    model(torch.randn(7, WIDTH))
    assert all("x read once with" in reason for reason in reasons(model))


def test_merged_disabled_or_hooked_layers_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, WIDTH)
    model = make_model()
    attention = attention_of(model)
    expected = outcome(model, x)[0]
    fastlora.accelerate(model)
    calls = count_shared(monkeypatch)
    handle = attention.k_proj.register_forward_hook(lambda layer, args, y: y + 1)
    q, k, v = model(x).split([WIDTH, 8, 8], 1)
    torch.testing.assert_close(torch.cat((q, k - 1, v), 1), expected)
    handle.remove()
    with model.disable_adapter():
        model(x)
    attention.v_proj.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not calls
    attention.v_proj.unmerge()
    torch.testing.assert_close(model(x), expected)
    assert calls == [3]


def make_mixed_model() -> tuple[Any, list[Any]]:
    """A model with adapters "default" and "other", and "query" in one layer; and its layers."""
    model = make_model()
    for name, r, layers in (("other", 3, ["q_proj", "k_proj", "v_proj"]), ("query", 2, ["q_proj"])):
        model.add_adapter(name, peft.LoraConfig(r=r, target_modules=layers, init_lora_weights=False))
    attention = attention_of(model.eval())
    return model, [attention.q_proj, attention.k_proj, attention.v_proj]


@pytest.mark.skipif("triton" not in implementations("multi_lora_shared", "cpu"), reason="needs Triton's interpreter")
def test_a_mixed_batch_is_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples with adapters of their own, and without; an adapter that one of the layers lacks keeps the group from running."""
    x = torch.randn(4, 5, WIDTH)
    model, layers = make_mixed_model()

    def results(names: list[str]) -> list[Tensor]:
        return [layer(x, adapter_names=names) for layer in layers]

    both, all_three = ["other", "__base__", "default", "other"], ["query", "other", "default", "query"]
    expected = [results(both), results(all_three)]
    fastlora.accelerate(model)
    monkeypatch.setattr(ops, "candidates", lambda *_: ["triton"])  # as on a card
    monkeypatch.setattr(ops, "forced", "triton")
    calls = count_shared(monkeypatch, "multi_lora_shared")
    assert_near(results(both), expected[0])
    assert calls == [3] and all("x read once with" in reason for reason in reasons(model))
    assert_near(results(all_three), expected[1])
    assert calls == [3] and not any("x read once" in reason for reason in reasons(model))
    with torch.no_grad():
        assert_near(results(both), expected[0])
    with pytest.raises(ValueError, match="adapter_names"):
        layers[0](x, adapter_names=both[:3])
    assert calls == [3, 3] and not any("dissolved" in reason for reason in reasons(model))
    layers[0](x, adapter_names=both)
    other_rows = layers[1](x, adapter_names=both[::-1])  # not what waits for it
    assert layers[0].__dict__["_fastlora_group"].dissolved == "k_proj was called with another x"
    fastlora.restore(model)
    torch.testing.assert_close(other_rows, layers[1](x, adapter_names=both[::-1]), rtol=1e-5, atol=1e-5)


def test_a_mixed_batch_runs_alone_where_nothing_runs_it_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = make_mixed_model()
    fastlora.accelerate(model)
    calls = count_shared(monkeypatch, "multi_lora_shared")
    for layer in layers:
        layer(torch.randn(2, WIDTH), adapter_names=["other", "default"])
    assert calls == [] and not any("_proj" in reason for reason in reasons(model))


def test_report_tells_a_call_without_the_group() -> None:
    x = torch.randn(7, WIDTH)
    model = fastlora.accelerate(make_model())
    attention = attention_of(model)
    alone = "x read alone: its group with q_proj, v_proj could not run"

    def reason() -> str:
        return reasons(model)[1]

    assert "x read once with" in reason()  # before any call
    with torch.inference_mode():
        model(torch.randn(7, WIDTH))
    assert alone in reason() and "x read once" not in reason()
    model(x)
    assert "x read once with" in reason()
    attention.v_proj.merge()
    model(x)
    assert alone in reason()
    attention.v_proj.unmerge()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    model(x)
    assert alone in reason()


def test_a_replaced_layer_dissolves_the_group() -> None:
    model = fastlora.accelerate(make_model())
    attention = attention_of(model)
    attention.v_proj = nn.Sequential(attention.v_proj)  # as FSDP wraps
    model(torch.randn(7, WIDTH))
    assert "was dissolved: a layer was wrapped or replaced" in reasons(model)[0]


def test_copies_have_groups_of_their_own() -> None:
    model = fastlora.accelerate(make_model())
    x = torch.randn(7, WIDTH)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        attention_of(other).way = "asks for one"
        other(x)
        assert "was dissolved" in reasons(other)[0]
        fastlora.accelerate(other)
        attention_of(other).way = "shares x"
        torch.testing.assert_close(other(x), expected)
        assert all("x read once with" in reason for reason in reasons(other))
    assert all("x read once with" in reason for reason in reasons(model))


def test_restore_leaves_no_hooks() -> None:
    model = fastlora.accelerate(make_model())
    fastlora.restore(fastlora.accelerate(model))
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("_fastlora_group" in module.__dict__ for module in model.modules())


def test_checkpointing_recomputes_groups() -> None:
    x = torch.randn(7, WIDTH)
    model = fastlora.accelerate(make_model())
    expected = outcome(model, x)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    assert_near(outcome(Checkpointed(), x), expected)
    assert all("x read once with" in reason for reason in reasons(model))


def shared_names(model: Any, **options: Any) -> set[str]:
    """What is in a group, of a transformers model with LoRA on all linear layers, after a forward."""
    model = fastlora.accelerate(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")))
    model(**options)
    return {
        layer.name.removeprefix("base_model.model.")
        for layer in fastlora.report(model)
        if "x read once" in layer.reason
    }


def test_models_of_known_shapes() -> None:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Qwen2Config,
        Qwen2ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    ids = torch.randint(64, (2, 5))
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 64}
    qwen = Qwen2ForCausalLM(Qwen2Config(num_attention_heads=2, num_key_value_heads=1, **small))
    first = "model.layers.0."
    attention = {f"{first}self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")}
    assert shared_names(qwen, input_ids=ids) == attention | {f"{first}mlp.gate_proj", f"{first}mlp.up_proj"}

    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=64, feed_forward_proj="gated-gelu")
    )
    found = shared_names(t5, input_ids=ids, decoder_input_ids=ids)
    cross = {name for name in found if "EncDecAttention" in name}
    assert {name.rpartition(".")[2] for name in cross} == {"k", "v"}
    assert {name.rpartition(".")[2] for name in found - cross} == {"q", "k", "v", "wi_0", "wi_1"}

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64))
    assert shared_names(gpt2, input_ids=ids) == set()
