"""A language model's head with an adapter: its loss from the labelled tokens only, without [tokens, vocabulary] logits, with PEFT's gradients."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import ATTENDED, IDS, a_pair, assert_as_near_as, llama  # noqa: F401  (a fixture)

import fastlora
from fastlora.language_model_loss import LanguageModelLoss
from fastlora.peft import FusedLinear, composed

LABELS = torch.where(torch.arange(11) < 4, -100, IDS)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def model_with_head(dtype=FLOAT32, **options):
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 3, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, **options})
    return get_peft_model(llama()[0].to(dtype), config).train()


def losses(model, autocast=None):
    model.zero_grad()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = model(input_ids=IDS, attention_mask=ATTENDED, labels=LABELS)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": out.loss.detach(), **grads}, out.logits


def loss_of(model):
    [entry] = [entry for entry in fastlora.report(model) if entry.name.endswith("loss")]
    return entry.implementation, entry.reason


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(FLOAT32, None), (BFLOAT16, None), (FLOAT32, BFLOAT16)],
    ids=["float32", "bfloat16", "autocast"],
)
def test_loss_and_gradients_equal_peft(dtype, autocast):
    model = model_with_head(dtype)
    exact, _ = losses(copy.deepcopy(model).double())
    eager, _ = losses(model, autocast)
    fastlora.accelerate(model, loss=True)
    ours, logits = losses(model, autocast)
    assert logits is None and loss_of(model)[0] == "fused"
    assert any("lm_head" in name for name in ours)
    assert torch.allclose(
        ours["loss"].double(), exact["loss"].double(), rtol=1e-5 if dtype is FLOAT32 and autocast is None else 4e-3
    )
    for each in (ours, eager, exact):  # assert_as_near_as has two parts: of the head, and of the rest
        each["logits"] = torch.cat(
            [each.pop(name).flatten() for name in list(each) if "lm_head" in name or name == "loss"][1:]
        )
    assert_as_near_as(ours, eager, exact)


def test_several_adapters_are_summed():
    model = model_with_head()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    eager, _ = losses(model)
    fastlora.accelerate(model, loss=True)
    ours, logits = losses(model)
    assert logits is None
    assert all(torch.allclose(ours[name], value, atol=1e-5) for name, value in eager.items())


def test_dropout_is_drawn_for_the_labelled_tokens_and_replayed():
    model = fastlora.accelerate(model_with_head(lora_dropout=0.4), loss=True)
    losses(model)  # the path is chosen
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(losses(model)[0])
    first, again, other = results
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not torch.equal(other["loss"], first["loss"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "the head has a DoRA adapter"),
        ({"lora_bias": True, "init_lora_weights": True}, "the head has a bias that is trained, or B one"),
    ],
)
def test_what_it_cannot_do_is_told_and_right(options, words):
    model = model_with_head(**options)
    eager, _ = losses(model)
    fastlora.accelerate(model, loss=True)
    ours, logits = losses(model)
    assert logits is None and loss_of(model)[0] == "labelled" and words in loss_of(model)[1]
    assert all(torch.allclose(ours[name], value, atol=1e-5) for name, value in eager.items())


def test_a_head_that_changes_between_calls():
    """Each call looks again: merged, disabled, hooked, several with dropout."""
    model = fastlora.accelerate(model_with_head(lora_dropout=0.2), loss=True)
    losses(model)
    head = model.base_model.model.lm_head
    assert type(head) is FusedLinear and head.cross_entropy_obstacle() is None
    with pytest.raises(ValueError, match=r"hidden: x is float64"):
        head.cross_entropy(torch.ones(2, 32).double(), torch.zeros(2, dtype=torch.int64))
    with model.disable_adapter():
        assert head.cross_entropy_obstacle() == "adapters are disabled"
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.2))
    model.base_model.set_adapter(["default", "other"])
    assert head.cross_entropy_obstacle() == "several adapters are active with dropout"
    out = model(input_ids=IDS, labels=LABELS)
    assert out.logits is None and loss_of(model)[0] == "labelled"
    model.base_model.set_adapter("default")
    handle = head.register_forward_hook(lambda *_: None)
    model(input_ids=IDS, labels=LABELS)
    assert "labelled" in loss_of(model)[0]
    handle.remove()
    model.merge_adapter()
    assert head.cross_entropy_obstacle() == "the adapter is merged"


def test_our_own_loss_of_a_model_takes_it_too(monkeypatch):
    """LanguageModelLoss, as `fastlora train` has it."""
    model = model_with_head()
    batch = {"input_ids": IDS, "attention_mask": ATTENDED, "labels": LABELS}
    expected = LanguageModelLoss(model)(batch)
    fastlora.accelerate(model)
    calls, own = [], composed.cross_entropy
    monkeypatch.setattr(composed, "cross_entropy", lambda *args: calls.append(1) or own(*args))
    loss = LanguageModelLoss(model)
    assert torch.allclose(loss(batch), expected, rtol=1e-5) and loss.path == "fused" and calls == [1]


def test_an_evaluation_has_its_logits():
    model = fastlora.accelerate(model_with_head(), loss=True)
    losses(model)
    with torch.no_grad():
        out = model.eval()(input_ids=IDS, labels=LABELS)
    assert out.logits.shape == (3, 11, 96)
