"""peft/prompts.py: which models' class is swapped, what is said of those that are not, and which forward a call runs."""

import warnings
from typing import Any

import pytest
import torch
from peft import (
    MultitaskPromptTuningConfig,
    PeftModelForCausalLM,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from prompted_models import VOCABULARY, P, prompted
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import fastlora
from fastlora.peft import prompts
from fastlora.peft.prompts import FORWARDS, KEY
from fastlora.swap import is_derived

BERT = BertConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCABULARY
)
T5 = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0)
IDS = torch.arange(1, 8)[None]


CALLER = compile("fastlora.accelerate(model)", "caller.py", "exec")


def said(model: Any) -> list[warnings.WarningMessage]:
    """What `accelerate` says."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        exec(CALLER, {"fastlora": fastlora, "model": model})
    return [one for one in found if "fastlora" in str(one.message) or "PEFT uses" in str(one.message)]


def test_a_class_that_is_left_to_peft_is_named_where_accelerate_was_called() -> None:
    model = get_peft_model(
        BertForQuestionAnswering(BERT), PromptTuningConfig(task_type="QUESTION_ANS", num_virtual_tokens=P)
    )
    (one,) = said(model)
    assert str(one.message) == "fastlora.accelerate leaves the prompts of a PeftModelForQuestionAnswering to PEFT"
    assert one.filename == "caller.py" and not is_derived(model) and KEY not in model.__dict__


def test_a_model_is_swapped_once_and_nothing_is_said() -> None:
    model = prompted("prompt tuning")
    assert said(model) == []
    kind, state = type(model), model.__dict__[KEY]
    assert is_derived(model) and issubclass(kind, PeftModelForCausalLM)
    assert said(model) == []
    assert type(model) is kind and model.__dict__[KEY] is state
    prompts.detach(model)
    assert type(model) is PeftModelForCausalLM and KEY not in model.__dict__
    prompts.detach(model)
    assert type(model) is PeftModelForCausalLM


WASTEFUL = {
    "prompt tuning": PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P),
    "P-tuning": PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, encoder_hidden_size=8),
}
THRIFTY = {
    "one half": PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=1),
    "a prefix": PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P),
    "of tasks": MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_tasks=2),
}


@pytest.mark.parametrize("kind", [*WASTEFUL, *THRIFTY])
def test_rows_that_peft_never_uses_are_told_where_there_are_some(kind: str) -> None:
    model = get_peft_model(T5ForConditionalGeneration(T5), {**WASTEFUL, **THRIFTY}[kind])
    found = said(model)
    assert len(found) == (kind in WASTEFUL) and is_derived(model) and isinstance(model, PeftModelForSeq2SeqLM)
    for one in found:
        assert one.filename == "caller.py" and str(one.message) == (
            f"adapter 'default' has {2 * P} rows, of which PEFT uses {P}, before the encoder's input; the others are never"
            " trained: num_transformer_submodules=1 in its config leaves them out"
        )


def test_a_causal_prompt_of_two_halves_is_nothing_to_tell() -> None:
    """PEFT makes as many rows as are asked for, and uses them all."""
    model = prompted("prompt tuning")
    model.peft_config["default"].num_transformer_submodules = 2
    assert said(model) == []


def test_generation_is_ours_where_there_is_one() -> None:
    assert "prepare_inputs_for_generation" in vars(prompts.with_prompts(PeftModelForCausalLM))
    seq2seq, classes = (
        vars(prompts.with_prompts(one)) for one in (PeftModelForSeq2SeqLM, PeftModelForSequenceClassification)
    )
    assert "generate" in seq2seq and "prepare_inputs_for_generation" not in seq2seq
    assert "generate" not in classes and "forward" in classes


def test_arguments_by_place_and_those_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = fastlora.accelerate(prompted("prompt tuning")), []
    monkeypatch.setitem(FORWARDS, PeftModelForCausalLM, lambda *args: seen.append(args) or "ours")
    mask = torch.ones_like(IDS)
    assert model(IDS, mask, labels=None, position_ids=IDS) == "ours"
    ((one, plain, state, given),) = seen
    assert one is model and plain is PeftModelForCausalLM and state is model.__dict__[KEY]
    assert (
        given.keys() == {"input_ids", "attention_mask", "position_ids"}
        and given["input_ids"] is IDS
        and given["attention_mask"] is mask
    )


@pytest.mark.parametrize("why", ["no state", "another method"])
def test_what_is_not_ours_runs_pefts_forward(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastlora.accelerate(prompted("prompt tuning"))
    expected = model(IDS).logits
    monkeypatch.setitem(FORWARDS, PeftModelForCausalLM, None)
    if why == "no state":
        model.__dict__.pop(KEY)
    else:
        monkeypatch.setattr(prompts, "_is_known", lambda config: False)
    out = model(IDS, labels=None).logits  # with the prompt's own, as PEFT has it
    torch.testing.assert_close(out[:, P:], expected)


def test_a_twin_with_another_active_adapter_writes_nothing_into_the_model() -> None:
    model = prompted("prompt tuning")
    model.add_adapter("other", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P + 1))
    twin = prompts._as_if_active(model, "other")
    assert prompts._as_if_active(model, "default") is model and twin is not model and type(twin) is type(model)
    assert twin.active_adapter == "other" and model.active_adapter == "default"
    assert twin.get_prompt(1).shape[1] == P + 1


def test_a_kept_prompt_asks_for_one_logit_where_the_model_can(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastlora.accelerate(prompted("prompt tuning")).eval()
    base, given = type(model.base_model), []
    forward = base.forward

    def with_logits_to_keep(self: Any, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        given.append({"logits_to_keep": logits_to_keep, **kwargs})
        return forward(self, logits_to_keep=logits_to_keep, **kwargs)

    def without(self: Any, inputs_embeds: Any = None, past_key_values: Any = None, use_cache: Any = None) -> Any:
        given.append({"inputs_embeds": inputs_embeds})
        return forward(self, inputs_embeds=inputs_embeds, past_key_values=past_key_values, use_cache=use_cache)

    keys = []
    for function in (with_logits_to_keep, without):
        monkeypatch.setattr(base, "forward", function)
        state = model.__dict__[KEY]
        state.kept.clear()
        keys.append(prompts.kept_keys(model, state, prompts.find_prompts(model, 1, None, None)))
    assert given[0]["logits_to_keep"] == 1 and given[0]["use_cache"] is True and "logits_to_keep" not in given[1]
    for one, other in zip(*keys[0], *keys[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_classifier_is_swapped_too() -> None:
    model = get_peft_model(
        BertForSequenceClassification(BERT), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
    )
    assert said(model) == [] and is_derived(model)


def test_a_call_without_tokens_is_refused() -> None:
    model = fastlora.accelerate(prompted("prompt tuning"))
    with pytest.raises(ValueError, match="^input_ids: got None, expected the batch's tokens, or inputs_embeds"):
        model(attention_mask=torch.ones_like(IDS))
    model(inputs_embeds=model.word_embeddings(IDS))
