"""Which tokens count: the turns that were asked for, exactly or not at all; the prompt where it shall; all of a plain text."""

import random
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tokenizer_kinds as kinds
from chat_templates import TEMPLATES, chat_template
from test_tokens import CHATTING, KINDS, random_pair

from fastlora.data.examples import DataError, Example
from fastlora.data.formats import example
from fastlora.data.prompts import encode_prompt
from fastlora.data.rows import TURNS, Row, encode, reference, turn_end
from fastlora.evaluation import evaluate
from fastlora.language_model_loss import IGNORE

MARKS = ("{% generation %}", "{% endgeneration %}")
SAID = ["The cat?", "It runs.", "The dog?", "It sings.", "The owl?", "It hides."]
MESSAGES = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, SAID, strict=True)]
DIALOGUE = Example(MESSAGES[:-1], SAID[-1], "data:1")
TOOL = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "count", "arguments": {"of": "legs"}}}
CALLS = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "Four."},
]
SAYING = (
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '#</s>' }}"
)
TOOL_TEMPLATE = (
    "{% if tools %}<|user|>tools {{ tools | tojson }}</s>{% endif %}"
    "{% for m in messages %}{{ '<|user|>' + m.role + '\n' }}{% if m.role == 'assistant' %}@{% endif %}"
    + SAYING
    + "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|user|>assistant\n@' }}{% endif %}"
)
MARKED_TOOL_TEMPLATE = TOOL_TEMPLATE.replace(
    SAYING, f"{{% if m.role == 'assistant' %}}{MARKS[0]}{SAYING}{MARKS[1]}{{% else %}}{SAYING}{{% endif %}}"
)


@pytest.fixture(scope="module", params=CHATTING)
def chatting(request) -> Any:
    return KINDS[request.param]()


@pytest.fixture
def words() -> Any:
    words = kinds.byte_level(add_prefix_space=False, template="<s> $A")
    words.chat_template = chat_template("ChatML")
    return words


def row_of(words: Any, given: Example, **options: Any) -> Row:
    (row,) = encode([given], words, 10**6, **options).rows
    return row


