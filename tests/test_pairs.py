"""An encoder-decoder's rows: what each side is, what counts, what is cut, and how rows are batched."""

from typing import Any

import encoder_decoders
import pytest
import tiny
import torch

from fastlora.data.examples import DataError, Example
from fastlora.data.lines import group_by_length, padded_batches, padded_tokens, without_labels
from fastlora.data.rows import Encoded, Pair, collate, count_tokens, encode, marked, reference, row_length
from fastlora.language_model_loss import IGNORE

KINDS = ["t5", "bart"]
LONG = Example("The cat runs. What does the cat do?", "It runs and sleeps.", "d.jsonl:1")
SHORT = Example("The dog", "It sings", "d.jsonl:2")


def encoded(tokenizer: Any, *examples: Example, max_length: int = 64, truncation: str = "prompt") -> Encoded:
    return encode(examples, tokenizer, max_length, truncation, encoder_decoder=True)


@pytest.mark.parametrize("kind", KINDS)
def test_each_side_is_as_the_tokenizer_frames_it_and_the_completion_counts(kind: str) -> None:
    words = encoder_decoders.tokenizer(kind)
    rows = encoded(words, LONG, SHORT).rows
    for row, example in zip(rows, (LONG, SHORT), strict=True):
        assert isinstance(row, Pair)
        assert row.input_ids == words(example.prompt)["input_ids"]
        assert row.labels == words(text_target=example.completion)["input_ids"]
        assert row.input_ids[-1] == row.labels[-1] == words.eos_token_id
        assert row.prompt_length == len(row.input_ids)
        assert row.labelled == row.completion_length == len(row.labels)  # the first of them, too
        assert row.tokens == len(row.input_ids) + len(row.labels)
        assert reference(example, row, words) == example.completion
    assert count_tokens(rows) == sum(row.tokens for row in rows)


def test_a_completion_that_the_tokenizer_does_not_end_is_ended() -> None:
    words = tiny.tokenizer()  # <s> opens every text, and nothing ends it
    (row,) = encoded(words, SHORT).rows
    assert row.input_ids == words(SHORT.prompt)["input_ids"]
    assert row.labels == [*words(SHORT.completion)["input_ids"], words.eos_token_id]


def test_a_tokenizer_may_frame_a_target_otherwise() -> None:
    """As mBART's and NLLB's do, which name another language there."""
    words = encoder_decoders.tokenizer("t5")
    taken: list[dict[str, Any]] = []

    class Named(type(words)):  # type: ignore[misc]
        def __call__(self, *args: Any, **given: Any) -> Any:
            taken.append(given)
            return super().__call__(*args, **given)

    words.__class__ = Named
    encoded(words, SHORT)
    assert {"text": "The dog", "verbose": False} in taken and {"text_target": "It sings", "verbose": False} in taken


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example([{"role": "user", "content": "a"}], "b", "d:1"), "d:1: an encoder-decoder has no chat template"),
        (Example("", "b", "d:2"), "d:2: an encoder-decoder reads a prompt: expected prompt and completion"),
        (Example("a", "", "d:3"), "d:3: completion: the tokenizer has no token for it"),
        (Example("a\ud800", "b", "d:4"), "d:4: .*surrogates not allowed"),
    ],
)
def test_what_is_no_pair_is_a_bad_line(example: Example, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encoded(encoder_decoders.tokenizer("t5"), example, SHORT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_side_that_is_too_long_is_cut_as_truncation_says(kind: str) -> None:
    words = encoder_decoders.tokenizer(kind)
    whole = encoded(words, LONG).rows[0]
    prompt, answer = len(whole.input_ids), len(whole.labels)
    assert prompt > answer + 1
    # The prompt alone is too long.
    cut = encoded(words, LONG, SHORT, max_length=answer)
    opening = kind == "bart"
    assert cut.rows[0].input_ids == whole.input_ids[:opening] + whole.input_ids[prompt - answer + opening :]
    assert cut.rows[0].labels == whole.labels and cut.rows[0].prompt_length == answer
    assert (cut.prompt_cut, cut.completion_cut, cut.dropped) == ([LONG], [], [])
    for truncation in ("completion", "drop"):
        dropped = encoded(words, LONG, SHORT, max_length=answer, truncation=truncation)
        assert (dropped.dropped, len(dropped.rows)) == ([LONG], 1)
    # The completion, too; its end goes, and its end token with it.
    both = encoded(words, LONG, SHORT, max_length=answer - 1)
    assert both.rows[0].labels == whole.labels[:-1] and len(both.rows[0].input_ids) == answer - 1
    assert (both.prompt_cut, both.completion_cut) == ([LONG], [LONG])
    # The completion alone.
    turned = Example(LONG.completion, LONG.prompt, "d.jsonl:3")
    for truncation in ("prompt", "completion"):
        (row,) = encoded(words, turned, max_length=answer, truncation=truncation).rows
        assert row.input_ids == words(turned.prompt)["input_ids"] and len(row.labels) == answer
    with pytest.raises(ValueError, match="drops every one of the 1 rows"):
        encoded(words, turned, max_length=answer, truncation="drop")


def test_a_prompt_of_which_nothing_would_stay_is_dropped() -> None:
    words = encoder_decoders.tokenizer("bart")
    assert encoded(words, LONG, max_length=3).rows[0].input_ids[1] not in words.all_special_ids
    with pytest.raises(ValueError, match="max_length=2 .* drops every one"):
        encoded(words, LONG, max_length=2)


def test_examples_before_a_question_are_counted_by_the_longer_side() -> None:
    words = encoder_decoders.tokenizer("t5")
    length, whole = row_length(words, encoder_decoder=True), encoded(words, LONG).rows[0]
    assert length(LONG) == len(whole.input_ids) == length(Example(LONG.completion, LONG.prompt))


def test_a_batch_pads_each_side_to_its_own_width() -> None:
    rows = [Pair([5, 6, 7, 2], [8, 2], 4), Pair([5, 2], [8, 9, 2], 2)]
    batch = collate(rows, 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [5, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[8, 2, IGNORE], [8, 9, 2]]
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert padded_tokens(rows) == batch["input_ids"].numel() + batch["labels"].numel() == 14


def test_batches_by_tokens_hold_both_sides_with_their_padding() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 20, (50, 2), generator=draw).tolist()
    rows = [Pair([1] * prompt, [2] * answer, prompt) for prompt, answer in sizes]
    for processes in (1, 2):
        parts = [batch for share in padded_batches(rows, 60, processes) for batch in share]
        assert all(padded_tokens(batch) <= 60 for batch in parts)
        assert sorted(map(id, rows)) == sorted(id(row) for batch in parts for row in batch if row.labelled)
    assert any(len(batch) > 1 for batch in parts)
    assert group_by_length(range(3), [row.tokens for row in rows[:3]], 1)[0] == max(
        range(3), key=lambda i: rows[i].tokens
    )


def test_a_row_of_which_nothing_counts_keeps_its_sides() -> None:
    row = without_labels(Pair([5, 2], [8, 9, 2], 2))
    assert row == Pair([5, 2], [IGNORE] * 3, 2) and row.labelled == 0


def test_a_row_is_shown_with_its_sides_apart() -> None:
    words = encoder_decoders.tokenizer("t5")
    assert marked(encoded(words, SHORT).rows[0], words) == "encoder: The dog</s>\ndecoder: [[It sings</s>]]"
