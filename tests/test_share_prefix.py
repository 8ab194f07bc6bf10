"""`accelerate(model, share_prefix=True)`: what rows begin with runs once; logits, losses and gradients are the model's own."""

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from prompted_models import FAMILIES, IGNORE, VOCABULARY, llama
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, MistralConfig, MistralForCausalLM

import fastlora
from fastlora import metrics, sharing
from fastlora.config import TrainConfig
from fastlora.language_model_loss import LanguageModelLoss
from fastlora.train import train

TEMPLATE, OWN = 14, (5, 3, 6, 4)


def batch(left: bool = False) -> dict[str, Tensor]:
    """Rows that begin with the same 14 tokens, and predict 2 to 5 of their own; the last begins otherwise."""
    drawn = torch.Generator().manual_seed(1)
    template, width = torch.randint(5, VOCABULARY, (TEMPLATE,), generator=drawn), TEMPLATE + max(OWN)
    found = {
        "input_ids": torch.zeros(4, width, dtype=torch.long),
        "attention_mask": torch.zeros(4, width, dtype=torch.long),
    }
    found["labels"] = torch.full((4, width), IGNORE)
    for row, own in enumerate(OWN):
        text = torch.cat((template, torch.randint(5, VOCABULARY, (own,), generator=drawn)))
        text[0] += row == 3
        there = slice(width - len(text), None) if left else slice(0, len(text))
        found["input_ids"][row, there], found["attention_mask"][row, there] = text, 1
        found["labels"][row, there][TEMPLATE + 1 :] = text[TEMPLATE + 1 :]
    return found


def lora(base: nn.Module, **more: Any) -> Any:
    torch.manual_seed(2)
    gpt2 = not hasattr(base, "model")
    targets = ["c_attn", "c_proj", "c_fc"] if gpt2 else "all-linear"
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=gpt2, **more)
    return get_peft_model(base, config)