def counted(words: Any, row: Row) -> list[str]:
    """The text of each run of labels, without spaces, which decoders add and drop."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (IGNORE, token)
        if label == IGNORE:
            runs.append([])
        else:
            runs[-1].append(token)
    return ["".join(words.decode(run).split()) for run in runs if run]


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_turns_count_as_where_the_template_marks_them(chatting, name):
    """The marks are the law; the last turn's end may be the end token's, which the template has not."""
    chatting.chat_template = chat_template(name)
    plain = row_of(chatting, DIALOGUE, train_on_turns="all")
    assert plain.input_ids == row_of(chatting, DIALOGUE).input_ids, "labels change and no token does"
    assert plain.input_ids[: plain.prompt_length] == encode_prompt(chatting, MESSAGES[:-1])
    chatting.chat_template = chat_template(name, *MARKS)
    marked = row_of(chatting, DIALOGUE)
    assert counted(chatting, plain)[:-1] == counted(chatting, marked)[:-1]
    assert len(counted(chatting, plain)) == 3 and "Itruns." in counted(chatting, plain)[0]
    border = marked.prompt_length
    if name != "Llama 2":  # whose generation prompt is empty, so that the space before an answer is the model's
        assert plain.labels[:border] == marked.labels[:border]


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_of_random_words_are_exact_or_refused(chatting, name):
    draw, exact = random.Random(0), 0
    for number in range(20):
        texts = [text for _ in range(3) for text in random_pair(draw)]
        said = [{"role": one["role"], "content": text} for one, text in zip(MESSAGES, texts, strict=True)]
        given = Example(said[:-1], texts[-1], f"data:{number}")
        chatting.chat_template = chat_template(name)
        try:
            row = row_of(chatting, given, train_on_turns="all")
        except DataError as error:
            assert f"data:{number}: messages[" in str(error) and "a token reaches across its border" in str(error)
            continue
        chatting.chat_template = chat_template(name, *MARKS)
        marked = row_of(chatting, given)
        assert counted(chatting, row)[:-1] == counted(chatting, marked)[:-1]
        if name != "Llama 2":
            assert row.labels[: row.prompt_length] == marked.labels[: marked.prompt_length]
        exact += 1
    assert exact >= 10


@pytest.mark.parametrize("marks", [("", ""), MARKS], ids=["plain", "marked"])
def test_the_turns_that_are_asked_for_count(words, marks):
    words.chat_template = chat_template("ChatML", *marks)
    every, last = ["Itruns.</s>", "Itsings.</s>", "Ithides.</s>"], ["Ithides.</s>"]
    auto = every if marks[0] else last
    assert [counted(words, row_of(words, DIALOGUE, train_on_turns=one)) for one in TURNS] == [auto, last, every]


@pytest.mark.parametrize("marks", [("", ""), MARKS], ids=["plain", "marked"])
def test_the_turns_that_a_row_names_count(words, marks):
    words.chat_template = chat_template("ChatML", *marks)
    completion = example({"prompt": MESSAGES[:3], "completion": MESSAGES[3:]})
    assert counted(words, row_of(words, completion)) == ["Itsings.</s>", "Ithides.</s>"]
    assert counted(words, row_of(words, completion, train_on_turns="last")) == ["Ithides.</s>"]
    single = example({"prompt": MESSAGES[:5], "completion": MESSAGES[5:]})
    for option in TURNS:
        assert counted(words, row_of(words, single, train_on_turns=option)) == ["Ithides.</s>"]
    light = example({"messages": [*MESSAGES[:5], {**MESSAGES[5], "weight": 0}]})
    row = row_of(words, light)
    assert counted(words, row) == ["Itruns.</s>", "Itsings.</s>"]
    assert row.input_ids[: row.prompt_length] == encode_prompt(words, MESSAGES[:5])
    with pytest.raises(DataError, match="its last turn does not count, and train_on_turns='last' counts no other"):
        row_of(words, light, train_on_turns="last")


def test_a_row_whose_last_turn_does_not_count_is_cut_within_its_size(words):
    light = example({"messages": [*MESSAGES[:5], {**MESSAGES[5], "weight": 0}]})
    whole = row_of(words, light)
    for truncation in ("prompt", "completion"):
        (row,) = encode([light], words, 40, truncation).rows
        assert len(row.input_ids) <= 40 and row.prompt_length <= len(row.input_ids) < len(whole.input_ids)
        assert row.labelled and counted(words, row)


def test_a_template_that_renders_earlier_turns_otherwise_is_refused(words):
    """As those that leave an earlier turn's reasoning out, or write the end token behind the last turn only."""
    plain = chat_template("ChatML")
    words.chat_template = plain.replace(
        "{{ m.content }}", "{{ m.content }}{{ '!' if loop.last and m.role == 'assistant' else '' }}"
    )
    assert counted(words, row_of(words, DIALOGUE, train_on_turns="last")) == ["Ithides.!</s>"]
    with pytest.raises(
        ValueError, match=r"data:1: the chat template renders messages\[1\] otherwise where more"
    ) as caught:
        row_of(words, DIALOGUE, train_on_turns="all")
    assert not isinstance(caught.value, DataError) and "train_on_turns='last'" in str(caught.value)


def test_a_border_between_tokens_is_found_where_the_turn_before_is_cut_otherwise():
    """At the end of a text two line breaks are one token of GPT-2's, before a word two: their end is a border in both."""
    words = tiny.tokenizer()
    words.chat_template = chat_template("Llama 3").replace("m.content | trim", "m.content")
    row = row_of(words, DIALOGUE, train_on_turns="all")
    assert counted(words, row) == ["Itruns.</s>", "Itsings.</s>", "Ithides.</s>"]
    assert row.input_ids[: row.prompt_length] == encode_prompt(words, MESSAGES[:-1])
    begun = encode_prompt(words, MESSAGES[:1])
    assert row.labels[: len(begun)] == [IGNORE] * len(begun)


