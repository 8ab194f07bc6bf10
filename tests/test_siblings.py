"""peft/siblings.py: layers that share x are found by name, computed together, and left alone as soon as they turn out not to share."""

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
from conftest import implementations
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fastlora
from fastlora import operators, ops
from fastlora.choice import table

WIDTH = 16


class Attention(nn.Module):
    """Calls its projections in one of several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.way = "shares x"
        self.between: Callable[[], Any] = bool  # called behind the query's projection

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        q = self.q_proj(x, **options)
        self.between()
        if self.way == "raises":
            raise KeyError("on purpose")
        if self.way == "another object":
            x = x.clone()
        elif self.way == "written to":
            x.mul_(2)
        elif self.way == "asks for one":
            return q
        elif self.way == "twice":
            q = q + self.q_proj(x)
        elif self.way == "other rows":
            options["adapter_names"] = options["adapter_names"][::-1]
        gradients = torch.is_grad_enabled() and self.way != "without gradients"
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", enabled=self.way == "under autocast"):
            k = self.k_proj(x, **options)
        self.dtypes = q.dtype, k.dtype
        return torch.cat((q, k, self.v_proj(x, **options)), -1)


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


def count_shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of layers at each call of the operator for layers that share x."""
    calls: list[int] = []
    compute = operators.lora_linear.compute

    def counting(x: Tensor, weight: list[Tensor], *args: Any, **options: Any) -> list[Tensor]:
        if len(weight) > 1:
            calls.append(len(weight))
        return compute(x, weight, *args, **options)

    monkeypatch.setattr(operators.lora_linear, "compute", counting)
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
        ("twice", "q_proj was called twice"),
        ("without gradients", "k_proj was called in another mode"),
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


def test_autocast_for_one_of_them() -> None:
    """What was computed without it does not pass for what is asked for with it."""
    model = fastlora.accelerate(make_model())
    attention_of(model).way = "under autocast"
    for _ in range(2):
        model(torch.randn(7, WIDTH))
        assert attention_of(model).dtypes == (torch.float32, torch.bfloat16)
    assert all("was dissolved: k_proj was called in another mode" in reason for reason in reasons(model))


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


def make_mixed_model() -> tuple[Any, Any]:
    """A model with adapters "default" and "other", and "query" in one layer; and its attention, whose layers PEFT has not hooked."""
    model = make_model()
    for name, r, layers in (("other", 3, ["q_proj", "k_proj", "v_proj"]), ("query", 2, ["q_proj"])):
        model.add_adapter(name, peft.LoraConfig(r=r, target_modules=layers, init_lora_weights=False))
    return model, attention_of(model.eval())


@pytest.mark.skipif("triton" not in implementations("multi_lora_shared", "cpu"), reason="needs Triton's interpreter")
def test_a_mixed_batch_is_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples with adapters of their own, and without; an adapter that one of the layers lacks keeps the group from running."""
    x = torch.randn(4, 5, WIDTH)
    model, attention = make_mixed_model()

    def results(names: list[str]) -> list[Tensor]:
        return [attention(x, adapter_names=names)]

    both, all_three = ["other", "__base__", "default", "other"], ["query", "other", "default", "query"]
    expected = [results(both), results(all_three)]
    fastlora.accelerate(model)
    monkeypatch.setattr(ops, "candidates", lambda *_: ["triton"])  # as on a card
    monkeypatch.setattr(ops, "forced", "triton")
    calls = count_shared(monkeypatch)
    assert_near(results(both), expected[0])
    assert calls == [3] and all("x read once with" in reason for reason in reasons(model))
    assert_near(results(all_three), expected[1])
    assert calls == [3] and not any("x read once" in reason for reason in reasons(model))
    with torch.no_grad():
        assert_near(results(both), expected[0])
    with pytest.raises(ValueError, match="adapter_names"):
        attention(x, adapter_names=both[:3])
    assert calls == [3, 3] and not any("dissolved" in reason for reason in reasons(model))
    attention.way = "other rows"  # not what waits for them
    found = results(both)
    assert attention.q_proj.__dict__["_fastlora_family"].dissolved == "k_proj was called in another mode"
    fastlora.restore(model)
    assert_near(found, results(both))


def test_a_mixed_batch_runs_alone_where_nothing_runs_it_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA C++, which has no rows of their own adapters for layers that share x."""
    without = {key: value for key, value in ops.implementations.items() if not key[0].startswith("multi_lora_shared")}
    reference_only = {key: value for key, value in ops.implementations.items() if key[1] == "reference"}
    monkeypatch.setattr(ops, "implementations", without | reference_only)
    table.choices.clear()
    model, attention = make_mixed_model()
    fastlora.accelerate(model)
    calls = count_shared(monkeypatch)
    attention(torch.randn(2, WIDTH), adapter_names=["other", "default"])
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


