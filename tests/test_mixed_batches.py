"""peft/mixed.py: the names of a mixed batch reach every layer without a hook, in the thread that gave them, and PEFT's own context does the rest."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft_models import IDS, a_pair, logits, peft_model, q_proj  # noqa: F401  (a fixture)

import fastlora
from fastlora.peft import mixed
from fastlora.peft.layers import SEEN

NAMES = ["default", "__base__", "other"]


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The names of each call of PEFT's own context."""
    calls: list[Any] = []
    own = LoraModel._enable_peft_forward_hooks

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("adapter_names"))
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LoraModel, "_enable_peft_forward_hooks", noted)
    return calls


def test_names_reach_the_layers_without_hooks(pair: Any, walks: list[Any]) -> None:
    model, peer = pair
    expected = logits(peer, adapter_names=NAMES)
    fastlora.accelerate(model)
    walks.clear()
    hooked: list[int] = []
    layer = q_proj(model)
    handle = model.base_model.model.register_forward_pre_hook(
        lambda *_: hooked.append(len(layer._forward_pre_hooks)) or None
    )
    for names in (NAMES, tuple(NAMES)):
        torch.testing.assert_close(logits(model, adapter_names=names), expected, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert hooked == [0, 0] and walks == [] and mixed.under_way == 0
    assert layer.__dict__[SEEN].mixed
    torch.testing.assert_close(logits(model), logits(peer), rtol=1e-4, atol=1e-4)
    assert walks == [None, None] and not layer.__dict__[SEEN].mixed


def test_pefts_own_raises_what_it_raises(pair: Any, walks: list[Any]) -> None:
    model, peer = pair
    fastlora.accelerate(model)
    for one in (model, peer):
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): typo"):
            logits(one, adapter_names=["default", "typo", "other"])
    with pytest.raises(ValueError, match="typo; loaded are default, other, and __base__ is none"):
        logits(model, adapter_names=["typo"] * 3)
    with pytest.raises(ValueError, match="adapter_names"):
        logits(model, adapter_names=NAMES[:2])
    assert mixed.under_way == 0 and mixed.names_of(q_proj(model)) is None
    expected = logits(model)
    with pytest.raises(RuntimeError, match="on purpose"), model._enable_peft_forward_hooks(adapter_names=NAMES):
        assert mixed.under_way == 1 and mixed.names_of(q_proj(model)) == tuple(NAMES)
        raise RuntimeError("on purpose")
    assert mixed.under_way == 0 and torch.equal(logits(model), expected)


def test_the_inner_names_hold_inside_and_the_outer_behind(pair: Any) -> None:
    model, other = pair
    fastlora.accelerate(model)
    fastlora.accelerate(other)
    layer, stranger = q_proj(model), q_proj(other)
    with model._enable_peft_forward_hooks(adapter_names=NAMES):
        assert mixed.names_of(stranger) is None
        with other._enable_peft_forward_hooks(adapter_names=["other"] * 3):
            assert mixed.names_of(layer) == tuple(NAMES) and mixed.names_of(stranger) == ("other",) * 3
        with model._enable_peft_forward_hooks(adapter_names=["default"] * 3):
            assert mixed.names_of(layer) == ("default",) * 3
        assert mixed.names_of(layer) == tuple(NAMES) and mixed.names_of(stranger) is None


def test_threads_do_not_see_each_others_names(pair: Any) -> None:
    model, _ = pair
    fastlora.accelerate(model)
    expected, plain = logits(model, adapter_names=NAMES), logits(model)
    found: list[torch.Tensor] = []
    with model._enable_peft_forward_hooks(adapter_names=NAMES):
        thread = threading.Thread(target=lambda: found.append(logits(model)))
        thread.start()
        thread.join()
        torch.testing.assert_close(model.base_model.model(input_ids=IDS).logits, expected)
    torch.testing.assert_close(found[0], plain)