def test_what_a_template_cannot_write_is_a_bad_line(words):
    """A template for lists of texts and images writes nothing of a text, and trains on ends alone."""
    words.chat_template = chat_template("ChatML").replace(
        "{{ m.content }}", "{% for part in m.content %}{% if part is mapping %}{{ part.text }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="data:1: the chat template writes nothing of what the assistant says"):
        row_of(words, DIALOGUE)
    words.chat_template = chat_template("ChatML").replace("{{ m.content }}", "{{ m.content + 1 }}")
    with pytest.raises(DataError, match="data:1: the chat template cannot write it: "):
        row_of(words, DIALOGUE)
    words.chat_template = chat_template("ChatML")
    assert counted(words, row_of(words, replace(DIALOGUE, completion="<s>"))) == ["<s></s>"]


@pytest.mark.parametrize("marks", [("", ""), MARKS], ids=["plain", "marked"])
def test_a_message_that_a_template_leaves_out_is_told(words, marks):
    """As templates do that ask for the roles they know, one by one."""
    system = {"role": "system", "content": "Be brief."}
    words.chat_template = chat_template("ChatML", *marks)
    assert "Be brief." in words.decode(row_of(words, replace(DIALOGUE, prompt=[system, *DIALOGUE.prompt])).input_ids)
    whole = words.chat_template
    words.chat_template = whole.replace("{{ m.content }}", "{% if m.role != 'system' %}{{ m.content }}{% endif %}")
    assert words.chat_template != whole
    with pytest.raises(DataError, match=r"data:1: the chat template writes nothing of messages\[0\], by 'system'"):
        row_of(words, replace(DIALOGUE, prompt=[system, *DIALOGUE.prompt]))
    assert row_of(words, DIALOGUE).labelled > 0
    assert turn_end(words, [system, *MESSAGES[:1]]) == words.eos_token_id, "an answer ends all the same"
    words.chat_template = whole.replace("{{ m.content }}", "{{ m.content | tojson }}")
    quoted = {"role": "system", "content": '{"a":1}'}
    assert row_of(words, replace(DIALOGUE, prompt=[quoted, *DIALOGUE.prompt])).labelled > 0
    words.chat_template = whole.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    thought = {"role": "assistant", "content": "<think>hm</think>"}
    assert row_of(words, replace(DIALOGUE, prompt=[*DIALOGUE.prompt[:1], thought, *DIALOGUE.prompt])).labelled > 0


def test_what_was_thought_and_is_left_out_is_told(words, caplog):
    thought = example({"messages": [MESSAGES[0], {**MESSAGES[1], "reasoning_content": "It has legs."}]}, "data:2")
    encode([DIALOGUE, thought], words, 10**6, train_on_turns="last")
    (record,) = caplog.records
    told = "the tokenizer's chat template does not read reasoning_content: left out in 1 of 2 rows (the first: data:2)"
    assert record.getMessage() == told
    caplog.clear()
    words.chat_template = words.chat_template.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}")
    encode([DIALOGUE, thought], words, 10**6, train_on_turns="last")
    assert not caplog.records


def test_that_only_the_last_turn_counts_is_told_where_nobody_asked_for_it(words, caplog):
    short = Example(MESSAGES[:1], SAID[1], "data:2")
    weighed = replace(DIALOGUE, turns=(5,))
    text = Example("a ", "b", "data:3")
    encode([short, DIALOGUE, text, weighed], words, 10**6)
    (record,) = caplog.records
    assert record.getMessage() == (
        "train_on_turns=auto: the chat template marks no turns: of several turns of the assistant's only the last counts,"
        " in 1 of 4 rows (the first: data:1); train_on_turns=all counts every one"
    )
    caplog.clear()
    encode([short, text, weighed], words, 10**6)
    for options in ({"train_on_turns": "last"}, {"train_on_turns": "all"}, {"completion_only_loss": False}):
        encode([DIALOGUE], words, 10**6, **options)
    words.chat_template = words.chat_template.replace("{{ m.content }}", f"{MARKS[0]}{{{{ m.content }}}}{MARKS[1]}")
    encode([DIALOGUE], words, 10**6)
    assert "marks no turns" not in caplog.text


