"""What is left of a prompt that is too long: of messages the latest turns, in the template's own frame."""

from typing import Any

import pytest
import tokenizer_kinds as kinds
from chat_templates import TEMPLATES, chat_template

from fastlora.data.examples import Example
from fastlora.data.prompts import cut_prompt, encode_prompt
from fastlora.data.rows import Row, encode
from fastlora.language_model_loss import IGNORE

SYSTEM = {"role": "system", "content": "Be brief."}
PROMPT = [
    {"role": "user", "content": "The owl hides. Where is the owl?"},
    {"role": "assistant", "content": "In the tree."},
    {"role": "user", "content": "The cat runs. Who runs?"},
    {"role": "assistant", "content": "The cat."},
    {"role": "user", "content": "And what does the dog do, who has slept all day?"},
]


@pytest.fixture(scope="module")
def words() -> Any:
    return kinds.byte_level(add_prefix_space=False, template="<s> $A")


def row_of(words: Any, messages: list[Any], max_length: int = 4096, tools: Any = None, **options: Any) -> Row:
    """Without what follows the last label, which a row that is too long loses first."""
    (row,) = encode([Example(messages, "It sings.", tools=tools)], words, max_length, **options).rows
    while row.labels[-1] == IGNORE:
        row = Row(row.input_ids[:-1], row.labels[:-1], row.prompt_length)
    return row


# Llama 2's templates write what the system says into the first user's message; this small one does not.
WITH_SYSTEM = [(name, system) for name in TEMPLATES for system in ([], [SYSTEM]) if not system or name != "Llama 2"]


@pytest.mark.parametrize(("name", "system"), WITH_SYSTEM, ids=str)
def test_a_row_is_as_if_the_conversation_had_begun_later(words, name, system):
    words.chat_template = chat_template(name)
    later = [row_of(words, system + PROMPT[start:]) for start in (0, 2, 4)]
    lengths = [len(row.input_ids) for row in later]
    assert lengths[0] > lengths[1] > lengths[2]
    for max_length in range(lengths[2], lengths[0] + 1):
        row = row_of(words, system + PROMPT, max_length)
        expected = next(one for one in later if len(one.input_ids) <= max_length)
        assert (row.input_ids, row.labels, row.prompt_length) == (
            expected.input_ids,
            expected.labels,
            expected.prompt_length,
        )


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_message_loses_its_first_words_and_keeps_its_header(words, name):
    words.chat_template = chat_template(name)
    whole = row_of(words, PROMPT[-1:])
    text = words.decode(whole.input_ids)
    header, _, rest = text.partition("And")
    assert header and header in words.decode(row_of(words, PROMPT, 40).input_ids)
    row = row_of(words, PROMPT, len(whole.input_ids) - 5)
    assert len(row.input_ids) == len(whole.input_ids) - 5 and row.prompt_length == whole.prompt_length - 5
    left = words.decode(row.input_ids)
    assert left.startswith(header) and rest.endswith(left.removeprefix(header))
    assert [label for label in row.labels if label != IGNORE] == [label for label in whole.labels if label != IGNORE]


def test_where_the_frame_alone_would_fill_it_the_oldest_tokens_go(words):
    words.chat_template = chat_template("Llama 3")
    told = [{"role": "system", "content": "Be brief, and be kind, and never say what you do not know. " * 3}]
    whole = row_of(words, told + PROMPT[-1:])
    row = row_of(words, told + PROMPT[-1:], 30)
    assert row.input_ids == [words.bos_token_id, *whole.input_ids[-29:]]


def test_words_like_those_they_are_held_against(words):
    """What a message says is told from its frame by another first character than its own."""
    words.chat_template = chat_template("ChatML")
    for content in ("0 1 2 3 4 5 6 7 8 9", "a b c d e f g h i j", "", "  00"):
        prompt = [*PROMPT[:2], {"role": "user", "content": content}]
        later = row_of(words, prompt[2:])
        assert row_of(words, prompt, len(later.input_ids)).input_ids == later.input_ids


def test_a_template_that_refuses_words_leaves_the_oldest_to_go(words):
    refusal = (
        "{% for m in messages %}{% if m.content in ('0', 'a') %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    )
    words.chat_template = refusal + chat_template("ChatML")
    whole = row_of(words, PROMPT)
    assert row_of(words, PROMPT, 60).input_ids == whole.input_ids[-60:]
    later = "{% if messages[2:] and messages[2].content == '0' %}{{ raise_exception('no') }}{% endif %}"
    words.chat_template = later + chat_template("ChatML")
    assert row_of(words, PROMPT, 60).input_ids == whole.input_ids[-60:]


def test_a_call_of_tools_says_nothing(words):
    """The last message before the answer may be one."""
    words.chat_template = (
        "{% for m in messages %}<|user|>{{ m.role }} {{ m.content or m.tool_calls }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|user|>assistant {% endif %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    later = row_of(words, [*PROMPT[2:], call])
    assert row_of(words, [*PROMPT, call], len(later.input_ids)).input_ids == later.input_ids


def test_generation_cuts_as_training_does(words):
    words.chat_template = chat_template("Gemma")
    given = [SYSTEM, *PROMPT]
    ids = encode_prompt(words, given)
    completion = len(row_of(words, given).input_ids) - len(ids)
    for length in range(len(encode_prompt(words, [SYSTEM, PROMPT[-1]])), len(ids)):
        row = row_of(words, given, length + completion)
        assert cut_prompt(words, ids, length, given) == row.input_ids[: row.prompt_length]


def test_tools_stay(words):
    """A template writes them before the conversation."""
    words.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + chat_template("ChatML")
    tools = [{"type": "function", "function": {"name": "look", "description": "looks", "parameters": {}}}]
    later = row_of(words, PROMPT[2:], tools=tools)
    row = row_of(words, PROMPT, len(later.input_ids), tools=tools)
    assert row.input_ids == later.input_ids and "looks" in words.decode(row.input_ids)


def test_turns_that_are_cut_do_not_count(words):
    words.chat_template = chat_template("ChatML", "{% generation %}", "{% endgeneration %}")
    later = row_of(words, PROMPT[2:], train_on_turns="all")
    row = row_of(words, PROMPT, len(later.input_ids), train_on_turns="all")
    assert row.labels == later.labels and row.labelled < row_of(words, PROMPT, train_on_turns="all").labelled
