"""evaluate and generate: every figure over the same rows, every answer to the tokens that the loss saw, wrong options by name."""

import logging
from typing import Any

import pytest
import tiny
import torch
from transformers import LlamaForCausalLM

from fastlora import evaluation, generation
from fastlora.data.examples import DataError, Example
from fastlora.data.prompts import encode_prompt
from fastlora.data.rows import encode
from fastlora.evaluation import evaluate
from fastlora.generation import generate
from fastlora.models import load_model

SHORT = Example("The cat runs. What does the cat do?", " It runs.", "data:1")
LONG = Example("The owl hides. The fox sings. " * 5 + SHORT.prompt, " It hides.", "data:2")


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    with tiny.on_cpu():
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple[Any, Any]:
    return load_model(str(tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")))


@pytest.fixture
def seen(loaded, monkeypatch) -> list[list[int]]:
    """The prompts that the model answers, without their padding."""
    prompts: list[list[int]] = []

    def answer(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        prompts.extend(ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
        return original(self, input_ids=input_ids, attention_mask=attention_mask, **options)

    original = LlamaForCausalLM.generate
    monkeypatch.setattr(LlamaForCausalLM, "generate", answer)
    return prompts


@pytest.mark.parametrize(
    ("truncation", "kept", "cut"), [("prompt", [LONG, SHORT], 1), ("completion", [SHORT], 0), ("drop", [SHORT], 0)]
)
def test_every_figure_is_over_the_same_rows(loaded, seen, monkeypatch, truncation, kept, cut):
    references: list[str] = []
    monkeypatch.setattr(evaluation, "rouge", lambda answers, given: references.extend(given) or {})
    result = evaluate(*loaded, [LONG, SHORT], max_length=40, truncation=truncation, max_new_tokens=2)
    rows = encode([LONG, SHORT], loaded[1], 40, truncation).rows
    assert (result.rows, result.dropped_rows, result.prompt_cut_rows) == (len(kept), 2 - len(kept), cut)
    assert result.tokens == sum(row.labelled for row in rows)
    assert references == [example.completion for example in kept]
    assert sorted(seen) == sorted(row.input_ids[: row.prompt_length] for row in rows)


def test_the_loss_is_over_the_rows_that_are_answered(loaded):
    whole = evaluate(*loaded, [SHORT], max_new_tokens=2)
    cut = evaluate(*loaded, [LONG, SHORT], max_length=40, truncation="drop", max_new_tokens=2)
    assert cut.loss == whole.loss and cut.exact_match == whole.exact_match and cut.rows == 1


def test_no_row_and_no_prompt_has_more_tokens_than_the_model_positions(loaded, seen, caplog):
    endless = Example("The owl hides. " * 200 + SHORT.prompt, " It runs.", "data:3")
    model, words = loaded
    positions = model.config.max_position_embeddings
    with caplog.at_level(logging.WARNING, "fastlora"):
        result = evaluate(model, words, [endless], max_length=4096, max_new_tokens=16)
        generate(model, words, [SHORT.prompt, endless.prompt], max_new_tokens=16)
    assert (result.rows, result.prompt_cut_rows) == (1, 1)
    assert [len(ids) for ids in seen] == [positions - 16, len(encode_prompt(words, SHORT.prompt)), positions - 16]
    assert all(ids[0] == words.bos_token_id and words.decode(ids).endswith(SHORT.prompt) for ids in seen)
    assert (
        f"cut the oldest tokens of 1 of 2 prompts (the first: prompts[1]): the number of the model's positions is {positions}"
        in caplog.text
    )


def test_a_prompt_is_cut_to_what_max_length_leaves(loaded, seen):
    model, words = loaded
    generate(model, words, [LONG.prompt], max_length=40, max_new_tokens=8)
    ids = encode_prompt(words, LONG.prompt)
    assert seen == [[words.bos_token_id, *ids[-31:]]]


def test_an_answer_ends_where_the_template_ends_a_turn(loaded):
    """The end of a turn is not always the tokenizer's end token, and training has taught no other."""
    model, words = loaded
    chat, template = [{"role": "user", "content": "The cat"}], words.chat_template
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|user|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    try:
        options = generation._options(model, words, 4, ["The cat", chat])
        assert options["eos_token_id"] == sorted([words.eos_token_id, words.convert_tokens_to_ids("<|user|>")])
        assert generation._options(model, words, 4, ["The cat"])["eos_token_id"] == [words.eos_token_id]
    finally:
        words.chat_template = template


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size", "max_length"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_counts_are_named(loaded, name, value):
    for function, data in ((generate, ["The cat"]), (evaluate, [SHORT])):
        with pytest.raises(ValueError, match=f"{name}={value!r}: expected an integer, at least"):
            function(*loaded, data, **{name: value})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("The cat", "prompts is a string: expected a list"),
        ([5], r"prompts\[0\]: expected a text or a list of messages, got int"),
        (["The cat", []], r"prompts\[1\]: expected a text or a list of messages"),
        ([["The cat"]], r"prompts\[0\]: messages\[0\]: expected an object whose role and content are strings"),
        (["\udcff"], r"prompts\[0\]: .*surrogates not allowed"),
        ([[{"role": "user"}]], r"prompts\[0\]: messages\[0\]: expected an object whose role and content"),
    ],
)
def test_prompts_that_cannot_be_answered_are_named(loaded, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(*loaded, prompts)


def test_an_empty_prompt_needs_a_token_that_opens_it(loaded, seen):
    model, words = loaded
    generate(model, words, [""], max_new_tokens=2)
    assert seen == [[words.bos_token_id]]
    bare = tiny.tokenizer()
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match=r"prompts\[1\] has no tokens: expected a text that is not empty"):
        generate(model, bare, ["The cat", ""])


def test_options_that_leave_nothing_are_named(loaded):
    with pytest.raises(ValueError, match=r"max_new_tokens=64 leaves nothing to the prompt: max_length is 64"):
        generate(*loaded, ["The cat"], max_length=64)
    with pytest.raises(ValueError, match=r"max_new_tokens=256 leaves .*: the number of the model's positions is 256"):
        evaluate(*loaded, [SHORT], max_new_tokens=256)
    with pytest.raises(ValueError, match="max_length=1: expected an integer, at least 2"):
        evaluate(*loaded, [SHORT], max_length=1)
    with pytest.raises(ValueError, match="limit=0"):
        evaluate(*loaded, [SHORT], limit=0)
    with pytest.raises(ValueError, match="at least one row"):
        evaluate(*loaded, [])
    with pytest.raises(DataError, match="data:9: .*surrogates not allowed"):
        evaluate(*loaded, [Example("\ud800", "a", "data:9")])