def test_marks_that_are_no_turns_are_not_chosen_from(words):
    """Two blocks a turn: all of them count, or which are the last turn's cannot be told."""
    twice = chat_template("ChatML", *MARKS).replace(
        MARKS[0], "{% generation %}{{ 'a' }}{% endgeneration %}{{ 'b' }}{% generation %}"
    )
    words.chat_template = twice
    assert len(counted(words, row_of(words, DIALOGUE))) == 6
    with pytest.raises(DataError, match="data:1: the chat template marks 6 parts of 3 turns"):
        row_of(words, DIALOGUE, train_on_turns="last")


def test_a_turn_with_nothing_before_it_is_told(words):
    opened = Example([MESSAGES[1], *MESSAGES[:1]], "It runs.", "data:4")
    assert counted(words, row_of(words, opened)) == ["Itruns.</s>"]
    with pytest.raises(DataError, match=r"data:4: messages\[0\] is the assistant's: nothing stands before it"):
        row_of(words, opened, train_on_turns="all")


def test_the_generation_prompt_does_not_count(words):
    """trl#4147: without it the header of the answer had labels, and the answer's own border was elsewhere."""
    row = row_of(words, example({"prompt": MESSAGES[:1], "completion": MESSAGES[1:2]}))
    assert words.decode(row.input_ids[: row.prompt_length]).endswith("assistant\n")
    assert counted(words, row) == ["Itruns.</s>"]


@pytest.mark.parametrize("truncation", ["prompt", "completion", "drop"])
def test_no_row_is_left_without_a_label(words, truncation):
    """trl#6668: all labels were cut away, and the loss was 0.0 without a word."""
    long = Example("The owl hides. " * 40 + "What?", " It hides.", "data:1")
    fits = Example("What?", " It runs.", "data:2")
    for size in (8, 16, 32, 64):
        encoded = encode([long, fits], words, size, truncation)
        assert all(row.labelled >= 1 for row in encoded.rows) and len(encoded.rows) + len(encoded.dropped) == 2
        assert truncation == "prompt" or encoded.dropped == [long]
        if truncation != "prompt":
            with pytest.raises(ValueError, match=f"max_length={size} .* drops every one of the 1 rows"):
                encode([long], words, size, truncation)


@pytest.mark.parametrize("marks", [("", ""), MARKS], ids=["plain", "marked"])
def test_the_prompt_counts_where_it_shall(words, marks):
    words.chat_template = chat_template("ChatML", *marks)
    for given in (DIALOGUE, Example("The cat?", " It runs.", "data:2")):
        row, without = row_of(words, given, completion_only_loss=False), row_of(words, given)
        assert (row.input_ids, row.prompt_length) == (without.input_ids, without.prompt_length)
        end = max(i for i, label in enumerate(without.labels) if label != IGNORE) + 1
        assert row.labels == [IGNORE, *row.input_ids[1:end], *[IGNORE] * (len(row.input_ids) - end)]
        assert row.labelled == end - 1


@pytest.mark.parametrize("name", KINDS)
def test_all_of_a_plain_text_counts(name):
    words = KINDS[name]()
    row = row_of(words, example({"text": "The cat runs."}))
    tokens = words("The cat runs.", add_special_tokens=False)["input_ids"]
    end = [] if words.eos_token_id is None else [words.eos_token_id]
    assert row.input_ids == encode_prompt(words, "") + tokens + end
    assert row.prompt_length == len(encode_prompt(words, "")) and row.labels == [IGNORE, *row.input_ids[1:]]
    if "ends every text" not in name and row.prompt_length:
        assert row.input_ids[:-1] == words("The cat runs.")["input_ids"] or not end