def test_generate_and_beams(pair: Any, walks: list[Any]) -> None:
    model, peer = pair
    fastlora.accelerate(model)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "adapter_names": NAMES}
    for beams in (1, 2):
        expected = peer.generate(input_ids=IDS, num_beams=beams, **options)
        walks.clear()
        assert torch.equal(model.generate(input_ids=IDS, num_beams=beams, **options), expected)
        assert walks == []


def test_what_else_is_asked_of_a_context_is_pefts(pair: Any, walks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair
    model.base_model.model.register_module("nothing", None)  # as a module without an optional part has it
    fastlora.accelerate(model)

    def is_ours(names: Any = NAMES, **more: Any) -> bool:
        walks.clear()
        with model._enable_peft_forward_hooks(adapter_names=names, **more):
            assert mixed.under_way == (not walks) and walks in ([], [names])
        return not walks

    assert is_ours() and is_ours(num_beams=None) and is_ours(num_beams=1)
    assert is_ours(["__base__"] * 3) and is_ours(["other"] * 3)
    assert is_ours(num_beams=2) and not is_ours(alora_offsets=[1, None, 2])
    with pytest.raises(TypeError, match="subscriptable"):
        is_ours({"default"})  # in no order
    assert walks == [{"default"}]
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not is_ours()
    model.base_model.model.model = torch.nn.DataParallel(model.base_model.model.model)
    assert not is_ours()  # its replicas run in other threads


def test_a_tuner_with_a_context_of_its_own_keeps_it() -> None:
    class Own(LoraModel):
        def _enable_peft_forward_hooks(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    model, _ = peft_model()
    model.base_model.__class__ = Own
    fastlora.accelerate(model)
    assert mixed.METHOD not in model.base_model.__dict__
    fastlora.restore(model)


def test_modules_of_another_kind_are_left_to_peft(walks: list[Any]) -> None:
    model, _ = peft_model(modules_to_save=["lm_head"], target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    peer = copy.deepcopy(model.eval())
    fastlora.accelerate(model)
    expected = logits(peer, adapter_names=NAMES)
    walks.clear()
    torch.testing.assert_close(logits(model, adapter_names=NAMES), expected, rtol=1e-4, atol=1e-4)
    assert walks == [NAMES]


def test_copies_hand_names_to_layers_of_their_own_and_restored_models_to_none(pair: Any, walks: list[Any]) -> None:
    model, _ = pair
    fastlora.accelerate(model)
    expected = logits(model, adapter_names=NAMES)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with other._enable_peft_forward_hooks(adapter_names=NAMES):
            assert mixed.names_of(q_proj(other)) == tuple(NAMES) and mixed.names_of(q_proj(model)) is None
        assert torch.equal(logits(other, adapter_names=NAMES), expected)
    fastlora.restore(model)
    assert mixed.METHOD not in model.base_model.__dict__
    walks.clear()
    torch.testing.assert_close(logits(model, adapter_names=NAMES), expected, rtol=1e-4, atol=1e-4)
    assert walks == [NAMES]


def test_whatever_is_active_and_however_names_are_given(pair: Any, walks: list[Any]) -> None:
    model, peer = pair
    fastlora.accelerate(model)
    expected = logits(peer, adapter_names=NAMES)
    for active in ("other", ["default", "other"]):
        model.base_model.set_adapter(active)
        walks.clear()
        for names in (NAMES, tuple(NAMES)):
            torch.testing.assert_close(logits(model, adapter_names=names), expected, rtol=1e-4, atol=1e-4)
        assert walks == []


def test_no_rows_and_no_tokens(pair: Any) -> None:
    model, _ = pair
    fastlora.accelerate(model)
    model.add_adapter("dora", LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    fastlora.accelerate(model)
    layer = q_proj(model)
    for names, rows in (([], torch.zeros(0, 11, 32)), (["default", "dora"], torch.zeros(2, 0, 32))):
        with model._enable_peft_forward_hooks(adapter_names=names):
            assert layer(rows).shape == rows.shape
    with model._enable_peft_forward_hooks(adapter_names=[]), pytest.raises(ValueError, match="adapter_names"):
        layer(torch.zeros(1, 11, 32))
