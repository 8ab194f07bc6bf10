"""peft/mixed.py's parts: whose names are handed out, when rows are sorted anew, what is refused before anything runs, and what a block remembers."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft_models import peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.peft import mixed
from fastlora.peft.mixed import BASE, CHECKPOINT, RowNames

K, N = 8, 6


def lone(*others: str) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)
    for name in others:
        model.add_adapter(name, config)
    return fastlora.accelerate(model)


def test_rows_are_sorted_once_for_the_same_adapters_layout_and_mode() -> None:
    names, x = RowNames(["b", "a"], [2, 1]), torch.ones(2, 3, K)
    first = names.groups(("a", "b"), x)
    assert names.groups(("a", "b"), torch.zeros(2, 1, K)) is first
    by_token = names.groups(("a", "b"), torch.ones(1, 3, K))
    assert by_token is not first and names.groups(("a", "b"), torch.ones(1, 3, K)) is by_token
    assert names.groups(("b",), x) is not first
    with torch.inference_mode():
        assert names.groups(("a", "b"), x) is not first
    assert mixed.groups_of(names, ["a", "b"], x) is first
    plain = mixed.groups_of(["b", "a"], ["a", "b"], x)
    assert plain is mixed.groups_of(("b", "a"), ("a", "b"), x) and plain is not first


def test_names_that_are_no_list_are_pefts_to_refuse() -> None:
    """Of LoRA; a tuner that knows no names is told here."""
    tuner = lone("other").base_model
    asked: list[Any] = []

    class Own(type(tuner)):  # type: ignore[misc]
        def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> str:
            asked.append(kwargs["adapter_names"])
            return "PEFT's"

    tuner.__class__ = Own
    assert mixed.enable(tuner, adapter_names="default") == "PEFT's" and asked == ["default"]
    bare = SimpleNamespace(peft_config={"default": None}, model=nn.Linear(K, N), training=False)
    with pytest.raises(TypeError, match="^adapter_names: expected a list with an adapter for each row, got str"):
        mixed.enable(bare, adapter_names="default")


@pytest.mark.parametrize("training", [False, True])
def test_a_model_in_training_remembers_names_for_its_checkpoints(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lone("other").train(training)
    for name in ("_remembering", "_handing_out"):
        monkeypatch.setattr(mixed, name, lambda *given, name=name: (name, given[-1]))
    layer = model.base_model.model[0]
    found = mixed.enable(model.base_model, adapter_names=["other", BASE])
    assert found == ("_remembering" if training else "_handing_out", {layer: ("other", BASE)})


def test_a_compiled_model_of_a_method_without_names_says_that(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(peft_type=SimpleNamespace(value="BOFT"))
    tuner = SimpleNamespace(peft_config={"default": config}, model=nn.Linear(K, N), training=False)
    with pytest.raises(ValueError, match="PEFT ignores them with BOFT, and no layer has an adapter of that name"):
        mixed.enable(tuner, adapter_names=["default"])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match="PEFT ignores them with BOFT, and the model is compiled as a whole"):
        mixed.enable(tuner, adapter_names=["default"])


def test_a_generation_names_each_of_its_rows_and_an_encoders_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(K, N)), "decoder": nn.Linear(K, N)})
    layers = [model["encoder"][0], model["decoder"]]
    asked: list[Any] = []
    monkeypatch.setattr(mixed, "_get_encoder", lambda one: asked.append(one) or one["encoder"])
    assert mixed._given(model, layers, ("a", "b"), 1) == dict.fromkeys(layers, ("a", "b")) and asked == []
    many = mixed._given(model, layers, ("a", "b"), 2)
    assert many == {layers[0]: ("a", "b"), layers[1]: ("a", "a", "b", "b")}
    monkeypatch.setattr(mixed, "_get_encoder", lambda one: None)
    assert mixed._given(model, layers, ("a",), 2) == dict.fromkeys(layers, ("a", "a"))


def test_what_cannot_train_several_adapters_at_once_is_refused() -> None:
    model, names = lone("other"), RowNames(["other", "default"], [1, 1])
    layer = model.base_model.model[0]
    with mixed.training(model.base_model, type(layer), names):
        assert mixed.names_of(layer) is names
    with pytest.raises(ValueError, match="^model: expected LoRA layers of linear layers alone, each fused"):
        mixed.training(model.base_model, nn.Bilinear, names)
    with pytest.raises(ValueError, match=r"^names=\('other', 'third'\): expected adapters of the model"):
        mixed.training(model.base_model, type(layer), RowNames(["other", "third"], [1, 1]))


def test_every_name_must_be_some_layers() -> None:
    layers = [SimpleNamespace(adapter_layer_names=("held", "other"), held=dict.fromkeys(held)) for held in ("ab", "bc")]
    for names, known in (("abc", True), (["a", BASE], True), ("abd", False), ("d", False), ([BASE], True)):
        assert mixed._are_known(names, layers) is known
    assert mixed._are_known("a", []) is False


def test_blocks_that_are_checkpointed_remember_and_others_do_not() -> None:
    block, other, bare, plain = (nn.Identity() for _ in range(4))
    model, layer = nn.Sequential(block, other, plain), nn.Linear(K, N)
    block.gradient_checkpointing, other.gradient_checkpointing = True, False  # type: ignore[assignment]
    bare.gradient_checkpointing = True  # type: ignore[assignment]
    asked: list[Any] = []

    def checkpoint(forward: Any, *inputs: Any) -> Any:
        asked.append(mixed.names_of(layer))
        return forward(*inputs)

    for one in model:
        one.__dict__[CHECKPOINT] = checkpoint
    model.append(bare)
    with pytest.raises(RuntimeError), mixed._remembering(model, {layer: ("a",)}):
        assert mixed.names_of(layer) == ("a",) and CHECKPOINT not in bare.__dict__
        assert other.__dict__[CHECKPOINT] is plain.__dict__[CHECKPOINT] is checkpoint
        kept = block.__dict__[CHECKPOINT]
        raise RuntimeError
    assert block.__dict__[CHECKPOINT] is checkpoint and mixed.names_of(layer) is None
    assert kept(lambda x: (x, mixed.names_of(layer)), 3) == (3, ("a",)) and asked == [None]


def test_a_layer_that_asks_by_name_of_another_kind_leaves_all_to_peft() -> None:
    model, _ = peft_model(modules_to_save=["norm"])
    fastlora.accelerate(model)
    assert mixed._layers(model.base_model.model, mixed.ByRow) == []
    model, _ = peft_model()
    fastlora.accelerate(model)
    assert len(mixed._layers(model.base_model.model, mixed.ByRow)) > 2


def test_what_is_computed_again_in_a_backward_is_missed_where_it_had_names() -> None:
    for seen_mixed in (False, True):
        mixed.require_names(seen_mixed)  # in a forward
        calls: list[bool] = []

        def forward(x: torch.Tensor, seen: bool = seen_mixed, calls: list[bool] = calls) -> torch.Tensor:
            if calls:
                mixed.require_names(seen)
            calls.append(seen)
            return x.exp()

        y = checkpoint(forward, torch.ones(3, requires_grad=True), use_reentrant=False)
        with pytest.raises(RuntimeError, match="without the names") if seen_mixed else nullcontext():
            y.sum().backward()
