"""What `report` says word by word of a layer in each state: called or not, compiled or not, before and from now on."""

import copy
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from measurements import needs_native
from test_siblings import WIDTH, attention_of, make_model, reasons
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import model_loss, ops
from fastlora.choice import table
from fastlora.operators import frozen_linear, lora_linear
from fastlora.peft import FusedLinear, siblings
from fastlora.peft.layers import SEEN
from fastlora.peft.reporting import LayerReport, Report, linear_weight

X = torch.ones(7, WIDTH)
TRAINED = "nn.Linear's own forward: the base weight or bias is trained"
MERGED = "PEFT's own forward: the adapter is merged"


def frozen_model() -> Any:
    """One frozen layer, without adapters."""
    model = nn.Sequential(nn.Linear(WIDTH, 8)).requires_grad_(False)
    return fastlora.accelerate(model, frozen=True)


def alone(dropout: float = 0.0) -> Any:
    """One LoRA layer, without siblings."""
    config = peft.LoraConfig(r=4, lora_dropout=dropout, target_modules=["0"], init_lora_weights=False)
    return fastlora.accelerate(peft.get_peft_model(nn.Sequential(nn.Linear(WIDTH, 8)), config))


def reason_of(model: nn.Module) -> str:
    [only] = reasons(model)
    return only


def test_a_frozen_layer_that_is_trained_from_now_on() -> None:
    model = frozen_model()
    assert reason_of(model).startswith("not called yet, unless compiled; 512 rows: ")
    model[0].weight.requires_grad_()
    assert fastlora.report(model)[0] == ("0", "reference", f"not called yet, unless compiled; {TRAINED}")
    model[0].weight.requires_grad_(False)
    model(X)
    called = reason_of(model)
    assert called.startswith("7 rows: ")
    model[0].weight.requires_grad_()
    assert reason_of(model) == f"{called}; from now on {TRAINED}"
    model(X)
    assert reason_of(model) == f"{TRAINED}; before, {fastlora.report(frozen_called())[0].implementation}, {called}"
    model[0].weight.requires_grad_(False)
    assert reason_of(model).startswith(f"{TRAINED}, now no longer; before, ")
    model(X)
    assert reason_of(model) == f"{called}; earlier also {TRAINED}"


def frozen_called() -> Any:
    model = frozen_model()
    model(X)
    return model


def test_a_call_that_stood_in_the_way_itself_is_no_longer_told_as_the_layers_state() -> None:
    model = frozen_model()
    model(X.as_subclass(type("Odd", (torch.Tensor,), {})))
    assert reason_of(model) == "nn.Linear's own forward: x is a Odd"


def test_one_row_is_one_row() -> None:
    model = alone()
    model(X[:1])
    assert reason_of(model).startswith("1 row: ")
    model(torch.ones(2, 3, WIDTH))
    assert reason_of(model).startswith("6 rows: ")


def test_one_state_after_another() -> None:
    model = alone()
    layer = model.base_model.model[0]
    model(X)
    called = reason_of(model)
    layer.merge()
    assert reason_of(model) == f"{called}; from now on {MERGED}"
    model(X)
    implementation = "cpu" if ops.implementations.get(("lora_linear", "cpu")) else "reference"
    assert fastlora.report(model)[0][1:] == ("reference", f"{MERGED}; before, {implementation}, {called}")
    layer.enable_adapters(False)
    assert reason_of(model).startswith(f"{MERGED}, now adapters are disabled; before, ")


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_compiled(called: bool, merged: bool) -> None:
    model = alone()
    if merged:
        model.base_model.model[0].merge()
    if called:
        model(X)
    eager = reason_of(model)
    model.compile(backend="eager")
    if merged:
        expected = f"in its last eager call {MERGED}" if called else MERGED
    else:
        expected = f"its last eager call, {eager}" if called else f"a guess, {eager.partition('; ')[2]}"
    assert reason_of(model) == f"compiled: not observed; {expected}"


def test_a_model_that_torch_compile_has_wrapped() -> None:
    assert reason_of(torch.compile(alone(), backend="eager")).startswith("compiled: not observed; a guess, ")