def test_a_copy_of_one_layer_is_alone() -> None:
    """It takes neither its parent nor the others along, and computes what it is asked for, within the parent and without."""
    model = fastlora.accelerate(make_model())
    attention = attention_of(model)
    x = torch.randn(7, WIDTH)
    expected = attention.k_proj(x)
    for duplicate in (copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))):
        other = duplicate(attention.k_proj)
        torch.testing.assert_close(other(x), expected)
        assert "_fastlora_family" not in other.__dict__
    assert len(pickle.dumps(attention.k_proj)) < len(pickle.dumps(attention)) / 2
    assert "x read once with" in reasons(fastlora.accelerate(model))[0]
    whole = model(x)
    assert all("x read once with" in reason for reason in reasons(model))
    attention.k_proj = copy.copy(attention.k_proj)
    torch.testing.assert_close(model(x), whole)
    assert "was dissolved: a layer was wrapped or replaced" in reasons(model)[0]
    fastlora.accelerate(model)
    torch.testing.assert_close(model(x), whole)
    assert all("x read once with" in reason for reason in reasons(model))


def test_shallow_copies_of_the_parent_share_its_group() -> None:
    model = fastlora.accelerate(make_model())
    x = torch.randn(7, WIDTH)
    expected = outcome(model, x)
    for other in (copy.copy(model), copy.copy(attention_of(model))):
        assert_near(outcome(other, x), expected)
    assert all("x read once with" in reason for reason in reasons(model))


@pytest.mark.parametrize("parameter_of", [Tensor.clone, nn.Parameter], ids=["tensors", "parameters"])
def test_replicas_run_alone(parameter_of: Callable[[Tensor], Tensor]) -> None:
    """As DataParallel makes them: the same `__dict__`, new modules, parameters that are plain tensors; or as others might, with parameters."""
    model = fastlora.accelerate(make_model()).requires_grad_(False)
    x = torch.randn(7, WIDTH)
    expected = model(x)
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter_of(parameter.detach()))
        replica.requires_grad_(False)
    torch.testing.assert_close(replicas[model](x), expected)
    torch.testing.assert_close(model(x), expected)
    assert all("x read once with" in reason for reason in reasons(model))


def test_layers_called_by_hand_see_what_was_changed_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tells when the parent begins and ends, so that nothing may wait: a fused optimizer's step would leave no trace."""
    model = fastlora.accelerate(make_model())
    attention = attention_of(model)
    calls = count_shared(monkeypatch)
    x = torch.randn(7, WIDTH)
    attention.q_proj(x)
    attention.k_proj.lora_B["default"].weight.data.mul_(3)
    found = attention.k_proj(x)
    assert calls == []
    fastlora.restore(model)
    torch.testing.assert_close(found, attention.k_proj(x))


@pytest.mark.parametrize("training", [False, True])
def test_threads_have_their_own_results(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each between query and key when the other computes its query: both are right, and the group lasts."""
    model = make_model()
    xs = [torch.randn(9, WIDTH) for _ in range(2)]
    expected = [outcome(model, x) if training else [model(x).detach()] for x in xs]
    fastlora.accelerate(model)
    attention_of(model).between = threading.Barrier(2, timeout=30).wait
    calls = count_shared(monkeypatch)

    def work(x: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(training):
            return outcome(model, x) if training else [model(x)]

    with ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            for found, wanted in zip(threads.map(work, xs), expected, strict=True):
                assert_near(found, wanted)
    assert calls == [3] * 6
    assert all("x read once with" in reason for reason in reasons(model))


def test_many_threads_at_once() -> None:
    """Switched as often as Python can: all are right, among them those whose parent raises, and the group lasts."""
    model = fastlora.accelerate(make_model())
    attention = attention_of(model)
    xs = [torch.randn(9, WIDTH) for _ in range(6)]  # not few, which run alone
    with torch.no_grad():
        expected = [model(x) for x in xs]
    raising = threading.local()

    def between() -> None:
        if getattr(raising, "now", False):
            raise KeyError("on purpose")

    attention.between = between

    def work(number: int) -> None:
        for turn in range(40):
            with torch.no_grad():
                raising.now = turn % 5 == number % 5
                if raising.now:
                    with pytest.raises(KeyError):
                        model(xs[number])
                else:
                    torch.testing.assert_close(model(xs[number]), expected[number])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(xs)) as threads:
            list(threads.map(work, range(len(xs))))
    finally:
        sys.setswitchinterval(interval)
    assert attention.q_proj.__dict__["_fastlora_family"].dissolved is None


def test_a_thread_that_dissolves_leaves_nothing_behind_in_another() -> None:
    model = fastlora.accelerate(make_model())
    attention = attention_of(model)
    group = attention.q_proj.__dict__["_fastlora_family"]
    x = torch.randn(7, WIDTH)
    expected = model(x)

    def dissolved_by_another() -> None:
        thread = threading.Thread(target=group.dissolve, args=("on purpose",))
        thread.start()
        thread.join()
        assert group._here.pending is not None

    attention.between = dissolved_by_another
    torch.testing.assert_close(model(x), expected)
    assert group._here.pending is None and not attention._forward_hooks


def test_restore_leaves_no_hooks() -> None:
    model = fastlora.accelerate(make_model())
    fastlora.restore(fastlora.accelerate(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("_fastlora_family" in module.__dict__ for module in model.modules())


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
