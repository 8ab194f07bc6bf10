"""A batch with an adapter a row, in training: as each row by itself, dropout and checkpointed activations included."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft_models import ATTENDED, IDS, a_pair, peft_model, q_proj  # noqa: F401  (a fixture)
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.peft import mixed
from fastlora.peft.layers import SEEN

NAMES = ["default", "__base__", "other"]
WEIGHTS = torch.linspace(-1, 1, 11 * 96).view(11, 96)  # of a row's logits in what is minimised


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def row_by_row(model: Any) -> dict[str, torch.Tensor]:
    """The gradients of both adapters, each from its own row alone; the base's row has none."""
    for row, name in enumerate(NAMES):
        if name != mixed.BASE:
            model.set_adapter(name)
            (model(input_ids=IDS[row : row + 1]).logits * WEIGHTS).sum().backward()
    model.set_requires_grad(["default", "other"])
    return gradients(model)


def all_at_once(model: Any, rows: list[int]) -> None:
    (model(input_ids=IDS[rows], adapter_names=[NAMES[row] for row in rows]).logits * WEIGHTS).sum().backward()


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
def test_gradients_are_those_of_each_row_alone(pair: Any, reentrant: bool | None) -> None:
    model, peer = (one.train() for one in pair)
    expected = row_by_row(peer)
    model.set_requires_grad(["default", "other"])
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    fastlora.accelerate(model)
    block = model.base_model.model.model.layers[0]
    own = block.__dict__.get(mixed.CHECKPOINT)
    all_at_once(model, [2, 1, 0])
    found = gradients(model)
    assert q_proj(model).__dict__[SEEN].mixed and block.__dict__.get(mixed.CHECKPOINT) is own
    assert found.keys() == expected.keys() and len(found) == 2 * 2 * 7 * 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    # Two forwards, and then both backwards: each knows its own names.
    outs = [(model(input_ids=IDS[[row]], adapter_names=[NAMES[row]]).logits * WEIGHTS).sum() for row in (0, 2)]
    sum(outs).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    assert mixed.under_way == 0


def test_checkpointing_draws_the_same_dropout_again() -> None:
    model, _ = peft_model(lora_dropout=0.5)
    model.add_adapter("other", LoraConfig(r=3, lora_dropout=0.2, target_modules="all-linear", init_lora_weights=False))
    model.set_requires_grad(["default", "other"])
    fastlora.accelerate(model.train())
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        all_at_once(model, [0, 1, 2])
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_what_somebody_else_checkpoints_is_not_computed_without_its_names(pair: Any) -> None:
    model, _ = pair
    model.train().set_requires_grad(["default", "other"])
    fastlora.accelerate(model)
    with model._enable_peft_forward_hooks(adapter_names=NAMES):
        x = model.get_input_embeddings()(IDS).requires_grad_()
        y = checkpoint(q_proj(model), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="adapter_names: a layer is computed again in the backward"):
        y.sum().backward()


OTHERS: dict[str, dict[str, Any]] = {
    "a module that is saved whole": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj", "down_proj"]},
    "tokens": {"trainable_token_indices": list(range(5, 60)), "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_left_to_peft_has_its_rows_in_training_too(kind: str) -> None:
    """PEFT refuses the names there, though its modules take them."""
    model, _ = peft_model(**OTHERS[kind])
    torch.manual_seed(3)
    other = {"trainable_token_indices": list(range(60, 90))} if kind == "tokens" else {}
    model.add_adapter("other", LoraConfig(r=3, **{**OTHERS[kind], **other}, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    peer = copy.deepcopy(model).train()
    expected = row_by_row(peer)
    model.set_requires_grad(["default", "other"])
    fastlora.accelerate(model.train())
    tuner = model.base_model
    all_at_once(model, [2, 1, 0])
    found = gradients(model)
    assert tuner.training and found.keys() == expected.keys() and len(found) > 2 * 2 * 2 * 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * max(1.0, gradient.abs().max().item()))
    with pytest.raises(ValueError, match="typo"):
        model(input_ids=IDS, adapter_names=["default", "typo", "other"])
    assert tuner.training
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="^adapter_names: .* has no names once a block is computed again"):
        model(input_ids=IDS, adapter_names=["default"] * 3)


@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
def test_the_loss_without_logits(head: bool) -> None:
    """`loss=True`: of padded rows, whose padding stays; and where the head has adapters, too, the model's own."""
    targets = ["q_proj", "v_proj", "down_proj", *["lm_head"] * head]
    model, _ = peft_model(target_modules=targets)
    model.add_adapter("other", LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    model.train()
    peer = fastlora.accelerate(copy.deepcopy(model))
    fastlora.accelerate(model, loss=True, fuse=True)
    labels = IDS.masked_fill(ATTENDED == 0, -100)
    given: Any = {"input_ids": IDS, "attention_mask": ATTENDED, "labels": labels}
    for names in (None, NAMES, ["other"] * 3, None):  # the path is chosen by the first
        found = []
        for each in (model, peer):
            each.set_requires_grad(["default", "other"])
            out = each(**given) if names is None else each(**given, adapter_names=names)
            out.loss.backward()
            found.append((out, gradients(each)))
        (ours, mine), (own, its) = found
        torch.testing.assert_close(ours.loss, own.loss, rtol=1e-5, atol=1e-6)
        assert (ours.logits is None) is (names is None or not head)
        for name, gradient in its.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5)