def both(make: Any = llama, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = lora(make().to(dtype)).to(dtype)
    plain = copy.deepcopy(model)
    return fastlora.accelerate(model, share_prefix=True, **options), plain


def state_of(model: nn.Module) -> sharing.State:
    (found,) = [module.__dict__[sharing.KEY] for module in model.modules() if sharing.KEY in module.__dict__]
    return found


def assert_same(model: Any, plain: Any, given: dict[str, Tensor], tolerance: float = 1e-5) -> Any:
    """tolerance: of the largest; Llama's norms and transformers' loss are float32 in any model."""
    outs = [one(**given) for one in (model, plain)]
    real = given["attention_mask"] == 1
    for one in (model, plain):
        one.zero_grad()
    if outs[0].logits is not None:
        logits, own = (out.logits[real] for out in outs)
        assert (logits - own).abs().max() <= tolerance * own.abs().max()
    assert torch.allclose(outs[0].loss.double(), outs[1].loss.double(), rtol=tolerance)
    for out in outs:
        out.loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).abs().max() <= tolerance * theirs.grad.abs().max(), name
    return outs[0]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(
    "options", [{}, {"loss": True}, {"fuse": True, "frozen": True}, {"fuse": True, "loss": True}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_values(family: str, options: dict[str, bool], left: bool) -> None:
    model, plain = both(FAMILIES[family], **options)
    given = batch(left)
    if left:
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    out = assert_same(model.train(), plain.train(), given)
    assert (out.logits is None) == options.get("loss", False)
    way, reason = state_of(model).last
    assert way == "tree" and f"{given['attention_mask'].sum() - 2 * TEMPLATE} run" in reason
    (told,) = [entry for entry in fastlora.report(model) if entry.name.endswith("share_prefix")]
    assert (told.implementation, told.reason) == (way, reason)


def test_the_models_own_attention() -> None:
    model, plain = both()
    for one in (model, plain):
        one.base_model.model.set_attn_implementation("eager")
    assert_same(model, plain, batch())
    assert state_of(model).last[0] == "mask"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, plain = both(dtype=dtype, fuse=True, frozen=True, loss=True)
    assert_same(model.train(), plain.train(), batch(), {torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype])
    assert state_of(model).last[0] == "tree"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, plain = both()
    for one in (model, plain):
        one.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        one.enable_input_require_grads()
    assert_same(model, plain, batch())
    assert state_of(model).last[0] == "tree"


def test_at_inference() -> None:
    model, plain = (one.eval() for one in both())
    given = batch()
    del given["labels"]
    real = given["attention_mask"] == 1
    with torch.no_grad():
        for kept in (0, 2):
            ours, own = (one(**given, logits_to_keep=kept).logits for one in (model, plain))
            there = real[:, -kept:] if kept else real
            assert (ours[there] - own[there]).abs().max() <= 1e-5 * own.abs().max()
        assert state_of(model).last[0] == "tree"
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        assert torch.equal(
            model.generate(**batch(True) | {"labels": None}, **options),
            plain.generate(**batch(True) | {"labels": None}, **options),
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": batch()["input_ids"].where(batch()["attention_mask"] == 1, IGNORE)}, "no rows begin"),
        ({"input_ids": torch.arange(5, 85).view(4, 20), "labels": None}, "no rows begin"),
        ({"use_cache": True}, "use_cache"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"return_dict": False}, "return_dict"),
        ({"attention_mask": torch.ones(4, 1, 20, 20).bool().tril()}, "4 dimensions"),
        ({"attention_mask": None, "position_ids": torch.arange(20).remainder(10).expand(4, 20)}, "several texts"),
        ({"adapter_names": ["default"] * 4}, "adapters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_runs_as_before(change: dict[str, Any], reason: str) -> None:
    model, plain = both()
    given = {**batch(), **change}
    given["labels"] = None if "adapter_names" in change else given["labels"]
    if "adapter_names" in change:
        model, plain = model.eval(), plain.eval()
    ours, own = (one(**given) for one in (model, plain))
    assert reason in state_of(model).last[1] and state_of(model).last[0] == "apart"
    real = (
        given["attention_mask"] == 1
        if given["attention_mask"] is not None and given["attention_mask"].dim() == 2
        else ...
    )
    ours, own = (
        (out[1] if given["labels"] is not None else out[0]) if isinstance(out, tuple) else out.logits
        for out in (ours, own)
    )
    assert torch.allclose(ours[real], own[real])


def test_a_label_of_padding() -> None:
    model, plain = both()
    given = batch()
    given["labels"][1, -1] = 7
    assert torch.allclose(model(**given).loss, plain(**given).loss) and "padding" in state_of(model).last[1]


def test_layers_that_see_a_window() -> None:
    def mistral(window: int) -> Any:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return MistralForCausalLM(
            MistralConfig(**sizes, num_key_value_heads=2, vocab_size=VOCABULARY, sliding_window=window)
        )

    model, plain = both(functools.partial(mistral, 16))
    assert_same(model, plain, batch())
    assert "sees 16 tokens" in state_of(model).last[1]
    model, plain = both(functools.partial(mistral, 64))
    assert_same(model, plain, batch())
    assert state_of(model).last[0] == "tree"


def test_a_model_that_does_more_across_tokens() -> None:
    model, plain = both()
    for one in (model, plain):
        one.base_model.model.lm_head.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    given = batch()
    ours, own = (one(**given).logits for one in (model, plain))
    assert torch.equal(ours, own) and "logits are others" in state_of(model).last[1]


def test_full_fine_tuning_and_restoring() -> None:
    torch.manual_seed(0)
    model = llama().double()
    plain, kind = copy.deepcopy(model), type(model)
    fastlora.accelerate(model, share_prefix=True, loss=True)
    assert_same(model.train(), plain.train(), batch())
    fastlora.accelerate(model, fuse=True)  # what was asked for before stays
    assert_same(model, plain, batch())
    assert state_of(model).last[0] == "tree"
    assert type(copy.deepcopy(model)) is type(model)
    fastlora.restore(model)
    assert type(model) is kind and {type(one) for one in model.modules()} == {type(one) for one in plain.modules()}
    assert not any(sharing.KEY in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("every", [False, True], ids=["some tokens", "every token"])
def test_the_loss_of_the_training_loop(every: bool) -> None:
    """`LanguageModelLoss` asks for no loss of the model's, so that tokens that predict may be shared, too: each of their labels counts."""
    model, plain = both(dtype=torch.float32, fuse=True, frozen=True)
    given = batch()
    if every:
        given["labels"] = given["input_ids"].where(given["attention_mask"] == 1, IGNORE)
    losses = [LanguageModelLoss(one.train())(given) for one in (model, plain)]
    assert torch.allclose(*losses, rtol=1e-5)
    assert state_of(model).last == (
        "tree",
        f"80 tokens of rows, {int(given['attention_mask'].sum()) - 2 * TEMPLATE} run",
    )
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max(), name


def test_fastlora_train_trains_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, data = tiny.save_model(tmp_path / "base"), tmp_path / "data.jsonl"
    begin = "The horse runs. The dog sleeps. The cat sings."
    rows = [{**row, "prompt": f"{begin} {row['prompt']}"} for row in tiny.rows(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(model=base, data=data, output=tmp_path / "apart", lora_dropout=0.0, r=4, lr=1e-2, max_steps=6)
    ours = replace(config, output=tmp_path / "shared", share_prefix=True)
    with tiny.on_cpu():
        for one in (config, ours):
            train(one, progress=False)
    apart, shared = ([record["loss"] for record in metrics.read(one.output)] for one in (config, ours))
    assert shared == pytest.approx(apart, rel=1e-3) and apart[-1] < apart[0]
    assert "ran each for itself" not in caplog.text
    with pytest.raises(ValueError, match="share_prefix=True: expected accelerate=True"):
        replace(ours, accelerate=False)


def test_what_shares_nothing_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, data = tiny.save_model(tmp_path / "base"), tmp_path / "data.jsonl"
    rows = [{"prompt": prompt, "completion": " It runs."} for prompt in ("The dog runs.", "It sleeps.")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with tiny.on_cpu():
        train(
            TrainConfig(model=base, data=data, output=tmp_path / "out", share_prefix=True, max_steps=1), progress=False
        )
    assert "share_prefix: the last batch's rows ran each for itself" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_the_model_below_the_head_shares_for_whoever_asks_it(family: str, left: bool) -> None:
    model, plain = both(FAMILIES[family], loss=True)
    given = batch(left)
    real = given["attention_mask"] == 1
    places = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)  # GPT-2 alone would count padding
    asked = {**{name: given[name] for name in ("input_ids", "attention_mask")}, "position_ids": places}
    states = [one.get_base_model().base_model(**asked) for one in (model, plain)]
    ours, own = (one.last_hidden_state[real] for one in states)
    assert (ours - own).abs().max() <= 1e-5 * own.abs().max()
    weights = torch.randn(own.shape, generator=torch.Generator().manual_seed(4), dtype=own.dtype)
    for one in (ours, own):
        (one * weights).sum().backward()
    for (name, parameter), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert (parameter.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max(), name
    found = [line.implementation for line in fastlora.report(model) if line.name.endswith("share_prefix")]
    assert found[0] == "apart" and found[1:] in (["tree"], ["mask"])
    restored = fastlora.restore(model).get_base_model().base_model
    assert type(restored) is type(plain.get_base_model().base_model)


def test_attention_dropout_is_torchs() -> None:
    model, _ = both(functools.partial(llama, attention_dropout=0.5))
    model.train()(**batch())
    assert state_of(model).last[0] == "mask"


def test_an_encoder_has_no_use_for_it() -> None:
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    with pytest.raises(ValueError, match="share_prefix"):
        fastlora.accelerate(BertForSequenceClassification(config), share_prefix=True)