@pytest.mark.parametrize("called", [False, True])
def test_siblings_where_compiled(called: bool) -> None:
    model = fastlora.accelerate(make_model())
    if called:
        model(X)
    model.compile(backend="eager")
    assert all("not grouped with " in reason for reason in reasons(model))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_the_guess_before_any_call_knows_of_dropout(
    dropout: float, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    choose = ops.choose

    def noting(op: str, x: Any, rows: int, elements: int, dropout: bool, *rest: Any) -> Any:
        asked.append(dropout)
        return choose(op, x, rows, elements, dropout, *rest)

    monkeypatch.setattr(ops, "choose", noting)
    reasons(alone(dropout).train(training))
    assert set(asked) == {training and dropout > 0}


def test_dropout_is_the_last_calls() -> None:
    model = alone(0.5)
    seen = model.base_model.model[0].__dict__
    model(X)
    assert seen[SEEN].dropout
    model.eval()(X)
    assert not seen[SEEN].dropout


def test_the_guess_counts_on_siblings_only_where_one_adapter_is_active() -> None:
    model = fastlora.accelerate(make_model())
    assert all("x read once with" in reason for reason in reasons(model))
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    assert all("could not run" in reason for reason in reasons(model))


def test_an_adapter_that_is_not_used_stands_in_nobodys_way_but_a_mixed_batchs() -> None:
    model = alone()
    model.add_adapter("second", model.peft_config["default"])
    layer = model.base_model.model[0]
    layer.lora_A["second"].register_forward_hook(lambda *_: None)
    assert "hook" not in reason_of(model)
    layer(X)
    assert "hook" not in reason_of(model)
    layer(X, adapter_names=["default"] * 7)
    assert reason_of(model).endswith("; from now on PEFT's own forward: adapter 'second' carries a hook")


def test_the_choice_is_asked_as_the_last_call_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """For siblings where the family ran and still would; else for the layer alone."""
    asked: list[tuple[str, Any]] = []
    for name in ("choose", "choose_shared"):
        own = getattr(lora_linear, name)

        def noting(x: Any, weight: Any, *rest: Any, own: Any = own, name: str = name, **mode: Any) -> Any:
            asked.append((name, weight))
            return own(x, weight, *rest, **mode)

        monkeypatch.setattr(lora_linear, name, noting)

    def how(model: nn.Module) -> set[tuple[str, int]]:
        asked.clear()
        reasons(model)
        first = [(name, weight) for name, weight in asked if name == "choose_shared"] or asked
        return {(name, id(weight)) for name, weight in first}

    model = fastlora.accelerate(make_model())
    attention_of(model).compile(backend="eager")
    assert {name for name, _ in how(model)} == {"choose"}  # before any call
    model = fastlora.accelerate(make_model())
    layers = [getattr(attention_of(model), name) for name in ("q_proj", "k_proj", "v_proj")]
    each = {("choose", id(layer.base_layer.weight)) for layer in layers}
    with torch.inference_mode():
        model(X.clone())
    assert how(model) == each
    model(X)
    assert how(model) == {("choose_shared", id(layers[0].base_layer.weight))}
    twin = copy.deepcopy(layers[1])  # without its family, and with what its last call was
    assert "x read" not in reason_of(twin)
    layers[0].__dict__[siblings.KEY].dissolve("for a test")
    assert how(model) == each


@needs_native
def test_what_multiplies_on_a_cpu_is_told_where_the_cpus_own_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = alone()
    for forced in ("cpu", "reference"):
        monkeypatch.setattr(ops, "forced", forced)
        model(X)
        assert ("; x Wᵀ by native C++, a few rows" in reason_of(model)) is (forced == "cpu")


def test_a_frozen_layers_choice_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, choose = frozen_called(), [], frozen_linear.choose
    monkeypatch.setattr(frozen_linear, "choose", lambda *case: asked.append(case[2]) or choose(*case))
    reason_of(model)
    assert asked == [False, True]  # forward, then backward


def test_a_layer_that_was_not_swapped() -> None:
    model = make_model()
    assert set(fastlora.report(model)) == {
        (f"base_model.model.0.{name}", "peft", "not accelerated: call fastlora.accelerate(model)")
        for name in ("q_proj", "k_proj", "v_proj")
    }
    attention_of(model).k_proj.base_layer.weight.requires_grad_()
    fastlora.accelerate(model)
    assert type(attention_of(model).q_proj) is FusedLinear
    assert fastlora.report(model)[1][1:] == ("peft", "the base weight or bias is trained")


def test_a_table_whose_columns_are_as_wide_as_their_widest_cell() -> None:
    found = Report([LayerReport("a long name", "cpu", "why"), LayerReport("b", "reference", "a long reason")])
    assert str(found).splitlines() == [
        "name         implementation  reason",
        "a long name  cpu             why",
        "b            reference       a long reason",
    ]


def test_another_backward_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = alone()
    model(X)
    assert "; backward " not in reason_of(model)
    without = {key: value for key, value in ops.implementations.items() if key[0] != "lora_linear_backward"}
    reference_only = {key: value for key, value in ops.implementations.items() if key[1] == "reference"}
    monkeypatch.setattr(ops, "implementations", without | reference_only)
    table.choices.clear()
    implementation, reason = fastlora.report(model)[0][1:]
    assert ("; backward reference: " in reason) is (implementation != "reference")


def test_the_loss_tells_its_own_reason() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    loss = SimpleNamespace(describe=lambda replaced: ("fused", f"replaced: {replaced}"))
    model[0].__dict__[model_loss.KEY] = loss
    assert fastlora.report(model) == [("0.loss", "fused", "replaced: False")]
    model[0].forward = model[0].forward
    assert fastlora.report(model) == [("0.loss", "fused", "replaced: True")]
    assert fastlora.report(model[0])[0].name == "loss"
    model.compile(backend="eager")
    assert fastlora.report(model)[0].reason == "compiled: not observed; in its last eager call replaced: True"


def test_of_two_layers_one_is_compiled() -> None:
    config = peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    model = fastlora.accelerate(
        peft.get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)), config)
    )
    model.base_model.model[1].compile(backend="eager")
    assert [reason.startswith("compiled: not observed") for reason in reasons(model)] == [False, True]


def test_a_weight_that_lies_the_other_way_is_looked_at_as_a_linears() -> None:
    base = Conv1D(8, WIDTH)
    assert linear_weight(base).shape == linear_weight(nn.Linear(WIDTH, 8)).shape == (8, WIDTH)