def test_a_plain_text_that_is_too_long_loses_its_end(words, caplog):
    text = Example("", "The cat runs. " * 20, "data:1")
    whole = row_of(words, text)
    for truncation in ("prompt", "completion"):
        (row,) = (encoded := encode([text], words, 16, truncation)).rows
        assert row.input_ids == whole.input_ids[:16] and row.labelled == 15
        assert encoded.completion_cut == [text] and not encoded.prompt_cut
    assert "cut the end of the completion" in caplog.text
    with pytest.raises(ValueError, match="drops every one"):
        encode([text], words, 16, "drop")


def test_a_text_without_a_token_is_a_bad_line():
    words = tiny.tokenizer()
    words.backend_tokenizer.normalizer = kinds.normalizers.Replace("x", "")
    with pytest.raises(DataError, match="data:1: text: the tokenizer has no token for it"):
        encode([Example("", "x", "data:1")], words, 16)


def test_tools_and_calls_reach_the_template(words):
    words.chat_template = TOOL_TEMPLATE
    given = example({"messages": CALLS, "tools": [TOOL]}, "data:1")
    row = row_of(words, given)
    text = words.decode(row.input_ids)
    assert '<|user|>tools [{"type": "function"' in text and '{"name": "count", "arguments": {"of": "legs"}}#' in text
    assert counted(words, row) == ["Four.#</s>"]
    call = '{"name":"count","arguments":{"of":"legs"}}#</s>'
    assert counted(words, row_of(words, given, train_on_turns="all")) == [call, "Four.#</s>"]
    words.chat_template = MARKED_TOOL_TEMPLATE
    assert row_of(words, given).input_ids == row.input_ids
    assert counted(words, row_of(words, given)) == [call, "Four.#</s>"]


def test_a_template_of_its_own_for_tools_is_used(words):
    words.chat_template = {"default": chat_template("ChatML"), "tool_use": TOOL_TEMPLATE}
    assert "tools [" in words.decode(row_of(words, example({"messages": CALLS, "tools": [TOOL]})).input_ids)
    assert "#" not in words.decode(row_of(words, DIALOGUE).input_ids)


def test_what_a_template_does_not_read_is_refused(words):
    for fields, name in (
        ({"messages": MESSAGES, "tools": [TOOL]}, "tools"),
        ({"messages": [{**one, "content": one.get("content", "")} for one in CALLS]}, "tool_calls"),
        ({"messages": CALLS}, "tool_calls"),
    ):
        with pytest.raises(
            ValueError, match=f"data:1: the row has {name}, which the tokenizer's chat template does not"
        ):
            row_of(words, example(fields, "data:1"))


def test_an_answer_is_held_against_all_that_the_turn_says(words, tmp_path):
    words.chat_template = TOOL_TEMPLATE
    given = example({"messages": CALLS[:2], "tools": [TOOL]})
    assert reference(given, row_of(words, given), words) == '{"name": "count", "arguments": {"of": "legs"}}#'
    assert reference(DIALOGUE, row_of(words, DIALOGUE), words) == SAID[-1]


def test_plain_text_is_measured_without_answers():
    sizes = {"vocab_size": 420, "max_position_embeddings": 64}
    model, words = tiny.llama(**sizes), tiny.tokenizer()
    texts = [Example("", "The cat runs.", "data:1"), Example("", "The owl hides.", "data:2")]
    result = evaluate(model, words, texts, generations=False)
    assert (
        result.rows == 2
        and result.exact_match is None
        and result.tokens == sum(row.labelled for row in encode(texts, words, 64).rows)
    )
    with pytest.raises(ValueError, match="rows of plain text have no prompt to answer"):
        evaluate(model, words, texts)


def test_wrong_options_are_named(words):
    with pytest.raises(ValueError, match="train_on_turns='every': expected one of auto, last, all"):
        encode([DIALOGUE], words, 64, train_on_turns="every")
    broken = replace(DIALOGUE, prompt=[{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": []}])
    with pytest.raises(DataError, match=r"messages\[1\]: expected an object whose role and content are strings"):
        encode([broken], words, 64)
